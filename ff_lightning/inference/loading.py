"""From a file or a folder to a predictor."""

import io
from pathlib import Path
from typing import Any

import lightning
import torch

from ff_lightning.commands.ckpt_path import read_checkpoint
from ff_lightning.inference import formats
from ff_lightning.inference.facts import Facts, facts_of
from ff_lightning.inference.predictor import Predictor
from ff_lightning.modules import LocalLearner
from ff_lightning.training.checkpoint_io import is_remote
from ff_lightning.training.trust import named_class
from ff_lightning.util.extras import needs


def load(path: str | Path, device: str | torch.device = "cpu", **arguments: Any) -> Predictor:
    """A predictor for a checkpoint or an export.

    Args:
        path: A checkpoint (path or URL), what `export` wrote (``.onnx``, ``.pt2``, ``.safetensors``), or a folder that
            `ff_lightning.inference.save_pretrained` wrote.
        device: Where it runs; ONNX runs on the CPU.
        arguments: Arguments of the model that replace the stored ones, such as ``backbone=network`` for a network that
            was given as a module. Only for checkpoints and ``.safetensors``.

    Raises:
        ValueError: If the file is none of these, is damaged, is not for classification, names a class that is neither
            imported nor of this package, or does not fit the arguments.
        ModuleNotFoundError: If the format needs what is not installed.
    """
    if is_remote(path):
        return _of_checkpoint(str(path), device, arguments)
    place = Path(path).expanduser()
    if place.is_dir():
        place = place / formats.HUB_FILES[0]
    if not place.is_file():
        raise ValueError(f"path={str(place)!r}: there is no such file")
    ending = place.suffix.lower()
    if ending == ".safetensors":
        return _of_safetensors(place, device, arguments)
    if ending not in formats.READERS:
        return _of_checkpoint(str(place), device, arguments)
    if arguments:
        raise ValueError(f"{list(arguments)} have no effect on {place}, which holds its network: leave them out")
    return Predictor(*formats.READERS[ending](place, torch.device(device)), device)


def from_pretrained(name: str, revision: str | None = None, device: str = "cpu", **arguments: Any) -> Predictor:
    """A predictor for a model of the Hugging Face hub, or for a folder that `save_pretrained` wrote.

    Args:
        name: ``"user/model"``, or the path of the folder.
        revision: Branch, tag or commit of the model on the hub.
        device: Where it runs.
        arguments: As for `load`.

    Raises:
        ModuleNotFoundError: If huggingface_hub is needed, and is not installed.
        ValueError: As `load`.
    """
    if Path(name).expanduser().is_dir():
        return load(name, device, **arguments)
    hub = needs("huggingface_hub", "hub")
    return load(hub.snapshot_download(name, revision=revision, allow_patterns=formats.HUB_FILES), device, **arguments)


def _of_checkpoint(path: str, device: str | torch.device, arguments: dict[str, Any]) -> Predictor:
    facts = facts_of(read_checkpoint(path), path)
    return Predictor(_learner(facts, path, device, arguments), facts, device)


def _of_safetensors(path: Path, device: str | torch.device, arguments: dict[str, Any]) -> Predictor:
    """By way of a checkpoint in memory, so that what it names is checked as in any other."""
    tensors, facts = formats.read_safetensors(path)
    source = io.BytesIO()
    content = {"state_dict": tensors, "hyper_parameters": facts.arguments}
    torch.save({**content, "pytorch-lightning_version": lightning.__version__}, source)
    source.seek(0)
    return Predictor(_learner(facts, source, device, arguments), facts, device)


def _learner(facts: Facts, source: Any, device: str | torch.device, arguments: dict[str, Any]) -> LocalLearner:
    cls: Any = named_class("the model", facts.class_path, (LocalLearner,))
    learner: LocalLearner = cls.load_from_checkpoint(source, map_location="cpu", **arguments)
    return learner.eval().requires_grad_(False).to(device)
