"""Forward-Forward as a plain network: labels go in with the input, and each block tells right from wrong ones.

    x, labels ── views.py ── mean square 1 ── block 0 ── mean square 1 ── block 1 ── ...
                                                 |                           |
                                    goodness: sum of squares, above theta for positive data

Shapes: B batch, K classes, L blocks, N features of a block, C channels.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads.layers import position_means, without_padding
from ff_lightning.heads.place import Place
from ff_lightning.local.net import LocalNet
from ff_lightning.local.objectives import Objective
from ff_lightning.partition import Block, Example, Granularity
from ff_lightning.partition.inputs import MASKS
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_choice, check_number, check_whole, for_each, is_whole, shown
from ff_lightning.views import NEGATIVES, PLACEMENTS, hard_labels, hybrids, label_token, labelled_shape, wrong_labels

GOODNESS = ("sum", "mean")
"""What the goodness of a block is: of the squares of its features."""


class PassThroughReLU(nn.ReLU):
    """A ReLU with the gradient of the identity, so that the peer term also reaches units that are off."""

    def forward(self, z: Tensor) -> Tensor:
        """The positive part, (B, N) -> (B, N)."""
        return z + (z.relu() - z).detach()


def mlp(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Layers of Forward-Forward: of each width a linear one and a `PassThroughReLU`."""
    for width in widths:
        check_whole("widths", width)
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
        self.register_buffer("theta", torch.tensor(float(values[place.number])))
        self.register_buffer("activity", torch.full((place.shape[0],), 0.5))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """How far goodness is on the side of positive data, (B, ...) -> (B,), float32; padding has no part in it."""
        features = (features if mask is None else without_padding(features, mask)).float().flatten(1)
        size = features.shape[1] if mask is None else mask.sum(1) * (features.shape[1] // mask.shape[1])
        squares = features.square().sum(1)
        return self.sign * (squares - self.theta * size if self.goodness == "sum" else squares / size - self.theta)

    def loss_and_scores(
        self, features: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean of ``softplus(-logit)`` of positive and ``softplus(logit)`` of negative data, plus the peer term.

        Args:
            features: (B, ...).
            target: 1 for positive and 0 for negative data, (B,), floating.
            mask: Of tokens: False at padding, (B, T).
        """
        loss = F.binary_cross_entropy_with_logits(self(features, mask), target)
        if self.peer:
            positive = target > 0.5
            loss = loss + self.peer * self._peer_term(features[positive], None if mask is None else mask[positive])
        return loss, None

    def _peer_term(self, positive: Tensor, mask: Tensor | None) -> Tensor:
        """The variance of the running means of the channels."""
        by_channel = positive.float().movedim(1, -1)
        of_batch = (by_channel if mask is None else by_channel[mask]).flatten(0, -2).mean(0)
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
        label: Where the label goes: ``"overlay"``, ``"concat"``, ``"map"`` or ``"token"``; see `ff_lightning.views`.
        negatives: Wrong labels that are ``"uniform"`` among all others or ``"hard"``, drawn from the read-out's scores;
            ``"hybrid"`` images, which need no label; or a function (classes (B,), K) -> wrong classes (B,).
        granularity: Where to cut; see `ff_lightning.partition`.
        theta: Threshold per feature: of all blocks, or a list with one for each.
        goodness: See `ThresholdObjective`, and there for sign and peer.
        voters: Numbers of the blocks that count at test; None: all, but of token ids not the first one.
        readout_from: Number of the first block that the read-out sees; None: 1, or 0 if there is no other.
        vocabulary: Number V of token ids, for a label that is a token. The network takes V + K + 1 ids, those of the
            classes and a neutral one behind the others, and one token more than a sample has.

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
        vocabulary: int | None = None,
    ) -> None:
        check_whole("vocabulary", vocabulary, optional=True)
        check_choice("label", label, PLACEMENTS)
        if (label == "token") != (vocabulary is not None):
            raise ValueError(
                f"label={label!r} and vocabulary={vocabulary}: token ids take 'token', others another label"
            )
        shape = labelled_shape(label, input_shape, num_classes)
        if label == "token" and negatives == "hybrid":
            raise ValueError("negatives='hybrid' mixes two images: for token ids give 'uniform' or 'hard'")
        if not callable(negatives):
            check_choice("negatives", negatives, NEGATIVES, f"one of {list(NEGATIVES)}, or a function (classes, K)")
        ids = None if vocabulary is None else vocabulary + num_classes + 1
        device = next((parameter.device for parameter in model.parameters()), None)
        if ids is None:
            _check_takes(
                model, lambda: model(torch.zeros(2, *shape, device=device)), f"samples of shape {shape}", label
            )
        make = partial(ThresholdObjective, theta=theta, goodness=goodness, sign=sign, peer=peer)
        super().__init__(model, num_classes, granularity, norm="length", input_shape=shape, loss=make, vocabulary=ids)
        if ids is not None:
            values = self.inputs.values(torch.full((2, *shape), ids - 1, device=device))
            what = f"{ids} ids, those of the label behind the {vocabulary} others, and {shape[0]} of them in a sample"
            _check_takes(model, lambda: self.inputs.call(model, values), what, label)
            self._warn_of_norms(torch.arange(2 * shape[0], device=device).view(2, -1) % ids)
        blocks = len(self.blocks)
        readout_from = min(1, blocks - 1) if readout_from is None else readout_from
        for name, value, numbers in (("voters", voters, voters or ()), ("readout_from", readout_from, [readout_from])):
            if not all(is_whole(k) and 0 <= k < blocks for k in numbers):
                raise ValueError(f"{name}={shown(value)}: the blocks are 0 to {blocks - 1}")
        if voters is None and ids is not None and blocks > 1:
            voters = range(1, blocks)  # the first one is the embedding, which sees each token by itself
        self.voters = frozenset(voters) if voters else None
        self.place_label = PLACEMENTS[label] if vocabulary is None else partial(label_token, vocabulary=vocabulary)
        self.words = None if ids is None else replace(self.inputs, vocabulary=vocabulary, longest=input_shape[0])
        self.negatives = negatives
        self.readout_from = readout_from
        shapes = [cast(Block, block).map_shape for block in self.blocks]
        sizes = [torch.Size(shape if ids is None else shape[:1]).numel() for shape in shapes]
        self.readout = nn.Linear(sum(sizes[readout_from:]), num_classes)

    # ---------------------------------------------------------------------------------------------------------- inputs

    def with_label(self, x: Example, target: Tensor | None = None) -> Example:
        """Inputs with a label in them, of mean square 1 unless they are token ids.

        Args:
            x: (B, ...); token ids (B, T) with their mask, if there is padding.
            target: Classes, (B,); None: the neutral label.

        Raises:
            ValueError: If there are other inputs.
        """
        main, *masks = self._parts(x)
        if target is None:
            labels = torch.full((main.shape[0], self.num_classes), 1 / self.num_classes, device=main.device)
        else:
            labels = F.one_hot(target, self.num_classes)
        placed = self.place_label(
            main, labels.to(main.dtype if main.is_floating_point() else torch.get_default_dtype())
        )
        if self.words is None:
            return mean_square_1(placed)
        counts = [mask.new_full((len(mask), 1), MASKS[cast(str, self.words.mask)]) for mask in masks]
        return (placed, *(torch.cat([count, mask], 1) for count, mask in zip(counts, masks, strict=True)))

    def pairs(self, x: Example, target: Tensor | None) -> tuple[Example, Tensor]:
        """Positive and then negative inputs, (2 B, ...), and ones and zeros for them, (2 B,)."""
        parts = self._parts(x)
        kinds = torch.ones(len(parts[0]), device=parts[0].device)
        kinds = torch.cat([kinds, 1 - kinds])
        if self.negatives == "hybrid":
            return mean_square_1(torch.cat([*parts, hybrids(parts[0])])), kinds
        assert target is not None
        if self.negatives == "hard":
            with torch.no_grad():
                wrong = hard_labels(target, self.readout(self.states(x)))
        elif callable(self.negatives):
            wrong = self.negatives(target, self.num_classes)
        else:
            wrong = wrong_labels(target, self.num_classes)
        return self.with_label([torch.cat([part, part]) for part in parts], torch.cat([target, wrong])), kinds

    def _warn_of_norms(self, ids: Tensor) -> None:
        """Warn if two samples have the same goodness at a block, as behind a layer norm."""
        with torch.no_grad(), evaluating(self):
            squares = [*self._each(ids, lambda k, features, mask: features.float().square().mean((1, 2)))]
        same = [cast(str, self.blocks[k].name) for k, (a, b) in enumerate(squares) if abs(a - b) <= 1e-4 * a]
        if same:
            warnings.warn(
                f"blocks {same} end in a norm: all samples have the same goodness there, and they hardly learn; cut "
                "elsewhere (granularity=[names]), or leave them out of the vote (voters=[numbers])",
                stacklevel=4,
            )

    def _parts(self, x: Example) -> Sequence[Tensor]:
        """The input and, of token ids, their mask."""
        if self.words is not None:
            return self.words.values(x)
        if isinstance(x, tuple | list) and len(x) == 1:
            (x,) = x
        if not isinstance(x, Tensor):
            raise ValueError(f"inputs {shown(x)}: Forward-Forward takes one tensor (B, ...), or token ids with a mask")
        return (x,)

    def _losses(
        self, x: Example, y: Tensor, see: Callable[[int, Tensor], None] | None, scaler: torch.amp.GradScaler | None
    ) -> Iterator[tuple[Tensor, bool]]:
        return super()._losses(*self.pairs(x, y), None, scaler)

    # --------------------------------------------------------------------------------------------------------- answers

    def local_goodness(self, x: Example) -> Generator[Tensor, Tensor | None, None]:
        """How well each label goes with the input, at one block after the other: (B, K) each, float32.

        With hybrid negatives, which know no label, the block's part in the scores of the read-out.
        """
        if self.negatives == "hybrid":
            yield from self._parts_of_readout(x)
            return
        parts = self._parts(x)
        count = parts[0].shape[0]  # len() is a constant of an export
        every = torch.arange(self.num_classes, device=parts[0].device).repeat(count)
        tried = self.with_label([part.repeat_interleave(self.num_classes, 0) for part in parts], every)
        passing: Any = super().local_goodness(tried)
        stay: Tensor | None = None
        for _ in self.blocks:
            rows = None if stay is None else stay.repeat_interleave(self.num_classes)
            stay = yield passing.send(rows).view(-1, self.num_classes)

    def states(self, x: Example) -> Tensor:
        """What the read-out sees: the normalised features of its blocks for the neutral label, (B, D), detached."""
        return torch.cat(self.neutral_features(x)[self.readout_from :], 1)

    @torch.no_grad()
    def neutral_features(self, x: Example) -> list[Tensor]:
        """The normalised features of each block for the neutral label, (B, N) each, detached; of tokens, their mean."""
        if self.words is not None:
            labelled = self.with_label(x)
            return list(self._each(labelled, lambda k, *of_block: position_means(*of_block), for_head=False))
        neutral = mean_square_1(self._parts(x)[0]) if self.negatives == "hybrid" else self.with_label(x)
        return [features.flatten(1) for features in self.local_features(neutral)]

    def _parts_of_readout(self, x: Example) -> Iterator[Tensor]:
        start = 0
        for k, features in enumerate(self.neutral_features(x)):
            if k < self.readout_from:
                yield features.new_zeros(features.shape[0], self.num_classes)
            else:
                yield F.linear(features, self.readout.weight[:, start : start + features.shape[1]])
                start += features.shape[1]


def _check_takes(model: nn.Module, run: Callable[[], Any], what: str, label: str) -> None:
    """Raise ValueError unless a network can be run on what a label makes."""
    try:
        with torch.no_grad(), evaluating(model):
            run()
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"label={label!r} makes {what}, which the network does not take: {str(error).splitlines()[0]}"
        ) from error


def mean_square_1(x: Tensor) -> Tensor:
    """Samples (B, ...), each scaled to a mean square of 1."""
    return F.rms_norm(x, x.shape[1:])
