"""Recurrent Forward-Forward: the settling against a plain loop, and what trains what."""

import pytest
import torch
from torch.nn import functional as F

from ff_lightning import RecurrentFF, views
from ff_lightning.local.recurrent import RecurrentNet

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def network(widths=(12, 8), **arguments):
    torch.manual_seed(0)
    return RecurrentNet(64, 10, widths, **arguments)


def unit(h):
    return h / h.square().mean(1, keepdim=True).sqrt()


def settle(net, x, labels, steps):
    """The states of a network of two layers after each step."""
    (up1, down1), (up2, down2) = ((layer.up, layer.down) for layer in net.layers)
    x = unit(x.flatten(1))
    h1 = up1(x).relu()
    h2 = up2(unit(h1)).relu()
    for _ in range(steps):
        new1 = (up1(x) + unit(h2) @ down1.weight.T).relu()
        new2 = (up2(unit(h1)) + unit(labels) @ down2.weight.T).relu()
        h1, h2 = 0.3 * h1 + 0.7 * new1, 0.3 * h2 + 0.7 * new2
        yield h1, h2


class TestNet:
    def test_losses_of_all_steps_are_those_of_the_paper(self):
        net = network(peer=0, theta=[0.5, 2.0], steps=4, window=(2, 3))
        x, y = torch.rand(6, 1, 8, 8) * 3 - 1, torch.arange(6)
        torch.manual_seed(1)
        found = [*net.local_losses(x, y)]
        torch.manual_seed(1)
        labels = F.one_hot(torch.cat([y, views.wrong_labels(y, 10)]), 10).float()
        for losses, states in zip(found, settle(net, torch.cat([x, x]), labels, 4), strict=True):
            for loss, h, threshold in zip(losses, states, (0.5 * 12, 2.0 * 8), strict=True):
                logit = h.square().sum(1) - threshold
                torch.testing.assert_close(loss, torch.cat([F.softplus(-logit[:6]), F.softplus(logit[6:])]).mean())

    def test_goodness_is_the_mean_over_the_window_for_each_label(self):
        net, x = network(steps=6, window=(2, 4)), torch.rand(5, 1, 8, 8)
        goodness = net.goodness(x)
        assert goodness.shape == (2, 5, 10)
        for label in range(10):
            states = [*settle(net, x, F.one_hot(torch.full((5,), label), 10).float(), 4)][1:]
            for k, width in enumerate((12, 8)):
                mean = torch.stack([of_step[k].square().sum(1) - width for of_step in states]).mean(0)
                torch.testing.assert_close(goodness[k, :, label], mean)

    def test_no_gradient_crosses_a_layer_or_a_step(self):
        net = network((12, 8, 12), steps=3, window=(1, 3))
        units = [[p for module in modules for p in module.parameters()] for modules in net.units().values()]
        assert {id(p) for own in units for p in own} == {id(p) for p in net.parameters()}
        alone = network((12, 8, 12), steps=3, window=(1, 3))
        for losses in net.local_losses(torch.rand(4, 1, 8, 8), torch.arange(4)):
            for k, loss in enumerate(losses):
                for other, own in enumerate(units):
                    found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
                    assert all((gradient is not None) == (other == k) for gradient in found)
        states = alone.step([state.requires_grad_() for state in alone.start(torch.rand(2, 64))],
                            torch.rand(2, 12), torch.eye(10)[:2])  # fmt: skip
        assert torch.autograd.grad(sum(s.sum() for s in states), alone.layers[0].up.weight, allow_unused=True) == (
            None,
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"widths": (20,)}, r"widths=\(20,\): must be a list of the units of at least two layers"),
            ({"widths": (20, 0)}, "widths=0: must be at least 1"),
            ({"steps": 0}, "steps=0: must be at least 1"),
            ({"steps": 4}, r"window=\(3, 5\): must be the first and the last of some steps from 1 to 4"),
            ({"window": (0, 2)}, r"window=\(0, 2\)"),
            ({"window": (3, 2)}, r"window=\(3, 2\)"),
            ({"window": 3}, "window=3"),
            ({"damping": 1}, "damping=1: must be at least 0 and below 1"),
            ({"damping": -0.1}, "damping=-0.1"),
            ({"theta": [1.0]}, r"theta=\[1.0\]: must be 2"),
            ({"peer": -1}, "peer=-1"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            network(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimization": "automatic"}, "optimization='automatic': RecurrentFF takes a step after each of its 8 steps"),
        ({"accumulate": 2}, "accumulate=2: RecurrentFF takes a step after each"),
        ({"task": "MultiLabel"}, "task=MultiLabel: RecurrentFF tries the labels of classes"),
        ({"task": "Unlabelled"}, "task=Unlabelled: RecurrentFF tries the labels of classes"),
    ],
)
def test_what_cannot_work_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecurrentFF(**SHAPE, **arguments)


def test_probes_see_states_without_a_label():
    model, x = RecurrentFF([20, 30], **SHAPE), torch.rand(3, 1, 8, 8)
    features = model.representation(x)
    assert features.shape == (3, 50)
    first = model.net.layers[0].up(unit(x.flatten(1))).relu()
    torch.testing.assert_close(features[:, :20], unit(first))
    torch.testing.assert_close(features[:, 20:], unit(model.net.layers[1].up(unit(first)).relu()))
