"""A method that a user writes: the base gives it all the rest."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ff_lightning import SFF, Backprop, LocalLearner, Update, data
from ff_lightning.cli import main
from tests.conftest import small_net
from tests.hinton import Hinton

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_it_learns_on_the_command_line_by_its_import_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "tests.hinton.Hinton", "--model.widths", "[128, 128]", "--trainer.max_epochs", "12"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--data.batch_size", "32"]
    main(["fit", *arguments])
    (best,) = Path(tmp_path).rglob("*-acc*.ckpt")
    main(["test", "--ckpt_path", str(best), "--trainer.accelerator", "cpu"])
    figures = [line.split() for line in capsys.readouterr().out.splitlines() if "vote" in line]
    assert float(figures[-1][-2]) > 85, "untrained: 10; logistic regression: 95"


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_the_file_is_read_again_and_goes_on(optimization, make_trainer, tmp_path):
    runs = []
    for stop in (None, 1):
        torch.manual_seed(0)
        model = Hinton(**SHAPE, optimization=optimization, lr_scheduler="constant", theta=1.5)
        trainer = make_trainer(max_epochs=stop or 2)
        trainer.fit(model, data.Digits(batch_size=16))
        if stop:
            trainer.save_checkpoint(tmp_path / "one.ckpt")
            model = Hinton.load_from_checkpoint(tmp_path / "one.ckpt")
            assert model.theta == 1.5
            make_trainer(max_epochs=2).fit(model, data.Digits(batch_size=16), ckpt_path=tmp_path / "one.ckpt")
        runs.append(weights(model))
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


def test_a_method_without_updates_is_told_so(make_trainer):
    class Nothing(LocalLearner):
        def __init__(self):
            super().__init__(**SHAPE)
            self.set_units({"one": [nn.Linear(2, 2)]})

    with pytest.raises(NotImplementedError, match=r"Nothing is no method yet: it needs local_updates\(batch\)"):
        make_trainer().fit(Nothing(), data.Digits())


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_a_unit_may_come_back_several_times_in_a_batch(optimization, make_trainer):
    class Twice(LocalLearner):
        def __init__(self, **kwargs):
            super().__init__(**SHAPE, lr_scheduler="constant", optimizer=torch.optim.SGD, lr=0.1, **kwargs)
            self.layer = nn.Linear(64, 10)
            self.set_units({"layer": [self.layer], "other": [nn.Linear(1, 1)]})
            self.seen = []

        def local_updates(self, batch):
            (x,), y = self.inputs_and_target(batch)
            for _ in range(2):
                loss = self.task.criterion()(self.layer(x.flatten(1)), y)
                self.seen.append(loss.item())
                yield Update((0,), loss, (loss.detach(),))

    model = Twice(optimization=optimization)
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, data.Digits(batch_size=16))
    assert trainer.global_step == 3, "steps of the run are batches"
    first, second = model.seen[0], model.seen[1]
    assert (second < first) if optimization == "manual" else (second == first), "the second sees the step of the first"


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_machinery_is_not_lost_by_overriding_a_hook_without_super(optimization, make_trainer, digits):
    class Careless(SFF):
        calls = 0

        def on_before_optimizer_step(self, optimizer):
            Careless.calls += 1

        def on_train_start(self):
            pass

        def on_train_epoch_end(self):
            pass

        def setup(self, stage):
            pass

        def on_save_checkpoint(self, checkpoint):
            pass

    class Mixin:
        def on_validation_epoch_end(self):
            pass

    class Mixed(Mixin, SFF):
        pass

    ends = []
    for method in (SFF, Careless, Mixed):
        torch.manual_seed(0)
        model = method(small_net(), **SHAPE, clip_norm=0.01, optimization=optimization)
        trainer = make_trainer()
        trainer.fit(model, digits)
        assert "val/acc" in trainer.callback_metrics
        ends.append(weights(model))
    assert Careless.calls > 0
    for end in ends[1:]:
        assert all(torch.equal(value, end[key]) for key, value in ends[0].items())


def test_hooks_of_parameters_run_once(make_trainer):
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    ends = []
    for optimization in ("manual", "automatic"):
        torch.manual_seed(0)
        model = SFF(small_net(), **SHAPE, optimizer=torch.optim.SGD, lr=0.1, lr_scheduler="constant",
                    optimization=optimization)  # fmt: skip
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 0.5)
        make_trainer(max_epochs=1, limit_train_batches=1).fit(model, DataLoader([(x, y)], batch_size=None))
        ends.append(weights(model))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_backprop_trains_by_lightnings_own_loop_and_both_modes_agree(make_trainer, digits):
    assert Backprop(small_net(), **SHAPE).automatic_optimization
    ends = []
    for optimization in ("manual", "automatic"):
        torch.manual_seed(0)
        model = Backprop(small_net(), **SHAPE, optimization=optimization, clip_norm=0.1)
        make_trainer().fit(model, digits)
        ends.append(weights(model))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_accuracy_of_training_is_that_of_the_vote(make_trainer, digits):
    class Watched(SFF):
        def report_scores(self, scores, target):
            self.right = (self.vote(scores).argmax(1) == target).float().mean()
            super().report_scores(scores, target)

    model = Watched(small_net(), **SHAPE)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    assert trainer.callback_metrics["train/acc"] == pytest.approx(model.right.item())


def test_tasks_and_losses_with_arguments_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    fit = ["fit", *quick, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    loss = ["--model.loss", "tests.hinton.Focal"]
    main([*fit, *loss, "--model.loss.gamma", "1", "--model.task", "Classification", "--model.task.ignore_index", "3"])
    path = str(next(tmp_path.rglob("*-acc*.ckpt")))
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (stored["loss"]["init_args"], stored["task"]["init_args"]["ignore_index"]) == ({"gamma": 1.0}, 3)
    main(["test", *quick, "--ckpt_path", path])
    assert "test accuracy" in capsys.readouterr().out
