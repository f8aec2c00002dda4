"""Optimizers, schedules and clipping: of each unit by itself."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from ff_lightning.training import checks, recipe
from ff_lightning.training.kept import KeepsHooks, kept
from ff_lightning.training.schedules import (
    OF_WHOLE_RUN,
    follow_first_group,
    make_scheduler,
    monitored,
    step_epoch_scheduler,
    total_steps,
)
from ff_lightning.training.stepping import Stepper, clip, unscales_by_itself


class Optimizing(KeepsHooks, LightningModule):
    """One optimizer for each unit in manual optimization, or one with a group for each in automatic optimization.

    Attributes:
        optimizer_of_unit: The number of the optimizer (manual) or of its group (automatic) of each unit.
        schedulers_count_steps: Whether the schedules count steps, and not epochs.
    """

    unit_names: list[str]
    make_optimizer: Callable[..., Optimizer]
    lr: float | None
    lr_decay: float
    schedule: Any
    lr_interval: str
    clip_norm: float | None
    clip_value: float | None
    stepper: Stepper
    train_losses: Any
    _log_losses: Any
    _is_in_window: bool
    _without_gradient: set[nn.Parameter] | None = None
    """The parameters without a gradient in all batches of a step (automatic optimization)."""

    @property
    def parameters_of_units(self) -> list[list[nn.Parameter]]:
        """The trainable parameters of each unit."""
        raise NotImplementedError

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of a run in float16."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_optimizers(self) -> Any:
        """One optimizer per unit (manual), or one with a named parameter group per unit (automatic).

        Raises:
            ValueError: If no parameter is trainable, or if a schedule needs a run of known length.
        """
        groups: list[dict[str, Any]] = []
        self.optimizer_of_unit: dict[int, int] = {}
        units = self.parameters_of_units
        for k, parameters in enumerate(units):
            if parameters:
                self.optimizer_of_unit[k] = len(groups)
                groups.append({"params": parameters, "name": f"block{k:02d}", **self._rate_of(k)})
        if not groups:
            raise ValueError("every parameter is frozen (requires_grad=False): there is nothing to train")
        if self.automatic_optimization:
            checks.check_shares_nothing(self.unit_names, units)
        per_optimizer = [groups] if self.automatic_optimization else [[group] for group in groups]
        optimizers = [recipe.make("optimizer", self.make_optimizer, of_one) for of_one in per_optimizer]
        recipe.check_trains_blocks(type(optimizers[0]), "automatic" if self.automatic_optimization else "manual")
        schedulers = [scheduler for o in optimizers if (scheduler := make_scheduler(self, o)) is not None]
        self.schedulers_count_steps = isinstance(self.schedule, str) or self.lr_interval == "step"
        self._configured_lr = self.lr
        self._steps_of_run = total_steps(self) if self.schedule in OF_WHOLE_RUN else 0
        if not self.automatic_optimization:
            return optimizers, schedulers
        interval = "step" if self.schedulers_count_steps else "epoch"
        return optimizers, [
            {"scheduler": scheduler, "interval": interval, "monitor": monitored(scheduler)} for scheduler in schedulers
        ]

    def _rate_of(self, k: int) -> dict[str, float]:
        return {} if self.lr is None else {"lr": self.lr * self.lr_decay ** (len(self.unit_names) - 1 - k)}

    def start_schedules(self) -> None:
        """Take over a rate that was found; a schedule from a checkpoint must be long enough for this run."""
        if self.lr != self._configured_lr:
            self._take_found_rate()
        if self.trainer.ckpt_path is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            checks.check_schedules(schedulers, self.schedule, self._steps_of_run)

    def _take_found_rate(self) -> None:
        """Go on with the learning rate that `LearningRateFinder` has found, and with a schedule for it."""
        self._configured_lr = self.lr
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        for k, index in self.optimizer_of_unit.items():
            groups[index].update(self._rate_of(k))
            groups[index].pop("initial_lr", None)
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler = cast(Any, make_scheduler(self, config.scheduler.optimizer))

    def on_validation_model_zero_grad(self) -> None:
        """Clear the gradients before a validation, unless an accumulation still needs them."""
        if not self._is_in_window:
            super().on_validation_model_zero_grad()

    @kept
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients of each unit by themselves, at their true scale."""
        if self.scaler is not None and unscales_by_itself(optimizer):  # for all others they are unscaled by now
            self.scaler.unscale_(optimizer)
        for parameter in self._without_gradient or ():  # in all batches of this step; DDP has made zeros of them
            parameter.grad = None
        self._without_gradient = None
        if self.clip_norm is not None or self.clip_value is not None:
            clip(self._units_of(optimizer), self.clip_norm, self.clip_value)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """`Trainer(gradient_clip_val=...)` in automatic optimization: each unit is clipped by itself."""
        if gradient_clip_val:
            by_value = gradient_clip_algorithm == "value"
            clip(
                self._units_of(optimizer),
                norm=None if by_value else gradient_clip_val,
                value=gradient_clip_val if by_value else None,
            )

    def _units_of(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        """The parameters of an optimizer by units; what belongs to none is one of its own."""
        if not self.automatic_optimization:
            return [[p for group in optimizer.param_groups for p in group["params"]]]
        left = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
        units = [[p for p in own if p in left] for own in self.parameters_of_units]
        for parameter in (p for own in units for p in own):
            left.pop(parameter, None)
        return [*units, list(left)]

    @kept
    def on_train_epoch_start(self) -> None:
        """Have what a callback has unfrozen follow the schedule.

        Raises:
            MisconfigurationException: If something was unfrozen on several processes, which would drift apart.
        """
        for optimizer in self.trainer.optimizers:
            checks.check_unfrozen(optimizer, self.trainer.world_size)
        for config in self.trainer.lr_scheduler_configs:
            follow_first_group(config.scheduler.optimizer, config.scheduler)

    @kept
    def on_train_epoch_end(self) -> None:
        """Report what is left of the epoch, and step the schedulers that count epochs."""
        if self.train_losses.update_called:
            self._log_losses()
        if not self.automatic_optimization:
            self.step_epoch_schedules(self.trainer.callback_metrics)

    def step_epoch_schedules(self, logged: Mapping[str, Any]) -> None:
        """Step the schedulers that count epochs, of the units that have stepped in this one; plateaus see `logged`."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if schedulers and not self.schedulers_count_steps:
            for unit in sorted(self.stepper.stepped_in_epoch):
                step_epoch_scheduler(schedulers[self.optimizer_of_unit[unit]], logged)
        self.stepper.stepped_in_epoch.clear()
