"""What a checkpoint may name.

A checkpoint is read without running code (``weights_only``), but its hyper-parameters name classes, and those are
called. So they are checked first. A checkpoint may name subclasses of `KINDS` from `PACKAGES` or from modules that are
already imported; no other module is imported for it. Of functions it may name those that make a network of
`ff_lightning.backbones`, which read no files. Names in the user's own command line, YAML or Python are not checked.
"""

import functools
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ff_lightning.backbones import cfse, cnn, local, mlp, signal, text
from ff_lightning.tasks import Task
from ff_lightning.training.checkpoint_io import check_whole, fetched, read
from ff_lightning.training.lightning_private import INSTANTIATOR, hyperparameters_given, restricted_classmethod

PACKAGES = ("torch", "torchvision", "lightning", "ff_lightning")
"""Their modules are imported if a checkpoint names one of their classes."""

KINDS = (Optimizer, LRScheduler, nn.Module, LightningDataModule, Task)
"""A checkpoint may name their subclasses."""

_NETWORKS = (cfse, cnn, local, mlp, signal, text)

_TEXT = re.compile(r"([\w/~.][\w ./,+=()%@~-]*)?")
"""Text that YAML takes for text or a number, and for no list or mapping: the command line reads a value as YAML."""

_DATA = (str, bytes, int, float, complex, bool, type(None), Path)
_CONTAINERS = (Mapping, Sequence, Set)


def named_class(argument: str, path: Any, kinds: tuple[type, ...] = KINDS) -> Any:
    """The class, or the function that makes a network, that a class path stands for, if a checkpoint may name it.

    Args:
        argument: For the error.
        path: Such as ``torch.optim.SGD``.
        kinds: It must be a subclass of one of these.

    Raises:
        ValueError: If it is of another kind, or its module is neither imported nor in `PACKAGES`.
    """
    found = _find(path)
    if isinstance(found, type) and issubclass(found, kinds):
        return found
    if nn.Module in kinds and _makes_network(found):
        return found
    module = str(path).rpartition(".")[0]
    if found is not None:
        why = f"is not a subclass of {' or '.join(kind.__name__ for kind in kinds)}"
        if nn.Module in kinds:
            why += ", and not a function of ff_lightning.backbones that makes a network"
    elif module in sys.modules or module.split(".")[0] in PACKAGES:
        why = "cannot be imported: there is no such class"
    else:
        why = f"is not imported: import {module or 'its module'} first"
    raise ValueError(f"{argument}: class_path={path!r} {why}")


def is_nameable(thing: Any) -> bool:
    """Whether a checkpoint that names this can be loaded again."""
    known = issubclass(thing, KINDS) if isinstance(thing, type) else _makes_network(thing)
    return known and _find(f"{thing.__module__}.{thing.__qualname__}") is thing


def _makes_network(thing: Any) -> bool:
    """Whether this is one of our functions that make a network; torchvision's also load weights, by pickle."""
    return any(thing is one for one in _NETWORKS)


def _find(path: Any) -> Any:
    """What stands at an import path, without importing other modules than those of `PACKAGES`; None: nothing."""
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    with suppress(Exception):  # what a module that lacks something leads to
        if parts[0] in PACKAGES and parts[0] in sys.modules and not any(part[0] == "_" for part in parts[:-1]):
            importlib.import_module(".".join(parts[:-1]))
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is not None:
            found = getattr(module, parts[cut], None)
            for part in parts[cut + 1 :]:  # a class within a class, but not `os` in torch.nn.os.system
                found = getattr(found, part, None) if isinstance(found, type) else None
            return found
    return None


# ------------------------------------------------------------------------------------------- what a checkpoint stores


