"""Error messages for names that are not known."""

import difflib
from collections.abc import Iterable


def closest(value: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no known name is close.

    Examples:
        >>> closest("resnet81", ["resnet18", "vgg16"])
        "; did you mean 'resnet18'?"
    """
    names = [name for name in dict.fromkeys(known) if name != value]  # it is known, but of another kind
    ratios = {name: difflib.SequenceMatcher(a=name, b=str(value)).ratio() for name in names}
    best = max(ratios.values(), default=0.0)
    close = sorted((name for name in names if ratios[name] >= max(0.6, best - 0.05)), key=lambda name: -ratios[name])[
        :3
    ]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def unknown(argument: str, value: object, known: Iterable[str], allowed: str | None = None) -> str:
    """Message for a value that is not known: what is allowed, and the names that look like it.

    Examples:
        >>> unknown("norm", "layr", ["layer", "none"])
        "norm='layr' is not known: give one of ['layer', 'none']; did you mean 'layer'?"
    """
    known = list(known)
    return f"{argument}={value!r} is not known: give {allowed or f'one of {known}'}{closest(value, known)}"
