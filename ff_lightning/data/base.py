"""What all data modules share: splits, transforms and loaders.

A data set says how its training and its test images are read; validation is always cut from the training images, with
a seed of its own, and the test images are touched by ``test`` and ``predict`` alone.
"""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Sample = tuple[Any, int]  # an image (PIL or uint8 tensor) and its class


class ImageData(LightningDataModule):
    """Base of the data modules: images (B, C, H, W), float32, normalised; classes (B,), int64.

    All data sets have the same defaults, so that another ``--data`` on the command line changes nothing else. A data
    set sets `class_names`, `input_shape` and `statistics` in its `__init__` and implements `read_train` and
    `read_test`; `read_val` only where it has a validation set of its own.

    Args:
        root: Folder of the data.
        batch_size: Images per batch and process.
        num_workers: Processes that read images; None: half the cores, 8 at most, or none for images in memory.
        image_size: Pixels of a side; None: as the data set has them.
        augment: Random crops and flips of the training images.
        val_fraction: Share of the training images that becomes the validation set, the same for each class.
        seed: Seed of that split.

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

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int | None = None,
        augment: bool = True,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: must be above 0 and below 1")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size}: must be at least 1")
        self.root = root
        self.batch_size = batch_size
        self.num_workers = self.default_workers() if num_workers is None else num_workers
        self.image_size = image_size
        if image_size is not None and hasattr(self, "input_shape"):
            self.input_shape = (self.input_shape[0], image_size, image_size)
        self.augment = augment
        self.val_fraction = val_fraction
        self.seed = seed

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    # ------------------------------------------------------------------------------------- what a data set fills in

    def default_workers(self) -> int:
        """Processes that read images if the user gave no number."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores // 2)

    def read_train(self) -> Dataset[Sample]:
        """The training images, with their classes in `targets`."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_train")

    def read_val(self) -> Dataset[Sample] | None:
        """The validation images of the data set itself; None: they are cut from the training images."""
        return None

    def read_test(self) -> Dataset[Sample]:
        """The test images."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_test")

    # ----------------------------------------------------------------------------------------------- splits and loaders

    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage in ("fit", "validate"):
            images = self.read_train()
            chosen: Sequence[int] = range(len(cast(Any, images)))
            val_images = self.read_val()
            if val_images is None:
                chosen, held_out = self._split(images)
                self.val_set: Dataset[Sample] = _Prepared(images, held_out, self.eval_transform())
            else:
                self.val_set = _Prepared(val_images, None, self.eval_transform())
            self.train_set: Dataset[Sample] = _Augmented(images, chosen, self.train_transform(), self._shuffle_seed())
        else:
            self.test_set: Dataset[Sample] = _Prepared(self.read_test(), None, self.eval_transform())

    def _split(self, images: Any) -> tuple[list[int], list[int]]:
        """Numbers of the images to train on and to validate on."""
        targets = np.asarray(images.targets)
        try:
            train, val = train_test_split(
                np.arange(len(targets)), test_size=self.val_fraction, stratify=targets, random_state=self.seed
            )
        except ValueError as error:
            raise ValueError(f"val_fraction={self.val_fraction} of {len(targets)} training images: {error}") from error
        return sorted(train.tolist()), sorted(val.tolist())

    def train_transform(self) -> v2.Transform:
        """From an image to a normalised tensor, with augmentation."""
        size = self.input_shape[1]
        steps: list[Any] = [v2.ToImage()]
        if not self.augment:
            return self.eval_transform()
        if size <= 64:
            steps += [*self._resize(), v2.RandomCrop(size, padding=size // 8)]
        else:
            steps += [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)]
        return v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if self.flips else []), *self._normalize()])

    def eval_transform(self) -> v2.Transform:
        """From an image to a normalised tensor: the centre of it."""
        return v2.Compose([v2.ToImage(), *self._resize(), *self._normalize()])

    def _resize(self) -> list[v2.Transform]:
        size = self.input_shape[1]
        return [v2.Resize(size, antialias=True), v2.CenterCrop(size)]

    def _normalize(self) -> list[v2.Transform]:
        mean, std = self.statistics
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Shuffled anew each epoch, the same way in a run that was resumed; the last partial batch is left out."""
        self._check_world(self.train_set, "training")
        full = len(cast(Any, self.train_set)) >= self.batch_size * self._world()[0]
        sampler = EpochSampler(self.train_set, *self._world(), seed=self._shuffle_seed(), drop_last=full)
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

    def _eval_loader(self, images: Dataset[Sample]) -> DataLoader[Any]:
        self._check_world(images, "evaluation")
        return self._loader(DataLoader, images, UnrepeatedDistributedSampler(images, *self._world(), shuffle=False))

    def _check_world(self, images: Any, purpose: str) -> None:
        if len(images) < self._world()[0]:
            raise ValueError(
                f"{len(images)} images for {purpose} on {self._world()[0]} processes: each process needs at least one"
            )

    def _loader(
        self, kind: type[DataLoader[Any]], images: Dataset[Sample], sampler: Any, drop_last: bool = False
    ) -> DataLoader[Any]:
        return kind(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # starting a loader draws from it: not from the one that the model draws from
        )

    def _world(self) -> tuple[int, int]:
        """Number of processes, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _shuffle_seed(self) -> int:
        """The seed of `seed_everything`, so that runs with other seeds see other orders, alike on all processes."""
        return int(os.environ.get("PL_GLOBAL_SEED", self.seed))


class EpochSampler(DistributedSampler[Any]):
    """Numbers of images, each with its epoch: the augmentation of an image hangs on both and on nothing else."""

    start = 0
    """Images to leave out of the next epoch, because they were seen before the run was interrupted."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        return ((self.epoch, index) for index in itertools.islice(super().__iter__(), start, None))


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on in the middle of an epoch: its state is the number of batches that it has given."""

    given = 0
    resume_at = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # lazy: a Trainer calls iter() before it tells the sampler the epoch
        self.given, self.resume_at = self.resume_at, 0
        cast(EpochSampler, self.sampler).start = self.given * cast(int, self.batch_size)
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches given in this epoch."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch after so many batches."""
        self.resume_at = state["given"]


class _Prepared(Dataset[Sample]):
    """Some of the images of a data set, each through a transform."""

    def __init__(self, images: Any, chosen: Sequence[int] | None, transform: Any) -> None:
        self.images = images
        self.chosen = range(len(images)) if chosen is None else chosen
        self.transform = transform

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.chosen[index]]
        return self.transform(image), int(label)


class _Augmented(_Prepared):
    """The training images; how one is augmented hangs on the seed, the epoch and its number, and on nothing else."""

    def __init__(self, images: Any, chosen: Sequence[int], transform: Any, seed: int) -> None:
        super().__init__(images, chosen, transform)
        self.seed = seed

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:
        """The image with this (epoch, number)."""
        epoch, number = index if isinstance(index, tuple) else (0, index)
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(random.Random(f"{self.seed} {epoch} {number}").getrandbits(63))
        try:
            return super().__getitem__(number)
        finally:
            generator.set_state(before)
