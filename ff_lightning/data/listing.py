"""Which files of a folder are samples of which class, without those that file managers and notebooks leave behind."""

import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ff_lightning.util.files import printable

log = logging.getLogger(__name__)

LEFT_BEHIND = {"@eadir", "thumbs.db", "desktop.ini", "__macosx", "#recycle", "$recycle.bin", "lost+found"}
"""Files and folders that nobody made on purpose, besides those whose name begins with a dot."""

Identity = tuple[int, int]


class Listing(NamedTuple):
    """What lies in the folders of the classes.

    A sample is anything with one of the endings, readable or not, even a broken link, a pipe or a folder; and a folder
    that cannot be listed or leads back to one above it. Reading such a sample gives an error that names it.
    """

    files: dict[str, list[str]]
    """Paths of the samples of each class, classes and samples in order."""
    passed_over: Counter[str]
    """How many other files there are, by ending."""
    loops: list[str]
    """Folders in the place of a class that lead back to one above."""


def list_classes(folder: str | Path, endings: tuple[str, ...]) -> Listing:
    """The samples of each class, in ``folder/<class>/*`` and below.

    Args:
        folder: The folder of the classes.
        endings: Those of the files that are samples, in small letters, each with its point.

    Raises:
        OSError: If the folder itself cannot be listed.
    """
    listing = Listing({}, Counter(), [])
    above = _with_parents(folder)
    for entry in sorted(_visible(folder), key=lambda entry: entry.name):
        if not _is_folder(entry):
            kind = "in no class folder" if entry.name.lower().endswith(endings) else _ending(entry.name)
            listing.passed_over[kind] += 1
        elif _identity(entry.path) in above:
            listing.loops.append(entry.path)
        else:
            listing.files[entry.name] = _files_below(entry.path, above, endings, listing.passed_over)
    return listing


def class_files(folder: str | Path, endings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Paths of all samples of `list_classes`, and the name of the class of each; other files are counted in the log.

    Raises:
        FileNotFoundError: If there are no two folders of classes, or one without a sample.
        OSError: If a folder leads back to one above it, or cannot be listed.
    """
    listing = list_classes(Path(folder).expanduser(), endings)
    kinds = " or ".join(endings)
    for loop in listing.loops:
        raise OSError(f"cannot read the class folder {printable(loop)}: it leads back to a folder above it")
    empty = [name for name, files in listing.files.items() if not files]
    if len(listing.files) < 2 or empty:
        found = f"{first_five(empty)} hold none" if empty else f"it holds the folders {list(listing.files)}"
        raise FileNotFoundError(
            f"{printable(folder)}: must hold a folder of {kinds} files for each of two or more classes: {found}"
        )
    if listing.passed_over:
        log.warning("passed over %d files in %s that are not %s in the folder of a class",
                    listing.passed_over.total(), printable(folder), kinds)  # fmt: skip
    pairs = [(path, printable(name)) for name, files in listing.files.items() for path in files]
    return [path for path, _ in pairs], [name for _, name in pairs]


def files_below(folder: str | Path, endings: tuple[str, ...]) -> list[str]:
    """Paths of the samples in a folder and below, as `Listing` has them."""
    return _files_below(str(folder), frozenset(), endings, Counter())


def _files_below(
    folder: str, above: frozenset[Identity], endings: tuple[str, ...], passed_over: Counter[str]
) -> list[str]:
    """Paths of the samples, in order of their folders; other files are counted."""
    found: list[tuple[str, str]] = []
    pending = [(folder, above)]
    while pending:
        at, above = pending.pop()
        try:
            identity, entries = _identity(at), _visible(at)
        except OSError:  # no permission
            found.append(os.path.split(at))
            continue
        if identity in above:
            found.append(os.path.split(at))
            continue
        for entry in entries:
            if entry.name.lower().endswith(endings):
                found.append((at, entry.name))
            elif _is_folder(entry):
                pending.append((entry.path, above | {identity}))
            else:
                passed_over[_ending(entry.name)] += 1
    return [os.path.join(*place) for place in sorted(found)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder was left behind by a program."""
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


def first_five(names: Collection[str]) -> str:
    """Names for an error message.

    Examples:
        >>> first_five(["a", "b"])
        "['a', 'b']"
        >>> first_five([str(number) for number in range(3000)])
        "['0', '1', '2', '3', '4'] and 2,995 more"
    """
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{list(names)[:5]}{more}"


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(path: str | Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _with_parents(folder: str | Path) -> frozenset[Identity]:
    """A folder and all above it, by its own path and by where links lead."""
    ways = [Path(os.path.abspath(folder)), Path(os.path.realpath(folder))]
    return frozenset(_identity(path) for way in ways for path in (way, *way.parents))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no ending"
