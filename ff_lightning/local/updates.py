"""Updates: all that the training loop knows of a method, and how a loop with a single loss gets them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ff_lightning.util.torch_private import without_tensor_hooks


class Update(NamedTuple):
    """A local loss and the units that learn from it."""

    units: tuple[int, ...]
    """Numbers of the units that the gradient of `loss` reaches; they step next."""
    loss: Tensor
    """Scalar with a graph."""
    values: tuple[Tensor, ...]
    """The loss of each of these units, detached, for reports."""


class Delivered(NamedTuple):
    """What `deliver` gives."""

    losses: Tensor
    """(N,): the loss of each unit in the order of the updates; the backward of their sum delivers the gradients."""
    units: tuple[int, ...]
    """The unit of each of the losses."""
    without_gradient: set[nn.Parameter]
    """The parameters of all units for which no update has a gradient."""


def deliver(
    updates: Iterable[Update], parameters: Sequence[Sequence[nn.Parameter]], scaler: torch.amp.GradScaler | None = None
) -> Delivered:
    """Compute the gradients of all updates, one update after the other, for a loop that calls backward once.

    The graph of only one update is alive at a time; its gradients are kept. ``backward()`` of any scalar made of the
    losses hands them to the parameters, each times the gradient that arrives at the loss of its unit. The losses of one
    update need the same weight (checked on the CPU only, where it costs nothing): their gradients are one sum.

    Args:
        updates: Those of a batch. An update without a graph only adds its loss.
        parameters: The trainable parameters of each unit.
        scaler: The gradient scaler of a loop in float16. The gradients are then computed at its scale, too, so that
            they do not underflow.

    Raises:
        ValueError: If there is no update. In backward, if the losses of an update have different weights.
    """
    every: list[nn.Parameter] = []  # DistributedDataParallel waits for each of them
    place: dict[int, int] = {}  # by identity, which costs less than to hash a tensor
    of_units: list[list[int]] = []
    for own in parameters:
        for parameter in own:
            if place.setdefault(id(parameter), len(every)) == len(every):
                every.append(parameter)
        of_units.append(list(dict.fromkeys(place[id(parameter)] for parameter in own)))
    gradients: list[tuple[int, list[int], list[Tensor]]] = []  # number of the loss, of the parameters, their gradients
    together: list[slice] = []  # the losses of each update
    values: list[Tensor] = []
    units: list[int] = []
    scale: Tensor | None = None
    for update in updates:
        if scaler is not None and scale is None:
            scale = scaler.scale(torch.ones((), device=update.loss.device))
        wanted = list(dict.fromkeys(number for unit in update.units for number in of_units[unit]))
        if update.loss.requires_grad and wanted:
            learning = [every[number] for number in wanted]
            with without_tensor_hooks(learning):  # they run when the gradients are handed over
                loss = update.loss if scale is None else update.loss * scale
                found = torch.autograd.grad(loss, learning, allow_unused=True)
            gradient_of = {n: gradient for n, gradient in zip(wanted, found, strict=True) if gradient is not None}
            for at in reversed(range(len(update.units))):
                of_unit = [number for number in of_units[update.units[at]] if number in gradient_of]
                got = [gradient_of.pop(number) for number in of_unit]  # a shared parameter is handed over once
                gradients.append((len(values) + at, of_unit, got))
            together.append(slice(len(values), len(values) + len(update.values)))
        units += update.units
        values += update.values
    if not values:
        raise ValueError("a batch without any update: local_updates must yield one or more")
    reached = {number for _, numbers, _ in gradients for number in numbers}
    without_gradient = {parameter for number, parameter in enumerate(every) if number not in reached}
    losses = torch.stack(values)
    if torch.is_grad_enabled():
        losses = _Deliver.apply(losses, scale, gradients, together, *every)
    return Delivered(losses, tuple(units), without_gradient)


class _Deliver(torch.autograd.Function):
    """A vector whose backward hands out gradients that were computed before, times the gradient that arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        scale: Tensor | None,
        gradients: list[tuple[int, list[int], list[Tensor]]],
        together: list[slice],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.gradients, ctx.together, ctx.count = scale, gradients, together, len(parameters)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the local gradients of this loss were already delivered: compute the loss again")
        if arriving.device.type == "cpu":
            for update in ctx.together:
                if len(set(weights := arriving[update].tolist())) > 1:
                    raise ValueError(
                        f"losses {update.start} to {update.stop - 1} have the weights {weights}: those of one window "
                        "of blocks (reach above 1) need the same weight"
                    )
        factors = (arriving if ctx.scale is None else arriving / ctx.scale).unbind()
        totals: list[Tensor | None] = [None] * ctx.count
        while gradients:
            number, places, computed = gradients.pop(0)
            # not in place: two parameters may have been given the same tensor, or one that repeats its values
            scaled = torch._foreach_mul(computed, factors[number]) if computed else ()
            for at, gradient in zip(places, scaled, strict=True):
                before = totals[at]
                totals[at] = gradient if before is None else before + gradient
        return None, None, None, None, *totals
