"""The chain of blocks: what a block hands on across its border.

Shapes: B batch, C channels, H x W or T positions.
"""

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.local.recompute import run_again
from ff_lightning.partition import Block, Hooked, Inputs, State
from ff_lightning.partition.block import main_output
from ff_lightning.partition.trace import evaluating

Norm = Literal["layer", "channel", "length", "none"]


def norm_for(norm: Norm, inputs: Inputs) -> Norm:
    """The norm for a kind of input: for tokens layer is channel, so that they do not see each other, nor padding."""
    return "channel" if norm == "layer" and (inputs.tokens or inputs.mask) else norm


def normalise(h: Tensor, norm: Norm, channel_dim: int, mask: Tensor | None = None) -> Tensor:
    """Normalise the output of a block, in its own dtype also where autocast widens a norm.

    Args:
        h: (B, ...), floating.
        norm: See `ff_lightning.LocalNet`.
        channel_dim: The dimension that counts channels.
        mask: For tokens (B, T, C) or (B, C, T): (B, T), bool, false at what is only padding and has no part in length.

    Returns:
        The same shape and dtype.
    """
    if norm == "channel":
        return F.layer_norm(h.movedim(channel_dim, -1), (h.shape[channel_dim],)).movedim(-1, channel_dim).to(h.dtype)
    if norm == "layer":
        return F.group_norm(h, 1).to(h.dtype)  # one group: a layer norm, in a third of the time on a CPU
    if norm == "length" and mask is not None:
        x = h.to(torch.promote_types(h.dtype, torch.float32)).masked_fill(~mask.unsqueeze(channel_dim), 0)
        count = mask.sum(1).clamp(min=1)[:, None, None] * h.shape[channel_dim]
        mean_square = x.square().sum((1, 2), keepdim=True) / count
        return (x * torch.rsqrt(mean_square + torch.finfo(h.dtype).eps)).to(h.dtype)
    if norm == "length":
        return F.rms_norm(h, h.shape[1:]).to(h.dtype)
    return h


def run_block(
    number: int,
    block: Block,
    state: State,
    norm: Norm,
    detach: bool,
    for_head: bool,
    mask: Tensor | None = None,
    call: Callable[[State], State] | None = None,
) -> tuple[State, Tensor]:
    """Run a block.

    Args:
        number: Of the block, for errors.
        block: The block.
        state: What the block before it handed on.
        norm: Between the blocks.
        detach: Whether the border behind the block is closed for gradients.
        for_head: Whether the output is asked for as the head sees it: as it is.
        mask: Of the positions (B, T) of its output, bool, false at what is only padding.
        call: Runs the block; None: as it is.

    Returns:
        What the next block sees, and the output with its graph, as a map (B, C, H, W); normalised unless for a head.

    Raises:
        ValueError: If the block does, with its name.
    """
    try:
        out = (call or block)(state)
    except (ValueError, IndexError) as error:  # an id that an embedding does not have
        raise ValueError(f"block {number} ({block.name}), batch of {len(main_output(state))}: {error}") from error
    rest = out[1:] if isinstance(out, tuple) else ()
    outside, features = hand_on(block, main_output(out), norm, detach, for_head, mask)
    if detach:
        rest = tuple(map(_detach, rest))
    return (outside, *rest) if rest else outside, features


