"""The command ``python -m ff_lightning.results``: run recipes with several seeds, and tabulate the runs that are there.

A recipe is a config of the same name for several methods, ``configs/METHOD/RECIPE.yaml``. A run lies in
``RUNS/RECIPE/METHOD-SEED`` and is not repeated; one that was cut off goes on. The table is made of what runs logged.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ff_lightning.commands.answers import PlainParser, as_path, in_one_line
from ff_lightning.commands.runs import read_run, run, runs_in
from ff_lightning.commands.tabulating import headline, plot, table, write_csv
from ff_lightning.util.extras import needs
from ff_lightning.util.suggest import unknown

_NO_METHOD = "trainer"
"""The folder of configs of the machine, which go with any method."""


def main(args: Sequence[str] | None = None) -> None:
    """Run and tabulate; see ``--help``."""
    arguments, of_fit = _parser().parse_known_args(args)
    _check(arguments, of_fit)
    configs = [path for recipe in arguments.recipes for path in _configs(recipe, arguments.configs, arguments.methods)]
    runs = [(config, seed) for config in configs for seed in arguments.seeds]
    left = 0
    for number, (config, seed) in enumerate(sorted(runs, key=lambda run: (run[0].stem, run[1])), start=1):
        folder = arguments.runs / config.stem / f"{config.parent.name}-{seed}"
        print(f"[{number}/{len(runs)}] {folder}", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        outcome = run(config, folder, seed, of_fit, arguments.stage)
        if outcome == "is being made elsewhere":
            left += 1
            print(outcome, file=sys.stderr)
            continue
        took = "was there" if outcome == "was there" else f"{time.monotonic() - start:.0f} s"
        print(f"{headline(read_run(folder), arguments.stage)} ({took})", file=sys.stderr)
    if left:
        print(f"{left} of {len(runs)} runs are left to another process: they are not in the table yet", file=sys.stderr)
    found = [one for one in runs_in(arguments.runs) if not arguments.methods or one.method in arguments.methods]
    if not found:
        of_methods = f" of {' or '.join(arguments.methods)}" if arguments.methods else ""
        sys.exit(f"there are no runs{of_methods} in {arguments.runs}")
    known = sorted({name for one in found for name in one.of_stage(arguments.stage)})
    for figure in arguments.figures:
        if figure not in known:
            sys.exit(unknown("figures", figure, known, f"one of {known}, which the runs have logged"))
    print(table(found, arguments.stage, arguments.methods, arguments.figures))
    if arguments.csv:
        write_csv(found, arguments.stage, arguments.csv)
    if arguments.plot:
        plot(found, arguments.stage, arguments.plot)


def _check(arguments: argparse.Namespace, of_fit: Sequence[str]) -> None:
    """End the process where the command could not be carried out to its end."""
    given = [argument.split("=")[0].rstrip("+") for argument in of_fit]
    for option in ("--seed_everything", "--data.seed"):
        if option in given:
            sys.exit(f"{option}: each run has the seed of its own, give --seeds")
    for option in given:
        if option == "--trainer.logger" or option.startswith("--trainer.logger."):
            sys.exit(f"{option}: the table is made of what the default logger writes")
    if of_fit and not arguments.recipes:
        sys.exit(f"{given[0]}: is handed to ff-lightning fit, and there is no recipe to fit: give RECIPE first")
    if arguments.plot and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        sys.exit(f"--plot={arguments.plot}: must end in .png, .svg or .pdf")
    if arguments.plot and not arguments.plot.parent.is_dir():
        sys.exit(f"--plot={arguments.plot}: there is no folder {arguments.plot.parent}")
    for option in ("plot", "csv"):
        if (path := getattr(arguments, option)) and path.is_dir():
            sys.exit(f"--{option}={path}: is a folder, give a file")
    if arguments.runs.exists() and not arguments.runs.is_dir():
        sys.exit(f"--runs={arguments.runs}: is a file, give a folder")
    if arguments.plot:
        with in_one_line():
            needs("matplotlib", "plot")


def _configs(recipe: str, folder: Path, methods: Sequence[str] | None) -> list[Path]:
    """The configs of a recipe; all that are there, unless methods are asked for.

    Raises:
        SystemExit: If there is none, or not of each method that is asked for.
    """
    known = sorted(path for path in folder.glob("*/*.yaml") if path.parent.name != _NO_METHOD)
    found = [path for path in known if path.stem == recipe]
    if not found:
        recipes = sorted({path.stem for path in known})
        where = f"a config in a folder of {folder}, one of {recipes} (--configs names the folder)"
        sys.exit(unknown("recipe", recipe, recipes, where))
    there = [path.parent.name for path in found]
    for method in methods or ():
        if method not in there:
            sys.exit(f"recipe={recipe!r} has no config of {method!r} in {folder}: give --methods {' '.join(there)}")
    return [path for path in found if methods is None or path.parent.name in methods]


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m ff_lightning.results",
        allow_abbrev=False,
        description="Fit and test recipes with several seeds and methods, from a folder with configs/, such as a "
        "clone; print a table of all runs that are there. A run that was cut off goes on, and several processes can "
        "share the work, each with the same command (on Windows: with other seeds). Any other argument is handed to "
        "ff-lightning fit, such as --data.root FOLDER; recipes come before these.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="name of the configs; none: only the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="folders of the configs (default: all that hold the recipe)"
    )
    parser.add_argument("--runs", type=as_path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "--configs", type=as_path, default=Path("configs"), help="holds METHOD/RECIPE.yaml (default: %(default)s)"
    )
    parser.add_argument(
        "--stage",
        choices=["test", "val"],
        default="test",
        help="val: only fit, and tabulate the figures of the validation images, to choose settings by",
    )
    parser.add_argument(
        "--figures",
        nargs="+",
        default=(),
        metavar="NAME",
        help="of what was logged, such as readout_acc for test/readout_acc (default: those the task is judged by)",
    )
    parser.add_argument("--csv", type=as_path, metavar="FILE", help="every figure of every run, a line for each")
    parser.add_argument("--plot", type=as_path, metavar="FILE.png", help="the figure of each block; needs matplotlib")
    return parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
