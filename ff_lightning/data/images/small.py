"""Small images besides CIFAR: street numbers, handwriting, clothes and STL-10; read by torchvision."""

from typing import Any

from torchvision import datasets

from ff_lightning.data.images.download import BY_FLAG, DownloadedData
from ff_lightning.util.arguments import is_whole, shown


class SVHN(DownloadedData):
    """99,289 house numbers, 32x32 pixels, 10 digits, 26,032 of them the test set; the extra images are not used.

    Source: Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.

    Args:
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader = datasets.SVHN
    class_names = tuple("0123456789")
    input_shape = (3, 32, 32)
    statistics = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    flips = False


class MNIST(DownloadedData):
    """70,000 handwritten digits, 28x28 grey values, 10,000 of them the test set.

    Source: LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.

    Args:
        kwargs: root, flat, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData` and `VectorData`.
    """

    reader = datasets.MNIST
    splits = BY_FLAG
    extracted = "MNIST"
    class_names = tuple("0123456789")
    input_shape = (1, 28, 28)
    statistics = ((0.1307,), (0.3081,))
    flips = False


class FashionMNIST(DownloadedData):
    """70,000 pictures of clothes in 10 classes, 28x28 grey values, 10,000 of them the test set.

    Source: Xiao et al., Fashion-MNIST, arXiv 1708.07747, 2017.

    Args:
        kwargs: root, flat, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData` and `VectorData`.
    """

    reader = datasets.FashionMNIST
    splits = BY_FLAG
    extracted = "FashionMNIST"
    class_names = tuple(datasets.FashionMNIST.classes)
    input_shape = (1, 28, 28)
    statistics = ((0.2860,), (0.3530,))


class STL10(DownloadedData):
    """13,000 labelled photographs of 96x96 pixels in 10 classes, 8,000 of them the test set.

    Source: Coates et al., An Analysis of Single Layer Networks in Unsupervised Feature Learning, 2011.

    Args:
        fold: Train on one of its ten folds of 1,000 images, 0 to 9; None: on all 5,000.
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.

    Raises:
        ValueError: If there is no such fold.
    """

    reader = datasets.STL10
    class_names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    input_shape = (3, 96, 96)
    statistics = ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))

    def __init__(self, fold: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fold is not None and (not is_whole(fold) or fold not in range(10)):
            raise ValueError(f"fold={shown(fold)}: must be from 0 to 9, or None")
        self.splits = {"train": {"split": "train", "folds": fold}, "test": {"split": "test"}}
