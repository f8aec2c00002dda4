"""What a network computes, as a list of operations: the raw material of every partition.

`read_features` traces a model with `torch.fx`, runs one example through it and returns the operations of its
feature part in the order in which they run. The classifier, and the pooling and flattening before it, are left out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ff_lightning.partition.classifier import end_of_features, has_classifier
from ff_lightning.partition.flow import Flow
from ff_lightning.partition.inputs import Example, Inputs
from ff_lightning.partition.modes import made_from, mode_dependent_calls
from ff_lightning.partition.ops import Op, Reader
from ff_lightning.partition.shapes import default_example, read_values
from ff_lightning.partition.trace import Call, Trace, trace
from ff_lightning.partition.untouched import Snapshot, same_random, untouched


@dataclass(frozen=True)
class Features(Flow):
    """The feature part of a model: its operations in order; their result is the feature map.

    Attributes:
        left_out: The operations behind the features that lead to what the network returns: pooling and classifier.
        calls: The calls of modules that have children, by the unique name that `Op.calls` uses.
        mode_dependent: The calls whose own operations are others in training than in evaluation.
        called: What the network is called with.
        of_input: All values that depend on the inputs, also those that the features do not need.
        closed: The modules that cannot be traced.
        facts: What the code only reads off weights and buffers: their device, dtype or size.
    """

    called: Inputs
    left_out: tuple[Op, ...]
    calls: dict[str, Call]
    mode_dependent: frozenset[str]
    of_input: frozenset[fx.Node]
    closed: frozenset[str]
    facts: dict[fx.Node, Any]


def read_features(model: nn.Module, example: Example | None = None) -> Features:
    """Trace `model` and list the operations of its feature part; the model comes back as it was.

    Args:
        model: The network.
        example: An input batch: a tensor, a tuple or a dict. None: a shape that fits the first layer is tried.

    Returns:
        The operations in order, without the classifier and without the pooling and flattening before it.

    Raises:
        ValueError: If the model cannot be traced, does not take the example, or has no layer with weights.
    """
    with untouched(model) as snapshot:
        return trace_features(model, example, snapshot)


def trace_features(model: nn.Module, example: Example | None, snapshot: Snapshot) -> Features:
    """As `read_features`, of a model that is put back by the caller, when the blocks are built."""
    called = Inputs.of(model, torch.zeros(1, 1) if example is None else example)
    training, evaluation = _traces(model, called, snapshot)
    graph = evaluation.graph
    if example is None:
        example = default_example(model, graph)
        called = Inputs.of(model, example)
    examples = called.values(example)
    reader = Reader(model, graph, read_values(model, graph, examples))
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    flows = []
    for result in _results(graph, reader):
        nodes = made_from(graph.nodes, [result], reader)
        nodes = [node for node in nodes if node in reader.of_input and node not in inputs]
        flows.append(Flow(model, tuple(map(reader.read, nodes)), inputs, result, examples))
    flows = [flow for flow in flows if any(op.weights for op in flow.ops)]
    if not flows:
        raise ValueError(f"{type(model).__name__} has no layer with weights: there is nothing to train")
    flow = next((flow for flow in flows if has_classifier(flow)), flows[-1])
    end, feature_map = end_of_features(flow)
    if not flow.is_map(feature_map):
        raise ValueError(
            f"{type(model).__name__} returns a tensor of shape {flow.shape(feature_map)} for a batch of "
            f"{len(examples[0])}: local training needs a network that returns features or scores for each sample"
        )
    kept = {*made_from([op.node for op in flow.ops[:end]], [feature_map], reader)}
    ops = tuple(op for op in flow.ops[:end] if op.node in kept)
    wanted = [*dict.fromkeys((feature_map, ops[-1].node))]
    mode_dependent = mode_dependent_calls(training.graph, graph, wanted, reader)
    left_out, calls, of_input = flow.ops[end:], evaluation.calls, frozenset(reader.of_input)
    facts = {node: fact for node, fact in reader.values.facts.items() if node not in of_input}
    return Features(
        model,
        ops,
        inputs,
        feature_map,
        examples,
        called,
        left_out,
        calls,
        mode_dependent,
        of_input,
        evaluation.closed,
        facts,
    )


def _traces(model: nn.Module, called: Inputs, snapshot: Snapshot) -> tuple[Trace, Trace]:
    """The network in training and in evaluation, with the same modules as one operation each.

    What tracing has left in the network is put back; only the constants are still there that the second graph uses.
    """
    closed: frozenset[str] = frozenset()
    buffers_as_values = True
    while True:
        traces = []
        for mode in (True, False):
            model.train(mode)
            with same_random(model):
                traces.append(trace(model, called, closed, buffers_as_values))
            closed, buffers_as_values = traces[-1].closed, traces[-1].buffers_as_values
            names = {str(node.target) for node in traces[-1].graph.nodes if node.op == "get_attr"}
            constants = {key: model.__dict__[key] for key in names & snapshot.added()}
            snapshot.restore_state()
        if (traces[0].closed, traces[0].buffers_as_values) == (closed, buffers_as_values):
            snapshot.constants = constants
            snapshot.restore_state()
            return traces[0], traces[1]


def _results(graph: fx.Graph, reader: Reader) -> list[fx.Node]:
    """The tensors that the network returns, in the order in which it computes them."""
    returned = {*next(node for node in graph.nodes if node.op == "output").all_input_nodes}
    results = [node for node in graph.nodes if node in returned and node in reader.values.floating & reader.of_input]
    if not results:
        raise ValueError(f"{type(reader.model).__name__} returns no tensor that depends on its input")
    return results
