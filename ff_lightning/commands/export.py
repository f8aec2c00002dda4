"""``ff-lightning export``: a trained model as a file for use elsewhere."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ff_lightning.commands.answers import PlainParser, as_path
from ff_lightning.commands.ckpt_path import checkpoint_at
from ff_lightning.commands.predict import image_files
from ff_lightning.inference import Predictor, export, load
from ff_lightning.inference.formats import WRITERS

COMPARED = 32
"""Images on which the export is compared with the original."""


def main(args: Sequence[str]) -> None:
    """Write an export, and say how far its scores are from those of the original.

    Args:
        args: What follows ``ff-lightning export`` on the command line.

    Raises:
        ValueError: If they are too far, or an argument does not fit.
        FileExistsError: If the file is there already.
    """
    parser = PlainParser(prog="ff-lightning export", description="Write a trained model for use elsewhere.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a trained model, or last, or best")
    parser.add_argument("--format", choices=WRITERS, default="onnx", help="safetensors holds the weights alone")
    parser.add_argument("--out", type=as_path, help="file to write; by itself: beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--data.root", dest="root", help="images to compare the export with the original on")
    settings = parser.parse_args(args)
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
