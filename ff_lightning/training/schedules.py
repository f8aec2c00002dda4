"""Learning-rate schedules: by name for the length of the run, or any scheduler class."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ff_lightning.training.factories import to_factory
from ff_lightning.training.recipe import check_interval, make

Schedule = Literal["onecycle", "cosine", "cooldown", "constant"]
OF_WHOLE_RUN = ("onecycle", "cosine", "cooldown")
"""Those that are made for the length of a run, and have ended with it."""


class CooldownLR(LRScheduler):
    """The rate is constant for half of the run, and then falls linearly to 0.

    The schedule of Hinton's code for Forward-Forward.

    Args:
        optimizer: Whose rate it is.
        total_steps: Number of steps of the run.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the next step."""
        share = min(1.0, 2 * max(0.0, 1 - self.last_epoch / self.total_steps))
        return [rate * share for rate in self.base_lrs]


def make_scheduler(module: Any, optimizer: Optimizer) -> LRScheduler | ReduceLROnPlateau | None:
    """The scheduler of an optimizer, as `LocalLearner` was told; None for a constant rate."""
    if module.schedule == "constant":
        return None
    if module.schedule == "onecycle":
        groups = optimizer.param_groups
        momentum = any("betas" in group or group.get("momentum") for group in groups)
        rates = [group["lr"] for group in groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=total_steps(module), cycle_momentum=momentum)
    if module.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=total_steps(module))
    if module.schedule == "cooldown":
        return CooldownLR(optimizer, total_steps(module))
    factory = to_factory("lr_scheduler", module.schedule, LRScheduler)
    made: LRScheduler | ReduceLROnPlateau = make("lr_scheduler", factory, optimizer)
    check_interval(type(made), module.lr_interval)
    return made


def total_steps(module: Any) -> int:
    """Number of optimizer steps of each unit: those of the run, or of a phase where units are trained in turn."""
    trainer = module.trainer
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps) or steps < 0:
        raise ValueError(
            f"lr_scheduler={module.schedule!r} must know the length of the run: set max_epochs of the Trainer, or "
            "max_steps where the data do not tell how many they are, or lr_scheduler='constant'"
        )
    counted = trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches)
    if module.accumulate > 1 and counted:
        in_epochs = math.ceil(trainer.num_training_batches / module.accumulate) * trainer.max_epochs
        steps = in_epochs if trainer.max_steps == -1 else min(in_epochs, trainer.max_steps)
    if steps < 1 and trainer.max_steps != 0:
        raise ValueError(
            "no batch to fit: the loader is empty, or holds fewer samples than a batch with drop_last=True"
        )
    return max(1, math.ceil(steps / module.phases))


def follow_first_group(optimizer: Optimizer, scheduler: Any) -> None:
    """Make parameter groups added during the run, as by `BaseFinetuning`, follow the schedule of the first group.

    They keep their learning-rate factor relative to it.
    """
    first = optimizer.param_groups[0]
    for number, group in enumerate(optimizer.param_groups):
        if "initial_lr" in group:
            continue
        share = group["lr"] / (first["lr"] or 1.0)
        for key in first.keys() - group.keys():
            group[key] = first[key] * share if key in ("initial_lr", "max_lr", "min_lr") else first[key]
        group["name"] = f"unfrozen{number}"
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs.append(group["initial_lr"])


def monitored(scheduler: Any) -> str | None:
    """Name of the logged value that a plateau scheduler watches."""
    return getattr(scheduler, "monitor", "val/loss") if isinstance(scheduler, ReduceLROnPlateau) else None


def step_epoch_scheduler(scheduler: Any, logged: Mapping[str, Tensor]) -> None:
    """Step a scheduler at the end of an epoch.

    Raises:
        ValueError: If a plateau scheduler watches a value that was not logged.
    """
    watched = monitored(scheduler)
    if watched is None:
        scheduler.step()
    elif watched in logged:
        scheduler.step(logged[watched])
    else:
        raise ValueError(f"lr_scheduler watches {watched!r}, which was not logged; there are {sorted(logged)}")
