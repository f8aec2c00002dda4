"""Trained models in use: predictors from checkpoints, exports, sharing."""

from ff_lightning.inference.exporting import export
from ff_lightning.inference.loading import from_pretrained, load
from ff_lightning.inference.predictor import Prediction, Predictor
from ff_lightning.inference.sharing import model_card, push_to_hub, save_pretrained

__all__ = [
    "Prediction",
    "Predictor",
    "export",
    "from_pretrained",
    "load",
    "model_card",
    "push_to_hub",
    "save_pretrained",
]
