"""Recurrent, top-down Forward-Forward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ff_lightning.local.recurrent import RecurrentNet
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.training.checks import check_settles
from ff_lightning.training.plain import to_plain
from ff_lightning.training.schedules import Schedule


class RecurrentFF(LocalLearner):
    """Hinton's recurrent Forward-Forward: the label is on top, the image at the bottom, and activity goes both ways.

    The states of the layers settle over several steps; each layer sees the layers above and below, at the step before.
    After each step all layers are updated: they learn to be active if the label is that of the image. ``val/acc`` is
    the accuracy when all labels are tried.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345. What the paper leaves open: docs/methods/ff.md.

    Args:
        widths: Units of each layer, at least two; None: 500, 500.
        num_classes: K. The command line takes it from the data.
        input_shape: Of a sample; None: (3, 32, 32). The command line takes it from the data.
        steps: Steps of settling for each batch, each with an update.
        damping: Share of a state that stays in a step.
        window: The first and the last step, from 1, whose goodness is the answer.
        theta: Threshold of the mean square of a layer's states: one for all, or a list over the layers.
        peer: Weight of the peer normalisation.
        optimizer: None: Adam, fused.
        lr: Learning rate; None: the one of `optimizer`, or 5e-4 for the default.
        lr_scheduler: See `LocalLearner`.
        kwargs: How it is trained: clip_norm, ...; see `LocalLearner`.

    Raises:
        ValueError: If an argument is out of its range, or would join several updates into one step.
    """

    def __init__(
        self,
        widths: list[int] | None = None,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        steps: int = 8,
        damping: float = 0.3,
        window: tuple[int, int] = (3, 5),
        theta: list[float] | float = 1.0,  # the list first: the command line takes the first type that fits
        peer: float = 0.03,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "cooldown",
        **kwargs: Any,
    ) -> None:
        if optimizer is None:
            optimizer, lr = partial(torch.optim.Adam, fused=True), 5e-4 if lr is None else lr
        super().__init__(
            num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, lr=lr, lr_scheduler=lr_scheduler,
            **kwargs,
        )  # fmt: skip
        check_settles(self, steps)
        widths, window, theta = to_plain(([500, 500] if widths is None else widths, window, theta))
        inputs = torch.Size(self.input_shape).numel()
        self.net = RecurrentNet(inputs, self.num_classes, widths, steps, damping, window, theta, peer)
        self.set_units(self.net.units())

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """An update of all layers for each step of settling."""
        (x,), target = self.inputs_and_target(batch)
        for losses in self.net.local_losses(x, target):
            yield Update(tuple(range(len(losses))), torch.stack(losses).sum(), tuple(loss.detach() for loss in losses))

    def scores(self, *inputs: Any) -> Tensor:
        """Goodness of each label at each layer, the mean over the window: (L, B, K)."""
        return self.net.goodness(*inputs)

    def representation(self, *inputs: Any) -> Tensor:
        """The start states of all layers, which know no label, each with mean square 1: (B, sum of units)."""
        return torch.cat(self.block_features(*inputs), 1)

    def block_features(self, *inputs: Any) -> list[Tensor]:
        """The same of each layer by itself, (B, N) each."""
        return self.net.features(*inputs)
