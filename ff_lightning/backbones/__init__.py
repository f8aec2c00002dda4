"""Networks by name: for images, vectors, signals and text."""

from ff_lightning.backbones.build import Backbone, Stem, build_backbone
from ff_lightning.backbones.cfse import cfse
from ff_lightning.backbones.cnn import cnn
from ff_lightning.backbones.local import LocallyConnected, local
from ff_lightning.backbones.mlp import mlp
from ff_lightning.backbones.signal import signal
from ff_lightning.backbones.stem import small_stem
from ff_lightning.backbones.text import text
from ff_lightning.backbones.weights import load_weights

__all__ = [
    "Backbone",
    "LocallyConnected",
    "Stem",
    "build_backbone",
    "cfse",
    "cnn",
    "load_weights",
    "local",
    "mlp",
    "signal",
    "small_stem",
    "text",
]
