"""The table of results is what the runs logged."""

from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from PIL import Image

from ff_lightning import results
from ff_lightning.cli import main as ff_lightning

ROOT = Path(__file__).parent.parent
QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.accelerator", "cpu"]


@pytest.mark.slow
def test_recipes_are_run_once_and_tabulated(tmp_path, capsys):
    runs = tmp_path / "runs"
    arguments = ["digits_cnn", "--seeds", "0", "--runs", str(runs), "--configs", str(ROOT / "configs"), *QUICK]
    results.main([*arguments, "--seeds", "0", "1", "--methods", "sff"])
    results.main(arguments)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in runs.glob("*/*")) == ["backprop-0", "sff-0", "sff-1"]
    seen = []
    for seed in (0, 1):
        (last,) = (runs / "digits_cnn" / f"sff-{seed}").rglob("last.ckpt")
        ff_lightning(["test", "--ckpt_path", str(last), "--trainer.default_root_dir", str(tmp_path / str(seed))])
        seen.append(results.accuracies(tmp_path / str(seed), "test")["acc"])
    assert f"| `digits_cnn` | 2, 1 | {mean(seen):.2f} ± {stdev(seen):.2f} |" in printed
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    results.main([*arguments, "--plot", str(tmp_path / "blocks.png")])
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written, "no run is repeated"
    assert "was there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"(?s)other settings.*backprop-0.*\+# --stage test .* --model.lr 0.1"):
        results.main([*arguments, "--model.lr", "0.1"])
    assert (31, 119, 180) in Image.open(tmp_path / "blocks.png").convert("RGB").getdata(), "SFF, in blue"


RECIPES = {path.name for path in (ROOT / "configs/sff").iterdir()} & {
    path.name for path in (ROOT / "configs/backprop").iterdir()
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_configs_of_a_recipe_differ_only_in_the_model(name):
    sff, backprop = (ROOT / "configs" / method / name for method in results.METHODS)
    sff, backprop = (yaml.safe_load(path.read_text()) for path in (sff, backprop))
    for settings in (sff, backprop):
        model = settings.pop("model")["init_args"]
        settings["backbone"] = model["backbone"], model.get("stem")
    assert sff == backprop


def test_a_recipe_that_is_not_there_is_named_before_anything_is_run(tmp_path):
    with pytest.raises(SystemExit, match=r"recipe='digit_cnn' is not known.*configs/sff.*did you mean 'digits_cnn'"):
        results.main(["digits_cnn", "digit_cnn", "--configs", str(ROOT / "configs"), "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--trainer.max_epochs", "1"], ["--stage", "val"]])
@pytest.mark.parametrize("there", results.METHODS)
def test_a_table_mixes_no_settings(tmp_path, there, more):
    folder = tmp_path / "digits_cnn" / f"{there}-0"
    folder.mkdir(parents=True)
    config = (ROOT / "configs" / there / "digits_cnn.yaml").read_text()
    (folder / results.SETTINGS).write_text(f"{config}\n# --stage test \n")
    arguments = ["digits_cnn", "--seeds", "1", "--methods", "sff", "--configs", str(ROOT / "configs")]
    with pytest.raises(SystemExit, match=rf"(?s)other settings.*{there}-0.*--stage"):
        results.main([*arguments, "--runs", str(tmp_path), *more])


def test_a_recipe_of_one_method_says_so(tmp_path):
    arguments = ["digits_cnn_layer", "--configs", str(ROOT / "configs"), "--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match="no config of backprop: leave that out, by --methods"):
        results.main(arguments)


def test_no_runs_are_no_table(tmp_path):
    with pytest.raises(SystemExit, match="no runs in"):
        results.main(["--runs", str(tmp_path / "nothing"), "--plot", str(tmp_path / "blocks.png")])


def test_a_run_that_fails_says_why_and_where_it_can_be_read(tmp_path):
    arguments = ["cifar10_1000_cnn", "--runs", str(tmp_path), "--configs", str(ROOT / "configs")]
    with pytest.raises(SystemExit, match=r"(?s)failed:.*must hold a folder 'train'.*log.txt"):
        results.main([*arguments, "--data", "ImageFolder", "--data.root", str(tmp_path / "images")])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sff").glob("*_layer.yaml")), ids=lambda path: path.stem)
def test_a_layer_wise_config_differs_only_in_the_granularity(path):
    layer, block = (yaml.safe_load(of.read_text()) for of in (path, path.with_stem(path.stem.removesuffix("_layer"))))
    assert layer["model"]["init_args"].pop("granularity") == "layer"
    assert block["model"]["init_args"].pop("granularity", "block") == "block"
    assert layer == block
