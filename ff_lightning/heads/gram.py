"""Goodness of each class, by its definition or by the Gram matrix of the features; keeps only these for backward.

Shapes: B batch, C channels, N = H x W positions, K classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def class_goodness(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
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
    trains = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or bias.requires_grad)
    if trains or torch.is_autocast_enabled(features.device.type):  # which would narrow the second way
        return _ClassGoodness.apply(features, weight, bias)
    return _goodness(features.flatten(2), weight, bias)


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
