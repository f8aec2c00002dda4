"""The command ff-lightning, up to where Lightning is needed: to import that takes seconds."""

import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ff_lightning import __version__
from ff_lightning.commands.answers import end, in_one_line, process_as_it_was
from ff_lightning.commands.parsers import PARSERS
from ff_lightning.util.suggest import closest

COMMANDS = {
    "fit": "train",
    "validate": "the figures of the validation samples",
    "test": "the figures of the test samples",
    "predict": "the classes of images in a folder",
    "exits": "early exit: error against multiply-adds",
    "probe": "the accuracy of linear read-outs, also of a method that learns without labels",
    "export": "a model for use elsewhere: ONNX, torch.export, safetensors",
    "sheet": "a picture of what a network sees of a data set",
    "init": "a config to start from",
    "completion": "what bash needs to complete commands and options",
}
OF_TRAINER = ("fit", "validate", "test", "predict")
"""The commands that are Lightning's own; `predict` is so only in part, see `is_of_files`."""

EPOCHS = 10
"""Of a run for which neither epochs, steps nor time are given."""

_OVERVIEW = f"""\
ff-lightning {__version__}: train any network block by block, each block on its own loss, inside Lightning.

  ff-lightning fit                                   a first run: three blocks on scans of digits, nothing to download
  ff-lightning init                                  write config.yaml, a config to start from
  ff-lightning predict --ckpt_path X --data.root F   the classes of the images in folder F, as predictions.csv

Commands, each with --help:
{{}}
"""

_NOT_FIT = OF_TRAINER[1:]
_OPTIONS = (
    ("--config FILE", "YAML; again and again, later ones win; ff-lightning init writes one", OF_TRAINER),
    ("--ckpt_path PATH|last|best", "go on with this run", ("fit",)),
    ("--ckpt_path PATH|last|best", "the trained model; its data are used unless others are given", _NOT_FIT),
    ("--model SFF|Backprop|...", "the method; what it takes: --model.help SFF", ("fit",)),
    ("--model NAME", "where the checkpoint names none, or a class of your own", _NOT_FIT),
    ("--data Digits|ImageFolder|...", "the data set; what it takes: --data.help ImageFolder", (*OF_TRAINER, "sheet")),
    ("--data.root FOLDER", "where the data lie", (*OF_TRAINER, "sheet")),
    ("--data.batch_size N", "samples for one step", OF_TRAINER),
    ("--model.backbone NAME", "cnn, a network of torchvision, timm/NAME, or a class of your own", ("fit",)),
    ("--model.granularity NAME", "layer, block, stage, a number of units, or names of modules", ("fit",)),
    ("--model.lr X", "learning rate of a block", ("fit",)),
    ("--seed_everything N", "of all that is drawn", ("fit",)),
    ("--trainer.max_epochs N", f"{EPOCHS} if neither max_steps nor max_time is given", ("fit",)),
    ("--trainer.accelerator NAME", "cpu, gpu or auto", OF_TRAINER),
    ("--trainer.devices N", "how many of them", OF_TRAINER),
    ("--trainer.precision NAME", "32-true, bf16-mixed, 16-mixed", OF_TRAINER),
    ("--trainer.default_root_dir DIR", "where logs and checkpoints go, and where last and best are sought", OF_TRAINER),
    ("--pictures FOLDER", "draw what is confused, and what each block knows; needs matplotlib", ("test",)),
    ("--pictures_format png|svg", "how", ("test",)),
    ("--out FILE", "the picture to write; sheet.png", ("sheet",)),
    ("--rows N", "rows of eight images; 4", ("sheet",)),
    ("--print_config", "all settings with their values, as YAML, and no run", OF_TRAINER),
    ("--help_all", "every option of Lightning and of the default model and data: hundreds of lines", OF_TRAINER),
)
"""What is needed most: option, what it is, and the commands that have it."""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command: fit, validate, test, predict, exits, probe, export, sheet, init or completion.

    Args:
        args: What follows ``ff-lightning`` on the command line. None: the command line of the process.
    """
    given = [re.sub("^-c(?==|$)", "--config", argument) for argument in (sys.argv[1:] if args is None else args)]
    command = given[0] if given else "--help"
    with process_as_it_was(), in_one_line(), _reader_may_leave():
        if command in ("--help", "-h"):
            print(_OVERVIEW.format("\n".join(f"  {name:10}  {what}" for name, what in COMMANDS.items())))
        elif command == "--version":
            print(f"ff-lightning {__version__}")
        elif command in PARSERS and (command != "predict" or is_of_files(given)):
            settings = PARSERS[command]().parse_args(given[1:])
            _import(f"ff_lightning.commands.{command}").main(settings)
        elif command in (*OF_TRAINER, "sheet") and {"--help", "-h"} & set(given):
            print(_options(command))
        elif command == "sheet":
            _import("ff_lightning.commands.sheet").main(given)
        elif command not in COMMANDS and not command.startswith("-"):
            text = f"{command!r} is no command: known are {', '.join(COMMANDS)}{closest(command, COMMANDS)}"
            end(text, "ff-lightning --help")
        else:
            _import("ff_lightning.cli").run(given)


def is_of_files(args: Sequence[str]) -> bool:
    """Whether a command line asks for the classes of files, and not for a data module in Lightning's own way."""
    names = {arg.split("=")[0] for arg in args}
    others = {"--data", "--config", "--print_config", "--help_all", "--seed_everything"}
    of_trainer = any(name.startswith(("--trainer", "--model")) for name in names)
    asks = any(name.endswith(".help") for name in names)
    return args[:1] == ["predict"] and not names & others and not of_trainer and not asks


def _import(module: str) -> Any:
    """Import what runs a command; after Lightning, which sets the format of warnings too, set it to one line.

    The user's own classes are found from then on: before, a file of the working folder could stand for a package that
    Lightning or another library would import if it were installed.
    """
    imported = importlib.import_module(module)
    sys.path.append(os.getcwd())
    warnings.formatwarning = _in_one_line
    return imported


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End without a traceback where what reads the output, such as head, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        raise SystemExit(1) from None


def _in_one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    text = " ".join(str(message).split())
    how = " (--trainer.callbacks+=NAME)" if "add the following callbacks" in text else ""
    return f"warning: {text}{how}\n"


def _options(command: str) -> str:
    """The help of a command on one screen."""
    lines = [f"  {option:30} {what}" for option, what, commands in _OPTIONS if command in commands]
    return "\n".join([f"usage: ff-lightning {command} [options]", "", *lines])
