"""What keeps little for backward equals what keeps everything."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ff_lightning import LocalNet
from ff_lightning.heads import GoodnessHead, PooledHead
from ff_lightning.heads.gram import class_goodness
from ff_lightning.heads.pooled import _MEANS, means_by_shares, region_means
from ff_lightning.local.chain import normalise
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import Residual, small_net

# (K, C, H, W): few classes and many, channels and positions; by definition and by the Gram matrix
SHAPES = [(10, 64, 8, 8), (3, 5, 3, 5), (40, 4, 1, 1), (30, 6, 1, 7), (100, 16, 8, 8), (200, 8, 16, 16)]


def naive(features, weight, bias):
    z = F.conv2d(features, weight[:, :, None, None], bias)
    return (z.float() if z.dtype == torch.bfloat16 else z).square().mean((2, 3))


def tensors(shape, dtype=torch.float32, batch=5):
    classes, channels, height, width = shape
    h = (torch.randn(batch, channels, height, width, dtype=dtype) + 1).relu()
    return [h, torch.randn(classes, channels, dtype=dtype), torch.randn(classes, dtype=dtype)]


def with_gradients(function, inputs, arriving):
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, arriving.to(result.dtype))]


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_goodness_and_its_gradients_equal_the_naive_ones(shape, channels_last):
    inputs = tensors(shape)
    if channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    arriving = torch.randn(5, shape[0])
    ours, theirs = (with_gradients(function, inputs, arriving) for function in (class_goodness, naive))
    for got, wanted in zip(ours, theirs, strict=True):
        assert error(got, wanted.double()) < 1e-5


@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (20, 3, 5, 5)])
def test_gradients_in_float64(shape):
    inputs = [x.requires_grad_() for x in tensors(shape, torch.float64, batch=2)]
    inputs[0] = torch.randn_like(inputs[0]).requires_grad_()
    assert torch.autograd.gradcheck(class_goodness, inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(10, 64, 8, 8), (100, 16, 8, 8), (200, 8, 16, 16)])
def test_bfloat16_is_no_worse_than_the_naive_way(shape, autocast):
    arriving = torch.randn(5, shape[0])
    narrow = [x.bfloat16() for x in tensors(shape)]
    if autocast:
        narrow[1:] = [x.float() for x in narrow[1:]]
    exact = with_gradients(naive, [x.double() for x in narrow], arriving)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return with_gradients(function, narrow, arriving)

    ours, theirs = run(class_goodness), run(naive)
    for got, other, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        assert error(got, wanted) <= 1.1 * error(other, wanted)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6), (4, 4), (8, 32), (8, 33)])
@pytest.mark.parametrize("regions", [(4, 4), (1, 3)])
def test_pooling_equals_that_of_pytorch(size, regions, channels_last):
    h = torch.randn(5, 6, *size) + 1
    if channels_last:
        h = h.contiguous(memory_format=torch.channels_last)
    arriving = torch.randn(5, 6, *regions)
    ours = with_gradients(lambda h: region_means(h, regions), [h], arriving)
    theirs = with_gradients(lambda h: F.adaptive_avg_pool2d(h, regions), [h], arriving)
    for got, wanted in zip(ours, theirs, strict=True):
        assert error(got, wanted.double()) < 1e-5


@pytest.mark.parametrize(
    "order", [lambda h: h, lambda h: h.movedim(1, -1).contiguous().movedim(-1, 1), lambda h: h[:, ::2]]
)
@pytest.mark.parametrize(("size", "regions"), [((12,), (4,)), ((7,), (3,)), ((5, 6, 7), (2, 3, 2)), ((7, 5), (4, 2))])
def test_the_means_of_deterministic_runs_on_a_gpu_equal_those_of_pytorch(size, regions, order):
    h = order(torch.randn(5, 6, *size) + 1)
    arriving = torch.randn(5, h.shape[1], *regions)
    ours = with_gradients(lambda h: means_by_shares(h, regions), [h], arriving)
    theirs = with_gradients(lambda h: _MEANS[len(size) - 1](h, regions), [h], arriving)
    for got, wanted in zip(ours, theirs, strict=True):
        assert error(got, wanted.double()) < 1e-5


def test_shares_of_a_long_signal_take_little_memory():
    torch.testing.assert_close(means_by_shares(torch.ones(1, 1, 400_000), (3,)), torch.ones(1, 1, 3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_an_ensemble_by_vmap_averages_as_its_members(size):
    images, weights = torch.randn(2, 3, *size), torch.randn(6, 5, 3, 3, 3)

    def of_member(weight):
        return region_means(F.conv2d(images, weight, padding=1), (4, 4))

    together = torch.vmap(of_member)(weights)
    torch.testing.assert_close(together, torch.stack([of_member(weight) for weight in weights]))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_layer_norm_equals_that_of_pytorch_and_keeps_the_order_in_memory(channels_last):
    h = torch.randn(5, 6, 7, 4)
    if channels_last:
        h = h.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise(h, "layer", 1), F.layer_norm(h, h.shape[1:]))
    assert normalise(h, "layer", 1).is_contiguous() == h.is_contiguous()


@pytest.mark.parametrize("classes", [10, 300])
def test_goodness_keeps_nothing_but_its_inputs(classes):
    h, weight, bias = (x.requires_grad_() for x in tensors((classes, 8, 16, 16)))
    with saved_for_backward(left_out=[weight, bias]) as saved:
        goodness = class_goodness(h, weight, bias)
    assert saved.now == h.nbytes
    goodness.sum().backward()


def heads():
    return {
        "paper": partial(GoodnessHead, depth=0),
        "pooled": PooledHead,
        "pooled_1x1": partial(PooledHead, width=7),
        "pooled_3x3": partial(PooledHead, regions=3, width=7, kernel_size=3),
    }


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", heads())
def test_losses_and_gradients_equal_those_of_plain_modules(name, granularity):
    lean = LocalNet(small_net(), 10, granularity, head=heads()[name], input_shape=(1, 8, 8))
    plain = copy.deepcopy(lean)
    for objective in plain.objectives:
        objective.head = Plain(objective.head)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    for ours, theirs in zip(lean.local_losses(x, y), plain.local_losses(x, y), strict=True):
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)  # a bias before a batch norm has 0
    torch.testing.assert_close(lean.eval()(x), plain.eval()(x))


class Plain(nn.Module):
    """A head made of PyTorch's own functions."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        if isinstance(self.head, PooledHead):
            features = F.adaptive_avg_pool2d(features, self.head.regions)
            features = F.layer_norm(features, features.shape[1:])
            for layer in self.head.features:
                is_convolution = isinstance(layer, nn.Conv2d)
                features = (
                    F.conv2d(features, layer.weight, padding=layer.padding) if is_convolution else layer(features)
                )
            return features.flatten(1) @ self.head.classes.weight.T + self.head.classes.bias
        z = self.head.classes(self.head.features(features))
        return z.square().mean((2, 3)) * torch.exp(-self.head.log_temperature)


