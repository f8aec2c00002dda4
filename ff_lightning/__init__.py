"""Scalable Forward-Forward and other local learning, for your own network, inside stock Lightning."""

__version__ = "0.2.0"

import importlib
from typing import TYPE_CHECKING, Any

from ff_lightning.heads import GoodnessHead, PooledHead
from ff_lightning.local.exits import EarlyExit
from ff_lightning.local.net import LocalNet
from ff_lightning.local.objectives import Objective
from ff_lightning.local.updates import Update
from ff_lightning.partition import partition

if TYPE_CHECKING:
    from ff_lightning import data, tasks
    from ff_lightning.inference import from_pretrained, load
    from ff_lightning.modules import FF, PFF, SCFF, SFF, Backprop, CwC, LocalLearner, RecurrentFF

__all__ = [
    "FF",
    "PFF",
    "SCFF",
    "SFF",
    "Backprop",
    "CwC",
    "EarlyExit",
    "GoodnessHead",
    "LocalLearner",
    "LocalNet",
    "Objective",
    "PooledHead",
    "RecurrentFF",
    "Update",
    "data",
    "from_pretrained",
    "load",
    "partition",
    "tasks",
]


def __getattr__(name: str) -> Any:
    """Import the names that need Lightning only when they are used: plain PyTorch users do not wait for it."""
    if name in ("data", "tasks"):
        return importlib.import_module(f"ff_lightning.{name}")
    if name in ("FF", "PFF", "SCFF", "SFF", "Backprop", "CwC", "LocalLearner", "RecurrentFF"):
        return getattr(importlib.import_module("ff_lightning.modules"), name)
    if name in ("load", "from_pretrained"):
        return getattr(importlib.import_module("ff_lightning.inference"), name)
    raise AttributeError(f"module 'ff_lightning' has no attribute {name!r}")
