"""A linear read-out that is trained during the run."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from ff_lightning.local.probes import LinearProbe, check_classes
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_number, check_whole


class OnlineProbe(Callback):
    """Trains a linear read-out of `representation` on each batch, after the model; logs ``val/probe_acc``.

    The model does not learn from it, and ends in the same weights as without it. All processes have the same read-out.
    Checkpoints hold it, and a resumed run continues it. ``train/probe_loss`` and ``test/probe_acc`` are logged too. It
    uses the classes of the batches, even if the model does not. For a figure to publish see
    `ff_lightning.local.probes.final_probe` and ``ff-lightning probe``.

    Args:
        lr: Learning rate of the read-out, by Adam.
        num_classes: K; None: that of the data module, or of the model.

    Raises:
        ValueError: If an argument is out of its range; in the run, if the model has no representation, if the number of
            classes is not known, or if the batches have no classes.
    """

    def __init__(self, lr: float = 1e-3, num_classes: int | None = None) -> None:
        check_number("lr", lr, above=0)
        check_whole("num_classes", num_classes, least=2, optional=True)
        self.lr, self.num_classes = lr, num_classes
        self.probe: LinearProbe | None = None
        self._stored: dict[str, Any] = {}
        self._right = MeanMetric()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without features."""
        if not isinstance(pl_module, LocalLearner) or type(pl_module).representation is LocalLearner.representation:
            raise ValueError(f"OnlineProbe reads `representation`: {type(pl_module).__name__} has none")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the read-out."""
        features, classes = _features(pl_module, batch)
        if self.probe is None:
            self._make(trainer, pl_module, features.shape[1])
        assert self.probe is not None
        with torch.enable_grad():
            loss = F.cross_entropy(self.probe(features), classes)
            gradients = torch.autograd.grad(loss, list(self.probe.parameters()))
        for parameter, gradient in zip(self.probe.parameters(), gradients, strict=True):
            if trainer.world_size > 1:
                dist.all_reduce(gradient)
                gradient /= trainer.world_size
            parameter.grad = gradient
        self.optimizer.step()
        pl_module.log("train/probe_loss", loss.detach())

    def _make(self, trainer: Trainer, pl_module: Any, features: int) -> None:
        """The read-out for so many features, as a checkpoint has it."""
        of_data = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        of_model = pl_module.num_classes if pl_module.num_classes > 1 else None  # 1: it was not told
        classes = self.num_classes or of_data or of_model
        if classes is None:
            raise ValueError("num_classes of OnlineProbe is missing: neither data nor model say how many there are")
        self.probe = LinearProbe(features, classes).to(pl_module.device)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=self.lr)
        if self._stored:
            self.probe.load_state_dict(self._stored["probe"])
            self.optimizer.load_state_dict(self._stored["optimizer"])

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count the right answers of a batch."""
        features, classes = _features(pl_module, batch)
        if self.probe is None:
            self._make(trainer, pl_module, features.shape[1])
        assert self.probe is not None
        self._right.to(classes.device).update((self.probe(features).argmax(1) == classes).float())

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count the right answers."""
        self._count(trainer, pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log their share."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log their share."""
        self._log(pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracy of the last validation."""
        self._print(trainer, "val", "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracy of the test."""
        self._print(trainer, "test", "test")

    def _print(self, trainer: Trainer, stage: str, samples: str) -> None:
        logged = trainer.callback_metrics.get(f"{stage}/probe_acc")
        if logged is not None and trainer.is_global_zero:
            Console().print(f"{samples} accuracy of the probe: {100 * float(logged):.2f} %", highlight=False)

    def _log(self, pl_module: LightningModule, stage: str) -> None:
        pl_module.log(f"{stage}/probe_acc", self._right.compute(), prog_bar=True)  # of all processes
        self._right.reset()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer of the read-out."""
        if self.probe is None:
            return self._stored
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, once the number of features is known."""
        self._stored, self.probe = state_dict, None


def _features(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    inputs, target = module.split(batch)
    with evaluating(module):
        return module.representation(*inputs).detach(), check_classes(target)
