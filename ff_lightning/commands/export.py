"""``ff-lightning export``: a trained model as a file for use elsewhere."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ff_lightning.commands.ckpt_path import checkpoint_at
from ff_lightning.commands.predict import image_files
from ff_lightning.inference import Predictor, export, load
from ff_lightning.inference.formats import WRITERS

COMPARED = 32
"""Images on which the export is compared with the original."""


def main(settings: Namespace) -> None:
    """Write an export, and say how far its scores are from those of the original.

    Args:
        settings: See `ff_lightning.commands.parsers.export`.

    Raises:
        ValueError: If they are too far, or an argument does not fit.
        FileExistsError: If the file is there already.
    """
    path = checkpoint_at(settings.ckpt_path)
    out = settings.out or Path(path).expanduser().with_suffix(WRITERS[settings.format][0])
    if out.exists() and not settings.overwrite:
        raise FileExistsError(f"out={str(out)!r} is there already: give another name, or --overwrite")
    predictor = load(path)
    images, on = None, "noise (give --data.root for real images)"
    if settings.root:
        files = image_files(settings.root)
        images = torch.stack([*islice(_readable(predictor, files, settings.root), COMPARED)])
        on = f"{len(images)} images of {settings.root}"
    differs = export(predictor, out, settings.format, images)
    print(f"{out}: {out.stat().st_size:,} bytes; scores equal those of the checkpoint to {differs:.1e} on {on}")


def _readable(predictor: Predictor, files: Sequence[str], root: str) -> Iterator[Tensor]:
    """The images of those files that can be read.

    Raises:
        ValueError: If there is none.
    """
    lost: list[OSError] = []
    for file in files:
        try:
            yield predictor.prepare(file)
        except OSError as error:
            lost.append(error)
    if len(lost) == len(files):
        raise ValueError(f"data.root={root!r}: none of the {len(files)} images can be read: {lost[0]}")
