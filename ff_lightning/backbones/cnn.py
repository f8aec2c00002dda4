"""A plain convolutional network for small images."""

from collections import OrderedDict

from torch import nn


def cnn(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> nn.Sequential:
    """A plain network of three blocks: two 3x3 convolutions, each with batch norm and ReLU, and a pool that halves.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of an image.
        width: Channels of the first convolution; the others have 2, 4, 4, 8 and 8 times as many.

    Returns:
        A network for images from 8 pixels up, in the spirit of the small CNN of arXiv 2501.03176.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, factors in enumerate([(1, 2), (4, 4), (8, 8)], start=1):
        block: list[nn.Module] = []
        for factor in factors:
            out = width * factor
            block += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers[f"block{number}"] = nn.Sequential(*block, nn.MaxPool2d(2))
    layers["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(layers)
