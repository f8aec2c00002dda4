"""Local losses: what a single block learns from.

Shapes: B batch, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_choice, check_number

IGNORED = -100
"""A target that does not count, as in PyTorch."""


def logsumexp_loss(goodness: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The local loss of Scalable Forward-Forward: the true class against all others.

    ``L = -mean_b (g_y - log sum_j exp(g_j))``: the true class is the positive signal, all others are the negative
    one. By algebra it is the softmax cross-entropy with goodness values as logits, which never overflows.

    Args:
        goodness: (B, K), floating.
        target: Class numbers, (B,), int64, or probabilities of the classes, (B, K).
        label_smoothing: Share of the target that is spread evenly over all classes, 0 to 1.

    Returns:
        A scalar, float32.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176.

    Examples:
        >>> import torch
        >>> logsumexp_loss(torch.tensor([[2.0, 2.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    return F.cross_entropy(goodness.float(), target, label_smoothing=label_smoothing)


class LogSumExpLoss(nn.Module):
    """`logsumexp_loss` with its settings kept.

    Args:
        label_smoothing: Share of the target that is spread evenly over all classes.
        class_weights: Weights of the classes, (K,); None: equal.
        ignore_index: Images with this target do not count; None: all images count.

    Raises:
        ValueError: If `label_smoothing` is outside 0 to 1.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, goodness: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch; see `logsumexp_loss`. 0 where no image counts."""
        ignored = IGNORED if self.ignore_index is None else self.ignore_index
        loss = F.cross_entropy(
            goodness.float(),
            target,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
            ignore_index=ignored,
        )
        if self.ignore_index is None:
            return loss
        return torch.where((target == ignored).all(), torch.zeros_like(loss), loss)  # of no image at all: 0 / 0


class LabelLoss(nn.Module):
    """The binary cross-entropy with logits, of scores (B, K) and labels (B, K) of any dtype; float32."""

    weights: Tensor | None

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        own = None if weights is None else torch.tensor([float(weight) for weight in weights])
        self.register_buffer("weights", own, persistent=False)

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Mean over samples and labels."""
        return F.binary_cross_entropy_with_logits(scores.float(), target.float(), pos_weight=self.weights)


class NumberLoss(nn.Module):
    """The mean squared error, or Huber's, of scores (B, K) and targets (B, K) or (B,); float32."""

    def __init__(self, robust: bool = False) -> None:
        super().__init__()
        self.robust = robust

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Mean over samples and numbers."""
        target = target.reshape(scores.shape).float()
        return F.huber_loss(scores.float(), target) if self.robust else F.mse_loss(scores.float(), target)


class NextTokenLoss(nn.Module):
    """The softmax cross-entropy of scores (B, T, K) at each place and the token id behind it in (B, T); float32.

    Ids `IGNORED` do not count; 0 where none counts.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.each = LogSumExpLoss(label_smoothing, ignore_index=IGNORED)

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Mean over the tokens that count."""
        return self.each(scores[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def check_classes(target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Raise ValueError if a class is outside 0 ... K-1. Looks only where that needs no wait for a device."""
    if target.device.type != "cpu" or not target.numel():
        return
    lowest, highest = int(target.min()), int(target.max())
    if lowest >= 0 and highest < num_classes:
        return
    wrong = target[(target < 0) | (target >= num_classes)]
    wrong = wrong if ignore_index is None else wrong[wrong != ignore_index]
    if wrong.numel():
        label = int(wrong.min() if wrong.min() < 0 else wrong.max())
        raise ValueError(f"label {label} in the batch: num_classes={num_classes} allows 0 to {num_classes - 1}")


