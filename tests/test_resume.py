"""A run that was interrupted ends in the weights of the run that was not."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from ff_lightning import SFF, Backprop, data
from ff_lightning.callbacks import GreedyBlocks
from ff_lightning.training.checkpoint_io import WholeCheckpointIO
from tests.conftest import small_net

BATCHES = 5  # in an epoch


class Stopped(Exception):
    pass


class StopAfter(Callback):
    """Ends the run as an error would, after its last.ckpt was written."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batches:
            raise Stopped


class Noisy(Callback):
    """Uses up random numbers, as a user's own callback may."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].add_(0.01 * (torch.randn(()) + random.random() + np.random.rand()))


def make(method=SFF, **arguments):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.2), small_net())
    return method(backbone=network, num_classes=10, input_shape=(1, 8, 8), lr=0.01, **arguments)


def fit(make_trainer, model, ckpt_path=None, callbacks=(), seed=1, **settings):
    """A run of 2 epochs with other random numbers than any other run, until a checkpoint restores them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    settings = {"max_epochs": 2, "limit_train_batches": BATCHES, "callbacks": [Noisy(), *callbacks], **settings}
    trainer = make_trainer(**settings)
    trainer.fit(model, data.Digits(batch_size=16), ckpt_path=ckpt_path)
    return trainer


def interrupted(make_trainer, folder, batches, make_model=make, **settings):
    """The state after a run that was stopped before the batch of this number, and resumed from its last checkpoint."""
    keep = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(Stopped):
        fit(make_trainer, make_model(), callbacks=[StopAfter(batches), keep], enable_checkpointing=True, **settings)
    model = make_model()
    trainer = fit(make_trainer, model, ckpt_path=folder / "last.ckpt", seed=2, **settings)
    return model, trainer


def assert_same(one, two):
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


class SaveEverywhere(Callback):
    """Writes a checkpoint wherever one may be written."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []

    def save(self, trainer, *args):
        if not trainer.sanity_checking:
            self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
            trainer.save_checkpoint(self.paths[-1])

    on_train_batch_end = on_validation_end = on_train_epoch_end = save


@pytest.mark.parametrize(
    ("method", "optimization", "schedule"),
    [
        (SFF, "manual", "onecycle"),
        pytest.param(SFF, "manual", "constant", marks=pytest.mark.slow),
        pytest.param(SFF, "automatic", "onecycle", marks=pytest.mark.slow),
        pytest.param(Backprop, "manual", "onecycle", marks=pytest.mark.slow),
        pytest.param(Backprop, "automatic", "constant", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_written_anywhere_leads_to_the_same_weights(
    method, optimization, schedule, make_trainer, tmp_path
):
    def make_model():
        return make(method, optimization=optimization, lr_scheduler=schedule)

    whole, everywhere = make_model(), SaveEverywhere(tmp_path)
    fit(make_trainer, whole, callbacks=[everywhere], val_check_interval=3)
    assert len(everywhere.paths) == 14  # in each epoch 5 batches, validation after 3 of them, the end
    for path in everywhere.paths[:-1]:
        model = make_model()
        fit(make_trainer, model, ckpt_path=path, seed=2, val_check_interval=3)
        assert_same(whole, model)


class SaveAt(Callback):
    """Writes a checkpoint at the end of a batch, also where no step was taken."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("optimization", ["manual", pytest.param("automatic", marks=pytest.mark.slow)])
def test_interrupted_in_the_middle_of_an_accumulation(optimization, make_trainer, tmp_path):
    manual = optimization == "manual"
    settings = {} if manual else {"accumulate_grad_batches": 3}

    def make_model():
        return make(optimization=optimization, accumulate=3 if manual else 1)

    whole = make_model()
    saves = [SaveAt(batch, tmp_path / f"{batch}.ckpt") for batch in range(9)]
    steps = fit(make_trainer, whole, callbacks=saves, **settings).global_step
    for batch in range(9):
        model = make_model()
        trainer = fit(make_trainer, model, ckpt_path=tmp_path / f"{batch}.ckpt", seed=2, **settings)
        assert trainer.global_step == steps == 4
        assert_same(whole, model)


