"""Texts with padding, and runs on each kind of input."""

import copy
import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ff_lightning import SFF, Backprop, LocalNet
from ff_lightning.backbones import signal, text
from tests.test_inputs import GRANULARITIES, IDS, KINDS, MASK, Encoder

LENGTHS = torch.tensor([9, 5, 3, 1])
PADDED = torch.arange(9) < LENGTHS[:, None]
TEXTS = torch.arange(36).view(4, 9) % 50
LABELS = torch.tensor([0, 1, 2, 1])


def text_net(norm="layer", head="pooled", granularity="block", loss=None, dropout=0.0):
    torch.manual_seed(0)
    model = text(3, 50, 12, width=16, depth=2, heads=2, dropout=dropout)
    return LocalNet(model, 3, granularity, head, norm, input_shape=(12,), vocabulary=50, loss=loss)


def gradients(net):
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    return found


@pytest.mark.parametrize(
    ("norm", "head", "loss"),
    [(norm, head, None) for norm in ("layer", "length", "none") for head in ("pooled", "deep", "paper")]
    + [("layer", "pooled", "predsim"), ("layer", "pooled", "supcon")],
)
def test_a_padded_batch_equals_its_texts_one_by_one(norm, head, loss):
    """In scores, losses, gradients and normalised features, wherever the padding stands and whatever is in it."""
    net = text_net(norm, head, "layer" if norm == "layer" else "block", loss)
    for side in ("right", "left"):
        mask = PADDED if side == "right" else PADDED.flip(1)
        ids = torch.zeros_like(TEXTS).masked_scatter(mask, TEXTS[PADDED])
        alone = [TEXTS[i : i + 1, :n] for i, n in enumerate(LENGTHS)]
        padded = {"input_ids": ids, "attention_mask": mask}
        other = {"ids": ids.masked_fill(~mask, 49), "key_padding_mask": ~mask}
        scores = net.eval().goodness(padded)
        torch.testing.assert_close(scores, torch.cat([net.goodness(x) for x in alone], 1))
        assert torch.equal(scores, net.goodness((other["ids"], mask)))
        features = [torch.cat([f[i][:, m] for i, m in enumerate(mask)], 1).T for f in net.local_features(padded)]
        theirs = [
            torch.cat([f[0] for f in of_block], 1).T for of_block in zip(*map(net.local_features, alone), strict=True)
        ]
        torch.testing.assert_close(features, theirs)
        torch.testing.assert_close(net.representation(padded), torch.cat([net.representation(x) for x in alone]))
        net.train()
        losses = torch.stack(list(net.local_losses(padded, LABELS)))
        assert torch.equal(losses, torch.stack(list(net.local_losses(other, LABELS))))
        net.loss(padded, LABELS).backward()
        of_padded = gradients(net)
        assert all(grad.isfinite().all() for grad in of_padded.values() if grad is not None)
        if loss is None:  # the others look at the batch as a whole
            parts = [net.delivered_losses(x, LABELS[i : i + 1]) / 4 for i, x in enumerate(alone)]
            torch.testing.assert_close(losses, sum(parts))
            sum(parts).sum().backward()
            torch.testing.assert_close(of_padded, gradients(net), atol=1e-6, rtol=1e-4)


def test_without_a_mask_nothing_is_masked():
    net = text_net().eval()
    assert torch.equal(net(TEXTS), net({"ids": TEXTS, "mask": torch.ones_like(TEXTS)}))
    assert not torch.equal(net(TEXTS), net((TEXTS, PADDED)))


def test_a_text_that_is_all_padding_harms_no_other():
    net = text_net()
    mask = PADDED.clone()
    mask[3] = False
    scores = net.goodness((TEXTS, mask))
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[:, :3], net.goodness((TEXTS[:3], mask[:3])))
    net.loss((TEXTS, mask), LABELS).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_a_head_without_a_mask_is_given_zeros():
    seen = []

    class Mean(nn.Module):
        def __init__(self, channels, classes):
            super().__init__()
            self.classes = nn.Linear(channels, classes)

        def forward(self, features):
            seen.append(features.detach())
            return self.classes(features.mean(2))

    net = text_net(head=Mean)
    seen.clear()
    net.goodness((TEXTS, PADDED))
    for features in seen:
        assert torch.equal(features.abs().sum(1) > 0, PADDED)


