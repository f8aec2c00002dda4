"""How the figure of each block went over the epochs, from the log of a run."""

import csv
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ff_lightning.drawing.figure import new_figure, shown_units

Course = dict[float, float]
"""Epoch, counted from 1, to value."""
NAMED = 20
"""So many units are all named; of more of them some are."""


def read_log(folder: Path, name: str) -> dict[str, Course]:
    """A figure of the validations of a run: of each unit, by its key such as ``block03``, and of the vote, by ``""``.

    Args:
        folder: Of the run, with what `CSVLogger` or `TensorBoardLogger` has written.
        name: Of the figure, such as ``acc``.

    Returns:
        Empty, where nothing was logged.
    """
    table = folder / "metrics.csv"
    found: dict[str, Course] = {}
    for tag, epoch, value in _of_table(table) if table.is_file() else _of_events(folder):
        match = re.fullmatch(rf"val/(?:(block\d+|readout)_)?{name}", tag)
        if match:
            found.setdefault(match[1] or "", {})[epoch + 1] = value
    return found


def _of_table(path: Path) -> list[tuple[str, float, float]]:
    with path.open(newline="") as file:
        return [
            (tag, float(row["epoch"]), float(value))
            for row in csv.DictReader(file)
            for tag, value in row.items()
            if tag.startswith("val/") and value
        ]


def _of_events(folder: Path) -> list[tuple[str, float, float]]:
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = []
    for events in sorted(folder.glob("events.*")):
        read = reader.EventAccumulator(str(events)).Reload()
        tags = read.Tags()["scalars"]
        epochs = {scalar.step: scalar.value for scalar in read.Scalars("epoch")} if "epoch" in tags else {}
        found += [
            (tag, epochs[scalar.step], scalar.value)
            for tag in tags
            if tag.startswith("val/")
            for scalar in read.Scalars(tag)
            if scalar.step in epochs
        ]
    return found


def draw_epochs(courses: Mapping[str, Course], titles: Mapping[str, str], name: str) -> Any:
    """A line for each unit, from dark (first) to light (last), and a dashed one for the vote.

    Args:
        courses: What `read_log` has found.
        titles: Of the units, in order, by their keys.
        name: Of the figure; that of shares is drawn in percent.
    """
    figure = new_figure(6.5, 3.8)
    axes = figure.subplots()
    times = 100 if name.endswith("acc") else 1
    units = [key for key in titles if key in courses]
    colours = importlib.import_module("matplotlib").colormaps["viridis"]
    lines = {key: {"color": colours(0.9 * k / max(1, len(units) - 1))} for k, key in enumerate(units)}
    named = {units[k] for k in shown_units(len(units))} if len(units) > NAMED else {*units}
    for key, style in {**lines, "": {"color": "black", "linestyle": "--"}}.items():
        course = courses.get(key, {})
        values = [times * course[epoch] for epoch in sorted(course)]
        label = titles[key] if key in named else "_" if key else "vote"
        axes.plot(sorted(course), values, marker=".", label=label, **style)
    axes.set(xlabel="epoch", ylabel=f"validation {'accuracy, %' if name == 'acc' else name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if units:
        figure.legend(loc="outside right center", frameon=False, fontsize="x-small")
    return figure
