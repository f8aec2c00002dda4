"""A trained model that classifies images: paths, PIL images, arrays and tensors.

Shapes: N images, B batch, C channels, S pixels of a side, K classes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ff_lightning.data.images.reading import eight_bits, load_image, to_pixels
from ff_lightning.inference.facts import Facts
from ff_lightning.util.arguments import check_whole, kind_of


class Prediction(NamedTuple):
    """The answer for one image."""

    name: str
    """Of the most probable class."""
    probability: float
    """Of that class."""
    scores: Tensor
    """Of all classes, (K,): their softmax are the probabilities."""


class Predictor:
    """Class names and probabilities for images; see `ff_lightning.load`.

    Images are read, cropped to their centre square, resized and normalised like those of validation.

    Args:
        network: From normalised images (B, C, S, S) to scores (B, K).
        facts: The `Facts` about the model.
        device: Where it runs.

    Attributes:
        network: The same.
        facts: The same.

    Raises:
        ValueError: If the task of the model is not classification: `load_from_checkpoint` of its class loads it.

    Examples:
        >>> predictor = ff_lightning.load("last.ckpt")                       # doctest: +SKIP
        >>> [(answer.name, answer.probability) for answer in predictor(["a.png", "b.png"])]  # doctest: +SKIP
        [('cat', 0.97), ('dog', 0.71)]
    """

    def __init__(self, network: Callable[[Tensor], Tensor], facts: Facts, device: str | torch.device = "cpu") -> None:
        if facts.task != "Classification":
            raise ValueError(
                f"the task of the model is {facts.task}, so it names no classes: load it with load_from_checkpoint of "
                "its class, and call it; ff-lightning probe says what a linear read-out finds in it"
            )
        self.network, self.facts, self.device = network, facts, torch.device(device)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the scores."""
        return self.facts.class_names

    def __call__(self, images: Any, batch_size: int = 64) -> list[Prediction]:
        """Classify images.

        Args:
            images: One image or an iterable of them. An image is a path, a PIL image, a uint8 array (H, W) or
                (H, W, C), a uint8 tensor (C, H, W), or a floating tensor (C, S, S), which is taken as normalised. A
                tensor or array with one dimension more is a batch.
            batch_size: Number of images read and run at once.

        Returns:
            One answer for each image, in order.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If something is not an image.
        """
        check_whole("batch_size", batch_size)
        batches = in_batches(self._each(images), batch_size)
        return [answer for batch in batches for answer in self.answers(torch.stack([*map(self.prepare, batch)]))]

    def answers(self, inputs: Tensor) -> list[Prediction]:
        """Answers for normalised images (B, C, S, S)."""
        scores = self.scores(inputs)
        probabilities, numbers = scores.softmax(1).max(1)
        each = zip(numbers.tolist(), probabilities.tolist(), scores, strict=True)
        return [Prediction(self.class_names[number], probability, of_one) for number, probability, of_one in each]

    @torch.inference_mode()
    def scores(self, inputs: Tensor) -> Tensor:
        """Scores (B, K), float32 on the CPU, for normalised images (B, C, S, S)."""
        return self.network(inputs.to(self.device)).float().cpu()

    def prepare(self, image: Any) -> Tensor:
        """The normalised image, float32 (C, S, S); see `__call__`.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If it is no image.
        """
        if isinstance(image, Tensor) and image.is_floating_point():
            if tuple(image.shape) != self.facts.input_shape:
                raise ValueError(f"an image is {kind_of(image)}: give normalised ones of {self.facts.input_shape}")
            return image.float()
        if len(self.facts.input_shape) != 3 or self.facts.statistics is None:
            raise ValueError(
                "the checkpoint does not say how images are normalised: its data were no images, or a data module "
                f"without statistics; give normalised tensors of shape {self.facts.input_shape}"
            )
        pixels = to_pixels(_opened(image), self.facts.input_shape)
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in self.facts.statistics)
        return pixels.float().sub_(mean).div_(std)

    def prepare_all(self, images: list[Any]) -> Iterator[Tensor | OSError]:
        """As `prepare`, of several at once; for a file that cannot be read, the error."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            yield from pool.map(self._try, images)

    def _try(self, image: Any) -> Tensor | OSError:
        try:
            return self.prepare(image)
        except OSError as error:
            return error

    def _each(self, images: Any) -> Iterable[Any]:
        if isinstance(images, str | Path | Image.Image):
            return [images]
        if isinstance(images, np.ndarray):
            is_batch = images.ndim == 4 or (images.ndim == 3 and images.shape[-1] not in (1, 3, 4))
            return images if is_batch else [images]
        if isinstance(images, Tensor):
            return images if images.ndim > len(self.facts.input_shape) else [images]
        if not isinstance(images, Iterable):
            raise ValueError(f"images={images!r}: give a path, a PIL image, an array, a tensor, or several of them")
        return images


def in_batches(images: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    """Lists of so many."""
    left = iter(images)
    while batch := list(islice(left, batch_size)):
        yield batch


def _opened(image: Any) -> Any:
    """A PIL image or a uint8 tensor."""
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an image is an array of {image.dtype}: give uint8, or a normalised floating tensor")
        return Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    if isinstance(image, Image.Image):
        return eight_bits(image).convert("RGB")
    if isinstance(image, Tensor):
        return image
    raise ValueError(f"an image is {type(image).__name__}: give a path, a PIL image, an array or a tensor")
