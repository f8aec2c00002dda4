"""Random crops and flips of whole batches, each image with draws of its own.

The transforms of torchvision give every image of a batch the same crop; these do not. All random numbers come from a
table for each epoch, which depends only on the seed and the epoch. So the augmentation of an image does not depend on
batches, workers, processes, devices or interruptions.

Shapes: N images of a split, B batch, C channels, S pixels of a side.
"""

import functools
import math
import random
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Crop = Literal["none", "shift", "resized"]

AREA, RATIO, TOP, LEFT, FLIP = range(5)
"""Columns of the draws."""


@functools.lru_cache(maxsize=2)
def draws_of_epoch(images: int, seed: int, epoch: int) -> Tensor:
    """Numbers in [0, 1) for each image of a split, (N, 5); the generator is no one else's."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))
    return torch.rand(images, 5, generator=generator)


def augment(images: Tensor, draws: Tensor, crop: Crop, flips: bool) -> Tensor:
    """Crop and mirror each image by its own draws.

    Args:
        images: uint8 (B, C, S, S).
        draws: (B, 5) in [0, 1).
        crop: ``"shift"``: by up to an eighth of a side, black beyond the edge. ``"resized"``: 35 to 100 % of the
            area, resized to the whole.
        flips: Mirror half of the images.

    Returns:
        (B, C, S, S): uint8, or float32 between the same limits after a resized crop.
    """
    if crop == "shift":
        images = shifted(images, draws, images.shape[-1] // 8)
    elif crop == "resized":
        images = resized(images.float(), torch.stack(crop_box(draws, *images.shape[-2:]), 1))
    if flips:
        images = torch.where((draws[:, FLIP] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return images


def shifted(images: Tensor, draws: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels, black where it was not; (B, C, S, S)."""
    size = images.shape[-1]
    top, left = (draws[:, [TOP, LEFT]] * (2 * most + 1)).long().unbind(1)
    windows = F.pad(images, [most] * 4).unfold(2, size, 1).unfold(3, size, 1)  # (B, C, 2*most+1, 2*most+1, S, S) view
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def crop_box(draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of a crop of 35 to 100 % of the area, as shares of the image, (B,) each.

    The ratio of the sides is 3:4 to 4:3, as in torchvision's RandomResizedCrop. A side that would be longer than the
    image is cut; torchvision draws again.
    """
    area = (0.35 + 0.65 * draws[:, AREA]) * (height * width)
    ratio = ((2 * draws[:, RATIO] - 1) * math.log(4 / 3)).exp()
    h = ((area / ratio).sqrt() / height).clamp(max=1)
    w = ((area * ratio).sqrt() / width).clamp(max=1)
    return draws[:, TOP] * (1 - h), draws[:, LEFT] * (1 - w), h, w


def resized(images: Tensor, boxes: Tensor) -> Tensor:
    """The part of each image (B, C, S, S) in its box (top, left, height, width) (B, 4), with the side of the whole."""
    top, left, h, w = boxes.unbind(1)
    zero = torch.zeros_like(h)
    to_input = torch.stack([w, zero, 2 * left + w - 1, zero, h, 2 * top + h - 1], 1).view(-1, 2, 3)
    grid = F.affine_grid(to_input, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
