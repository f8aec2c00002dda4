"""Heads of the user's own."""

from typing import get_args

import pytest
import torch
from torch import nn

from ff_lightning import LocalNet
from ff_lightning.local.net import Norm


def net_with_heads(norm, reach, inplace):
    """Blocks whose output is not needed for their own backward, as an operation in place asks for."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(channels, 4, 3, padding=1) for channels in (1, 4, 4)))

    def head(channels, classes):
        return nn.Sequential(nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    return LocalNet(network, 10, "layer", head, norm, input_shape=(1, 8, 8), reach=reach)


@pytest.mark.xfail(strict=True, reason="the next block sees what the head has changed")
@pytest.mark.parametrize(("norm", "reach"), [("none", 1), *((norm, 2) for norm in get_args(Norm))])
def test_a_head_that_works_in_place_changes_nothing_but_its_own_input(norm, reach):
    plain, in_place = (net_with_heads(norm, reach, inplace) for inplace in (False, True))
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(in_place.goodness(x), plain.goodness(x))
    for _ in range(reach):  # each border is open in one of the passes
        for net in (plain, in_place):
            for loss in net.local_losses(x, y):
                if loss.requires_grad:
                    loss.backward()
    for (name, one), two in zip(plain.named_parameters(), in_place.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
