"""Windows of several blocks: where they lie, what they keep, and what a block learns from inside of one."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from ff_lightning import SFF, LocalNet
from ff_lightning.backbones import build_backbone
from ff_lightning.callbacks import BlockTable, GreedyBlocks
from ff_lightning.callbacks.table import kept_per_image
from ff_lightning.heads import GoodnessHead
from ff_lightning.local.objectives import Objective
from ff_lightning.local.windows import Windows
from ff_lightning.losses import NextTokenLoss
from ff_lightning.partition.channelwise import all_kept
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import Residual, small_net

X, Y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])


def make(network=None, **arguments):
    torch.manual_seed(0)
    arguments = {"input_shape": (1, 8, 8), **arguments}
    return LocalNet(network or small_net(), 10, **arguments)


def deep(blocks=6, **arguments):
    torch.manual_seed(0)
    return make(nn.Sequential(*(Residual(4) for _ in range(blocks))), input_shape=(4, 8, 8), **arguments)


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same(one, two, exact=False):
    for a, b in zip(one, two, strict=True):
        if a is None or b is None:
            assert a is b
        elif exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def naive(net, x, y, ends, own_loss):
    """Losses of a pass with norm "layer" and windows that end at some blocks; gradients go to the weights."""
    losses, window, state = [], [], x
    for k, block in enumerate(net.blocks):
        out = block(state)
        losses.append(net.objectives[k].criterion(net.heads[k](out), y))
        window.append(losses[-1])
        state = nn.functional.layer_norm(out, out.shape[1:])
        if k in ends:
            weighted = ((own_loss ** (len(window) - 1 - i), loss) for i, loss in enumerate(window))
            sum(weight * loss for weight, loss in weighted if weight).backward()
            window, state = [], state.detach()
    return torch.stack(losses).detach()


def learn(net, x, y, how):
    """Losses of a pass, in one of the ways to train; gradients go to the weights."""
    if how == "loss":
        losses = net.delivered_losses(x, y)
        losses.sum().backward()
        return losses.detach()
    losses = []
    if how == "updates":
        for update in net.updates(x, y):
            losses += update.values
            update.loss.backward()
    else:
        for loss in net.local_losses(x, y):
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.backward()
    return torch.stack(losses)


def peak(net, x, y):
    """Bytes kept at once in a pass, at most."""
    with saved_for_backward(left_out=net.parameters()) as saved:
        learn(net, x, y, "updates")
    return saved.peak


def of_backprop(net, x):
    """Bytes that the blocks keep in an ordinary pass, and ordinary stems."""
    with all_kept(), saved_for_backward(left_out=net.parameters()) as saved:
        for block in net.blocks:
            x = block(x)
    return saved.peak


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 7])
def test_windows_of_some_blocks_lie_where_they_always_did(reach):
    for blocks in range(reach, 12):
        windows = Windows(reach, [""] * blocks, None, 1.0)
        for number in range(2 * reach):
            ends = {k for k in range(blocks) if (k + 1 + number) % reach == 0} | {blocks - 1}
            assert windows.borders(number, range(blocks)) == ends


@pytest.mark.parametrize("how", ["updates", "local_losses", "loss"])
def test_windows_of_one_block_are_blocks_by_themselves(how):
    with pytest.warns(UserWarning, match=r"reach=0.1: block \d .* by itself keeps 0\.\d+ of what backprop keeps"):
        one = deep(reach=0.1)
    assert one.windows.placements == [(0, 1, 2, 3, 4, 5)]
    two, x = deep(), torch.randn(6, 4, 8, 8)
    for net in (one, two):
        net.losses = learn(net, x, Y, how)
    assert torch.equal(one.losses, two.losses)
    assert_same(gradients(one), gradients(two), exact=True)


@pytest.mark.parametrize("how", ["updates", "local_losses", "loss"])
@pytest.mark.parametrize(
    ("reach", "own_loss"), [(1.0, 1.0), (1.0, 0.3), (0.95, 0.3), (2, 0.5), (3, 0.3), pytest.param(3, 0, id="3-last")]
)
def test_gradients_of_windows_equal_a_naive_loop(reach, own_loss, how):
    one, two = make(reach=reach, own_loss=own_loss), make()
    assert len(one.windows.placements) == {1.0: 1, 0.95: 2}.get(reach, reach)
    for number in range(4):
        one.zero_grad()
        two.zero_grad()
        ends = one.windows.borders(number, range(3))
        assert reach != 1.0 or ends == {2}, "one window over all: backprop with deep supervision"
        torch.testing.assert_close(learn(one, X, Y, how), naive(two, X, Y, ends, own_loss))
        assert_same(gradients(one), [None if p.grad is None else p.grad for p in two.parameters()])


@pytest.mark.parametrize(("reach", "ends"), [(2, {1, 3, 5}), (4, {2, 5}), (0.6, None)])
def test_windows_that_do_not_move_are_the_fewest_of_all_placements(reach, ends):
    moving, one, two = deep(reach=reach), deep(reach=reach, moving_windows=False, own_loss=0.3), deep()
    placement = one.windows.borders(0, range(6))
    every = [moving.windows.borders(number, range(6)) for number in range(12)]
    assert placement in every
    assert len(placement) == min(map(len, every))
    assert ends is None or placement == ends, "two windows of equal length keep least"
    x = torch.randn(6, 4, 8, 8)
    for number in range(3):
        assert one.windows.borders(number, range(6)) == placement
        one.zero_grad(), two.zero_grad()
        torch.testing.assert_close(learn(one, x, Y, "updates"), naive(two, x, Y, placement, 0.3))
        assert_same(gradients(one), gradients(two))


@pytest.mark.parametrize(
    ("trained", "windows"),
    [([1, 2], [(1, 2)]), ([1, 2, 3, 4], [(1, 2), (3, 4)]), ([0, 2, 3, 5], [(0, 0), (2, 3), (5, 5)])],
)
def test_windows_that_do_not_move_are_the_fewest_of_the_trained_blocks(trained, windows):
    net = deep(reach=2, moving_windows=False)
    net.train_only(trained)
    assert net.windows.run(net.trained) == [windows]
    units = [update.units for update in net.updates(torch.randn(6, 4, 8, 8), Y)]
    assert units == [tuple(range(first, last + 1)) for first, last in windows]


def test_appended_blocks_have_windows_that_stay():
    net = deep(5, reach=2, moving_windows=False)
    added = net.append("more", nn.Sequential(*(Residual(4) for _ in range(2))))
    net.train_only(added)
    assert net.windows.run(net.trained) == [[(5, 6)]]


def test_bad_moving_windows():
    with pytest.raises(ValueError, match="moving_windows=3"):
        make(reach=2, moving_windows=3)
    with pytest.warns(UserWarning, match=r"moving_windows=False has no effect: no window of reach=1 has two blocks"):
        make(moving_windows=False)


class Halting(GoodnessHead):
    """A head that sends no gradient to its block, by a hook or by a detached input."""

    how = None

    def forward(self, features):
        if self.how == "hook":
            features.register_hook(torch.zeros_like)
        return super().forward(features.detach() if self.how == "detached" else features)


@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_of_a_head_do_not_reach_the_next_block(recompute):
    nets = {how: make(reach=1.0, head=Halting, recompute=recompute) for how in ("hook", "detached")}
    for how, net in nets.items():
        net.heads[0].how = net.heads[1].how = how
        net.loss(X, Y).backward()
    one, two = map(gradients, nets.values())
    assert_same(one, two)
    assert one[0].any(), "the last loss reaches the first block"


@pytest.mark.filterwarnings("ignore:reach=")
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_every_border_that_may_be_is_open_at_times_and_no_window_keeps_too_much(norm):
    net = make(build_backbone("resnet18", 10, (3, 32, 32), "small"), input_shape=(3, 32, 32), norm=norm, reach=2)
    kept, blocks = net.windows.kept, len(net.blocks)
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        windows = Windows(share, [""] * blocks, kept, 1.0)
        limit = max(share, *(kept.share(k, k) for k in range(blocks)))
        assert max(max(windows.shares(ends)) for ends in windows.placements) <= limit
        for k in range(blocks - 1):
            is_open = [k not in ends for ends in windows.placements]
            assert any(is_open) == (kept.share(k, k + 1) <= limit)
            assert not all(is_open)


def pooled() -> nn.Module:
    """Chains of norm, activation and pooling, which are redone by groups of channels."""
    pairs = pairwise([16, 16, 32, 32])
    parts = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)) for a, b in pairs]
    return nn.Sequential(*(nn.Sequential(*part) for part in parts))


@pytest.mark.filterwarnings("ignore:reach=")
@pytest.mark.parametrize("network", [small_net, lambda: nn.Sequential(*(Residual(16) for _ in range(5))), pooled])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_what_is_kept_stays_below_the_share_of_backprop(network, share):
    shape = {small_net: (1, 32, 32), pooled: (16, 32, 32)}.get(network, (16, 8, 8))
    net = make(network(), input_shape=shape, reach=share)
    x, y = torch.randn(32, *shape), torch.arange(32) % 10
    whole = of_backprop(net, x)
    found = [peak(net, x, y) / whole for _ in net.windows.placements]
    counted = [max(net.windows.shares(ends)) for ends in net.windows.placements]
    assert found == pytest.approx(counted, rel=0.02)
    assert max(found) <= 1.01 * max(share, *(net.windows.kept.share(k, k) for k in range(len(net.blocks))))


class TwoConvolutions(Objective):
    """A loss that keeps more than its scores do."""

    def __init__(self, place):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(place.shape[0], place.shape[0], 3, padding=1) for _ in range(2)))

    def loss(self, features, target):
        return self.layers(features).square().mean()

    def forward(self, features):
        return features.mean((2, 3))[:, :10]


@pytest.mark.parametrize("loss", ["similarity", "predsim", "supcon", TwoConvolutions, nn.BCEWithLogitsLoss])
def test_what_a_loss_keeps_counts(loss):
    net = make(nn.Sequential(*(Residual(16) for _ in range(5))), input_shape=(16, 16, 16), reach=0.7, loss=loss)
    x, y = torch.randn(16, 16, 16, 16), torch.arange(16) % 10
    whole = of_backprop(net, x)
    for ends in net.windows.placements:
        found = peak(net, x, y if loss is not nn.BCEWithLogitsLoss else torch.zeros(16, 10)) / whole
        assert found == pytest.approx(max(net.windows.shares(ends)), rel=0.02)
        assert found <= 0.71


@pytest.mark.filterwarnings("ignore:reach=")
def test_what_the_loss_of_tokens_keeps_counts():
    layers = (nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4))
    network = nn.Sequential(nn.Embedding(50, 16), *layers)
    net = make(network, input_shape=(24,), vocabulary=50, head="tokens", loss=NextTokenLoss, reach=0.9)
    ids = torch.randint(10, (32, 24))
    whole = of_backprop(net, ids)
    for ends in net.windows.placements:
        assert peak(net, ids, ids) / whole == pytest.approx(max(net.windows.shares(ends)), rel=0.03)


class TwoInputs(nn.Module):
    """The second input enters a later layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3)
        self.last = nn.Sequential(
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )

    def forward(self, x, z):
        x = self.first(x).relu()
        return self.last(self.third(x + self.second(z).relu()).relu())


