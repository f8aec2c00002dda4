"""Side matters: what is reported about a run."""

from ff_lightning.callbacks.table import BlockTable

__all__ = ["BlockTable"]
