import contextlib
import gzip
import importlib
import inspect
import io
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import wavfile

from ff_lightning import SFF, cli, data
from ff_lightning.cli import main
from tests.test_data import write_cifar

ROOT = Path(__file__).parents[1]
FAST = ("digits_cnn", "digits")
CONFIGS = [
    pytest.param(path.relative_to(ROOT), marks=[] if path.stem in FAST else pytest.mark.slow)
    for path in sorted((ROOT / "configs").glob("*/*.yaml"))
    if path.parent.name != "trainer"
]
QUICK = [
    *("--config", str(ROOT / "configs/trainer/cpu.yaml"), "--config", str(ROOT / "configs/trainer/debug.yaml")),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--data.batch_size", "4"),
]


def run(*args):
    """Run the command; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise SystemExit(out.getvalue()) from None
    return out.getvalue()


class GreyImages:
    """In place of MNIST: two hundred grey images of ten classes."""

    def __init__(self, root, train, download):
        self.targets = list(range(10)) * 20

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return Image.new("L", (28, 28), i), self.targets[i]


@pytest.fixture
def files(tmp_path, monkeypatch, image_folder, served):
    """The images, signals and texts that a config asks for, small and in the place where it looks for them."""
    monkeypatch.chdir(tmp_path)
    reader, _ = write_cifar(*served, fine=False)
    monkeypatch.setattr(data.CIFAR10, "reader", reader)
    for small in (data.MNIST, data.FashionMNIST):
        monkeypatch.setattr(small, "reader", GreyImages)
    (tmp_path / "data").mkdir()
    image_folder(classes=("cat", "dog"), size=(32, 32)).rename(tmp_path / "data" / "images")
    (tmp_path / "data" / "ecg").mkdir()
    for name in ("signals", "ecg/train", "ecg/val", "ecg/test"):
        noise = np.random.default_rng(0).normal(size=(40, 100))
        np.savez(tmp_path / "data" / f"{name}.npz", x=noise, y=np.arange(40) % 2)
    for path in (f"data/fsdd/{split}/{digit}" for split in ("train", "test") for digit in (0, 1)):
        (tmp_path / path).mkdir(parents=True)
        for i in range(20):
            wavfile.write(tmp_path / path / f"{i}.wav", 8000, np.full(500, i, np.int16))
    rows = [f"{('good', 'bad')[i % 2]} film {i},{i % 2}" for i in range(40)]
    (tmp_path / "data" / "texts.csv").write_text("\n".join(["text,label", *rows]))
    for split in ("train", "test"):
        with gzip.open(tmp_path / "data" / f"imdb_{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{('good', 'bad')[i % 2]} film {i}", "label": i % 2}) + "\n"
                            for i in range(40, 80))  # fmt: skip


def checkpoint(folder, name="last.ckpt"):
    (found,) = Path(folder).rglob(name)
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_runs(config, files):
    text = (ROOT / config).read_text()
    assert text.startswith(f"# ff-lightning fit --config {config}")
    method = yaml.safe_load(text)["model"]["class_path"]
    quick = [*QUICK, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2]
    quick += ["--trainer.check_val_every_n_epoch", 1]
    if "imagenette" in str(config):
        side = 128 if "vit" in str(config) else 64  # a transformer takes the one size that it was made for
        quick += ["--data.root", "data/images", "--data.image_size", side]
    if "imdb" in str(config):
        quick += ["--data.length", 8]
    for argument, few in (("subset", 40), ("samples_per_class", 4)):
        if f"{argument}:" in text:
            quick += [f"--data.{argument}", few]
    printed = run("fit", "--config", ROOT / config, *quick)
    figure = "mae" if "diabetes" in str(config) else "loss" if method == "SCFF" else "accuracy"
    assert f"validation {figure}" in printed
    assert ("sum" if method == "SCFF" else "vote") in printed
    path = checkpoint(".")
    stored = torch.load(path, weights_only=True)
    assert stored["global_step"] == 2
    assert stored["hyper_parameters"]["_class_path"].endswith(f".{method}")
    assert f"test {figure}" in run("test", *QUICK, "--ckpt_path", path)


@pytest.mark.parametrize("overlay", sorted((ROOT / "configs/trainer").glob("*.yaml")), ids=lambda path: path.name)
def test_every_overlay_is_understood(overlay):
    printed = run("fit", "--config", ROOT / "configs/sff/digits_cnn.yaml", "--config", overlay, "--print_config")
    assert_within(yaml.safe_load(overlay.read_text()), yaml.safe_load(printed))


def assert_within(part, whole):
    for key, value in part.items():
        if isinstance(value, dict):
            assert_within(value, whole[key])
        else:
            assert whole[key] == value, key


DIGITS = ["fit", *QUICK]
OWN = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, width: int = 4):
        first, second = (nn.Sequential(nn.Conv2d(c, width, 3), nn.ReLU()) for c in (1, width))
        super().__init__(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
"""


