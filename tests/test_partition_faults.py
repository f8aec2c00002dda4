"""Never another network, never an untrained parameter, in silence; and the user's network comes back as it was."""

import copy
import gc
import io
import pickle
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ff_lightning import LocalNet, partition

X = torch.zeros(1, 3, 8, 8)
GRANULARITIES = ["layer", "block", "stage", 1]


def run(blocks, x):
    for block in blocks:
        x = block(x)
    return x[0] if isinstance(x, tuple) else x


def conv(c_in=4, c_out=4, k=3):
    return nn.Conv2d(c_in, c_out, k, padding=k // 2)


class Net(nn.Module):
    """Stem, a part of the test's own, a last convolution, a classifier; `features` are what the blocks must return."""

    def __init__(self, part=None, **more):
        super().__init__()
        self.stem = conv(3)
        self.part = part
        for name, value in more.items():
            setattr(self, name, value)
        self.last = conv()
        self.fc = nn.Linear(4, 10)

    def middle(self, x):
        return self.part(x)

    def features(self, x):
        return self.last(self.middle(self.stem(x).relu())).relu()

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def assert_exact(make, granularity, example=X, training=(False, True), count=None):
    """The units compute the network's own features bit by bit, and the loss of each unit trains all of its weights."""
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    blocks = partition(model, granularity, example)
    x = torch.randn(2, *example.shape[1:])
    for mode in training:
        reference.train(mode)
        for block in blocks:
            block.train(mode)
        torch.manual_seed(1)
        expected = reference.features(x.clone())
        torch.manual_seed(1)
        assert torch.equal(run(blocks, x.clone()), expected), f"training={mode}"
    for (key, value), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert_trained(make, granularity, example)
    assert count is None or len(blocks) == count
    return blocks


def assert_trained(make, granularity, example=X):
    net = LocalNet(make(), 10, granularity, input_shape=tuple(example.shape[1:]))
    x, y = torch.randn(4, *example.shape[1:]), torch.tensor([0, 1, 2, 3])
    for k, loss in enumerate(net.local_losses(x, y)):
        loss.backward()
        for name, parameter in net.blocks[k].named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient from the loss of its own unit"


# A residual stack is not a classifier


class Mlp(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Tokens(nn.Module):
    """Patches, residual blocks of linear layers, a head or none."""

    def __init__(self, head, pool=True, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.Sequential(*(Mlp() for _ in range(depth)))
        self.norm, self.pool, self.head = nn.LayerNorm(6), pool, head

    def features(self, x):
        return self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2)))

    def forward(self, x):
        x = self.features(x)
        return self.head(x.mean(1) if self.pool else x[:, 0])


class Vectors(nn.Module):
    """A residual network of linear layers alone, without a head: its result is one residual block's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3 * 8 * 8, 6)
        self.blocks = nn.Sequential(*(Mlp() for _ in range(3)))

    def features(self, x):
        return self.blocks(self.first(x.flatten(1)))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokens(nn.Identity()),
        lambda: Tokens(nn.Identity(), pool=False),
        lambda: Tokens(nn.Linear(6, 10)),
        Vectors,
    ],
    ids=["headless", "headless token", "head", "vectors"],
)
def test_a_residual_stack_is_not_a_classifier(make, granularity):
    blocks = assert_exact(make, granularity)
    held = {key.split(".")[0] for block in blocks for key, _ in block.body.named_parameters()}
    assert held >= {"blocks"}
    assert "head" not in held


def test_a_public_transformer_without_a_head():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    names = [block.name for block in partition(model, "block", torch.zeros(1, 3, 32, 32))]
    assert names == ["patch_embed", "blocks.0", "blocks.1"]


def test_two_heads_that_are_averaged_are_a_classifier():
    class Distilled(Tokens):
        def __init__(self):
            super().__init__(nn.Linear(6, 10))
            self.second = nn.Linear(6, 10)

        def forward(self, x):
            x = self.features(x)
            first, second = x[:, 0], x[:, 1]
            return (self.head(first) + self.second(second)) / 2

    blocks = assert_exact(Distilled, "block")
    held = {key.split(".")[0] for block in blocks for key, _ in block.body.named_parameters()}
    assert held == {"patches", "blocks", "norm"}


def test_a_hidden_layer_with_its_activation_is_not_a_classifier():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.ReLU())
    assert [len(partition(net, "layer", X)) for net in (model, Headless())] == [2, 2]


class Headless(nn.Module):
    """As torchvision's VGG without its last linear layer: what comes out is activated."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = conv(3), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Identity())

    def forward(self, x):
        return self.classifier(self.features(x).relu().mean((2, 3)))


# Arguments that are changed, or are more than tensors


