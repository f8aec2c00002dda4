"""The best checkpoint of a run, also of one that was resumed, and the last one, also of one that is asked to stop."""

import signal
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ff_lightning.arguments import check_path, check_whole


class BestCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that remembers, in a resumed run with a folder of its own, which one was best before."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best of the run that was interrupted; its file stays where it is."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, from which a run goes on; Ctrl-C and SIGTERM write it at the end of the running batch.

    On several processes all stop after the same batch, whichever of them got the signal. The signal by which SLURM
    announces the end of a job (`SLURMEnvironment`, SIGUSR1 by default) waits for the end of the batch too, and
    Lightning then saves and requeues. A second Ctrl-C stops at once, without a checkpoint. An error, such as a loss
    that is not finite, leaves the checkpoint that was there before.

    Args:
        dirpath: Its folder; None: the folder of the run.
        every_n_train_steps: Write it every so many steps too; None: after each epoch only.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        check_path("dirpath", dirpath, optional=True)
        check_whole("every_n_train_steps", every_n_train_steps, least=0, optional=True)
        super().__init__(
            dirpath, "last", every_n_train_steps=every_n_train_steps, enable_version_counter=False, save_top_k=1
        )
        self.received = 0
        self._replaced: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer signals from here on between batches."""
        super().on_train_start(trainer, pl_module)
        answered = [signal.SIGINT, signal.SIGTERM]
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            answered.append(environment.requeue_signal)
        self.received = 0
        for number in answered:
            try:
                self._replaced[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are not ours
                return

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        if number == signal.SIGINT:
            rank_zero_info("stopping after this batch with a checkpoint; press Ctrl-C again to stop at once, without")
            signal.signal(number, self._replaced[number])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the checkpoint when it is due, and stop if any process was asked to; the last batch waits."""
        if not trainer.is_last_batch:  # after it comes the validation that belongs to this epoch
            super().on_train_batch_end(trainer, pl_module, *args)
            self._answer(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, and stop if any process was asked to."""
        self.on_train_end(trainer, pl_module)
        self._answer(trainer)

    def _answer(self, trainer: Trainer) -> None:
        """Do what a signal that came to any process asks for."""
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max")) if trainer.world_size > 1 else self.received
        if not number:
            return
        self.received = 0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise SIGTERMException(128 + number)  # the exit code of the process
        self._replaced[number](number, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the checkpoint of a run that was asked to stop; not of one that went wrong."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.training and self._replaced:
            self._write(trainer)
            rank_zero_info(f"stopped; go on with ckpt_path={self.best_model_path}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, if it was not written after the last step."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self.best_model_path = self.format_checkpoint_name({})
        self._save_checkpoint(trainer, self.best_model_path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}
