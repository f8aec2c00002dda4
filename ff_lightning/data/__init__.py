"""LightningDataModules: one base for splits and loaders, then one file for each family of data sets."""

from ff_lightning.data.base import ImageData
from ff_lightning.data.cifar import CIFAR10, CIFAR100
from ff_lightning.data.digits import Digits
from ff_lightning.data.fake import FakeImages
from ff_lightning.data.folder import ImageFolder
from ff_lightning.data.photos import DTD, Flowers102, Imagenette, OxfordPets
from ff_lightning.data.small import MNIST, STL10, SVHN, FashionMNIST
from ff_lightning.data.tiny import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "MNIST",
    "STL10",
    "SVHN",
    "Digits",
    "FakeImages",
    "FashionMNIST",
    "Flowers102",
    "ImageData",
    "ImageFolder",
    "Imagenette",
    "OxfordPets",
    "TinyImageNet",
]
