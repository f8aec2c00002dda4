"""LightningDataModules: one base for splits and loaders, then one file for each family of data sets."""

from ff_lightning.data.base import ImageData
from ff_lightning.data.cifar import CIFAR10, CIFAR100
from ff_lightning.data.digits import Digits
from ff_lightning.data.folder import ImageFolder

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageData", "ImageFolder"]
