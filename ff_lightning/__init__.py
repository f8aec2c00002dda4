"""Scalable Forward-Forward and local learning for any network, inside Lightning."""

__version__ = "0.1.0"

from ff_lightning.network import LocalNet
from ff_lightning.partition import partition

__all__ = ["LocalNet", "partition"]
