"""The command ``python -m ff_lightning.benchmark``."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import get_args

import torch
from rich.console import Console

from ff_lightning.backbones import Stem
from ff_lightning.benchmark.fits import print_batches
from ff_lightning.benchmark.frontier import FRONTIER, REFERENCES, accuracies, plot_frontier
from ff_lightning.benchmark.measure import measure
from ff_lightning.benchmark.report import Run, plot, print_table, write_json
from ff_lightning.benchmark.variants import Settings, build
from ff_lightning.commands.answers import PlainParser, as_path, in_one_line
from ff_lightning.heads import HEADS
from ff_lightning.util.extras import needs


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and report; see ``--help``."""
    arguments = _checked(_parser(), args)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    if arguments.what == "startup":
        _startup(arguments.repetitions, console)
        return
    runs: list[Run] = []
    for classes in arguments.classes:
        settings = _settings(arguments, classes)
        of_cuts = [*REFERENCES, *(f"sff {cut}" for cut in arguments.granularity)]
        names = {
            "train": FRONTIER if arguments.frontier else of_cuts,
            "inference": ["model", *(f"vote {cut}" for cut in arguments.granularity)],
            "trainer": ["loop", "trainer"],
        }[arguments.what]
        if arguments.fits:
            print_batches(settings, names, arguments.fits, console)
            continue
        runs.append((settings, measure(settings, names, arguments.compile, arguments.repetitions, arguments.steps)))
        images = settings.batch * (settings.epoch_batches if arguments.what == "trainer" else 1)
        print_table(runs[-1], images, console)
        if arguments.json:
            write_json(runs, torch.get_num_threads(), arguments.json)
    if arguments.plot:
        plot(runs, arguments.plot)
    if arguments.frontier:
        plot_frontier(runs[0], arguments.accuracy, arguments.frontier)


def _settings(arguments: argparse.Namespace, classes: int) -> Settings:
    return Settings(
        backbone=arguments.backbone,
        stem=arguments.stem,
        classes=classes,
        batch=arguments.batch,
        size=arguments.input_size,
        head=arguments.head,
        micro_batches=arguments.micro_batches,
        epoch_batches=arguments.epoch_batches,
        device=arguments.device,
        precision=arguments.precision,
        channels_last=arguments.channels_last,
    )


def _checked(parser: argparse.ArgumentParser, args: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; what would only show after minutes of measuring ends the command here."""
    arguments = parser.parse_args(args)
    if arguments.plot or arguments.frontier:
        with in_one_line():
            needs("matplotlib", "plot")
    if arguments.frontier and (arguments.what != "train" or len(arguments.classes) > 1 or arguments.compile):
        parser.error("--frontier: takes --what train, one number of classes, and no --compile")
    if arguments.fits and (arguments.what != "train" or arguments.plot or arguments.frontier or arguments.json):
        parser.error("--fits: takes --what train, and neither --json nor a picture")
    for file in (arguments.plot, arguments.frontier):
        if file and file.suffix not in (".svg", ".png"):
            parser.error(f"{file}: must end in .svg or .png")
    if arguments.accuracy and not arguments.frontier:
        parser.error("--accuracy: is drawn by --frontier FILE alone")
    for file in (arguments.json, arguments.plot, arguments.frontier):
        if file and not file.parent.is_dir():
            parser.error(f"the folder of {file} does not exist")
    if arguments.what == "startup":
        return arguments
    try:
        torch.zeros(1, device=arguments.device)
        arguments.accuracy = accuracies(arguments.accuracy)
        for classes in arguments.classes:
            for granularity in ["block"] if arguments.frontier else arguments.granularity:
                build(_settings(arguments, classes), f"sff {granularity}")
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    return arguments


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return value


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, of GiB")
    return value


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m ff_lightning.benchmark",
        description="Speed and memory of SFF against backpropagation: variants take turns, each in its own process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--what", choices=["train", "inference", "trainer", "startup"], default="train", help="what to measure")
    add("--backbone", default="resnet18", help="a name that SFF takes")
    add("--stem", choices=get_args(Stem), default="small", help="see SFF")
    add("--granularity", nargs="+", default=["block", "layer", "4"], help="layer, block, stage, or a number of units")
    add("--classes", nargs="+", type=_positive, default=[10], help="a table for each")
    add("--batch", type=_positive, default=32, help="images of a step")
    add("--input-size", type=_positive, default=32, help="side of an image")
    add("--head", choices=list(HEADS), default="pooled", help="see SFF")
    add("--device", default="cpu", help="cpu or cuda")
    add("--precision", choices=["32", "bf16"], default="32", help="bf16: mixed")
    add("--channels-last", action="store_true", help="order of maps and weights in memory")
    add("--compile", action="store_true", help="each variant also with torch.compile: whole networks, or each block")
    add("--micro-batches", type=_positive, default=4, help="of the variant that accumulates gradients")
    add("--steps", type=_positive, default=2, help="counted steps of a turn; an epoch, for --what trainer, is one step")
    add("--epoch-batches", type=_positive, default=20, help="steps of an epoch, for --what trainer")
    add("--repetitions", type=_natural, default=9, help="turns of each variant; 0 only counts")
    add("--fits", type=_gib, metavar="GIB", help="instead of timing: the largest batch of which a step fits into GIB, "
        "found by trying, from --batch; compiles nothing")  # fmt: skip
    add("--json", type=as_path, metavar="FILE", help="write all figures")
    add("--frontier", type=as_path, metavar="FILE", help="instead of --granularity, the ways to train the network; "
        "draw what a step takes against what it keeps; needs matplotlib")  # fmt: skip
    add("--accuracy", nargs="+", default=[], metavar="VARIANT=RUNS/RECIPE/METHOD",
        help="test accuracies for the frontier, of runs made by ff_lightning.results")  # fmt: skip
    add("--plot", type=as_path, metavar="FILE", help="draw memory over a step, .svg or .png; needs matplotlib")
    return parser


def _startup(repetitions: int, console: Console) -> None:
    """Time of ``ff-lightning --help`` against the import of what it stands on."""
    commands = {
        "import lightning, torchvision": [sys.executable, "-c", "import lightning, torchvision"],
        "ff-lightning --help": [sys.executable, "-m", "ff_lightning", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repetitions + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if turn:  # the first one fills the caches
                seconds[name].append(time.perf_counter() - start)
    base, ours = (median(of_one) for of_one in seconds.values())
    console.print(
        f"{' against '.join(reversed(commands))}: {ours:.2f} s / {base:.2f} s = {ours / base:.2f}", markup=False
    )


if __name__ == "__main__":
    main()
