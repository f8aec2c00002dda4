"""What a class takes, on a screen or two."""

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import docstring_parser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ff_lightning.commands.answers import end
from ff_lightning.util.suggest import closest


def asked_class(given: Sequence[str], classes: Mapping[str, type]) -> str | None:
    """The help that a command line asks for, such as by ``--model.help SFF`` or ``--model.optimizer.help Adam``.

    Args:
        given: The command line.
        classes: Those that options may name, by name.

    Returns:
        None where it asks for none.
    """
    for argument, following in zip(given, [*given[1:], ""], strict=True):
        option, attached, value = argument.partition("=")
        name = value if attached else following
        if not (option.startswith("--") and option.endswith(".help")) or "." in name or name.startswith("-"):
            continue
        if name in classes:
            return class_help(option.removesuffix(".help"), classes[name])
        if name:
            end(f"{option}={name!r} is not known{closest(name, classes)}", f"ff-lightning {given[0]} --help")
    return None


def class_help(option: str, cls: type) -> str:
    """The arguments of a class with their defaults and what their docstrings say.

    Examples:
        >>> from ff_lightning.data import FakeImages
        >>> class_help("--data", FakeImages).splitlines()[3:5]
        ['  --data.images 1000', '      Number of training images; there are a quarter as many to test.']
    """
    lines = [f"{cls.__name__}: {docstring_parser.parse(inspect.getdoc(cls) or '').short_description}", "", "options:"]
    ours = issubclass(cls, Optimizer | LRScheduler)  # the first argument is not the user's
    for parameter, text in [*arguments_of(cls)][ours:]:
        default = "(required)" if parameter.default is parameter.empty else str(parameter.default)
        lines.append(f"  {option}.{parameter.name} {default}".rstrip())
        lines += textwrap.wrap(" ".join(text.split()), 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "What stands behind an option is its default; classes go by name or import path."])


def arguments_of(cls: type) -> Iterator[tuple[inspect.Parameter, str]]:
    """The arguments of a class and those that it hands on, each with its description."""
    seen = {"self"}
    texts = {
        parameter.arg_name: parameter.description or ""
        for base in reversed(cls.__mro__)
        for parameter in docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")).params
    }
    for base in cls.__mro__:
        parameters = [*inspect.signature(base).parameters.values()] if "__init__" in vars(base) else []
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter, texts.get(parameter.name, "")
        if parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