WITH_FUNCTIONS = """
import functools
from collections.abc import Callable
import torch
from torch import nn
from torch.nn import functional as F
class Double:
    def __call__(self, x):
        return 2 * x
class Net(nn.Module):
    def __init__(self, width: int = 8, act=F.relu, squash: Callable = torch.tanh, double=Double,
                 norm: Callable[[int], nn.Module] = functools.partial(nn.LayerNorm, eps=1e-6),
                 end: nn.Module = nn.Sigmoid(), make=lambda width: nn.Linear(width, 10)):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, width), norm(width), end)
        self.act, self.squash, self.double, self.last = act, squash, double(), make(width)
    def forward(self, x):
        return self.last(self.double(self.squash(self.act(self.first(x)))))
"""


def test_functions_that_are_defaults_of_a_backbone_stay_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "own.py").write_text(WITH_FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own")  # the class, that is: a checkpoint cannot have its module imported
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(*DIGITS, "--model.backbone", "own.Net")
    assert not [str(warning.message) for warning in said if "serialize" in str(warning.message)]
    first = checkpoint(".")
    assert torch.load(first, weights_only=True)["hyper_parameters"]["backbone"]["init_args"].keys() == {"width", "end"}
    assert "test accuracy" in run("test", *QUICK[:8], "--ckpt_path", first)
    again = ["--config", first.parents[1] / "config.yaml", "--trainer.default_root_dir", "again"]
    run("fit", *again)
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, checkpoint("again")))
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("name", ["torch.sigmoid", "torch.nn.functional.max_pool1d"])  # the latter is <locals>.fn
def test_a_function_that_was_asked_for_is_not_forgotten(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    given = ", 1" if "pool" in name else ""
    (tmp_path / "own.py").write_text(WITH_FUNCTIONS.replace("self.first(x)))", f"self.first(x)){given})"))
    run(*DIGITS, "--model.backbone", "own.Net", "--model.backbone.squash", name)
    with pytest.raises(SystemExit, match=rf"{name}.* name it yourself: --model.backbone own.Net"):
        run("test", *QUICK[:8], "--ckpt_path", checkpoint("."))


def test_a_path_of_a_backbone_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    own = OWN.replace("width: int = 4", "width: int = 4, table: Path_fr | None = None")
    (tmp_path / "own.py").write_text(f"from jsonargparse.typing import Path_fr\n{own}")
    (tmp_path / "table.txt").write_text("1")
    run(*DIGITS, "--model.backbone", "own.Net", "--model.backbone.table", "table.txt")
    stored = torch.load(checkpoint("."), weights_only=True)["hyper_parameters"]["backbone"]
    assert stored["init_args"]["table"] == "table.txt"


def test_a_second_run_in_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(*DIGITS, "--trainer.logger", "false")
    assert (tmp_path / "config.yaml").is_file()


def test_resume_on_the_command_line_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*DIGITS, "--trainer.max_epochs", 3]
    whole = [*arguments, "--trainer.default_root_dir", "whole"]
    run(*whole, "--checkpoint.save_top_k", -1, "--checkpoint.filename", "epoch{epoch}")
    first = checkpoint("whole", "epoch0.ckpt")
    run(*arguments, "--trainer.default_root_dir", "resumed", "--ckpt_path", first)
    one, two = (torch.load(checkpoint(folder), weights_only=True) for folder in ("whole", "resumed"))
    assert one["global_step"] == two["global_step"] == 12
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())


def test_a_checkpoint_brings_its_model_but_does_not_overrule_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*DIGITS, "--model", "SFF", "--model.granularity", "layer", "--model.vote", "last", "--model.lr", "0.01")
    path = checkpoint(".")
    printed = run("test", "--ckpt_path", path, *QUICK[:8])
    assert "block2.3" in printed, "the test ran the layers of the checkpoint"
    run("fit", *QUICK[:8], "--ckpt_path", path, "--model.lr", "0.02", "--trainer.default_root_dir", "again")
    (settings,) = Path("again").rglob("config.yaml")
    model = yaml.safe_load(settings.read_text())["model"]["init_args"]
    assert (model["granularity"], model["vote"], model["lr"]) == ("layer", "last", 0.02)


