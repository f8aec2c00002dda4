"""The checkpoint that ``--ckpt_path`` stands for, and the data that it names."""

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from ff_lightning.training.checkpoint_io import check_whole, fetched, is_remote, read
from ff_lightning.training.trust import named_class

log = logging.getLogger(__name__)


def find_checkpoint(which: str, root: str | None, dirpath: str | None) -> str:
    """The last or the best checkpoint of the newest run.

    Args:
        which: ``"last"`` or ``"best"``.
        root: The folder of the runs, as ``default_root_dir`` of the Trainer; None: the working directory.
        dirpath: The folder of last.ckpt, where that is given.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(root or ".").expanduser()
    pattern = "lightning_logs/version_*/checkpoints/last.ckpt"
    places = [folder / "checkpoints/last.ckpt", *folder.glob(pattern)]
    if dirpath is not None:
        places = [Path(dirpath).expanduser() / "last.ckpt"]
    found = [path for path in places if path.is_file()]
    if not found:
        where = str(places[0]) if dirpath is not None else str(folder / pattern)
        raise ValueError(f"ckpt_path={which!r}: there is no checkpoint {where}: give the path of one")
    last = max(found, key=lambda path: path.stat().st_mtime)
    if which == "last":
        rank_zero_info(f"ckpt_path='last': {last}")
        return str(last)
    states = read_checkpoint(str(last)).get("callbacks", {})
    paths = [state["best_model_path"] for key, state in states.items() if key.startswith("BestCheckpoint")]
    for path in (Path(path) for path in paths if path):  # empty: the run ended before its first validation
        for best in (path, last.with_name(path.name)):  # the folder of the run may have been moved
            if best.is_file():
                return str(best)
    raise ValueError(f"ckpt_path='best': the run of {last} has kept no best checkpoint: give 'last', or a path")


def checkpoint_at(which: str) -> str:
    """The checkpoint that ``--ckpt_path`` stands for in a command without a Trainer: a path, ``last`` or ``best``."""
    return find_checkpoint(which, None, None) if which in ("last", "best") else which


def read_checkpoint(path: str) -> Mapping[str, Any]:
    """Read a checkpoint; no code of it is run.

    Raises:
        ValueError: If the file is not there, or is no checkpoint.
    """
    if not is_remote(path) and not Path(path).is_file():
        what = "it is a folder, give a file in it" if Path(path).is_dir() else "there is no such file"
        raise ValueError(f"ckpt_path={path!r}: {what}")
    check_whole(path)
    try:
        content = read(fetched(path))
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"ckpt_path={path!r} is no checkpoint, or holds more than tensors and plain values: it could run code "
            "and is not read"
        ) from error
    if not isinstance(content, Mapping) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(
            f"ckpt_path={path!r} is no checkpoint of Lightning; weights alone are given as --model.weights FILE"
        )
    return content


def found_root(cls: Any, arguments: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The arguments of a data module, with the folder of its data where that is, seen from here.

    Args:
        cls: Class of the data module.
        arguments: As a checkpoint holds them.
        checkpoint: Its path: a relative ``root`` that is not here may lie in a folder above the checkpoint.

    Returns:
        The arguments; they are unchanged, with a warning, where nothing is found.
    """
    root = arguments.get("root")
    if not isinstance(root, str) or not getattr(cls, "reads_root", True):
        return arguments
    place = Path(root).expanduser()
    if place.is_absolute() or place.exists() or is_remote(checkpoint):
        return arguments
    for folder in Path(checkpoint).absolute().parents:
        if (folder / place).exists():
            return {**arguments, "root": str(folder / place)}
    log.warning(
        "root=%r of the checkpoint %s is relative to the folder of the training: it is neither in %s nor above the "
        "checkpoint; give --data.root", root, checkpoint, Path.cwd(),
    )  # fmt: skip
    return arguments


def data_of(path: str, root: str | None) -> LightningDataModule:
    """The data module that a checkpoint names, with its own folder of the data unless another `root` is given.

    Raises:
        ValueError: If the checkpoint names no data.
    """
    stored = dict(read_checkpoint(path).get("datamodule_hyper_parameters", {}))
    if "_class_path" not in stored:
        raise ValueError(f"ckpt_path={path!r} names no data: it was not written by ff-lightning fit")
    cls: Any = named_class("the data", stored["_class_path"], (LightningDataModule,))
    arguments = {name: value for name, value in stored.items() if not name.startswith("_")}
    return cls(**(found_root(cls, arguments, path) if root is None else {**arguments, "root": root}))
