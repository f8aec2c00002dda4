"""Forward-Forward as a plain network: labels go in with the input, and each block tells right from wrong ones.

    x, labels ── views.py ── mean square 1 ── block 0 ── mean square 1 ── block 1 ── ...
                                                 |                           |
                                    goodness: sum of squares, above theta for positive data

Shapes: B batch, K classes, L blocks, N features of a block, C channels.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.local.net import LocalNet
from ff_lightning.local.objectives import Objective, Place
from ff_lightning.partition import Granularity
from ff_lightning.util.arguments import check_choice, check_number, for_each, is_whole, shown
from ff_lightning.views import NEGATIVES, PLACEMENTS, hard_labels, hybrids, labelled_shape, wrong_labels

GOODNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda features: features.flatten(1).square().sum(1),
    "mean": lambda features: features.flatten(1).square().mean(1),
}
"""By name, the goodness (B,) of features (B, ...)."""


class PassThroughReLU(nn.ReLU):
    """A ReLU with the gradient of the identity, so that the peer term also reaches units that are off."""

    def forward(self, z: Tensor) -> Tensor:
        """The positive part, (B, N) -> (B, N)."""
        return z + (z.relu() - z).detach()


def mlp(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Layers of Forward-Forward: of each width a linear one and a `PassThroughReLU`."""
    sizes = [inputs, *widths]
    layers = ((nn.Linear(sizes[k], width), PassThroughReLU()) for k, width in enumerate(widths))
    return nn.Sequential(nn.Flatten(), *(module for layer in layers for module in layer))


