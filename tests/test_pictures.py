"""Pictures of a test show what the test counts."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ff_lightning import FF, SFF, LocalNet, data, modules
from ff_lightning.callbacks import Pictures
from ff_lightning.callbacks.pictures import MAPPED, MISTAKES
from ff_lightning.drawing.epochs import read_log
from ff_lightning.drawing.fields import FIELDS, first_fields
from ff_lightning.drawing.figure import SHOWN, shown_units
from ff_lightning.drawing.images import goodness_maps
from ff_lightning.drawing.plane import Samples
from tests.conftest import make_trainer_in, small_net
from tests.methods import CASES
from tests.test_cli import DIGITS, QUICK, run

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
NAMES = ("blocks", "confusion", "confusion_of_blocks", "features", "fields", "goodness", "maps", "mistakes")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A model that has learned a little, and its pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pictures")
    pictures = Pictures(folder / "new" / "folder")
    module, model = data.Digits(batch_size=64), SFF(small_net(), **SHAPE)
    trainer = make_trainer_in(folder)(
        max_epochs=1, limit_train_batches=1.0, limit_test_batches=1.0, callbacks=[pictures]
    )
    trainer.fit(model, module)
    (figures,) = trainer.test(model, module, verbose=False)
    with torch.no_grad():
        batches = [(x, y, model.eval().scores(x)) for x, y in module.test_dataloader()]
    images, classes, scores = (
        torch.cat(parts, -2 if parts[0].ndim == 3 else 0) for parts in zip(*batches, strict=True)
    )
    return pictures, figures, images, classes, scores


def test_they_are_pictures(drawn):
    pictures, *_ = drawn
    assert sorted(path.name for path in pictures.folder.iterdir()) == [f"{name}.png" for name in NAMES]
    for path in pictures.folder.iterdir():
        assert len(set(Image.open(path).convert("RGB").getdata())) > 20, path


def test_what_is_drawn_is_what_the_test_has_counted(drawn):
    pictures, figures, _, classes, scores = drawn
    for confusion, goodness in zip(pictures.confusions, [*scores, scores.mean(0)], strict=True):
        assert torch.equal(confusion, MulticlassConfusionMatrix(10)(goodness, classes))
        assert confusion.sum() == 360
    assert 0.2 < figures["test/acc"] < 1, "it has learned, and makes mistakes"
    pairs = torch.cat(pictures.pairs, 1)
    right = (pairs[..., 0] > pairs[..., 1]).float().mean(1)
    expected = [figures[f"test/block{k:02d}_acc"] for k in range(3)] + [figures["test/acc"]]
    torch.testing.assert_close(right, torch.tensor(expected))


def test_the_worst_mistakes_come_first(drawn):
    pictures, _, images, classes, scores = drawn
    vote = scores.mean(0)
    wrong = [i for i in range(len(vote)) if vote[i].argmax() != classes[i]]
    margins = {i: (vote[i].max() - vote[i, classes[i]]).item() for i in wrong}
    worst = sorted(wrong, key=lambda i: -margins[i])[:MISTAKES]
    assert [one.margin for one in pictures.worst] == pytest.approx([margins[i] for i in worst])
    assert [one.true for one in pictures.worst[:5]] == [int(classes[i]) for i in worst[:5]]
    assert [one.rival for one in pictures.worst[:5]] == [int(vote[i].argmax()) for i in worst[:5]]
    assert torch.equal(pictures.worst[0].image, images[worst[0]])


def test_those_that_are_right_are_of_different_classes(drawn):
    pictures, _, _, classes, scores = drawn
    first = {int(c): i for i, c in reversed([*enumerate(classes)]) if scores[:, i].mean(0).argmax() == c}
    for number, one in pictures.right.items():
        rivals = scores[:, first[number]].mean(0)
        margin = rivals[one.true] - rivals[one.rival]
        assert margin == rivals.topk(2).values.diff().abs()
        assert one.margin == pytest.approx(-margin.item())
    assert len(pictures.right) == MAPPED


def test_features_are_those_of_as_many_of_each_class(drawn):
    pictures, *_ = drawn
    assert torch.bincount(torch.tensor(pictures.samples.classes)).tolist() == [30] * 10
    assert [sum(map(len, blocks)) for blocks in zip(*pictures.samples.features, strict=True)] == [
        len(pictures.samples.classes)
    ] * 3


def test_of_many_classes_and_blocks_some_are_shown():
    samples = Samples(1000)
    for number in range(1000):  # sorted, as in folders
        samples.wanted(torch.full((50,), number))
    assert set(samples.left.values()) == {0}
    assert [*samples.left][::9] == [0, 999]
    assert shown_units(100)[::3] == [0, 50, 99]
    assert len(shown_units(100)) == SHOWN
    assert shown_units(2) == [0, 1]


@pytest.mark.parametrize("head", ["pooled", "deep", "paper", "groups", "lookahead"])
def test_maps_add_up_to_the_goodness(head):
    sizes = [(1, 10), (10, 20), (20, 20)]
    network = nn.Sequential(*(layer for i, o in sizes for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU())))
    net, x = LocalNet(network, 10, "layer", head, input_shape=(1, 16, 16)).eval(), torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        goodness, maps = net.goodness(x), goodness_maps(net, x)
        torch.testing.assert_close(maps[0].sum((2, 3)), goodness[0])
        features = next(iter(net.blocks))(x)
        parts = net.objectives[0].head.maps(features).sum((2, 3))
    torch.testing.assert_close((goodness[0] - parts).std(0), torch.zeros(10), atol=1e-5, rtol=0)
    assert maps[0].shape[:2] == (4, 10)
    assert maps[0][0, 0].numel() > 1
    assert not net.objectives[0].head._forward_hooks


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_log_is_read_in_epochs(tmp_path, digits, make_trainer, kind):
    logger = kind(tmp_path, name="")
    trainer = make_trainer(logger=logger, max_epochs=4, check_val_every_n_epoch=2)
    trainer.fit(SFF(small_net(), **SHAPE), digits)
    courses = read_log(Path(logger.log_dir), "acc")
    assert sorted(courses) == ["", "block00", "block01", "block02"]
    for key, course in courses.items():
        assert [*course] == [2, 4], "counted from 1"
        assert course[4] == pytest.approx(trainer.callback_metrics[f"val/{key}_acc" if key else "val/acc"].item())
    assert read_log(tmp_path / "none", "acc") == {}


def test_fields_are_the_weights_of_the_first_layer_for_the_pixels():
    dense = FF(widths=[80, 20], label="concat", **SHAPE)
    weight = next(dense.net.parameters())
    fields = first_fields(dense, (1, 8, 8))
    assert fields.shape == (FIELDS, 1, 8, 8)
    assert torch.equal(fields[0].flatten(), weight[0, 10:]), "the label stands in front"
    assert torch.equal(fields[-1].flatten(), weight[-1, 10:])
    mapped = nn.Conv2d(2, 4, 3)
    assert torch.equal(first_fields(mapped, (1, 8, 8)), mapped.weight[:, :1]), "the label is a channel"
    for other in (nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(10, 5), nn.Embedding(4, 4), nn.ReLU()):
        assert first_fields(other, (4, 8, 8)) is None


def test_on_the_command_line_with_the_names_of_the_data(tmp_path, monkeypatch, image_folder):
    root = image_folder(size=(8, 8))
    monkeypatch.chdir(tmp_path)
    run(*DIGITS, "--data", "ImageFolder", "--data.root", root)
    (path,) = Path().rglob("last.ckpt")
    printed = run("test", *QUICK, "--ckpt_path", path, "--pictures", "pictures", "--pictures_format", "svg")
    assert "pictures in pictures: confusion, confusion_of_blocks, " in printed
    assert (tmp_path / "pictures/epochs.svg").read_text().startswith("<?xml")
    assert "cat" in (tmp_path / "pictures/confusion.svg").read_text()


ANSWERS = {"confusion", "goodness", "mistakes", "features", "fields"}
BLOCKS = {"confusion_of_blocks", "blocks"}
DRAWN = {
    "Backprop": ANSWERS,
    "CwC": ANSWERS | BLOCKS | {"maps"},
    "FF": ANSWERS | BLOCKS,
    "PFF": ANSWERS | BLOCKS,
    "RecurrentFF": ANSWERS | BLOCKS,
    "SCFF": {"features", "fields"},
    "SFF": ANSWERS | BLOCKS | {"maps"},
}


def draw(folder, model, module, make_trainer):
    """The names of the pictures of two batches of a test."""
    make_trainer(callbacks=[Pictures(folder)]).test(model, module, verbose=False)
    return {path.stem for path in folder.iterdir()}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "SCFF" else pytest.mark.slow) for name in DRAWN]
)
def test_what_a_method_does_not_have_is_left_out_and_named(tmp_path, make_trainer, capsys, method):
    model = getattr(modules, method)(**CASES[method].arguments(), **SHAPE)
    found = draw(tmp_path / "p", model, data.Digits(batch_size=40), make_trainer)
    assert found == DRAWN[method]
    assert len(model.block_features(torch.zeros(2, 1, 8, 8))) == len(model.unit_names) - (
        "readout" in model.unit_names or method == "PFF"
    )
    left_out = capsys.readouterr().out.partition("left out: ")[2]
    assert all(name in left_out for name in {*NAMES, "epochs"} - found), left_out


def test_without_classes_there_is_nothing_to_draw(tmp_path, make_trainer, capsys):
    model = SFF("mlp", task="Regression", num_classes=1, input_shape=(10,))
    assert draw(tmp_path / "p", model, data.Diabetes(), make_trainer) == set()
    assert "no classes are answered by SFF with the task Regression" in capsys.readouterr().out


@pytest.mark.slow
def test_a_hundred_blocks(tmp_path, make_trainer):
    layers = (layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.ReLU()))
    model = SFF(nn.Sequential(nn.Flatten(), *layers), granularity="layer", **SHAPE)
    assert len(model.unit_names) == 100
    assert draw(tmp_path / "p", model, data.Digits(batch_size=40), make_trainer) == ANSWERS | BLOCKS


@pytest.mark.slow
def test_texts(tmp_path, make_trainer):
    rows = [f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(100)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]))
    module = data.Text(str(tmp_path / "texts.csv"), length=8, test_fraction=0.5, batch_size=16)
    shape = {"num_classes": 2, "input_shape": (8,), "vocabulary": module.vocabulary}
    model = SFF("text", **shape)
    assert draw(tmp_path / "p", model, module, make_trainer) == ANSWERS - {"mistakes", "fields"} | BLOCKS


def test_what_cannot_be_drawn_is_refused_before_the_test(tmp_path, make_trainer, monkeypatch):
    with pytest.raises(ValueError, match="ending='jpg'"):
        Pictures(tmp_path, "jpg")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Pictures(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is not installed: pip install 'ff-lightning\[plot\]'"):
        Pictures(tmp_path)
