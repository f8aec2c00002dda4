"""What all data modules share: splits and loaders.

    read_train / read_val / read_test        images and classes, by torchvision or by the user's own data set
      |  splits.py                           classes, subset, validation: stratified, by the seed alone
      |  reading.py, cache.py                one uint8 tensor in memory, or a reader for workers
      |  loaders.py                          uint8 batches, the same again in a run that was resumed
      |  augment.py                          crops, flips and normalisation of the batch, on the device
    (x, y)                                   float32 (B, C, S, S), int64 (B,)

A data set says how its training and its test images are read; validation is cut from the training images, with a seed
of its own, and the test images are touched by ``test`` and ``predict`` alone.
"""

import inspect
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch.utils.data import Dataset

from ff_lightning.data.augment import Crop
from ff_lightning.data.cache import cached, name_of, user_folder
from ff_lightning.data.loaders import BatchLoader, EpochSampler, Finish, ResumableLoader, Sample, Split
from ff_lightning.data.reading import (
    Held,
    Numbers,
    OnError,
    Reader,
    as_it_is,
    files_of,
    find_readable,
    labels_of,
    read_again,
    read_all,
)
from ff_lightning.data.splits import ValFrom, check_labels, class_numbers, renumber, split_off, take_subset
from ff_lightning.training.plain import store_arguments, to_plain
from ff_lightning.training.trust import SafeLoading
from ff_lightning.util.arguments import check_keywords, check_number, check_path, check_switch, check_whole, shown

log = logging.getLogger(__name__)

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEMORY_LIMIT = 2 * 2**30
"""Bytes of pixels of a split up to which it is held in memory."""
FORMAT = 2  # of what is cached: a change of how images are read makes the files of before stale
PURPOSES = {"train": "training", "val": "validation", "test": "test"}


