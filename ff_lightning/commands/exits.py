"""``ff-lightning exits``: what early exit saves, and what it costs."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ff_lightning.commands.ckpt_path import checkpoint_at, data_of
from ff_lightning.drawing.figure import new_figure, save
from ff_lightning.inference import load
from ff_lightning.local.exits import RULES, EarlyExit, depth_answers, multiply_adds
from ff_lightning.local.net import LocalNet
from ff_lightning.util.extras import needs

TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of the samples that leave at each block: the points of a curve."""


class Point(NamedTuple):
    """A way to answer, with what it costs."""

    name: str
    error: float
    """Share of wrong answers."""
    cost: float
    """Multiplications with additions for a sample, as a share of those of all blocks."""


def main(settings: Namespace) -> None:
    """Print the error and the cost of each depth and of each rule, and draw them.

    Args:
        settings: See `ff_lightning.commands.parsers.exits`.

    Raises:
        ValueError: If the checkpoint names no data, or if its network cannot be left early.
    """
    path = checkpoint_at(settings.ckpt_path)
    if settings.out:
        needs("matplotlib", "plot")
    net: Any = load(path).network
    net = getattr(net, "net", net)
    data = data_of(path, settings.root)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    points = curve(net, data.val_dataloader(), data.test_dataloader(), settings.rules)
    table = Table(title="test samples")
    for column in ("answer", "error %", "multiply-adds %"):
        table.add_column(column, justify="left" if column == "answer" else "right")
    for point in points:
        table.add_row(point.name, f"{100 * point.error:.2f}", f"{100 * point.cost:.1f}")
    Console().print(table)
    if settings.out:
        _draw(points, settings.out)
        print(settings.out)


def curve(net: LocalNet, val: Iterable[Any], test: Iterable[Any], rules: Sequence[str]) -> list[Point]:
    """Each depth, and then each rule at its targets.

    Args:
        net: Trained, in eval mode.
        val: Batches that set the thresholds.
        test: Batches (inputs, classes) that are judged.
        rules: Names of `RULES`.
    """
    points: list[Point] = []
    exiting = [EarlyExit(net, rule, target) for rule in rules for target in (TARGETS if rule != "mean_std" else [None])]
    calibration = depth_answers(net, val)
    for one in exiting:
        one.calibrate_by(calibration)
    samples = list(test)
    if any(y.ndim != 1 or y.is_floating_point() for _, y in samples):
        raise ValueError("exits counts wrong classes: it needs a model of the task Classification")
    costs = torch.tensor(multiply_adds(net, samples[0][0][:8]))
    wrong = torch.zeros(len(costs))
    with torch.no_grad():
        for x, y in samples:
            goodness = net.goodness(x)
            answers = torch.stack([net.decide(goodness[: k + 1]).argmax(1) for k in range(len(goodness))])
            wrong += (answers != y).sum(1)
    number = sum(len(y) for _, y in samples)
    for k, cost in enumerate(costs / costs[-1]):
        points.append(Point(f"blocks 0 to {k}", wrong[k].item() / number, cost.item()))
    for one in exiting:
        found = [(*one.answers_and_exits(x), y) for x, y in samples]
        error = sum((scores.argmax(1) != y).sum().item() for scores, _, y in found) / number
        exits: Tensor = torch.cat([of_batch for _, of_batch, _ in found])
        name = str(one.rule) if one.rule == "mean_std" else f"{one.rule}, target {one.target:g}"
        points.append(Point(name, error, (costs[exits].mean() / costs[-1]).item()))
    return points


def _draw(points: Sequence[Point], path: Path) -> None:
    figure = new_figure(6.4, 4.8)
    axes = figure.subplots()
    for kind in ("blocks", *RULES):
        own = [point for point in points if point.name.startswith(kind)]
        axes.plot([100 * p.cost for p in own], [100 * p.error for p in own], "o-", label=kind)
    axes.set_xlabel("multiply-adds, % of all blocks")
    axes.set_ylabel("test error, %")
    axes.legend()
    save(figure, path)
