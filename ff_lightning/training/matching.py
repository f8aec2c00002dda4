"""Whether a checkpoint fits the model, the data and the run that read it.

Even if its tensors fit, a checkpoint may be of another network (such as one with another norm between the blocks) or of
other classes in the same number. Its scores would be silently wrong.
"""

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from ff_lightning.heads import HEADS
from ff_lightning.tasks import TASKS
from ff_lightning.training.plain import make_plain
from ff_lightning.util.arguments import shown

COMPUTING = ("backbone", "stem", "num_classes", "input_shape", "vocabulary", "granularity", "head", "norm", "task")
"""Arguments that change what the network computes: they must be those of the checkpoint."""
_TRAINING = (
    *("optimizer", "lr", "lr_decay", "lr_scheduler", "lr_interval", "optimization", "clip_norm", "clip_value"),
    *("accumulate", "compile", "memory_format", "label_smoothing", "reach", "own_loss", "train_blocks", "probe"),
    "weights",
    *("loss", "metrics"),
)
"""Arguments that change how it is trained: they may differ, except where a run is resumed. All other arguments, among
them the vote and those of a user's own class, are compared with a warning."""

WAY_OUT = "resume with what it was, or start a new run from its weights with weights=FILE instead of ckpt_path=FILE"


# ------------------------------------------------------------------------------------------------------------ the model


