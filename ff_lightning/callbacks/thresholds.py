"""Thresholds of Forward-Forward that change during the run."""

from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from ff_lightning.local.ffnet import FFNet
from ff_lightning.training.plain import to_plain
from ff_lightning.util.arguments import check_number, check_whole, for_each


class Thresholds(Callback):
    """Multiplies the thresholds of `FF` by `rate` every `every` epochs; logs ``train/block00_theta``.

    The threshold in epoch e is ``multiplier * rate ** (e // every)``. Checkpoints hold it with the weights.

    Args:
        multiplier: Threshold per feature in the first epoch: one for all blocks, or a list with one for each.
        rate: Factor.
        every: Number of epochs between two changes.

    Raises:
        ValueError: If an argument is out of its range; at the start of the run, if the model has no thresholds or
            another number of them.

    Source: Gandhi et al., Extending the Forward Forward Algorithm, arXiv 2307.04205: 0.15, 1.1 and 10 in their code.
    """

    def __init__(self, multiplier: list[float] | float = 0.15, rate: float = 1.1, every: int = 10) -> None:
        check_number("rate", rate, above=0)
        check_whole("every", every)
        self.multiplier, self.rate, self.every = to_plain(multiplier), rate, every

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the thresholds of this epoch."""
        net = getattr(pl_module, "net", None)
        if not isinstance(net, FFNet):
            raise ValueError(f"Thresholds moves the thresholds of FF: {type(pl_module).__name__} has none")
        factor = self.rate ** (trainer.current_epoch // self.every)
        starts = for_each("multiplier", self.multiplier, len(net.blocks), partial(check_number, above=0), "block")
        for k, start in enumerate(starts):
            cast(Any, net.objectives[k]).theta.fill_(start * factor)
            pl_module.log(f"train/block{k:02d}_theta", start * factor)
