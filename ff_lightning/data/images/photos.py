"""Photographs of many sizes: Imagenette and the usual targets of transfer; read by torchvision."""

from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from ff_lightning.data.images.base import IMAGENET_STATISTICS
from ff_lightning.data.images.download import WITH_VAL, DownloadedData
from ff_lightning.data.images.folder import FolderImages
from ff_lightning.data.images.reading import load_image


class Imagenette(DownloadedData):
    """13,394 photographs of ImageNet in 10 easy classes; its 3,925 validation images are the test set.

    Source: Howard, https://github.com/fastai/imagenette, 2019.

    Args:
        kwargs: root, image_size, batch_size, ...; see `ImageData`. The archive of 160 pixels is taken for an image_size
            of up to 160 pixels (128 if it is not given), that of 320 for up to 320, and the full one beyond.
    """

    reader = datasets.Imagenette
    class_names = tuple(names[0] for names in datasets.Imagenette._WNID_TO_CLASS.values())
    input_shape = (3, 128, 128)
    statistics = IMAGENET_STATISTICS

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        size = next((f"{pixels}px" for pixels in (160, 320) if self.image_shape[1] <= pixels), "full")
        self.splits = {name: {"split": folder, "size": size} for name, folder in (("train", "train"), ("test", "val"))}
        self.extracted = "imagenette2" + {"160px": "-160", "320px": "-320", "full": ""}[size]

    def _open(self, split: str, download: bool = False) -> Any:
        if download:
            super()._open(split, download)
        folder = Path(self.root).expanduser() / str(self.extracted) / self.splits[split]["split"]
        return FolderImages(folder, list(datasets.Imagenette._WNID_TO_CLASS))


class Flowers102(DownloadedData):
    """8,189 flowers in 102 classes: 1,020 to train, 1,020 to validate, 6,149 to test.

    Source: Nilsback and Zisserman, Automated Flower Classification over a Large Number of Classes, 2008.

    Args:
        kwargs: root, image_size, batch_size, augment, seed, ...; see `ImageData`.
    """

    reader = datasets.Flowers102
    splits = WITH_VAL
    extracted = "flowers-102"
    class_names = tuple(datasets.Flowers102.classes)
    input_shape = (3, 224, 224)
    statistics = IMAGENET_STATISTICS


class DTD(DownloadedData):
    """5,640 textures in 47 classes: 1,880 each to train, to validate and to test (the first of its ten partitions).

    Source: Cimpoi et al., Describing Textures in the Wild, 2014.

    Args:
        kwargs: root, image_size, batch_size, augment, seed, ...; see `ImageData`.
    """

    reader = datasets.DTD
    splits = WITH_VAL
    extracted = "dtd"
    class_names = tuple(
        (  # noqa: SIM905
            "banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous "
            "flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted "
            "meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled "
            "stained stratified striped studded swirly veined waffled woven wrinkled zigzagged"
        ).split()
    )
    input_shape = (3, 224, 224)
    statistics = IMAGENET_STATISTICS


class _Pets(datasets.OxfordIIITPet):
    """Its images are read as those of all other sets: a damaged one is named."""

    def __getitem__(self, idx: int) -> tuple[Image.Image, int]:
        return load_image(self._images[idx]), self._labels[idx]


SPLITS_OF_PETS = {"train": {"split": "trainval"}, "test": {"split": "test"}}


class OxfordPets(DownloadedData):
    """7,349 cats and dogs in 37 breeds: 3,680 to train, 3,669 to test.

    Source: Parkhi et al., Cats and Dogs, 2012.

    Args:
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader = _Pets
    splits = SPLITS_OF_PETS
    extracted = "oxford-iiit-pet"
    class_names = tuple(
        (  # noqa: SIM905
            "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
            "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired "
            "great_pyrenees havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland "
            "Persian pomeranian pug Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese "
            "Sphynx staffordshire_bull_terrier wheaten_terrier yorkshire_terrier"
        ).split()
    )
    input_shape = (3, 224, 224)
    statistics = IMAGENET_STATISTICS
