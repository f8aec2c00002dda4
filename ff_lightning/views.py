"""Views of a batch for contrastive methods: labels written into inputs, and negative data.

Shapes: B batch, K classes, C channels, H x W positions, F numbers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ff_lightning.util.arguments import check_choice, check_whole

# ------------------------------------------------------------------------------------------------- labels in the input


def overlay(x: Tensor, labels: Tensor) -> Tensor:
    """Write the labels over the first K values of each sample.

    A label of 0 becomes the smallest value of the sample, a label of 1 the largest. Digits have an empty border for
    this; photographs do not.

    Args:
        x: (B, ...), floating; it is not changed.
        labels: Shares of the classes, (B, K), floating: one-hot, or 1 / K for the neutral label.

    Returns:
        The shape and dtype of x.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345.

    Examples:
        >>> overlay(torch.tensor([[[[0.0, 0.5], [0.5, 4.0]]]]), torch.tensor([[0.0, 1.0]])).flatten().tolist()
        [0.0, 4.0, 0.5, 4.0]
    """
    flat = x.flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    return torch.cat([low + labels * (high - low), flat[:, labels.shape[1] :]], 1).view_as(x)


def concat(x: Tensor, labels: Tensor) -> Tensor:
    """Flatten each sample and put its label first: (B, ...) and (B, K) -> (B, K + F).

    Source: Gandhi et al., Extending the Forward Forward Algorithm, arXiv 2307.04205.
    """
    return torch.cat([labels.to(x.dtype), x.flatten(1)], 1)


def label_map(x: Tensor, labels: Tensor) -> Tensor:
    """Add a channel that shows the label at each position: (B, C, H, W) and (B, K) -> (B, C + 1, H, W).

    Class k is a plane wave from -1 to 1, four pixels long, in the direction of the angle pi k / K, so a convolution can
    tell the classes apart at every position. Shares of classes give the mean of their waves.

    Source: after Scodellaro et al., Training Convolutional Neural Networks with the Forward-Forward Algorithm, arXiv
    2312.14924; the waves are ours.
    """
    rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
    angles = torch.arange(labels.shape[1], device=x.device, dtype=x.dtype) * (math.pi / labels.shape[1])
    along = columns * angles.cos()[:, None, None] + rows[:, None] * angles.sin()[:, None, None]  # (K, H, W)
    waves = torch.tensordot(labels.to(x.dtype), torch.cos(along * (math.pi / 2)), 1)
    return torch.cat([x, waves[:, None]], 1)


def label_token(ids: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Put the label in front, as a token of its own: (B, T) and (B, K) -> (B, 1 + T).

    The ids from `vocabulary` on are those of the classes, and behind them one for the neutral label.

    Args:
        ids: (B, T), whole numbers below `vocabulary`.
        labels: One-hot, or 1 / K for the neutral label, (B, K), floating.
        vocabulary: Number of the ids of tokens.

    Examples:
        >>> label_token(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]]), 4).tolist()
        [[5, 3, 1], [6, 0, 2]]
    """
    most, classes = labels.max(1)
    own = vocabulary + torch.where(most > 1 / labels.shape[1], classes, labels.shape[1])
    return torch.cat([own[:, None].to(ids.dtype), ids], 1)


PLACEMENTS: dict[str, Callable[..., Tensor]] = {
    "overlay": overlay,
    "concat": concat,
    "map": label_map,
    "token": label_token,
}
"""By name, what puts labels (B, K) into inputs (B, ...)."""


def labelled_shape(label: str, shape: Sequence[int], num_classes: int) -> tuple[int, ...]:
    """The shape of a sample with its label in it.

    Args:
        label: A name of `PLACEMENTS`.
        shape: Of a sample without.
        num_classes: K.

    Raises:
        ValueError: If the label has no room, or the name is not known.
    """
    check_choice("label", label, PLACEMENTS)
    size = math.prod(shape)
    if label == "overlay" and num_classes >= size:
        raise ValueError(
            f"label='overlay': {num_classes} labels leave nothing of the {size} values of a sample of shape "
            f"{tuple(shape)}: give label='concat'"
        )
    if label == "token" and len(shape) != 1:
        raise ValueError(f"label='token' is for token ids (T,), a sample has the shape {tuple(shape)}: give 'concat'")
    if label == "map" and len(shape) != 3:
        raise ValueError(f"label='map' is for images (C, H, W), a sample has the shape {tuple(shape)}: give 'concat'")
    of_label = {
        "overlay": shape,
        "concat": (num_classes + size,),
        "map": (shape[0] + 1, *shape[1:]),
        "token": (1 + size,),
    }
    return tuple(of_label[label])