def check_stored(part: str, stored: Any, kind: type, own: Any = None, parsed: bool = True) -> None:
    """Raise ValueError if hyper-parameters of a checkpoint name what a checkpoint may not name.

    Args:
        part: ``"model"`` or ``"data"``.
        stored: The hyper-parameters.
        kind: Of the class that they are for.
        own: What the user's own command line says of the same part: that may be named.
        parsed: Whether the rules of the command line are to read them, by which text may name a class as well.
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"the hyper-parameters of the {part} in the checkpoint are {stored!r}: must be a dict")
    own = own.as_dict() if own is not None else {}
    given = own.get("init_args") or {}
    check = _Check(tuple(_named_in(own)), parsed)
    cls: Any = kind
    path = stored.get("_class_path")
    if path is not None:
        with _advice(f"--{part} {path}"):
            cls = check.named(part, path, (kind,))
    if "class_path" in stored:  # Lightning can hand over all of them as one argument
        with _advice(f"--{part} ..."):
            check.value(part, stored, data=False)
    data = _data_arguments(cls)
    for name, value in stored.items():
        if not name.startswith("_") and not (name in given and _same(value, given[name])):
            path = value.get("class_path") if isinstance(value, Mapping) else value
            own_name = path if isinstance(path, str) else "..."
            with _advice(f"--{part}.{name} {own_name}, or load_from_checkpoint({name}=...)"):
                check.key(name)
                check.value(name, value, data.get(name, False))


@contextmanager
def _advice(how: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"the checkpoint names what no checkpoint may name: {error}; if you trust it, name it yourself: {how}"
        ) from None


@dataclass
class _Check:
    """Goes through a value of a checkpoint."""

    allowed: tuple[Any, ...]
    parsed: bool

    def named(self, where: str, path: Any, kinds: tuple[type, ...] = KINDS) -> Any:
        """The class of a path, or what the user has named by the same path."""
        found = _find(path)
        return found if any(found is thing for thing in self.allowed) else named_class(where, path, kinds)

    def key(self, name: Any) -> None:
        """The command line takes a point in a name for a level."""
        if isinstance(name, str) and "." in name:
            raise ValueError(f"{name!r}: a name with a point")

    def value(self, where: str, value: Any, data: bool) -> None:
        """Raise ValueError if a value names a function, or a class of another kind; `data`: if it cannot be a class."""
        if isinstance(value, Mapping):
            if "class_path" in value:
                self._class(where, value)
                value = {key: item for key, item in value.items() if key not in ("class_path", "init_args")}
            for key, item in value.items():
                if self.parsed and not data:
                    self.key(key)
                self.value(f"{where}.{key}", item, data)
        elif isinstance(value, str):
            if self.parsed and not data:
                self._text(where, value)
        elif isinstance(value, Iterable) and not isinstance(value, Tensor | bytes):
            for item in value:
                self.value(where, item, data)
        elif callable(value):
            raise ValueError(f"{where}: {value!r} is a function")

    def _class(self, where: str, spec: Mapping[str, Any]) -> None:
        cls, arguments = self.named(where, spec["class_path"]), spec.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{where}: init_args={arguments!r} must be a dict")
        data = _data_arguments(cls)
        for name, value in arguments.items():
            self.key(name)
            self.value(f"{where}.{name}", value, data.get(name, False))

    def _text(self, where: str, text: str) -> None:
        name = text.strip()
        if not _TEXT.fullmatch(text):
            raise ValueError(f"{where}: {text!r} could be read as more than text")
        if os.path.isfile(os.path.expanduser(name)):
            raise ValueError(f"{where}: {text!r} is a file here, which could be read as its value")
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            self.named(where, name)


def _named_in(own: Any) -> Iterator[Any]:
    """Classes and functions in what the user gave."""
    if isinstance(own, Mapping):
        if "class_path" in own and (found := _find(own["class_path"])) is not None:
            yield found
        for value in own.values():
            yield from _named_in(value)
    elif isinstance(own, list | tuple):
        for value in own:
            yield from _named_in(value)
    elif callable(own):
        yield own


def _same(value: Any, own: Any) -> bool:
    with suppress(Exception):  # of tensors, which are compared one by one
        return type(value) is type(own) and bool(value == own)
    return False


def _data_arguments(cls: Any) -> dict[str, bool]:
    """For each argument of a class or its bases, whether it cannot be a class or a function, by its annotation."""
    found: dict[str, bool] = {}
    for base in inspect.getmro(cls) if isinstance(cls, type) else ():
        with suppress(Exception):  # of annotations that cannot be read: what is not known is not taken for data
            init: Any = vars(base)["__init__"]
            hints = get_type_hints(init)
            for name in inspect.signature(init).parameters:
                found[name] = found.get(name, True) and _is_data(hints.get(name))
    return found


def _is_data(annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType) or (isinstance(origin, type) and issubclass(origin, _CONTAINERS)):
        return all(_is_data(argument) for argument in arguments if argument is not ...)
    return annotation in _DATA or (isinstance(annotation, type) and issubclass(annotation, Enum))


# ------------------------------------------------------------------------------------------------------------ loading


class SafeLoading:
    """`load_from_checkpoint` of models and data modules: a checkpoint names only what it may name."""

    @restricted_classmethod
    def load_from_checkpoint(
        cls: Any,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model or data module as Lightning does; arguments given here replace the stored ones.

        Args:
            checkpoint_path: A path, a URL or an open file.
            map_location: Where the tensors go; see `torch.load`.
            hparams_file: A YAML file in place of the stored arguments.
            strict: Whether the names of all tensors must match.
            weights_only: False: read a file that you trust, and run the code that it may contain.
            kwargs: Arguments of the class.

        Raises:
            ValueError: If the checkpoint names a function, or a class that it may not name.
        """
        check_whole(checkpoint_path)
        source = fetched(checkpoint_path)
        options = {"strict": strict} if strict is not None else {}
        load = functools.partial(
            super().load_from_checkpoint,  # type: ignore[misc]
            source, map_location, hparams_file, weights_only=weights_only, **options, **kwargs,
        )  # fmt: skip
        if weights_only is False:
            return load()
        checkpoint = read(source)
        part = "data" if issubclass(cls, LightningDataModule) else "model"
        stored: dict[str, Any] = {}
        for key in (*CHECKPOINT_PAST_HPARAMS_KEYS, cls.CHECKPOINT_HYPER_PARAMS_KEY):
            if key in checkpoint and not (key == cls.CHECKPOINT_HYPER_PARAMS_KEY and hparams_file):
                stored |= checkpoint[key]
        stored = {name: value for name, value in stored.items() if name not in kwargs}
        instantiator = stored.get("_instantiator")
        if instantiator not in (None, INSTANTIATOR):
            raise ValueError(f"the checkpoint names _instantiator={instantiator!r}: must be {INSTANTIATOR!r}")
        check_stored(part, stored, cls, parsed=instantiator is not None)
        if instantiator is None:
            return load()
        with hyperparameters_given({**stored, **kwargs}, instantiator):  # what is made of them cannot be stored again
            return load()
