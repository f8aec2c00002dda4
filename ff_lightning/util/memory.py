"""What autograd keeps for the backward pass, counted exactly and on any device."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved:
    """Bytes of the tensors that are kept for backward: now, and the most so far.

    A storage counts once, however often it is saved, and until the last reference to it is gone.
    """

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()
        self._left_out: set[int] = set()
        self.leave_out(left_out)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors, from now on; they must live as long as is counted."""
        self._left_out |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def add(self, tensor: Tensor) -> Tensor:
        """Note that a tensor is saved."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._known and key not in self._left_out:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)
        return tensor.detach()  # the tensor itself would keep its graph alive, which keeps what is saved here: for ever

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def saved_for_backward(left_out: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Count the tensors that autograd saves inside the context.

    Args:
        left_out: Tensors that do not count: parameters, which are there anyway.

    Examples:
        >>> x = torch.ones(10, requires_grad=True)
        >>> with saved_for_backward() as saved:
        ...     y = x.exp()  # keeps its result
        >>> saved.now
        40
    """
    saved = Saved(left_out)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
