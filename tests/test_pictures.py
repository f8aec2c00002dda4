"""Pictures of a test show what the test counts."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ff_lightning import SFF, data
from ff_lightning.callbacks import Pictures
from ff_lightning.callbacks.pictures import MISTAKES
from tests.conftest import make_trainer_in, small_net
from tests.test_cli import DIGITS, QUICK, run

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
NAMES = ("blocks", "confusion", "goodness", "mistakes")


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
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for true, answer in zip(classes.tolist(), scores.mean(0).argmax(1).tolist(), strict=True):
        confusion[true, answer] += 1
    assert torch.equal(pictures.confusion, confusion)
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
    assert [margin for margin, *_ in pictures.worst] == pytest.approx([margins[i] for i in worst])
    assert [true for _, true, _, _ in pictures.worst[:5]] == [int(classes[i]) for i in worst[:5]]
    assert torch.equal(pictures.worst[0][3], images[worst[0]])


def test_on_the_command_line_with_the_names_of_the_data(tmp_path, monkeypatch, image_folder):
    root = image_folder(size=(8, 8))
    monkeypatch.chdir(tmp_path)
    run(*DIGITS, "--data", "ImageFolder", "--data.root", root)
    (path,) = Path().rglob("last.ckpt")
    printed = run("test", *QUICK, "--ckpt_path", path, "--pictures", "pictures")
    assert "pictures in pictures: confusion, goodness, blocks" in printed
    assert (tmp_path / "pictures/confusion.png").is_file()


@pytest.mark.slow
def test_svg_with_the_names_of_classes(tmp_path, make_trainer):
    trainer = make_trainer(callbacks=[Pictures(tmp_path / "p", "svg")])
    trainer.test(SFF(small_net(), **SHAPE), data.Digits(batch_size=16), verbose=False)
    for name in NAMES:
        assert (tmp_path / f"p/{name}.svg").read_text().startswith("<?xml")


def test_what_cannot_be_drawn_is_refused_before_the_test(tmp_path, make_trainer, monkeypatch):
    with pytest.raises(ValueError, match="ending='jpg'"):
        Pictures(tmp_path, "jpg")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Pictures(tmp_path / "file")
    trainer = make_trainer(callbacks=[Pictures(tmp_path)])
    with pytest.raises(ValueError, match="the task is Regression"):
        trainer.test(SFF("mlp", task="Regression", num_classes=1, input_shape=(10,)), data.Diabetes(), verbose=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pictures need matplotlib: pip install 'ff-lightning\[plot\]'"):
        Pictures(tmp_path)
