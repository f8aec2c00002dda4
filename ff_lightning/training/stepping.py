"""Steps of the units in manual optimization, each as soon as its gradients are ready."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ff_lightning.training.averaging import Averaging
from ff_lightning.training.lightning_private import before_step, count_step
from ff_lightning.util.torch_private import without_capture_check


class Stepper:
    """Averages the gradients of units over the processes, clips, steps, clears and schedules.

    On several processes the gradients of a unit are averaged while the next unit runs, if the model allows it; the unit
    steps after that.

    Args:
        module: The model, of which `trainer`, `parameters_of_units`, `optimizer_of_unit` and `lr_schedulers()` are
            used.
        group: The processes that average; None: there is one process.
    """

    def __init__(self, module: Any, group: dist.ProcessGroup | None) -> None:
        self.module = module
        self.group = group
        self.scaler: torch.amp.GradScaler | None = module.scaler
        self.optimizers: Sequence[Optimizer] = module.trainer.optimizers
        self.schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
        self.waiting: list[tuple[int, Averaging | None]] = []
        self.parameters: Sequence[Sequence[nn.Parameter]] = ()  # of the units, looked up once a step
        self.stepped: set[int] = set()
        self.scaled: set[int] = set()  # that have stepped with the present scale of float16
        self.stepped_in_epoch: set[int] = set()
        if module.device.type == "cpu":
            for optimizer in self.optimizers:
                without_capture_check(optimizer)

    def begin(self, units: Sequence[int]) -> None:
        """Before the backward of these units: renew the scale of float16 if one of them has stepped with it.

        A scaler takes one step of an optimizer between two of its updates, and unscales by its present scale.
        """
        if self.scaler is not None and not self.scaled.isdisjoint(units):
            self._renew_scale(self.scaler)

    def take(self, units: Sequence[int]) -> None:
        """The gradients of these units are complete: they step, or wait for the other processes."""
        for unit in units:
            if unit not in self.module.optimizer_of_unit:  # every parameter of it is frozen
                continue
            averaging = None
            if self.group is not None:
                self.parameters = self.parameters or self.module.parameters_of_units
                averaging = Averaging(self.parameters[unit], self.group)
            self.waiting.append((unit, averaging))
            if averaging is None or not self.module.overlaps_steps or len(self.waiting) > 1:
                self._step(*self.waiting.pop(0))

    def finish(self) -> None:
        """Step the units that wait, count one step of the run and of the schedules, renew the scale of float16."""
        while self.waiting:
            self._step(*self.waiting.pop(0))
        if self.schedulers and self.module.schedulers_count_steps:
            for unit in sorted(self.stepped):
                self.schedulers[self.module.optimizer_of_unit[unit]].step()
        self.stepped_in_epoch |= self.stepped
        self.stepped.clear()
        self.parameters = ()
        if self.scaler is not None and self.scaled:
            self._renew_scale(self.scaler)
        count_step(self.module.trainer)

    def _step(self, unit: int, averaging: Averaging | None) -> None:
        if averaging is not None:
            averaging.wait()
        optimizer = self.optimizers[self.module.optimizer_of_unit[unit]]
        if self.scaler is None:
            self.module.trainer.strategy.optimizer_step(optimizer, closure=lambda: None)
        else:
            if not unscales_by_itself(optimizer):
                self.scaler.unscale_(optimizer)
            before_step(self.module, optimizer)
            self.scaler.step(optimizer)
        optimizer.zero_grad()
        self.stepped.add(unit)
        self.scaled.add(unit)

    def _renew_scale(self, scaler: torch.amp.GradScaler) -> None:
        scaler.update()
        self.scaled.clear()


def unscales_by_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer is fused with the scaling of float16: its gradients are else unscaled in its step alone."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def clip(units: Sequence[Sequence[nn.Parameter]], norm: float | None, value: float | None) -> None:
    """Clip the gradients of each unit by themselves, at their true scale."""
    for parameters in units:
        with_gradient = [p for p in parameters if p.grad is not None]
        if norm is not None and with_gradient:
            nn.utils.clip_grad_norm_(with_gradient, norm)
        if value is not None and with_gradient:
            nn.utils.clip_grad_value_(with_gradient, value)