class ChangesList(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv()

    def forward(self, xs):
        xs[0] = self.a(xs[0])
        return xs[0] + 1


class ChangesDict(ChangesList):
    def forward(self, xs):
        xs["x"] = self.a(xs["x"])
        return xs["x"] * 2


class Appends(ChangesList):
    def forward(self, xs):
        xs.append(self.a(xs[-1]))
        return xs[-1]


class CallsWithList(Net):
    def __init__(self, callee, wrap, looks):
        super().__init__(conv(), callee=callee, wrap=wrap, looks=looks)

    def middle(self, x):
        xs = self.wrap(self.part(x))
        y = self.callee(xs)
        first = next(iter(xs.values())) if isinstance(xs, dict) else xs[0]
        return y + first if self.looks else y


@pytest.mark.parametrize("looks", [False, True], ids=["caller", "caller that looks"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("callee", "wrap"),
    [(ChangesList, lambda x: [x]), (ChangesDict, lambda x: {"x": x}), (Appends, lambda x: [x])],
    ids=["list", "dict", "append"],
)
def test_a_callee_that_changes_its_argument(callee, wrap, granularity, looks):
    assert_exact(lambda: CallsWithList(callee(), wrap, looks), granularity)


class Masked(nn.Module):
    def __init__(self, use=True):
        super().__init__()
        self.conv, self.use = conv(), use

    def forward(self, x, mask, unused=None, scale=1.0, **kwargs):
        return self.conv(x) * mask * scale if self.use else self.conv(x) * scale


class Arguments(Net):
    """Buffers, tensors, parameters and values that the callee does not use."""

    def __init__(self, use):
        super().__init__(None, one=Masked(use), two=Masked(use), gain=nn.Parameter(torch.ones(4, 1, 1)))
        self.register_buffer("mask", torch.rand(8, 8))
        self.register_buffer("hidden", torch.rand(8, 8), persistent=False)
        self.constant = torch.rand(8, 8)

    def middle(self, x):
        x = x * self.gain
        x = self.one(x, self.mask, unused=x.mean((2, 3)), scale=2.0, more=[self.hidden, {"a": x}])
        x = x * torch.linspace(0, 1, 8)
        return self.two(x, self.constant, x.shape[0], dtype=torch.float32, device=x.device)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("use", [True, False])
def test_tensors_and_unused_values_as_arguments(use, granularity):
    blocks = assert_exact(lambda: Arguments(use), granularity)
    own = Arguments(use).state_dict().keys()
    assert all(key in own for block in blocks for key in block.body.state_dict())
    assert torch.equal(run(pickle.loads(pickle.dumps(blocks)), X + 1), run(blocks, X + 1))


def test_an_unused_argument_of_an_earlier_block():
    class Passes(Net):
        def middle(self, x):
            first = self.one(x, 1.0)
            aside = first.mean((2, 3))
            x = self.two(first, 1.0)
            return self.three(x, 1.0, unused=aside)

    for granularity in GRANULARITIES:
        assert_exact(lambda: Passes(None, one=Masked(), two=Masked(), three=Masked()), granularity)


def test_a_buffer_that_changes_later_is_read_anew():
    class Scaled(Net):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("scale", torch.ones(()))

        def middle(self, x):
            return x * (self.scale * 2)

    model = Scaled().eval()
    blocks = partition(model, "layer", X)
    model.scale.fill_(3.0)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(run(blocks, x), model.features(x))


# Every unit trains all of its weights


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(4, 2), conv(4, 2)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([a, b], 1)


class Reparametrised(nn.Module):
    """A norm alone beside two convolutions."""

    def __init__(self):
        super().__init__()
        self.identity, self.a, self.b = nn.BatchNorm2d(4), conv(), conv(k=1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        identity = self.identity(x)
        return F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)) + identity)


class Positions(nn.Module):
    """Positions on the device of a weight, which does not learn from them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        rows = torch.arange(x.shape[2] + 0, device=self.b.weight.device, dtype=self.a.weight.dtype)
        return self.b(self.a(x) + rows.sin()[:, None])


class Gains(nn.Module):
    """Parameters that enter late, and one that enters in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gain, self.bias = conv(), conv(), nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(X.mean())

    def forward(self, x):
        a, gained = self.a(x), x * self.gain
        gained += self.bias
        return gained + self.b(a)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("part", [Parallel, Reparametrised, Positions, Gains])
def test_every_unit_trains_all_of_its_weights(part, granularity):
    assert_exact(lambda: Net(nn.Sequential(part(), part())), granularity)


def test_parallel_branches_stay_units_of_their_own():
    names = [block.name for block in partition(Net(Parallel()), "layer", X)]
    assert names == ["stem", "part.a", "part.b", "last"], "each branch has an output of its own"


# Shapes at a border


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


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_grad_is_honoured(granularity):
    model = NoGrad(conv(), frozen=nn.Sequential(conv(), conv()))
    with pytest.warns(UserWarning, match=r"NoGrad gives .*'frozen.0.bias'.* no gradient"):
        net = LocalNet(model, 10, granularity, input_shape=(3, 8, 8))
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


