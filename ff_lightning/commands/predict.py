"""``ff-lightning predict --data.root``: the classes of images in a folder, as a table in a file."""

import csv
import glob
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ff_lightning.commands.ckpt_path import checkpoint_at
from ff_lightning.data.images.folder import ENDINGS
from ff_lightning.data.listing import files_below
from ff_lightning.inference import Prediction, Predictor, load
from ff_lightning.inference.predictor import in_batches
from ff_lightning.util.arguments import check_whole
from ff_lightning.util.extras import needs
from ff_lightning.util.files import printable, replacing

MOST_NAMED = 10
"""Files that cannot be read and are named; the others are counted."""

Row = list[Any]


def main(settings: Namespace) -> None:
    """Classify images and write the table.

    Args:
        settings: See `ff_lightning.commands.parsers.predict`.

    Raises:
        ValueError: If there is no image, none can be read, or an argument does not fit.
        FileExistsError: If the table is there already.
    """
    check_whole("batch_size", settings.batch_size)
    files = image_files(settings.root)
    check_out(settings.out, settings.overwrite)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = load(checkpoint_at(settings.ckpt_path), device)
    lost: list[str] = []
    found: Counter[str] = Counter()
    probabilities: list[float] = []

    def rows() -> Iterator[Row]:
        for file, answer in predict_files(predictor, files, settings.batch_size, lost):
            found[answer.name] += 1
            probabilities.append(answer.probability)
            row = [printable(file), answer.name, round(answer.probability, 6)]
            yield row + (answer.scores.tolist() if settings.scores else [])
        if lost and len(lost) == len(files):
            raise ValueError(f"data.root={settings.root!r}: none of the {len(files)} images can be read: {lost[0]}")

    columns = ["file", "class", "probability"]
    columns += [f"score_{name}" for name in predictor.class_names] if settings.scores else []
    write_table(settings.out, columns, rows())
    print(summary(found, probabilities, lost))
    print(f"{settings.out}: {len(probabilities):,} rows")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise if a table cannot be written there, or would replace another file."""
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"out={str(out)!r}: must end in '.csv' or '.parquet'")
    if out.suffix.lower() == ".parquet":
        for module in ("pandas", "pyarrow"):
            needs(module, "parquet")
    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"out={str(out)!r} is there already: give another name, or --overwrite")


def image_files(root: str) -> list[str]:
    """The images that a folder, a file or a pattern such as ``photos/*.jpg`` stands for, in order.

    Raises:
        ValueError: If there are none.
    """
    place = Path(root).expanduser()
    if place.is_dir():
        files = files_below(place, ENDINGS)
        known = f"known are files that end in {', '.join(ENDINGS)}"
        empty = f"the folder holds no image; {known}"
    elif place.exists():
        return [str(place)]
    else:
        files = sorted(path for path in glob.glob(str(place), recursive=True) if not Path(path).is_dir())
        empty = "no file fits the pattern" if glob.has_magic(root) else "there is no such file or folder"
    if not files:
        raise ValueError(f"data.root={root!r}: {empty}")
    return files


def predict_files(
    predictor: Predictor, files: Iterable[str], batch_size: int, lost: list[str]
) -> Iterator[tuple[str, Prediction]]:
    """Each file that can be read with its answer; what is said of the others is added to `lost`."""
    for batch in in_batches(files, batch_size):
        readable: dict[str, Tensor] = {}
        for file, image in zip(batch, predictor.prepare_all(batch), strict=True):
            if isinstance(image, Tensor):
                readable[file] = image
                continue
            lost.append(str(image))
            if len(lost) <= MOST_NAMED:
                sys.stderr.write(f"left out: {image}\n")
        if readable:
            yield from zip(readable, predictor.answers(torch.stack([*readable.values()])), strict=True)


def write_table(out: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a table that is whole or not there, as CSV (RFC 4180, UTF-8) or Parquet by its ending."""
    with replacing(out) as part:
        if out.suffix.lower() == ".csv":
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(rows)
        else:
            needs("pandas", "parquet").DataFrame(list(rows), columns=columns).to_parquet(part, index=False)


def summary(found: Counter[str], probabilities: Sequence[float], lost: Sequence[str]) -> str:
    """How many images are of each class, and how many could not be read.

    Examples:
        >>> print(summary(Counter(cat=3, dog=1), [0.9, 0.8, 0.9, 0.6], ["cannot read the image x.jpg"]))
        class  images
        cat         3
        dog         1
        sum         4
        mean probability 0.800; 1 of 5 images could not be read
    """
    rows = [*found.most_common(), ("sum", len(probabilities))]
    names = [" ".join(name.split()) for name, _ in rows]
    width = max(map(len, (*names, "class")))
    lines = [f"{'class':{width}}  images"]
    lines += [f"{name:{width}}{count:8}" for name, (_, count) in zip(names, rows, strict=True)]
    unread = f"; {len(lost)} of {len(lost) + len(probabilities)} images could not be read" if lost else ""
    return "\n".join([*lines, f"mean probability {sum(probabilities) / len(probabilities):.3f}{unread}"])
