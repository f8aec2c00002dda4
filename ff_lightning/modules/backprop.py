"""Ordinary backpropagation: the baseline, as a network that is a single unit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from ff_lightning.backbones import Backbone, Stem
from ff_lightning.heads.layers import position_means
from ff_lightning.local.chain import Chain, Norm, norm_for
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition import Block, Example, Granularity, Inputs, cut
from ff_lightning.partition.inputs import make_example
from ff_lightning.training.matching import classes_of_classifier
from ff_lightning.util.arguments import check_choice, check_granularity, check_number, check_switch


class NormedBlocks(nn.Module):
    """The blocks of a network with a norm between them, as SFF trains them, and a linear classifier on the last one.

    Args:
        model: The network to cut; its classifier is not used.
        num_classes: K.
        granularity: Where to cut; see `ff_lightning.partition`.
        norm: Between the blocks; see `ff_lightning.LocalNet`.
        example: An input batch.
        inputs: What the model is called with.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, granularity: Granularity, norm: Norm, example: Example, inputs: Inputs
    ) -> None:
        super().__init__()
        blocks, self.hooked = cut(model, granularity, example)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm_for(norm, inputs)
        self.inputs = inputs
        self.classifier = nn.Linear(blocks[-1].map_shape[0], num_classes)

    def forward(self, *values: Tensor) -> Tensor:
        """Scores of the classes, (B, C, H, W) -> (B, K)."""
        blocks = cast(Sequence[Block], self.blocks)
        chain = Chain(blocks, self.hooked, self.inputs, self.norm)
        *_, means = chain.run(values, lambda k, features, mask: position_means(features, mask), borders=())
        return self.classifier(means)


class Backprop(LocalLearner):
    """The baseline: the same backbone and recipe, trained by ordinary backpropagation through the whole network.

    Args:
        backbone: ``"cnn"``, ``"mlp"`` (for vectors), ``"signal"``, ``"text"``, the name of a torchvision model, or any
            network with K outputs as an `nn.Module`.
        num_classes: K. The command line takes it from the data.
        input_shape: Of a sample, such as (C, H, W); None: (3, 32, 32). The command line takes it from the data.
        stem: ``"small"`` swaps a strided stem and its max-pooling for a 3x3 convolution: for images of 32 pixels.
        weights: Weights to start from: a name of torchvision's weights for the backbone (``"DEFAULT"``), or the path of
            a state dict or checkpoint. Its classifier may be for other classes.
        label_smoothing: Share of the target that is spread evenly over all classes.
        norm: To continue from weights that SFF trained: the norm that it had between the blocks. The network then has a
            linear classifier on the last block. None: the unchanged backbone, with its own classifier.
        granularity: Which blocks `norm` lies between; see `ff_lightning.partition`.
        probe: Whether only the last layer is trained, as a linear probe of the features.
        optimization: ``"automatic"``, Lightning's own loop, in which several processes exchange gradients during
            backward; or ``"manual"``.
        kwargs: How it is trained: task, optimizer, lr, lr_scheduler, ...; see `LocalLearner`.
    """

    def __init__(
        self,
        backbone: Backbone = "cnn",
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        stem: Stem = "standard",
        weights: str | None = None,
        label_smoothing: float = 0.0,
        norm: Norm | None = None,
        granularity: Granularity = "block",
        probe: bool = False,
        optimization: Literal["manual", "automatic"] = "automatic",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, input_shape=input_shape, optimization=optimization, **kwargs)
        check_choice("norm", norm, get_args(Norm), optional=True)
        check_granularity(granularity)
        check_switch("probe", probe)
        check_number("label_smoothing", label_smoothing, least=0, most=1)
        self.criterion = self.task.criterion(label_smoothing)
        self.net = self.build_backbone(backbone, stem, weights)
        example = make_example(self.net, self.input_shape, self.vocabulary)
        self.inputs = Inputs.of(self.net, example, self.vocabulary, self.input_shape[0])
        if norm is None:
            self.trained_on = classes_of_classifier(weights, self.num_classes)
        else:
            self.net = NormedBlocks(self.net, self.num_classes, granularity, norm, example, self.inputs)
            self.inputs = replace(self.inputs, by_name=False)
        self.probe = probe
        if probe:
            self.net.requires_grad_(False)
            self._last_layer().requires_grad_(True)
            self.train()
        self.set_units({"network": [self.net]})

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The one update of the network."""
        inputs, target = self.inputs_and_target(batch)
        scores = self._run(inputs)
        loss = self.criterion(scores, target)
        self.report_scores(scores.detach()[None], target)
        yield Update((0,), loss, (loss.detach(),))

    def scores(self, *inputs: Any) -> Tensor:
        """The scores of the network, (1, B, K)."""
        return self._run(inputs)[None]

    def _run(self, inputs: Any) -> Tensor:
        output = self.inputs.call(self.net, self.inputs.values(inputs))
        return output["logits"] if isinstance(output, Mapping) else output  # what networks of transformers return

    def representation(self, *inputs: Any) -> Tensor:
        """What enters the last layer, (B, D)."""
        seen: list[Tensor] = []
        with self._last_layer().register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            self._run(inputs)
        return seen[-1].flatten(1)

    def _last_layer(self) -> nn.Module:
        return [module for module in self.net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]

    def train(self, mode: bool = True) -> "Backprop":
        """Switch to training or evaluation; with `probe`, only the last layer."""
        super().train(mode)
        if getattr(self, "probe", False):
            self.net.eval()
            self._last_layer().train(mode)
        return self
