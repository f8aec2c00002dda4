"""Networks that `torch.fx` cannot trace: cut at the outputs of their repeated layers, or of named modules.

The blocks do not run by themselves: they are visited while the network's own forward runs, see `hooks.run_hooked`.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.partition.block import Block, State, parameters_behind
from ff_lightning.partition.classifier import NAMES
from ff_lightning.partition.cuts import balanced_ends
from ff_lightning.partition.hooks import Visit, run_hooked
from ff_lightning.partition.trace import evaluating, first_line
from ff_lightning.partition.untouched import untouched
from ff_lightning.util.arguments import check_granularity, is_whole, shown
from ff_lightning.util.memory import saved_for_backward
from ff_lightning.util.suggest import unknown


class HookedBlock(Block):
    """One unit of local training that runs only as a part of its network's own forward.

    `body` holds what runs since the border before it: modules as they are where all of them is its own, and single
    weights and buffers of others, under their names in the network.
    """

    def forward(self, state: State) -> State:
        """Not to be called.

        Raises:
            RuntimeError: In any case.
        """
        raise RuntimeError(f"block {self.name!r} runs only as a part of its network: run that with LocalNet")


class Hooked:
    """A network and the modules at whose outputs it is cut.

    Args:
        model: The network.
        granularity: ``"block"``: a unit for each of the repeated layers, such as those of a transformer; ``"stage"``: a
            new unit where their resolution changes; a number: so many units of repeated layers that keep about equally
            much for backward; a list of module names: each ends a unit.
        call: Calls the network with an example, one sample is enough.

    Attributes:
        blocks: The units in order. What runs before the end of the first belongs to it, what runs behind the last one
            is left out. A weight that several units use belongs to the first of them, and is a constant to the others.
        borders: The name of the module that ends each of them.

    Raises:
        ValueError: If the granularity does not fit the network, or if the example does not pass through it.

    Warns:
        If parameters, other than those of a classifier, are left out, get no gradient, or are used by several units.
    """

    def __init__(self, model: nn.Module, granularity: Any, call: Callable[[], Any]) -> None:
        check_granularity(granularity)
        self.model = model
        with torch.inference_mode(False), untouched(model):
            model.eval()
            if isinstance(granularity, str) or is_whole(granularity):
                probe = _probe_repeated(model, call)
                ends = _ends(probe, granularity, type(model).__name__)
            else:
                probe = _probe_named(model, granularity, call)
                ends = list(range(len(granularity)))
        self.borders = [probe.names[end] for end in ends]
        self._links: list[tuple[nn.Module, str, nn.Module]] = []  # a module, its tensor, and where a block holds it
        units = probe.joined(ends)
        self.blocks = self._build(units)
        held = {module for block in self.blocks for module in block.modules()}
        self._others = [module for module in model.modules() if module not in held]
        self._warn(units)

    def run(self, call: Callable[[], Any], visit: Visit, **kwargs: Any) -> None:
        """Run the network up to the end of the last block; see `run_hooked`."""
        for module in self._others:
            module.training = self.blocks[0].training
        for module, name, holder in self._links:
            if getattr(module, name) is not getattr(holder, name):  # the blocks were moved to another device
                setattr(module, name, getattr(holder, name))
        run_hooked(self.model, self.borders, call, visit, **kwargs)

    def _build(self, units: "_Probe") -> list[HookedBlock]:
        """The blocks, over the modules of the network itself."""
        owner = {leaf: k for k, reached in reversed([*enumerate(units.reached)]) for leaf in reached}
        stored = self.model.state_dict().keys()

        def fill(body: nn.Module, module: nn.Module, path: str, k: int) -> None:
            began, _ = units.spans.get(module, (None, None))
            for name, child in module.named_children():
                if units.spans.get(child) == (k, k) and all(owner.get(p, k) == k for p in child.parameters()):
                    body.add_module(name, child)
                    continue
                part = nn.Module().train(child.training)
                fill(part, child, f"{path}{name}.", k)
                if any(True for _ in (*part.children(), *part.parameters(), *part.buffers())):
                    body.add_module(name, part)
            tensors = [
                *((name, p) for name, p in module.named_parameters(recurse=False) if owner.get(p, began) == k),
                *((name, b) for name, b in module.named_buffers(recurse=False) if began == k),
            ]
            for name, tensor in tensors:
                if isinstance(tensor, nn.Parameter):
                    body.register_parameter(name, tensor)
                else:
                    body.register_buffer(name, tensor, persistent=path + name in stored)
                self._links.append((module, name, body))

        blocks = []
        for k, name in enumerate(units.names):
            body = nn.Module()
            fill(body, self.model, "", k)
            block = HookedBlock(name, body, units.channel_dims[k])
            block.training = body.training = self.model.training
            block.map_shape = tuple(block.to_map(torch.empty(units.shapes[k], device="meta")).shape[1:])
            block.saved_bytes = units.bytes[k]
            own = [(name, p) for name, p in body.named_parameters() if p.requires_grad]
            block.idle = tuple(name for name, p in own if p not in owner)
            blocks.append(block)
        return blocks

    def _warn(self, units: "_Probe") -> None:
        title = type(self.model).__name__
        names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        held = {parameter for block in self.blocks for parameter in block.parameters()}
        left_out = [
            name for parameter, name in names.items() if parameter not in held and not self._of_classifier(name)
        ]
        users = Counter(leaf for reached in units.reached for leaf in reached)
        shared = [name for parameter, name in names.items() if users[parameter] > 1]
        idle = [name for block in self.blocks for name in block.idle]
        for found, what in (
            (left_out, "run behind the last block, if at all: they are left out and not trained"),
            (shared, "are used by several blocks: they are trained by the loss of the first of them alone"),
            (idle, "get no gradient from the output of their block"),
        ):
            if found:
                warnings.warn(f"{_listed(found)} of {title} {what}", stacklevel=4)

    def _of_classifier(self, name: str) -> bool:
        top = name.partition(".")[0]
        return top in NAMES or isinstance(getattr(self.model, top), nn.Linear)


@dataclass
class _Probe:
    """What a pass of the example shows of each module at which it was stopped."""

    names: list[str]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    channel_dims: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    """Kept for the backward of one sample since the module before."""
    reached: list[set[Tensor]] = field(default_factory=list)
    """Leaves of the graph behind its output."""
    broken: str | None = None
    """The first module whose output does not depend on that of the one before."""
    clean: bool = True
    """Whether no output depends on any but the one before by another way, such as a shortcut."""
    spans: dict[nn.Module, tuple[int, int | None]] = field(default_factory=dict)
    """Of all modules that ran: how many outputs came before they began, and before they ended, if they did."""

    def joined(self, ends: Sequence[int]) -> "_Probe":
        """The same of units that end with some of the modules."""
        runs = [range(before + 1, end + 1) for before, end in pairwise([-1, *ends])]
        unit = {place: k for k, run in enumerate(runs) for place in run}
        return _Probe(
            [self.names[end] for end in ends],
            [self.shapes[end] for end in ends],
            [self.channel_dims[end] for end in ends],
            [sum(self.bytes[i] for i in run) for run in runs],
            [set().union(*(self.reached[i] for i in run)) for run in runs],
            spans={m: (unit[a], None if b is None else unit[b]) for m, (a, b) in self.spans.items()},
        )


def _probe(model: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> _Probe:
    """Stop at the outputs of these modules, in eval mode, with a graph."""
    probe = _Probe(list(names))
    outputs: list[Tensor] = []  # with their graphs, so that what is saved is counted once
    leaves: list[Tensor] = []

    def visit(k: int, output: Tensor) -> Tensor:
        outputs.append(output)
        reached = parameters_behind(output) or set()
        if leaves and leaves[-1] not in reached and probe.broken is None:
            probe.broken = names[k]
        probe.clean &= reached.isdisjoint(leaves[:-1])
        leaves.append(output.detach().requires_grad_())
        probe.shapes.append(tuple(output.shape))
        probe.channel_dims.append(_channel_dim(model.get_submodule(names[k]), output))
        probe.bytes.append(saved.now // len(output) - sum(probe.bytes))
        probe.reached.append(reached)
        return leaves[-1].clone()  # it may be changed in place

    with torch.enable_grad(), saved_for_backward(left_out=model.parameters()) as saved, ExitStack() as hooks:
        for module in model.modules():

            def begin(module: nn.Module, args: Any) -> None:
                probe.spans.setdefault(module, (len(probe.shapes), None))

            def end(module: nn.Module, args: Any, output: Any) -> None:
                probe.spans[module] = (probe.spans[module][0], len(probe.shapes))

            hooks.callback(module.register_forward_pre_hook(begin).remove)
            hooks.callback(module.register_forward_hook(end).remove)
        run_hooked(model, names, call, visit)
    return probe


def _probe_named(model: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> _Probe:
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise ValueError(
                unknown("granularity", name, known, f"names of modules of the network, such as {known[:8]}")
            )
    if not names or len({*names}) < len(names):
        raise ValueError(f"granularity={shown(names)}: give one or more names of modules, each once")
    probe = _probe(model, names, call)
    if probe.broken:
        before = names[names.index(probe.broken) - 1]
        raise ValueError(f"granularity: the output of {probe.broken!r} does not depend on that of {before!r} before it")
    return probe


def _probe_repeated(model: nn.Module, call: Callable[[], Any]) -> _Probe:
    """The probe of the repeated layers; of those inside a residual connection only where there are no others."""
    probes = [probe for names in _families(model, call) if (probe := _probe(model, names, call)).broken is None]
    for probe in sorted(probes, key=lambda probe: not probe.clean):
        return probe
    raise ValueError(
        f"{type(model).__name__} has no repeated layers (a ModuleList or Sequential of one class, each of which runs "
        "once, one after the other): give the names of the modules at whose outputs to cut, such as "
        f"granularity={[name for name, module in model.named_modules() if name and [*module.children()]][:3]}"
    )


def _families(model: nn.Module, call: Callable[[], Any]) -> list[list[str]]:
    """The names of the layers of each class that is repeated, in the order in which they run; innermost first.

    A class counts if its layers hold half as many weights or more as those of the class that holds most: stages hold
    layers, but a layer may also hold, say, a list of small convolutions.
    """
    layers: dict[nn.Module, str] = {}
    for path, container in model.named_modules():
        children = list(container.children())
        if isinstance(container, nn.ModuleList | nn.Sequential) and len({*map(type, children)}) == 1:
            layers |= {m: f"{path}.{name}" for name, m in container.named_children() if any(True for _ in m.children())}
    ran: list[nn.Module] = []
    problem: Exception | None = None
    with ExitStack() as hooks, evaluating(model):
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda module, args, output: ran.append(module)).remove)
        try:
            call()
        except Exception as error:  # what runs behind the layers may fail: it does not run in training
            problem = error
    families: dict[type, list[nn.Module]] = defaultdict(list)
    for layer in ran:
        families[type(layer)].append(layer)
    if problem and not families:
        raise ValueError(
            f"the example does not pass through {type(model).__name__}: {first_line(problem)}"
        ) from problem
    once = [
        f for f in families.values() if {*f} == {m for m in layers if type(m) is type(f[0])} and len({*f}) == len(f) > 1
    ]
    weights = [sum(p.numel() for layer in family for p in layer.parameters()) for family in once]
    large = [f for f, count in zip(once, weights, strict=True) if 2 * count >= max(weights)]
    return sorted(([layers[m].removeprefix(".") for m in f] for f in large), key=lambda names: -names[0].count("."))


def _ends(probe: _Probe, granularity: str | int, title: str) -> list[int]:
    """The repeated layers that end a unit."""
    last = len(probe.names) - 1
    if granularity == "layer":
        raise ValueError(
            f"granularity='layer': torch.fx does not see into the layers of {title}: give 'block' (a unit for each of "
            "them), a number, or a list of module names"
        )
    if granularity == "block":
        return list(range(last + 1))
    if granularity == "stage":
        areas = [math.prod(shape) // shape[dim] for shape, dim in zip(probe.shapes, probe.channel_dims, strict=True)]
        changes = [k for k, (before, behind) in enumerate(pairwise(areas)) if before != behind]
        if not changes:
            raise ValueError(
                f"granularity='stage': the layers of {title} all work at one resolution: give 'block' or a number"
            )
        return [*changes, last]
    ends = balanced_ends(probe.bytes, int(granularity)) if 1 <= int(granularity) <= last + 1 else None
    if ends is None:
        raise ValueError(f"granularity={granularity}: {title} can be cut into 1 to {last + 1} units")
    return [end - 1 for end in ends]


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    """The dimension that counts channels: the last one of tokens (B, T, C), the second one of maps (B, C, H, W).

    Unless the biases and norm weights of the module only fit the other way round.
    """
    sizes = {len(p) for p in module.parameters() if p.ndim == 1}
    usual, other = (output.ndim - 1, 1) if output.ndim == 3 else (1, output.ndim - 1)
    return other if output.shape[usual] not in sizes and output.shape[other] in sizes else usual


def _listed(names: Collection[str]) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "")
