"""Optimizers and schedulers as arguments: from Python, from YAML and from a checkpoint.

A checkpoint is read without running any code, so what is stored is always ``{class_path, init_args}``.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def to_factory(argument: str, value: Any) -> Callable[..., Any]:
    """The function that a class, a partial, a function or ``{class_path, init_args}`` stands for.

    Raises:
        ValueError: If the value is none of these, or the class path leads nowhere.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        module, _, name = str(value["class_path"]).rpartition(".")
        try:
            made = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{argument}: class_path={value['class_path']!r} cannot be imported: {error}") from error
        return functools.partial(made, **dict(value.get("init_args") or {}))
    if callable(value):
        return value
    raise ValueError(
        f"{argument}={value!r}: give a class such as torch.optim.SGD, a partial of it, or {{class_path, init_args}}"
    )


def make_plain(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as names, numbers and {class_path, init_args}; networks and functions are left out."""
    plain = {}
    for name, value in hparams.items():
        if isinstance(value, functools.partial) and not value.args and isinstance(value.func, type):
            plain[name] = {"class_path": _path(value.func), "init_args": dict(value.keywords)}
        elif isinstance(value, type):
            plain[name] = {"class_path": _path(value), "init_args": {}}
        elif not callable(value):
            plain[name] = value
        elif not isinstance(value, nn.Module):
            warnings.warn(
                f"{name} is a function and is not stored in checkpoints: give it to load_from_checkpoint again, or "
                "give a class or {class_path, init_args}",
                stacklevel=4,
            )
    return plain


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
