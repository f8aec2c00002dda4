"""How the commands answer what the user can mend: one sentence, and one line on where there is help."""

import argparse
import ast
import errno
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ff_lightning.util.suggest import closest

_REFUSALS = (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError)
_OF_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
             errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
_PROBE = "; a method that learns without labels has an accuracy by --trainer.callbacks+=OnlineProbe, as val/probe_acc"
_HINTS = {
    "No supported gpu backend": " torch sees no GPU here, give --trainer.accelerator cpu or auto",
    "could not find the monitored key": _PROBE,
    "Early stopping conditioned on metric": _PROBE,
}
"""What Lightning's own sentence leaves open."""

_GROUPS = ("trainer", "model", "data", "checkpoint", "last")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "text",
    "list": "a list", "Sequence": "a list", "tuple": "a list", "dict": "a mapping",
}  # fmt: skip


class PlainParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that answers without its pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where there is help, and end the process."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        end(message + (closest(choice[1], re.findall(r"[\w./-]+", choice[2])) if choice else ""), f"{self.prog} --help")


def as_path(text: str) -> Path:
    """The type of an argument that is a path."""
    return Path(text).expanduser()


def end(message: object, *commands: str) -> NoReturn:
    """Write an error in one line, and the commands that help in another, and end the process."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    if commands:
        sys.stderr.write(f"Try {' or '.join(map(repr, commands))}\n")
    raise SystemExit(2)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Answer in one line what the user can mend; any other error keeps its traceback."""
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        hint = next((hint for known, hint in _HINTS.items() if known in refusal), "")
        sys.stderr.write(f"error: {' '.join(refusal.split())}{hint}\n")
        raise SystemExit(2) from error


