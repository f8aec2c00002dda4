import csv
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ff_lightning
from ff_lightning import SCFF, SFF, data
from tests.conftest import small_net
from tests.trained import CLASSES, QUIET, run, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_predicted_as_test_would(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the test leaves its config
    root, path = trained
    printed = run("predict", "--ckpt_path", path, "--data.root", root / "test", "--out", tmp_path / "p.csv", "--scores")
    rows = read(tmp_path / "p.csv")
    assert [*rows[0]] == ["file", "class", "probability", *(f"score_{name}" for name in sorted(CLASSES))]
    assert len(rows) == 120
    right = np.mean([row["class"] == row["file"].split("/")[-2] for row in rows])
    tested = run("test", "--ckpt_path", path, *QUIET)
    assert f"{100 * right:.2f}" in tested.split("vote")[1]
    assert right > 0.9
    assert "sum" in printed
    scores = torch.tensor([[float(row[f"score_{name}"]) for name in sorted(CLASSES)] for row in rows])
    torch.testing.assert_close(
        scores.softmax(1).amax(1), torch.tensor([float(r["probability"]) for r in rows]), atol=2e-6, rtol=0
    )


def test_one_bad_file_among_many(trained, tmp_path, monkeypatch):
    root, path = trained
    monkeypatch.chdir(tmp_path)
    flat = tmp_path / "flat"
    shutil.copytree(root / "test" / CLASSES[0], flat)
    (flat / "bad.png").write_bytes(b"no image")
    (flat / "notes.txt").write_text("passed over")
    printed = run("predict", "--ckpt_path", path, "--data.root", "flat")
    assert "left out: cannot read the image flat/bad.png" in printed
    assert "1 of 41 images could not be read" in printed
    assert len(read("predictions.csv")) == 40
    with pytest.raises(SystemExit, match=r"predictions\.csv' is there already: give another name, or --overwrite"):
        run("predict", "--ckpt_path", path, "--data.root", "flat")
    run("predict", "--ckpt_path", path, "--data.root", flat / "000.png", "--overwrite")
    assert [row["file"] for row in read("predictions.csv")] == [str(flat / "000.png")]
    run("predict", "--ckpt_path", path, "--data.root=flat/00*.png", "--overwrite")
    assert len(read("predictions.csv")) == 10
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    run("predict", "--ckpt_path", path, "--data.root", "flat/00*.png", "--out", "p.parquet")
    assert pandas.read_parquet("p.parquet")["file"].tolist() == [row["file"] for row in read("predictions.csv")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root", "empty"], "data.root='empty': the folder holds no image; known are files that end in .jpg"),
        (["--data.root", "nowhere"], "data.root='nowhere': there is no such file or folder"),
        (["--data.root", "no*thing"], r"data.root='no\*thing': no file fits the pattern"),
        (["--data.root", "bad.png"], "data.root='bad.png': none of the 1 images can be read: cannot read the image"),
        (["--data.root", "bad.png", "--out", "p.txt"], r"out='p\.txt': must end in '\.csv' or '\.parquet'"),
        (["--data.root", "bad.png", "--ckpt_path", "x.ckpt"], r"path='x\.ckpt': there is no such file"),
        (["--data.root", "bad.png", "--ckpt_path", "other.ckpt"], "is no checkpoint of Lightning"),
        ([], "the following arguments are required: --data.root"),
        (["--data.root", "bad.png", "--batch_size", "0"], "batch_size=0: must be at least 1"),
    ],
)
def test_what_cannot_be_predicted(arguments, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match=message):
        run("predict", "--ckpt_path", trained[1], *arguments)
    assert not (tmp_path / "predictions.csv").exists()


def test_the_last_run_is_found_by_every_command(trained, tmp_path, monkeypatch):
    root, path = trained
    monkeypatch.chdir(path.parents[1])  # where the run had its default folder
    rows = [
        run("predict", "--ckpt_path", which, "--data.root", root / "test", "--out", tmp_path / "p.csv", "--overwrite")
        for which in (path, "last")
    ]
    assert rows[0] == rows[1]
    out = tmp_path / "net.pt2"
    (root.parent / "mixed").mkdir()
    (root.parent / "mixed" / "bad.png").write_bytes(b"no image")
    export = "export", "--ckpt_path", "last", "--format", "torch", "--out", out, "--data.root"
    with pytest.raises(SystemExit, match="none of the 1 images can be read"):
        run(*export, root.parent / "mixed")
    shutil.copy(next((root / "test").rglob("*.png")), root.parent / "mixed" / "good.png")
    assert "on 1 images of" in run(*export, root.parent / "mixed")
    assert "multiply-adds" in run("exits", "--ckpt_path", "last", "--rules", "margin")


