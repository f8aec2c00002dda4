"""How the blocks answer together: from their goodness to scores.

Shapes: L blocks, B batch, K classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mean_vote(goodness: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
    """Mean over the blocks of their goodness: (L, B, K) -> (B, K).

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.
    """
    return goodness.mean(0)


def last_vote(goodness: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
    """Goodness of the last block alone: (L, B, K) -> (B, K).

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.
    """
    return goodness[-1]


def log_softmax_vote(goodness: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
    """Mean over the blocks of their log-probabilities, (L, B, K) -> (B, K): sure blocks count more."""
    return goodness.log_softmax(-1).mean(0)


def depth_vote(goodness: Tensor, numbers: Sequence[int] | None = None) -> Tensor:
    """Mean over the blocks, weighted by their number from the input, 1 to L: (L, B, K) -> (B, K).

    Deeper blocks are usually better, but the others see what these miss.

    Args:
        goodness: (L, B, K).
        numbers: Those of the L blocks, counted from the input, from 0. None: 0 to L - 1.

    Examples:
        >>> import torch
        >>> depth_vote(torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]]))
        tensor([[1., 2.]])
    """
    numbers = range(len(goodness)) if numbers is None else numbers
    weights = torch.tensor([number + 1.0 for number in numbers], device=goodness.device, dtype=goodness.dtype)
    return torch.tensordot(weights / weights.sum(), goodness, 1)


Vote = Callable[[Tensor, Sequence[int]], Tensor]

VOTES: dict[str, Vote] = {"mean": mean_vote, "depth": depth_vote, "last": last_vote, "log_softmax": log_softmax_vote}
