"""LocalNet: a network whose blocks learn each by its own local loss. Plain PyTorch, no Lightning in it.

Shapes: B batch, C channels, H x W positions, K classes, L blocks.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast, get_args

import torch
from torch import Tensor, nn

from ff_lightning.heads import HEADS, HeadFactory, check_head, make_head
from ff_lightning.local.chain import Norm, held, run_block
from ff_lightning.local.objectives import Loss, Objective, Place, check_loss, checked_loss, make_objective
from ff_lightning.local.updates import Update, deliver
from ff_lightning.local.votes import VOTES
from ff_lightning.losses import LogSumExpLoss, check_classes
from ff_lightning.partition import Block, Granularity, State, partition
from ff_lightning.partition.block import main_output
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import (
    check_blocks,
    check_choice,
    check_network,
    check_shape,
    check_whole,
    is_whole,
    shown,
)
from ff_lightning.util.suggest import unknown


class LocalNet(nn.Module):
    """A network cut into blocks, each with an objective of its own; no gradient crosses a border.

    The blocks hold the modules of `model` themselves: what is trained here is trained there.

    Args:
        model: The network to cut; its classifier is not used.
        num_classes: K, the number of scores of each block.
        granularity: Where to cut; see `ff_lightning.partition`.
        head: ``"pooled"``, ``"deep"``, ``"paper"`` (see `PooledHead` and `GoodnessHead`), or a function (channels, K)
            -> module from (B, C, H, W) to goodness (B, K); a parameter `size` of it is given (H, W).
        norm: What the next block sees of a block's output: normalised over all features of an image (``"layer"``),
            over the channels of each position (``"channel"``), divided by its root mean square (``"length"``), or as
            it is (``"none"``). The head sees it as it is.
        vote: How the blocks decide together: ``"mean"`` of goodness, mean weighted by ``"depth"``, ``"last"`` block,
            mean ``"log_softmax"``.
        input_shape: (C, H, W) of an image.
        loss: ``"logsumexp"`` (that of Scalable Forward-Forward), ``"similarity"``, ``"predsim"``, ``"supcon"``; a
            module from goodness (B, K) and targets to a scalar; or a class or function that makes such a module, or an
            `Objective`, for each block: a parameter `place` of it is given the `Place` of the block. None: logsumexp.
        reach: How many blocks a loss trains at most: its own, and those below it up to the last border. Above 1 the
            network is cut behind every `reach` blocks only, one block further down at each pass, so that each border
            is open half of the time or more and each block learns from the losses above it as well. Graphs of so
            many blocks are then alive at once.

    Attributes:
        blocks: The blocks in order, each with a `name`.
        objectives: The objective of each block; those with a head have it as `head`.
        trained: Numbers of the blocks that are trained; see `train_only`.
        voters: Numbers of the blocks that take part in the vote, those with a trained head; None: all.
        passes: Passes with a graph so far; they decide where the borders lie. These three are in the state dict.

    Raises:
        ValueError: If an argument is out of its range or the model cannot be cut; see `ff_lightning.partition`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU())
        >>> net = LocalNet(model, num_classes=10, input_shape=(1, 8, 8))
        >>> x, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
        >>> for loss in net.local_losses(x, y):  # block after block
        ...     loss.backward()
        >>> net(x).shape, net.goodness(x).shape
        (torch.Size([2, 10]), torch.Size([2, 2, 10]))
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        granularity: Granularity = "block",
        head: str | HeadFactory = "pooled",
        norm: Norm = "layer",
        vote: str = "mean",
        input_shape: Sequence[int] = (3, 32, 32),
        loss: Loss = None,
        reach: int = 1,
    ) -> None:
        super().__init__()
        check_network("model", model)
        check_whole("num_classes", num_classes, least=2 if loss is None or isinstance(loss, str) else 1)
        check_choice("norm", norm, get_args(Norm))
        check_choice("vote", vote, VOTES)
        check_head(head)
        check_shape("input_shape", input_shape, model)
        check_loss(loss)
        like = next(model.parameters(), torch.zeros(0))
        blocks = partition(model, granularity, torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
        if not is_whole(reach) or not 1 <= reach <= len(blocks):
            raise ValueError(f"reach={shown(reach)}: must be 1 to {len(blocks)}, the number of blocks")
        self.head_factory = HEADS[head] if isinstance(head, str) else head
        self.loss_factory = loss
        self.num_classes = num_classes
        self.norm: Norm = norm
        self.vote = vote
        self.reach = reach
        self.passes = 0
        self.input_shape = tuple(input_shape)
        self.blocks = nn.ModuleList(blocks)
        self.objectives = nn.ModuleList()
        self._add_objectives()
        self.trained = frozenset(range(len(blocks)))
        self.voters: frozenset[int] | None = None
        if len(blocks) == 1:
            warnings.warn(
                f"{type(model).__name__} is a single block with granularity={granularity!r}: nothing is local, it is "
                "trained by ordinary backpropagation",
                stacklevel=2,
            )

    # ---------------------------------------------------------------------------------------------------- its structure

    def _add_objectives(self) -> None:
        """Make the objectives of the blocks that have none yet."""
        like = next(self.parameters(), torch.zeros(0))
        for k in range(len(self.objectives), len(self.blocks)):
            self.objectives.append(make_objective(self.loss_factory, self._place(k)).to(like.device, like.dtype))

    def _place(self, k: int) -> Place:
        block = cast(Block, self.blocks[k])
        head = partial(make_head, self.head_factory, block.map_shape, self.num_classes)
        return Place(k, len(self.blocks), block.name, block.map_shape, self.num_classes, head)

    @property
    def heads(self) -> nn.ModuleList:
        """The head of each block whose objective has one."""
        heads = (getattr(objective, "head", None) for objective in self.objectives)
        return nn.ModuleList(head for head in heads if head is not None)

    def units(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Block and objective of each unit of training, by the name of the block."""
        return {
            cast(str, block.name): (block, objective)
            for block, objective in zip(self.blocks, self.objectives, strict=True)
        }

    def train_only(self, blocks: Iterable[int | str] | None) -> None:
        """Train only some of the blocks.

        The others run without a graph and in eval mode, so that neither their weights nor their running statistics
        move; those above the last trained block do not run in training at all.

        Args:
            blocks: Their numbers or names; None: all blocks.

        Raises:
            ValueError: If a block does not exist, or if none is left.
        """
        check_blocks("train_blocks", blocks)
        names = [cast(str, block.name) for block in self.blocks]
        wanted = range(len(names)) if blocks is None else [_number(block, names) for block in blocks]
        if not wanted:
            raise ValueError(f"train_blocks={blocks!r}: at least one block must be trained")
        self.trained = frozenset(wanted)

    def append(self, name: str, model: nn.Module, granularity: Granularity = "block") -> list[int]:
        """Put further blocks on top of the network; those below keep their weights.

        Args:
            name: Of the new part: its blocks are called ``name.…``.
            model: Network from the normalised features of the last block; it is cut like the first one.
            granularity: Where to cut it; see `ff_lightning.partition`.

        Returns:
            The numbers of the new blocks, for `train_only`.
        """
        like = next(self.parameters(), torch.zeros(0))
        with evaluating(self):
            state: State = torch.zeros(1, *self.input_shape, device=like.device, dtype=like.dtype)
            for k, block in enumerate(cast(Iterable[Block], self.blocks)):
                state, _ = run_block(k, block, state, self.norm, detach=True, for_head=False)
        added = partition(nn.Sequential(OrderedDict([(name, model)])), granularity, main_output(state))
        first = len(self.blocks)
        self.blocks.extend(added)
        self._add_objectives()
        self.trained |= set(range(first, first + len(added)))
        for module in (*self.blocks[first:], *self.objectives[first:]):
            module.train(self.training)
        return list(range(first, first + len(added)))

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters of block k and its objective."""
        both = (*self.blocks[k].parameters(), *self.objectives[k].parameters())
        return [parameter for parameter in both if parameter.requires_grad]

    def compile_blocks(self) -> None:
        """Compile each block and each objective's head by itself, when it runs for the first time."""
        for block, objective in zip(self.blocks, self.objectives, strict=True):
            cast(Block, block).body.compile()  # the blocks share one forward, and a limit of recompilations with it
            head = objective.head if hasattr(objective, "head") else objective
            cast(nn.Module, head).compile()

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The weights of all blocks under the names of the model they were made of; its classifier is not among them.

        ``model.load_state_dict(net.backbone_state_dict(), strict=False)`` takes them to another model of its kind.
        """
        return {key: value for block in self.blocks for key, value in cast(Block, block).body.state_dict().items()}

    def export(self) -> nn.Module:
        """A copy for prediction: images (B, C, H, W) -> scores (B, K), in eval mode, nothing to train.

        It is a plain module that goes through `torch.export.export` and `torch.onnx.export`.
        """
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

    # ------------------------------------------------------------------------------------------------------ the passes

    def local_features(self, x: Tensor) -> Iterator[Tensor]:
        """The normalised features (B, C, H, W) of one block after the other; the next block runs when it is asked for.

        Only the block's own graph hangs on each: what enters a block is detached.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: If the images have another number of channels than `input_shape`, or if a batch norm gets a
                single value per channel.
        """
        return self._pass(x, range(len(self.blocks)), for_head=False)

    def local_goodness(self, x: Tensor) -> Iterator[Tensor]:
        """The goodness (B, K) of one block after the other; the next block runs when it is asked for.

        Only the graph of the block and its head hangs on each.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: As `local_features`.
        """
        passing = self._pass(x, range(len(self.blocks)))
        for k in range(len(self.blocks)):
            features = next(passing)
            with self._mode_of(k):
                goodness = self.objectives[k](features)
            del features  # the output of this block is not to be alive while the next one runs
            yield goodness

    def _pass(self, x: Tensor, borders: Container[int], for_head: bool = True) -> Iterator[Tensor]:
        """Features of one block after the other; what leaves a block of `borders` is detached."""
        if x.ndim != len(self.input_shape) + 1 or x.shape[1] != self.input_shape[0]:
            raise ValueError(f"images of shape {tuple(x.shape[1:])}: the network was built for {self.input_shape}")
        state: State = x
        for k, block in enumerate(self.blocks):
            with self._mode_of(k):
                state, features = run_block(k, cast(Block, block), state, self.norm, k in borders, for_head)
            yield features
            del features

    def _mode_of(self, k: int) -> AbstractContextManager[None]:
        """A block that is not trained runs without a graph and in eval mode.

        The mode is set for each run, since blocks may share modules without weights, such as a dropout.
        """
        return nullcontext() if k in self.trained else held((self.blocks[k], self.objectives[k]))

    def _losses(self, x: Tensor, y: Tensor, see: Callable[[int, Tensor], None] | None) -> Iterator[tuple[Tensor, bool]]:
        """The loss of one block after the other with its graph, and whether a border follows."""
        self._check_target(y)
        borders = self._borders()
        self.passes += torch.is_grad_enabled()
        passing = self._pass(x, borders)
        for k in range(max(self.trained) + 1):
            features = next(passing)
            with self._mode_of(k):
                loss, scores = cast(Objective, self.objectives[k]).loss_and_scores(features, y)
            del features  # the output of this block is not to be alive while the next one runs
            if see is not None and scores is not None:
                see(k, scores.detach())
            yield checked_loss(loss, cast(str, self.blocks[k].name)), k in borders

    def _borders(self) -> set[int]:
        """The blocks behind which the next pass is cut."""
        moved = (k for k in range(len(self.blocks)) if (k + 1 + self.passes) % self.reach == 0)
        between = (k for k in range(len(self.blocks)) if not {k, k + 1} <= self.trained)  # also behind the last block
        return {*moved, *between}

    def _check_target(self, y: Tensor) -> None:
        criterion = getattr(self.objectives[0], "criterion", None)
        if isinstance(criterion, LogSumExpLoss) and not y.is_floating_point():
            check_classes(y, self.num_classes, criterion.ignore_index)

    # ----------------------------------------------------------------------------------------------------- the learning

    def updates(self, x: Tensor, y: Tensor, see: Callable[[int, Tensor], None] | None = None) -> Iterator[Update]:
        """The updates of one block after the other; the next block runs when the next update is asked for.

        Call backward on its loss (and step its units) in between, and only one graph is ever alive. There is none for
        blocks that are not trained. With `reach` above 1 an update is one of all blocks between two borders.

        Args:
            x: Images, (B, C, H, W).
            y: Targets, such as classes (B,), int64.
            see: Called with the number and the goodness (B, K), detached, of each block whose objective computes it.

        Raises:
            ValueError: If a class is outside 0 ... K-1 (checked on the CPU only, where it costs nothing), or if a loss
                is no scalar.
        """
        units: list[int] = []
        losses: list[Tensor] = []
        for k, (loss, is_border) in enumerate(self._losses(x, y, see)):
            if k in self.trained:
                units.append(k)
                losses.append(loss)
            del loss
            if is_border and units:
                yield Update(tuple(units), sum(losses[1:], losses[0]), tuple(loss.detach() for loss in losses))
                units.clear()
                losses.clear()

    def local_losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The local loss of one block after the other, each with the graph of its own block.

        The next block runs when the next loss is asked for: call backward (and step) in between, and only one graph
        is ever alive. With `train_only`, the loss of a block that is not trained has no graph, and there are none
        after the last trained block. With `reach` above 1, a loss has no graph either unless a border follows its
        block: the loss there brings the gradients of all blocks since the border before.

        Args:
            x: Images, (B, C, H, W).
            y: Classes, (B,), int64.

        Raises:
            ValueError: As `updates`.
        """
        joined: list[Tensor] = []
        for loss, is_border in self._losses(x, y, None):
            if is_border:
                yield sum((other - other.detach() for other in joined), loss)  # the value of this loss alone
                joined.clear()
            else:
                joined.append(loss)
                yield loss.detach()

    def delivered_losses(self, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The local losses of the trained blocks as one vector, for any ordinary training loop.

        The local gradients are computed here, block after block, so that the graph of only one block (of at most
        `reach` blocks) is alive at any time. ``backward()`` of any scalar made of the vector hands them to the
        parameters, each times the gradient that arrives at the loss of its block: weights of the losses other than
        one for all ask for a `reach` of 1.

        Args:
            x: Images, (B, C, H, W).
            y: Classes, (B,), int64.
            scaler: The gradient scaler of the training loop, where it trains in float16: the local gradients are
                then computed at its scale too, and do not underflow.
        """
        parameters = [self.block_parameters(k) for k in range(len(self.blocks))]
        return deliver(self.updates(x, y), parameters, scaler).losses

    def loss(self, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The sum of the local losses, as one scalar for any ordinary training loop; see `delivered_losses`."""
        return self.delivered_losses(x, y, scaler).sum()

    # ------------------------------------------------------------------------------------------------------ the answers

    def goodness(self, x: Tensor) -> Tensor:
        """Goodness of each class at each block.

        Args:
            x: Images, (B, C, H, W).

        Returns:
            (L, B, K), float32.
        """
        return torch.stack(list(self.local_goodness(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes after the vote of the blocks: (B, C, H, W) -> (B, K); the highest one wins."""
        return self.decide(self.goodness(x))

    def decide(self, goodness: Tensor) -> Tensor:
        """The vote of the blocks: goodness (L, B, K) -> scores (B, K)."""
        voters = sorted(self.voters) if self.voters is not None else range(len(goodness))
        return VOTES[self.vote](goodness if self.voters is None else goodness[voters], voters)


def _number(block: int | str, names: Sequence[str]) -> int:
    """The number of a block that is given by number or name."""
    if isinstance(block, str) and block in names:
        return names.index(block)
    if isinstance(block, int) and -len(names) <= block < len(names):
        return block % len(names)
    if isinstance(block, str):
        raise ValueError(unknown("train_blocks", block, names))
    raise ValueError(f"train_blocks: there is no block {block}; the network has blocks 0 to {len(names) - 1}")
