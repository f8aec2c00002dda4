"""Every method on a small network: what the tests that go over all of them need to know of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ff_lightning import LocalLearner, modules
from ff_lightning.backbones import cfse
from tests.conftest import small_net

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
METHODS = sorted(set(modules.__all__) - {"LocalLearner"})


class Case(NamedTuple):
    """How a method is made for the tests.

    Args:
        arguments: Makes its arguments, a network of its own among them.
        joined: Makes those with which two processes equal one with the joined batch: no statistics and no draws of a
            batch. None: it has no such form.
        config: Of its first run, in configs/.
        floor: Test accuracy in % that it passes after `epochs` of this config and untrained weights do not.
        epochs: None: all of the config.
        modes: Of optimization.
        answers: Whether it gives scores; else it gives features alone, and its floor is in tests of its own.
    """

    arguments: Callable[[], dict[str, Any]]
    joined: Callable[[], dict[str, Any]] | None
    config: str
    floor: float
    epochs: int | None = None
    modes: tuple[str, ...] = ("manual", "automatic")
    answers: bool = True


def next_label(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """A wrong label without a draw."""
    return (labels + 1) % classes


CASES = {
    "Backprop": Case(
        lambda: {"backbone": small_net()}, lambda: {"backbone": small_net(norm=False)}, "backprop/digits_cnn", 90, 3
    ),
    "CwC": Case(
        lambda: {"backbone": cfse(10, 1, (20, 40, 40)), "windows": [[0, 1], [0, 2], [1, 2]]}, None, "cwc/digits", 90, 4
    ),
    "FF": Case(
        lambda: {"widths": [30, 30]},
        lambda: {"widths": [30, 30], "negatives": next_label, "peer": 0.0},
        "ff/digits",
        85,
        8,
    ),
    "PFF": Case(lambda: {"units": [30, 30], "steps": 4}, None, "pff/digits", 85, None, ("manual",)),
    "RecurrentFF": Case(
        lambda: {"widths": [30, 30], "steps": 4, "window": (2, 4)}, None, "ff/digits_recurrent", 85, 4, ("manual",)
    ),
    "SCFF": Case(lambda: {"widths": [20, 16], "epochs": [1, 1]}, None, "scff/digits", 0, answers=False),
    "SFF": Case(
        lambda: {"backbone": small_net()}, lambda: {"backbone": small_net(norm=False)}, "sff/digits_cnn", 90, 3
    ),
}
"""By the name of the method."""


def make(name: str, joined: bool = False, **arguments: Any) -> LocalLearner:
    """A method with the same weights each time."""
    torch.manual_seed(0)
    case = CASES[name]
    own = case.joined() if joined and case.joined else case.arguments()
    return getattr(modules, name)(**{**SHAPE, **own, **arguments})


def again(name: str, path: Any) -> LocalLearner:
    """The method of a checkpoint; its network is given again where it was given as a module."""
    own = {key: value for key, value in CASES[name].arguments().items() if isinstance(value, torch.nn.Module)}
    return getattr(modules, name).load_from_checkpoint(path, weights_only=True, **own)
