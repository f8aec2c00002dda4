"""Tasks: kinds of targets, each with its loss and the figures that judge an answer.

Shapes: B batch, K scores, L blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, classification, regression
from torchmetrics.text import Perplexity

from ff_lightning.losses import IGNORED, LabelLoss, LogSumExpLoss, NextTokenLoss, NumberLoss, check_classes
from ff_lightning.util.arguments import check_choice, check_number, check_switch, is_whole, kind_of, shown


class Task:
    """A kind of target. A subclass gives the criterion, the check of targets and the figures.

    Attributes:
        num_classes: K; the model sets it.
    """

    monitor: tuple[str, str] = ("val/loss", "min")
    """The logged figure that chooses the best checkpoint, and whether it should be high (``"max"``) or low."""
    figure_names: tuple[str, ...] = ()
    """Names of the figures that `figures` returns."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics that are logged unless others are asked for."""
    known_metrics: ClassVar[dict[str, Callable[[int], Metric]]] = {}
    """By name, what makes a metric of torchmetrics for K scores."""
    least_scores = 1
    num_classes: int

    def criterion(self, label_smoothing: float = 0.0) -> nn.Module:
        """The loss of scores (B, K) and targets: a module that gives a scalar.

        Raises:
            ValueError: If there are no labels to smooth.
        """
        raise NotImplementedError(f"{type(self).__name__} has no criterion of its own: the method brings its loss")

    def check(self, target: Any, batch: int, training: bool = True, look: bool = False) -> None:
        """Raise ValueError unless a target fits the task.

        Args:
            target: What a loader gave.
            batch: B.
            training: Whether it is trained on.
            look: Whether to check the values even if that waits for a device.
        """

    def figures(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Figures of each sample, whose mean is logged.

        Args:
            scores: (..., B, K): one set of scores, or those of all blocks at once.
            target: As the task has it.

        Returns:
            For each name (..., B), floating.
        """
        return {}

    def counted(self, target: Tensor) -> Tensor | None:
        """Which samples count, (B,) bool; None: all."""
        return None

    def metric(self, name: str) -> Metric:
        """The metric of this name, for scores (B, K).

        Raises:
            ValueError: If the task has none of this name.
        """
        check_choice("metrics", name, self.known_metrics)
        return self.known_metrics[name](self.num_classes)

    def for_metric(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and targets as the metrics take them."""
        return scores.float(), target

    def _no_smoothing(self, label_smoothing: float) -> None:
        if label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing}: {type(self).__name__} has no labels to smooth")


