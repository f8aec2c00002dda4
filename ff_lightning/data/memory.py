"""What tables, signals and texts share: they are held in memory, and encoded by means of the training split.

    read("train" / "val" / "test")     samples with their targets, as they are in the files
      |  test_fraction                 the test samples where no file has them, the same for every seed
      |  base.py                       subset and validation
      |  encoder.fit                   means, categories, a vocabulary: from the training split alone
      |  encoder.transform             tensors of one shape
    (inputs, targets)

Shapes: N samples of a file, K classes, labels or outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch import Tensor

from ff_lightning.data.base import DataModule
from ff_lightning.data.listing import first_five
from ff_lightning.data.loaders import InMemory, Split
from ff_lightning.data.splits import Indices, Targets, split_off
from ff_lightning.util.arguments import check_choice, check_number, check_path, check_switch

Task = Literal["classification", "multilabel", "regression"]


@dataclass
class Samples:
    """What was read.

    Args:
        inputs: An array (N, ...), or a dict of such.
        targets: Names of classes (N,), text; or float32 (N,) or (N, K).
        path: The file or folder.
        rows: Where each of them is, (N,): its line in the file, its number, or the path of a file of its own.
        unit: What `rows` counts.
        outputs: Names of the K outputs, where targets are no classes; None: they have numbers.
    """

    inputs: Any
    targets: Targets
    path: str
    rows: np.ndarray[Any, Any]
    unit: str = "line"
    outputs: Sequence[str] | None = None

    def take(self, numbers: Indices) -> "Samples":
        """The samples of these numbers."""
        if isinstance(self.inputs, dict):
            inputs: Any = {name: column[numbers] for name, column in self.inputs.items()}
        else:
            inputs = self.inputs[numbers]
        return replace(self, inputs=inputs, targets=self.targets[numbers], rows=self.rows[numbers])

    def place(self, number: int) -> str:
        """Where a sample is, for a message."""
        row = self.rows[number]
        return row if isinstance(row, str) else f"{self.path}, {self.unit} {row}"


class Encoder(Protocol):
    """Makes tensors of samples."""

    input_shape: tuple[int, ...]
    """Of a sample, once `fit` was called."""
    statistics: tuple[list[float], list[float]] | None
    """Means and standard deviations by which inputs are standardised, if they are."""

    def fit(self, samples: Samples) -> None:
        """Learn what the training split says."""

    def transform(self, samples: Samples) -> Tensor:
        """The samples as one tensor (N, ...)."""


class MemoryData(DataModule):
    """Base of the data modules that are held in memory.

    A subclass sets `task`, and all that its `read` needs, before it calls `__init__` of this class, which reads the
    training samples and fits the encoder.

    Args:
        kwargs: batch_size, val_fraction, seed, samples_per_class, subset, val_from, classes; see `DataModule`.

    Attributes:
        statistics: Means and standard deviations of the inputs before standardising, if they are standardised.
        target_statistics: Mean and standard deviation of the targets before standardising, (K,) each, if they are
            standardised.
    """

    test_fraction: float = 0.2
    standardise_target = False
    target_statistics: tuple[list[float], list[float]] | None = None

    def __init__(self, **kwargs: Any) -> None:
        train, val, self._test = self.read("train"), self.read("val"), None
        if not self.has_test:
            train, self._test = self._cut_test(train)
        self.class_names = self._names = self._names_of(train)
        self._shape = train.targets.shape[1:]
        self._train, self._val = self._numbered(train), None if val is None else self._numbered(val)
        super().__init__(**kwargs)
        self.encoder = self.make_encoder()
        samples, targets, numbers, _ = self.training_samples(self._val is not None)
        self.encoder.fit(samples.take(numbers))
        self.input_shape, self.statistics = self.encoder.input_shape, self.encoder.statistics
        if self.standardise_target:
            chosen = targets[numbers].reshape(len(numbers), -1).astype(np.float64)
            self.target_statistics = (chosen.mean(0).tolist(), deviations(chosen).tolist())

    # ------------------------------------------------------------------------------------- what a data set fills in

    has_test = False
    """Whether `read` gives test samples; otherwise they are cut from the training samples."""

    def read(self, split: str) -> Any:
        """The `Samples` of ``"train"``, ``"val"`` or ``"test"``; None where there is nothing for a split."""
        raise NotImplementedError(f"{type(self).__name__} must implement read")

    def make_encoder(self) -> Any:
        """An `Encoder`."""
        raise NotImplementedError(f"{type(self).__name__} must implement make_encoder")

    # ------------------------------------------------------------------------------------------------------- splits

    def read_train(self) -> Samples:
        """The training samples."""
        return self._train

    def read_val(self) -> Samples | None:
        """The validation samples, if there are some of their own."""
        return self._val

    def read_test(self) -> Samples:
        """The test samples."""
        return self._numbered(self._test or self.read("test"))

    def make_splits(self, name: str, samples: Any, targets: Targets, *parts: Indices) -> list[Split]:
        """Parts of the samples, from one tensor."""
        needed = np.sort(np.concatenate(parts))
        source = InMemory(self.encoder.transform(samples.take(needed)), needed)
        if self.target_statistics is not None:
            mean, std = (np.array(values, np.float32).reshape(targets.shape[1:]) for values in self.target_statistics)
            targets = (targets - mean) / std
        return [Split(source, part, targets[part]) for part in parts]

    def _cut_test(self, samples: Samples) -> tuple[Samples, Samples]:
        """The rest and the test samples: a stratified part, with a seed of its own."""
        everything = np.arange(len(samples.targets))
        strata = samples.targets if self.task == "classification" else np.zeros(len(everything), np.int64)
        argument = f"{samples.path}: test_fraction={self.test_fraction}"
        rest, test = split_off(everything, strata, self.test_fraction, 0, argument)
        return samples.take(rest), samples.take(test)

    def _names_of(self, samples: Samples) -> Sequence[str]:
        """Names of the classes of the training samples, or of their outputs."""
        if self.task == "classification":
            return class_names_of(samples)
        return samples.outputs or [str(output) for output in range(samples.targets[:1].size)]

    def _numbered(self, samples: Samples) -> Samples:
        """The samples with the numbers of their classes, if they have classes."""
        if samples.targets.shape[1:] != self._shape:
            raise ValueError(
                f"{samples.path}: has targets of shape {samples.targets.shape[1:]}, the training samples {self._shape}"
            )
        if self.task != "classification":
            return samples
        numbers = {name: number for number, name in enumerate(self._names)}
        for i, name in enumerate(samples.targets):
            if name not in numbers:
                raise ValueError(
                    f"{samples.place(i)}: class {name!r} is none of the classes of the training samples, "
                    f"{first_five(self._names)}"
                )
        targets = np.array([numbers[name] for name in samples.targets], np.int64)
        return replace(samples, targets=targets)


class FileData(MemoryData):
    """Base of the data modules that read the user's own files.

    Args:
        train: The training samples.
        val: The validation samples; None: they are cut from `train`.
        test: The test samples; None: they are cut from `train`.
        test_fraction: Without `test`, the share of `train` that becomes the test set: the same samples for every
            `seed`, and the same share of each class.
        task: ``"classification"``, ``"multilabel"`` or ``"regression"``.
        standardise_target: Whether targets of a regression are standardised by the training split
            (`target_statistics`). Errors are then in standard deviations, not in the unit of the target.
        kwargs: batch_size, val_fraction, seed, samples_per_class, subset, val_from, classes; see `DataModule`.
    """

    tasks: tuple[str, ...] = get_args(Task)
    """What `task` may be."""

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        test_fraction: float = 0.2,
        task: Task = "classification",
        standardise_target: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, path in (("train", train), ("val", val), ("test", test)):
            check_path(name, path, optional=name != "train")
        check_choice("task", task, self.tasks)
        check_switch("standardise_target", standardise_target)
        if standardise_target and task != "regression":
            raise ValueError(f"standardise_target=True is for task='regression', the task is {task!r}")
        check_number("test_fraction", test_fraction, above=0, below=1)
        self.task, self.standardise_target = task, standardise_target
        self.paths = {"train": str(train), "val": val and str(val), "test": test and str(test)}
        self.test_fraction, self.has_test = test_fraction, test is not None
        super().__init__(**kwargs)

    def read(self, split: str) -> Samples | None:
        """The samples of a split."""
        path = self.paths[split]
        return None if path is None else self.read_file(path)

    def read_file(self, path: str) -> Samples:
        """The samples of a file or folder."""
        raise NotImplementedError(f"{type(self).__name__} must implement read_file")


def class_names_of(samples: Samples) -> Sequence[str]:
    """The different classes of samples: in the order of their values if all are numbers, else by name.

    Raises:
        ValueError: If there are fewer than two.
    """
    names = set(samples.targets.tolist())
    if len(names) < 2:
        raise ValueError(f"{samples.path}: must hold samples of two or more classes, it holds {sorted(names)}")
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(sorted(names), key=int) if whole else sorted(names)


def deviations(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The standard deviation of each column of (N, F); 1 where all values are the same."""
    std = values.std(0)
    return np.where(std > 0, std, 1.0)
