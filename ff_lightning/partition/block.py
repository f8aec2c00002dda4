"""The units of local training, built from a traced network and the places where it is cut."""

import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ff_lightning.partition.channelwise import join_channelwise
from ff_lightning.partition.features import Features
from ff_lightning.partition.ops import Op
from ff_lightning.partition.trace import Call, evaluating
from ff_lightning.partition.undivided import nodes_in, undivided_calls
from ff_lightning.util.memory import saved_for_backward
from ff_lightning.util.torch_private import leave_out_of_state, own_buffers

State = Tensor | tuple[Any, ...]


class Block(nn.Module):
    """One unit of local training: a piece of a network that runs by itself.

    A block takes what is alive at the border before it and returns what is alive at the border behind it: a tensor, or
    a tuple of its main output and everything that later blocks still need, such as a shortcut. So blocks run in order,
    each on what the previous one returned, without the network.

    The state dict of `body` has the keys of the original model, restricted to this block.

    Attributes:
        name: The module, or the first and the last module, of the original model that it holds.
        body: The operations, as a `torch.fx.GraphModule` over the modules of the original model.
        channel_dim: The dimension of the main output that counts channels.
        map_shape: Shape of a sample of the main output as a map, for the example: channels, then positions: (C,) for
            vectors, (C, T) for signals and tokens, (C, H, W), (C, D, H, W).
        saved_bytes: What autograd keeps of one image for the backward of this block, without parameters.
        without_gradient: Names of its trainable parameters that no gradient of its main output reaches.
    """

    def __init__(self, name: str, body: fx.GraphModule, channel_dim: int) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.channel_dim = channel_dim
        self.map_shape: tuple[int, ...] = ()
        self.saved_bytes = 0
        self.without_gradient: tuple[str, ...] = ()

    def forward(self, state: State) -> State:
        """Run the block on the state before it; returns the state behind it."""
        return self.body(*state) if isinstance(state, tuple) else self.body(state)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the body alone: blocks share one forward, and a limit of recompilations with it."""
        self.body.compile(*args, **kwargs)

    def to_map(self, output: Tensor) -> Tensor:
        """The main output as a map (B, C, ...): channels before positions, tokens (B, T, C) become (B, C, T).

        Of more than three dimensions of positions the first ones become one.
        """
        if self.channel_dim != 1:  # a view that changes nothing would be one more step of autograd
            output = output.movedim(self.channel_dim, 1)
        return output.flatten(2, -3) if output.ndim > 5 else output

    def extra_repr(self) -> str:
        """Name and shape, for the printed network."""
        return f"{self.name!r}, map_shape={self.map_shape}"


def build_blocks(features: Features, cuts: Sequence[int]) -> list[Block]:
    """Build the blocks between the cuts, over the modules of the model itself: nothing is copied.

    A module that no cut divides is called as it is; only modules with a cut inside are taken apart.

    Raises:
        CannotDivideError: If a module with a cut inside cannot be taken apart.
    """
    borders = [0, *cuts, len(features.ops)]
    whole = undivided_calls(features, borders)
    of_model = set(features.model.modules())
    stored = features.model.state_dict().keys()
    name_of = _Names(features)
    blocks: list[Block] = []
    inputs = [*features.inputs]
    state: State = features.examples if len(inputs) > 1 else features.example
    for start, end in pairwise(borders):
        main = features.main(start, end)
        assert main is not None, "cuts are made where there is one"
        outputs = [main, *(node for node in features.alive(end) if node is not main)]
        graph = _body(features, features.ops[start:end], whole, inputs, outputs)
        body = fx.GraphModule(features.model, graph)
        for name, module in body.named_modules():
            if module not in of_model:
                keys = {key for key in own_buffers(module) if f"{name}.{key}".removeprefix(".") not in stored}
                leave_out_of_state(module, keys)  # constants of the code, no state of the network
        block = Block(name_of(start, end), body, features.channel_dim(main))
        join_channelwise(body)
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
        result = block(copies if isinstance(state, tuple) else copies[0])
    block.saved_bytes = saved.peak // len(copies[0])
    reached = parameters_behind(main_output(result))
    own = [(name, parameter) for name, parameter in block.body.named_parameters() if parameter.requires_grad]
    block.without_gradient = tuple(name for name, parameter in own if reached is not None and parameter not in reached)
    graph = block.body.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    changed = False
    for node, copy in zip(inputs, copies, strict=True):
        users = [block.body.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
        if isinstance(copy, Tensor) and (copy._version > 0 or any(getattr(user, "inplace", False) for user in users)):
            changed = True
            with graph.inserting_after(inputs[-1]):
                own_copy = graph.call_method("clone", (node,))
            node.replace_all_uses_with(own_copy, delete_user_cb=lambda user, own=own_copy: user is not own)
    if changed:
        block.body.recompile()
    return detached(result)


def take_modes(blocks: Sequence[Block], model: nn.Module) -> None:
    """Put what stands for a divided module into the mode of the module: training or evaluation."""
    training = {name: module.training for name, module in model.named_modules()}
    of_model = set(model.modules())
    for block in blocks:
        block.training = model.training
        for name, module in block.body.named_modules():
            if module not in of_model:
                module.training = training.get(name, model.training)


def parameters_behind(output: Tensor) -> set[Tensor] | None:
    """The parameters that a gradient of a tensor reaches, or None where the graph does not tell.

    Nothing is computed: the graph of autograd is read alone.
    """
    found: set[Tensor] = set()
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        if type(function).__name__ == "CheckpointFunctionBackward":  # reentrant: it has its graph in backward only
            return None
        seen.add(function)
        if hasattr(function, "variable"):
            found.add(function.variable)
        todo.extend(earlier for earlier, _ in function.next_functions)
    return found


def main_output(state: State) -> Tensor:
    """The main output of the block before a border."""
    return state[0] if isinstance(state, tuple) else state


def detached(value: Any) -> Any:
    """A value without its graph; also of tensors inside lists, tuples and dicts."""
    return fx.node.map_aggregate(value, lambda part: part.detach() if isinstance(part, Tensor) else part)


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

    def make(node: fx.Node) -> Any:
        """The node in this graph; constants and weights are made where they are first needed."""
        if node in features.facts:  # without the weight that it was read off, which may belong to another block
            fact = features.facts[node]
            of_input = made[inputs[0]]
            return graph.call_function(getattr, (of_input, "device")) if isinstance(fact, torch.device) else fact
        if node not in made:
            copy = graph.node_copy(node, make)
            made[node] = _without_grad(graph, copy) if node.meta.get("without_grad") and node.op != "get_attr" else copy
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
            _spread(graph, call.result, _without_grad(graph, result) if call.without_grad else result, made)
    graph.output(made[outputs[0]] if len(outputs) == 1 else tuple(made[node] for node in outputs))
    return graph


def _without_grad(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What the network computes under `torch.no_grad` passes no gradient on here either."""
    result = graph.call_function(detached, (node,))
    result.meta["is_wrapped"] = True  # or it is gone where the block is traced again, as unpickling does
    return result


def _spread(graph: fx.Graph, value: Any, result: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
    """Note where the parts of what a module returned are to be found; what it only passed on is known already."""
    if isinstance(value, fx.Node):
        made.setdefault(value, result)
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if nodes_in(part):
                _spread(graph, part, graph.call_function(operator.getitem, (result, key)), made)


class _Names:
    """Names for blocks: the outermost module that holds the layers of it and no others, or the first and the last."""

    def __init__(self, features: Features) -> None:
        self.ops = features.ops
        self.layers = [i for i, op in enumerate(self.ops) if op.weights]
        self.held = Counter(name for i in self.layers for name in self.ops[i].path)

    def __call__(self, start: int, end: int) -> str:
        inside = [self.ops[i] for i in self.layers[bisect_left(self.layers, start) : bisect_left(self.layers, end)]]
        for name in inside[0].path:
            if self.held[name] == len(inside) and all(name in op.path for op in inside):
                return name
        return f"{inside[0].module_name}...{inside[-1].module_name}"
