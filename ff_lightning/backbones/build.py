"""Networks by name: the package's own, torchvision's and timm's."""

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import nn
from torchvision import models

from ff_lightning.backbones.cfse import cfse
from ff_lightning.backbones.cnn import cnn
from ff_lightning.backbones.local import local
from ff_lightning.backbones.mlp import mlp
from ff_lightning.backbones.signal import signal
from ff_lightning.backbones.stem import first_convolution, like, replace, small_stem
from ff_lightning.backbones.text import text
from ff_lightning.backbones.weights import load_weights, read_weights
from ff_lightning.util.arguments import check_shape, check_whole
from ff_lightning.util.suggest import unknown

log = logging.getLogger(__name__)

Backbone = Literal["cnn", "cfse", "local", "mlp", "signal", "text"] | nn.Module | str
"""Our own names come first: for others, jsonargparse looks through all modules that there are, many times a parse."""
Stem = Literal["standard", "small"]

_MODULE = "an nn.Module (in YAML: class_path and init_args)"
_OTHERS = "for vectors there is 'mlp', for signals (C, T) 'signal', for token ids 'text'"


def build_backbone(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    stem: Stem = "standard",
    weights: str | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """Build a network by its name, for samples of a shape.

    Args:
        name: ``"cnn"``, ``"cfse"``, ``"local"``, ``"mlp"``, ``"signal"`` or ``"text"``, the name of a torchvision
            classification model, or ``"timm/NAME"`` where timm is installed.
        num_classes: Outputs of the classifier.
        input_shape: (C, H, W) of an image, of which only C matters to most networks, (C, T) of a signal, (T,) for the
            most tokens of a text; an mlp takes any shape.
        stem: ``"small"``: see `small_stem`.
        weights: ``"DEFAULT"`` or another name of torchvision's weights for the model, or the path of a state dict.
        vocabulary: Number of token ids.

    Raises:
        ValueError: If the name or the weights are not known, or the weights, the shape or the vocabulary do not fit.
    """
    check_whole("vocabulary", vocabulary, optional=True)
    if name != "text" and vocabulary is not None:
        raise ValueError(f"backbone={name!r} takes no token ids (vocabulary={vocabulary}): give 'text', or {_MODULE}")
    if name == "text" and vocabulary is None:
        raise ValueError("backbone='text' needs the vocabulary, the number of token ids, and input_shape=(T,)")
    try:
        check_shape("input_shape", input_shape, name)
    except ValueError as error:
        raise ValueError(f"{error} for backbone={name!r}; {_OTHERS}") from None
    model = _build(name, num_classes, input_shape, vocabulary)
    if weights is not None:
        load_weights(model, read_weights(name, weights))
    first_name, first = first_convolution(model)
    if first is not None and first.in_channels != input_shape[0]:
        replace(model, first_name, like(first, in_channels=input_shape[0]))
        if weights is not None:
            log.warning("%s starts anew: the images have %d channels", first_name, input_shape[0])
    return small_stem(model) if stem == "small" else model


_OWN: dict[str, Callable[[int, Sequence[int], int | None], nn.Module]] = {
    "cnn": lambda num_classes, shape, _: cnn(num_classes, shape[0]),
    "cfse": lambda num_classes, shape, _: cfse(num_classes, shape[0]),
    "local": lambda num_classes, shape, _: local(num_classes, shape),
    "mlp": lambda num_classes, shape, _: mlp(num_classes, math.prod(shape)),
    "signal": lambda num_classes, shape, _: signal(num_classes, shape[0]),
    "text": lambda num_classes, shape, vocabulary: text(num_classes, cast(int, vocabulary), shape[0]),
}


def known_names() -> list[str]:
    """Names of the package's own networks and of torchvision's."""
    return [*_OWN, *models.list_models(module=models)]


def _build(name: str, num_classes: int, shape: Sequence[int], vocabulary: int | None) -> nn.Module:
    if name in _OWN:
        return _OWN[name](num_classes, shape, vocabulary)
    if name in models.list_models(module=models):
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
            known_names(),
            f"one of {list(_OWN)}, the name of a torchvision model, 'timm/NAME', or {_MODULE}",
        )
    )
