"""Network -> ordered blocks: traced once, cut where the granularity says, run by the model's own modules."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ff_lightning.arguments import check_granularity, check_network, shown
from ff_lightning.partition.block import Block, State, build_blocks
from ff_lightning.partition.cuts import (
    balanced_cuts,
    block_cuts,
    keep_shared_together,
    layer_cuts,
    named_cuts,
    stage_cuts,
)
from ff_lightning.partition.features import Features, read_features

__all__ = ["Block", "Granularity", "State", "partition"]

Granularity = Literal["layer", "block", "stage"] | int | Sequence[str]

_RULES = {"layer": layer_cuts, "block": block_cuts, "stage": stage_cuts}


def partition(model: nn.Module, granularity: Granularity = "block", example: Tensor | None = None) -> list[Block]:
    """Cut the feature part of a network into the units of local training.

    The classifier is left out, with the pooling and flattening before it. The blocks share the model's own modules
    and parameters: nothing is copied, so training the blocks trains the model.

    Args:
        model: Any network with one image batch as input that `torch.fx` can trace. Modules inside it that cannot be
            traced stay in one block.
        granularity: ``"layer"``: a unit for each convolution, linear or attention layer with its norm and
            activation, also inside residual blocks, and for each squeeze-excite gate; ``"block"``: a unit for each
            residual, inverted-residual or transformer block, and for each layer outside of them, in a plain network
            for each run of layers at one resolution; ``"stage"``: a new unit where the resolution changes; a number:
            so many units that keep about equally much for backward, made of whole blocks where there are enough of
            them; a list of module names: a cut after each of them.
        example: An input batch (B, C, H, W), one image is enough. None: a usual shape is tried.

    Returns:
        The blocks in order. Each takes what the one before it returned; the last returns the feature map, equal bit
        by bit to what the model itself computes at that place.

    Raises:
        ValueError: If the granularity or a module name is not known, a unit would have no weights, the model cannot
            be traced, or the example does not pass through it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = model(torch.zeros(1, 3, 8, 8))
        >>> [block.name for block in partition(model, "layer", torch.zeros(1, 3, 8, 8))]
        ['0', '2']
    """
    check_network("model", model)
    check_granularity(granularity)
    if example is not None and not isinstance(example, Tensor):
        raise ValueError(f"example={shown(example)}: must be an input batch, a tensor (B, C, H, W), or None")
    features = read_features(model, example)
    if isinstance(granularity, str):
        cuts = keep_shared_together(features, _RULES[granularity](features))
    elif isinstance(granularity, Sequence):
        cuts = keep_shared_together(features, named_cuts(features, granularity))
    else:
        cuts = _balanced(features, int(granularity))
    return build_blocks(features, cuts)


def _balanced(features: Features, count: int) -> list[int]:
    for rule in (block_cuts, layer_cuts):
        cuts = keep_shared_together(features, rule(features))
        if 1 <= count <= len(cuts) + 1:
            costs = [block.saved_bytes for block in build_blocks(features, cuts)]
            return balanced_cuts(cuts, costs, count)
    raise ValueError(f"granularity={count}: {type(features.model).__name__} can be cut into 1 to {len(cuts) + 1} units")
