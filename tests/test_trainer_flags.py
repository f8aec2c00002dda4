"""The table of docs/training.md, row by row: what the Trainer's flags and callbacks do in both modes."""

import re
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner

from ff_lightning import SFF, data
from ff_lightning.heads import GoodnessHead
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


@row("`EarlyStopping`")
@BOTH
def test_early_stopping(optimization, make_trainer, digits):
    stop = EarlyStopping("val/loss", min_delta=1e9, patience=1)
    trainer = make_trainer(max_epochs=10, callbacks=[stop])
    trainer.fit(make(optimization), digits)
    assert trainer.current_epoch == 2


@row("`ModelCheckpoint`, also `every_n_train_steps`")
@BOTH
def test_checkpoint_interval(optimization, make_trainer, digits, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    make_trainer(enable_checkpointing=True, callbacks=[keep]).fit(make(optimization), digits)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in (2, 4, 6)}


@row("`ModelCheckpoint(train_time_interval=...)`")
@BOTH
def test_checkpoint_time(optimization, make_trainer, digits, tmp_path):
    keep = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=0))
    trainer = make_trainer(enable_checkpointing=True, callbacks=[keep])
    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="give every_n_train_steps"):
            trainer.fit(make(optimization), digits)
    else:
        trainer.fit(make(optimization), digits)
        assert list(tmp_path.glob("*.ckpt"))


@row("`LearningRateMonitor`")
@BOTH
def test_learning_rate_monitor(optimization, make_trainer, digits, tmp_path):
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger, callbacks=[LearningRateMonitor()]).fit(
        make(optimization, lr_scheduler="cosine"), digits
    )
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    lines = [name for name in header if name.startswith("lr-")]
    assert len(lines) == 3
    assert all(any(f"block{k:02d}" in line for line in lines) for k in range(3))


@row("`EMAWeightAveraging`, `WeightAveraging`")
@BOTH
def test_moving_average(optimization, make_trainer, digits):
    model, average = make(optimization), Average()
    ema = EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    make_trainer(callbacks=[average, ema]).fit(model, digits)
    expected = average.steps[0]
    for step in (2, 4):
        expected = {key: 0.5 * value + 0.5 * average.steps[step][key] for key, value in expected.items()}
    assert_same(expected, weights(model), atol=1e-6, rtol=1e-5)


@row("`StochasticWeightAveraging`")
@BOTH
def test_weight_averaging(optimization, make_trainer, digits):
    model, average = make(optimization), Average()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer = make_trainer(max_epochs=4, callbacks=[average, swa])
    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="one for each block: give the model optimization='auto"):
            trainer.fit(model, digits)
    else:
        trainer.fit(model, digits)
        expected = {key: sum(epoch[key] for epoch in average.epochs[1:4]) / 3 for key in average.epochs[0]}
        assert_same(expected, weights(model), atol=1e-6, rtol=1e-5)


@row("`GradientAccumulationScheduler`")
@BOTH
def test_accumulation_schedule(optimization, make_trainer, digits):
    trainer = make_trainer(limit_train_batches=4, callbacks=[GradientAccumulationScheduler({1: 2})])
    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="give the model accumulate, or optimization='automatic'"):
            trainer.fit(make(optimization), digits)
    else:
        trainer.fit(make(optimization), digits)
        assert trainer.global_step == 4 + 2


@row("`BaseFinetuning`")
@BOTH
def test_finetuning(optimization, make_trainer, digits):
    class Thaw(BackboneFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net.blocks[0], train_bn=False)

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

        def on_fit_start(self, trainer, pl_module):
            pass

    model = make(optimization)
    before = weights(model)
    trainer = make_trainer(callbacks=[Thaw()])
    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="give the model train_blocks, or optimization='automatic'"):
            trainer.fit(model, digits)
    else:
        trainer.fit(model, digits)
        moved = {key.split(".")[2] for key in before if not torch.equal(before[key], weights(model)[key])}
        assert "1" in moved
        assert all(torch.equal(v, weights(model)[k]) for k, v in before.items() if k.startswith("net.blocks.0."))


