"""Blocks of a window that run again in backward: the same gradients and statistics, less that is kept."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from ff_lightning import SFF, LocalNet
from ff_lightning.backbones import build_backbone
from ff_lightning.benchmark.measure import Alive
from tests.conftest import Residual, small_net
from tests.test_windows import TwoInputs, of_backprop, pooled

pytestmark = pytest.mark.filterwarnings("ignore:reach=", "ignore:own_loss=")


def wide():
    """Its products are worth keeping."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), *(Residual(32) for _ in range(4)))


def in_place():
    """What a convolution gives is changed in place."""
    pairs = [(1, 32), (32, 32), (32, 32), (32, 32)]
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Hardswish(inplace=True)) for a, b in pairs))


def dropped():
    pairs = [(1, 32), (32, 32), (32, 32)]
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3), nn.ReLU(), nn.Dropout(0.5)) for a, b in pairs))


def statistics():
    """Running statistics of every kind."""
    norms = [nn.BatchNorm2d(32), nn.BatchNorm2d(32, momentum=None), nn.InstanceNorm2d(32, track_running_stats=True)]
    layers = [nn.Sequential(nn.Conv2d(a, 32, 3), norm, nn.ReLU()) for a, norm in zip((1, 32, 32), norms, strict=True)]
    layers[0][1].requires_grad_(False)
    return nn.Sequential(*layers)


def transformer():
    layer = dict(d_model=32, nhead=2, dim_feedforward=64, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Embedding(50, 32), *(nn.TransformerEncoderLayer(**layer) for _ in range(3)))


class Own(nn.Module):
    """Keeps the mean of what it sees, in one of the ways in which buffers are changed."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        for name in ("mean", "variance"):
            self.register_buffer(name, torch.zeros(32))
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x):
        mean = x.detach().mean((0, 2, 3))
        if self.way == "assigned":
            self.mean = 0.9 * self.mean + mean
        elif self.way == "data":
            self.mean.data.mul_(0.9).add_(mean)
        elif self.way == "in place":
            self.mean.mul_(0.9).add_(mean)
        else:
            x = nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)
        return x * self.scale


def own():
    ways = ("assigned", "data", "in place", "kernel")
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1 if k == 0 else 32, 32, 3, padding=1), Own(way)) for k, way in enumerate(ways))
    )


class Scaled(nn.Module):
    """Changes a product in place by an operation that returns nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        h = self.layer(x)
        torch._foreach_mul_([h], 2.0)
        return h.tanh()


def dropped_in_place():
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.5, inplace=True), nn.ReLU()) for _ in range(3))
    )


CASES = {
    "own statistics": (own, {"input_shape": (1, 8, 8), "granularity": "layer"}),
    "foreach": (lambda: nn.Sequential(*(Scaled() for _ in range(3))), {"input_shape": (256,), "granularity": "layer"}),
    "dropout in place": (dropped_in_place, {"input_shape": (256,), "granularity": "layer"}),
    "thin": (small_net, {"input_shape": (1, 8, 8)}),
    "wide": (wide, {"input_shape": (1, 8, 8)}),
    "layers": (wide, {"input_shape": (1, 8, 8), "granularity": "layer"}),
    "in place": (in_place, {"input_shape": (1, 8, 8), "granularity": "layer"}),
    "dropout": (dropped, {"input_shape": (1, 12, 12), "granularity": "layer"}),
    "statistics": (statistics, {"input_shape": (1, 12, 12), "granularity": "layer"}),
    "stem": (lambda: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), pooled()), {"input_shape": (1, 32, 32)}),
    "transformer": (transformer, {"input_shape": (8,), "vocabulary": 50}),
    "norm none": (wide, {"input_shape": (1, 8, 8), "norm": "none"}),
    "norm length": (wide, {"input_shape": (1, 8, 8), "norm": "length"}),
    "mobile": (lambda: build_backbone("mobilenet_v3_small", 10, (3, 32, 32)), {"input_shape": (3, 32, 32)}),
}


def both(name, **arguments):
    network, of_case = CASES[name]
    torch.manual_seed(0)
    one = LocalNet(network(), 10, recompute=True, **{"reach": 2, **of_case, **arguments})
    two = copy.deepcopy(one)
    two.recompute = False
    return one, two


def batch(net, size=6):
    shape = net.input_shape
    x = torch.randint(50, (size, *shape)) if net.inputs.tokens else torch.randn(size, *shape)
    return x, torch.arange(size) % 10


def learn(net, x, y):
    net.zero_grad()
    torch.manual_seed(1)
    losses = []
    for update in net.updates(x, y):
        losses += update.values
        update.loss.backward()
    return torch.stack(losses)


