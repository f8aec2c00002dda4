"""What one pass of an example shows of the layers of a network: their order, their outputs and what they reach."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.partition.block import parameters_behind
from ff_lightning.partition.hooks import run_hooked
from ff_lightning.partition.trace import evaluating, first_line
from ff_lightning.util.arguments import shown
from ff_lightning.util.memory import saved_for_backward
from ff_lightning.util.suggest import unknown


@dataclass
class Probe:
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

    def joined(self, ends: Sequence[int]) -> "Probe":
        """The same of units that end with some of the modules."""
        runs = [range(before + 1, end + 1) for before, end in pairwise([-1, *ends])]
        unit = {place: k for k, run in enumerate(runs) for place in run}
        return Probe(
            [self.names[end] for end in ends],
            [self.shapes[end] for end in ends],
            [self.channel_dims[end] for end in ends],
            [sum(self.bytes[i] for i in run) for run in runs],
            [set().union(*(self.reached[i] for i in run)) for run in runs],
            spans={m: (unit[a], None if b is None else unit[b]) for m, (a, b) in self.spans.items()},
        )


def _probe(model: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> Probe:
    """Stop at the outputs of these modules, in eval mode, with a graph."""
    probe = Probe(list(names))
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


def probe_named(model: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> Probe:
    """The probe of modules of these names."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise ValueError(
                unknown("granularity", name, known, f"names of modules of the network, such as {known[:8]}")
            )
    if not names or len({*names}) < len(names):
        raise ValueError(f"granularity={shown(names)}: give one or more names of modules, each once")
    ran, _ = _runs(model, [model.get_submodule(name) for name in names], call)
    for name in names:
        if ran.count(model.get_submodule(name)) > 1:
            raise ValueError(f"granularity={shown(names)}: {name!r} runs {ran.count(model.get_submodule(name))} times")
    probe = _probe(model, names, call)
    if probe.broken:
        before = names[names.index(probe.broken) - 1]
        raise ValueError(f"granularity: the output of {probe.broken!r} does not depend on that of {before!r} before it")
    return probe


def probe_repeated(model: nn.Module, call: Callable[[], Any]) -> Probe:
    """The probe of the repeated layers; of those inside a residual connection only where there are no others."""
    probes = [probe for names in _families(model, call) if (probe := _probe(model, names, call)).broken is None]
    for probe in sorted(probes, key=lambda probe: not probe.clean):
        return probe
    raise ValueError(
        f"{type(model).__name__} has no repeated layers (a ModuleList or Sequential of one class, each of which runs "
        "once, one after the other): give the names of the modules at whose outputs to cut, such as "
        f"granularity={[name for name, module in model.named_modules() if name and [*module.children()]][:3]}"
    )


def hides_layers(model: nn.Module, closed: Collection[str]) -> str | None:
    """The one of the closed modules that holds all layers that are repeated in a network, two or more."""
    layers = _layers(model)
    counts = Counter(map(type, layers))
    repeated = [name for layer, name in layers.items() if counts[type(layer)] > 1]
    within = {c: f"{c}." if c else "" for c in closed}  # the network itself has no name
    return next((c for c in closed if repeated and all(name.startswith(within[c]) for name in repeated)), None)


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """The modules in a list or sequence of one class, but for those that hold no others, such as nn.Linear."""
    layers: dict[nn.Module, str] = {}
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len({*map(type, container)}) == 1:
            parts = [(f"{path}.{name}", layer) for name, layer in container.named_children()]
            layers |= {layer: name.removeprefix(".") for name, layer in parts if any(True for _ in layer.children())}
    return layers


def _runs(
    model: nn.Module, modules: Collection[nn.Module], call: Callable[[], Any]
) -> tuple[list[nn.Module], Exception | None]:
    """Those of the modules that ran, in the order in which they ended; and the error that ended the pass, if any.

    What runs behind the layers may fail: it does not run in training.
    """
    ran: list[nn.Module] = []
    with ExitStack() as hooks, evaluating(model):
        for module in modules:
            hooks.callback(module.register_forward_hook(lambda module, args, output: ran.append(module)).remove)
        try:
            call()
        except Exception as error:
            return ran, error
    return ran, None


def _families(model: nn.Module, call: Callable[[], Any]) -> list[list[str]]:
    """The names of the layers of each class that is repeated, in the order in which they run; innermost first.

    A class counts if its layers hold half as many weights or more as those of the class that holds most: stages hold
    layers, but a layer may also hold, say, a list of small convolutions.
    """
    layers = _layers(model)
    ran, problem = _runs(model, layers, call)
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
    return sorted(([layers[m] for m in f] for f in large), key=lambda names: -names[0].count("."))


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    """The dimension that counts channels: the last one of tokens (B, T, C), the second one of maps (B, C, H, W).

    Unless the biases and norm weights of the module only fit the other way round.
    """
    sizes = {len(p) for p in module.parameters() if p.ndim == 1}
    usual, other = (output.ndim - 1, 1) if output.ndim == 3 else (1, output.ndim - 1)
    return other if output.shape[usual] not in sizes and output.shape[other] in sizes else usual
