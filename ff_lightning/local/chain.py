"""The chain of blocks: what a block hands on across its border.

Shapes: B batch, C channels, H x W positions.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.partition import Block, State
from ff_lightning.partition.block import main_output
from ff_lightning.partition.trace import evaluating

Norm = Literal["layer", "channel", "length", "none"]


def normalise(h: Tensor, norm: Norm, channel_dim: int) -> Tensor:
    """Normalise the output of a block, in its own dtype also where autocast widens a norm.

    Args:
        h: (B, ...), floating.
        norm: See `ff_lightning.LocalNet`.
        channel_dim: The dimension that counts channels.

    Returns:
        The same shape and dtype.
    """
    if norm == "layer":
        return F.group_norm(h, 1).to(h.dtype)  # one group: a layer norm, in a third of the time on a CPU
    if norm == "channel":
        return F.layer_norm(h.movedim(channel_dim, -1), (h.shape[channel_dim],)).movedim(-1, channel_dim).to(h.dtype)
    if norm == "length":
        return F.rms_norm(h, h.shape[1:]).to(h.dtype)
    return h


def run_block(
    number: int, block: Block, state: State, norm: Norm, detach: bool, for_head: bool
) -> tuple[State, Tensor]:
    """Run a block.

    Args:
        number: Of the block, for errors.
        block: The block.
        state: What the block before it handed on.
        norm: Between the blocks.
        detach: Whether the border behind the block is closed for gradients.
        for_head: Whether the output is asked for as the head sees it: as it is.

    Returns:
        What the next block sees, and the output with its graph, as a map (B, C, H, W); normalised unless for a head.

    Raises:
        ValueError: If the block does, with its name.
    """
    try:
        out = block(state)
    except ValueError as error:
        raise ValueError(f"block {number} ({block.name}), batch of {len(main_output(state))}: {error}") from error
    rest = out[1:] if isinstance(out, tuple) else ()
    main = main_output(out)
    if for_head:
        features, outside = main, normalise(main.detach() if detach else main, norm, block.channel_dim)
    else:
        features = normalise(main, norm, block.channel_dim)
        outside = features.detach() if detach else features
    if detach:
        rest = tuple(map(_detach, rest))
    return (outside, *rest) if rest else outside, block.to_map(features)


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules without a graph and in eval mode: neither weights nor running statistics move."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        yield
