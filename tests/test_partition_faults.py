"""Never another network, never an untrained parameter, in silence; and the user's network comes back as it was."""

import copy
import pickle

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
    assert [block.name for block in partition(Net(Parallel()), "layer", X)] == ["stem", "part.a", "part.b", "last"]