def _refusal(error: BaseException) -> str | None:
    """What was refused on purpose, by this package or by Lightning, or by the file system; None: a bug."""
    packages = (sys.modules.get(name) for name in ("ff_lightning", "lightning"))  # not every command needs the latter
    folders = [Path(str(package.__file__)).parent for package in packages if package is not None]

    def on_purpose(file: str, line: str) -> bool:
        return line.startswith("raise") and any(Path(file).is_relative_to(folder) for folder in folders)

    found: BaseException | None = error
    caused = True  # what was handled, or failed, while something else was handled, may be another matter
    while found is not None:
        frames = traceback.extract_tb(found.__traceback__)
        if isinstance(found, _REFUSALS) and frames and on_purpose(frames[-1].filename, frames[-1].line or ""):
            return str(found)
        if type(found).__name__ == "MisconfigurationException" or any(known in str(found) for known in _HINTS):
            return str(found)
        frames_there = re.findall(r'File "(.*?)", line \d+, in .*\n +(.*)', str(found))
        if isinstance(found, _REFUSALS) and "DataLoader worker" in str(found) and frames_there:  # as text, from there
            return str(found).strip().splitlines()[-1].partition(": ")[2] if on_purpose(*frames_there[-1]) else None
        if caused and isinstance(found, OSError) and found.errno in _OF_FILES:
            return f"{found.filename}: {found.strerror}" if found.filename else str(found)
        caused = caused and found.__cause__ is not None
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Put back, at the end, where modules are looked for, how warnings are shown, and what the loggers do."""
    folders, form = sys.path[:], warnings.formatwarning
    named = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]
    before = [(logger, logger.level, logger.filters[:], logger.handlers[:]) for logger in loggers]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.path[:], warnings.formatwarning = folders, form
        for logger, level, filters, handlers in before:
            logger.level, logger.filters[:], logger.handlers[:] = level, filters, handlers


# --------------------------------------------------------------------------------------------- what jsonargparse says


def of_parser(
    message: str, args: Sequence[str], options: Mapping[str, Iterable[str]], classes: Mapping[str, type]
) -> str:
    """What jsonargparse says of an argument, in one sentence and with the names that look like what was given.

    Args:
        message: Its words, often ten lines.
        args: The command line.
        options: Names of the options of each command, such as ``trainer.max_epochs``.
        classes: Classes that a value may name, by their names.

    Examples:
        >>> of_parser("unrecognized arguments: --trainer.max_epochz 3", [], {"fit": ["trainer.max_epochs"]}, {})
        "unrecognized arguments: --trainer.max_epochz 3; did you mean 'trainer.max_epochs'?"
    """
    value = _of_value(message, classes)
    if value is not None:
        return value
    choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if choice:
        return message + closest(choice[1], re.findall(r"[\w.-]+", choice[2]))
    missing = re.search(r"arguments are required: ([^,\s]+)", message)
    if missing:
        for option, name in _pairs(args):
            cls = classes.get(name.rpartition(".")[2])
            if cls is not None and missing[1] in signature(cls).parameters:
                return f"{option.lstrip('-')}={name!r} needs {missing[1]}: give {option}.{missing[1]} too"
    within = re.search(r"^Option '(\S+)' is not accepted$", message)
    if within:
        options_of = {
            name: {option for base in cls.__mro__ for option in signature(base).parameters}
            for name, cls in classes.items()
        }
        theirs = [classes[name] for name, known in options_of.items() if within[1] in known]
        first = [cls.__name__ for cls in theirs if not any(base in theirs for base in cls.__mro__[1:])]
        if first:
            more = f" and {len(first) - 3} more" if len(first) > 3 else ""
            return f"{message}: it is an option of {', '.join(first[:3])}{more}"
        return message + closest(within[1], set().union(*options_of.values()))
    unknown = re.search(r"option '(\S+)'|unrecognized arguments: (?:--)?([^\s=]+)", message)
    return (
        message + _option_like(unknown[1] or unknown[2], options)
        if unknown
        else re.sub('Parser key "(.*?)":', r"\1:", message)
    )


def _option_like(name: str, options: Mapping[str, Iterable[str]]) -> str:
    """The options that may have been meant by a name, or the commands that have it."""
    theirs = [command for command, known in options.items() if name in known]
    if theirs:
        return f": it is an option of {' and '.join(theirs)}"
    known = {option for of_command in options.values() for option in of_command}
    groups = {option.split(".")[0] for option in known}
    within = [option for option in known if option.split(".")[-1] == name]
    if within:
        return f"; did you mean {within[0]!r}?"
    group = name.split(".")[0]
    return closest(name, known | groups) if group in groups or "." not in name else closest(group, groups)


def _of_value(message: str, classes: Iterable[str]) -> str | None:
    """The sentence for a value that is refused, or None where it is about something else."""
    message = message[message.rfind('Parser key "') :]  # the innermost one
    key = re.match(r'Parser key "([^"]+)"( element \d+)?:', message)
    given = re.search(r"(?:Given|Got) value: (.*)|dot import path string: (\S+)", message)
    if key is None or given is None:
        return None
    value = given[1] if given[1] is not None else given[2]
    path = re.search(r"class_path\W+([\w.]+)", value)
    value = path[1] if path else value
    base = re.search(r"(?:correspond to|to be) a subclass of (?:<class ')?(\w+)", message)
    if base and base[1] != "Union":
        return f"{key[1]}={value!r}: must be a subclass of {base[1]}"
    why = re.search(r"No module named '\S+'|module '\S+' has no attribute '\S+'", message)
    if why:
        return f"{key[1]}={value!r}: {why[0]}{closest(value.rpartition('.')[2], classes)}"
    several = re.search(r"to avoid ambiguity: (.*)\.$", message, re.MULTILINE)
    if several:
        return f"{key[1]}={value!r} is the name of several classes: give {several[1].replace(', ', ' or ')}"
    names = [name for listed in re.findall(r"Literal\[(.*?)\]", message) for name in ast.literal_eval(f"[{listed}]")]
    allowed = [*map(repr, dict.fromkeys(names))]
    known = [*map(str, names)]
    if "dot import path" in message:
        allowed.append("the name of a class")
        known += classes
    kinds = re.findall(r"Expected an? (?:<class '|typing\.)?(?:\w+\.)*(\w+)", message)
    length = re.search(r"tuple with (\d+) elements", message)
    for kind in dict.fromkeys(_KINDS[kind] for kind in kinds if kind in _KINDS):
        allowed.append(f"a list of {length[1]}" if length and kind == "a list" else kind)
    if not allowed:
        return None
    listed = " or ".join(filter(None, [", ".join(allowed[:-1]), allowed[-1]]))
    verb = " is not known: give" if known else ": must be"
    return f"{key[1]}{key[2] or ''}={value!r}{verb} {listed}{closest(value, known)}"


def _pairs(args: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line with what was given for them, behind a space or behind ``=``."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [(name, value) if "=" not in name else (name.split("=")[0], name.split("=", 1)[1]) for name, value in pairs]


def subclasses(*bases: type) -> dict[str, type]:
    """These classes and all public ones that are made of them, as far as they are imported, by their names."""
    found: dict[str, type] = {}
    for base in bases:
        # torch.export leaves subclasses that have the name of their base
        found |= {**subclasses(*base.__subclasses__()), base.__name__: base}
    return {name: cls for name, cls in found.items() if not name.startswith("_")}


def collect_namesakes(*bases: type) -> None:
    """Collect the subclasses that `torch.export` leaves behind: with them the name of their base has two meanings."""
    if any(_has_namesake(base) for base in bases):
        gc.collect()


def _has_namesake(base: type) -> bool:
    below: list[type] = base.__subclasses__()
    return any(cls.__name__ == base.__name__ or _has_namesake(cls) for cls in below)


def check_configs(args: Sequence[str]) -> None:
    """Raise ValueError if a file that is given as ``--config`` holds no YAML, or no mapping."""
    for option, given in _pairs(args):
        path = Path(given).expanduser()
        if option != "--config" or "\n" in given or not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"config={given!r} is not a text file: {error}") from error
        except yaml.YAMLError as error:
            tab = "a tab indents, YAML takes spaces alone; " if "'\\t'" in str(error) else ""
            raise ValueError(f"config={given!r} is not YAML: {tab}{_where(error)}") from error
        if not isinstance(content, Mapping):
            what = "is empty" if content is None else f"holds a {type(content).__name__}"
            raise ValueError(f"config={given!r} {what}: it must hold a mapping, such as 'trainer: {{max_epochs: 3}}'")
        if args[0] in content:
            raise ValueError(f"config={given!r} begins with {args[0]!r}: leave that out, what is below it is enough")
        empty = next((name for name, of_group in content.items() if of_group is None and name in _GROUPS), None)
        if empty:
            raise ValueError(f"config={given!r}: {empty!r} holds nothing: leave it out, or say what it is")


def _where(error: Any) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)
