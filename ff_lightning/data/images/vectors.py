"""Small images as vectors, for networks without convolutions."""

import math
from collections.abc import Callable
from typing import Any

from ff_lightning.data.images.base import ImageData
from ff_lightning.data.images.reading import Shape
from ff_lightning.util.arguments import check_switch


class VectorData(ImageData):
    """Base of the sets whose images are vectors on request.

    Args:
        flat: Whether a sample is a vector (C S S,) in place of an image (C, S, S).
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    def __init__(self, flat: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_switch("flat", flat)
        self.flat = flat
        if flat:
            self.input_shape = (math.prod(self.image_shape),)

    @property
    def image_shape(self) -> Shape:
        """(C, S, S) of the pixels."""
        channels, side, _ = type(self).input_shape
        side = self.image_size or side
        return channels, side, side

    def finish(self, split: Any) -> Callable[[Any], Any]:
        """Augmentation and normalisation of a batch, and the change to vectors."""
        finish = super().finish(split)

        def as_vectors(batch: Any) -> Any:
            images, targets = finish(batch)
            return images.flatten(1), targets

        return as_vectors if self.flat else finish
