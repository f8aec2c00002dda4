"""Which values are alive at each place between the operations of a network, and what is made of what."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx, nn

from ff_lightning.partition.ops import Op, is_convolution, is_embedding, is_linear, output_widths, permutes


@dataclass(frozen=True)
class Flow:
    """Operations in order, from the inputs to one result. Cut `p` lies before operation number `p`.

    Attributes:
        model: The network.
        ops: The operations.
        inputs: The nodes that stand for the inputs, the main one first.
        result: The value that they all lead to.
        examples: The inputs that were run.
    """

    model: nn.Module
    ops: tuple[Op, ...]
    inputs: tuple[fx.Node, ...]
    result: fx.Node
    examples: tuple[Tensor, ...]

    @property
    def input(self) -> fx.Node:
        """The node that stands for the main input: images, say."""
        return self.inputs[0]

    @property
    def example(self) -> Tensor:
        """The main input that was run."""
        return self.examples[0]

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """The number of each operation."""
        return {op.node: i for i, op in enumerate(self.ops)}

    @cached_property
    def last_use(self) -> dict[fx.Node, int]:
        """The last operation that uses a value; their number for the result."""
        last = {node: i for i, op in enumerate(self.ops) for node in op.inputs}
        last[self.result] = len(self.ops)
        return last

    @cached_property
    def _alive(self) -> list[tuple[fx.Node, ...]]:
        alive = [*self.inputs]
        at = [tuple(alive)]
        for i, op in enumerate(self.ops):
            alive = [node for node in (*alive, op.node) if self.last_use.get(node, -1) > i]
            at.append(tuple(alive))
        return at

    @cached_property
    def _led(self) -> set[fx.Node]:
        """The values from which a gradient path leads to the result."""
        led = {self.result}
        for op in reversed(self.ops):
            if op.passes_gradients and (op.node in led or op.changes in led):
                led.update((op.node, *op.inputs))
        return led

    @cached_property
    def _learnt(self) -> set[fx.Node]:
        """The values that a gradient can come from or go to: of the main input or of weights, not of a mask alone."""
        learnt = {self.input} if self.example.is_floating_point() else set[fx.Node]()
        for op in self.ops:
            if op.passes_gradients and (op.learns or not learnt.isdisjoint(op.inputs)):
                learnt.update((op.node, op.node if op.changes is None else op.changes))
        return learnt

    def alive(self, cut: int) -> tuple[fx.Node, ...]:
        """The values made before a cut and used behind it."""
        return self._alive[cut]

    def crossing(self, cut: int) -> list[fx.Node]:
        """The tensors that are alive at a cut, but for those that only travel along, such as a mask."""
        return [node for node in self.alive(cut) if self.shape(node) is not None and node in self._learnt]

    def can_cut(self, cut: int) -> bool:
        """Whether all values that are alive at a cut can cross it by themselves."""
        return not any(node in self.index and self.ops[self.index[node]].is_bundle for node in self.alive(cut))

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Shape of a value for the example, or None where it is not a tensor."""
        if node in self.inputs:
            return tuple(self.examples[self.inputs.index(node)].shape)
        return self.ops[self.index[node]].shape

    def is_map(self, node: fx.Node) -> bool:
        """Whether a value holds features for each sample of the batch, of a kind that a loss can be computed from.

        Windows of a map or rows of tokens that are counted as samples of their own are not.
        """
        shape = self.shape(node) or ()
        return len(shape) >= 2 and shape[0] == len(self.example) and node in self._learnt

    def is_feature_map(self, cut: int) -> bool:
        """Whether a single tensor crosses a cut, with features for each image."""
        crossing = self.crossing(cut)
        return len(crossing) == 1 and self.can_cut(cut) and self.is_map(crossing[0])

    def main(self, start: int, end: int) -> fx.Node | None:
        """The value that a unit is trained by: the last one alive behind it that all of its layers lead to.

        None where there is no such value, so that part of the unit would never be trained.
        """
        if not self.can_cut(end):
            return None
        reached: dict[fx.Node, int] = {}  # each value -> the layers of the unit that lead to it, one bit for each
        layers = 0
        for op in self.ops[start:end]:
            behind = 0
            for node in op.inputs:
                behind |= reached.get(node, 0)
            if op.learns and op.node in self._led:
                behind |= 1 << layers
                layers += 1
            if op.passes_gradients:
                reached[op.node] = behind
            if op.changes is not None:
                reached[op.changes] = reached.get(op.changes, 0) | behind
        every = (1 << layers) - 1
        fitting = [node for node in self.alive(end) if reached.get(node) == every and self.is_map(node)]
        return fitting[-1] if fitting else None

    def channel_dim(self, node: fx.Node) -> int:
        """Which dimension of a value counts channels.

        Behind a convolution it is dimension 1, behind a linear layer or an embedding the last one, until the dimensions
        are permuted.
        Else it is the one whose extent is the output width of the last layer before; where that fits none or several
        of them, dimension 1 of a map and the last one of a row of tokens.
        """
        shape = self.shape(node) or ()
        cut = self.index[node] + 1 if node in self.index else 0
        last = next((i for i in reversed(range(cut)) if self.ops[i].weights), None)
        since: Sequence[Op] = () if last is None else self.ops[last:cut]
        in_order = bool(since) and not any(permutes(self.model, op) for op in since)
        if in_order and is_convolution(self.model, since[0]):
            return 1
        widths = output_widths(self.model, since[0]) if since else set[int]()
        fitting = [dim for dim in range(1, len(shape)) if shape[dim] in widths]
        last_dim = in_order and (is_linear(self.model, since[0]) or is_embedding(self.model, since[0]))
        if last_dim and len(shape) - 1 in fitting:
            return len(shape) - 1
        return fitting[0] if len(fitting) == 1 else (len(shape) - 1 if len(shape) == 3 else 1)

    def area(self, node: fx.Node) -> int:
        """Number of positions of a value: H * W of a map, N of a row of tokens."""
        shape = self.shape(node) or ()
        return math.prod(shape[1:]) // shape[self.channel_dim(node)]
