"""Decoded images in one file, so that the next run does not decode them again."""

import functools
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ff_lightning.util.files import replacing

log = logging.getLogger(__name__)

Stored = dict[str, torch.Tensor]


def user_folder() -> Path:
    """Where the user's caches are: ``$FF_LIGHTNING_CACHE``, or ff_lightning in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own, common = os.environ.get("FF_LIGHTNING_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(own or os.path.join(common, "ff_lightning")))


def name_of(folder: str | Path) -> str:
    """A short name for a folder, another one for each."""
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:8]


def cached(
    path: Path,
    files: Sequence[str | Path],
    settings: Any,
    make: Callable[[], Stored],
    mend: Callable[[Stored], None] = lambda stored: None,
) -> Stored:
    """What `make` gives, from the file `path` if that was made of the same files with the same settings.

    Otherwise, or if the file is damaged, it is made and written again. If it cannot be written, a warning says so.

    Args:
        path: The file.
        files: What it is made of; a change of a name, a size or a time makes it stale.
        settings: What else it depends on.
        make: Makes the tensors.
        mend: Changes in place what was read from the file.
    """
    key = _key(files, settings)
    kept = _load(path, key)
    if kept is not None:
        mend(kept)
        return kept
    content = make()
    try:
        with replacing(path) as part:
            torch.save({"key": key, "sum": _sum(content), "content": content}, part)
        _say_where(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a folder or disk that cannot be written as the latter
        log.warning("the decoded images are not kept for the next run: %s (cache_dir may name another folder)", error)
    return content


def _load(path: Path, key: str) -> Stored | None:
    """The content of the file, unless it is stale, damaged or missing."""
    try:
        # mapped, and copied where it is changed: processes on one machine share the memory
        stored = torch.load(path, weights_only=True, mmap=True)
        if stored["key"] == key and stored["sum"] == _sum(stored["content"]):
            return stored["content"]
        log.info("%s is stale or damaged: it is made anew", path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever a damaged file leads to
        log.warning("%s cannot be read and is made anew: %s", path, error)
    return None


@functools.cache
def _say_where(folder: Path) -> None:
    """Once for each folder."""
    log.warning("decoded images are kept for the next run in %s (cache_dir may name another folder)", folder)


def _key(files: Sequence[str | Path], settings: Any) -> str:
    listing = hashlib.sha256(repr(settings).encode())
    for file in files:
        try:
            status = os.stat(file)
            facts = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:  # such as a link that leads nowhere
            facts = "\0missing\n"
        listing.update(os.fsencode(os.path.abspath(file)) + facts.encode())
    return listing.hexdigest()


def _sum(content: Stored) -> int:
    total = 0
    for name in sorted(content):
        total = zlib.crc32(content[name].contiguous().numpy().reshape(-1).data, total)
    return total
