"""Scalable Forward-Forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ff_lightning.backbones import Backbone, Stem
from ff_lightning.heads import HeadFactory
from ff_lightning.local.chain import Norm
from ff_lightning.local.net import LocalNet
from ff_lightning.local.updates import Update
from ff_lightning.modules.base import LocalLearner
from ff_lightning.partition import Granularity
from ff_lightning.training.factories import to_factory
from ff_lightning.training.kept import kept
from ff_lightning.training.plain import to_plain


class SFF(LocalLearner):
    """Scalable Forward-Forward: each block is trained by the log-sum-exp loss on its own class goodness.

    Source: Krutsylo, Scalable Forward-Forward, arXiv 2501.03176. The paper does not specify optimizer, schedule,
        temperature, depth of the head and axes of the norm; those are ours.

    Args:
        backbone: ``"cnn"``, ``"mlp"`` (for vectors), ``"signal"``, ``"text"``, the name of a torchvision model, or any
            network as an `nn.Module`.
        num_classes: K. The command line takes it from the data.
        input_shape: Of a sample, such as (C, H, W); None: (3, 32, 32). The command line takes it from the data.
        stem: ``"small"`` swaps a strided stem and its max-pooling for a 3x3 convolution: for images of 32 pixels.
        weights: Weights to start from: a name of torchvision's weights for the backbone (``"DEFAULT"``), or the path of
            a state dict or checkpoint, whose classifier may be for other classes.
        granularity: ``"layer"``, ``"block"``, ``"stage"``, a number of units, or names of modules to cut after.
        head: ``"pooled"``, ``"deep"``, ``"paper"``, ``"lookahead"``, or a class such as `PooledHead` called with
            (channels, classes).
        norm: Normalisation between the blocks: ``"layer"``, ``"channel"``, ``"length"`` or ``"none"``.
        vote: The common answer of the blocks: ``"mean"``, ``"depth"``, ``"last"`` or ``"log_softmax"``.
        loss: The local loss: ``"similarity"``, ``"predsim"``, ``"supcon"``, or a class or function that makes one for a
            block; see `ff_lightning.LocalNet`. None: the loss of the task, log-sum-exp for classes.
        label_smoothing: Share of the target that is spread evenly over all classes.
        reach: The most blocks that a loss trains, its own and those below it; or, as a float, the share of backprop's
            memory that they may keep, up to 1.0, which is backprop with deep supervision. See `ff_lightning.LocalNet`.
        own_loss: With `reach`, the loss of a block weighs `own_loss` to the power of its distance to the end of its
            window; 0 to 1.
        recompute: Whether windows of several blocks keep the results of large products alone, and compute the rest
            again in backward; see `ff_lightning.LocalNet`.
        moving_windows: Whether the windows of `reach` move from batch to batch; if not, there are as few as possible.
        train_blocks: Numbers or names of the blocks to train. The others keep weights and running statistics, and vote
            only if a checkpoint brings trained heads for them.
        kwargs: How it is trained: task, optimizer, lr, lr_scheduler, ...; see `LocalLearner`.
    """

    overlaps_steps = True

    def __init__(
        self,
        backbone: Backbone = "cnn",
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        stem: Stem = "standard",
        weights: str | None = None,
        granularity: Granularity = "block",
        head: Literal["pooled", "deep", "paper", "groups", "lookahead"] | HeadFactory = "pooled",
        norm: Norm = "layer",
        vote: Literal["mean", "depth", "last", "log_softmax"] = "mean",
        loss: Literal["logsumexp", "similarity", "predsim", "supcon"] | Callable[[], nn.Module] | None = None,
        label_smoothing: float = 0.0,
        reach: int | float = 1,
        train_blocks: list[int | str] | None = None,
        own_loss: float = 1.0,
        recompute: bool = False,
        moving_windows: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, input_shape=input_shape, **kwargs)
        granularity, reach, train_blocks, own_loss = to_plain((granularity, reach, train_blocks, own_loss))
        self.criterion = self.task.criterion(label_smoothing)
        if loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing} and loss={loss!r}: give the loss its own smoothing")
        self.net = LocalNet(
            self.build_backbone(backbone, stem, weights),
            self.num_classes,
            granularity,
            to_factory("head", head, nn.Module) if callable(head) or isinstance(head, Mapping) else head,
            norm,
            vote,
            self.input_shape,
            self._loss(loss),
            reach,
            self.vocabulary,
            own_loss=own_loss,
            recompute=recompute,
            moving_windows=moving_windows,
        )
        self.set_units(self.net.units())
        self.train_blocks = train_blocks
        if train_blocks is not None:
            self.net.train_only(train_blocks)
            self.net.voters = self.net.trained

    def _loss(self, loss: Any) -> Any:
        if loss is None:
            return self.criterion
        return loss if isinstance(loss, str) else to_factory("loss", loss, nn.Module)

    def local_updates(self, batch: Any) -> Iterator[Update]:
        """The updates of the blocks, from the input on."""
        inputs, target = self.inputs_and_target(batch)
        scores: list[Tensor] = []
        yield from self.net.updates(inputs, target, lambda k, of_block: scores.append(of_block), self.scaler)
        if len(scores) == len(self.net.blocks):
            self.report_scores(torch.stack(scores), target)

    def scores(self, *inputs: Any) -> Tensor:
        """Goodness of each class at each block, (L, B, K)."""
        return self.net.goodness(inputs)

    def vote(self, scores: Tensor) -> Tensor:
        """The vote of the blocks, (L, B, K) -> (B, K)."""
        return self.net.decide(scores)

    def representation(self, *inputs: Any) -> Tensor:
        """The normalised features of all blocks, averaged over the positions: (B, sum of channels)."""
        return self.net.representation(inputs)

    def block_features(self, *inputs: Any) -> Sequence[Tensor]:
        """The same of each block by itself, (B, C) each."""
        return self.representation(*inputs).split(self.net.channels, 1)

    @property
    def backbone(self) -> nn.Module:
        """The blocks without their heads: what `BackboneFinetuning` of Lightning freezes and thaws."""
        return self.net.blocks

    @kept
    def on_train_start(self) -> None:
        """Let the blocks vote that are trained in this run, or whose heads a checkpoint brought."""
        super().on_train_start()
        if self.train_blocks is not None:
            self.net.train_only(self.train_blocks)
        if self.net.voters is not None:
            self.net.voters |= self.net.trained

    def append_blocks(self, name: str, model: nn.Module, granularity: Granularity = "block") -> list[int]:
        """Put new blocks on top of the network, as `ff_lightning.LocalNet.append` does, and train only these.

        Returns:
            The numbers of the new blocks.
        """
        added: list[int] = self.net.append(name, model, granularity)
        self.set_units(self.net.units())
        self.net.train_only(added)
        self.train_blocks = cast(Any, added)
        return added
