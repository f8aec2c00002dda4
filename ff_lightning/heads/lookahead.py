"""Heads that look like the network above their block.

Shapes: B batch, C channels, H x W positions, K classes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ff_lightning.heads.layers import convolution
from ff_lightning.heads.place import Place
from ff_lightning.heads.pooled import PooledHead
from ff_lightning.partition.block import Block, State, main_output
from ff_lightning.partition.hooked import HookedBlock
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_number, check_whole, shown


class LookAhead(nn.Module):
    """Copies of the next blocks of the network, and a pooled head behind them: the block learns what these can use.

    Of the blocks that follow, those that change the shape of the features are copied, the next ones first. The copies
    have weights of their own, drawn anew, and are trained with the block; no gradient crosses a border. Blocks behind
    which fewer of them follow have fewer copies, and the last ones a `PooledHead` alone. What enters a copy passes a
    1x1 convolution where it has other channels. No norm stands between the copies: it would keep one more map.

    The auxiliary networks of Ma et al. take their layers evenly from all that follows; these here take the next ones,
    which need no adapters.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K.
        copies: Their number at most.
        width: Share of the channels of the network that the copies have, above 0 and up to 1.
        kernel_size: Of the layer in the `PooledHead`: 3 for one; see there.
        place: Of the block; `LocalNet` gives it.

    Raises:
        ValueError: If an argument is out of its range, or if there is nothing that could be copied.

    Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks, arXiv 2402.17318.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        copies: int = 2,
        width: float = 1.0,
        kernel_size: int = 1,
        place: Any = None,
    ) -> None:
        super().__init__()
        check_whole("copies", copies)
        check_number("width", width, above=0, most=1)
        if place is None:
            raise ValueError(
                "place=None: LookAhead is made for a block of a network, give its class to LocalNet or SFF"
            )
        _check_place(place)
        shape: tuple[int, ...] = place.shape
        self.copies = nn.ModuleList()
        for segment in _changing(place)[:copies]:
            self.copies.append(_Copy(shape[0], segment, width))
            shape = (_scaled(segment.out_shape[0], width), *segment.out_shape[1:])
        self.pooled = PooledHead(shape[0], num_classes, kernel_size=kernel_size, size=shape[1:])
        like = next((p for block in place.following for p in block.parameters()), torch.zeros(0))
        self.to(like.device, like.dtype)  # copies lie where the network lies, and so does what is new
        if width < 1:
            self._check_width(place, width, like)

    def _check_width(self, place: Place, width: float, like: Tensor) -> None:
        """Raise ValueError if the copies do not fit together, as where rounded channels are put side by side."""
        try:
            with evaluating(self):
                self(like.new_zeros(1, *place.shape))
        except RuntimeError as error:
            raise ValueError(
                f"width={shown(width)}: the blocks behind {place.name} cannot be made so narrow, they join or split "
                f"channels ({str(error).splitlines()[0]}); give 1.0, or a width that leaves no fractions of channels"
            ) from error

    def forward(self, features: Tensor) -> Tensor:
        """Goodness of each class: features (B, C, H, W) of any floating dtype -> (B, K), float32."""
        for part in self.copies:
            features = part(features)
        goodness: Tensor = self.pooled(features)
        return goodness

    def maps(self, features: Tensor) -> Tensor:
        """The part of each region, as the last copy sees it, in the goodness; see `PooledHead.maps`."""
        for part in self.copies:
            features = part(features)
        return self.pooled.maps(features)


class _Segment:
    """Blocks between two places of the network that a single tensor crosses."""

    def __init__(
        self, blocks: Sequence[Block], channel_dim: int, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
    ) -> None:
        self.blocks = blocks
        self.channel_dim = channel_dim  # of what enters
        self.in_shape = in_shape
        self.out_shape = out_shape


