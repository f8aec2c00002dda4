"""One check after every cut: the blocks compute what the network computes, and each parameter learns."""

import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ff_lightning.partition.block import Block, State, main_output, parameters_behind
from ff_lightning.partition.features import Features
from ff_lightning.partition.trace import evaluating, first_line
from ff_lightning.partition.undivided import CannotDivideError
from ff_lightning.partition.untouched import Snapshot, same_random
from ff_lightning.util.torch_private import has_forward_hooks

_CHEAP = 20_000_000  # values that a network makes of one image, up to which it is also run in training: a ResNet50


def check(features: Features, blocks: Sequence[Block], snapshot: Snapshot) -> None:
    """Run the blocks and the network once each, and compare; on the meta device there is nothing to compare.

    Args:
        features: What was cut.
        blocks: The blocks.
        snapshot: Of the network before it was cut: whoever calls this puts it back.

    Raises:
        CannotDivideError: If the blocks compute something else than the network does, or if a parameter gets a
            gradient from the network, but not in its block.

    Warns:
        UserWarning: If the network itself gives parameters no gradient, if parameters take no part in the features, or
            if hooks or attributes of modules that are taken apart are not served by the blocks.
    """
    model = features.model
    if features.example.device.type == "meta":
        return
    inputs = _noise(features, len(features.example))
    _ = torch.rand(()), random.random(), np.random.random()  # other numbers than those that tracing has drawn
    snapshot.restore_state()
    with evaluating(model):
        with same_random(model):
            ours = _run(blocks, inputs)
        snapshot.restore_state()
        if not _computes(features, inputs, ours):
            raise CannotDivideError(
                f"the blocks compute something else than {_name(model)} does: {_why(features, blocks)}; move that into "
                "a smaller module"
            )
    changed = snapshot.changed()
    unmoved = _state_after_training(features, blocks, snapshot)
    _check_gradients(features, blocks, inputs)
    _warn_of_unserved(features, blocks, changed, unmoved)


def _noise(features: Features, count: int) -> tuple[Tensor, ...]:
    """Images of noise (token ids as they are), the same at each call, without a touch to the global generators."""
    main, size = features.example, len(features.example)
    rows = torch.arange(count, device=main.device) % size
    inputs = [value[rows] if value.shape[:1] == (size,) else value for value in features.examples]
    if main.is_floating_point():
        noise = torch.randn((count, *main.shape[1:]), generator=torch.Generator().manual_seed(0))
        inputs[0] = noise.to(main)
    return tuple(inputs)


def _copies(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.clone() for value in inputs)


def _run(blocks: Sequence[Block], inputs: Sequence[Tensor]) -> Tensor:
    state: State = _copies(inputs) if len(inputs) > 1 else inputs[0].clone()
    with _Watch(None):  # as the network runs: torch chooses other kernels for some layers where something watches
        for block in blocks:
            state = block(state)
    return main_output(state)


class _Watch(TorchFunctionMode):
    """Looks whether a tensor with the very values of another one is computed."""

    def __init__(self, wanted: Tensor | None) -> None:
        super().__init__()
        self.wanted = wanted
        self.found = False

    def look(self, values: Any) -> None:
        """Look at values, also inside lists, tuples and dicts."""
        fx.node.map_aggregate(values, self._look_at)

    def _look_at(self, value: Any) -> Any:
        if self.wanted is not None and not self.found:
            self.found = _equal(value, self.wanted)
        return value

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.look((args, result))
        return result


def _equal(value: Any, wanted: Tensor) -> bool:
    """Whether two tensors are equal bit by bit; on accelerators, whose sums may vary, up to rounding."""
    if type(value) not in (Tensor, nn.Parameter) or value.shape != wanted.shape:  # not one that a compiler looks at
        return False
    if (value.dtype, value.device) != (wanted.dtype, wanted.device):
        return False
    tolerance = {"rtol": 0.0, "atol": 0.0} if wanted.device.type == "cpu" else {}
    return torch.equal(value, wanted) or torch.allclose(value, wanted, equal_nan=True, **tolerance)


def _computes(features: Features, inputs: Sequence[Tensor], wanted: Tensor) -> bool:
    watch = _Watch(wanted)
    with watch:
        result = features.called.call(features.model, _copies(inputs))
    watch.look(result)
    return watch.found


