"""Ordinary backpropagation: the baseline, as a network with one block."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ff_lightning.backbones import Stem
from ff_lightning.local.net import Norm, normalise
from ff_lightning.losses import LogSumExpLoss
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition import Block, Granularity, State, partition
from ff_lightning.partition.block import main_output
from ff_lightning.training.matching import classes_of_classifier
from ff_lightning.util.arguments import check_choice, check_granularity, check_number, check_switch


class EndToEnd(nn.Module):
    """A whole network, classifier included, as a single block whose loss is the softmax cross-entropy.

    Args:
        model: Network from images (B, C, H, W) to scores (B, K).
        label_smoothing: Share of the target that is spread evenly over all classes.
        probe: Train the last layer alone; the rest stays in evaluation.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, probe: bool = False) -> None:
        super().__init__()
        self.model = model
        self.criterion = LogSumExpLoss(label_smoothing)
        self.probe = probe
        if probe:
            model.requires_grad_(False)
            self._last_layer().requires_grad_(True)
            self.train()

    def _last_layer(self) -> nn.Module:
        return [module for module in self.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]

    def train(self, mode: bool = True) -> "EndToEnd":
        """Switch to training or evaluation; with `probe`, the last layer alone."""
        super().train(mode)
        if self.probe:
            self.model.eval()
            self._last_layer().train(mode)
        return self

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


class Joined(nn.Module):
    """The blocks of a network with a norm between them, as SFF trains them, and a linear classifier on the last one.

    Args:
        model: The network to cut; its classifier is not used.
        num_classes: K.
        granularity: Where to cut; see `ff_lightning.partition`.
        norm: Between the blocks; see `ff_lightning.LocalNet`.
        input_shape: (C, H, W) of an image.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, granularity: Granularity, norm: Norm, input_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(partition(model, granularity, torch.zeros(1, *input_shape)))
        self.norm = norm
        self.classifier = nn.Linear(cast(Block, self.blocks[-1]).map_shape[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, (B, C, H, W) -> (B, K)."""
        state: State = x
        for block in cast(Iterable[Block], self.blocks):
            out = block(state)
            features = normalise(main_output(out), self.norm, block.channel_dim)
            state = (features, *out[1:]) if isinstance(out, tuple) else features
        return self.classifier(block.to_map(features).mean((2, 3)))


class Backprop(LocalLearner):
    """The same backbone and recipe, trained by ordinary backpropagation through the whole network.

    Args:
        backbone: ``"cnn"``, the name of a torchvision model, or any network with K outputs as an `nn.Module`.
        num_classes: K. The command line takes it from the data.
        input_shape: (C, H, W) of an image; None: (3, 32, 32). The command line takes it from the data.
        stem: ``"small"`` swaps a strided stem and its max-pooling for a 3x3 convolution: for images of 32 pixels.
        weights: To start from: a name of torchvision's weights for the backbone (``"DEFAULT"``), or the path of a
            state dict or checkpoint, whose classifier may be one for other classes.
        label_smoothing: Share of the target that is spread evenly over all classes.
        norm: To go on from what SFF has trained: the norm that it had between the blocks. The network then has a linear
            classifier on the last block. None: the backbone as it is, with its own classifier.
        granularity: Of the blocks that `norm` stands between.
        probe: Train the last layer alone, as a linear probe of the features.
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
        norm: Norm | None = None,
        granularity: Granularity = "block",
        probe: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, input_shape=input_shape, **kwargs)
        check_choice("norm", norm, get_args(Norm), optional=True)
        check_granularity(granularity)
        check_switch("probe", probe)
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        model = self.build_backbone(backbone, stem, weights)
        if norm is None:
            self.trained_on = classes_of_classifier(weights, self.num_classes)
        else:
            model = Joined(model, self.num_classes, granularity, norm, self.input_shape)
        self.set_network(EndToEnd(model, label_smoothing, probe))
