"""Pictures of a test: what is confused, how sure the answers are, what each block knows, looks at, and makes of it.

Shapes: B batch, K classes, N samples of the test, P units that have a panel and the vote, U units.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ff_lightning.drawing.answers import draw_accuracies, draw_goodness
from ff_lightning.drawing.confusion import draw_confusion, draw_confusions
from ff_lightning.drawing.epochs import draw_epochs, read_log
from ff_lightning.drawing.fields import draw_fields, first_fields
from ff_lightning.drawing.figure import panel_titles, save, shown_units
from ff_lightning.drawing.images import Answered, draw_maps, draw_mistakes, goodness_maps
from ff_lightning.drawing.plane import Samples, draw_plane, rows
from ff_lightning.local.net import LocalNet
from ff_lightning.tasks import Classification
from ff_lightning.util.arguments import check_choice
from ff_lightning.util.extras import needs

MISTAKES, MAPPED = 24, 2
"""The worst mistakes that are drawn; images with maps: so many of these, and as many that were answered right."""


class Pictures(Callback):
    """Draws a test of a classifier.

    - ``confusion``: how often each class was the answer to each class; ``confusion_of_blocks``: of each unit.
    - ``mistakes``: the images whose best wrong class is furthest above the true one.
    - ``goodness``: of the true class against that of the best wrong one, for units and vote.
    - ``blocks``: the accuracy of each unit.
    - ``maps``: where in an image the goodness of the true class is above that of the best wrong one.
    - ``fields``: what units of the first layer look for, its weights as images.
    - ``features``: those of each block in the plane, by t-SNE.
    - ``epochs``: the accuracy of each unit over the epochs, from the log of the run that wrote the checkpoint.

    Of many units some are shown, from the first to the last. What a method, its task or its inputs do not have is left
    out, and named. The data module gives the names of the classes and the normalisation.

    Args:
        folder: Folder of the pictures; it is created, and pictures of the same names are replaced.
        ending: ``"png"`` or ``"svg"``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If an argument is out of its range; at the start of the test, if there are several processes.
    """

    def __init__(self, folder: str | Path, ending: Literal["png", "svg"] = "png") -> None:
        needs("matplotlib", "plot")
        check_choice("ending", ending, ("png", "svg"))
        self.folder, self.ending = Path(folder).expanduser(), ending
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"pictures={str(folder)!r} is a file: give a folder")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        if trainer.world_size > 1:
            raise ValueError(f"pictures are drawn by one process, not {trainer.world_size}: give devices=1")
        learner = cast(Any, pl_module)
        data = getattr(trainer, "datamodule", None)
        self.names = [*map(str, getattr(data, "class_names", None) or range(learner.num_classes))]
        self.statistics = getattr(data, "statistics", None)
        self.units: Sequence[str] = learner.unit_names
        self.shown = shown_units(len(self.units))
        self.confusions = torch.zeros(0)  # (P, true, answer), the last one of the vote
        self.pairs: list[Tensor] = []  # goodness of the true and of the best wrong class: (U + 1, B, 2)
        self.worst: list[Answered] = []
        self.right: dict[int, Answered] = {}  # by class
        self.samples = Samples(len(self.names))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the answers to a batch, `outputs` (U + 1, B, K), and take some features."""
        learner = cast(Any, pl_module)
        inputs, target = learner.inputs_and_target(batch, training=False, look=False)
        if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
            return
        chosen = self.samples.wanted(target)
        if chosen:
            with trainer.precision_plugin.forward_context():
                try:
                    self.samples.add(learner.block_features(*rows(inputs, chosen)), target[chosen].cpu())
                except NotImplementedError:  # a method without features
                    self.samples.left.clear()
        if outputs is not None and isinstance(learner.task, Classification):
            counted = ((target >= 0) & (target != learner.task.ignore_index)).cpu()
            is_image = isinstance(inputs[0], Tensor) and inputs[0].ndim == 4 and inputs[0].shape[1] in (1, 3)
            images = inputs[0].float().cpu()[counted] if is_image else None
            self._count(outputs.float().cpu()[:, counted], target.cpu()[counted], images)

    def _count(self, scores: Tensor, target: Tensor, images: Tensor | None) -> None:
        """Count scores (U + 1, B, K) for classes (B,) of images, where the inputs are any."""
        classes = scores.shape[2]
        answers = scores[[*self.shown, -1]].argmax(2)  # (P, B)
        if not len(self.confusions):
            self.confusions = torch.zeros(len(answers), classes, classes, dtype=torch.int64)
        cells = (torch.arange(len(answers))[:, None] * classes + target) * classes + answers
        self.confusions.view(-1).index_add_(0, cells.flatten(), torch.ones(cells.numel(), dtype=torch.int64))
        true = target.expand(len(scores), -1)[..., None]
        rivals, rival = scores.scatter(2, true, -math.inf).max(2)
        self.pairs.append(torch.stack([scores.gather(2, true)[..., 0], rivals], 2))
        if images is None:
            return
        margins = self.pairs[-1][-1, :, 1] - self.pairs[-1][-1, :, 0]
        wrong = (answers[-1] != target).nonzero()[:, 0]
        worst = wrong[margins[wrong].topk(min(MISTAKES, len(wrong))).indices].tolist()
        for i in (*worst, *(answers[-1] == target).nonzero()[:, 0].tolist()):
            one = Answered(margins[i].item(), int(target[i]), int(rival[-1, i]), images[i])
            if i in worst:
                self.worst.append(one)
            elif len(self.right) < MAPPED:
                self.right.setdefault(one.true, one)
            else:
                break
        self.worst = sorted(self.worst, key=lambda one: -one.margin)[:MISTAKES]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        learner = cast(Any, pl_module)
        task = type(learner.task).__name__
        no_answers = "" if self.pairs else f"no classes are answered by {type(learner).__name__} with the task {task}"
        no_images = no_answers or ("" if self.right or self.worst else "the inputs are no images")
        no_blocks = no_answers or ("" if len(self.units) > 1 else "there is a single block")
        titles = panel_titles(self.units)
        maps = {} if no_images else self._maps(trainer, learner, titles)
        figure = learner.task.monitor[0].rpartition("/")[2]
        courses = self._courses(trainer, figure)
        fields = first_fields(learner, learner.input_shape)
        pairs = torch.cat(self.pairs, 1) if self.pairs else torch.zeros(1, 0, 2)
        pictures: dict[str, tuple[str, Callable[[], Any]]] = {
            "confusion": (no_answers, lambda: draw_confusion(self.confusions[-1], self.names)),
            "confusion_of_blocks": (
                no_blocks, lambda: draw_confusions(self.confusions, self._titles(titles), self.names)
            ),
            "mistakes": (
                no_images or ("" if self.worst else "there are none"),
                lambda: draw_mistakes(self.worst, self.names, self.statistics),
            ),
            "goodness": (no_answers, lambda: draw_goodness(pairs, self.units)),
            "blocks": (
                no_blocks, lambda: draw_accuracies((pairs[..., 0] > pairs[..., 1]).float().mean(1), self.units)
            ),
            "maps": (
                no_images or ("" if maps else "no head has them"),
                lambda: draw_maps(self._mapped, maps, self.names, self.statistics),
            ),
            "fields": (
                "" if fields is not None else "the first layer has no weights that are images",
                lambda: draw_fields(cast(Tensor, fields)),
            ),
            "features": (
                "" if len(self.samples.classes) > 2 else "no features of classes",
                lambda: draw_plane(self.samples, titles, self.names),
            ),
            "epochs": (
                "" if courses else "no validations are logged beside the checkpoint",
                lambda: draw_epochs(courses, {learner.unit_key(k): t for k, t in enumerate(titles)}, figure),
            ),
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        left_out: dict[str, list[str]] = {}
        for name, (why_not, draw) in pictures.items():
            if why_not:
                left_out.setdefault(why_not, []).append(name)
            else:
                save(draw(), self.folder / f"{name}.{self.ending}")
        print(f"pictures in {self.folder}: {', '.join(name for name, (why_not, _) in pictures.items() if not why_not)}")
        if left_out:
            print("left out:", "; ".join(f"{', '.join(names)} ({why})" for why, names in left_out.items()))

    def _titles(self, titles: Sequence[str]) -> list[str]:
        """Of the panels, with the vote."""
        return [*(titles[k] for k in self.shown), "vote"]

    @property
    def _mapped(self) -> list[Answered]:
        return [*self.right.values(), *self.worst[:MAPPED]]

    def _maps(self, trainer: Trainer, learner: Any, titles: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the goodness for some images, (B, K, h, w) for each block that has one."""
        if not isinstance(learner.net, LocalNet):
            return {}
        images = torch.stack([one.image for one in self._mapped]).to(learner.device)
        with trainer.precision_plugin.forward_context():
            maps = goodness_maps(learner.net, images)
        return {titles[k]: maps[k].cpu() for k in self.shown if k in maps}

    @staticmethod
    def _courses(trainer: Trainer, figure: str) -> dict[str, dict[float, float]]:
        """The figure of each validation of the run that wrote the checkpoint, if its log is near."""
        near = Path(trainer.ckpt_path).parents[:2] if trainer.ckpt_path else []
        return next(filter(None, (read_log(folder, figure) for folder in near)), {})
