"""On the command line, what the user can mend is answered in one line, and one on where there is help."""

import importlib
import logging
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ff_lightning import SFF, results
from ff_lightning.benchmark.__main__ import main as benchmark
from ff_lightning.cli import main
from ff_lightning.commands import start
from ff_lightning.commands.ckpt_path import find_checkpoint
from tests.test_cli import DIGITS, QUICK, ROOT, run

SHORT = [*QUICK[:8], "--trainer.fast_dev_run", "1"]


def answer(*args):
    """The answer to a mistake: one line, and at most one more for help; never a traceback."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    printed = str(stop.value)
    assert "Traceback" not in printed
    lines = printed.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert len(lines[lines.index(error) :]) <= 2, "no pages of usage behind it"
    assert len(error) < 600
    return error


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


VALUES = [
    ("--model.granularity layers", "granularity='layers' is not known: give 'layer', .* a list; did you mean 'layer'"),
    ("--model.norm layr", "norm='layr' is not known: give 'layer', .*did you mean 'layer'"),
    ("--model.head poled", "head='poled' .*or the name of a class; did you mean 'pooled'"),
    ("--model.lr x", "lr='x': must be a number or null$"),
    ("--model.reach 1.5", "reach=1.5: must be 1 to 3, the number of blocks, or a float above 0 and at most 1.0"),
    ("--model.input_shape [32,32]", r"input_shape=\(32, 32\): must be \(C, H, W\), whole numbers"),
    ("--model.optimizer SDG", "optimizer='SDG' .*did you mean 'SGD'"),
    ("--model.optimizer SGD --model.optimizer.momentun 1", "'momentun' is not accepted; did you mean 'momentum'"),
    ("--model FF --model.train_blocks [1]", "'train_blocks' is not accepted: it is an option of SFF"),
    ("--model.optimizer nomodule.SGD", "optimizer='nomodule.SGD'.*No module named 'nomodule'"),
    ("--model.lr_scheduler StepLR", "lr_scheduler='StepLR' needs step_size: give --model.lr_scheduler.step_size"),
    ("--model torch.nn.Linear", "model='torch.nn.Linear': must be a subclass of LocalLearner"),
    ("--model.optimizer torch.nn.Linear", "optimizer='torch.nn.Linear': must be a subclass of Optimizer"),
    ("--trainer.precision bf15", "trainer.precision='bf15' .*did you mean 'bf16'"),
    ("--trainer.max_epochz 3", "unrecognized arguments: .*did you mean 'trainer.max_epochs'"),
    ("--trainer.callbacks EarlyStoping", "trainer.callbacks='EarlyStoping'.*did you mean 'EarlyStopping'"),
    ("--optimizer SGD", "--optimizer SGD; did you mean 'model.optimizer'"),
    ("--modell SFF", "--modell SFF; did you mean 'model'"),
    ("--data.batch_size x", "batch_size='x': must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), VALUES, ids=[args for args, _ in VALUES])
def test_a_value_that_is_not_known(args, message):
    assert re.search(message, answer("fit", *args.split()))


FILES = [
    ("trainer: [1,\nmodel: {", "config='c.yaml' is not YAML: line 2"),
    ("trainer:\n\tmax_epochs: 1\n", "config='c.yaml' is not YAML: a tab indents.*line 2, column 1"),
    ("", "config='c.yaml' is empty: it must hold a mapping"),
    ("- a\n- b\n", "config='c.yaml' holds a list"),
    ("fit:\n  trainer: {max_epochs: 1}\n", "config='c.yaml' begins with 'fit'"),
    ("trainer:\n", "config='c.yaml': 'trainer' holds nothing"),
    ("modell: {class_path: SFF}\n", "does not accept option 'modell.class_path'; did you mean 'model'"),
    ("trainer: {max_epoch: 1}\n", "'trainer.max_epoch'; did you mean 'trainer.max_epochs'"),
    ("verbose: true\n", "option 'verbose': it is an option of validate and test"),
    ("model: {class_path: SFFF}\n", "model='SFFF'.*did you mean 'SFF'"),
    ("model: {class_path: SFF, init_args: {granularity: layers}}\n", "granularity='layers'.*did you mean 'layer'"),
    ("model: {class_path: SFF, init_args: {granulrity: layer}}\n", "'granulrity'.*did you mean 'granularity'"),
    ("model: {class_path: SFF, init_args: {lr: .nan}}\n", "lr=nan: must be a finite number above 0, or None"),
    ("model: {class_path: SFF, init_args: {reach: null}}\n", "reach=None: must be 1 to 3, the number of blocks"),
    ("model: {class_path: SFF, init_args: {accumulate: null}}\n", "accumulate=None: must be a whole number"),
    ("model: {class_path: SFF, init_args: {head: {class_path: torch.nn.Linear}}}\n", "head=Linear fails for"),
    (
        "model: {class_path: SFF, init_args: {optimizer: {class_path: torch.optim.SGDD}}}\n",
        "optimizer='torch.optim.SGDD'.*did you mean 'SGD'",
    ),
    ("data: {class_path: Digits, init_args: {batch_size: null}}\n", "batch_size=None: must be a whole number"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_config_that_is_wrong(content, message):
    Path("c.yaml").write_text(content)
    assert re.search(message, answer("fit", "--config", "c.yaml"))


def test_a_name_of_several_classes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("firstpackage", "secondpackage"):
        (tmp_path / f"{module}.py").write_text("from ff_lightning.data import Digits\nclass Twin(Digits):\n    pass\n")
        importlib.import_module(module)
    error = answer("fit", *SHORT, "--data", "Twin")
    assert "data='Twin' is the name of several classes: give firstpackage.Twin or secondpackage.Twin" in error


def test_a_config_that_is_no_text_and_one_that_is_not_there():
    Image.new("RGB", (8, 8)).save("a.png")
    assert "config='a.png' is not a text file" in answer("fit", "--config", "a.png")
    assert "nothere.yaml" in answer("fit", "--config=nothere.yaml")
    assert "did you mean 'fit'" in answer("fitt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--trainer.accelerator gpuu", "invalid accelerator name: `accelerator='gpuu'`. Available names are"),
        ("--trainer.strategy dpp", "invalid strategy name: `strategy='dpp'`"),
        ("--trainer.devices 0", r"`Trainer\(devices='0'\)` value is not a valid input"),
        ("--trainer.limit_train_batches 0", "limit_train_batches=0 of the Trainer: must be above 0"),
        ("--trainer.limit_train_batches 1.5", "invalid value 1.5 for limit_train_batches"),
        ("--trainer.val_check_interval 1000", r"`val_check_interval` \(1000\) must be less than or equal"),
        ("--checkpoint.mode foo", "`mode` can be min, max but got foo"),
        ("--model.optimizer SGD --model.optimizer.momentum -1", "optimizer=SGD: Invalid momentum value: -1.0"),
        ("--model.optimizer LBFGS", "optimizer=LBFGS computes the loss several times"),
        ("--model.weights .", "weights='.' is a folder"),
    ],
)
def test_what_lightning_and_torch_refuse(args, message):
    assert re.search(message, answer("fit", *QUICK[:8], *args.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_overlay_for_a_gpu_where_there_is_none():
    overlay = str(ROOT / "configs/trainer/gpu.yaml")
    assert "torch sees no GPU here, give --trainer.accelerator cpu or auto" in answer("fit", "--config", overlay)


@pytest.mark.parametrize(
    "args",
    [
        "--trainer.default_root_dir file/runs",
        "--last.dirpath file/runs",
        "--trainer.logger CSVLogger --trainer.logger.save_dir file",
    ],
)
def test_a_folder_that_cannot_be_written(args):
    Path("file").write_text("in the way")
    assert re.search(
        "(Not a directory|File exists).*/file|/file.*(Not a directory|File exists)",
        answer("fit", *QUICK[:8], *args.split()),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "the checkpoint text "),
        ("picture.png", "the checkpoint picture.png "),
        ("archive.zip", "ckpt_path='archive.zip' is no checkpoint"),
        ("weights.pt", "ckpt_path='weights.pt' is no checkpoint of Lightning; weights alone are given as --model"),
        ("list.pt", "ckpt_path='list.pt' is no checkpoint of Lightning"),
        ("module.pt", "ckpt_path='module.pt' is no checkpoint, or holds more than tensors and plain values"),
        ("nothere.ckpt", "ckpt_path='nothere.ckpt': there is no such file"),
        (".", "ckpt_path='.': it is a folder"),
    ],
)  # fmt: skip
def test_another_file_as_checkpoint(name, message):
    Path("text").write_text("no checkpoint")
    Image.new("RGB", (8, 8)).save("picture.png")
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("a.txt", "b")
    torch.save({"weight": torch.zeros(2)}, "weights.pt")
    torch.save([1, 2], "list.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    assert message in answer("test", "--ckpt_path", name)


def test_a_checkpoint_of_another_lightning_module():
    torch.save(
        {"state_dict": {"w": torch.zeros(2)}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {"a": 1}},
        "a.ckpt",
    )
    assert "the checkpoint was written by another architecture" in answer(
        "test", "--ckpt_path", "a.ckpt", "--data", "Digits"
    )


def test_errors_of_a_worker_that_reads_images(image_folder):
    root = image_folder(splits=("train", "val"))
    (root / "train/cat/3.png").write_bytes(b"no image")
    args = ["--data.in_memory", "false", "--data.num_workers", "1", "--data.batch_size", "4"]
    given = ["--data", "ImageFolder", "--data.root", str(root), *args, "--trainer.accelerator", "cpu"]
    error = answer("fit", *given, "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1")
    assert "error: cannot read the image" in error
    assert "3.png" in error


class Broken(SFF):
    """A model with a bug."""

    def training_step(self, batch, batch_idx):
        return {}["no such key"]


class Unlucky(SFF):
    """A model with a bug of a kind that is refused elsewhere on purpose."""

    def on_train_start(self):
        int("no number")


class Careless(SFF):
    """A model with a bug that comes up when a missing file was handled."""

    def on_train_start(self):
        try:
            Path("nothere").read_text()
        except OSError:
            {}["no such key"]


@pytest.mark.parametrize(("name", "kind"), [("Broken", KeyError), ("Unlucky", ValueError), ("Careless", KeyError)])
def test_a_bug_keeps_its_traceback(name, kind):
    with pytest.raises(kind):
        run("fit", *SHORT, "--model", f"tests.test_answers.{name}")


# ----------------------------------------------------------------------------------------------------- last and best


def test_last_and_best_are_those_of_the_newest_run():
    constant = ["--model.lr_scheduler", "constant", "--model.granularity", "layer"]
    run(*DIGITS, *constant, "--trainer.max_epochs", 1)
    run(*DIGITS, *constant, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    first, second = (Path(f"lightning_logs/version_{number}/checkpoints") for number in (0, 1))
    stored = torch.load(second / "last.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == (1, 8), "it went on"
    assert find_checkpoint("last", None, None) == str(second / "last.ckpt")
    best = Path(find_checkpoint("best", None, None))
    assert best.resolve() in [path.resolve() for folder in (first, second) for path in folder.glob("epoch*.ckpt")]
    assert "block2.3" in run("test", *QUICK[:8], "--ckpt_path", "best")
    os.utime(first / "last.ckpt", (2e9, 2e9))  # as if written later
    assert find_checkpoint("last", None, None) == str(first / "last.ckpt")
    assert find_checkpoint("last", None, str(second)) == str(second / "last.ckpt")
    Path("lightning_logs").rename("lightning_logs_elsewhere")
    Path("moved").mkdir()
    Path("lightning_logs_elsewhere").rename("moved/lightning_logs")
    moved = Path(find_checkpoint("best", "moved", None))
    assert moved.is_file()
    assert moved.is_relative_to("moved/lightning_logs/version_0")


def test_a_run_without_a_validation_has_no_best_checkpoint():
    run(*DIGITS, "--trainer.max_steps", 1)
    assert "has kept no best checkpoint" in answer("test", "--ckpt_path", "best")


def test_a_monitor_that_is_not_logged():
    stop = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/auc"]
    assert "metric `val/auc` which is not available" in answer(*DIGITS, *stop, "--trainer.max_epochs", 1)


def test_there_is_no_last_checkpoint():
    for which in ("last", "best"):
        assert f"ckpt_path='{which}': there is no checkpoint lightning_logs" in answer("fit", "--ckpt_path", which)
    elsewhere = answer("test", "--ckpt_path", "last", "--trainer.default_root_dir", "runs")
    assert "there is no checkpoint runs/lightning_logs/version_*/checkpoints/last.ckpt" in elsewhere
    assert "ckpt_path='last': there is no checkpoint mine/last.ckpt" in answer(
        "fit", "--ckpt_path", "last", "--last.dirpath", "mine"
    )


# ------------------------------------------------------------------------------------------------ the folder of a user


def test_a_tilde_is_the_folder_of_the_user_everywhere(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    settings = {"trainer": {"default_root_dir": "~/runs"}, "last": {"dirpath": "~/last"}}
    (home / "c.yaml").write_text(yaml.safe_dump(settings))
    run(*DIGITS, "--config=~/c.yaml", "--checkpoint.dirpath=~/best")
    assert (home / "last/last.ckpt").is_file()
    assert list(home.glob("best/*.ckpt"))
    assert (home / "runs/lightning_logs/version_0/config.yaml").is_file()
    assert "test accuracy" in run("test", *QUICK[:8], "--ckpt_path=~/last/last.ckpt")
    weights = "--model.weights=~/last/last.ckpt"
    assert "the weights do not fit ResNet" in answer("fit", *SHORT, "--model.backbone", "resnet18", weights)
    run("sheet", "--out=~/sheet.png")
    assert (home / "sheet.png").is_file()
    with pytest.raises(SystemExit, match=f"there are no runs in {home}/none"):
        results.main(["--runs=~/none"])
    with pytest.raises(SystemExit, match="2"):
        benchmark(["--json=~/nothere/a.json"])
    assert not list(tmp_path.glob("~*"))


# ------------------------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--data Digts", "data='Digts'.*did you mean 'Digits'"),
        ("--outt x", "--outt x; did you mean 'out'"),
        ("--out nowhere/x.png", "out='nowhere/x.png': there is no folder 'nowhere'"),
        ("--out x.foo", "out='x.foo': must end as a picture does"),
        ("--rows 0", "rows: Not of type PositiveInt: 0"),
        ("--data.image_size x", "image_size='x': must be a whole number"),
    ],
)
def test_mistakes_in_sheet(args, message):
    assert re.search(message, answer("sheet", *args.split()))


@pytest.mark.parametrize("command", [results.main, benchmark])
@pytest.mark.parametrize("args", [["--stage", "tset"], ["--what", "trian"], ["--stem", "smal"], ["--seeds", "x"]])
def test_mistakes_in_the_other_commands(command, args, capsys):
    with pytest.raises(SystemExit):
        command(args)
    assert len(capsys.readouterr().err.splitlines()) <= 2


# -------------------------------------------------------------------------------------------------------- the process


def state():
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return (
        list(sys.path),
        list(warnings.filters),
        warnings.formatwarning,
        {
            name: (list(logger.filters), list(logger.handlers), logger.level)
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger)
        },
    )


def test_warnings_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    start._import("ff_lightning.cli")
    assert warnings.formatwarning(UserWarning("two\n  lines"), UserWarning, "x.py", 3) == "warning: two lines\n"
    lightning = "Please add the following callbacks: ['OnlineProbe']."
    assert start._in_one_line(lightning) == f"warning: {lightning} (--trainer.callbacks+=NAME)\n"


def test_the_command_leaves_the_process_as_it_was():
    run("fit", *SHORT)  # what is imported by it stays
    before = state()
    for _ in range(2):
        run("fit", *SHORT)
        answer("fit", "--model.norm", "layr")
    answer("fit", "--model.lr", "-1")
    with pytest.raises(KeyError):
        main(["fit", *map(str, SHORT), "--model", "tests.test_answers.Broken"])
    assert state() == before