def hand_on(
    block: Block, output: Tensor, norm: Norm, detach: bool, for_head: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the next block sees of the output of a block, and the output as it is asked for; see `run_block`."""
    if for_head:
        features = output if detach else output.view_as(output)  # hooks of a head are not to reach the next block
        outside = normalise(output.detach() if detach else output, norm, block.channel_dim, mask)
    else:
        features = normalise(output, norm, block.channel_dim, mask)
        outside = features.detach() if detach else features
    return outside, block.to_map(features)


def _normed(norm: Norm, channel_dim: int, mask: Tensor | None, state: State) -> State:
    """What a block handed on as it was, with its main output normalised."""
    main = normalise(main_output(state), norm, channel_dim, mask)
    return (main, *state[1:]) if isinstance(state, tuple) else main


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


OfBlock = Callable[[int, Tensor, Tensor | None], Tensor]
"""Is given the number of a block, its features, and the mask of their positions if there is one."""


@dataclass(frozen=True)
class Chain:
    """The blocks of a network, to be run one after the other."""

    blocks: Sequence[Block]
    hooked: Hooked | None
    """The network, if the blocks run as parts of its own forward."""
    inputs: Inputs
    norm: Norm
    for_head: bool = False
    """Whether features are as they are; else they are normalised."""
    mode: Callable[[int], AbstractContextManager[None]] = lambda k: nullcontext()
    """The mode of each block."""
    recompute: Sequence[bool] = ()
    """In windows of several blocks each runs again in backward, with the norm before it: whether it keeps products."""

    def run(
        self, values: Sequence[Tensor], of_block: OfBlock, borders: Container[int]
    ) -> Generator[Tensor, Tensor | None, None]:
        """What a function makes of one block after the other, called in the mode of the block.

        The next block runs when its result is asked for; blocks that run as parts of their network's own forward have
        all run before the first result.

        Where a mask of the samples (B,) is sent to it, the others do not go on to the next block.

        Args:
            values: What enters the network.
            of_block: The function.
            borders: The blocks whose output is handed on detached.
        """
        valid = self.inputs.valid(values)
        masks = [valid if self.inputs.covers(block.map_shape) else None for block in self.blocks]
        if self.hooked is not None:
            yield from self._results_of_hooks(self.hooked, values, of_block, borders, masks)
            return
        state = state_of(values)
        enter: Callable[[State], State] | None = None
        for k, block in enumerate(self.blocks):
            is_open = bool(self.recompute) and k not in borders
            call = partial(run_again, block, self.recompute[k], enter) if is_open or enter else block
            norm = "none" if is_open else self.norm  # it then belongs to the next block
            with self.mode(k):
                state, features = run_block(k, block, state, norm, k in borders, self.for_head, masks[k], call)
                enter = partial(_normed, self.norm, block.channel_dim, masks[k]) if is_open else None
                result = of_block(k, features, masks[k])
            del features  # neither the output of this block nor its loss is to be alive while the next one runs
            stay = yield result
            del result
            if stay is not None:
                state = _narrowed(state, stay)
                masks = [mask if mask is None else mask[stay] for mask in masks]

    def _results_of_hooks(
        self,
        hooked: Hooked,
        values: Sequence[Tensor],
        of_block: OfBlock,
        borders: Container[int],
        masks: Sequence[Tensor | None],
    ) -> list[Tensor]:
        results: list[Tensor] = []

        def visit(k: int, output: Tensor) -> Tensor:
            outside, features = hand_on(self.blocks[k], output, self.norm, k in borders, self.for_head, masks[k])
            results.append(of_block(k, features, masks[k]))
            return outside

        try:
            hooked.run(lambda: self.inputs.call(hooked.model, values), visit, len(self.blocks), mode=self.mode)
        except IndexError as error:  # an id that an embedding does not have
            raise ValueError(f"{type(hooked.model).__name__}: {error}") from error
        return results


def state_of(values: Sequence[Tensor]) -> State:
    """What enters the first block."""
    return tuple(values) if len(values) > 1 else values[0]


def _narrowed(state: State, stay: Tensor) -> State:
    """The state of some of the samples; what crosses a border besides its main output may belong to no sample."""
    if isinstance(state, Tensor):
        return state[stay]
    of_samples = (isinstance(part, Tensor) and part.ndim > 0 and len(part) == len(stay) for part in state)
    return tuple(part[stay] if is_one else part for part, is_one in zip(state, of_samples, strict=True))


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules without a graph and in eval mode: neither weights nor running statistics move."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        yield
