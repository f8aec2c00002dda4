import json
import re
import shlex
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

import ff_lightning
from ff_lightning import SFF, Backprop, inference
from ff_lightning.commands.recorded import recorded
from ff_lightning.inference.formats import Answering
from tests.trained import CLASSES, run, train

ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=[pytest.param("onnx", marks=pytest.mark.slow), "torch", "safetensors"])
def exported(request, trained):
    """An export of each format that can be written here."""
    for module in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}.get(
        request.param, ()
    ):
        pytest.importorskip(module)
    root, path = trained
    out = path.with_name(f"net{ENDINGS[request.param]}")
    printed = run("export", "--ckpt_path", path, "--format", request.param, "--out", out, "--data.root", root / "test")
    assert f"on 32 images of {root / 'test'}" in printed
    return out


def test_exports_give_the_scores_of_the_checkpoint(exported, trained):
    root, path = trained
    original, network = ff_lightning.load(path), ff_lightning.load(exported)
    assert network.class_names == sorted(CLASSES)
    files = sorted((root / "test").rglob("*.png"))
    for count in (1, 70):  # the last batch of two is another size
        for answer, expected in zip(network(files[:count]), original(files[:count]), strict=True):
            torch.testing.assert_close(answer.scores, expected.scores, atol=1e-5, rtol=1e-5)
            assert answer.name == expected.name
    with pytest.raises(SystemExit, match="is there already: give another name, or --overwrite"):
        run("export", "--ckpt_path", path, "--out", exported)


def test_names_in_an_onnx_file(exported):
    if exported.suffix != ".onnx":
        pytest.skip("it is about ONNX")
    graph = pytest.importorskip("onnx").load(exported)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {"images": ["batch", 3, 8, 8], "scores": ["batch", 3]}
    (facts,) = [entry.value for entry in graph.metadata_props if entry.key == "ff_lightning"]
    facts = json.loads(facts)
    assert facts["class_names"] == sorted(CLASSES)
    assert facts["version"] == ff_lightning.__version__
    assert len(facts["statistics"]) == 2


def test_the_baseline_is_exported_too(make_trainer, digits, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Backprop(num_classes=10, input_shape=(1, 8, 8)), digits)
    trainer.save_checkpoint(tmp_path / "baseline.ckpt")
    digits.setup("test")
    images, _ = next(iter(digits.test_dataloader()))
    assert inference.export(ff_lightning.load(tmp_path / "baseline.ckpt"), tmp_path / "b.pt2", "torch", images) < 1e-5


def test_a_network_of_token_ids_is_refused(make_trainer, tmp_path):
    model = SFF("text", 2, (8,), vocabulary=20)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, DataLoader([(torch.arange(8), k % 2) for k in range(8)], batch_size=4))
    trainer.save_checkpoint(tmp_path / "text.ckpt")
    with pytest.raises(ValueError, match="exports are of networks of images: this one takes token ids"):
        inference.export(ff_lightning.load(tmp_path / "text.ckpt"), tmp_path / "text.pt2", "torch")


def test_an_export_that_differs_is_not_handed_over(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Answering, "forward", lambda self, images: self.learner(images) + 1e-3)
    with pytest.raises(ValueError, match=r"format='torch': the scores differ from those of the original by"):
        inference.export(ff_lightning.load(trained[1]), tmp_path / "net.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_export(exported, tmp_path):
    path = tmp_path / exported.name
    whole = exported.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            ff_lightning.load(path)


def test_files_of_other_programs(tmp_path):
    pytest.importorskip("safetensors.torch").save_file({"w": torch.zeros(2)}, tmp_path / "net.safetensors")
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), tmp_path / "net.pt2")
    for name in ("net.safetensors", "net.pt2"):
        with pytest.raises(ValueError, match=f"{name} was not written by ff-lightning export"):
            ff_lightning.load(tmp_path / name)


def test_a_safetensors_file_names_no_foreign_class(trained, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    inference.export(ff_lightning.load(trained[1]), tmp_path / "net.safetensors", "safetensors")
    tensors, facts = inference.formats.read_safetensors(tmp_path / "net.safetensors")
    facts.arguments["optimizer"] = {"class_path": "os.system", "init_args": {"command": "true"}}
    library.save_file(tensors, tmp_path / "evil.safetensors", {"ff_lightning": facts.to_json()})
    with pytest.raises(ValueError, match="names what no checkpoint may name"):
        ff_lightning.load(tmp_path / "evil.safetensors")


def test_what_is_shared_comes_back(trained, tmp_path):
    pytest.importorskip("safetensors")
    root, path = trained
    predictor = ff_lightning.load(path)
    inference.save_pretrained(predictor, tmp_path / "shared", license="cc0-1.0", notes="Made for a test.")
    assert sorted(file.name for file in (tmp_path / "shared").iterdir()) == ["README.md", "model.safetensors"]
    moved = shutil.move(tmp_path / "shared", tmp_path / "moved")
    files = sorted((root / "test").rglob("*.png"))
    for answer, expected in zip(ff_lightning.from_pretrained(moved)(files), predictor(files), strict=True):
        assert torch.equal(answer.scores, expected.scores)
    card = (tmp_path / "moved" / "README.md").read_text()
    for part in (
        "license: cc0-1.0",
        "ImageFolder",
        "val/acc",
        "from_pretrained",
        "Made for a test.",
        "4 epochs",
        "fit --data ImageFolder",
    ):
        assert part in card
    assert str(root.parent) not in card, "whose folder it was is nobody's business"
    command = re.search(r"```bash\nff-lightning (.*)\n```", card)[1]
    assert shlex.split(command)[:5] == ["fit", "--data", "ImageFolder", "--data.root", ".../images"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--trainer.logger.api_key", "abc"], "--trainer.logger.api_key ..."),
        (
            ["--trainer.logger={init_args: {token: abc, offline: true}}"],
            "'--trainer.logger={init_args: {token: ..., offline: true}}'",
        ),
        (["--data.train=/home/me/a b.csv"], "'--data.train=.../a b.csv'"),
        (["--data.root", "~/me/abc"], "--data.root .../abc"),
        (["--data.train", "[/home/me/a.csv,/home/me/b.csv]"], "--data.train '[.../a.csv,.../b.csv]'"),
        (["--model.weights", "runs/abc/last.ckpt"], "--model.weights runs/abc/last.ckpt"),
        (["--ckpt_path", "https://host/a/b.ckpt"], "--ckpt_path https://host/a/b.ckpt"),
    ],
)
def test_secrets_and_folders_are_not_recorded(given, kept):
    assert recorded(["fit", *given, "--model", "SFF"]) == f"ff-lightning fit {kept} --model SFF"
