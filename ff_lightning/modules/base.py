"""The training loop: every block of the network takes its step on its own local loss.

    (x, y)
      |
    block 0 ── goodness ── loss 0 ── backward ── step 0      block 0's graph is gone again here
      | detached
    block 1 ── goodness ── loss 1 ── backward ── step 1
      | detached
     ...                                                     vote of all goodnesses -> class

Shapes: B batch, K classes, L blocks.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ff_lightning.backbones import Stem, build_backbone
from ff_lightning.modules.factories import to_factory, to_spec
from ff_lightning.modules.metrics import BlockLosses, BlockScores
from ff_lightning.network import check_classes
from ff_lightning.suggest import unknown

Schedule = Literal["onecycle", "cosine", "constant"]
_NOT_PLAIN = ("backbone", "head", "optimizer", "lr_scheduler")


class LocalLearner(LightningModule):
    """Base of all methods: a network of blocks, each with an optimizer of its own, in Lightning.

    A method makes its network in `__init__` and hands it to `set_network`; the rest is here. The network offers
    `blocks` (each with a `name`), `block_parameters(k)`, `local_losses(x, y)`, `delivered_losses(x, y, scaler)`,
    `goodness(x)`, `decide(goodness)`, `criterion` and `forward`, as `ff_lightning.LocalNet` does.

    Args:
        num_classes: K. The command line takes it from the data.
        input_shape: (C, H, W) of an image; None: (3, 32, 32). The command line takes it from the data.
        optimizer: A class, a partial of it, or ``{class_path, init_args}``, called with parameter groups. None: AdamW.
        lr: Learning rate of every block; None: the one of `optimizer`, or 5e-3 for the default.
        lr_scheduler: ``"onecycle"``, ``"cosine"`` or ``"constant"``, for each optimizer step; or a class, a partial or
            ``{class_path, init_args}``, called with the optimizer.
        lr_interval: Whether a scheduler given as a class counts each optimizer ``"step"`` or each ``"epoch"``.
        optimization: ``"manual"``: backward and step of each block at once, one optimizer per block.
            ``"automatic"``: the same gradients and weights by Lightning's own loop, with one optimizer.
        clip_norm: Largest norm of the gradients of a block; they are scaled down to it.
        accumulate: Number of batches whose gradients are averaged for one step (manual optimization only).

    Raises:
        ValueError: If an argument is out of its range or not known.
    """

    net: Any
    scores: Any

    def __init__(
        self,
        num_classes: int | None = None,
        input_shape: tuple[int, int, int] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_scheduler: Schedule | LRSchedulerCallable = "onecycle",
        lr_interval: Literal["step", "epoch"] = "epoch",
        optimization: Literal["manual", "automatic"] = "manual",
        clip_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self._check_arguments(num_classes, lr, lr_scheduler, optimization, clip_norm, accumulate)
        self._keep_plain_hparams()
        self.num_classes = cast(int, num_classes)
        self.input_shape = tuple(input_shape or (3, 32, 32))
        self.automatic_optimization = optimization == "automatic"
        self.make_optimizer = to_factory("optimizer", optimizer) if optimizer else torch.optim.AdamW
        self.lr = lr if lr is not None or optimizer else 5e-3
        self.schedule = lr_scheduler
        self.lr_interval = lr_interval
        self.clip_norm = clip_norm
        self.accumulate = accumulate

    def build_backbone(self, backbone: str | nn.Module, stem: Stem) -> nn.Module:
        """The network itself, or the one of this name for the shape of the images; see `ff_lightning.backbones`."""
        if isinstance(backbone, str):
            return build_backbone(backbone, self.num_classes, self.input_shape, stem)
        if stem != "standard":
            warnings.warn(f"stem={stem!r} has no effect on a backbone that is given as a module", stacklevel=3)
        return backbone

    def set_network(self, net: nn.Module) -> None:
        """Take the network of local blocks, and make the running figures of its blocks."""
        self.net = net
        self.train_losses = BlockLosses(len(self.net.blocks))
        self.scores = nn.ModuleDict({stage: BlockScores(len(self.net.blocks)) for stage in ("val", "test")})

    # -------------------------------------------------------------------------------------------------------- the loop

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """One mini-batch through all blocks; block k+1 starts when block k has taken its step."""
        x, y = batch
        if self.automatic_optimization:
            losses = self.net.delivered_losses(x, y, self._scaler())
            self._report(losses.detach())
            return losses.sum()
        stepping = self._is_last_of_window(batch_idx)
        local = []
        for k, loss in enumerate(self.net.local_losses(x, y)):
            if loss.requires_grad:
                self.manual_backward(loss / self.accumulate)
            if stepping:
                self._step_block(k)
            local.append(loss.detach())
        self._report(torch.stack(local))
        return None

    def _step_block(self, k: int) -> None:
        """Step and clear the optimizer of block k; only the last block's step counts as a step of the run."""
        if k not in self._optimizer_of_block:
            return
        optimizer = _as_list(self.optimizers())[self._optimizer_of_block[k]]
        if k == max(self._optimizer_of_block):
            optimizer.step()  # counted in trainer.global_step
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        optimizer.zero_grad()
        if self._schedulers_step_with_optimizer:
            scheduler = _as_list(self.lr_schedulers())[self._optimizer_of_block[k]]
            scheduler.step()

    def _is_last_of_window(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients of each block by themselves; mixed precision has unscaled them by now."""
        if self.clip_norm is not None:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.clip_norm)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """`Trainer(gradient_clip_val=...)` in automatic optimization: each block is clipped by itself."""
        if gradient_clip_val:
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            for group in optimizer.param_groups:
                clip(group["params"], gradient_clip_val)

    def on_train_epoch_end(self) -> None:
        """Report what is left of the epoch, and step the schedulers that count epochs."""
        if self.train_losses.update_called:
            self._log_losses()
        if not self.automatic_optimization and not self._schedulers_step_with_optimizer:
            for scheduler in _as_list(self.lr_schedulers()):
                self._step_epoch_scheduler(scheduler)

    def _step_epoch_scheduler(self, scheduler: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
            return
        monitor = getattr(scheduler, "monitor", "val/loss")
        if monitor not in self.trainer.callback_metrics:
            raise ValueError(
                f"lr_scheduler: ReduceLROnPlateau watches {monitor!r}, which was not logged; there are "
                f"{sorted(self.trainer.callback_metrics)}"
            )
        scheduler.step(self.trainer.callback_metrics[monitor])

    # ------------------------------------------------------------------------------------------------------ optimizers

    def configure_optimizers(self) -> Any:
        """One optimizer per block (manual), or one with a named parameter group per block (automatic)."""
        groups: list[dict[str, Any]] = []
        self._optimizer_of_block: dict[int, int] = {}
        for k in range(len(self.net.blocks)):
            parameters = self.net.block_parameters(k)
            if parameters:
                self._optimizer_of_block[k] = len(groups)
                rate = {} if self.lr is None else {"lr": self.lr}
                groups.append({"params": parameters, "name": f"block{k:02d}", **rate})
        if not groups:
            raise ValueError("every parameter is frozen (requires_grad=False): there is nothing to train")
        if self.automatic_optimization:
            optimizers = [self.make_optimizer(groups)]
        else:
            optimizers = [self.make_optimizer([group]) for group in groups]
        schedulers = [self._scheduler(optimizer) for optimizer in optimizers] if self.schedule != "constant" else []
        self._schedulers_step_with_optimizer = bool(schedulers) and (
            isinstance(self.schedule, str) or self.lr_interval == "step"
        )
        if not self.automatic_optimization:
            return optimizers, schedulers
        interval = "step" if self._schedulers_step_with_optimizer else "epoch"
        monitor = getattr(schedulers[0], "monitor", "val/loss") if schedulers else None
        return optimizers, [{"scheduler": s, "interval": interval, "monitor": monitor} for s in schedulers]

    def _scheduler(self, optimizer: Optimizer) -> LRScheduler | ReduceLROnPlateau:
        if self.schedule == "onecycle":
            rates = [group["lr"] for group in optimizer.param_groups]
            return OneCycleLR(optimizer, max_lr=rates, total_steps=self._total_steps())
        if self.schedule == "cosine":
            return CosineAnnealingLR(optimizer, T_max=self._total_steps())
        made: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] = to_factory("lr_scheduler", self.schedule)
        return made(optimizer)

    def _total_steps(self) -> int:
        """Number of optimizer steps of each block in the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                f"lr_scheduler={self.schedule!r} must know the length of the run: set max_epochs or max_steps of the "
                "Trainer, or lr_scheduler='constant'"
            )
        if self.accumulate > 1 and self.trainer.max_epochs not in (None, -1):
            per_epoch = math.ceil(self.trainer.num_training_batches / self.accumulate)
            in_epochs = per_epoch * self.trainer.max_epochs
            steps = in_epochs if self.trainer.max_steps == -1 else min(in_epochs, self.trainer.max_steps)
        return int(steps)

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # --------------------------------------------------------------------------------------------- what is logged of it

    def _report(self, losses: Tensor) -> None:
        """Collect the losses (L,) on the device; logged, and checked, only when the loggers are due."""
        self.train_losses.update(losses)
        if self.trainer._logger_connector.should_update_logs:
            self._log_losses()

    def _log_losses(self) -> None:
        losses = self._finite_losses()
        self.train_losses.reset()
        self.log("train/loss", losses.mean(), prog_bar=True)
        self.log_dict({f"train/block{k:02d}_loss": loss for k, loss in enumerate(losses)})

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

    def on_validation_start(self) -> None:
        """A run that went wrong ends here, before its weights are taken for a checkpoint."""
        if self.train_losses.update_called:
            self._finite_losses()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy of each block and of the vote."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy of each block and of the vote."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of the whole set."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies of the whole set."""
        self._log_scores("test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
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
        return self(batch if isinstance(batch, Tensor) else batch[0])

    # ---------------------------------------------------------------------------------------------------------- checks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the classes of the first batch; on the CPU the network itself checks every batch."""
        if batch_idx == 0:
            check_classes(batch[1].cpu(), self.num_classes)

    def configure_callbacks(self) -> list[Any]:
        """Answer the Trainer flags that manual optimization cannot serve, before Lightning refuses them."""
        trainer = self.trainer
        if not self.automatic_optimization:
            if trainer.gradient_clip_val:
                raise MisconfigurationException(
                    f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) does not work with optimization='manual': "
                    f"give the model clip_norm={trainer.gradient_clip_val}, or optimization='automatic'"
                )
            if trainer.accumulate_grad_batches != 1:
                raise MisconfigurationException(
                    f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) does not work with "
                    f"optimization='manual': give the model accumulate={trainer.accumulate_grad_batches}, or "
                    "optimization='automatic'"
                )
        return []

    def setup(self, stage: str) -> None:
        """Compare the model with the data.

        Raises:
            ValueError: If the data module has other classes or another number of channels.
        """
        data = getattr(self.trainer, "datamodule", None)
        classes, shape = getattr(data, "num_classes", None), getattr(data, "input_shape", None)
        if classes not in (None, self.num_classes):
            raise ValueError(f"num_classes={self.num_classes} of the model, but {type(data).__name__} has {classes}")
        if shape is not None and shape[0] != self.input_shape[0]:
            raise ValueError(
                f"input_shape={self.input_shape} of the model, but {type(data).__name__} has images of shape {shape}"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with the network, and say in one line where they differ.

        Raises:
            ValueError: If the checkpoint belongs to another architecture.
        """
        own, theirs = self.state_dict(), checkpoint["state_dict"]
        wrong = [key for key in own if key not in theirs or own[key].shape != theirs[key].shape]
        wrong += [key for key in theirs if key not in own]
        if wrong:
            was = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
            changed = {
                key: f"{value!r} here, {was.get(key)!r} there"
                for key, value in self.hparams.items()
                if key in was and was[key] != value
            }
            raise ValueError(
                f"the checkpoint was written by another architecture: {len(wrong)} tensors differ, the first is "
                f"{wrong[0]!r}; arguments that differ: {changed or 'none that were stored (the backbone?)'}"
            )

    def _check_arguments(
        self,
        num_classes: int | None,
        lr: float | None,
        lr_scheduler: Any,
        optimization: str,
        clip_norm: float | None,
        accumulate: int,
    ) -> None:
        if num_classes is None:
            raise ValueError("num_classes is missing: give the number of classes of the data")
        if lr is not None and lr <= 0:
            raise ValueError(f"lr={lr}: must be above 0")
        if isinstance(lr_scheduler, str) and lr_scheduler not in get_args(Schedule):
            allowed = f"one of {list(get_args(Schedule))}, or a scheduler class"
            raise ValueError(unknown("lr_scheduler", lr_scheduler, get_args(Schedule), allowed))
        if optimization not in ("manual", "automatic"):
            raise ValueError(f"optimization={optimization!r}: must be 'manual' or 'automatic'")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm={clip_norm}: must be above 0, or None for no clipping")
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: must be at least 1")
        if accumulate > 1 and optimization == "automatic":
            raise ValueError(
                f"accumulate={accumulate} is for optimization='manual': with 'automatic' give "
                f"Trainer(accumulate_grad_batches={accumulate})"
            )

    def _keep_plain_hparams(self) -> None:
        """Keep the arguments as names, numbers and {class_path, init_args}: a checkpoint holds no code."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters()
        for name in _NOT_PLAIN:
            value = self.hparams.get(name)
            if callable(value):
                spec = to_spec(value)
                self.hparams[name] = spec
                if spec is None:
                    self.hparams.pop(name)
                    if not isinstance(value, nn.Module):
                        warnings.warn(
                            f"{name} is a function and is not stored in checkpoints: give it to load_from_checkpoint "
                            "again, or give a class or {class_path, init_args}",
                            stacklevel=4,
                        )
        self.save_hyperparameters(dict(self.hparams))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
