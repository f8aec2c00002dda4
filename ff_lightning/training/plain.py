"""Hyper-parameters that a checkpoint can hold: it is read without running code (``weights_only``), so they are plain.

Plain are numbers, text, None, tensors, and lists, tuples, sets and dicts of them. A class, or a partial of one, is
stored as ``{class_path, init_args}``. Functions are left out, with a warning; networks are left out: their weights are
in the checkpoint.
"""

import functools
import inspect
import os
import warnings
from collections.abc import Collection, Mapping, Sequence, Set
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn

from ff_lightning.training.lightning_private import given_hyperparameters, hyperparameters_given, unwrapped
from ff_lightning.training.trust import is_nameable

_SCALARS: tuple[tuple[Any, Any], ...] = (
    (bool, bool), (int, int), (float, float), (complex, complex), (bytes | bytearray, bytes),
)  # fmt: skip
_CONTAINERS: tuple[tuple[Any, Any], ...] = ((tuple, tuple), (Set, set), (Sequence, list))


class NotPlainError(TypeError):
    """Raised for what a checkpoint cannot hold."""

    def __init__(self, part: Any) -> None:
        super().__init__(f"{part!r} of type {type(part).__name__} is not plain")
        self.is_code = callable(part)


def to_plain(value: Any) -> Any:
    """The same value from Python's own types and tensors: paths as text, numbers of NumPy as Python's.

    Examples:
        >>> to_plain({"lr": np.float64(0.1), "shape": torch.Size([3, 8])})
        {'lr': 0.1, 'shape': (3, 8)}

    Raises:
        NotPlainError: If that is not possible.
    """
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value.detach()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str):
        return str.__str__(value)
    for family, kind in _SCALARS:
        if isinstance(value, family):
            return kind(value)
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    for family, kind in _CONTAINERS:
        if isinstance(value, family):
            return kind(map(to_plain, value))
    if value is None or isinstance(value, torch.dtype | torch.device):
        return value
    raise NotPlainError(value)


def store_arguments(module: HyperparametersMixin, without: Collection[str] = (), logger: bool = True) -> None:
    """Lightning's `save_hyperparameters`, called in an `__init__`; what is stored is plain, and no network is copied.

    Args:
        module: Whose arguments they are, those of its subclasses among them.
        without: Names of arguments that are not stored.
        logger: Whether loggers are told.

    Raises:
        ValueError: If an argument cannot be stored.
    """
    arguments = given_hyperparameters.get()
    if arguments is None:
        frame = cast(Any, inspect.currentframe()).f_back
        arguments = {}
        for of_class in collect_init_args(frame, [], classes=(HyperparametersMixin,)):
            arguments |= of_class
    plain = make_plain({name: value for name, value in arguments.items() if name not in without})
    with hyperparameters_given({}, ""):  # else Lightning compares them with the arguments, which may be arrays
        module.save_hyperparameters(plain, logger=logger)


def make_plain(hparams: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """Hyper-parameters for a checkpoint; see above.

    Args:
        hparams: As they were given.
        strict: Whether what cannot be stored, and is no function, is an error; else it is left out with a warning.

    Raises:
        ValueError: If it is; it names the argument.
    """
    plain = {}
    for name, value in hparams.items():
        if isinstance(value, nn.Module):
            continue
        try:
            plain[name] = _class_spec(value) or to_plain(value)
        except NotPlainError as error:
            if error.is_code:
                warnings.warn(
                    f"{name} {'is' if callable(value) else 'holds'} a function and is not stored in checkpoints: give "
                    "it to load_from_checkpoint again, or give a class or {class_path, init_args}",
                    stacklevel=4,
                )
            elif strict:
                raise ValueError(
                    f"{name}={value!r} cannot be stored in a checkpoint ({error}): give numbers, text, lists, tuples, "
                    "dicts or tensors, a class, or a function that makes it"
                ) from None
            else:
                warnings.warn(f"{name} is not stored in checkpoints: {error}", stacklevel=4)
    return plain


def make_checkpoint_plain(checkpoint: dict[str, Any]) -> None:
    """Keep a checkpoint readable that Lightning has put together: other data modules and callbacks add to it too."""
    checkpoint.pop("hparams_type", None)  # of a config object, which becomes a dict here
    for key, content in checkpoint.items():
        if key.endswith("hyper_parameters"):
            checkpoint[key] = make_plain(content, strict=False)
        elif key != "state_dict":
            checkpoint[key] = _with_plain_numbers(content)


def _with_plain_numbers(state: Any) -> Any:
    """Python's numbers for those of NumPy, in dicts and lists; all else as it is."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {key: _with_plain_numbers(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_with_plain_numbers, state))
    return state


def _class_spec(value: Any) -> dict[str, Any] | None:
    """``{class_path, init_args}`` of a class or a partial of one that a checkpoint may name."""
    value = unwrapped(value)
    partial = value if isinstance(value, functools.partial) else functools.partial(value) if callable(value) else None
    if partial is None or partial.args or not is_nameable(partial.func):
        return None
    cls: Any = partial.func
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": to_plain(partial.keywords)}
