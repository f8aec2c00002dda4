"""Arguments of a module, what it stores of them, and half precision."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, IterableDataset

from ff_lightning import SFF
from ff_lightning.heads import GoodnessHead
from tests.conftest import small_net
from tests.test_modules import SHAPE, assert_same, make, plain_head, weights


def test_hyperparameters_are_plain(make_trainer, digits, tmp_path):
    model = make(optimizer=partial(torch.optim.SGD, momentum=0.9), head=partial(GoodnessHead, depth=2), lr=0.1)
    assert model.hparams.optimizer == {"class_path": "torch.optim.sgd.SGD", "init_args": {"momentum": 0.9}}
    assert model.hparams.head == {"class_path": "ff_lightning.heads.squared.GoodnessHead", "init_args": {"depth": 2}}
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = SFF.load_from_checkpoint(tmp_path / "model.ckpt", backbone=small_net(), weights_only=True)
    assert_same(weights(model), weights(again))
    assert again.make_optimizer([torch.zeros(1, requires_grad=True)], lr=1).defaults["momentum"] == 0.9


def test_a_function_that_a_checkpoint_cannot_hold_is_said():
    with pytest.warns(UserWarning, match="head is a function and is not stored in checkpoints"):
        model = make(head=plain_head)
    assert "head" not in model.hparams


def test_a_checkpoint_of_another_architecture_is_refused(make_trainer, digits, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SFF(**SHAPE), digits)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = SFF(**SHAPE, granularity="stage")
    with pytest.raises(ValueError, match=r"another architecture.*'granularity': \"'stage' here, 'block' there\""):
        make_trainer(max_epochs=1).fit(other, digits, ckpt_path=tmp_path / "model.ckpt")


def test_data_and_model_must_agree(make_trainer, digits):
    with pytest.raises(ValueError, match="num_classes=7 of the model, but Digits has 10 classes"):
        make_trainer().fit(SFF(num_classes=7, input_shape=(1, 8, 8)), digits)
    with pytest.raises(ValueError, match=r"input_shape=\(3, 8, 8\) of the model, but Digits has samples of shape \(1,"):
        make_trainer().fit(SFF(num_classes=10, input_shape=(3, 8, 8)), digits)


def test_all_frozen(make_trainer, digits):
    model = make()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        make_trainer().fit(model, digits)


def test_a_shared_head_needs_an_optimizer_for_each_block(make_trainer, digits):
    shared = GoodnessHead(4, 10)
    arguments = {"input_shape": (1, 8, 8), "num_classes": 10, "head": lambda *_: shared}
    make_trainer().fit(SFF(small_net(), **arguments), digits)
    with pytest.raises(ValueError, match=r"optimization='automatic': blocks 0 .* and 1 .* share parameters"):
        make_trainer().fit(SFF(small_net(), optimization="automatic", **arguments), digits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gradient_clip_val": 0.5}, "give the model clip_norm=0.5, or optimization='automatic'"),
        ({"accumulate_grad_batches": 4}, "give the model accumulate=4, or optimization='automatic'"),
    ],
)
def test_a_trainer_flag_that_manual_optimization_refuses_names_its_replacement(flags, message, make_trainer, digits):
    with pytest.raises(Exception, match=message):
        make_trainer(**flags).fit(make(), digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "num_classes is missing"),
        ({"backbone": "resnet81"}, "backbone='resnet81' is not known.*did you mean 'resnet18'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr_decay": 0.0}, "lr_decay=0.0"),
        ({"lr_decay": 0.5, "optimizer": torch.optim.SGD}, "lr_decay=0.5 needs the lr of the last block"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler='cosin'.*did you mean 'cosine'"),
        ({"optimization": "auto"}, "optimization='auto'"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"reach": 0}, "reach=0: must be 1 to 3, the number of blocks"),
        ({"reach": 4}, "reach=4: must be 1 to 3, the number of blocks"),
        ({"reach": 0.0}, "reach=0.0: must be 1 to 3, the number of blocks, or a float above 0 and at most 1.0"),
        ({"reach": 1.01}, "reach=1.01: must be"),
        ({"own_loss": 1.1}, "own_loss=1.1: must be at least 0 and at most 1"),
        ({"clip_value": -1.0}, "clip_value=-1.0"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "clip_norm=1.0 and clip_value=1.0: give one of them"),
        ({"memory_format": "channels_first"}, "memory_format='channels_first'.*'channels_last'"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 2, "optimization": "automatic"}, r"Trainer\(accumulate_grad_batches=2\)"),
        ({"optimizer": "Adam"}, "optimizer='Adam'"),
        ({"optimizer": {"class_path": "torch.optim.Adm"}}, r"class_path='torch.optim.Adm' cannot be imported"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SFF(**{**SHAPE, **arguments})


def test_a_schedule_needs_the_length_of_the_run(make_trainer, digits):
    with pytest.raises(ValueError, match="lr_scheduler='onecycle' must know the length of the run: set max_epochs"):
        make_trainer(max_epochs=-1).fit(make(), digits)


class Stream(IterableDataset):
    """Six batches that do not tell how many they are."""

    def __iter__(self):
        return iter([(torch.randn(4, 1, 8, 8), torch.arange(4))] * 6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_that_do_not_tell_their_length(accumulate, make_trainer):
    settings = {"limit_train_batches": None, "limit_val_batches": 0}
    with pytest.raises(ValueError, match=r"lr_scheduler='cosine' must know .* max_steps where the data do not tell"):
        make_trainer(**settings).fit(make(lr_scheduler="cosine"), DataLoader(Stream(), batch_size=None))
    trainer = make_trainer(max_steps=5, **settings)
    trainer.fit(make(accumulate=accumulate), DataLoader(Stream(), batch_size=None))
    assert [config.scheduler.total_steps for config in trainer.lr_scheduler_configs] == [5, 5, 5]
    assert trainer.global_step == 5


def test_cooldown_is_constant_for_half_of_the_run_and_then_falls_to_0(make_trainer, digits):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = make_trainer(max_epochs=4, limit_train_batches=2, limit_val_batches=0, callbacks=[Watch()])
    trainer.fit(make(lr_scheduler="cooldown", lr=0.1), digits)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_onecycle_gives_no_momentum_to_an_optimizer_without(momentum, make_trainer, digits):
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"momentum": momentum}}
    used = set()

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            used.add(trainer.optimizers[0].param_groups[0]["momentum"])

    make_trainer(callbacks=[Watch()]).fit(make(optimizer=optimizer), digits)
    assert (used == {0}) == (momentum == 0)


def test_onecycle_goes_with_an_optimizer_that_knows_no_momentum(make_trainer, digits):
    model = make(optimizer=torch.optim.Adagrad)
    before = {key: value.clone() for key, value in weights(model).items()}
    make_trainer().fit(model, digits)
    assert not torch.equal(before["net.blocks.0.body.0.weight"], weights(model)["net.blocks.0.body.0.weight"])


def test_a_one_cycle_scheduler_of_the_user_may_count_epochs(make_trainer, digits):
    scheduler = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 2}}
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make(lr_scheduler=scheduler), digits)
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [2, 2, 2]


def test_small_stem_keeps_the_resolution():
    standard, small = (SFF(backbone="resnet18", num_classes=10, stem=stem) for stem in ("standard", "small"))
    assert standard.net.blocks[0].map_shape == (64, 8, 8)
    assert small.net.blocks[0].map_shape == (64, 32, 32)
    with pytest.warns(UserWarning, match="stem='small' has no effect"):
        SFF(**SHAPE, stem="small")


def half_precision(scaler):
    """Mixed precision with a gradient scaler, on the CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler)