@row("`Tuner.lr_find`, `LearningRateFinder`")
@BOTH
def test_learning_rate_finder(optimization, make_trainer, digits):
    model = make(optimization)
    trainer = make_trainer(limit_train_batches=1.0)
    if optimization == "manual":
        with pytest.raises(MisconfigurationException, match="LearningRateFinder needs a single optimizer"):
            Tuner(trainer).lr_find(model, digits, num_training=20)
        with pytest.raises(MisconfigurationException, match="LearningRateFinder needs a single optimizer"):
            make_trainer(callbacks=[LearningRateFinder()]).fit(model, digits)
    else:
        found = Tuner(trainer).lr_find(model, digits, num_training=20)
        assert found.suggestion() == model.lr != 0.01
        trainer = make_trainer()
        trainer.fit(model, digits)
        assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr


@row("`Tuner.scale_batch_size`, `BatchSizeFinder`")
@BOTH
def test_batch_size_finder(optimization, make_trainer, digits):
    model = make(optimization)
    before = weights(model)
    trainer = make_trainer(limit_train_batches=1.0)
    size = Tuner(trainer).scale_batch_size(model, digits, mode="power", steps_per_trial=2, init_val=8, max_trials=3)
    assert size == digits.batch_size == 32
    assert_same(before, weights(model))


@row("`profiler`")
@BOTH
def test_profilers(optimization, make_trainer, digits, tmp_path):
    simple = SimpleProfiler()
    for profiler in (simple, AdvancedProfiler(tmp_path, "advanced"), PyTorchProfiler(tmp_path, "torch")):
        trainer = make_trainer(max_epochs=1, profiler=profiler)
        trainer.fit(make(optimization), digits)
    assert len(simple.recorded_durations["run_training_batch"]) == 3


@row("`ModelSummary`, `RichModelSummary`")
def test_summary(make_trainer, digits, capsys):
    make_trainer(fast_dev_run=1, callbacks=[RichModelSummary(max_depth=2)]).fit(make(), digits)
    assert "net.blocks" in capsys.readouterr().out


@row("`deterministic`")
@BOTH
def test_deterministic(optimization, make_trainer, digits):
    class Puts(GoodnessHead):
        def forward(self, features):
            torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))  # there is no deterministic way to do this
            return super().forward(features)

    def run(head, deterministic):
        model = make(optimization, head=head)
        try:
            make_trainer(max_epochs=1, deterministic=deterministic).fit(model, digits)
        finally:
            torch.use_deterministic_algorithms(False)
        return weights(model)

    run(Puts, False)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        run(Puts, True)
    assert_same(run("pooled", True), run("pooled", False))


@row("`detect_anomaly`")
@BOTH
def test_detect_anomaly(optimization, make_trainer, digits):
    class Nan(GoodnessHead):
        def forward(self, features):
            return super().forward(features) * torch.where(features.sum() > 1e9, 1.0, torch.nan).sqrt()

    model = make(optimization)
    model.net.objectives[1].head = Nan(4, 10)
    with pytest.raises(RuntimeError, match="returned nan values"):
        make_trainer(detect_anomaly=True).fit(model, digits)


@row("`reload_dataloaders_every_n_epochs`, `use_distributed_sampler`, `inference_mode`, `barebones`")
@BOTH
def test_indifferent_flags(optimization, make_trainer, digits):
    plain = make(optimization)
    make_trainer().fit(plain, digits)
    for flags in (
        {"reload_dataloaders_every_n_epochs": 1},
        {"use_distributed_sampler": False},
        {"inference_mode": False},
        {"barebones": True, "logger": None, "log_every_n_steps": None},
    ):
        model = make(optimization)
        make_trainer(**flags).fit(model, data.Digits(batch_size=16))
        assert_same(weights(plain), weights(model))
