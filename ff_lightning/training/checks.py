"""Checks before a run: arguments, Trainer flags, data and checkpoints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from ff_lightning.tasks import Classification, Task, Unlabelled
from ff_lightning.training.lightning_private import ddp_settings
from ff_lightning.training.recipe import check_optimizer, check_scheduler
from ff_lightning.training.schedules import CooldownLR, Schedule
from ff_lightning.util.arguments import check_choice, check_number, check_shape, check_switch, check_whole, shown

MEMORY_FORMATS: dict[str | None, torch.memory_format] = {
    None: torch.preserve_format,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def check_arguments(
    num_classes: int | None,
    task: Task,
    input_shape: Sequence[int] | None,
    vocabulary: int | None,
    lr: float | None,
    lr_decay: float,
    optimizer: Any,
    lr_scheduler: Any,
    lr_interval: str,
    optimization: str,
    clip_norm: float | None,
    clip_value: float | None,
    accumulate: int,
    compile: bool,
    memory_format: str | None,
) -> None:
    """Raise ValueError if an argument of `LocalLearner` is out of its range."""
    if num_classes is None and not isinstance(task, Unlabelled):
        raise ValueError("num_classes is missing: give the number of classes of the data")
    check_whole("num_classes", num_classes, least=task.least_scores, optional=isinstance(task, Unlabelled))
    if input_shape is not None:
        check_shape("input_shape", input_shape)
    check_whole("vocabulary", vocabulary, optional=True)
    check_number("lr", lr, above=0, optional=True)
    check_number("lr_decay", lr_decay, above=0, most=1)
    if lr is None and lr_decay != 1 and optimizer is not None:
        raise ValueError(f"lr_decay={lr_decay} needs the lr of the last block: give lr beside the optimizer")
    check_choice("lr_interval", lr_interval, ["step", "epoch"])
    check_choice("optimization", optimization, ["manual", "automatic"])
    check_optimizer(optimizer, lr, optimization)
    check_scheduler(lr_scheduler, get_args(Schedule), lr_interval)
    check_number("clip_norm", clip_norm, above=0, optional=True)
    check_number("clip_value", clip_value, above=0, optional=True)
    if clip_norm is not None and clip_value is not None:
        raise ValueError(f"clip_norm={clip_norm} and clip_value={clip_value}: give one of them")
    check_switch("compile", compile)
    check_choice("memory_format", memory_format, ["contiguous", "channels_last"], optional=True)
    check_whole("accumulate", accumulate)
    if accumulate > 1 and optimization == "automatic":
        raise ValueError(
            f"accumulate={accumulate} is for optimization='manual': with 'automatic' give "
            f"Trainer(accumulate_grad_batches={accumulate})"
        )


def check_settles(model: Any, steps: Any) -> None:
    """Raise ValueError if a model whose states settle under each class would join its updates, or has no classes."""
    name = type(model).__name__
    if model.accumulate > 1 or model.automatic_optimization:
        asked = f"accumulate={model.accumulate}" if model.accumulate > 1 else "optimization='automatic'"
        raise ValueError(
            f"{asked}: {name} takes a step after each of its {shown(steps)} steps of settling, and the next one sees "
            "the new weights: they cannot be one; give optimization='manual' and accumulate=1"
        )
    if type(model.task) is not Classification:
        raise ValueError(f"task={type(model.task).__name__}: {name} tries the labels of classes, give 'Classification'")


_ONE_OPTIMIZER: dict[type[Callback], str] = {
    StochasticWeightAveraging: "",
    LearningRateFinder: "",
    GradientAccumulationScheduler: "accumulate, or ",
    BaseFinetuning: "train_blocks, or ",
}
"""Callbacks that know one optimizer only, and what there is instead."""


def check_trainer_flags(trainer: Trainer) -> None:
    """Raise MisconfigurationException, with the replacement, for what manual optimization cannot serve."""
    clip = "clip_value" if trainer.gradient_clip_algorithm == "value" else "clip_norm"
    for flag, off, replacement in (("gradient_clip_val", None, clip), ("accumulate_grad_batches", 1, "accumulate")):
        value = getattr(trainer, flag)
        if value not in (off, 0):
            raise MisconfigurationException(
                f"Trainer({flag}={value}) does not work with optimization='manual': give the model "
                f"{replacement}={value}, or optimization='automatic'"
            )
    for callback in cast(Any, trainer).callbacks:
        if getattr(callback, "_train_time_interval", None) is not None:
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) is passed over by Lightning with optimization='manual': give "
                "every_n_train_steps, or the model optimization='automatic'"
            )
        for kind, instead in _ONE_OPTIMIZER.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"{type(callback).__name__} needs a single optimizer, and optimization='manual' has one for each "
                    f"block: give the model {instead}optimization='automatic'"
                )


def check_batches(trainer: Trainer) -> None:
    """Raise ValueError if the Trainer was told to run no batch: it would end at once, silently."""
    flag = {TrainerFn.FITTING: "train", TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test"}.get(
        cast(TrainerFn, trainer.state.fn), "predict"
    )
    if getattr(trainer, f"limit_{flag}_batches") == 0:
        raise ValueError(f"limit_{flag}_batches=0 of the Trainer: must be above 0, no batch would run")


def check_something_ran(trainer: Trainer) -> None:
    """Raise ValueError if a finished run saw no batch, because its loader had none."""
    fn = cast(TrainerFn, trainer.state.fn)
    if fn == TrainerFn.FITTING:
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if trainer.max_epochs == 0 or trainer.max_steps == 0 or trainer.should_stop:
            return
    else:
        loops = {TrainerFn.VALIDATING: trainer.validate_loop, TrainerFn.TESTING: trainer.test_loop}
        seen = cast(Any, loops.get(fn, trainer.predict_loop)).batch_progress.total.ready
    if not seen:
        raise ValueError(
            f"no batch to {fn.value}: the loader is empty, or holds fewer samples than a batch with drop_last=True"
        )


def check_strategy(strategy: Strategy, automatic: bool = True) -> None:
    """Raise MisconfigurationException for a strategy that spreads the parameters themselves over devices.

    In manual optimization also for settings of DistributedDataParallel's backward, which is not used there.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not see the gradients of local losses: train on one device, or with "
            "strategy='ddp', where each process keeps the activations of one block only"
        )

    for name in ("static_graph", "ddp_comm_hook"):
        value = ddp_settings(strategy).get(name)
        if value and not automatic:
            raise MisconfigurationException(
                f"DDPStrategy({name}={getattr(value, '__name__', value)}) is for one backward of the whole network, "
                f"and optimization='manual' has one for each block: leave {name} out, or give the model "
                "optimization='automatic'"
            )


