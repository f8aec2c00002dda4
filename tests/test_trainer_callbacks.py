"""The rows of the table of docs/training.md that are callbacks, profilers and the like."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner

from ff_lightning import data
from ff_lightning.heads import GoodnessHead
from tests.test_trainer_flags import BOTH, Average, assert_same, make, row, weights


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
