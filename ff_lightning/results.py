"""The command ``python -m ff_lightning.results``: run recipes with several seeds, and tabulate the runs that are there.

A recipe is a pair of configs of the same name, ``configs/sff/NAME.yaml`` and ``configs/backprop/NAME.yaml``. A run lies
in ``RUNS/NAME/METHOD-SEED`` and is not repeated; the table is made of what Lightning's logger wrote there.
"""

import argparse
import importlib
import importlib.util
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ff_lightning.commands.answers import PlainParser, as_path
from ff_lightning.util.suggest import unknown

METHODS = ("sff", "backprop")
SETTINGS = "settings.yaml"
"""In the folder of a run: its config, and in the last line its stage and the further arguments."""


def main(args: Sequence[str] | None = None) -> None:
    """Run and tabulate; see ``--help``."""
    arguments, of_fit = _parser().parse_known_args(args)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    configs: list[tuple[str, str, Path]] = []
    for name in arguments.recipes:
        for method in arguments.methods:
            configs.append((name, method, arguments.configs / method / f"{name}.yaml"))
            if not configs[-1][2].is_file():
                if any((arguments.configs / other / f"{name}.yaml").is_file() for other in METHODS):
                    sys.exit(f"recipe={name!r} has no config of {method}: leave that out, by --methods")
                known = sorted(path.stem for path in arguments.configs.glob(f"{method}/*.yaml"))
                where = f"a config in {arguments.configs / method}, one of {known} (--configs names the folder)"
                sys.exit(unknown("recipe", name, known, where))
    runs = [(config, name, method, seed) for name, method, config in configs for seed in arguments.seeds]
    for number, (config, name, method, seed) in enumerate(sorted(runs, key=lambda run: (run[1], run[3])), start=1):
        folder = arguments.runs / name / f"{method}-{seed}"
        print(f"[{number}/{len(runs)}] {folder}", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        was_there = run(config, folder, seed, of_fit, arguments.stage)
        accuracy = f"{accuracies(folder, arguments.stage).get('acc', math.nan):.2f} %"
        took = "was there" if was_there else f"{time.monotonic() - start:.0f} s"
        print(f"{accuracy} ({took})", file=sys.stderr)
    if not any(arguments.runs.glob("*/*[0-9]")):
        sys.exit(f"there are no runs in {arguments.runs}")
    print(table(arguments.runs, arguments.stage))
    if arguments.plot:
        plot(arguments.runs, arguments.stage, arguments.plot)


def run(config: Path, folder: Path, seed: int, of_fit: Sequence[str], stage: str) -> bool:
    """Fit with a seed, which the splits of the data take too, and test the weights of the last epoch, once.

    Args:
        config: Of the run.
        folder: Where it goes, with all that was printed in ``log.txt``. Nothing is done where it is there already; one
            that is cut off leaves ``folder.part``.
        seed: Of weights, order, augmentation and splits.
        of_fit: Further arguments of ``ff-lightning fit``.
        stage: ``"val"``: do not test.

    Returns:
        Whether it was there already.

    Raises:
        SystemExit: If the run fails, or if a run of the recipe that is there had other settings: a row is of one kind.
    """
    settings = f"{config.read_text()}\n# --stage {stage} {' '.join(of_fit)}\n"
    for there in sorted(folder.parent.glob(f"*[0-9]/{SETTINGS}")):
        start = 0 if there.parent.name.startswith(config.parent.name) else -1  # the methods share the arguments alone
        old, new = (text.splitlines()[start:] for text in (there.read_text(), settings))
        if old != new:
            difference = "\n".join(unified_diff(old, new, str(there), "now", n=0, lineterm=""))
            sys.exit(f"would be run with other settings than those that are there; give other --runs:\n{difference}")
    if folder.is_dir():
        return True
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / SETTINGS).write_text(settings)
    seeded = ["--seed_everything", str(seed)]
    of_run = [*seeded, "--data.seed", str(seed), *of_fit, "--trainer.default_root_dir", str(part)]
    _ff_lightning(part, "fit", "--config", str(config), *of_run)
    if stage == "test":
        (last,) = part.rglob("last.ckpt")
        _ff_lightning(part, "test", "--ckpt_path", str(last), *seeded, "--trainer.default_root_dir", str(part / "test"))
    part.rename(folder)
    return False


