"""``ff-lightning export``: a trained model as a file for use elsewhere."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from ff_lightning.commands.answers import PlainParser, as_path
from ff_lightning.commands.predict import image_files
from ff_lightning.inference import export, load
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
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a trained model")
    parser.add_argument("--format", choices=WRITERS, default="onnx", help="safetensors holds the weights alone")
    parser.add_argument("--out", type=as_path, help="file to write; by itself: beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--data.root", dest="root", help="images to compare the export with the original on")
    settings = parser.parse_args(args)
    out = settings.out or Path(settings.ckpt_path).expanduser().with_suffix(WRITERS[settings.format][0])
    if out.exists() and not settings.overwrite:
        raise FileExistsError(f"out={str(out)!r} is there already: give another name, or --overwrite")
    predictor = load(settings.ckpt_path)
    images, on = None, "noise (give --data.root for real images)"
    if settings.root:
        files = image_files(settings.root)
        images = torch.stack([predictor.prepare(file) for file in islice(files, COMPARED)])
        on = f"{len(images)} images of {settings.root}"
    differs = export(predictor, out, settings.format, images)
    print(f"{out}: {out.stat().st_size:,} bytes; scores equal those of the checkpoint to {differs:.1e} on {on}")