@pytest.mark.parametrize("optimization", ["manual", pytest.param("automatic", marks=pytest.mark.slow)])
def test_a_validation_in_the_middle_of_an_accumulation_changes_nothing(optimization, make_trainer, tmp_path):
    manual = optimization == "manual"
    settings = {} if manual else {"accumulate_grad_batches": 3}

    def make_model():
        return make(optimization=optimization, accumulate=3 if manual else 1)

    plain, validated, everywhere = make_model(), make_model(), SaveEverywhere(tmp_path)
    fit(make_trainer, plain, **settings)
    fit(make_trainer, validated, callbacks=[everywhere], val_check_interval=2, **settings)
    assert_same(plain, validated)
    for path in everywhere.paths[:5]:  # two batches, a validation, two batches
        model = make_model()
        fit(make_trainer, model, ckpt_path=path, seed=2, val_check_interval=2, **settings)
        assert_same(plain, model)


def test_gradients_are_kept_only_in_the_middle_of_an_accumulation(make_trainer, tmp_path):
    saves = [SaveAt(batch, tmp_path / f"{batch}.ckpt") for batch in range(BATCHES)]
    fit(make_trainer, make(accumulate=3), callbacks=saves)
    kept = [torch.load(save.path, weights_only=True)["ff_lightning"]["gradients"] for save in saves]
    assert [bool(gradients) for gradients in kept] == [True, True, False, True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}},
        {"lr_scheduler": {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}},  # noqa: E501
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, "clip_norm": 0.1},
        {"reach": 2, "optimization": "automatic"},
        {"reach": 2},
        {"reach": 0.95, "own_loss": 0.3},
        {"reach": 2, "recompute": True},
    ],
    ids=["schedule per epoch", "plateau", "momentum and clipping", "reach, automatic", "reach", "windows", "recompute"],
)  # fmt: skip
def test_interrupted_with(arguments, make_trainer, tmp_path):
    whole = make(**arguments)
    fit(make_trainer, whole)
    model, _ = interrupted(make_trainer, tmp_path, 7, lambda: make(**arguments))
    assert_same(whole, model)


def test_interrupted_with_a_gradient_scaler(make_trainer, tmp_path):
    def settings():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}

    whole = make()
    fit(make_trainer, whole, **settings())
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(Stopped):
        fit(make_trainer, make(), callbacks=[StopAfter(7), keep], enable_checkpointing=True, **settings())
    model = make()
    trainer = fit(make_trainer, model, ckpt_path=tmp_path / "last.ckpt", seed=2, **settings())
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**13
    assert_same(whole, model)


def test_interrupted_in_the_turn_of_a_block(make_trainer, tmp_path):
    whole = make()
    trainer = make_trainer(max_epochs=3, limit_train_batches=BATCHES, callbacks=[GreedyBlocks(1)])
    trainer.fit(whole, data.Digits(batch_size=16))
    model = make()
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [GreedyBlocks(1), StopAfter(7), keep]
    with pytest.raises(Stopped):
        make_trainer(max_epochs=3, limit_train_batches=BATCHES, callbacks=callbacks, enable_checkpointing=True).fit(
            model, data.Digits(batch_size=16)
        )
    model = make()
    trainer = make_trainer(max_epochs=3, limit_train_batches=BATCHES, callbacks=[GreedyBlocks(1)])
    trainer.fit(model, data.Digits(batch_size=16), ckpt_path=tmp_path / "last.ckpt")
    assert_same(whole, model)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "cooldown"])
def test_a_schedule_is_not_run_beyond_its_end(schedule, make_trainer, tmp_path):
    fit(make_trainer, make(lr_scheduler=schedule), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    message = f"lr_scheduler='{schedule}' of the checkpoint was made for 5 steps, this run has 10: resume with"
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, make(lr_scheduler=schedule), max_epochs=2, ckpt_path=tmp_path / "one.ckpt")


def test_a_truncated_checkpoint_is_refused_by_name(make_trainer, tmp_path):
    path = tmp_path / "cut.ckpt"
    trainer = fit(make_trainer, make(), max_epochs=1)
    trainer.save_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.ckpt is not whole"):
        fit(make_trainer, make(), ckpt_path=path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"epoch": 1}, path)

    class Broken:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        WholeCheckpointIO().save_checkpoint({"epoch": 2, "weights": torch.zeros(1000), "broken": Broken()}, path)
    assert WholeCheckpointIO().load_checkpoint(path) == {"epoch": 1}


def test_schedules_of_epochs_go_on_from_every_batch(make_trainer, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        model = make(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), lr_interval="epoch")
        fit(make_trainer, model, ckpt_path, callbacks, max_epochs=3, limit_train_batches=2)
        return model

    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.epoch_loop.total_batch_idx + 1}.ckpt")

    whole = run(callbacks=[Save()])
    for batches in (1, 2, 4):  # in mid-epoch, and after the last batch of two epochs
        assert_same(whole, run(tmp_path / f"{batches}.ckpt"))
