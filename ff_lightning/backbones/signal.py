"""A residual network with convolutions along time, for signals.

Shapes: B batch, C channels, T samples in time.
"""

from collections import OrderedDict

from torch import Tensor, nn

_KERNEL = 7


def signal(num_classes: int = 10, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """A stem, six residual blocks at three resolutions, and a linear classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of a signal.
        width: Channels of the stem and of the first two blocks; the others have 2 and 4 times as many.

    Returns:
        A network from (B, C, T) to (B, num_classes), for T of 32 or more. The stem and every other block halve the
        resolution.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_layer(in_channels, width, 2))
    channels = width
    for number, out in enumerate([width, 2 * width, 4 * width], start=1):
        layers[f"stage{number}"] = nn.Sequential(_Residual(channels, out, 2), _Residual(out, out, 1))
        channels = out
    layers["classifier"] = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(layers)


def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv1d(in_channels, out_channels, _KERNEL, stride, _KERNEL // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(out_channels), nn.ReLU())


class _Residual(nn.Module):
    """Two convolutions and a shortcut, (B, C, T) -> (B, C', T / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = _layer(in_channels, out_channels, stride)
        self.second = _layer(out_channels, out_channels, 1)[:2]
        same = stride == 1 and in_channels == out_channels
        projection = nn.Conv1d(in_channels, out_channels, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(projection, nn.BatchNorm1d(out_channels))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))
