"""Norm, activation and pooling redone in backward: the same gradients, and less that is kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ff_lightning import LocalNet
from ff_lightning.partition.channelwise import all_kept, by_channels
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import small_net


def stem(activation=None, norm=None, pooling=None, channels=12):
    own = nn.BatchNorm2d(channels) if norm is None else norm
    return [own, activation or nn.ReLU(inplace=True), pooling or nn.MaxPool2d(3, 2, 1)]


def frozen(norm):
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(1, 2)
    return norm.eval()


MODULES = {
    "resnet": stem,
    "frozen": lambda: stem(norm=frozen(nn.BatchNorm2d(12))),
    "no affine": lambda: stem(norm=nn.BatchNorm2d(12, affine=False)),
    "no running statistics": lambda: stem(norm=nn.BatchNorm2d(12, track_running_stats=False)),
    "weights fixed": lambda: stem(norm=nn.BatchNorm2d(12).requires_grad_(False)),
    "vgg": lambda: [nn.ReLU(inplace=True), nn.MaxPool2d(2)],
    "other sizes": lambda: stem(
        nn.SiLU(), pooling=nn.MaxPool2d((3, 2), (2, 1), (1, 0), dilation=(1, 2), ceil_mode=True)
    ),
}


def gradients(modules, x, context):
    modules = nn.ModuleList(copy.deepcopy(modules))
    x = x.clone().requires_grad_()
    with context():
        out = by_channels(x * 1, *modules)
    (out.square() * torch.arange(out.numel()).view_as(out).remainder(7)).sum().backward()
    return [out, x.grad, *(p.grad for p in modules.parameters()), *modules.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_results_gradients_and_statistics_are_those_of_the_modules(make, layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 12, 15, 14, dtype=dtype).contiguous(memory_format=layout)
    modules = make()
    for here, plain in zip(gradients(modules, x, nullcontext), gradients(modules, x, all_kept), strict=True):
        if plain is None:
            assert here is None
        else:
            torch.testing.assert_close(here, plain, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}))


def test_maps_of_more_places_than_16_bits_count():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 200, 200)
    modules = stem()
    for here, plain in zip(gradients(modules, x, nullcontext), gradients(modules, x, all_kept), strict=True):
        torch.testing.assert_close(here, plain)


def test_only_the_first_input_and_small_places_are_kept():
    x = torch.randn(2, 16, 32, 32, requires_grad=True) * 1
    with saved_for_backward() as saved:
        out = by_channels(x, *stem(channels=16))
    assert saved.peak == x.nbytes + out.numel() * 2 + 2 * 16 * 4, "the map, places of 16 bits, weight and bias"


class Stemmed(nn.Sequential):
    def __init__(self):
        body = small_net(3)
        super().__init__(nn.Conv2d(3, 16, 7, 2, 3, bias=False), *stem(channels=16), nn.Conv2d(16, 3, 1), *body)


def test_a_network_learns_the_same_and_keeps_less():
    torch.manual_seed(0)
    net = LocalNet(Stemmed(), 10, "layer", input_shape=(3, 32, 32))
    assert "by_channels" in net.blocks[0].body.code
    keys = [key for key in Stemmed().state_dict() if not key.startswith("11.")]
    assert sorted(net.backbone_state_dict()) == sorted(keys), "the classifier aside, under their own names"
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = []
    for context in (nullcontext, all_kept):
        one = copy.deepcopy(net)
        with context(), saved_for_backward(one.parameters()) as saved:
            for update in one.updates(x, y):
                update.loss.backward()
                break
        found.append(([p.grad for p in one.blocks[0].parameters()], one.blocks[0].state_dict(), saved.peak))
    (own, state, kept), (plain, plain_state, all_of_it) = found
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(state, plain_state)
    assert kept < 0.7 * all_of_it, "the rest are images, what the head needs, and a map that is pooled"
    assert net.kept().backprop > sum(block.saved_bytes for block in net.blocks), "what backprop keeps is all of it"


def test_hooks_see_each_module_once():
    modules, seen = stem(), []
    for module in modules:
        module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    modules[1].register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    modules[1].inplace = False
    by_channels(torch.randn(2, 12, 8, 8, requires_grad=True), *modules).sum().backward()
    assert seen == ["BatchNorm2d", "ReLU", "MaxPool2d", "backward"]


def test_a_norm_that_was_replaced_is_run_as_it_is():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    x, modules = torch.randn(2, 12, 8, 8, requires_grad=True), stem(norm=Own(12))
    plain = nn.Sequential(*copy.deepcopy(modules))
    torch.testing.assert_close(by_channels(x, *modules), plain(x))
