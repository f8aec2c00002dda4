"""The best checkpoint of a run, even if it was resumed, and the last one, even if it is stopped."""

import itertools
import signal
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ff_lightning.tasks import Task
from ff_lightning.training.lightning_private import cluster_environment
from ff_lightning.util.arguments import check_path, check_whole


class BestCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` of the best epoch, by the figure that the task of the model names unless another is given.

    A resumed run, which has its own folder, remembers which checkpoint was best before.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the figure to watch, and a name of the file that shows it, from the task of the model."""
        task = getattr(pl_module, "task", None)
        if self.monitor is None and isinstance(task, Task):
            self.monitor, self.mode = task.monitor
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
        if self.filename is None and self.monitor is not None:
            short = self.monitor.rpartition("/")[2]
            self.filename = f"epoch{{epoch:03d}}-{short}{{{self.monitor}:.4f}}"
            self.auto_insert_metric_name = False
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best of the run that was interrupted; its file stays where it is."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, from which a run goes on; Ctrl-C and SIGTERM write it at the end of the running batch.

    On several processes all stop after the same batch, whichever of them got the signal: one batch after that in which
    it came, because processes do not wait for each other after every batch. SLURM's signal before the end of a job
    (`SLURMEnvironment`, SIGUSR1 by default) also waits for the end of the batch; Lightning then saves and requeues. A
    second Ctrl-C stops at once. It leaves the previous checkpoint, and so does an error, such as a loss that is not
    finite. After the run the previous signal handlers are restored.

    Args:
        dirpath: Its folder; None: the folder of the run.
        every_n_train_steps: Also write it after every this many steps; None: only after each epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        check_path("dirpath", dirpath, optional=True)
        check_whole("every_n_train_steps", every_n_train_steps, least=0, optional=True)
        super().__init__(
            dirpath, "last", every_n_train_steps=every_n_train_steps, enable_version_counter=False, save_top_k=1
        )
        self._received: set[int] = set()
        self._replaced: dict[int, Any] = {}
        self._stop: BaseException | None = None
        self._group: dist.ProcessGroup | None = None
        self._sent: tuple[Tensor, dist.Work] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer signals from here on between batches."""
        super().on_train_start(trainer, pl_module)
        self._received, self._stop, self._sent = set(), None, None
        if trainer.world_size > 1:  # of its own, on the CPU: signals wait neither for gradients nor for a device
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        answered: list[int] = [signal.SIGTERM, signal.SIGINT]
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            answered.insert(0, environment.requeue_signal)  # Lightning saves and requeues, before a run that stops does
        self._replaced = {number: signal.getsignal(number) for number in answered}
        if threading.current_thread() is not threading.main_thread():
            return  # signals come to the main thread alone; what another process got is answered all the same
        for number, handler in self._replaced.items():
            if handler is not None:  # one that is not Python's own could not be put back
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._received.add(number)
        if number == signal.SIGINT:
            rank_zero_info("stopping after this batch with a checkpoint; press Ctrl-C again to stop at once, without")
            signal.signal(number, self._replaced[number])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the checkpoint when it is due, and stop if any process was asked to; the last batch waits."""
        if not trainer.is_last_batch:  # after it comes the validation that belongs to this epoch
            super().on_train_batch_end(trainer, pl_module, *args)
            self._answer(trainer, self._arrived())
            self._send()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, and stop if any process was asked to."""
        self._write_if_due(trainer)
        arrived = self._arrived()
        self._send()
        self._answer(trainer, [*arrived, *self._arrived()])

    def _send(self) -> None:
        """Tell the other processes which signals came to this one, without a wait."""
        if self._group is not None:
            came = torch.tensor([number in self._received for number in self._replaced], dtype=torch.uint8)
            work = dist.all_reduce(came, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._sent = came, work
            self._received.clear()

    def _arrived(self) -> list[int]:
        """The signals that came to any process before the last `_send`; of a single process, those so far."""
        if self._group is None:
            numbers = [number for number in self._replaced if number in self._received]
            self._received.clear()
            return numbers
        if self._sent is None:
            return []
        (came, work), self._sent = self._sent, None
        work.wait()
        return list(itertools.compress(self._replaced, came.tolist()))

    def _answer(self, trainer: Trainer, numbers: Sequence[int]) -> None:
        """Do what signals ask for."""
        for number in numbers:
            if number == signal.SIGINT:
                self._stop = KeyboardInterrupt()
            elif number == signal.SIGTERM:
                self._stop = SIGTERMException(128 + number)  # the exit code of the process
            elif callable(handler := self._replaced[number]):
                handler(number, None)
        if self._stop is not None:
            raise self._stop

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the checkpoint of a run that was stopped between two batches; not of one that broke off in a batch."""
        if exception is self._stop and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer)
            rank_zero_info(f"stopped; go on with ckpt_path={self.best_model_path}")
        elif isinstance(exception, KeyboardInterrupt) and self.best_model_path:
            rank_zero_info(f"stopped at once; the last checkpoint is {self.best_model_path}")
        self._give_back()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, if it was not written after the last step."""
        self._write_if_due(trainer)
        self._give_back()

    def _write_if_due(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self.best_model_path = self.format_checkpoint_name({})
        self._save_checkpoint(trainer, self.best_model_path)

    def _give_back(self) -> None:
        """Give the signals back; one that someone else has taken since is his."""
        for number, handler in self._replaced.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._replaced, self._stop, self._sent, self._group = {}, None, None, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand on a signal that came after the last batch: all is written, and Lightning has given its own back too."""
        self._give_back()
        late, self._received = self._received & {signal.SIGTERM, signal.SIGINT}, set()
        for number in late:
            signal.raise_signal(number)
