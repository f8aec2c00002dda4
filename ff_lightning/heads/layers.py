"""What the heads have in common: their layers, and the checks of their sizes."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_whole, is_whole, shown


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size of the map (but for the stride), batch norm and ReLU."""
    padding = kernel_size // 2
    kind = _Pointwise if kernel_size == 1 else nn.Conv2d
    convolution = kind(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


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
