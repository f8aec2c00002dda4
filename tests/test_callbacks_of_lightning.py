"""Callbacks of Lightning that change rates, groups, weights and windows: with the default schedule, and resumed."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from ff_lightning import SFF, data
from ff_lightning.training import checks
from ff_lightning.training.schedules import follow_first_group
from tests.conftest import small_net

BATCHES = 4
STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make(optimization="automatic", **arguments):
    torch.manual_seed(0)
    arguments = {"lr": 0.01, **arguments}
    return SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), optimization=optimization, **arguments)


def fit(make_trainer, model, *callbacks, ckpt_path=None, **settings):
    settings = {"max_epochs": 3, "limit_train_batches": BATCHES, "enable_checkpointing": True, **settings}
    trainer = make_trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model, data.Digits(batch_size=16), ckpt_path=ckpt_path)
    return trainer


class Everywhere(Callback):
    """Writes a checkpoint after each batch but the last of an epoch, and after each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *args):
        if not trainer.is_last_batch:  # after it, Lightning would not begin the next epoch with its hooks
            trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx + 1}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx + 1}.ckpt")


def assert_same(one, two):
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


# ------------------------------------------------------------------------------------------- the rate that is found


@pytest.mark.parametrize("schedule", ["onecycle", slow("cosine"), slow("constant")])
def test_the_rate_that_is_found_is_trained_with(schedule, make_trainer):
    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    runs = []
    for way in ("callback", "tuner"):
        model, rates = make(lr_scheduler=schedule, lr_decay=0.5), []
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        if way == "tuner":
            tuner = Tuner(make_trainer(max_epochs=1, limit_train_batches=24))
            tuner.lr_find(model, data.Digits(batch_size=16), num_training=20, early_stop_threshold=None)
        callbacks = [finder] if way == "callback" else []
        fit(make_trainer, model, Rates(), *callbacks, max_epochs=1, limit_train_batches=24)
        assert model.lr != 0.01
        runs.append((model.lr, rates))
    assert runs[0] == runs[1], "the same rate, and the same rates of all blocks at all steps"
    highest = [max(of_block) for of_block in zip(*runs[0][1], strict=True)]
    assert highest == pytest.approx([runs[0][0] * 0.5**k for k in (2, 1, 0)], rel=0.15)


# -------------------------------------------------------------------------------------------------- thawed in the run


