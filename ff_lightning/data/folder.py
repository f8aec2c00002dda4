"""Images in folders, one folder for each class."""

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from ff_lightning.data.base import FORMAT, IMAGENET_STATISTICS, ImageData
from ff_lightning.data.cache import cached
from ff_lightning.data.loaders import Sample
from ff_lightning.data.reading import load_image

log = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """Images in ``root/{train,val,test}/<class>/*``; ``val`` and ``test`` may be missing.

    Without ``val``, validation images are cut from ``train``. With ``val`` but without ``test``, ``val`` is the test
    set and validation images are cut from ``train``, so that nothing is chosen on the test set. Pixels are normalised
    by the statistics of ImageNet.

    Args:
        root: Folder with the folder ``train``.
        kwargs: image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`. Without an image_size it is
            the shorter side of the first training image.

    Raises:
        FileNotFoundError: If a folder or a class is missing or empty.
        OSError: While loading, if an image cannot be read; it is named.
    """

    statistics = IMAGENET_STATISTICS

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        self.folders = _folders(Path(root).expanduser())
        self.class_names = names = _class_names(self.folders)
        super().__init__(root=root, **kwargs)
        size = self.image_size or min(load_image(_first_image(self.folders["train"] / names[0])).size)
        self.input_shape = (3, size, size)

    def prepare_data(self) -> None:
        """Warn of images that are in two splits; sets too large for memory are too large to look for them."""
        files = {split: list(_images(folder)) for split, folder in self.folders.items()}
        if not self._fits_in_memory(max(map(len, files.values()))):
            return
        contents = cached(
            self._cache_file("contents"),
            [file for found in files.values() for file in found],
            FORMAT,
            lambda: {split: torch.stack([_content(file) for file in found]) for split, found in files.items()},
        )
        for split, other in itertools.combinations(files, 2):
            known = {bytes(digest): file for digest, file in zip(contents[split].numpy(), files[split], strict=True)}
            found = zip(contents[other].numpy(), files[other], strict=True)
            same = [(file, known[bytes(digest)]) for digest, file in found if bytes(digest) in known]
            if same:
                log.warning(
                    "%d images of %r are in %r too, such as %s and %s: what is measured on them is not to be trusted",
                    len(same), other, split, *same[0],
                )  # fmt: skip

    def read_train(self) -> Dataset[Sample]:
        """All images of ``train``."""
        return self._read("train")

    def read_val(self) -> Dataset[Sample] | None:
        """All images of ``val``, if there is a ``test`` besides."""
        return self._read("val") if "val" in self.folders else None

    def read_test(self) -> Dataset[Sample]:
        """All images of ``test``, or of ``val`` where there is no ``test``."""
        if "test" not in self.folders:
            raise FileNotFoundError(
                f"root={self.root!r} has neither a folder 'test' nor 'val': there is nothing to test on"
            )
        return self._read("test")

    def _read(self, split: str) -> Dataset[Sample]:
        return datasets.ImageFolder(str(self.folders[split]), loader=load_image)


def _folders(root: Path) -> dict[str, Path]:
    """The folder of each split."""
    if not (root / "train").is_dir():
        there = sorted(path.name for path in root.iterdir()) if root.is_dir() else "nothing: it does not exist"
        raise FileNotFoundError(
            f"root={str(root)!r} must hold a folder 'train' with a folder for each class; it holds {there}"
        )
    folders = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
    if "val" in folders and "test" not in folders:
        log.warning("%s has no folder 'test': 'val' is the test set, and validation images are cut from 'train'", root)
        folders["test"] = folders.pop("val")
    elif "val" not in folders:
        log.warning("%s has no folder 'val': validation images are cut from 'train'", root)
    return folders


def _class_names(folders: dict[str, Path]) -> list[str]:
    """Names of the classes, which are the same in all splits, each with an image."""
    names = {
        split: sorted(path.name for path in folder.iterdir() if path.is_dir()) for split, folder in folders.items()
    }
    if len(names["train"]) < 2:
        raise FileNotFoundError(
            f"{folders['train']} must hold a folder for each of two or more classes: {names['train']}"
        )
    for split, found in names.items():
        differ = sorted(set(found) ^ set(names["train"]))
        if differ:
            raise FileNotFoundError(
                f"{folders[split]} and {folders['train']} must hold the same classes, but differ in {differ}"
            )
        for name in found:
            _first_image(folders[split] / name)
    return names["train"]


def _first_image(folder: Path) -> Path:
    """The first image below a folder."""
    path = next(_images(folder), None)
    if path is None:
        raise FileNotFoundError(
            f"class folder {folder} holds no image; known are files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return path


def _images(folder: Path) -> Iterator[Path]:
    """All images below a folder, in order."""
    for at, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (Path(at, name) for name in sorted(names) if is_image_file(name))


def _content(file: Path) -> torch.Tensor:
    """A digest, uint8 (16,)."""
    return torch.frombuffer(bytearray(hashlib.blake2b(file.read_bytes(), digest_size=16).digest()), dtype=torch.uint8)