class Classification(Task):
    """One class of K for each sample; logged as ``acc``.

    Targets are class numbers (B,), int64; in training also probabilities (B, K), as mixup and cutmix make them.

    Args:
        class_weights: Weights of the classes in the loss, K numbers; None: equal.
        ignore_index: Samples with this target count neither in the loss nor in the figures; None: all samples count.

    Raises:
        ValueError: If an argument is out of its range.
    """

    monitor = ("val/acc", "max")
    figure_names = ("acc",)
    least_scores = 2
    known_metrics: ClassVar[dict[str, Callable[[int], Metric]]] = {
        "top5": lambda k: classification.MulticlassAccuracy(k, top_k=min(5, k), average="micro"),
        "balanced_acc": lambda k: classification.MulticlassAccuracy(k, average="macro"),
        "f1": lambda k: classification.MulticlassF1Score(k, average="macro"),
        "precision": lambda k: classification.MulticlassPrecision(k, average="macro"),
        "recall": lambda k: classification.MulticlassRecall(k, average="macro"),
        "auroc": lambda k: classification.MulticlassAUROC(k),
        "map": lambda k: classification.MulticlassAveragePrecision(k),
        "ece": lambda k: classification.MulticlassCalibrationError(k),
    }

    def __init__(self, class_weights: Sequence[float] | None = None, ignore_index: int | None = None) -> None:
        for weight in class_weights or ():
            check_number("class_weights", weight, least=0)
        if ignore_index is not None and not is_whole(ignore_index):
            raise ValueError(f"ignore_index={shown(ignore_index)}: must be a whole number, or None")
        self.class_weights = class_weights
        self.ignore_index = ignore_index

    def criterion(self, label_smoothing: float = 0.0) -> nn.Module:
        """The softmax cross-entropy, with scores as logits."""
        weights = None
        if self.class_weights is not None:
            if len(self.class_weights) != self.num_classes:
                raise ValueError(
                    f"class_weights={shown(self.class_weights)}: must be {self.num_classes} numbers, one for each class"
                )
            weights = torch.tensor([float(weight) for weight in self.class_weights])
        return LogSumExpLoss(label_smoothing, weights, self.ignore_index)

    def check(self, target: Any, batch: int, training: bool = True, look: bool = False) -> None:
        """Raise ValueError unless targets are class numbers, or probabilities in training."""
        k = self.num_classes
        if not isinstance(target, Tensor):
            raise ValueError(
                f"the classes of a batch are {kind_of(target)}: give numbers from 0 to {k - 1}, int64 (B,)"
            )
        _check_length(target, batch, "classes")
        if training and target.is_floating_point() and target.shape == (batch, k):
            if look:
                _check_probabilities(target)
        elif target.ndim != 1 or target.dtype not in (torch.int64, torch.uint8):
            one_hot = ", such as y.argmax(1) of one-hot vectors" if target.shape == (batch, k) else ""
            raise ValueError(
                f"the classes of a batch are {target.dtype} of shape {tuple(target.shape)}: give numbers from 0 to "
                f"{k - 1}, int64 ({batch},){one_hot}"
            )
        else:
            check_classes(target.cpu() if look else target, k, self.ignore_index)

    def figures(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Whether the highest score is the one of the class."""
        return {"acc": (scores.argmax(-1) == _class_numbers(target)).float()}

    def counted(self, target: Tensor) -> Tensor | None:
        """The samples that are not ignored."""
        return None if self.ignore_index is None or target.is_floating_point() else target != self.ignore_index

    def for_metric(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K) and class numbers (B,), without the samples that are ignored."""
        counted = self.counted(target)
        if counted is not None:
            scores, target = scores[counted], target[counted]
        return scores.float().softmax(-1), _class_numbers(target)


class MultiLabel(Task):
    """Any number of K labels for each sample; logged as ``acc`` (the share of right labels) and ``map``.

    Targets are 0 or 1 for each label, (B, K), floating or whole numbers; a score above 0 says that a label applies.

    Args:
        label_weights: Weight of a present label against an absent one, for each label, K numbers; None: 1.
    """

    monitor = ("val/map", "max")
    figure_names = ("acc",)
    metrics = ("map",)
    known_metrics: ClassVar[dict[str, Callable[[int], Metric]]] = {
        "map": lambda k: (
            classification.MultilabelAveragePrecision(k) if k > 1 else classification.BinaryAveragePrecision()
        ),
        "f1": lambda k: classification.MultilabelF1Score(k) if k > 1 else classification.BinaryF1Score(),
        "auroc": lambda k: classification.MultilabelAUROC(k) if k > 1 else classification.BinaryAUROC(),
        "exact": lambda k: classification.MultilabelExactMatch(k) if k > 1 else classification.BinaryAccuracy(),
    }

    def __init__(self, label_weights: Sequence[float] | None = None) -> None:
        for weight in label_weights or ():
            check_number("label_weights", weight, above=0)
        self.label_weights = label_weights

    def criterion(self, label_smoothing: float = 0.0) -> nn.Module:
        """The binary cross-entropy of each label, with scores as logits."""
        self._no_smoothing(label_smoothing)
        if self.label_weights is not None and len(self.label_weights) != self.num_classes:
            raise ValueError(
                f"label_weights={shown(self.label_weights)}: must be {self.num_classes} numbers, one for each label"
            )
        return LabelLoss(self.label_weights)

    def check(self, target: Any, batch: int, training: bool = True, look: bool = False) -> None:
        """Raise ValueError unless targets are 0 or 1 for each label."""
        k = self.num_classes
        if not isinstance(target, Tensor) or target.shape != (batch, k):
            raise ValueError(f"the labels of a batch are {kind_of(target)}: give 0 or 1 for each label, ({batch}, {k})")
        if target.device.type == "cpu" or look:
            outside = (target < 0) | (target > 1) if training else (target != 0) & (target != 1)
            if bool(outside.any()):
                value = target[outside].flatten()[0].item()
                raise ValueError(f"label value {value:g} in the batch: give 0 or 1 for each label, ({batch}, {k})")

    def figures(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The share of labels that are right."""
        return {"acc": ((scores > 0) == (target > 0.5)).float().mean(-1)}

    def for_metric(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and labels, (B, K), or (B,) of a single label."""
        scores, target = scores.float().sigmoid(), (target > 0.5).long()
        return (scores.squeeze(1), target.squeeze(1)) if self.num_classes == 1 else (scores, target)


class Regression(Task):
    """K numbers for each sample; logged as ``mae`` and ``r2``.

    Targets are floating, (B, K); (B,) for K = 1.

    Args:
        robust: Whether the loss is Huber's (with a width of 1) instead of the squared error.
    """

    monitor = ("val/mae", "min")
    figure_names = ("mae",)
    metrics = ("r2",)
    known_metrics: ClassVar[dict[str, Callable[[int], Metric]]] = {
        "r2": lambda k: regression.R2Score(),
        "mse": lambda k: regression.MeanSquaredError(),
        "rmse": lambda k: regression.MeanSquaredError(squared=False),
        "pearson": lambda k: regression.PearsonCorrCoef(num_outputs=k),
    }

    def __init__(self, robust: bool = False) -> None:
        check_switch("robust", robust)
        self.robust = robust

    def criterion(self, label_smoothing: float = 0.0) -> nn.Module:
        """The mean squared error, or Huber's."""
        self._no_smoothing(label_smoothing)
        return NumberLoss(self.robust)

    def check(self, target: Any, batch: int, training: bool = True, look: bool = False) -> None:
        """Raise ValueError unless targets are finite numbers."""
        k = self.num_classes
        shapes = [(batch, k)] + ([(batch,)] if k == 1 else [])
        if not isinstance(target, Tensor) or tuple(target.shape) not in shapes or not target.is_floating_point():
            raise ValueError(
                f"the targets of a batch are {kind_of(target)}: give floating numbers, {' or '.join(map(str, shapes))}"
            )
        if (target.device.type == "cpu" or look) and not bool(target.isfinite().all()):
            raise ValueError("the targets of a batch hold a value that is not finite")

    def figures(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The mean absolute error of the numbers."""
        return {"mae": (scores.float() - target.reshape(scores.shape[-2:])).abs().mean(-1)}

    def for_metric(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (B, K), or (B,) for K = 1."""
        scores, target = scores.float(), target.reshape(scores.shape).float()
        return (scores.squeeze(1), target.squeeze(1)) if self.num_classes == 1 else (scores, target)


class Unlabelled(Task):
    """No target: only the loss of the method is logged."""


class NextToken(Task):
    """The next token at each place of a text, out of K; logged as ``acc`` and ``perplexity``. For causal networks.

    Scores are (B, T, K), such as those of the head ``"tokens"``; place t predicts the token at t + 1. Targets are the
    token ids themselves (B, T), int64, or `IGNORED` where nothing is to be predicted, such as padding.
    """

    monitor = ("val/perplexity", "min")
    figure_names = ("acc",)
    metrics = ("perplexity",)
    known_metrics: ClassVar[dict[str, Callable[[int], Metric]]] = {"perplexity": lambda k: Perplexity(IGNORED)}
    least_scores = 2

    def criterion(self, label_smoothing: float = 0.0) -> nn.Module:
        """The softmax cross-entropy of the next tokens."""
        return NextTokenLoss(label_smoothing)

    def check(self, target: Any, batch: int, training: bool = True, look: bool = False) -> None:
        """Raise ValueError unless targets are token ids."""
        if not isinstance(target, Tensor) or target.ndim != 2 or len(target) != batch or target.dtype != torch.int64:
            raise ValueError(f"the tokens of a batch are {kind_of(target)}: give their ids, int64 ({batch}, T)")
        check_classes(target.cpu() if look else target, self.num_classes, IGNORED)

    def figures(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Whether the highest score is the one of the next token, (..., B (T - 1))."""
        scores, target = self.for_metric(scores, target)
        return {"acc": (scores.argmax(-1) == target).float().flatten(-2)}

    def counted(self, target: Tensor) -> Tensor | None:
        """The tokens that are to be predicted, (B (T - 1),)."""
        return (target[:, 1:] != IGNORED).flatten()

    def for_metric(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of all places but the last, and the tokens behind them."""
        return scores[..., :-1, :].float(), target[:, 1:]


TaskName = Literal["Classification", "MultiLabel", "Regression", "NextToken", "Unlabelled"]

TASKS: dict[str, type[Task]] = {
    cls.__name__.lower(): cls for cls in (Classification, MultiLabel, Regression, NextToken, Unlabelled)
}


def task_of_name(name: str) -> Task:
    """The task of a name of `TASKS`, capital letters or not."""
    check_choice("task", name.lower(), TASKS, f"one of {[cls.__name__ for cls in TASKS.values()]}")
    return TASKS[name.lower()]()


def _class_numbers(target: Tensor) -> Tensor:
    return target.argmax(-1) if target.is_floating_point() else target


def _check_length(target: Tensor, batch: int, what: str) -> None:
    if len(target.shape) == 0 or len(target) != batch:
        raise ValueError(
            f"a batch has {batch} images and {what} of shape {tuple(target.shape)}: give one for each image"
        )


def _check_probabilities(y: Tensor) -> None:
    """Raise ValueError for one-hot vectors, which a validation could not take, and for what does not add up to one."""
    if bool(((y == 0) | (y == 1)).all()):
        raise ValueError(
            "the classes of a batch are one-hot vectors (B, K): give their numbers, y.argmax(1), int64 (B,)"
        )
    if not torch.allclose(y.float().sum(1), torch.ones(len(y), device=y.device), atol=0.02) or float(y.min()) < 0:
        raise ValueError("the targets of a batch (B, K) are no probabilities: they must be 0 or more and add up to 1")
