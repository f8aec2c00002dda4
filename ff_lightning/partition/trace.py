"""Tracing a network: its operations, the calls of its modules, and the shapes of what they make."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_SIZES_TO_TRY = (224, 32, 28, 64, 96, 8)  # pixels, for a model whose input size nobody told us


@dataclass(frozen=True)
class Call:
    """One call of a module with children while the network was traced: what went in and what came out."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _UntraceableError(Exception):
    """The forward of the module of this name cannot be traced."""


class _Tracer(fx.Tracer):
    """Traces a model down to its smallest modules, and notes the calls of the larger ones."""

    def __init__(self, closed: Collection[str]) -> None:
        super().__init__()
        self.closed = closed
        self.calls: dict[str, Call] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = not any(True for _ in m.children())
        return childless or module_qualified_name in self.closed or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        times = self.num_calls.get(name, 0)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except _UntraceableError:
            raise
        except Exception as error:
            raise _UntraceableError(name) from error
        if not self.is_leaf_module(m, name):
            as_nodes = [_nodes(value) for value in (args, kwargs, result)]
            self.calls[f"{name}@{times}" if times else name] = Call(name, *as_nodes)
        return result


def _nodes(value: Any) -> Any:
    """The value with graph nodes in the place of proxies."""
    return fx.node.map_aggregate(value, lambda v: v.node if isinstance(v, fx.Proxy) else v)


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Call]]:
    """Trace `model`; a module that cannot be traced stays one operation.

    Raises:
        ValueError: If forward wants several inputs, or if the forward of the model itself cannot be traced.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    fixed = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        raise ValueError(
            f"{type(model).__name__}.forward takes several inputs {needed}: local training needs a network with one "
            "input; wrap it in a module that makes the others itself"
        )
    closed: set[str] = set()
    while True:
        tracer = _Tracer(closed)
        try:
            return tracer.trace(model, concrete_args=fixed), tracer.calls
        except _UntraceableError as error:
            closed.add(str(error))
        except (fx.proxy.TraceError, TypeError) as error:
            raise ValueError(
                f"{type(model).__name__}.forward cannot be traced ({error}): give the network as an nn.Sequential of "
                "its blocks, or move the operation into a submodule of its own, which then stays in one block"
            ) from error


def own_operations(nodes: Iterable[fx.Node]) -> dict[str, list[str]]:
    """What each call of a module does itself, without the modules inside of it."""
    own: dict[str, list[str]] = {}
    for node in nodes:
        if node.op != "get_attr":
            args = fx.node.map_arg((node.args, node.kwargs), lambda _: "node")
            own.setdefault(_last(node.meta.get("nn_module_stack", {})), []).append(f"{node.op} {node.target} {args}")
    return own


def _last(stack: Collection[str]) -> str:
    return list(stack)[-1] if stack else ""


class _ShapeReader(fx.Interpreter):
    """Runs the graph and notes the shape of every tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.bundles: set[fx.Node] = set()
        self.current: fx.Node | None = None
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        if isinstance(value, Tensor):
            if value.numel() == 0:
                raise RuntimeError(f"empty map of shape {tuple(value.shape[1:])}")
            self.shapes[n] = tuple(value.shape)
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.bundles.add(n)
        return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def read_shapes(
    model: nn.Module, graph: fx.Graph, example: Tensor
) -> tuple[dict[fx.Node, tuple[int, ...]], set[fx.Node]]:
    """Shape of every tensor that the network makes of an example in evaluation mode, and what is a tuple of tensors.

    Raises:
        ValueError: If the example does not pass through the network; the module that failed is named.
    """
    reader = _ShapeReader(model, graph)
    try:
        with evaluating(model):
            reader.run(example)
    except Exception as error:
        assert reader.current is not None
        where = (path(reader.current) or (reader.current.name,))[-1]
        raise ValueError(
            f"an image of shape {tuple(example.shape[1:])} does not pass through {type(model).__name__}: {where!r} "
            f"failed ({str(error).splitlines()[0]}); give images of another shape, or a network made for this one"
        ) from error
    return reader.shapes, reader.bundles


def default_example(model: nn.Module, graph: fx.Graph) -> Tensor:
    """An image batch of one for a model whose input shape was not given: tried from the most usual size down."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, device=device)
    channels = first.in_channels if first is not None else 3
    problem: ValueError | None = None
    for size in _SIZES_TO_TRY:
        example = torch.zeros(1, channels, size, size, device=device)
        try:
            read_shapes(model, graph, example)
            return example
        except ValueError as error:
            problem = error
    raise ValueError("give `example`, an input batch of the right shape") from problem


def path(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules in whose forward an operation runs, outermost first."""
    return tuple(name for name, _ in node.meta.get("nn_module_stack", {}).values())
