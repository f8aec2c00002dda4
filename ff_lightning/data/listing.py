"""Which files of a folder are images of which class; what file managers and notebooks leave behind is neither."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ff_lightning.data.reading import load_image

ENDINGS = (*IMG_EXTENSIONS, ".avif")
LEFT_BEHIND = {"@eadir", "thumbs.db", "desktop.ini", "__macosx", "#recycle", "$recycle.bin", "lost+found"}
"""Files and folders that nobody made on purpose, besides those whose name begins with a dot."""

Identity = tuple[int, int]


class Listing(NamedTuple):
    """What lies in the folders of the classes.

    An image is what has the ending of one, readable or not: a dangling link, a pipe and a folder are, too. So is a
    folder that cannot be listed or leads back to one above it. Whoever reads such an image gets an error that names it.
    """

    images: dict[str, list[str]]
    """Paths of the images of each class, classes and images in order."""
    passed_over: Counter[str]
    """How many other files there are, by ending."""
    loops: list[str]
    """Folders in the place of a class that lead back to one above."""


class FolderImages(Dataset[Any]):
    """Images in ``folder/<class>/*`` with the numbers of their classes.

    Args:
        folder: The folder of the classes.
        classes: Their names in the order of their numbers; None: all, by name.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str] | None = None) -> None:
        images = list_classes(folder).images
        self.classes = list(images if classes is None else classes)
        self.samples = [(path, number) for number, name in enumerate(self.classes) for path in images.get(name, ())]
        self.loader = load_image

    @property
    def targets(self) -> list[int]:
        """The class of each image."""
        return [number for _, number in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, number = self.samples[index]
        return self.loader(path), number


def list_classes(folder: str | Path) -> Listing:
    """The images of each class, in ``folder/<class>/*`` and below.

    Raises:
        OSError: If the folder itself cannot be listed.
    """
    listing = Listing({}, Counter(), [])
    above = _with_parents(folder)
    for entry in sorted(_visible(folder), key=lambda entry: entry.name):
        if not _is_folder(entry):
            kind = "image in no class folder" if is_image(entry.name) else _ending(entry.name)
            listing.passed_over[kind] += 1
        elif _identity(entry.path) in above:
            listing.loops.append(entry.path)
        else:
            listing.images[entry.name] = _images_below(entry.path, above, listing.passed_over)
    return listing


def _images_below(folder: str, above: frozenset[Identity], passed_over: Counter[str]) -> list[str]:
    """Paths of the images, in order of their folders; other files are counted."""
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
            if is_image(entry.name):
                found.append((at, entry.name))
            elif _is_folder(entry):
                pending.append((entry.path, above | {identity}))
            else:
                passed_over[_ending(entry.name)] += 1
    return [os.path.join(*place) for place in sorted(found)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder was left behind by a program."""
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


def is_image(name: str) -> bool:
    """Whether a name has the ending of an image."""
    return name.lower().endswith(ENDINGS)


def first_five(names: Collection[str]) -> str:
    """Names for an error message.

    Example:
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
