"""What was measured, as a table, as JSON, and as a plot of memory over a step."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ff_lightning.benchmark.measure import Result, ratio_of_times
from ff_lightning.benchmark.variants import Settings

MB = 1e6
Run = tuple[Settings, list[Result]]


LEGEND = {
    "time x": "x: share of the first row",
    "+- %": "+-: half the distance between the quartiles",
    "saved MB": "saved: kept for backward, at most",
    "tensors MB": "tensors: all tensors of a step, at most",
    "memory MB": "memory: what the steps added to the process or device",
}
"""What the columns mean that do not say it themselves."""


def print_table(run: Run, images: int, console: Console) -> None:
    """Print the figures, without what was not measured; ratios are to the first row."""
    settings, results = run
    base = results[0]
    rows = {result.name: _row(result, base, images) for result in results if not result.skipped}
    headings = [heading for heading in _row(base, base, images) if any(row[heading] for row in rows.values())]
    legend = "; ".join(meaning for heading, meaning in LEGEND.items() if heading in headings)
    table = Table("", title=escape(title(settings)), title_justify="left", caption=legend, caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(escape(name), *(row[heading] for heading in headings))
    if rows:
        console.print(table)
    for result in results:
        if result.skipped:
            console.print(f"{result.name}: skipped, {result.skipped}", markup=False)


def _row(result: Result, base: Result, images: int) -> dict[str, str]:
    """The figures of a variant by their headings; empty: not measured."""
    timed, counted = len(result.seconds) > 0, result.operations > 0
    return {
        "ms": f"{1e3 * result.median:.0f}" if timed else "",
        "+- %": f"{100 * result.spread:.1f}" if len(result.seconds) > 1 else "",
        "images/s": f"{images / result.median:.1f}" if timed else "",
        "time x": f"{ratio_of_times(result, base):.3f}" if timed and not base.skipped else "",
        "compiled in s": f"{result.compile_seconds:.0f}" if result.compile_seconds else "",
        "saved MB": f"{result.saved_peak / MB:.1f}" if counted else "",
        "saved x": _ratio(result.saved_peak, base.saved_peak) if counted else "",
        "tensors MB": f"{result.tensor_peak / MB:.1f}" if counted else "",
        "memory MB": f"{result.device_peak / MB:.0f}" if timed else "",
        "grad+opt MB": f"{(result.gradients + result.optimizer) / MB:.1f}" if counted else "",
        "GFLOP": f"{result.operations / 1e9:.1f}" if counted else "",
        "GFLOP x": _ratio(result.operations, base.operations) if counted else "",
    }


def title(settings: Settings) -> str:
    """What all variants share, in a line."""
    precision = {"32": "float32", "bf16": "bfloat16"}[settings.precision]
    return (
        f"{settings.backbone}, stem {settings.stem}, {settings.classes} classes, batch {settings.batch}, "
        f"{settings.size} x {settings.size}, head {settings.head}, {precision}, {settings.device}"
    )


def label(name: str, settings: Settings) -> str:
    """The name of a variant, as people who do not know the command read it."""
    if name == "accumulation":
        return f"backprop in {settings.micro_batches} micro-batches"
    if name == "selective":
        return "selective checkpointing"
    for word in (" head", " reach", " recompute"):
        name = name.replace(word, f",{word}")
    return name.replace("sff", "SFF by")


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
    """What is kept for backward over the operations of a step: one picture per number of classes."""
    from matplotlib import pyplot  # an extra, `plot`

    with pyplot.rc_context({"svg.hashsalt": "ff_lightning"}):  # the same file for the same figures
        figure, axes = pyplot.subplots(1, len(runs), figsize=(8 * len(runs), 3.6), squeeze=False, layout="constrained")
        for axis, (settings, results) in zip(axes[0], runs, strict=True):
            for result in results:
                if result.course:
                    done, kept = zip(*((count / 1e9, size / MB) for count, size in result.course), strict=True)
                    name = f"{label(result.name, settings)}: {result.saved_peak / MB:.0f} MB at most"
                    (line,) = axis.step(done, kept, where="post", label=name, linewidth=1.3)
                    axis.fill_between(done, kept, step="post", color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set_title(title(settings), fontsize="small", wrap=True)
            axis.set(xlabel="GFLOP of the step done", ylabel="MB kept for backward", ylim=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, loc="upper right", fontsize="small")
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
