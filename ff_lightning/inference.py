"""From the goodness of all blocks to a class.

Shapes: L blocks, B batch, K classes.
"""

from collections.abc import Callable

from torch import Tensor


def mean_vote(goodness: Tensor) -> Tensor:
    """Mean over the blocks of their goodness: (L, B, K) -> (B, K).

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.
    """
    return goodness.mean(0)


def last_vote(goodness: Tensor) -> Tensor:
    """Goodness of the last block alone: (L, B, K) -> (B, K).

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.
    """
    return goodness[-1]


def log_softmax_vote(goodness: Tensor) -> Tensor:
    """Mean over the blocks of their log-probabilities: a block counts by its certainty, (L, B, K) -> (B, K)."""
    return goodness.log_softmax(-1).mean(0)


Vote = Callable[[Tensor], Tensor]

VOTES: dict[str, Vote] = {"mean": mean_vote, "last": last_vote, "log_softmax": log_softmax_vote}