def test_optimizer_and_head_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        *(*DIGITS, "--model.optimizer", "SGD", "--model.optimizer.momentum", "0.5", "--model.lr", "0.001"),
        *("--model.head", "GoodnessHead", "--model.head.depth", "0", "--model.lr_scheduler", "StepLR"),
        *("--model.lr_scheduler.step_size", "1", "--model.lr_scheduler.gamma", "0.5"),
    )
    stored = torch.load(checkpoint("."), weights_only=True)
    assert len(stored["optimizer_states"]) == 3
    (group,) = stored["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.5, 0, 0.00025)
    assert not any("heads.0.features" in key for key in stored["state_dict"])
    assert stored["hyper_parameters"]["head"]["init_args"]["depth"] == 0


def test_a_head_from_the_command_line_is_told_the_size_of_its_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*DIGITS, "--model.head", "PooledHead", "--model.head.width", "5")
    stored = torch.load(checkpoint("."), weights_only=True)["state_dict"]
    shapes = [stored[f"net.objectives.{k}.head.classes.weight"].shape for k in range(3)]
    assert shapes == [(10, 5 * 4 * 4), (10, 5 * 2 * 2), (10, 5 * 2 * 2)], "the last pooling goes with the classifier"


@pytest.mark.parametrize("name", sorted(set(data.__all__) - {"DataModule", "ImageData"}))
def test_another_data_set_keeps_nothing_of_the_default_one(name):
    cls = getattr(data, name)
    own = {
        parameter.name: parameter.default
        for base in reversed(cls.__mro__)
        if issubclass(base, data.DataModule)
        for parameter in inspect.signature(base).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    required = {key: "given" for key, default in own.items() if default is inspect.Parameter.empty}
    arguments = [f"--data.{key}={value}" for key, value in required.items()]
    chosen = yaml.safe_load(run("fit", "--data", name, *arguments, "--print_config"))["data"]["init_args"]
    assert chosen == {**own, **required}


def test_predict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*DIGITS)
    lines = []
    monkeypatch.setattr(cli, "rank_zero_info", lines.append)
    run("predict", "--ckpt_path", checkpoint("."), "--trainer.limit_predict_batches", "1")
    assert "nothing was written" in lines[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "SFFF"], "SFFF.*did you mean 'SFF'"),
        (["--data", "Digit"], "Digit.*did you mean 'Digits'"),
        (["--model", "SFF", "--model.backbon", "cnn"], "'backbon' is not accepted; did you mean 'backbone'"),
        (["--data.batchsize", "3"], "'batchsize' is not accepted; did you mean 'batch_size'"),
        (["--model.norm", "layr"], "layr"),
    ],
)
def test_wrong_names_are_answered_with_close_ones(args, message):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        run("fit", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.lr", "-1"], "error: lr=-1.0: must be above 0"),
        (["--model.backbone", "resnet81"], "error: backbone='resnet81' is not known.*did you mean 'resnet18'"),
        (["--model.granularity", "[block9]"], "error: granularity='block9'.*did you mean"),
        (["--data", "ImageFolder", "--data.root", "nowhere"], "error: root='nowhere' must hold a folder 'train'"),
    ],
)
def test_a_refused_value_is_answered_in_one_line(args, message):
    with pytest.raises(SystemExit, match=message) as answer:
        run("fit", *args)
    assert len([line for line in str(answer.value).splitlines() if "error" in line.lower()]) == 1


def test_testing_without_a_checkpoint_warns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="untrained network"):
        run("test", *QUICK[:8])


def test_own_classes_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownpackage.py").write_text("from ff_lightning.data import Digits\nclass Numbers(Digits):\n    pass\n")
    run(*DIGITS, "--data", "ownpackage.Numbers")
    stored = torch.load(checkpoint("."), weights_only=True)
    assert stored["datamodule_hyper_parameters"]["_class_path"] == "ownpackage.Numbers"


def test_an_own_backbone_goes_on_and_lends_its_weights(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    options = [*DIGITS, "--model.lr_scheduler", "constant", "--model.backbone", "own.Net"]
    run(*options, "--trainer.max_epochs", 1, "--trainer.default_root_dir", "first")
    first = checkpoint("first")
    run(*options, "--trainer.max_epochs", 2, "--trainer.default_root_dir", "second", "--ckpt_path", first)
    assert torch.load(checkpoint("second"), weights_only=True)["global_step"] == 8
    run(*options, "--trainer.default_root_dir", "third", "--model.weights", first, "--model.lr", "1e-12")
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, checkpoint("third")))
    own = [name for name in before if ".blocks." in name and "weight" in name]
    assert own
    for name in own:
        torch.testing.assert_close(after[name], before[name])
    assert "test accuracy" in run("test", *QUICK[:8], "--ckpt_path", first, "--model.backbone", "own.Net")
    assert "give --data.root" not in caplog.text, "the digits lie in no folder"
    with pytest.raises(SystemExit, match=r"the weights do not fit Net.* in the weights, .* in the network"):
        run(*options, "--model.backbone.width", "6", "--model.weights", first)


