"""The table of results is what the runs logged."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from PIL import Image
from scipy import stats

from ff_lightning import results
from ff_lightning.cli import main as ff_lightning
from ff_lightning.commands import runs as runs_module
from ff_lightning.commands.runs import RECORD, SETTINGS, Run, read_run, run
from ff_lightning.commands.tabulating import table
from ff_lightning.util.files import claimed

ROOT = Path(__file__).parent.parent
CONFIGS = ["--configs", str(ROOT / "configs")]
QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.accelerator", "cpu"]


def made(recipe, method, seed, shown=("acc",), **figures):
    return Run(recipe, method, seed, {f"test/{name}": value for name, value in figures.items()}, [*shown], 3,
               "python -m x", "2026-11-29", "torch 2")  # fmt: skip


def write(run, runs):
    folder = runs / run.recipe / f"{run.method}-{run.seed}"
    folder.mkdir(parents=True)
    record = {name: value for name, value in run._asdict().items() if name not in ("recipe", "method", "seed")}
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.slow
def test_recipes_are_run_once_and_tabulated(tmp_path, capsys):
    runs = tmp_path / "runs"
    arguments = ["digits_cnn", "--seeds", "0", "--runs", str(runs), *CONFIGS, *QUICK]
    results.main([*arguments, "--seeds", "0", "1", "--methods", "sff"])
    results.main(arguments)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in runs.glob("*/*")) == ["backprop-0", "sff-0", "sff-1"]
    seen = []
    for seed in (0, 1):
        (last,) = (runs / "digits_cnn" / f"sff-{seed}").rglob("last.ckpt")
        ff_lightning(["test", "--ckpt_path", str(last), "--trainer.default_root_dir", str(tmp_path / str(seed))])
        figures = capsys.readouterr().out
        recorded = read_run(runs / "digits_cnn" / f"sff-{seed}")
        assert recorded.epochs == 1
        assert f"{recorded.figures['test/acc']:.2%}".removesuffix("%") in figures
        seen.append(100 * recorded.figures["test/acc"])
    assert f"| `digits_cnn` | acc, % | 0, 1 | {mean(seen):.2f} ± {stdev(seen):.2f} |" in printed
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    results.main([*arguments, "--plot", str(tmp_path / "blocks.png")])
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written, "no run is repeated"
    assert "was there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"(?s)other settings.*backprop-0.*\+# --stage test .* --model.lr 0.1"):
        results.main([*arguments, "--model.lr", "0.1"])
    assert (31, 119, 180) in Image.open(tmp_path / "blocks.png").convert("RGB").getdata(), "a line of the first method"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_cut_off_goes_on_and_ends_as_one_that_was_not(tmp_path, capsys, how):
    of_run = ["digits_cnn", "--methods", "sff", "--seeds", "0", "--stage", "val", *CONFIGS]
    of_run += ["--trainer.max_epochs", "6", "--trainer.accelerator", "cpu"]
    command = [sys.executable, "-m", "ff_lightning.results", *of_run, "--runs", str(tmp_path / "cut")]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        while not (there := [*tmp_path.rglob("last.ckpt")]) and process.poll() is None:
            time.sleep(0.05)
        assert there, process.communicate()
        process.terminate() if how == signal.SIGTERM else os.killpg(process.pid, how)
    assert (tmp_path / "cut/digits_cnn/sff-0.part").is_dir()
    _wait_until_free(tmp_path / "cut/digits_cnn/sff-0.lock")
    results.main([*of_run, "--runs", str(tmp_path / "cut")])
    assert len([*(tmp_path / "cut").rglob("last.ckpt")]) == 2, "in two pieces"
    results.main([*of_run, "--runs", str(tmp_path / "whole")])
    cut, whole = (read_run(tmp_path / kind / "digits_cnn/sff-0") for kind in ("cut", "whole"))
    assert cut.figures == whole.figures
    assert cut.epochs == 6


def _wait_until_free(lock):
    """The process that trained holds the claim until the system has cleared its memory, later than its parent ends."""
    for _ in range(600):
        with claimed(lock) as mine:
            if mine:
                return
        time.sleep(0.1)
    pytest.fail("somebody trains on")


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    config, folder = ROOT / "configs/sff/digits_cnn.yaml", tmp_path / "digits_cnn/sff-0"
    folder.parent.mkdir()
    lock = folder.with_name("sff-0.lock")
    with claimed(lock) as descriptors:
        assert run(config, folder, 0, [], "val") == "is being made elsewhere"
        child = subprocess.Popen(["sleep", "60"], pass_fds=descriptors)
    assert run(config, folder, 0, [], "val") == "is being made elsewhere", "the process that trains holds the claim"
    child.kill()
    child.wait()
    _wait_until_free(lock)


def test_differences_are_paired_by_seed():
    ours = [56.87, 56.66, 54.49, 56.83, 57.40, 56.72]
    theirs = [55.78, 56.19, 55.20, 54.95, 55.38, 56.79]
    runs = [made("few", "backprop", 101 + k, acc=value / 100) for k, value in enumerate(theirs)]
    runs += [made("few", "sff", 101 + k, acc=value / 100) for k, value in enumerate(ours)]
    head, _, row = table(runs, "test").splitlines()
    assert head == "| recipe | figure | seeds | sff | backprop | sff - backprop |"
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    difference = f"+0.78 ± 1.08 (95 %: {low:+.2f} to {high:+.2f})"
    assert row == f"| `few` | acc, % | 101 to 106 | 56.50 ± 1.02 | 55.72 ± 0.69 | {difference} |"
    (*_, row) = table([*runs, made("few", "sff", 7, acc=0.99)], "test").splitlines()
    assert row.startswith("| `few` | acc, % | 7, 101 to 106 |")
    assert row.endswith(f"| 55.72 ± 0.69 (seeds 101 to 106) | {difference} (seeds 101 to 106) |")


def test_any_methods_have_columns_and_the_last_one_asked_for_is_the_baseline():
    runs = [made("r", "ff", 0, acc=0.5), made("r", "ff", 1, acc=0.7), made("r", "scff", 0, acc=0.75)]
    head, _, row = table(runs, "test").splitlines()
    assert head.endswith("| ff | scff | ff - scff |")
    assert row == "| `r` | acc, % | 0, 1 | 60.00 ± 14.14 | 75.00 (seed 0) | -25.00 (seed 0) |"
    head, _, row = table(runs, "test", ["scff", "ff"]).splitlines()
    assert head.endswith("| scff | ff | scff - ff |")
    three = [*runs, made("r", "backprop", 0, acc=0.8), made("other", "backprop", 0, acc=0.1)]
    head, _, row, other = table(three, "test").splitlines()
    assert head.endswith("| ff | scff | backprop | ff - backprop | scff - backprop |")
    assert row.endswith("| 80.00 (seed 0) | -30.00 (seed 0) | -5.00 (seed 0) |")
    assert other == "| `other` | acc, % | 0 | - | - | 10.00 | - | - |"


def test_published_figures_stand_beside_ours():
    run = made("mnist", "ff", 0, ("acc", "top5"), acc=0.985, top5=1.0)
    runs = [run._replace(published="98.64 (arXiv 2212.13345)"), made("other", "ff", 0, acc=0.5)]
    head, _, first, second, other = table(runs, "test").splitlines()
    assert head == "| recipe | figure | seeds | ff | published |"
    assert first == "| `mnist` | acc, % | 0 | 98.50 | ff: 98.64 (arXiv 2212.13345) |"
    assert second == "| `mnist` | top5, % | 0 | 100.00 | - |"
    assert other == "| `other` | acc, % | 0 | 50.00 | - |"


def test_figures_are_those_of_the_task_or_those_asked_for(tmp_path, capsys):
    write(made("diabetes", "sff", 0, ("mae", "r2"), mae=0.6, r2=0.54, loss=0.3, block00_mae=0.7), tmp_path)
    write(made("digits", "ff", 0, acc=0.97, readout_acc=0.98), tmp_path)
    results.main(["--runs", str(tmp_path), "--csv", str(tmp_path / "all.csv")])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("| seeds | ff | sff |"), "no recipe has both"
    assert rows == [
        "| `diabetes` | mae | 0 | - | 0.6000 |",
        "| `diabetes` | r2 | 0 | - | 0.5400 |",
        "| `digits` | acc, % | 0 | 97.00 | - |",
    ]
    results.main(["--runs", str(tmp_path), "--figures", "readout_acc", "block00_mae"])
    printed = capsys.readouterr().out
    assert "| `digits` | readout_acc, % | 0 | 98.00 |" in printed
    assert "block00_mae" in printed
    assert "| r2 |" not in printed
    rows = [*csv.DictReader((tmp_path / "all.csv").open())]
    assert {(row["recipe"], row["method"], row["figure"]): float(row["value"]) for row in rows} == {
        ("diabetes", "sff", "test/mae"): 0.6,
        ("diabetes", "sff", "test/r2"): 0.54,
        ("diabetes", "sff", "test/loss"): 0.3,
        ("diabetes", "sff", "test/block00_mae"): 0.7,
        ("digits", "ff", "test/acc"): 0.97,
        ("digits", "ff", "test/readout_acc"): 0.98,
    }
    assert {(row["seed"], row["epochs"], row["command"], row["date"], row["versions"]) for row in rows} == {
        ("0", "3", "python -m x", "2026-11-29", "torch 2")
    }


METHODS = ("sff", "backprop")
RECIPES = {path.name for path in (ROOT / "configs/sff").iterdir()} & {
    path.name for path in (ROOT / "configs/backprop").iterdir()
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_configs_of_a_recipe_differ_only_in_the_model(name):
    sff, backprop = (ROOT / "configs" / method / name for method in METHODS)
    sff, backprop = (yaml.safe_load(path.read_text()) for path in (sff, backprop))
    for settings in (sff, backprop):
        model = settings.pop("model")["init_args"]
        settings["backbone"] = model["backbone"], model.get("stem")
    assert sff == backprop


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["digits_cnn", "digit_cnn"], r"recipe='digit_cnn' is not known.*did you mean 'digits_cnn'"),
        (["gpu"], r"recipe='gpu' is not known"),  # settings of a machine are no method
        (["digits_cnn_layer", "--methods", "sff", "backprop"], r"no config of 'backprop' in .*: give --methods sff"),
        (["digits_cnn", "--methods", "sf"], r"no config of 'sf' in .*: give --methods backprop sff"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_run(tmp_path, given, says):
    with pytest.raises(SystemExit, match=says):
        results.main([*given, *CONFIGS, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--trainer.max_epochs", "1"], ["--stage", "val"]])
@pytest.mark.parametrize("there", ["sff-0", "backprop-0", "sff-0.part", "sff_deep-0"])
def test_a_table_mixes_no_settings(tmp_path, there, more):
    folder = tmp_path / "digits_cnn" / there
    folder.mkdir(parents=True)
    config = (ROOT / "configs" / there.partition("-")[0].removesuffix("_deep") / "digits_cnn.yaml").read_text()
    (folder / SETTINGS).write_text(f"{config}\n# --stage test \n")
    (folder / "last.ckpt").touch()
    arguments = ["digits_cnn", "--seeds", "1", "--methods", "sff", *CONFIGS]
    with pytest.raises(SystemExit, match=rf"(?s)other settings.*{there}.*--stage"):
        results.main([*arguments, "--runs", str(tmp_path), *more])


def test_settings_may_be_mended_until_there_is_a_checkpoint(tmp_path, monkeypatch):
    """As after Ctrl-C or SIGKILL in the first epoch."""
    monkeypatch.setattr(runs_module, "_make", lambda part, *_: pytest.fail("begins"))
    part = tmp_path / "digits_cnn/sff-0.part"
    part.mkdir(parents=True)
    (part / SETTINGS).write_text("lr: 0.1\n# --stage test \n")
    arguments = ["digits_cnn", "--seeds", "1", "--methods", "sff", *CONFIGS, "--runs", str(tmp_path)]
    with claimed(part.with_suffix(".lock")), pytest.raises(SystemExit, match="other settings"):
        results.main(arguments)
    with pytest.raises(pytest.fail.Exception, match="begins"):
        results.main(arguments)


@pytest.mark.parametrize("option", [["--seed_everything", "5"], ["--data.seed=5"]])
def test_one_seed_for_all_runs_is_refused(tmp_path, option):
    with pytest.raises(SystemExit, match=rf"{option[0].split('=')[0]}: each run has the seed of its own, give --seeds"):
        results.main(["digits_cnn", *CONFIGS, "--runs", str(tmp_path), *option])


def test_the_table_passes_over_what_is_no_run_and_names_what_cannot_be_read(tmp_path, capsys):
    for method in ("sff", "ff"):
        write(made("digits_cnn", method, 0, acc=0.9), tmp_path)
    record = tmp_path / "digits_cnn/sff-0" / RECORD
    shutil.copytree(record.parent, record.parent.with_name("sff-old"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "of_a_later_version": 1}))
    results.main(["--runs", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == "| `digits_cnn` | acc, % | 0 | 90.00 | 90.00 | +0.00 |"
    for content in ("{", "{}", "[]"):
        record.write_text(content)
        with pytest.raises(SystemExit, match=r"sff-0.run.json cannot be read: .*; remove the folder"):
            results.main(["--runs", str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--figures", "ac"], "figures='ac' is not known: .*did you mean 'acc'"),
        (["--methods", "ff"], "there are no runs of ff in"),
    ],
)
def test_what_no_run_has_is_named(tmp_path, given, says):
    write(made("digits_cnn", "sff", 0, acc=0.9), tmp_path)
    with pytest.raises(SystemExit, match=says):
        results.main(["--runs", str(tmp_path), *given])


def test_a_comment_is_no_setting(tmp_path):
    (tmp_path / "configs/sff").mkdir(parents=True)
    write(made("digits_cnn", "sff", 0, acc=0.9), tmp_path / "runs")
    config = (ROOT / "configs/sff/digits_cnn.yaml").read_text()
    (tmp_path / "configs/sff/digits_cnn.yaml").write_text(f"# another\n\n{config}")
    (tmp_path / "runs/digits_cnn/sff-0" / SETTINGS).write_text(f"{config}\n# --stage test \n")
    places = ["--configs", str(tmp_path / "configs"), "--runs", str(tmp_path / "runs")]
    results.main(["digits_cnn", "--seeds", "0", *places])


def test_no_runs_are_no_table(tmp_path):
    with pytest.raises(SystemExit, match="no runs in"):
        results.main(["--runs", str(tmp_path / "nothing"), "--plot", str(tmp_path / "blocks.png")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plot", "{}/x.foo"], "x.foo: must end in .png, .svg or .pdf"),
        (["--plot", "{}/no/x.png"], "x.png: there is no folder"),
        (["--csv", "{}"], "is a folder, give a file"),
        (["--runs", "{}/a_file"], "a_file: is a file, give a folder"),
        (["--stages=val"], "--stages: is handed to ff-lightning fit, and there is no recipe to fit"),
        (["digits_cnn", "--trainer.logger", "false"], "--trainer.logger: the table is made of what the default logger"),
        (["digits_cnn", "--trainer.logger.save_dir=x"], "--trainer.logger.save_dir: the table is made of"),
        (["digits_cnn", "--data.seed=3"], "--data.seed: each run has the seed of its own"),
    ],
)
def test_what_could_not_be_carried_out_is_refused_before_a_run(arguments, says, tmp_path):
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit, match=re.escape(says)):
        results.main([*CONFIGS, "--runs", str(tmp_path / "runs"), *(a.format(tmp_path) for a in arguments)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_ended_early_is_only_tested_again(tmp_path, capsys):
    early = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc"]
    early += ["--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1"]
    arguments = ["digits_cnn", "--methods", "sff", "--seeds", "0", "--runs", str(tmp_path), *CONFIGS, *QUICK, *early]
    results.main([*arguments, "--trainer.max_epochs", "9"])
    folder = tmp_path / "digits_cnn" / "sff-0"
    whole = read_run(folder)
    assert whole.epochs < 9
    part = folder.with_suffix(".part")
    folder.rename(part)  # as a kill during the test leaves it
    (part / RECORD).unlink()
    shutil.rmtree(part / "test")
    results.main([*arguments, "--trainer.max_epochs", "9"])
    again = read_run(folder)
    assert (again.epochs, again.figures) == (whole.epochs, whole.figures)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_where_it_can_be_read_and_may_be_run_otherwise(tmp_path):
    arguments = ["cifar10_1000_cnn", "--runs", str(tmp_path), "--seeds", "0", "--methods", "sff", *CONFIGS]
    for number in (1, 2):
        with pytest.raises(SystemExit, match=r"(?s)failed:.*must hold a folder 'train'.*log.txt"):
            results.main([*arguments, "--data", "ImageFolder", "--data.root", str(tmp_path / f"images{number}")])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sff").glob("*_layer.yaml")), ids=lambda path: path.stem)
def test_a_layer_wise_config_differs_only_in_the_granularity(path):
    layer, block = (yaml.safe_load(of.read_text()) for of in (path, path.with_stem(path.stem.removesuffix("_layer"))))
    assert layer["model"]["init_args"].pop("granularity") == "layer"
    assert block["model"]["init_args"].pop("granularity", "block") == "block"
    assert layer == block