@pytest.mark.filterwarnings("ignore:reach=")
@pytest.mark.parametrize("reach", [0.6, 0.8, 0.95])
def test_every_input_of_the_batch_counts(reach):
    example = torch.randn(256, 1, 16, 16), torch.randn(256, 1, 16, 16)
    torch.manual_seed(0)
    net = LocalNet(TwoInputs(), 10, "layer", example=example, reach=reach)
    y = torch.arange(256) % 10
    with all_kept(), saved_for_backward(left_out=net.parameters()) as saved:
        state = example
        for block in net.blocks:
            state = block(state)
    for ends in net.windows.placements:
        found = peak(net, example, y) / saved.peak
        assert found == pytest.approx(max(net.windows.shares(ends)), rel=0.02)


def test_counting_leaves_no_trace():
    """Neither in random numbers, nor in what a loss remembers."""

    class Remembering(TwoConvolutions):
        def __init__(self, place):
            super().__init__(place)
            self.register_buffer("seen", torch.zeros(()))

        def loss(self, features, target):
            self.seen += 1
            return super().loss(features + torch.rand_like(features), target)

    net = deep(3, loss=Remembering)
    state = torch.get_rng_state()
    net.kept()
    assert torch.equal(state, torch.get_rng_state())
    assert not net.objectives[0].seen


