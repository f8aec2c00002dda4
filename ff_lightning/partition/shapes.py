"""What the values of a traced network are for one example: their shapes, and which of them are tensors at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ff_lightning.partition.inputs import Example, Inputs
from ff_lightning.partition.trace import evaluating, first_line, path

_SIZES_TO_TRY = (224, 32, 28, 64, 96, 8)  # pixels, for a model whose input size nobody told us
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))


@dataclass
class Values:
    """What the operations of a network return for an example.

    Attributes:
        shapes: Of each tensor.
        floating: The tensors that can carry a gradient.
        bundles: The values that can hold tensors without being one, such as tuples of tensors.
        facts: What is only read off a tensor: its device, dtype or size.
    """

    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    floating: set[fx.Node] = field(default_factory=set)
    bundles: set[fx.Node] = field(default_factory=set)
    facts: dict[fx.Node, Any] = field(default_factory=dict)


class _Reader(fx.Interpreter):
    """Runs the graph and notes what comes out of each operation."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.values = Values()
        self.current: fx.Node | None = None
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        if isinstance(value, Tensor):
            if value.numel() == 0:
                raise RuntimeError(f"empty map of shape {tuple(value.shape[1:])}")
            self.values.shapes[n] = tuple(value.shape)
            if value.is_floating_point() or value.is_complex():
                self.values.floating.add(n)
        elif not _is_plain(value):
            self.values.bundles.add(n)
        elif n.target is getattr or n.target in ("size", "dim", "numel"):
            self.values.facts[n] = tuple(value) if isinstance(value, torch.Size) else value
        return value


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple | list) else isinstance(value, _PLAIN)


def read_values(model: nn.Module, graph: fx.Graph, examples: Sequence[Tensor]) -> Values:
    """What the network makes of inputs in evaluation mode.

    Raises:
        ValueError: If the example does not pass through the network; the module that failed is named.
    """
    reader = _Reader(model, graph)
    try:
        with evaluating(model):
            reader.run(*(example.clone() for example in examples))
    except Exception as error:
        assert reader.current is not None
        what = "an image" if examples[0].ndim == 4 else "a sample"
        where = (path(reader.current) or (reader.current.name,))[-1]
        raise ValueError(
            f"{what} of shape {tuple(examples[0].shape[1:])} does not pass through {type(model).__name__}: {where!r} "
            f"failed ({first_line(error)}); give {what.split()[1]}s of another shape, or a network made for this one"
        ) from error
    return reader.values


def materialise(model: nn.Module, example: Example | None) -> None:
    """Let lazy modules take their shape from the example.

    Raises:
        ValueError: If there are any, and no example.
    """
    lazy = nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer
    if any(isinstance(state, lazy) for state in (*model.parameters(), *model.buffers())):
        if example is None:
            raise ValueError("give `example`: lazy modules of the network take their shape from it")
        with evaluating(model):
            called = Inputs.of(model, example)
            called.call(model, called.values(example))


def default_example(model: nn.Module, graph: fx.Graph) -> Tensor:
    """A sample for a model whose input shape was not given: tried from the most usual size down."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, *_CONVOLUTIONS))), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, **kind)
    if isinstance(first, nn.Embedding):
        return torch.zeros(1, 8, dtype=torch.int64, device=like.device)
    channels = first.in_channels if first is not None else 3
    axes = 1 + _CONVOLUTIONS.index(type(first)) if type(first) in _CONVOLUTIONS else 2
    problem: ValueError | None = None
    for size in _SIZES_TO_TRY:
        example = torch.zeros(1, channels, *axes * [size], **kind)
        try:
            read_values(model, graph, [example])
            return example
        except ValueError as error:
            problem = error
    raise ValueError("give `example`, an input batch of the right shape") from problem
