"""Configs that compose: what belongs to one data set does not stay when another one is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

OF_ONE_SET = ("root", "classes", "cache_dir")
"""Arguments of data modules that say which samples they are, and mean nothing for another set."""


def compose(args: Sequence[str]) -> list[str]:
    """The command line, with configs in which nothing is left of a data set that a later config or ``--data`` replaces.

    jsonargparse keeps the arguments that both classes have: the folder and the classes of the one for the other.

    Args:
        args: The command line.

    Returns:
        The same, with a config's text in the place of its path where something was taken out.
    """
    args = list(args)
    chosen: str | None = None
    for i in reversed(range(len(args))):  # from the last, which wins
        option, _, value = args[i].partition("=")
        if option not in ("--config", "--data"):
            continue
        attached = "=" in args[i]
        if not attached and i + 1 == len(args):
            continue
        value = value if attached else args[i + 1]
        if option == "--data":
            chosen = chosen or value
            continue
        content = _content(value)
        data = content.get("data")
        theirs = data.get("class_path") if isinstance(data, Mapping) else data
        if not isinstance(theirs, str):
            continue
        if chosen is None or _same(theirs, chosen):
            chosen = chosen or theirs
        elif isinstance(data, Mapping) and isinstance(data.get("init_args"), Mapping):
            kept = {name: argument for name, argument in data["init_args"].items() if name not in OF_ONE_SET}
            if kept != data["init_args"]:
                text = yaml.safe_dump({**content, "data": {**data, "init_args": kept}})
                args[i] = f"--config={text}" if attached else args[i]
                args[i + 1] = args[i + 1] if attached else text
    return args


def names(part: str, args: Sequence[str]) -> bool:
    """Whether a command line names the class of model or data, by ``--model`` or ``--data``, or in a config."""
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        option, attached, value = argument.partition("=")
        if option == f"--{part}" or (option == "--config" and part in _content(value if attached else following)):
            return True
    return False


def _same(one: str, other: str) -> bool:
    return one.rpartition(".")[2] == other.rpartition(".")[2]


def _content(config: str) -> dict[str, Any]:
    path = Path(config).expanduser()
    if "\n" in config or not path.is_file():
        return {}
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
