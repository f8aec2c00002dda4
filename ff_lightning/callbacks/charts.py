"""What a logger shows of a run: one chart for all blocks, the learning rates, a figure beside the hyper-parameters."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ff_lightning.training.lightning_private import logs_are_due

_UNIT = r"(block\d+_|readout_|probe_)?"
"""In the name of a figure; TensorBoard takes an expression for the lines of a chart."""


class Charts(Callback):
    """Groups the lines of all blocks into charts, logs the learning rates, and fills TensorBoard's tab HPARAMS.

    Under CUSTOM SCALARS, TensorBoard has a chart of each figure of the validation, such as the accuracy, one of the
    losses in training, and one of the learning rates. The rate is logged as ``lr`` where all blocks have the same, else
    as ``lr/block03`` for each. The figure beside the hyper-parameters is the one by which the best checkpoint is told,
    of the last validation. The command line has this callback in each run with a logger.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell TensorBoard which lines belong together."""
        learner = cast(Any, pl_module)
        names = dict.fromkeys((*learner.task.figure_names, *learner.metrics))
        charts = {f"validation: {name}": ["Multiline", [f"val/{_UNIT}{name}$"]] for name in names}
        charts["training: loss"] = ["Multiline", [f"train/{_UNIT}loss$"]]
        charts["learning rate"] = ["Multiline", ["lr(/.*)?$"]]
        for logger in _of_tensorboard(trainer):
            logger.experiment.add_custom_scalars({"blocks": charts})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the learning rates, as often as losses are logged."""
        if not logs_are_due(trainer):
            return
        learner = cast(Any, pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = {learner.unit_key(k): float(groups[i]["lr"]) for k, i in learner.optimizer_of_unit.items()}
        different = len(set(rates.values())) > 1
        pl_module.log_dict({f"lr/{key}" if different else "lr": rate for key, rate in rates.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the figure beside the hyper-parameters."""
        monitors = [getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks]
        name = next(filter(None, monitors), cast(Any, pl_module).task.monitor[0])
        value = trainer.callback_metrics.get(name)
        if value is not None and not trainer.sanity_checking:
            for logger in _of_tensorboard(trainer):
                logger.log_metrics({"hp_metric": float(value)}, trainer.global_step)


def _of_tensorboard(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that write for TensorBoard: in one process."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero]
