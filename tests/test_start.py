import logging
import subprocess
import sys

import pytest
import torch
import yaml

from ff_lightning import SFF, LocalLearner, LocalNet, __version__
from ff_lightning.callbacks.table import kept_per_image
from ff_lightning.commands.answers import subclasses
from ff_lightning.commands.start import EPOCHS
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import small_net
from tests.trained import run

SMALL = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--data.subset",
    "100",
    "--data.batch_size",
    "90",
]


def test_the_command_alone_shows_examples():
    printed = run()
    assert printed.count("  ff-lightning ") == 3


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "init", "export", "sheet"])
def test_help_fits_on_a_screen(command):
    printed = run(command, "--help")
    assert f"ff-lightning {command}" in printed
    assert len(printed.splitlines()) < 60
    assert ("--trainer.max_epochs" in printed) == (command == "fit")
    assert "ImageData" not in printed


def test_all_options_are_behind_a_flag():
    assert "--trainer.gradient_clip_val" in run("fit", "--help_all")


def test_help_of_a_class_names_all_its_arguments():
    printed = run("fit", "--model.help", "SFF")
    assert all(f"--model.{name} " in printed for name in ("backbone", "reach", "train_blocks", "lr", "clip_norm"))
    assert "torch.nn" not in printed
    assert "--data.image_size None" in run("fit", "--data.help=CIFAR10")
    assert "--data.image_size None" in run("sheet", "--data.help", "CIFAR10")
    printed = run("fit", "--model.optimizer.help", "AdamW")
    assert "--model.optimizer.weight_decay 0.01" in printed
    assert "params" not in printed
    with pytest.raises(SystemExit, match=r"model\.help='SFFF' is not known; did you mean 'SFF'"):
        run("fit", "--model.help", "SFFF")


def test_a_class_made_of_another_by_its_name_does_not_take_its_place():
    namesake = type("SFF", (SFF,), {})  # as torch.export makes one
    assert subclasses(LocalLearner)["SFF"] is SFF
    assert namesake in SFF.__subclasses__()


def test_a_name_has_one_meaning_after_an_export():
    sff = SFF(num_classes=10, input_shape=(1, 8, 8)).eval()
    torch.export.export(sff, (torch.zeros(2, 1, 8, 8),), strict=False)
    printed = run("fit", "--model", "SFF", "--data", "Digits", "--print_config")
    assert yaml.safe_load(printed)["model"]["class_path"] == "ff_lightning.SFF"


def test_a_template_runs_and_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("init", "mine.yaml")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["trainer"]["max_epochs"] == EPOCHS
    printed = run("fit", "--config", "mine.yaml", *SMALL, "--trainer.max_epochs", 1)
    assert "validation accuracy" in printed
    with pytest.raises(SystemExit, match=r"mine\.yaml is there already"):
        run("init", "mine.yaml")


def test_a_run_without_a_number_of_epochs_is_short(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    of_lightning = logging.getLogger("lightning.pytorch")  # hands nothing on to the root logger in Lightning 2.6.0
    of_lightning.addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO"):
            run("fit", *SMALL)
    finally:
        of_lightning.removeHandler(caplog.handler)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == EPOCHS - 1
    assert f"training for {EPOCHS} epochs" in caplog.text
    run("fit", *SMALL, "--trainer.max_steps", EPOCHS + 3)
    last = max(tmp_path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    assert torch.load(last, weights_only=True)["global_step"] == EPOCHS + 3, "one step in an epoch, and more epochs"


def test_short_answers_do_not_wait_for_lightning(tmp_path):
    code = """
import contextlib, sys
from ff_lightning.__main__ import main
for args in ([], ["--help"], ["--version"], ["init"], ["test", "--help"], ["exits", "--help"], ["predict"], ["tets"]):
    with contextlib.suppress(SystemExit):
        main(args)
print("slow" if "lightning" in sys.modules else "quick")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("quick\n"), done
    assert (tmp_path / "config.yaml").is_file()
    assert f"ff-lightning {__version__}\n" in done.stdout
    assert "error: the following arguments are required: --ckpt_path, --data.root" in done.stderr
    assert "error: 'tets' is no command" in done.stderr


def test_a_file_of_the_working_folder_does_not_stand_for_a_package_that_is_not_installed(tmp_path):
    for name in ("pytz", "snappy", "lz4"):  # libraries ask for them while they are imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run from the working folder')")
    code = "from ff_lightning.commands.start import main; main(['fit', '--print_config'])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (found.returncode, "working folder" in found.stderr) == (0, False), found.stderr


def test_a_reader_may_leave(tmp_path):
    code = "from ff_lightning.commands.start import main; main(['--help'])"
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    found = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not found.stderr


def test_the_short_form_of_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "data: {class_path: Digits, init_args: {classes: ['3', '4'], root: elsewhere}}"
    (tmp_path / "one.yaml").write_text(text)
    printed = [
        run("fit", option, "one.yaml", "--data", "ImageFolder", "--print_config") for option in ("--config", "-c")
    ]
    assert printed[0] == printed[1]
    assert "elsewhere" not in printed[0]


def test_a_bar_that_is_asked_for_is_shown_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu"]
    assert "Epoch 0" in run("fit", *one, "--trainer.callbacks+=RichProgressBar")


def test_a_command_that_is_not_known():
    with pytest.raises(SystemExit, match=r"'tets' is no command: known are fit, .*exits.*; did you mean 'test'"):
        run("tets")
    with pytest.raises(SystemExit, match="Try 'ff-lightning test --help'"):
        run("test", "--trainer.max_epochz", 3)


@pytest.mark.parametrize("reach", [1, 2])
def test_kept_bytes_are_those_of_training(reach):
    net = LocalNet(small_net(), 10, input_shape=(1, 8, 8), reach=reach)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    here, backprop = kept_per_image(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with saved_for_backward(net.parameters()) as saved:
        for _ in net.windows.placements:
            for update in net.updates(x, y):
                update.loss.backward()
    assert saved.peak // 64 == pytest.approx(here, rel=0.05), "but for the loss"
    model = small_net()[:4]
    with saved_for_backward(model.parameters()) as saved:
        model(x)
    assert saved.peak // 64 == pytest.approx(backprop, rel=0.02), "but for what does not grow with the batch"
