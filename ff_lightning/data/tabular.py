"""Tables: rows of numbers and categories become vectors (F,)."""

from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes

from ff_lightning.data.columns import OnMissing, TableEncoder, targets_of
from ff_lightning.data.listing import first_five
from ff_lightning.data.memory import FileData, MemoryData, Samples
from ff_lightning.data.records import read_records
from ff_lightning.data.splits import Targets
from ff_lightning.training.plain import to_plain
from ff_lightning.util.arguments import check_choice, check_delimiter, check_switch, shown


class Tabular(FileData):
    """Your own table: csv, tsv, jsonl or parquet (with pandas), one sample in a row.

    Columns of numbers are standardised by the training split. Other columns are one-hot, with a category for each of
    their values in the training split. A sample is float32 (F,).

    Args:
        train: File of the training samples, with the names of its columns in the first line.
        target: Column of the target: classes; for ``task="multilabel"`` a list of columns of 0 and 1; for
            ``task="regression"`` one or more columns of numbers.
        categorical: Columns of categories; None: those in which less than half of the values are numbers.
        drop: Columns to leave out, such as a row number.
        on_missing: A missing value (nothing, ``NA``, ``NaN``, ``null``, ``?``) is an error (``"raise"``) or is filled
            (``"fill"``): numeric columns get their mean, other columns no category.
        delimiter: Between the values of a line; None: a comma, in a file that ends in .tsv a tab.
        kwargs: val, test, test_fraction, task, batch_size, val_fraction, seed, ...; see `FileData` and `DataModule`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an argument or a file is not as it should be; line and column are named.
    """

    def __init__(
        self,
        train: str,
        target: list[str] | str,  # lists first: the command line takes the first type that fits
        categorical: list[str] | None = None,
        drop: list[str] | None = None,
        on_missing: OnMissing = "raise",
        delimiter: str | None = None,
        **kwargs: Any,
    ) -> None:
        target, categorical, drop = to_plain((target, categorical, drop))
        check_choice("on_missing", on_missing, ["raise", "fill"])
        for name, given in (("categorical", categorical), ("drop", drop)):
            if given is not None and (isinstance(given, str) or not all(isinstance(column, str) for column in given)):
                raise ValueError(f"{name}={shown(given)}: must be a list of names of columns, or None")
        check_delimiter(delimiter)
        self.target, self.delimiter = target, delimiter
        self.categorical, self.drop, self.on_missing = categorical or [], drop or [], on_missing
        self._columns: list[str] = []
        super().__init__(train=train, **kwargs)

    def read_file(self, path: str) -> Samples:
        """The rows of a table; those of the first are asked for the names of the columns."""
        records = read_records(path, self.delimiter)
        targets, outputs = targets_of(records, self.target, self.task)
        if not self._columns:
            for name in self.categorical:
                records.column("categorical", name)
            for name in self.drop:
                records.column("drop", name)
            out = {*self.drop, *([self.target] if isinstance(self.target, str) else self.target)}
            self._columns = [name for name in records.columns if name not in out]
            if not self._columns:
                raise ValueError(f"{path}: there is no column besides the target and those in drop")
        missing = [name for name in self._columns if name not in records.columns]
        if missing:
            raise ValueError(f"{path}: has no column {first_five(missing)}, which the training samples have")
        inputs = {name: records.columns[name] for name in self._columns}
        return Samples(inputs, targets, records.path, records.lines, records.unit, outputs)

    def make_encoder(self) -> TableEncoder:
        """Of numbers and categories."""
        return TableEncoder(self.categorical, self.on_missing)


class BreastCancer(MemoryData):
    """569 tumours, 30 measures of the cells of each, malignant or benign; 20 % are the test set. Embedded.

    Source: Street, Wolberg and Mangasarian, Nuclear Feature Extraction for Breast Tumor Diagnosis, 1993; by
    scikit-learn.

    Args:
        kwargs: batch_size, val_fraction, seed, ...; see `DataModule`.

    Examples:
        >>> data = BreastCancer()
        >>> data.num_classes, data.input_shape, data.task
        (2, (30,), 'classification')
    """

    def read(self, split: str) -> Samples | None:
        """The table."""
        if split != "train":
            return None
        table = load_breast_cancer()
        return _embedded("breast_cancer", table, table.target_names[table.target].astype(object))

    def make_encoder(self) -> TableEncoder:
        """Of numbers."""
        return TableEncoder()


class Diabetes(MemoryData):
    """442 patients, 10 measures of each, and how far their diabetes came in a year: a regression. Embedded.

    20 % are the test set. The target is from 25 to 346.

    Source: Efron, Hastie, Johnstone and Tibshirani, Least Angle Regression, Annals of Statistics 32, 2004; by
    scikit-learn.

    Args:
        standardise_target: Whether targets are standardised by the training split (`target_statistics`). Errors are
            then in standard deviations, not in the unit of the target.
        kwargs: batch_size, val_fraction, seed, ...; see `DataModule`.

    Examples:
        >>> data = Diabetes()
        >>> data.num_classes, data.input_shape, data.task
        (1, (10,), 'regression')
    """

    task = "regression"

    def __init__(self, standardise_target: bool = True, **kwargs: Any) -> None:
        check_switch("standardise_target", standardise_target)
        self.standardise_target = standardise_target
        super().__init__(**kwargs)

    def read(self, split: str) -> Samples | None:
        """The table."""
        table = load_diabetes(scaled=False)
        targets = table.target.astype(np.float32)
        return _embedded("diabetes", table, targets, ["progression"]) if split == "train" else None

    def make_encoder(self) -> TableEncoder:
        """Of numbers."""
        return TableEncoder()


def _embedded(name: str, table: Any, targets: Targets, outputs: list[str] | None = None) -> Samples:
    """A table of scikit-learn."""
    inputs = {str(column): table.data[:, i] for i, column in enumerate(table.feature_names)}
    return Samples(inputs, targets, name, np.arange(1, len(targets) + 1), "row", outputs)