def test_blocks_whose_positions_the_mask_does_not_count_are_named():
    class Pooled(Encoder):
        def forward(self, input_ids, attention_mask):
            x = F.max_pool1d(self.layers[0](self.embed(input_ids), None).transpose(1, 2), 2).transpose(1, 2)
            return self.fc(self.layers[1](x + 0 * self.places[:4], None).mean(1)) + 0 * attention_mask.sum()

    with pytest.warns(
        UserWarning, match=r"block 1 \(layers.0\) has features of shape \(16, 4\).*not leave padding out"
    ):
        LocalNet(Pooled(), 10, example={"input_ids": IDS, "attention_mask": MASK})


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [(kind, g) for kind in ("vectors", "signals", "volumes", "masked", "fusion") for g in GRANULARITIES[:2]],
)
def test_every_kind_is_trained_and_answers(kind, granularity):
    make, example, _, _ = KINDS[kind]
    net = LocalNet(make(), 10, granularity, example=example)
    labels = torch.tensor([3, 7])
    net.loss(example, labels).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net(example).shape == (2, 10)
    for loss, of_block in zip(net.local_losses(example, labels), net.blocks, strict=True):
        loss.backward()
        assert all(p.grad is not None for p in of_block.parameters())


def test_blocks_are_put_on_top_of_a_masked_network():
    net = text_net()
    added = net.append("more", nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()))
    assert added == [3]
    with torch.no_grad():
        assert torch.equal(net.eval().goodness((TEXTS, PADDED))[:3], text_net().eval().goodness((TEXTS, PADDED)))


def test_a_masked_network_goes_through_export():
    net = text_net().export()
    batch = {"input_ids": TEXTS, "attention_mask": PADDED}
    program = torch.export.export(net, (batch,), strict=False)
    torch.testing.assert_close(program.module()(batch), net(batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (3, 8)}, r"input_shape=\(3, 8\): must be \(T,\)"),
        ({"vocabulary": None}, "vocabulary=None: the network begins with an embedding"),
        ({"vocabulary": 5000}, r"a sample of shape \(12,\) does not pass .*'embed.tokens' failed"),
    ],
)
def test_networks_of_tokens_that_do_not_fit(changes, message):
    model = text(3, 10, 12, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=message):
        LocalNet(model, 3, **{"input_shape": (12,), "vocabulary": 10, **changes})


