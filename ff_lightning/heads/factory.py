"""Heads by name, by class, or by a function that makes them."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.heads.pooled import PooledHead
from ff_lightning.heads.squared import GoodnessHead
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_choice, shown

HeadFactory = Callable[[int, int], nn.Module]
"""Makes the head of a block from its number of channels and the number of classes.

If it has a parameter `size`, it is given H x W of the features as well.
"""

HEADS: dict[str, HeadFactory] = {
    "pooled": PooledHead,
    "deep": GoodnessHead,
    "paper": partial(GoodnessHead, depth=0, temperature=1.0),
}


def check_head(head: Any) -> None:
    """Raise ValueError unless a head is one of the names, or a class or function that makes one."""
    if isinstance(head, nn.Module):
        raise ValueError(
            f"head={shown(head)} is a head that is already made: give its class, or a function (channels, classes), "
            "since each block has a head of its own"
        )
    if isinstance(head, str) or not callable(head):
        check_choice("head", head, HEADS, f"one of {list(HEADS)} or a function (channels, classes)")


def make_head(factory: HeadFactory, map_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The head for features of shape (C, H, W); see `HeadFactory`.

    Raises:
        ValueError: If what is made is no module from features (B, C, H, W) to goodness (B, K).
    """
    of_partial = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
    name = f"head={next((part.__name__ for part in of_partial if isinstance(part, type)), shown(factory))}"
    try:
        takes = signature(factory)
        arguments = {*takes.parameters, *getattr(factory, "keywords", {})}  # the command line gives a partial
        size = {"size": map_shape[1:]} if "size" in arguments else {}
        takes.bind(map_shape[0], num_classes, **size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be called with (channels, classes): {error}") from error
    head = factory(map_shape[0], num_classes, **size)
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} makes {shown(head)}: it must make an nn.Module from (B, C, H, W) to goodness (B, K)")
    _check_goodness(name, head, map_shape, num_classes)
    return head


def _check_goodness(name: str, head: nn.Module, map_shape: Sequence[int], num_classes: int) -> None:
    """Raise ValueError unless a head gives a goodness for each of two images and each class."""
    like = next(head.parameters(), torch.zeros(0))
    features = torch.zeros(2, *map_shape, device=like.device, dtype=like.dtype)
    try:
        with evaluating(head):
            goodness = head(features)
            if features._version:  # what the next block sees is not to change with it
                head.register_forward_pre_hook(_on_a_copy)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} fails for features of shape {tuple(features.shape)}: {why}") from error
    shape = tuple(goodness.shape) if isinstance(goodness, Tensor) else shown(goodness)
    if shape != (2, num_classes) or not goodness.is_floating_point():
        raise ValueError(
            f"{name} makes {shape} of features {tuple(features.shape)}: it must make goodness of shape "
            f"{(2, num_classes)}, for each image and each class a floating-point number"
        )


def _on_a_copy(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]
