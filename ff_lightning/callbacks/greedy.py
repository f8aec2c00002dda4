"""One block after the other."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from ff_lightning.local.net import LocalNet
from ff_lightning.modules.base import LocalLearner
from ff_lightning.util.arguments import check_whole


class GreedyBlocks(Callback):
    """Trains block 0 for some epochs, then block 1 on the output of the frozen block 0, and so on.

    A run has `epochs_per_block` epochs for each block. In its turn a block goes through the whole schedule of the
    learning rate; blocks below run without a graph, blocks above do not run. The blocks that had their turn vote.

    Args:
        epochs_per_block: Number of epochs of each block.

    Raises:
        ValueError: At the start of the run, if it has another number of epochs, or if the model does not train by
            manual optimization.
    """

    def __init__(self, epochs_per_block: int) -> None:
        check_whole("epochs_per_block", epochs_per_block)
        self.epochs_per_block = epochs_per_block

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the run with the number of blocks, and tell the schedules."""
        if stage != "fit":
            return
        learner = _learner(pl_module)
        blocks = len(learner.net.blocks)
        if trainer.max_epochs != blocks * self.epochs_per_block:
            raise ValueError(
                f"GreedyBlocks(epochs_per_block={self.epochs_per_block}) trains {blocks} blocks in "
                f"{blocks * self.epochs_per_block} epochs: give the Trainer max_epochs="
                f"{blocks * self.epochs_per_block}, not {trainer.max_epochs}"
            )
        if learner.automatic_optimization:
            raise ValueError("GreedyBlocks has a schedule for each block: it needs a model with optimization='manual'")
        learner.phases = blocks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the turn in which a run was interrupted."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the turn to the block whose time it is."""
        net = _learner(pl_module).net
        k = trainer.current_epoch // self.epochs_per_block
        net.train_only([k])
        net.voters = frozenset(range(k + 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All blocks are trained from here on, and vote."""
        _learner(pl_module).net.voters = None
        _end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A further run of the model trains all blocks; those that have had their turn vote, as in the checkpoint."""
        if isinstance(getattr(pl_module, "net", None), LocalNet):
            _end(pl_module)


def _learner(module: LightningModule) -> Any:
    if not isinstance(module, LocalLearner) or not isinstance(getattr(module, "net", None), LocalNet):
        raise ValueError(f"GreedyBlocks trains the blocks of SFF: {type(module).__name__} has none")
    return module


def _end(module: LightningModule) -> None:
    learner = cast(Any, module)
    learner.net.train_only(None)
    learner.phases = 1
