"""``ff-lightning probe``: what a linear read-out finds in a trained model, and in untrained weights."""

from argparse import Namespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ff_lightning.commands.ckpt_path import checkpoint_at, data_of, read_checkpoint
from ff_lightning.inference.facts import facts_of
from ff_lightning.local.probes import final_probe
from ff_lightning.modules import LocalLearner
from ff_lightning.training.trust import named_class


def main(settings: Namespace) -> None:
    """Print the accuracy of a probe on the model of a checkpoint, and on the same model with untrained weights.

    Args:
        settings: See `ff_lightning.commands.parsers.probe`.

    Raises:
        ValueError: If the checkpoint names no data, if its model has no features, or if an argument is out of range.
    """
    path = checkpoint_at(settings.ckpt_path)
    data: Any = data_of(path, settings.root)
    data.prepare_data()
    data.setup("fit")
    if not settings.no_test:
        data.setup("test")
    table = Table(title="linear read-out, %")
    for column in ("weights", "penalty", "validation", "test"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    found = []
    for name, model in zip(("trained", "untrained"), models_of(path, settings.seed), strict=True):
        loaders = data.train_dataloader(), data.val_dataloader(), None if settings.no_test else data.test_dataloader()
        probed = final_probe(model, *loaders, data.num_classes, settings.decays)
        found.append([100 * share for share in (probed.val, probed.test) if share is not None])
        table.add_row(name, f"{probed.decay:g}", *(f"{percent:.2f}" for percent in found[-1]))
    table.add_section()
    table.add_row("gain", "", *(f"{a - b:+.2f}" for a, b in zip(*found, strict=True)), style="bold")
    Console().print(table)


def models_of(path: str, seed: int) -> tuple[LocalLearner, LocalLearner]:
    """The model of a checkpoint, and one that is made alike and not trained."""
    facts = facts_of(read_checkpoint(path), path)
    cls: Any = named_class("the model", facts.class_path, (LocalLearner,))
    trained = cls.load_from_checkpoint(path, map_location="cpu")
    torch.manual_seed(seed)
    return trained, cls(**{name: value for name, value in trained.hparams.items() if not name.startswith("_")})
