"""Norm, activation and max pooling that keep little, and are redone for a few channels at a time in backward.

Each of them acts on every channel by itself. A stem as that of ResNet keeps for their backward what the norm sees, what
the pooling sees, and its places, of 64 bits each. Here it is the first of them, and places of 16 bits where they fit.

Shapes: B batch, C channels, H x W positions.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ff_lightning.util.torch_private import has_hooks

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Identity)
_all_kept: ContextVar[bool] = ContextVar("all_kept", default=False)
_PARTS = 8
"""So many groups of channels are redone, one after the other: more of them keep less, and are slower."""


@contextmanager
def all_kept() -> Iterator[None]:
    """Keep what an ordinary network keeps, to count it."""
    token = _all_kept.set(True)
    try:
        yield
    finally:
        _all_kept.reset(token)


def join_channelwise(body: fx.GraphModule) -> None:
    """Let every chain of norm, activation and pooling in a graph run by `by_channels`; the modules stay where they are.

    A chain ends in a pooling, which is where something is to be gained: what is before it has the larger map, and no
    layer behind it needs that map.
    """
    graph = body.graph
    joined = False
    for last in list(graph.nodes):
        chain = _chain_to(last, body)
        if len(chain) < 2:  # a pooling alone keeps what the layer before it has made anyway
            continue
        with graph.inserting_before(last):
            modules = [graph.create_node("get_attr", str(node.target)) for node in chain]
            result = graph.call_function(by_channels, (chain[0].args[0], *modules))
        last.replace_all_uses_with(result)
        for node in reversed(chain):
            graph.erase_node(node)
        joined = True
    if joined:
        body.recompile()


def _chain_to(last: fx.Node, body: fx.GraphModule) -> list[fx.Node]:
    """The calls of modules that lead to a pooling, in order, none of whose results is used elsewhere."""
    if not _calls(last, body, (nn.MaxPool2d,)) or body.get_submodule(str(last.target)).return_indices:
        return []
    chain = [last]
    while True:
        before = chain[0].args[0]
        if not isinstance(before, fx.Node) or len(before.users) > 1 or _calls(chain[0], body, (nn.BatchNorm2d,)):
            return chain
        if not _calls(before, body, (*_ACTIVATIONS, nn.BatchNorm2d)):
            return chain
        chain.insert(0, before)


def _calls(node: fx.Node, body: fx.GraphModule, kinds: tuple[type[nn.Module], ...]) -> bool:
    called = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return called and type(body.get_submodule(str(node.target))) in kinds


def by_channels(x: Tensor, *modules: nn.Module) -> Tensor:
    """Run modules one after the other; of their values only the first input and the places are kept for backward.

    Args:
        x: (B, C, H, W), floating.
        modules: At most one batch norm, which comes first, then activations, and a max pooling.

    Returns:
        What the modules give, and in backward the same gradients.
    """
    norm = modules[0] if isinstance(modules[0], nn.BatchNorm2d) else None
    own = [] if norm is None else [norm.weight, norm.bias]
    learns = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, *own))
    # modules may have been replaced, or looked at, since the network was cut
    usual = all(type(module) in (nn.BatchNorm2d, *_ACTIVATIONS, nn.MaxPool2d) for module in modules)
    if not learns or not usual or _all_kept.get() or torch.compiler.is_compiling() or any(map(has_hooks, modules)):
        return _in_order(modules, x)
    result: Tensor = _ByChannels.apply(x, modules, *own)
    return result


def _in_order(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What the modules make of a value that they leave as it is."""
    for number, module in enumerate(modules):
        x = module(x) if number else _out_of_place(module)(x)
    return x


class _ByChannels(torch.autograd.Function):
    """See `by_channels`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, modules: Sequence[nn.Module], *own: Tensor | None) -> Tensor:
        *before, pooling = modules
        ctx.modules, ctx.pooling = before, _arguments(pooling)
        ctx.batch_statistics = bool(own) and (before[0].training or before[0].running_mean is None)
        mapped = _in_order(before, x)
        out, places = F.max_pool2d(mapped, *ctx.pooling, return_indices=True)
        small = torch.int16 if mapped[0, 0].numel() <= torch.iinfo(torch.int16).max else torch.int32
        ctx.save_for_backward(x, places.to(small), *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        x, places, *own = ctx.saved_tensors
        gradients = [None if value is None else torch.empty_like(value) for value in (x, *own)]
        size = -(-x.shape[1] // _PARTS)
        lines = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.contiguous_format if lines else torch.channels_last  # or sums are rounded in another order
        for part in (slice(start, start + size) for start in range(0, x.shape[1], size)):
            channels = x[:, part].contiguous(memory_format=layout).requires_grad_()
            weights = [None if value is None else value[part].detach().requires_grad_() for value in own]
            with torch.enable_grad():
                mapped = _redone(ctx, part, channels, *weights)
            of_map = torch.ops.aten.max_pool2d_with_indices_backward(
                arriving[:, part].contiguous(memory_format=layout),
                mapped.detach(),
                *_pairs(ctx.pooling),
                places[:, part].long(),
            )
            wanted = [value for value in (channels, *weights) if value is not None]
            found = iter(torch.autograd.grad(mapped, wanted, of_map))
            for k, whole in enumerate(gradients):
                if whole is not None:
                    (whole[:, part] if k == 0 else whole[part]).copy_(next(found))
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        gradients = [gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True)]
        return gradients[0], None, *gradients[1:]


def _arguments(pooling: Any) -> tuple[Any, ...]:
    return pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation, pooling.ceil_mode


def _pairs(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a pooling with two numbers for each of its sizes, as its backward takes them."""
    *sizes, ceil_mode = arguments
    return [*([size, size] if isinstance(size, int) else [*size] for size in sizes), ceil_mode]


def _redone(ctx: Any, part: slice, x: Tensor, *own: Tensor | None) -> Tensor:
    """What is pooled, for some of the channels; no running statistic moves."""
    modules = ctx.modules
    if own:
        weight, bias = own
        norm, *modules = modules
        running = [None if value is None else value[part].clone() for value in (norm.running_mean, norm.running_var)]
        x = F.batch_norm(x, running[0], running[1], weight, bias, ctx.batch_statistics, eps=norm.eps)
    return _in_order(modules, x)


def _out_of_place(module: nn.Module) -> nn.Module:
    """A module that leaves its input as it is."""
    if not getattr(module, "inplace", False):
        return module
    own: Any = copy.copy(module)
    own.inplace = False
    return cast(nn.Module, own)