class Thaw(BaseFinetuning):
    """The first block is frozen until the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.blocks[0], pl_module.net.heads[0]], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.net.blocks[0], pl_module.net.heads[0]], optimizer)


@pytest.mark.parametrize("schedule", ["onecycle", slow("cosine"), slow(STEP), slow("constant")])
def test_what_is_thawed_follows_the_schedule(schedule, make_trainer, tmp_path):
    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            first, *others = [group["lr"] for group in trainer.optimizers[0].param_groups]
            shares.append(others[-1] / first if trainer.current_epoch else None)

    whole, shares = make(lr_scheduler=schedule, lr_interval="step"), []
    before = {name: p.clone() for name, p in whole.named_parameters()}
    fit(make_trainer, whole, Thaw(), Rates(), Everywhere(tmp_path))
    assert shares[BATCHES:] == pytest.approx([0.1] * 2 * BATCHES)
    assert all(
        not torch.equal(p, before[name]) for name, p in whole.net.blocks[0].named_parameters(prefix="net.blocks.0")
    )
    for step in (BATCHES - 1, BATCHES, BATCHES + 2):  # before it was thawed, at the border, and after
        resumed = make(lr_scheduler=schedule, lr_interval="step")
        fit(make_trainer, resumed, Thaw(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert_same(whole, resumed)


def test_the_finetuning_of_lightning_knows_the_backbone(make_trainer):
    model = make()
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    fit(make_trainer, model, BackboneFinetuning(unfreeze_backbone_at_epoch=2), max_epochs=2)
    moved = {name for name, p in model.net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("objectives.") or "norm" in name}


def test_nothing_is_thawed_on_several_processes():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "name": "block00"}], lr=1.0)
    checks.check_unfrozen(optimizer, 2)
    optimizer.add_param_group({"params": weights[1:]})
    checks.check_unfrozen(optimizer, 1)
    with pytest.raises(MisconfigurationException, match="unfrozen in a run on 2 processes"):
        checks.check_unfrozen(optimizer, 2)


def test_a_group_that_comes_when_the_rate_is_zero():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights[:1], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": weights[1:], "lr": 0.0})
    follow_first_group(optimizer, scheduler)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups][1] == 0.0


# ------------------------------------------------------------------------------------------------- weights and windows


@pytest.mark.parametrize("optimization", ["manual", slow("automatic")])
def test_a_run_with_averaged_weights_goes_on(optimization, make_trainer, tmp_path):
    whole = make(optimization)
    fit(make_trainer, whole, EMAWeightAveraging(), Everywhere(tmp_path))
    for step in (BATCHES - 1, BATCHES):
        resumed = make(optimization)
        fit(make_trainer, resumed, EMAWeightAveraging(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert_same(whole, resumed)


def test_a_schedule_of_accumulation_goes_on_in_mid_epoch(make_trainer, tmp_path):
    whole = make()
    steps = fit(make_trainer, whole, GradientAccumulationScheduler({1: 2}), Everywhere(tmp_path)).global_step
    for batch in (BATCHES, BATCHES + 1, BATCHES + 2):
        resumed = make()
        callback = GradientAccumulationScheduler({1: 2})
        assert fit(make_trainer, resumed, callback, ckpt_path=tmp_path / f"{batch}.ckpt").global_step == steps == 8
        assert_same(whole, resumed)


def test_stochastic_averages_with_the_default_schedule(make_trainer, tmp_path):
    averages = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    steps = fit(make_trainer, make(), averages, Everywhere(tmp_path)).global_step
    resumed = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer = fit(make_trainer, make(), resumed, ckpt_path=tmp_path / f"{BATCHES + 1}.ckpt")
    assert trainer.global_step == steps


@pytest.mark.parametrize("optimization", ["manual", slow("automatic")])
def test_weights_alone_are_saved_at_the_end_of_an_epoch_and_tested(optimization, make_trainer, tmp_path):
    weights = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    model = make(optimization)
    trainer = fit(make_trainer, model, weights)
    (results,) = trainer.test(model, data.Digits(), verbose=False)
    assert make_trainer().test(make(), data.Digits(), ckpt_path=tmp_path / "weights.ckpt", verbose=False) == [results]
    with pytest.raises(ValueError, match=r"holds weights alone.*weights=FILE"):
        fit(make_trainer, make(optimization), ckpt_path=tmp_path / "weights.ckpt")


@pytest.mark.parametrize(
    ("before", "after"), [slow("32", "16-mixed"), slow("16-mixed", "32"), slow("64-true", "32"), slow("32", "64-true")]
)
def test_another_precision_may_go_on(before, after, make_trainer, tmp_path):
    def settings(precision):
        if precision != "16-mixed":
            return {"precision": precision}
        return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))}

    fit(make_trainer, make("manual"), Everywhere(tmp_path), **settings(before))
    model = make("manual")
    trainer = fit(make_trainer, model, ckpt_path=tmp_path / f"{BATCHES + 1}.ckpt", **settings(after))
    assert trainer.global_step == 3 * BATCHES
    assert all(p.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- strategies


def test_what_belongs_to_the_one_backward_of_ddp_is_refused_with_many():
    for settings in ({"static_graph": True}, {"ddp_comm_hook": fp16_compress_hook}):
        (name,) = settings
        with pytest.raises(MisconfigurationException, match=rf"DDPStrategy\({name}=.*optimization='automatic'"):
            checks.check_strategy(DDPStrategy(**settings), automatic=False)
        checks.check_strategy(DDPStrategy(**settings), automatic=True)
    checks.check_strategy(DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=True), automatic=False)
