"""Self-contrastive Forward-Forward as a plain network: each layer tells a sample beside itself from one beside another.

    (a, a'), (a, b) ── standardise each pair ── W a + W a' + 2 b ── goodness: above the first threshold for (a, a'),
                                                     |                        below the second one for (a, b)
                                          activation, pool, detach
                                                     |
                                                next layer: single maps, or new pairs of the positive ones

Shapes: B batch, C channels, H x W positions (none in a dense layer), D features.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.util.arguments import check_choice, check_number, check_switch, check_whole, for_each, shown
from ff_lightning.views import VIEWS


def triangle(y: Tensor) -> Tensor:
    """What of each channel is above the mean of the channels: ``relu(y - y.mean(1))``, (B, C, ...) alike."""
    return F.relu(y - y.mean(1, keepdim=True))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"triangle": triangle, "relu": F.relu}
POOLS: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "avg": partial(F.avg_pool2d, count_include_pad=False)}


def standardised(x: Tensor) -> Tensor:
    """Each sample (B, ...) with mean 0 and variance 1 over all of its values."""
    return F.layer_norm(x, x.shape[1:])


def pair_sum(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the two samples of each pair, which are standardised together: (B, ...) twice -> (B, ...).

    A linear layer without its bias is to be applied to the sum: ``W a + W a' = W (a + a')``.
    """
    return standardised(torch.stack([one, other], 1)).sum(1)


def goodness(y: Tensor) -> Tensor:
    """The mean over the channels of ``relu(y) ** 2``, at each position: (B, C, ...) -> (B, positions), float32."""
    return y.float().relu().square().mean(1).reshape(len(y), -1)


def contrast_loss(positive: Tensor, negative: Tensor, thresholds: Sequence[float], lam: float) -> Tensor:
    """``mean softplus(th1 - G+) + mean softplus(G- - th2) + lam * mean ||G+||``, the norm being that over a map.

    Args:
        positive: G+, the goodness of positive pairs, (B, positions).
        negative: G-, that of negative pairs.
        thresholds: th1 of positive and th2 of negative pairs.
        lam: Weight of the norm.

    Returns:
        A scalar.

    Source: Chen et al., Self-Contrastive Forward-Forward Algorithm, arXiv 2409.11593.
    """
    loss = F.softplus(thresholds[0] - positive).mean() + F.softplus(negative - thresholds[1]).mean()
    return loss + lam * torch.linalg.vector_norm(positive, dim=1).mean() if lam else loss