def test_a_text_that_is_too_long():
    with pytest.raises(ValueError, match=r"input_ids of shape \(1, 13\): must be of 12 ids or fewer"):
        text_net()(torch.zeros(1, 13, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------- in Lightning


def vectors():
    table = load_breast_cancer()
    x = (table.data - table.data.mean(0)) / table.data.std(0)
    return torch.from_numpy(x).float(), torch.from_numpy(table.target)


def waves():
    """Waves of three frequencies, at any phase and under noise, in two channels."""
    y = torch.arange(360) % 3
    time = torch.arange(64) / 64 + torch.rand(360, 2, 1)
    return torch.sin(2 * torch.pi * (3 + 3 * y[:, None, None]) * time) + 0.5 * torch.randn(360, 2, 64), y


def sentences():
    """The class is told by one of three tokens; in the padding behind the text are all of them."""
    y = torch.arange(600) % 3
    lengths = torch.randint(3, 10, (600,))
    ids = torch.randint(3, 20, (600, 12))
    ids[torch.arange(600), (torch.rand(600) * lengths).long()] = y
    mask = torch.arange(12) < lengths[:, None]
    return {"input_ids": torch.where(mask, ids, torch.arange(12) % 3), "attention_mask": mask.long()}, y


def batches(x, y, size=40):
    def part(rows):
        return {name: value[rows] for name, value in x.items()} if isinstance(x, dict) else x[rows]

    rows = torch.randperm(len(y)).split(size)
    return DataLoader([(part(own), y[own]) for own in rows], batch_size=None)


RUNS = {
    "vectors": (vectors, lambda: {"backbone": "mlp", "num_classes": 2, "input_shape": (30,)}, 3),
    "signals": (waves, lambda: {"backbone": signal(3, 2, 16), "num_classes": 3, "input_shape": (2, 64)}, 3),
    "texts": (
        sentences,
        lambda: {
            "backbone": text(3, 20, 12, width=32, depth=2),
            **{"num_classes": 3, "input_shape": (12,), "vocabulary": 20},
        },
        5,
    ),
}


@pytest.mark.parametrize("method", [SFF, Backprop])
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_each_kind_learns(kind, method, make_trainer):
    make, arguments, epochs = RUNS[kind]
    model = method(**arguments(), lr=5e-3)
    loader = batches(*make())
    trainer = make_trainer(max_epochs=epochs, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, loader, batches(*make()))
    assert trainer.callback_metrics["val/acc"] > 0.9


def test_manual_and_automatic_end_in_the_same_weights_for_texts(make_trainer):
    ends = []
    x, y = sentences()
    for optimization in ("manual", "automatic"):
        torch.manual_seed(0)
        backbone = text(3, 20, 12, width=16, depth=2, heads=2, dropout=0.0)
        model = SFF(backbone, 3, (12,), vocabulary=20, optimization=optimization, granularity="layer")
        torch.manual_seed(0)
        make_trainer(max_epochs=1, limit_train_batches=5).fit(model, batches(x, y))
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_inputs_in_order_come_from_a_loader_as_a_list(make_trainer):
    """As torch's own collate makes them of ((ids, mask), class)."""
    x, y = sentences()
    loader = DataLoader([((ids, mask), k) for ids, mask, k in zip(*x.values(), y, strict=True)], batch_size=40)
    for method in (SFF, Backprop):
        model = method(Encoder(vocabulary=20), 10, (12,), vocabulary=20)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(model, loader, loader)
        assert trainer.callback_metrics["val/loss"].isfinite()
        (scores, *_) = trainer.predict(model, loader)
        assert scores.shape == (40, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["input_ids"].float(), r"the inputs of a batch are torch.float32 of shape \(40, 12\): give ids"),
        (lambda x: {**x, "input_ids": x["input_ids"] + 10}, r"input_ids holds \d+: vocabulary=20 allows 0 to 19"),
        (lambda x: {**x, "attention_mask": x["attention_mask"][:, 1:]}, r"attention_mask of shape \(40, 11\)"),
        (lambda x: {**x, "token_type_ids": x["input_ids"]}, r"the network was built for tensors \['input_ids'"),
    ],
)
@pytest.mark.parametrize("method", [SFF, Backprop])
def test_batches_of_texts_that_do_not_fit(method, change, message, make_trainer):
    x, y = sentences()
    x = change({name: value[:40] for name, value in x.items()})
    model = method(text(3, 20, 12, width=8, depth=1, heads=2), 3, (12,), vocabulary=20)
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(model, DataLoader([(x, y[:40])], batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "cnn", "input_shape": (30,)},
            r"must be \(C, H, W\).* for backbone='cnn'; for vectors there is 'mlp'",
        ),
        ({"backbone": "signal", "input_shape": (3, 8, 8)}, r"input_shape=\(3, 8, 8\): must be \(C, T\)"),
        ({"backbone": "text", "input_shape": (8,)}, "backbone='text' needs the vocabulary"),
        ({"backbone": "resnet18", "vocabulary": 9, "input_shape": (8,)}, "'resnet18' takes no token ids.*give 'text'"),
        ({"backbone": "text", "vocabulary": 0, "input_shape": (8,)}, "vocabulary=0: must be at least 1"),
    ],
)
def test_backbones_for_another_kind(arguments, message):
    with pytest.raises(ValueError, match=message):
        SFF(num_classes=3, **arguments)


def test_the_code_of_the_page_on_inputs_runs():
    page = (Path(__file__).parents[1] / "docs/inputs.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, names)
    assert [block.name for block in names["model"].net.blocks] == ["embed", "layers.0", "layers.1"]
    assert names["scores"].shape == (8, 10)


def test_backprop_goes_on_from_blocks_that_sff_trained_on_texts():
    x, _ = sentences()
    x = {name: value[:8] for name, value in x.items()}
    network = text(3, 20, 12, width=16, depth=2, heads=2, dropout=0.0)
    local = SFF(network, 3, (12,), vocabulary=20).net
    after = Backprop(copy.deepcopy(network), 3, (12,), vocabulary=20, norm="layer").eval()
    seen = []
    after.net.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    after(x)
    torch.testing.assert_close(seen[0], local.eval().representation(x)[:, -16:])
