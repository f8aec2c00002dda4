"""Private names of Lightning and jsonargparse that the package cannot do without, each with its reason."""

import functools
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

given_hyperparameters = _given_hyperparameters_context
"""Has `save_hyperparameters` store these: what the command line, or a checkpoint of it, said of a model; its
constructor sees what was made of that."""

restricted_classmethod = _restricted_classmethod
"""Refuses `model.load_from_checkpoint(...)`, whose result is easily overlooked, as Lightning's own does."""

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What the command line stores as ``_instantiator``: Lightning then makes the model by its command line's rules."""


def unwrapped(factory: Any) -> Any:
    """A partial of the class itself, for what the command line makes of a class that is an argument.

    jsonargparse hands over ``partial(instantiator, cls, **arguments)``.
    """
    if isinstance(factory, functools.partial) and len(factory.args) == 1 and isinstance(factory.args[0], type):
        module = getattr(factory.func, "__module__", None) or type(factory.func).__module__
        if module.startswith("jsonargparse."):
            return functools.partial(factory.args[0], **factory.keywords)
    return factory