def test_one_gradient_scaler_serves_all_blocks(make_trainer, digits):
    class Overflowing(SFF):
        def on_before_optimizer_step(self, optimizer):
            self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
            super().on_before_optimizer_step(optimizer)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    model = make(Overflowing)
    model.scales = []
    trainer = make_trainer(max_epochs=1, limit_train_batches=5, plugins=half_precision(scaler))
    trainer.fit(model, digits)
    assert model.scales == [2.0**8] * 6 + [2.0**9] * 6 + [2.0**10] * 3, "renewed once a batch, not once a block"
    assert trainer.global_step == 5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_overflow_skips_its_block_and_halves_the_scale(make_trainer, digits):
    class Overflowing(SFF):
        def on_train_batch_start(self, batch, batch_idx):
            self.before = weights(self)

        def manual_backward(self, loss):
            super().manual_backward(loss)
            weight = self.net.blocks[1].body.get_submodule("2").conv1.weight
            if weight.grad is not None:
                weight.grad.fill_(torch.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = make(Overflowing)
    make_trainer(max_epochs=1, limit_train_batches=1, plugins=half_precision(scaler)).fit(model, digits)
    moved = {key.split(".")[2] for key, value in model.named_parameters() if not torch.equal(value, model.before[key])}
    assert moved == {"0", "2"}, "blocks 0 and 2 stepped, block 1 did not"
    assert scaler.get_scale() == 2.0**7


def test_learning_rates_are_monitored(make_trainer, digits, tmp_path):
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger, callbacks=[LearningRateMonitor()], max_epochs=1).fit(make(), digits)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert sum(name.startswith("lr-") for name in header) == 3
