"""Tracing a network: its operations, and the calls of its modules."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ff_lightning.partition.inputs import Inputs
from ff_lightning.partition.untouched import remember
from ff_lightning.util.torch_private import original_of_compiled

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
_FRAMES = 20  # of Python, for each level of nested modules while tracing


@dataclass(frozen=True)
class Call:
    """One call of a module with children while the network was traced: what went in and what came out.

    Attributes:
        name: The module.
        args: Its arguments when it was called, with graph nodes in the place of tensors.
        kwargs: The same of arguments by name.
        result: What it returned.
        repeatable: Whether the call can be made again from its arguments: they can be written down, and the module
            does not change the lists among them.
        without_grad: Whether it was made under `torch.no_grad`.
        autocast: Whether it was made under an autocast of the network's own.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    repeatable: bool
    without_grad: bool
    autocast: bool


@dataclass(frozen=True)
class Trace:
    """A traced network.

    Attributes:
        graph: Its operations.
        calls: The calls of modules with children, by a name that is unique for each call.
        closed: The modules that cannot be traced: each is one operation.
        buffers_as_values: Whether buffers are read anew by each operation, not taken as they were.
    """

    graph: fx.Graph
    calls: dict[str, Call]
    closed: frozenset[str]
    buffers_as_values: bool


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without what `torch.compile`, DataParallel or DistributedDataParallel put around it.

    Raises:
        ValueError: If it is scripted.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                "a scripted network cannot be cut, its modules have no Python code: give the nn.Module that it was "
                "made from, with the same weights"
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (original := original_of_compiled(model)) is not None:
            model = original
        else:
            return model


# Functions for `x += y` and its like: fx records them as `x = x + y`, another thing where x has a second name.
def iadd(x: Any, y: Any) -> Any:
    """``x += y``."""
    x += y
    return x


def isub(x: Any, y: Any) -> Any:
    """``x -= y``."""
    x -= y
    return x


def imul(x: Any, y: Any) -> Any:
    """``x *= y``."""
    x *= y
    return x


def itruediv(x: Any, y: Any) -> Any:
    """``x /= y``."""
    x /= y
    return x


