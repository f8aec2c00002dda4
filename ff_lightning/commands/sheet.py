"""``ff-lightning sheet``: what a network sees of a data set, on one picture, and how many images there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from ff_lightning.commands.answers import end, of_parser, subclasses
from ff_lightning.commands.classes import asked_class
from ff_lightning.data.images.base import ImageData
from ff_lightning.data.loaders import EpochSampler

GAP, TEXT = 2, 12
"""Pixels between the images, and for the name below each."""


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = {"sheet": [key for key, _ in self.get_defaults(skip_validation=True).items()]}
        end(of_parser(message, [], options, subclasses(ImageData)), "ff-lightning sheet --help")


def main(given: Sequence[str]) -> None:
    """Write the contact sheet of a data module, and print the number of images of each class and split.

    Args:
        given: What follows ``ff-lightning`` on the command line.
    """
    text = asked_class(given, subclasses(ImageData))
    if text is not None:
        print(text)
        return
    parser = _Parser(prog="ff-lightning sheet")
    parser.add_subclass_arguments(ImageData, "data", default={"class_path": "ff_lightning.data.Digits"})
    parser.add_argument("--out", type=str, default="sheet.png")
    parser.add_argument("--rows", type=PositiveInt, default=4)
    settings = parser.parse_args(given[1:])
    out = Path(settings.out).expanduser()
    if not out.parent.is_dir():
        parser.error(f"out={settings.out!r}: there is no folder {str(out.parent)!r}")
    if out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"out={settings.out!r}: must end as a picture does, such as .png")
    try:
        data: ImageData = parser.instantiate(settings).data
        data.prepare_data()
        data.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        data.setup("test")
    except OSError as error:
        print(f"no test images: {error}")
    print(counts(data))
    contact_sheet(data, settings.rows).save(out)
    print(f"{out}: training images as the network sees them")


def counts(data: ImageData) -> str:
    """A table of the images of each class in each split.

    Examples:
        >>> from ff_lightning.data import Digits
        >>> data = Digits(classes=["3", "4"])
        >>> data.setup("fit")
        >>> print(counts(data))
        class  train    val
        3        131     15
        4        130     15
        sum      261     30
    """
    splits = {name: getattr(data, f"{name}_set") for name in ("train", "val", "test") if hasattr(data, f"{name}_set")}
    numbers = [images.targets.bincount(minlength=data.num_classes).tolist() for images in splits.values()]
    rows = [*zip(data.class_names, *numbers, strict=True), ("sum", *map(sum, numbers))]
    width = max(len(str(row[0])) for row in [*rows, ("class",)])
    lines = [f"{'class':{width}}" + "".join(f"{name:>7}" for name in splits)]
    lines += [f"{name:{width}}" + "".join(f"{number:7}" for number in of_split) for name, *of_split in rows]
    return "\n".join(lines)


def contact_sheet(data: ImageData, rows: int = 4, columns: int = 8, zoom_to: int = 64) -> Image.Image:
    """The first training images of the first epoch with the names of their classes, at least `zoom_to` pixels each."""
    batches, wanted = [], rows * columns
    loader = data.train_dataloader()
    if isinstance(loader.sampler, EpochSampler):
        loader.sampler.set_epoch(0)
    for batch in loader:
        batches.append(batch)
        wanted -= len(batch[1])
        if wanted <= 0:
            break
    x, y = (torch.cat(parts)[: rows * columns] for parts in zip(*batches, strict=True))
    mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in data.statistics)
    zoom = max(1, -(-zoom_to // data.image_shape[-1]))
    images = (
        (x.reshape(-1, *data.image_shape) * std + mean)
        .clamp(0, 1)
        .repeat_interleave(zoom, 2)
        .repeat_interleave(zoom, 3)
    )
    images = torch.nn.functional.pad(images, (0, 0, 0, TEXT), value=1)
    sheet = to_pil_image(make_grid(images, columns, GAP, pad_value=1))
    height, width = (side + GAP for side in images.shape[-2:])
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(y.tolist()):
        row, column = divmod(i, columns)
        name = str(data.class_names[label])
        while draw.textlength(name) > width - GAP:
            name = name[:-1]
        draw.text((GAP + column * width, (row + 1) * height - TEXT), name, fill="black")
    return sheet
