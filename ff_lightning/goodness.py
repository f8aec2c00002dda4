"""Goodness: how strongly the features of a block speak for each class.

Shapes: B batch, C channels, H x W positions, K classes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning import gram
from ff_lightning.arguments import check_choice, check_number, check_switch, check_whole, is_whole, shown
from ff_lightning.partition.trace import evaluating


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
        _check_head_sizes(in_channels, num_classes, width, kernel_size, (1, 3, 5))
        check_number("temperature", temperature, above=0)
        check_switch("learn_temperature", learn_temperature)
        check_whole("depth", depth, least=0)
        channels = [in_channels] + depth * [width or in_channels]
        self.features = nn.Sequential(
            *(layer for i, o in pairwise(channels) for layer in _convolution(i, o, kernel_size=3, stride=2))
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


class PooledHead(nn.Module):
    """A head that costs next to nothing: class kernels that cover a whole map, after it was averaged over regions.

    The features are averaged over ``regions x regions`` parts of the map and normalised over all features of an image,
    and a kernel for each class weighs every channel in every region, behind a layer (convolution, batch norm, ReLU)
    where that is asked for or makes the head smaller. The goodness of a class is the activity of its kernel, which has
    one position, so that there is nothing to average; it is not squared: evidence against a class counts as well.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        regions: Along each side of the map. None: 4, or 2 for more than 100 classes: their kernels would else outweigh
            the network itself.
        width: Channels of the layer. None: C, 128 at most, where a layer of 3x3 kernels is asked for or a layer leaves
            the head with fewer weights, as it does for many channels and classes; else there is no layer.
        kernel_size: Of the layer, in regions: 1 or 3.
        size: H x W of the features; where that is less than `regions`, there are fewer. None: it is not less.

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
        _check_head_sizes(in_channels, num_classes, width, kernel_size, (1, 3))
        check_whole("regions", regions, optional=True)
        regions = regions if regions is not None else 4 if num_classes <= 100 else 2
        if size is not None and not (
            isinstance(size, Sequence) and len(size) == 2 and all(is_whole(n) and n for n in size)
        ):
            raise ValueError(f"size={shown(size)}: must be (H, W) of the features, or None")
        rows, columns = size if size is not None else (regions, regions)
        self.regions = min(regions, rows), min(regions, columns)
        of_a_channel = self.regions[0] * self.regions[1] * num_classes  # weights of the class kernels
        narrow = min(in_channels, 128)
        if width is None and (kernel_size > 1 or narrow * (in_channels + of_a_channel) < in_channels * of_a_channel):
            width = narrow
        self.features = nn.Sequential(*(_convolution(in_channels, width, kernel_size) if width else []))
        # a kernel that covers the whole map is a linear layer, which costs a fraction of the convolution on a CPU
        self.classes = nn.Linear((width or in_channels) * self.regions[0] * self.regions[1], num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, H, W), any floating dtype.

        Returns:
            (B, K), float32.
        """
        means = region_means(features, self.regions)
        activity: Tensor = self.classes(self.features(F.layer_norm(means, means.shape[1:])).flatten(1))
        return activity.float()


def region_means(features: Tensor, regions: tuple[int, int]) -> Tensor:
    """Mean over regions, as `adaptive_avg_pool2d` draws them: (B, C, H, W) -> (B, C, *regions).

    On a CPU, half its time or less: large regions are summed line by line, small ones by one matrix product.
    """
    size = tuple(features.shape[2:])
    if size == regions:
        return features
    if features.device.type != "cpu" or not features.is_contiguous():
        return F.adaptive_avg_pool2d(features, regions)
    (lines, no_line), (width, no_column) = (divmod(side, part) for side, part in zip(size, regions, strict=True))
    if width >= 8 and no_line == no_column == 0:
        return features.unflatten(2, (-1, lines)).mean(3).unflatten(3, (-1, width)).mean(4)
    return (features.flatten(2) @ _shares(size, regions).to(features.dtype)).unflatten(2, regions)


def _shares(size: Sequence[int], regions: Sequence[int]) -> Tensor:
    """The share of each position in the mean over each region, (H W, number of regions)."""
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(side), part) for side, part in zip(size, regions, strict=True))
    return torch.kron(rows, columns)


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    padding = kernel_size // 2
    kind = _Pointwise if kernel_size == 1 else nn.Conv2d
    convolution = kind(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution of a small map as one matrix product: two thirds of its time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)


HeadFactory = Callable[[int, int], nn.Module]
"""Makes the head of a block from its number of channels and the number of classes.

If it has a parameter `size`, it is given H x W of the features as well.
"""

HEADS: dict[str, HeadFactory] = {
    "pooled": PooledHead,
    "deep": GoodnessHead,
    "paper": partial(GoodnessHead, depth=0, temperature=1.0),
}


def check_head(head: Any) -> None:
    """Raise ValueError unless a head is one of the names, or a class or function that makes one."""
    if isinstance(head, nn.Module):
        raise ValueError(
            f"head={shown(head)} is a head that is already made: give its class, or a function (channels, classes), "
            "since each block has a head of its own"
        )
    if isinstance(head, str) or not callable(head):
        check_choice("head", head, HEADS, f"one of {list(HEADS)} or a function (channels, classes)")


def make_head(factory: HeadFactory, map_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The head for features of shape (C, H, W); see `HeadFactory`.

    Raises:
        ValueError: If what is made is no module from features (B, C, H, W) to goodness (B, K).
    """
    of_partial = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
    name = f"head={next((part.__name__ for part in of_partial if isinstance(part, type)), shown(factory))}"
    try:
        takes = signature(factory)
        arguments = {*takes.parameters, *getattr(factory, "keywords", {})}  # the command line gives a partial
        size = {"size": map_shape[1:]} if "size" in arguments else {}
        takes.bind(map_shape[0], num_classes, **size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be called with (channels, classes): {error}") from error
    head = factory(map_shape[0], num_classes, **size)
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} makes {shown(head)}: it must make an nn.Module from (B, C, H, W) to goodness (B, K)")
    _check_goodness(name, head, map_shape, num_classes)
    return head


def _check_goodness(name: str, head: nn.Module, map_shape: Sequence[int], num_classes: int) -> None:
    """Raise ValueError unless a head gives a goodness for each of two images and each class."""
    like = next(head.parameters(), torch.zeros(0))
    features = torch.zeros(2, *map_shape, device=like.device, dtype=like.dtype)
    try:
        with evaluating(head):
            goodness = head(features)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} fails for features of shape {tuple(features.shape)}: {why}") from error
    shape = tuple(goodness.shape) if isinstance(goodness, Tensor) else shown(goodness)
    if shape != (2, num_classes) or not goodness.is_floating_point():
        raise ValueError(
            f"{name} makes {shape} of features {tuple(features.shape)}: it must make goodness of shape "
            f"{(2, num_classes)}, for each image and each class a floating-point number"
        )


def _check_head_sizes(channels: int, classes: int, width: int | None, kernel: int, kernels: Sequence[int]) -> None:
    check_whole("in_channels", channels)
    check_whole("num_classes", classes)
    check_whole("width", width, optional=True)
    if not is_whole(kernel) or kernel not in kernels:
        raise ValueError(f"kernel_size={shown(kernel)}: must be one of {list(kernels)}")
