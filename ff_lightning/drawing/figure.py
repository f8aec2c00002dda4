"""Figures of matplotlib, with no window and no state that is shared."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ff_lightning.util.extras import needs

SHOWN = 7
"""Units that have a panel, beside the vote; of more of them some do, evenly spread from the first to the last."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    return needs("matplotlib.figure", "plot").Figure((width, height), layout="constrained")


def small_multiples(count: int, side: float = 3.0, most: int = 4) -> tuple[Any, list[Any], int]:
    """A figure with so many square panels: the figure, their axes, and the number of columns."""
    columns = min(most, count)
    rows = math.ceil(count / columns)
    figure = new_figure(side * columns + 0.5, side * rows)
    every = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in every[count:]:
        axes.set_axis_off()
    return figure, every[:count], columns


def shown_units(units: int) -> list[int]:
    """Numbers of the units that have a panel."""
    return sorted({round(k) for k in torch.linspace(0, units - 1, min(SHOWN, units)).tolist()})


def short(name: str, most: int = 16) -> str:
    """A name that fits at an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def panel_titles(units: Sequence[str]) -> list[str]:
    """Number and name of each unit."""
    return [f"{k:02d} {short(name)}" for k, name in enumerate(units)]


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the ending; the same figures give the same file."""
    with needs("matplotlib", "plot").rc_context({"svg.hashsalt": "ff_lightning"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
