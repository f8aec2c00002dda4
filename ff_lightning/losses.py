"""Local losses: what a single block is trained to do.

Shapes: B batch, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_number


def logsumexp_loss(goodness: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The local loss of Scalable Forward-Forward: the true class against all others.

    ``L = -mean_b (g_y - log sum_j exp(g_j))``: the true class is the positive signal, all others are the negative
    one. By algebra it is the softmax cross-entropy with goodness values as logits, which never overflows.

    Args:
        goodness: (B, K), floating.
        target: Class numbers, (B,), int64.
        label_smoothing: Share of the target that is spread evenly over all classes, 0 to 1.

    Returns:
        A scalar, float32.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Example:
        >>> import torch
        >>> logsumexp_loss(torch.tensor([[2.0, 2.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    return F.cross_entropy(goodness.float(), target, label_smoothing=label_smoothing)


class LogSumExpLoss(nn.Module):
    """`logsumexp_loss` with its label smoothing kept.

    Args:
        label_smoothing: Share of the target that is spread evenly over all classes.

    Raises:
        ValueError: If `label_smoothing` is outside 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        self.label_smoothing = label_smoothing

    def forward(self, goodness: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch; see `logsumexp_loss`."""
        return logsumexp_loss(goodness, target, self.label_smoothing)
