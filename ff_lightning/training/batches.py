"""What a batch must be: two parts, images (B, C, H, W) and classes (B,). All else is answered in one sentence.

Shapes: B batch, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ff_lightning.local.net import check_classes


def images_and_classes(
    batch: Any, num_classes: int, input_shape: Sequence[int], training: bool, look: bool
) -> tuple[Tensor, Tensor]:
    """The two parts of a batch.

    Args:
        batch: What a loader gave.
        num_classes: K.
        input_shape: (C, H, W) of an image of the model.
        training: Whether it is trained on: then the probabilities of the classes (B, K) will do, as mixup makes them.
        look: Whether to look at the values also where that waits for a device.

    Returns:
        Images, floating, (B, C, H, W), and classes, (B,), int64; in training also probabilities (B, K).

    Raises:
        ValueError: If the batch is anything else.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(f"a batch is {_kind(batch)}: give two parts, images (B, C, H, W) and classes (B,)")
    x, y = batch
    check_images(x, input_shape)
    if not isinstance(y, Tensor):
        raise ValueError(f"the classes of a batch are {_kind(y)}: give numbers from 0 to {num_classes - 1}, int64 (B,)")
    if len(y.shape) == 0 or len(y) != len(x):
        raise ValueError(f"a batch has {len(x)} images and classes of shape {tuple(y.shape)}: give one for each image")
    if training and y.is_floating_point() and y.shape == (len(x), num_classes):
        if look:
            _check_probabilities(y)
    elif y.ndim != 1 or y.dtype not in (torch.int64, torch.uint8):
        one_hot = ", such as y.argmax(1) of one-hot vectors" if y.shape == (len(x), num_classes) else ""
        raise ValueError(
            f"the classes of a batch are {y.dtype} of shape {tuple(y.shape)}: give numbers from 0 to "
            f"{num_classes - 1}, int64 ({len(x)},){one_hot}"
        )
    else:
        check_classes(y.cpu() if look else y, num_classes)
    return x, y


def images_of(batch: Any, input_shape: Sequence[int]) -> Tensor:
    """The images (B, C, H, W) of a batch to predict: it is those, or they are its first part."""
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    check_images(x, input_shape)
    return x


def check_images(x: Any, input_shape: Sequence[int]) -> None:
    """Raise ValueError if the images of a batch are not floating (B, C, H, W)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"the images of a batch are {_kind(x)}: give a tensor (B, C, H, W)")
    channels = input_shape[0]
    wanted = f"({', '.join(['B', *map(str, input_shape)])})"
    if x.ndim != 1 + len(input_shape) or (x.shape[1] != channels and x.shape[-1] == channels):
        raise ValueError(f"the images of a batch have the shape {tuple(x.shape)}: give {wanted}, channels first")
    if not x.is_floating_point():
        raise ValueError(f"the images of a batch are {x.dtype}: give floating ones, normalised, such as x / 255")


def _check_probabilities(y: Tensor) -> None:
    """Raise ValueError for one-hot vectors, which a validation could not take, and for what does not add up to one."""
    if bool(((y == 0) | (y == 1)).all()):
        raise ValueError(
            "the classes of a batch are one-hot vectors (B, K): give their numbers, y.argmax(1), int64 (B,)"
        )
    if not torch.allclose(y.float().sum(1), torch.ones(len(y), device=y.device), atol=0.02) or float(y.min()) < 0:
        raise ValueError("the targets of a batch (B, K) are no probabilities: they must be 0 or more and add up to 1")


def _kind(value: Any) -> str:
    """What something is, for an error message."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)[:5]}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list | tuple):
        kinds = [type(part).__name__ for part in value[:5]]
        return f"a {type(value).__name__} of {len(value)} parts ({', '.join(kinds)}{', ...' if len(value) > 5 else ''})"
    return f"a {type(value).__name__}"
