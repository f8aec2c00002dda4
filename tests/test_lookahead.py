"""Look-ahead heads: copies of the next blocks, trained with the block that they stand on."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

from ff_lightning import SFF, LocalNet, PooledHead, data
from ff_lightning.backbones.build import build_backbone
from ff_lightning.heads import LookAhead
from ff_lightning.util.memory import saved_for_backward
from tests.test_cli import DIGITS, checkpoint, run

SHAPE = (1, 8, 8)


def residual():
    """A ResNet in small: a stem, and two stages of two blocks."""

    def block(channels, out, stride):
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(channels, out, stride, shortcut if stride > 1 else None)

    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = [block(8, 8, 1), block(8, 16, 2), block(16, 16, 1), block(16, 32, 2), block(32, 32, 1)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def inverted():
    """A MobileNetV3 in small: depthwise layers and squeeze-excite gates."""
    settings = [(8, 16, 8, True, 1), (8, 32, 16, False, 2), (16, 64, 16, True, 1), (16, 64, 24, True, 2)]
    blocks = [
        InvertedResidual(InvertedResidualConfig(i, 3, e, o, gate, "HS", stride, 1, 1.0), nn.BatchNorm2d)
        for i, e, o, gate, stride in settings
    ]
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def plain():
    return build_backbone("cnn", 10, SHAPE, "standard", None, None)


def mlp():
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in ((64, 32), (32, 16), (16, 8))]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 10))


def net_of(network, granularity="block", **arguments):
    torch.manual_seed(0)
    return LocalNet(network(), 10, granularity, partial(LookAhead, **arguments), input_shape=SHAPE)


@pytest.mark.parametrize(
    ("network", "granularity", "width"),
    [
        (residual, "layer", 0.25),
        (residual, "stage", 1.0),
        (inverted, "layer", 1.0),
        (inverted, "block", 0.25),
        (plain, "block", 1.0),
        (plain, "layer", 0.25),
        (mlp, "block", 0.5),
    ],
)
def test_gradients_stay_in_the_block_and_its_head(network, granularity, width):
    net = net_of(network, granularity, width=width)
    assert len(net.heads[0].copies) > 0
    assert len(net.heads[-1].copies) == 0, "nothing follows the last block"
    x, y = torch.randn(4, *SHAPE), torch.arange(4)
    for k, loss in enumerate(net.local_losses(x, y)):
        loss.backward()
        reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
        own = {name for name, _ in net.named_parameters() if name.startswith((f"blocks.{k}.", f"objectives.{k}."))}
        assert reached == own
        net.zero_grad()


def test_copies_are_the_next_blocks_that_change_the_shape():
    names = [[block.name for part in head.copies for block in part.blocks] for head in net_of(residual).heads]
    assert names == [["2", "4"], ["2", "4"], ["4"], ["4"], [], []]
    names = [[block.name for part in head.copies for block in part.blocks] for head in net_of(residual, copies=1).heads]
    assert names == [["2"], ["2"], ["4"], ["4"], [], []]
    inside = [len(head.copies) for head in net_of(residual, "layer").heads]
    assert inside == sorted(inside, reverse=True), "fewer towards the output"
    last = net_of(residual, kernel_size=3).heads[-1].pooled
    expected = PooledHead(32, 10, kernel_size=3, size=(2, 2))
    assert [p.shape for p in last.parameters()] == [p.shape for p in expected.parameters()]


@pytest.mark.parametrize("network", [residual, inverted])
def test_a_copy_computes_what_the_blocks_compute_and_has_weights_of_its_own(network):
    torch.manual_seed(0)
    frozen = network().requires_grad_(False)
    net = LocalNet(frozen, 10, "layer", partial(LookAhead, copies=1), input_shape=SHAPE).eval()
    features = [*net.local_features(torch.randn(3, *SHAPE))]
    originals = {block.name: block for block in net.blocks}
    stored = {tensor.data_ptr() for block in net.blocks for tensor in block.state_dict().values()}
    for h, head in zip(features, net.heads, strict=True):
        for part in head.copies:
            for block in part.blocks:
                for name, weight in block.named_parameters():
                    assert weight.data_ptr() not in stored
                    assert weight.requires_grad
                    if weight.ndim > 1:
                        assert not torch.equal(weight, originals[block.name].get_parameter(name)), "drawn anew"
                block.load_state_dict(originals[block.name].state_dict())
            if isinstance(part.adapter, nn.Identity):
                state = h
                for block in part.blocks:
                    state = originals[block.name](state)
                assert torch.equal(part(h), state)


def test_a_narrow_copy_has_a_share_of_the_channels():
    head = net_of(inverted, width=0.5).heads[0]
    (first, second) = head.copies
    widths = [[m.weight.shape[:2] for m in part.modules() if isinstance(m, nn.Conv2d)] for part in (first, second)]
    assert widths[0] == [(4, 8), (16, 4), (16, 1), (8, 16)], "adapter, expansion, depthwise, projection"
    assert widths[1][0] == (32, 8)
    assert head.pooled.classes.in_features == 12 * 2 * 2


def test_manual_and_automatic_end_in_the_same_weights(make_trainer, digits):
    states = []
    for optimization in ("manual", "automatic"):
        torch.manual_seed(0)
        arguments = {"num_classes": 10, "input_shape": SHAPE, "reach": 2, "optimization": optimization}
        model = SFF(residual(), head="lookahead", **arguments)
        before = [p.clone() for p in model.net.heads.parameters()]
        make_trainer(max_epochs=1).fit(model, digits)
        assert not any(map(torch.equal, before, model.net.heads.parameters())), "all of them are trained"
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("head", ["lookahead", {"class_path": "LookAhead", "init_args": {"copies": 1, "width": 0.5}}])
def test_a_checkpoint_is_read_again(head, make_trainer, digits, tmp_path):
    if isinstance(head, dict):
        head = {**head, "class_path": "ff_lightning.heads.LookAhead"}
    model = SFF("cnn", num_classes=10, input_shape=SHAPE, head=head)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SFF.load_from_checkpoint(tmp_path / "last.ckpt")
    x = torch.randn(3, *SHAPE)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert len(again.net.heads[0].copies) == (1 if isinstance(head, dict) else 2)
    torch.testing.assert_close(model.net.export()(x), model(x))


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*DIGITS, "--model.head", "LookAhead", "--model.head.copies", "1", "--model.head.width", "0.5")
    stored = torch.load(checkpoint("."), weights_only=True)
    assert stored["state_dict"]["net.objectives.0.head.pooled.classes.weight"].shape == (10, 64 // 2 * 2 * 2)
    run("test", "--ckpt_path", checkpoint("."))


def test_what_the_copies_keep_is_counted():
    x, y = torch.randn(2, *SHAPE), torch.arange(2)

    def kept(**arguments):
        net = net_of(residual, **arguments) if arguments else LocalNet(residual(), 10, input_shape=SHAPE)
        with saved_for_backward(net.parameters()) as saved:
            net.loss(x, y)
        return max(net.kept().share(k, k) for k in range(len(net.blocks))), saved.peak

    for counted in zip(kept(), kept(copies=1), kept(copies=2), strict=True):
        assert list(counted) == sorted(set(counted)), "more copies keep more"
    torch.manual_seed(0)
    windows = LocalNet(residual(), 10, head="lookahead", input_shape=SHAPE, reach=0.99).windows
    assert all(share <= 0.99 for ends in windows.placements for share in windows.shares(ends))


def test_a_head_of_the_users_own_sees_what_follows():
    seen = []

    def head(channels, classes, place):
        seen.append((place.number, place.name, [block.name for block in place.following]))
        return place.make_head()

    net = LocalNet(residual(), 10, head=head, input_shape=SHAPE)
    names = [block.name for block in net.blocks]
    assert seen == [(k, name, names[k + 1 :]) for k, name in enumerate(names)]
    assert all(isinstance(head, PooledHead) for head in net.heads)


class Scaled(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x):
        return self.conv(self.scale * x).relu()


class Joined(nn.Module):
    """Two halves side by side."""

    def __init__(self, channels, out):
        super().__init__()
        self.halves = nn.ModuleList(nn.Conv2d(channels, out // 2, 3, padding=1) for _ in range(2))
        self.after = nn.Conv2d(out, out, 3, 2, 1)

    def forward(self, x):
        return self.after(torch.cat([half(x) for half in self.halves], 1)).relu()


def joined():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), Joined(8, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def with_weight_norm():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.utils.weight_norm(nn.Conv2d(4, 8, 3)), nn.ReLU())


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_it_lies_where_the_network_lies(width):
    net = LocalNet(residual().double(), 10, head=partial(LookAhead, width=width), input_shape=SHAPE)
    net.loss(torch.randn(2, *SHAPE, dtype=torch.float64), torch.arange(2)).backward()
    assert all(p.dtype == p.grad.dtype == torch.float64 for p in net.parameters())


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (residual, {"copies": 0}, "copies=0: must be at least 1"),
        (residual, {"width": 1.5}, "width=1.5: must be above 0 and at most 1"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), {}, "LookAhead: no block behind 0 follows"),
        (
            lambda: nn.Sequential(*(nn.Conv2d(c, 4, 3, padding=1) for c in (1, 4))),
            {},
            "no block behind 0 changes the sh",
        ),
        (
            joined,
            {"width": 0.3},
            "width=0.3: the blocks behind 0 cannot be made so narrow, they join",
        ),
        (lambda: nn.Sequential(Scaled(1, 4), Scaled(4, 8)), {"width": 0.5}, r"width=0.5: the Scaled in 1.*narrower"),
        pytest.param(
            with_weight_norm, {}, "block 2 cannot be copied", marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is a single block")
def test_what_cannot_be_is_refused(network, arguments, says):
    with pytest.raises(ValueError, match=says):
        net_of(network, "layer", **arguments)


def test_networks_that_cannot_be_traced_are_refused():
    transformers = pytest.importorskip("transformers")
    settings = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.ViTConfig(**settings, num_hidden_layers=2, intermediate_size=16)
    with pytest.raises(ValueError, match="cannot be copied, they run only as parts of their network's own forward"):
        LocalNet(transformers.ViTModel(config), 10, head="lookahead", input_shape=SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
@pytest.mark.parametrize("width", [1.0, 0.25])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11_bn"])
def test_networks_of_torchvision(name, width, granularity):
    head = partial(LookAhead, width=width)
    net = LocalNet(torchvision.models.get_model(name, num_classes=10), 10, granularity, head, input_shape=(3, 64, 64))
    copies = [len(head.copies) for head in net.heads]
    assert copies[0] == 2
    assert copies == sorted(copies, reverse=True)
    net.loss(torch.randn(2, 3, 64, 64), torch.arange(2)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
def test_they_learn(make_trainer):
    model = SFF(residual(), num_classes=10, input_shape=SHAPE, head="lookahead")
    trainer = make_trainer(max_epochs=5, limit_train_batches=None, limit_test_batches=None)
    trainer.fit(model, data.Digits(batch_size=32))
    (figures,) = trainer.test(model, data.Digits(batch_size=32), verbose=False)
    assert figures["test/acc"] > 0.95
    assert figures["test/block00_acc"] > 0.9, "the head of the stem alone"
