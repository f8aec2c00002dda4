"""Private names of torch that the package cannot do without; a test fails when one changes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor


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