def check_shares_nothing(names: Sequence[str], units: Sequence[Sequence[Tensor]]) -> None:
    """Raise ValueError if two units have a parameter in common, which a single optimizer takes once."""
    owner: dict[int, int] = {}
    for k, parameters in enumerate(units):
        for parameter in parameters:
            if (other := owner.setdefault(id(parameter), k)) != k:
                raise ValueError(
                    f"optimization='automatic': blocks {other} ({names[other]}) and {k} ({names[k]}) share parameters, "
                    "as by one head for both; give optimization='manual'"
                )


def check_unfrozen(optimizer: Any, processes: int) -> None:
    """Raise MisconfigurationException if parameters that were unfrozen in the run would not be averaged."""
    if processes > 1 and any("name" not in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"parameters were unfrozen in a run on {processes} processes, and DistributedDataParallel averages only "
            "those that were trainable at its start: unfreeze them before, or train on one process"
        )


def check_data(num_classes: int | None, input_shape: tuple[int, ...], vocabulary: int | None, data: Any) -> None:
    """Raise ValueError if a data module has other classes than the model, another number of channels, or other ids."""
    classes, shape = getattr(data, "num_classes", None), getattr(data, "input_shape", None)
    if num_classes is not None and classes not in (None, num_classes):
        raise ValueError(f"num_classes={num_classes} of the model, but {type(data).__name__} has {classes} classes")
    ids = getattr(data, "vocabulary", None)
    if ids != vocabulary and hasattr(data, "vocabulary"):
        raise ValueError(f"vocabulary={vocabulary} of the model, but {type(data).__name__} has vocabulary={ids}")
    if shape is not None and (shape[0] > input_shape[0] if ids else shape[0] != input_shape[0]):
        raise ValueError(
            f"input_shape={input_shape} of the model, but {type(data).__name__} has samples of shape {tuple(shape)}: "
            f"give the model input_shape={tuple(shape)}"
        )


def check_schedules(schedulers: Iterable[Any], name: Any, wanted: int) -> None:
    """Raise ValueError if a schedule by name, restored from a checkpoint, ends before the run does.

    Args:
        schedulers: Those of the run.
        name: The argument `lr_scheduler`.
        wanted: Number of steps for which they would have been made.
    """
    for scheduler in schedulers:
        length = {OneCycleLR: "total_steps", CosineAnnealingLR: "T_max", CooldownLR: "total_steps"}.get(type(scheduler))
        steps = wanted if length is None else getattr(scheduler, length)
        if steps < wanted:
            raise ValueError(
                f"lr_scheduler={name!r} of the checkpoint was made for {steps} steps, this run has {wanted}: resume "
                "with the max_epochs of the first run and its accumulate, or start a new run with weights=FILE instead "
                "of ckpt_path=FILE"
            )


def check_architecture(own: Mapping[str, Tensor], hparams: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint holds other tensors than the network, and say which arguments differ."""
    theirs = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    own = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    wrong = [key for key in own if key not in theirs or own[key].shape != theirs[key].shape]
    wrong += [key for key in theirs if key not in own]
    if wrong:
        was = checkpoint.get("hyper_parameters", {})
        differ = {
            key: f"{value!r} here, {was[key]!r} there"
            for key, value in hparams.items()
            if key in was and was[key] != value
        }
        module = "".join(
            f"the {name} of the checkpoint was given as {kind} and is not stored: give it again, {name}=...; "
            for name, kind in (("backbone", "a module"), ("head", "a function"))
            if name not in was and name in hparams  # what is given as a module or a function is not in there
        )
        if module and "ff_lightning" in checkpoint:  # of this package, so that it tells what was stored
            raise ValueError(f"{module}{len(wrong)} tensors differ")
        raise ValueError(
            f"the checkpoint was written by another architecture: {len(wrong)} tensors differ, the first is "
            f"{wrong[0]!r}; arguments that differ: {differ or 'none that were stored'}"
        )
