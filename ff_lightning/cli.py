"""The commands fit, validate, test and predict: LightningCLI over the models and data modules of this package."""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich import get_console
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ff_lightning.callbacks import BestCheckpoint, BlockTable, Charts, LastCheckpoint, Pictures, TimeLeft
from ff_lightning.callbacks.table import LogShortEpochs
from ff_lightning.commands.answers import check_configs, collect_namesakes, end, of_parser, subclasses
from ff_lightning.commands.ckpt_path import find_checkpoint, found_root, read_checkpoint
from ff_lightning.commands.classes import asked_class
from ff_lightning.commands.composing import OF_ONE_SET, compose, names
from ff_lightning.commands.recorded import recorded
from ff_lightning.commands.start import EPOCHS
from ff_lightning.commands.start import main as main
from ff_lightning.heads import GoodnessHead, LookAhead, PooledHead
from ff_lightning.modules import LocalLearner
from ff_lightning.tasks import Unlabelled, task_of_name
from ff_lightning.training.checkpoint_io import is_remote
from ff_lightning.training.schedules import OF_WHOLE_RUN
from ff_lightning.training.trust import check_stored, named_class

_DEFAULT_DATA = "ff_lightning.data.Digits"
_BASES = (
    *(LocalLearner, LightningDataModule, Optimizer, LRScheduler, Callback, Logger),
    *(GoodnessHead, PooledHead, LookAhead),
)
"""Of all classes that options may name."""

_FROM_DATA = ("num_classes", "input_shape", "vocabulary", "task")


