"""Recurrent Forward-Forward as a plain network: an image below, a label on top, and states that settle between them.

    label ──> layer L-1 ──> ... ──> layer 0 <── x         each layer sees the layers above and below, of the step before
              layer L-1 <── ... <── layer 0

All layers move at once, from the states of the step before, which are constants: no gradient crosses a layer or a step.

Shapes: B batch, K classes, L layers, F values of a sample, N units of a layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.heads.place import Place
from ff_lightning.local.ffnet import PassThroughReLU, ThresholdObjective, mean_square_1
from ff_lightning.util.arguments import check_number, check_whole, is_whole, shown
from ff_lightning.views import wrong_labels


class RecurrentLayer(nn.Module):
    """Weights from the layer below and from the layer above.

    Args:
        below: Values of the layer below, or of the sample.
        units: N.
        above: Values of the layer above, or of the label.
    """

    def __init__(self, below: int, units: int, above: int) -> None:
        super().__init__()
        self.up = nn.Linear(below, units)
        self.down = nn.Linear(above, units, bias=False)

    def forward(self, state: Tensor, drive: Tensor, above: Tensor, damping: float) -> Tensor:
        """The next state, (B, N).

        Args:
            state: (B, N).
            drive: What comes from below, (B, N).
            above: The normalised state of the layer above, or the label.
            damping: Share of the state that stays.
        """
        return damping * state + (1 - damping) * _relu(drive + self.down(above))


class RecurrentNet(nn.Module):
    """Layers that are active, once they have settled, if the label on top is that of the image below.

    Args:
        inputs: F.
        num_classes: K.
        widths: Units of each layer.
        steps: Steps in which the states settle in training, each with an update.
        damping: Share of a state that stays in a step.
        window: The first and the last step, from 1, whose goodness is the answer.
        theta: Threshold per unit: of all layers, or a list with one for each.
        peer: Weight of the peer normalisation.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        widths: Sequence[int] = (500, 500),
        steps: int = 8,
        damping: float = 0.3,
        window: Sequence[int] = (3, 5),
        theta: float | Sequence[float] = 1.0,
        peer: float = 0.03,
    ) -> None:
        super().__init__()
        if isinstance(widths, str) or not isinstance(widths, Sequence) or len(widths) < 2:
            raise ValueError(f"widths={shown(widths)}: must be a list of the units of at least two layers")
        for width in widths:
            check_whole("widths", width)
        check_whole("steps", steps)
        check_number("damping", damping, least=0, below=1)
        numbers = isinstance(window, Sequence) and len(window) == 2 and all(map(is_whole, window))
        if not numbers or not 1 <= window[0] <= window[1] <= steps:
            raise ValueError(f"window={shown(window)}: must be the first and the last of some steps from 1 to {steps}")
        self.num_classes, self.steps, self.damping, self.window = num_classes, steps, damping, tuple(window)
        sizes = [inputs, *widths, num_classes]
        triples = zip(sizes, widths, sizes[2:], strict=False)
        self.layers: Any = nn.ModuleList(RecurrentLayer(below, width, above) for below, width, above in triples)
        places = (Place(k, len(widths), f"layer{k}", (n,), num_classes, nn.Identity) for k, n in enumerate(widths))
        self.objectives: Any = nn.ModuleList(ThresholdObjective(place, theta, peer=peer) for place in places)

    def units(self) -> dict[str, list[nn.Module]]:
        """The modules of each layer."""
        pairs = zip(self.layers, self.objectives, strict=True)
        return {f"layer{k}": [layer, objective] for k, (layer, objective) in enumerate(pairs)}

    def start(self, x: Tensor) -> list[Tensor]:
        """The states of one pass upwards, which know no label: x (B, ...) -> (B, N) of each layer."""
        states = [_relu(self.drive(x))]
        for layer in self.layers[1:]:
            states.append(_relu(layer.up(mean_square_1(states[-1]))))
        return states

    def drive(self, x: Tensor) -> Tensor:
        """What the first layer gets from samples, at every step: (B, ...) -> (B, N)."""
        return self.layers[0].up(mean_square_1(x.flatten(1)))

    def step(self, states: Sequence[Tensor], drive: Tensor, labels: Tensor) -> list[Tensor]:
        """The next states of all layers, (B, N) each.

        Args:
            states: The ones before; no gradient reaches them.
            drive: What the first layer gets from the samples, (B, N).
            labels: One-hot, (B, K).
        """
        states = [state.detach() for state in states]
        seen = [mean_square_1(state) for state in (*states, labels)]
        drives = [drive, *(layer.up(below) for layer, below in zip(self.layers[1:], seen, strict=False))]
        return [
            layer(state, drive, above, self.damping)
            for layer, state, drive, above in zip(self.layers, states, drives, seen[1:], strict=True)
        ]

    def local_losses(self, x: Tensor, target: Tensor) -> Iterator[list[Tensor]]:
        """The losses of all layers at each step, with a graph; what a step changes is seen by the next one.

        Args:
            x: (B, ...).
            target: Classes, (B,).
        """
        both = torch.cat([target, wrong_labels(target, self.num_classes)])
        labels = F.one_hot(both, self.num_classes).to(x.dtype)
        positive = torch.cat([x.new_ones(len(x)), x.new_zeros(len(x))])
        with torch.no_grad():
            states = [state.repeat(2, 1) for state in self.start(x)]
        for _ in range(self.steps):
            states = self.step(states, self.drive(x).repeat(2, 1), labels)
            yield [objective.loss(state, positive) for objective, state in zip(self.objectives, states, strict=True)]

    @torch.no_grad()
    def goodness(self, x: Tensor) -> Tensor:
        """How well each label goes with a sample at each layer, the mean over the window: (B, ...) -> (L, B, K)."""
        labels = torch.eye(self.num_classes, device=x.device, dtype=x.dtype).repeat(x.shape[0], 1)
        states = [state.repeat_interleave(self.num_classes, 0) for state in self.start(x)]
        drive = self.drive(x).repeat_interleave(self.num_classes, 0)
        first, last = self.window
        seen = []
        for number in range(1, last + 1):
            states = self.step(states, drive, labels)
            if number >= first:
                seen.append(torch.stack([logit(state) for logit, state in zip(self.objectives, states, strict=True)]))
        return torch.stack(seen).mean(0).view(len(self.layers), -1, self.num_classes)

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """The start states of each layer, which know no label, with mean square 1: (B, ...) -> (B, N) each."""
        return [mean_square_1(state) for state in self.start(x)]


_relu = PassThroughReLU()
