"""The table of docs/networks.md: ``python -m tests.networks`` makes it anew, with names as arguments these rows alone.

The networks are built without weights, for 10 classes (``headless/NAME``: without a classifier), and cut for images of
the first of 32 (transformers of torchvision), 64 and 128 pixels and their own size that passes through them.
"""

import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from ff_lightning import partition

PAGE = Path(__file__).parents[1] / "docs/networks.md"
ROW = re.compile(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \|.*$", re.M)
ROWS = {name: tuple(map(int, counts)) for name, *counts in ROW.findall(PAGE.read_text())}
GRANULARITIES = ("layer", "block", "stage")


def build(name):
    """The network, and the side of images that are large enough for it."""
    torch.manual_seed(0)
    headless, name = name.startswith("headless/"), name.removeprefix("headless/")
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name[5:], num_classes=0 if headless else 10)
        sizes = [64, 128, model.pretrained_cfg["input_size"][-1]]
    else:
        with_heads = name in ("googlenet", "inception_v3")
        arguments = {"init_weights": False, "aux_logits": False} if with_heads else {}
        arguments |= {"image_size": 32} if name.startswith("vit") else {}
        model = models.get_model(name, num_classes=10, **arguments)
        sizes = [32] if name.startswith("vit") else [64, 128, 224]
        if headless:
            part = next(part for part in ("heads", "head", "fc", "classifier") if hasattr(model, part))
            setattr(model, part, nn.Identity())
    model.eval()
    for size in sizes:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return model.train(), size
    raise ValueError(f"{name} takes images of none of {sizes} pixels")


def row(name):
    """One line of the table."""
    model, size = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that only run in training
        counts = [len(partition(model, granularity, torch.zeros(1, 3, size, size))) for granularity in GRANULARITIES]
    return f"| `{name}` | {' | '.join(map(str, counts))} | {size} |"


def main(names):
    """Make these rows anew, or all of them."""
    text = PAGE.read_text()
    for name in names or ROWS:
        new = row(name)
        print(new, flush=True)
        text = ROW.sub(lambda match, name=name, new=new: new if match[1] == name else match[0], text)
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
