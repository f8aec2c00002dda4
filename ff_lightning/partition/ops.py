"""One operation of a network: its weights, and what kind of operation it is."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ff_lightning.partition.shapes import Values
from ff_lightning.partition.trace import changes_in_place, function_name, path

_ACTIVATIONS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "elu", "silu", "hardswish", "tanh", "sigmoid"}
_ELEMENTWISE = {"add", "iadd", "mul", "imul", "sub", "isub", "truediv", "itruediv", "cat", "concat", "expand", "where"}
_ELEMENTWISE |= {"getitem", "stack"}
_LAYERS = {"conv1d", "conv2d", "conv3d", "linear", "embedding", "embedding_bag"}
_ADAPTIVE_MEANS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE = (*_ADAPTIVE_MEANS, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_PERMUTATIONS = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "rearrange"}


@dataclass(frozen=True)
class Op:
    """One operation of the network that depends on its input.

    Attributes:
        node: The operation in the traced graph.
        inputs: The values that it takes and that depend on the network's input.
        calls: The module calls it runs in, outermost first, unique for each call: ``("layer1", "layer1.0")``.
        path: The names of these modules.
        shape: Shape of its result for the example, or None where the result is not a tensor.
        weights: Its weight tensors of at least two dimensions: what makes it a layer of its own.
        state: All its parameters and buffers.
        learns: Whether it has parameters that a gradient can reach.
        passes_gradients: Whether a gradient can go through its result.
        is_bundle: Whether its result is a tuple of tensors, which cannot cross a border as it is.
        changes: What it changes in place.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    calls: tuple[str, ...]
    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    weights: tuple[Tensor, ...]
    state: tuple[Any, ...]
    learns: bool
    passes_gradients: bool
    is_bundle: bool
    changes: fx.Node | None

    @property
    def module_name(self) -> str:
        """Name of the innermost module it runs in, or of the operation where that is the model itself."""
        return self.path[-1] if self.path else self.node.name


class Reader:
    """Makes the operations of a traced network.

    Args:
        model: The network.
        graph: Its graph.
        values: What the operations return for an example.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, values: Values) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.values = values
        self.of_input = _depending_on_input(graph)
        self.constants: dict[fx.Node, tuple[tuple[Any, ...], bool]] = {}

    def read(self, node: fx.Node) -> Op:
        """The operation of a node."""
        state, learns = self._state(node)
        without_grad = bool(node.meta.get("without_grad")) or function_name(node) in ("detach", "detach_")
        bundle = node in self.values.bundles
        passes_gradients = (bundle or node in self.values.floating) and not without_grad
        return Op(
            node,
            tuple(arg for arg in node.all_input_nodes if arg in self.of_input),
            tuple(node.meta.get("nn_module_stack", {})),
            path(node),
            self.values.shapes.get(node),
            self._weights(node, state),
            state,
            learns and passes_gradients,
            passes_gradients,
            bundle,
            self.changed_by(node),
        )

    def changed_by(self, node: fx.Node) -> fx.Node | None:
        """What the operation changes in place."""
        if node.op == "call_module":
            in_place = bool(getattr(self.modules.get(str(node.target)), "inplace", False))
        else:
            in_place = changes_in_place(node)
        return node.all_input_nodes[0] if in_place and node.all_input_nodes else None

    def _state(self, node: fx.Node) -> tuple[tuple[Any, ...], bool]:
        """Parameters and buffers that an operation works with, and whether a gradient can reach one of them."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            parameters = tuple(module.parameters())
            return (*parameters, *module.buffers()), bool(parameters)
        found: list[Any] = []
        learns = False
        for arg in node.all_input_nodes:
            if arg not in self.of_input:
                state, reached = self._constant(arg)
                found += state
                learns = learns or reached
        return tuple(found), learns

    def _constant(self, node: fx.Node) -> tuple[tuple[Any, ...], bool]:
        """The same of a value that does not depend on the network's input."""
        if node not in self.constants:
            if node.op == "get_attr":
                value = attribute(self.model, str(node.target))
                self.constants[node] = (value,), isinstance(value, nn.Parameter)
            elif node not in self.values.floating | self.values.bundles:  # the device of a weight, say
                self.constants[node] = (), False
            else:
                state, learns = self._state(node)
                self.constants[node] = state, learns and not node.meta.get("without_grad")
        return self.constants[node]

    def _weights(self, node: fx.Node, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        name = function_name(node).strip("_")
        if node.op != "call_module" and name not in _LAYERS:
            own = [arg for arg in node.all_input_nodes if arg.op == "get_attr" and name not in _ELEMENTWISE]
            state = tuple(attribute(self.model, str(arg.target)) for arg in own)
        return tuple(t for t in state if isinstance(t, nn.Parameter) and t.ndim >= 2)


def _depending_on_input(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on the network's input, the input among them."""
    dependent = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op != "output" and any(arg in dependent for arg in node.all_input_nodes):
            dependent.add(node)
    return dependent


def attribute(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of this name."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key)


def is_adaptive_pool(model: nn.Module, op: Op) -> bool:
    """Whether the operation pools to a given size."""
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), _ADAPTIVE)
    return function_name(op.node).startswith("adaptive_")


def is_convolution(model: nn.Module, op: Op) -> bool:
    """Whether the operation is a convolution: channels are dimension 1 of its result."""
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.modules.conv._ConvNd)
    return function_name(op.node) in ("conv1d", "conv2d", "conv3d")


def is_linear(model: nn.Module, op: Op) -> bool:
    """Whether the operation is a linear layer: channels are the last dimension of its result."""
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.Linear)
    return function_name(op.node) == "linear"


def is_embedding(model: nn.Module, op: Op) -> bool:
    """Whether the operation looks up a row for each id: channels are the last dimension of its result."""
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.Embedding | nn.EmbeddingBag)
    return function_name(op.node) in ("embedding", "embedding_bag")


def output_widths(model: nn.Module, op: Op) -> set[int]:
    """How many channels the result of a layer may have, as its weights tell."""
    module = model.get_submodule(str(op.node.target)) if op.node.op == "call_module" else None
    if isinstance(module, nn.RNNBase):
        return {(module.proj_size or module.hidden_size) * (1 + module.bidirectional)}
    return {weight.shape[1 if is_embedding(model, op) else 0] for weight in op.weights}


def permutes(model: nn.Module, op: Op) -> bool:
    """Whether the operation changes the order of the dimensions."""
    if op.node.op == "call_module":
        return type(model.get_submodule(str(op.node.target))).__name__ in ("Permute", "Rearrange")
    return function_name(op.node) in _PERMUTATIONS


def is_activation(model: nn.Module, op: Op) -> bool:
    """Whether the operation is an activation, other than a softmax."""
    if op.node.op == "call_module":
        module = model.get_submodule(str(op.node.target))
        is_one = any(cls.__module__ == "torch.nn.modules.activation" for cls in type(module).__mro__)
        return is_one and not isinstance(module, nn.Softmax | nn.LogSoftmax)
    return function_name(op.node) in _ACTIVATIONS


def is_sigmoid(model: nn.Module, op: Op) -> bool:
    """Whether the operation is a sigmoid, which may also make probabilities of logits."""
    if op.node.op == "call_module":
        return isinstance(model.get_submodule(str(op.node.target)), nn.Sigmoid)
    return function_name(op.node) == "sigmoid"