# ------------------------------------------------------------------------------------------------------- negative data


def wrong_labels(target: Tensor, num_classes: int) -> Tensor:
    """A wrong class for each sample, all wrong ones equally likely: (B,) -> (B,), int64."""
    return (target + torch.randint_like(target, 1, num_classes)) % num_classes


def hard_labels(target: Tensor, scores: Tensor) -> Tensor:
    """A wrong class for each sample, drawn from the soft-max of scores: the model's likely mistakes.

    Args:
        target: Class numbers, (B,), int64.
        scores: Of the model, (B, K).

    Returns:
        (B,), int64.

    Source: the Matlab code of Hinton, The Forward-Forward Algorithm, arXiv 2212.13345.
    """
    others = scores.float().scatter(1, target[:, None], -torch.inf)
    return others.softmax(1).multinomial(1).squeeze(1)


NEGATIVES = ("uniform", "hard", "hybrid")


def blurred_masks(masks: Tensor, blurs: int) -> Tensor:
    """Blur masks by [1/4, 1/2, 1/4] along both axes, several times, and cut them at a half.

    Args:
        masks: Of zeros and ones, (B, 1, H, W), floating.
        blurs: Number of times; the border is repeated outwards.

    Returns:
        Zeros and ones, (B, 1, H, W): more blurring gives larger patches.
    """
    kernel = masks.new_tensor([0.25, 0.5, 0.25])
    for _ in range(blurs):
        masks = F.conv2d(F.pad(masks, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel)[None, None])
    return (masks > 0.5).to(masks.dtype)


def hybrids(x: Tensor, blurs: int = 6) -> Tensor:
    """Negative images without labels: patches of an image and, between them, of another one of the batch.

    Args:
        x: (B, C, H, W), floating.
        blurs: See `blurred_masks`. The paper does not give the number; 6 is that of another implementation.

    Raises:
        ValueError: If the inputs are no images, or if there is no other image in the batch.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345.
    """
    check_whole("blurs", blurs, least=0)
    if x.ndim != 4:
        raise ValueError(f"negatives='hybrid' mixes images (B, C, H, W): the inputs have the shape {tuple(x.shape)}")
    if len(x) < 2:
        raise ValueError("negatives='hybrid' mixes two images, the batch holds one: give another batch_size")
    bits = torch.randint(0, 2, (len(x), 1, *x.shape[2:]), device=x.device).to(x.dtype)
    mask = blurred_masks(bits, blurs)
    others = x.roll(int(torch.randint(1, len(x), ())), 0)
    return mask * x + (1 - mask) * others


# ------------------------------------------------------------------------------------------------------ positive pairs


def same(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample paired with itself."""
    return x, x


def shifts(x: Tensor, most: int = 2) -> tuple[Tensor, Tensor]:
    """Two views of each image, moved by up to `most` pixels; the edge is repeated.

    Args:
        x: (B, C, H, W), floating.
        most: Largest shift in each direction; all 2 most + 1 shifts are equally likely.

    Raises:
        ValueError: If the inputs are no images.
    """
    if x.ndim != 4:
        raise ValueError(f"views='shifts' moves images (B, C, H, W): the inputs have the shape {tuple(x.shape)}")
    windows = F.pad(x, [most] * 4, mode="replicate").unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    batch = torch.arange(len(x), device=x.device)
    one, other = torch.randint(2 * most + 1, (2, 2, len(x)), device=x.device)
    return windows[batch, :, one[0], one[1]], windows[batch, :, other[0], other[1]]


VIEWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"same": same, "shifts": shifts}
"""By name, what makes the two samples of each positive pair."""