def _ff_lightning(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ff_lightning", *arguments, "--trainer.enable_progress_bar", "false"]
    with (folder / "log.txt").open("a+") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            log.seek(0)
            sys.exit(f"failed:\n{''.join(log.readlines()[-5:])}see {log.name}")


def accuracies(folder: Path, stage: str) -> dict[str, float]:
    """What a run logged last of a stage, in %: ``{"acc": of the vote, "block00_acc": ...}``."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, float] = {}
    for events in sorted(folder.rglob("events.*")):
        read = reader.EventAccumulator(str(events)).Reload()
        for tag in read.Tags()["scalars"]:
            if tag.startswith(f"{stage}/") and tag.endswith("acc"):
                found[tag.removeprefix(f"{stage}/")] = 100 * read.Scalars(tag)[-1].value
    return found


def collect(runs: Path, recipe: str, method: str, stage: str) -> dict[str, list[float]]:
    """The accuracies of all seeds of a recipe, by what was measured."""
    collected: dict[str, list[float]] = {}
    for folder in sorted(runs.glob(f"{recipe}/{method}-*[0-9]")):
        for name, accuracy in accuracies(folder, stage).items():
            collected.setdefault(name, []).append(accuracy)
    return collected


def table(runs: Path, stage: str) -> str:
    """Markdown: accuracy of every recipe in a folder, mean and standard deviation over its seeds."""
    lines = ["| recipe | seeds | SFF | backprop | difference |", "| --- | --- | --- | --- | --- |"]
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        sff, backprop = (collect(runs, folder.name, method, stage).get("acc", []) for method in METHODS)
        if sff or backprop:
            seeds = f"{len(sff)}" if len(sff) == len(backprop) else f"{len(sff)}, {len(backprop)}"
            difference = f"{mean(sff) - mean(backprop):+.2f}" if sff and backprop else "-"
            lines.append(f"| `{folder.name}` | {seeds} | {_spread(sff)} | {_spread(backprop)} | {difference} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}" if values else "-"


def plot(runs: Path, stage: str, path: Path) -> None:
    """Accuracy of each block, of their vote, and of backprop; one panel for each recipe."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    recipes = [folder.name for folder in sorted(runs.glob("*")) if collect(runs, folder.name, "sff", stage)]
    if not recipes:
        sys.exit(f"--plot: no SFF run in {runs} has an accuracy of stage {stage!r}")
    figure, panels = pyplot.subplots(1, len(recipes), figsize=(4 * len(recipes), 3.5), squeeze=False)
    for panel, recipe in zip(panels[0], recipes, strict=True):
        sff, backprop = (collect(runs, recipe, method, stage) for method in METHODS)
        blocks = sorted(name for name in sff if name.startswith("block"))
        heights, errors = (
            [of(sff[name]) for name in blocks] for of in (mean, lambda v: stdev(v) if len(v) > 1 else 0.0)
        )
        panel.errorbar(range(len(blocks)), heights, errors, marker="o", label="SFF, block")
        panel.axhline(mean(sff["acc"]), color="tab:blue", linestyle="--", label="SFF, vote", zorder=3)
        if backprop:
            panel.axhline(mean(backprop["acc"]), color="tab:orange", label="backprop")
        panel.set(title=recipe, xlabel="block", ylabel=f"{stage} accuracy, %", xticks=range(len(blocks)))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m ff_lightning.results",
        allow_abbrev=False,
        description="Fit and test recipes with several seeds, SFF and backprop, from a folder with configs/, such as "
        "a clone; print a table of all runs that are there. Any other argument is handed to ff-lightning fit, such as "
        "--data.root FOLDER.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="name of a pair of configs; none: only the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    parser.add_argument("--runs", type=as_path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--configs", type=as_path, default=Path("configs"), help="default: %(default)s")
    parser.add_argument(
        "--stage",
        choices=["test", "val"],
        default="test",
        help="val: only fit, and tabulate the accuracy on the validation images, to choose settings by",
    )
    parser.add_argument("--plot", type=as_path, metavar="FILE.png", help="accuracy per block; needs matplotlib")
    return parser


if __name__ == "__main__":
    main()
