"""Channel-wise competition."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ff_lightning.backbones import Backbone, Stem
from ff_lightning.local.net import LocalNet
from ff_lightning.local.updates import Update
from ff_lightning.losses import GroupLoss
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition import Granularity
from ff_lightning.partition.trace import evaluating
from ff_lightning.training.plain import to_plain
from ff_lightning.training.schedules import Schedule
from ff_lightning.util.arguments import check_number, check_whole, shown


class CwC(LocalLearner):
    """Channel-wise competitive Forward-Forward: the classes compete by the activity of their channels.

    Two accuracies are logged: ``val/acc``, by the goodness of the last block, and ``val/readout_acc``, by a linear
    soft-max head on its features, which is a unit of its own.

    Source: Papachristodoulou et al., Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm,
    arXiv 2312.12668. Where paper and code disagree: docs/methods/cwc.md.

    Args:
        backbone: ``"cfse"``, the authors' network, or another one whose blocks have a multiple of K channels.
        num_classes: K. The command line takes it from the data.
        input_shape: (C, H, W) of an image; None: (3, 32, 32). The command line takes it from the data.
        loss: ``"ce"``, ``"pvn"`` or ``"cwg"``; see `ff_lightning.losses.GroupLoss`.
        windows: For each block the first epoch in which it is trained, and the epoch before which it stops. None: all
            blocks are trained all the time. The read-out is always trained.
        readout_lr: Learning rate of the read-out.
        granularity: Where a backbone is cut; see `ff_lightning.partition`.
        stem: See `SFF`.
        weights: See `SFF`.
        vote: See `SFF`.
        optimizer: None: Adam.
        lr: Learning rate of the blocks; None: the one of `optimizer`, or 0.01 for the default.
        lr_scheduler: See `LocalLearner`.
        kwargs: How it is trained: clip_norm, ...; see `LocalLearner`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        backbone: Backbone = "cfse",
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        loss: Literal["ce", "pvn", "cwg"] = "ce",
        windows: list[list[int]] | None = None,
        readout_lr: float = 1e-3,
        granularity: Granularity = "layer",
        stem: Stem = "standard",
        weights: str | None = None,
        vote: Literal["mean", "depth", "last", "log_softmax"] = "last",
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
        **kwargs: Any,
    ) -> None:
        if optimizer is None:
            optimizer, lr = torch.optim.Adam, 0.01 if lr is None else lr
        super().__init__(
            num_classes=num_classes, input_shape=input_shape, optimizer=optimizer, lr=lr, lr_scheduler=lr_scheduler,
            **kwargs,
        )  # fmt: skip
        check_number("readout_lr", readout_lr, above=0)
        self.net = LocalNet(
            self.build_backbone(backbone, stem, weights), self.num_classes, granularity, "groups", "none", vote,
            self.input_shape, partial(GroupLoss, loss),
        )  # fmt: skip
        self.windows = to_plain(windows)
        if windows is not None:
            if len(self.windows) != len(self.net.blocks):
                raise ValueError(f"windows={shown(windows)}: must be {len(self.net.blocks)}, one for each block")
            for window in self.windows:
                if len(window) != 2 or window[0] >= window[1]:
                    raise ValueError(f"windows={shown(windows)}: {window} is no pair of a first and a later epoch")
                check_whole("windows", window[0], least=0)
        last: Any = self.net.blocks[-1]
        self.readout = nn.Linear(torch.Size(last.map_shape).numel(), self.num_classes)
        self.readout_lr = readout_lr
        self.set_units({**self.net.units(), "readout": [self.readout]})

    def on_train_end(self) -> None:
        """All blocks are trained by a further run, unless it has windows too."""
        self.net.train_only(None)

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The updates of the blocks that are trained, from the input on, and that of the read-out."""
        inputs, target = self.inputs_and_target(batch)
        if self.windows is not None:
            epoch = self.current_epoch
            self.net.trained = frozenset(k for k, (first, end) in enumerate(self.windows) if first <= epoch < end)
        loss = self.criterion(self.readout(self._last_features(*inputs)), target)  # of the weights before any step
        if self.net.trained:
            yield from self.net.updates(inputs, target, scaler=self.scaler)
        yield Update((len(self.net.blocks),), loss, (loss.detach(),))

    def _last_features(self, *inputs: Any) -> Tensor:
        """What the read-out sees, as it is at test: (B, D), detached; running statistics do not move."""
        with evaluating(self.net):
            *_, features = self.net.local_features(*inputs)
        return features.flatten(1)

    def scores(self, *inputs: Any) -> Tensor:
        """Goodness of each class at each block, and the scores of the read-out: (L + 1, B, K)."""
        return torch.cat([self.net.goodness(*inputs), self.readout(self._last_features(*inputs))[None]])

    def vote(self, scores: Tensor) -> Tensor:
        """The vote of the blocks."""
        return self.net.decide(scores[:-1])

    def representation(self, *inputs: Any) -> Tensor:
        """The features of all blocks, averaged over the positions: (B, sum of channels)."""
        return self.net.representation(*inputs)

    def block_features(self, *inputs: Any) -> Sequence[Tensor]:
        """The same of each block by itself, (B, C) each."""
        return self.representation(*inputs).split(self.net.channels, 1)

    def unit_key(self, k: int) -> str:
        """What figures of unit k are logged by."""
        return "readout" if k == len(self.net.blocks) else super().unit_key(k)

    def _rate_of(self, k: int) -> dict[str, float]:
        return {"lr": self.readout_lr} if k == len(self.net.blocks) else super()._rate_of(k)
