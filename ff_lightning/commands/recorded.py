"""The command line, as checkpoints and model cards may hold it."""

import re
import shlex
from collections.abc import Sequence

_SECRET = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)
_SECRET_WITHIN = re.compile(r"((?:key|token|secret|password)['\"]?:\s*)[^\s,}]+", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<![\w.:/~])[~/][^\s,:'\"\[\]{}]*/(?=[^\s/])")
"""Of an absolute path, all but its last part."""


def recorded(args: Sequence[str]) -> str:
    """The command line without what is nobody else's business: secrets, and the folders of this machine.

    Args:
        args: What follows ``ff-lightning``.

    Examples:
        >>> recorded(["fit", "--config", "a/b.yaml", "--data.root", "/home/me/images", "--trainer.logger.api_key=1"])
        'ff-lightning fit --config a/b.yaml --data.root .../images --trainer.logger.api_key=...'
    """
    words = ["ff-lightning"]
    for argument, before in zip(args, ["", *args], strict=False):
        option, attached, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        value = "..." if _SECRET.search(option) else _SECRET_WITHIN.sub(r"\1...", _FOLDERS.sub(".../", value))
        words.append(f"{option}={value}" if attached else argument if argument.startswith("--") else value)
    return shlex.join(words)
