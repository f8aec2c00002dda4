"""Private names of torch that the package cannot do without; a test fails when one changes."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


@contextmanager
def without_tensor_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Take the hooks of `Tensor.register_hook` off for a while: `torch.autograd.grad` runs them too."""
    hooks = [(cast(Any, tensor), tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooks:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, own in hooks:
            tensor._backward_hooks = own


def original_of_compiled(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` was given for this one, which has no public class; None: it was not."""
    original = module._modules.get("_orig_mod")
    return original if isinstance(original, nn.Module) else None


def holds_compiled(module: nn.Module) -> bool:
    """Whether a module or one inside it was compiled, by `Module.compile` or by `torch.compile`."""
    return any(m._compiled_call_impl is not None or original_of_compiled(m) is not None for m in module.modules())


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which what is compiled runs as it was written, so that its results are those of eager code."""
    # without dynamo, which takes a second to load, nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def changed_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation of torch changes in place."""
    if not func._schema.is_mutable:
        return
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (part for part in (value if isinstance(value, list | tuple) else [value]) if part is not None)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that its call runs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that its call or its backward runs, its own or those of all modules."""
    every = nn.modules.module
    of_all = every._global_forward_hooks or every._global_forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    backward_of_all = every._global_backward_hooks or every._global_backward_pre_hooks
    return has_forward_hooks(module) or bool(of_all or backward or backward_of_all)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work, or `torch.jit.trace`."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself: what is changed here is changed there."""
    return module._buffers


def leave_out_of_state(module: nn.Module, buffers: Iterable[str]) -> None:
    """Keep buffers of a module out of its state dict."""
    module._non_persistent_buffers_set |= set(buffers)


def without_capture_check(optimizer: Optimizer) -> None:
    """Have an optimizer whose parameters lie on the CPU step without asking whether a GPU records its steps.

    Where there is no GPU, the question loads the driver anew, in vain: 0.3 ms, for each unit and batch.
    """
    of_torch_2_7 = "_cuda_graph_capture_health_check"
    for name in ("_accelerator_graph_capture_health_check", of_torch_2_7):
        if hasattr(optimizer, name):
            setattr(optimizer, name, _nothing)


def _nothing() -> None:
    pass
