"""The command ff-lightning: LightningCLI over the models and data modules of this package."""

import inspect
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ff_lightning import __version__, data, modules
from ff_lightning.callbacks import BestCheckpoint, BlockTable, LastCheckpoint
from ff_lightning.checkpoints import check_whole, fetched, is_remote, read
from ff_lightning.data.sheet import main as sheet
from ff_lightning.modules import LocalLearner
from ff_lightning.modules.trust import check_stored
from ff_lightning.suggest import closest

_PACKAGE = Path(__file__).parent
_REFUSALS = (ValueError, OSError, FloatingPointError, MisconfigurationException)
_FROM_DATA = ("num_classes", "input_shape")


class _Parser(LightningArgumentParser):
    """Says what is wrong, and which name may have been meant, without pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        classes = [*modules.__all__, *data.__all__]
        for name, option in re.findall(r"dot import path string: (\S+)|Option '(\S+)' is not accepted", message):
            message += closest(name, classes) if name else closest(option, _argument_names(classes))
        sys.stderr.write(f"error: {message}\nTry 'ff-lightning fit --help' or 'ff-lightning fit --model.help SFF'\n")
        raise SystemExit(2)


class CLI(LightningCLI):
    """Models and data by their class names; what the model must know of the data is taken from it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults, the best checkpoint, and the links from data to model."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.filename": "epoch{epoch:03d}-acc{val/acc:.4f}",
                "checkpoint.auto_insert_metric_name": False,
                "model": {"class_path": "ff_lightning.SFF"},
                "data": {"class_path": "ff_lightning.data.Digits"},
            }
        )
        for name in _FROM_DATA:
            parser.link_arguments("data", f"model.init_args.{name}", self._from_data(name), apply_on="instantiate")

    def _from_data(self, name: str) -> Callable[[LightningDataModule], Any]:
        """What the model gets: the user's own value, or else the one of the data. The model compares them in setup."""

        def value(data: LightningDataModule) -> Any:
            given = self.config[self.subcommand].model.init_args.get(name)
            return getattr(data, name, None) if given is None else given

        return value

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Leave the table of results to `BlockTable`."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for subcommand in ("validate", "test"):
            self._subcommand_parsers[subcommand].set_defaults({"verbose": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what a checkpoint says of its model and data replaces defaults, not the user's own arguments."""
        super().parse_arguments(parser, args)
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        if not path or path in ("best", "last", "hpc", "registry"):
            return
        if not is_remote(path) and not Path(path).is_file():
            parser.error(f"ckpt_path={path!r}: there is no such file")
        try:
            check_whole(path)
            defaults = self._stored_in(read(fetched(path)))
        except UnpicklingError:
            parser.error(
                f"ckpt_path={path!r} holds more than tensors and plain values: it could run code and is not read"
            )
        except ValueError as error:
            parser.error(str(error))
        if defaults:
            self._subcommand_parsers[subcommand].set_defaults(defaults)
            super().parse_arguments(parser, args)

    def _stored_in(self, checkpoint: Any) -> dict[str, Any]:
        """Model and data of a checkpoint that was written by the command line, if it may name what it names."""
        found = {}
        for part, key, kind in (
            ("model", "hyper_parameters", LocalLearner), ("data", "datamodule_hyper_parameters", LightningDataModule),
        ):  # fmt: skip
            stored = checkpoint.get(key, {})
            if "_class_path" in stored:
                check_stored(part, stored, kind, self.config[self.config.subcommand].get(part))
                arguments = {name: value for name, value in stored.items() if not name.startswith("_")}
                found[part] = {"class_path": stored["_class_path"], "init_args": arguments}
        return found

    def _parse_ckpt_path(self) -> None:
        """Nothing: `parse_arguments` has done it, without overruling the command line."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; without checkpoints where they are switched off."""
        settings = self.config_init[self.subcommand].trainer
        if settings.enable_checkpointing is False or settings.barebones:
            self._parser(self.subcommand).callback_keys = []
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer."""
        with _in_one_line():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with _in_one_line():
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Follow the learning rates, where there is a logger for them."""
        if self.trainer.loggers:
            cast(Any, self.trainer).callbacks.append(LearningRateMonitor(logging_interval="step"))

    def before_test(self) -> None:
        """Say so where there is nothing to test."""
        if not self.config[self.subcommand].get("ckpt_path"):
            warnings.warn("no --ckpt_path was given: these are the results of an untrained network", stacklevel=1)

    before_validate = before_predict = before_test


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand: fit, validate, test or predict, or sheet.

    Args:
        args: What follows ``ff-lightning`` on the command line. None: the command line of the process.
    """
    sys.path.insert(0, os.getcwd())  # the user's own classes, as with python -m
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["sheet"]:  # needs neither model nor trainer, which a subcommand of LightningCLI has
        sheet(given[1:])
        return
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message="The dirpath has changed from")  # every test writes a folder of its own
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
        parser_kwargs={"version": __version__, "epilog": "ff-lightning sheet --help: look at the images of a data set"},
        args=None if args is None else list(args),
    )


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Answer what the package itself refuses in one line, without the pages around it."""
    try:
        yield
    except Exception as error:
        refusal = _own_refusal(error)
        if refusal is None:
            raise
        sys.stderr.write(f"error: {refusal}\n")
        raise SystemExit(2) from error


def _own_refusal(error: BaseException | None) -> BaseException | None:
    """The error in the chain of causes that this package raised itself."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, _REFUSALS) and frames and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return error
        error = error.__cause__ or error.__context__
    return None


def _argument_names(classes: list[str]) -> set[str]:
    """Names of all arguments of these classes."""
    found = [getattr(modules, name, None) or getattr(data, name) for name in classes]
    bases = {base for cls in found for base in cls.__mro__ if base.__module__.startswith("ff_lightning")}
    return {name for base in bases for name in inspect.signature(base).parameters}
