"""What was measured, as a table, as JSON, and as a plot of memory over a step."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ff_lightning.benchmark.measure import Result, ratio_of_times
from ff_lightning.benchmark.variants import Settings

MB = 1e6
Run = tuple[Settings, list[Result]]


def print_table(run: Run, images: int, console: Console) -> None:
    """Print the figures; ratios are to the first row."""
    settings, results = run
    base = results[0]
    table = Table(title=_title(settings), title_justify="left")
    table.add_column("")
    for heading in (
        "time ms",
        "+- %",
        "images/s",
        "time",
        "saved MB",
        "saved",
        "tensors MB",
        "process MB",
        "grad+opt MB",
    ):
        table.add_column(heading, justify="right")
    table.add_column("GFLOP", justify="right")
    table.add_column("floor", justify="right")  # of the time, were it operations alone
    for result in results:
        if result.skipped:
            table.add_row(result.name, "skipped")
            continue
        counted = result.operations > 0
        table.add_row(
            result.name,
            f"{1e3 * result.median:.0f}",
            f"{100 * result.spread:.1f}",
            f"{images / result.median:.1f}",
            "" if base.skipped else f"{ratio_of_times(result, base):.3f}",
            f"{result.saved_peak / MB:.1f}" if counted else "",
            _ratio(result.saved_peak, base.saved_peak) if counted else "",
            f"{result.tensor_peak / MB:.1f}" if counted else "",
            f"{result.device_peak / MB:.0f}",
            f"{(result.gradients + result.optimizer) / MB:.1f}" if counted else "",
            f"{result.operations / 1e9:.1f}" if counted else "",
            _ratio(result.operations, base.operations) if counted else "",
        )
    console.print(table)
    for result in results:
        if result.skipped:
            console.print(f"{result.name}: skipped, {result.skipped}", markup=False)


def _title(settings: Settings) -> str:
    return (
        f"{settings.backbone}, stem {settings.stem}, {settings.classes} classes, batch {settings.batch}, "
        f"{settings.size} x {settings.size}, head {settings.head}, {settings.precision}, {settings.device}"
    )


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.3f}" if base else ""


def write_json(runs: Sequence[Run], threads: int, path: Path) -> None:
    """All figures, each turn included; bytes and seconds."""
    data: list[dict[str, Any]] = []
    for settings, results in runs:
        rows = [{**dataclasses.asdict(r), "median": r.median if r.seconds else None} for r in results]
        data.append({"settings": dataclasses.asdict(settings), "threads": threads, "results": rows})
    path.write_text(json.dumps(data, indent=1))


def plot(runs: Sequence[Run], path: Path) -> None:
    """Bytes of all tensors of a step over its operations: one picture per number of classes."""
    from matplotlib import pyplot  # an extra, `plot`

    figure, axes = pyplot.subplots(1, len(runs), figsize=(7 * len(runs), 4), squeeze=False, layout="constrained")
    for axis, (settings, results) in zip(axes[0], runs, strict=True):
        for result in results:
            if result.history:
                share = [i / len(result.history) for i in range(len(result.history))]
                axis.plot(share, [size / MB for size in result.history], label=result.name, linewidth=1)
        axis.set(title=_title(settings), xlabel="operations of a step, as a share", ylabel="MB of tensors")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
