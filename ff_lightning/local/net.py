"""LocalNet: a network whose blocks each learn from their own local loss. Plain PyTorch, without Lightning.

Shapes: B batch, C channels, H x W or T positions, K classes, L blocks.
"""

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from typing import cast, get_args

import torch
from torch import Tensor, nn

from ff_lightning.heads import HEADS, HeadFactory, check_head
from ff_lightning.heads.factory import with_mask
from ff_lightning.heads.layers import position_means, without_padding
from ff_lightning.local.blocks import LocalBlocks, by_hooks
from ff_lightning.local.chain import Chain, Norm, OfBlock, norm_for
from ff_lightning.local.objectives import Loss, Objective, check_loss, checked_loss
from ff_lightning.local.updates import Update, deliver
from ff_lightning.local.votes import VOTES
from ff_lightning.local.windows import check_reach
from ff_lightning.partition import Block, Example, Granularity, Inputs, cut
from ff_lightning.partition.inputs import make_example
from ff_lightning.util.arguments import (
    check_choice,
    check_network,
    check_number,
    check_shape,
    check_switch,
    check_whole,
    is_whole,
    shown,
)


class LocalNet(LocalBlocks):
    """A network cut into blocks, each with an objective of its own; no gradient crosses a border.

    The blocks hold the modules of `model` themselves, so training them trains `model`.

    A network that `torch.fx` cannot trace, such as those of transformers, runs by its own forward and is cut at the
    outputs of its repeated layers; see `ff_lightning.partition.Hooked`. The local gradients are then computed while the
    forward runs: the graph of only one block is alive at a time, but the gradients of all blocks are alive when it
    ends. For such a network all blocks run before the methods below give their first result, `reach` must be 1, and
    there is no export.

    Args:
        model: The network to cut; its classifier is not used.
        num_classes: K, the number of scores of each block.
        granularity: Where to cut; see `ff_lightning.partition`.
        head: ``"pooled"``, ``"deep"``, ``"paper"`` (see `PooledHead` and `GoodnessHead`), ``"tokens"`` (`TokenHead`,
            for `NextTokenLoss`), ``"lookahead"`` (`LookAhead`: copies of the next blocks), or a function (channels, K)
            -> module from (B, C, H, W) to goodness (B, K). If the function has a parameter `size`, it gets (H, W); with
            a parameter `place`, the `Place` of the block, which names the blocks that follow. Signals and tokens have
            one axis, (B, C, T), vectors none; for padding see `ff_lightning.heads.HeadFactory`.
        norm: How a block's output is changed for the next block: normalised over all features of a sample
            (``"layer"``), over the channels of each position (``"channel"``), divided by its root mean square
            (``"length"``), or not at all (``"none"``). The head sees the unchanged output. For token ids, and where
            there is a mask, ``"layer"`` means ``"channel"``: neither padding nor other tokens affect a token's norm.
        vote: The common answer of the blocks: ``"mean"`` of goodness, mean weighted by ``"depth"``, ``"last"`` block,
            mean ``"log_softmax"``.
        input_shape: Of a sample: (C, H, W) of an image, (F,) of a vector, (C, T) of a signal, (C, D, H, W) of a volume,
            (T,) for the most tokens of a text.
        loss: ``"logsumexp"`` (that of Scalable Forward-Forward), ``"similarity"``, ``"predsim"``, ``"supcon"``; a
            module from goodness (B, K) and targets to a scalar; or a class or function that makes such a module, or an
            `Objective`, for each block. If it has a parameter `place`, it gets the `Place` of the block. None:
            logsumexp.
        reach: The largest number of blocks that a loss trains: its own, and those below it up to the previous border.
            Above 1 the network is cut into windows of `reach` blocks, which move one block down at each pass, so that
            each border is open half of the time or more, and each block also learns from losses above its own. A float
            above 0 and below 1 is a share of memory: no window keeps more for backward than this share of what backprop
            keeps, unless a single block does. 1.0 is one window over all blocks: backprop with deep supervision.
        vocabulary: Number of token ids, if a sample is a row of ids, int64. A parameter of `forward` with the name of a
            padding mask (see `Inputs`) is then taken as one.
        example: An input batch instead of `input_shape`, for a network with several inputs: a tuple of tensors, or a
            dict of tensors by the names of the arguments of `forward`. In all methods below, x may be a tensor, a tuple
            or a dict like the example. Without a padding mask nothing is masked. Masked positions change no result.
        own_loss: The weights of the losses of a window: with 0.3 the loss of the last block weighs 1, that of the block
            below 0.3, the next 0.09; with 0 only the last loss counts, and the other heads do not learn. The weights
            apply to gradients, not to the losses that are returned and reported.
        recompute: Within a window of several blocks keep the results of large convolutions, matrix products and
            attention alone, and compute the rest again in backward: longer windows in the memory that `reach` allows.
        moving_windows: Whether the windows move from pass to pass. If not, they lie where the fewest are needed.

    Attributes:
        inputs: What the network is called with, an `Inputs`.
        blocks: The blocks in order, each with a `name`.
        objectives: The objective of each block; those with a head have it as `head`.
        trained: Numbers of the blocks that are trained (in the state dict); see `train_only`.
        windows: The `ff_lightning.local.windows.Windows` of `reach`.
        voters: Numbers of the blocks that vote, those with a trained head (in the state dict); None: all.
        passes: Passes with a graph so far (in the state dict); they decide where the borders lie.

    Raises:
        ValueError: If an argument is out of its range or the model cannot be cut; see `ff_lightning.partition`.

    Examples:
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
        reach: float = 1,
        vocabulary: int | None = None,
        example: Example | None = None,
        own_loss: float = 1.0,
        recompute: bool = False,
        moving_windows: bool = True,
    ) -> None:
        super().__init__()
        check_network("model", model)
        check_whole("num_classes", num_classes, least=2 if loss is None or isinstance(loss, str) else 1)
        check_choice("norm", norm, get_args(Norm))
        check_choice("vote", vote, VOTES)
        check_head(head)
        check_loss(loss)
        check_number("own_loss", own_loss, least=0, most=1)
        check_switch("recompute", recompute)
        check_switch("moving_windows", moving_windows)
        longest = None
        if example is None:
            check_shape("input_shape", input_shape, model if vocabulary is None else "text")
            example, longest = make_example(model, input_shape, vocabulary), input_shape[0]
        blocks, self.hooked = cut(model, granularity, example)
        if self.hooked is not None and not (is_whole(reach) and reach == 1):
            raise ValueError(f"reach={shown(reach)}: must be 1 for {by_hooks(model)}")
        check_reach(reach, len(blocks))
        self.head_factory = HEADS[head] if isinstance(head, str) else head
        self.loss_factory = loss
        self.num_classes = num_classes
        self.inputs = Inputs.of(model, example, vocabulary, longest)
        self.norm = norm_for(norm, self.inputs)
        self.vote = vote
        self.reach = reach
        self.own_loss = float(own_loss)
        self.recompute, self.moving_windows = recompute, moving_windows
        self._keeps_products = {}
        self.passes = 0
        self.input_shape = self.inputs.shape
        self._example = self.inputs.values(example)
        self.blocks = nn.ModuleList(blocks)
        self.objectives = nn.ModuleList()
        self._take_mask: dict[str, list[bool]] = {"forward": [], "loss_and_scores": []}
        self._add_objectives()
        self._place_windows()
        self.trained = frozenset(range(len(blocks)))
        self.voters: frozenset[int] | None = None
        if len(blocks) == 1:
            warnings.warn(
                f"{type(model).__name__} is a single block with granularity={granularity!r}: nothing is local, it is "
                "trained by ordinary backpropagation",
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------------------------------ the passes

    def local_features(self, x: Example) -> Iterator[Tensor]:
        """The normalised features (B, C, H, W) of one block after the other; the next block runs when it is asked for.

        Each has the graph of its own block only: the input of a block is detached.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: If the inputs have another shape or dtype than the network was built for, or if a batch norm
                gets a single value per channel.
        """

        def filled(k: int, features: Tensor, mask: Tensor | None) -> Tensor:
            return features if mask is None else without_padding(features, mask)

        return self._each(x, filled, for_head=False)

    def representation(self, x: Example) -> Tensor:
        """The normalised features of all blocks, averaged over the positions: (B, sum of channels)."""
        means = self._each(x, lambda k, features, mask: position_means(features, mask), for_head=False)
        return torch.cat(list(means), 1)

    def local_goodness(self, x: Example) -> Iterator[Tensor]:
        """The goodness (B, K) of one block after the other; the next block runs when it is asked for.

        Each has the graph of its block and head only. Send a mask (B,) to the generator to choose the samples that
        continue to the next block.

        Args:
            x: Images, (B, C, H, W).

        Raises:
            ValueError: As `local_features`.
        """

        def answer(k: int, features: Tensor, mask: Tensor | None) -> Tensor:
            return with_mask(self.objectives[k], self._take_mask["forward"][k], features, mask)

        return self._each(x, answer)

    def _each(
        self,
        x: Example,
        of_block: OfBlock,
        borders: Container[int] | None = None,
        for_head: bool = True,
        count: int | None = None,
    ) -> Iterator[Tensor]:
        """What a function makes of the number, the features and the mask of each of the first `count` blocks.

        See `Chain`; what leaves a block of `borders` (None: all) is detached.
        """
        blocks = cast(Sequence[Block], list(self.blocks)[:count])
        again = [self._keeps_products[k] for k in range(len(blocks))] if self.recompute and self._keeps_products else ()
        chain = Chain(blocks, self.hooked, self.inputs, self.norm, for_head, self._mode_of, again)
        return chain.run(self.inputs.values(x), of_block, borders or range(len(blocks)))

    def _losses(
        self, x: Example, y: Tensor, see: Callable[[int, Tensor], None] | None, scaler: torch.amp.GradScaler | None
    ) -> Iterator[tuple[Tensor, bool]]:
        """The loss of one block after the other with its graph, and whether a border follows."""
        self._check_target(y)
        borders = self.windows.borders(self.passes, self.trained)
        if not self.passes:
            self.windows.warn_of_heads(self.trained)
        self.passes += torch.is_grad_enabled()

        def learn(k: int, features: Tensor, mask: Tensor | None) -> Tensor:
            evaluate = cast(Objective, self.objectives[k]).loss_and_scores
            loss, scores = with_mask(evaluate, self._take_mask["loss_and_scores"][k], features, mask, y)
            if see is not None and scores is not None:
                see(k, scores.detach())
            loss = checked_loss(loss, cast(str, self.blocks[k].name))
            return loss if self.hooked is None else self._delivered(k, loss, scaler)

        for k, loss in enumerate(self._each(x, learn, borders, count=max(self.trained) + 1)):
            yield loss, k in borders
            del loss

    # ----------------------------------------------------------------------------------------------------- the learning

    def updates(
        self,
        x: Example,
        y: Tensor,
        see: Callable[[int, Tensor], None] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Iterator[Update]:
        """The updates of one block after the other; the next block runs when the next update is asked for.

        Call backward on each loss (and step its units) before you ask for the next: then only one graph is ever alive.
        Blocks that are not trained have no update. With `reach` above 1 an update covers all blocks of a window.

        Args:
            x: Images, (B, C, H, W).
            y: Targets, such as classes (B,), int64.
            see: Called for each block whose objective computes goodness, with its number and goodness (B, K), detached.
            scaler: The gradient scaler of a run in float16, for a network whose gradients are computed in its pass.

        Raises:
            ValueError: If a class is outside 0 ... K-1 (checked on the CPU only, where it costs nothing), or if a loss
                is no scalar.
        """
        units: list[int] = []
        losses: list[Tensor] = []
        for k, (loss, is_border) in enumerate(self._losses(x, y, see, scaler)):
            if k in self.trained:
                units.append(k)
                losses.append(loss)
            del loss
            if is_border and units:
                weighted = self.windows.weighted(losses)
                yield Update(tuple(units), sum(weighted[1:], weighted[0]), tuple(loss.detach() for loss in losses))
                del weighted
                units.clear()
                losses.clear()

    def local_losses(self, x: Example, y: Tensor) -> Iterator[Tensor]:
        """The local loss of one block after the other, each with the graph of its own block.

        The next block runs when the next loss is asked for. Call backward (and step) before that: then only one graph
        is ever alive. With `train_only`, the loss of a block that is not trained has no graph, and no losses follow the
        last trained block. With `reach` above 1, only a loss at a border has a graph; its ``backward()`` fills the
        gradients of all blocks since the previous border.

        Args:
            x: Images, (B, C, H, W).
            y: Classes, (B,), int64.

        Raises:
            ValueError: As `updates`.
        """
        joined: list[Tensor] = []
        for loss, is_border in self._losses(x, y, None, None):
            if is_border:
                others = self.windows.weighted([*joined, loss])[:-1]
                yield sum((other - other.detach() for other in others), loss)  # the value of this loss alone
                joined.clear()
            else:
                joined.append(loss)
                yield loss.detach()

    def delivered_losses(self, x: Example, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The local losses of the trained blocks as one vector, for any ordinary training loop.

        The local gradients are computed here, block after block, so that the graph of only one block (or one window) is
        alive at any time. ``backward()`` of any scalar made of the vector hands them to the parameters, each times the
        gradient that arrives at the loss of its block. Different weights within a window are an error, on the CPU.

        Args:
            x: Images, (B, C, H, W).
            y: Classes, (B,), int64.
            scaler: The gradient scaler of a training loop in float16. The local gradients are then computed at its
                scale, too, so that they do not underflow.
        """
        parameters = [self.block_parameters(k) for k in range(len(self.blocks))]
        return deliver(self.updates(x, y, scaler=scaler), parameters, scaler).losses

    def loss(self, x: Example, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The sum of the local losses, as one scalar for any ordinary training loop; see `delivered_losses`."""
        return self.delivered_losses(x, y, scaler).sum()

    # ------------------------------------------------------------------------------------------------------ the answers

    def goodness(self, x: Example) -> Tensor:
        """Goodness of each class at each block.

        Args:
            x: Images, (B, C, H, W).

        Returns:
            (L, B, K), float32.
        """
        return torch.stack(list(self.local_goodness(x)))

    def forward(self, x: Example) -> Tensor:
        """Scores of the classes after the vote of the blocks: (B, C, H, W) -> (B, K); the highest one wins."""
        return self.decide(self.goodness(x))
