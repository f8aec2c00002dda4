"""Tiny ImageNet, which torchvision does not have, but its folders can be read."""

from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from ff_lightning.data.base import IMAGENET_STATISTICS
from ff_lightning.data.download import DownloadedData
from ff_lightning.data.reading import load_image


class TinyImageNetFolder(datasets.ImageFolder):
    """One split of Tiny ImageNet in its own format.

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
        super().__init__(str(base / split), loader=load_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The classes in the order of their names, for both splits."""
        names = sorted((Path(directory).parent / "wnids.txt").read_text().split())
        return names, {name: number for number, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *args: Any, **kwargs: Any) -> Any:
        """Files and their classes."""
        annotations = Path(directory) / "val_annotations.txt"
        if not annotations.exists():
            return datasets.ImageFolder.make_dataset(directory, class_to_idx, *args, **kwargs)
        lines = [line.split("\t") for line in annotations.read_text().splitlines()]
        return sorted((str(Path(directory) / "images" / name), class_to_idx[wnid]) for name, wnid, *_ in lines)


SPLITS = {"train": {"split": "train"}, "test": {"split": "val"}}


class TinyImageNet(DownloadedData):
    """110,000 photographs of 64x64 pixels in 200 classes; its 10,000 validation images are the test set.

    The images of its own test set have no classes. The names of the classes are known when it is there; before, they
    are numbers.

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
