"""Heads of the user's own."""

from typing import get_args

import pytest
import torch
from torch import nn

from ff_lightning import SFF, LocalNet
from ff_lightning.local.net import Norm


def net_with_heads(norm, reach, inplace):
    """Blocks whose output is not needed for their own backward, as an operation in place asks for."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(channels, 4, 3, padding=1) for channels in (1, 4, 4)))

    def head(channels, classes):
        return nn.Sequential(nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    return LocalNet(network, 10, "layer", head, norm, input_shape=(1, 8, 8), reach=reach)


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


# -------------------------------------------------------------------------------------------------- whole networks


def plain_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes(dtype):
    net = LocalNet(plain_network().to(dtype), 10, input_shape=(1, 8, 8))
    net.loss(torch.randn(4, 1, 8, 8, dtype=dtype), torch.arange(4)).backward()
    assert {p.grad.dtype for p in net.parameters()} == {dtype}


@pytest.mark.parametrize("size", [8, 16])
def test_traced_networks_take_batches_and_images_of_any_size(size):
    net = LocalNet(plain_network(), 10, input_shape=(1, 8, 8)).export()
    x = torch.randn(2, 1, size, size)
    traced = torch.jit.trace(net, x)
    more = torch.randn(3, 1, size, size)
    torch.testing.assert_close(traced(more), net(more))
    if size == 16:
        auto = torch.export.Dim.AUTO
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False).module()
        other = torch.randn(5, 1, 24, 24)
        torch.testing.assert_close(exported(other), net(other))


def test_a_model_can_be_pickled_and_keeps_the_users_network(tmp_path, make_trainer, digits):
    network = plain_network()
    network[0] = nn.utils.weight_norm(network[0])  # which cannot be copied
    model = SFF(network, num_classes=10, input_shape=(1, 8, 8))
    assert {*network.parameters()} <= {*model.parameters()}
    plain = SFF(plain_network(), num_classes=10, input_shape=(1, 8, 8))
    make_trainer(max_epochs=1).fit(plain, digits)
    plain.eval()
    torch.save(plain, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), plain(x))