class _Copy(nn.Module):
    """A copy of a segment with new weights, from and to maps (B, C, H, W)."""

    def __init__(self, in_channels: int, segment: _Segment, width: float) -> None:
        super().__init__()
        self.channel_dim = segment.channel_dim
        wanted = _scaled(segment.in_shape[0], width)
        axes = len(segment.in_shape) - 1
        self.adapter = convolution(in_channels, wanted, 1, axes) if wanted != in_channels else nn.Identity()
        self.blocks = nn.ModuleList(_fresh(block, width) for block in segment.blocks)

    def forward(self, features: Tensor) -> Tensor:
        state: State = self.adapter(features).movedim(1, self.channel_dim)
        for block in self.blocks:
            state = block(state)
        return cast(Block, self.blocks[-1]).to_map(main_output(state))


def _check_place(place: Place) -> None:
    """Raise ValueError where no block can be copied at all."""
    if any(isinstance(block, HookedBlock) for block in place.following):
        raise ValueError(
            f"head=LookAhead: the blocks behind {place.name} cannot be copied, they run only as parts of their "
            "network's own forward; give another head"
        )
    if place.masked:
        raise ValueError("head=LookAhead: there is none for inputs with padding; give another head")
    if place.number == 0 and not _changing(place):
        what = "changes the shape of the features" if place.following else "follows"
        raise ValueError(f"head=LookAhead: no block behind {place.name} {what}, so there is nothing to copy")


def _changing(place: Place) -> list[_Segment]:
    """The segments behind a block that change the shape of the features."""
    following: Sequence[Block] = place.following
    found = []
    start = None
    for k, block in enumerate(following):
        if len(block.map_shape) != len(
            place.shape
        ):  # maps have become vectors, which the features of the block are not
            break
        graph = block.body.graph
        if len(graph.find_nodes(op="placeholder")) == 1:
            start = k
        (output,) = graph.find_nodes(op="output")
        if start is None or isinstance(output.args[0], tuple):
            continue
        channel_dim, in_shape = place.channel_dim, place.shape
        if start:
            channel_dim, in_shape = following[start - 1].channel_dim, following[start - 1].map_shape
        if in_shape != block.map_shape:
            found.append(_Segment(following[start : k + 1], channel_dim, in_shape, block.map_shape))
        start = None
    return found


def _fresh(block: Block, width: float) -> Block:
    """A copy of a block with new weights, narrower if asked for.

    What has no `reset_parameters`, such as the scale of a layer in ConvNeXt, begins with the values of the network.

    Raises:
        ValueError: If it cannot be copied, or not be made narrower.
    """
    try:
        made = copy.deepcopy(block).requires_grad_(True)
    except Exception as error:  # weights that are computed of others, such as those of weight_norm
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"head=LookAhead: block {block.name} cannot be copied: {why}") from error
    for name, module in made.named_modules():
        if width < 1:
            _narrow(f"{block.name}, {name.removeprefix('body.')}", module, width)
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return made


def _narrow(name: str, module: nn.Module, width: float) -> None:
    """Give a layer a share of its channels; its weights are to be drawn then.

    Raises:
        ValueError: If it is of a kind whose channels are not known.
    """
    if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        return
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        channels = module.in_channels, module.out_channels
        module.in_channels, module.out_channels = (_scaled(count, width) for count in channels)
        if module.groups == channels[0]:  # depthwise
            module.groups = module.in_channels
        module.groups = math.gcd(module.groups, module.in_channels, module.out_channels)
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = (_scaled(n, width) for n in (module.in_features, module.out_features))
        shape = (module.out_features, module.in_features)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        module.num_features = _scaled(module.num_features, width)
        shape = (module.num_features,)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = _scaled(module.num_channels, width)
        module.num_groups = math.gcd(module.num_groups, module.num_channels)
        shape = (module.num_channels,)
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        module.normalized_shape = (_scaled(module.normalized_shape[0], width),)
        shape = module.normalized_shape
    else:
        raise ValueError(
            f"width={shown(width)}: the {type(module).__name__} in {name} cannot be made narrower; give 1.0"
        )
    if module.weight is not None:
        module.weight = nn.Parameter(module.weight.new_empty(shape))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.new_empty(shape[:1]))
    for name in ("running_mean", "running_var"):
        if isinstance(statistic := getattr(module, name, None), Tensor):
            setattr(module, name, statistic.new_empty(shape))


def _scaled(channels: int, width: float) -> int:
    return max(1, math.ceil(channels * width))