class _Parser(LightningArgumentParser):
    """Says what is wrong, and which name may have been meant, without pages of usage."""

    given: Sequence[str] = ()
    commands: Mapping[str, LightningArgumentParser] = {}
    """The command line and the parsers of its subcommands: for all parsers, jsonargparse makes more of them itself."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        classes = subclasses(*_BASES)
        options = {name: _options(parser) for name, parser in self.commands.items()}
        text = of_parser(message, self.given, options, classes)
        command = next((given for given in self.given if given in self.commands), "fit")
        end(text, f"ff-lightning {command} --help", f"ff-lightning {command} --model.help SFF")

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """The arguments as text, without functions and classes that are defaults: who reads the text has them again.

        Text cannot say some of them, such as a partial, and there are others that no checkpoint may name.
        """
        namespace = namespace.clone()
        named = {
            key: value for key, value in namespace.items() if callable(value) and not isinstance(value, os.PathLike)
        }
        defaults = self.get_defaults(skip_validation=True) if named else Namespace()
        for key, value in named.items():
            default = defaults.get(key)
            if value is default or (type(value) is type(default) and not hasattr(value, "__qualname__")):  # its copy
                del namespace[key]
        return cast(str, super().dump(namespace, *args, **kwargs))

    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **kwargs: Any) -> Any:
        """Jsonargparse gives linked targets to what a class path stands for, but takes them for classes alone."""
        return super().add_function_arguments(*args, **kwargs)


def _options(parser: LightningArgumentParser) -> set[str]:
    """Names of all options, such as ``trainer.max_epochs``, and ``model.lr`` of the default model."""
    keys = [key for key, _ in parser.get_defaults(skip_validation=True).items()]
    return {key.replace(".init_args.", ".").removesuffix(".class_path") for key in keys}


class CLI(LightningCLI):
    """Models and data by their class names; what the model must know of the data is taken from it."""

    command = ""
    """As it is recorded in checkpoints."""
    first_step: int | None = None
    """Of a run that goes on, the number of steps in its checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults, the best checkpoint, and the links from data to model."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.set_defaults(
            {
                "checkpoint.auto_insert_metric_name": False,
                "model": {"class_path": "ff_lightning.SFF"},
                "data": {"class_path": _DEFAULT_DATA},
            }
        )
        for name in _FROM_DATA:
            parser.link_arguments("data", f"model.init_args.{name}", self._from_data(name), apply_on="instantiate")

    def _from_data(self, name: str) -> Callable[[LightningDataModule], Any]:
        """What the model gets: the user's own value, or else the one of the data. The model compares them in setup."""

        def value(data: LightningDataModule) -> Any:
            given = self.config[self.subcommand].model.init_args.get(name)
            if given is not None:
                return given.as_dict() if isinstance(given, Namespace) else given  # a class with its arguments
            own = getattr(data, name, None)
            return type(task_of_name(own)).__name__ if name == "task" and isinstance(own, str) else own

        return value

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Leave the table of results to `BlockTable`."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for subcommand in ("validate", "test"):
            self._subcommand_parsers[subcommand].set_defaults({"verbose": False})
        self._subcommand_parsers["test"].add_argument(
            "--pictures", type=str | None, default=None, help="folder to draw what is confused into; see `Pictures`"
        )
        self._subcommand_parsers["test"].add_argument("--pictures_format", type=Literal["png", "svg"], default="png")
        _Parser.commands = self._subcommand_parsers

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what a checkpoint says of its model and data replaces defaults, not the user's own arguments.

        A class that is asked for brings its own defaults: jsonargparse would keep those of the default class.
        """
        given = sys.argv[1:] if args is None else args
        collect_namesakes(*_BASES)
        first = parser.parse_args([argument for argument in given if not argument.startswith("--print_config")])
        subcommand = first.subcommand
        try:
            path = self._ckpt_path(first[subcommand])
            stored = {} if path is None else self._stored_in(path, first[subcommand])
            if path is not None and subcommand != "fit" and "data" not in stored and not names("data", given):
                raise ValueError(f"ckpt_path={path!r} names no data, no ff-lightning fit has written it: give --data")
        except ValueError as error:
            parser.error(str(error))
        chosen = {part: {"class_path": first[subcommand][part].class_path} for part in ("model", "data")}
        self._subcommand_parsers[subcommand].set_defaults({**chosen, **stored})
        super().parse_arguments(parser, args)
        if path is not None:
            self.config[subcommand].ckpt_path = path

    def _ckpt_path(self, config: Any) -> str | None:
        """The file to read a checkpoint from; None: there is none, or Lightning finds it."""
        path = config.get("ckpt_path")
        if path in ("last", "best"):
            return find_checkpoint(path, config.trainer.default_root_dir, config.get("last", {}).get("dirpath"))
        if not path or path in ("hpc", "registry"):
            return None
        return path if is_remote(path) else str(Path(path).expanduser())

    def _stored_in(self, path: str, config: Any) -> dict[str, Any]:
        """Model and data of a checkpoint that was written by the command line, if it may name what it names."""
        checkpoint = read_checkpoint(path)
        self.first_step = checkpoint.get("global_step")
        found = {}
        for part, key, kind in (
            ("model", "hyper_parameters", LocalLearner), ("data", "datamodule_hyper_parameters", LightningDataModule),
        ):  # fmt: skip
            stored = checkpoint.get(key, {})
            if "_class_path" in stored:
                if part == "model" and names("model", _Parser.given):
                    _check_same_method(path, config.model.class_path, stored["_class_path"])
                check_stored(part, stored, kind, config.get(part))
                arguments = {name: value for name, value in stored.items() if not name.startswith("_")}
                if part == "data" and self._is_other_data(config.data.class_path, stored["_class_path"]):
                    arguments = {name: value for name, value in arguments.items() if name not in OF_ONE_SET}
                elif part == "data":
                    arguments = found_root(named_class(part, stored["_class_path"]), arguments, path)
                found[part] = {"class_path": stored["_class_path"], "init_args": arguments}
        return found

    @staticmethod
    def _is_other_data(given: str, stored: str) -> bool:
        """Whether the user asks for another class of data than a checkpoint names."""
        asked = given != _DEFAULT_DATA or any(argument.split("=")[0] == "--data" for argument in _Parser.given)
        return asked and given.rpartition(".")[2] != stored.rpartition(".")[2]

    def _parse_ckpt_path(self) -> None:
        """Nothing: `parse_arguments` has done it, without overruling the command line."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; without checkpoints where they are switched off, and without a bar in a file."""
        settings = self.config_init[self.subcommand].trainer
        if settings.enable_checkpointing is False or settings.barebones:
            self._parser(self.subcommand).callback_keys = []
        console = get_console()
        own = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        own_bar = any(isinstance(callback, ProgressBar) for callback in own)
        if settings.enable_progress_bar is None and not (own_bar or console.is_terminal or console.is_jupyter):
            kwargs["enable_progress_bar"] = False
        trainer = super().instantiate_trainer(**kwargs)
        given = (settings.max_epochs, settings.max_time, None if settings.max_steps == -1 else settings.max_steps)
        if self.subcommand == "fit" and given == (None, None, None) and not settings.fast_dev_run:
            trainer.fit_loop.max_epochs = EPOCHS
            rank_zero_info(f"training for {EPOCHS} epochs, since no --trainer.max_epochs was given")
        if settings.log_every_n_steps is None:
            cast(Any, trainer).callbacks.append(LogShortEpochs())
        return trainer

    def before_fit(self) -> None:
        """Say how long it takes, and if nothing is validated; group what is logged, where there is a logger."""
        every, epochs = self.trainer.check_val_every_n_epoch, self.trainer.max_epochs
        if every is not None and epochs is not None and 0 < epochs < every:
            rank_zero_warn(
                f"check_val_every_n_epoch={every}, and the run has max_epochs={epochs}: there is no validation, and so "
                "no best checkpoint"
            )
        self.model.command = self.command
        callbacks = cast(Any, self.trainer).callbacks
        callbacks.insert(0, TimeLeft())  # before the bar, which shows what it says
        if self.trainer.loggers:
            callbacks.append(Charts())

    def after_fit(self) -> None:
        """Say so where nothing was left to train."""
        if self.trainer.global_step == self.first_step:
            path, schedule = self.config[self.subcommand].ckpt_path, self.model.schedule
            how = "give a higher --trainer.max_epochs"
            if schedule in OF_WHOLE_RUN:
                takes_weights = "weights" in inspect.signature(type(self.model)).parameters
                how = f"start a new run{f' with --model.weights {path}' if takes_weights else ''}"
                how += f", since lr_scheduler={schedule!r} has ended"
            rank_zero_info(f"nothing was left to train: the run of {path} is finished; to train on, {how}")

    def before_test(self) -> None:
        """Say so where there is nothing to test."""
        if not self.config[self.subcommand].get("ckpt_path"):
            warnings.warn("no --ckpt_path was given: these are the results of an untrained network", stacklevel=1)

        config = self.config[self.subcommand]
        if config.get("pictures") is not None:
            cast(Any, self.trainer).callbacks.append(Pictures(config.pictures, config.pictures_format))

    before_validate = before_predict = before_test

    def after_test(self) -> None:
        """Say where an accuracy comes from, for a method that gives no answers."""
        if isinstance(self.model.task, Unlabelled):
            path = self.config[self.subcommand].ckpt_path or "FILE"
            name = type(self.model).__name__
            rank_zero_info(f"{name} learns without labels; for an accuracy: ff-lightning probe --ckpt_path {path}")

    after_validate = after_test

    def after_predict(self) -> None:
        """Say so where the scores went nowhere."""
        if not any(isinstance(callback, BasePredictionWriter) for callback in cast(Any, self.trainer).callbacks):
            rank_zero_info(
                "nothing was written: give a BasePredictionWriter as --trainer.callbacks, or for a table of the "
                "classes of images --ckpt_path and --data.root alone"
            )


