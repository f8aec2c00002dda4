"""Libraries that are extras of this package."""

import importlib
from typing import Any


def needs(module: str, extra: str) -> Any:
    """The module of an extra.

    Raises:
        ModuleNotFoundError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{module} is not installed: pip install 'ff-lightning[{extra}]'") from error
