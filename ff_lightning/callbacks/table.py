"""Tables on the terminal: the blocks at the start of a run, their accuracies at the end."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ff_lightning.local.net import LocalNet


class BlockTable(Callback):
    """Prints what each block is before training, and how accurate each block and the vote are after fit and test."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the blocks."""
        net = getattr(pl_module, "net", None)
        if not trainer.is_global_zero or not isinstance(net, LocalNet):
            return
        table = Table(title=f"{len(net.blocks)} blocks, each with a local loss")
        for column in ("block", "module", "features", "parameters", "of its head", "kept / image"):
            table.add_column(column, justify="left" if column in ("block", "module") else "right")
        for k, (block, objective) in enumerate(zip(cast(Any, net.blocks), net.objectives, strict=True)):
            shape = " x ".join(map(str, block.map_shape))
            sizes = f"{_size(block):,}", f"{_size(objective):,}", f"{block.saved_bytes / 1024:,.0f} KiB"
            name = block.name if k in net.trained else f"{block.name} (held)"
            table.add_row(f"{k:02d}", escape(name), shape, *sizes)
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
            key = f"{stage}/block{k:02d}_{name}"
            if key in logged:
                table.add_row(f"{k:02d}", escape(unit), shown(logged[key]))
        table.add_section()
        table.add_row("all", "vote", shown(logged[f"{stage}/{name}"]), style="bold")
        Console().print(table)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
