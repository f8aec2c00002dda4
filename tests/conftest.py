"""What the tests share: small networks, small folders of images, and one way to run a Trainer."""

import functools
import http.server
import os
import threading
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ff_lightning import data

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when a GPU first multiplies
REAL_DATA = Path(os.environ.get("FF_DATA", "~/.cache/ff-data")).expanduser()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)  # small networks gain nothing from more, and lose much where cores are shared
    torch.use_deterministic_algorithms(False)  # a Trainer that was asked for them leaves them on
    pl.seed_everything(0, verbose=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where images that were decoded are kept by default, in each test another folder."""
    monkeypatch.setenv("FF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer on the CPU that writes into the folder of the test and says nothing."""
    return make_trainer_in(tmp_path)


def make_trainer_in(folder):
    """The same for another folder."""

    def make(**changes):
        settings = {
            "max_epochs": 2,
            "limit_train_batches": 3,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "limit_predict_batches": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "log_every_n_steps": 1,
        }
        return pl.Trainer(**{**settings, **changes})

    return make


@pytest.fixture
def digits():
    return data.Digits(batch_size=16)


class Residual(nn.Module):
    """A residual block of the user's own, with an activation in place."""

    def __init__(self, channels, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.norm(self.conv1(x)))))


def small_net(channels=1, norm=True, classes=10):
    """Stem, two residual blocks, classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.ReLU(),
        Residual(4, norm),
        Residual(4, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


@pytest.fixture
def image_folder(tmp_path):
    """Writes root/<split>/<class>/*.png with a colour for each class; returns root."""

    def write(splits=("train", "val", "test"), classes=("cat", "dog"), count=10, size=(16, 16), mode="RGB"):
        generator = np.random.default_rng(0)
        for split in splits:
            for number, name in enumerate(classes):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    pixels = generator.integers(0, 100, (*size, 3)) + np.eye(3, dtype=int)[number % 3] * 150
                    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.png")
        return tmp_path / "images"

    return write


@pytest.fixture
def served(tmp_path):
    """A folder whose files can be downloaded, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
