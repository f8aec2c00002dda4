"""Batches of images: held or read as uint8, then augmented and normalised on the device."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ff_lightning.data.images.augment import Crop, augment, draws_of_epoch
from ff_lightning.data.images.reading import Reader
from ff_lightning.data.loaders import Split

Sample = tuple[Any, int]  # an image (PIL or uint8 tensor) and its class
RawBatch = tuple[Tensor, Tensor, Tensor | None]  # uint8 (B, C, S, S); int64 (B,); draws (B, 5) of training images


class ImageSplit(Split):
    """The images of a split, without augmentation until `augment` is called."""

    crop: Crop = "none"
    flips = False
    seed: int | None = None

    def augment(self, seed: int, crop: Crop, flips: bool) -> None:
        """Augment the images, with draws of this seed; see `ff_lightning.data.images.augment.augment`."""
        self.seed, self.crop, self.flips = seed, crop, flips

    @property
    def crops_at_reading(self) -> bool:
        """Where there are more pixels in the file than are kept of it, the crop is taken when it is read."""
        return self.crop == "resized" and isinstance(self.source, Reader)

    def batch(self, at: Tensor, epoch: int) -> RawBatch:
        """The images at these positions, (B,), with their draws of an epoch."""
        draws = None if self.seed is None else draws_of_epoch(len(self), self.seed, epoch)[at]
        numbers = self.numbers[at.numpy()]
        if self.crops_at_reading:
            return self.source.read(numbers, draws), self.targets[at], draws
        return self.source.read(numbers), self.targets[at], draws


class Finish:
    """Makes a batch of float32 images and classes out of what a split gives, on a device.

    Args:
        split: Where the batches come from.
        statistics: Mean and standard deviation of each channel, for pixels from 0 to 1.
        device: Where the work is done; the batch stays there.
    """

    def __init__(
        self, split: ImageSplit, statistics: tuple[Sequence[float], Sequence[float]], device: torch.device
    ) -> None:
        self.split, self.device = split, device
        self.mean, self.std = (torch.tensor(s, device=device).view(1, -1, 1, 1) * 255 for s in statistics)

    def __call__(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, S, S) and classes (B,)."""
        images, labels, draws = (x if x is None else x.to(self.device, non_blocking=True) for x in batch)
        if draws is not None:
            crop = "none" if self.split.crops_at_reading else self.split.crop
            images = augment(cast(Tensor, images), draws, crop, self.split.flips)
        return cast(Tensor, images).float().sub_(self.mean).div_(self.std), cast(Tensor, labels)
