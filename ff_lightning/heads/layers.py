"""What the heads have in common: their layers, and the checks of their sizes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_whole, is_whole, shown

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, axes: int, stride: int = 1, bias: bool = False
) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution along so many axes that keeps the size of the map, but for the stride; a linear layer for none."""
    if axes == 0:
        return nn.Linear(in_channels, out_channels, bias)
    return _CONVOLUTIONS[axes - 1](in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)


def hidden_layer(in_channels: int, out_channels: int, kernel_size: int, axes: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, batch norm and ReLU."""
    if axes == 2 and kernel_size == stride == 1:
        return [_Pointwise(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    layer = convolution(in_channels, out_channels, kernel_size, axes, stride)
    return [layer, _NORMS[axes](out_channels), nn.ReLU()]


def token_layer(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A layer for each position by itself, whatever the others hold: linear, layer norm and ReLU."""
    return [nn.Conv1d(in_channels, out_channels, 1), _PositionNorm(out_channels), nn.ReLU()]


class _PositionNorm(nn.LayerNorm):
    """A layer norm over the channels of each position, (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def without_padding(features: Tensor, mask: Tensor) -> Tensor:
    """Features (B, C, T) with zeros where a mask (B, T) is false."""
    return features.masked_fill(~mask[:, None], 0)


def position_means(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all positions: (B, C, ...) -> (B, C); over those only where a mask (B, T) is true."""
    if mask is not None:
        return without_padding(features, mask).sum(2) / mask.sum(1, keepdim=True).clamp(min=1)
    return features.flatten(2).mean(2) if features.ndim > 2 else features


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution of a small map as one matrix product: two thirds of its time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)


def check_head_sizes(channels: int, classes: int, width: int | None, kernel: int, kernels: Sequence[int]) -> None:
    """Raise ValueError if a size of a head is out of its range."""
    check_whole("in_channels", channels)
    check_whole("num_classes", classes)
    check_whole("width", width, optional=True)
    if not is_whole(kernel) or kernel not in kernels:
        raise ValueError(f"kernel_size={shown(kernel)}: must be one of {list(kernels)}")


def check_size(size: Any) -> None:
    """Raise ValueError unless a size counts the positions along no, one, two or three axes; None will do."""
    sequence = isinstance(size, Sequence) and not isinstance(size, str)
    if size is not None and not (sequence and len(size) <= 3 and all(is_whole(n) and n for n in size)):
        raise ValueError(f"size={shown(size)}: must be the positions of the features, such as (H, W) or (T,), or None")
