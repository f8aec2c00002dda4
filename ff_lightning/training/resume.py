"""What a run needs besides Lightning's own checkpoint to continue exactly where it was interrupted.

Lightning keeps weights, optimizers, schedulers, the gradient scaler and the position in the data. Here are the random
numbers of every process, and the gradients of a window of accumulation that was not complete.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from torch import nn

from ff_lightning.data.loaders import EpochSampler, ResumableLoader
from ff_lightning.training.averaging import Averaging
from ff_lightning.training.lightning_private import load_loader_states, train_loaders


def restore_window(trainer: Trainer, window: int, waiting: bool) -> None:
    """Continue an accumulation of gradients; a `GradientAccumulationScheduler` acts only at the start of an epoch.

    Args:
        trainer: That of the resumed run.
        window: Number of batches of an accumulation when the checkpoint was written.
        waiting: Whether it was not complete.

    Raises:
        ValueError: If gradients of a window wait, and the windows of this run have another length.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in _callbacks(trainer)):
        trainer.accumulate_grad_batches = window
    own = max(cast(Any, trainer.lightning_module).accumulate, trainer.accumulate_grad_batches)
    if waiting and own != window:
        raise ValueError(
            f"the checkpoint was written in the middle of an accumulation of {window} batches, this run has accumulate="
            f"{own}: resume with accumulate={window}, or from the end of an epoch"
        )


def restore_frozen(module: LightningModule, frozen: Sequence[str] | None) -> None:
    """Freeze and thaw what `BaseFinetuning` had frozen and thawed; resumed, it restores the parameter groups alone."""
    if frozen is None or not any(isinstance(callback, BaseFinetuning) for callback in _callbacks(module.trainer)):
        return
    for name, part in module.named_modules():
        own = {f"{name}.{key}": parameter for key, parameter in part.named_parameters(recurse=False)}
        for key, parameter in own.items():
            parameter.requires_grad = key not in frozen
        if own and isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            part.track_running_stats = any(parameter.requires_grad for parameter in own.values())


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(cast(Any, trainer).callbacks)


def restore_position(trainer: Trainer) -> None:
    """Have loaders that can go on in mid-epoch do so.

    Lightning tells them only when it makes them; a schedule that asked for the length of the run has had them made
    before the checkpoint was read.
    """
    loop = cast(Any, trainer.fit_loop)
    if loop.restarting:
        load_loader_states(trainer)
        _count_batches_anew(trainer, loop)


def _count_batches_anew(trainer: Trainer, loop: Any) -> None:
    """Where batches have another size than before the interruption, count those of the epoch so far as if they had it.

    A Trainer goes on with the number that it had: the epoch would end too early, or without its validation.
    """
    (loader, *others) = train_loaders(trainer)
    if others or not isinstance(loader, ResumableLoader) or not isinstance(loader.sampler, EpochSampler):
        return
    position = loader.interrupted
    if position is None:
        return
    current = loop.epoch_loop.batch_progress.current
    batches = len(loader) - loader.batches_after(position["images"])
    if position["epoch"] == loop.epoch_progress.current.processed and batches != current.ready:
        change = min(batches, trainer.num_training_batches - 1) - current.ready
        for count in ("ready", "started", "processed", "completed"):
            setattr(current, count, getattr(current, count) + change)


def random_states(world_size: int) -> list[dict[str, Any]]:
    """The states of the random number generators of all processes, each plain."""
    name, keys, *rest = np.random.get_state()
    own: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if world_size == 1:
        return [own]
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, own)
    return states


def restore_random_state(states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Set the generators of this process to what they were; a process that is new keeps its own."""
    if rank >= len(states):
        return
    own = states[rank]
    version, keys, gauss = own["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(own["numpy"]))
    torch.set_rng_state(own["torch"].cpu())
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"].cpu())


def gradients(module: nn.Module, world_size: int) -> dict[str, torch.Tensor]:
    """The gradients so far, averaged over the processes: at the end of the window it comes to the same."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    own = [p.grad for _, p in named]
    if world_size > 1:
        Averaging([p for _, p in named]).wait()
    found = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    for (_, p), gradient in zip(named, own, strict=True):
        p.grad = gradient
    return found


def restore_gradients(module: nn.Module, found: Mapping[str, torch.Tensor]) -> None:
    """Put gradients back in place, for the window that goes on."""
    for name, p in module.named_parameters():
        if name in found:
            p.grad = found[name].to(p)
