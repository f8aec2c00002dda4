"""Blocks of a window that keep little for backward: the results of large products. The rest is computed once more.

Norms, activations and sums take little time and keep most. So backward runs a block again from its input, with the
results of convolutions, matrix products and attention as they were. The gradients are the same.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; the selection is torch's.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ff_lightning.util.torch_private import TorchDispatchMode, changed_arguments, holds_compiled

aten: Any = torch.ops.aten
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
PRODUCTS = {aten.convolution.default: 1, aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}
"""For each product, which argument tells how many multiply-adds make one number of its result."""
_MANY = 256
"""So many are worth keeping the number; a stem on three channels and depthwise layers take fewer."""
_HOOKS = "respect_saved_tensors_hooks"
_OPTIONS: dict[str, Any] = {_HOOKS: True} if _HOOKS in signature(checkpoint).parameters else {}
"""The user's hooks see the results that are kept, too, where torch can do that."""


def is_kept(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of an operation is kept."""
    if operation in PRODUCTS:
        factor = args[PRODUCTS[operation]]
        return bool((factor[0].numel() if operation is aten.convolution.default else factor.shape[-1]) >= _MANY)
    return operation in ATTENTION


def run_again(block: nn.Module, keeps: bool, enter: Callable[[Any], Any] | None, state: Any) -> Any:
    """Run a block, and once more in backward.

    Args:
        block: The block.
        keeps: Whether the results of its products are kept. If a module in it is compiled, they are not: compiled code
            may write over them.
        enter: What is done to its input before; None: nothing.
        state: What enters.
    """
    keeps = keeps and not holds_compiled(block)

    def region(state: Any) -> Any:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights that are cast already would leave out an operation
        try:
            return block(state if enter is None else enter(state))
        finally:
            torch.set_autocast_cache_enabled(cached)

    return checkpoint(region, state, use_reentrant=False, context_fn=partial(_contexts, block, keeps), **_OPTIONS)


def _contexts(block: nn.Module, keeps: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the first run and around the second one."""
    first: AbstractContextManager[Any] = nullcontext()
    second: AbstractContextManager[Any] = nullcontext()
    if keeps:
        first, second = create_selective_checkpoint_contexts(_policy)
    return first, BuffersStay((module for module in block.modules() if module.training), second)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


class BuffersStay(AbstractContextManager[None]):
    """Running statistics and the like are afterwards what they were before.

    Args:
        modules: Whose own buffers they are.
        inner: A context to be in as well.
    """

    def __init__(self, modules: Iterable[nn.Module], inner: AbstractContextManager[Any] | None = None) -> None:
        self.modules = list(modules)
        self.inner = inner or nullcontext()
        self._before: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def __enter__(self) -> None:
        for module in self.modules:
            for name, buffer in module.named_buffers(recurse=False):
                self._before.append((module, name, buffer, buffer.clone()))
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self.inner.__exit__(*error)
        finally:
            for module, name, buffer, value in self._before:
                setattr(module, name, buffer)
                buffer.data.copy_(value)  # counts as no change: a graph may hold the buffer
            self._before.clear()


class Results(TorchDispatchMode):
    """Records the results that are kept, and whether one of them is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.changed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        known = {kept.untyped_storage().data_ptr() for kept in self.found}
        self.changed |= any(
            t.untyped_storage().data_ptr() in known for t in changed_arguments(func, args, kwargs or {})
        )
        if is_kept(func, args):
            values = result if isinstance(result, tuple | list) else [result]
            self.found += [value.detach() for value in values if isinstance(value, Tensor)]
        return result