TWO_FACED = {
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


@pytest.mark.parametrize("how", TWO_FACED)
def test_what_is_done_only_in_training_is_never_lost(how):
    def make():
        part = Noise(TWO_FACED[how])
        part.extra, part.nested = nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Tanh())
        return Net(nn.Sequential(part))

    with pytest.raises(ValueError, match=r"'part.0' does something else in training .*granularity='block'"):
        partition(make(), "layer", X)
    assert_exact(make, "block")
    for granularity in ("layer", "block", ["stem"]):
        with pytest.raises(ValueError, match=r"'NetNoise' does something else in training .*cannot be cut"):
            partition(NetNoise(TWO_FACED[how]), granularity, X)


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


def test_a_second_name_for_what_is_changed_in_place():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            x = self.a(x)
            shortcut = x
            x += self.b(x.relu())
            return self.b(x) + shortcut

    for granularity in GRANULARITIES:
        assert_exact(lambda: Net(Alias()), granularity)


# What cannot be traced, and what is wrapped


class Length(Net):
    def forward(self, x):
        return super().forward(x) / len(x)


class Star(Net):
    def forward(self, *args, **kwargs):
        (x,) = args
        return super().forward(x)


class Assigns(Net):
    def forward(self, x):
        x[:, 0] = 0
        return super().forward(x)


class ManyArguments(Net):
    def forward(self, x, *, y):
        return super().forward(x) + y


class Accumulates(Net):
    def middle(self, x):
        out = torch.zeros(1, 4, 8, 8)
        out += self.part(x)
        return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Length, r"Length.forward cannot be traced \(.*len.*\).* at no granularity.*nn.Sequential"),
        (Assigns, r"Assigns.forward cannot be traced \(.*item assignment\)"),
        (ManyArguments, r"several inputs \['x', 'y'\]"),
        (Accumulates, r"changes a tensor that was made in forward"),
    ],
)
def test_what_cannot_be_traced_is_said_in_one_sentence(make, message):
    model = make(conv())
    with pytest.raises(ValueError, match=message) as info:
        partition(model, "block", X)
    assert len(str(info.value).splitlines()) == 1
    assert all(module.training for module in model.modules())


