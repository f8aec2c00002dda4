"""What a run adds to its checkpoints, and how a run or a test reads one."""

import sys
import warnings
from contextlib import suppress
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from ff_lightning import __version__
from ff_lightning.tasks import Unlabelled
from ff_lightning.training import checks, matching, resume
from ff_lightning.training.checkpoint_io import WholeCheckpointIO
from ff_lightning.training.kept import kept
from ff_lightning.training.plain import make_checkpoint_plain, make_plain
from ff_lightning.training.reporting import Reporting, not_finite

_EXPECTED = (
    "It is recommended to use .self.log",  # figures are the same on all processes before they are logged
    ".*with manual optimization and every_n_train_steps",  # a checkpoint after the step is what is asked for
)
"""Warnings of Lightning that do not apply here."""


class Resumable(Reporting):
    """A model whose checkpoints name the model and its data, and which continues where a run stopped.

    Attributes:
        trained_on: The description of the data that it was trained on; see `ff_lightning.training.matching`.
        command: The command line that trains it, if there is one.
    """

    accumulate: int
    num_classes: int
    input_shape: tuple[int, ...]
    stepper: Any = None
    step_epoch_schedules: Any

    def __init__(self) -> None:
        super().__init__()
        self.trained_on: dict[str, Any] = {}
        self.command: str | None = None
        self._data: dict[str, Any] | None = None
        self._interrupted: dict[str, Any] = {}

    @kept
    def setup(self, stage: str) -> None:
        """Compare the model with the data; make the Trainer write only complete checkpoints."""
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        strategy = self.trainer.strategy
        checks.check_strategy(strategy, self.automatic_optimization)
        checks.check_batches(self.trainer)
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO()
        data = getattr(self.trainer, "datamodule", None)
        classes = None if isinstance(self.task, Unlabelled) else self.num_classes  # else they are not looked at
        checks.check_data(classes, self.input_shape, self.vocabulary, data)
        self._data = matching.describe_data(data)
        if self.trainer.ckpt_path is None:  # else a checkpoint says what the weights were trained on
            matching.check_same_data(self.trained_on, self._data, strict=stage != "fit")
        if stage == "fit":
            self.trained_on = self.trained_on | self._data
            self.infinite_by_nature = frozenset(not_finite(dict(self.named_buffers())))

    @kept
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with the network, the data and the run, and say in one line where they differ."""
        saved = checkpoint.get("ff_lightning", {})
        arguments = saved.get("arguments", checkpoint.get("hyper_parameters", {}))
        own = make_plain(self.hparams, strict=False)
        fitting = self._data is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            matching.check_same_run(arguments, own, checkpoint)
        checks.check_architecture(self.state_dict(), self.hparams, checkpoint)
        matching.check_same_network(arguments, own)
        self.trained_on = saved.get("data") or (self._data if fitting else None) or {}
        self.command = self.command or saved.get("command")
        if self._data is not None:  # else there is no Trainer yet
            matching.check_same_data(self.trained_on, self._data)
            resume.restore_frozen(self, saved.get("frozen"))
        self._interrupted = {**saved, "optimizers": matching.groups_of(checkpoint.get("optimizer_states", ()))}

    @kept
    def teardown(self, stage: str) -> None:
        """Say so where no batch was seen; a Tuner ends its trial runs by an exception, before their first batch."""
        if sys.exc_info()[0] is None:
            checks.check_something_ran(self.trainer)

    @kept
    def on_fit_start(self) -> None:
        """Compare the optimizers with those of the run that goes on."""
        if self.trainer.ckpt_path is not None and self._interrupted:
            matching.check_same_parameters(self._interrupted["optimizers"], self.trainer.optimizers)

    @kept
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `resume` says, unless the run went wrong."""
        trainer = self.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check_weights()
        in_window = fitting and self._is_in_window
        if trainer.is_last_batch:  # the next one is the first of an epoch
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        checkpoint["ff_lightning"] = {
            "arguments": make_plain(
                {name: value for name, value in self.hparams.items() if not name.startswith("_")}, strict=False
            ),
            "data": self.trained_on,
            "command": self.command,
            "model": {
                "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
                "num_classes": self.num_classes,
                "input_shape": list(self.input_shape),
                "task": type(self.task).__name__,
            },
            "version": __version__,
            "window": self._window,
            "stepped_in_epoch": sorted(self.stepper.stepped_in_epoch) if fitting and self.stepper else [],
            "logged": {k: float(v) for k, v in trainer.callback_metrics.items()} if trainer.is_last_batch else None,
            "frozen": [name for name, parameter in self.named_parameters() if not parameter.requires_grad],
            "random": resume.random_states(trainer.world_size),
            "gradients": resume.gradients(self, trainer.world_size) if in_window else {},
        }
        make_checkpoint_plain(checkpoint)

    def take_up(self) -> None:
        """Continue where the run was interrupted, if it was."""
        interrupted, self._interrupted = self._interrupted, {}
        if self.trainer.ckpt_path is not None and interrupted:
            resume.restore_window(self.trainer, interrupted.get("window", 1), bool(interrupted["gradients"]))
            resume.restore_position(self.trainer)
            resume.restore_random_state(interrupted["random"], self.trainer.global_rank)
            resume.restore_gradients(self, interrupted["gradients"])
            self._take_up_epoch(interrupted)

    def _take_up_epoch(self, interrupted: dict[str, Any]) -> None:
        """Let schedules of epochs step as they would have: Lightning does not end an epoch whose last batch is done."""
        if self.stepper:
            self.stepper.stepped_in_epoch.update(interrupted.get("stepped_in_epoch", ()))
            if interrupted.get("logged") is not None:  # it was written after the last batch
                with suppress(ValueError):  # a plateau's figure was not there yet: it waits for the next epoch
                    self.step_epoch_schedules(interrupted["logged"])

    @property
    def _is_in_window(self) -> bool:
        """Whether gradients wait for further batches of an accumulation."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return batches % self._window != 0 and not self.trainer.is_last_batch

    @property
    def _window(self) -> int:
        """Number of batches of an accumulation."""
        return max(self.accumulate, self.trainer.accumulate_grad_batches)
