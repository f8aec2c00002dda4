"""What a batch may be: inputs and targets in any of the usual forms. Anything else is an error in one sentence.

Shapes: B batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ff_lightning.util.arguments import kind_of

TARGETS = ("label", "labels", "target", "targets", "class", "y")
"""Keys under which a batch that is a dict holds its targets."""

Inputs = tuple[Any, ...]


def split_batch(batch: Any) -> tuple[Inputs, Any]:
    """Inputs of the network and targets of a batch.

    A batch may be ``(x, y)``, ``(x, y, more)`` where more is not used, a dict with one of `TARGETS` beside the inputs,
    or x alone. x is a tensor, a tuple of tensors, or a dict of keyword arguments of the network; a dict with a single
    input stands for that input.

    Args:
        batch: What a loader returned.

    Returns:
        The inputs, as a tuple for ``network(*inputs)``, and the targets, None where there are none.

    Examples:
        >>> split_batch({"image": "x", "label": "y", "name": "z"}), split_batch("x")
        ((('x',), 'y'), (('x',), None))
    """
    target = None
    if isinstance(batch, Mapping):
        key = next((name for name in TARGETS if name in batch), None)
        target = batch[key] if key is not None else None
        rest = {name: value for name, value in batch.items() if name not in TARGETS}
        images = next((rest[name] for name in ("image", "images", "x", "pixel_values", "input") if name in rest), None)
        batch = images if images is not None else next(iter(rest.values())) if len(rest) == 1 else rest
    elif isinstance(batch, list | tuple):
        batch, target = batch[0] if batch else batch, batch[1] if len(batch) > 1 else None
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,), target


def check_inputs(inputs: Inputs, input_shape: Sequence[int], vocabulary: int | None = None) -> int:
    """The number of samples of a batch.

    Raises:
        ValueError: If the first input is not floating of the shape (B, *input_shape), but for the sides of images; or,
            with a vocabulary, if it holds no token ids (B, T). Further inputs beside ids are left to the network.
    """
    x = inputs[0] if inputs else inputs
    what = "images" if len(input_shape) == 3 else "inputs"
    wanted = f"({', '.join(['B', *map(str, input_shape)])})"
    if isinstance(x, Mapping):
        tensors = [value for value in x.values() if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError(f"the {what} of a batch are {kind_of(x)}: give a tensor {wanted}")
        return len(tensors[0])
    if not isinstance(x, Tensor):
        raise ValueError(f"the {what} of a batch are {kind_of(x)}: give a tensor {wanted}")
    if vocabulary is not None:
        if x.ndim != 2 or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"the inputs of a batch are {x.dtype} of shape {tuple(x.shape)}: give ids (B, T), int64")
        return len(x)
    channels = input_shape[0]
    if x.ndim != 1 + len(input_shape) or (x.shape[1] != channels and x.shape[-1] == channels):
        first = ", channels first" if len(input_shape) > 1 else ""
        raise ValueError(f"the {what} of a batch have the shape {tuple(x.shape)}: give {wanted}{first}")
    if not x.is_floating_point():
        raise ValueError(f"the {what} of a batch are {x.dtype}: give floating ones, normalised, such as x / 255")
    return len(x)


def check_has_target(batch: Any, target: Any) -> None:
    """Raise ValueError if a batch to learn from, or to be judged by, has no targets."""
    if target is None:
        raise ValueError(
            f"a batch is {kind_of(batch)}, without targets: give (x, y), or a dict with a key out of {list(TARGETS)}; "
            "to learn without targets is for methods with task='Unlabelled'"
        )
