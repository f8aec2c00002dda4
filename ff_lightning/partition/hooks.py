"""Runs a network's own forward up to the last of some of its modules, and stops at the output of each of them."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

Visit = Callable[[int, Tensor], Tensor]
"""Called with the number of a module and its output; what it returns is handed on in the place of the output."""


class _Enough(Exception):
    """Ends a forward whose remaining results nobody needs."""


def run_hooked(
    model: nn.Module,
    borders: Sequence[str],
    call: Callable[[], Any],
    visit: Visit,
    mode: Callable[[int], AbstractContextManager[None]] = lambda k: nullcontext(),
) -> None:
    """Run the forward of a network once; control flow, masks and keyword arguments stay its own.

    What runs behind the last border does not run. A module may return a tensor, or tuples, lists and dicts of them: its
    output is the first floating one; the others are handed on detached, in the same structure.

    Args:
        model: The network.
        borders: Names of the modules at whose outputs to stop. Each runs once, in this order.
        call: Calls the network.
        visit: What to do at each output.
        mode: A context for what runs between the border before number k and the visit of number k.

    Raises:
        ValueError: If a border does not run once and in its place, returns no floating tensor, or if the network
            checkpoints its activations: the outputs would be visited once more in backward.
    """
    number = {model.get_submodule(name): k for k, name in enumerate(borders)}
    done = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal done
        k = number[module]
        if k != done:
            raise ValueError(f"{borders[k]!r} ran {_place(k, done, borders)}: each border must run once, in order")
        main = _main(output, borders[k])
        handed_on = visit(k, main)
        done += 1
        modes.close()
        if done == len(borders):
            raise _Enough
        modes.enter_context(mode(done))
        return _mapped(output, lambda tensor: handed_on if tensor is main else tensor.detach())

    _check_no_checkpointing(model)
    with ExitStack() as handles, ExitStack() as modes, _without_cache(model):
        for module in number:
            handles.callback(module.register_forward_hook(hook).remove)
        modes.enter_context(mode(0))
        try:
            call()
        except _Enough:
            return
    if done < len(borders):
        raise ValueError(
            f"{type(model).__name__} did not run {borders[done]!r} in this pass: each border must run in every pass "
            "(no layerdrop, no early exit)"
        )


def _place(k: int, done: int, borders: Sequence[str]) -> str:
    return "a second time" if k < done else f"before {borders[done]!r}"


def _main(output: Any, name: str) -> Tensor:
    """The first floating tensor."""
    found = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
    if found is None or found.ndim < 2:
        raise ValueError(f"{name!r} returns no batch of features: a border must be at a module that does")
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value of the same structure, with another tensor in the place of each."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # a dict, or an output class of transformers
        for key, part in value.items():
            changed[key] = _mapped(part, function)
        return changed
    if isinstance(value, tuple | list):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _check_no_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} checkpoints its activations: call its gradient_checkpointing_disable(); only one "
            "block's activations are kept anyway"
        )


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values for further tokens are not kept: decoders of transformers do so by default, in training too."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
