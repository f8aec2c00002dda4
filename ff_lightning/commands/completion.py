"""``ff-lightning completion``: what bash needs to complete commands, options and their values."""

import contextlib
import io
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, Literal, get_args, get_origin

from lightning.pytorch import Trainer

from ff_lightning import __version__, data, modules
from ff_lightning.backbones.build import known_names
from ff_lightning.commands.classes import arguments_of
from ff_lightning.commands.start import COMMANDS, OF_TRAINER
from ff_lightning.commands.start import main as run

_BASES = ("LocalLearner", "DataModule", "ImageData")
_SCRIPT = """\
# ff-lightning completion, version VERSION: for bash; zsh reads it after autoload -U +X bashcompinit && bashcompinit
_ff_lightning() {
  local word="${COMP_WORDS[COMP_CWORD]#=}" command="${COMP_WORDS[1]}" words="" model=SFF data=Digits before="" given
  for given in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
    if [[ $given == "=" ]]; then continue; fi
    case "$before" in
      --model) model="${given##*.}" ;;
      --data) data="${given##*.}" ;;
    esac
    before="$given"
  done
  if ((COMP_CWORD == 1)); then
    words="COMMANDS"
  elif [[ $word == -* || -z $word && $before != -* ]]; then
    case "$command" in
OPTIONS
    esac
    case "$command" in fit | validate | test | predict)
      case "$model" in
MODEL
      esac ;;
    esac
    case "$command" in fit | validate | test | predict | sheet)
      case "$data" in
DATA
      esac ;;
    esac
  else
    case "$before" in
VALUES
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _ff_lightning ff-lightning
"""


def main(settings: Namespace) -> None:
    """Print a script for the shell. Its words are those of today: it starts no Python when it is asked.

    Args:
        settings: None.
    """
    print(script(), end="")


def script() -> str:
    """The script; the options of a command are those that its help lists."""
    options, values = {}, {"--ckpt_path": ["last", "best"], "--model.backbone": known_names()}
    for command in COMMANDS:
        text = _help(command, "--help_all") + "  --help_all\n" if command in OF_TRAINER else ""
        if command not in OF_TRAINER or command == "predict":  # which is one of the Trainer and one of files
            text += _help(command, "--help")
        options[command] = ["--help", *re.findall(r"^ +(?:-\w, )?(--[\w.]+)", text, re.MULTILINE)]
        values |= {option: choices.split(",") for option, choices in re.findall(r"(--\w+) \{([\w,]+)\}", text)}
    of_part: dict[str, dict[str, list[str]]] = {}
    for part, module in (("model", modules), ("data", data)):
        classes = {name: getattr(module, name) for name in module.__all__ if name not in _BASES}
        values |= {f"--{part}": [*classes], f"--{part}.help": [*classes]}
        arguments = {name: [parameter for parameter, _ in arguments_of(cls)] for name, cls in classes.items()}
        of_part[part] = {name: [f"--{part}.{each.name}" for each in own] for name, own in arguments.items()}
        for own in arguments.values():
            values |= {f"--{part}.{name}": words for name, words in _choices(own) if f"--{part}.{name}" not in values}
    values |= {f"--trainer.{name}": words for name, words in _choices(signature(Trainer).parameters.values())}
    parts = {
        "VERSION": __version__,
        "COMMANDS": " ".join(COMMANDS),
        "OPTIONS": _cases(options, 6),
        "MODEL": _cases(of_part["model"], 8),
        "DATA": _cases(of_part["data"], 8),
        "VALUES": _cases(values, 6),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], _SCRIPT)


def _help(command: str, option: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run([command, option])
    return out.getvalue()


def _cases(words: Mapping[str, Iterable[str]], indent: int) -> str:
    """The branches of a ``case`` that add words."""
    return "\n".join(f'{" " * indent}{name}) words+=" {" ".join(dict.fromkeys(of))}" ;;' for name, of in words.items())


def _choices(parameters: Iterable[Parameter]) -> Iterator[tuple[str, list[str]]]:
    """The names that arguments may have as values, by their annotations."""
    for parameter in parameters:
        names = [str(name) for name in _literals(parameter.annotation)]
        if names:
            yield parameter.name, names


def _literals(annotation: Any) -> Iterator[Any]:
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is not list:
        for part in get_args(annotation):
            yield from _literals(part)
