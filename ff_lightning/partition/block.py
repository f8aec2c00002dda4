"""The units of local training, built from a traced network and the places where it is cut."""

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ff_lightning.memory import saved_for_backward
from ff_lightning.partition.features import Features, Op
from ff_lightning.partition.trace import Call, evaluating

State = Tensor | tuple[Any, ...]


class Block(nn.Module):
    """One unit of local training: a piece of a network that runs by itself.

    A block takes what is alive at the border before it and returns what is alive at the border behind it: a tensor,
    or a tuple of the block's main output and of everything that later blocks still need (a shortcut, say). So
    blocks run in order, each on what the one before it returned, without any knowledge of the network.

    The state dict of `body` has the keys of the original model, restricted to this block.

    Attributes:
        name: The module, or the first and the last module, of the original model that it holds.
        body: The operations, as a `torch.fx.GraphModule` over the modules of the original model.
        channel_dim: The dimension of the main output that counts channels.
        map_shape: (C, H, W) of the main output for the example; H counts tokens and W is 1 for a row of tokens.
        saved_bytes: What autograd keeps of one image for the backward of this block, parameters aside.
    """

    def __init__(self, name: str, body: fx.GraphModule, channel_dim: int) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.channel_dim = channel_dim
        self.map_shape: tuple[int, ...] = ()
        self.saved_bytes = 0

    def forward(self, state: State) -> State:
        """Run the block on the state before it; returns the state behind it."""
        return self.body(*state) if isinstance(state, tuple) else self.body(state)

    def to_map(self, output: Tensor) -> Tensor:
        """The main output as a map (B, C, H, W): tokens become (B, C, N, 1), vectors (B, C, 1, 1)."""
        output = output.movedim(self.channel_dim, 1)
        return output if output.ndim == 4 else output.reshape(*output.shape, *[1] * (4 - output.ndim))

    def extra_repr(self) -> str:
        """Name and shape, for the printed network."""
        return f"{self.name!r}, map_shape={self.map_shape}"


def build_blocks(features: Features, cuts: Sequence[int]) -> list[Block]:
    """Build the blocks between the cuts, over the modules of the model itself: nothing is copied.

    A module that no cut divides is called as it is; only modules with a cut inside are taken apart.

    Raises:
        ValueError: If a module with a cut inside does something else in training than in evaluation.
    """
    borders = [0, *cuts, len(features.ops)]
    whole = _undivided_calls(features, borders)
    of_model = set(features.model.modules())
    blocks: list[Block] = []
    inputs = [features.input]
    state: State = features.example
    for start, end in pairwise(borders):
        alive = features.alive(end)
        main = next(op.node for op in reversed(features.ops[start:end]) if op.shape is not None and op.node in alive)
        outputs = [main, *(node for node in alive if node is not main)]
        graph = _body(features, features.ops[start:end], whole, inputs, outputs)
        body = fx.GraphModule(features.model, graph)
        block = Block(_name(features, start, end), body, features.channel_dim(end))
        for module in set(block.modules()) - of_model:
            module.training = features.model.training
        with evaluating(block):
            state = _run_untouched(block, state)
        block.map_shape = tuple(block.to_map(main_output(state)).shape[1:])
        blocks.append(block)
        inputs = outputs
    return blocks


def _run_untouched(block: Block, state: State) -> State:
    """Run a block; from now on it works on a copy of each input that it changes in place.

    What crosses a border belongs to the block before it, whose backward may still need it.
    """
    values = state if isinstance(state, tuple) else (state,)
    copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in values)
    with torch.enable_grad(), saved_for_backward(left_out=block.parameters()) as saved:
        result = _detached(block(copies if isinstance(state, tuple) else copies[0]))
    block.saved_bytes = saved.peak // len(copies[0])
    graph = block.body.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, copy in zip(inputs, copies, strict=True):
        users = [block.body.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
        if isinstance(copy, Tensor) and (copy._version > 0 or any(getattr(user, "inplace", False) for user in users)):
            with graph.inserting_after(inputs[-1]):
                own = graph.call_method("clone", (node,))
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    block.body.recompile()
    return result


def main_output(state: State) -> Tensor:
    """The main output of the block before a border."""
    return state[0] if isinstance(state, tuple) else state


def _detached(state: State) -> State:
    return fx.node.map_aggregate(state, lambda value: value.detach() if isinstance(value, Tensor) else value)


def _undivided_calls(features: Features, borders: Sequence[int]) -> dict[str, Call]:
    """The module calls whose operations all lie in one block and that can be made again as one operation."""
    units: dict[str, set[int]] = {}
    inside: dict[str, set[fx.Node]] = {}
    for unit, (start, end) in enumerate(pairwise(borders)):
        for op in features.ops[start:end]:
            for call in op.calls:
                units.setdefault(call, set()).add(unit)
                inside.setdefault(call, set()).add(op.node)
    for op in features.left_out:
        for call in op.calls:
            units.setdefault(call, set()).add(-1)
    whole = {}
    for name, traced in features.calls.items():
        results = _nodes_in(traced.result)
        leaving = {n for n in inside.get(name, ()) if n in results or any(u not in inside[name] for u in n.users)}
        if len(units.get(name, ())) == 1 and results and leaving == set(results):
            whole[name] = traced
    for op in features.ops:
        divided = next((call for call in reversed(op.calls) if call in features.calls), "")
        if divided in features.two_faced and not any(call in whole for call in op.calls):
            raise ValueError(
                f"{features.calls[divided].name if divided else type(features.model).__name__!r} does something else "
                "in training than in evaluation in its own forward, and a border runs through it: use modules there "
                "(nn.Dropout instead of F.dropout), or give `granularity` as a list of names that does not cut it"
            )
    return whole


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda node: found.append(node))
    return found


def _body(
    features: Features,
    ops: Sequence[Op],
    whole: dict[str, Call],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.Graph:
    """The graph of one block."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}

    def make(node: fx.Node) -> fx.Node:
        """The node in this graph; constants and weights are made where they are first needed."""
        if node not in made:
            made[node] = graph.node_copy(node, make)
        return made[node]

    called: set[str] = set()
    for op in ops:
        name = next((call for call in op.calls if call in whole), None)
        if name is None:
            make(op.node)
        elif name not in called:
            called.add(name)
            call = whole[name]
            args, kwargs = fx.node.map_arg((call.args, call.kwargs), make)
            result = graph.call_module(call.name, args, kwargs)
            _spread(graph, call.result, result, made)
    graph.output(made[outputs[0]] if len(outputs) == 1 else tuple(made[node] for node in outputs))
    return graph


def _spread(graph: fx.Graph, value: Any, result: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
    """Note where the parts of what a module returned are to be found."""
    if isinstance(value, fx.Node):
        made[value] = result
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if _nodes_in(part):
                _spread(graph, part, graph.call_function(operator.getitem, (result, key)), made)


def _name(features: Features, start: int, end: int) -> str:
    """The outermost module that holds the layers of a block and no others, or the first and the last of several."""
    layers = [i for i, op in enumerate(features.ops) if op.weights]
    inside = [i for i in layers if start <= i < end]
    for name in features.ops[inside[0]].path:
        if [i for i in layers if name in features.ops[i].path] == inside:
            return name
    return f"{features.ops[inside[0]].module_name}...{features.ops[inside[-1]].module_name}"
