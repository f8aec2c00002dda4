"""Tables on the terminal: the blocks at the start of a run, their accuracies at the end."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class BlockTable(Callback):
    """Prints what each block is before training, and how accurate each block and the vote are after fit and test."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the blocks."""
        net = cast(Any, pl_module.net)
        if not trainer.is_global_zero or not hasattr(net, "heads"):
            return
        table = Table(title=f"{len(net.blocks)} blocks, each with a local loss")
        for column in ("block", "module", "features", "parameters", "of its head", "kept / image"):
            table.add_column(column, justify="left" if column in ("block", "module") else "right")
        for k, (block, head) in enumerate(zip(net.blocks, net.heads, strict=True)):
            shape = " x ".join(map(str, block.map_shape))
            sizes = f"{_size(block):,}", f"{_size(head):,}", f"{block.saved_bytes / 1024:,.0f} KiB"
            name = block.name if k in net.trained else f"{block.name} (held)"
            table.add_row(f"{k:02d}", escape(name), shape, *sizes)
        Console().print(table)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies of the last validation, and where the checkpoints are."""
        self._print_accuracies(trainer, pl_module, "val")
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
            self._print_accuracies(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies of the test."""
        self._print_accuracies(trainer, pl_module, "test")

    def _print_accuracies(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero or f"{stage}/acc" not in metrics:
            return
        table = Table(title="validation accuracy" if stage == "val" else "test accuracy")
        table.add_column("block")
        table.add_column("module")
        table.add_column("%", justify="right")
        for k, block in enumerate(cast(Any, pl_module.net).blocks):
            table.add_row(f"{k:02d}", escape(block.name), f"{100 * float(metrics[f'{stage}/block{k:02d}_acc']):.2f}")
        table.add_section()
        table.add_row("all", "vote", f"{100 * float(metrics[f'{stage}/acc']):.2f}", style="bold")
        Console().print(table)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
