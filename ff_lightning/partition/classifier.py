"""Where the features of a network end and its classifier begins."""

from collections.abc import Sequence

from torch import fx

from ff_lightning.partition.flow import Flow
from ff_lightning.partition.ops import Op, is_activation, is_adaptive_pool, is_sigmoid

NAMES = ("classifier", "fc", "head", "heads")


def end_of_features(flow: Flow) -> tuple[int, fx.Node]:
    """How many operations belong to the features, and which value is the feature map.

    The classifier is left out, with the pooling and flattening before it. One tensor enters what is left out.
    """
    ops, layers = flow.ops, [i for i, op in enumerate(flow.ops) if op.weights]
    start = _start_of_classifier(flow, layers)
    end = next((cut for cut in range(start, layers[0], -1) if flow.is_feature_map(cut)), 0)
    if any(end <= i < start for i in layers):  # several tensors enter the classifier: it is not left out
        end = len(ops)
    for tail in range(end - 1, layers[0], -1):
        if ops[tail].state:
            break
        before, after = flow.shape(ops[tail].inputs[0]) or (), ops[tail].shape or ()
        flattens = len(before) > 2 and len(after) == 2
        pools = len(before) == len(after) > 2 and max(before[2:]) > 1 == max(after[2:])
        if (flattens or pools or is_adaptive_pool(flow.model, ops[tail])) and flow.is_feature_map(tail):
            end = tail
    return end, flow.result if end == len(ops) else flow.crossing(end)[0]


def has_classifier(flow: Flow) -> bool:
    """Whether the result of the network is what a classifier returns."""
    return _start_of_classifier(flow, [i for i, op in enumerate(flow.ops) if op.weights]) < len(flow.ops)


def _start_of_classifier(flow: Flow, layers: Sequence[int]) -> int:
    """Where the classifier begins: the outermost module that holds the last linear layers, and no others.

    The last layers are those from which a path leads to the result without any other layer. They are a classifier if
    they are linear, give (B, K) logits, and none depends on another. One that does is the end of a residual connection,
    whose shortcut brings features to the result, too.
    """
    ops, none = flow.ops, len(flow.ops)
    last, behind = _last_layers(flow)
    if not last or len(layers) == len(last) or len(_shape_of_result(flow)) != 2 or _depend(flow, last):
        return none
    dense = all(w.ndim == 2 for i in last for w in ops[i].weights)
    named = all(ops[i].path[:1] and ops[i].path[0] in NAMES for i in last)
    activations = [op for op in behind if is_activation(flow.model, op)]
    hidden = dense and any(not (named and is_sigmoid(flow.model, op)) for op in activations)
    if hidden or not (dense or named):
        return none
    for call in ops[last[0]].calls:
        inside = [i for i in layers if call in ops[i].calls]
        only_dense = all(w.ndim == 2 for i in inside for w in ops[i].weights)
        in_order = inside == last or all(len(flow.crossing(i)) == 1 for i in inside)
        if inside[0] != layers[0] and inside[-1] == layers[-1] and (only_dense or named) and in_order:
            return next(i for i, op in enumerate(ops) if call in op.calls)
    return last[0]


def _shape_of_result(flow: Flow) -> tuple[int, ...]:
    return flow.ops[flow.index[flow.result]].shape or ()


def _last_layers(flow: Flow) -> tuple[list[int], list[Op]]:
    """The layers from which a path leads to the result without any other layer, and the operations behind them.

    No layers at all if the input itself reaches the result.
    """
    last, behind, todo = set[int](), set[int](), [flow.result]
    while todo:
        node = todo.pop()
        if node is flow.input:
            return [], []
        i = flow.index.get(node)
        if i is None:  # a further input, such as a mask
            continue
        if flow.ops[i].weights:
            last.add(i)
        elif i not in behind and flow.ops[i].passes_gradients:
            behind.add(i)
            todo.extend(flow.ops[i].inputs)
    return sorted(last), [flow.ops[i] for i in behind]


def _depend(flow: Flow, last: Sequence[int]) -> bool:
    """Whether one of these layers works on what another one made."""
    reached: set[fx.Node] = set()
    for op in flow.ops[last[0] :]:
        from_last = any(node in reached for node in op.inputs)
        if from_last and flow.index[op.node] in last:
            return True
        if from_last or op.node is flow.ops[last[0]].node or flow.index[op.node] in last:
            reached.add(op.node)
    return False
