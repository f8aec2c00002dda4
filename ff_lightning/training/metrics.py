"""Running figures of all units at once: one small tensor each, one synchronisation across ranks.

Shapes: U units, B batch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class UnitLosses(Metric):
    """Mean local loss of each unit over its updates since the last reset."""

    total: Tensor
    count: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(units), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(units), dist_reduce_fx="sum")
        self.seen: set[int] = set()

    def update(self, units: Sequence[int], losses: Tensor) -> None:
        """Add the losses (N,) of N units; a unit may come more than once."""
        self.seen.update(units)
        if list(units) == list(range(len(units))):  # without a copy of the numbers to the device
            self.total[: len(units)] += losses
            self.count[: len(units)] += 1
        else:
            at = torch.tensor(units, device=self.total.device)
            self.total.index_add_(0, at, losses.to(self.total))
            self.count.index_add_(0, at, torch.ones_like(losses, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """Mean losses, (U,); 0 of a unit without an update."""
        return self.total / self.count.clamp(min=1)

    def reset(self) -> None:
        """Forget all losses."""
        super().reset()
        self.seen = set()


class UnitFigures(Metric):
    """Mean figures of each unit and of the vote, and mean losses of the units, over a whole data set.

    Args:
        units: U.
        names: Of the figures.
    """

    figures: Tensor
    losses: Tensor
    samples: Tensor

    def __init__(self, units: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("figures", torch.zeros(len(names), units + 1), dist_reduce_fx="sum")
        self.add_state("losses", torch.zeros(units), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, figures: Mapping[str, Tensor], losses: Tensor, counted: Tensor | None, samples: int) -> None:
        """Add a batch.

        Args:
            figures: By name, of each unit and of the vote, (U + 1, B).
            losses: Mean losses of the units, (U,).
            counted: Which samples count, (B,) bool; None: all.
            samples: B.
        """
        sums = torch.zeros_like(self.figures)
        for row, name in enumerate(self.names):
            if name in figures:  # else of a method that gives no scores
                values = figures[name]
                sums[row] = (values if counted is None else values.where(counted, 0.0)).sum(1)
        number: int | Tensor = samples if counted is None else counted.sum()
        self.figures = self.figures + sums  # not in place: a state may come from the inference mode of a validation
        self.samples = self.samples + number
        self.losses = self.losses + losses * number

    def compute(self) -> tuple[dict[str, Tensor], Tensor]:
        """Mean figures of each unit and of the vote, by name (U + 1,), and mean losses, (U,)."""
        means = self.figures / self.samples
        return dict(zip(self.names, means, strict=True)), self.losses / self.samples