def similarity_loss(features: Tensor, target: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Similarity matching: the mean squared difference between the similarities of features and those of targets.

    The similarity of two images is the cosine of their centred vectors. For features, a vector holds the standard
    deviation of each channel over space (for vectors, the channels themselves); for targets, the one-hot class.

    Args:
        features: (B, C, ...), floating.
        target: Class numbers, (B,), int64, or probabilities of the classes, (B, K).
        num_classes: K.
        mask: For tokens (B, C, T): (B, T), bool, false at what is only padding and does not count.

    Returns:
        A scalar, float32.

    Source: Nøkland and Eidnes, Training Neural Networks with Local Error Signals, arXiv 1901.06656; the standard
    deviation is in their code alone.
    """
    x = features.float()
    if mask is not None:
        x = _deviation(x, mask[:, None])
    else:
        x = x.flatten(1) if x[0, 0].numel() == 1 else x.flatten(2).std(2)
    y = target.float() if target.is_floating_point() else F.one_hot(target, num_classes).float()
    return F.mse_loss(_similarities(x), _similarities(y))


def _deviation(x: Tensor, mask: Tensor) -> Tensor:
    """The standard deviation of each channel (B, C, T) over the positions where a mask (B, 1, T) is true."""
    count = mask.sum(2)
    mean = x.masked_fill(~mask, 0).sum(2, keepdim=True) / count.clamp(min=1)[:, :, None]
    squares = (x - mean).masked_fill(~mask, 0).square().sum(2)
    return (squares / (count - 1).clamp(min=1) + 1e-12).sqrt()  # the root of zero has no gradient


def _similarities(x: Tensor) -> Tensor:
    return F.linear(*2 * [F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-8)])


def supervised_contrastive_loss(features: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Images of one class attract each other, all others repel; an image alone in its class does not count.

    Args:
        features: (B, D), of length 1.
        target: Class numbers, (B,), int64.
        temperature: Of the similarities.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: If the targets are no class numbers.

    Source: Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, ``L_out``.
    """
    if target.is_floating_point() or target.ndim != 1:
        raise ValueError(f"targets of shape {tuple(target.shape)}, {target.dtype}: supcon needs class numbers (B,)")
    logits = features.float() @ features.float().T / temperature
    itself = torch.eye(len(target), dtype=torch.bool, device=target.device)
    logs = logits.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0.0)
    partners = (target[:, None] == target) & ~itself
    count = partners.sum(1)
    per_image = -(logs * partners).sum(1) / count.clamp(min=1)
    return per_image.sum() / (count > 0).sum().clamp(min=1)


def threshold_loss(positive: Tensor, negative: Tensor, theta: float | Tensor) -> Tensor:
    """The contrastive local loss of Forward-Forward: goodness above theta for positive data, below for negative.

    Args:
        positive: Goodness of positive data, (B,).
        negative: Goodness of negative data, (B,).
        theta: The threshold.

    Returns:
        A scalar: the mean over all of ``softplus(theta - g)`` and ``softplus(g - theta)``, which never overflows.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345.
    """
    return F.softplus(torch.cat([theta - positive, negative - theta])).mean()


class GroupLoss(nn.Module):
    """The three losses of channel-wise competition, on the goodness of the classes.

    ``"ce"`` is the softmax cross-entropy. ``"pvn"`` pushes the goodness of the true class above a threshold and the
    mean goodness of the others below it, by `threshold_loss`. ``"cwg"`` is 0.28 of the first plus 0.72 of the second.

    Args:
        kind: ``"ce"``, ``"pvn"`` or ``"cwg"``.
        theta: The threshold.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Papachristodoulou et al., Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm,
    arXiv 2312.12668.
    """

    def __init__(self, kind: str = "ce", theta: float = 2.0) -> None:
        super().__init__()
        check_choice("loss", kind, ["ce", "pvn", "cwg"])
        check_number("theta", theta, above=0)
        self.share = {"ce": 1.0, "pvn": 0.0, "cwg": 0.28}[kind]
        self.theta = theta

    def forward(self, goodness: Tensor, target: Tensor) -> Tensor:
        """The loss of goodness (B, K) and classes (B,), a scalar, float32."""
        goodness = goodness.float()
        true = goodness.gather(1, target[:, None]).squeeze(1)
        others = (goodness.sum(1) - true) / (goodness.shape[1] - 1)
        both = logsumexp_loss(goodness, target), threshold_loss(true, others, self.theta)
        return self.share * both[0] + (1 - self.share) * both[1]
