"""Side matters: what is reported about a run, its last checkpoint, and which block is trained when."""

from ff_lightning.callbacks.greedy import GreedyBlocks
from ff_lightning.callbacks.last import LastCheckpoint
from ff_lightning.callbacks.table import BlockTable

__all__ = ["BlockTable", "GreedyBlocks", "LastCheckpoint"]
