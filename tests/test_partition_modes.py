"""Cuts of networks with unusual operations, and of those that do something else in training."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ff_lightning import LocalNet, partition
from tests.test_partition_faults import GRANULARITIES, Net, X, assert_exact, conv, run


class Windows(nn.Module):
    """Attention in windows, which count as images of their own between its layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        shortcut = x.permute(0, 2, 3, 1)
        b, h, w, c = shortcut.shape
        windows = self.norm(shortcut).view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv(windows).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        windows = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, c))
        mixed = windows.view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
        return (shortcut + mixed).permute(0, 3, 1, 2)


class Boxes(nn.Module):
    """Layers on five dimensions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1)
        return self.b(self.a(x).relu()).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("part", [Windows, Boxes])
def test_windows_and_many_dimensions(part, granularity):
    for block in assert_exact(lambda: Net(nn.Sequential(part(), part())), granularity):
        assert len(block.map_shape) in (3, 4)
        assert block.map_shape[0] in (4, 12)


def test_convolutions_of_volumes():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 5, 3, padding=1), nn.Linear(5, 10)

        def features(self, x):
            return self.b(self.a(x).relu())

        def forward(self, x):
            return self.fc(self.features(x).mean((2, 3, 4)))

    blocks = assert_exact(Video, "layer", torch.zeros(1, 3, 2, 6, 7))
    assert [block.map_shape for block in blocks] == [(4, 2, 6, 7), (5, 2, 6, 7)]


# What nobody uses, and what is not the way to the result


class Aside(Net):
    """A second head whose result is thrown away, one that is returned, one that runs in training alone."""

    def __init__(self, returned):
        super().__init__(conv(), aside=nn.Linear(4, 5), aux=nn.Linear(4, 10), returned=returned)

    def forward(self, x):
        features = self.features(x)
        logits = self.fc(features.mean((2, 3)))
        self.aside(features.amax((2, 3)))
        if self.training:
            return logits, self.aux(features.mean((2, 3)))
        return {"logits": logits, "features": features} if self.returned else logits


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("returned", [False, True])
def test_what_nobody_uses_is_left_out_and_named(returned, granularity):
    with pytest.warns(
        UserWarning, match=r"'aside.weight', 'aside.bias', 'aux.weight', 'aux.bias' of Aside take no part"
    ):
        blocks = partition(Aside(returned), granularity, X)
    assert {key.split(".")[0] for b in blocks for key, _ in b.body.named_parameters()} == {"stem", "part", "last"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_exact(lambda: Aside(returned), granularity)


def test_a_plain_network_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(Net(conv()), "layer", X)
        frozen = Net(conv())
        frozen.stem.requires_grad_(False)
        partition(frozen, "layer", X)


# Contexts


class NoGrad(Net):
    def middle(self, x):
        with torch.no_grad():
            x = self.frozen(x).relu()
        return self.part(x)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_grad_is_honoured(granularity, pickled):
    model = NoGrad(conv(), frozen=nn.Sequential(conv(), conv()))
    with pytest.warns(UserWarning, match=r"NoGrad gives .*'frozen.0.bias'.* no gradient"):
        net = LocalNet(model, 10, granularity, input_shape=(3, 8, 8))
    model, net = pickle.loads(pickle.dumps((model, net))) if pickled else (model, net)
    x = torch.randn(2, 3, 8, 8)
    for loss in net.local_losses(x, torch.tensor([0, 1])):
        loss.backward()
    assert all(p.grad is None for p in model.frozen.parameters()), "as the network says"
    assert all(p.grad is not None for p in (*model.part.parameters(), *model.last.parameters()))
    assert torch.equal(run(net.blocks, x), model.features(x))


def test_autocast_is_refused_where_it_is_cut():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
                y = self.b(self.a(x))
            return x + y.float()

    for Cast.enabled in (True, False):  # switched off inside of the trainer's autocast, it matters as well
        with pytest.raises(
            ValueError, match=r"'part' switches autocast .* border runs through it.*granularity='block'"
        ):
            partition(Net(Cast()), "layer", X)
        assert_exact(lambda: Net(Cast()), "block")


# Training and evaluation


class Noise(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = conv(), conv(), how

    def forward(self, x):
        return x + self.b(self.how(self, self.a(x)))


def _noise(self, x):
    if self.training:
        x = x + torch.randn_like(x)
    return x


MODE_DEPENDENT = {
    "noise": _noise,
    "noise behind": lambda self, x: self.b(x) + 1 if self.training else self.b(x),
    "dropout": lambda self, x: F.dropout(x, 0.5, self.training),
    "dropout2d": lambda self, x: F.dropout2d(x, 0.5, self.training),
    "dropout in place": lambda self, x: (F.dropout(x, 0.5, self.training, inplace=True), x)[1],
    "other module": lambda self, x: self.extra(x) if self.training else x,
    "other modules": lambda self, x: self.nested(x) if self.training else x,
    "other argument": lambda self, x: self.a(x * 2 if self.training else x),
}


class NetNoise(Net):
    """In the forward of the network itself, around modules that each stand in a unit of their own."""

    def __init__(self, how):
        super().__init__(None, how=how, a=nn.Sequential(conv()), b=nn.Sequential(conv()), extra=nn.ReLU())
        self.nested = nn.Sequential(nn.ReLU(), nn.Tanh())

    def middle(self, x):
        return self.b(self.how(self, self.a(x)))


@pytest.mark.parametrize("how", MODE_DEPENDENT)
def test_what_is_done_only_in_training_is_never_lost(how):
    def make():
        part = Noise(MODE_DEPENDENT[how])
        part.extra, part.nested = nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Tanh())
        return Net(nn.Sequential(part))

    with pytest.raises(ValueError, match=r"'part.0' does something else in training .*granularity='block'"):
        partition(make(), "layer", X)
    assert_exact(make, "block")
    for granularity in ("layer", "block", ["stem"]):
        with pytest.raises(ValueError, match=r"'NetNoise' does something else in training .*cannot be cut"):
            partition(NetNoise(MODE_DEPENDENT[how]), granularity, X)


def test_a_difference_in_the_classifier_alone_is_allowed():
    class Drops(Net):
        def forward(self, x):
            x = F.dropout(self.features(x).mean((2, 3)), 0.5, self.training)
            return self.fc(x + 1 if self.training else x)

    assert_exact(lambda: Drops(Noise(lambda self, x: x)), "layer")


def test_an_auxiliary_head_in_training_alone_is_no_difference():
    class Aux(Net):
        def middle(self, x):
            x = self.part(x + 1)
            self.aux_logits = self.aux(x.mean((2, 3)) + 1) if self.training else None
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head, and of the attribute
        assert_exact(lambda: Aux(Noise(lambda self, x: x), aux=nn.Linear(4, 10)), "layer")


def test_random_numbers_of_python_are_not_frozen_in_silence():
    class Numbers(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.conv, self.last, self.number = conv(), conv(), number

        def forward(self, x):
            return self.last(self.conv(x + self.number()))

    for number in (random.random, np.random.rand, lambda: torch.rand(1).item(), lambda: torch.rand(4, 1, 1)):
        with pytest.raises(ValueError, match=r"the blocks compute something else than Net .* granularity='stage'"):
            partition(Net(Numbers(number)), "layer", X)
        assert len(partition(Net(Numbers(number)), "stage", X)) == 1