def test_checkpoints_that_do_not_say_what_they_are(trained, tmp_path):
    content = torch.load(trained[1], weights_only=True)
    content["ff_lightning"]["model"]["class_path"] = "nowhere.Model"
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"class_path='nowhere\.Model' is not imported"):
        ff_lightning.load(tmp_path / "foreign.ckpt")
    del content["ff_lightning"]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="does not say of which model it is"):
        ff_lightning.load(tmp_path / "old.ckpt")


def test_a_model_without_answers_names_the_command_that_reads_it(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(SCFF(input_shape=(1, 8, 8), channels=[4]), data.Digits(batch_size=8))
    trainer.save_checkpoint(tmp_path / "scff.ckpt")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    of_files = ["predict", "--data.root", tmp_path / "a.png", "--out", tmp_path / "p.csv"]
    for arguments in (of_files, ["export", "--format", "torch"]):
        with pytest.raises(SystemExit, match=r"names no classes.*ff-lightning probe says"):
            run(*arguments, "--ckpt_path", tmp_path / "scff.ckpt")
    assert not {*tmp_path.glob("*.csv"), *tmp_path.glob("*.pt2")}


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("pyarrow", ["predict", "--data.root", "a.png", "--out", "p.parquet"], "parquet"),
        ("pandas", ["predict", "--data.root", "a.png", "--out", "p.parquet"], "parquet"),
        ("onnx", ["export"], "onnx"),
        ("onnxscript", ["export"], "onnx"),
        ("safetensors.torch", ["export", "--format", "safetensors"], "hub"),
    ],
)
def test_an_extra_that_is_missing(missing, arguments, extra, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    monkeypatch.setitem(sys.modules, missing, None)  # an import then fails, as of a module that is not there
    if arguments[0] == "export":
        arguments = [*arguments, "--out", "net" + (".onnx" if extra == "onnx" else ".safetensors")]
    message = rf"error: {missing} is not installed: pip install 'ff-lightning\[{extra}\]'\n$"
    with pytest.raises(SystemExit, match=message):
        run(*arguments, "--ckpt_path", trained[1])
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["a.png"]


def test_images_of_all_kinds_get_the_same_answers(trained):
    root, path = trained
    predictor = ff_lightning.load(path)
    assert predictor.class_names == sorted(CLASSES)
    file = root / "test" / CLASSES[0] / "000.png"
    (expected,) = predictor(file)
    image = Image.open(file)
    pixels = np.asarray(image.convert("RGB"))
    as_tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    kinds = [image, np.asarray(image), pixels, as_tensor, predictor.prepare(file)]
    batches = [pixels[None], as_tensor[None], predictor.prepare(file)[None], [str(file)], kinds]
    for images in (*kinds, *batches):
        for answer in predictor(images):
            torch.testing.assert_close(answer.scores, expected.scores)
            assert answer.name == expected.name
    with pytest.raises(ValueError, match="array of float64: give uint8"):
        predictor(pixels / 255)
    with pytest.raises(ValueError, match=r"give normalised ones of \(3, 8, 8\)"):
        predictor(torch.zeros(1, 8, 8))


def test_a_network_of_ones_own_is_given_again(make_trainer, tmp_path):
    network = small_net()
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    model = SFF(backbone=network, num_classes=10, input_shape=(1, 8, 8))
    digits = data.Digits()
    trainer.fit(model, digits)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="backbone"):
        ff_lightning.load(tmp_path / "own.ckpt")
    predictor = ff_lightning.load(tmp_path / "own.ckpt", backbone=small_net())
    digits.setup("test")
    images, _ = next(iter(digits.test_dataloader()))
    answers = predictor(images)
    torch.testing.assert_close(torch.stack([answer.scores for answer in answers]), model.eval()(images).detach())
