"""The network of channel-wise competition."""

from collections.abc import Sequence

from torch import nn

from ff_lightning.util.arguments import check_whole


def cfse(num_classes: int = 10, in_channels: int = 3, channels: Sequence[int] = (20, 80, 240, 480)) -> nn.Sequential:
    """Blocks of a 3x3 convolution, ReLU and batch norm; every second block has a group of channels for each class.

    The second, fourth, ... convolution has a group for each class, and after its ReLU a max-pool that halves the map.

    Args:
        num_classes: K, the number of groups.
        in_channels: Channels of an image.
        channels: Of each block; multiples of K.

    Returns:
        A network of blocks alone, without a classifier.

    Raises:
        ValueError: If a number of channels is not a multiple of K.

    Source: Papachristodoulou et al., Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm,
    arXiv 2312.12668; these channels are those of their code for MNIST, Fashion-MNIST and CIFAR-10.
    """
    blocks = []
    for number, out in enumerate(channels):
        check_whole("channels", out)
        if out % num_classes:
            raise ValueError(f"channels={list(channels)}: {out} is no multiple of the {num_classes} classes")
        apart = number % 2 == 1
        convolution = nn.Conv2d(in_channels, out, 3, padding=1, groups=num_classes if apart else 1)
        pool = [nn.MaxPool2d(2)] if apart else []
        blocks.append(nn.Sequential(convolution, nn.ReLU(), *pool, nn.BatchNorm2d(out)))
        in_channels = out
    return nn.Sequential(*blocks)
