"""Layer norm, pooling and class goodness that keep only the output of the block itself for backward.

A layer norm and what follows it keep two maps: their inputs. Both can be computed again from the block's output, which
the block's own last operation mostly keeps anyway, and two numbers per image. So that is what is kept here.

Shapes: B batch, C channels, N = H x W positions, K classes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-5  # of `torch.nn.functional.layer_norm`


class Normed(NamedTuple):
    """The output of a block, and its layer norm over all features of an image."""

    raw: Tensor  # (B, C, H, W), with the graph of the block
    value: Tensor  # (B, C, H, W), the layer norm of it, without a graph
    mean: Tensor  # (B, 1, 1, 1), float32 or float64
    rstd: Tensor  # (B, 1, 1, 1), one over the standard deviation

    def view_as(self, to_map: Callable[[Tensor], Tensor]) -> "Normed":
        """The same, with another view of both tensors."""
        return Normed(to_map(self.raw), to_map(self.value), self.mean, self.rstd)


def layer_norm(raw: Tensor) -> Tensor:
    """Layer norm of a block's output (B, ...) over all features of an image; keeps the order in memory."""
    there, back = _memory_order(raw)
    ordered = raw.permute(there)
    return F.layer_norm(ordered, ordered.shape[1:], eps=EPS).permute(back)


def layer_normed(raw: Tensor) -> Normed:
    """The layer norm of a block's output (B, ...), for `pooled` and `class_goodness`."""
    there, back = _memory_order(raw)
    ordered = raw.detach().permute(there)
    with torch.autocast(raw.device.type, enabled=False):
        value, mean, rstd = torch.native_layer_norm(_wide(ordered), ordered.shape[1:], None, None, EPS)
    return Normed(raw, value.permute(back).to(raw.dtype), mean.view(-1, 1, 1, 1), rstd.view(-1, 1, 1, 1))


def pooled(features: Tensor | Normed, regions: tuple[int, int]) -> Tensor:
    """Mean over regions, as `adaptive_avg_pool2d` draws them: (B, C, H, W) -> (B, C, *regions)."""
    return _Pooled.apply(*features, regions) if isinstance(features, Normed) else _pool(features, regions)


def class_goodness(features: Tensor | Normed, weight: Tensor, bias: Tensor) -> Tensor:
    """Goodness of each class, by the cheaper one of two ways, computed again in backward instead of kept.

    By definition ``g_k = mean_n (w_k . x_n + b_k)^2``: K C N products. Multiplied out,
    ``g_k = w_k^T M w_k + 2 b_k w_k . m + b_k^2`` with ``M = mean_n x_n x_n^T`` and ``m = mean_n x_n``: C^2 N + K C^2.
    Both are exact; the second is computed in float32 at least.

    Args:
        features: (B, C, H, W).
        weight: (K, C).
        bias: (K,).

    Returns:
        (B, K), float32, or float64 for features of float64.
    """
    if isinstance(features, Normed):
        return _NormedGoodness.apply(*features, weight, bias)
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or bias.requires_grad):
        return _ClassGoodness.apply(features, weight, bias)
    return _goodness(features.flatten(2), weight, bias)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, value: Tensor, mean: Tensor, rstd: Tensor, regions: tuple[int, int]) -> Tensor:
        result = _pool(value, regions)
        ctx.save_for_backward(raw, mean, rstd, result)  # the result is an input of what follows: kept there anyway
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        raw, mean, rstd, result = ctx.saved_tensors
        wide, arriving = _wide(raw), _wide(arriving)
        # d raw = rstd (d - mean(d) - n mean(d n)) for n = rstd (raw - mean); the two means over an image are those of
        # the pooled maps, so that all of it is one number per image times raw, and one per window
        count = raw[0].numel()
        slope = -(rstd**2) * (arriving * result).sum((1, 2, 3), keepdim=True) / count
        offset = -rstd * arriving.sum((1, 2, 3), keepdim=True) / count - slope * mean
        gradient = _add_pool_backward(torch.addcmul(offset, wide, slope), arriving * rstd)
        return gradient.to(raw.dtype), None, None, None, None


