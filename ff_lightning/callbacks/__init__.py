"""Callbacks: reports and pictures of a run, the best and the last checkpoint, which block is trained when."""

from ff_lightning.callbacks.charts import Charts
from ff_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from ff_lightning.callbacks.greedy import GreedyBlocks
from ff_lightning.callbacks.pictures import Pictures
from ff_lightning.callbacks.probe import OnlineProbe
from ff_lightning.callbacks.progress import TimeLeft
from ff_lightning.callbacks.table import BlockTable
from ff_lightning.callbacks.thresholds import Thresholds

__all__ = [
    "BestCheckpoint",
    "BlockTable",
    "Charts",
    "GreedyBlocks",
    "LastCheckpoint",
    "OnlineProbe",
    "Pictures",
    "Thresholds",
    "TimeLeft",
]
