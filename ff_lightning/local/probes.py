"""Linear probes: how well a linear read-out finds the classes in the features of a model.

Shapes: N samples, B batch, D features, K classes.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_number, check_whole

DECAYS = (1e-2, 1e-3, 1e-4)


class LinearProbe(nn.Module):
    """A linear layer on features that are standardised for each sample. It starts at zero, without random numbers.

    Args:
        features: D.
        num_classes: K.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of the classes, (B, D) -> (B, K)."""
        scores: Tensor = self.linear(F.layer_norm(features.float(), features.shape[1:]))
        return scores


class Probed(NamedTuple):
    """What a probe found."""

    probe: LinearProbe
    decay: float
    """Weight of the penalty with which it was trained."""
    val: float
    """Share of right answers on the validation samples, by which the penalty was chosen."""
    test: float | None
    """The same on the test samples, if there were any."""


def features_of(model: Any, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """The features of all samples, in evaluation mode, and their classes.

    Args:
        model: A `LocalLearner` with a `representation`.
        batches: Of a loader.

    Returns:
        Features (N, D), float32, and classes (N,), int64, on the CPU.

    Raises:
        ValueError: If the batches have no classes, or if there are none.
    """
    found = []
    with evaluating(model):
        for batch in batches:
            inputs, target = model.split(model.transfer_batch_to_device(batch, model.device, 0))
            features = model.representation(*inputs)
            found.append((features.float().cpu(), check_classes(target).cpu()))
    if not found:
        raise ValueError("there is no sample to probe: the loader is empty")
    features, classes = zip(*found, strict=True)
    return torch.cat(features), torch.cat(classes)


def check_classes(target: Any) -> Tensor:
    """The classes of a batch, if it has any.

    Raises:
        ValueError: If they are not numbers of classes.
    """
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
        raise ValueError("a probe reads classes: it needs batches (x, y) with the numbers of the classes, int64 (B,)")
    return target.long()


def fit_probe(
    features: Tensor, classes: Tensor, num_classes: int, decay: float = 1e-3, start: LinearProbe | None = None
) -> LinearProbe:
    """The read-out that minimises ``cross-entropy + decay / 2 * (sum of squared weights)``, found by L-BFGS.

    It does not depend on where it starts: there are no random numbers, learning rate or number of epochs to choose.

    Args:
        features: (N, D).
        classes: (N,), int64.
        num_classes: K.
        decay: Weight of the penalty.
        start: A probe to start from, which saves time; it is not changed.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_whole("num_classes", num_classes, least=2)
    check_number("decay", decay, above=0)
    features = F.layer_norm(features.float(), features.shape[1:])
    probe = LinearProbe(features.shape[1], num_classes)
    if start is not None:
        probe.load_state_dict(start.state_dict())
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=500, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(probe.linear(features), classes) + decay / 2 * probe.linear.weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return probe


def accuracy(probe: LinearProbe, features: Tensor, classes: Tensor) -> float:
    """Share of the samples whose class has the highest score."""
    with torch.no_grad():
        return (probe(features).argmax(1) == classes).double().mean().item()


def final_probe(
    model: Any,
    train: Iterable[Any],
    val: Iterable[Any],
    test: Iterable[Any] | None,
    num_classes: int,
    decays: Sequence[float] = DECAYS,
) -> Probed:
    """Train probes on a model that is not changed, and keep the one that is best on the validation samples.

    Only that probe is tested, once. Probe untrained weights too: only the gain over them says something.

    Args:
        model: A `LocalLearner` with a `representation`.
        train: Batches (x, y) to train on: one pass over them is kept in memory, as features (N, D), float32.
        val: Batches to choose by.
        test: Batches to judge by; None: not now.
        num_classes: K.
        decays: Penalties to choose from; see `fit_probe`.

    Raises:
        ValueError: If an argument is out of its range, or if the batches have no classes.

    Source: the read-out of Chen et al., Self-Contrastive Forward-Forward Algorithm, arXiv 2409.11593. They train it by
        Adam with dropout; we train it to the minimum, so that all features are judged alike.
    """
    if not decays:
        raise ValueError("decays=[]: give one or more to choose from")
    features, classes = features_of(model, train)
    of_val = features_of(model, val)
    found: list[Probed] = []
    for decay in sorted(decays, reverse=True):
        probe = fit_probe(features, classes, num_classes, decay, found[-1].probe if found else None)
        found.append(Probed(probe, decay, accuracy(probe, *of_val), None))
    best = max(found, key=lambda probed: probed.val)
    return best if test is None else best._replace(test=accuracy(best.probe, *features_of(model, test)))