def check_same_network(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare the arguments of a checkpoint with those of the model that takes its weights.

    Args:
        saved: Arguments of the model that wrote the checkpoint.
        own: Arguments of the model that reads it.

    Raises:
        ValueError: If an argument differs that changes what the network computes.
    """
    differ = _differences(saved, own)
    wrong = [said for name, said in differ.items() if name in COMPUTING]
    if wrong:
        raise ValueError(
            f"the checkpoint was written by a network that computes something else: {', '.join(wrong)}; give the model "
            "the arguments of the checkpoint"
        )
    others = [said for name, said in differ.items() if name not in _TRAINING]
    if others:
        rank_zero_warn(f"the checkpoint was trained with other arguments: {', '.join(others)}", stacklevel=2)


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """What is stored on both sides and differs, each with both values."""
    return {
        name: f"{name}={saved[name]!r} there, {value!r} here"
        for name, value in own.items()
        if name in saved and not name.startswith("_") and _spelled(name, saved[name]) != _spelled(name, value)
    }


def _spelled(name: str, value: Any) -> Any:
    """An argument in one way of writing it: a class by its name with all its arguments, a list for any sequence."""
    if name == "input_shape" and value is None:
        value = (3, 32, 32)
    elif name == "task" and (value is None or isinstance(value, str)):
        name_of_task = "classification" if value is None else value.lower()
        value = make_plain({name: TASKS.get(name_of_task, value)})[name]
    elif name == "head" and isinstance(value, str) and value in HEADS:
        value = make_plain({name: HEADS[value]})[name]
    if isinstance(value, Mapping) and "class_path" in value:
        module, _, cls = str(value["class_path"]).rpartition(".")
        found = getattr(sys.modules.get(module), cls, None)  # nothing is imported because a checkpoint names it
        defaults = {}
        if isinstance(found, type):
            parameters = inspect.signature(found).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return cls, {key: _spelled("", each) for key, each in {**defaults, **(value.get("init_args") or {})}.items()}
    if isinstance(value, list | tuple):
        return [_spelled("", each) for each in value]
    return value


# ------------------------------------------------------------------------------------------------------------- the data


def describe_data(data: Any) -> dict[str, Any]:
    """What a data module says of its classes and its normalisation, as plain values; {} where it says nothing."""
    found: dict[str, Any] = {}
    names, statistics = getattr(data, "class_names", None), getattr(data, "statistics", None)
    if isinstance(names, Sequence) and not isinstance(names, str):
        found["class_names"] = [str(name) for name in names]
    if statistics is not None:
        found["statistics"] = [[float(value) for value in values] for values in statistics]
    return found


def classes_of_classifier(weights: str | None, num_classes: int) -> dict[str, Any]:
    """What a file of weights says of the classes of its classifier, where that is taken over; else {}.

    It starts anew where it is one for another number of classes, and checkpoints of local blocks have none.
    """
    path = Path(weights or "").expanduser()
    if not path.is_file():
        return {}
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = stored.get("ff_lightning", {}).get("data", {}).get("class_names", ())
    local = any(key.startswith("net.blocks.") for key in stored.get("state_dict", ()))
    return {} if local or len(names) != num_classes else {"class_names": names}


def check_same_data(trained_on: Mapping[str, Any], data: Mapping[str, Any], strict: bool = True) -> None:
    """Compare the data that a model was trained on with the data that it gets.

    Another normalisation is only a warning: a data set may have good reasons for its own statistics.

    Args:
        trained_on: As `describe_data` gives it.
        data: As `describe_data` gives it.
        strict: Whether other classes are an error. In a new run, which may be meant to learn them, they are a warning.

    Raises:
        ValueError: If `strict` and the classes are others, or are numbered in another order.
    """
    there, here = trained_on.get("class_names"), data.get("class_names")
    if there and here and there != here:
        which = "in another order" if sorted(there) == sorted(here) else "others"
        at = next((k for k, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), len(here))
        message = (
            f"the model was trained on {len(there)} classes, the data have {which}: number {at} is {there[at:][:1]} "
            f"there, {here[at:][:1]} here"
        )
        if strict:
            raise ValueError(f"{message}; give the data classes={_shortened(there)}, or the model of these classes")
        rank_zero_warn(f"{message}; its heads go on from what they were", stacklevel=2)
    there, here = trained_on.get("statistics"), data.get("statistics")
    if there and here and not _close(there, here):
        rank_zero_warn(
            f"the model was trained on samples that were normalised with mean and deviation {shown(there)}, these are "
            f"with {shown(here)}",
            stacklevel=2,
        )


def _close(there: Sequence[Sequence[float]], here: Sequence[Sequence[float]]) -> bool:
    """Whether statistics are the same but for what another machine makes of the same samples."""
    return np.shape(there) == np.shape(here) and np.allclose(there, here)


def _shortened(names: Sequence[str]) -> str:
    return repr(list(names)) if len(names) <= 20 else f"[{', '.join(map(repr, names[:20]))}, ...]"


# -------------------------------------------------------------------------------------------------------------- the run


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Compare the settings of an interrupted run with those of the run that resumes it.

    Args:
        saved: Arguments of the model that wrote the checkpoint.
        own: Arguments of the model that reads it.
        checkpoint: The checkpoint.

    Raises:
        ValueError: If the state of optimizers or schedules is not there, or would not fit.
    """
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            "the checkpoint holds weights alone (save_weights_only=True): no run can be resumed from it; start "
            "a new one from its weights with weights=FILE instead of ckpt_path=FILE"
        )
    both = {name: (saved[name], own[name]) for name in _TRAINING if name in saved and name in own}
    classes = {name: [_class_of(name, value) for value in both[name]] for name in _WITH_STATE if name in both}
    fixed = {name: list(both[name]) for name in ("optimization",) if name in both} | classes
    if isinstance(own.get("lr_scheduler"), Mapping) and "lr_interval" in both:
        fixed["lr_interval"] = list(both["lr_interval"])
    wrong = [f"{name}={there!r} there, {here!r} here" for name, (there, here) in fixed.items() if there != here]
    if wrong:
        raise ValueError(f"the checkpoint is of a run with other settings: {', '.join(wrong)}; {WAY_OUT}")
    unchanged = _differences({name: there for name, (there, _) in both.items() if name in _RESTORED}, own)
    if unchanged:
        rank_zero_warn(
            f"a resumed run keeps what its checkpoint says of these: {', '.join(unchanged.values())}; the new "
            "values have no effect",
            stacklevel=2,
        )


_WITH_STATE = ("optimizer", "lr_scheduler")
_RESTORED = (*_WITH_STATE, "lr", "lr_decay")


def _class_of(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return "AdamW" if name == "optimizer" and value is None else value


def groups_of(states: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Number of parameters in each group of each optimizer, of their state dicts."""
    return [[len(group["params"]) for group in state["param_groups"]] for state in states]


def check_same_parameters(saved: Sequence[Sequence[int]], optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError if the optimizers of a checkpoint have other numbers of parameters than those of this run."""
    own = groups_of(optimizer.state_dict() for optimizer in optimizers)
    if list(map(list, saved)) != own:
        raise ValueError(
            f"the checkpoint is of a run that trained other parameters: its optimizers have groups of {saved} tensors, "
            f"those of this run {own}; freeze the same ones (requires_grad) as before, and {WAY_OUT}"
        )