def test_any_signature_will_do_that_takes_one_batch():
    import functools

    def decorated(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            kwargs.setdefault("scale", None)
            return function(self, *args, **kwargs)

        return wrapper

    class Decorated(Net):
        @decorated
        def forward(self, pixels=None, mask=None, scale=None, **kwargs):
            return super().forward(pixels)

    for make in (Star, Decorated):
        assert_exact(lambda make=make: make(conv()), "layer", count=3)


def test_wrapped_networks():
    x = torch.randn(2, 3, 8, 8)
    for wrap in (torch.compile, nn.DataParallel, lambda net: nn.DataParallel(torch.compile(net))):
        model = Net(conv()).eval()
        blocks = partition(wrap(model), "layer", X)
        assert [block.name for block in blocks] == ["stem", "part", "last"]
        assert torch.equal(run(blocks, x), model.features(x))
    with pytest.raises(ValueError, match="scripted network cannot be cut"):
        partition(torch.jit.script(nn.Sequential(conv(3), nn.ReLU())), "layer", X)
    compiled = Net(torch.compile(nn.Sequential(conv(), nn.ReLU()), backend="eager"))
    assert [block.name for block in partition(compiled, "layer", X)] == ["stem", "part", "last"]
    scripted = Net(torch.jit.script(nn.Sequential(conv(), nn.ReLU())))
    assert [block.name for block in partition(scripted, "layer", X)] == ["stem", "part", "last"]


def test_deeply_nested_modules():
    def nested(depth):
        inner = conv()
        for _ in range(depth):
            inner = nn.Sequential(inner)
        return Net(nn.Sequential(inner, conv()))

    assert [block.name for block in partition(nested(200), "layer", X)] == ["stem", "part.0", "part.1", "last"]


def test_untraceable_modules_stay_whole_and_are_found_at_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(-x if x.sum() > 0 else x)

    class Counts(Odd):
        def forward(self, x):
            seen.append(1)
            return super().forward(x)

    seen = []
    model = Net(nn.Sequential(*(nn.Sequential(conv(), Counts()) for _ in range(10))))
    blocks = assert_exact(lambda: copy.deepcopy(model), "layer")
    assert len(blocks) == 22
    seen.clear()
    partition(model, "layer", X)
    assert len(seen) <= 10 * 12, "each module is traced and run a few times, not once for each other one"


# The user's network comes back as it was


class Stateful(Net):
    """Keeps what it sees, counts its calls, in its own forward and in that of a part."""

    def __init__(self):
        super().__init__(conv())
        self.calls, self.seen, self.cache = 0, [], {"x": None}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def middle(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(x)
        self.cache["x"] = x
        self.feat = x
        return self.part(x)


def everything(model):
    """All that a network holds, to be compared."""
    buffer = io.BytesIO()
    torch.save([module.__dict__ for module in model.modules()], buffer)
    return buffer.getvalue()


def test_the_network_comes_back_as_it_was():
    model = Stateful()
    model.part.eval()
    model.last.weight.requires_grad = False
    calls = []
    model.part.register_forward_hook(lambda *args: calls.append(args[2]))
    model.fc.register_forward_pre_hook(lambda *args: calls.append(args[1][0]))
    model._forward_hooks.clear()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.warns(UserWarning, match=r"whose forward sets 'cache', 'calls', .*'seen'.*: the blocks do not"):
        partition(model, "layer", X)
    assert (model.calls, model.seen, model.cache, int(model.count)) == (0, [], {"x": None}, 0)
    assert not hasattr(model, "feat")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in (model, model.part, model.last)] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not model.last.weight.requires_grad
    assert all(type(value) is torch.Tensor for value in calls), "hooks see tensors alone"
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    model.part._forward_hooks.clear()
    model.fc._forward_pre_hooks.clear()
    torch.save(model, io.BytesIO())
    model(torch.randn(2, 3, 8, 8))
    assert (model.calls, len(model.seen), int(model.count)) == (1, 1, 1)


def test_counters_go_on_counting():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = conv(), 0
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            self.count += 1
            return self.conv(x)

    model = Net(Counts())
    blocks = partition(model, "layer", X)
    assert (model.part.calls, int(model.part.count)) == (0, 0), "tracing and the check do not count"
    run(blocks, X)
    assert (model.part.calls, int(model.part.count)) == (1, 1)


def test_a_counter_of_the_network_itself_that_counts_in_training():
    class Counts(Net):
        def middle(self, x):
            if self.training:
                self.count += 1
            return self.part(x)

    model = Counts(conv())
    model.register_buffer("count", torch.zeros((), dtype=torch.long))
    with pytest.warns(UserWarning, match="whose forward sets 'count': the blocks do not"):
        partition(model, "layer", X)
    model(torch.randn(2, 3, 8, 8))
    assert int(model.count) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.a, self.b, self.reentrant = conv(), conv(), reentrant

        def forward(self, x):
            return x + checkpoint(lambda y: self.b(self.a(y).relu()), x, use_reentrant=self.reentrant)

    assert_exact(lambda: Net(Checkpointed(False)), "layer", count=4)
    with pytest.raises(ValueError, match=r"its own unit does not reach 'part.a.weight', .* granularity='stage'"):
        partition(Net(Checkpointed(True)), "block", X)  # it gives none where its input is detached
    assert_exact(lambda: Net(Checkpointed(True)), "stage")


def test_hooks_of_a_divided_module():
    def make():
        return Net(nn.Sequential(conv(), nn.ReLU(), conv()))

    seen = []
    model = make()
    model.part.register_forward_hook(lambda *args: seen.append(args[2]))
    model.part.register_forward_pre_hook(lambda *args: seen.append(args[1][0]))
    with pytest.warns(UserWarning, match="borders run through 'part': the blocks do not run the forward hooks"):
        partition(model, "layer", X)
    assert all(type(value) is torch.Tensor for value in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(model, ["stem", "part"], X)
    changing = make()
    changing.part.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(
        ValueError, match="compute something else than Net does: borders run through 'part', so that its"
    ):
        partition(changing, "layer", X)


@pytest.mark.parametrize("wrong", ["example", "granularity", "forward"])
def test_a_failed_partition_leaves_no_trace(wrong):
    model = Stateful()
    model.part.eval()
    example, granularity = X, "layer"
    if wrong == "example":
        example = torch.zeros(1, 5, 8, 8)
    elif wrong == "granularity":
        granularity = ["nothing"]
    else:
        model = Length(conv()).train()
        model.part.eval()
    keys = set(model.__dict__)
    with pytest.raises(ValueError, match=r"does not pass|is not known|cannot be traced"):
        partition(model, granularity, example)
    assert [m.training for m in (model, model.part)] == [True, False]
    assert set(model.__dict__) == keys


def test_running_statistics_are_not_moved():
    model = Net(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.utils.parametrizations.spectral_norm(conv())))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    partition(model, "layer", X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_kept_of_a_network_that_is_gone():
    model = Net(nn.Sequential(conv(), nn.ReLU(), conv()))
    blocks = partition(model, "layer", X)
    alive = weakref.ref(model.stem.weight)
    del model, blocks
    gc.collect()
    assert alive() is None


def test_lazy_modules_take_their_shape_from_the_example():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10))
    assert len(partition(model, "layer", X)) == 2
