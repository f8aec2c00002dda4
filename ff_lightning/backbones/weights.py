"""Weights for a network by name: torchvision's, or those of a file."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torchvision import models

from ff_lightning.util.arguments import check_path
from ff_lightning.util.files import check_sums
from ff_lightning.util.suggest import unknown

log = logging.getLogger(__name__)


def read_weights(name: str, weights: str) -> Mapping[str, Tensor]:
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
    """Load a state dict of the same network; a classifier for other classes is left out.

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
