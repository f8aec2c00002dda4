"""Hooks of a base class that run even if an override does not call ``super()``."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Hook = TypeVar("Hook", bound=Callable[..., Any])


def kept(hook: Hook) -> Hook:
    """Mark a hook of a base class: `KeepsHooks` runs it after any override that does not call it."""

    @functools.wraps(hook)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._hooks_run.add(hook.__qualname__)
        return hook(self, *args, **kwargs)

    run._kept = hook.__qualname__  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


class KeepsHooks:
    """Base of classes with hooks that are marked by `kept`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in {name for base in cls.__mro__ for name in vars(base)}:
            own = getattr(cls, name, None)
            if not callable(own) or hasattr(own, "_kept") or hasattr(own, "_keeps"):
                continue
            marked = [vars(base)[name] for base in cls.__mro__ if hasattr(vars(base).get(name), "_kept")]
            if marked:
                setattr(cls, name, _followed_by(own, marked[0]))

    @property
    def _hooks_run(self) -> set[str]:
        return self.__dict__.setdefault("_names_of_hooks_run", set())


def _followed_by(own: Callable[..., Any], base: Any) -> Callable[..., Any]:
    """An override that is followed by what it overrides, unless it has called that."""

    @functools.wraps(own)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._hooks_run.discard(base._kept)
        result = own(self, *args, **kwargs)
        if base._kept not in self._hooks_run:
            base(self, *args, **kwargs)
        return result

    run._keeps = base._kept  # type: ignore[attr-defined]
    return run
