"""Heads: from the features of a block to the goodness of each class."""

from ff_lightning.heads.factory import HEADS, HeadFactory, check_head, make_head
from ff_lightning.heads.lookahead import LookAhead
from ff_lightning.heads.pooled import PooledHead
from ff_lightning.heads.squared import GoodnessHead
from ff_lightning.heads.tokens import TokenHead

__all__ = ["HEADS", "GoodnessHead", "HeadFactory", "LookAhead", "PooledHead", "TokenHead", "check_head", "make_head"]
