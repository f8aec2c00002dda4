"""Columns of tables: what is missing, what is a number, and vectors made of both kinds of columns.

Shapes: N rows, F features.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ff_lightning.data.listing import first_five
from ff_lightning.data.memory import Samples, deviations
from ff_lightning.data.records import Records
from ff_lightning.data.splits import Targets
from ff_lightning.util.arguments import shown

log = logging.getLogger(__name__)

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""Text that stands for a value that is not there, in small letters."""
MOST_CATEGORIES = 100
"""Different texts up to which a column is taken for one of categories without being named as one."""

OnMissing = Literal["raise", "fill"]
Column = np.ndarray[Any, Any]


def is_missing(value: Any) -> bool:
    """Whether a value is not there."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def as_name(value: Any) -> str:
    """A value as the name of a class or category: whole numbers without a point.

    Examples:
        >>> as_name(" cat "), as_name(2.0), as_name(True)
        ('cat', '2', 'True')
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def as_number(value: Any) -> float:
    """A value as a number: NaN for what is missing.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if is_missing(value):
        return math.nan
    if isinstance(value, list | dict):
        raise ValueError(f"{shown(value)} is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or missing."""
    try:
        as_number(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def missing_in(column: Column) -> Column:
    """Which values are missing, (N,)."""
    if _finite(column) is not None:
        return np.zeros(len(column), bool)
    return np.isnan(column) if column.dtype.kind == "f" else np.array([is_missing(value) for value in column], bool)


def numbers_of(column: Column, place: Callable[[int], str]) -> Column:
    """The values of a column as numbers, float64 (N,), NaN where they are missing.

    Raises:
        ValueError: If one is not a finite number; `place` says where it is.
    """
    numbers = _finite(column)
    if numbers is not None:
        return numbers
    found = np.empty(len(column))
    for row, value in enumerate(column):
        try:
            found[row] = as_number(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{place(row)}: {shown(value)} is not a finite number") from None
    return found


def targets_of(records: Records, target: list[str] | str, task: str) -> tuple[Targets, list[str] | None]:
    """The targets of a table: names of classes (N,), labels (N, K), or numbers (N,) of a column and (N, K) of several.

    Returns:
        The targets, names as text, others float32; and the columns, where they are outputs.

    Raises:
        ValueError: If a column is missing or there is no name, number, 0 or 1 in a row of it.
    """
    if isinstance(target, str) and task != "multilabel":
        return _target(records, target, task), None if task == "classification" else [target]
    target = [target] if isinstance(target, str) else target
    if task == "classification" or not target or not all(isinstance(name, str) for name in target):
        allowed = "the name of a column" if task == "classification" else "a name or names of columns"
        raise ValueError(f"target={shown(target)}: must be {allowed} for task={task!r}")
    return np.stack([_target(records, name, task) for name in target], 1), target


def _target(records: Records, name: str, task: str) -> Targets:
    column = records.column("target", name)

    def place(row: int) -> str:
        return f"{records.path}, {records.unit} {records.lines[row]}, column {name!r}"

    for row, value in enumerate(column):
        a_name = task == "classification" and isinstance(value, str)  # a class may be called none
        if not value.strip() if a_name else is_missing(value):
            raise ValueError(f"{place(row)}: there is no target")
    if task == "classification":
        names = np.array([as_name(value) for value in column], object)
        different = set(names)
        if len(different) > 20 and 3 * len(different) > len(names) and all(map(is_number, different)):
            raise ValueError(
                f"{records.path}, column {name!r}: holds {len(different)} different numbers, too many to be classes of "
                f"{len(names)} rows: is it task='regression'?"
            )
        return names
    if task == "multilabel":
        column = np.array([{"true": 1, "false": 0}.get(str(value).strip().lower(), value) for value in column], object)
    numbers = numbers_of(column, place).astype(np.float32)
    wrong = np.flatnonzero((numbers != 0) & (numbers != 1))
    if task == "multilabel" and len(wrong):
        raise ValueError(f"{place(wrong[0])}: must be 0 or 1, it is {shown(column[wrong[0]])}")
    return numbers


class TableEncoder:
    """Numbers standardised, categories one-hot, in the order of the columns.

    A column is numeric if most of its values are numbers. Missing values and unknown categories become 0: the mean of a
    numeric column, no category of another.

    Args:
        categorical: Columns of categories, also where these are numbers.
        on_missing: A missing value is an error (``"raise"``), or becomes 0 (``"fill"``).
    """

    input_shape: tuple[int, ...]

    def __init__(self, categorical: list[str] | None = None, on_missing: OnMissing = "raise") -> None:
        self.categorical, self.on_missing = categorical or [], on_missing

    def fit(self, samples: Samples) -> None:
        """Learn means, deviations and categories.

        Raises:
            ValueError: If a column holds no value, or texts that seem to be no categories.
        """
        self.columns: dict[str, tuple[float, float] | list[str]] = {}
        for name, column in samples.inputs.items():
            there = column[~missing_in(column)]
            if not len(there):
                raise ValueError(f"{samples.path}, column {name!r}: no training sample has a value: name it in drop")
            if name not in self.categorical and _mostly_numbers(there):
                numbers = self._numbers(samples, name)
                known = numbers[~np.isnan(numbers)][:, None]
                self.columns[name] = (float(known.mean()), float(deviations(known)[0]))
                continue
            categories = sorted(set(map(as_name, there)))
            if name not in self.categorical and len(categories) > MOST_CATEGORIES:
                raise ValueError(
                    f"{samples.path}, column {name!r}: holds {len(categories)} different texts, such as "
                    f"{shown(categories[0])}: name it in drop, or in categorical if they are categories"
                )
            self.columns[name] = categories
        self.input_shape = (len(self.feature_names),)

    @property
    def feature_names(self) -> list[str]:
        """Names of the features (F,): of columns, and ``column=category``."""
        found = []
        for name, learned in self.columns.items():
            found += [f"{name}={category}" for category in learned] if isinstance(learned, list) else [name]
        return found

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Means and standard deviations of the numeric columns."""
        numeric = [learned for learned in self.columns.values() if isinstance(learned, tuple)]
        return [mean for mean, _ in numeric], [std for _, std in numeric]

    def transform(self, samples: Samples) -> Tensor:
        """The features of all samples, float32 (N, F).

        Raises:
            ValueError: If a value is no number where it should be one, or is missing; line and column are named.
        """
        parts = []
        for name, learned in self.columns.items():
            self._check_missing(samples, name)
            if isinstance(learned, list):
                parts.append(self._one_hot(samples, name, learned))
            else:
                mean, std = learned
                parts.append(np.nan_to_num((self._numbers(samples, name) - mean) / std)[:, None])
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))

    def _check_missing(self, samples: Samples, name: str) -> None:
        missing = np.flatnonzero(missing_in(samples.inputs[name]))
        if len(missing) and self.on_missing == "raise":
            more = f", nor is there one in {len(missing) - 1} other rows" if len(missing) > 1 else ""
            raise ValueError(
                f"{samples.place(missing[0])}, column {name!r}: there is no value{more}: on_missing='fill' takes the "
                "mean of the training split, or no category"
            )

    def _numbers(self, samples: Samples, name: str) -> Column:
        return numbers_of(samples.inputs[name], lambda row: f"{samples.place(row)}, column {name!r}")

    def _one_hot(self, samples: Samples, name: str, categories: list[str]) -> Column:
        places = {category: place for place, category in enumerate(categories)}
        found = np.zeros((len(samples.rows), len(categories)))
        unseen = set()
        for row, value in enumerate(samples.inputs[name]):
            if is_missing(value):
                continue
            if (category := as_name(value)) in places:
                found[row, places[category]] = 1
            else:
                unseen.add(category)
        if unseen:
            log.warning(
                "%s, column %r: %s are no categories of the training split and count as none",
                samples.path, name, first_five(sorted(unseen)),
            )  # fmt: skip
        return found


def _mostly_numbers(values: Column) -> bool:
    """Whether more than half of some values are numbers."""
    return _finite(values) is not None or sum(map(is_number, values)) > len(values) / 2


def _finite(column: Column) -> Column | None:
    """The values as numbers, if each of them is one: much faster than one by one."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        numbers = column.astype(np.float64)
        if np.isfinite(numbers).all():
            return numbers
    return None
