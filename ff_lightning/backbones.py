"""Networks by name: torchvision's, timm's, and a plain one; with their weights, and adapted to small images."""

import importlib.util
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from ff_lightning.partition.features import read_features
from ff_lightning.util.arguments import check_path, check_shape
from ff_lightning.util.files import check_sums
from ff_lightning.util.suggest import unknown

log = logging.getLogger(__name__)

Stem = Literal["standard", "small"]

_REDUCTION = 8  # of a small stem: 32 pixels become maps of 4 x 4


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


def build_backbone(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    stem: Stem = "standard",
    weights: str | None = None,
) -> nn.Module:
    """Build a network by its name, fit for images of a shape.

    Args:
        name: ``"cnn"``, the name of a torchvision classification model, or ``"timm/NAME"`` where timm is installed.
        num_classes: Outputs of the classifier.
        input_shape: (C, H, W) of an image; only C matters here.
        stem: ``"small"``: see `small_stem`.
        weights: ``"DEFAULT"`` or another name of torchvision's weights for the model, or the path of a state dict.

    Raises:
        ValueError: If the name or the weights are not known, or the weights do not fit.
    """
    check_shape("input_shape", input_shape, name)
    model = _build(name, num_classes, input_shape[0])
    if weights is not None:
        load_weights(model, _read_weights(name, weights))
    first_name, first = _first_convolution(model)
    if first is not None and first.in_channels != input_shape[0]:
        _replace(model, first_name, _like(first, in_channels=input_shape[0]))
        if weights is not None:
            log.warning("%s starts anew: the images have %d channels", first_name, input_shape[0])
    return small_stem(model) if stem == "small" else model


def _build(name: str, num_classes: int, channels: int) -> nn.Module:
    known = ["cnn", *models.list_models(module=models)]
    if name == "cnn":
        return cnn(num_classes, channels)
    if name in known:
        plain = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, num_classes=num_classes, **plain)
    if name.startswith("timm/"):
        if importlib.util.find_spec("timm") is None:
            raise ValueError(f"backbone={name!r} needs timm: pip install 'ff-lightning[timm]'")
        timm: Any = importlib.import_module("timm")
        if name[5:] not in timm.list_models():
            raise ValueError(
                unknown("backbone", name, [f"timm/{model}" for model in timm.list_models()], "a timm model")
            )
        return timm.create_model(name[5:], pretrained=False, num_classes=num_classes)
    raise ValueError(
        unknown(
            "backbone",
            name,
            known,
            "'cnn', the name of a torchvision model, 'timm/NAME', or an nn.Module (in YAML: class_path and init_args)",
        )
    )


def _read_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    """The state dict of torchvision's weights of a name, or of a local file; only tensors are read."""
    check_path("weights", weights)
    path = Path(weights).expanduser()
    if path.is_file():
        check_sums(path)
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            why = str(error).split(". ")[0].splitlines()[0]
            raise ValueError(f"weights={weights!r} is not whole, or no file of weights alone: {why}") from error
        stored = stored.get("state_dict", stored) if isinstance(stored, Mapping) else stored
        if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
            raise ValueError(f"weights={weights!r} holds no state dict: it must hold tensors by name")
        return stored
    if name not in models.list_models(module=models):
        what = "a folder, not a file" if path.is_dir() else "no file"
        raise ValueError(f"weights={weights!r} is {what}, and torchvision has no weights for {name!r}")
    offered = models.get_model_weights(name)
    if weights not in offered.__members__:
        names = list(offered.__members__)
        where = ", which is a folder" if path.is_dir() else ""
        raise ValueError(unknown("weights", weights, names, f"the path of a state dict{where}, or one of {names}"))
    return offered[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)


_OF_A_BLOCK = re.compile(r"(?:.+\.)?blocks\.\d+\.body\.(.+)")
"""Tensors of a `LocalNet`, and their names in the network that was cut."""


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of the same network; its classifier may be one for other classes and then starts anew.

    Args:
        model: The network.
        state: Tensors by name, with or without a common prefix such as ``model.``; those of an SFF checkpoint have no
            classifier.

    Raises:
        ValueError: If any other tensor is missing, has another shape or belongs elsewhere.
    """
    own = model.state_dict()
    blocks = {match[1]: value for key, value in state.items() if (match := _OF_A_BLOCK.fullmatch(key))}
    state = blocks or _without_prefix(state, own)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    of_classifier = {f"{layers[-1]}.weight", f"{layers[-1]}.bias"}
    if blocks:  # whole parts of the network that SFF leaves out
        parts = {key.split(".")[0] for key in blocks}
        of_classifier |= {key for key in own if key.split(".")[0] not in parts}
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    foreign = [key for key in state if key not in own]
    misfits = [*(key for key in wrong if key not in of_classifier), *foreign]
    if misfits:
        first = misfits[0]
        theirs = tuple(state[first].shape) if first in state else "nothing"
        ours = tuple(own[first].shape) if first in own else "nothing"
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: {len(wrong) + len(foreign)} tensors differ, such as "
            f"{first!r}: {theirs} in the weights, {ours} in the network"
        )
    if wrong:
        why = "a checkpoint of SFF has none" if blocks else "the weights were made for other classes"
        log.warning("the classifier %s starts anew: %s", layers[-1], why)
    model.load_state_dict({key: own[key] if key in wrong else state[key] for key in own})


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take a common prefix away, such as the one of a LightningModule or of DistributedDataParallel."""
    first = next(iter(own))
    prefix = next((key.removesuffix(first) for key in state if key.endswith(f".{first}")), "")
    if first in state or not prefix:
        return state
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def small_stem(model: nn.Module) -> nn.Module:
    """Adapt a network for images of 224 pixels to images of about 32: a stem that keeps the resolution.

    From the front, convolutions lose their stride and poolings go, until the network reduces an image to an eighth of
    its side (32 pixels to maps of 4 x 4); a first convolution larger than 3x3 becomes a 3x3 one. So ResNets lose the
    stride and the pooling of the stem, as is usual for CIFAR; MobileNets and EfficientNets lose the strides of the stem
    and of the first strided block. Warns where the network has no strided stem.

    Raises:
        ValueError: If the network cannot be traced; see `ff_lightning.partition`.
    """
    _, first = _first_convolution(model)
    if first is None or max(first.stride) == 1:
        warnings.warn(f"stem='small' has no effect: {type(model).__name__} has no strided stem", stacklevel=4)
        return model
    size = 128
    example = torch.zeros(1, first.in_channels, size, size)
    while True:
        features = read_features(model, example)
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
                _replace(model, name, nn.Identity())
            elif module is first and max(module.kernel_size) > 3:
                _replace(model, name, _like(module, kernel_size=3, stride=1, padding=1))
            else:
                module.stride = (1, 1)


def _stride(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return module.stride if isinstance(module.stride, int) else max(module.stride)
    return 1


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(found, ("", None))


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
