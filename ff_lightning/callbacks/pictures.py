"""Pictures of a test: confused classes, the worst mistakes, how sure the answers are, the accuracy of each block.

Shapes: B batch, K classes, N samples of the test, U units.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ff_lightning.tasks import Classification
from ff_lightning.util.arguments import check_choice

MISTAKES = 24
"""The worst ones, which are drawn."""
NAMED = 40
"""So many classes have their names at the axes, half as many also numbers in the fields."""
PANELS = 6
"""Units whose goodness is drawn, beside the vote."""


class Pictures(Callback):
    """Draws a test of a classifier: ``confusion``, ``mistakes``, ``goodness`` and ``blocks``.

    `confusion` is how often each class was taken for each other; `mistakes` are the images whose best wrong class is
    furthest above the true one; `goodness` is that of the true class against the best wrong one, for units and vote;
    `blocks` is the accuracy of each unit. The scores are computed a second time for it, so the test takes about twice
    as long. The data module gives the names of the classes and the normalisation.

    Args:
        folder: Folder of the pictures; it is created, and pictures of the same names are replaced.
        ending: ``"png"`` or ``"svg"``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: At the start of the test, if the task is not classification, or if there are several processes.
    """

    def __init__(self, folder: str | Path, ending: Literal["png", "svg"] = "png") -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("pictures need matplotlib: pip install 'ff-lightning[plot]'")
        check_choice("ending", ending, ("png", "svg"))
        self.folder, self.ending = Path(folder).expanduser(), ending
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"pictures={str(folder)!r} is a file: give a folder")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be drawn, and begin to count."""
        task = getattr(pl_module, "task", None)
        if not isinstance(task, Classification):
            raise ValueError(f"pictures are drawn of classes: the task is {type(task).__name__}")
        if trainer.world_size > 1:
            raise ValueError(f"pictures are drawn by one process, not {trainer.world_size}: give devices=1")
        self.confusion = torch.zeros(task.num_classes, task.num_classes, dtype=torch.int64)  # (true, answer)
        self.pairs: list[Tensor] = []  # goodness of the true and of the best wrong class: (U + 1, B, 2)
        self.worst: list[tuple[float, int, int, Tensor]] = []  # margin, true class, answer, image

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the answers to a batch."""
        learner = cast(Any, pl_module)
        inputs, target = learner.inputs_and_target(batch, training=False, look=False)
        with trainer.precision_plugin.forward_context():
            scores = learner.scores(*inputs)
            if scores is None:
                raise ValueError(f"pictures are drawn of answers: this {type(learner).__name__} gives none")
            every = torch.cat([scores, learner.vote(scores)[None]]).float().cpu()  # (U + 1, B, K)
        target = target.cpu()
        counted = (target >= 0) & (target != learner.task.ignore_index)
        every, target = every[:, counted], target[counted]
        is_image = isinstance(inputs[0], Tensor) and inputs[0].ndim == 4
        images = inputs[0].float().cpu()[counted] if is_image else None
        true = target.expand(len(every), -1)[..., None]
        pairs = torch.stack([every.gather(2, true)[..., 0], every.scatter(2, true, -math.inf).amax(2)], 2)
        answers = every[-1].argmax(1)
        self.pairs.append(pairs)
        self.confusion += torch.bincount(
            target * len(self.confusion) + answers, minlength=self.confusion.numel()
        ).reshape_as(self.confusion)
        margins = pairs[-1, :, 1] - pairs[-1, :, 0]
        for i in margins.topk(min(MISTAKES, len(margins))).indices.tolist():
            if images is not None and answers[i] != target[i]:
                self.worst.append((margins[i].item(), int(target[i]), int(answers[i]), images[i]))
        self.worst = sorted(self.worst, key=lambda one: -one[0])[:MISTAKES]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        data = getattr(trainer, "datamodule", None)
        names = [*map(str, getattr(data, "class_names", None) or range(len(self.confusion)))]
        units, pairs = cast(Sequence[str], pl_module.unit_names), torch.cat(self.pairs, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        figures = {
            "confusion": draw_confusion(self.confusion, names),
            "goodness": draw_goodness(pairs, units),
            "blocks": draw_accuracies((pairs[..., 0] > pairs[..., 1]).float().mean(1), units),
        }
        if self.worst and len(self.worst[0][3]) in (1, 3):
            figures["mistakes"] = draw_mistakes(self.worst, names, getattr(data, "statistics", None))
        for name, figure in figures.items():
            figure.savefig(self.folder / f"{name}.{self.ending}", dpi=120)
        print(f"pictures in {self.folder}: {', '.join(figures)}")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # an extra, `plot`; and no window, nor a state that is shared

    return Figure((width, height), layout="constrained")


def draw_confusion(confusion: Tensor, names: Sequence[str]) -> Any:
    """A field for each true class (row) and answer (column), coloured by its share of the row.

    Args:
        confusion: Numbers of samples (K, K), int64.
        names: Of the classes.
    """
    classes = len(confusion)
    side = max(4.5, min(12, 0.45 * classes))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    field = axes.imshow(shares.sqrt(), cmap="Blues", vmin=0, vmax=10)  # the root: mistakes are few, and seen
    bar = figure.colorbar(field, ax=axes, ticks=[0, 1, 10**0.5, 5, 10], label="% of the true class", shrink=0.8)
    bar.ax.set_yticklabels(["0", "1", "10", "25", "100"])
    if 2 * classes <= NAMED:
        for i, j in confusion.nonzero().tolist():
            colour = "white" if shares[i, j] > 36 else "black"
            axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=colour)
    if classes <= NAMED:
        short = [name if len(name) < 16 else f"{name[:14]}…" for name in names]
        axes.set_xticks(range(classes), short, rotation=0 if max(map(len, short)) < 3 else 90)
        axes.set_yticks(range(classes), short)
    accuracy = 100 * confusion.diag().sum() / confusion.sum().clamp_min(1)
    axes.set(xlabel="answer", ylabel="true class", title=f"{accuracy:.2f} % of {confusion.sum():,} samples are right")
    return figure


def draw_mistakes(worst: Sequence[tuple[float, int, int, Tensor]], names: Sequence[str], statistics: Any) -> Any:
    """The images whose answer is furthest from right.

    Args:
        worst: Margin, true class, answer and image (C, H, W), the worst first.
        names: Of the classes.
        statistics: Mean and deviation that the images were normalised by, each with C numbers; None: each image is
            drawn from its smallest to its largest value.
    """
    columns = min(6, len(worst))
    rows = math.ceil(len(worst) / columns)
    figure = _figure(1.7 * columns, 2.1 * rows)
    for axes, one in zip(figure.subplots(rows, columns, squeeze=False).flat, [*worst, *[None] * columns], strict=False):
        axes.set_axis_off()
        if one is None:
            continue
        _, true, answer, image = one
        if statistics is None:
            image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-9)
        else:
            mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
            image = image * deviation + mean
        axes.imshow(image.clamp(0, 1).movedim(0, -1).squeeze(-1), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"true: {names[true]}\nanswer: {names[answer]}", fontsize=8)
    return figure


def draw_goodness(pairs: Tensor, units: Sequence[str]) -> Any:
    """Goodness of the true class against the best wrong one, a point for each sample; below the line it is right.

    Args:
        pairs: (U + 1, N, 2), the last row of the vote.
        units: Names of the units.
    """
    shown = sorted({round(i) for i in torch.linspace(0, len(units) - 1, min(PANELS, len(units))).tolist()})
    panels = [(f"{k:02d} {units[k]}", pairs[k]) for k in shown if len(units) > 1] + [("vote", pairs[-1])]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3 * columns + 0.5, 3 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(every, [*panels, *[None] * columns], strict=False):
        if panel is None:
            axes.set_axis_off()
            continue
        name, points = panel
        right = points[:, 0] > points[:, 1]
        for chosen, colour in ((right, "tab:blue"), (~right, "tab:red")):
            axes.plot(*points[chosen].T, ".", color=colour, markersize=3, alpha=0.4, rasterized=True)
        axes.axline((points.median().item(),) * 2, slope=1, color="black", linewidth=0.8)
        axes.set_title(f"{name}: {100 * right.float().mean():.1f} % right", fontsize="small")
    figure.supxlabel("goodness of the true class", fontsize="small")
    figure.supylabel("goodness of the best wrong class", fontsize="small")
    return figure


def draw_accuracies(accuracies: Tensor, units: Sequence[str]) -> Any:
    """Accuracy of each unit, and that of the vote as a line.

    Args:
        accuracies: (U + 1,), from 0 to 1, the last one of the vote.
        units: Names of the units.
    """
    figure = _figure(max(4.5, 0.45 * len(units) + 2), 3.4)
    axes = figure.subplots()
    *of_units, vote = (100 * accuracies).tolist()
    axes.plot(range(len(units)), of_units, "o-", label="block")
    axes.axhline(vote, color="black", linestyle="--", label=f"vote: {vote:.2f} %")
    axes.set_xticks(range(len(units)), units, rotation=90 if len(units) > 4 else 0, fontsize="small")
    axes.set(ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
