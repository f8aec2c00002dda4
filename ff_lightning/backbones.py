"""Networks by name: torchvision's, and a plain convolutional one."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision import models

from ff_lightning.suggest import unknown

Stem = Literal["standard", "small"]


def cnn(num_classes: int = 10, in_channels: int = 3, width: int = 32) -> nn.Sequential:
    """A plain network of six 3x3 convolutions, each with batch norm and ReLU; the maps are halved after every second.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of an image.
        width: Channels of the first convolution; the others have 2, 4, 4, 8 and 8 times as many.

    Returns:
        A network for images from 8 pixels up, in the spirit of the small CNN of arXiv 2501.03176.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for i, factor in enumerate((1, 2, 4, 4, 8, 8)):
        out = width * factor
        convolution = [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        layers[f"conv{i + 1}"] = nn.Sequential(*convolution, *([nn.MaxPool2d(2)] if i % 2 else []))
        channels = out
    layers["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(layers)


def build_backbone(name: str, num_classes: int, input_shape: Sequence[int], stem: Stem = "standard") -> nn.Module:
    """Build a network by its name, fit for images of a shape.

    Args:
        name: ``"cnn"`` or the name of a torchvision classification model.
        num_classes: Outputs of the classifier.
        input_shape: (C, H, W) of an image; only C matters here.
        stem: ``"small"``: see `small_stem`.

    Raises:
        ValueError: If the name is not known.
    """
    known = ["cnn", *models.list_models(module=models)]
    if name not in known:
        raise ValueError(unknown("backbone", name, known, "'cnn', the name of a torchvision model, or an nn.Module"))
    if name == "cnn":
        model: nn.Module = cnn(num_classes, in_channels=input_shape[0])
    else:
        extra = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, num_classes=num_classes, **extra)
        first_name, first = _first_convolution(model)
        if first.in_channels != input_shape[0]:
            _replace(model, first_name, _like(first, in_channels=input_shape[0]))
    return small_stem(model) if stem == "small" else model


def small_stem(model: nn.Module) -> nn.Module:
    """Make the first convolution of a network keep the resolution, and drop the pooling behind it; for 32 pixels.

    A 7x7 or other convolution of stride 2 becomes a 3x3 convolution of stride 1; a max-pooling before the second
    convolution goes. Warns where the network has no such stem.
    """
    name, first = _first_convolution(model)
    if first.stride == (1, 1):
        warnings.warn(f"stem='small' has no effect: {type(model).__name__} has no strided stem", stacklevel=3)
        return model
    _replace(model, name, _like(first, kernel_size=3, stride=1, padding=1))
    for name, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d):
            _replace(model, name, nn.Identity())
            break
        if isinstance(module, nn.Conv2d) and module.in_channels == first.out_channels:
            break
    return model


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _like(convolution: nn.Conv2d, **changes: int) -> nn.Conv2d:
    """A new convolution with the arguments of another one, but for some changes."""
    return nn.Conv2d(
        changes.get("in_channels", convolution.in_channels),
        convolution.out_channels,
        changes.get("kernel_size", convolution.kernel_size),  # type: ignore[arg-type]
        changes.get("stride", convolution.stride),  # type: ignore[arg-type]
        changes.get("padding", convolution.padding),  # type: ignore[arg-type]
        bias=convolution.bias is not None,
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
