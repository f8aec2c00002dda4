"""Private names of Lightning and jsonargparse that the package cannot do without; a test fails when one changes."""

import functools
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters, _given_hyperparameters_context
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch.optim import Optimizer

given_hyperparameters = _given_hyperparameters
"""Where the command line leaves what it was told of a model, to be stored; the constructor sees what was made of it."""

hyperparameters_given = _given_hyperparameters_context
"""Leaves hyper-parameters there, for a model that is loaded again."""

restricted_classmethod = _restricted_classmethod
"""Refuses `model.load_from_checkpoint(...)`, whose result is easily overlooked, as Lightning's own does."""

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What the command line stores as ``_instantiator``: Lightning then makes the model by its command line's rules."""


def unwrapped(factory: Any) -> Any:
    """A partial of the class itself, for what the command line makes of a class that is an argument.

    jsonargparse hands over a partial of functions of its own, which are given the class.
    """
    if isinstance(factory, functools.partial):
        classes = [thing for thing in factory.args if isinstance(thing, type)]
        if len(classes) == 1 and getattr(factory.func, "__module__", "").startswith("jsonargparse."):
            return functools.partial(classes[0], **factory.keywords)
    return factory


def cluster_environment(trainer: Trainer) -> Any:
    """The cluster that a run is on: strategies of one process do not know it, though Lightning requeues their job."""
    return cast(Any, trainer)._accelerator_connector.cluster_environment


def ddp_settings(strategy: Strategy) -> dict[str, Any]:
    """What was given to a `DDPStrategy` for DistributedDataParallel beside Lightning's own arguments."""
    if not isinstance(strategy, DDPStrategy):
        return {}
    return {**strategy._ddp_kwargs, "ddp_comm_hook": strategy._ddp_comm_hook}


def count_step(trainer: Trainer) -> None:
    """Count one step of a run with manual optimization, where Lightning counts the steps of each optimizer."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def logs_are_due(trainer: Trainer) -> bool:
    """Whether the loggers are told of the step that runs."""
    return cast(Any, trainer)._logger_connector.should_update_logs


def before_step(module: LightningModule, optimizer: Optimizer) -> None:
    """What Lightning does between a backward and a step: hooks and clipping."""
    module.trainer.precision_plugin._after_closure(module, optimizer)


def load_loader_states(trainer: Trainer) -> None:
    """Tell loaders where they were interrupted: Lightning tells those only that it makes after it read a checkpoint."""
    loop = cast(Any, trainer.fit_loop)
    if loop._combined_loader_states_to_load:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def train_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of the training data."""
    return list(cast(Any, trainer.fit_loop)._combined_loader.flattened)
