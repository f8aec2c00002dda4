"""Windows: where the borders lie, and what the blocks between two of them keep for backward.

Shapes: L blocks.
"""

import warnings
from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ff_lightning.util.arguments import is_whole, shown

Storages = dict[int, int]
"""Sizes in bytes of the storages that autograd keeps, by their addresses."""


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of an example for backward, parameters aside."""

    blocks: Sequence[Storages]
    """Of each block."""
    redone: Sequence[int]
    """Bytes that each block keeps for a while in its backward, besides."""
    objectives: Sequence[Storages]
    """Of the objective of each block."""
    norms: Sequence[Storages]
    """Of the norm behind each block, where no border lies there."""
    inputs: Storages
    """Those of them that are the batch itself: it is there as long as any window."""
    backprop: int
    """Bytes that the blocks keep all at once, without norms and objectives."""
    entered: Sequence[Storages] = ()
    """What enters each block, where blocks of a window run again; empty: they do not."""
    handed: Sequence[Storages] = ()
    """What each block hands on, before its norm."""
    products: Sequence[Storages] = ()
    """The results in each block that are not computed again."""

    def share(self, first: int, last: int) -> float:
        """What the blocks from `first` to `last` keep at once, as a share of what backprop keeps."""
        count = self._bytes_run_again if self.entered and first < last else self._bytes
        return count(first, last) / self.backprop if self.backprop else 0.0

    def most(self, windows: Iterable[Sequence[tuple[int, int]]]) -> int:
        """Bytes that the largest of some windows keeps, given as those of each pass (see `Windows.run`)."""
        return round(max(self.share(*span) for of_pass in windows for span in of_pass) * self.backprop)

    def _bytes(self, first: int, last: int) -> int:
        kept, most = dict(self.inputs), 0
        for k in range(first, last + 1):
            kept |= self.blocks[k]  # a storage counts once, however many blocks keep it
            if self.redone[k]:  # in backward, where what is above the block is gone
                most = max(most, sum(kept.values()) + self.redone[k])
            kept |= self.objectives[k] | (self.norms[k] if k < last else {})
        return max(most, sum(kept.values()))

    def _bytes_run_again(self, first: int, last: int) -> int:
        """The same where each block runs again in backward, when those above it are gone."""
        kept, most = self.inputs | self.entered[first], 0
        for k in range(first, last + 1):
            kept = kept | self.products[k] | self.objectives[k] | (self.handed[k] if k < last else {})
            again = kept | self.blocks[k] | (self.norms[k - 1] if k > first else {})
            most = max(most, sum(again.values()) + self.redone[k])
        return most


class Counter:
    """Records what autograd keeps, on any device.

    Args:
        left_out: Tensors that do not count: parameters, which are there anyway.
    """

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in left_out}
        self._found: Storages = {}

    def counting(self) -> AbstractContextManager[Any]:
        """Notes what is kept inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def take(self) -> Storages:
        """What was kept since this was called before; its graph must be alive until all is counted."""
        found, self._found = self._found, {}
        return found

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph alive, which keeps what is saved here


