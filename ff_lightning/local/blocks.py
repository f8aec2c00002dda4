"""Blocks and their objectives, of which `LocalNet` is made: which are trained, and what they keep for backward.

Shapes: B batch, C channels, H x W positions, K classes, L blocks.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ff_lightning.heads import HeadFactory, PooledHead, make_head
from ff_lightning.heads.factory import takes_mask, with_mask
from ff_lightning.heads.place import Place
from ff_lightning.local.chain import Norm, hand_on, held, run_block, state_of
from ff_lightning.local.objectives import Loss, Objective, example_targets, make_objective
from ff_lightning.local.recompute import BuffersStay, Results
from ff_lightning.local.updates import Update, deliver
from ff_lightning.local.votes import VOTES
from ff_lightning.local.windows import Counter, Kept, Storages, Windows
from ff_lightning.losses import LogSumExpLoss, check_classes
from ff_lightning.partition import Block, Granularity, Hooked, Inputs, partition
from ff_lightning.partition.block import main_output
from ff_lightning.partition.channelwise import all_kept, redone_bytes
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import check_blocks, is_whole
from ff_lightning.util.suggest import unknown
from ff_lightning.util.torch_private import uncompiled


class LocalBlocks(nn.Module):
    """The blocks of a network with their objectives; see `ff_lightning.LocalNet`, which adds the passes."""

    blocks: nn.ModuleList
    objectives: nn.ModuleList
    hooked: Hooked | None
    inputs: Inputs
    norm: Norm
    vote: str
    head_factory: HeadFactory
    loss_factory: Loss
    num_classes: int
    reach: float
    own_loss: float
    recompute: bool
    moving_windows: bool
    windows: Windows
    passes: int
    trained: frozenset[int]
    voters: frozenset[int] | None
    _example: Sequence[Tensor]
    _take_mask: dict[str, list[bool]]
    _keeps_products: dict[int, bool]

    def _add_objectives(self) -> None:
        """Make the objectives of the blocks that have none yet."""
        like = next(self.parameters(), torch.zeros(0))
        for k in range(len(self.objectives), len(self.blocks)):
            objective = make_objective(self.loss_factory, self._place(k)).to(like.device, like.dtype)
            self.objectives.append(objective)
            for name, takes in self._take_mask.items():
                takes.append(takes_mask(getattr(objective, name)))
            if self.inputs.mask and not self._is_masked(k):
                block = cast(Block, self.blocks[k])
                warnings.warn(
                    f"block {k} ({block.name}) has features of shape {block.map_shape}, not one for each position of "
                    f"{self.inputs.mask}: its norm and its loss do not leave padding out",
                    stacklevel=3,
                )

    def _place(self, k: int) -> Place:
        block = cast(Block, self.blocks[k])
        shape, masked = block.map_shape, self._is_masked(k)
        following = cast(tuple[Block, ...], tuple(self.blocks)[k + 1 :])
        pooled = partial(PooledHead, shape[0], self.num_classes, size=shape[1:])
        place = Place(
            k, len(self.blocks), block.name, shape, self.num_classes, pooled, masked, block.channel_dim, following
        )
        return place._replace(make_head=partial(make_head, self.head_factory, shape, self.num_classes, masked, place))

    def _is_masked(self, k: int) -> bool:
        """Whether there may be padding among the positions of block k."""
        return self.inputs.covers(cast(Block, self.blocks[k]).map_shape)

    @property
    def heads(self) -> nn.ModuleList:
        """The head of each block whose objective has one."""
        heads = (getattr(objective, "head", None) for objective in self.objectives)
        return nn.ModuleList(head for head in heads if head is not None)

    @property
    def channels(self) -> list[int]:
        """The number of channels of each block's features."""
        return [cast(Block, block).map_shape[0] for block in self.blocks]

    def units(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Block and objective of each unit of training, by the name of the block."""
        return {
            cast(str, block.name): (block, objective)
            for block, objective in zip(self.blocks, self.objectives, strict=True)
        }

    def train_only(self, blocks: Iterable[int | str] | None) -> None:
        """Train only some of the blocks.

        The others run without a graph and in eval mode, so their weights and running statistics stay. Blocks above the
        last trained one do not run in training.

        Args:
            blocks: Their numbers or names; None: all blocks.

        Raises:
            ValueError: If a block does not exist, or if no block would be trained.
        """
        check_blocks("train_blocks", blocks)
        names = [cast(str, block.name) for block in self.blocks]
        wanted = range(len(names)) if blocks is None else [_number(block, names) for block in blocks]
        if not wanted:
            raise ValueError(f"train_blocks={blocks!r}: at least one block must be trained")
        self.trained = frozenset(wanted)

    def append(self, name: str, model: nn.Module, granularity: Granularity = "block") -> list[int]:
        """Put new blocks on top of the network; the blocks below keep their weights.

        Args:
            name: Of the new part: its blocks are called ``name.…``.
            model: Its input is the normalised output of the last block. It is cut like the first network.
            granularity: Where to cut it; see `ff_lightning.partition`.

        Returns:
            The numbers of the new blocks, for `train_only`.

        Raises:
            ValueError: If the blocks run only as parts of the network's own forward.
        """
        if self.hooked is not None:
            raise ValueError(f"append is not there for {by_hooks(self.hooked.model)}")
        with evaluating(self):
            values = self._example_here()
            state = state_of(values)
            for k, block in enumerate(cast(Iterable[Block], self.blocks)):
                mask = self.inputs.valid(values) if self._is_masked(k) else None
                state, _ = run_block(k, block, state, self.norm, detach=True, for_head=False, mask=mask)
        added = partition(nn.Sequential(OrderedDict([(name, model)])), granularity, main_output(state))
        first = len(self.blocks)
        self.blocks.extend(added)
        self._add_objectives()
        self._place_windows()
        self.trained |= set(range(first, first + len(added)))
        for module in (*self.blocks[first:], *self.objectives[first:]):
            module.train(self.training)
        return list(range(first, first + len(added)))

    def _example_here(self) -> list[Tensor]:
        """The inputs of the example, where the network lies now."""
        like = next(self.parameters(), torch.zeros(0))
        return [value.to(like if value.is_floating_point() else like.device) for value in self._example]

    def _place_windows(self) -> None:
        """Place the windows for the blocks that are there."""
        names = [cast(str, block.name) for block in self.blocks]
        local = is_whole(self.reach) and self.reach == 1
        kept = None if local else self.kept()
        self.windows = Windows(self.reach, names, kept, self.own_loss, self.recompute, self.moving_windows)

    def kept(self) -> Kept:
        """What autograd keeps for one example in the blocks: as much as a batch of three keeps more than one of two."""
        like = next(self.parameters(), torch.zeros(0))
        devices = [like.device] if like.is_cuda else []
        untouched = BuffersStay(self.objectives.modules(), torch.random.fork_rng(devices))  # a loss may change its own
        with evaluating(self), untouched, uncompiled(), torch.enable_grad():
            values = [value[:1] for value in self._example_here()]
            two, three = (self._storages([torch.cat([value] * count) for value in values]) for count in (2, 3))
        inputs, backprop, *parts = map(_per_example, two, three)
        of_block, redone, of_objective, of_norm, *again = (parts[i::7] for i in range(7))
        most = [max(part.values(), default=0) for part in redone]  # one chain after the other
        return Kept(
            of_block, most, of_objective, of_norm, inputs, sum(backprop.values()), *(again if self.recompute else ())
        )

    def _storages(self, values: Sequence[Tensor]) -> list[Storages]:
        """What is kept: of the batch, of all without norms and heads; seven parts for each block, see `Kept`."""
        counter = Counter(self.parameters())
        found: list[Storages] = []
        graphs: list[Any] = []
        with counter.counting():
            state = state_of(values)
            for k, block in enumerate(cast(Iterable[Block], self.blocks)):
                mask = self.inputs.valid(values) if self._is_masked(k) else None
                entered = _storages_of(state)
                results = Results()
                with redone_bytes() as redone, results if self.recompute else nullcontext():
                    out = block(state)
                if k not in self._keeps_products:
                    self._keeps_products[k] = not (results.changed or self._changes_products(block, state))
                found += [counter.take(), dict(enumerate(redone))]
                outside, features = hand_on(block, main_output(out), self.norm, False, True, mask)
                of_norm = counter.take()
                graphs.append(self._answer_to_example(k, features, mask, counter))
                products = _storages_of(tuple(results.found)) if self._keeps_products[k] else {}
                found += [counter.take(), of_norm, entered, _storages_of(out), products]
                graphs += [out, results.found]
                state = (outside, *out[1:]) if isinstance(out, tuple) else outside
            graphs.append(state)
            state = state_of(values)
            with all_kept():
                for block in cast(Iterable[Block], self.blocks):
                    state = block(state)
        batch = {value.untyped_storage().data_ptr() for value in values}
        kept = {address: size for part in found[::7] for address, size in part.items() if address in batch}
        return [kept, counter.take(), *found]

    def _changes_products(self, block: Block, state: Any) -> bool:
        """Whether a block in training changes the result of a product in place, as a dropout may do."""
        if not self.recompute:
            return False
        block.train()
        with torch.no_grad(), BuffersStay(block.modules()), Results() as results, suppress(ValueError):
            block(state)  # a batch norm of one value per channel refuses
        block.eval()
        return results.changed

    def _answer_to_example(self, k: int, features: Tensor, mask: Tensor | None, counter: Counter) -> Any:
        """The loss of a block on an example, with its graph; its scores where no target that we know suits the loss."""
        objective, takes = cast(Objective, self.objectives[k]), self._take_mask
        with warnings.catch_warnings(), suppress(NotImplementedError):
            warnings.simplefilter("ignore")  # of a criterion that broadcasts a target of another shape
            for target in example_targets(features, self.num_classes):
                with suppress(Exception):  # of any kind: criteria are the user's own
                    return with_mask(objective.loss_and_scores, takes["loss_and_scores"][k], features, mask, target)
                counter.take()  # what the attempt has kept
            return with_mask(objective, takes["forward"][k], features, mask)
        return None

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters of block k and its objective."""
        both = (*self.blocks[k].parameters(), *self.objectives[k].parameters())
        return [parameter for parameter in both if parameter.requires_grad]

    def _mode_of(self, k: int) -> AbstractContextManager[None]:
        """A block that is not trained runs without a graph and in eval mode.

        The mode is set for each run, since blocks may share modules without weights, such as a dropout.
        """
        return nullcontext() if k in self.trained else held((self.blocks[k], self.objectives[k]))

    def _delivered(self, k: int, loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
        """The loss of a block with its gradients in the place of its graph."""
        parameters = [self.block_parameters(j) if j == k else [] for j in range(k + 1)]
        return deliver([Update((k,), loss, (loss.detach(),))], parameters, scaler).losses[0]

    def _check_target(self, y: Tensor) -> None:
        criterion = getattr(self.objectives[0], "criterion", None)
        if isinstance(criterion, LogSumExpLoss) and not y.is_floating_point():
            check_classes(y, self.num_classes, criterion.ignore_index)

    def decide(self, goodness: Tensor) -> Tensor:
        """The vote of the blocks, or of the first of them: goodness (L, B, K) -> scores (B, K)."""
        if self.voters is None:
            return VOTES[self.vote](goodness, range(len(goodness)))
        voters = [k for k in sorted(self.voters) if k < len(goodness)]
        return VOTES[self.vote](goodness[voters], voters) if voters else torch.zeros_like(goodness[0])

    def compile_blocks(self) -> None:
        """Compile each block and each head by itself, when it first runs."""
        for block, objective in zip(self.blocks, self.objectives, strict=True):
            block.compile()
            head = objective.head if hasattr(objective, "head") else objective
            cast(nn.Module, head).compile()

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The weights of all blocks under the names of the model they were made of; its classifier is not among them.

        ``model.load_state_dict(net.backbone_state_dict(), strict=False)`` loads them into another such network.
        """
        return {key: value for block in self.blocks for key, value in cast(Block, block).body.state_dict().items()}

    def export(self) -> nn.Module:
        """A copy for prediction only: images (B, C, H, W) -> scores (B, K), in eval mode.

        It is a plain module, which `torch.export.export` and `torch.onnx.export` accept; with torch 2.7 say
        ``strict=False``, which is the default of later releases.

        Raises:
            ValueError: If the blocks run only as parts of the network's own forward.
        """
        if self.hooked is not None:
            raise ValueError(f"export is not there for {by_hooks(self.hooked.model)}: keep its checkpoint")
        return copy.deepcopy(self).eval().requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        """Passes so far, and for each block whether it is trained and whether it votes (2: all do), (1 + 2 L,)."""
        blocks = range(len(self.blocks))
        votes = [2 if self.voters is None else int(k in self.voters) for k in blocks]
        return torch.tensor(
            [self.passes, *(int(k in self.trained) for k in blocks), *votes]
        )  # many take it for weights

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` gave."""
        self.passes, *flags = state.tolist()
        trained, votes = flags[: len(self.blocks)], flags[len(self.blocks) :]
        self.trained = frozenset(k for k, flag in enumerate(trained) if flag)
        self.voters = None if 2 in votes else frozenset(k for k, flag in enumerate(votes) if flag)


def by_hooks(model: nn.Module) -> str:
    """The network, in a message, and why it cannot do what other networks can."""
    return f"{type(model).__name__}, whose blocks run only as parts of its own forward"


def _storages_of(values: Any) -> Storages:
    """Those of a tensor, or of the tensors in a tuple."""
    storages = [
        v.untyped_storage() for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, Tensor)
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _per_example(two: Storages, three: Storages) -> Storages:
    """From what batches of two and of three examples keep; constants do not count where both keep the like."""
    if len(two) != len(three):
        return {address: size // 3 for address, size in three.items()}
    return {address: size - smaller for (address, size), smaller in zip(three.items(), two.values(), strict=True)}


def _number(block: int | str, names: Sequence[str]) -> int:
    """The number of a block that is given by number or name."""
    if isinstance(block, str) and block in names:
        return names.index(block)
    if is_whole(block) and -len(names) <= int(block) < len(names):
        return int(block) % len(names)
    if isinstance(block, str):
        raise ValueError(unknown("train_blocks", block, names))
    raise ValueError(f"train_blocks: there is no block {block}; the network has blocks 0 to {len(names) - 1}")
