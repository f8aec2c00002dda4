"""The frontier: what a step takes against what it keeps, for the ways to train one network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ff_lightning.benchmark.measure import Result, ratio_of_times
from ff_lightning.benchmark.report import Run, label, title
from ff_lightning.commands.runs import runs_in
from ff_lightning.drawing.figure import new_figure, save

REFERENCES = ["backprop", "checkpointing", "selective", "accumulation"]
FRONTIER = [
    *REFERENCES,
    *("sff layer", "sff block", "sff stage"),
    *(f"sff block reach {reach}" for reach in (0.3, 0.4, 0.6, 0.8, 1.0)),
    *("sff block reach 0.4 recompute", "sff block reach 0.6 recompute"),
    "sff block head lookahead",
]
"""The variants, see `variants.build`. A reach of 1.0 is backpropagation with deep supervision and a vote."""


def accuracies(places: Sequence[str]) -> dict[str, float]:
    """Mean test accuracy in % by variant, from ``VARIANT=RUNS/RECIPE/METHOD``, over the seeds that are there.

    Raises:
        ValueError: If it has another form, or no such run has a test accuracy.
    """
    found = {}
    for text in places:
        variant, _, place = text.partition("=")
        folder = Path(place)
        if variant not in FRONTIER or len(folder.parts) < 2:
            raise ValueError(f"accuracy={text!r}: must be VARIANT=RUNS/RECIPE/METHOD, with a variant of {FRONTIER}")
        runs = [
            run
            for run in runs_in(folder.parent.parent)
            if (run.recipe, run.method) == (folder.parent.name, folder.name)
        ]
        values = [100 * run.figures["test/acc"] for run in runs if "test/acc" in run.figures]
        if not values:
            raise ValueError(f"accuracy={text!r}: no finished run {place}-SEED has a test accuracy")
        found[variant] = mean(values)
    return found


def plot_frontier(run: Run, accuracy: Mapping[str, float], path: Path) -> None:
    """Each variant by what it keeps and how long it takes; by its operations, where nothing was timed.

    Raises:
        ValueError: If backpropagation, which all others are compared with, could not be run.
    """
    settings, results = run
    base, *_ = results
    if base.skipped:
        raise ValueError(f"there is no frontier, since backpropagation could not be run: {base.skipped}")
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    for number, result in enumerate((one for one in results if not one.skipped), start=1):
        place = result.saved_peak / base.saved_peak, _cost(result, base)
        name = f"{number}  {label(result.name, settings)}"
        if result.name in accuracy:
            name += f": {accuracy[result.name]:.1f} %"
        axes.plot(*place, "o", color="C0" if result.name.startswith("sff") else "C3", label=name)
        axes.annotate(
            f"{number}", place, xytext=(3, -11 if result is base else 3), textcoords="offset points", fontsize="small"
        )
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.axhline(1, color="grey", linewidth=0.5)
    what = "time" if base.seconds else "operations"
    axes.set(xlabel="kept for backward, share of backpropagation", ylabel=f"{what} of a step, share of backpropagation")
    axes.set_xlim(0)
    figure.legend(loc="outside right center", frameon=False, fontsize="x-small")
    axes.set_title(title(settings), fontsize="small", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _cost(result: Result, base: Result) -> float:
    return ratio_of_times(result, base) if base.seconds else result.operations / base.operations