def _check_same_method(path: str, asked: str, stored: str) -> None:
    """Raise ValueError if a checkpoint is of another method than the one that is asked for."""
    known = subclasses(LocalLearner)
    given, own = (known.get(name.rpartition(".")[2]) for name in (asked, stored))
    if given and own and not (issubclass(given, own) or issubclass(own, given)):
        raise ValueError(
            f"ckpt_path={path!r} is of {own.__name__}, and the command asks for {given.__name__}: give another "
            "checkpoint, or leave the model out"
        )


def run(given: Sequence[str]) -> None:
    """Run a command of the Trainer.

    Args:
        given: What follows ``ff-lightning`` on the command line.
    """
    text = asked_class(given, subclasses(*_BASES))
    if text is not None:
        print(text)
        return
    given = ["--help" if argument == "--help_all" else argument for argument in given]
    check_configs(given)
    CLI.command = recorded(given)
    given = compose(given)
    _Parser.given = given
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in str(record.msg))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval")  # see LogShortEpochs
    if given[0] != "fit":  # what callbacks of the training kept does not matter then
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    # each test writes a folder of its own
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    CLI(
        LocalLearner,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [BlockTable()], "enable_model_summary": False},
        save_config_kwargs={"overwrite": True},
        parser_class=_Parser,
        args=given,
    )
