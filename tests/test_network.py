import copy

import pytest
import torch
from torch import nn

from ff_lightning import LocalNet
from ff_lightning.heads import GoodnessHead
from ff_lightning.local.updates import deliver
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import Residual, small_net

X, Y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])


def make(granularity="block", **arguments):
    torch.manual_seed(0)
    return LocalNet(small_net(), 10, granularity, input_shape=(1, 8, 8), **arguments)


def gradients(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same(one, two, exact=True):
    assert one.keys() == two.keys()
    for key in one:
        if one[key] is None or two[key] is None:
            assert one[key] is two[key], key
        elif exact:
            assert torch.equal(one[key], two[key]), key
        else:
            torch.testing.assert_close(one[key], two[key], msg=key)


@pytest.mark.parametrize("norm", ["layer", "channel", "length", "none"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_no_gradient_crosses_a_border(granularity, norm):
    net = make(granularity, norm=norm)
    for k, loss in enumerate(net.local_losses(X, Y)):
        net.zero_grad()
        loss.backward()
        own = {id(p) for p in net.block_parameters(k)}
        assert all((p.grad is not None) == (id(p) in own) for p in net.parameters())


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_backward_per_block_equals_backward_of_the_sum(granularity):
    one, two = make(granularity), make(granularity)
    for loss in one.local_losses(X, Y):
        loss.backward()
    sum(two.local_losses(X, Y)).backward()
    assert_same(gradients(one), gradients(two))


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_loss_delivers_the_local_gradients(granularity):
    one, two = make(granularity), make(granularity)
    losses = list(one.local_losses(X, Y))
    sum(losses).backward()
    total = two.loss(X, Y)
    assert all(p.grad is None for p in two.parameters()), "nothing is delivered before backward"
    total.backward()
    torch.testing.assert_close(total, sum(losses))
    assert_same(gradients(one), gradients(two))


def test_delivered_losses_can_be_weighted():
    one, two = make(), make()
    weights = torch.tensor([1.0, 0.5, 2.0])
    (torch.stack(list(one.local_losses(X, Y))) * weights).sum().backward()
    (two.delivered_losses(X, Y) * weights).sum().backward()
    assert_same(gradients(one), gradients(two), exact=False)


def test_windows_can_be_weighted_but_not_the_losses_within_one():
    one, two, three = (make(reach=2, moving_windows=False) for _ in range(3))
    (ends,) = one.windows.placements
    weights = torch.tensor([0.5 + sum(end < k for end in ends) for k in range(3)])
    assert weights.unique().numel() == len(ends) == 2
    for window, factor in zip(one.updates(X, Y), weights.unique(), strict=True):
        (window.loss * factor).backward()
    (two.delivered_losses(X, Y) * weights).sum().backward()
    assert_same(gradients(one), gradients(two), exact=False)
    with pytest.raises(ValueError, match=r"have the weights \[.*\]: those of one window .* need the same weight"):
        (three.delivered_losses(X, Y) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()


def test_parameters_with_one_gradient_each_get_it_once():
    class SumOfWeights(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.change = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.zeros(4, 1, 3, 3))

        def forward(self, x):
            return torch.conv2d(x, self.weight + self.change).relu()

    one = LocalNet(nn.Sequential(SumOfWeights(), nn.Conv2d(4, 4, 3)), 10, input_shape=(1, 8, 8))
    two = copy.deepcopy(one)
    for loss in one.local_losses(X, Y):
        (loss / 4).backward()
    (two.loss(X, Y) / 4).backward()
    assert_same(gradients(one), gradients(two), exact=False)


def test_step_per_block_equals_one_step_on_the_sum():
    one, two = make(), make()
    optimizers = [torch.optim.AdamW(one.block_parameters(k), lr=0.01) for k in range(3)]
    for _ in range(3):
        for optimizer, loss in zip(optimizers, one.local_losses(X, Y), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    together = torch.optim.AdamW(two.parameters(), lr=0.01)
    for _ in range(3):
        together.zero_grad()
        two.loss(X, Y).backward()
        together.step()
    assert_same(one.state_dict(), two.state_dict())


def naive_reach(net, number):
    """Losses of the `number`-th pass of a network of three blocks with norm "layer"; gradients go to its weights."""
    losses, joined, state = [], 0, X
    for k, (block, head) in enumerate(zip(net.blocks, net.heads, strict=True)):
        out = block(state)
        losses.append(net.objectives[k].criterion(head(out), Y))
        joined = joined + losses[-1]
        state = nn.functional.layer_norm(out, out.shape[1:])
        if (k + 1 + number) % net.reach == 0 or k == 2:
            joined.backward()
            joined, state = 0, state.detach()
    return torch.stack(losses).detach()


@pytest.mark.parametrize("how", ["local_losses", "loss"])
@pytest.mark.parametrize("reach", [2, 3])
def test_losses_of_a_longer_reach_equal_moving_borders(reach, how):
    one, two = make(reach=reach), make(reach=reach)
    for number in range(reach + 1):
        one.zero_grad()
        two.zero_grad()
        if how == "loss":
            losses = one.delivered_losses(X, Y)
            losses.sum().backward()
        else:
            losses = []
            for loss in one.local_losses(X, Y):
                losses.append(loss.detach())
                if loss.requires_grad:
                    loss.backward()
            losses = torch.stack(losses)
        torch.testing.assert_close(losses.detach(), naive_reach(two, number))
        assert_same(gradients(one), gradients(two), exact=False)


def test_a_longer_reach_ends_at_blocks_that_are_not_trained():
    one, two = make(reach=3), make()
    for net in (one, two):
        net.train_only([0, 2])
        net.loss(X, Y).backward()
    assert_same(gradients(one), gradients(two))


@pytest.mark.parametrize(("reach", "trained"), [(1, [1, 2]), (2, None), (3, None), (3, [0, 2])])
def test_blocks_may_share_a_head(reach, trained):
    shared = GoodnessHead(4, 10)
    model = nn.Sequential(*(Residual(4) for _ in range(3)))
    one = LocalNet(model, 10, head=lambda channels, classes: shared, input_shape=(4, 8, 8), reach=reach)
    two = copy.deepcopy(one)
    x = torch.randn(6, 4, 8, 8)
    for net in (one, two):
        net.train_only(trained)
    for loss in one.local_losses(x, Y):
        if loss.requires_grad:
            loss.backward()
    delivered = deliver(two.updates(x, Y), [two.block_parameters(k) for k in range(3)])
    delivered.losses.sum().backward()
    assert_same(gradients(one), gradients(two), exact=False)
    assert not {*two.heads.parameters()} & delivered.without_gradient


def test_a_unit_may_name_a_parameter_twice():
    one = make()
    two = copy.deepcopy(one)
    one.loss(X, Y).backward()
    delivered = deliver(two.updates(X, Y), [2 * two.block_parameters(k) for k in range(len(two.blocks))])
    delivered.losses.sum().backward()
    assert_same(gradients(one), gradients(two))


def test_every_border_is_open_at_times():
    net = make(reach=2)
    crossed = set()
    for _ in range(2):
        for k, loss in enumerate(net.local_losses(X, Y)):
            net.zero_grad()
            if loss.requires_grad:
                loss.backward()
                reached = [j for j in range(k + 1) if next(net.blocks[j].parameters()).grad is not None]
                crossed |= {*reached} - {k}
    assert crossed == {0, 1}


def test_a_gradient_cannot_be_delivered_twice():
    loss = make().loss(X, Y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already delivered"):
        loss.backward()


def peak_saved_bytes(step, net):
    """Most bytes that were kept for a backward at any one time."""
    with saved_for_backward(left_out=net.parameters()) as saved:
        step(net)
    return saved.peak


def deep_net(blocks, **arguments):
    torch.manual_seed(0)
    return LocalNet(nn.Sequential(*(Residual(4) for _ in range(blocks))), 10, input_shape=(4, 16, 16), **arguments)


@pytest.mark.parametrize("how", ["local_losses", "loss"])
def test_memory_does_not_grow_with_the_number_of_blocks(how):
    x, y = torch.randn(8, 4, 16, 16), torch.arange(8)

    def step(net):
        if how == "loss":
            net.loss(x, y).backward()
        else:
            for loss in net.local_losses(x, y):
                if loss.requires_grad:
                    loss.backward()

    small, large, whole = deep_net(2), deep_net(8), deep_net(8)
    few, many = peak_saved_bytes(step, small), peak_saved_bytes(step, large)
    together = peak_saved_bytes(lambda net: sum(net.local_losses(x, y)).backward(), whole)
    assert many <= 1.1 * few
    assert together > 3 * many, "the measure sees a graph that is kept"
    longer = deep_net(8, reach=2)
    assert 1.5 * many < max(peak_saved_bytes(step, longer) for _ in range(2)) < 2.1 * many


def test_without_gradients_there_is_no_graph():
    net = make().eval()
    with torch.no_grad():
        assert not net.loss(X, Y).requires_grad
        assert not net.goodness(X).requires_grad


def test_forward_is_the_vote_over_the_goodness():
    net = make(vote="last").eval()
    goodness = net.goodness(X)
    assert goodness.shape == (3, 6, 10)
    assert torch.equal(net(X), goodness[-1])
    net.vote = "mean"
    torch.testing.assert_close(net(X), goodness.mean(0))


@pytest.mark.parametrize(("norm", "dims"), [("layer", (1, 2, 3)), ("channel", (1,)), ("length", (1, 2, 3))])
def test_norm_equals_its_formula(norm, dims):
    h, normalised = (next(make(norm=kind).local_features(X)) for kind in ("none", norm))
    mean = 0 if norm == "length" else h.mean(dims, keepdim=True)
    scale = (h - mean).square().mean(dims, keepdim=True).sqrt()
    seen = (scale > 0.01).expand_as(h)  # below, the epsilon of the norm counts
    torch.testing.assert_close(normalised[seen], ((h - mean) / scale)[seen], atol=0, rtol=0.06)
    assert seen.float().mean() > 0.9


def test_training_the_net_trains_the_model_it_was_made_of():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    net = LocalNet(model, 10, input_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.loss(X, Y).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"0.weight", "2.conv1.weight", "3.conv2.bias"} <= changed
    assert not any(key.startswith("6") for key in changed), "the classifier takes no part"


def test_a_frozen_block_is_left_alone():
    net = make()
    net.blocks[1].requires_grad_(False)
    net.heads[1].requires_grad_(False)
    net.loss(X, Y).backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in net.parameters())


def test_a_gradient_scaler_scales_the_local_backward_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    one, two = make(), make()
    inside: list[torch.Tensor] = []
    for net in (one, two):
        net.heads[0].features.register_full_backward_hook(lambda module, inputs, outputs: inside.append(outputs[0]))
    one.loss(X, Y).backward()
    loss = two.loss(X, Y, scaler)
    torch.testing.assert_close(inside[1], inside[0] * 2.0**10)
    scaler.scale(loss).backward()
    scaled = {name: None if p.grad is None else p.grad / 2.0**10 for name, p in two.named_parameters()}
    assert_same(gradients(one), scaled, exact=False)


def test_a_network_with_a_single_block_warns():
    with pytest.warns(UserWarning, match="is a single block with granularity='block'"):
        LocalNet(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), 10, input_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is not known.*'layer'"),
        ({"vote": "means"}, "vote='means'.*did you mean 'mean'"),
        ({"head": "papr"}, "head='papr'.*did you mean 'paper'"),
        ({"granularity": "blocks"}, "granularity='blocks'.*did you mean 'block'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_num_classes_must_be_two_or_more():
    with pytest.raises(ValueError, match="num_classes=1"):
        LocalNet(small_net(), 1, input_shape=(1, 8, 8))


@pytest.mark.parametrize(("labels", "wrong"), [([0, 10], 10), ([-1, 3], -1)])
def test_labels_out_of_range_are_named(labels, wrong):
    with pytest.raises(ValueError, match=rf"label {wrong} in the batch: num_classes=10 allows 0 to 9"):
        make().loss(X[:2], torch.tensor(labels))


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\): the network was built for \(1, 8, 8\)"):
        make()(torch.randn(2, 3, 8, 8))


def test_one_sample_with_batch_norm_names_the_block():
    net = LocalNet(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 6), nn.BatchNorm2d(4), nn.ReLU()),
        10,
        input_shape=(1, 8, 8),
        head=lambda channels, classes: GoodnessHead(channels, classes, depth=0),
    )
    with pytest.raises(ValueError, match=r"block 1 \(2\), batch of 1: Expected more than 1 value per channel"):
        net.loss(X[:1], Y[:1])
