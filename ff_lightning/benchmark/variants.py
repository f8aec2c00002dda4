"""The variants: each is one step, the same network, images, optimizer and settings for all.

Shapes: B batch, K classes.
"""

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from ff_lightning.backbones import Stem, build_backbone
from ff_lightning.local.net import LocalNet
from ff_lightning.local.recompute import ATTENTION, PRODUCTS
from ff_lightning.local.windows import Kept
from ff_lightning.partition import Block, Granularity, State, partition
from ff_lightning.partition.block import main_output
from ff_lightning.util.memory import Saved, saved_for_backward
from ff_lightning.util.torch_private import TorchDispatchMode


@dataclass(frozen=True)
class Settings:
    """What is the same for all variants."""

    backbone: str
    stem: Stem
    classes: int
    batch: int
    size: int
    head: str
    micro_batches: int
    epoch_batches: int
    device: str
    precision: str
    channels_last: bool

    def model(self) -> nn.Module:
        """The network, the same weights each time."""
        torch.manual_seed(0)
        if self.backbone.startswith("vit_") and self.stem == "standard":  # made for images of one size
            return models.get_model(self.backbone, num_classes=self.classes, image_size=self.size)
        return build_backbone(self.backbone, self.classes, (3, self.size, self.size), self.stem)

    def place(self, module: nn.Module) -> nn.Module:
        """On the device, in the order of memory asked for."""
        return module.to(self.device, memory_format=torch.channels_last if self.channels_last else None)  # type: ignore[call-overload]

    def batch_of_noise(self) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and classes (B,)."""
        x = torch.randn(self.batch, 3, self.size, self.size)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.device), torch.randint(self.classes, (self.batch,)).to(self.device)

    def autocast(self) -> torch.autocast:
        """Mixed precision, or none."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bf16")


@dataclass
class Variant:
    """A step that can be repeated, and what is counted beside it."""

    step: Callable[[], Any]
    modules: list[nn.Module] = field(default_factory=list)  # what `torch.compile` is applied to, one by one
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    passes: int = 1  # of a step: as many as it takes for windows to come back to where they were
    saved_peak: Callable[[], int] | None = None  # where hooks cannot count it
    seconds: Callable[[], float] | None = None  # where only a part of the step counts

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters that are stepped."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]