class ImageData(SafeLoading, LightningDataModule):  # type: ignore[misc]  # one more argument, strict, for models
    """Base of the data modules: images (B, C, H, W), float32, normalised; classes (B,), int64.

    All data sets have the same defaults, so that another ``--data`` on the command line changes nothing else. A data
    set has `class_names`, `input_shape` and `statistics` as class attributes, or sets them in its `__init__` before it
    calls this one, and implements `read_train` and `read_test`; `read_val` only where it has a validation set of its
    own. What they return gives the same image each time: augmentation is done here.

    Args:
        root: Folder of the data.
        batch_size: Images per batch and process.
        num_workers: Processes that decode images; None: half the cores, 8 at most. Images in memory need none.
        image_size: Pixels of a side; None: as the data set has them.
        augment: Random crops and flips of the training images.
        val_fraction: Share of the training images that becomes the validation set, the same for each class.
        seed: Seed of the splits.
        samples_per_class: So many training images of each class, instead of all.
        subset: So many training images in all, of each class its share.
        val_from: With a subset: whether validation images are cut from this ``"subset"``, since whoever has few labels
            has no others, or are those of the whole set (``"rest"``), and the subset is taken from what they leave.
        classes: Numbers or names of classes: only these, numbered from 0 in this order.
        download: Whether to download to `root` what is not there, if there is something to download.
        in_memory: Hold a split as one tensor of pixels; None: up to 2 GiB. Else workers read it batch by batch.
        cache_dir: Folder for the decoded images of a set in memory that is made of files; None:
            ``$FF_LIGHTNING_CACHE``, or ff_lightning in the user's folder of caches (``~/.cache``).
        on_error: An image that cannot be read is an error (``"raise"``) or is left out and reported (``"skip"``).

    Attributes:
        class_names: Names of the classes in the order of their numbers.
        num_classes: K.
        input_shape: (C, H, W) of an image.

    Raises:
        ValueError: If an argument is out of its range.
    """

    class_names: Sequence[str]
    input_shape: tuple[int, int, int]
    statistics: tuple[Sequence[float], Sequence[float]]
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    flips = True
    """Whether a mirrored image is of the same class."""
    crops = True
    """Whether a part of an image is of the same class."""

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int | None = None,
        augment: bool = True,
        val_fraction: float = 0.1,
        seed: int = 0,
        samples_per_class: int | None = None,
        subset: int | None = None,
        val_from: ValFrom = "subset",
        classes: list[str | int] | None = None,  # text first: the command line takes the first type that fits
        download: bool = True,
        in_memory: bool | None = None,
        cache_dir: str | None = None,
        on_error: OnError = "raise",
        **unknown: Any,
    ) -> None:
        super().__init__()
        store_arguments(self, logger=False)
        root, batch_size, num_workers, image_size, seed, classes, cache_dir = to_plain(
            (root, batch_size, num_workers, image_size, seed, classes, cache_dir)
        )
        check_keywords(type(self), unknown)
        check_path("root", root)
        check_path("cache_dir", cache_dir, optional=True)
        check_whole("batch_size", batch_size)
        check_whole("num_workers", num_workers, least=0, optional=True)
        check_whole("seed", seed, least=0)
        for name, value in (("image_size", image_size), ("samples_per_class", samples_per_class), ("subset", subset)):
            check_whole(name, value, optional=True)
        for name, switch in (("augment", augment), ("download", download)):
            check_switch(name, switch)
        check_switch("in_memory", in_memory, optional=True)
        check_number("val_fraction", val_fraction, above=0, below=1)
        if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
            raise ValueError(f"classes={shown(classes)}: must be a list of numbers or names of classes, or None")
        if samples_per_class is not None and subset is not None:
            raise ValueError(f"samples_per_class={samples_per_class} and subset={subset}: give one of them")
        for name, choice, allowed in (
            ("val_from", val_from, ("subset", "rest")), ("on_error", on_error, ("raise", "skip")),
        ):  # fmt: skip
            if choice not in allowed:
                raise ValueError(f"{name}={choice!r}: must be one of {allowed}")
        self.root = root
        self.batch_size = batch_size
        self.num_workers = min(8, _cores() // 2) if num_workers is None else num_workers
        self.image_size = image_size
        if image_size is not None and hasattr(self, "input_shape"):
            self.input_shape = (self.input_shape[0], image_size, image_size)
        self.augment = augment
        self.val_fraction = val_fraction
        self.seed = seed
        self.samples_per_class, self.subset, self.val_from = samples_per_class, subset, val_from
        self.download = download
        self.in_memory, self.cache_dir, self.on_error = in_memory, cache_dir, on_error
        self._order_seed = seed
        self.class_numbers: list[int] | None = None
        if classes is not None:
            if not hasattr(self, "class_names"):
                raise ValueError(
                    f"classes={classes}: {type(self).__name__} must set class_names before super().__init__"
                )
            self.class_numbers = class_numbers(classes, self.class_names)
            self.class_names = [self.class_names[number] for number in self.class_numbers]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    # ------------------------------------------------------------------------------------- what a data set fills in

    def read_train(self) -> Dataset[Sample]:
        """The training images, with their classes in `targets`."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_train")

    def read_val(self) -> Dataset[Sample] | None:
        """The validation images of the data set itself; None: they are cut from the training images."""
        return None

    def read_test(self) -> Dataset[Sample]:
        """The test images."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_test")

    # ------------------------------------------------------------------------------------------------------- splits

    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage in ("fit", "validate"):
            images, val_images = self.read_train(), self.read_val()
            labels = self._labels("training", images)
            train, val = self._choose(labels, val_images is not None)
            if val is None:
                (self.train_set,) = self._splits("train", images, labels, train)
                labels = self._labels("validation", val_images)
                (self.val_set,) = self._splits("val", val_images, labels, np.flatnonzero(labels >= 0))
            else:
                self.train_set, self.val_set = self._splits("train", images, labels, train, val)
            self._order_seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        else:
            images = self.read_test()
            labels = self._labels("test", images)
            (self.test_set,) = self._splits("test", images, labels, np.flatnonzero(labels >= 0))

    def _labels(self, purpose: str, images: Any) -> Numbers:
        """Classes of all images of a data set, as this module numbers them; -1: not one of its classes."""
        labels = labels_of(images)
        if self.class_numbers is not None:
            labels = renumber(labels, self.class_numbers)
        check_labels(labels, self.class_names, purpose)
        return labels

    def _choose(self, labels: Numbers, has_val: bool) -> tuple[Numbers, Numbers | None]:
        """Numbers of the images to train on and to validate on; None: the validation set that the data set has."""

        def subset(numbers: Numbers) -> Numbers:
            return take_subset(numbers, labels, self.class_names, self.samples_per_class, self.subset, self.seed)

        def validation(numbers: Numbers) -> tuple[Numbers, Numbers]:
            argument = f"val_fraction={self.val_fraction}"
            return split_off(numbers, labels, self.val_fraction, self.seed, argument)

        everything = np.flatnonzero(labels >= 0)
        from_subset = self.val_from == "subset" and (self.samples_per_class or self.subset)
        if has_val and not from_subset:
            return subset(everything), None
        if from_subset:
            return validation(subset(everything))
        rest, val = validation(everything)
        return subset(rest), val

    def _splits(self, name: str, images: Any, labels: Numbers, *parts: Numbers) -> list[Split]:
        """Parts of the images, each with its classes, from one source of pixels."""
        needed = np.sort(np.concatenate(parts))
        reader = Reader(images, self.input_shape)
        source: Reader | Held = reader
        readable = np.ones(len(needed), bool)
        if self._fits_in_memory(len(needed)):
            files = files_of(images)
            if files is None or len(needed) < len(files):
                content = read_all(reader, needed, self.num_workers, self.on_error)
            else:
                path = self._cache_file(f"{name}-{self.input_shape[1]}")
                settings = (FORMAT, self.input_shape, self.on_error, *self._own_arguments())
                content = cached(
                    path,
                    files,
                    settings,
                    lambda: read_all(reader, needed, self.num_workers, self.on_error),
                    lambda kept: read_again(kept, reader, needed),
                )
            source, readable = Held(content["pixels"], needed), content["readable"].numpy()
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
            check_labels(labels[needed[readable]], self.class_names, PURPOSES[name])
        parts = tuple(part[readable[np.searchsorted(needed, part)]] for part in parts)
        return [Split(source, part, labels[part]) for part in parts]

    def _cache_file(self, name: str) -> Path:
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else user_folder()
        return folder / f"{type(self).__name__}-{name_of(Path(self.root).expanduser())}-{name}.pt"

    def _own_arguments(self) -> tuple[Any, ...]:
        """The class, and what it takes beyond the arguments of all sets: both may change what is read."""
        common = inspect.signature(ImageData).parameters
        own = {name: value for name, value in self.hparams.items() if name not in common and name[0] != "_"}
        return type(self).__module__, type(self).__qualname__, *sorted(own.items())

    def _fits_in_memory(self, images: int) -> bool:
        return images * math.prod(self.input_shape) <= MEMORY_LIMIT if self.in_memory is None else self.in_memory

    def _augmentation(self) -> tuple[Crop, bool]:
        """How training images are cropped, and whether they are mirrored."""
        crop: Crop = "none" if not self.crops else "shift" if self.input_shape[1] <= 64 else "resized"
        return crop, self.flips

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Shuffled anew each epoch, the same way in a run that was resumed; the last partial batch is left out."""
        self._check_world(self.train_set, "training")
        full = len(self.train_set) >= self.batch_size * self._world()[0]
        self.train_set.augment(self._order_seed, *(self._augmentation() if self.augment else ("none", False)))
        sampler = EpochSampler(self.train_set, *self._world(), seed=self._order_seed, drop_last=full)
        return self._loader(ResumableLoader, self.train_set, sampler, drop_last=full)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Every validation image once, also over several processes."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Every test image once, also over several processes."""
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The test images in order."""
        return self._eval_loader(self.test_set)

    def _eval_loader(self, images: Split) -> BatchLoader:
        self._check_world(images, "evaluation")
        return self._loader(BatchLoader, images, UnrepeatedDistributedSampler(images, *self._world(), shuffle=False))

    def _check_world(self, images: Split, purpose: str) -> None:
        if len(images) < self._world()[0]:
            raise ValueError(
                f"{len(images)} images for {purpose} on {self._world()[0]} processes: each process needs at least one"
            )

    def _loader(self, kind: type[BatchLoader], images: Split, sampler: Any, drop_last: bool = False) -> BatchLoader:
        workers = 0 if isinstance(images.source, Held) else self.num_workers
        return kind(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # starting a loader draws from it: not from the one that the model draws from
            collate_fn=as_it_is,
            finish=Finish(images, self.statistics, self._device()),
        )

    def _world(self) -> tuple[int, int]:
        """Number of processes, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _device(self) -> torch.device:
        """Where batches are augmented: where the Trainer uses them, or the CPU where there is no Trainer."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the seed of order and augmentation, so that a run goes on with the same ones."""
        return {"order_seed": self._order_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with order and augmentation of the run that was interrupted."""
        self._order_seed = state_dict["order_seed"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
