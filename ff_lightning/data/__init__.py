"""LightningDataModules: one base for splits and loaders, and a file or folder for each kind of data."""

from ff_lightning.data.base import DataModule
from ff_lightning.data.images.base import ImageData
from ff_lightning.data.images.cifar import CIFAR10, CIFAR100
from ff_lightning.data.images.digits import Digits
from ff_lightning.data.images.fake import FakeImages
from ff_lightning.data.images.folder import ImageFolder
from ff_lightning.data.images.photos import DTD, Flowers102, Imagenette, OxfordPets
from ff_lightning.data.images.small import MNIST, STL10, SVHN, FashionMNIST
from ff_lightning.data.images.tiny import TinyImageNet
from ff_lightning.data.signals import Signals
from ff_lightning.data.tabular import BreastCancer, Diabetes, Tabular
from ff_lightning.data.text import Text

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "MNIST",
    "STL10",
    "SVHN",
    "BreastCancer",
    "DataModule",
    "Diabetes",
    "Digits",
    "FakeImages",
    "FashionMNIST",
    "Flowers102",
    "ImageData",
    "ImageFolder",
    "Imagenette",
    "OxfordPets",
    "Signals",
    "Tabular",
    "Text",
    "TinyImageNet",
]
