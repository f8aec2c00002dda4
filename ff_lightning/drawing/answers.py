"""How sure and how right the units are.

Shapes: N samples, U units.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ff_lightning.drawing.figure import new_figure, panel_titles, shown_units, small_multiples

POINTS = 2000
"""Samples that have a point at most."""
NAMED = 40
"""So many units have their names at the axis."""


def draw_goodness(pairs: Tensor, units: Sequence[str]) -> Any:
    """Goodness of the true class against the best wrong one, a point for each sample; below the line it is right.

    Of more than `POINTS` samples every second, third, ... has a point; the shares are those of all.

    Args:
        pairs: (U + 1, N, 2), the last row of the vote.
        units: Names of the units.
    """
    titles = panel_titles(units)
    panels = [(titles[k], pairs[k]) for k in shown_units(len(units)) if len(units) > 1] + [("vote", pairs[-1])]
    figure, every, _ = small_multiples(len(panels))
    for axes, (title, points) in zip(every, panels, strict=True):
        share = (points[:, 0] > points[:, 1]).float().mean()
        points = points[:: math.ceil(len(points) / POINTS)]
        right = points[:, 0] > points[:, 1]
        for chosen, colour in ((right, "tab:blue"), (~right, "tab:red")):
            axes.plot(*points[chosen].T.numpy(), ".", color=colour, markersize=3, alpha=0.4, rasterized=True)
        axes.axline((points.median().item(),) * 2, slope=1, color="black", linewidth=0.8)
        axes.set_title(f"{title}: {100 * share:.1f} % right", fontsize="small")
    figure.supxlabel("goodness of the true class", fontsize="small")
    figure.supylabel("goodness of the best wrong class", fontsize="small")
    return figure


def draw_accuracies(accuracies: Tensor, units: Sequence[str]) -> Any:
    """Accuracy of each unit, and that of the vote as a line.

    Args:
        accuracies: (U + 1,), from 0 to 1, the last one of the vote.
        units: Names of the units.
    """
    figure = new_figure(max(4.5, min(12, 0.45 * len(units) + 2)), 3.4)
    axes = figure.subplots()
    *of_units, vote = (100 * accuracies).tolist()
    axes.plot(range(len(units)), of_units, "o-", label="block")
    axes.axhline(vote, color="black", linestyle="--", label=f"vote: {vote:.2f} %")
    if len(units) <= NAMED:
        axes.set_xticks(range(len(units)), units, rotation=90 if len(units) > 4 else 0, fontsize="small")
    axes.set(xlabel="block", ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
