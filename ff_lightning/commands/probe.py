"""``ff-lightning probe``: what a linear read-out finds in a trained model, and in untrained weights."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ff_lightning.commands.answers import PlainParser
from ff_lightning.commands.ckpt_path import checkpoint_at, data_of, read_checkpoint
from ff_lightning.inference.facts import facts_of
from ff_lightning.local.probes import DECAYS, final_probe
from ff_lightning.modules import LocalLearner
from ff_lightning.training.trust import named_class


def main(args: Sequence[str]) -> None:
    """Print the accuracy of a probe on the model of a checkpoint, and on the same model with untrained weights.

    Args:
        args: What follows ``ff-lightning probe`` on the command line.

    Raises:
        ValueError: If the checkpoint names no data, if its model has no features, or if an argument is out of range.
    """
    parser = PlainParser(
        prog="ff-lightning probe",
        description="Accuracy of a linear read-out of all layers, trained on frozen features; the same for untrained "
        "weights. Its penalty is chosen on the validation samples, the test samples are looked at once.",
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a trained model, or last, or best")
    parser.add_argument("--data.root", dest="root", help="folder of the data; by itself: the one of the training")
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS, help="penalties to choose from")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained weights")
    parser.add_argument("--no_test", action="store_true", help="validation samples alone, to choose settings by")
    settings = parser.parse_args(args)
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
