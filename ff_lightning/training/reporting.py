"""What is reported of training, and how the blocks and their vote are evaluated.

Shapes: B batch, K classes, L blocks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ff_lightning.training.averaging import broadcast_buffers
from ff_lightning.training.batches import images_and_classes, images_of
from ff_lightning.training.metrics import BlockLosses, BlockScores


class Reporting(LightningModule):
    """Losses and accuracies of each block, logged without a wait for the device in between.

    Logged are ``train/loss``, ``train/block00_loss``, ..., and for ``val`` and ``test`` ``acc``, ``loss``,
    ``block00_acc``, ...
    """

    net: Any
    scores: Any
    num_classes: int
    input_shape: tuple[int, ...]
    infinite_by_nature: frozenset[str] = frozenset()
    """Tensors of the network that were not finite before it was trained, such as masks of an attention."""

    def make_metrics(self) -> None:
        """Make the running figures of the blocks of the network."""
        self.train_losses = BlockLosses(len(self.net.blocks))
        self.scores = nn.ModuleDict({stage: BlockScores(len(self.net.blocks)) for stage in ("val", "test")})

    def _report(self, losses: Tensor) -> None:
        """Collect the losses, (L,) or fewer, on the device; logged, and checked, only when the loggers are due."""
        self.train_losses.update(losses)
        if self.trainer._logger_connector.should_update_logs:
            self._log_losses()

    def _log_losses(self) -> None:
        losses = self._finite_losses()
        self.train_losses.reset()
        trained = sorted(self.net.trained)
        self.log("train/loss", losses[trained].mean(), prog_bar=True)
        self.log_dict({f"train/block{k:02d}_loss": losses[k] for k in trained})

    def _finite_losses(self) -> Tensor:
        """Mean losses since the last report, (L,).

        Raises:
            FloatingPointError: If one of them is not finite.
        """
        losses = self.train_losses.compute().reshape(-1)  # torchmetrics makes a scalar of a vector of one
        for k, finite in enumerate(losses.isfinite().tolist()):
            if not finite:
                raise FloatingPointError(
                    f"the loss of block {k} ({self.net.blocks[k].name}) became {losses[k].item()} in epoch "
                    f"{self.current_epoch}, in the last steps before step {self.global_step}: stopped, the last "
                    "checkpoint is untouched; a lower lr or a clip_norm may help"
                )
        return losses

    def _check_weights(self) -> None:
        """Raise FloatingPointError if a weight or a running statistic is not finite: no checkpoint is written then."""
        wrong = [name for name in not_finite(self.net.state_dict()) if name not in self.infinite_by_nature]
        if not wrong:
            return
        kind = "weights" if wrong[0] in dict(self.net.named_parameters()) else "running statistics"
        in_block = re.match(r"(?:blocks|heads)\.(\d+)\.", wrong[0])
        k = int(in_block[1]) if in_block else 0
        narrow = "; float16 is too narrow: try precision='16-mixed'" if self.dtype == torch.float16 else ""
        raise FloatingPointError(
            f"the {kind} of block {k} ({self.net.blocks[k].name}) are not finite after step {self.global_step}: "
            f"stopped, the last checkpoint is untouched; a lower lr or a clip_norm may help{narrow} ({wrong[0]!r} is "
            f"the first of {len(wrong)} tensors)"
        )

    def on_validation_start(self) -> None:
        """End a run that went wrong before its weights are taken for a checkpoint; make batch norms alike."""
        if self.train_losses.update_called:
            self._finite_losses()
        if self.trainer.world_size > 1:
            broadcast_buffers(self.net)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy of each block and of the vote."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy of each block and of the vote."""
        self._evaluate(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of the whole set."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies of the whole set."""
        self._log_scores("test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        x, y = images_and_classes(batch, self.num_classes, self.input_shape, training=False, look=batch_idx == 0)
        goodness = self.net.goodness(x)
        losses = torch.stack([self.net.criterion(of_block, y) for of_block in goodness])
        self.scores[stage].update(goodness, self.net.decide(goodness), losses, y)

    def _log_scores(self, stage: str) -> None:
        scores = self.scores[stage]
        accuracies, losses = scores.compute()
        scores.reset()
        self.log(f"{stage}/acc", accuracies[-1], prog_bar=True)
        self.log(f"{stage}/loss", losses.mean())
        self.log_dict({f"{stage}/block{k:02d}_acc": accuracy for k, accuracy in enumerate(accuracies[:-1])})

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, (B, C, H, W) -> (B, K); the highest one wins."""
        return self.net(x)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Scores of the classes (B, K) for images, or for batches of images and classes."""
        return self(images_of(batch, self.input_shape))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value that is not finite; one wait for the device."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist() if floats else []
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]
