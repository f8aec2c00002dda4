"""The private names of Lightning that this package uses, each in one place; a test fails when one of them changes."""

from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

restricted_classmethod = _restricted_classmethod
"""Refuses `model.load_from_checkpoint(...)`, whose result is easily overlooked, as Lightning's own does."""


def cluster_environment(trainer: Trainer) -> Any:
    """The cluster that a run is on: strategies of one process do not know it, though Lightning requeues their job."""
    return cast(Any, trainer)._accelerator_connector.cluster_environment


def ddp_settings(strategy: Strategy) -> dict[str, Any]:
    """What was given to a `DDPStrategy` for DistributedDataParallel beside Lightning's own arguments."""
    if not isinstance(strategy, DDPStrategy):
        return {}
    return {**strategy._ddp_kwargs, "ddp_comm_hook": strategy._ddp_comm_hook}
