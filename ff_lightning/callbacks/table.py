"""Tables on the terminal: the blocks at the start of a run, their accuracies at the end."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ff_lightning.local.net import LocalNet


class BlockTable(Callback):
    """Prints the blocks and windows before training, and the accuracy of each block and of the vote after it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the blocks, and the windows where they are longer than a block."""
        net = getattr(pl_module, "net", None)
        if not trainer.is_global_zero:
            return
        if not isinstance(net, LocalNet):
            if len(cast(Any, pl_module).unit_names) > 1:
                Console().print(_units(cast(Any, pl_module)))
            return
        table = Table(title=f"{len(net.blocks)} blocks, each with a local loss")
        for column in ("block", "module", "features", "parameters", "of its head", "kept / sample"):
            table.add_column(column, justify="left" if column in ("block", "module") else "right")
        for k, (block, objective) in enumerate(zip(cast(Any, net.blocks), net.objectives, strict=True)):
            shape = " x ".join(map(str, block.map_shape))
            sizes = f"{_size(block):,}", f"{_size(objective):,}", f"{block.saved_bytes / 1024:,.0f} KiB"
            name = _name(block) if k in net.trained else f"{_name(block)} (held)"
            table.add_row(f"{k:02d}", escape(name), shape, *sizes)
        table.add_section()
        kept, backprop = (f"{size / 1024:,.0f} KiB" if size else "" for size in kept_per_image(net))
        both = _size(net.blocks), _size(net.objectives)
        table.add_row("all", "at most", "", *(f"{size:,}" for size in both), kept, style="bold")
        if backprop:
            table.add_row("", "backprop", "", "", "", backprop)
        Console().print(table)
        if net.windows.kept is not None:
            Console().print(_windows(net))

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
        net = getattr(pl_module, "net", None)
        blocks = list(cast(Any, net.blocks)) if isinstance(net, LocalNet) else []
        table.add_column("block" if blocks else "unit")
        table.add_column("module")
        table.add_column("%" if in_percent else name, justify="right")
        shown = (lambda value: f"{100 * float(value):.2f}") if in_percent else (lambda value: f"{float(value):.4g}")
        for k, unit in enumerate(learner.unit_names):
            unit_key = learner.unit_key(k)
            key = f"{stage}/{unit_key}_{name}"
            if key in logged:
                module = _name(blocks[k]) if k < len(blocks) else unit
                table.add_row("" if unit_key == unit else f"{k:02d}", escape(module), shown(logged[key]))
        table.add_section()
        answer = "vote (last block)" if getattr(net, "vote", None) == "last" else "vote"
        table.add_row("all", "sum" if name == "loss" else answer, shown(logged[f"{stage}/{name}"]), style="bold")
        Console().print(table)


class LogShortEpochs(Callback):
    """Logs at least once in an epoch that is shorter than the interval of the Trainer (50 steps by default)."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shorten the interval."""
        of_trainer = cast(Any, trainer)
        of_trainer.log_every_n_steps = max(1, min(of_trainer.log_every_n_steps, int(trainer.num_training_batches)))


def kept_per_image(net: LocalNet) -> tuple[int, int]:
    """Bytes that autograd keeps at most for one image in training: with local losses, and by backpropagation.

    The first figure includes heads; parameters and the loss itself do not count. Backpropagation is that through the
    blocks, without norms between them and without a classifier. Networks that run by hooks are not counted: (0, 0).
    """
    if net.hooked is not None:
        return 0, 0
    kept = net.windows.kept or net.kept()
    return kept.most(net.windows.run(net.trained)), kept.backprop


def _name(block: Any) -> str:
    """The name of a block's module; with its class where that is only the number of a layer."""
    name = str(block.name)
    kind = type(block.body.get_submodule(name)) if name.isdigit() and block.body is not None else nn.Module
    return name if kind in (nn.Module, nn.Sequential) else f"{name} ({kind.__name__})"


def _units(learner: Any) -> Table:
    """The units of a network that is not cut into blocks, such as layers."""
    title = f"{len(learner.unit_names)} units, each with a local loss"
    table = Table(title=title, min_width=len(title))
    for column in ("unit", "module", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for k, (name, parameters) in enumerate(zip(learner.unit_names, learner.parameters_of_units, strict=True)):
        table.add_row(f"{k:02d}", escape(name), f"{sum(parameter.numel() for parameter in parameters):,}")
    return table


def _windows(net: LocalNet) -> Table:
    """The windows of trained blocks, in the order in which their placements take turns, and what they keep."""
    windows = net.windows
    table = Table(title=f"windows of reach={windows.reach}")
    for column in ("batch", "blocks: share of what backprop keeps", "most"):
        table.add_column(column, justify="left" if column.startswith("blocks") else "right")
    for number, of_pass in enumerate(windows.run(net.trained)):
        shares = {span: cast(Any, windows.kept).share(*span) for span in of_pass}
        texts = [f"{a}: {share:.2f}" if a == b else f"{a}-{b}: {share:.2f}" for (a, b), share in shares.items()]
        table.add_row(str(number), "  ".join(texts), f"{max(shares.values()):.2f}")
    return table


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
