"""Generated images whose classes can be learned."""

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from ff_lightning.data.images.base import ImageData
from ff_lightning.data.images.digits import TensorImages
from ff_lightning.data.images.split import Sample
from ff_lightning.util.arguments import check_whole


class FakeImages(ImageData):
    """Ten coarse patterns of colours with noise, generated, the same on every machine: nothing to download.

    Args:
        images: Number of training images; there are a quarter as many to test.
        kwargs: image_size (32 if it is not given), batch_size, classes, val_fraction, seed, ...; see `ImageData`.

    Raises:
        ValueError: If there are fewer than 40 images.

    Examples:
        >>> FakeImages(image_size=64, classes=[0, 1]).input_shape
        (3, 64, 64)
    """

    class_names = tuple(f"pattern{number}" for number in range(10))
    input_shape = (3, 32, 32)
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    flips = reads_root = False

    def __init__(self, images: int = 1000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("images", images, least=40)  # so that there is one of each class to test
        self.images = images

    def read_train(self) -> Dataset[Sample]:
        """The training images."""
        return _make(self.images, self.input_shape[1], seed=1)

    def read_test(self) -> Dataset[Sample]:
        """The test images."""
        return _make(self.images // 4, self.input_shape[1], seed=2)


def _make(count: int, size: int, seed: int) -> TensorImages:
    """Images (N, 3, S, S), the classes in turn."""
    patterns = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(count) % 10
    clean = F.interpolate(patterns, (size, size), mode="bilinear")[targets]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return TensorImages((clean + 0.15 * noise).clamp(0, 1).mul(255).to(torch.uint8), targets)
