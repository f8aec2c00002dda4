"""Networks for large images, adapted to small ones."""

import warnings

import torch
from torch import nn

from ff_lightning.partition.features import read_features

_REDUCTION = 8  # of a small stem: 32 pixels become maps of 4 x 4


def small_stem(model: nn.Module) -> nn.Module:
    """Adapt a network for images of 224 pixels to images of about 32: a stem that keeps the resolution.

    Starting at the first layers, strides of convolutions and poolings are removed until the last maps have an eighth of
    the image's side (4 x 4 for 32 pixels). A first convolution larger than 3x3 becomes 3x3. So ResNets lose the stride
    and the pooling of the stem, as is usual for CIFAR; MobileNets and EfficientNets lose the strides of the stem and of
    the first strided block. Warns if the network has no strided stem.

    Raises:
        ValueError: If the network cannot be traced; see `ff_lightning.partition`.
    """
    _, first = first_convolution(model)
    if first is None or max(first.stride) == 1:
        warnings.warn(f"stem='small' has no effect: {type(model).__name__} has no strided stem", stacklevel=4)
        return model
    size = 128
    example = torch.zeros(1, first.in_channels, size, size)
    while True:
        try:
            features = read_features(model, example)
        except ValueError as error:
            raise ValueError(f"stem='small' does not suit this network, give stem='standard' ({error})") from error
        sides = {
            features.input: size,
            **{op.node: op.shape[-1] for op in features.ops if op.shape and len(op.shape) == 4},
        }
        if size <= _REDUCTION * min(side for side in sides.values() if side > 1):  # 1: pooled values, not a map
            return model
        strided: dict[int, list[str]] = {}
        for op in features.ops:
            if op.node.op == "call_module" and _stride(model.get_submodule(str(op.node.target))) > 1:
                strided.setdefault(sides[op.node.all_input_nodes[0]], []).append(str(op.node.target))
        for name in strided[max(strided)]:  # a shortcut beside a strided convolution is at the same resolution
            module = model.get_submodule(name)
            if not isinstance(module, nn.Conv2d):
                replace(model, name, nn.Identity())
            elif module is first and max(module.kernel_size) > 3:
                replace(model, name, like(module, kernel_size=3, stride=1, padding=1))
            else:
                module.stride = (1, 1)


def _stride(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return module.stride if isinstance(module.stride, int) else max(module.stride)
    return 1


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The first convolution of images, and its name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, ("", None))


def like(convolution: nn.Conv2d, **changes: int) -> nn.Conv2d:
    """A new convolution with the arguments of another one, but for some changes."""
    return nn.Conv2d(
        changes.get("in_channels", convolution.in_channels),
        convolution.out_channels,
        changes.get("kernel_size", convolution.kernel_size),  # type: ignore[arg-type]
        changes.get("stride", convolution.stride),  # type: ignore[arg-type]
        changes.get("padding", convolution.padding),  # type: ignore[arg-type]
        bias=convolution.bias is not None,
    )


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module by another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
