"""Data sets that torchvision downloads and reads."""

import http.client
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ff_lightning.data.images.reading import load_image
from ff_lightning.data.images.split import Sample
from ff_lightning.data.images.vectors import VectorData

Splits = Mapping[str, Mapping[str, Any]]

BY_NAME: Splits = {split: {"split": split} for split in ("train", "test")}
BY_FLAG: Splits = {"train": {"train": True}, "test": {"train": False}}
WITH_VAL: Splits = {split: {"split": split, "loader": load_image} for split in ("train", "val", "test")}
"""How the readers are asked for a split; the last ones read files, and have a validation set of their own."""


class DownloadedData(VectorData):
    """Base of these sets: each names the class of torchvision that reads it, and the arguments for its splits.

    A marker file lies in `root` during a download. torchvision takes some half extracted archives for whole ones; if
    the marker is still there, they are removed and never read.

    Args:
        kwargs: root, download, flat, ...; see `ImageData` and `VectorData`.
    """

    reader: Callable[..., Any]
    """Called with root, download and what `splits` says."""
    splits: Splits = BY_NAME
    extracted: str | None = None
    """What an archive fills, below root, where torchvision does not know the checksums of the single files."""

    def prepare_data(self) -> None:
        """Download what is missing.

        Raises:
            OSError: If that fails; another run repairs it.
        """
        if self._is_complete() or not self.download:
            return
        root = Path(self.root).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
            if self._marker.exists() and self.extracted:
                shutil.rmtree(root / self.extracted, ignore_errors=True)
            self._marker.touch()
            for split in self.splits:
                self._open(split, download=True)
            self._marker.unlink()
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a wrong checksum
            raise OSError(
                f"{type(self).__name__} could not be downloaded to root={self.root!r}: {error} - another run replaces "
                "what is incomplete; without a network give --data.root FOLDER of a copy, or your own images by --data "
                "ImageFolder"
            ) from error

    def read_train(self) -> Dataset[Sample]:
        """All training images."""
        return self._read("train")

    def read_val(self) -> Dataset[Sample] | None:
        """The validation images, if the set has some of its own."""
        return self._read("val") if "val" in self.splits else None

    def read_test(self) -> Dataset[Sample]:
        """All test images."""
        return self._read("test")

    @property
    def _marker(self) -> Path:
        return Path(self.root).expanduser() / f".{self.extracted or type(self).__name__}.incomplete"

    def _open(self, split: str, download: bool = False) -> Any:
        return self.reader(str(Path(self.root).expanduser()), download=download, **self.splits[split])

    def _is_complete(self) -> bool:
        try:
            return not self._marker.exists() and all(len(self._open(split)) > 0 for split in self.splits)
        except (OSError, RuntimeError):
            return False

    def _read(self, split: str) -> Any:
        if self._marker.exists():
            raise FileNotFoundError(
                f"root={self.root!r}: the download of {type(self).__name__} broke off; run it again with download=True"
            )
        try:
            return self._open(split)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"root={self.root!r} does not hold {type(self).__name__}, or not all of it: {error} - download=True "
                "fetches it if it is not there at all"
            ) from error
