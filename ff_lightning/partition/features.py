"""What a network computes, as a list of operations: the raw material of every partition.

`read_features` traces a model with `torch.fx`, runs one example through it and returns the operations of its
feature part in the order in which they run. The classifier, and the pooling and flattening before it, are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ff_lightning.partition.trace import Call, default_example, own_operations, path, read_shapes, trace

_ACTIVATIONS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "elu", "silu", "hardswish", "tanh", "sigmoid"}
_ELEMENTWISE = {"add", "iadd", "mul", "imul", "sub", "truediv", "cat", "concat", "expand", "where", "getitem", "stack"}
_PERMUTATIONS = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "rearrange"}


@dataclass(frozen=True)
class Op:
    """One operation of the network that depends on its input.

    Attributes:
        node: The operation in the traced graph.
        calls: The module calls it runs in, outermost first, unique for each call: ``("layer1", "layer1.0")``.
        path: The names of these modules.
        shape: Shape of its result for the example, or None where the result is not a tensor.
        weights: Its weight tensors of at least two dimensions: what makes it a layer of its own.
        state: All its parameters and buffers.
        is_bundle: Whether its result is a tuple of tensors, which cannot cross a border as it is.
    """

    node: fx.Node
    calls: tuple[str, ...]
    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    weights: tuple[Tensor, ...]
    state: tuple[Any, ...]
    is_bundle: bool

    @property
    def module_name(self) -> str:
        """Name of the innermost module it runs in, or of the operation where that is the model itself."""
        return self.path[-1] if self.path else self.node.name


@dataclass(frozen=True)
class Features:
    """The feature part of a model: its operations in order; the result of the last one is the feature map.

    Attributes:
        model: The network.
        ops: The operations.
        left_out: Operations behind the features: pooling and classifier.
        calls: The calls of modules that have children, by the unique name that `Op.calls` uses.
        two_faced: The calls whose own operations are others in training than in evaluation.
        input: The node that stands for the images.
        example: The input batch that was run.
    """

    model: nn.Module
    ops: tuple[Op, ...]
    left_out: tuple[Op, ...]
    calls: dict[str, Call]
    two_faced: frozenset[str]
    input: fx.Node
    example: Tensor

    def alive(self, cut: int) -> list[fx.Node]:
        """The values made before operation number `cut` and used by it or after it."""
        if cut == len(self.ops):
            return [self.ops[-1].node]
        after = {op.node for op in self.ops[cut:]}
        made = [self.input, *(op.node for op in self.ops[:cut])]
        return [node for node in made if any(user in after for user in node.users)]

    def crossing(self, cut: int) -> list[fx.Node]:
        """The tensors among the values that are alive at a cut."""
        tensors = {self.input, *(op.node for op in self.ops if op.shape is not None)}
        return [node for node in self.alive(cut) if node in tensors]

    def can_cut(self, cut: int) -> bool:
        """Whether all values that are alive at a cut can cross it by themselves."""
        bundles = {op.node for op in self.ops if op.is_bundle}
        return not bundles.intersection(self.alive(cut))

    def channel_dim(self, cut: int) -> int:
        """Which dimension of the last tensor before a cut counts channels.

        Behind a convolution it is dimension 1, until the dimensions are permuted. Else it is the one whose extent is
        the output width of the last layer before the cut; where that fits none or several of them, dimension 1 of a
        map and the last one of a row of tokens.
        """
        shape = self._last_shape(cut)
        last = next((i for i in reversed(range(cut)) if self.ops[i].weights), None)
        since = () if last is None else self.ops[last:cut]
        if since and _is_convolution(self.model, since[0]) and not any(_permutes(self.model, op) for op in since):
            return 1
        widths = {weight.shape[0] for weight in since[0].weights} if since else set()
        fitting = [dim for dim in range(1, len(shape)) if shape[dim] in widths]
        return fitting[0] if len(fitting) == 1 else (len(shape) - 1 if len(shape) == 3 else 1)

    def area(self, cut: int) -> int:
        """Number of positions of the last tensor before a cut: H * W of a map, N of a row of tokens."""
        shape = self._last_shape(cut)
        return math.prod(shape[1:]) // shape[self.channel_dim(cut)]

    def _last_shape(self, cut: int) -> tuple[int, ...]:
        return next(op.shape for op in reversed(self.ops[:cut]) if op.shape is not None)


def _state(model: nn.Module, node: fx.Node) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The weight tensors (two dimensions or more) of an operation, and all its parameters and buffers."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return tuple(p for p in module.parameters() if p.ndim >= 2), (*module.parameters(), *module.buffers())
    state = tuple(_get_attribute(model, str(arg.target)) for arg in node.all_input_nodes if arg.op == "get_attr")
    if _function(node).strip("_") in _ELEMENTWISE:
        return (), state
    return tuple(t for t in state if isinstance(t, nn.Parameter) and t.ndim >= 2), state


def _function(node: fx.Node) -> str:
    """Name of the function or method that an operation calls."""
    return str(getattr(node.target, "__name__", node.target))


def _get_attribute(model: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def read_features(model: nn.Module, example: Tensor | None = None) -> Features:
    """Trace `model` and list the operations of its feature part.

    Args:
        model: The network; one tensor in, one tensor out.
        example: An input batch, (B, C, H, W). None: a shape that fits the first layer is tried.

    Returns:
        The operations in order, without the classifier and without the pooling and flattening before it.

    Raises:
        ValueError: If the model cannot be traced, does not take the example, or has no layer with weights.
    """
    training = [module for module in model.modules() if module.training]
    model.train()
    graph_of_training, _ = trace(model)
    model.eval()
    graph, calls = trace(model)
    for module in training:
        module.training = True
    example = default_example(model, graph) if example is None else example
    shapes, bundles = read_shapes(model, graph, example)
    ops = []
    for node in _flow(graph):
        stack = node.meta.get("nn_module_stack", {})
        weights, state = _state(model, node)
        ops.append(Op(node, tuple(stack), path(node), shapes.get(node), weights, state, node in bundles))
    if not any(op.weights for op in ops):
        raise ValueError(f"{type(model).__name__} has no layer with weights: there is nothing to train")
    end = _end_of_features(model, ops)
    while ops[end - 1].shape is None:
        end -= 1
    needed = [_needed(model, g, ops[end - 1].node.name) for g in (graph_of_training, graph)]
    own = [own_operations(nodes) for nodes in needed]
    two_faced = frozenset(call for call in {*own[0], *own[1]} if own[0].get(call) != own[1].get(call))
    used = {*needed[1]}
    kept = tuple(op for op in ops[:end] if op.node in used)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    return Features(model, kept, tuple(ops[end:]), calls, two_faced, images, example)


def _flow(graph: fx.Graph) -> list[fx.Node]:
    """The operations that depend on the input, in order."""
    dependent: set[fx.Node] = set()
    flow = []
    for node in graph.nodes:
        if node.op == "placeholder" and not dependent:
            dependent.add(node)
        elif node.op != "output" and any(arg in dependent for arg in node.all_input_nodes):
            dependent.add(node)
            flow.append(node)
    return flow


def _needed(model: nn.Module, graph: fx.Graph, name: str) -> list[fx.Node]:
    """All that the node of this name is made of, in order, or every node where there is none of this name."""
    found: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.name == name] or list(graph.nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in found or _has_side_effect(model, node)]


def _has_side_effect(model: nn.Module, node: fx.Node) -> bool:
    """Whether the operation matters though nothing uses its result: an assertion, or a change in place."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False)) and not node.users
    name = _function(node)
    in_place = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.startswith("_"))
    return not node.users and (name == "_assert" or in_place)


