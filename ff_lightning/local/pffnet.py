"""Predictive Forward-Forward as a plain network: a circuit that tells right labels from wrong ones, and one that draws.

    label ──> layer L-1 <── latent       representation: settles from step to step, up, down and sideways
               |     |                   generation: each layer predicts the one below, the lowest one the image
              ...   ...
               |     |
        x ──> layer 0 ──> image

All layers move at once, from the states of the step before, which are constants: no gradient crosses a layer or a step.

Shapes: B batch, K classes, L layers, F values of a sample, N units of a layer, Z latent numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.local.ffnet import PassThroughReLU, mean_square_1
from ff_lightning.util.arguments import check_number, check_switch, check_whole, is_whole, shown
from ff_lightning.views import wrong_labels

MEMORY = 5000
"""Number of the latest training samples whose latents `PFFNet` keeps."""
COMPONENTS = 10
"""Gaussians of the mixture that samples are drawn from."""


class PFFLayer(nn.Module):
    """A layer of both circuits.

    Args:
        below: Values of what is below: the layer or the sample.
        units: N.
        above: Values of what is above: the layer or the label.
        groups: Units of a group that inhibit each other.
        generative: Whether the layer predicts what is below.
    """

    def __init__(self, below: int, units: int, above: int, groups: int, generative: bool) -> None:
        super().__init__()
        self.up = nn.Linear(below, units)
        self.down = nn.Linear(above, units, bias=False)
        self.lateral = nn.Parameter(torch.empty(units // groups, groups, groups).uniform_(0, 0.05))
        self.predict = nn.Linear(units, below, bias=False) if generative else None
        for weight in (self.up.weight, self.down.weight, self.up.bias[None]):
            nn.init.orthogonal_(weight)
        if self.predict is not None:
            nn.init.uniform_(self.predict.weight, 0, 0.05)

    def start(self, below: Tensor) -> Tensor:
        """The state that one pass upwards gives, (B, below) -> (B, N)."""
        return _relu(self.up(F.normalize(below)))

    def forward(self, state: Tensor, below: Tensor, above: Tensor, alpha: float, noise: float = 0.0) -> Tensor:
        """The next state.

        Args:
            state: (B, N).
            below: (B, below).
            above: What comes from above, (B, above), as it is: states are normalised by the caller.
            alpha: Share of the state that stays.
            noise: Deviation of the noise.
        """
        drive = self.up(F.normalize(below)) + self.down(above) - self.inhibition(state)
        if noise:
            drive = drive + noise * torch.randn_like(drive)
        return (1 - alpha) * _relu(drive) + alpha * state

    def inhibition(self, state: Tensor) -> Tensor:
        """What the units of a group take from each other and give to themselves, (B, N) -> (B, N)."""
        groups = self.lateral.shape[1]
        weights = self.lateral.relu() * (1 - 2 * torch.eye(groups, device=state.device))
        return torch.einsum("bgi,gij->bgj", state.unflatten(1, (-1, groups)), weights).flatten(1)


class PFFNet(nn.Module):
    """The two circuits, and a linear read-out of the states before the first step, which know no label.

    Args:
        inputs: F.
        num_classes: K.
        units: Of each layer.
        steps: Steps in which the states settle, each with an update.
        theta: Threshold of the sum of squares of a layer.
        alpha: Share of a state that stays in a step.
        noise: Deviation of the noise in the representation, in training.
        groups: Units of a group that inhibit each other.
        label_gain: Factor of the label at the top.
        generative: Whether there is a generative circuit.
        sign: 1: positive data are active; -1: negative data are.

    Attributes:
        latents: Of the latest training samples, (M, Z), a buffer.
        latent_classes: Their classes, (M,), -1 where there was no sample yet, a buffer.

    Raises:
        ValueError: If an argument is out of its range.
    """

    latents: Tensor
    latent_classes: Tensor
    latent_size = 20
    """Z."""
    latent_rate = 0.025
    """How far a latent moves down its error in a step."""
    generative_noise = 0.025
    """Deviation of the noise in the states that the generative circuit predicts from, in training."""

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        units: Sequence[int] = (2000, 2000),
        steps: int = 12,
        theta: float = 10.0,
        alpha: float = 0.3,
        noise: float = 0.01,
        groups: int = 10,
        label_gain: float = 5.0,
        generative: bool = True,
        sign: int = -1,
    ) -> None:
        super().__init__()
        if isinstance(units, str) or not isinstance(units, Sequence) or not units:
            raise ValueError(f"units={shown(units)}: must be a list of the units of each layer")
        check_whole("steps", steps)
        check_whole("groups", groups)
        for width in units:
            check_whole("units", width)
            if width % groups:
                raise ValueError(f"units={shown(units)}: {width} is no multiple of groups={groups}")
        check_number("theta", theta, above=0)
        check_number("label_gain", label_gain, above=0)
        check_number("alpha", alpha, least=0, below=1)
        check_number("noise", noise, least=0)
        check_switch("generative", generative)
        if sign not in (1, -1):
            raise ValueError(f"sign={shown(sign)}: must be 1 or -1")
        self.num_classes, self.steps, self.theta, self.alpha = num_classes, steps, theta, alpha
        self.noise, self.label_gain, self.sign = noise, label_gain, sign
        sizes = [inputs, *units, num_classes]
        self.layers: Any = nn.ModuleList(
            PFFLayer(below, width, above, groups, generative)
            for below, width, above in zip(sizes, sizes[1:], sizes[2:], strict=False)
        )
        self.readout = nn.Linear(sum(units), num_classes)
        self.top: Any = nn.Linear(self.latent_size, units[-1], bias=False) if generative else None
        if self.top is not None:
            nn.init.uniform_(self.top.weight, 0, 0.05)
            self.register_buffer("latents", torch.zeros(MEMORY, self.latent_size))
            self.register_buffer("latent_classes", torch.full((MEMORY,), -1))

    def units(self) -> dict[str, list[nn.Module]]:
        """The modules of each layer; the prediction from the latents belongs to the last one."""
        units: dict[str, list[nn.Module]] = {f"layer{k}": [layer] for k, layer in enumerate(self.layers)}
        if self.top is not None:
            units[f"layer{len(units) - 1}"].append(self.top)
        return units

    # --------------------------------------------------------------------------------------------------- representation

    def start(self, x: Tensor) -> list[Tensor]:
        """The states of one pass upwards, which know no label: x (B, F) -> (B, N) of each layer."""
        states: list[Tensor] = []
        for layer in self.layers:
            states.append(layer.start(states[-1] if states else x))
        return states

    def step(self, states: Sequence[Tensor], x: Tensor, labels: Tensor, noise: float = 0.0) -> list[Tensor]:
        """The next states of all layers, (B, N) each.

        Args:
            states: The ones before, constants to the gradient.
            x: Samples, (B, F).
            labels: Shares of the classes, (B, K).
            noise: Deviation of the noise.
        """
        states = [state.detach() for state in states]
        belows = [x, *states[:-1]]
        aboves = [*(F.normalize(state) for state in states[1:]), self.label_gain * labels]
        return [
            layer(state, below, above, self.alpha, noise)
            for layer, state, below, above in zip(self.layers, states, belows, aboves, strict=True)
        ]

    def logit(self, state: Tensor) -> Tensor:
        """How far a layer is on the side of positive data, (B, N) -> (B,), float32."""
        return self.sign * (state.float().square().sum(1) - self.theta)

    @torch.no_grad()
    def goodness(self, x: Tensor) -> Tensor:
        """How well each label goes with a sample, at each layer: (B, ...) -> (L, B, K).

        As in the authors' code the mean over two steps in the middle of the settling.
        """
        x = self.scaled(x)
        labels = torch.eye(self.num_classes, device=x.device, dtype=x.dtype).repeat(x.shape[0], 1)
        x = x.repeat_interleave(self.num_classes, 0)
        states, seen = self.start(x), []
        for _ in range(self.steps // 2 + 1):
            states = self.step(states, x, labels)
            seen.append(torch.stack([self.logit(state) for state in states]))
        return torch.stack(seen[-2:]).mean(0).view(len(self.layers), -1, self.num_classes)

    def readout_scores(self, x: Tensor) -> Tensor:
        """Scores of the read-out, which sees the start states with mean square 1: (B, ...) -> (B, K)."""
        return self.readout(self.representation(x))

    @torch.no_grad()
    def representation(self, x: Tensor) -> Tensor:
        """The start states of all layers, each with mean square 1: (B, ...) -> (B, sum of N)."""
        return torch.cat([mean_square_1(state) for state in self.start(self.scaled(x))], 1)

    # ------------------------------------------------------------------------------------------------------- generation

    def scaled(self, x: Tensor) -> Tensor:
        """Each sample from its smallest value, 0, to its largest, 1: (B, ...) -> (B, F)."""
        low, high = x.flatten(1).aminmax(dim=1, keepdim=True)
        return (x.flatten(1) - low) / (high - low).clamp(min=1e-6)

    def predict_top(self, latent: Tensor) -> Tensor:
        """The state of the last layer that a latent stands for, (B, Z) -> (B, N).

        Latents up to a length of 1 count as they are. The authors' code makes all of them unit vectors, also the 0 that
        they begin with: their first step is then as good as infinite, and no later one turns them.
        """
        return _relu(self.top(F.normalize(_relu(latent), eps=1.0)))

    def predict_below(self, k: int, state: Tensor) -> Tensor:
        """What layer k predicts of what is below: (B, N) -> (B, N of the layer below), or pixels (B, F) from 0 to 1."""
        below = self.layers[k].predict(F.normalize(_relu(state)))
        return _relu(below) if k else below.clamp(0, 1)

    def errors(self, x: Tensor, states: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """The squared errors of the predictions by each layer, means over the batch; the latent's is in the last one.

        Args:
            x: Samples, (B, F), from 0 to 1.
            states: Of the layers, (B, N) each, constants.
            latent: (B, Z).
        """
        errors = []
        for k, below in enumerate([x, *states[:-1]]):
            noisy = states[k] + self.generative_noise * torch.randn_like(states[k])
            errors.append(_distance(self.predict_below(k, noisy), below))
        errors[-1] = errors[-1] + _distance(self.predict_top(latent), states[-1])
        return errors

    def move_latent(self, latent: Tensor, state: Tensor) -> Tensor:
        """A step of latents down the squared error of their own prediction: (B, Z), and the last layer's state (B, N).

        The error is that of each sample: in the authors' code it is the mean over the batch, so that a step is the
        shorter the larger the batch.
        """
        with torch.enable_grad():
            latent = latent.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_distance(self.predict_top(latent), state) * len(state), latent)
        return (latent - self.latent_rate * slope).detach()

    def latents_of(self, state: Tensor) -> Tensor:
        """The latents that settle under states of the last layer, (B, N) -> (B, Z)."""
        latent = state.new_zeros(len(state), self.latent_size)
        for _ in range(self.steps):
            latent = self.move_latent(latent, state)
        return latent

    @torch.no_grad()
    def draw(self, state: Tensor) -> Tensor:
        """Pixels for states of the last layer: (B, N) -> (B, F), from 0 to 1."""
        for k in reversed(range(len(self.layers))):
            state = self.predict_below(k, state)
        return state

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixels for the start state of the last layer: (B, ...) -> (B, F); see `PFF.reconstruct`."""
        self._check_generative()
        return self.draw(self.start(self.scaled(x))[-1])

    def reconstruction_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The squared errors of the reconstructions of samples (B, ...), and of empty images: two sums."""
        scaled = self.scaled(x)
        return (self.reconstruct(x) - scaled).square().sum(), scaled.square().sum()

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, label: int | None = None) -> Tensor:
        """New samples, (n, F); see `PFF.sample`."""
        from sklearn.mixture import GaussianMixture  # here, since nothing else needs it

        self._check_generative()
        check_whole("n", n)
        check_whole("seed", seed, least=0)
        if label is not None and not (is_whole(label) and 0 <= label < self.num_classes):
            raise ValueError(f"label={shown(label)}: must be a class from 0 to {self.num_classes - 1}, or None")
        known = self.latents[self.latent_classes >= 0 if label is None else self.latent_classes == label]
        if len(known) < COMPONENTS:
            raise ValueError(
                f"label={label}: {len(known)} samples were trained on, {COMPONENTS} are needed to draw new ones"
            )
        mixture = GaussianMixture(COMPONENTS, random_state=seed).fit(known.double().cpu().numpy())
        drawn, _ = mixture.sample(n)
        return self.draw(self.predict_top(torch.as_tensor(drawn).to(self.latents)))

    def _check_generative(self) -> None:
        if self.top is None:
            raise ValueError("generative=False: there is no circuit that draws")

    # --------------------------------------------------------------------------------------------------------- training

    def local_losses(self, x: Tensor, target: Tensor) -> Iterator[list[Tensor]]:
        """The losses of all layers at each step, with a graph; what a step changes is seen by the next one.

        Args:
            x: (B, ...).
            target: Classes, (B,).
        """
        x, batch = self.scaled(x).repeat(2, 1), len(x)
        both = torch.cat([target, wrong_labels(target, self.num_classes)])
        labels = F.one_hot(both, self.num_classes).to(x.dtype)
        positive = torch.cat([x.new_ones(batch), x.new_zeros(batch)])
        with torch.no_grad():
            states = self.start(x)
        start = states[-1][:batch]
        latent = x.new_zeros(len(x), self.latent_size) if self.top is not None else None
        for _ in range(self.steps):
            states = self.step(states, x, labels, self.noise)
            losses = [F.binary_cross_entropy_with_logits(self.logit(state), positive) for state in states]
            states = [state.detach() for state in states]
            if latent is not None:
                losses = [a + b for a, b in zip(losses, self.errors(x, states, latent), strict=True)]
                latent = self.move_latent(latent, states[-1])
            yield losses
        if latent is not None:
            self.latents = torch.cat([self.latents_of(start), self.latents])[:MEMORY]
            self.latent_classes = torch.cat([target, self.latent_classes])[:MEMORY]


_relu = PassThroughReLU()


def _distance(predicted: Tensor, true: Tensor) -> Tensor:
    return (predicted - true).square().sum(1).mean()
