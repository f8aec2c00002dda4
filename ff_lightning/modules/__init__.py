"""LightningModules: the training loop, and one file for each method."""

from ff_lightning.modules.backprop import Backprop
from ff_lightning.modules.base import LocalLearner
from ff_lightning.modules.cwc import CwC
from ff_lightning.modules.ff import FF
from ff_lightning.modules.pff import PFF
from ff_lightning.modules.recurrent_ff import RecurrentFF
from ff_lightning.modules.scff import SCFF
from ff_lightning.modules.sff import SFF

__all__ = ["FF", "PFF", "SCFF", "SFF", "Backprop", "CwC", "LocalLearner", "RecurrentFF"]
