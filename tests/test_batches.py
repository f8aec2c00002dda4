"""Batches that are not images and classes: one sentence for each, wherever they come in."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ff_lightning import SFF, Backprop
from tests.conftest import small_net

X, Y = torch.randn(8, 1, 8, 8), torch.arange(8) % 10

WRONG = {
    "dict without targets": (
        {"image": X, "name": ["name"] * 8},
        r"a batch is a dict with the keys \['image', 'name'\], without targets: give \(x, y\), or a dict with a key",
    ),
    "text": ("images", "the images of a batch are the text 'images': give a tensor"),
    "images alone": (X[:2], r"a batch is torch.float32 of shape \(2, 1, 8, 8\), without targets: give \(x, y\)"),
    "strings": (
        (X, ["cat"] * 8),
        r"the classes of a batch are a list of 8 parts \(str, .*\): give numbers from 0 to 9",
    ),
    "one-hot": ((X, F.one_hot(Y, 10)), r"torch.int64 of shape \(8, 10\): give numbers.*y.argmax\(1\) of one-hot"),
    "one-hot, floating": ((X, F.one_hot(Y, 10).float()), r"y.argmax\(1\)"),
    "column": ((X, Y[:, None]), r"torch.int64 of shape \(8, 1\): give numbers from 0 to 9, int64 \(8,\)"),
    "negative": ((X, torch.full((8,), -1)), "label -1 in the batch: num_classes=10 allows 0 to 9"),
    "too high": ((X, Y + 5), "label 12 in the batch: num_classes=10 allows 0 to 9"),
    "floating": ((X, Y.float()), r"the classes of a batch are torch.float32 of shape \(8,\): give numbers"),
    "int32": ((X, Y.int()), r"the classes of a batch are torch.int32 of shape \(8,\): give numbers"),
    "fewer": ((X, Y[:5]), r"a batch has 8 images and classes of shape \(5,\): give one for each image"),
    "one for all": ((X, torch.tensor(3)), r"a batch has 8 images and classes of shape \(\)"),
    "channels last": (
        (X.permute(0, 2, 3, 1), Y),
        r"have the shape \(8, 8, 8, 1\): give \(B, 1, 8, 8\), channels first",
    ),
    "flat": ((X.flatten(1), Y), r"have the shape \(8, 64\): give \(B, 1, 8, 8\)"),
    "uint8": (((X * 50).byte(), Y), "the images of a batch are torch.uint8: give floating ones, normalised"),
    "list of images": ((list(X), Y), r"have the shape \(1, 8, 8\): give \(B, 1, 8, 8\)"),
}


def loader(batch):
    return DataLoader([batch], batch_size=None)


def make(method=SFF, **arguments):
    return method(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), **arguments)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("method", [SFF, Backprop])
def test_a_wrong_batch_is_refused_in_one_sentence(method, case, make_trainer):
    batch, message = WRONG[case]
    model, trainer = make(method), make_trainer(max_epochs=1)
    for run in (trainer.fit, trainer.validate, trainer.test):
        with pytest.raises(ValueError, match=message) as caught:
            run(model, loader(batch))
        assert "\n" not in str(caught.value)


def test_a_wrong_batch_is_refused_in_automatic_optimization(make_trainer):
    batch, message = WRONG["dict without targets"]
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(make(optimization="automatic"), loader(batch))


def test_a_wrong_batch_that_comes_later_is_refused(make_trainer):
    good = (X, Y)
    for run in ("fit", "validate"):
        for batch, message in (WRONG["negative"], WRONG["column"]):
            with pytest.raises(ValueError, match=message):
                getattr(make_trainer(), run)(make(), DataLoader([good, batch], batch_size=None))


@pytest.mark.parametrize("case", ["text", "channels last", "uint8"])
def test_what_cannot_be_predicted(case, make_trainer):
    batch, _ = WRONG[case]
    with pytest.raises(ValueError, match="the images of a batch"):
        make_trainer().predict(make(), loader(batch))


def test_images_alone_and_images_with_names_can_be_predicted(make_trainer):
    model = make().eval()
    for batch in (X, (X,), (X, Y, ["name"] * 8)):
        (scores,) = make_trainer().predict(model, loader(batch))
        assert torch.equal(scores, model(X))


def test_mixed_images_are_trained_by_the_probabilities_of_their_classes(make_trainer):
    targets = 0.7 * F.one_hot(Y, 10) + 0.3 * F.one_hot(Y.flip(0), 10)
    model = make()
    before = model.net.blocks[0].state_dict()
    before = {key: value.clone() for key, value in before.items()}
    make_trainer(max_epochs=1).fit(model, loader((X, targets)))
    assert any(not torch.equal(before[key], value) for key, value in model.net.blocks[0].state_dict().items())
    with pytest.raises(ValueError, match="no probabilities: they must be 0 or more and add up to 1"):
        make_trainer(max_epochs=1).fit(make(), loader((X, targets * 2)))


def test_classes_of_eight_bits_will_do(make_trainer):
    make_trainer(max_epochs=1).fit(make(), loader((X, Y.byte())), loader((X, Y.byte())))


def test_batches_of_other_shapes_train_alike(make_trainer):
    ends = []
    for batch in ((X, Y), (X, Y, ["name"] * 8), {"image": X, "label": Y}, {"x": X, "y": Y, "name": ["name"] * 8}):
        torch.manual_seed(0)
        model = make()
        make_trainer(max_epochs=1).fit(model, loader(batch), loader(batch))
        ends.append(model.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(value, end[key]) for key, value in ends[0].items())
