"""What was measured in many runs: as a table, as a CSV file, and as a picture.

A method is compared with a baseline on the seeds that both have: a seed decides weights, order and the draw of images,
so its two runs belong together.
"""

import csv
import importlib
import math
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from ff_lightning.commands.runs import Run
from ff_lightning.util.files import replacing

BASELINE = "backprop"
_COLUMNS = ("recipe", "method", "seed", "figure", "value", "epochs", "command", "date", "versions")


def table(runs: Sequence[Run], stage: str, methods: Sequence[str] | None = None, figures: Sequence[str] = ()) -> str:
    """Markdown: each figure of each recipe, mean and standard deviation over the seeds, a column for each method.

    Differences are those to backpropagation, or to the second of two methods, over the seeds that both have: mean,
    standard deviation, and the 95 % interval of the mean by Student's t. What a config says is published stands beside
    the first figure.

    Args:
        runs: Of any recipes.
        stage: ``"val"`` or ``"test"``.
        methods: Those with a column, in this order; None: all, backpropagation last.
        figures: Their names without the stage, such as ``"readout_acc"``; none: those that the task is judged by.
    """
    known = {run.method for run in runs}
    methods = (
        [m for m in methods if m in known] if methods else sorted(known, key=lambda name: (name == BASELINE, name))
    )
    baseline = BASELINE if BASELINE in methods else methods[1] if len(methods) == 2 else ""
    compared = [name for name in methods if name != baseline and _share_seeds(runs, name, baseline)]
    rows = []
    for recipe, of_recipe in groupby(runs, lambda run: run.recipe):
        group = [run for run in of_recipe if run.method in methods]
        for figure in figures or dict.fromkeys(name for run in group for name in run.shown):
            values = {method: _by_seed(group, method, figure, stage) for method in methods}
            seeds = sorted({seed for of_method in values.values() for seed in of_method})
            if seeds:
                cells = [_spread(figure, values[method], seeds) for method in methods]
                pairs = [_difference(figure, values[method], values[baseline], seeds) for method in compared]
                unit = f"{figure}, %" if _in_percent(figure) else figure
                rows.append([f"`{recipe}`", unit, _listed(seeds), *cells, *pairs])
                published = {run.method: run.published for run in group if run.published and figure in run.shown[:1]}
                rows[-1].append(", ".join(f"{method}: {text}" for method, text in published.items()) or "-")
    head = ["recipe", "figure", "seeds", *methods, *(f"{method} - {baseline}" for method in compared), "published"]
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share_seeds(runs: Sequence[Run], one: str, other: str) -> bool:
    first, second = ({(run.recipe, run.seed) for run in runs if run.method == method} for method in (one, other))
    return bool(first & second)


def headline(run: Run, stage: str) -> str:
    """The figures that the task of a run is judged by."""
    found = run.of_stage(stage)
    return ", ".join(f"{name} {_text(name, found[name])}" for name in run.shown if name in found) or "no figure"


def _by_seed(runs: Sequence[Run], method: str, figure: str, stage: str) -> dict[int, float]:
    found = {run.seed: run.of_stage(stage).get(figure) for run in runs if run.method == method}
    return {seed: _scaled(figure, value) for seed, value in found.items() if value is not None}


def _spread(figure: str, values: dict[int, float], seeds: Sequence[int]) -> str:
    if not values:
        return "-"
    text = _number(figure, mean(values.values()))
    text += f" ± {_number(figure, stdev(values.values()))}" if len(values) > 1 else ""
    return text if sorted(values) == seeds else f"{text} ({_named(sorted(values))})"


def _difference(figure: str, one: dict[int, float], other: dict[int, float], seeds: Sequence[int]) -> str:
    """Paired by seed."""
    both = sorted(one.keys() & other.keys())
    if not both:
        return "-"
    differences = [one[seed] - other[seed] for seed in both]
    text = _number(figure, mean(differences), "+")
    if len(both) > 1:
        low, high = interval(differences)
        text += f" ± {_number(figure, stdev(differences))}"
        text += f" (95 %: {_number(figure, low, '+')} to {_number(figure, high, '+')})"
    return text if both == seeds else f"{text} ({_named(both)})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, by Student's t.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"


def _listed(seeds: Sequence[int]) -> str:
    """Seeds in order, three and more in a row by their ends: ``0 to 4, 7``."""
    runs = [[seed for _, seed in of_run] for _, of_run in groupby(enumerate(seeds), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _in_percent(figure: str) -> bool:
    return figure.rpartition("_")[2] in ("acc", "top5", "exact")


def _scaled(figure: str, value: float) -> float:
    return 100 * value if _in_percent(figure) else value


def _number(figure: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.{2 if _in_percent(figure) else 4}f}"


def _text(figure: str, value: float) -> str:
    return _number(figure, _scaled(figure, value)) + (" %" if _in_percent(figure) else "")


def write_csv(runs: Sequence[Run], stage: str, path: Path) -> None:
    """Every figure of a stage of every run, in a line of its own, as it was logged: shares are 0 to 1."""
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run in runs:
            for figure, value in run.of_stage(stage).items():
                of_run = (run.epochs, run.command, run.date, run.versions)
                writer.writerow((run.recipe, run.method, run.seed, f"{stage}/{figure}", value, *of_run))


def plot(runs: Sequence[Run], stage: str, path: Path) -> None:
    """The first figure that a task is judged by, of each block and of the vote; one panel for each recipe."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    of_recipe = {recipe: [*group] for recipe, group in groupby(runs, lambda run: run.recipe)}
    panels = {recipe: group for recipe, group in of_recipe.items() if any(_blocks(run, stage) for run in group)}
    if not panels:
        sys.exit(f"--plot: no run has figures of blocks of stage {stage!r}")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False)
    for panel, (recipe, group) in zip(axes[0], panels.items(), strict=True):
        shown = group[0].shown[0]
        for number, method in enumerate(dict.fromkeys(run.method for run in group)):
            names = {name for run in group if run.method == method for name in _blocks(run, stage)}
            blocks = sorted(names, key=lambda name: (len(name), name))  # by number: block99 before block100
            values = [[*_by_seed(group, method, name, stage).values()] for name in blocks]
            errors = [stdev(of_block) if len(of_block) > 1 else 0.0 for of_block in values]
            style: dict[str, Any] = {"color": f"C{number}", "zorder": 3}
            if blocks:
                panel.errorbar(range(len(blocks)), [*map(mean, values)], errors, marker="o", label=method, **style)
            vote = _by_seed(group, method, shown, stage)
            if vote:
                label = f"{method}, vote" if blocks else method
                panel.axhline(mean(vote.values()), linestyle="--" if blocks else "-", label=label, **style)
        unit = f"{shown}, %" if _in_percent(shown) else shown
        last = max(len(_blocks(run, stage)) for run in group)
        panel.set(title=recipe, xlabel="block", ylabel=f"{stage} {unit}", xticks=range(last))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path)


def _blocks(run: Run, stage: str) -> list[str]:
    """Names of the first figure that a task is judged by, of each block; none where the network is one block."""
    figure = "|".join(run.shown[:1])
    names = [name for name in run.of_stage(stage) if re.fullmatch(rf"block\d+_{figure}", name)]
    return names if len(names) > 1 else []
