"""How long a run still takes."""

import math
import time
from datetime import timedelta
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console


class TimeLeft(Callback):
    """Says how long the whole run still takes, where Lightning's progress bars speak of an epoch alone.

    It stands in the progress bar as ``left``. Where there is no bar, or what is printed goes to a file, there is a line
    after each epoch. It is reckoned from the pace of this run so far, validation included, and from ``max_epochs``,
    ``max_steps`` and ``max_time``: a run that another callback stops ends earlier.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count: a run that goes on has batches behind it whose pace is not known."""
        self._batches, self._first_step = 0, trainer.global_step
        self._start = self._shown = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the time into the bar, once in a second."""
        self._batches += 1
        self._left_in_epoch = trainer.num_training_batches - batch_idx - 1
        if trainer.progress_bar_callback is not None and time.monotonic() >= self._shown + 1:
            self._show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the time into the bar, or print a line."""
        if not self._batches:
            return
        if trainer.progress_bar_callback is not None:
            self._show(trainer)
        if trainer.progress_bar_callback is None or not get_console().is_terminal:
            of = f" of {trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            figures = [f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items() if name != "left"]
            times = f"{_text(time.monotonic() - self._start)} so far", f"about {_text(self.seconds(trainer))} left"
            rank_zero_info(", ".join([f"epoch {trainer.current_epoch + 1}{of}", *figures, *times]))

    def seconds(self, trainer: Trainer) -> float:
        """What is left of the run in seconds; infinite where it has no end."""
        batches = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = trainer.max_epochs - trainer.current_epoch - 1
            batches = self._left_in_epoch + (epochs * trainer.num_training_batches if epochs > 0 else 0)
        steps = trainer.global_step - self._first_step
        if trainer.max_steps >= 0 and steps:
            batches = min(batches, (trainer.max_steps - trainer.global_step) * self._batches / steps)
        pace = (time.monotonic() - self._start) / self._batches
        timers = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, Timer)]
        times = [left for timer in timers if (left := timer.time_remaining()) is not None]
        return max(0.0, min([batches * pace, *times]))

    def _show(self, trainer: Trainer) -> None:
        self._shown = time.monotonic()
        cast(Any, trainer.progress_bar_metrics)["left"] = _text(self.seconds(trainer))


def _text(seconds: float) -> str:
    """As ``0:01:20``.

    Examples:
        >>> _text(80.4), _text(math.inf)
        ('0:01:20', '?')
    """
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"