def test_a_compiled_network_is_counted_as_it_is():
    one, two = make(), make()
    two.compile_blocks()
    assert kept_per_image(one) == kept_per_image(two)


NETWORKS = [
    "swin_t",
    "resnet18",
    "resnet50",
    "mobilenet_v3_small",
    "densenet121",
    "convnext_tiny",
    "efficientnet_b0",
    "vgg11_bn",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reach=")
@pytest.mark.parametrize("name", NETWORKS)
def test_what_real_networks_keep_stays_below_the_share_of_backprop(name):
    side = 64
    net = make(build_backbone(name, 10, (3, side, side)), input_shape=(3, side, side), reach=0.4)
    x, y = torch.randn(4, 3, side, side), torch.arange(4)
    whole = of_backprop(net, x)
    limit = max(0.4, *(net.windows.kept.share(k, k) for k in range(len(net.blocks))))
    places = range(0, len(net.windows.placements), 1 + len(net.windows.placements) // 4)
    for net.passes in places:
        assert peak(net, x, y) / whole <= 1.01 * limit
    assert net.windows.longest > 1


def test_an_own_loss_that_says_nothing_is_told():
    with pytest.warns(UserWarning, match="own_loss=0.3 has no effect: no window of reach=1 has two blocks"):
        make(own_loss=0.3)
    with pytest.warns(UserWarning, match=r"own_loss=0.0: the heads of blocks \[0, 1\] never learn"):
        make(reach=1.0, own_loss=0).loss(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(reach=3, own_loss=0).loss(X, Y)
        net = make(reach=1.0, own_loss=0)
        net.train_only([0])  # whose window ends with it
        net.loss(X, Y)


def test_the_heads_of_losses_without_weight_stay():
    net = make(reach=1.0, own_loss=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    before = [[p.clone() for p in head.parameters()] for head in net.heads]
    with pytest.warns(UserWarning, match="never learn"):
        net.loss(X, Y).backward()
    optimizer.step()
    same = [all(map(torch.equal, old, head.parameters())) for old, head in zip(before, net.heads, strict=True)]
    assert same == [True, True, False]


def test_windows_end_at_blocks_that_are_not_trained():
    one, two = make(reach=1.0, own_loss=0.3), make()
    for net in (one, two):
        net.train_only([0, 2])
        net.loss(X, Y).backward()
    assert_same(gradients(one), gradients(two), exact=True)


def test_appended_blocks_are_in_windows_too():
    net = deep(3, reach=0.7)
    net.append("more", nn.Sequential(*(Residual(4) for _ in range(3))))
    windows, whole = net.windows, deep(6, reach=0.7).windows
    assert windows.placements == whole.placements
    assert windows.longest == 2
    net.train_only([4, 5])
    learn(net, torch.randn(6, 4, 8, 8), Y, "updates")
    assert all((p.grad is not None) == (k >= 4) for k in range(6) for p in net.block_parameters(k))


def test_blocks_in_windows_may_share_a_head():
    shared = GoodnessHead(4, 10)
    one = deep(4, head=lambda channels, classes: shared, reach=0.8, own_loss=0.3)
    two, x = copy.deepcopy(one), torch.randn(6, 4, 8, 8)
    assert one.windows.longest > 1
    for how, net in (("updates", one), ("loss", two)):
        learn(net, x, Y, how)
    assert_same(gradients(one), gradients(two))


def test_blocks_in_their_turn_are_windows_by_themselves(make_trainer, digits):
    models = [SFF(small_net(), 10, (1, 8, 8), **arguments) for arguments in ({}, {"reach": 1.0, "own_loss": 0.3})]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        torch.manual_seed(0)
        make_trainer(max_epochs=3, callbacks=[GreedyBlocks(1)]).fit(model, digits)
    assert_same(models[0].net.parameters(), models[1].net.parameters(), exact=True)


def test_the_table_shows_windows_and_what_they_keep(make_trainer, digits, capsys):
    model = SFF("cnn", 10, (1, 8, 8), reach=0.95)
    make_trainer(max_epochs=1, callbacks=[BlockTable()]).fit(model, digits)
    printed = capsys.readouterr().out
    assert "windows of reach=0.95" in printed
    for ends in model.net.windows.placements:
        most = max(model.net.windows.shares(ends))
        assert f"{most:.2f}" in printed
    assert "0-1: " in printed
    assert "1-2: " in printed


def test_the_table_shows_no_windows_of_blocks_that_are_held(make_trainer, digits, capsys):
    model = SFF("cnn", 10, (1, 8, 8), reach=1.0, train_blocks=[1, 2])
    make_trainer(max_epochs=1, callbacks=[BlockTable()]).fit(model, digits)
    printed = capsys.readouterr().out
    share = model.net.windows.kept.share(1, 2)
    assert f" 1-2: {share:.2f} " in printed
    assert "0-2" not in printed
    assert " 0: " not in printed
    assert f"{share * kept_per_image(model.net)[1] / 1024:,.0f} KiB" in printed


@pytest.mark.parametrize("reach", [1, 2, 1.0])
@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_what_is_frozen_as_a_whole_rests(reach, optimization, make_trainer, digits):
    torch.manual_seed(0)
    model = SFF(small_net(), 10, (1, 8, 8), reach=reach, optimization=optimization)
    for module in (model.net.blocks[0], model.net.objectives[0]):
        module.requires_grad_(False)
    before = copy.deepcopy(model.net)
    make_trainer(max_epochs=1, limit_train_batches=4).fit(model, digits)
    for k in range(len(model.net.blocks)):
        for module in ("blocks", "objectives"):
            pairs = zip(*(getattr(net, module)[k].parameters() for net in (before, model.net)), strict=True)
            assert all(torch.equal(p, q) == (k == 0) for p, q in pairs)