def _state_after_training(features: Features, blocks: Sequence[Block], snapshot: Snapshot) -> list[str]:
    """Run and compare in training too, where that is cheap; names of the buffers that the blocks do not move alike."""
    model = features.model
    if sum(math.prod(op.shape or ()) for op in features.ops) > _CHEAP * len(features.example):
        return []
    inputs = _noise(features, max(2, len(features.example)))  # a batch norm needs more than one
    model.train()
    ours: Tensor | None = None
    problem: Exception | None = None
    with torch.no_grad():
        snapshot.restore_state()
        with same_random(model):
            try:
                ours = _run(blocks, inputs)
            except Exception as error:
                problem = error
        moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
        snapshot.restore_state()
        with same_random(model):
            try:
                alike = ours is not None and _computes(features, inputs, ours)
                if ours is None:
                    features.called.call(model, inputs)
            except Exception:  # the classifier may ask for more than this: the network cannot be compared
                return []
    if not alike:
        why = first_line(problem) if problem is not None else _why(features, blocks)
        raise CannotDivideError(
            f"the blocks compute something else in training than {_name(model)} does: {why}; move that into a smaller "
            "module"
        )
    parts = _held(blocks) | {model.get_submodule(name) for name in _divided(features, blocks)}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in moved}
    now = dict(model.named_buffers())
    return [name for name, value in moved.items() if owners[name] in parts and not torch.equal(value, now[name])]


def _check_gradients(features: Features, blocks: Sequence[Block], inputs: Sequence[Tensor]) -> None:
    model = features.model
    unreached = {name: block.body.get_parameter(name) for block in blocks for name in block.without_gradient}
    if unreached:
        model.eval()
        with torch.enable_grad():
            outputs: list[Any] = []
            fx.node.map_aggregate(features.called.call(model, _copies(inputs)), outputs.append)
        reached = [parameters_behind(output) for output in outputs if isinstance(output, Tensor)]
        lost = [name for name, p in unreached.items() if any(found is None or p in found for found in reached)]
        if lost:
            raise CannotDivideError(
                f"the loss of its own unit does not reach {_listed(lost)}, though {_name(model)} trains it: freeze it"
            )
        warnings.warn(
            f"{_name(model)} gives {_listed(list(unreached))} no gradient (unused, torch.no_grad, detach), and "
            "neither do its blocks",
            stacklevel=6,
        )
    known = {parameter for block in blocks for parameter in block.parameters()}
    known |= {state for op in features.left_out for state in op.state if isinstance(state, nn.Parameter)}
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if unused:
        warnings.warn(
            f"{_listed(unused)} of {_name(model)} take no part in its features and are not trained", stacklevel=6
        )


def _warn_of_unserved(
    features: Features, blocks: Sequence[Block], changed: dict[str, list[str]], unmoved: Sequence[str]
) -> None:
    divided = _divided(features, blocks)
    hooked = [name for name in divided if has_forward_hooks(features.model.get_submodule(name))]
    if hooked:
        warnings.warn(
            f"borders run through {_listed(hooked)}: the blocks do not run the forward hooks of that module",
            stacklevel=6,
        )
    attributes = [f"{name}.{key}".removeprefix(".") for name in divided for key in changed.get(name, ())]
    if attributes or unmoved:
        warnings.warn(
            f"borders run through modules of {_name(features.model)} whose forward sets "
            f"{_listed([*attributes, *unmoved])}: the blocks do not",
            stacklevel=6,
        )


def _held(blocks: Sequence[Block]) -> set[nn.Module]:
    return {module for block in blocks for module in block.modules()}


def _divided(features: Features, blocks: Sequence[Block]) -> list[str]:
    """Names of the modules that the blocks do not call, but only what is in them; the network itself is the first."""
    held = _held(blocks)
    names = dict.fromkeys(["", *(name for op in features.ops for name in op.path)])
    return [name for name in names if features.model.get_submodule(name) not in held]


def _why(features: Features, blocks: Sequence[Block]) -> str:
    hooked = [name for name in _divided(features, blocks) if has_forward_hooks(features.model.get_submodule(name))]
    if hooked:
        return f"borders run through {_listed(hooked)}, so that its forward hooks do not run"
    return "a border runs through Python code whose effect is not seen in its operations"


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name or "the network itself") for name in names]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "")


def _name(model: nn.Module) -> str:
    return type(model).__name__
