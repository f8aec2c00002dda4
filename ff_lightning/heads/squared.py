"""Goodness: how strongly the features of a block speak for each class.

Shapes: B batch, C channels, H x W or T positions, K classes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads import gram
from ff_lightning.heads.layers import (
    check_head_sizes,
    check_size,
    convolution,
    hidden_layer,
    token_layer,
    without_padding,
)
from ff_lightning.util.arguments import check_number, check_switch, check_whole

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def squared_goodness(activity: Tensor, mask: Tensor | None = None) -> Tensor:
    """Goodness of each channel: the mean over space of its squared activity.

    ``g_k = mean_hw z_k^2``, always in float32.

    Args:
        activity: (B, K, H, W), or with one or three axes, any floating dtype.
        mask: For tokens (B, K, T): (B, T), bool, false at what is only padding and does not count.

    Returns:
        (B, K), float32.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Examples:
        >>> squared_goodness(torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]]))
        tensor([[5., 2.]])
    """
    squares = activity.float().square()
    if mask is None:
        return squares.mean(tuple(range(2, squares.ndim)))
    return without_padding(squares, mask).sum(2) / mask.sum(1, keepdim=True).clamp(min=1)


def class_goodness(features: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Goodness of each class: squared class convolution, averaged over space.

    ``g_k = mean_hw (w_k * h + b_k)^2`` with one output channel per class and padding that keeps H x W.

    Args:
        features: Features of a block, (B, C, H, W), or with no, one or three axes.
        weight: (K, C, k, k) with k odd, with as many axes.
        bias: (K,).
        mask: For tokens (B, C, T): (B, T), bool, false at what is only padding and does not count.

    Returns:
        (B, K), float32; with k = 1 float64 for features of float64.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Examples:
        >>> class_goodness(torch.ones(1, 2, 4, 4), torch.tensor([[1.0, 1.0], [1.0, -1.0]])[..., None, None])
        tensor([[4., 0.]])
    """
    if mask is not None:
        features = without_padding(features, mask)
    if weight.ndim > 2 and weight.shape[-1] > 1:
        convolve = _CONVOLVE[weight.ndim - 3]
        return squared_goodness(convolve(features, weight, bias, padding=weight.shape[-1] // 2), mask)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    goodness = gram.class_goodness(features if features.ndim > 2 else features[:, :, None], weight.flatten(1), bias)
    if mask is None:
        return goodness
    positions, count = mask.shape[1], mask.sum(1, keepdim=True)
    return (goodness * positions - (positions - count) * bias.square()) / count.clamp(min=1)  # b_k^2 where h is 0


class GoodnessHead(nn.Module):
    """The head of the paper: goodness is the squared class convolution, averaged over space.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        kernel_size: Of the class convolution: 1, 3 or 5.
        temperature: The goodness is divided by it before the softmax of the loss. Below 1 it sharpens.
        learn_temperature: Whether the temperature is learned with the head.
        depth: Number of layers before the class convolution, each a 3x3 convolution of stride 2 with batch norm
            and ReLU. 0 is the form of the paper.
        width: Channels of these layers. None: those of the block.
        size: Positions of the features: (), (T,), (H, W) or (D, H, W): convolutions have as many axes, and for vectors
            are linear layers. None: two axes.
        masked: Whether tokens may be padding. The layers then work on each token by itself (linear, layer norm, ReLU),
            so that padding has no part in them.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176; temperature and layers are ours.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        kernel_size: int = 1,
        temperature: float = 0.125,
        learn_temperature: bool = False,
        depth: int = 1,
        width: int | None = None,
        size: Sequence[int] | None = None,
        masked: bool = False,
    ) -> None:
        super().__init__()
        check_head_sizes(in_channels, num_classes, width, kernel_size, (1, 3, 5))
        check_size(size)
        check_switch("masked", masked)
        check_number("temperature", temperature, above=0)
        check_switch("learn_temperature", learn_temperature)
        check_whole("depth", depth, least=0)
        axes = 2 if size is None else len(size)
        channels = [in_channels] + depth * [width or in_channels]
        layers = [token_layer(i, o) if masked else hidden_layer(i, o, 3, axes, stride=2) for i, o in pairwise(channels)]
        self.features = nn.Sequential(*(module for layer in layers for module in layer))
        self.classes = convolution(channels[-1], num_classes, kernel_size, axes, bias=True)
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, H, W), or with another number of axes, any floating dtype.
            mask: For tokens (B, C, T), if the head is `masked`: (B, T), bool, false at what is only padding.

        Returns:
            (B, K), float32.
        """
        goodness = class_goodness(self.features(features), self.classes.weight, self.classes.bias, mask)
        return goodness * torch.exp(-self.log_temperature)

    def maps(self, features: Tensor) -> Tensor:
        """The part of each position in the goodness: features (B, C, H, W) -> (B, K, h, w), float32."""
        squares = self.classes(self.features(features)).float().square()
        return squares * torch.exp(-self.log_temperature) / squares[0, 0].numel()
