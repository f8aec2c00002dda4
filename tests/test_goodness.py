from functools import partial

import pytest
import torch

from ff_lightning.heads import GoodnessHead, PooledHead, make_head
from ff_lightning.heads.pooled import token_means
from ff_lightning.heads.squared import class_goodness
from ff_lightning.local.votes import depth_vote, last_vote, log_softmax_vote, mean_vote
from ff_lightning.losses import LogSumExpLoss, logsumexp_loss


def naive_goodness(h, weight, bias):
    """Goodness by its definition: one class, one position at a time."""
    kernel = weight.shape[-1]
    padded = torch.nn.functional.pad(h, [kernel // 2] * 4)
    goodness = torch.zeros(len(h), len(weight), dtype=h.dtype)
    height, width = h.shape[2:]
    for b in range(len(h)):
        for k in range(len(weight)):
            for i in range(height):
                for j in range(width):
                    z = (padded[b, :, i : i + kernel, j : j + kernel] * weight[k]).sum() + bias[k]
                    goodness[b, k] += z**2 / (height * width)
    return goodness


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_goodness_equals_its_definition(kernel):
    h, weight, bias = torch.randn(2, 3, 4, 6), torch.randn(4, 3, kernel, kernel), torch.randn(4)
    torch.testing.assert_close(class_goodness(h, weight, bias), naive_goodness(h, weight, bias))


@pytest.mark.parametrize("classes", [4, 100])
def test_goodness_in_float16_is_the_same_with_and_without_gradients(classes):
    h, weight, bias = 10 * torch.rand(2, 16, 64, 64), torch.randn(classes, 16, 1, 1), torch.randn(classes)
    with torch.autocast("cpu", torch.float16):
        without = class_goodness(h.half(), weight, bias)
        assert torch.equal(class_goodness(h.half(), weight.requires_grad_(), bias), without)
    torch.testing.assert_close(without, class_goodness(h, weight, bias).detach(), atol=0, rtol=0.01)


def test_temperature_divides_the_goodness():
    cold, warm = (GoodnessHead(3, 4, temperature=t, depth=0) for t in (0.5, 2.0))
    warm.classes.load_state_dict(cold.classes.state_dict())
    h = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(cold(h), 4 * warm(h))
    torch.testing.assert_close(2 * warm(h), class_goodness(h, warm.classes.weight, warm.classes.bias))


def test_learned_temperature_is_a_parameter_and_gets_a_gradient():
    head = GoodnessHead(3, 4, learn_temperature=True)
    head(torch.randn(2, 3, 4, 4)).sum().backward()
    assert head.log_temperature.grad != 0
    assert "log_temperature" not in dict(GoodnessHead(3, 4).named_parameters())


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_head_takes_maps_of_any_size(size, depth):
    assert GoodnessHead(3, 4, depth=depth, width=5)(torch.randn(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (7, 1)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_pooled_head_has_no_more_regions_than_the_map_has_positions(size, kernel):
    head = make_head(partial(PooledHead, kernel_size=kernel), (3, *size), 5)
    assert head.classes.weight.shape == (5, 3 * min(4, size[0]) * min(4, size[1]))
    assert head(torch.randn(2, 3, *size)).shape == (2, 5)
    assert head(torch.randn(2, 3, 8, 8)).shape == (2, 5), "also for images of another size"


def test_kernels_of_many_classes_are_smaller():
    few, many = (PooledHead(8, classes).classes.weight for classes in (100, 101))
    assert few.shape == (100, 8 * 4 * 4)
    assert many.shape == (101, 8 * 2 * 2)


@pytest.mark.parametrize(("channels", "classes", "layer"), [(64, 10, False), (512, 10, False), (512, 100, True)])
def test_a_pooled_head_has_a_layer_where_that_saves_weights(channels, classes, layer):
    def size(head):
        return sum(p.numel() for name, p in head.named_parameters() if name.endswith("weight") and p.ndim > 1)

    head, with_layer = PooledHead(channels, classes), PooledHead(channels, classes, width=min(channels, 128))
    assert (len(head.features) > 0) == layer
    assert size(head) == (size(with_layer) if layer else channels * 4 * 4 * classes) <= size(with_layer)


def test_a_pooled_head_tells_regions_apart():
    head = PooledHead(1, 2, regions=2, width=4).eval()
    corner = torch.zeros(2, 1, 4, 4)
    corner[0, :, 0, 0] = corner[1, :, 3, 3] = 1
    assert not torch.equal(*head(corner))


@pytest.mark.parametrize("arguments", [{"regions": 0}, {"width": 0}, {"kernel_size": 2}])
def test_pooled_head_refuses_bad_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PooledHead(3, 4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kernel_size": 2}, "kernel_size=2"), ({"temperature": 0}, "temperature=0"), ({"depth": -1}, "depth=-1")],
)
def test_head_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GoodnessHead(3, 4, **arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_its_formula(smoothing):
    g, y = torch.randn(5, 4).double(), torch.tensor([0, 3, 2, 2, 1])
    true = g[torch.arange(5), y]
    positive = (1 - smoothing) * true + smoothing * g.mean(1)
    expected = -(positive - g.exp().sum(1).log()).mean()
    torch.testing.assert_close(LogSumExpLoss(smoothing)(g, y), expected.float())


def test_loss_stays_finite_for_large_goodness():
    g = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = logsumexp_loss(g, torch.tensor([1, 1]))
    loss.backward()
    assert loss.isfinite()
    assert g.grad.isfinite().all()


def test_label_smoothing_out_of_range():
    with pytest.raises(ValueError, match=r"label_smoothing=1.5"):
        LogSumExpLoss(1.5)


def test_votes():
    g = torch.randn(3, 2, 4)
    torch.testing.assert_close(mean_vote(g), (g[0] + g[1] + g[2]) / 3)
    assert torch.equal(last_vote(g), g[2])
    torch.testing.assert_close(depth_vote(g), (1 * g[0] + 2 * g[1] + 3 * g[2]) / 6)
    probabilities = g.softmax(-1)
    torch.testing.assert_close(log_softmax_vote(g), probabilities.prod(0).log() / 3)


HEADS = {
    "pooled": PooledHead,
    "pooled, with a layer": partial(PooledHead, width=6, kernel_size=3),
    "paper": partial(GoodnessHead, depth=0),
    "deep": GoodnessHead,
    "wide kernels": partial(GoodnessHead, kernel_size=3, depth=0),
}


@pytest.mark.parametrize("size", [(), (9,), (4, 6), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads_have_as_many_axes_as_the_features(head, size):
    head = make_head(HEADS[head], (8, *size), 5)
    features = torch.randn(3, 8, *size)
    assert head(features).shape == (3, 5)
    moved = features.roll(1, dims=-1)
    if size:  # the layers and regions lie along the axes: what neighbours what matters, unless all positions are alike
        same = torch.allclose(head.eval()(features), head(moved), atol=1e-6)
        assert same == (isinstance(head, GoodnessHead) and head.classes.kernel_size[0] == 1 and len(head.features) == 0)


@pytest.mark.parametrize("size", [(), (7,), (3, 4, 5)], ids=str)
def test_goodness_along_other_axes_is_that_of_all_positions_in_a_row(size):
    features, weight, bias = torch.randn(2, 3, *size), torch.randn(4, 3), torch.randn(4)
    kernel = weight[(...,) + (None,) * len(size)]
    positions = features.flatten(2) if size else features[:, :, None]
    expected = (torch.einsum("kc,bcn->bkn", weight, positions) + bias[:, None]).square().mean(2)
    torch.testing.assert_close(class_goodness(features, kernel, bias), expected)


LENGTHS = [9, 5, 3, 1]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing_in_a_head(head, training):
    masked = make_head(HEADS[head], (8, 9), 5, masked=True).train(training)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(4, 8, 9).masked_fill(~mask[:, None], float("nan")).requires_grad_()
    goodness = masked(features, mask)
    if training:  # a batch norm sees all samples at once
        zeros = features.detach().nan_to_num(7.0).requires_grad_()
        other = masked(zeros, mask)
    else:
        other = torch.cat([masked(features[i : i + 1, :, :n], mask[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(goodness, other)
    goodness.square().sum().backward()
    assert torch.equal(features.grad.isfinite() & (features.grad != 0), mask[:, None].expand(-1, 8, -1))


def test_regions_of_tokens_are_those_of_the_tokens_alone():
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(4, 8, 9)
    alone = [torch.nn.functional.adaptive_avg_pool1d(features[i : i + 1, :, :n], 4) for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(token_means(features, mask, 4), torch.cat(alone))
    left = mask.flip(1)  # padding before the tokens
    torch.testing.assert_close(token_means(features.flip(2), left, 4), torch.cat(alone).flip(2))
    assert token_means(features, torch.zeros_like(mask), 4).eq(0).all()