class ThresholdObjective(Objective):
    """Goodness of positive data goes above a threshold, that of negative data below it.

    Args:
        place: Where in the network.
        theta: The threshold per feature, of all blocks or a list with one for each: 1 is a mean square of 1.
        goodness: ``"sum"`` of the squares of the N features, against theta N; or their ``"mean"``, against theta.
        sign: 1: positive data are active; -1: negative data are.
        peer: Weight of the peer term: units are kept from being off, or on, for all positive data.

    Attributes:
        theta: The threshold, a buffer.
        activity: Running mean of each channel over positive data, (C,), a buffer.

    Raises:
        ValueError: If an argument is out of its range.
    """

    theta: Tensor
    activity: Tensor

    def __init__(
        self, place: Place, theta: float | Sequence[float], goodness: str = "sum", sign: int = 1, peer: float = 0.03
    ) -> None:
        super().__init__()
        check_choice("goodness", goodness, GOODNESS)
        if sign not in (1, -1):
            raise ValueError(f"sign={shown(sign)}: must be 1 or -1")
        check_number("peer", peer, least=0)
        values = for_each("theta", theta, place.blocks, partial(check_number, above=0), "block")
        self.goodness, self.sign, self.peer = goodness, sign, peer
        self.features = torch.Size(place.shape).numel()
        self.register_buffer("theta", torch.tensor(float(values[place.number])))
        self.register_buffer("activity", torch.full((place.shape[0],), 0.5))

    def forward(self, features: Tensor) -> Tensor:
        """How far goodness is on the side of positive data, (B, ...) -> (B,), float32."""
        theta = self.theta * self.features if self.goodness == "sum" else self.theta
        return self.sign * (GOODNESS[self.goodness](features.float()) - theta)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Mean of ``softplus(-logit)`` of positive and ``softplus(logit)`` of negative data, plus the peer term.

        Args:
            features: (B, ...).
            target: 1 for positive and 0 for negative data, (B,), floating.
        """
        loss = F.binary_cross_entropy_with_logits(self(features), target)
        return loss + self.peer * self._peer_term(features[target > 0.5]) if self.peer else loss

    def _peer_term(self, positive: Tensor) -> Tensor:
        """The variance of the running means of the channels."""
        of_batch = positive.float().transpose(0, 1).flatten(1).mean(1)
        means = 0.9 * self.activity + 0.1 * of_batch
        if self.training and torch.is_grad_enabled():
            self.activity.copy_(means.detach())
        return (means - means.mean()).square().mean()


class FFNet(LocalNet):
    """A network that learns to tell inputs with their own label from others, block by block.

    Everything that a `LocalNet` can, it can: `local_losses`, `loss`, `goodness` (of each label that is put into the
    input), `train_only`, `export`. Beside it a linear read-out answers in one pass, from inputs with a neutral label.

    Args:
        model: The network, for inputs with a label in them; see `ff_lightning.views.labelled_shape`.
        num_classes: K.
        input_shape: Of a sample without its label.
        label: Where the label goes: ``"overlay"``, ``"concat"`` or ``"map"``; see `ff_lightning.views`.
        negatives: Wrong labels that are ``"uniform"`` among all others or ``"hard"``, drawn from the read-out's scores;
            ``"hybrid"`` images, which need no label; or a function (classes (B,), K) -> wrong classes (B,).
        granularity: Where to cut; see `ff_lightning.partition`.
        theta: Threshold per feature: of all blocks, or a list with one for each.
        goodness: See `ThresholdObjective`, and there for sign and peer.
        voters: Numbers of the blocks that count at test; None: all.
        readout_from: Number of the first block that the read-out sees; None: 1, or 0 if there is no other.

    Raises:
        ValueError: If an argument is out of its range, or if the network does not take the labelled inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        input_shape: Sequence[int],
        label: str = "overlay",
        negatives: str | Callable[[Tensor, int], Tensor] = "uniform",
        granularity: Granularity = "layer",
        theta: float | Sequence[float] = 1.0,
        goodness: str = "sum",
        sign: int = 1,
        peer: float = 0.03,
        voters: Sequence[int] | None = None,
        readout_from: int | None = None,
    ) -> None:
        shape = labelled_shape(label, input_shape, num_classes)
        if not callable(negatives):
            check_choice("negatives", negatives, NEGATIVES, f"one of {list(NEGATIVES)}, or a function (classes, K)")
        try:
            with torch.no_grad():
                model(torch.zeros(2, *shape))
        except RuntimeError as error:
            raise ValueError(
                f"label={label!r} makes samples of shape {shape}, which the network does not take: "
                f"{str(error).splitlines()[0]}"
            ) from error
        make = partial(ThresholdObjective, theta=theta, goodness=goodness, sign=sign, peer=peer)
        super().__init__(model, num_classes, granularity, norm="length", input_shape=shape, loss=make)
        blocks = len(self.blocks)
        readout_from = min(1, blocks - 1) if readout_from is None else readout_from
        for name, value, numbers in (("voters", voters, voters or ()), ("readout_from", readout_from, [readout_from])):
            if not all(is_whole(k) and 0 <= k < blocks for k in numbers):
                raise ValueError(f"{name}={shown(value)}: the blocks are 0 to {blocks - 1}")
        self.voters = frozenset(voters) if voters else None
        self.place_label = PLACEMENTS[label]
        self.negatives = negatives
        self.readout_from = readout_from
        sizes = [torch.Size(block.map_shape).numel() for block in self.blocks]  # type: ignore[arg-type]
        self.readout = nn.Linear(sum(sizes[readout_from:]), num_classes)

    # ---------------------------------------------------------------------------------------------------------- inputs

    def with_label(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Inputs with a label in them, of mean square 1.

        Args:
            x: (B, ...).
            target: Classes, (B,); None: the neutral label.
        """
        if target is None:
            labels = x.new_full((x.shape[0], self.num_classes), 1 / self.num_classes)
        else:
            labels = F.one_hot(target, self.num_classes).to(x.dtype)
        return mean_square_1(self.place_label(x, labels))

    def pairs(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positive and then negative inputs, (2 B, ...), and ones and zeros for them, (2 B,)."""
        if self.negatives == "hybrid":
            both = mean_square_1(torch.cat([x, hybrids(x)]))
        else:
            assert target is not None
            if self.negatives == "hard":
                with torch.no_grad():
                    wrong = hard_labels(target, self.readout(self.states(x)))
            elif callable(self.negatives):
                wrong = self.negatives(target, self.num_classes)
            else:
                wrong = wrong_labels(target, self.num_classes)
            both = self.with_label(torch.cat([x, x]), torch.cat([target, wrong]))
        return both, torch.cat([x.new_ones(len(x)), x.new_zeros(len(x))])

    def _losses(  # type: ignore[override]  # a label goes into a single tensor
        self,
        x: Tensor,
        y: Tensor,
        see: Callable[[int, Tensor], None] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Iterator[tuple[Tensor, bool]]:
        return super()._losses(*self.pairs(x, y), None, scaler)

    # --------------------------------------------------------------------------------------------------------- answers

    def local_goodness(self, x: Tensor) -> Generator[Tensor, Tensor | None, None]:  # type: ignore[override]
        """How well each label goes with the input, at one block after the other: (B, K) each, float32.

        With hybrid negatives, which know no label, the block's part in the scores of the read-out.
        """
        if self.negatives == "hybrid":
            yield from self._parts_of_readout(x)
            return
        every = torch.arange(self.num_classes, device=x.device).repeat(x.shape[0])  # len() is a constant of an export
        passing: Any = super().local_goodness(self.with_label(x.repeat_interleave(self.num_classes, 0), every))
        stay: Tensor | None = None
        for _ in self.blocks:
            rows = None if stay is None else stay.repeat_interleave(self.num_classes)
            stay = yield passing.send(rows).view(-1, self.num_classes)

    def states(self, x: Tensor) -> Tensor:
        """What the read-out sees: the normalised features of its blocks for the neutral label, (B, D), detached."""
        return torch.cat(self.neutral_features(x)[self.readout_from :], 1)

    @torch.no_grad()
    def neutral_features(self, x: Tensor) -> list[Tensor]:
        """The normalised features of each block for the neutral label, (B, N) each, detached."""
        neutral = mean_square_1(x) if self.negatives == "hybrid" else self.with_label(x)
        return [features.flatten(1) for features in self.local_features(neutral)]

    def _parts_of_readout(self, x: Tensor) -> Iterator[Tensor]:
        start = 0
        for k, features in enumerate(self.neutral_features(x)):
            if k < self.readout_from:
                yield features.new_zeros(x.shape[0], self.num_classes)
            else:
                yield F.linear(features, self.readout.weight[:, start : start + features.shape[1]])
                start += features.shape[1]


def mean_square_1(x: Tensor) -> Tensor:
    """Samples (B, ...), each scaled to a mean square of 1."""
    return F.rms_norm(x, x.shape[1:])
