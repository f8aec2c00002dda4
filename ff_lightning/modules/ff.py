"""Forward-Forward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ff_lightning.backbones import Backbone, Stem
from ff_lightning.local.ffnet import FFNet, mlp
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition import Granularity
from ff_lightning.tasks import Unlabelled
from ff_lightning.training.plain import to_plain
from ff_lightning.training.schedules import Schedule
from ff_lightning.util.arguments import check_number, shown
from ff_lightning.views import labelled_shape


class FF(LocalLearner):
    """Hinton's Forward-Forward: each block tells inputs with the right label from inputs with a wrong one.

    Two accuracies are logged. For ``val/acc`` all labels are tried, and the one with the highest goodness is the
    answer. ``val/readout_acc`` is that of a linear read-out, in one pass with a neutral label; it is a unit of its own.
    With hybrid negatives, which use no label, both are the read-out's.

    Source: Hinton, The Forward-Forward Algorithm, arXiv 2212.13345; thresholds: Gandhi et al., Extending the Forward
    Forward Algorithm, arXiv 2307.04205. Where paper and code disagree: docs/methods/ff.md.

    Args:
        backbone: The name of a network, or any network as an `nn.Module`. Its inputs contain a label (see
            `ff_lightning.views.labelled_shape`); its classifier is not used. None: a plain network with these `widths`.
        widths: Units of each layer of the plain network; None: 500, 500, 500.
        num_classes: K. The command line takes it from the data.
        input_shape: Of a sample; None: (3, 32, 32). The command line takes it from the data.
        label: Where the label is written: ``"overlay"`` (into the first K pixels), ``"concat"`` (before a vector),
            ``"map"`` (one more channel, for images without a dark border) or ``"token"`` (before token ids).
        negatives: What negative data are: inputs with wrong labels, drawn uniformly (``"uniform"``), from the
            read-out's scores (``"hard"``) or by a function (classes (B,), K) -> wrong classes (B,); or ``"hybrid"``
            images without labels.
        theta: Threshold of the mean square of a block's features: one for all, or a list over the blocks. To change it
            during the run see `ff_lightning.callbacks.Thresholds`.
        goodness: ``"sum"`` or ``"mean"`` of the squares; the mean needs a higher learning rate.
        sign: 1: positive data are active; -1: negative data are.
        peer: Weight of the peer normalisation.
        voters: Numbers of the blocks whose goodness counts at test; None: all.
        readout_from: Number of the first block that the read-out sees; None: 1, or 0 if there is no other.
        readout_lr: Learning rate of the read-out.
        readout_decay: Weight decay of the read-out.
        granularity: Where a backbone is cut; see `ff_lightning.partition`.
        stem: See `SFF`.
        weights: See `SFF`.
        optimizer: None: SGD with momentum 0.9 and weight decay 3e-4.
        lr: Learning rate; None: the one of `optimizer`, or 1e-3 for the default.
        lr_scheduler: See `LocalLearner`; ``"cooldown"`` is the author's.
        kwargs: How it is trained: task, clip_norm, ...; see `LocalLearner`.

    Raises:
        ValueError: If an argument is out of its range, or if the network does not take labelled inputs.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        widths: list[int] | None = None,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        label: Literal["overlay", "concat", "map", "token"] = "overlay",
        negatives: Literal["uniform", "hard", "hybrid"] | Callable[[Tensor, int], Tensor] = "uniform",
        theta: list[float] | float = 1.0,  # the list first: the command line takes the first type that fits
        goodness: Literal["sum", "mean"] = "sum",
        sign: Literal[1, -1] = 1,
        peer: float = 0.03,
        voters: list[int] | None = None,
        readout_from: int | None = None,
        readout_lr: float = 1e-2,
        readout_decay: float = 3e-3,
        granularity: Granularity = "layer",
        stem: Stem = "standard",
        weights: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        **kwargs: Any,
    ) -> None:
        if optimizer is None:
            optimizer, lr = partial(torch.optim.SGD, momentum=0.9, weight_decay=3e-4), 1e-3 if lr is None else lr
        super().__init__(
            num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, lr=lr, lr_scheduler=lr_scheduler,
            **kwargs,
        )  # fmt: skip
        self.sets_samples_beside_others = negatives == "hybrid"
        widths, theta, voters, readout_from = to_plain((widths, theta, voters, readout_from))
        check_number("readout_lr", readout_lr, above=0)
        check_number("readout_decay", readout_decay, least=0)
        if isinstance(self.task, Unlabelled) and negatives != "hybrid":
            raise ValueError(f"negatives={shown(negatives)} are wrong labels: without labels give 'hybrid'")
        shape = labelled_shape(label, self.input_shape, self.num_classes)
        if backbone is None:
            if label == "token":
                raise ValueError("label='token' needs a backbone for token ids, such as 'text'")
            backbone = mlp(torch.Size(shape).numel(), widths or [500, 500, 500])
        elif widths is not None:
            raise ValueError(f"widths={shown(widths)} and a backbone: give one of them")
        network = self.build_backbone(backbone, stem, weights, shape, more_ids=self.num_classes + 1)
        self.net = FFNet(
            network, self.num_classes, self.input_shape, label, negatives, granularity, theta, goodness, sign, peer,
            voters, readout_from, self.vocabulary,
        )  # fmt: skip
        self.readout_rates = {"lr": readout_lr, "weight_decay": readout_decay}
        self.set_units({**self.net.units(), "readout": [self.net.readout]})

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The updates of the blocks, from the input on, and that of the read-out, once the last block is trained."""
        inputs, target = self.inputs_and_target(batch)
        loss = None
        if target is not None and len(self.net.blocks) - 1 in self.net.trained:
            loss = self.criterion(self.net.readout(self.net.states(inputs)), target)  # of the weights before any step
        yield from self.net.updates(inputs, target)
        if loss is not None:
            yield Update((len(self.unit_names) - 1,), loss, (loss.detach(),))

    def scores(self, *inputs: Any) -> Tensor | None:
        """Goodness of each label at each block, and the scores of the read-out: (L + 1, B, K)."""
        if isinstance(self.task, Unlabelled):
            return None
        return torch.cat([self.net.goodness(inputs), self.net.readout(self.net.states(inputs))[None]])

    def vote(self, scores: Tensor) -> Tensor:
        """The mean goodness of the blocks that count."""
        return scores[-1] if self.net.negatives == "hybrid" else self.net.decide(scores[:-1])

    def representation(self, *inputs: Any) -> Tensor:
        """The normalised features of all blocks for a neutral label, (B, D)."""
        return torch.cat(self.block_features(*inputs), 1)

    def block_features(self, *inputs: Any) -> list[Tensor]:
        """The same of each block by itself, (B, N) each."""
        return self.net.neutral_features(inputs)

    def unit_key(self, k: int) -> str:
        """What figures of unit k are logged by."""
        return "readout" if k == len(self.net.blocks) else super().unit_key(k)

    def _rate_of(self, k: int) -> dict[str, float]:
        return self.readout_rates if k == len(self.net.blocks) else super()._rate_of(k)
