"""The table of docs/training.md through the command, as a user meets it: with checkpoints, a logger and the bar."""

from pathlib import Path

import pytest
import torch

from tests.test_cli import run
from tests.test_trainer_flags import ROWS

COMMAND = [
    "fit", "--data.batch_size", "8", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2",
    "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
    "--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", ".",
]  # fmt: skip


def callback(name, **arguments):
    given = [f"--trainer.callbacks+={name}"]
    for argument, value in arguments.items():
        given += [f"--trainer.callbacks.{argument}", value]
    return given


def trainer(**flags):
    return [part for flag, value in flags.items() for part in (f"--trainer.{flag}", value)]


def model(**arguments):
    return [part for name, value in arguments.items() for part in (f"--model.{name}", value)]


WORKS = ("works", "works")
ONE = "needs a single optimizer"
BASE = {  # the rows, and in each what a user may write and what comes of it in the two modes
    "`max_epochs`, `max_steps`, `max_time`": [
        (trainer(max_epochs=-1, max_steps=3), WORKS),
        ([*trainer(max_epochs=-1, max_time="00:00:00:01"), *model(lr_scheduler="constant")], WORKS),
        (trainer(max_epochs=-1, max_time="00:00:00:01"), ("must know the length of the run",) * 2),
    ],
    "`limit_*_batches`, `val_check_interval`, `check_val_every_n_epoch`": [
        (trainer(val_check_interval=0.5), WORKS),
        (trainer(val_check_interval=2), WORKS),
        (trainer(check_val_every_n_epoch=2), WORKS),
        (trainer(limit_val_batches=0), WORKS),
        (trainer(num_sanity_val_steps=-1), WORKS),
    ],
    "`fast_dev_run`": [(trainer(fast_dev_run="true"), ("no checkpoint",) * 2)],
    "`overfit_batches`": [(trainer(overfit_batches=2), WORKS), (trainer(overfit_batches=0.06), WORKS)],
    "`accumulate_grad_batches`": [
        (trainer(accumulate_grad_batches=2), ("give the model accumulate=2", "works")),
        (model(accumulate=2), ("works", "is for optimization='manual'")),
    ],
    "`gradient_clip_val`, `gradient_clip_algorithm`": [
        (trainer(gradient_clip_val=0.1), ("give the model clip_norm=0.1", "works")),
        (trainer(gradient_clip_val=0.1, gradient_clip_algorithm="value"), ("clip_value=0.1", "works")),
        (model(clip_value=0.1), WORKS),
    ],
    '`precision="bf16-mixed"`': [(trainer(precision="bf16-mixed"), WORKS)],
    '`precision="16-mixed"`': [(trainer(precision="16-mixed"), WORKS)],
    '`precision="16-true"`, `"bf16-true"`, `"64-true"`': [
        (trainer(precision="16-true", max_epochs=5), ("float16 is too narrow: try precision='16-mixed'",) * 2),
        (trainer(precision="bf16-true"), WORKS),
        (trainer(precision="64-true"), WORKS),
    ],
    "`lr_scheduler` per step, per epoch, on plateau": [
        (model(lr_scheduler="cosine"), WORKS),
        (["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", 1], WORKS),
        (
            [
                "--model.lr_scheduler",
                "lightning.pytorch.cli.ReduceLROnPlateau",
                "--model.lr_scheduler.monitor",
                "val/loss",
            ],
            WORKS,
        ),
    ],
    "`EarlyStopping`": [(callback("EarlyStopping", monitor="val/loss"), WORKS)],
    "`ModelCheckpoint`, also `every_n_train_steps`": [
        (callback("ModelCheckpoint", every_n_train_steps=2), WORKS),
        (callback("ModelCheckpoint", save_last="link", filename="linked"), WORKS),
        (callback("ModelCheckpoint", save_weights_only="true", filename="weights"), WORKS),
        (trainer(enable_checkpointing="false"), ("no checkpoint",) * 2),
    ],
    "`ModelCheckpoint(train_time_interval=...)`": [
        (callback("ModelCheckpoint", train_time_interval="00:00:00:01"), ("give every_n_train_steps", "works")),
    ],
    "`LearningRateMonitor`": [(callback("LearningRateMonitor"), WORKS)],
    "`EMAWeightAveraging`, `WeightAveraging`": [
        (callback("EMAWeightAveraging"), WORKS),
        (callback("WeightAveraging"), WORKS),
    ],
    "`StochasticWeightAveraging`": [
        (callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1), (ONE, "works")),
    ],
    "`GradientAccumulationScheduler`": [
        (callback("GradientAccumulationScheduler", scheduling="{1: 2}"), ("give the model accumulate", "works")),
    ],
    "`BaseFinetuning`": [
        (callback("BackboneFinetuning", unfreeze_backbone_at_epoch=1), ("give the model train_blocks", "works")),
    ],
    "`Tuner.lr_find`, `LearningRateFinder`": [
        (callback("LearningRateFinder", num_training_steps=4), (ONE, "works")),
    ],
    "`Tuner.scale_batch_size`, `BatchSizeFinder`": [
        (callback("BatchSizeFinder", max_trials=2, init_val=4, steps_per_trial=1), WORKS),
    ],
    "`profiler`": [(trainer(profiler=name), WORKS) for name in ("simple", "advanced", "pytorch")],
    "`ModelSummary`, `RichModelSummary`": [
        (trainer(enable_model_summary="true"), WORKS),
        (callback("RichModelSummary"), WORKS),
    ],
    "`deterministic`": [(trainer(deterministic="true"), WORKS)],
    "`detect_anomaly`": [(trainer(detect_anomaly="true"), WORKS)],
    "`reload_dataloaders_every_n_epochs`, `use_distributed_sampler`, `inference_mode`, `barebones`": [
        (trainer(reload_dataloaders_every_n_epochs=1), WORKS),
        (trainer(use_distributed_sampler="false"), WORKS),
        (trainer(inference_mode="false"), WORKS),
        (trainer(barebones="true", log_every_n_steps="null"), ("no checkpoint",) * 2),
        (trainer(logger="false"), WORKS),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."], WORKS),
        ([*callback("RichProgressBar"), *callback("DeviceStatsMonitor")], WORKS),
    ],
}
FAST = {  # died before with checkpoints on, or came to nothing
    ("overfit_batches 2", "manual"), ("enable_checkpointing", "manual"), ("BackboneFinetuning", "automatic"),
    ("LearningRateFinder", "automatic"), ("precision 16-true", "manual"),
}  # fmt: skip
CASES = [
    pytest.param(given, mode, outcome, id=f"{' '.join(map(str, given))}, {mode}")
    if any(mode == fast_mode and name in " ".join(map(str, given)) for name, fast_mode in FAST)
    else pytest.param(given, mode, outcome, id=f"{' '.join(map(str, given))}, {mode}", marks=pytest.mark.slow)
    for cases in BASE.values()
    for given, outcomes in cases
    for mode, outcome in zip(("manual", "automatic"), outcomes, strict=True)
]


def test_every_row_is_run():
    assert set(BASE) == ROWS


@pytest.mark.parametrize(("given", "mode", "outcome"), CASES)
def test_flag(given, mode, outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--model.optimization", mode, *given]
    if outcome not in ("works", "no checkpoint"):
        with pytest.raises(SystemExit, match=f"error: .*{outcome}") as stop:
            run(*command)
        assert "Traceback" not in str(stop.value)
        assert_finite(Path())
        return
    try:
        run(*command)
    finally:
        torch.use_deterministic_algorithms(False)
    paths = list(Path().rglob("last.ckpt"))
    assert len(paths) == (0 if outcome == "no checkpoint" else 1)
    assert_finite(Path())


def assert_finite(folder):
    for path in folder.rglob("*.ckpt"):
        assert all(t.isfinite().all() for t in torch.load(path, weights_only=True)["state_dict"].values()), path