class Windows:
    """The windows that a network is cut into, and how they move from pass to pass.

    A placement starts a window at one block, and makes all windows above and below as long as allowed. Each block in
    turn is the one to start at; the different placements take turns. So each border is open part of the time, unless
    its two neighbours together exceed the limit. Windows that do not move have the placement with the fewest of them,
    and of several such ones that whose largest window keeps least; each run of trained blocks for itself.

    Args:
        reach: The most blocks of a window, or the largest share of backprop's memory that it may keep: above 0 and
            below 1. 1.0 is one window over all blocks, whatever it keeps.
        names: Of the blocks.
        kept: What they keep; None: not known, `reach` is a number of blocks.
        own_loss: The loss of a block weighs `own_loss` to the power of its distance to the end of its window.
        recompute: Whether the blocks of a window run again in backward.
        moving: Whether the placements take turns.

    Attributes:
        placements: For each pass in turn, the last block of each window, in order.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        reach: float,
        names: Sequence[str],
        kept: Kept | None,
        own_loss: float,
        recompute: bool = False,
        moving: bool = True,
    ) -> None:
        self.reach = reach
        self.kept = kept
        self.own_loss = own_loss
        self.blocks = len(names)
        self._limit = float(reach)
        self._stay = not moving and kept is not None
        self._fewest: dict[frozenset[int], set[int]] = {}
        if kept is not None and not is_whole(reach) and reach < 1:
            shares = [kept.share(k, k) for k in range(self.blocks)]
            largest = max(range(self.blocks), key=shares.__getitem__)
            if shares[largest] > reach:
                self._limit = shares[largest]
                warnings.warn(
                    f"reach={reach}: block {largest} ({names[largest]}) by itself keeps {self._limit:.3f} of what "
                    f"backprop keeps; windows keep up to {self._limit:.3f} instead",
                    stacklevel=5,
                )
        one = not is_whole(reach) and self._fits(0, self.blocks - 1)
        # windows of a number of blocks are the same wherever one of them begins so many blocks further up
        begins = range(1 if one else min(int(reach), self.blocks) if is_whole(reach) else self.blocks)
        self.placements = sorted({self._from(begin, 0, self.blocks - 1) for begin in begins}, reverse=True)
        if self._stay:
            self.placements = [tuple(sorted(self.borders(0, range(self.blocks))))]
        idle = [f"own_loss={own_loss}"] * (own_loss != 1) + ["recompute=True"] * recompute
        idle += ["moving_windows=False"] * (not moving)
        if idle and self.longest == 1:
            warnings.warn(
                f"{' and '.join(idle)} has no effect: no window of reach={reach} has two blocks", stacklevel=5
            )

    def borders(self, number: int, trained: Container[int]) -> set[int]:
        """The blocks behind which a pass of this number is cut; a block that is not trained is a window by itself."""
        held = frozenset(k for k in range(self.blocks) if k not in trained or k + 1 not in trained)
        if not self._stay:
            return {*self.placements[number % len(self.placements)], *held}
        if held not in self._fewest:  # between blocks that are held, windows that stay lie as in a network of their own
            self._fewest[held] = {end for first, last in spans(sorted(held)) for end in self._staying(first, last)}
        return self._fewest[held]

    def run(self, trained: Container[int]) -> list[list[tuple[int, int]]]:
        """For each placement, the first and the last block of its windows; those of blocks not trained are left out."""
        placements = (spans(sorted(self.borders(number, trained))) for number in range(len(self.placements)))
        return [[span for span in of_pass if span[1] in trained] for of_pass in placements]

    def warn_of_heads(self, trained: frozenset[int]) -> None:
        """Say which heads of trained blocks never learn."""
        if self.own_loss:
            return
        never = sorted(trained - {last for of_pass in self.run(trained) for _, last in of_pass})
        if never:
            warnings.warn(
                f"own_loss={self.own_loss}: the heads of blocks {never} never learn, since no window ends there; "
                "vote='last' leaves them out",
                stacklevel=2,
            )

    def weighted(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """The losses of the blocks of a window, in order, times their weights; those of weight 0 are left out.

        The last loss weighs 1.
        """
        weights = [self.own_loss**distance for distance in reversed(range(len(losses)))]
        both = zip(weights, losses, strict=True)
        return [loss if weight == 1 else weight * loss for weight, loss in both if weight]

    def shares(self, ends: Sequence[int], first: int = 0) -> list[float]:
        """What each window of a placement keeps, as a share of what backprop keeps; the lowest begins at `first`."""
        assert self.kept is not None, "counted where a window may be longer than a block"
        return [self.kept.share(*span) for span in spans(ends, first)]

    @property
    def longest(self) -> int:
        """Number of blocks of the longest window."""
        return max(last - first + 1 for ends in self.placements for first, last in spans(ends))

    def _fits(self, first: int, last: int) -> bool:
        if is_whole(self.reach):
            return last - first < self.reach
        return first == last or self.reach == 1 or self.kept is None or self.kept.share(first, last) <= self._limit

    def _staying(self, lowest: int, highest: int) -> tuple[int, ...]:
        """The placement of some blocks that has the fewest windows, and of those the one whose largest keeps least."""
        every = sorted({self._from(begin, lowest, highest) for begin in range(lowest, highest + 1)}, reverse=True)
        return min(every, key=lambda ends: (len(ends), max(self.shares(ends, lowest))))

    def _from(self, begin: int, lowest: int, highest: int) -> tuple[int, ...]:
        """The last block of each window of some blocks, where one of the windows begins at a block."""
        ends = [begin - 1] if begin > lowest else []
        first = begin - 1
        for k in range(begin - 1, lowest - 1, -1):  # down from there
            if not self._fits(k, first):
                ends.insert(0, k)
                first = k
        first = begin
        for k in range(begin, highest + 1):  # up from there
            if not self._fits(first, k):
                ends.append(k - 1)
                first = k
        return (*ends, highest)


def check_reach(reach: Any, blocks: int) -> None:
    """Raise ValueError unless a reach is a number of blocks, or a share as a float."""
    is_share = isinstance(reach, Real) and not isinstance(reach, bool | Integral) and 0 < float(reach) <= 1
    if not is_share and not (is_whole(reach) and 1 <= reach <= blocks):
        raise ValueError(
            f"reach={shown(reach)}: must be 1 to {blocks}, the number of blocks, or a float above 0 and at most 1.0, a "
            "share of what backprop keeps"
        )


def spans(ends: Sequence[int], first: int = 0) -> list[tuple[int, int]]:
    """The first and the last block of each window; the lowest begins at `first`."""
    return list(zip([first, *(end + 1 for end in ends[:-1])], ends, strict=True))
