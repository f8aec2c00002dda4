"""What a network does in training and what in evaluation, as far as its own code differs."""

from collections.abc import Iterable, Sequence

from torch import fx

from ff_lightning.partition.ops import Reader
from ff_lightning.partition.trace import function_name


def two_faced_calls(
    training: fx.Graph, evaluation: fx.Graph, wanted: Sequence[fx.Node], reader: Reader
) -> frozenset[str]:
    """The calls of modules that do something else in training than in evaluation on the way to some values."""
    twins = [_node_at(training, _place_in_call(evaluation, node)) for node in wanted]
    own = []
    for graph, results in ((training, [node for node in twins if node is not None]), (evaluation, wanted)):
        nodes = list(graph.nodes)
        end = max(map(nodes.index, results)) + 1 if len(results) == len(wanted) else len(nodes)
        own.append(_own_operations(made_from(nodes[:end], results or nodes, reader)))
    return frozenset(call for call in {*own[0], *own[1]} if own[0].get(call) != own[1].get(call))


def made_from(nodes: Iterable[fx.Node], results: Iterable[fx.Node], reader: Reader) -> list[fx.Node]:
    """The operations among the nodes that make some values, with assertions and changes in place, in order."""
    found = {*results}
    needed = []
    for node in reversed(list(nodes)):
        changed = reader.changed_by(node)
        of_a_module = changed is not None and changed.op == "get_attr"
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


def _place_in_call(graph: fx.Graph, wanted: fx.Node) -> tuple[str, int]:
    """The call in which an operation stands, and the how many of its own operations it is."""
    caller = _innermost(wanted)
    own = [node for node in graph.nodes if node.op != "get_attr" and _innermost(node) == caller]
    return caller, own.index(wanted)


def _node_at(graph: fx.Graph, place: tuple[str, int]) -> fx.Node | None:
    """The operation at such a place, if there is one."""
    own = [node for node in graph.nodes if node.op != "get_attr" and _innermost(node) == place[0]]
    return own[place[1]] if place[1] < len(own) else None
