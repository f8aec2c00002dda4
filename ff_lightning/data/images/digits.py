"""Handwritten digits, embedded in scikit-learn: nothing to download."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from ff_lightning.data.images.split import Sample
from ff_lightning.data.images.vectors import VectorData


class Digits(VectorData):
    """1,797 real scans of handwritten digits, 8x8 grey values: 20 % are the test set, stratified with a fixed seed.

    The scans are not augmented: shifting or mirroring a digit of 8 pixels would change what it shows.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Args:
        kwargs: flat, image_size, batch_size, val_fraction, seed, ...; see `ImageData` and `VectorData`.

    Raises:
        ValueError: If `image_size` is below 8.

    Examples:
        >>> data = Digits()
        >>> data.num_classes, data.input_shape
        (10, (1, 8, 8))
    """

    class_names = tuple("0123456789")
    input_shape = (1, 8, 8)
    flips = crops = reads_root = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.image_shape[1] < 8:
            raise ValueError(f"image_size={self.image_size}: the scans have 8 pixels, give 8 or more")
        scale = _images(train=True).images.float() / 255
        self.statistics = ([scale.mean().item()], [scale.std().item()])

    def read_train(self) -> Dataset[Sample]:
        """80 % of the scans."""
        return _images(train=True)

    def read_test(self) -> Dataset[Sample]:
        """20 % of the scans."""
        return _images(train=False)


class TensorImages(Dataset[Sample]):
    """Images in memory.

    Args:
        images: uint8 (N, C, H, W).
        targets: Classes (N,).
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.targets[index])


def _images(train: bool) -> TensorImages:
    """The scans as uint8 (N, 1, 8, 8); the split never changes."""
    scans, targets = load_digits(return_X_y=True)
    chosen = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)[not train]
    images = torch.from_numpy(scans[chosen].reshape(-1, 1, 8, 8) / 16 * 255).round().to(torch.uint8)
    return TensorImages(images, torch.from_numpy(targets[chosen]))