def assert_equal(one, two, exact=True):
    same = torch.equal if exact else partial(torch.allclose, atol=1e-6)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and not same(p.grad, q.grad):
            pytest.fail(f"the gradients of {name} differ by {(p.grad - q.grad).abs().max()}")
    for (name, b), c in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("reach", [2, 3, 0.6, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_statistics_are_the_same(name, reach):
    if reach == 3 and name == "transformer":
        reach = 4
    one, two = both(name, reach=reach, own_loss=0.3)
    x, y = batch(one)
    for _ in range(3):
        assert torch.equal(learn(one, x, y), learn(two, x, y))
        assert_equal(one, two, exact=name != "norm length")  # its kernel is another one where gradients are recorded


@pytest.mark.parametrize("name", ["wide", "mobile", "transformer"])
def test_in_mixed_precision(name):
    one, two = both(name, reach=1.0)
    x, y = batch(one)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learn(one, x, y), learn(two, x, y))
    assert_equal(one, two)


def test_forward_twice_before_backward():
    """The second time, autocast has the weights in its cache."""
    one, two = both("wide", reach=1.0)
    x, y = batch(one)
    for net in (one, two):
        with torch.autocast("cpu", torch.bfloat16):
            net.goodness(x)
            updates = [*net.updates(x, y), *net.updates(x, y)]
        for update in updates:
            update.loss.backward()
    assert_equal(one, two)


def test_backward_twice_where_nothing_is_kept():
    one, two = both("thin", reach=1.0)
    x, y = batch(one)
    for net in (one, two):
        (update,) = net.updates(x, y)
        update.loss.backward(retain_graph=True)
        update.loss.backward()
    assert_equal(one, two)
    (update,) = both("wide", reach=1.0)[0].updates(x, y)
    update.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        update.loss.backward()


def test_hooks_on_saved_tensors_see_them():
    one, _ = both("wide", reach=1.0)
    with torch.autograd.graph.save_on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(one, *batch(one))


def test_a_head_with_a_dropout_in_place_changes_no_other_block():
    def head(channels, classes):
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        return nn.Sequential(nn.Dropout(0.5, inplace=True), *pooled)

    one, two = both("wide", reach=1.0, head=head)
    x, y = batch(one)
    for net in (one, two):
        learn(net, x, y)
    assert_equal(one, two)


def test_the_loss_for_any_loop_is_the_same():
    one, two = both("wide")
    x, y = batch(one)
    for net in (one, two):
        net.loss(x, y).backward()
    assert_equal(one, two)


def test_two_inputs():
    example = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    torch.manual_seed(0)
    one = LocalNet(TwoInputs(), 10, "layer", example=example, reach=1.0, recompute=True)
    two = copy.deepcopy(one)
    two.recompute = False
    for net in (one, two):
        learn(net, example, torch.arange(4))
    assert_equal(one, two)


def test_blocks_that_are_held_and_appended():
    one, two = both("wide", reach=1.0)
    for net in (one, two):
        torch.manual_seed(2)
        net.append("more", nn.Sequential(Residual(32), Residual(32)))
        net.train_only([1, 2, 4, 5, 6])
    x, y = batch(one)
    for net in (one, two):
        learn(net, x, y)
    assert_equal(one, two)


@pytest.mark.parametrize("name", ["wide", "mobile", "in place", "stem"])
def test_what_is_there_before_backward_is_what_was_counted(name):
    one, _ = both(name, reach=1.0)
    x, y = batch(one, 64)
    whole, kept, last = of_backprop(one, x), one.windows.kept, len(one.blocks) - 1
    learn(one, x, y)  # gradients are there
    with Alive() as alive:
        for update in one.updates(x, y):
            found = alive.now
            update.loss.backward()
    counted = kept.inputs | kept.entered[0]
    for k in range(last + 1):
        counted |= kept.products[k] | kept.objectives[k] | (kept.handed[k] if k < last else {})
    found += x.nbytes - 64 * sum(kept.handed[last].values())  # what is handed on behind the last block
    assert found == pytest.approx(64 * sum(counted.values()), rel=0.02)
    assert found < 1.02 * kept.share(0, last) * whole


def test_windows_are_longer_within_the_same_memory():
    one, two = (
        LocalNet(build_backbone("resnet18", 10, (3, 64, 64)), 10, input_shape=(3, 64, 64), reach=0.4, recompute=switch)
        for switch in (True, False)
    )
    assert one.windows.longest > two.windows.longest
    for net in (one, two):
        assert max(max(net.windows.shares(ends)) for ends in net.windows.placements) <= 0.4
    assert all(any(k not in ends for ends in one.windows.placements) for k in range(8)), "every border is open at times"
    assert [one.windows.kept.share(k, k) for k in range(9)] == [two.windows.kept.share(k, k) for k in range(9)]
    pairs = ([net.windows.kept.share(k, k + 1) for k in range(8)] for net in (one, two))
    assert all(less < more for less, more in zip(*pairs, strict=True))


def test_a_compiled_network(make_trainer, digits):
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        models.append(
            SFF(
                *(wide(), 10, (1, 8, 8)), reach=2, recompute=True, compile=compiled, optimizer=torch.optim.SGD,
                lr_scheduler="constant", lr=0.01,
            )
        )  # fmt: skip
        torch.manual_seed(0)
        make_trainer(max_epochs=1, limit_train_batches=2).fit(models[-1], digits)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


class Bounded(nn.Module):
    """Sigmoids behind convolutions: compiled code writes them over the results of these."""

    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.act = nn.Sequential(self.layers[0], nn.Sigmoid())
        if how == "module":
            self.act.compile()
        self.function = torch.compile(self.act.forward) if how == "function" else self.act

    def forward(self, x):
        return x + self.layers[1](self.function(x)).sigmoid()


@pytest.mark.parametrize("how", ["blocks", "module", "function"])
def test_gradients_of_what_is_compiled(how):
    nets = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(*(Bounded(how) for _ in range(2)))
        nets.append(LocalNet(network, 10, input_shape=(32, 8, 8), reach=1.0, recompute=recompute))
        if how == "blocks":
            nets[-1].compile_blocks()
        torch.manual_seed(1)
        nets[-1].loss(torch.randn(6, 32, 8, 8), torch.arange(6)).backward()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)


def test_it_is_said_where_it_does_nothing():
    with pytest.warns(UserWarning, match="recompute=True has no effect: no window of reach=1 has two blocks"):
        LocalNet(small_net(), 10, input_shape=(1, 8, 8), recompute=True)
    with pytest.raises(ValueError, match="recompute='yes': must be True or False"):
        LocalNet(small_net(), 10, input_shape=(1, 8, 8), recompute="yes")
