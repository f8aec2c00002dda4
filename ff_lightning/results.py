"""The command ``python -m ff_lightning.results``: run recipes with several seeds, and tabulate the runs that are there.

A recipe is a pair of configs of the same name, ``configs/sff/NAME.yaml`` and ``configs/backprop/NAME.yaml``. A run lies
in ``RUNS/NAME/METHOD-SEED`` and is not repeated; the table is made of what Lightning's logger wrote there.
"""

import argparse
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METHODS = ("sff", "backprop")


def main(args: Sequence[str] | None = None) -> None:
    """Run and tabulate; see ``--help``."""
    arguments, of_fit = _parser().parse_known_args(args)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install 'ff-lightning[plot]'")
    for name in arguments.recipes:
        for seed in arguments.seeds:
            for method in arguments.methods:
                config = arguments.configs / method / f"{name}.yaml"
                if not config.is_file():
                    sys.exit(f"{config} does not exist: a recipe is a config of the same name for each of {METHODS}")
                run(config, arguments.runs / name / f"{method}-{seed}", seed, of_fit, arguments.stage)
    print(table(arguments.runs, arguments.stage))
    if arguments.plot:
        plot(arguments.runs, arguments.stage, arguments.plot)


def run(config: Path, folder: Path, seed: int, of_fit: Sequence[str], stage: str) -> None:
    """Fit with a seed, which the splits of the data take too, and test the weights of the last epoch, once.

    Args:
        config: Of the run.
        folder: Where it goes; nothing is done where it is there already. One that is cut off leaves ``folder.part``.
        seed: Of weights, order, augmentation and splits.
        of_fit: Further arguments of ``ff-lightning fit``.
        stage: ``"val"``: do not test.
    """
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    print(f"{folder} ...", file=sys.stderr)
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    _ff_lightning("fit", "--config", str(config), *seeds, *of_fit, "--trainer.default_root_dir", str(part))
    if stage == "test":
        (last,) = part.rglob("last.ckpt")
        _ff_lightning("test", "--ckpt_path", str(last), "--trainer.default_root_dir", str(part / "test"))
    part.rename(folder)


def _ff_lightning(*arguments: str) -> None:
    bar = ["--trainer.enable_progress_bar", "false"]
    subprocess.run([sys.executable, "-m", "ff_lightning", *arguments, *bar], check=True, stdout=subprocess.DEVNULL)


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
    figure, panels = pyplot.subplots(1, len(recipes), figsize=(4 * len(recipes), 3.5), squeeze=False)
    for panel, recipe in zip(panels[0], recipes, strict=True):
        sff, backprop = (collect(runs, recipe, method, stage) for method in METHODS)
        blocks = sorted(name for name in sff if name.startswith("block"))
        heights, errors = (
            [of(sff[name]) for name in blocks] for of in (mean, lambda v: stdev(v) if len(v) > 1 else 0.0)
        )
        panel.errorbar(range(len(blocks)), heights, errors, marker="o", label="SFF, block")
        panel.axhline(mean(sff["acc"]), color="tab:blue", linestyle="--", label="SFF, vote")
        if backprop:
            panel.axhline(mean(backprop["acc"]), color="tab:orange", label="backprop")
        panel.set(title=recipe, xlabel="block", ylabel=f"{stage} accuracy, %", xticks=range(len(blocks)))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ff_lightning.results",
        allow_abbrev=False,
        description="Fit and test recipes with several seeds, SFF and backprop; print a table of all runs that are "
        "there. Any other argument is handed to ff-lightning fit, such as --data.root FOLDER.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="name of a pair of configs; none: only the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="default: %(default)s")
    parser.add_argument(
        "--stage",
        choices=["test", "val"],
        default="test",
        help="val: only fit, and tabulate the accuracy on the validation images, to choose settings by",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="accuracy per block; needs ff-lightning[plot]")
    return parser


if __name__ == "__main__":
    main()
