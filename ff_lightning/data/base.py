"""What all data modules share: splits and loaders.

    read_train / read_val / read_test        samples and their targets
      |  splits.py                           classes, subset, validation: stratified, by the seed alone
      |  images/                             what a kind of data makes of the samples
      |  loaders.py                          whole batches, the same again in a run that was resumed
    (inputs, targets)                        float32 (B, ...) or a dict; int64 (B,), or float32 (B,) or (B, K)

A data set says how its training and test samples are read. Validation is cut from the training samples, with its own
seed; only ``test`` and ``predict`` use the test samples.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS

from ff_lightning.data.loaders import BatchLoader, EpochSampler, InMemory, ResumableLoader, Split, as_it_is
from ff_lightning.data.splits import (
    Indices,
    Targets,
    ValFrom,
    check_labels,
    class_numbers,
    renumber,
    split_off,
    take_subset,
)
from ff_lightning.training.plain import store_arguments, to_plain
from ff_lightning.training.trust import SafeLoading
from ff_lightning.util.arguments import check_choice, check_keywords, check_number, check_whole, shown


class DataModule(SafeLoading, LightningDataModule):  # type: ignore[misc]  # one more argument, strict, for models
    """Base of the data modules.

    All of them have the same defaults, so that another ``--data`` on the command line changes nothing else. A subclass
    has the class attributes `class_names` and `input_shape`, or sets them in its `__init__` before it calls this one.
    It implements `read_train` and `read_test`, and `read_val` if it comes with validation samples.

    Args:
        batch_size: Samples per batch and process.
        val_fraction: Share of the training samples that becomes the validation set, the same for each class.
        seed: Seed of the splits.
        samples_per_class: Number of training samples of each class; None: all.
        subset: Number of training samples, the same share of each class; None: all.
        val_from: With a subset: ``"subset"`` cuts validation from it, since someone with few labels has no others;
            ``"rest"`` cuts validation from the full set first, and draws the subset from the remainder.
        classes: Numbers or names of the classes to use, numbered from 0 in this order; None: all.

    Attributes:
        task: ``"classification"``: targets are numbers of classes, int64 (B,). ``"multilabel"``: zeros and ones,
            float32 (B, K). ``"regression"``: numbers, float32 (B,) or (B, K). See `ff_lightning.tasks`.
        class_names: Names of the classes in the order of their numbers; of the labels or outputs in other tasks.
        num_classes: K, the number of them.
        input_shape: Shape of a sample.
        vocabulary: Number of token ids if samples are token ids, else None.

    Raises:
        ValueError: If an argument is out of its range, or chooses classes where the task has none.
    """

    task: str = "classification"
    class_names: Sequence[str]
    input_shape: tuple[int, ...]
    vocabulary: int | None = None
    num_workers = 0
    """Processes that read samples which are not held in memory."""

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        samples_per_class: int | None = None,
        subset: int | None = None,
        val_from: ValFrom = "subset",
        classes: list[str | int] | None = None,  # text first: the command line takes the first type that fits
        **unknown: Any,
    ) -> None:
        super().__init__()
        store_arguments(self, logger=False)
        batch_size, seed, classes = to_plain((batch_size, seed, classes))
        check_keywords(type(self), unknown)
        check_whole("batch_size", batch_size)
        check_whole("seed", seed, least=0)
        for name, value in (("samples_per_class", samples_per_class), ("subset", subset)):
            check_whole(name, value, optional=True)
        check_number("val_fraction", val_fraction, above=0, below=1)
        check_choice("val_from", val_from, ["subset", "rest"])
        if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
            raise ValueError(f"classes={shown(classes)}: must be a list of numbers or names of classes, or None")
        if samples_per_class is not None and subset is not None:
            raise ValueError(f"samples_per_class={samples_per_class} and subset={subset}: give one of them")
        for name, chosen in (("samples_per_class", samples_per_class), ("classes", classes)):
            if chosen is not None and self.task != "classification":
                raise ValueError(f"{name}={chosen}: {type(self).__name__} has no classes, its task is {self.task}")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = self._order_seed = seed
        self.samples_per_class, self.subset, self.val_from = samples_per_class, subset, val_from
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
        """Number of classes, labels or outputs."""
        return len(self.class_names)

    # ------------------------------------------------------------------------------------- what a data set fills in

    def read_train(self) -> Any:
        """The training samples, with their classes in `targets`."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_train")

    def read_val(self) -> Any:
        """The validation samples that the data set comes with; None: they are cut from the training samples."""
        return None

    def read_test(self) -> Any:
        """The test samples."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_test")

    # ----------------------------------------------------------------------------------------- what a kind fills in

    def targets_of(self, samples: Any) -> Targets:
        """The targets of all samples, without reading the samples."""
        return np.asarray(samples.targets)

    def make_splits(self, name: str, samples: Any, targets: Targets, *parts: Indices) -> list[Split]:
        """Parts of the samples, each with its targets, from one source of inputs.

        Args:
            name: ``"train"`` (with the validation samples, if they are cut from it), ``"val"`` or ``"test"``.
            samples: What was read.
            targets: Those of all samples, (N,) or (N, K).
            parts: Numbers of the samples of each part.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement make_splits")

    def finish(self, split: Split) -> Any:
        """A function from what the split gives to a batch, run in the process that uses the batch."""
        return as_it_is

    # ------------------------------------------------------------------------------------------------------- splits

    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage in ("fit", "validate"):
            val_samples = self.read_val()
            samples, targets, train, val = self.training_samples(val_samples is not None)
            if val is None:
                (self.train_set,) = self.make_splits("train", samples, targets, train)
                (self.val_set,) = self._whole("val", "validation", val_samples)
            else:
                self.train_set, self.val_set = self.make_splits("train", samples, targets, train, val)
            self._order_seed = int(os.environ.get("PL_GLOBAL_SEED", self.seed))
        else:
            (self.test_set,) = self._whole("test", "test", self.read_test())

    def training_samples(self, has_val: bool) -> tuple[Any, Targets, Indices, Indices | None]:
        """The samples read for training, all their targets, and which of them to train and to validate on.

        Args:
            has_val: Whether there are separate validation samples; the last numbers are then None.
        """
        samples = self.read_train()
        targets = self._targets("training", samples)
        return samples, targets, *self._choose(self._strata(targets), has_val)

    def _whole(self, name: str, purpose: str, samples: Any) -> list[Split]:
        """The split that is all of some samples, except those of other classes."""
        targets = self._targets(purpose, samples)
        return self.make_splits(name, samples, targets, np.flatnonzero(self._strata(targets) >= 0))

    def _targets(self, purpose: str, samples: Any) -> Targets:
        """Targets of all samples; classes as this module numbers them, -1: not one of its classes."""
        targets = self.targets_of(samples)
        if self.task != "classification":
            if not len(targets):
                raise ValueError(f"there is no sample for {purpose}")
            return targets
        targets = targets.astype(np.int64)
        if self.class_numbers is not None:
            targets = renumber(targets, self.class_numbers)
        check_labels(targets, self.class_names, purpose)
        return targets

    def _strata(self, targets: Targets) -> Indices:
        """What is divided into the same shares, (N,): the classes; all samples alike where there are none."""
        return targets if self.task == "classification" else np.zeros(len(targets), np.int64)

    def _choose(self, strata: Indices, has_val: bool) -> tuple[Indices, Indices | None]:
        """Numbers of the samples to train on and to validate on; None: there are others to validate on."""

        def subset(numbers: Indices) -> Indices:
            return take_subset(numbers, strata, self.class_names, self.samples_per_class, self.subset, self.seed)

        def validation(numbers: Indices) -> tuple[Indices, Indices]:
            argument = f"val_fraction={self.val_fraction}"
            return split_off(numbers, strata, self.val_fraction, self.seed, argument)

        everything = np.flatnonzero(strata >= 0)
        from_subset = self.val_from == "subset" and (self.samples_per_class or self.subset)
        if has_val and not from_subset:
            return subset(everything), None
        if from_subset:
            return validation(subset(everything))
        rest, val = validation(everything)
        return subset(rest), val

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Shuffled in each epoch, the same way in a resumed run; a last batch that is not full is skipped."""
        self._check_world(self.train_set, "training")
        full = len(self.train_set) >= self.batch_size * self._world()[0]
        sampler = EpochSampler(self.train_set, *self._world(), seed=self._order_seed, drop_last=full)
        return self._loader(ResumableLoader, self.train_set, sampler, drop_last=full)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Every validation sample once, also over several processes."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Every test sample once, also over several processes."""
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The test samples in order."""
        return self._eval_loader(self.test_set)

    def _eval_loader(self, split: Split) -> BatchLoader:
        self._check_world(split, "evaluation")
        return self._loader(BatchLoader, split, UnrepeatedDistributedSampler(split, *self._world(), shuffle=False))

    def _check_world(self, split: Split, purpose: str) -> None:
        if len(split) < self._world()[0]:
            raise ValueError(
                f"{len(split)} samples for {purpose} on {self._world()[0]} processes: each process needs at least one"
            )

    def _loader(self, kind: type[BatchLoader], split: Split, sampler: Any, drop_last: bool = False) -> BatchLoader:
        workers = 0 if isinstance(split.source, InMemory) else self.num_workers
        return kind(
            split,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # starting a loader draws from it: not from the one that the model draws from
            collate_fn=as_it_is,
            finish=self.finish(split),
        )

    def _world(self) -> tuple[int, int]:
        """Number of processes, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the seed of order and augmentation, so that a resumed run has the same."""
        return {"order_seed": self._order_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take order and augmentation from the interrupted run."""
        self._order_seed = state_dict["order_seed"]
