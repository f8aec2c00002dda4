"""Optimizers and schedulers that cannot work are found before the run, and errors of their own name the argument."""

import functools
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ff_lightning.training.factories import to_factory
from ff_lightning.util.arguments import check_choice
from ff_lightning.util.suggest import closest


def check_optimizer(optimizer: Any, lr: float | None, optimization: str) -> None:
    """Raise ValueError if an optimizer cannot be made of parameter groups alone, or cannot train blocks."""
    if optimizer is None:
        return
    factory = to_factory("optimizer", optimizer, Optimizer)
    cls, given = _class_of(factory)
    if cls is None:
        return
    _check_class("optimizer", cls, given, Optimizer)
    check_trains_blocks(cls, optimization)
    of_class = signature(cls).parameters.get("lr")
    own = given.get("lr")
    if lr is not None and of_class is not None and own not in (None, of_class.default, lr):
        raise ValueError(f"lr={lr} and lr={own} of the optimizer {cls.__name__}: give one of them")


def check_trains_blocks(cls: type, optimization: str) -> None:
    """Raise ValueError for the optimizers that cannot step a block on the gradients of its loss."""
    if issubclass(cls, SparseAdam):
        raise ValueError("optimizer=SparseAdam takes sparse gradients alone, those of the blocks are dense: give Adam")
    if issubclass(cls, LBFGS) and optimization == "manual":
        raise ValueError(
            "optimizer=LBFGS computes the loss several times for a step, a block steps once on each batch: give a "
            "first-order optimizer, such as SGD or AdamW"
        )


def check_scheduler(scheduler: Any, names: Sequence[str], interval: str) -> None:
    """Raise ValueError if a scheduler is not known, cannot be made of an optimizer alone, or cannot count steps."""
    is_factory = callable(scheduler) or (isinstance(scheduler, Mapping) and "class_path" in scheduler)
    if not is_factory:
        check_choice("lr_scheduler", scheduler, names, f"one of {list(names)}, or a scheduler class")
        return
    cls, given = _class_of(to_factory("lr_scheduler", scheduler, LRScheduler))
    if cls is None:
        return
    _check_class("lr_scheduler", cls, given, LRScheduler)
    check_interval(cls, interval)


def check_interval(cls: type, interval: str) -> None:
    """Raise ValueError for a scheduler that cannot step after each batch."""
    if issubclass(cls, ReduceLROnPlateau) and interval == "step":
        raise ValueError(
            f"lr_interval='step': {cls.__name__} watches a figure that is logged once in an epoch: give 'epoch'"
        )


def make(argument: str, factory: Callable[..., Any], subject: Any) -> Any:
    """Call the factory of an optimizer or of a scheduler.

    Raises:
        ValueError: If its class refuses what it is given.
    """
    cls, _ = _class_of(factory)
    try:
        return factory(subject)
    except (TypeError, ValueError) as error:
        if cls is None:  # a function of the user's own: its errors speak for themselves
            raise
        raise ValueError(f"{argument}={cls.__name__}: {error}") from error


def _class_of(factory: Callable[..., Any]) -> tuple[type | None, Mapping[str, Any]]:
    """The class that a factory makes, if that is known, and the arguments that it was given."""
    made, given = (factory.func, factory.keywords) if isinstance(factory, functools.partial) else (factory, {})
    if isinstance(factory, functools.partial) and getattr(made, "__module__", "").startswith("jsonargparse"):
        made = factory.args[-1]  # the command line's partial: of a function that makes this class
    return (made, given) if isinstance(made, type) else (None, given)


def _check_class(argument: str, cls: type, given: Mapping[str, Any], base: type) -> None:
    """Raise ValueError unless a class is of this kind, and needs nothing but what it is given and one argument."""
    if not issubclass(cls, base):
        raise ValueError(f"{argument}={cls.__name__}: must be a subclass of {base.__module__}.{base.__name__}")
    takes = signature(cls)
    try:
        takes.bind(None, **given)
    except TypeError as error:
        misspelt = next((name for name in given if name not in takes.parameters), None)
        hint = "" if misspelt is None else closest(misspelt, takes.parameters)
        path = f"{cls.__module__}.{cls.__qualname__}"
        raise ValueError(
            f"{argument}={cls.__name__}: {error}{hint}; its arguments are given as {{class_path: {path}, init_args: "
            "{...}}, or by functools.partial"
        ) from error
