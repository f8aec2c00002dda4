"""A plain network of linear layers, for vectors."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def mlp(num_classes: int = 10, in_features: int = 784, widths: Sequence[int] = (512, 512, 512)) -> nn.Sequential:
    """For each width a linear layer with batch norm and ReLU; then a linear classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_features: Numbers of a sample; images and signals are flattened.
        widths: Of the hidden layers.

    Returns:
        A network from (B, ...) to (B, num_classes). Each hidden layer is a block.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, width in enumerate(widths, start=1):
        layers[f"layer{number}"] = nn.Sequential(nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU())
        in_features = width
    layers["classifier"] = nn.Linear(in_features, num_classes)
    return nn.Sequential(layers)
