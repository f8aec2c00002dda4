"""The user's network comes back as it was: whatever tracing and trial runs change in it is put back."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ff_lightning.util.torch_private import own_buffers

_CONTAINERS = (list, dict, set, deque)
_OF_TORCH = nn.Module().__dict__.keys()  # parameters, buffers, modules, hooks: what torch gives to each module


class Snapshot:
    """The attributes, buffers and modes of all modules of a network, to be put back.

    Args:
        model: The network.

    Attributes:
        modules: Its modules by name.
        constants: Attributes of the network that it is to have in addition, until the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.constants: dict[str, Any] = {}
        self._training = {name: module.training for name, module in self.modules.items()}
        self._frozen = {p: p.requires_grad for p in model.parameters()}
        self._attributes = {name: _attributes(module) for name, module in self.modules.items()}
        self._contents = {name: _Contents(kept) for name, kept in self._attributes.items()}
        self._buffers = {
            name: {key: (buffer, None if buffer is None else buffer.detach().clone()) for key, buffer in buffers}
            for name, module in self.modules.items()
            if (buffers := list(own_buffers(module).items()))
        }

    def added(self) -> set[str]:
        """Attributes of the network itself that it did not have."""
        return set(_attributes(self.modules[""])) - set(self._attributes[""])

    def changed(self) -> dict[str, list[str]]:
        """Names of the attributes that each module now holds another value in, modules without any left out."""
        changes: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            before, now = self._attributes[name], _attributes(module)
            differing = [key for key in {**before, **now} if not _same(before, now, key)]
            changes[name] = sorted({*differing, *self._contents[name].changed()})
        changes[""] = [key for key in changes[""] if key not in self.constants]
        return {name: keys for name, keys in changes.items() if keys}

    def restore_state(self) -> None:
        """Put back attributes and buffers."""
        for name, module in self.modules.items():
            for key in _attributes(module).keys() - self._attributes[name].keys():
                del module.__dict__[key]
            module.__dict__.update(self._attributes[name])
            self._contents[name].restore()
        self.modules[""].__dict__.update(self.constants)
        with torch.no_grad():
            for name, buffers in self._buffers.items():
                own = own_buffers(self.modules[name])
                for key in [key for key in own if key not in buffers]:
                    del own[key]
                for key, (buffer, value) in buffers.items():
                    own[key] = buffer
                    if buffer is not None and value is not None and not torch.equal(buffer, value):
                        buffer.copy_(value)

    def restore(self) -> None:
        """Put everything back."""
        self.constants.clear()
        self.restore_state()
        for parameter, requires_grad in self._frozen.items():
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
        for name, module in self.modules.items():
            module.training = self._training[name]


@contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Afterwards, also after an error, the network and all random generators are as they were."""
    snapshot = Snapshot(model)
    with same_random(model):
        try:
            yield snapshot
        finally:
            snapshot.restore()


@contextmanager
def same_random(model: nn.Module) -> Iterator[None]:
    """Afterwards all random generators are as they were."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


class _Contents:
    """What lists, dicts and sets among some values hold, however deeply nested."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._kept: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        todo = [(name, value) for name, value in values.items()]
        while todo:
            name, value = todo.pop()
            if isinstance(value, _CONTAINERS) and id(value) not in seen:
                seen.add(id(value))
                self._kept.append((name, value, value.copy()))
                todo += [(name, part) for part in (value.values() if isinstance(value, dict) else value)]
            elif isinstance(value, tuple):
                todo += [(name, part) for part in value]

    def changed(self) -> list[str]:
        return [name for name, container, content in self._kept if not _alike(container, content)]

    def restore(self) -> None:
        for _, container, content in self._kept:
            if not _alike(container, content):
                container.clear()
                (container.update if isinstance(container, dict | set) else container.extend)(content)


def remember(values: dict[str, Any]) -> Callable[[], None]:
    """A function that puts back what lists, dicts and sets among the values hold now."""
    return _Contents(values).restore


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if key not in _OF_TORCH}


def _same(before: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    """Whether an attribute is the same object, or an equal plain value."""
    if key not in before or key not in now:
        return False
    old, new = before[key], now[key]
    return old is new or (type(old) is type(new) and isinstance(old, int | float | str | bytes) and old == new)


def _alike(container: Any, content: Any) -> bool:
    """Whether a container holds the very same objects."""
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return {id(part) for part in container} == {id(part) for part in content}
    if isinstance(container, dict):
        ordered = isinstance(container, OrderedDict)
        return all(key in container and container[key] is value for key, value in content.items()) and (
            not ordered or list(container) == list(content)
        )
    return all(old is new for old, new in zip(container, content, strict=True))
