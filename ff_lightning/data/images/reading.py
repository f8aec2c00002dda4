"""From files and readers to pixels: uint8 images (C, S, S) of one size."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ff_lightning.data.images.augment import crop_box
from ff_lightning.data.loaders import as_it_is
from ff_lightning.data.splits import Indices
from ff_lightning.util.files import check_kind, printable

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Shape = tuple[int, int, int]

MOST_NAMED = 10
"""Unreadable images that are named in the log; the others are counted."""
LARGE_SIDE = 2048
"""Pixels of the shorter side from which on, times a whole number, images are reduced by that number."""
THIN = 16
"""How often the longer side may hold the shorter one before the ends are cut off: a line has no centre to enlarge."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""


def load_image(path: str | Path) -> Image.Image:
    """Read an image as RGB, upright; 16 bits become 8, and what is transparent loses that.

    One whose shorter side has 4,096 pixels or more is reduced to one of 2,048 or more: a file of some KB may hold so
    many pixels that to convert all of them takes GB of memory.

    Raises:
        OSError: If it cannot be read, or has more than `PIL.Image.MAX_IMAGE_PIXELS` (89 million); it is named.
    """
    try:
        check_kind(os.stat(path).st_mode)
        with Image.open(path) as image:
            _check_size(*image.size)
            if (factor := _too_large_by(image)) > 1:
                image.draft(None, (image.width // factor, image.height // factor))  # of effect on JPEG files alone
            image.load()
            return _reduced(eight_bits(_upright(image))).convert("RGB")
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise OSError(f"cannot read the image {printable(path)}: {error}") from error


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise OSError(f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {limit:,}")


def _too_large_by(image: Image.Image) -> int:
    """By what the sides may be divided; 1 for all but huge images."""
    return max(1, min(image.size) // LARGE_SIDE)


def _reduced(image: Image.Image) -> Image.Image:
    factor = _too_large_by(image)
    if factor == 1:
        return image
    return (image if image.mode in ("L", "RGB") else image.convert("RGB")).reduce(factor)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its camera noted."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged notes: the pixels may be whole
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def eight_bits(image: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255 when it converts deep grey values: they are scaled instead."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode!r}, with values beyond 16 bits: give 8 or 16 bits per channel")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def to_pixels(image: Any, shape: Shape, box: Tensor | None = None) -> Tensor:
    """A PIL image or a uint8 tensor, or the part of it in a box, as uint8 (C, S, S).

    Args:
        image: Of any size.
        shape: (C, S, S) of the result.
        box: Top, left, height and width as shares of the image; None: the largest square in its centre.
    """
    channels, size, _ = shape
    if isinstance(image, Image.Image):
        image = v2.functional.pil_to_tensor(image.convert("RGB" if channels == 3 else "L"))
    if image.dtype != torch.uint8 or image.shape[0] != channels:
        raise ValueError(
            f"an image is {image.dtype} of shape {tuple(image.shape)}: give PIL images, or uint8 tensors of "
            f"{channels} channels"
        )
    height, width = image.shape[1:]
    if box is not None:
        sides = torch.tensor([height, width, height, width])
        top, left, h, w = (box * sides).round().int().tolist()
        return v2.functional.resized_crop(image, top, left, max(1, h), max(1, w), [size, size], antialias=True)
    if image.shape[1:] == (size, size):
        return image
    longest = THIN * min(height, width)
    if max(height, width) > longest:
        image = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
    return v2.functional.center_crop(v2.functional.resize(image, [size], antialias=True), [size, size])


def labels_of(images: Any) -> np.ndarray[Any, Any]:
    """The classes of all images of a reader, without reading the images; torchvision has several names for them."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(images, name):
            return np.asarray(getattr(images, name))
    if hasattr(images, "_samples"):
        return np.asarray([label for _, label in images._samples])
    raise ValueError(f"{type(images).__name__} must have `targets`: the classes of all its images")


def files_of(images: Any) -> list[Path] | None:
    """The files of a reader, one for each image; None: it has its images in memory."""
    for name in ("samples", "_samples"):
        if hasattr(images, name):
            return [Path(path) for path, _ in getattr(images, name)]
    for name in ("_images", "_image_files"):
        if hasattr(images, name):
            return [Path(path) for path in getattr(images, name)]
    return None


class Reader(Dataset[Tensor]):
    """Reads the images of a data set one by one, as uint8 (C, S, S)."""

    def __init__(self, images: Any, shape: Shape) -> None:
        self.images, self.shape = images, shape

    def read(self, numbers: Indices, draws: Tensor | None = None) -> Tensor:
        """Images (B, C, S, S): the centre of each, or a crop by its draws (B, 5) from all pixels of the file."""
        return torch.stack([self._read(n, None if draws is None else draws[i]) for i, n in enumerate(numbers.tolist())])

    def _read(self, number: int, draws: Tensor | None) -> Tensor:
        image = self.images[number][0]
        if draws is None:
            return to_pixels(image, self.shape)
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        return to_pixels(image, self.shape, torch.cat(crop_box(draws[None], height, width)))


def read_all(reader: Reader, numbers: Indices, workers: int, on_error: OnError) -> dict[str, Tensor]:
    """The `pixels` (N, C, S, S) of all these images, and which of them are `readable` (N,); others are black."""
    pixels = torch.zeros(len(numbers), *reader.shape, dtype=torch.uint8)
    readable = torch.ones(len(numbers), dtype=torch.bool)
    start = 0
    for images, good in _attempts(reader, numbers, workers, on_error):
        pixels[start : start + len(images)] = images
        readable[start : start + len(images)] = good
        start += len(images)
    return {"pixels": pixels, "readable": readable}


def read_again(content: dict[str, Tensor], reader: Reader, numbers: Indices) -> None:
    """Try those images of `read_all` once more that could not be read: they may be readable by now, or are named."""
    lost = np.flatnonzero(~content["readable"].numpy())
    if len(lost):
        for name, values in read_all(reader, numbers[lost], 0, "skip").items():
            content[name][lost] = values


def find_readable(reader: Reader, numbers: Indices, workers: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of these images can be read, (N,): each is read once, so that all epochs and processes see the same."""
    return torch.cat([good for _, good in _attempts(reader, numbers, workers, "skip")]).numpy()


def _attempts(reader: Reader, numbers: Indices, workers: int, on_error: OnError) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, S, S) in order, and which of them could be read, (B,); the first errors are reported."""
    loader = DataLoader(
        _Attempts(reader, numbers, on_error),
        batch_size=64,
        num_workers=workers if len(numbers) > 1000 else 0,  # to start a worker takes as long as reading some hundred
        collate_fn=as_it_is,
        generator=torch.Generator(),  # not the one that the model draws from
    )
    named = 0
    for images, errors in loader:
        for error in errors.values():
            named += 1
            if named <= MOST_NAMED:
                log.warning("left out: %s", error)
        yield images, torch.tensor([i not in errors for i in range(len(images))])


class _Attempts(Dataset[Any]):
    """Batches of images, and errors by the position in the batch: such an image is black."""

    def __init__(self, reader: Reader, numbers: Indices, on_error: OnError) -> None:
        self.reader, self.numbers, self.on_error = reader, numbers, on_error

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, dict[int, str]]:
        images = torch.zeros(len(indices), *self.reader.shape, dtype=torch.uint8)
        errors = {}
        for i, index in enumerate(indices):
            try:
                images[i] = self.reader.read(self.numbers[[index]])[0]
            except OSError as error:
                if self.on_error == "raise":
                    raise
                errors[i] = str(error)
        return images, errors
