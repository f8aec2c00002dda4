"""Early exit: each sample is answered at the first block that is sure. Plain PyTorch.

Shapes: B batch, K classes, L blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ff_lightning.local.net import LocalNet
from ff_lightning.util.arguments import check_choice, check_number, shown

Rule = Callable[[Tensor], Tensor]


def margin(scores: Tensor) -> Tensor:
    """The best score minus the second best: (B, K) -> (B,)."""
    best = scores.topk(2, 1).values
    return best[:, 0] - best[:, 1]


def softmax(scores: Tensor) -> Tensor:
    """The probability of the best class: (B, K) -> (B,)."""
    return scores.softmax(1).amax(1)


def highest(scores: Tensor) -> Tensor:
    """The score of the best class: (B, K) -> (B,)."""
    return scores.amax(1)


RULES: dict[str, Rule] = {"margin": margin, "softmax": softmax, "mean_std": highest}
"""By name, how sure scores are."""


class EarlyExit(nn.Module):
    """A trained network in which only samples without a sure answer continue to the next block.

    The answer at a block is the vote of the blocks so far. A sample exits at the first block where its certainty
    reaches the threshold. `calibrate` sets the thresholds by inputs without labels, such as those of the validation
    set.

    Args:
        net: A `LocalNet`, the result of its `export`, the network of `FF` or `CwC`, or a module that has one as `net`.
        rule: How sure scores (B, K) are: ``"margin"`` between the two best classes; ``"softmax"``, the probability of
            the best; ``"mean_std"``, the score of the best, with a threshold of its mean minus a standard deviation; or
            a function to (B,), where higher is surer.
        target: Thresholds are set so that this share of the samples reaching a block exits there. Not for mean_std.
            None: 0.8.

    Attributes:
        thresholds: One for each block but the last, (L - 1,); NaN before `calibrate`.

    Raises:
        ValueError: If an argument is out of its range, or if the network has a single block.

    Source: Aminifar et al., LightFF, arXiv 2404.05241, for mean_std. Their code decides by the score of the true class
        of the test image; we use that of the predicted class. The margin is ours.
    """

    thresholds: Tensor

    def __init__(self, net: nn.Module, rule: str | Rule = "margin", target: float | None = None) -> None:
        super().__init__()
        net = net if isinstance(net, LocalNet) else getattr(net, "net", net)
        if not isinstance(net, LocalNet):
            raise ValueError(
                f"net={type(net).__name__}: early exit is for networks whose blocks answer, a LocalNet or a module "
                "that has one as net: those of SFF, FF and CwC"
            )
        if not callable(rule):
            check_choice("rule", rule, RULES, f"one of {list(RULES)}, or a function from scores (B, K) to (B,)")
        check_number("target", target, above=0, below=1, optional=True)
        if rule == "mean_std" and target is not None:
            raise ValueError(f"target={target} has no effect on rule='mean_std', whose thresholds are means")
        if len(net.blocks) < 2:
            raise ValueError("the network has a single block: there is nothing to leave early from")
        if net.hooked is not None or getattr(net, "negatives", None) == "hybrid":
            raise ValueError("the blocks of this network run all at once: there is nothing to save by leaving early")
        self.net = net
        self.rule = rule
        self.target = 0.8 if target is None else target
        self.register_buffer("thresholds", torch.full((len(net.blocks) - 1,), torch.nan))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Any]) -> "EarlyExit":
        """Set the thresholds by samples that the network was not trained on; labels are not used.

        Args:
            batches: Inputs (B, ...), or tuples that begin with them, such as those of a loader for validation.

        Raises:
            ValueError: If there is no sample, or if none exits before the last block.
        """
        return self.calibrate_by(depth_answers(self.net, batches))

    def calibrate_by(self, answers: Sequence[Tensor]) -> "EarlyExit":
        """As `calibrate`, from the answers at each depth, L tensors (B, K), which several rules can share."""
        left = None
        for k in range(len(self.thresholds)):
            sure = self._sure(answers[k])
            left = torch.ones_like(sure, dtype=torch.bool) if left is None else left
            answers_yet = self.net.voters is None or k >= min(self.net.voters)
            self.thresholds[k] = self._threshold(sure[left]) if answers_yet and left.any() else torch.inf
            left = left & ~(sure >= self.thresholds[k])
        if left is None or left.all():
            raise ValueError(f"rule={shown(self.rule)}: none of {len(sure)} samples leaves before the last block")
        return self

    def _threshold(self, sure: Tensor) -> Tensor:
        if self.rule == "mean_std":
            return sure.mean() - sure.std(correction=0)
        return sure.sort().values[round((1 - self.target) * (len(sure) - 1))]

    def _sure(self, scores: Tensor) -> Tensor:
        rule = self.rule if callable(self.rule) else RULES[self.rule]
        return rule(scores)

    @torch.no_grad()
    def answers_and_exits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, K), and the number of the block at which each sample exits, (B,) int64, from 0.

        Raises:
            ValueError: If `calibrate` was not called.
        """
        if self.thresholds.isnan().any():
            raise ValueError("EarlyExit has no thresholds yet: call calibrate(batches), of the validation set")
        passing = cast(Any, self.net.local_goodness(x))
        rest = torch.arange(len(x), device=x.device)
        scores = torch.zeros(len(x), self.net.num_classes, device=x.device)
        exits = torch.full_like(rest, len(self.thresholds))
        goodness: list[Tensor] = []
        stay: Tensor | None = None
        for k in range(len(self.net.blocks)):
            goodness.append(passing.send(stay))
            answer = self.net.decide(torch.stack(goodness)).float()
            scores[rest] = answer
            if k == len(self.thresholds):
                break
            leave = self._sure(answer) >= self.thresholds[k]
            exits[rest[leave]] = k
            stay = ~leave
            if not stay.any():
                break
            rest, goodness = rest[stay], [of_block[stay] for of_block in goodness]
        return scores, exits

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, K) of the vote at the block where each sample exits."""
        return self.answers_and_exits(x)[0]

    def exits(self, x: Tensor) -> Tensor:
        """The number of the block at which each sample exits, from 0: (B,), int64."""
        return self.answers_and_exits(x)[1]


@torch.no_grad()
def depth_answers(net: LocalNet, batches: Iterable[Any]) -> list[Tensor]:
    """For each depth, the vote of the blocks up to there for all samples: L tensors (B, K).

    Args:
        net: In eval mode.
        batches: Inputs (B, ...), or tuples that begin with them.

    Raises:
        ValueError: If there is no sample.
    """
    where = next(net.parameters()).device
    goodness = [net.goodness(_inputs(batch).to(where)) for batch in batches]
    if not sum(of_batch.shape[1] for of_batch in goodness):
        raise ValueError("calibrate: there is no sample to calibrate on")
    joined = torch.cat(goodness, 1)
    return [net.decide(joined[: k + 1]) for k in range(len(joined))]


@torch.no_grad()
def multiply_adds(net: LocalNet, x: Tensor) -> list[float]:
    """Multiply-adds for one sample up to each block, with its head, as torch counts them.

    Args:
        net: In eval mode.
        x: One or more samples.
    """
    counts = []
    passing = net.local_goodness(x)
    with FlopCounterMode(display=False) as counter:
        for _ in net.blocks:
            next(passing)
            counts.append(counter.get_total_flops() / 2 / len(x))
    return counts


def _inputs(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(inputs, Tensor):
        kind = type(inputs).__name__
        raise ValueError(f"early exit takes networks with one tensor as input, this batch holds a {kind}")
    return inputs
