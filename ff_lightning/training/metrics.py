"""Running figures of all blocks at once: one small tensor each, one synchronisation across ranks.

Shapes: L blocks, B batch, K classes.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class BlockLosses(Metric):
    """Mean local loss of each block over the steps since the last reset."""

    total: Tensor
    steps: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_blocks), dist_reduce_fx="sum")
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Add the losses of a step: (L,), or fewer where the blocks above are not trained."""
        self.total[: len(losses)] += losses
        self.steps += 1

    def compute(self) -> Tensor:
        """Mean losses, (L,)."""
        return self.total / self.steps


class BlockScores(Metric):
    """Accuracy and loss of each block, and accuracy of the vote, over a whole data set."""

    correct: Tensor
    loss: Tensor
    samples: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(num_blocks + 1), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(num_blocks), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, goodness: Tensor, scores: Tensor, losses: Tensor, y: Tensor) -> None:
        """Add a batch: goodness (L, B, K), scores of the vote (B, K), mean losses (L,), classes (B,)."""
        answers = torch.cat([goodness.argmax(-1), scores.argmax(-1)[None]])  # (L + 1, B)
        self.correct += (answers == y).sum(1)
        self.loss += losses * len(y)
        self.samples += len(y)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Accuracy of each block and of the vote, (L + 1,), from 0 to 1, and mean loss of each block, (L,)."""
        return self.correct / self.samples, self.loss / self.samples
