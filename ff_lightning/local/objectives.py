"""Objectives: what a single block is trained to do, and how it answers.

Shapes: B batch, C channels, H x W or T positions, K classes.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads.factory import takes_mask, with_mask
from ff_lightning.heads.layers import convolution, position_means, without_padding
from ff_lightning.heads.place import Place
from ff_lightning.losses import LogSumExpLoss, similarity_loss, supervised_contrastive_loss
from ff_lightning.util.arguments import check_choice, check_number, check_whole, shown


class Objective(nn.Module):
    """The local loss of a block. Its parameters are trained with the block, its buffers go into checkpoints.

    A subclass gives `loss` and `forward`. Features of tokens are zeros at padding; `forward` and `loss_and_scores` are
    given the mask, (B, T), bool and false there, and the features as they are, if they have a parameter `mask`.
    """

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The local loss.

        Args:
            features: Of the block, with their graph, (B, C, H, W).
            target: What the task has, such as classes (B,).

        Returns:
            A scalar.
        """
        return self.loss_and_scores(features, target)[0]

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, K), for the vote and early exit."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores: it needs a method forward(features)")

    def loss_and_scores(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The local loss, and the scores if they cost no extra pass."""
        return self.loss(features, target), None


class HeadObjective(Objective):
    """A head, and a criterion on its scores.

    Args:
        head: Features (B, C, H, W) -> scores (B, K).
        criterion: Scores (B, K) and target -> scalar.
    """

    def __init__(self, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.criterion = criterion
        self._takes_mask = takes_mask(head.forward)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of the head, (B, K)."""
        return with_mask(self.head, self._takes_mask, features, mask)

    def loss_and_scores(
        self, features: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The criterion of the scores, and the scores."""
        scores = self(features, mask)
        return self.criterion(scores, target), scores


class SimilarityObjective(HeadObjective):
    """Similarity matching: images of a class become alike, those of two classes do not.

    A 3x3 convolution (a linear layer for vectors) stands between the features and the similarities, as in the authors'
    code. The head is trained by the softmax cross-entropy; with a weight of 0 its gradient stays in the head.

    Args:
        place: Where in the network.
        prediction: Weight of the head's own loss for the block, 0 to 1; the similarity loss weighs the rest. 0.01 is
            ``predsim`` of the paper, 0 is ``sim``.

    Raises:
        ValueError: If the weight is outside 0 to 1.

    Source: Nøkland and Eidnes, Training Neural Networks with Local Error Signals, arXiv 1901.06656.
    """

    def __init__(self, place: Place, prediction: float = 0.01) -> None:
        check_number("prediction", prediction, least=0, most=1)
        super().__init__(place.make_head(), LogSumExpLoss())
        channels = place.shape[0]
        is_vector = all(side == 1 for side in place.shape[1:])
        self.similarity = convolution(channels, channels, 1 if is_vector else 3, len(place.shape) - 1, bias=True)
        self.prediction = prediction
        self.num_classes = place.num_classes

    def loss_and_scores(
        self, features: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of both losses, and the scores."""
        scores = self(features if self.prediction else features.detach(), mask)
        predicted = self.criterion(scores, target)
        features = features if mask is None else without_padding(features, mask)
        similar = similarity_loss(self.similarity(features), target, self.num_classes, mask)
        return (1 - self.prediction) * similar + (self.prediction or 1.0) * predicted, scores


class ContrastiveObjective(HeadObjective):
    """Supervised contrastive loss on a projection of the averaged features; the head learns beside it.

    Args:
        place: Where in the network.
        temperature: Of the similarities.
        width: Of the projection.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362.
    """

    def __init__(self, place: Place, temperature: float = 0.1, width: int = 128) -> None:
        check_number("temperature", temperature, above=0)
        check_whole("width", width)
        super().__init__(place.make_head(), LogSumExpLoss())
        self.projection = nn.Linear(place.shape[0], width)
        self.temperature = temperature

    def loss_and_scores(
        self, features: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The contrastive loss of the block, plus the loss of the head, which stays in the head; and the scores."""
        scores = self(features.detach(), mask)
        projected = F.normalize(self.projection(position_means(features, mask)), dim=1)
        own = supervised_contrastive_loss(projected, target, self.temperature)
        return own + self.criterion(scores, target), scores


def _log_sum_exp(place: Place) -> Objective:
    return HeadObjective(place.make_head(), LogSumExpLoss())


LOSSES: dict[str, Callable[[Place], Objective]] = {
    "logsumexp": _log_sum_exp,
    "similarity": partial(SimilarityObjective, prediction=0.0),
    "predsim": SimilarityObjective,
    "supcon": ContrastiveObjective,
}

Loss = str | nn.Module | Callable[..., nn.Module] | None
"""A name of `LOSSES`, a criterion, or a class or function that makes a criterion or an `Objective`.

A parameter `place` of it is given the `Place` of the block.
"""


def check_loss(loss: Any) -> None:
    """Raise ValueError unless a loss is one of the names, a module, or a class or function that makes one."""
    if isinstance(loss, Objective):
        raise ValueError(
            f"loss={type(loss).__name__}(...) is an objective that is already made: give its class, or a function of "
            "the place, since each block has one of its own"
        )
    if loss is not None and (isinstance(loss, str) or not callable(loss)):
        check_choice(
            "loss", loss, LOSSES, f"one of {list(LOSSES)}, a module from scores (B, K) and targets to a scalar, or a "
            "class or function that makes one"
        )  # fmt: skip


def make_objective(loss: Loss, place: Place) -> Objective:
    """The objective of a block; see `Loss`.

    Raises:
        ValueError: If what is made is neither an `Objective` nor a module.
    """
    if loss is None or isinstance(loss, str):
        return LOSSES[loss or "logsumexp"](place)
    if isinstance(loss, nn.Module):  # parameters of a criterion belong to one block
        return HeadObjective(place.make_head(), copy.deepcopy(loss) if any(True for _ in loss.parameters()) else loss)
    made = loss(place=place) if _takes_place(loss) else loss()
    if isinstance(made, Objective):
        return made
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"loss={shown(loss)} makes {shown(made)}: it must make an Objective, or a module from scores (B, K) and "
            "targets to a scalar"
        )
    return HeadObjective(place.make_head(), made)


def example_targets(features: Tensor, num_classes: int) -> Iterator[Tensor]:
    """Targets of the kinds that criteria take, for features (B, C, ...): classes of samples or positions, numbers."""
    batch, _, *axes = features.shape
    yield features.new_zeros(batch, dtype=torch.int64)
    if len(axes) == 1:
        yield features.new_zeros(batch, *axes, dtype=torch.int64)
    yield features.new_zeros(batch, num_classes)
    yield features.new_zeros(batch)


def _takes_place(factory: Callable[..., nn.Module]) -> bool:
    given = cast(Any, getattr(factory, "keywords", {})).keys()
    classes = [part for part in getattr(factory, "args", ()) if isinstance(part, type)]  # of the command line
    return "place" in signature(classes[-1] if classes else factory).parameters and "place" not in given


def checked_loss(loss: Any, name: str) -> Tensor:
    """A loss, if it is one scalar.

    Raises:
        ValueError: If it is not; it names the block.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(()) if loss.ndim else loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
    raise ValueError(f"the loss of block {name} is {found}: it must be one scalar, such as its mean over the batch")
