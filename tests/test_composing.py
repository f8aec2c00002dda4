import shutil
from pathlib import Path

import pytest
import yaml

from tests.trained import CLASSES, QUIET, run, train

CONFIG = """
data:
  class_path: ImageFolder
  init_args: {root: photos, classes: [a, b], batch_size: 7}
model: {class_path: ff_lightning.SFF, init_args: {lr: 0.25}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "other.yaml").write_text("data: CIFAR100\n")
    return tmp_path


def chosen(*args):
    return yaml.safe_load(run("fit", *args, "--print_config"))


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--data", "CIFAR10"], "CIFAR10"),
        (["--data=CIFAR10"], "CIFAR10"),
        (["--config", "other.yaml"], "CIFAR100"),
        (["--config=other.yaml"], "CIFAR100"),
    ],
)
@pytest.mark.parametrize("first", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_another_data_set_keeps_neither_folder_nor_classes(first, more, name, config):
    composed = chosen(*first, *more)
    assert composed["data"]["class_path"].endswith(f".{name}")
    arguments = composed["data"]["init_args"]
    assert (arguments["root"], arguments["classes"], arguments["batch_size"]) == ("data", None, 7)
    assert composed["model"]["init_args"]["lr"] == 0.25
    arguments = chosen(*first, *more, "--data.root", "here")["data"]["init_args"]
    assert arguments["root"] == "here"


def test_the_same_data_set_keeps_both(config):
    arguments = chosen("--config", "mine.yaml", "--data", "ImageFolder")["data"]["init_args"]
    assert (arguments["root"], arguments["classes"]) == ("photos", ["a", "b"])


def test_the_data_of_a_checkpoint_are_found_from_elsewhere(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    root, path = train(tmp_path, "--data.root", "images", "--data.classes", f"['{CLASSES[0]}', 1]", "--data.subset", 40,
                       "--trainer.max_epochs", 1)  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert "test accuracy" in run("test", "--ckpt_path", path, *QUIET)
    arguments = yaml.safe_load(run("test", "--ckpt_path", path, "--data", "CIFAR10", "--print_config"))["data"]
    assert arguments["class_path"].endswith(".CIFAR10")
    assert (arguments["init_args"]["root"], arguments["init_args"]["classes"]) == ("data", None)
    shutil.move(root, tmp_path / "moved")
    with pytest.raises(SystemExit, match="must hold a folder 'train'"):
        run("test", "--ckpt_path", path, *QUIET)
    assert "root='images' of the checkpoint" in caplog.text


def test_a_checkpoint_of_another_method_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("fit", "--model", "Backprop", *QUIET, "--trainer.max_steps", 1)
    refusal = (
        r"last.ckpt' is of Backprop, and the command asks for SFF: give another checkpoint, or leave the model out"
    )
    Path("mine.yaml").write_text("model: {class_path: SFF}")
    for asked in (["--model", "SFF"], ["--config", "mine.yaml"]):
        with pytest.raises(SystemExit, match=refusal):
            run("fit", *asked, *QUIET, "--ckpt_path", "last")


def test_a_run_too_short_to_validate_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_epochs", 2, "--trainer.limit_train_batches", 1]
    with pytest.warns(UserWarning, match="check_val_every_n_epoch=5, and the run has max_epochs=2: there is no valid"):
        run("fit", *QUIET, *few, "--trainer.check_val_every_n_epoch", 5)
