"""What is said while a run goes on: how long it still takes, and figures of epochs that are short."""

import csv
import re
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from ff_lightning import SFF
from ff_lightning.callbacks import LastCheckpoint, TimeLeft, progress
from ff_lightning.callbacks.table import LogShortEpochs
from tests.conftest import small_net
from tests.trained import run


def make_model(**changes):
    return SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), lr_scheduler="constant", **changes)


class Clock(Callback):
    """Ten seconds for each batch; asks after each how much time is left."""

    def __init__(self, time_left):
        self.now, self.time_left, self.answers = 0, time_left, []

    def monotonic(self):
        return self.now

    def on_train_batch_start(self, *args):
        self.now += 10

    def on_train_batch_end(self, trainer, *args):
        self.answers.append(self.time_left.seconds(trainer))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(TimeLeft())
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"max_epochs": 2}, 50),
        ({"max_epochs": 100, "max_steps": 4}, 30),
        ({"max_epochs": -1, "max_steps": 4}, 30),
        ({"max_epochs": -1, "max_steps": 3, "accumulate": 2}, None),
    ],
)
def test_time_left_is_that_of_all_batches_that_follow(settings, first, make_trainer, digits, clock):
    model = make_model(accumulate=settings.pop("accumulate", 1))
    make_trainer(callbacks=[clock.time_left, clock], **settings).fit(model, digits)
    if first is not None:
        assert clock.answers == list(range(first, -1, -10))
    assert clock.answers[-1] == 0


def test_a_run_that_goes_on_reckons_by_its_own_pace(make_trainer, digits, clock, tmp_path):
    make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[LastCheckpoint(str(tmp_path))]).fit(
        make_model(), digits
    )
    trainer = make_trainer(max_epochs=3, callbacks=[clock.time_left, clock])
    trainer.fit(make_model(), digits, ckpt_path=tmp_path / "last.ckpt")
    assert clock.answers == [50, 40, 30, 20, 10, 0]


def test_a_run_ends_with_its_time(make_trainer, digits, clock):
    make_trainer(max_epochs=2, max_time="00:00:00:45", callbacks=[clock.time_left, clock]).fit(make_model(), digits)
    assert clock.answers[0] <= 45, "not 50"
    assert clock.answers[1:] == [40, 30, 20, 10, 0]


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_time_left_is_in_the_bar(bar, make_trainer, digits, clock, capsys):
    shown = []

    class Bar(bar):
        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            shown.append(metrics.get("left"))
            return metrics

    trainer = make_trainer(enable_progress_bar=True, callbacks=[clock.time_left, Bar(), clock])
    trainer.fit(make_model(), digits)
    assert [*dict.fromkeys(shown)] == [None, *(f"0:00:{seconds:02d}" for seconds in range(50, -1, -10))]
    assert "left" not in trainer.callback_metrics


def test_without_a_bar_there_is_a_line_for_each_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)  # releases of Lightning log to other places
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    printed = run("fit", *quiet, "--data.subset", 100, "--data.batch_size", 20, "--trainer.max_epochs", 2)
    line = r"epoch {} of 2, train/loss [\d.]+, val/acc [\d.]+, \d:\d\d:\d\d so far, about \d:\d\d:\d\d left"
    assert "Epoch" not in printed, "a file has no bar"
    assert len(lines) == 2
    assert re.fullmatch(line.format(1), lines[0])
    assert re.fullmatch(line.format(2), lines[1])
    assert lines[1].endswith("about 0:00:00 left")


@pytest.mark.parametrize(("interval", "steps"), [(50, [2, 5]), (2, [1, 3, 5])])
def test_short_epochs_are_logged(interval, steps, make_trainer, digits, tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [LogShortEpochs(), LearningRateMonitor("step")]
    trainer = make_trainer(logger=logger, log_every_n_steps=interval, callbacks=callbacks)
    trainer.fit(make_model(), digits)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row.get("lr-AdamW/block00")] == steps
