"""Images per second of `ImageFolder` against torchvision's folder in a plain DataLoader, with the same transforms.

    python -m ff_lightning.benchmark.throughput FOLDER [--image_size 32]

Both give float32 batches, cropped at random, mirrored and normalised. They take turns, so that what else the machine
does hits both; the best of the rounds counts. ``fit`` is a whole epoch through Lightning's Trainer with a model of
one linear layer, which costs next to nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from ff_lightning.data.images.folder import ImageFolder


class _Linear(LightningModule):
    """The least that can be trained: the mean of each channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layer(x.mean((2, 3))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def compare(root: str, image_size: int | None = None, batch_size: int = 128, workers: int = 2, rounds: int = 3) -> None:
    """Print images per second of both.

    Args:
        root: Folder with the folder ``train``.
        image_size: Pixels of a side.
        batch_size: Images of a batch.
        workers: Processes of the plain loader, and of ours for what it streams.
        rounds: How often both are measured.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size, "num_workers": workers}
    ours, streamed = ImageFolder(root, **arguments), ImageFolder(root, in_memory=False, **arguments)
    start = time.perf_counter()
    ours.setup("fit")
    print(f"first start: {time.perf_counter() - start:.1f} s to decode and keep the images, if they were not kept")
    start = time.perf_counter()
    ours.setup("fit")
    print(f"next start:  {time.perf_counter() - start:.1f} s")
    streamed.setup("fit")
    plain = _plain_loader(ours, batch_size, workers)
    loaders: dict[str, Callable[[], Any]] = {
        "torchvision folder, plain DataLoader": lambda: plain,
        "ImageFolder, streamed": streamed.train_dataloader,
        "ImageFolder, in memory": ours.train_dataloader,
    }
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, loader in loaders.items():
            for how, run in (("loader", _iterate), ("fit", lambda it: _fit(it, ours.num_classes))):
                rate = run(loader())
                best[name, how] = max(best.get((name, how), 0), rate)
    print(f"{len(ours.train_set)} training images of {ours.input_shape}, batches of {batch_size}, {workers} workers")
    for name in loaders:
        print(f"{name:38} {best[name, 'loader']:8.0f} images/s, through fit {best[name, 'fit']:8.0f}")


def _plain_loader(ours: ImageFolder, batch_size: int, workers: int) -> DataLoader[Any]:
    """What one would write without this package."""
    size = ours.input_shape[1]
    if size <= 64:
        crop = [v2.Resize(size), v2.CenterCrop(size), v2.RandomCrop(size, padding=size // 8)]
    else:
        crop = [v2.RandomResizedCrop(size, scale=(0.35, 1))]
    mean, std = ours.statistics
    finish = [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    images = datasets.ImageFolder(str(ours.folders["train"]), v2.Compose([v2.ToImage(), *crop, *finish]))
    part = torch.utils.data.Subset(images, ours.train_set.numbers.tolist())
    return DataLoader(
        part,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def _iterate(loader: Iterable[Any]) -> float:
    start = time.perf_counter()
    images = sum(len(y) for _, y in loader)
    return images / (time.perf_counter() - start)


def _fit(loader: Any, classes: int) -> float:
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    model = _Linear(classes)
    model.layer(torch.zeros(1, 3))
    start = time.perf_counter()
    trainer.fit(model, loader)
    return len(loader) * loader.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    auto_cli(compare)
