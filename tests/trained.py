"""A network that was trained on real images in folders, for the tests of what is done with it."""

import contextlib
import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ff_lightning.cli import main

CLASSES = ("a plain one", "two, or 'deux'", 'three\n"trois"')
"""Of folders, and hard to write into a table."""
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
]  # fmt: skip


def run(*args):
    """Run the command; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise SystemExit(out.getvalue()) from None
    return out.getvalue()


def write_digits(root, train=80, test=40):
    """Scans of 1, 2 and 3 as root/{train,test}/<class>/*.png."""
    scans, targets = load_digits(return_X_y=True)
    for number, name in enumerate(CLASSES, start=1):
        of_class = (scans[targets == number].reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
        for split, images in (("train", of_class[:train]), ("test", of_class[train : train + test])):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, pixels in enumerate(images):
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def train(folder, *more):
    """Fit in a folder; returns the images and the last checkpoint."""
    root = write_digits(folder / "images")
    run(
        *("fit", "--data", "ImageFolder", "--data.root", root, "--data.batch_size", 16, "--data.augment", "false"),
        *("--trainer.max_epochs", 4, "--trainer.default_root_dir", folder, *QUIET, *more),
    )
    (path,) = folder.rglob("last.ckpt")
    return root, path
