"""One run of a recipe in a folder of its own: claimed, fitted, gone on with where it was cut off, tested, recorded."""

import importlib
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from difflib import unified_diff
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import torch

from ff_lightning import __version__
from ff_lightning.commands.ckpt_path import read_checkpoint
from ff_lightning.inference.facts import facts_of
from ff_lightning.tasks import TASKS
from ff_lightning.util.files import claimed, replacing

SETTINGS = "settings.yaml"
"""In the folder of a run: its config, and in the last line its stage and the further arguments."""
RECORD = "run.json"
"""In the folder of a run that is finished: what `Run` holds of it."""
FITTED = "fitted"
"""In the folder of a run whose fit has ended, maybe early: it is not trained further."""


class Run(NamedTuple):
    """A run that is finished.

    Attributes:
        recipe: Name of its config.
        method: Name of the folder of its config.
        seed: Of weights, order, augmentation and splits.
        figures: What was logged last, by its name: ``{"test/acc": 0.98, ...}``.
        shown: The figures that its task is judged by, without their stage: ``["acc"]``.
        epochs: So many were trained.
        command: Makes it once more.
        date: Of its end, UTC.
        versions: Of what it was run with.
        published: The figure of its paper: what the config says in a line ``# published: 98.64 (arXiv 2212.13345)``.
    """

    recipe: str
    method: str
    seed: int
    figures: dict[str, float]
    shown: list[str]
    epochs: int
    command: str
    date: str
    versions: str
    published: str = ""

    def of_stage(self, stage: str) -> dict[str, float]:
        """The figures of a stage, by their names without it."""
        return {name.removeprefix(f"{stage}/"): v for name, v in self.figures.items() if name.startswith(f"{stage}/")}


def runs_in(folder: Path) -> list[Run]:
    """The finished runs in ``FOLDER/RECIPE/METHOD-SEED``, by recipe, method and seed; other folders are passed over."""
    paths = folder.glob(f"*/*-*/{RECORD}")
    return sorted(read_run(path.parent) for path in paths if re.fullmatch(r".+-\d+", path.parent.name))


def read_run(folder: Path) -> Run:
    """What is recorded of a finished run.

    Raises:
        SystemExit: If that cannot be read.
    """
    method, _, seed = folder.name.rpartition("-")
    try:
        record = dict(json.loads((folder / RECORD).read_text()))
        of_run = {name: value for name, value in record.items() if name in Run._fields}  # later versions may write more
        return Run(folder.parent.name, method, int(seed), **of_run)
    except (ValueError, TypeError) as error:
        sys.exit(f"{folder / RECORD} cannot be read: {error}; remove the folder, and the run is made again")


def run(
    config: Path, folder: Path, seed: int, of_fit: Sequence[str], stage: str
) -> Literal["was there", "made", "is being made elsewhere"]:
    """Fit with a seed, which the splits of the data take too, and test the weights of the last epoch, once.

    A run that was cut off lies in ``folder.part``; it goes on from its last checkpoint. While it is run, this process
    and the one that trains hold a lock on ``folder.lock``, which is gone when both are.

    Args:
        config: Of the run.
        folder: Where it goes, with all that was printed in ``log.txt``. Nothing is done where it is there already.
        seed: Of weights, order, augmentation and splits.
        of_fit: Further arguments of ``ff-lightning fit``.
        stage: ``"val"``: do not test.

    Returns:
        Whether it was there already, was made, or is left to another process that makes it now.

    Raises:
        SystemExit: If the run fails, or if a run of the recipe that is there has other settings: a row is of one kind.
    """
    settings = f"{config.read_text()}\n# --stage {stage} {' '.join(of_fit)}\n"
    _check_settings(settings, folder)
    if folder.is_dir() and not (folder / RECORD).is_file():
        sys.exit(f"{folder} has no {RECORD}: it was not made by this version; give other --runs")
    if folder.is_dir():
        return "was there"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with claimed(lock) as descriptors:
        if descriptors is None:
            return "is being made elsewhere"
        if not folder.is_dir():  # another process may have finished it since
            part = folder.with_name(f"{folder.name}.part")
            _make(part, config, seed, of_fit, stage, settings, descriptors)
            part.rename(folder)
    lock.unlink(missing_ok=True)  # who still holds it, or makes it anew, finds the run finished
    return "made"


