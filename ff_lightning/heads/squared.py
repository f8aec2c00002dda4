"""Goodness: how strongly the features of a block speak for each class.

Shapes: B batch, C channels, H x W positions, K classes.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads import gram
from ff_lightning.heads.layers import check_head_sizes, convolution
from ff_lightning.util.arguments import check_number, check_switch, check_whole


def squared_goodness(activity: Tensor) -> Tensor:
    """Goodness of each channel: the mean over space of its squared activity.

    ``g_k = mean_hw z_k^2``, always in float32.

    Args:
        activity: (B, K, H, W), any floating dtype.

    Returns:
        (B, K), float32.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Example:
        >>> squared_goodness(torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]]))
        tensor([[5., 2.]])
    """
    return activity.float().square().mean((2, 3))


def class_goodness(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Goodness of each class: squared class convolution, averaged over space.

    ``g_k = mean_hw (w_k * h + b_k)^2`` with one output channel per class and padding that keeps H x W.

    Args:
        features: Features of a block, (B, C, H, W).
        weight: (K, C, k, k) with k odd.
        bias: (K,).

    Returns:
        (B, K), float32; with k = 1 float64 for features of float64.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Example:
        >>> class_goodness(torch.ones(1, 2, 4, 4), torch.tensor([[1.0, 1.0], [1.0, -1.0]])[..., None, None])
        tensor([[4., 0.]])
    """
    if weight.shape[-1] > 1:
        return squared_goodness(F.conv2d(features, weight, bias, padding=weight.shape[-1] // 2))
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return gram.class_goodness(features, weight.flatten(1), bias)


class GoodnessHead(nn.Module):
    """A head as the paper has it: goodness is the squared class convolution, averaged over space.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        kernel_size: Of the class convolution: 1, 3 or 5.
        temperature: The goodness is divided by it before the softmax of the loss. Below 1 it sharpens.
        learn_temperature: Whether the temperature is trained with the head.
        depth: Number of layers before the class convolution, each a 3x3 convolution of stride 2 with batch norm
            and ReLU. 0 is the form of the paper.
        width: Channels of these layers. None: as many as the block has.

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
    ) -> None:
        super().__init__()
        check_head_sizes(in_channels, num_classes, width, kernel_size, (1, 3, 5))
        check_number("temperature", temperature, above=0)
        check_switch("learn_temperature", learn_temperature)
        check_whole("depth", depth, least=0)
        channels = [in_channels] + depth * [width or in_channels]
        self.features = nn.Sequential(
            *(layer for i, o in pairwise(channels) for layer in convolution(i, o, kernel_size=3, stride=2))
        )
        self.classes = nn.Conv2d(channels[-1], num_classes, kernel_size)
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    def forward(self, features: Tensor) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, H, W), any floating dtype.

        Returns:
            (B, K), float32.
        """
        goodness = class_goodness(self.features(features), self.classes.weight, self.classes.bias)
        return goodness * torch.exp(-self.log_temperature)
