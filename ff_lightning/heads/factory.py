"""Heads by name, by class, or by a function that makes them."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.heads.groups import GroupHead
from ff_lightning.heads.layers import without_padding
from ff_lightning.heads.lookahead import LookAhead
from ff_lightning.heads.pooled import PooledHead
from ff_lightning.heads.squared import GoodnessHead
from ff_lightning.heads.tokens import TokenHead
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_choice, shown

HeadFactory = Callable[[int, int], nn.Module]
"""Makes the head of a block from its number of channels and the number of classes.

If it has a parameter `size`, it is given the positions of the features as well: (), (T,), (H, W) or (D, H, W); if it
has `masked`, whether there may be padding among them; if it has `place`, the `ff_lightning.heads.place.Place` of
the block, with the blocks that follow. The head is then given a mask (B, T) with features (B, C, T), if
its forward has a parameter `mask`; where it has none, the features are zeros at padding. A method `maps`, from features
(B, C, H, W) to the part of each position in the goodness (B, K, h, w), is for pictures alone.
"""

HEADS: dict[str, HeadFactory] = {
    "pooled": PooledHead,
    "deep": GoodnessHead,
    "paper": partial(GoodnessHead, depth=0, temperature=1.0),
    "tokens": TokenHead,
    "groups": GroupHead,
    "lookahead": LookAhead,
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


def make_head(
    factory: HeadFactory, map_shape: Sequence[int], num_classes: int, masked: bool = False, place: Any = None
) -> nn.Module:
    """The head for features of shape (C, H, W), or with another number of axes; see `HeadFactory`.

    Raises:
        ValueError: If what is made is no module from features (B, C, H, W) to goodness (B, K).
    """
    of_partial = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
    name = f"head={next((part.__name__ for part in of_partial if isinstance(part, type)), shown(factory))}"
    try:
        takes = signature(factory)
        arguments = {*takes.parameters, *getattr(factory, "keywords", {})}  # the command line gives a partial
        offered = {"size": tuple(map_shape[1:]), "masked": masked, "place": place}
        options = {key: value for key, value in offered.items() if key in arguments}
        takes.bind(map_shape[0], num_classes, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be called with (channels, classes): {error}") from error
    head = factory(map_shape[0], num_classes, **options)
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} makes {shown(head)}: it must make an nn.Module from (B, C, H, W) to goodness (B, K)")
    _check_goodness(name, head, map_shape, num_classes, masked)
    return head


def takes_mask(function: Callable[..., Any]) -> bool:
    """Whether a function, such as the forward of a head, has a parameter `mask`."""
    return _has_mask(getattr(function, "__func__", function))


@lru_cache  # a network may have a thousand heads of one class
def _has_mask(function: Callable[..., Any]) -> bool:
    return "mask" in signature(function).parameters


def with_mask(function: Callable[..., Any], takes: bool, features: Tensor, mask: Tensor | None, *more: Any) -> Any:
    """Call a function with features (B, C, T), and with the mask (B, T) if it takes one; else they are zeros there."""
    if mask is None:
        return function(features, *more)
    return function(features, *more, mask=mask) if takes else function(without_padding(features, mask), *more)


def _check_goodness(name: str, head: nn.Module, map_shape: Sequence[int], num_classes: int, masked: bool) -> None:
    """Raise ValueError unless a head gives a goodness for each of two images and each class."""
    like = next(head.parameters(), torch.zeros(0))
    features = torch.zeros(2, *map_shape, device=like.device, dtype=like.dtype)
    mask = torch.ones(2, *map_shape[1:], dtype=torch.bool, device=like.device) if masked else None
    try:
        with evaluating(head):
            goodness = with_mask(head, takes_mask(head.forward), features, mask)
            dropout = any(isinstance(part, _DROPOUT) and part.inplace for part in head.modules())  # in training alone
            if features._version or dropout:  # what the next block sees is not to change with it
                head.register_forward_pre_hook(_on_a_copy)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} fails for features of shape {tuple(features.shape)}: {why}") from error
    shape = tuple(goodness.shape) if isinstance(goodness, Tensor) else shown(goodness)
    of_tokens = (
        (2, *map_shape[1:], num_classes) if len(map_shape) == 2 else None
    )  # scores of each, for a language model
    if shape not in ((2, num_classes), of_tokens) or not goodness.is_floating_point():
        raise ValueError(
            f"{name} makes {shape} of features {tuple(features.shape)}: it must make goodness of shape "
            f"{(2, num_classes)}, for each image and each class a floating-point number"
        )


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _on_a_copy(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]
