"""Reports of training, and evaluation of the units and their vote.

Shapes: B batch, K scores, U units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ff_lightning.local.updates import Update
from ff_lightning.tasks import Task, Unlabelled
from ff_lightning.training.averaging import broadcast_buffers
from ff_lightning.training.batches import Inputs, check_has_target, check_inputs, split_batch
from ff_lightning.training.kept import KeepsHooks, kept
from ff_lightning.training.lightning_private import logs_are_due
from ff_lightning.training.metrics import UnitFigures, UnitLosses


class Reporting(KeepsHooks, LightningModule):
    """Losses and figures of each unit, logged without a wait for the device in between.

    Logged are ``train/loss``, ``train/block00_loss``, ..., the figures of the vote in training (``train/acc``), and for
    ``val`` and ``test`` the figures of the vote (``acc``), ``loss``, and the figures of each unit (``block00_acc``).
    """

    task: Task
    unit_names: list[str]
    input_shape: tuple[int, ...]
    vocabulary: int | None
    metrics: Sequence[str]
    criterion: Any
    train_losses: Any
    train_figures: Any
    unit_figures: Any
    named_metrics: Any
    local_updates: Any
    _is_left_over: Any
    infinite_by_nature: frozenset[str] = frozenset()
    """Tensors of the network that were not finite before it was trained, such as masks of an attention."""

    def make_metrics(self) -> None:
        """Make the running figures of the units."""
        units = len(self.unit_names)
        self._has_scores = True
        self._units_of_batch: list[int] = []
        self._losses_of_batch: list[Tensor] = []
        self.train_losses = UnitLosses(units)
        self.train_figures = UnitFigures(0, self.task.figure_names)
        self.unit_figures = nn.ModuleDict(
            {
                "val": UnitFigures(units, self.task.figure_names),
                "test": UnitFigures(units, self.task.figure_names),
            }
        )
        self.named_metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {
                        name: nn.ModuleList(self.task.metric(name) for _ in range(1 if units == 1 else units + 1))
                        for name in self.metrics
                    }
                )
                for stage in ("val", "test")
            }
        )

    # ----------------------------------------------------------------------------------------------- hooks of a method

    def split(self, batch: Any) -> tuple[Inputs, Any]:
        """Inputs of the network, as a tuple, and target of a batch; see `ff_lightning.training.batches.split_batch`."""
        return split_batch(batch)

    def scores(self, *inputs: Any) -> Tensor | None:
        """Scores of each unit, (U, B, K); None for a method that gives no answers."""
        return None

    def unit_key(self, k: int) -> str:
        """What figures of unit k are logged by."""
        return f"block{k:02d}"

    def vote(self, scores: Tensor) -> Tensor:
        """From the scores of all units (U, B, K) to those that decide, (B, K): their mean."""
        return scores.mean(0)

    # --------------------------------------------------------------------------------------------------------- batches

    def inputs_and_target(self, batch: Any, training: bool = True, look: bool | None = None) -> tuple[Inputs, Any]:
        """The parts of a batch, checked.

        Args:
            batch: What a loader gave.
            training: Whether it is trained on.
            look: Whether to check the values even if that waits for a device; None: only in the first batch of an epoch
                of training.

        Raises:
            ValueError: If the batch fits neither the network nor the task.
        """
        if look is None:
            look = self.trainer.fit_loop.batch_idx == 0
        inputs, target = self.split(batch)
        samples = check_inputs(inputs, self.input_shape, self.vocabulary)
        if not isinstance(self.task, Unlabelled):
            check_has_target(batch, target)
        self.task.check(target, samples, training, look)
        return inputs, target

    # -------------------------------------------------------------------------------------------------------- training

    def report(self, update: Update) -> None:
        """Note the losses of an update; they are collected at the end of the batch."""
        self._units_of_batch.extend(update.units)
        self._losses_of_batch.extend(update.values)

    def report_scores(self, scores: Tensor, target: Tensor) -> None:
        """Count the figures of the vote in training, from scores (U, B, K) that cost no extra pass."""
        if not torch.is_grad_enabled():  # of a validation that has no scores
            return
        with torch.no_grad():
            figures = self.task.figures(self.vote(scores)[None], target)
            none = scores.new_zeros(0)
            self.train_figures.update(figures, none, self.task.counted(target), scores.shape[1])

    def end_of_batch(self) -> None:
        """Collect the losses on the device; logged, and checked, only when the loggers are due."""
        self.train_losses.update(self._units_of_batch, torch.stack(self._losses_of_batch))
        self._units_of_batch, self._losses_of_batch = [], []
        if logs_are_due(self.trainer):
            self._log_losses()

    def _log_losses(self) -> None:
        losses, seen = self._finite_losses(), sorted(self.train_losses.seen)
        self.train_losses.reset()
        self.log("train/loss", losses[seen].mean(), prog_bar=True)
        self.log_dict({f"train/{self.unit_key(k)}_loss": losses[k] for k in seen})
        figures = self.train_figures
        if figures.update_called:
            self.log_dict({f"train/{name}": mean.mean() for name, mean in figures.compute()[0].items()})
            figures.reset()

    def _finite_losses(self) -> Tensor:
        """Mean losses since the last report, (U,).

        Raises:
            FloatingPointError: If one of them is not finite.
        """
        losses = self.train_losses.compute().reshape(-1)  # torchmetrics makes a scalar of a vector of one
        for k, finite in enumerate(losses.isfinite().tolist()):
            if not finite:
                raise FloatingPointError(
                    f"the loss of block {k} ({self.unit_names[k]}) became {losses[k].item()} in epoch "
                    f"{self.current_epoch}, in the last steps before step {self.global_step}: stopped, the last "
                    "checkpoint is untouched; a lower lr or a clip_norm may help"
                )
        return losses

    def _check_weights(self) -> None:
        """Raise FloatingPointError if a weight or a running statistic is not finite: no checkpoint is written then."""
        state = {name: value for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        wrong = [name for name in not_finite(state) if name not in self.infinite_by_nature]
        if not wrong:
            return
        parameters = dict(self.named_parameters())
        kind = "weights" if wrong[0] in parameters else "running statistics"
        k = self.unit_of(state[wrong[0]])
        where = "" if k is None else f" of block {k} ({self.unit_names[k]})"
        narrow = "; float16 is too narrow: try precision='16-mixed'" if self.dtype == torch.float16 else ""
        raise FloatingPointError(
            f"the {kind}{where} are not finite after step {self.global_step}: stopped, the last checkpoint is "
            f"untouched; a lower lr or a clip_norm may help{narrow} ({wrong[0]!r} is the first of {len(wrong)} tensors)"
        )

    def unit_of(self, tensor: Tensor) -> int | None:
        """The number of the unit that a parameter or buffer belongs to."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ evaluation

    @kept
    def on_validation_start(self) -> None:
        """End a run that went wrong before its weights are saved; make batch norms alike on all processes."""
        if self.train_losses.update_called:
            self._finite_losses()
        if self.trainer.world_size > 1:
            broadcast_buffers(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Figures of each unit and of the vote."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Figures of each unit and of the vote; returns their scores, (U + 1, B, K), for callbacks."""
        return self._evaluate(batch, batch_idx, "test")

    @kept
    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole set."""
        self._log_figures("val")

    @kept
    def on_test_epoch_end(self) -> None:
        """Log the figures of the whole set."""
        self._log_figures("test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> Tensor | None:
        inputs, target = self.inputs_and_target(batch, training=False, look=batch_idx == 0)
        scores = self.scores(*inputs)
        self._has_scores = scores is not None
        if scores is None:
            if not (self.sets_samples_beside_others and self._is_left_over(batch, batch_idx)):
                self._evaluate_losses(batch, stage)
            return None
        losses = torch.stack([self.criterion(of_unit, target) for of_unit in scores])
        every = torch.cat([scores, self.vote(scores)[None]])
        counted = self.task.counted(target)
        self.unit_figures[stage].update(self.task.figures(every, target), losses, counted, scores.shape[1])
        for metrics in self.named_metrics[stage].values():
            for metric, own in zip(metrics, every[-len(metrics) :], strict=True):
                metric.update(*self.task.for_metric(own, target))
        return every

    def _evaluate_losses(self, batch: Any, stage: str) -> None:
        """Without scores: the losses of the updates."""
        losses = torch.zeros(len(self.unit_names), device=self.device)
        for update in self.local_updates(batch):
            losses[list(update.units)] = torch.stack(update.values).to(losses)
        self.unit_figures[stage].update({}, losses, None, 1)

    def _log_figures(self, stage: str) -> None:
        figures, losses = self.unit_figures[stage].compute()
        self.unit_figures[stage].reset()
        figures = dict(figures) if self._has_scores else {}
        for name, metrics in self.named_metrics[stage].items() if self._has_scores else ():
            figures[name] = torch.stack([metric.compute().mean() for metric in metrics])
            for metric in metrics:
                metric.reset()
        self.log(f"{stage}/loss", losses.mean())
        for name, values in figures.items():
            self.log(f"{stage}/{name}", values[-1], prog_bar=True)
            self.log_dict({f"{stage}/{self.unit_key(k)}_{name}": value for k, value in enumerate(values[:-1])})

    def forward(self, *inputs: Any) -> Tensor:
        """Scores after the vote, (B, K), such as those of the classes: the highest one wins.

        Raises:
            ValueError: If the method gives no answers.
        """
        scores = self.scores(*inputs)
        self._has_scores = scores is not None
        if scores is None:
            raise ValueError(f"{type(self).__name__} gives no answers: it has no scores")
        return self.vote(scores)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scores (B, K) for inputs, or for batches of inputs and targets."""
        inputs, _ = self.split(batch)
        check_inputs(inputs, self.input_shape, self.vocabulary)
        return self(*inputs)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value that is not finite; one wait for the device."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist() if floats else []
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]