class _Proxy(fx.Proxy):
    """Stands for a value while the network is traced."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces a model down to its smallest modules, and notes the calls of the larger ones.

    Hooks of the larger modules do not run: they would be given values that are none.
    """

    def __init__(self, inputs: Inputs, closed: Collection[str], buffers_as_values: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.closed = set(closed)
        self.calls: dict[str, Call] = {}
        self.autocasts = 0
        self.buffers_as_values = buffers_as_values
        self.state_names: dict[int, str] = {}

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], list[Any]]:
        """The inputs go in; whatever else `forward` takes has its default."""
        kinds = [self.root.named_parameters(), self.root.named_buffers() if self.buffers_as_values else ()]
        self.state_names = {id(tensor): name for named in kinds for name, tensor in named}
        given = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs.names]
        return lambda root, *values: self.inputs.call(root.forward, values), [self.root, *given]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A value for a parameter or buffer; fx searches the whole network for each."""
        name = self.state_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        name = self.state_names.get(id(a))
        return super().create_arg(a) if name is None else self.create_node("get_attr", name, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["without_grad"], node.meta["autocast"] = self._modes()
        if changes_in_place(node) and str(node.all_input_nodes[0].target).startswith("_tensor_constant"):
            raise RuntimeError(f"{function_name(node)!r} changes a tensor that was made in forward")
        return node

    def _modes(self) -> tuple[bool, bool]:
        """Whether gradients are switched off, and whether autocast or inference mode is on."""
        return not torch.is_grad_enabled(), self.autocasts > 0 or torch.is_inference_mode_enabled()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = not any(True for _ in m.children())
        opaque = isinstance(m, torch.jit.ScriptModule) or original_of_compiled(m) is not None
        closed = module_qualified_name in self.closed
        return childless or opaque or closed or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        times = self.num_calls.get(name, 0)
        undo = self._undo(args, kwargs)
        modes = self._modes()
        try:
            before = _identities((args, kwargs))
            written = self._written(args, kwargs)
            result = super().call_module(m, m.forward, args, kwargs)
        except Exception:  # whatever stands in the way: the module stays one operation
            undo()
            self.closed.add(name)
            return super().call_module(m, forward, args, kwargs)
        repeatable = written is not None and _identities((args, kwargs)) == before
        key = f"{name}@{times}" if times else name
        taken, named = written or ((), {})
        self.calls[key] = Call(name, taken, named, _nodes(result), repeatable, *modes)
        return result

    def _written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The arguments with graph nodes in the place of tensors, or None where a graph cannot hold them."""
        try:
            return self.create_arg(args), self.create_arg(kwargs)
        except NotImplementedError:
            return None

    def _undo(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """A function that takes back all that was traced since."""
        last = next(iter(reversed(self.graph.nodes)))
        depth, times, calls = len(self.module_stack), dict(self.num_calls), len(self.calls)
        restore_arguments = remember({"args": args, "kwargs": kwargs})

        def undo() -> None:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                if node.op != "get_attr":  # those are found again by their names
                    self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self.num_calls = times
            for key in list(self.calls)[calls:]:
                del self.calls[key]
            restore_arguments()

        return undo


def _nodes(value: Any) -> Any:
    """The value with graph nodes in the place of proxies."""
    return fx.node.map_aggregate(value, lambda v: v.node if isinstance(v, fx.Proxy) else v)


def _identities(value: Any) -> Any:
    """What a list, tuple or dict holds, to be compared later."""
    if isinstance(value, dict):
        return [(key, _identities(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [_identities(part) for part in value]
    return id(value.node if isinstance(value, fx.Proxy) else value)


class CannotTraceError(ValueError):
    """The forward of a network itself cannot be traced."""


def trace(model: nn.Module, inputs: Inputs, closed: Collection[str], buffers_as_values: bool) -> Trace:
    """Trace `model`; a module that cannot be traced stays one operation.

    Args:
        model: The network, in the mode in which it is to be traced.
        inputs: What it is called with.
        closed: Modules that stay one operation in any case.
        buffers_as_values: Whether to try that; a forward that assigns to a buffer of its own does not allow it.

    Raises:
        CannotTraceError: If the forward of the model itself cannot be traced.
    """
    problem: Exception | None = None
    for as_values in dict.fromkeys((buffers_as_values, False)):
        tracer = _Tracer(inputs, closed, as_values)
        try:
            with torch.enable_grad(), _deep_enough(model), _autocasts_noted(tracer):
                graph = tracer.trace(model)
            return Trace(graph, tracer.calls, frozenset(tracer.closed), as_values)
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise CannotTraceError(
        f"{type(model).__name__}.forward cannot be traced ({first_line(problem)}), so that it can be cut at no "
        "granularity: give the network as an nn.Sequential of its blocks, or move the operation into a submodule of "
        "its own, which then stays in one block"
    ) from problem


@contextmanager
def _deep_enough(model: nn.Module) -> Iterator[None]:
    """Allow as deep a recursion as the nesting of the modules asks for."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + _FRAMES * max(name.count(".") + 1 for name, _ in model.named_modules()))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@contextmanager
def _autocasts_noted(tracer: _Tracer) -> Iterator[None]:
    """Count the autocasts that the network's own code is inside of."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def noted_enter(self: torch.autocast) -> Any:
        tracer.autocasts += 1
        return enter(self)

    def noted_leave(self: torch.autocast, *error: Any) -> Any:
        tracer.autocasts -= 1
        return leave(self, *error)

    torch.autocast.__enter__, torch.autocast.__exit__ = noted_enter, noted_leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


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


def function_name(node: fx.Node) -> str:
    """Name of the function or method that an operation calls."""
    return str(getattr(node.target, "__name__", node.target))


def changes_in_place(node: fx.Node) -> bool:
    """Whether a function or method changes its first argument."""
    name = function_name(node)
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    in_place = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.startswith("_"))
    return in_place or node.kwargs.get("inplace") is True


def path(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules in whose forward an operation runs, outermost first."""
    return tuple(name for name, _ in node.meta.get("nn_module_stack", {}).values())


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
