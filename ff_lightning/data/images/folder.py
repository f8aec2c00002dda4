"""Images in folders, one folder for each class."""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ff_lightning.data.images.base import FORMAT, IMAGENET_STATISTICS, ImageData
from ff_lightning.data.images.cache import cached
from ff_lightning.data.images.reading import OnError, load_image
from ff_lightning.data.images.split import Sample
from ff_lightning.data.listing import Listing, first_five, is_hidden, list_classes
from ff_lightning.util.arguments import check_choice
from ff_lightning.util.files import printable, read_bytes

log = logging.getLogger(__name__)

ENDINGS = (*IMG_EXTENSIONS, ".avif")
"""Of the files that are images."""
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Names of the folders of the splits, in small letters or capitals."""


class FolderImages(Dataset[Any]):
    """Images in ``folder/<class>/*`` with the numbers of their classes.

    Args:
        folder: The folder of the classes.
        classes: Their names in the order of their numbers; None: all, by name.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str] | None = None) -> None:
        images = list_classes(folder, ENDINGS).files
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


class ImageFolder(ImageData):
    """Images in ``root/{train,val,test}/<class>/*``; ``val`` and ``test`` may be missing.

    Without ``val``, validation images are cut from ``train``. With ``val`` but without ``test``, see `val_as`. The
    folders may also be named ``training``, ``valid``, ``validation`` or ``testing``. Hidden files and folders, and
    those that file managers leave behind, are skipped. Pixels are normalised by the statistics of ImageNet.

    Args:
        root: Folder with the folder ``train``.
        val_as: What the folder ``val`` is if there is no folder ``test``. ``"test"``: the test set; validation images
            are cut from ``train``, so that nothing is chosen by the test set. ``"val"``: the validation set; there is
            nothing to test on.
        kwargs: image_size (None: the shorter side of the first training image), batch_size, augment, val_fraction,
            seed, ...; see `ImageData`.

    Raises:
        FileNotFoundError: If a folder or a class is missing or empty.
        ValueError: If there are two folders for a split, or `val_as` is not known.
        OSError: While loading, if an image cannot be read; it is named.
    """

    statistics = IMAGENET_STATISTICS

    def __init__(self, root: str = "data", val_as: Literal["test", "val"] = "test", **kwargs: Any) -> None:
        check_choice("val_as", val_as, ["test", "val"])
        self.folders = _folders(Path(root).expanduser(), val_as)
        listings = {split: list_classes(folder, ENDINGS) for split, folder in self.folders.items()}
        _check_loops(listings, kwargs.get("on_error", "raise"))
        self.class_names = [printable(name) for name in _class_names(self.folders, listings)]
        super().__init__(root=root, **kwargs)
        size = self.image_size or _size_of_first(listings["train"], self.on_error)
        self.input_shape = (3, size, size)

    def prepare_data(self) -> None:
        """Warn of images that are in two splits; sets too large for memory are too large to look for them."""
        files = {split: [path for path, _ in self._read(split).samples] for split in self.folders}
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
            known.pop(bytes(NOTHING.numpy()), None)
            found = zip(contents[other].numpy(), files[other], strict=True)
            same = [(file, known[bytes(digest)]) for digest, file in found if bytes(digest) in known]
            if same:
                log.warning(
                    "%d images of %r are in %r too, such as %s and %s: what is measured on them is not to be trusted",
                    len(same), other, split, *map(printable, same[0]),
                )  # fmt: skip

    def read_train(self) -> Dataset[Sample]:
        """All images of ``train``."""
        return self._read("train")

    def read_val(self) -> Dataset[Sample] | None:
        """All images of ``val``, unless they are the test set."""
        if "val" in self.folders:
            return self._read("val")
        log.warning("%s has no folder 'val': validation images are cut from 'train'", printable(self.root))
        return None

    def read_test(self) -> Dataset[Sample]:
        """All images of ``test``, or of ``val`` where that is the test set."""
        if "test" not in self.folders:
            kept = "val" in self.folders
            has = "has no folder 'test', and val_as='val'" if kept else "has neither a folder 'test' nor 'val'"
            raise FileNotFoundError(f"root={self.root!r} {has}: there is nothing to test on")
        return self._read("test")

    def _read(self, split: str) -> FolderImages:
        return FolderImages(self.folders[split])


def _folders(root: Path, val_as: str) -> dict[str, Path]:
    """The folder of each split."""
    there = sorted(path.name for path in root.iterdir() if not is_hidden(path.name)) if root.is_dir() else []
    folders = {}
    for split, names in SPLITS.items():
        found = [name for name in there if name.lower() in names and (root / name).is_dir()]
        if len(found) > 1:
            raise ValueError(f"root={str(root)!r} holds {found}, which are names of the same split: keep one of them")
        if found:
            folders[split] = root / found[0]
    if "train" not in folders:
        holds = f"it holds {first_five(there)}" if root.is_dir() else "it does not exist"
        raise FileNotFoundError(f"root={str(root)!r} must hold a folder 'train' with a folder for each class; {holds}")
    if "val" in folders and "test" not in folders and val_as == "test":
        name = folders["val"].name
        log.warning(
            "%s has no folder 'test': %r is the test set; with val_as='val' it is the validation set",
            printable(root), name,
        )  # fmt: skip
        folders["test"] = folders.pop("val")
    return folders


def _check_loops(listings: dict[str, Listing], on_error: OnError) -> None:
    for loop in (loop for listing in listings.values() for loop in listing.loops):
        message = f"cannot read the class folder {printable(loop)}: it leads back to a folder above it"
        if on_error == "raise":
            raise OSError(message)
        log.warning("left out: %s", message)


def _class_names(folders: dict[str, Path], listings: dict[str, Listing]) -> list[str]:
    """Names of the classes, which are the same in all splits, each with an image; what is passed over is reported."""
    names = list(listings["train"].files)
    if len(names) < 2:
        raise FileNotFoundError(
            f"{printable(folders['train'])} must hold a folder for each of two or more classes: it holds the "
            f"folders {names} and other files: {first_five(_loose(folders['train']))}"
        )
    for split, listing in listings.items():
        differ = sorted(set(listing.files) ^ set(names))
        if differ:
            raise FileNotFoundError(
                f"{printable(folders[split])} and {printable(folders['train'])} must hold the same classes, but differ "
                f"in {first_five(differ)}"
            )
        for name, images in listing.files.items():
            if not images:
                raise FileNotFoundError(
                    f"class folder {printable(folders[split] / name)} holds no image; known are files that end in "
                    f"{', '.join(ENDINGS)}"
                )
        if listing.passed_over:
            kinds = ", ".join(f"{count} {kind}" for kind, count in listing.passed_over.most_common(5))
            log.warning(
                "passed over %d files in %s that are no images of a class: %s",
                listing.passed_over.total(), printable(folders[split]), kinds,
            )  # fmt: skip
    return names


def _loose(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_dir() and not is_hidden(path.name))


def _size_of_first(listing: Listing, on_error: OnError) -> int:
    """The shorter side of the first image that can be read."""
    for path in itertools.chain(*listing.files.values()):
        try:
            return min(load_image(path).size)
        except OSError as error:
            if on_error == "raise":
                raise
            last = error
    raise OSError(f"none of the training images can be read: {last}")


NOTHING = torch.zeros(16, dtype=torch.uint8)
"""In place of the digest of a file that is empty or cannot be read: what it holds cannot be compared."""


def _content(file: str) -> torch.Tensor:
    """A digest, uint8 (16,)."""
    try:
        content = read_bytes(file)
    except OSError:
        return NOTHING
    if not content:
        return NOTHING
    return torch.frombuffer(bytearray(hashlib.blake2b(content, digest_size=16).digest()), dtype=torch.uint8)
