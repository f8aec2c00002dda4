"""Checks of arguments: each says in one sentence which argument it is, its value, and what is allowed."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from ff_lightning.util.suggest import closest, unknown


def shown(value: object) -> str:
    """A value as it is shown in a message: on one line, and not for pages.

    Examples:
        >>> shown("layr"), shown(list(range(100)))
        ("'layr'", '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, ...')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(value: Any) -> str:
    """What something is, for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with the keys {list(value)[:5]}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list | tuple):
        kinds = [type(part).__name__ for part in value[:5]]
        return f"a {type(value).__name__} of {len(value)} parts ({', '.join(kinds)}{', ...' if len(value) > 5 else ''})"
    return f"a {type(value).__name__}"


def is_whole(value: object) -> bool:
    """Whether a value is a whole number: NumPy's count, true and false do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(argument: str, value: Any, least: int = 1, optional: bool = False) -> None:
    """Raise ValueError unless a value is a whole number of at least `least`, or None where that is allowed."""
    if not (optional and value is None) and not (is_whole(value) and value >= least):
        kind = "" if is_whole(value) else "a whole number of "
        raise ValueError(f"{argument}={shown(value)}: must be {kind}at least {least}{_or_none(optional)}")


def check_number(
    argument: str,
    value: Any,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> None:
    """Raise ValueError unless a value is a finite number within these bounds, or None where that is allowed."""
    if optional and value is None:
        return
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    text = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not finite:
        raise ValueError(f"{argument}={shown(value)}: must be a finite number {text}{_or_none(optional)}")
    outside = (above is not None and value <= above, least is not None and value < least)
    if any(outside) or (below is not None and value >= below) or (most is not None and value > most):
        raise ValueError(f"{argument}={shown(value)}: must be {text}{_or_none(optional)}")


def check_switch(argument: str, value: Any, optional: bool = False) -> None:
    """Raise ValueError unless a value is True or False (1 and 0 will do), or None where that is allowed."""
    if not (optional and value is None) and not (isinstance(value, Integral | np.bool_) and value in (0, 1)):
        raise ValueError(f"{argument}={shown(value)}: must be True or False{_or_none(optional)}")


def check_choice(
    argument: str, value: Any, known: Iterable[str], allowed: str | None = None, optional: bool = False
) -> None:
    """Raise ValueError unless a value is one of some names, or None where that is allowed; see `suggest.unknown`."""
    known = list(known)
    if not (optional and value is None) and not (isinstance(value, str) and value in known):
        raise ValueError(unknown(argument, value, known, allowed) + _or_none(optional))


def check_path(argument: str, value: Any, optional: bool = False) -> None:
    """Raise ValueError unless a value is a path that is not empty, or None where that is allowed."""
    if not (optional and value is None) and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise ValueError(f"{argument}={shown(value)}: must be a path{_or_none(optional)}")


_FORMS = {1: "(T,)", 2: "(C, T)", 3: "(C, H, W)", 4: "(C, D, H, W)"}
_LAYERS = {nn.Embedding: 1, nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


def check_delimiter(value: Any) -> None:
    """Raise ValueError unless a value is one character, or None."""
    if value is not None and not (isinstance(value, str) and len(value) == 1):
        raise ValueError(f"delimiter={shown(value)}: must be one character, or None")


def check_shape(argument: str, value: Any, model: Any = None) -> None:
    """Raise ValueError unless a value is the shape of a sample that `model` takes: (C, H, W), say.

    Args:
        argument: Its name.
        value: The shape, without the batch.
        model: The name of a network, or the network: how many dimensions a sample has is known of those that begin with
            a convolution or an embedding.
    """
    if isinstance(model, str):
        dims = {"mlp": None, "signal": 2, "text": 1}.get(model, 3)
    else:
        first = _first_layer(model)
        dims = next((dims for kind, dims in _LAYERS.items() if isinstance(first, kind)), None)
    whole = isinstance(value, Sequence) and not isinstance(value, str) and all(is_whole(side) for side in value)
    if not whole or min(value, default=0) < 1 or dims not in (None, len(value)):
        form = "the shape of a sample, such as (C, H, W)" if dims is None else _FORMS[dims]
        raise ValueError(f"{argument}={shown(value)}: must be {form}, whole numbers of at least 1")


def _first_layer(model: Any) -> nn.Module | None:
    """The first layer of a network that is a sequence."""
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    return model if isinstance(model, nn.Module) else None


def check_network(argument: str, value: Any, names: str = "") -> None:
    """Raise ValueError unless a value is a network, already made."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ValueError(f"{argument}={value.__name__} is a class: give a network made of it, {value.__name__}(...)")
    if not isinstance(value, nn.Module):
        raise ValueError(f"{argument}={shown(value)}: must be {names}an nn.Module")


def check_granularity(value: Any) -> None:
    """Raise ValueError unless a value is a name of a granularity, a number of units, or a list of names."""
    known = ["layer", "block", "stage"]
    if isinstance(value, str):
        check_choice("granularity", value, known, f"one of {known}, a number or a list of module names")
    elif not is_whole(value) and not isinstance(value, Sequence):
        raise ValueError(f"granularity={shown(value)}: must be one of {known}, a number or a list of module names")


def check_blocks(argument: str, value: Any) -> None:
    """Raise ValueError unless a value is None or a collection of numbers and names of blocks."""
    if value is None:
        return
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{argument}={shown(value)}: must be a list of numbers or names of blocks, or None")
    for block in value:
        if not is_whole(block) and not isinstance(block, str):
            raise ValueError(f"{argument}={shown(value)}: {shown(block)} is neither the number nor the name of a block")


def for_each(
    argument: str, value: Any, count: int, check: Callable[[str, Any], None], unit: str = "layer"
) -> list[Any]:
    """What each layer or block has, from a list or from one value for all.

    Args:
        argument: Its name.
        value: The list, or the value.
        count: How many values there must be.
        check: Raises ValueError for a value that is not allowed.
        unit: The word for what is counted.

    Raises:
        ValueError: If the list has another length, or if the check does.
    """
    one = isinstance(value, str) or not isinstance(value, Sequence)
    values = [value] * count if one else list(value)
    for each in values:
        check(argument, each)
    if len(values) != count:
        raise ValueError(f"{argument}={shown(value)}: must be {count}, one for each {unit}")
    return values


def check_keywords(cls: type, unknown: Mapping[str, Any]) -> None:
    """Raise TypeError, with the names that look like it, for an argument that no constructor of a class has taken."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    parameters = [parameter for of_one in constructors for parameter in signature(of_one).parameters.values()]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in unknown:
        raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}{closest(name, known)}")


def check_loss(loss: Any) -> None:
    """Raise ValueError unless a loss is None or something that can be called with goodness and classes."""
    if isinstance(loss, type):
        raise ValueError(f"loss={loss.__name__} is a class: give a module made of it, {loss.__name__}(...)")
    if loss is not None and not callable(loss):
        raise ValueError(f"loss={shown(loss)}: must be a module from goodness (B, K) and classes (B,), or None")


def _or_none(optional: bool) -> str:
    return ", or None" if optional else ""
