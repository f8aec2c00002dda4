"""Decoded images in one file, so that the next run does not decode them again."""

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ff_lightning.files import whole

log = logging.getLogger(__name__)

Stored = dict[str, torch.Tensor]


def cached(path: Path, files: Sequence[Path], settings: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` gives, from the file `path` if that was made of the same files with the same settings.

    Else it is made anew and written, also where the file is damaged. A warning says so where it cannot be written.

    Args:
        path: The file.
        files: What it is made of; a change of a name, a size or a time makes it stale.
        settings: What else it depends on.
        make: Makes the tensors.
    """
    key = _key(files, settings)
    if path.exists():
        try:
            # mapped: processes on one machine share the memory
            stored = torch.load(path, weights_only=True, mmap=True)
            if stored["key"] == key and stored["sum"] == _sum(stored["content"]):
                return stored["content"]
            log.info("%s is stale or damaged: it is made anew", path)
        except Exception as error:  # whatever a damaged file leads to
            log.warning("%s cannot be read and is made anew: %s", path, error)
    content = make()
    try:
        with whole(path) as part:
            torch.save({"key": key, "sum": _sum(content), "content": content}, part)
    except (OSError, RuntimeError) as error:  # torch reports a folder or disk that cannot be written as the latter
        log.warning("the decoded images are not kept for the next run: %s (cache_dir may name another folder)", error)
    return content


def _key(files: Sequence[Path], settings: Any) -> str:
    listing = hashlib.sha256(repr(settings).encode())
    for file in files:
        status = file.stat()
        listing.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return listing.hexdigest()


def _sum(content: Stored) -> int:
    total = 0
    for name in sorted(content):
        total = zlib.crc32(content[name].contiguous().numpy().reshape(-1).data, total)
    return total
