"""Optimizers, schedulers, heads and networks as arguments: from Python, from YAML and from a checkpoint.

A checkpoint is read without running any code, so it stores ``{class_path, init_args}``. As it may be a stranger's, the
class path is looked up by the rules of `ff_lightning.training.trust`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ff_lightning.tasks import TASKS, Task, task_of_name
from ff_lightning.training.plain import NotPlainError, to_plain
from ff_lightning.training.trust import named_class


def to_factory(argument: str, value: Any, kind: type) -> Callable[..., Any]:
    """The function that a class, a partial, a function or ``{class_path, init_args}`` stands for.

    Args:
        argument: For the error.
        value: What was given.
        kind: A class that is named by its path must be a subclass of this one.

    Raises:
        ValueError: If the value is none of these, or the class path stands for another kind of class, or for one whose
            module is not imported.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{argument}: init_args={arguments!r} must be a dict")
        return functools.partial(named_class(argument, value["class_path"], (kind,)), **_plain(arguments))
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *value.args, **_plain(value.keywords))
    if callable(value):
        return value
    raise ValueError(
        f"{argument}={value!r}: give a class such as torch.optim.SGD, a partial of it, or {{class_path, init_args}}"
    )


def to_task(task: Any) -> Task:
    """The task that a name, a class, a function or ``{class_path, init_args}`` stands for.

    Raises:
        ValueError: If it stands for none.
    """
    if isinstance(task, Task):
        raise ValueError(
            f"task={type(task).__name__}(...) is already made, and cannot be stored in a checkpoint: give its name, "
            "its class, a functools.partial of it, or {class_path, init_args}"
        )
    task = "Classification" if task is None else task
    made = task_of_name(task) if isinstance(task, str) else to_factory("task", task, Task)()
    if not isinstance(made, Task):
        raise ValueError(f"task={task!r} makes {made!r}: it must make a task, such as one of {sorted(TASKS)}")
    return made


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with plain numbers, which optimizers and schedulers put into the checkpoint; code stays as it is."""
    plain = {}
    for name, value in arguments.items():
        try:
            plain[str(name)] = to_plain(value)
        except NotPlainError:
            plain[str(name)] = value
    return plain