def _end_of_features(model: nn.Module, ops: Sequence[Op]) -> int:
    """Number of operations that belong to the feature part."""
    end = _start_of_classifier(model, ops)
    tail = end
    while tail > 1 and not ops[tail - 1].state:
        tail -= 1
        before, after = ops[tail - 1].shape or (), ops[tail].shape or ()
        flattens = len(before) > 2 and len(after) == 2
        pools = len(before) == 4 and before[2:] != (1, 1) and after[2:] == (1, 1)
        if flattens or pools or _is_adaptive_pool(model, ops[tail]):
            end = tail
    return end


def _start_of_classifier(model: nn.Module, ops: Sequence[Op]) -> int:
    """Where the classifier begins: the outermost module that holds the last linear layer, and linear layers only."""
    layers = [i for i, op in enumerate(ops) if op.weights]
    last = layers[-1]
    output = ops[-1].shape
    dense = all(w.ndim == 2 for w in ops[last].weights)
    named = ops[last].path[:1] and ops[last].path[0] in ("classifier", "fc", "head", "heads")
    activated = any(_is_activation(model, op) for op in ops[last + 1 :])
    if output is None or len(output) != 2 or len(layers) == 1 or not (named or (dense and not activated)):
        return len(ops)
    for call in ops[last].calls:
        inside = [i for i in layers if call in ops[i].calls]
        only_dense = all(w.ndim == 2 for i in inside for w in ops[i].weights)
        if inside[0] != layers[0] and (only_dense or named):
            return next(i for i, op in enumerate(ops) if call in op.calls)
    return last


def _is_adaptive_pool(model: nn.Module, op: Op) -> bool:
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
    return _function(op.node).startswith("adaptive_")


def _is_convolution(model: nn.Module, op: Op) -> bool:
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.modules.conv._ConvNd)
    return _function(op.node) in ("conv1d", "conv2d", "conv3d")


def _permutes(model: nn.Module, op: Op) -> bool:
    """Whether the operation changes the order of the dimensions."""
    if op.node.op == "call_module":
        return type(model.get_submodule(str(op.node.target))).__name__ in ("Permute", "Rearrange")
    return _function(op.node) in _PERMUTATIONS


def _is_activation(model: nn.Module, op: Op) -> bool:
    if op.node.op == "call_module":
        module = model.get_submodule(str(op.node.target))
        return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
            module, nn.Softmax | nn.LogSoftmax
        )
    return _function(op.node) in _ACTIVATIONS
