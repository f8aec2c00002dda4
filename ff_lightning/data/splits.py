"""Which samples are trained on and which are validated on: stratified, and the same on every machine for a seed."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from sklearn.model_selection import train_test_split
from sklearn.utils import resample

from ff_lightning.data.listing import first_five
from ff_lightning.util.suggest import unknown

log = logging.getLogger(__name__)

ValFrom = Literal["subset", "rest"]
Indices = np.ndarray[Any, np.dtype[np.int64]]
Targets = np.ndarray[Any, Any]  # classes int64 (N,), or float32 (N,) or (N, K)


def class_numbers(classes: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Numbers of classes that are given by number or by name.

    Raises:
        ValueError: If one is not known or given twice, if there are fewer than two, or if a number is also the name of
            another class.
    """
    numbers = []
    for given in classes:
        if isinstance(given, int) and str(given) in names and list(names).index(str(given)) != given:
            raise ValueError(
                f"classes={list(classes)}: {given} is the number of a class and the name of another one: give names, "
                f"as text ({str(given)!r})"
            )
        if given in names:
            number = list(names).index(str(given))
        elif isinstance(given, int) and 0 <= given < len(names):
            number = given
        else:
            raise ValueError(
                unknown("classes", given, names, f"numbers from 0 to {len(names) - 1} or names of classes")
            )
        numbers.append(number)
    if len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise ValueError(f"classes={list(classes)}: give two or more classes, each once")
    return numbers


def renumber(labels: Indices, chosen: Sequence[int]) -> Indices:
    """Labels numbered by their place among the chosen classes; -1 for other classes.

    Examples:
        >>> renumber(np.array([5, 6, 7]), [7, 5])
        array([ 1, -1,  0])
    """
    places = np.full(max(labels.max(), *chosen) + 1, -1)
    places[list(chosen)] = np.arange(len(chosen))
    return places[labels]


def check_labels(labels: Indices, names: Sequence[str], purpose: str) -> None:
    """Warn where a class has no sample.

    Raises:
        ValueError: If it is one to train on, if there are more classes than names, or no sample at all.
    """
    if not len(labels):
        raise ValueError(f"there is no sample for {purpose}")
    if labels.max() >= len(names):
        raise ValueError(f"a sample for {purpose} is of class {labels.max()}: there are {len(names)} class names")
    missing = [names[number] for number in sorted(set(range(len(names))) - set(labels.tolist()))]
    if missing and purpose == "training":
        raise ValueError(f"there is no sample for training of {first_five(missing)}")
    if missing:
        log.warning("there is no sample for %s of %s", purpose, first_five(missing))


def split_off(numbers: Indices, labels: Indices, size: float, seed: int, argument: str) -> tuple[Indices, Indices]:
    """Divide samples into the rest and a stratified part of this size (a share, or a count), both in order.

    Raises:
        ValueError: If a class is too small for it.
    """
    try:
        rest, part = train_test_split(numbers, test_size=size, stratify=labels[numbers], random_state=seed)
    except ValueError as error:
        raise ValueError(f"{argument} of {len(numbers)} training samples: {error}") from error
    return np.sort(rest), np.sort(part)


def take_subset(
    numbers: Indices,
    labels: Indices,
    names: Sequence[str],
    samples_per_class: int | None,
    subset: int | None,
    seed: int,
) -> Indices:
    """So many of the samples of each class, or so many in all, stratified; in order.

    Raises:
        ValueError: If a class, or all of them, have fewer.
    """
    if samples_per_class is not None:
        of_class = [numbers[labels[numbers] == label] for label in range(len(names))]
        small = {
            name: len(found) for name, found in zip(names, of_class, strict=True) if len(found) < samples_per_class
        }
        if small:
            raise ValueError(f"samples_per_class={samples_per_class}: more than there are of {small}")
        taken = [resample(found, replace=False, n_samples=samples_per_class, random_state=seed) for found in of_class]
        return np.sort(np.concatenate(taken))
    if subset is None or subset == len(numbers):
        return numbers
    if subset > len(numbers):
        raise ValueError(f"subset={subset}: more than the {len(numbers)} training samples that there are")
    return split_off(numbers, labels, subset, seed, f"subset={subset}")[1]
