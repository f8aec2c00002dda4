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
from torch.nn import functional as F

from ff_lightning.util.torch_private import has_hooks, is_transformed

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Identity)
_all_kept: ContextVar[bool] = ContextVar("all_kept", default=False)
_redone_bytes: ContextVar[list[int] | None] = ContextVar("redone_bytes", default=None)
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


@contextmanager
def redone_bytes() -> Iterator[list[int]]:
    """Note what each chain keeps for a while in its backward: the values of one group of channels."""
    noted: list[int] = []
    token = _redone_bytes.set(noted)
    try:
        yield noted
    finally:
        _redone_bytes.reset(token)


def join_channelwise(body: fx.GraphModule) -> None:
    """Let every chain of norm, activation and pooling in a graph run by `by_channels`; the modules stay where they are.

    A chain ends in a pooling, which is where something is to be gained: what is before it has the larger map, and no
    layer behind it needs that map. Its input has no other use: a module that works in place would change it there.
    """
    graph = body.graph
    joined = False
    for last in list(graph.nodes):
        chain = _chain_to(last, body)
        if len(chain) < 2 or len(cast(fx.Node, chain[0].args[0]).users) > 1:  # a pooling alone keeps nothing new
            continue
        with graph.inserting_before(last):
            modules = [graph.create_node("get_attr", str(node.target)) for node in chain]
            result = graph.call_function(by_channels, (chain[0].args[0], *modules))
        result.meta["is_wrapped"] = True  # a call, too, where the block is traced again, as unpickling does
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
    own = (None, None) if norm is None else (norm.weight, norm.bias)
    learns = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, *own))
    if torch.compiler.is_compiling() or not learns or _all_kept.get() or is_transformed() or not _usual(x, modules):
        return _in_order(modules, x)
    result: Tensor = _ByChannels.apply(x, *own, modules)
    return result


def _usual(x: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Whether the modules are still what the graph was joined for: they may have been replaced, or are looked at."""
    first, *between = [type(module) for module in modules[:-1]]
    as_joined = first in (nn.BatchNorm2d, *_ACTIVATIONS) and all(kind in _ACTIVATIONS for kind in between)
    changed = any(has_hooks(module) or "forward" in vars(module) for module in modules)
    return x.ndim == 4 and as_joined and type(modules[-1]) is nn.MaxPool2d and not changed


def _in_order(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What the modules make of a value that they leave as it is."""
    result = x
    for module in modules:
        result = (_out_of_place(module) if result is x else module)(result)  # an identity passes x itself on
    return result


class _ByChannels(torch.autograd.Function):
    """See `by_channels`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, modules: Sequence[nn.Module]
    ) -> Tensor:
        *before, pooling = modules
        norm = before[0] if isinstance(before[0], nn.BatchNorm2d) else None
        ctx.norm, ctx.activations, ctx.pooling = norm, before if norm is None else before[1:], _arguments(pooling)
        ctx.frozen = norm is not None and not norm.training and norm.running_mean is not None
        statistics = _statistics(norm) if ctx.frozen else (None, None)
        mapped = _in_order(before, x)
        out, places = F.max_pool2d(mapped, *ctx.pooling, return_indices=True)
        small = torch.int16 if mapped.shape[2:].numel() <= torch.iinfo(torch.int16).max else torch.int32
        ctx.save_for_backward(x, weight, bias, *statistics, places.to(small))
        if (noted := _redone_bytes.get()) is not None:
            noted.append(len(before) * x[:, : _size(x)].nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        x, weight, bias, *statistics, places = ctx.saved_tensors
        if not ctx.frozen:
            statistics = _statistics(ctx.norm)
        values, needed = (x, weight, bias), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: the gradients get a graph of their own
            out = F.max_pool2d(_redone(ctx, *values, *statistics), *ctx.pooling)
            wanted = [value for value, needs in zip(values, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(out, wanted, arriving, create_graph=True))
            return *(next(found) if needs else None for needs in needed), None
        gradients = [torch.empty_like(value) if needs else None for value, needs in zip(values, needed, strict=True)]
        size = _size(x)
        lines = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.contiguous_format if lines else torch.channels_last  # or sums are rounded in another order
        for part in (slice(start, start + size) for start in range(0, x.shape[1], size)):
            channels = x[:, part].detach().contiguous(memory_format=layout).requires_grad_(needed[0])
            own = [None if value is None else value[part].detach() for value in (weight, bias, *statistics)]
            wanted = [channels, *own[:2]]
            wanted = [value.requires_grad_() for value, needs in zip(wanted, needed, strict=True) if needs]
            with torch.enable_grad():
                mapped = _redone(ctx, channels, *own)
            of_map = torch.ops.aten.max_pool2d_with_indices_backward(
                arriving[:, part].contiguous(memory_format=layout),
                mapped.detach(),
                *_pairs(ctx.pooling),
                places[:, part].long(),
            )
            found = iter(torch.autograd.grad(mapped, wanted, of_map))
            for k, whole in enumerate(gradients):
                if whole is not None:
                    (whole[:, part] if k == 0 else whole[part]).copy_(next(found))
            del channels, wanted, mapped, of_map, found  # or they are there beside those of the next group
        return *gradients, None


def _size(x: Tensor) -> int:
    """Channels of a group."""
    return -(-x.shape[1] // _PARTS)


def _arguments(pooling: Any) -> tuple[Any, ...]:
    return pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation, pooling.ceil_mode


def _pairs(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a pooling with two numbers for each of its sizes, as its backward takes them."""
    *sizes, ceil_mode = arguments
    return [*([size, size] if isinstance(size, int) else [*size] for size in sizes), ceil_mode]


def _statistics(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.running_mean, norm.running_var)


def _redone(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor | None) -> Tensor:
    """What is pooled, for some of the channels; no running statistic moves, but their types count."""
    if ctx.norm is not None:
        mean, variance = (None if value is None else value.clone() for value in statistics)
        x = F.batch_norm(x, mean, variance, weight, bias, training=not ctx.frozen, eps=ctx.norm.eps)
    return _in_order(ctx.activations, x)


def _out_of_place(module: nn.Module) -> nn.Module:
    """A module that leaves its input as it is."""
    if not getattr(module, "inplace", False):
        return module
    own: Any = copy.copy(module)
    own.inplace = False
    return cast(nn.Module, own)
