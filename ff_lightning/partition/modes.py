"""What a network does in training and what in evaluation, as far as its own code differs."""

from collections.abc import Iterable, Sequence
from itertools import product

from torch import fx

from ff_lightning.partition.ops import Reader
from ff_lightning.partition.trace import function_name


def mode_dependent_calls(
    training: fx.Graph, evaluation: fx.Graph, wanted: Sequence[fx.Node], reader: Reader
) -> frozenset[str]:
    """The calls of modules that do something else in training than in evaluation on the way to some values."""
    ours = _way_to(evaluation, wanted, reader)
    differing = _differing(ours, _own_operations(training.nodes))
    for twins in product(*(_twins(training, node) for node in wanted)):
        if differing:
            differing = min(differing, _differing(ours, _way_to(training, twins, reader)), key=len)
    return differing


def _way_to(graph: fx.Graph, wanted: Sequence[fx.Node], reader: Reader) -> dict[str, list[str]]:
    """The operations that lead to some values, by the call of the module that they stand in."""
    nodes = list(graph.nodes)
    end = max(map(nodes.index, wanted)) + 1
    return _own_operations(made_from(nodes[:end], wanted, reader, with_state=False))


def _twins(graph: fx.Graph, wanted: fx.Node) -> list[fx.Node]:
    """The operations of the other graph that may be the same one: alike, in the same call of a module."""

    def kind(node: fx.Node) -> tuple[str, str, object]:
        return _innermost(node), node.op, node.target

    return [node for node in reversed(graph.nodes) if kind(node) == kind(wanted)]


def _differing(ours: dict[str, list[str]], theirs: dict[str, list[str]]) -> frozenset[str]:
    return frozenset(call for call in {*ours, *theirs} if ours.get(call) != theirs.get(call))


def made_from(
    nodes: Iterable[fx.Node], results: Iterable[fx.Node], reader: Reader, with_state: bool = True
) -> list[fx.Node]:
    """The operations among the nodes that make some values, with assertions and changes in place, in order.

    Args:
        nodes: In the order in which they run.
        results: The values.
        reader: Of the network.
        with_state: Whether to count changes of buffers too that do not lead to the values, such as a counter.
    """
    found = {*results}
    needed = []
    for node in reversed(list(nodes)):
        changed = reader.changed_by(node)
        of_a_module = with_state and changed is not None and changed.op == "get_attr"
        if node in found or changed in found or of_a_module or function_name(node) == "_assert":
            found.update((node, *node.all_input_nodes))
            needed.append(node)
    return needed[::-1]


def _stack(node: fx.Node) -> list[str]:
    """The calls of modules in whose forward an operation stands, outermost first."""
    stack = list(node.meta.get("nn_module_stack", {}))
    return stack[:-1] if node.op == "call_module" else stack


def _innermost(node: fx.Node) -> str:
    """The call of the module in whose own forward an operation stands; of the model itself: nothing."""
    return next(reversed(_stack(node)), "")


def _own_operations(nodes: Iterable[fx.Node]) -> dict[str, list[str]]:
    """What each call of a module does itself: its operations in order, and which modules it calls."""
    own: dict[str, list[str]] = {"": []}
    places: dict[fx.Node, tuple[str, int]] = {}
    for node in nodes:
        if node.op in ("get_attr", "output"):
            continue
        caller = ""
        for call in _stack(node):
            if call not in own:
                own[call] = []
                own[caller].append(f"call of {call}")
            caller = call

        def written(arg: fx.Node, caller: str = caller) -> str:
            where, place = places.get(arg, ("", -1))
            return f"#{place}" if where == caller else "a node"

        args = fx.node.map_arg((node.args, node.kwargs), written)
        places[node] = (caller, len(own[caller]))
        own[caller].append(f"{node.op} {node.target} {args}")
    return own
