"""The training loop: every unit of a network takes its step on its own local loss.

    (x, y)
      |
    block 0 ── scores ── loss 0 ── backward ── step 0        block 0's graph is gone again here
      | detached
    block 1 ── scores ── loss 1 ── backward ── step 1
      | detached
     ...                                                     vote of all scores -> class

On several processes the gradients of block k are averaged while block k+1 runs, and block k steps after that.

Shapes: B batch, K scores, U units.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ff_lightning.backbones import Backbone, Stem, build_backbone, load_weights
from ff_lightning.backbones.weights import read_weights
from ff_lightning.local.updates import Update, deliver
from ff_lightning.tasks import Task, TaskName, Unlabelled
from ff_lightning.training import checks
from ff_lightning.training.factories import to_factory, to_task
from ff_lightning.training.kept import kept
from ff_lightning.training.optimizing import Optimizing
from ff_lightning.training.plain import store_arguments, to_plain
from ff_lightning.training.resumable import Resumable
from ff_lightning.training.schedules import Schedule
from ff_lightning.training.stepping import Stepper
from ff_lightning.training.trust import SafeLoading
from ff_lightning.util.arguments import check_choice, check_keywords, check_network, check_path


class LocalLearner(SafeLoading, Optimizing, Resumable):
    """Base of all methods: units of a network, each with an optimizer of its own, in Lightning.

    A method makes its network in `__init__`, hands the units to `set_units`, and implements `local_updates`. It may
    also implement `scores` (for answers), `vote`, `split` (for its own kind of batches) and `representation` (for
    probes). This class does the rest: the loop, optimizers, schedules, clipping, several processes, checkpoints,
    reports.

    Args:
        num_classes: K, the number of scores: of classes, labels or numbers. The command line takes it from the data.
        input_shape: Of a sample: (C, H, W) of an image, (F,) of a vector, (C, T) of a signal, (T,) for the most tokens
            of a text; None: (3, 32, 32). The command line takes it from the data.
        vocabulary: Number of token ids, where samples are rows of them. The command line takes it from the data.
        task: ``"Classification"``, ``"MultiLabel"``, ``"Regression"``, ``"Unlabelled"``, or a class of
            `ff_lightning.tasks`. None: classification; the command line takes it from the data.
        metrics: Names of further figures of validation and test, such as ``f1``; see `ff_lightning.tasks`. None: those
            of the task.
        optimizer: A class, a partial of it, or ``{class_path, init_args}``, called with parameter groups. None:
            AdamW, fused.
        lr: Learning rate of every unit; None: the one of `optimizer`, or 5e-3 for the default.
        lr_decay: Each unit has the learning rate of the unit above times this factor. For fine-tuning take less than 1,
            so that lower blocks move less.
        lr_scheduler: ``"onecycle"``, ``"cosine"``, ``"cooldown"`` (constant for half of the run, then linearly to 0) or
            ``"constant"``, for each optimizer step; or a class, a partial or ``{class_path, init_args}``, called with
            the optimizer.
        lr_interval: Whether a scheduler given as a class counts each optimizer ``"step"`` or each ``"epoch"``.
        optimization: ``"manual"``: each unit does backward and step before the next one runs, with its own optimizer.
            ``"automatic"``: Lightning's own loop with one optimizer, which gives the same gradients and weights.
        clip_norm: Largest norm of the gradients of a unit; larger ones are scaled down to it.
        clip_value: Largest size of each single gradient; larger ones are cut off there.
        accumulate: Number of batches whose gradients are averaged for one step (manual optimization only).
        compile: Whether the modules of each unit go through ``torch.compile``.
        memory_format: ``"channels_last"`` is the fastest order for convolutions on GPUs with mixed precision. None:
            that of the backbone.

    Attributes:
        unit_names: Names of the units.
        phases: Number of parts of the run. In each part some of the units go through their whole schedule.

    Raises:
        ValueError: If an argument is out of its range or not known.
    """

    overlaps_steps = False
    """Whether, on several processes, a unit may step while the next update is computed. Only for methods in which no
    update needs the step of the previous one, so that each unit comes once in a batch."""

    sets_samples_beside_others = False
    """Whether an update needs two samples. A last batch of one sample is then skipped."""

    def __init__(
        self,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        vocabulary: int | None = None,
        task: TaskName | Callable[[], Task] | None = None,
        metrics: list[str] | None = None,
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
        num_classes, input_shape, vocabulary, lr, lr_decay, clip_norm, clip_value, accumulate = to_plain(
            (num_classes, input_shape, vocabulary, lr, lr_decay, clip_norm, clip_value, accumulate)
        )
        self.task = to_task(task)
        checks.check_arguments(
            num_classes,
            self.task,
            input_shape,
            vocabulary,
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
        self.num_classes = self.task.num_classes = cast(int, num_classes or 1)
        self.criterion = None if isinstance(self.task, Unlabelled) else self.task.criterion()
        self.metrics = list(metrics if metrics is not None else self.task.metrics)
        self.input_shape = tuple(input_shape or (3, 32, 32))
        self.vocabulary = vocabulary
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
        self.phases = 1
        self._compile = compile
        self._memory_format = memory_format
        self._units: list[list[nn.Module]] = []

    # ------------------------------------------------------------------------------------------------------ of a method

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The updates of a batch, one after the other: the only hook that a method must implement.

        When the next update is asked for, the units of the previous one have taken their step (in manual optimization).

        Args:
            batch: What a loader returned; `inputs_and_target` takes it apart and checks it.
        """
        raise NotImplementedError(f"{type(self).__name__} is no method yet: it needs local_updates(batch)")

    def representation(self, *inputs: Any) -> Tensor:
        """Features for probes, (B, D)."""
        raise NotImplementedError(f"{type(self).__name__} gives no features: it needs representation(*inputs)")

    def block_features(self, *inputs: Any) -> Sequence[Tensor]:
        """The features of each block by themselves, (B, D) each, for pictures; by default `representation` in one."""
        return [self.representation(*inputs)]

    def set_units(self, units: Mapping[str, Iterable[nn.Module]]) -> None:
        """Set the units of training, and make their running figures.

        Args:
            units: The modules of each unit, by its name, in order. Their parameters are trained by the updates that
                name the number of the unit.
        """
        self._units = [list(modules) for modules in units.values()]
        self.unit_names = list(units)
        self.to(memory_format=checks.MEMORY_FORMATS[self._memory_format])
        if self._compile:
            for module in (module for modules in self._units for module in modules):
                module.compile()
        self.make_metrics()

    @property
    def parameters_of_units(self) -> list[list[nn.Parameter]]:
        """The trainable parameters of each unit."""
        return [[p for module in modules for p in module.parameters() if p.requires_grad] for modules in self._units]

    def build_backbone(
        self,
        backbone: Backbone,
        stem: Stem,
        weights: str | None,
        input_shape: Sequence[int] | None = None,
        more_ids: int = 0,
    ) -> nn.Module:
        """The network itself, or the one of this name for samples of a shape and ids, by default those of the data."""
        check_choice("stem", stem, get_args(Stem))
        if isinstance(backbone, str):
            shape, vocabulary = input_shape or self.input_shape, self.vocabulary and self.vocabulary + more_ids
            return build_backbone(backbone, self.num_classes, shape, stem, weights, vocabulary)
        if isinstance(backbone, Mapping):
            backbone = cast(nn.Module, to_factory("backbone", backbone, nn.Module)())
        check_network("backbone", backbone, "the name of a network or ")
        check_path("weights", weights, optional=True)
        if weights is not None:
            if not Path(weights).expanduser().is_file():
                raise ValueError(f"weights={weights!r}: must be a file for a backbone that is given as a module")
            load_weights(backbone, read_weights(type(backbone).__name__, weights))
        if stem != "standard":
            warnings.warn(f"stem={stem!r} has no effect on a backbone that is given as a module", stacklevel=3)
        return backbone

    # -------------------------------------------------------------------------------------------------------- the loop

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Train on one mini-batch: each unit steps before the next one starts."""
        if self.sets_samples_beside_others and self._is_left_over(batch, batch_idx):
            self._pass_over(batch_idx)
            return None
        updates = self.local_updates(batch)
        if self.automatic_optimization:
            return self._deliver(updates)
        steps = self.stepper if self._is_last_of_window(batch_idx) else None
        for update in updates:
            if steps:
                steps.begin(update.units)
            if update.loss.requires_grad or not self.optimizer_of_unit.keys().isdisjoint(update.units):
                with self._without_ddp_hooks():  # fails without a graph, unless all that it trains is frozen
                    self.manual_backward(update.loss / self.accumulate if self.accumulate > 1 else update.loss)
            self.report(update)
            if steps:
                steps.take(update.units)
        if steps:
            steps.finish()
        self.end_of_batch()
        return None

    def _is_left_over(self, batch: Any, batch_idx: int) -> bool:
        """Whether a batch is the single sample that an epoch ends with."""
        inputs, _ = self.split(batch)
        return batch_idx > 0 and len(inputs[0]) == 1

    def _pass_over(self, batch_idx: int) -> None:
        """Count the batch, and step with what an accumulation has gathered before it."""
        if self.automatic_optimization or not self._is_last_of_window(batch_idx):
            return
        if batch_idx % self.accumulate:
            self.stepper.take(range(len(self.unit_names)))
        self.stepper.finish()

    def _deliver(self, updates: Iterable[Update]) -> Tensor:
        """One loss for Lightning's loop; a network that is a single unit keeps its graph for it."""
        if len(self._units) == 1:
            losses = []
            for update in updates:
                self.report(update)
                losses.append(update.loss)
            self.end_of_batch()
            return sum(losses[1:], losses[0])
        delivered = deliver(updates, self.parameters_of_units, self.scaler)
        self._without_gradient = (
            delivered.without_gradient
            if self._without_gradient is None
            else self._without_gradient & delivered.without_gradient
        )
        self.report(Update(delivered.units, delivered.losses, tuple(delivered.losses.detach())))
        self.end_of_batch()
        return delivered.losses.sum()

    def _without_ddp_hooks(self) -> AbstractContextManager[None]:
        """DistributedDataParallel expects one backward per step: it stays out of ours, and we average by ourselves."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _is_last_of_window(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch

    # ---------------------------------------------------------------------------------------------------------- checks

    @kept
    def on_train_start(self) -> None:
        """Take up an interrupted run; a schedule that its checkpoint brought must be long enough for this run."""
        self.start_schedules()
        if not self.automatic_optimization:
            self.stepper = Stepper(self, cast(Any, dist.new_group()) if self.trainer.world_size > 1 else None)
        self.take_up()

    def unit_of(self, tensor: Tensor) -> int | None:
        """The number of the unit that a parameter or buffer belongs to."""
        storage = tensor.untyped_storage().data_ptr()
        for k, modules in enumerate(self._units):
            own = (state for module in modules for state in (*module.parameters(), *module.buffers()))
            if any(state.untyped_storage().data_ptr() == storage for state in own):
                return k
        return None

    def __getstate__(self) -> dict[str, Any]:
        """The model without what belongs to a run."""
        return {**super().__getstate__(), "stepper": None}

    def configure_callbacks(self) -> list[Any]:
        """Refuse Trainer flags that manual optimization cannot serve, and name the replacement."""
        if not self.automatic_optimization:
            checks.check_trainer_flags(self.trainer)
        return []
