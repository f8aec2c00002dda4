"""Self-contrastive Forward-Forward."""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from ff_lightning.local.contrast import ContrastNet, convolutional_layers, dense_layers, recurrent_layers
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.tasks import Task, TaskName
from ff_lightning.training.plain import to_plain
from ff_lightning.training.schedules import OF_WHOLE_RUN, Schedule
from ff_lightning.util.arguments import check_number, check_whole, for_each, shown


class SCFF(LocalLearner):
    """Self-contrastive Forward-Forward: each layer tells a sample paired with itself from one paired with another.

    It uses no labels. A linear read-out of `representation` shows what was learned: during the run by
    `ff_lightning.callbacks.OnlineProbe`, after it by ``ff-lightning probe``. `Trainer.predict` returns the
    representation.

    Source: Chen et al., Self-Contrastive Forward-Forward Algorithm, arXiv 2409.11593. Where paper and code disagree:
    docs/methods/scff.md.

    Args:
        widths: Units of each layer of a dense network; None: 1000, 1000, unless there is one of the next two.
        channels: Channels of each layer of a convolutional network.
        recurrent: Units (relu) in each direction of one recurrent layer over the steps of samples (features, steps).
        kernels: Sides of the kernels: one for all layers or a list; likewise for the following arguments.
        pools: Pooling after a convolution: ``"max4"`` (the maximum over 4 x 4 positions, stride 2), ``"avg2"``, ..., or
            ``"none"``.
        readout_pools: Sides of the squares that are averaged for a read-out.
        num_classes: K, for probes. The command line takes it from the data.
        input_shape: Of a sample; None: (3, 32, 32). The command line takes it from the data.
        thresholds: Two for each layer, for the goodness of positive and of negative pairs: the mean over the channels
            of ``relu(y) ** 2``. None: 4 and 6 for a layer that sees pairs, 1 and 1 for others, 0 and 1 if `recurrent`.
        lam: Weight of the norm of the goodness of positive pairs.
        pairs: For each layer, whether it sees new pairs, or the output of the layer below for its pairs. The first
            layer sees pairs. None: only the first does.
        views: A positive pair is a sample twice (``"same"``), or two versions of an image, each moved by up to 2 pixels
            (``"shifts"``).
        activation: Before the next layer: ``"triangle"`` (``relu(y - mean over the channels)``) or ``"relu"``.
        epochs: A number for each layer: they are trained one after the other, with those below frozen, and the last one
            to the end of the run. None: all layers train all the time.
        lr: Learning rate, one or a list; also of an optimizer that is given.
        weight_decay: One or a list; also of an optimizer that is given.
        lr_scheduler: See `LocalLearner`. With `epochs`: ``"constant"``, or a class, which counts only the steps of its
            layer.
        task: Accepted from the data, but without effect: the task is always ``"Unlabelled"``.
        kwargs: How it is trained: optimizer, clip_norm, ...; see `LocalLearner`.

    Raises:
        ValueError: If an argument is out of its range, or a list has another length than there are layers.
    """

    sets_samples_beside_others = True

    def __init__(
        self,
        widths: list[int] | None = None,
        channels: list[int] | None = None,
        recurrent: int | None = None,
        kernels: list[int] | int = 3,  # lists first: the command line takes the first type that fits
        pools: list[str] | str = "max2",
        readout_pools: list[int] | int = 1,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        thresholds: list[list[float]] | None = None,
        lam: list[float] | float = 0.0,
        pairs: list[bool] | None = None,
        views: Literal["same", "shifts"] = "same",
        activation: Literal["triangle", "relu"] = "triangle",
        epochs: list[int] | None = None,
        lr: list[float] | float = 0.003,
        weight_decay: list[float] | float = 1e-4,
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
        task: TaskName | Callable[[], Task] | None = None,
        **kwargs: Any,
    ) -> None:
        widths, channels, recurrent, kernels, pools = to_plain((widths, channels, recurrent, kernels, pools))
        readout_pools, thresholds, lam, pairs = to_plain((readout_pools, thresholds, lam, pairs))
        epochs, lr, weight_decay = to_plain((epochs, lr, weight_decay))
        kinds = {"widths": widths, "channels": channels, "recurrent": recurrent}
        if len(given := [f"{name}={shown(value)}" for name, value in kinds.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        count = 1 if recurrent is not None else len(channels or widths or [1000, 1000])
        rates = for_each("lr", lr, count, partial(check_number, above=0))
        super().__init__(
            num_classes=num_classes, input_shape=input_shape, task="Unlabelled", lr=rates[0],
            lr_scheduler=lr_scheduler, **kwargs,
        )  # fmt: skip
        self.rates = rates
        self.decays = for_each("weight_decay", weight_decay, count, partial(check_number, least=0))
        layers: list[Any]
        if recurrent is not None:
            layers, thresholds = recurrent_layers(self.input_shape, recurrent), thresholds or [[0.0, 1.0]]
        elif channels:
            layers = convolutional_layers(self.input_shape[0], channels, kernels, pools, readout_pools, activation)
        else:
            layers = dense_layers(torch.Size(self.input_shape).numel(), widths or [1000, 1000], activation)
        self.net = ContrastNet(layers, self.input_shape, thresholds, lam, pairs, views)
        self.epochs = None if epochs is None else for_each("epochs", epochs, count, check_whole)
        if epochs is not None and lr_scheduler in OF_WHOLE_RUN:
            raise ValueError(
                f"lr_scheduler={lr_scheduler!r} lasts for the whole run, and `epochs` gives each layer a part of it: "
                "give 'constant', or a class and lr_interval='step'"
            )
        self.set_units({f"layer{k}": [layer] for k, layer in enumerate(layers)})

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The updates of the layers that are trained, from the input on."""
        (x,), _ = self.inputs_and_target(batch)
        if self.epochs is not None:
            turn = bisect_right(list(accumulate(self.epochs)), self.current_epoch)
            self.net.trained = frozenset([min(turn, len(self.epochs) - 1)])
        for k, loss in self.net.local_losses(x):
            yield Update((k,), loss, (loss.detach(),))

    def representation(self, *inputs: Any) -> Tensor:
        """What a read-out sees of all layers: pooled and standardised, (B, D)."""
        return self.net.representation(*inputs)

    def block_features(self, *inputs: Any) -> list[Tensor]:
        """The same of each layer by itself, (B, D) each."""
        return self.net.layer_features(*inputs)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The representation, (B, D)."""
        inputs, _ = self.inputs_and_target(batch, training=False, look=False)
        return self.representation(*inputs)

    def setup(self, stage: str) -> None:
        """Warn if the run ends before each layer has had its turn."""
        super().setup(stage)
        planned, given = sum(self.epochs or ()), self.trainer.max_epochs
        if stage == "fit" and given not in (None, -1) and given < planned:
            warnings.warn(f"epochs={self.epochs}: a run of {given} epochs, and not {planned}, leaves layers untrained",
                          stacklevel=1)  # fmt: skip

    def _rate_of(self, k: int) -> dict[str, float]:
        rate = super()._rate_of(k)["lr"] * self.rates[k] / self.rates[0]
        return {"lr": rate, "weight_decay": self.decays[k]}
