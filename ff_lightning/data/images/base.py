"""What all data modules of images share: pixels, augmentation and normalisation.

read_train / read_val / read_test        images and classes, by torchvision or by the user's own data set
|  reading.py, cache.py                one uint8 tensor in memory, or a reader for workers
|  split.py                            uint8 batches
|  augment.py                          crops, flips and normalisation of the batch, on the device
(x, y)                                   float32 (B, C, S, S), int64 (B,)
"""

import inspect
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS

from ff_lightning.data.base import DataModule
from ff_lightning.data.images.augment import Crop
from ff_lightning.data.images.cache import cached, name_of, user_folder
from ff_lightning.data.images.reading import (
    OnError,
    Reader,
    Shape,
    files_of,
    find_readable,
    labels_of,
    read_again,
    read_all,
)
from ff_lightning.data.images.split import Finish, ImageSplit
from ff_lightning.data.loaders import InMemory, Split
from ff_lightning.data.splits import Indices, check_labels
from ff_lightning.training.plain import to_plain
from ff_lightning.util.arguments import check_choice, check_path, check_switch, check_whole

log = logging.getLogger(__name__)

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEMORY_LIMIT = 2 * 2**30
"""Bytes of pixels of a split up to which it is held in memory."""
FORMAT = 2  # of what is cached: a change of how images are read makes the files of before stale
PURPOSES = {"train": "training", "val": "validation", "test": "test"}


class ImageData(DataModule):
    """Base of the data modules of images (B, C, H, W), float32, normalised; classes (B,), int64.

    A subclass has the class attributes `class_names`, `input_shape` and `statistics`, or sets them in its `__init__`
    before it calls this one. It implements `read_train` and `read_test`, and `read_val` if it comes with a validation
    set. What they return must give the same image each time; this class does the augmentation.

    Args:
        root: Folder of the data.
        num_workers: Processes that decode images; None: half the cores, 8 at most. Images in memory need none.
        image_size: Pixels of a side; None: those of the data set.
        augment: Random crops and flips of the training images.
        download: Whether to download missing files to `root`, for sets that can be downloaded.
        in_memory: Whether a split is held as one tensor of pixels, or read batch by batch by workers; None: held if it
            has up to 2 GiB.
        cache_dir: Folder for decoded images of sets in memory that are read from files; None: ``$FF_LIGHTNING_CACHE``,
            or ff_lightning in the user's cache folder (``~/.cache``).
        on_error: An image that cannot be read is an error (``"raise"``), or is reported and left out (``"skip"``).
        kwargs: batch_size, val_fraction, seed, samples_per_class, subset, val_from, classes; see `DataModule`.

    Attributes:
        class_names: Names of the classes in the order of their numbers.
        num_classes: K.
        input_shape: (C, H, W) of an image.

    Raises:
        ValueError: If an argument is out of its range.
    """

    input_shape: tuple[int, ...]
    train_set: ImageSplit
    statistics: tuple[Sequence[float], Sequence[float]]
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    reads_root = True
    """Whether the samples lie in files below `root`."""
    flips = True
    """Whether a mirrored image is of the same class."""
    crops = True
    """Whether a part of an image is of the same class."""

    def __init__(
        self,
        root: str = "data",
        num_workers: int | None = None,
        image_size: int | None = None,
        augment: bool = True,
        download: bool = True,
        in_memory: bool | None = None,
        cache_dir: str | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        root, num_workers, image_size, cache_dir = to_plain((root, num_workers, image_size, cache_dir))
        check_path("root", root)
        check_path("cache_dir", cache_dir, optional=True)
        check_whole("num_workers", num_workers, least=0, optional=True)
        check_whole("image_size", image_size, optional=True)
        for name, switch in (("augment", augment), ("download", download)):
            check_switch(name, switch)
        check_switch("in_memory", in_memory, optional=True)
        check_choice("on_error", on_error, ["raise", "skip"])
        self.root = root
        self.num_workers = min(8, _cores() // 2) if num_workers is None else num_workers
        self.image_size = image_size
        if image_size is not None and hasattr(self, "input_shape"):
            self.input_shape = (self.input_shape[0], image_size, image_size)
        self.augment = augment
        self.download = download
        self.in_memory, self.cache_dir, self.on_error = in_memory, cache_dir, on_error

    @property
    def image_shape(self) -> Shape:
        """(C, S, S) of the pixels."""
        channels, height, width = self.input_shape
        return channels, height, width

    def targets_of(self, samples: Any) -> Indices:
        """The classes of all images, without reading the images."""
        return labels_of(samples)

    def make_splits(self, name: str, samples: Any, targets: Indices, *parts: Indices) -> list[Split]:
        """Parts of the images, each with its classes, from one source of pixels."""
        needed = np.sort(np.concatenate(parts))
        reader = Reader(samples, self.image_shape)
        source: Reader | InMemory = reader
        readable = np.ones(len(needed), bool)
        if self._fits_in_memory(len(needed)):
            files = files_of(samples)
            if files is None or len(needed) < len(files):
                content = read_all(reader, needed, self.num_workers, self.on_error)
            else:
                path = self._cache_file(f"{name}-{self.image_shape[1]}")
                settings = (FORMAT, self.image_shape, self.on_error, *self._own_arguments())
                content = cached(
                    path,
                    files,
                    settings,
                    lambda: read_all(reader, needed, self.num_workers, self.on_error),
                    lambda kept: read_again(kept, reader, needed),
                )
            source, readable = InMemory(content["pixels"], needed), content["readable"].numpy()
        elif self.on_error == "skip":
            readable = find_readable(reader, needed, self.num_workers)
        if not readable.all():
            log.warning(
                "left out %d of %d images of %r that cannot be read", (~readable).sum(), len(readable), self.root
            )
            if not readable.any():
                raise OSError(
                    f"root={self.root!r}: none of the {len(readable)} images for {PURPOSES[name]} can be read"
                )
            check_labels(targets[needed[readable]], self.class_names, PURPOSES[name])
        parts = tuple(part[readable[np.searchsorted(needed, part)]] for part in parts)
        return [ImageSplit(source, part, targets[part]) for part in parts]

    def _cache_file(self, name: str) -> Path:
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else user_folder()
        return folder / f"{type(self).__name__}-{name_of(Path(self.root).expanduser())}-{name}.pt"

    def _own_arguments(self) -> tuple[Any, ...]:
        """The class, and what it takes beyond the arguments of all sets: both may change what is read."""
        common = {**inspect.signature(DataModule).parameters, **inspect.signature(ImageData).parameters}
        own = {name: value for name, value in self.hparams.items() if name not in common and name[0] != "_"}
        return type(self).__module__, type(self).__qualname__, *sorted(own.items())

    def _fits_in_memory(self, images: int) -> bool:
        return images * math.prod(self.image_shape) <= MEMORY_LIMIT if self.in_memory is None else self.in_memory

    def _augmentation(self) -> tuple[Crop, bool]:
        """How training images are cropped, and whether they are mirrored."""
        crop: Crop = "none" if not self.crops else "shift" if self.image_shape[1] <= 64 else "resized"
        return crop, self.flips

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Shuffled and augmented in each epoch, the same way in a resumed run."""
        self.train_set.augment(self._order_seed, *(self._augmentation() if self.augment else ("none", False)))
        return super().train_dataloader()

    def finish(self, split: Any) -> Callable[[Any], Any]:
        """Augmentation and normalisation of a batch, on the device of the Trainer, or the CPU where there is none."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return Finish(split, self.statistics, device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
