"""Exports of a trained model, each compared with the original."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ff_lightning.inference.formats import WRITERS
from ff_lightning.inference.loading import load
from ff_lightning.inference.predictor import Predictor
from ff_lightning.util.arguments import check_choice
from ff_lightning.util.files import replacing

Format = Literal["onnx", "torch", "safetensors"]
TOLERANCE = 1e-5


def export(
    predictor: Predictor, path: str | Path, format: Format = "onnx", images: Tensor | None = None, **arguments: Any
) -> float:
    """Write a trained model for use elsewhere, read it back and compare its scores with those of the original.

    Args:
        predictor: The result of `load` for a checkpoint.
        path: The file to write; an old one is replaced.
        format: ``"onnx"``, ``"torch"`` (`torch.export`) or ``"safetensors"`` (weights alone); see
            `ff_lightning.inference.formats`.
        images: Normalised images (B, C, H, W) to compare on; None: eight of noise.
        arguments: The arguments of `load` besides the path, such as ``backbone=network``; only for safetensors.

    Returns:
        The largest difference of the scores of an image, relative to its largest score if that is above 1.

    Raises:
        ValueError: If the scores differ by more than 1e-5, or if the predictor is an export itself, or takes token ids.
        ModuleNotFoundError: If the format needs what is not installed.
    """
    check_choice("format", format, get_args(Format))
    path = Path(path).expanduser()
    ending, write = WRITERS[format]
    if path.suffix.lower() != ending:
        raise ValueError(f"path={str(path)!r}: a file of format={format!r} must end in {ending!r}")
    if not isinstance(predictor.network, nn.Module) or not hasattr(predictor.network, "hparams"):
        raise ValueError("the predictor is of an export: load the checkpoint, and export that")
    if predictor.network.vocabulary is not None:
        raise ValueError(
            "exports are of networks of images: this one takes token ids; `model.net.export()` is a module"
        )
    if images is None:
        images = torch.randn(8, *predictor.facts.input_shape, generator=torch.Generator().manual_seed(0))
    learner, device = predictor.network.cpu(), predictor.device
    with replacing(path) as part:
        named = part.with_name(f"{part.stem}{ending}")  # readers go by the ending
        try:
            write(learner, predictor.facts, named)
            differs = _difference(
                Predictor(learner, predictor.facts).scores(images), load(named, **arguments).scores(images)
            )
            if not differs <= TOLERANCE:
                raise ValueError(f"format={format!r}: the scores differ from those of the original by {differs:.1e}")
            named.replace(part)
        finally:
            named.unlink(missing_ok=True)
            learner.to(device)
    return differs


def _difference(original: Tensor, exported: Tensor) -> float:
    size = original.abs().amax(1, keepdim=True).clamp(min=1)
    return float(((original - exported).abs() / size).max())
