"""What a network is called with: one tensor, several in order, or several by the names of its arguments.

Shapes: B batch, T positions, such as tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.util.arguments import shown
from ff_lightning.util.suggest import closest

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a network can be called with: ``model(x)``, ``model(*x)`` or ``model(**x)``."""

MASKS = {"attention_mask": True, "mask": True, "key_padding_mask": False, "src_key_padding_mask": False}
"""Names of a padding mask (B, T), and whether it is true (or 1) at the positions that count, or at the others."""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Inputs:
    """How the inputs that a user gives become the arguments of a network: tensors in order, the main one first.

    The main input goes from block to block; the others are handed along to the blocks that need them. Inputs by name
    have the order of the arguments of `forward`, with masks last.

    Attributes:
        names: Of the arguments.
        by_name: Whether the network is called with them by name.
        shape: Of a sample of the main input.
        tokens: Whether the main input holds token ids: whole numbers, (B, T).
        vocabulary: Number of different ids; None: not known.
        longest: Most ids of a sample; None: not known.
        mask: Name of the padding mask (B, T), if there is one: ``attention_mask`` or ``mask``, true or 1 at the
            positions that count, or PyTorch's ``key_padding_mask``, true at the others.
        mask_dtype: What the network is given it as.
        mask_dim: The dimension of the main input that the mask's positions lie in.
    """

    names: tuple[str, ...]
    by_name: bool
    shape: tuple[int, ...]
    tokens: bool
    vocabulary: int | None = None
    longest: int | None = None
    mask: str | None = None
    mask_dtype: torch.dtype = torch.bool
    mask_dim: int = 1

    @classmethod
    def of(
        cls, model: nn.Module, example: Example, vocabulary: int | None = None, longest: int | None = None
    ) -> "Inputs":
        """Read off an example what a network takes.

        Raises:
            ValueError: If the example does not fit the arguments of `forward`, or its mask does not fit its tokens.
        """
        given = _arguments(model, example)
        name, main = next(iter(given.items()))
        if not main.ndim or not len(main):
            raise ValueError(f"example: {name} of shape {tuple(main.shape)}: must be a batch of one or more")
        mask = next((other for other in given if other in MASKS and other != name and given[other].ndim == 2), None)
        tokens = main.ndim == 2 and not main.is_floating_point()
        by_name, shape = isinstance(example, Mapping), tuple(main.shape[1:])
        inputs = cls(tuple(given), by_name, shape, tokens, vocabulary, longest, mask)
        if mask is None:
            return inputs
        dims = [d for d in range(1, main.ndim) if (len(main), main.shape[d]) == given[mask].shape]
        if not dims:
            raise ValueError(f"example: {_misfit(mask, given[mask], name, main.shape[:2])}")
        return replace(inputs, mask_dtype=given[mask].dtype, mask_dim=dims[0])

    def values(self, inputs: Example) -> tuple[Tensor, ...]:
        """The tensors in order, checked; a padding mask that is not given masks nothing.

        A dict may use other names, such as those of `ff_lightning.data.Text`: its padding mask becomes the mask, and if
        one other input is left on both sides, it is the main one.

        Raises:
            ValueError: If one is missing, not known, or has another shape or dtype than it should have. Ids outside of
                the vocabulary are looked for on the CPU only, where that needs no wait for a device.
        """
        given = self._renamed(_named(inputs, self.names))
        main = given.get(self.names[0])
        if self.mask and self.mask not in given and isinstance(main, Tensor) and main.ndim > self.mask_dim:
            count = (len(main), main.shape[self.mask_dim])
            given[self.mask] = torch.full(count, MASKS[self.mask], dtype=self.mask_dtype, device=main.device)
        if given.keys() != set(self.names) or not all(isinstance(value, Tensor) for value in given.values()):
            found = {name: tuple(v.shape) if isinstance(v, Tensor) else shown(v) for name, v in given.items()}
            raise ValueError(f"inputs {found}: the network was built for tensors {list(self.names)}")
        self._check_main(given[self.names[0]])
        if self.mask:
            given[self.mask] = self._as_mask(given[self.mask], given[self.names[0]])
        return tuple(given[name] for name in self.names)

    def _renamed(self, given: dict[str, Any]) -> dict[str, Any]:
        """What was given, under the names of the network."""
        others = [name for name in given if name not in self.names]
        mask = next((name for name in others if name in MASKS and self.mask), None)
        if self.mask and mask is not None and self.mask not in given and isinstance(given[mask], Tensor):
            given[self.mask] = given.pop(mask) != 0
            if MASKS[mask] != MASKS[self.mask]:
                given[self.mask] = ~given[self.mask]
            others.remove(mask)
        if len(others) == 1 and self.names[0] not in given and others[0] not in MASKS:
            given[self.names[0]] = given.pop(others[0])
        return given

    def covers(self, map_shape: Sequence[int]) -> bool:
        """Whether the mask has a place for each position of features of a shape (C, T)."""
        return self.mask is not None and tuple(map_shape[1:]) == (self.shape[self.mask_dim - 1],)

    def valid(self, values: Sequence[Tensor]) -> Tensor | None:
        """True at the positions (B, T) that are no padding, of what `values` returned; None without a mask."""
        if self.mask is None:
            return None
        mask = values[self.names.index(self.mask)] != 0
        return mask if MASKS[self.mask] else ~mask

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call the network, or its forward, with what `values` returned."""
        return function(**dict(zip(self.names, values, strict=True))) if self.by_name else function(*values)

    def _check_main(self, main: Tensor) -> None:
        name, shape = self.names[0], tuple(main.shape[1:])
        if self.tokens:
            if main.ndim != 2 or main.is_floating_point() or main.dtype == torch.bool:
                raise ValueError(f"{name} of shape {tuple(main.shape)} and {main.dtype}: must be ids (B, T), int64")
            if self.longest is not None and main.shape[1] > self.longest:
                raise ValueError(f"{name} of shape {tuple(main.shape)}: must be of {self.longest} ids or fewer")
            if self.vocabulary is None or torch.compiler.is_compiling():
                return
            if main.device.type == "cpu" and main.numel():
                lowest, highest = int(main.min()), int(main.max())
                if lowest < 0 or highest >= self.vocabulary:
                    wrong, most = lowest if lowest < 0 else highest, self.vocabulary - 1
                    raise ValueError(f"{name} holds {wrong}: vocabulary={self.vocabulary} allows 0 to {most}")
            return
        fixed = [d for d in range(len(self.shape)) if d != self.mask_dim - 1] if self.mask else [0]
        if len(shape) != len(self.shape) or any(shape[d] != self.shape[d] for d in fixed):
            what = "images" if len(self.shape) == 3 else "samples"
            raise ValueError(f"{what} of shape {shape}: the network was built for {self.shape}")

    def _as_mask(self, mask: Tensor, main: Tensor) -> Tensor:
        positions = (len(main), main.shape[self.mask_dim])
        if tuple(mask.shape) != positions:
            raise ValueError(_misfit(self.mask, mask, self.names[0], positions))
        if mask.is_floating_point() and mask.dtype != self.mask_dtype:
            raise ValueError(f"{self.mask} of {mask.dtype}: must be bool or whole numbers, 0 and 1")
        return mask.to(self.mask_dtype)


def make_example(model: nn.Module, shape: Sequence[int], vocabulary: int | None = None) -> Example:
    """An example of one sample: zeros, or ids of a vocabulary with a padding mask where `forward` takes one."""
    like = next(model.parameters(), torch.zeros(0))
    first_layer = next((m for m in model.modules() if any(True for _ in m.parameters(recurse=False))), None)
    if vocabulary is None and isinstance(first_layer, nn.Embedding) and len(shape) == 1:
        raise ValueError("vocabulary=None: the network begins with an embedding: give the number of token ids")
    if vocabulary is None:
        return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
    ids = torch.arange(shape[0], device=like.device)[None] % vocabulary
    first, *others = signature(model.forward).parameters
    mask = next((name for name in others if name in MASKS), None)
    if mask is None:
        return ids
    counts = torch.full(ids.shape, MASKS[mask], device=like.device)
    if shape[0] > 1:
        counts[:, -1] = not MASKS[mask]
    return {first: ids, mask: counts}


def _named(inputs: Any, names: Sequence[str]) -> dict[str, Any]:
    """What was given, by name; a tuple of one is that one."""
    if isinstance(inputs, tuple | list) and len(inputs) == 1:
        inputs = inputs[0]
    if isinstance(inputs, Mapping):
        return dict(inputs)
    in_order = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
    more = [f"input {number}" for number in range(len(names), len(in_order))]
    return dict(zip([*names, *more], in_order, strict=False))


def _arguments(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """An example by the names of the arguments of `forward`, in their order, masks last."""
    parameters = signature(model.forward).parameters
    in_order = [name for name, parameter in parameters.items() if parameter.kind in _POSITIONAL]
    given = _named(example, in_order)
    if not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(
            f"example={shown(example)}: must be an input batch: a tensor, a tuple of tensors, or a dict of tensors by "
            "the names of the arguments of forward"
        )
    kinds = {parameter.kind for parameter in parameters.values()}
    if isinstance(example, Mapping):
        unknown = [] if Parameter.VAR_KEYWORD in kinds else [name for name in given if name not in parameters]
        order = [*parameters, *given]
        given = {name: given[name] for name in sorted(given, key=lambda name: (name in MASKS, order.index(name)))}
    else:
        unknown = [] if Parameter.VAR_POSITIONAL in kinds else [*given][len(in_order) :]
    title = f"{type(model).__name__}.forward"
    if unknown:
        raise ValueError(f"example: {title} takes {[*parameters]}, not {unknown[0]}{closest(unknown[0], parameters)}")
    single = (*_POSITIONAL, Parameter.KEYWORD_ONLY)
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind in single]
    if any(name not in given for name in needed):
        raise ValueError(
            f"{title} takes several inputs {needed}: give an `example` of all of them, as a tuple or a dict"
        )
    return given


def _misfit(name: str | None, mask: Tensor, main: str, positions: Sequence[int]) -> str:
    return f"{name} of shape {tuple(mask.shape)}: must be {tuple(positions)}, one for each position of {main}"
