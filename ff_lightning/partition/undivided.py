"""Which modules a block calls as they are, and whether the others can be taken apart."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import fx

from ff_lightning.partition.features import Features
from ff_lightning.partition.trace import Call


class CannotDivideError(ValueError):
    """A border runs through a module that does not allow it."""


def undivided_calls(features: Features, borders: Sequence[int]) -> dict[str, Call]:
    """The module calls whose operations all lie in one block and that can be made again as one operation.

    Raises:
        CannotDivideError: If a module that is taken apart does something else in training, or switches autocast.
    """
    units: dict[str, set[int]] = defaultdict(set)
    inside: dict[str, set[fx.Node]] = defaultdict(set)
    for unit, (start, end) in enumerate(pairwise(borders)):
        for op in features.ops[start:end]:
            for call in op.calls:
                units[call].add(unit)
                inside[call].add(op.node)
    for op in features.left_out:
        for call in op.calls:
            units[call].add(-1)
    entering: dict[str, set[fx.Node]] = defaultdict(set)
    leaving: dict[str, set[fx.Node]] = defaultdict(set)
    for op in features.ops:
        for node in op.inputs:
            made_in = features.ops[features.index[node]].calls if node in features.index else ()
            for call in set(op.calls) ^ set(made_in):
                (entering if call in op.calls else leaving)[call].add(node)
    for call in features.ops[features.index[features.result]].calls:
        leaving[call].add(features.result)
    given = {name: nodes_in((call.args, call.kwargs)) for name, call in features.calls.items() if name in inside}
    for name, nodes in given.items():  # what a module is given leaves the others, though it may not use it
        around = features.ops[min(features.index[node] for node in inside[name])].calls
        for node in nodes:
            for call in set(features.ops[features.index[node]].calls if node in features.index else ()) - set(around):
                leaving[call].add(node)
    whole = {}
    for name, nodes in given.items():
        traced = features.calls[name]
        possible = len(units[name]) == 1 and traced.repeatable and leaving[name] <= set(nodes_in(traced.result))
        if possible and entering[name] <= set(nodes) and _known(features, nodes, inside[name], borders):
            whole[name] = traced
    _check_divided(features, whole)
    return whole


def _known(features: Features, given: Sequence[fx.Node], inside: set[fx.Node], borders: Sequence[int]) -> bool:
    """Whether all that is given to a call is there where it is made; what no operation uses is not carried along."""
    first = min(features.index[node] for node in inside)
    start = borders[bisect_right(borders, first) - 1]
    return all(
        node in features.alive(start) or start <= features.index.get(node, -1) < first
        for node in given
        if node in features.of_input
    )


def _check_divided(features: Features, whole: dict[str, Call]) -> None:
    for op in features.ops:
        outermost = next((call for call in op.calls if call in whole), None)
        opened = ["", *(call for call in op.calls if call in features.calls)]
        opened = opened[: opened.index(outermost)] if outermost else opened
        for call in opened:
            if call in features.mode_dependent:
                raise CannotDivideError(
                    f"{_title(features, call)} does something else in training than in evaluation in its own forward, "
                    "and a border runs through it: use modules there (nn.Dropout instead of F.dropout)"
                )
        if whole[outermost].autocast if outermost else op.node.meta.get("autocast"):
            raise CannotDivideError(
                f"{_title(features, opened[-1])} switches autocast or inference mode in its own forward, and a border "
                "runs through it: switch it inside of a smaller module"
            )


def _title(features: Features, call: str) -> str:
    return repr(features.calls[call].name if call else type(features.model).__name__)


def nodes_in(value: Any) -> list[fx.Node]:
    """The graph nodes in a value."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda node: found.append(node))
    return found
