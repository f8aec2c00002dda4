"""Tables on the terminal: the blocks at the start of a run, their accuracies at the end."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ff_lightning.local.chain import run_block
from ff_lightning.local.net import LocalNet
from ff_lightning.partition import Block, State
from ff_lightning.util.memory import saved_for_backward


class BlockTable(Callback):
    """Prints what each block is before training, and how accurate each block and the vote are after fit and test."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the blocks."""
        net = getattr(pl_module, "net", None)
        if not trainer.is_global_zero or not isinstance(net, LocalNet):
            return
        table = Table(title=f"{len(net.blocks)} blocks, each with a local loss")
        for column in ("block", "module", "features", "parameters", "of its head", "kept / sample"):
            table.add_column(column, justify="left" if column in ("block", "module") else "right")
        for k, (block, objective) in enumerate(zip(cast(Any, net.blocks), net.objectives, strict=True)):
            shape = " x ".join(map(str, block.map_shape))
            sizes = f"{_size(block):,}", f"{_size(objective):,}", f"{block.saved_bytes / 1024:,.0f} KiB"
            name = block.name if k in net.trained else f"{block.name} (held)"
            table.add_row(f"{k:02d}", escape(name), shape, *sizes)
        table.add_section()
        kept, backprop = (f"{size / 1024:,.0f} KiB" if size else "" for size in kept_per_image(net))
        both = _size(net.blocks), _size(net.objectives)
        table.add_row("all", "at most", "", *(f"{size:,}" for size in both), kept, style="bold")
        if backprop:
            table.add_row("", "backprop", "", "", "", backprop)
        Console().print(table)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies of the last validation, and where the checkpoints are."""
        self._print_figures(trainer, pl_module, "val")
        if trainer.is_global_zero:
            for callback in trainer.checkpoint_callbacks:
                path = getattr(callback, "best_model_path", "")
                if path:
                    monitor = getattr(callback, "monitor", None)
                    what = f"best {monitor}:" if monitor else "last:"
                    Console().print(what, path, soft_wrap=True, highlight=False, markup=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies, where validation is all that was asked for."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print_figures(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies of the test."""
        self._print_figures(trainer, pl_module, "test")

    def _print_figures(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the figure of each unit and of the vote by which the task tells the best checkpoint."""
        learner, logged = cast(Any, pl_module), trainer.callback_metrics
        name = learner.task.monitor[0].rpartition("/")[2]
        if not trainer.is_global_zero or f"{stage}/{name}" not in logged:
            return
        in_percent = name == "acc"
        title = "validation " if stage == "val" else "test "
        table = Table(title=title + ("accuracy" if in_percent else name))
        table.add_column("block")
        table.add_column("module")
        table.add_column("%" if in_percent else name, justify="right")
        shown = (lambda value: f"{100 * float(value):.2f}") if in_percent else (lambda value: f"{float(value):.4g}")
        for k, unit in enumerate(learner.unit_names):
            key = f"{stage}/{learner.unit_key(k)}_{name}"
            if key in logged:
                table.add_row(f"{k:02d}", escape(unit), shown(logged[key]))
        table.add_section()
        table.add_row("all", "vote", shown(logged[f"{stage}/{name}"]), style="bold")
        Console().print(table)


class LogShortEpochs(Callback):
    """Logs at least once in an epoch that is shorter than the interval of the Trainer (50 steps by default)."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shorten the interval."""
        of_trainer = cast(Any, trainer)
        of_trainer.log_every_n_steps = max(1, min(of_trainer.log_every_n_steps, int(trainer.num_training_batches)))


def kept_per_image(net: LocalNet) -> tuple[int, int]:
    """Bytes that autograd keeps at most for one image in training: with local losses, and by backpropagation.

    Counted in a pass that leaves no trace, with heads in the first figure; parameters do not count. Backpropagation is
    that of the blocks as they are, without norms between them and without a classifier. Networks with several inputs,
    of token ids or cut by hooks are not counted: (0, 0).
    """
    if net.hooked is not None or net.inputs.tokens or len(net.inputs.names) != 1:
        return 0, 0
    like = next(net.parameters(), torch.zeros(0))
    x = torch.zeros(2, *net.input_shape, device=like.device, dtype=like.dtype)
    devices = [like.device] if like.device.type == "cuda" else []

    def peak(local: bool) -> int:
        with torch.random.fork_rng(devices), torch.enable_grad(), saved_for_backward(net.parameters()) as saved:
            state: State = x
            scores = []
            for k, (block, objective) in enumerate(zip(net.blocks, net.objectives, strict=True)):
                border = local and (k + 1) % net.reach == 0
                norm = net.norm if local else "none"
                state, features = run_block(k, cast(Block, block), state, norm, border, for_head=local)
                scores.append(objective(features) if local else features)
                if border:
                    scores.clear()
                del features
        return saved.peak // len(x)

    modes = [(module, module.training) for module in net.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        net.train()
        return peak(local=True), peak(local=False)
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.data.copy_(before)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
