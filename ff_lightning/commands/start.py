"""Where a user begins: three examples, help on one screen, and a config to start from."""

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import docstring_parser

from ff_lightning.commands.answers import PlainParser, as_path, end
from ff_lightning.util.files import replacing
from ff_lightning.util.suggest import closest

COMMANDS = ("fit", "validate", "test", "predict")
"""Of the Trainer."""

EXAMPLES = """\
ff-lightning: train any network block by block, each block on its own loss, inside Lightning.

  ff-lightning fit                                   a first run: three blocks on scans of digits, nothing to download
  ff-lightning init                                  write config.yaml, a config to start from
  ff-lightning predict --ckpt_path X --data.root F   the classes of the images in folder F, as predictions.csv

Commands: fit, validate, test, predict, exits, export, probe, sheet, init, completion. Each has --help;
ff-lightning --help lists global options.
"""

_OPTIONS = """\
usage: ff-lightning {command} [--config FILE ...] [--model NAME] [--data NAME] [options]

  --config FILE                  YAML; again and again, later ones win; ff-lightning init writes one
  --ckpt_path PATH|last|best     {ckpt_path}
  --model SFF|Backprop|...       the method; what it takes: --model.help SFF
  --data Digits|ImageFolder|...  the data set; what it takes: --data.help ImageFolder
  --seed_everything N            of all that is drawn

  --model.backbone NAME          cnn, a network of torchvision, timm/NAME, or a class of your own
  --model.granularity NAME       layer, block, stage, a number of units, or names of modules
  --model.lr X                   learning rate of a block
  --data.root FOLDER             where the data lie
  --data.batch_size N            samples for one step

  --trainer.max_epochs N         {epochs}
  --trainer.accelerator NAME     cpu, gpu or auto
  --trainer.devices N            how many of them
  --trainer.precision NAME       32-true, bf16-mixed, 16-mixed
  --trainer.default_root_dir DIR where logs and checkpoints go

{pictures}  --print_config                 all settings with their values, as YAML, and no run
  --help_all                     every option of Lightning and of the default model and data: hundreds of lines
"""

_PICTURES = """\
  --pictures FOLDER              draw what is confused, the worst mistakes, what each block knows; needs matplotlib
  --pictures_format png|svg      how

"""

TEMPLATE = """\
# ff-lightning fit --config {name}
# What is left out has its default; see: ff-lightning fit --config {name} --print_config
seed_everything: 0
trainer:
  max_epochs: {epochs}
  # precision: bf16-mixed      # on a GPU
model:
  class_path: SFF              # Backprop: the same network and recipe by backpropagation
  init_args:
    backbone: cnn              # resnet18, mobilenet_v3_small, timm/NAME, or class_path and init_args of your own
    # stem: small              # for images of about 32 pixels
    granularity: block         # layer, block, stage
    lr: 0.005
data:
  class_path: Digits           # CIFAR10; ImageFolder for root/{{train,val,test}}/<class>/*; see docs/data.md
  init_args:
    # root: data
    batch_size: 64
"""

EPOCHS = 10
"""Of a run for which neither epochs, steps nor time are given."""


def help_of(given: Sequence[str], classes: Mapping[str, type]) -> str | None:
    """The help that a command line asks for, where that is one of these short ones.

    Args:
        given: The command line.
        classes: Models and data modules by name.
    """
    if not given:
        return EXAMPLES
    if given[0] not in COMMANDS:
        return None
    if {"--help", "-h"} & set(given):
        resumes = "go on with this run" if given[0] == "fit" else "the trained model"
        epochs = f"{EPOCHS} if neither max_steps nor max_time is given"
        pictures = _PICTURES if given[0] == "test" else ""
        return _OPTIONS.format(command=given[0], ckpt_path=resumes, epochs=epochs, pictures=pictures)
    for option in ("--model.help", "--data.help"):
        name = _value_of(option, given)
        if name is not None and name in classes:
            return class_help(option.removesuffix(".help"), classes[name])
        if name and "." not in name:
            end(f"{option}={name!r} is not known{closest(name, classes)}", f"ff-lightning {given[0]} --help")
    return None


def _value_of(option: str, given: Sequence[str]) -> str | None:
    for argument, following in zip(given, [*given[1:], ""], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def class_help(option: str, cls: type) -> str:
    """The arguments of a class with their defaults and what their docstrings say.

    Examples:
        >>> from ff_lightning.data import FakeImages
        >>> class_help("--data", FakeImages).splitlines()[3:5]
        ['  --data.images 1000', '      Number of training images; there are a quarter as many to test.']
    """
    lines = [f"{cls.__name__}: {docstring_parser.parse(inspect.getdoc(cls) or '').short_description}", "", "options:"]
    for parameter, text in arguments_of(cls):
        default = "(required)" if parameter.default is parameter.empty else str(parameter.default)
        lines.append(f"  {option}.{parameter.name} {default}".rstrip())
        lines += textwrap.wrap(" ".join(text.split()), 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "What stands behind an option is its default; classes go by name or import path."])


def arguments_of(cls: type) -> Iterator[tuple[inspect.Parameter, str]]:
    """The arguments of a class and those that it hands on, each with its description."""
    seen = {"self"}
    texts = {
        parameter.arg_name: parameter.description or ""
        for base in reversed(cls.__mro__)
        for parameter in docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")).params
    }
    for base in cls.__mro__:
        parameters = [*inspect.signature(base).parameters.values()] if "__init__" in vars(base) else []
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter, texts.get(parameter.name, "")
        if parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def init(args: Sequence[str]) -> None:
    """Write a config to start from.

    Args:
        args: What follows ``ff-lightning init`` on the command line.

    Raises:
        FileExistsError: If the file is there already.
    """
    parser = PlainParser(prog="ff-lightning init", description="Write a config to start from.")
    parser.add_argument("file", type=as_path, nargs="?", default="config.yaml", help="to write; config.yaml")
    path = as_path(str(parser.parse_args(args).file))
    if path.exists():
        raise FileExistsError(f"{path} is there already: give another name")
    with replacing(path) as part:
        part.write_text(TEMPLATE.format(name=path, epochs=EPOCHS), encoding="utf-8")
    print(f"{path}: edit it, then: ff-lightning fit --config {path}")