def test_resuming_a_longer_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*DIGITS)
    with pytest.raises(SystemExit, match="made for 8 steps, this run has 12: resume with the max_epochs of"):
        run(*DIGITS, "--trainer.max_epochs", "3", "--ckpt_path", checkpoint("."))
    lines = []
    monkeypatch.setattr(cli, "rank_zero_info", lines.append)
    run(*DIGITS, "--ckpt_path", checkpoint("."))
    assert re.fullmatch(
        r"nothing was left to train: the run of \S+last.ckpt is finished; to train on, .* --model.weights .*", lines[0]
    )
    layers = [*DIGITS, "--model", "RecurrentFF", "--model.widths", "[10, 10]", "--trainer.default_root_dir", "other"]
    run(*layers)
    run(*layers, "--ckpt_path", checkpoint("other"))
    assert lines[-1].endswith("to train on, start a new run, since lr_scheduler='cooldown' has ended")


def test_a_truncated_checkpoint_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.ckpt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(SystemExit, match=r"^error: the checkpoint cut.ckpt is not whole.*\n.*\n$"):
        run("test", "--ckpt_path", "cut.ckpt")


def test_mistakes_that_show_up_late_are_answered_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.pt").write_bytes(b"PK" + bytes(100))
    for args, message in (
        (["fit", "--trainer.gradient_clip_val", "1"], "give the model clip_norm=1"),
        (["fit", "--data.samples_per_class", "100000"], "samples_per_class=100000: more than there are"),
        (["fit", "--model.weights", "cut.pt"], "weights='cut.pt' is not whole"),
        (["test", "--ckpt_path", "nothere.ckpt"], "ckpt_path='nothere.ckpt': there is no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*args, "--trainer.fast_dev_run", "1")
        lines = [line for line in str(stop.value).splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in str(stop.value)


def test_a_resumed_run_remembers_the_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = ["--model.lr_scheduler", "constant", "--trainer.limit_val_batches", "1.0"]
    run(*DIGITS, *constant, "--trainer.limit_train_batches", 40, "--trainer.max_epochs", 1, "--model.lr", 0.005)
    best = next(Path("lightning_logs/version_0/checkpoints").glob("epoch000-*.ckpt"))
    last = best.with_name("last.ckpt")
    stored = torch.load(last, weights_only=True)
    for key, value in stored["state_dict"].items():
        if "classes" in key:
            value.zero_()  # what follows is worse
    torch.save(stored, last)
    more = ["--trainer.limit_train_batches", 1, "--trainer.max_epochs", 2]
    printed = run(*DIGITS, *constant, *more, "--ckpt_path", last)
    assert f"best val/acc: {best.resolve()}" in printed
    assert best.is_file()


def test_only_some_blocks_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("fit", *QUICK, "--model.train_blocks", "[0, block2]", "--last.every_n_train_steps", "2")
    assert "validation accuracy" in output
    assert output.count("(held)") == 1
    kept = torch.load(checkpoint(tmp_path), weights_only=True)
    assert kept["hyper_parameters"]["train_blocks"] == [0, "block2"]
    assert [bool(state["state"]) for state in kept["optimizer_states"]].count(True) == 2


def test_a_value_that_contradicts_the_data_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="num_classes=7 of the model, but Digits has 10 classes"):
        run(*DIGITS, "--model.num_classes", "7")


def test_help_names_the_subcommands():
    printed = run("--help")
    assert all(name in printed for name in ("fit", "validate", "test", "predict"))


def test_a_checkpoint_that_names_no_data_is_not_tested_on_others(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SFF(num_classes=10, input_shape=(1, 8, 8)), data.Digits(batch_size=16))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(SystemExit, match=r"own.ckpt' names no data, .*: give --data"):
        run("test", *QUICK, "--ckpt_path", tmp_path / "own.ckpt")
    assert "test accuracy" in run("test", *QUICK, "--ckpt_path", tmp_path / "own.ckpt", "--data", "Digits")
