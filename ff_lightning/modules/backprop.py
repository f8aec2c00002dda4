"""Ordinary backpropagation: the baseline, as a network with one block."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.backbones import Stem
from ff_lightning.losses import LogSumExpLoss
from ff_lightning.modules.base import LocalLearner


class EndToEnd(nn.Module):
    """A whole network, classifier included, as a single block whose loss is the softmax cross-entropy.

    Args:
        model: Network from images (B, C, H, W) to scores (B, K).
        weights: To start from: a name of torchvision's weights for the backbone (``"DEFAULT"``), or the path of a
            state dict, whose classifier may be one for other classes.
        label_smoothing: Share of the target that is spread evenly over all classes.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.criterion = LogSumExpLoss(label_smoothing)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The network, as the only block."""
        return [self]

    name = "network"
    idle: frozenset[nn.Parameter] = frozenset()
    trained = frozenset({0})

    def compile_blocks(self) -> None:
        """Compile the network, when it runs for the first time."""
        self.model.compile()

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """All trainable parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def local_losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The one loss of the network."""
        yield self.criterion(self.model(x), y)

    def delivered_losses(self, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The one loss as a vector (1,), with its graph."""
        return torch.stack(list(self.local_losses(x, y)))

    def goodness(self, x: Tensor) -> Tensor:
        """The scores of the classes, (1, B, K)."""
        return self.model(x)[None]

    def decide(self, goodness: Tensor) -> Tensor:
        """Scores (1, B, K) -> (B, K)."""
        return goodness[0]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, (B, C, H, W) -> (B, K)."""
        return self.model(x)


class Backprop(LocalLearner):
    """The same backbone and recipe, trained by ordinary backpropagation through the whole network.

    Args:
        backbone: ``"cnn"``, the name of a torchvision model, or any network with K outputs as an `nn.Module`.
        num_classes: K. The command line takes it from the data.
        input_shape: (C, H, W) of an image; None: (3, 32, 32). The command line takes it from the data.
        stem: ``"small"`` swaps a strided stem and its max-pooling for a 3x3 convolution: for images of 32 pixels.
        label_smoothing: Share of the target that is spread evenly over all classes.
        kwargs: How it is trained: optimizer, lr, lr_scheduler, ...; see `LocalLearner`.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "cnn",
        num_classes: int | None = None,
        input_shape: tuple[int, int, int] | None = None,
        stem: Stem = "standard",
        weights: str | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, input_shape=input_shape, **kwargs)
        self.set_network(EndToEnd(self.build_backbone(backbone, stem, weights), label_smoothing))
