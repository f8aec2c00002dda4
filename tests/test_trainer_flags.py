"""The table of docs/training.md, row by row: what the Trainer's flags and callbacks do in both modes."""

import importlib
import re
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from ff_lightning import SFF
from tests.conftest import small_net

TABLE = Path(__file__).parents[1] / "docs" / "training.md"
BOTH = pytest.mark.parametrize("optimization", ["manual", "automatic"])
ROWS = set()


def row(name):
    """Marks the test behind a row of the table."""
    ROWS.add(name)
    return lambda test: test


def make(optimization="manual", **arguments):
    torch.manual_seed(0)
    arguments = {"lr": 0.01, "lr_scheduler": "constant", **arguments}
    return SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), optimization=optimization, **arguments)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, two, **tolerance):
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, **(tolerance or {"atol": 0, "rtol": 0}), msg=key)


def differ(one, two):
    return any(not torch.equal(value, two[key]) for key, value in one.items())


class Count(Callback):
    """Counts batches and validations, and keeps the images."""

    def __init__(self):
        self.images, self.validations = [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images.append(batch[0].clone())

    def on_validation_end(self, trainer, pl_module):
        self.validations += not trainer.sanity_checking


class Average(Callback):
    """Weights at the start of each epoch, and at the end of each step."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module))

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(weights(pl_module))


def test_every_row_of_the_table_has_a_test():
    importlib.import_module("tests.test_trainer_callbacks")  # the other half of them
    rows = re.findall(r"^\| (`.*?) \|", TABLE.read_text(), re.MULTILINE)
    assert set(rows) == ROWS


@row("`max_epochs`, `max_steps`, `max_time`")
@BOTH
def test_length(optimization, make_trainer, digits):
    for settings, steps in (
        ({"max_epochs": 2}, 6),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_time": timedelta(microseconds=1)}, 1),  # it is looked at after each batch
    ):
        count = Count()
        trainer = make_trainer(callbacks=[count], **settings)
        trainer.fit(make(optimization), digits)
        assert trainer.global_step == len(count.images) == steps


@row("`limit_*_batches`, `val_check_interval`, `check_val_every_n_epoch`")
@BOTH
def test_validation(optimization, make_trainer, digits):
    for settings, validations in (({"val_check_interval": 2}, 4), ({"check_val_every_n_epoch": 2}, 1)):
        count = Count()
        make_trainer(limit_train_batches=4, callbacks=[count], **settings).fit(make(optimization), digits)
        assert (len(count.images), count.validations) == (8, validations)


@row("`fast_dev_run`")
@BOTH
@pytest.mark.parametrize("lr_scheduler", ["onecycle", "cosine"])
@pytest.mark.parametrize("batches", [1, 2])
def test_fast_dev_run(optimization, lr_scheduler, batches, make_trainer, digits):
    count = Count()
    make_trainer(fast_dev_run=batches, callbacks=[count]).fit(make(optimization, lr_scheduler=lr_scheduler), digits)
    assert (len(count.images), count.validations) == (batches, 1)


@row("`overfit_batches`")
@BOTH
def test_overfit_batches(optimization, make_trainer, digits):
    count = Count()
    trainer = make_trainer(overfit_batches=2, limit_train_batches=1.0, max_epochs=20, callbacks=[count])
    trainer.fit(make(optimization), digits)
    assert all(torch.equal(images, count.images[i % 2]) for i, images in enumerate(count.images))
    assert trainer.callback_metrics["train/loss"] < 1.5


@row("`accumulate_grad_batches`")
@BOTH
def test_accumulate(optimization, make_trainer, digits):
    def run(flags, **arguments):
        model, trainer = make(optimization, **arguments), make_trainer(limit_train_batches=4, **flags)
        trainer.fit(model, digits)
        return weights(model), trainer.global_step

    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="give the model accumulate=2"):
            run({"accumulate_grad_batches": 2})
        own = run({}, accumulate=2)
        automatic = make("automatic")
        make_trainer(limit_train_batches=4, accumulate_grad_batches=2).fit(automatic, digits)
        assert_same(own[0], weights(automatic))
    else:
        own = run({"accumulate_grad_batches": 2})
    assert own[1] == 4


@row("`gradient_clip_val`, `gradient_clip_algorithm`")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm, make_trainer, digits):
    flags = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    with pytest.raises(MisconfigurationException, match=f"give the model clip_{algorithm}=0.01"):
        make_trainer(**flags).fit(make(), digits)
    sgd = {"optimizer": torch.optim.SGD, "lr": 0.1}
    runs = [make(**{f"clip_{algorithm}": 0.01}, **sgd), make("automatic", **sgd), make(**sgd)]
    for model, settings in zip(runs, ({}, flags, {}), strict=True):
        make_trainer(**settings).fit(model, digits)
    clipped, automatic, unclipped = map(weights, runs)
    assert_same(clipped, automatic)
    assert differ(clipped, unclipped)


@row('`precision="bf16-mixed"`')
def test_bfloat16(make_trainer, digits):
    def run(optimization, **flags):
        class Types(SFF):
            def validation_step(self, batch, batch_idx):
                goodness = self.net.goodness(batch[0])
                features = next(iter(self.net.local_features(batch[0])))
                seen.add((goodness.dtype, features.dtype))
                super().validation_step(batch, batch_idx)

        torch.manual_seed(0)
        model = Types(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), optimization=optimization)
        make_trainer(precision="bf16-mixed").fit(model, digits)
        return weights(model)

    seen = set()
    assert_same(run("manual"), run("automatic"))
    assert seen == {(torch.float32, torch.bfloat16)}


@row('`precision="16-mixed"`')
def test_float16(make_trainer, digits):
    runs = []
    for optimization in ("manual", "automatic"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        model = make(optimization)
        make_trainer(plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(model, digits)
        assert scaler.get_scale() == 2.0**12, "renewed once a batch, whatever the number of optimizers"
        runs.append(weights(model))
    assert_same(*runs)


@BOTH
@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer undoes the scale in its own step
def test_float16_clips_at_the_true_scale_of_the_gradients(optimization, fused, make_trainer, digits):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = make(optimization, clip_norm=0.05, lr=1.0, optimizer=partial(torch.optim.SGD, fused=fused))
    before = weights(model)
    make_trainer(max_epochs=1, limit_train_batches=1, plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(
        model, digits
    )
    after = weights(model)
    for k in range(3):
        moved = [(after[key] - before[key]).flatten() for key in before if key.split(".")[2] == str(k)]
        assert torch.cat(moved).norm() == pytest.approx(0.05, rel=1e-3), "clipped, and by no more than it takes"


@row('`precision="16-true"`, `"bf16-true"`, `"64-true"`')
@BOTH
def test_true_precision(optimization, make_trainer, digits):
    for precision, dtype in (("bf16-true", torch.bfloat16), ("64-true", torch.float64)):
        model = make(optimization)
        make_trainer(precision=precision).fit(model, digits)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.isfinite().all() for p in model.parameters())


@row("`lr_scheduler` per step, per epoch, on plateau")
@BOTH
def test_schedulers(optimization, make_trainer, digits):
    halving = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    plateau = {
        "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
        "init_args": {"monitor": "val/loss", "patience": 0, "threshold": 1e9, "factor": 0.1, "threshold_mode": "abs"},
    }
    for schedule, interval, rate in ((halving, "step", 0.5**6), (halving, "epoch", 0.5**2), (plateau, "epoch", 0.1)):
        trainer = make_trainer()
        trainer.fit(make(optimization, lr=1e-3, lr_scheduler=schedule, lr_interval=interval), digits)
        rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        assert rates == pytest.approx([1e-3 * rate] * 3)