def backprop(settings: Settings, micro_batches: int = 1) -> Variant:
    """Plain backpropagation; with more than one micro-batch, their gradients are accumulated."""
    model = settings.place(settings.model())
    optimizer = _optimizer(list(model.parameters()))
    if settings.batch % micro_batches:
        raise ValueError(f"batch={settings.batch}: must be a multiple of micro_batches={micro_batches}")
    parts = [(x, y) for x, y in zip(*(t.chunk(micro_batches) for t in settings.batch_of_noise()), strict=True)]

    def step() -> None:
        for x, y in parts:
            with settings.autocast():
                loss = F.cross_entropy(model(x).float(), y)
            (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(step, [model], [optimizer])


def checkpointed(settings: Settings, kept: Sequence[Any] = ()) -> Variant:
    """Backpropagation that keeps the inputs of the blocks and runs each block again in backward.

    Args:
        settings: What all variants share.
        kept: Operations whose results are kept and not computed again, as torch's selective checkpointing does.
    """
    blocks = partition(settings.model(), "block", torch.zeros(1, 3, settings.size, settings.size))
    classifier = nn.Linear(blocks[-1].map_shape[0], settings.classes)
    net = settings.place(nn.ModuleList([*blocks, classifier]))
    optimizer = _optimizer(list(net.parameters()))
    x, y = settings.batch_of_noise()
    selection = partial(create_selective_checkpoint_contexts, [*kept]) if kept else noop_context_fn

    def step() -> None:
        with settings.autocast():
            state: State = x
            for block in blocks:
                state = checkpoint(block, state, use_reentrant=False, context_fn=selection)
            scores = classifier(blocks[-1].to_map(main_output(state)).flatten(2).mean(2))
            loss = F.cross_entropy(scores.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def saved_peak() -> int:
        """What is kept of the blocks up to the one that runs again, and what that one keeps besides."""
        state, before, peak = x, 0, 0
        for block in blocks:
            left_out = [*net.parameters(), state]
            with settings.autocast(), saved_for_backward(left_out) as saved, _Results(kept, saved) as results:
                result = cast(Tensor, block(state))
            before += state.nbytes + sum(tensor.nbytes for tensor in results.found)
            peak = max(peak, before + saved.peak)
            state = result.detach().requires_grad_()
            del result
        return peak

    return Variant(step, _bodies(blocks), [optimizer], saved_peak=saved_peak)


class _Results(TorchDispatchMode):
    """The results of some operations, which the counter leaves out."""

    def __init__(self, operations: Sequence[Any], saved: Saved) -> None:
        super().__init__()
        self._operations = operations
        self._saved = saved
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        if func in self._operations:
            tensors = [value.detach() for value in tree_leaves(result) if isinstance(value, Tensor)]
            self.found += tensors
            self._saved.leave_out(tensors)
        return result


def local(settings: Settings, granularity: Granularity, reach: float = 1, recompute: bool = False) -> Variant:
    """Scalable Forward-Forward: backward and step of each block, or window, at once; an optimizer for each block."""
    if recompute and settings.precision != "32":
        raise ValueError(
            f"precision={settings.precision!r}: what blocks keep that run again is counted in float32 alone"
        )
    with warnings.catch_warnings():
        # it would be another variant
        warnings.filterwarnings("error", message="(reach|recompute)=", category=UserWarning)
        try:
            net = _local_net(settings, granularity, reach, recompute)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    variant = _local_steps(settings, net, [settings.batch_of_noise()] * len(net.windows.placements))
    if recompute:  # the hooks see nothing of it
        variant.saved_peak = lambda: settings.batch * cast(Kept, net.windows.kept).most(net.windows.run(net.trained))
    return variant


def _local_steps(settings: Settings, net: LocalNet, batches: Iterable[Any]) -> Variant:
    optimizers = [_optimizer(net.block_parameters(k)) for k in range(len(net.blocks))]

    def step() -> None:
        for x, y in batches:
            x, y = x.to(settings.device), y.to(settings.device)
            with settings.autocast():
                since = 0  # the border before
                for k, loss in enumerate(net.local_losses(x, y)):
                    if not loss.requires_grad:  # no border here: the next loss with a graph trains this block, too
                        continue
                    loss.backward()
                    for optimizer in optimizers[since : k + 1]:
                        optimizer.step()
                        optimizer.zero_grad()
                    since = k + 1

    return Variant(step, _bodies(net.blocks), optimizers, len(net.windows.placements))


def predict(settings: Settings, granularity: Granularity | None) -> Variant:
    """Scores of a batch: of the plain network, or the full vote of all blocks."""
    model = settings.model() if granularity is None else _local_net(settings, granularity)
    model = settings.place(model).eval()
    x, _ = settings.batch_of_noise()

    def step() -> None:
        with torch.inference_mode(), settings.autocast():
            model(x)

    return Variant(step, [model] if granularity is None else _bodies(cast(LocalNet, model).blocks))


def epoch(settings: Settings, with_trainer: bool) -> Variant:
    """An epoch, block-wise: through the Trainer with bar, logger, metrics and checkpoints, or by a bare loop."""
    data = TensorDataset(
        torch.randn(settings.epoch_batches * settings.batch, 3, settings.size, settings.size),
        torch.randint(settings.classes, (settings.epoch_batches * settings.batch,)),
    )
    loader: DataLoader[Any] = DataLoader(data, settings.batch, shuffle=True)
    return _epoch_of_trainer(settings, loader) if with_trainer else _local_steps(settings, _local_net(settings), loader)


def _epoch_of_trainer(settings: Settings, loader: "DataLoader[Any]") -> Variant:
    import lightning.pytorch as pl

    from ff_lightning.modules import SFF

    class Clock(pl.Callback):
        seconds = 0.0

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seconds = -time.perf_counter()

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seconds += time.perf_counter()

    clock = Clock()
    torch.manual_seed(0)
    shape, head = (3, settings.size, settings.size), cast(Any, settings.head)
    model = SFF(settings.backbone, settings.classes, shape, stem=settings.stem, head=head)

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = pl.Trainer(
                accelerator="cpu" if settings.device == "cpu" else "gpu",
                devices=1,
                precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
                max_epochs=1,
                callbacks=[clock],
                default_root_dir=folder,
            )
            trainer.fit(model, loader)

    return Variant(step, seconds=lambda: clock.seconds)


def _local_net(
    settings: Settings, granularity: Granularity = "block", reach: float = 1, recompute: bool = False
) -> LocalNet:
    shape = (3, settings.size, settings.size)
    model, classes, head = settings.model(), settings.classes, settings.head
    net = LocalNet(model, classes, granularity, head, reach=reach, recompute=recompute, input_shape=shape)
    return cast(LocalNet, settings.place(net))


def _bodies(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """What to compile of blocks: the forward of `Block` is one function for all, compiled for 8 of them at most."""
    return [cast(Block, block).body for block in blocks]


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def build(settings: Settings, name: str) -> Variant:
    """The variant of a name: for local ones ``"sff GRANULARITY reach 0.4 head deep recompute"``, or a part of it.

    Raises:
        ValueError: If there is no such variant, or a share of `reach` is less than what a block by itself keeps.
    """
    method, *words = name.split()
    again = method == "sff" and "recompute" in words
    granularity, *pairs = [word for word in words if not (again and word == "recompute")] or ["block"]
    cut: Granularity = int(granularity) if granularity.isdigit() else cast(Any, granularity)
    if len(pairs) % 2 or (words and method not in ("sff", "vote")) or not {*pairs[::2]} <= {"reach", "head"}:
        raise ValueError(f"variant={name!r}: behind 'sff GRANULARITY' there may be 'reach R', 'head NAME', 'recompute'")
    more = dict(zip(pairs[::2], pairs[1::2], strict=True))
    settings = replace(settings, head=more.get("head", settings.head))
    builders: dict[str, Callable[[], Variant]] = {
        "backprop": lambda: backprop(settings),
        "checkpointing": lambda: checkpointed(settings),
        "selective": lambda: checkpointed(settings, [*PRODUCTS, *ATTENTION]),
        "accumulation": lambda: backprop(settings, settings.micro_batches),
        "sff": lambda: local(settings, cut, float(more["reach"]) if "reach" in more else 1, again),
        "model": lambda: predict(settings, None),
        "vote": lambda: predict(settings, cut),
        "loop": lambda: epoch(settings, with_trainer=False),
        "trainer": lambda: epoch(settings, with_trainer=True),
    }
    return builders[method]()
