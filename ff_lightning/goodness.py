"""Goodness: how strongly the features of a block speak for each class.

Shapes: B batch, C channels, H x W positions, K classes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning import fused
from ff_lightning.fused import Normed


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
    return fused.class_goodness(features, weight.flatten(1), bias)


class GoodnessHead(nn.Module):
    """The auxiliary head of a block: its features -> one goodness per class, used for the local loss and the vote.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        kernel_size: Of the class convolution: 1, 3 or 5.
        temperature: The goodness is divided by it before the softmax of the loss. Below 1 it sharpens.
        learn_temperature: Whether the temperature is trained with the head.
        depth: Number of layers before the class convolution, each a 3x3 convolution of stride 2 with batch norm
            and ReLU. 0 is the form of the paper.
        width: Channels of these layers. None: as many as the block has.
        pool: Side of the windows over which the features are averaged before these layers; smaller where fewer than
            two windows would fit. Above 1 the layers have stride 1.
        layer_kernel_size: Of the convolutions of these layers: 1 or 3.

    Raises:
        ValueError: If an argument is out of its range.
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
        pool: int = 1,
        layer_kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if kernel_size not in (1, 3, 5):
            raise ValueError(f"kernel_size={kernel_size} of the goodness head: must be 1, 3 or 5")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} of the goodness head: must be above 0")
        if depth < 0 or (width is not None and width < 1):
            raise ValueError(f"depth={depth}, width={width} of the goodness head: must be >= 0 and >= 1")
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(depth):
            out = width or in_channels
            convolution = nn.Conv2d(
                channels,
                out,
                layer_kernel_size,
                stride=2 if pool == 1 else 1,
                padding=layer_kernel_size // 2,
                bias=False,
            )
            layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.pool = pool
        self.features = nn.Sequential(*layers)
        self.classes = nn.Conv2d(channels, num_classes, kernel_size)
        log_temperature = torch.tensor(math.log(temperature))
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def takes_normed(self) -> bool:
        """Whether it works on the output of a block before its layer norm, and keeps nothing but that for backward."""
        return self.pool > 1 or (not self.features and self.classes.kernel_size == (1, 1))

    def forward(self, features: Tensor | Normed) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, H, W); `Normed` where the head `takes_normed`.

        Returns:
            (B, K), float32.
        """
        if self.pool > 1:
            features = self._pooled(features)
        if isinstance(features, Normed):
            bias = cast(Tensor, self.classes.bias)
            goodness = fused.class_goodness(features, self.classes.weight.flatten(1), bias)
        else:
            goodness = class_goodness(self.features(features), self.classes.weight, self.classes.bias)
        return goodness * torch.exp(-self.log_temperature)

    def _pooled(self, features: Tensor | Normed) -> Tensor:
        sides = (features.value if isinstance(features, Normed) else features).shape[2:]
        window = (max(1, min(self.pool, sides[0] // 2)), max(1, min(self.pool, sides[1] // 2)))
        return fused.pooled(features, window)


HeadFactory = Callable[[int, int], nn.Module]
"""Makes the head of a block from its number of channels and the number of classes."""

HEADS: dict[str, HeadFactory] = {
    "deep": GoodnessHead,
    "pooled": partial(GoodnessHead, pool=4, layer_kernel_size=1),
    "paper": partial(GoodnessHead, depth=0, temperature=1.0),
}