def _pool(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`adaptive_avg_pool2d`; on the CPU as a matrix product: half its time, or a third with the backward."""
    if not _pools_by_product(x, regions):
        return F.adaptive_avg_pool2d(x, regions)
    rows = x.reshape(*x.shape[:2], regions[0], -1)  # the lines of a region, one behind the other
    return rows @ _averages(x, regions)


def _add_pool_backward(gradient: Tensor, arriving: Tensor) -> Tensor:
    regions = (arriving.shape[2], arriving.shape[3])
    if not _pools_by_product(gradient, regions):
        return gradient.add_(torch.ops.aten._adaptive_avg_pool2d_backward(arriving, gradient))
    averages = _averages(gradient, regions)
    gradient.view(-1, len(averages)).addmm_(arriving.reshape(-1, regions[1]), averages.T)
    return gradient


def _pools_by_product(x: Tensor, regions: tuple[int, int]) -> bool:
    exact = x.dtype in (torch.float32, torch.float64)
    divisible = x.shape[2] % regions[0] == 0 and x.shape[3] % regions[1] == 0
    return x.device.type == "cpu" and exact and x.is_contiguous() and divisible


def _averages(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """The matrix (lines of a region times W, regions in a line) that takes the mean over each region."""
    lines, width = x.shape[2] // regions[0], x.shape[3] // regions[1]
    mean = torch.full((width, 1), 1 / (lines * width), dtype=x.dtype)
    return torch.block_diag(*[mean] * regions[1]).repeat(lines, 1)


class _ClassGoodness(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = _working_dtype(features)
        ctx.save_for_backward(features, weight, bias)
        return _goodness_in_chunks(features, weight, bias, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        features, weight, bias = ctx.saved_tensors
        return _goodness_backward(arriving, features, weight, bias, ctx.dtype)


class _NormedGoodness(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, value: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.dtype = _working_dtype(value)
        ctx.save_for_backward(raw, mean, rstd, weight, bias)
        return _goodness_in_chunks(value, weight, bias, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        raw, mean, rstd, weight, bias = ctx.saved_tensors
        wide = _wide(raw)
        value = torch.addcmul(-mean * rstd, wide, rstd).to(raw.dtype)
        by_value, by_weight, by_bias = _goodness_backward(arriving, value, weight, bias, ctx.dtype)
        there, back = _memory_order(wide)
        by_value, ordered = _wide(by_value).permute(there), wide.permute(there)
        by_raw, _, _ = torch.ops.aten.native_layer_norm_backward(
            by_value, ordered, ordered.shape[1:], mean, rstd, None, None, [True, False, False]
        )
        return by_raw.permute(back).to(raw.dtype), None, None, None, by_weight, by_bias


def _memory_order(x: Tensor) -> tuple[list[int], list[int]]:
    """Channels to the end where they are last in memory, and the way back: a norm over an image may take any order."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return [0, 2, 3, 1], [0, 3, 1, 2]
    return [*range(x.ndim)], [*range(x.ndim)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _working_dtype(features: Tensor) -> torch.dtype:
    """What a convolution of these features would be computed in."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def _by_gram(x: Tensor, weight: Tensor) -> bool:
    """Whether C^2 N + K C^2 products are fewer than K C N."""
    (classes, channels), positions = weight.shape, x.shape[2]
    return channels * (positions + classes) < classes * positions


def _goodness(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Goodness (B, K) of features (B, C, N)."""
    if not _by_gram(x, weight):
        return (_wide(_times(weight, x)) + _wide(bias)[:, None]).square().mean(2)
    x, weight, bias = _wide(x), _wide(weight), _wide(bias)
    gram, mean = torch.bmm(x, x.mT) / x.shape[2], x.mean(2)
    return (_times(weight, gram) * weight).sum(2) + 2 * bias * (mean @ weight.T) + bias**2


def _goodness_backward_of(arriving: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_goodness` by x, weight and bias, from the one that arrives (B, K)."""
    factor = 2 * arriving
    if not _by_gram(x, weight):
        by_z = (_wide(_times(weight, x)) + _wide(bias)[:, None]) * (factor / x.shape[2])[:, :, None]
        narrow = by_z.to(x.dtype)
        return _times(weight.T, narrow), _outer(narrow, x), by_z.sum((0, 2))
    x, weight, bias = _wide(x), _wide(weight), _wide(bias)
    gram, mean = torch.bmm(x, x.mT) / x.shape[2], x.mean(2)
    by_gram = torch.matmul(weight.T * factor[:, None, :], weight)  # (B, C, C), symmetric, times 2
    by_mean = (factor * bias) @ weight  # (B, C)
    by_x = torch.baddbmm(by_mean[:, :, None], by_gram, x).div_(x.shape[2])
    by_weight = (_times(weight, gram) * factor[:, :, None]).sum(0) + (factor * bias).T @ mean
    return by_x, by_weight, (factor * (mean @ weight.T + bias)).sum(0)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Parts of the batch whose temporary maps, K times as many as channels, take no more room than the features."""
    per_image = len(weight) * max(x.shape[1:]) if _by_gram(x, weight) else len(weight) * x.shape[2]
    step = max(1, x.numel() // per_image)
    return (slice(start, start + step) for start in range(0, len(x), step))


def _goodness_in_chunks(features: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        x, weight = features.flatten(2).to(dtype), weight.to(dtype)
        return torch.cat([_goodness(x[part], weight, bias) for part in _chunks(x, weight)])


def _goodness_backward(
    arriving: Tensor, features: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        x, narrow = features.flatten(2).to(dtype), weight.to(dtype)
        parts = [_goodness_backward_of(arriving[part], x[part], narrow, bias) for part in _chunks(x, narrow)]
        of_x, of_weight, of_bias = zip(*parts, strict=True)
        by_x = of_x[0] if len(of_x) == 1 else torch.cat(of_x)
        by_weight, by_bias = (torch.stack([_wide(of) for of in parts]).sum(0) for parts in (of_weight, of_bias))
        return by_x.reshape(features.shape).to(features.dtype), by_weight.to(weight.dtype), by_bias.to(bias.dtype)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """(K, C) times (B, C, N) -> (B, K, N): a product for each image, or a single one where images are small."""
    images, channels, positions = x.shape
    if len(weight) <= positions:
        return torch.bmm(weight.expand(images, -1, -1), x)
    return (weight @ x.transpose(0, 1).reshape(channels, -1)).view(-1, images, positions).transpose(0, 1)


def _outer(z: Tensor, x: Tensor) -> Tensor:
    """(B, K, N) times (B, C, N) -> (K, C), summed over B and N; a sum over B in 16 bits is left to the product."""
    if z.shape[1] <= z.shape[2] and z.dtype in (torch.float32, torch.float64):
        return torch.bmm(z, x.mT).sum(0)
    return z.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T
