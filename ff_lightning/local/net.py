"""LocalNet: a network whose blocks learn each by its own local loss. Plain PyTorch, no Lightning in it.

Shapes: B batch, C channels, H x W positions, K classes, L blocks.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ff_lightning.heads import HEADS, HeadFactory, check_head, make_head
from ff_lightning.local.votes import VOTES
from ff_lightning.losses import LogSumExpLoss
from ff_lightning.partition import Block, Granularity, State, partition
from ff_lightning.partition.block import main_output
from ff_lightning.partition.trace import evaluating
from ff_lightning.util.arguments import (
    check_blocks,
    check_choice,
    check_loss,
    check_network,
    check_shape,
    check_whole,
    is_whole,
    shown,
)
from ff_lightning.util.suggest import unknown

Norm = Literal["layer", "channel", "length", "none"]


class LocalNet(nn.Module):
    """A network cut into blocks, each with a head and a local loss of its own; no gradient crosses a border.

    The blocks hold the modules of `model` themselves: what is trained here is trained there.

    Args:
        model: The network to cut; its classifier is not used.
        num_classes: K.
        granularity: Where to cut; see `ff_lightning.partition`.
        head: ``"pooled"``, ``"deep"``, ``"paper"`` (see `PooledHead` and `GoodnessHead`), or a function (channels, K)
            -> module from (B, C, H, W) to goodness (B, K); a parameter `size` of it is given (H, W).
        norm: What the next block sees of a block's output: normalised over all features of an image (``"layer"``),
            over the channels of each position (``"channel"``), divided by its root mean square (``"length"``), or as
            it is (``"none"``). The head sees it as it is.
        vote: How the blocks decide together: ``"mean"`` of goodness, mean weighted by ``"depth"``, ``"last"`` block,
            mean ``"log_softmax"``.
        input_shape: (C, H, W) of an image.
        loss: Module from goodness (B, K) and classes (B,) to a scalar. None: `LogSumExpLoss`.
        reach: How many blocks a loss trains at most: its own, and those below it up to the last border. Above 1 the
            network is cut behind every `reach` blocks only, one block further down at each pass, so that each border
            is open half of the time or more and each block learns from the losses above it as well. Graphs of so
            many blocks are then alive at once. A head must not change in place what it is given.

    Attributes:
        blocks: The blocks in order, each with a `name`.
        heads: The head of each block.
        trained: Numbers of the blocks that are trained; see `train_only`.
        voters: Numbers of the blocks that take part in the vote, those with a trained head; None: all.
        passes: Passes with a graph so far; they decide where the borders lie.
        idle: The parameters that the last `delivered_losses` found without a gradient.

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
        loss: nn.Module | None = None,
        reach: int = 1,
    ) -> None:
        super().__init__()
        check_network("model", model)
        check_whole("num_classes", num_classes, least=2)
        check_choice("norm", norm, get_args(Norm))
        check_choice("vote", vote, VOTES)
        check_head(head)
        check_shape("input_shape", input_shape, model)
        check_loss(loss)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        blocks = partition(model, granularity, torch.zeros(1, *input_shape, device=device))
        if not is_whole(reach) or not 1 <= reach <= len(blocks):
            raise ValueError(f"reach={shown(reach)}: must be 1 to {len(blocks)}, the number of blocks")
        self.head_factory = HEADS[head] if isinstance(head, str) else head
        self.num_classes = num_classes
        self.norm = norm
        self.vote = vote
        self.reach = reach
        self.passes = 0
        self.input_shape = tuple(input_shape)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(self._make_heads(blocks, device))
        self.trained = frozenset(range(len(blocks)))
        self.voters: frozenset[int] | None = None
        self.idle: set[nn.Parameter] = set()
        self.criterion = loss if loss is not None else LogSumExpLoss()
        if len(blocks) == 1:
            warnings.warn(
                f"{type(model).__name__} is a single block with granularity={granularity!r}: nothing is local, it is "
                "trained by ordinary backpropagation",
                stacklevel=2,
            )

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
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        with evaluating(self):
            state: State = torch.zeros(1, *self.input_shape, device=device)
            for k, block in enumerate(self.blocks):
                state, _ = self._run(k, cast(Block, block), state, False, True)
        added = partition(nn.Sequential(OrderedDict([(name, model)])), granularity, main_output(state))
        first = len(self.blocks)
        self.blocks.extend(added)
        self.heads.extend(self._make_heads(added, device))
        self.trained |= set(range(first, first + len(added)))
        for module in (*self.blocks[first:], *self.heads[first:]):
            module.train(self.training)
        return list(range(first, first + len(added)))

    def _make_heads(self, blocks: Iterable[Block], device: torch.device) -> list[nn.Module]:
        return [make_head(self.head_factory, block.map_shape, self.num_classes).to(device) for block in blocks]

    def compile_blocks(self) -> None:
        """Compile each block and each head by itself, when it runs for the first time."""
        for block, head in zip(self.blocks, self.heads, strict=True):
            cast(Block, block).body.compile()  # the blocks share one forward, and a limit of recompilations with it
            head.compile()

    def local_features(self, x: Tensor) -> Iterator[Tensor]:
        """The normalised features (B, C, H, W) of one block after the other; the next block runs when it is asked for.

        Only the block's own graph hangs on each: what enters a block is detached.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: If the images have another number of channels than `input_shape`, or if a batch norm gets a
                single value per channel.
        """
        return self._pass(x, False, range(len(self.blocks)))

    def local_goodness(self, x: Tensor) -> Iterator[Tensor]:
        """The goodness (B, K) of one block after the other; the next block runs when it is asked for.

        Only the graph of the block and its head hangs on each.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: As `local_features`.
        """
        return self._pass(x, True, range(len(self.blocks)))

    def _pass(self, x: Tensor, with_heads: bool, borders: Container[int]) -> Iterator[Tensor]:
        """Goodness or features of one block after the other; what leaves a block of `borders` is detached."""
        if x.ndim != len(self.input_shape) + 1 or x.shape[1] != self.input_shape[0]:
            raise ValueError(f"images of shape {tuple(x.shape[1:])}: the network was built for {self.input_shape}")
        state: State = x
        for k, block in enumerate(self.blocks):
            with self._mode_of(k):
                state, features = self._run(k, cast(Block, block), state, with_heads, k in borders)
                result = cast(Tensor, self.heads[k](features) if with_heads else features)
            del features  # the output of this block is not to be alive while the next one runs
            yield result

    @contextmanager
    def _mode_of(self, k: int) -> Iterator[None]:
        """A block that is not trained runs without a graph and in eval mode.

        The mode is set for each run, since blocks may share modules without weights, such as a dropout.
        """
        if k in self.trained:
            yield
        else:
            with evaluating(self.blocks[k]), evaluating(self.heads[k]):
                yield

    def _run(self, k: int, block: Block, state: State, for_head: bool, detach: bool) -> tuple[State, Tensor]:
        """Run a block: what the next one sees of it, and its output with its graph, normalised but for a head."""
        try:
            out = block(state)
        except ValueError as error:
            raise ValueError(f"block {k} ({block.name}), batch of {len(main_output(state))}: {error}") from error
        rest = out[1:] if isinstance(out, tuple) else ()
        main = main_output(out)
        if for_head:
            features, outside = main, normalise(main.detach() if detach else main, self.norm, block.channel_dim)
        else:
            features = normalise(main, self.norm, block.channel_dim)
            outside = features.detach() if detach else features
        if detach:
            rest = tuple(map(_detach, rest))
        return (outside, *rest) if rest else outside, block.to_map(features)

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
            ValueError: If a class is outside 0 ... K-1 (checked on the CPU only, where it costs nothing).
        """
        check_classes(y, self.num_classes)
        borders = self._borders()
        self.passes += torch.is_grad_enabled()
        joined: list[Tensor] = []
        for k, goodness in enumerate(self._pass(x, True, borders)):
            loss = self.criterion(goodness, y)
            if k in borders:
                yield sum((other - other.detach() for other in joined), loss)  # the value of this loss alone
                joined.clear()
            else:
                joined.append(loss)
                yield loss.detach()
            if k == max(self.trained):
                return

    def _borders(self) -> set[int]:
        """The blocks behind which the next pass is cut."""
        moved = (k for k in range(len(self.blocks)) if (k + 1 + self.passes) % self.reach == 0)
        between = (k for k in range(len(self.blocks)) if not {k, k + 1} <= self.trained)  # also behind the last block
        return {*moved, *between}

    def delivered_losses(self, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The local losses as one vector (L,), as many as `local_losses` gives, for any ordinary training loop.

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
        if not torch.is_grad_enabled():
            return torch.stack(list(self.local_losses(x, y)))
        scale = scaler.scale(torch.ones((), device=x.device)) if scaler else torch.ones((), device=x.device)
        parameters = [self.block_parameters(k) for k in range(len(self.blocks))]
        gradients: list[Sequence[Tensor | None]] = [[None] * len(own) for own in parameters]
        losses: list[Tensor] = []
        reached: list[int] = []
        for k, loss in enumerate(self.local_losses(x, y)):
            losses.append(loss.detach())
            reached.append(k)
            own = list(dict.fromkeys(p for j in reached for p in parameters[j]))  # blocks may share a head
            if loss.requires_grad and own:
                found = dict(zip(own, torch.autograd.grad(loss * scale, own, allow_unused=True), strict=True))
                for j in reversed(reached):
                    gradients[j] = [found.pop(p, None) for p in parameters[j]]
                reached = []
        every = [p for own in parameters for p in own]  # DistributedDataParallel waits for each of them
        computed = [gradient for of_block in gradients for gradient in of_block]
        self.idle = {*every} - {p for p, gradient in zip(every, computed, strict=True) if gradient is not None}
        return _Deliver.apply(torch.stack(losses), scale, gradients, *every)

    def loss(self, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The sum of the local losses, as one scalar for any ordinary training loop; see `delivered_losses`."""
        return self.delivered_losses(x, y, scaler).sum()

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

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The trainable parameters of block k and its head."""
        both = (*self.blocks[k].parameters(), *self.heads[k].parameters())
        return [parameter for parameter in both if parameter.requires_grad]

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
        return VOTES[self.vote](goodness if self.voters is None else goodness[sorted(self.voters)])


def _number(block: int | str, names: Sequence[str]) -> int:
    """The number of a block that is given by number or name."""
    if isinstance(block, str) and block in names:
        return names.index(block)
    if isinstance(block, int) and -len(names) <= block < len(names):
        return block % len(names)
    if isinstance(block, str):
        raise ValueError(unknown("train_blocks", block, names))
    raise ValueError(f"train_blocks: there is no block {block}; the network has blocks 0 to {len(names) - 1}")


def check_classes(y: Tensor, num_classes: int) -> None:
    """Raise ValueError if a class is outside 0 ... K-1. Looks only where that needs no wait for a device."""
    if y.device.type == "cpu" and y.numel():
        lowest, highest = int(y.min()), int(y.max())
        if lowest < 0 or highest >= num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"label {wrong} in the batch: num_classes={num_classes} allows 0 to {num_classes - 1}")


def normalise(h: Tensor, norm: Norm, channel_dim: int) -> Tensor:
    """Normalise the output of a block, in its own dtype also where autocast widens a norm; see `LocalNet`."""
    if norm == "layer":
        return F.group_norm(h, 1).to(h.dtype)  # one group: a layer norm, in a third of the time on a CPU
    if norm == "channel":
        return F.layer_norm(h.movedim(channel_dim, -1), (h.shape[channel_dim],)).movedim(-1, channel_dim).to(h.dtype)
    if norm == "length":
        return F.rms_norm(h, h.shape[1:]).to(h.dtype)
    return h


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _Deliver(torch.autograd.Function):
    """A vector whose backward hands out gradients that were computed before, times the gradient that arrives."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, scale: Tensor, gradients: list[Sequence[Tensor | None]], *parameters: Tensor
    ) -> Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the local gradients of this loss were already delivered: compute the loss again")
        for k, factor in enumerate(arriving / ctx.scale):  # fewer than blocks, where the last ones did not run
            present = [gradient for gradient in gradients[k] if gradient is not None]
            # not in place: two parameters may have been given the same tensor, or one that repeats its values
            scaled = iter(torch._foreach_mul(present, factor) if present else ())
            gradients[k] = [None if gradient is None else next(scaled) for gradient in gradients[k]]
        return None, None, None, *(gradient for of_block in gradients for gradient in of_block)
