"""Class kernels over the regions of a map: heads that cost very little.

Shapes: B batch, C channels, H x W or T positions, K classes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads.layers import check_head_sizes, check_size, hidden_layer, without_padding
from ff_lightning.util.arguments import check_whole
from ff_lightning.util.torch_private import is_transformed


class PooledHead(nn.Module):
    """A head that costs very little: class kernels over a whole map that was averaged over regions.

    The features are averaged over ``regions x regions`` parts of the map and normalised over all features of a sample.
    (Signals, tokens and volumes have one or three axes, vectors none; padding among tokens does not count.) Then a
    kernel for each class has a weight for every channel in every region. A layer (convolution, batch norm, ReLU) comes
    before the kernels if it is asked for, or if it makes the head smaller. The goodness of a class is the output of its
    kernel. It is not squared, so evidence against a class counts too.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        regions: Number of regions along each side of the map. None: 4, or 2 for more than 100 classes or three axes,
            where the kernels would otherwise be larger than the network.
        width: Channels of the layer. None: C, at most 128, if 3x3 kernels are asked for or a layer makes the head
            smaller, as it does for many channels and classes; otherwise there is no layer.
        kernel_size: Of the layer, in regions: 1 or 3.
        size: Positions of the features: (), (T,), (H, W) or (D, H, W). An axis with fewer positions than `regions` has
            as many regions as positions. None: two axes with at least `regions` positions.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        regions: int | None = None,
        width: int | None = None,
        kernel_size: int = 1,
        size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_head_sizes(in_channels, num_classes, width, kernel_size, (1, 3))
        check_whole("regions", regions, optional=True)
        check_size(size)
        axes = 2 if size is None else len(size)
        regions = regions if regions is not None else 4 if num_classes <= 100 and axes < 3 else 2
        self.regions = tuple(min(regions, side) for side in size or axes * [regions])
        count = math.prod(self.regions)
        of_a_channel = count * num_classes  # weights of the class kernels
        narrow = min(in_channels, 128)
        if width is None and (kernel_size > 1 or narrow * (in_channels + of_a_channel) < in_channels * of_a_channel):
            width = narrow
        self.features = nn.Sequential(*(hidden_layer(in_channels, width, kernel_size, axes) if width else []))
        # a kernel that covers the whole map is a linear layer, which costs a fraction of the convolution on a CPU
        self.classes = nn.Linear((width or in_channels) * count, num_classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, H, W), or with another number of axes, any floating dtype.
            mask: For tokens (B, C, T): (B, T), bool, false at what is only padding.

        Returns:
            (B, K), float32.
        """
        means = region_means(features, self.regions) if mask is None else token_means(features, mask, *self.regions)
        activity: Tensor = self.classes(self.features(F.layer_norm(means, means.shape[1:])).flatten(1))
        return activity.float()

    def maps(self, features: Tensor) -> Tensor:
        """The part of each region in the goodness, but for the bias: features (B, C, H, W) -> (B, K, h, w), float32."""
        means = region_means(features, self.regions)
        seen = self.features(F.layer_norm(means, means.shape[1:])).float()
        kernels = self.classes.weight.float().unflatten(1, seen.shape[1:])
        return torch.einsum("bc...,kc...->bk...", seen, kernels)


_MEANS: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def region_means(features: Tensor, regions: tuple[int, ...]) -> Tensor:
    """Mean over regions, as `adaptive_avg_pool2d` draws them: (B, C, H, W) -> (B, C, *regions), also of other axes.

    On a CPU it takes half the time or less, for maps in the order channels last an eighth: large regions are summed
    line by line, small ones by one matrix product. On a GPU the product is taken where deterministic algorithms are
    asked for: PyTorch's own has none.
    """
    size = tuple(features.shape[2:])  # no plain numbers where a network is traced for any size
    if size == regions:
        return features
    known, device = all(type(side) is int for side in size), features.device.type
    if known and device == "cuda" and torch.are_deterministic_algorithms_enabled():
        return means_by_shares(features, regions)
    flat = features.is_contiguous()
    last = (
        len(size) == 2 and not (flat or is_transformed()) and features.is_contiguous(memory_format=torch.channels_last)
    )
    if not known or device != "cpu" or len(size) != 2 or not (flat or last):
        return _MEANS[len(regions) - 1](features, regions)
    divides = not any(side % part for side, part in zip(size, regions, strict=True))
    if divides and (last or size[1] >= 8 * regions[1]):
        (rows, columns), axis = regions, 1 if last else 2
        maps = features.movedim(1, -1) if last else features
        means = maps.unflatten(axis, (rows, -1)).mean(axis + 1).unflatten(axis + 1, (columns, -1)).mean(axis + 2)
        return means.movedim(-1, 1) if last else means
    return means_by_shares(features, regions)


def means_by_shares(features: Tensor, regions: tuple[int, ...]) -> Tensor:
    """The means of `region_means` by one matrix product, for any number of axes and any order in memory."""
    size = tuple(features.shape[2:])
    is_plain = type(features) is Tensor and not torch.compiler.is_compiling() and not is_transformed()
    make = _kept_shares if is_plain else _shares
    shares = make(size, regions, torch.get_default_dtype(), features.device).to(features.dtype)
    if features.is_contiguous():
        return (features.flatten(2) @ shares).unflatten(2, regions)
    return (shares.mT @ features.movedim(1, -1).flatten(1, -2)).movedim(-1, 1).unflatten(2, regions)


@lru_cache(maxsize=64)
def _kept_shares(size: tuple[int, ...], regions: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # training may use it later
        return _shares(size, regions, dtype, device)


def _shares(size: Sequence[int], regions: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The share of each position in the mean over each region, (positions, number of regions)."""
    of_axes = []
    for side, part in zip(size, regions, strict=True):
        place, (start, end) = torch.arange(side, device=device)[:, None], _bounds(side, part, device)
        of_axes.append(((start <= place) & (place < end)).to(dtype) / (end - start))
    return reduce(torch.kron, of_axes)


def _bounds(count: int | Tensor, regions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each region begins and ends, as `adaptive_avg_pool1d` draws them: (regions,), or (B, 1, regions)."""
    region = torch.arange(regions, device=device)
    return region * count // regions, ((region + 1) * count + regions - 1) // regions


def token_means(features: Tensor, mask: Tensor, regions: int) -> Tensor:
    """Mean over regions of the tokens that are no padding, as `adaptive_avg_pool1d` draws them for these alone.

    Args:
        features: (B, C, T).
        mask: (B, T), bool, false at what is only padding.
        regions: Their number.

    Returns:
        (B, C, regions), zeros where a sample has no token at all.
    """
    place, count = mask.cumsum(1)[:, :, None] - 1, mask.sum(1)[:, None, None]  # (B, T, 1), (B, 1, 1)
    starts, ends = _bounds(count, regions, mask.device)
    inside = mask[:, :, None] & (starts <= place) & (place < ends)  # (B, T, regions)
    shares = inside / inside.sum(1, keepdim=True).clamp(min=1)
    return without_padding(features, mask) @ shares.to(features.dtype)
