"""Where a network may be cut, and where each granularity cuts it.

A cut `p` lies before operation number `p`. Anchors are the runs of operations that must stay together, one for each
unit: a layer with weights, a gate (squeeze-excite), a residual block. Between two anchors the cut prefers, in this
    order: the shallowest module nesting (a norm stays with the convolution of its own module), the fewest crossing
    tensors (a norm behind a shortcut goes with what follows), the latest place (an activation or a pooling stays with
    the layer before it). A cut is only made where a crossing tensor depends on all layers of the unit before it, so
    that a loss on it trains them all: parallel branches without one stay together.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

from torch import fx, nn

from ff_lightning.partition.features import Features
from ff_lightning.partition.ops import Op, is_embedding
from ff_lightning.partition.trace import function_name
from ff_lightning.util.suggest import unknown

Span = tuple[int, int]  # operations start ... end - 1


def layer_cuts(features: Features) -> list[int]:
    """A unit for each convolution, linear or attention layer, with its norm and activation, and for each gate."""
    gates = _gates(features)
    inside_gate = {cut for start, end in gates for cut in range(start + 1, end)}
    anchors = [*gates, *_outside(features, gates)]
    allowed = set(range(len(features.ops))) - inside_gate
    return _between(features, sorted(anchors), allowed)


def block_cuts(features: Features) -> list[int]:
    """A unit for each residual block, and for each layer outside of them; one tensor crosses every cut.

    In a plain network, one of single layers: a unit for each run of them at one resolution, if that changes at all.
    """
    blocks = _residual_blocks(features)
    modules = dict(features.model.named_modules())
    targets = [str(op.node.target) for op in features.ops if op.weights and op.node.op == "call_module"]
    if not blocks and not any(list(modules[target].children()) for target in targets):
        return _resolution_cuts(features)
    anchors = [*blocks, *_outside(features, blocks)]
    inside = {cut for start, end in blocks for cut in range(start + 1, end)}
    return _between(features, sorted(anchors), set(_narrow(features)) - inside)


def stage_cuts(features: Features) -> list[int]:
    """The block cuts at which the resolution of the maps changes."""
    cuts = block_cuts(features)
    return _changes(cuts, [features.area(node) for node in _maps(features, cuts)])


def _maps(features: Features, cuts: Sequence[int]) -> list[fx.Node]:
    """The tensors that cross narrow cuts, and the feature map."""
    return [*(features.crossing(cut)[0] for cut in cuts), features.result]


def _resolution_cuts(features: Features) -> list[int]:
    """The layer cuts of a plain network at which the resolution changes; all of them if it never does.

    What counts is the resolution at which a layer works: a pooling behind it belongs to it.
    """
    cuts = sorted(set(layer_cuts(features)) & set(_narrow(features)))
    layers = _layers(features.ops)
    last_layers = [layers[bisect_left(layers, end) - 1] for end in [*cuts, len(features.ops)]]
    return _changes(cuts, [features.area(features.ops[i].node) for i in last_layers]) or cuts


def _changes(cuts: Sequence[int], areas: Sequence[int]) -> list[int]:
    """The cuts between two units of different areas; one more area than cuts."""
    return [cut for cut, (before, after) in zip(cuts, pairwise(areas), strict=True) if before != after]


def balanced_cuts(features: Features, cuts: Sequence[int], costs: Sequence[int], count: int) -> list[int]:
    """The cuts that leave `count` units such that the largest cost of a unit is as small as possible.

    Args:
        features: What is cut.
        cuts: The cuts to choose from.
        costs: What the units between all of these cuts cost, one more than cuts.
        count: Number of units wanted.

    Raises:
        ValueError: If no choice leaves this many units that are each trained as a whole.
    """
    borders = [0, *cuts, len(features.ops)]
    narrow = [features.is_feature_map(border) for border in borders]

    def allowed(start: int, end: int) -> bool:
        return narrow[end] or start == end - 1 or features.main(borders[start], borders[end]) is not None

    ends = balanced_ends(costs, count, allowed)
    if ends is None:
        raise ValueError(f"granularity={count}: no {count} units of {type(features.model).__name__} learn as a whole")
    return [cuts[end - 1] for end in ends[:-1]]


def balanced_ends(
    costs: Sequence[int], count: int, allowed: Callable[[int, int], bool] = lambda start, end: True
) -> list[int] | None:
    """The ends of `count` runs of costs such that the largest sum of a run is as small as possible.

    Args:
        costs: One or more, in order.
        count: Number of runs wanted.
        allowed: Whether the costs from one number up to another one can be a run.

    Returns:
        For each run the number behind its last cost; None if there is no choice.
    """
    sums = [0, *accumulate(costs)]
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0, [])}  # (units, costs taken) -> (worst, ends)
    for units in range(1, count + 1):
        for end in range(units, len(costs) - count + units + 1):
            ways = [
                (max(worst, sums[end] - sums[start]), [*ends, end])
                for start in range(units - 1, end)
                if (previous := best.get((units - 1, start))) is not None and allowed(start, end)
                for worst, ends in [previous]
            ]
            if ways:
                best[units, end] = min(ways)
    return best[count, len(costs)][1] if (count, len(costs)) in best else None


def named_cuts(features: Features, names: Sequence[str]) -> list[int]:
    """A cut after each of the named modules.

    Raises:
        ValueError: If a name is not in the model or not in its feature part, or if a unit would be empty.
    """
    known = [name for name, _ in features.model.named_modules() if name]
    if not names:
        raise ValueError("granularity=[]: give the names of one or more modules to cut after")
    cuts: list[int] = []
    for name in names:
        if name not in known:
            raise ValueError(
                unknown("granularity", name, known, f"names of modules of the network, such as {known[:8]}")
            )
        inside = [i for i, op in enumerate(features.ops) if name in op.path]
        if not inside:
            raise ValueError(f"granularity: module {name!r} takes no part in the features of the network")
        start = cuts[-1] if cuts else 0
        places = range(max(inside[-1], start) + 1, len(features.ops))
        cuts.append(next((cut for cut in places if features.main(start, cut) is not None), len(features.ops)))
    for name, start, end in zip(names, [0, *cuts], cuts, strict=False):
        if not _layers(features.ops[start:end]):
            raise ValueError(f"granularity={list(names)}: leave out {name!r}, the unit before its cut has no layer")
    if not _layers(features.ops[cuts[-1] :]):
        raise ValueError(f"granularity={list(names)}: leave out {names[-1]!r}, the unit after its cut has no layer")
    return cuts


def trainable(features: Features, cuts: Iterable[int]) -> list[int]:
    """The cuts that leave no layer untrained, and each parameter in one unit.

    Left out are cuts between two uses of the same parameters, under whatever names, and cuts behind a unit without an
    output that depends on all of its layers; such a unit is joined with the next one.
    """
    first: dict[int, int] = {}
    shared = [0] * (len(features.ops) + 1)  # +1 where a span begins that is not to be cut, -1 where it ends
    for i, op in enumerate(features.ops):
        for parameter in (state for state in op.state if isinstance(state, nn.Parameter)):
            start = first.setdefault(id(parameter), i)
            shared[start + 1] += 1
            shared[i + 1] -= 1
    spans = list(accumulate(shared))
    kept = [0]
    for cut in cuts:
        if spans[cut] == 0 and features.main(kept[-1], cut) is not None:
            kept.append(cut)
    return kept[1:]


def _layers(ops: Sequence[Op]) -> list[int]:
    return [i for i, op in enumerate(ops) if op.weights]


def _outside(features: Features, spans: Sequence[Span]) -> list[Span]:
    """The layers that lie in none of the spans; embeddings in a row (of tokens, of their places) are one."""
    covered = {i for start, end in spans for i in range(start, end)}
    layers: list[Span] = []
    for i in _layers(features.ops):
        if i in covered:
            continue
        joins = bool(layers) and all(is_embedding(features.model, features.ops[j]) for j in (layers[-1][1] - 1, i))
        layers.append((layers.pop()[0] if joins else i, i + 1))
    return layers


def _narrow(features: Features) -> list[int]:
    """The cuts that a single tensor crosses."""
    return [cut for cut in range(1, len(features.ops)) if features.is_feature_map(cut)]


def _residual_blocks(features: Features) -> list[Span]:
    """The spans of the residual blocks.

    A residual connection is a stretch of operations where at least two tensors run in parallel throughout. Its block is
    the innermost module that holds all of it; every other module of that class is a block too, such as an inverted
    residual without a shortcut. A connection made in the network's own forward is a block by itself.
    """
    ops = features.ops
    modules = dict(features.model.named_modules())
    wholes = set.intersection(*(set(op.path) for op in ops if op.weights))  # the network, not a block of it
    borders = [0, *_narrow(features), len(ops)]
    spans: list[Span] = []
    classes: set[type[nn.Module]] = set()
    for start, end in pairwise(borders):
        if end - start == 1 or not any(op.weights for op in ops[start:end]):
            continue
        spans.append((start, end))
        holder = [name for name in _common(ops[start:end]) if name not in wholes]
        if holder and not isinstance(modules[holder[-1]], nn.Sequential):
            classes.add(type(modules[holder[-1]]))
    calls: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        for call, name in zip(op.calls, op.path, strict=True):
            if type(modules[name]) in classes and name not in wholes:
                calls.setdefault(call, []).append(i)
    spans.extend((inside[0], inside[-1] + 1) for inside in calls.values())
    return _merge(span for span in spans if any(op.weights for op in ops[span[0] : span[1]]))


def _common(ops: Sequence[Op]) -> list[str]:
    """Names of the modules that all of these operations run in, outermost first."""
    names = []
    for level in zip(*(op.path for op in ops), strict=False):
        if len(set(level)) > 1:
            break
        names.append(level[0])
    return names


def _gates(features: Features) -> list[Span]:
    """The spans in which a map is multiplied by a function of its own pooled values (squeeze-excite).

    They are not cut: a cut inside would train a pooled vector, not a map.
    """
    spans = []
    for i, op in enumerate(features.ops):
        factors = [features.index[node] for node in op.inputs if node in features.index]
        if function_name(op.node).strip("_") not in ("mul", "imul", "multiply") or len(factors) != 2:
            continue
        shapes = [features.ops[f].shape for f in factors]
        if shapes[0] is None or shapes[1] is None or shapes[0] == shapes[1]:
            continue
        whole, gate = sorted(factors, key=lambda f: math.prod(features.ops[f].shape or ()), reverse=True)
        branch, todo = set(), [gate]
        while todo:
            j = todo.pop()
            if j > whole and j not in branch:
                branch.add(j)
                todo.extend(features.index[node] for node in features.ops[j].inputs if node in features.index)
        if any(features.ops[j].weights for j in branch):
            spans.append((min(branch), i + 1))
    return _merge(spans)


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Overlapping spans joined."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _between(features: Features, anchors: Sequence[Span], allowed: set[int]) -> list[int]:
    """One cut between each two anchors: see the top of this file for the choice."""

    def preference(cut: int) -> tuple[int, int, int]:
        return len(_common(features.ops[cut - 1 : cut + 1])), len(features.crossing(cut)), -cut

    cuts = [0]
    gap: list[int] = []  # the places between two anchors, from which the last cut was chosen
    for (_, end), (start, _) in pairwise(anchors):
        places = sorted((cut for cut in range(end, start + 1) if cut in allowed), key=preference)
        ways = [(cuts[-1], place) for place in places]
        # else the unit before may take what else would stand in the way, such as the norm of a parallel branch
        ways += [(other, place) for other in gap if features.main(cuts[-2], other) is not None for place in places]
        way = next((way for way in ways if features.main(*way) is not None), None)
        if way is not None:
            cuts[-1:] = way
            gap = places
    return cuts[1:]
