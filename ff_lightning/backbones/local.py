"""Local receptive fields without weight sharing.

Shapes: B batch, C channels, H x W positions of the input, h x w of the output, N values of a receptive field.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_whole, is_whole, shown


class LocallyConnected(nn.Module):
    """A convolution in which each position has weights of its own, (B, C, H, W) -> (B, C', h, w).

    The weights begin as those of `nn.Linear` do: inputs of mean square 1 give outputs of mean square 1/3.

    Args:
        in_channels: C.
        out_channels: C'.
        size: H and W of the input.
        kernel_size: Side of a receptive field.
        stride: Pixels from one field to the next.
        padding: Zeros around the input, on each side.

    Attributes:
        weight: (C', N, h w), N in the order of C, then rows and columns of the field.
        bias: (C', h w).

    Raises:
        ValueError: If an argument is out of its range, if no field fits, or if an input has another shape.

    Examples:
        >>> layer = LocallyConnected(1, 8, (28, 28), kernel_size=10, stride=6)
        >>> layer(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sequence[int],
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        check_whole("in_channels", in_channels)
        check_whole("out_channels", out_channels)
        check_whole("kernel_size", kernel_size)
        check_whole("stride", stride)
        check_whole("padding", padding, least=0)
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2 or not all(map(is_whole, size)):
            raise ValueError(f"size={shown(size)}: must be the height and width of the input")
        if min(size) + 2 * padding < kernel_size:
            raise ValueError(
                f"size={shown(size)}: no field fits, must be at least kernel_size - 2 padding = "
                f"{kernel_size - 2 * padding}"
            )
        self.in_shape = (in_channels, *size)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.out_size = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in size)
        values, positions = in_channels * kernel_size**2, math.prod(self.out_size)
        bound = values**-0.5
        self.weight = nn.Parameter(torch.empty(out_channels, values, positions).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels, positions).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Each field with its own weights, (B, C, H, W) -> (B, C', h, w)."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"a sample has the shape {tuple(x.shape[1:])}: this layer is made for {self.in_shape}")
        fields = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)  # (B, N, h w)
        return (torch.einsum("bnp,cnp->bcp", fields, self.weight) + self.bias).unflatten(2, self.out_size)

    def extra_repr(self) -> str:
        """Shapes, for the printed network."""
        return (
            f"{self.in_shape} -> {(len(self.bias), *self.out_size)}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


def local(num_classes: int = 10, input_shape: Sequence[int] = (1, 28, 28)) -> nn.Sequential:
    """Three layers of local receptive fields, each with a ReLU, and a linear classifier.

    For MNIST the layers have 4 x 4 positions with 128 channels (10 x 10 pixels every 6), 3 x 3 with 220 and 2 x 2 with
    512, each position of these on 2 x 2 neighbours.

    Args:
        num_classes: Outputs of the classifier.
        input_shape: (C, H, W) of an image, from 22 x 22 pixels up.

    Returns:
        A network from (B, C, H, W) to (B, num_classes). Each layer is a block.

    Raises:
        ValueError: If the samples are no images, or too small.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345.
    """
    channels, *size = input_shape
    if len(size) != 2 or min(size) < 22:
        raise ValueError(f"input_shape={shown(input_shape)}: backbone='local' needs images of at least 22 x 22 pixels")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (out, kernel, stride) in enumerate([(128, 10, 6), (220, 2, 1), (512, 2, 1)], start=1):
        layer = LocallyConnected(channels, out, size, kernel, stride)
        layers[f"layer{number}"] = nn.Sequential(layer, nn.ReLU())
        channels, size = out, [*layer.out_size]
    layers["classifier"] = nn.Sequential(nn.Flatten(), nn.Linear(channels * math.prod(size), num_classes))
    return nn.Sequential(layers)