def _check_settings(settings: str, folder: Path) -> None:
    """End the process if a run of the recipe has other settings; the methods share the last line alone."""
    for there in sorted(folder.parent.glob(f"*/{SETTINGS}")):
        part = there.parent
        if part.suffix == ".part" and _last_checkpoint(part) is None and not _is_made(part.with_suffix(".lock")):
            continue  # there is nothing to go on with: the settings may be mended
        start = 0 if there.parent.name.rpartition("-")[0] == folder.name.rpartition("-")[0] else -1
        try:
            old, new = (_without_comments(text)[start:] for text in (there.read_text(), settings))
        except FileNotFoundError:  # another process has just finished it
            continue
        if old != new:
            difference = "\n".join(unified_diff(old, new, str(there), "now", n=0, lineterm=""))
            sys.exit(f"would be run with other settings than those that are there; give other --runs:\n{difference}")


def _is_made(lock: Path) -> bool:
    """Whether a process makes the run of a lock."""
    if not lock.is_file():
        return False
    with claimed(lock) as descriptors:
        return descriptors is None


def _without_comments(settings: str) -> list[str]:
    """The lines of settings that decide; the last one is what the command was given."""
    *of_config, given = settings.splitlines()
    return [*(line for line in of_config if line.strip() and not line.startswith("#")), given]


def _make(
    part: Path, config: Path, seed: int, of_fit: Sequence[str], stage: str, settings: str, descriptors: Sequence[int]
) -> None:
    last = _last_checkpoint(part)
    if last is None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / SETTINGS).write_text(settings)
    seeded = ["--seed_everything", str(seed)]
    go_on = ["--ckpt_path", str(last)] if last else []
    of_run = [*seeded, "--data.seed", str(seed), *of_fit, "--trainer.default_root_dir", str(part), *go_on]
    if not (part / FITTED).is_file():
        _ff_lightning(part, descriptors, "fit", "--config", str(config), *of_run)
        (part / FITTED).touch()
    last = _last_checkpoint(part)
    if last is None:
        sys.exit(f"{config} leaves no last.ckpt, which is needed to test the run, and to go on with it")
    if stage == "test":
        root = ["--trainer.default_root_dir", str(part / "test")]
        _ff_lightning(part, descriptors, "test", "--ckpt_path", str(last), *seeded, *root)
    figures = _logged(part)
    if not figures:
        sys.exit(f"{config} logs no figure of validation or test by the default logger, of which the table is made")
    facts = facts_of(read_checkpoint(str(last)), str(last))
    judged_by = [name.rpartition("/")[2] for name in facts.figures]
    if facts.task.lower() in TASKS:
        task = TASKS[facts.task.lower()]
        judged_by += [task.monitor[0].rpartition("/")[2], *task.metrics]
    record = {
        "figures": figures,
        "shown": list(dict.fromkeys(judged_by)),
        "epochs": facts.epochs,
        "command": _command(config, seed, of_fit, stage),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": f"ff_lightning {__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"Python {platform.python_version()}",
        "published": "".join(re.findall(r"^# published: *(.*)$", settings, re.MULTILINE)[:1]),
    }
    with replacing(part / RECORD) as path:
        path.write_text(json.dumps(record, indent=1))


def _command(config: Path, seed: int, of_fit: Sequence[str], stage: str) -> str:
    of_run = ["--methods", config.parent.name, "--seeds", str(seed), "--stage", stage, "--configs"]
    return shlex.join(["python", "-m", "ff_lightning.results", config.stem, *of_run, str(config.parents[1]), *of_fit])


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest ``last.ckpt``: each piece of a run has a folder of its own."""
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _ff_lightning(folder: Path, descriptors: Sequence[int], *arguments: str) -> None:
    """Run the command in a process of its own; one that is stopped with this one leaves its checkpoint first."""
    command = [sys.executable, "-m", "ff_lightning", *arguments, "--trainer.enable_progress_bar", "false"]
    with (folder / "log.txt").open("a+") as log, _sigterm_raises():
        start = log.tell()
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=descriptors) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if code:
            log.seek(start)
            sys.exit(f"failed:\n{''.join(log.readlines()[-5:])}see {log.name}")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the process as Ctrl-C does: through what is to be done before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _logged(folder: Path) -> dict[str, float]:
    """What was logged last of each figure of validation and test, over all pieces of a run."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, tuple[int, float, float]] = {}
    for events in folder.rglob("events.*"):
        read = reader.EventAccumulator(str(events)).Reload()
        for tag in read.Tags()["scalars"]:
            if tag.startswith(("val/", "test/")):
                last = read.Scalars(tag)[-1]
                found[tag] = max(found.get(tag, (-1, 0.0, 0.0)), (last.step, last.wall_time, last.value))
    return {tag: value for tag, (*_, value) in sorted(found.items())}
