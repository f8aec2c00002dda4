"""Loaders that make whole batches at once, and that continue where they stopped."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ff_lightning.data.splits import Indices

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where the inputs of samples come from."""

    def read(self, numbers: Indices) -> Tensor:
        """The inputs of the samples of these numbers, (B, ...)."""


class InMemory:
    """Inputs in memory.

    Args:
        inputs: (N, ...).
        numbers: Their numbers in the data set, in order, (N,).
    """

    def __init__(self, inputs: Tensor, numbers: Indices) -> None:
        self.inputs, self.numbers = inputs, numbers

    def read(self, numbers: Indices) -> Tensor:
        """Inputs (B, ...)."""
        return self.inputs[torch.from_numpy(np.searchsorted(self.numbers, numbers))]


class Split(Dataset[Any]):
    """The samples of a split.

    Args:
        source: Where their inputs come from.
        numbers: Numbers of the samples in the data set, (N,).
        targets: Their targets, (N,).
    """

    next_epoch = 0
    """Of loops that do not say which epoch theirs is."""

    def __init__(self, source: Any, numbers: Indices, targets: Indices) -> None:
        self.source, self.numbers = source, numbers
        self.targets = torch.as_tensor(targets)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The inputs of one sample, as they are held, and its target."""
        return self.source.read(self.numbers[[index]])[0], self.targets[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """A batch for positions in the split, or for pairs of an epoch and a position."""
        epoch = indices[0][0] if isinstance(indices[0], tuple) else 0
        return self.batch(torch.tensor([i[1] if isinstance(i, tuple) else i for i in indices]), epoch)

    def batch(self, at: Tensor, epoch: int) -> Any:
        """The samples at these positions, (B,), as they are in an epoch."""
        return self.source.read(self.numbers[at.numpy()]), self.targets[at]


def as_it_is(batch: Any) -> Any:
    """What a loader collates with where a data set gives whole batches."""
    return batch


class BatchLoader(DataLoader[Any]):
    """A loader over a `Split`; `finish` makes its batches ready in this process, on the device where they are used.

    This is not done in a hook of Lightning, so that a plain loop, a Trainer and the user's own hooks all see the same
    batches.
    """

    def __init__(self, *args: Any, finish: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finish = finish

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield self.finish(batch)


class ResumableLoader(BatchLoader):
    """A loader that continues in mid-epoch: its state is the number of samples already given in the epoch.

    Samples are counted over all processes, so a run can continue with another batch size or number of processes.
    ``set_epoch`` of the sampler, which a Trainer calls, sets the epoch. If it is never called, each pass is the next
    epoch of the split, also with a new loader.
    """

    images = 0
    interrupted: Mapping[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # lazy: a Trainer calls iter() before it tells the sampler the epoch
        state, self.interrupted = self.interrupted, None
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Trainer(overfit_batches=...) has put another in its place
            yield from super().__iter__()
            return
        if not sampler.is_told:
            self._take_next_epoch(sampler, state)
        self.images = state["images"] if state and state["epoch"] == sampler.epoch else 0
        sampler.start = self.images
        for batch in super().__iter__():
            self.images += len(batch[1]) * sampler.num_replicas
            yield batch

    def _take_next_epoch(self, sampler: "EpochSampler", state: Mapping[str, int] | None) -> None:
        split = cast(Split, self.dataset)
        if state is not None:
            split.next_epoch = state["epoch"] + (self.batches_after(state["images"]) == 0)
        sampler.epoch = split.next_epoch
        split.next_epoch += 1

    def batches_after(self, images: int) -> int:
        """How many batches of an epoch are left after so many samples of all processes."""
        sampler = cast(EpochSampler, self.sampler)
        left = max(0, len(sampler) - sampler.own(images))
        batch_size = cast(int, self.batch_size)
        return left // batch_size if self.drop_last else -(-left // batch_size)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of samples that all processes together were given in it."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "images": self.images}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start after so many samples, if the next epoch is the one that was interrupted."""
        if set(state) == {"epoch", "images"}:
            self.interrupted = state
        else:
            log.warning(
                "the checkpoint has the position of another loader, %s: this epoch starts with its first sample", state
            )


class EpochSampler(DistributedSampler[Any]):
    """Positions of samples, each with its epoch: augmentation depends only on these two and the seed."""

    start = 0
    """Number of samples, over all processes, to skip in the next epoch: they were seen before the interruption."""
    is_told = False
    """Whether ``set_epoch`` was called."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; from now on passes no longer count it."""
        super().set_epoch(epoch)
        self.is_told = True

    def own(self, images: int) -> int:
        """The part of this process in the first samples of an epoch, rounded up: no sample comes twice."""
        return -(-images // self.num_replicas)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start, self.start = self.epoch, self.own(self.start), 0
        return ((epoch, index) for index in itertools.islice(super().__iter__(), start, None))
