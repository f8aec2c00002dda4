"""Norm, activation and pooling redone in backward: the same gradients, and less that is kept."""

import copy
import pickle
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
    "an identity before the activation": lambda: [nn.Identity(), nn.SiLU(inplace=True), nn.MaxPool2d(2)],
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


def test_a_copy_and_an_unpickled_network_keep_as_little():
    torch.manual_seed(0)
    block = LocalNet(Stemmed(), 10, "layer", input_shape=(3, 32, 32)).blocks[0]
    x, found = torch.randn(2, 3, 32, 32), []
    for other in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(block))))):
        other.zero_grad()
        with saved_for_backward() as saved:
            other(x).square().sum().backward()
        found.append((saved.peak, *(p.grad for p in other.parameters())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def changed_norm(modules):
    modules[0].forward = lambda x: nn.BatchNorm2d.forward(modules[0], x) * x
    return modules


CHANGED = {
    "no pooling": lambda: [*stem()[:2], nn.Identity()],
    "another pooling": lambda: stem(pooling=nn.AvgPool2d(2)),
    "no norm": lambda: stem(norm=nn.Identity()),
    "two norms": lambda: stem(activation=nn.BatchNorm2d(12)),
    "its own forward": lambda: changed_norm(stem()),
}


@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_modules_that_were_replaced_are_run_as_they_are(make):
    torch.manual_seed(0)
    x, modules = torch.randn(2, 12, 8, 8, requires_grad=True), make()
    out = by_channels(x, *modules)
    plain = nn.Sequential(*modules)(x * 1)
    torch.testing.assert_close(out, plain)
    (own,), (expected,) = (torch.autograd.grad(result.square().sum(), x) for result in (out, plain))
    torch.testing.assert_close(own, expected)


def test_hooks_of_all_modules_see_each_module_once():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        by_channels(torch.randn(2, 12, 8, 8, requires_grad=True), *stem()).sum().backward()
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]


@pytest.mark.parametrize("norm", [None, frozen(nn.BatchNorm2d(12))], ids=["learning", "frozen"])
def test_gradients_have_gradients(norm):
    torch.manual_seed(0)
    modules, found = nn.ModuleList(stem(nn.SiLU(), norm)).double(), []
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64, requires_grad=True)
    for context in (nullcontext, all_kept):
        with context():
            out = by_channels(x, *modules)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *modules.parameters()]))
    torch.testing.assert_close(*found)


def test_transforms_of_torch_func_and_torch_jit():
    modules, x = stem(norm=frozen(nn.BatchNorm2d(12))), torch.randn(3, 12, 8, 8)

    def loss(image):
        return by_channels(image[None], *modules).square().sum()

    image = x.clone().requires_grad_()
    sum(loss(part) for part in image).backward()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), image.grad)
    _, along = torch.func.jvp(loss, (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(along, image.grad[0].sum())
    block = LocalNet(Stemmed(), 10, "layer", input_shape=(3, 32, 32)).blocks[0]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(block.eval(), x)(x), block(x))


def test_frozen_statistics_that_move_before_backward_are_noticed():
    modules = stem(norm=frozen(nn.BatchNorm2d(12)))
    out = by_channels(torch.randn(2, 12, 8, 8, requires_grad=True), *modules)
    modules[0].running_var.mul_(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_batch_without_images():
    x = torch.randn(0, 12, 8, 8, requires_grad=True)
    by_channels(x, *stem(norm=frozen(nn.BatchNorm2d(12)))).sum().backward()
    assert x.grad.shape == x.shape


class UsedTwice(nn.Module):
    """The activation changes, or another module changes later, what the shortcut adds."""

    def __init__(self, activation, later):
        super().__init__()
        self.conv, self.activation, self.pool = nn.Conv2d(3, 8, 3, padding=1), activation, nn.MaxPool2d(3, 1, 1)
        self.later, self.last, self.classifier = later, nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x)
        pooled = self.pool(self.activation(x))
        return self.classifier(self.last(self.later(x) + pooled).mean((2, 3)))


@pytest.mark.parametrize(("own", "later"), [(nn.ReLU(True), nn.Identity()), (nn.ReLU(), nn.LeakyReLU(inplace=True))])
def test_a_map_with_another_use_stays_with_its_modules(own, later):
    net = LocalNet(UsedTwice(own, later), 10, "layer", input_shape=(3, 9, 9))
    for update in net.updates(torch.randn(2, 3, 9, 9), torch.arange(2)):
        update.loss.backward()
