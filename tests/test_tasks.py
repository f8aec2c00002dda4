"""Tasks and local losses, against closed forms, and by runs that learn."""

import functools

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import classification, regression

from ff_lightning import SFF, Backprop, LocalNet, Objective, tasks
from ff_lightning.losses import similarity_loss, supervised_contrastive_loss, threshold_loss
from tests.conftest import small_net

IMAGES = {"num_classes": 10, "input_shape": (1, 8, 8)}


def vectors(features, outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


def table(number, features, targets):
    """A table whose targets are functions of its features."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(256, features, generator=generator)
    return x, targets(x)


def fit(model, make_trainer, x, y, epochs=15):
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    trainer = make_trainer(max_epochs=epochs, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, loader, loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("method", [SFF, Backprop])
def test_numbers_are_learnt(method, make_trainer):
    table = load_diabetes()
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in (table.data, table.target))
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    extra = {"granularity": "layer"} if method is SFF else {}
    torch.manual_seed(0)
    model = method(vectors(10, 1), num_classes=1, input_shape=(10,), task="Regression", **extra)
    logged = fit(model, make_trainer, x, y)
    assert logged["val/r2"] > 0.5
    with torch.no_grad():
        answers = model.eval()(x).squeeze(1)
    assert logged["val/mae"] == pytest.approx((answers - y).abs().mean().item(), rel=1e-4)
    assert logged["val/r2"] == pytest.approx(regression.r2_score(answers, y).item(), rel=1e-4)


@pytest.mark.parametrize("method", [SFF, Backprop])
def test_labels_are_learnt(method, make_trainer):
    x, y = table(0, 12, lambda x: (x[:, :3] + x[:, 3:6] > 0).float())
    extra = {"granularity": "layer"} if method is SFF else {}
    torch.manual_seed(0)
    model = method(vectors(12, 3), num_classes=3, input_shape=(12,), task="MultiLabel", metrics=["map", "f1"], **extra)
    logged = fit(model, make_trainer, x, y)
    assert logged["val/map"] > 0.95
    with torch.no_grad():
        answers = model.eval()(x)
    assert logged["val/acc"] == pytest.approx(((answers > 0) == (y > 0.5)).float().mean().item())
    assert logged["val/f1"] == pytest.approx(classification.multilabel_f1_score(answers.sigmoid(), y.long(), 3).item())
    if method is SFF:
        assert {"val/block00_map", "val/block01_f1"} <= logged.keys()


def test_samples_that_are_ignored_change_nothing(make_trainer):
    x, y = table(0, 12, lambda x: (x[:, 0] > 0).long())
    ends = []
    for more in (0, 64):
        torch.manual_seed(0)
        task = functools.partial(tasks.Classification, ignore_index=-1)
        model = SFF(vectors(12, 2), num_classes=2, input_shape=(12,), task=task, granularity="layer")
        padded = torch.cat([x[:96], torch.randn(more, 12)]), torch.cat([y[:96], torch.full((more,), -1)])
        loader = DataLoader(TensorDataset(*padded), batch_size=len(padded[0]))
        trainer = make_trainer(limit_train_batches=1.0)
        trainer.fit(model, loader, loader)
        ends.append((trainer.callback_metrics["val/acc"], trainer.callback_metrics["val/loss"]))
    torch.testing.assert_close(*ends)


def test_class_weights_are_those_of_the_cross_entropy():
    task = tasks.Classification(class_weights=[1, 3, 0.5])
    task.num_classes = 3
    scores, y = torch.randn(8, 3), torch.arange(8) % 3
    torch.testing.assert_close(
        task.criterion()(scores, y), F.cross_entropy(scores, y, weight=torch.tensor([1, 3, 0.5]))
    )
    task.num_classes = 4
    with pytest.raises(ValueError, match=r"class_weights=.* must be 4 numbers"):
        task.criterion()


def test_metrics_are_those_of_torchmetrics(make_trainer, digits):
    torch.manual_seed(0)
    model = SFF(small_net(), **IMAGES, metrics=["top5", "f1", "auroc"])
    trainer = make_trainer(limit_val_batches=1.0)
    trainer.fit(model, digits)
    batches = [*digits.val_dataloader()]
    with torch.no_grad():
        goodness = torch.cat([model.eval().net.goodness(x) for x, _ in batches], 1)
    y, logged = torch.cat([y for _, y in batches]), trainer.callback_metrics
    scores = goodness.mean(0)
    assert logged["val/top5"] == pytest.approx(
        classification.multiclass_accuracy(scores, y, 10, top_k=5, average="micro").item()
    )
    assert logged["val/f1"] == pytest.approx(classification.multiclass_f1_score(scores, y, 10).item())
    of_block = classification.multiclass_auroc(goodness[1].softmax(1), y, 10)
    assert logged["val/block01_auroc"] == pytest.approx(of_block.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "outputs", "target", "message"),
    [
        ("Regression", 1, torch.arange(4), r"int64 of shape \(4,\): give floating numbers, \(4, 1\) or \(4,\)"),
        ("Regression", 2, torch.randn(4), r"shape \(4,\): give floating numbers, \(4, 2\)"),
        ("Regression", 1, torch.tensor([1.0, torch.nan, 0, 0]), "a value that is not finite"),
        ("MultiLabel", 3, torch.arange(4), r"int64 of shape \(4,\): give 0 or 1 for each label, \(4, 3\)"),
        ("MultiLabel", 3, torch.full((4, 3), 2), "label value 2 in the batch"),
        ("Classification", 3, torch.randn(4, 3), "no probabilities"),
        ("Classification", 3, None, "without targets"),
    ],
)
def test_targets_that_do_not_fit_the_task(task, outputs, target, message, make_trainer):
    model = SFF(vectors(6, outputs), num_classes=outputs, input_shape=(6,), task=task, granularity="layer")
    batch = torch.randn(4, 6) if target is None else (torch.randn(4, 6), target)
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1).fit(model, DataLoader([batch], batch_size=None))


# ------------------------------------------------------------------------------------------------------ local losses


def test_similarity_against_its_definition():
    x, y = torch.randn(5, 4, 3, 3), torch.tensor([0, 1, 0, 2, 1])
    spread = x.flatten(2).std(2)
    one_hot = F.one_hot(y, 3).float()
    total = 0.0
    for i in range(5):
        for j in range(5):
            ours = F.cosine_similarity(spread[i] - spread[i].mean(), spread[j] - spread[j].mean(), dim=0)
            wanted = F.cosine_similarity(one_hot[i] - 1 / 3, one_hot[j] - 1 / 3, dim=0)
            total += (ours - wanted) ** 2 / 25
    torch.testing.assert_close(similarity_loss(x, y, 3), total)


def test_supervised_contrastive_against_its_definition():
    x, y = F.normalize(torch.randn(6, 4), dim=1), torch.tensor([0, 1, 0, 2, 1, 0])
    terms = []
    for i in range(6):
        partners = [p for p in range(6) if p != i and y[p] == y[i]]
        others = torch.stack([x[i] @ x[a] / 0.5 for a in range(6) if a != i])
        if partners:
            terms.append(-sum(x[i] @ x[p] / 0.5 - others.logsumexp(0) for p in partners) / len(partners))
    torch.testing.assert_close(supervised_contrastive_loss(x, y, 0.5), sum(terms) / len(terms))


def test_threshold_loss_does_not_overflow():
    positive, negative = torch.tensor([3.0, 1000.0]), torch.tensor([-1000.0, 5.0])
    expected = (torch.tensor([-1.0, 3.0]).exp().log1p()).sum() / 4
    torch.testing.assert_close(threshold_loss(positive, negative, 2.0), expected)


@pytest.mark.parametrize("loss", ["logsumexp", "similarity", "predsim", "supcon"])
def test_every_loss_learns_digits_and_is_read_again(loss, make_trainer, tmp_path):
    from ff_lightning import data

    torch.manual_seed(0)
    model = SFF(small_net(), **IMAGES, loss=loss)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, data.Digits(batch_size=32))
    assert trainer.callback_metrics["val/acc"] > 0.85
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SFF.load_from_checkpoint(tmp_path / "a.ckpt", backbone=small_net())
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


class Scaled(nn.Module):
    """A criterion with a parameter."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, scores, target):
        return F.cross_entropy(self.scale * scores, target)


class Deeper(Objective):
    """An objective that asks for its place."""

    def __init__(self, place=None):
        super().__init__()
        self.head, self.number = place.make_head(), place.number

    def loss(self, features, target):
        return F.cross_entropy(self(features), target, label_smoothing=0.1 * self.number)

    def forward(self, features):
        return self.head(features)


def test_parameters_of_a_loss_belong_to_their_block(make_trainer, digits, tmp_path):
    torch.manual_seed(0)
    model = SFF(small_net(), **IMAGES, loss=functools.partial(Scaled, start=2.0))
    trainer = make_trainer()
    trainer.fit(model, digits)
    scales = [objective.criterion.scale for objective in model.net.objectives]
    assert len({scale.item() for scale in scales} | {2.0}) == 4, "each block has one of its own, and all have moved"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SFF.load_from_checkpoint(tmp_path / "a.ckpt", backbone=small_net())
    assert [objective.criterion.scale for objective in again.net.objectives] == scales


def test_a_loss_may_ask_for_its_place():
    net = LocalNet(small_net(), **IMAGES, loss=Deeper)
    assert [objective.number for objective in net.objectives] == [0, 1, 2]
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    plain = LocalNet(small_net(), **IMAGES)
    plain.load_state_dict(net.state_dict())
    net.eval(), plain.eval()
    for k, loss in enumerate(net.local_losses(x, y)):
        torch.testing.assert_close(loss, F.cross_entropy(plain.goodness(x)[k], y, label_smoothing=0.1 * k))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"the loss of block 0 is a tensor of shape \(8,\): it must be one"),
        (Deeper(LocalNet(small_net(), **IMAGES)._place(0)), "loss=Deeper.* is an objective that is already made"),
    ],
)
def test_losses_that_cannot_work(loss, message):
    with pytest.raises(ValueError, match=message):
        LocalNet(small_net(), **IMAGES, loss=loss).loss(torch.randn(8, 1, 8, 8), torch.arange(8))