@pytest.mark.parametrize("name", ["paper", "pooled"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_a_block_keeps_its_own_maps_and_hardly_more(name, classes):
    net = LocalNet(
        nn.Sequential(*(Residual(8) for _ in range(3))), classes, head=heads()[name], input_shape=(8, 16, 16)
    )
    x, y = torch.randn(4, 8, 16, 16), torch.arange(4)
    with saved_for_backward(left_out=net.parameters()) as saved:
        for loss in net.local_losses(x, y):
            loss.backward()
    maps = 5  # input, behind conv1, behind its ReLU, behind conv2 (an input of the sum), output
    kept_by_head = 2 / 16 + 16 / (4 * 8) if name == "pooled" else 0  # pooled and normalised; the matrix that pools
    small = 4 * classes * 8 + 2000  # scores and their softmax; statistics of norms
    assert saved.peak <= (maps + kept_by_head) * x.nbytes + small


def test_frozen_weights_get_no_gradient():
    net = LocalNet(small_net(), 10, head="paper", input_shape=(1, 8, 8))
    net.blocks.requires_grad_(False)
    net.heads[1].classes.bias.requires_grad_(False)
    for loss in net.local_losses(torch.randn(6, 1, 8, 8), torch.arange(6)):
        loss.backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in net.parameters())


@pytest.mark.parametrize("name", ["paper", "pooled"])
def test_features_and_gradients_stay_in_bfloat16_under_autocast(name):
    net = LocalNet(small_net(), 10, head=heads()[name], input_shape=(1, 8, 8))
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for loss in net.local_losses(torch.randn(6, 1, 8, 8), torch.arange(6)):
            loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("name", ["paper", "pooled"])
def test_prediction_exports_for_any_batch(name):
    net = LocalNet(small_net(), 300, head=heads()[name], input_shape=(1, 8, 8)).export()
    x = torch.randn(6, 1, 8, 8)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(net, (x[:3],), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(program.module()(x), net(x))


def test_a_map_that_was_first_seen_in_inference_mode_can_be_trained_on():
    features = torch.randn(2, 3, 12, 20, requires_grad=True)
    with torch.inference_mode():
        first = region_means(features, (4, 4))
    region_means(features, (4, 4)).sum().backward()
    assert torch.equal(region_means(features, (4, 4)), first)
    assert features.grad is not None


def test_shares_of_a_map_do_not_hang_on_the_dtype_that_was_the_default_before():
    features = torch.randn(2, 3, 7, 9)
    try:
        torch.set_default_dtype(torch.bfloat16)
        region_means(features.bfloat16(), (3, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(region_means(features, (3, 3)), F.adaptive_avg_pool2d(features.double(), (3, 3))) < 1e-5
