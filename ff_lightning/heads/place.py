"""Where in the network a head or a local loss stands.

Shapes: B batch, C channels, H x W positions, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ff_lightning.partition import Block


class Place(NamedTuple):
    """Where in the network an objective stands: what its factory may ask for."""

    number: int
    """Of the block, from 0."""
    blocks: int
    """Number of blocks."""
    name: str
    """Of the block."""
    shape: tuple[int, ...]
    """Of its features: (C, H, W), or with another number of axes."""
    num_classes: int
    """K."""
    make_head: Callable[[], nn.Module]
    """Makes the head that was asked for: features (B, C, H, W) -> scores (B, K); as a head sees it, a `PooledHead`."""
    masked: bool = False
    """Whether there may be padding among its positions, as among tokens."""
    channel_dim: int = 1
    """The dimension of the block's output that counts channels; in its features it is always 1."""
    following: tuple[Block, ...] = ()
    """The blocks behind it, in order: for copies of them, since they themselves learn by their own losses."""
