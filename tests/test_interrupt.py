"""Runs that are stopped by a signal or killed go on to the weights of the run that was left alone."""

import multiprocessing
import random
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback

from ff_lightning import SFF, data
from ff_lightning.callbacks import LastCheckpoint
from tests.conftest import small_net

pytestmark = pytest.mark.slow  # test_signals.py has the same within one process
EPOCHS, BATCHES = 3, 6
FORK = multiprocessing.get_context("fork")  # a process with everything imported


class Tell(Callback):
    """Sends the number of each batch, before it is trained on; a signal comes at the beginning of one of them."""

    def __init__(self, pipe, stop_at, number):
        self.pipe, self.stop_at, self.number = pipe, stop_at, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        now = trainer.fit_loop.epoch_loop.total_batch_idx
        self.pipe.send(now)
        if now == self.stop_at:
            signal.raise_signal(self.number)


def fit(folder, pipe, resume, every, stop_at, number, killed):
    torch.manual_seed(0)
    model = SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), lr=0.01, accumulate=2)
    last = LastCheckpoint(str(folder), every_n_train_steps=every)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, limit_train_batches=BATCHES, limit_val_batches=2, accelerator="cpu", devices=1, logger=False,
        callbacks=[last, Tell(pipe, stop_at, number)], enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    path = folder / "last.ckpt"
    trainer.fit(model, data.Digits(batch_size=16), ckpt_path=path if resume and path.exists() else None)
    torch.save(model.state_dict(), folder / "end.pt")
    pipe.send(EPOCHS * BATCHES)
    if killed:
        signal.pause()  # the kill may come later than the end


def run(folder, resume=False, every=1, stop_at=None, number=None, kill_at=None, delay=0.0):
    """Train in a process of its own, stopped by a signal or killed some time after a batch began: code and batches."""
    folder.mkdir(exist_ok=True)
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=fit, args=(folder, send, resume, every, stop_at, number, kill_at is not None))
    process.start()
    send.close()
    seen = []
    while True:
        try:
            seen.append(receive.recv())
        except EOFError:
            break
        if kill_at is not None and seen[-1] >= kill_at:
            time.sleep(delay)
            process.kill()
            kill_at = None
    process.join(60)
    return process.exitcode, seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights after a run that was left alone."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder)[0] == 0
    return torch.load(folder / "end.pt")


def assert_same(folder, whole):
    for key, value in torch.load(folder / "end.pt").items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)], ids=["SIGTERM", "SIGINT (Ctrl-C)"]
)
@pytest.mark.parametrize("batch", [2, 5, 9])  # in a window of gradients, behind an epoch, behind a window
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint(number, code, batch, whole, tmp_path):
    exitcode, seen = run(tmp_path, stop_at=batch, number=number, every=None)
    assert (exitcode, seen[-1]) == (code, batch), "stopped after this batch"
    exitcode, seen = run(tmp_path, resume=True)
    assert (exitcode, seen[0]) == (0, batch + 1), "and went on with the next"
    assert_same(tmp_path, whole)


def test_killed_at_twenty_random_moments(whole, tmp_path):
    dice = random.Random(0)
    for trial in range(5):
        folder, killed_in = tmp_path / str(trial), 0
        for part in range(0, 16, 4):
            exitcode, seen = run(folder, resume=True, kill_at=part + dice.randrange(3), delay=dice.uniform(0, 0.02))
            assert exitcode == -signal.SIGKILL
            assert seen[0] in range(max(0, killed_in - 2), killed_in + 2), "little was lost"
            killed_in = seen[-1]
        exitcode, seen = run(folder, resume=True)
        assert exitcode == 0
        assert seen[0] in range(killed_in - 2, killed_in + 2)
        assert_same(folder, whole)
