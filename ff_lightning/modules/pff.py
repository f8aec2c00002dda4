"""Predictive Forward-Forward."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ff_lightning.local.pffnet import PFFNet
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.training.checks import check_settles
from ff_lightning.training.plain import to_plain
from ff_lightning.training.schedules import Schedule
from ff_lightning.util.arguments import check_number


class PFF(LocalLearner):
    """Predictive Forward-Forward: a recurrent network that tells right labels from wrong ones, and draws.

    The states of the layers settle over several steps under an image and a label; after each step all weights are
    updated. ``val/acc`` is the accuracy when all labels are tried, ``val/readout_acc`` that of a linear read-out in one
    pass, which never sees a label. ``val/reconstruction`` is the squared error of `reconstruct`, relative to that of an
    empty image.

    Source: Ororbia and Mali, The Predictive Forward-Forward Algorithm, arXiv 2301.01452. Where paper and code disagree:
    docs/methods/pff.md.

    Args:
        units: Units of each layer; None: 2000, 2000.
        num_classes: K. The command line takes it from the data.
        input_shape: Of a sample; None: (3, 32, 32). The command line takes it from the data.
        steps: Steps of settling for each batch, each with an update.
        theta: Threshold of the sum of squares of a layer.
        alpha: Share of a state that stays in a step.
        noise: Deviation of the noise in the representation, in training.
        groups: Units of a group that inhibit each other.
        label_gain: Factor of the label at the top.
        generative: Whether there is a generative circuit; without it there are no reconstructions and samples.
        sign: 1: positive data are active; -1: negative data are, as in the authors' code.
        readout_lr: Learning rate of the read-out.
        optimizer: None: Adam, fused.
        lr: Learning rate of both circuits; None: the one of `optimizer`, or 2.5e-4 for the default.
        lr_scheduler: See `LocalLearner`.
        clip_value: Largest size of each single gradient; None: 1, as in the authors' code, unless clip_norm is given.
        kwargs: How it is trained: clip_norm, ...; see `LocalLearner`.

    Raises:
        ValueError: If an argument is out of its range, or would join several updates into one step.
    """

    def __init__(
        self,
        units: list[int] | None = None,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        steps: int = 12,
        theta: float = 10.0,
        alpha: float = 0.3,
        noise: float = 0.01,
        groups: int = 10,
        label_gain: float = 5.0,
        generative: bool = True,
        sign: Literal[1, -1] = -1,
        readout_lr: float = 1e-3,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
        clip_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        if optimizer is None:
            optimizer, lr = partial(torch.optim.Adam, fused=True), 2.5e-4 if lr is None else lr
        super().__init__(
            num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, lr=lr, lr_scheduler=lr_scheduler,
            clip_value=1.0 if clip_value is None and kwargs.get("clip_norm") is None else clip_value, **kwargs,
        )  # fmt: skip
        check_settles(self, steps)
        check_number("readout_lr", readout_lr, above=0)
        self.net = PFFNet(
            torch.Size(self.input_shape).numel(), self.num_classes, [2000, 2000] if units is None else to_plain(units),
            steps, theta, alpha, noise, groups, label_gain, generative, sign,
        )  # fmt: skip
        self.readout_lr = readout_lr
        self.set_units({**self.net.units(), "readout": [self.net.readout]})

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The update of the read-out, and then one of all layers for each step of settling."""
        (x,), target = self.inputs_and_target(batch)
        loss = self.criterion(self.net.readout_scores(x), target)
        yield Update((len(self.net.layers),), loss, (loss.detach(),))
        for losses in self.net.local_losses(x, target):
            yield Update(tuple(range(len(losses))), torch.stack(losses).sum(), tuple(loss.detach() for loss in losses))

    def scores(self, *inputs: Any) -> Tensor:
        """Goodness of each label at each layer, and the scores of the read-out: (L + 1, B, K)."""
        return torch.cat([self.net.goodness(*inputs), self.net.readout_scores(*inputs)[None]])

    def vote(self, scores: Tensor) -> Tensor:
        """The mean goodness of the layers."""
        return scores[:-1].mean(0)

    def representation(self, *inputs: Any) -> Tensor:
        """The start states of all layers, each with mean square 1: (B, sum of units)."""
        return self.net.representation(*inputs)

    def block_features(self, *inputs: Any) -> Sequence[Tensor]:
        """The same of each layer by itself, (B, N) each."""
        return self.representation(*inputs).split([layer.up.out_features for layer in self.net.layers], 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the generative circuit draws of the last layer's state: (B, ...), a sample's extremes being 0 and 1."""
        return self.net.reconstruct(x).view_as(x)

    def sample(self, n: int, seed: int = 0, label: int | None = None) -> Tensor:
        """New images, (n, *input_shape) from 0 to 1, from a Gaussian mixture of the latest training samples' latents.

        Args:
            n: Number of images.
            seed: Of the mixture and what is drawn from it.
            label: Use only the latents of this class; None: those of all classes.

        Raises:
            ValueError: If there is no generative circuit, or if too few samples were trained on.
        """
        return self.net.sample(n, seed, label).view(n, *self.input_shape)

    def unit_key(self, k: int) -> str:
        """What figures of unit k are logged by."""
        return "readout" if k == len(self.net.layers) else super().unit_key(k)

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> Tensor | None:
        scores = super()._evaluate(batch, batch_idx, stage)
        if self.net.top is not None:
            x = self.split(batch)[0][0]
            error, empty = self.net.reconstruction_error(x)
            self.log(f"{stage}/reconstruction", error / empty, batch_size=len(x), sync_dist=True)
        return scores

    def _rate_of(self, k: int) -> dict[str, float]:
        return {"lr": self.readout_lr} if k == len(self.net.layers) else super()._rate_of(k)
