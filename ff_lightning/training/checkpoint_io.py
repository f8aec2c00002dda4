"""Checkpoint files that are whole or not there."""

import io
import os
import shutil
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from ff_lightning.util.files import check_sums, replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name beside its place and then renames it.

    If a process dies while it writes, the previous checkpoint is still there. Lightning's own writer uses the folder
    for temporary files; if that is on another file system, its last step is an ordinary copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; on remote file systems Lightning's way.

        Raises:
            OSError: If it cannot be written, with the path and the space that is left there.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path)) as part:
                torch.save(checkpoint, part)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # torch's writer, of that file, reports what the system refuses as a wrong position
            raise OSError(f"the checkpoint {path} cannot be written: {_reason(error, Path(path))}") from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, from a URL as well without running code.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file is not a whole checkpoint.
        """
        if is_remote(path):
            return read(fetched(path), *args, **kwargs)
        check_whole(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return loaded


def is_remote(path: Any) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def fetched(path: Any) -> Any:
    """The content at a URL, in memory; anything else unchanged.

    Lightning reads ``http://`` with ``weights_only=False``, and caches it under the file's name, even for another URL
    that ends in the same name.
    """
    return io.BytesIO(get_filesystem(path).cat_file(str(path))) if is_remote(path) else path


def read(source: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
    """The content of a checkpoint: tensors and plain values, and no code unless that is asked for.

    Args:
        source: A path, whose tensors are read when they are used, or an open file, whose position is kept.
        map_location: Where the tensors go; see `torch.load`.
        weights_only: False: run the code that the file brings.
    """
    only = weights_only is not False
    if isinstance(source, str | Path):
        return torch.load(source, map_location=map_location, weights_only=only, mmap=is_zipfile(source))
    start = source.tell()
    content = torch.load(source, map_location=map_location, weights_only=only)
    source.seek(start)
    return content


def _reason(error: Exception, path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        left = f"{shutil.disk_usage(folder).free:,} bytes are free in {folder}"
    except OSError as unknown:
        left = str(unknown)
    return f"{error}; {left}" if isinstance(error, OSError) else left


def check_whole(path: Any) -> None:
    """Read a local checkpoint once, and compare the sums that stand in it; an open file is not looked at.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is cut off, damaged, or another kind of file.
    """
    if isinstance(path, str | os.PathLike) and not is_remote(path) and not check_sums(Path(path)):
        raise ValueError(
            f"the checkpoint {path} is not whole: it was cut off while it was written or copied, or it is no "
            f"checkpoint ({Path(path).stat().st_size:,} bytes); take an earlier one"
        )
