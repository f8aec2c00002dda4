"""Networks that `torch.fx` cannot trace: cut at the outputs of their repeated layers, or of named modules.

The blocks do not run by themselves: they are visited while the network's own forward runs, see `hooks.run_hooked`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ff_lightning.partition.block import Block, State, parameters_behind, take_modes
from ff_lightning.partition.classifier import NAMES
from ff_lightning.partition.cuts import balanced_ends
from ff_lightning.partition.hooks import Visit, run_hooked, tensors_in
from ff_lightning.partition.probe import Probe, probe_named, probe_repeated
from ff_lightning.partition.untouched import untouched
from ff_lightning.util.arguments import check_granularity, is_whole


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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is compiled.

        Warns:
            UserWarning: In any case.
        """
        warnings.warn(
            "compile: only the heads are compiled, not the blocks, which run as parts of their network's own forward",
            stacklevel=2,
        )


class Hooked:
    """A network and the modules at whose outputs it is cut.

    Args:
        model: The network.
        granularity: ``"block"``: a unit for each of the repeated layers, such as those of a transformer; ``"stage"``: a
            new unit where their resolution changes; a number: that many units of repeated layers, with about the same
            memory for backward; a list of module names: each ends a unit.
        call: Calls the network with an example, one sample is enough.

    Attributes:
        blocks: The units in order. The first includes all that runs before it; what runs behind the last one is left
            out. A weight that several units use belongs to the first of them, and is a constant for the others.
        borders: The name of the module that ends each of them.

    Raises:
        ValueError: If the granularity does not fit the network, or if the example does not pass through it.

    Warns:
        UserWarning: If parameters, other than those of a classifier, are left out, get no gradient, or are used by
            several units.
    """

    def __init__(self, model: nn.Module, granularity: Any, call: Callable[[], Any]) -> None:
        check_granularity(granularity)
        self.model = model
        with torch.inference_mode(False), untouched(model):
            model.eval()
            if isinstance(granularity, str) or is_whole(granularity):
                probe = probe_repeated(model, call)
                ends = _ends(probe, granularity, type(model).__name__)
            else:
                probe = probe_named(model, granularity, call)
                ends = list(range(len(granularity)))
            self.borders = [probe.names[end] for end in ends]
            self._links: list[tuple[nn.Module, str, nn.Module]] = []  # a module, its tensor, where a block holds it
            units = probe.joined(ends)
            self.blocks = self._build(units)
            self._check_gradients(call)
        take_modes(self.blocks, model)
        held = {module for block in self.blocks for module in block.modules()}
        self._others = [module for module in model.modules() if module not in held]
        self._warn(units)

    def run(self, call: Callable[[], Any], visit: Visit, count: int | None = None, **kwargs: Any) -> None:
        """Run the network up to the end of block number `count`, counted from 1, or of the last one.

        See `run_hooked` for the other arguments.
        """
        for module in self._others:
            module.training = self.blocks[0].training
        for module, name, holder in self._links:
            if getattr(module, name) is not getattr(holder, name):  # the blocks were moved to another device
                setattr(module, name, getattr(holder, name))
        run_hooked(self.model, self.borders[:count], call, visit, **kwargs)

    def _build(self, units: Probe) -> list[HookedBlock]:
        """The blocks, over the modules of the network itself."""
        owner = {leaf: k for k, reached in reversed([*enumerate(units.reached)]) for leaf in reached}
        stored = self.model.state_dict().keys()

        def fill(body: nn.Module, module: nn.Module, path: str, k: int) -> None:
            began, _ = units.spans.get(module, (None, None))
            for name, child in module.named_children():
                if units.spans.get(child) == (k, k) and all(owner.get(p, k) == k for p in child.parameters()):
                    body.add_module(name, child)
                    continue
                part = nn.Module()
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
            block = HookedBlock(name, cast(fx.GraphModule, body), units.channel_dims[k])
            block.map_shape = tuple(block.to_map(torch.empty(units.shapes[k], device="meta")).shape[1:])
            block.saved_bytes = units.bytes[k]
            own = [(name, p) for name, p in body.named_parameters() if p.requires_grad]
            block.without_gradient = tuple(name for name, p in own if p not in owner)
            blocks.append(block)
        return blocks

    def _check_gradients(self, call: Callable[[], Any]) -> None:
        """Raise ValueError if the whole network trains a weight that no block does."""
        unreached = {block.body.get_parameter(name): name for block in self.blocks for name in block.without_gradient}
        if not unreached:
            return
        outputs: list[Tensor] = []
        try:
            with torch.enable_grad():
                outputs += tensors_in(call())
        except Exception:  # what runs behind the blocks may fail
            return
        reached = {leaf for output in outputs for leaf in parameters_behind(output) or ()}
        lost = [name for parameter, name in unreached.items() if parameter in reached]
        if lost:
            raise ValueError(
                f"the loss of its own unit does not reach {_listed(lost)}, though {type(self.model).__name__} trains "
                "it: cut at the outputs of other modules, by their names"
            )

    def _warn(self, units: Probe) -> None:
        title = type(self.model).__name__
        names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        held = {parameter for block in self.blocks for parameter in block.parameters()}
        left_out = [
            name for parameter, name in names.items() if parameter not in held and not self._of_classifier(name)
        ]
        users = Counter(leaf for reached in units.reached for leaf in reached)
        shared = [name for parameter, name in names.items() if users[parameter] > 1]
        unreached = [name for block in self.blocks for name in block.without_gradient]
        for found, what in (
            (left_out, "run behind the last block, if at all: they are left out and not trained"),
            (shared, "are used by several blocks: they are trained by the loss of the first of them alone"),
            (unreached, "get no gradient from the output of their block"),
        ):
            if found:
                warnings.warn(f"{_listed(found)} of {title} {what}", stacklevel=5)

    def _of_classifier(self, name: str) -> bool:
        top = name.partition(".")[0]
        return top in NAMES or isinstance(getattr(self.model, top), nn.Linear)


def _ends(probe: Probe, granularity: str | int, title: str) -> list[int]:
    """The repeated layers that end a unit."""
    last = len(probe.names) - 1
    if granularity == "layer":
        raise ValueError(
            f"granularity='layer': no border can be inside of the layers of {title}: give 'block' (a unit for each of "
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


def _listed(names: Collection[str]) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:5]) + (f" and {len(quoted) - 5} more" if len(quoted) > 5 else "")
