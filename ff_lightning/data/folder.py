"""Images in folders, one folder for each class."""

import logging
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from ff_lightning.data.base import IMAGENET_STATISTICS, ImageData, Sample

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
        super().__init__(root=root, **kwargs)
        self.folders = _folders(Path(root).expanduser())
        self.class_names = _class_names(self.folders)
        size = self.image_size or min(_load(_first_image(self.folders["train"] / self.class_names[0])).size)
        self.input_shape = (3, size, size)

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
        return datasets.ImageFolder(str(self.folders[split]), loader=_load)


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
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMG_EXTENSIONS:
            return path
    raise FileNotFoundError(
        f"class folder {folder} holds no image; known are files that end in {', '.join(IMG_EXTENSIONS)}"
    )


def _load(path: str | Path) -> Image.Image:
    """Read an image as RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"cannot read the image {path}: {error}") from error