class ContrastLayer(nn.Module):
    """A dense or convolutional layer, what its output goes through, and what a read-out sees of it.

    Args:
        linear: Its weights and bias; a convolution pads by reflection, itself it has no padding.
        activation: A name of `ACTIVATIONS`.
        pool: ``"max4"``: over 4 x 4 positions, at every second one; ``"avg2"``, ...; or ``"none"``.
        readout_pool: Side of the squares that are averaged for a read-out; 1: none.
    """

    def __init__(
        self, linear: nn.Linear | nn.Conv2d, activation: str = "triangle", pool: str = "none",
        readout_pool: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.linear = linear
        self.activation, self.pool, self.readout_pool = activation, pool, readout_pool

    def prepare(self, x: Tensor) -> Tensor:
        """The input with its padding, before it is standardised: a vector, or a map with a reflected border."""
        if isinstance(self.linear, nn.Linear):
            return x.flatten(1)
        border = self.linear.kernel_size[0] // 2
        return F.pad(x, [border] * 4, mode="reflect") if border else x

    def forward(self, x: Tensor) -> Tensor:
        """``W x + b`` of standardised samples, (B, C, ...)."""
        y: Tensor = self.linear(standardised(self.prepare(x)))
        return y

    def of_pairs(self, one: Tensor, other: Tensor) -> Tensor:
        """``W a + W a' + 2 b`` of pairs that are standardised together, (B, C, ...)."""
        total = pair_sum(self.prepare(one), self.prepare(other))
        twice = None if self.linear.bias is None else 2 * self.linear.bias
        if isinstance(self.linear, nn.Linear):
            return F.linear(total, self.linear.weight, twice)
        return F.conv2d(total, self.linear.weight, twice)

    def output(self, y: Tensor) -> Tensor:
        """What the next layer sees: activated, pooled and detached."""
        h = ACTIVATIONS[self.activation](y.detach())
        if self.pool == "none":
            return h
        size = int(self.pool[3:])
        return POOLS[self.pool[:3]](h, size, 2, (size - 1) // 2)

    def for_readout(self, h: Tensor) -> Tensor:
        """What a read-out sees of an output: pooled again, standardised, flat, (B, D)."""
        pooled = F.avg_pool2d(h, self.readout_pool) if h.ndim == 4 and self.readout_pool > 1 else h
        return standardised(pooled).flatten(1)


class RecurrentLayer(nn.Module):
    """Units that go along the steps of a sample (F, T), and others that go back: C = 2 U outputs at each step.

    What a step hands to the next one is standardised and detached: no gradient goes through time. A step of zeros is
    one behind the end of the sample, and holds the output.

    Args:
        features: F.
        units: U of each direction.
    """

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.forth, self.back = (nn.RNNCell(features, units, nonlinearity="relu") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for pairs of a sample with itself, (B, F, T) -> (B, C, T)."""
        return self.of_pairs(x, x)

    def of_pairs(self, one: Tensor, other: Tensor) -> Tensor:
        """``relu(W (a + a') + V state + b)`` at each step, (B, C, T)."""
        total = one + other
        return torch.cat([_along(self.forth, total), _along(self.back, total.flip(2)).flip(2)], 1)

    def output(self, y: Tensor) -> Tensor:
        """Detached."""
        return y.detach()

    def for_readout(self, h: Tensor) -> Tensor:
        """The last output of each direction, standardised, (B, C)."""
        forth, back = h.chunk(2, 1)
        return torch.cat([standardised(forth[..., -1]), standardised(back[..., 0])], 1)


def _along(cell: nn.RNNCell, x: Tensor) -> Tensor:
    """The outputs of all steps, (B, F, T) -> (B, U, T)."""
    y, found = x.new_zeros(len(x), cell.hidden_size), []
    for step in x.unbind(2):
        state = y.detach()
        y = torch.where(step.any(1, keepdim=True), cell(step, standardised(state)), state)
        found.append(y)
    return torch.stack(found, 2)


class ContrastNet(nn.Module):
    """A network that learns without labels, layer by layer: no gradient crosses a border.

    Args:
        layers: From the input on.
        input_shape: Of a sample.
        thresholds: Of the goodness of positive and of negative pairs, for each layer. None: 4 and 6 for a layer that
            sees pairs, 1 and 1 for others: two equal samples have four times the goodness of one.
        lam: Weight of the norm of the goodness of positive pairs: of all layers, or a list with one for each.
        pairs: Whether each layer sees pairs: its negative ones are made anew, of the positive maps. Else it sees single
            maps, what the layer below makes of positive and of negative pairs. None: the first layer alone sees pairs.
        views: What makes the two samples of a positive pair, a name of `ff_lightning.views.VIEWS`.

    Attributes:
        trained: Numbers of the layers that are trained.

    Raises:
        ValueError: If an argument is out of its range, or not one for each layer; or if the samples are too small.

    Source: Chen et al., Self-Contrastive Forward-Forward Algorithm, arXiv 2409.11593, and its code. Where they
    disagree: docs/methods/scff.md.
    """

    def __init__(
        self,
        layers: Sequence[ContrastLayer | RecurrentLayer],
        input_shape: Sequence[int],
        thresholds: Sequence[Sequence[float]] | None = None,
        lam: Sequence[float] | float = 0.0,
        pairs: Sequence[bool] | None = None,
        views: str = "same",
    ) -> None:
        super().__init__()
        check_choice("views", views, VIEWS)
        count = len(layers)
        self.layers = nn.ModuleList(layers)
        self.pairs = for_each("pairs", pairs or [k == 0 for k in range(count)], count, check_switch)
        if not self.pairs[0]:
            raise ValueError(f"pairs={shown(pairs)}: the first layer has nothing else to learn from, it must see pairs")
        usual = [[4.0, 6.0] if own else [1.0, 1.0] for own in self.pairs]
        self.thresholds = for_each("thresholds", thresholds or usual, count, _check_pair)
        self.lam = for_each("lam", lam, count, partial(check_number, least=0))
        self.views = VIEWS[views]
        self.trained = frozenset(range(count))
        try:
            self.views(torch.zeros(1, *input_shape))
            self.representation(torch.zeros(1, *input_shape))
        except RuntimeError as error:
            raise ValueError(
                f"input_shape={tuple(input_shape)} does not fit the layers: {str(error).splitlines()[0]}"
            ) from error

    def local_losses(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number and the loss of one layer after the other; the next one runs when it is asked for.

        With a graph there are losses of the layers that are trained alone, without one those of all.

        Args:
            x: (B, ...); labels are not needed.

        Raises:
            ValueError: If the batch holds one sample.
        """
        if len(x) < 2:
            raise ValueError("SCFF sets each sample beside another one, the batch holds one: give another batch_size")
        layers = cast(Sequence[ContrastLayer | RecurrentLayer], self.layers)
        wanted = self.trained if torch.is_grad_enabled() else frozenset(range(len(layers)))
        positive, other = self.views(x)
        negative = positive
        for k in range(max(wanted) + 1):
            layer = layers[k]
            with torch.set_grad_enabled(torch.is_grad_enabled() and k in wanted):
                if self.pairs[k]:
                    shift = int(torch.randint(1, len(x), ())) if self.training else 1  # figures do not hang on a draw
                    another = other.roll(shift, 0)
                    plus, minus = layer.of_pairs(positive, other), layer.of_pairs(positive, another)
                else:
                    plus, minus = layer(positive), layer(negative)
            if k in wanted:
                yield k, contrast_loss(goodness(plus), goodness(minus), self.thresholds[k], self.lam[k])
            positive = other = layer.output(plus)
            negative = layer.output(minus)

    def representation(self, x: Tensor) -> Tensor:
        """What a read-out sees of all layers, (B, D), detached: a sample stands beside itself.

        The pair (a, a) has twice the output of a alone, which standardising takes back.
        """
        return torch.cat(self.layer_features(x), 1)

    @torch.no_grad()
    def layer_features(self, x: Tensor) -> list[Tensor]:
        """The same of each layer by itself."""
        features = []
        for layer in cast(Sequence[ContrastLayer | RecurrentLayer], self.layers):
            x = layer.output(layer(x))
            features.append(layer.for_readout(x))
        return features


def _check_pair(argument: str, value: Any) -> None:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{argument}: {shown(value)} must be two numbers, for positive and for negative pairs")
    for number in value:
        check_number(argument, number, least=0)


def _check_pool(argument: str, value: Any) -> None:
    if not re.fullmatch("none|(max|avg)[1-9][0-9]*", str(value)):
        raise ValueError(f"{argument}={shown(value)}: must be 'none', or 'max' or 'avg' with a number behind it")


def _check_kernel(argument: str, value: Any) -> None:
    check_whole(argument, value)
    if value % 2 == 0:
        raise ValueError(f"{argument}={value}: must be odd, or a map would not keep its size")


def dense_layers(inputs: int, widths: Sequence[int], activation: str = "triangle") -> list[ContrastLayer]:
    """Dense layers of these widths.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_choice("activation", activation, ACTIVATIONS)
    for width in widths:
        check_whole("widths", width)
    return [ContrastLayer(nn.Linear(a, b), activation) for a, b in pairwise([inputs, *widths])]


def recurrent_layers(input_shape: Sequence[int], units: int) -> list[RecurrentLayer]:
    """One recurrent layer of so many units in each direction.

    Raises:
        ValueError: If an argument is out of its range, or samples are not (F, T).
    """
    check_whole("recurrent", units)
    if len(input_shape) != 2:
        raise ValueError(f"input_shape={tuple(input_shape)}: recurrent={units} needs samples (features, steps)")
    return [RecurrentLayer(input_shape[0], units)]


def convolutional_layers(
    inputs: int,
    channels: Sequence[int],
    kernels: Sequence[int] | int = 3,
    pools: Sequence[str] | str = "max2",
    readout_pools: Sequence[int] | int = 1,
    activation: str = "triangle",
) -> list[ContrastLayer]:
    """Convolutions of these numbers of channels, each with a pool that halves the map; see `ContrastLayer`.

    Args:
        inputs: Channels of a sample.
        channels: Of each layer.
        kernels: Sides of the kernels, odd; like what follows, one for all layers or a list with one for each.
        pools: Such as ``"max4"``, or ``"none"``.
        readout_pools: Sides of the squares that are averaged for a read-out.
        activation: A name of `ACTIVATIONS`.

    Raises:
        ValueError: If an argument is out of its range, or not one for each layer.
    """
    check_choice("activation", activation, ACTIVATIONS)
    count = len(channels)
    sizes = zip(
        pairwise([inputs, *for_each("channels", channels, count, check_whole)]),
        for_each("kernels", kernels, count, _check_kernel),
        for_each("pools", pools, count, _check_pool),
        for_each("readout_pools", readout_pools, count, check_whole),
        strict=True,
    )
    return [ContrastLayer(nn.Conv2d(*io, kernel), activation, pool, last) for io, kernel, pool, last in sizes]
