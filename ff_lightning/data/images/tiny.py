"""Tiny ImageNet, which torchvision does not have."""

from pathlib import Path
from typing import Any

from torchvision.datasets.utils import download_and_extract_archive

from ff_lightning.data.images.base import IMAGENET_STATISTICS
from ff_lightning.data.images.download import DownloadedData
from ff_lightning.data.images.folder import FolderImages


class TinyImageNetFolder(FolderImages):
    """One split of Tiny ImageNet in its own format; the classes in the order of their names.

    Args:
        root: Folder with the folder ``tiny-imagenet-200``.
        split: ``"train"``: a folder for each class. ``"val"``: one folder, with the classes in val_annotations.txt.
        download: Whether to download the archive to `root`.
    """

    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def __init__(self, root: str, split: str, download: bool = False) -> None:
        base = Path(root) / "tiny-imagenet-200"
        if download and not base.exists():
            download_and_extract_archive(self.url, root, md5=self.md5)
        names = sorted((base / "wnids.txt").read_text().split())
        super().__init__(base / split, names)
        annotations = base / split / "val_annotations.txt"
        if annotations.exists():
            lines = [line.split("\t") for line in annotations.read_text().splitlines()]
            self.samples = sorted((str(base / split / "images" / name), names.index(wnid)) for name, wnid, *_ in lines)


SPLITS = {"train": {"split": "train"}, "test": {"split": "val"}}


class TinyImageNet(DownloadedData):
    """110,000 photographs of 64x64 pixels in 200 classes; its 10,000 validation images are the test set.

    The images of its own test set have no classes. Class names are numbers until the set is downloaded.

    Source: Stanford CS231n, Tiny ImageNet Visual Recognition Challenge, 2015.

    Args:
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader = TinyImageNetFolder
    splits = SPLITS
    extracted = "tiny-imagenet-200"
    input_shape = (3, 64, 64)
    statistics = IMAGENET_STATISTICS

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        names = Path(root).expanduser() / "tiny-imagenet-200" / "wnids.txt"
        self.class_names = sorted(names.read_text().split()) if names.exists() else [str(n) for n in range(200)]
        super().__init__(root=root, **kwargs)
