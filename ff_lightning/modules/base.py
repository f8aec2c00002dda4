"""The training loop: every block of the network takes its step on its own local loss.

    (x, y)
      |
    block 0 ── goodness ── loss 0 ── backward ── step 0      block 0's graph is gone again here
      | detached
    block 1 ── goodness ── loss 1 ── backward ── step 1
      | detached
     ...                                                     vote of all goodnesses -> class

On several processes the gradients of block k are averaged while block k+1 runs, and block k steps after that.

Shapes: B batch, K classes, L blocks.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ff_lightning.backbones import Stem, build_backbone
from ff_lightning.training import checks, recipe
from ff_lightning.training.averaging import Averaging
from ff_lightning.training.batches import images_and_classes
from ff_lightning.training.factories import to_factory
from ff_lightning.training.plain import store_arguments, to_plain
from ff_lightning.training.resumable import Resumable
from ff_lightning.training.schedules import (
    Schedule,
    follow_first_group,
    make_scheduler,
    monitored,
    step_epoch_scheduler,
    total_steps,
)
from ff_lightning.training.trust import SafeLoading
from ff_lightning.util.arguments import check_choice, check_keywords, check_network


class LocalLearner(SafeLoading, Resumable):
    """Base of all methods: a network of blocks, each with an optimizer of its own, in Lightning.

    A method makes its network in `__init__` and hands it to `set_network`; the rest is here. The network offers
    `blocks` (each with a `name`), `block_parameters(k)`, `local_losses(x, y)`, `delivered_losses(x, y, scaler)`,
    `goodness(x)`, `decide(goodness)`, `criterion` and `forward`, as `ff_lightning.LocalNet` does.

    Args:
        num_classes: K. The command line takes it from the data.
        input_shape: (C, H, W) of an image; None: (3, 32, 32). The command line takes it from the data.
        optimizer: A class, a partial of it, or ``{class_path, init_args}``, called with parameter groups. None:
            AdamW, fused.
        lr: Learning rate of every block; None: the one of `optimizer`, or 5e-3 for the default.
        lr_decay: The learning rate of each block is that of the block above it times this factor: below 1 for
            fine-tuning, where lower blocks should move less.
        lr_scheduler: ``"onecycle"``, ``"cosine"`` or ``"constant"``, for each optimizer step; or a class, a partial or
            ``{class_path, init_args}``, called with the optimizer.
        lr_interval: Whether a scheduler given as a class counts each optimizer ``"step"`` or each ``"epoch"``.
        optimization: ``"manual"``: backward and step of each block at once, one optimizer per block.
            ``"automatic"``: the same gradients and weights by Lightning's own loop, with one optimizer.
        clip_norm: Largest norm of the gradients of a block; they are scaled down to it.
        clip_value: Largest size of each single gradient; they are cut off there.
        accumulate: Number of batches whose gradients are averaged for one step (manual optimization only).
        compile: Whether each block and its head go through ``torch.compile``.
        memory_format: ``"channels_last"``: the order that convolutions like on GPUs with mixed precision; None: as the
            backbone has it.

    Raises:
        ValueError: If an argument is out of its range or not known.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        input_shape: tuple[int, int, int] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        lr_decay: float = 1.0,
        lr_scheduler: Schedule | LRSchedulerCallable = "onecycle",
        lr_interval: Literal["step", "epoch"] = "epoch",
        optimization: Literal["manual", "automatic"] = "manual",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        compile: bool = False,
        memory_format: Literal["contiguous", "channels_last"] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_keywords(type(self), unknown)
        store_arguments(self, without=("weights",))  # where the run began; a checkpoint has weights of its own
        num_classes, input_shape, lr, lr_decay, clip_norm, clip_value, accumulate = to_plain(
            (num_classes, input_shape, lr, lr_decay, clip_norm, clip_value, accumulate)
        )
        checks.check_arguments(
            num_classes,
            input_shape,
            lr,
            lr_decay,
            optimizer,
            lr_scheduler,
            lr_interval,
            optimization,
            clip_norm,
            clip_value,
            accumulate,
            compile,
            memory_format,
        )
        self.num_classes = cast(int, num_classes)
        self.input_shape = tuple(input_shape or (3, 32, 32))
        self.automatic_optimization = optimization == "automatic"
        default = partial(torch.optim.AdamW, fused=True)
        self.make_optimizer = to_factory("optimizer", optimizer, Optimizer) if optimizer else default
        self.lr = lr if lr is not None or optimizer else 5e-3
        self.lr_decay = lr_decay
        self.schedule = lr_scheduler
        self.lr_interval = lr_interval
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.accumulate = accumulate
        self.turns = 1
        self._compile = compile
        self._memory_format = checks.MEMORY_FORMATS[memory_format]
        self._idle: set[nn.Parameter] | None = None

    def build_backbone(self, backbone: str | nn.Module, stem: Stem, weights: str | None) -> nn.Module:
        """The network itself, or the one of this name for the shape of the images; see `ff_lightning.backbones`."""
        check_choice("stem", stem, get_args(Stem))
        if isinstance(backbone, str):
            return build_backbone(backbone, self.num_classes, self.input_shape, stem, weights)
        if isinstance(backbone, Mapping):
            backbone = cast(nn.Module, to_factory("backbone", backbone, nn.Module)())
        check_network("backbone", backbone, "the name of a network or ")
        if weights is not None:
            raise ValueError(f"weights={weights!r}: load them into the backbone that you give, with load_state_dict")
        if stem != "standard":
            warnings.warn(f"stem={stem!r} has no effect on a backbone that is given as a module", stacklevel=3)
        return backbone

    def set_network(self, net: nn.Module) -> None:
        """Take the network of local blocks, and make the running figures of its blocks."""
        self.net = net.to(memory_format=self._memory_format)
        if self._compile:
            self.net.compile_blocks()
        self.make_metrics()

    # -------------------------------------------------------------------------------------------------------- the loop

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """One mini-batch through all blocks; block k+1 starts when block k has taken its step, unless it trains it."""
        x, y = images_and_classes(batch, self.num_classes, self.input_shape, training=True, look=batch_idx == 0)
        if self.automatic_optimization:
            losses = self.net.delivered_losses(x, y, self._scaler())
            self._idle = self.net.idle if self._idle is None else self._idle & self.net.idle
            self._report(losses.detach())
            return losses.sum()
        stepping = self._stepping if self._is_last_of_window(batch_idx) else ()
        local, reached, to_step = [], [], []
        for k, loss in enumerate(self.net.local_losses(x, y)):
            local.append(loss.detach())
            if k in stepping:
                reached.append(k)
            if not loss.requires_grad:  # its gradients come with the loss of a block further up, or there are none
                continue
            with self._without_ddp_hooks():
                self.manual_backward(loss / self.accumulate)
            for j in reached:
                to_step.append((j, self._start_averaging(j)))
                if len(to_step) > self._blocks_in_flight:
                    self._step_block(*to_step.pop(0))
            reached = []
        to_step += [(k, self._start_averaging(k)) for k in reached]
        for block in to_step:
            self._step_block(*block)
        self._report(torch.stack(local))
        return None

    def _step_block(self, k: int, averaging: Averaging | None) -> None:
        """Step and clear the optimizer of block k; only the last block's step counts as a step of the run."""
        if averaging is not None:
            averaging.wait()
        optimizer = _as_list(self.optimizers())[self._optimizer_of_block[k]]
        scaler = self._scaler()
        if k == max(self._stepping):
            optimizer.step()  # counted in trainer.global_step; in float16 it renews the scale, once for all blocks
        elif scaler is None:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        else:
            if not _unscales_by_itself(optimizer.optimizer):
                scaler.unscale_(optimizer.optimizer)
            self.trainer.precision_plugin._after_closure(self, optimizer.optimizer)
            scaler.step(optimizer.optimizer)
        optimizer.zero_grad()
        schedulers = _as_list(self.lr_schedulers())
        if schedulers and self._schedulers_count_steps:
            schedulers[self._optimizer_of_block[k]].step()

    @property
    def _stepping(self) -> set[int]:
        """The blocks that are trained now and have something to train."""
        return self.net.trained & self._optimizer_of_block.keys()

    @property
    def _blocks_in_flight(self) -> int:
        """How many blocks may wait for their gradients while the next one runs."""
        return 1 if self.trainer.world_size > 1 else 0

    def _start_averaging(self, k: int) -> Averaging | None:
        return Averaging(self.net.block_parameters(k)) if self.trainer.world_size > 1 else None

    def _without_ddp_hooks(self) -> AbstractContextManager[None]:
        """DistributedDataParallel expects one backward per step: it stays out of ours, and we average by ourselves."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _is_last_of_window(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch

    def on_validation_model_zero_grad(self) -> None:
        """Clear the gradients before a validation, unless an accumulation still needs them."""
        if not self._is_in_window:
            super().on_validation_model_zero_grad()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients of each block by themselves, at their true scale."""
        scaler = self._scaler()
        if scaler is not None and _unscales_by_itself(optimizer):  # for all others float16 has unscaled them by now
            scaler.unscale_(optimizer)
        for parameter in self._idle or ():  # in all batches of this step; DDP has made zeros of them
            parameter.grad = None
        self._idle = None
        for group in optimizer.param_groups:
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
            if self.clip_value is not None:
                nn.utils.clip_grad_value_(group["params"], self.clip_value)

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

    def on_train_epoch_start(self) -> None:
        """Have what a callback has unfrozen follow the schedule.

        Raises:
            MisconfigurationException: If something was unfrozen on several processes, which would drift apart.
        """
        for optimizer in self.trainer.optimizers:
            checks.check_unfrozen(optimizer, self.trainer.world_size)
        for config in self.trainer.lr_scheduler_configs:
            follow_first_group(config.scheduler.optimizer, config.scheduler)

    def on_train_epoch_end(self) -> None:
        """Report what is left of the epoch, and step the schedulers that count epochs."""
        if self.train_losses.update_called:
            self._log_losses()
        schedulers = _as_list(self.lr_schedulers())
        if schedulers and not self.automatic_optimization and not self._schedulers_count_steps:
            for k in self._stepping:
                step_epoch_scheduler(schedulers[self._optimizer_of_block[k]], self.trainer.callback_metrics)

    # ------------------------------------------------------------------------------------------------------ optimizers

    def configure_optimizers(self) -> Any:
        """One optimizer per block (manual), or one with a named parameter group per block (automatic).

        Raises:
            ValueError: If no parameter is trainable, or if a schedule needs a run of known length.
        """
        groups: list[dict[str, Any]] = []
        self._optimizer_of_block: dict[int, int] = {}
        for k in range(len(self.net.blocks)):
            parameters = self.net.block_parameters(k)
            if parameters:
                self._optimizer_of_block[k] = len(groups)
                groups.append({"params": parameters, "name": f"block{k:02d}", **self._rate_of(k)})
        if not groups:
            raise ValueError("every parameter is frozen (requires_grad=False): there is nothing to train")
        per_optimizer = [groups] if self.automatic_optimization else [[group] for group in groups]
        optimizers = [recipe.make("optimizer", self.make_optimizer, of_one) for of_one in per_optimizer]
        recipe.check_trains_blocks(type(optimizers[0]), "automatic" if self.automatic_optimization else "manual")
        schedulers = [scheduler for o in optimizers if (scheduler := make_scheduler(self, o)) is not None]
        self._schedulers_count_steps = isinstance(self.schedule, str) or self.lr_interval == "step"
        self._configured_lr = self.lr
        self._steps_of_run = total_steps(self) if self.schedule in ("onecycle", "cosine") else 0
        if not self.automatic_optimization:
            return optimizers, schedulers
        interval = "step" if self._schedulers_count_steps else "epoch"
        return optimizers, [
            {"scheduler": scheduler, "interval": interval, "monitor": monitored(scheduler)} for scheduler in schedulers
        ]

    def _rate_of(self, k: int) -> dict[str, float]:
        return {} if self.lr is None else {"lr": self.lr * self.lr_decay ** (len(self.net.blocks) - 1 - k)}

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # ---------------------------------------------------------------------------------------------------------- checks

    def on_train_start(self) -> None:
        """Take up an interrupted run; a schedule that its checkpoint brought must be long enough for this run."""
        if self.lr != self._configured_lr:
            self._take_found_rate()
        if self.trainer.ckpt_path is not None:
            checks.check_schedules(_as_list(self.lr_schedulers()), self.schedule, self._steps_of_run)
        self.take_up()

    def _take_found_rate(self) -> None:
        """Go on with the learning rate that `LearningRateFinder` has found, and with a schedule for it."""
        self._configured_lr = self.lr
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        for k, index in self._optimizer_of_block.items():
            groups[index].update(self._rate_of(k))
            groups[index].pop("initial_lr", None)
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler = cast(Any, make_scheduler(self, config.scheduler.optimizer))

    def configure_callbacks(self) -> list[Any]:
        """Answer the Trainer flags that manual optimization cannot serve, before Lightning refuses them."""
        if not self.automatic_optimization:
            checks.check_trainer_flags(self.trainer)
        return []


def _unscales_by_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer is fused with the scaling of float16: its gradients are else unscaled in its step alone."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
