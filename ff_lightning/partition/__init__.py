"""Network -> ordered blocks: traced once, cut where the granularity says, run by the model's own modules."""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ff_lightning.partition.block import Block, State, build_blocks, take_modes
from ff_lightning.partition.check import check
from ff_lightning.partition.cuts import balanced_cuts, block_cuts, layer_cuts, named_cuts, stage_cuts, trainable
from ff_lightning.partition.features import Features, trace_features
from ff_lightning.partition.hooked import Hooked
from ff_lightning.partition.inputs import Example, Inputs
from ff_lightning.partition.probe import hides_layers
from ff_lightning.partition.shapes import materialise
from ff_lightning.partition.trace import CannotTraceError, unwrapped
from ff_lightning.partition.undivided import CannotDivideError
from ff_lightning.partition.untouched import Snapshot, untouched
from ff_lightning.util.arguments import check_granularity, check_network
from ff_lightning.util.torch_private import uncompiled

__all__ = ["Block", "Example", "Granularity", "Hooked", "Inputs", "State", "cut", "partition"]

Granularity = Literal["layer", "block", "stage"] | int | Sequence[str]

_RULES = {"layer": layer_cuts, "block": block_cuts, "stage": stage_cuts}


class _NoBorderError(CannotTraceError):
    """No border fits between the layers of a traced network: weights of the first and the last one are tied, say."""


def partition(model: nn.Module, granularity: Granularity = "block", example: Example | None = None) -> list[Block]:
    """Cut the feature part of a network into the units of local training.

    The classifier is left out, with the pooling and flattening before it. The blocks share the model's own modules
    and parameters: nothing is copied, so training the blocks trains the model.

    Args:
        model: Any network that `torch.fx` can trace. Modules inside it that cannot be traced stay in one block.
        granularity: ``"layer"``: a unit for each convolution, linear or attention layer with its norm and
            activation, also inside residual blocks, and for each squeeze-excite gate; ``"block"``: a unit for each
            residual, inverted-residual or transformer block, and for each layer outside of them, in a plain network for
            each run of layers at one resolution; ``"stage"``: a new unit where the resolution changes; a number: that
            many units, cut so that the largest memory of any unit is as small as possible, made of whole blocks if
            there are enough; a list of module names: a cut after each of them.
        example: An input batch, one sample is enough: a tensor (``model(x)``), a tuple (``model(*x)``) or a dict of
            tensors by the names of the arguments of `forward` (``model(**x)``). The first one goes from block to block:
            vectors (B, F), signals (B, C, T), images (B, C, H, W), volumes (B, C, D, H, W), tokens (B, T, F) or token
            ids (B, T); in a dict, the first argument of `forward` that is not a mask. None: a usual shape is tried.

    Returns:
        The blocks in order. Each takes what the previous one returned; the first takes the inputs (if there are
        several, a tuple in the order of `ff_lightning.partition.inputs.Inputs.values`). The last returns only the
        feature map, equal bit by bit to that of the model.

    Raises:
        ValueError: If the granularity or a module name is not known, if a unit would have no weights, if the model
            cannot be traced or does not take the example, or if the blocks would compute something else.

    Warns:
        UserWarning: If parameters of the network are in no block, or get no gradient there.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = model(torch.zeros(1, 3, 8, 8))
        >>> [block.name for block in partition(model, "layer", torch.zeros(1, 3, 8, 8))]
        ['0', '2']
    """
    return _traced_blocks(model, granularity, example)


def cut(model: nn.Module, granularity: Granularity, example: Example) -> tuple[list[Block], Hooked | None]:
    """As `partition`, and where tracing does not see the layers of a network, at the outputs of its modules.

    Returns:
        The blocks, and the network that they run in where they do not run by themselves.

    Raises:
        ValueError: As `partition` and `Hooked`.
    """
    try:
        return _traced_blocks(model, granularity, example, see_layers=True), None
    except CannotTraceError as error:
        problem = error
    model = unwrapped(model)
    inputs = Inputs.of(model, example)
    values = inputs.values(example)
    try:
        hooked = Hooked(model, granularity, lambda: inputs.call(model, values))
    except ValueError as error:
        if isinstance(problem, _NoBorderError):
            return _traced_blocks(model, granularity, example), None
        raise ValueError(f"{error} ({problem})") from problem
    return [*hooked.blocks], hooked


def _traced_blocks(
    model: nn.Module, granularity: Granularity, example: Example | None, see_layers: bool = False
) -> list[Block]:
    check_network("model", model)
    check_granularity(granularity)
    model = unwrapped(model)
    materialise(model, example)
    with torch.inference_mode(False), uncompiled(), untouched(model) as snapshot:
        features = trace_features(model, example, snapshot)
        if see_layers and (hiding := hides_layers(model, features.closed)) is not None:
            raise CannotTraceError(f"{hiding!r}, which holds them, cannot be traced")
        if see_layers and hides_layers(model, [""]) is not None and not trainable(features, block_cuts(features)):
            raise _NoBorderError
        try:
            blocks = _checked_blocks(features, granularity, snapshot)
        except CannotDivideError as error:
            raise ValueError(f"{error}, or {_advice(features, snapshot)}") from None
    take_modes(blocks, model)
    return blocks


def _checked_blocks(features: Features, granularity: Granularity, snapshot: Snapshot) -> list[Block]:
    blocks = build_blocks(features, _cuts(features, granularity))
    check(features, blocks, snapshot)
    return blocks


def _cuts(features: Features, granularity: Granularity) -> list[int]:
    if isinstance(granularity, str):
        return trainable(features, _RULES[granularity](features))
    if isinstance(granularity, Sequence):
        return trainable(features, named_cuts(features, granularity))
    return _balanced(features, int(granularity))


def _balanced(features: Features, count: int) -> list[int]:
    for rule in (block_cuts, layer_cuts):
        cuts = trainable(features, rule(features))
        if 1 <= count <= len(cuts) + 1:
            costs = [block.saved_bytes for block in build_blocks(features, cuts)] if count > 1 else []
            return balanced_cuts(features, cuts, costs, count) if count > 1 else []
    raise ValueError(f"granularity={count}: {type(features.model).__name__} can be cut into 1 to {len(cuts) + 1} units")


def _advice(features: Features, snapshot: Snapshot) -> str:
    """Which granularity works where one does not."""
    names: tuple[Granularity, ...] = ("layer", "block", "stage")
    for granularity in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _checked_blocks(features, granularity, snapshot)
        except CannotDivideError:
            continue
        return f"give granularity={granularity!r}, whose borders lie elsewhere"
    return "put what must stay whole into a module of its own: as it is, the network cannot be cut at any granularity"
