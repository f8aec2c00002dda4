"""What every method of the package must do: found in `modules.__all__`, so that a new one cannot be left out."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

import ff_lightning
from ff_lightning import data, inference
from tests.methods import CASES, METHODS, again, make
from tests.test_modules import assert_same, weights
from tests.trained import run

ROOT = Path(__file__).parents[1]
QUIET = ["--config", ROOT / "configs/trainer/cpu.yaml", "--trainer.enable_progress_bar", "false"]
EACH = pytest.mark.parametrize("name", METHODS)
EACH_MODE = pytest.mark.parametrize(
    ("name", "optimization"), [(name, mode) for name in METHODS for mode in CASES[name].modes]
)


class SaveAt(Callback):
    """Writes a checkpoint after so many batches."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


def test_no_method_is_left_out():
    assert sorted(CASES) == METHODS
    assert all(hasattr(ff_lightning, name) for name in METHODS)


class TestEveryMethod:
    @EACH_MODE
    def test_fit_validate_test_predict_and_reload(self, name, optimization, make_trainer, digits, tmp_path):
        model, trainer = make(name, optimization=optimization), make_trainer()
        before = weights(model)
        trainer.fit(model, digits)
        assert trainer.global_step == 6
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
        units = [model.unit_key(k) for k in range(len(model.unit_names))]
        answers = CASES[name].answers
        for stage, of_stage in (("val", trainer.validate), ("test", trainer.test)):
            logged = of_stage(model, digits, verbose=False)[0]
            figures = {f"{stage}/{unit}_acc" for unit in units} | {f"{stage}/acc"} if answers else set()
            assert figures | {f"{stage}/loss"} <= set(logged)
        predicted = torch.cat(trainer.predict(model, digits))
        assert predicted.shape == (32, 10 if answers else predicted.shape[1])
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        x, reloaded = torch.randn(4, 1, 8, 8), again(name, tmp_path / "model.ckpt").eval()
        one, two = (each if answers else each.representation for each in (model.eval(), reloaded))
        assert torch.equal(one(x), two(x))

    @EACH_MODE
    def test_a_run_that_was_cut_off_in_mid_epoch_ends_in_the_weights_of_the_whole_one(
        self, name, optimization, make_trainer, tmp_path
    ):
        ends = []
        for path in (None, tmp_path / "four.ckpt"):
            model = make(name, optimization=optimization)
            torch.manual_seed(len(ends))  # but for the checkpoint the second run would draw others
            trainer = make_trainer(callbacks=[SaveAt(4, tmp_path / "four.ckpt")] if path is None else [])
            trainer.fit(model, data.Digits(batch_size=16), ckpt_path=path)
            assert trainer.global_step == 6
            ends.append(weights(model))
        assert_same(*ends)

    @EACH
    def test_the_same_seed_and_the_other_mode_give_the_same_weights(self, name, make_trainer):
        ends = []
        for optimization in ("manual", *CASES[name].modes):
            model = make(name, optimization=optimization)
            make_trainer(deterministic=True).fit(model, data.Digits(batch_size=16))
            ends.append(weights(model))
        for end in ends[1:]:
            assert_same(ends[0], end)

    @EACH
    def test_one_quick_batch_on_the_command_line(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = ROOT / f"configs/{CASES[name].config}.yaml"
        printed = run("fit", "--config", config, *QUIET, "--trainer.fast_dev_run", "true")
        assert ("each with a local loss" in " ".join(printed.split())) == (name != "Backprop")
        assert not list(tmp_path.rglob("*.ckpt")), "a trial leaves nothing behind"

    @EACH
    @pytest.mark.slow
    def test_it_learns_on_the_command_line_and_its_export_answers_alike(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        case = CASES[name]
        if not case.answers:
            pytest.skip(f"{name} gives features alone")
        epochs = ["--trainer.max_epochs", case.epochs] if case.epochs else []
        run("fit", "--config", ROOT / f"configs/{case.config}.yaml", *QUIET, *epochs)
        (last,) = tmp_path.rglob("last.ckpt")
        lines = [line.split() for line in run("test", "--ckpt_path", last, *QUIET).splitlines() if "vote" in line]
        assert float(lines[-1][-2]) > case.floor
        predictor, images = ff_lightning.load(last), torch.rand(5, 1, 8, 8)
        assert inference.export(predictor, tmp_path / "net.pt2", "torch", images) < 1e-5
