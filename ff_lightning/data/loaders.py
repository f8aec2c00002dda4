"""Loaders whose batches are made as a whole, and which go on where they stopped."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ff_lightning.data.augment import Crop, augment, draws_of_epoch
from ff_lightning.data.reading import Held, Numbers, Reader

Sample = tuple[Any, int]  # an image (PIL or uint8 tensor) and its class
RawBatch = tuple[Tensor, Tensor, Tensor | None]  # uint8 (B, C, S, S); int64 (B,); draws (B, 5) of training images


class Split(Dataset[Any]):
    """The images of a split, without augmentation until `augment` is called.

    Args:
        source: Where their pixels come from.
        numbers: Numbers of the images in the data set, (N,).
        labels: Their classes, (N,).
    """

    crop: Crop = "none"
    flips = False
    seed: int | None = None

    def __init__(self, source: Held | Reader, numbers: Numbers, labels: Numbers) -> None:
        self.source, self.numbers = source, numbers
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def augment(self, seed: int, crop: Crop, flips: bool) -> None:
        """Augment the images, with draws of this seed; see `ff_lightning.data.augment.augment`."""
        self.seed, self.crop, self.flips = seed, crop, flips

    @property
    def crops_at_reading(self) -> bool:
        """Where there are more pixels in the file than are kept of it, the crop is taken when it is read."""
        return self.crop == "resized" and isinstance(self.source, Reader)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The pixels of one image, as they are, and its class."""
        return self.source.read(self.numbers[[index]])[0], int(self.labels[index])

    def __getitems__(self, indices: Sequence[Any]) -> RawBatch:
        """A batch for positions in the split, or for pairs of an epoch and a position."""
        epoch = indices[0][0] if isinstance(indices[0], tuple) else 0
        at = torch.tensor([i[1] if isinstance(i, tuple) else i for i in indices])
        draws = None if self.seed is None else draws_of_epoch(len(self), self.seed, epoch)[at]
        numbers = self.numbers[at.numpy()]
        if isinstance(self.source, Reader) and self.crops_at_reading:
            return self.source.read(numbers, draws), self.labels[at], draws
        return self.source.read(numbers), self.labels[at], draws


class Finish:
    """Makes a batch of float32 images and classes out of what a split gives, on a device.

    Args:
        split: Where the batches come from.
        statistics: Mean and standard deviation of each channel, for pixels from 0 to 1.
        device: Where the work is done; the batch stays there.
    """

    def __init__(self, split: Split, statistics: tuple[Sequence[float], Sequence[float]], device: torch.device) -> None:
        self.split, self.device = split, device
        self.mean, self.std = (torch.tensor(s, device=device).view(1, -1, 1, 1) * 255 for s in statistics)

    def __call__(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, S, S) and classes (B,)."""
        images, labels, draws = (x if x is None else x.to(self.device, non_blocking=True) for x in batch)
        if draws is not None:
            crop = "none" if self.split.crops_at_reading else self.split.crop
            images = augment(cast(Tensor, images), draws, crop, self.split.flips)
        return cast(Tensor, images).float().sub_(self.mean).div_(self.std), cast(Tensor, labels)


class BatchLoader(DataLoader[Any]):
    """A loader over a `Split`; its batches are finished in this process, on the device where they are used.

    That is done here and not in a hook of Lightning, so that a plain loop, a Trainer and a user's own hooks all see
    the same batches.
    """

    def __init__(self, *args: Any, finish: Finish, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finish = finish

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield self.finish(batch)


class ResumableLoader(BatchLoader):
    """A loader that goes on in the middle of an epoch: its state is the number of batches that it has given in it."""

    given = 0
    interrupted: Mapping[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # lazy: a Trainer calls iter() before it tells the sampler the epoch
        sampler, state, self.interrupted = cast(EpochSampler, self.sampler), self.interrupted, None
        self.given = state["given"] % len(self) if state and state["epoch"] == self._epoch else 0
        sampler.start = self.given * cast(int, self.batch_size)
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of batches given in it."""
        return {"epoch": self._epoch, "given": self.given}

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches=...) takes another sampler

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start after so many batches, if the next epoch is the one that was interrupted."""
        self.interrupted = state


class EpochSampler(DistributedSampler[Any]):
    """Positions of images, each with its epoch: the augmentation of an image hangs on both and the seed alone."""

    start = 0
    """Images to leave out of the next epoch, because they were seen before the run was interrupted."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        return ((self.epoch, index) for index in itertools.islice(super().__iter__(), start, None))
