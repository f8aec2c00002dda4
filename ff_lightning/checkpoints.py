"""Checkpoint files that are whole or not there."""

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from ff_lightning.files import whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name beside its place and then renames it.

    A process that dies while it writes leaves the checkpoint that was there before. Lightning's own writer goes over
    the folder for temporary files, and where that is another file system its last step is an ordinary copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; on remote file systems Lightning's way."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: If the file is not a whole checkpoint.
        """
        check_whole(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return loaded


def check_whole(path: Any) -> None:
    """Raise ValueError if a local file is cut off: the directory of the archive stands at its end."""
    if Path(path).is_file() and not is_zipfile(path):
        raise ValueError(
            f"the checkpoint {path} is not whole: it was cut off while it was written or copied, or it is no "
            f"checkpoint ({Path(path).stat().st_size:,} bytes); take an earlier one"
        )
