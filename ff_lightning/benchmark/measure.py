"""Time in alternation, memory and operations by counting; each variant in a process of its own."""

import multiprocessing
import os
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ff_lightning.benchmark.variants import Settings, Variant, build
from ff_lightning.util.memory import Saved, saved_for_backward
from ff_lightning.util.torch_private import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Bytes of all tensors made since it was entered and alive, after each operation: exact, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.history: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note the storages that it made."""
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before | self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        self.history.append(self.now)
        return result

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Course(TorchDispatchMode):
    """What a step keeps for backward, after each of its operations, and how many floating-point operations it does.

    They are counted as `torch.utils.flop_counter.FlopCounterMode` does, which cannot be used here: it hangs a hook on
    every module, and a stem that is watched keeps what an ordinary one keeps.
    """

    def __init__(self, saved: Saved) -> None:
        super().__init__()
        self._saved = saved
        self.operations = 0
        self.points: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; note how many floating-point operations are done by now, and the bytes kept."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        point = self.operations, self._saved.now
        if not self.points or self.points[-1][1] != point[1]:
            self.points.append(point)
        return result


@dataclass
class Result:
    """What was measured of a variant."""

    name: str
    seconds: list[float]  # of a step, the mean of each turn
    compile_seconds: float = 0.0  # of the first step, in which it is compiled
    operations: int = 0  # floating-point operations of a step, the mean over the places of windows; see `Course`
    saved_peak: int = 0  # bytes kept for backward, at most
    tensor_peak: int = 0  # bytes of all tensors of a step alive, at most
    device_peak: int = 0  # bytes of the process, or of the device, that the steps added
    gradients: int = 0  # bytes of gradients alive at once
    optimizer: int = 0  # bytes of its state
    course: tuple[tuple[int, int], ...] = ()  # operations done and bytes kept for backward, through a step
    skipped: str = ""  # why it could not be run

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in parts of the median."""
        if len(self.seconds) < 3:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def ratio_of_times(result: Result, base: Result) -> float:
    """Median of the ratios of one turn each, so that what slows the machine for a while slows both sides of a ratio."""
    return statistics.median(ours / theirs for ours, theirs in zip(result.seconds, base.seconds, strict=True))


def measure(settings: Settings, names: list[str], compiled: bool, repetitions: int, steps: int) -> list[Result]:
    """Measure variants: all are started, each in its own process, then take turns A B A B.

    A turn begins with a step that is not counted: after the turns of the others, caches and threads are cold, as they
    are only once in a training run.

    Args:
        settings: What they share.
        names: See `variants.build`.
        compiled: Whether each is measured with `torch.compile` as well.
        repetitions: Turns of each; 0: nothing is timed, only counted.
        steps: Steps of a turn that are counted.
    """
    workers = []
    console = Console(stderr=True)
    variants = [(name, False) for name in names] + [(name, True) for name in names if compiled]
    for name, compile_it in track(variants, "building and counting", console=console, transient=True):
        ours, process = start(_work, settings, name, compile_it, steps)
        result = answer(ours, name)  # one after the other: none is disturbed while it counts
        workers.append((ours, process, result))
    running = [worker for worker in workers if not worker[2].skipped]
    for turn in track(range(repetitions + 1 if repetitions else 0), "taking turns", console=console, transient=True):
        for ours, _, result in running:
            ours.send("turn")
            seconds = answer(ours, result.name)
            if turn:  # the first warms up
                result.seconds.append(seconds)
    for ours, process, result in running:
        ours.send("end")
        result.device_peak = answer(ours, result.name)
        process.join()
    return [result for _, _, result in workers]


def start(work: Callable[..., None], *args: Any) -> tuple[Connection, BaseProcess]:
    """Start a fresh process that does some work; its first argument is the other end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # or nobody notices where the process dies
    return ours, process


def answer(pipe: Connection, name: str) -> Any:
    """What the process of a variant sends.

    Raises:
        RuntimeError: If it has ended instead.
    """
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name!r} has ended: it may have run out of memory") from None


def _work(pipe: Connection, settings: Settings, name: str, compile_it: bool, steps: int) -> None:
    """What the process of a variant does: build, count, then a turn whenever it is told to."""
    label = f"{name} compiled" if compile_it else name
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  progress bars and warnings of many processes
    try:
        variant = build(settings, name)
        result = Result(label, [])
        before = _memory(settings)
        if variant.optimizers and not compile_it:
            _count(variant, result)
        if compile_it and name == "selective":
            raise ValueError("compiled code may write over the results that are kept")
        for module in variant.modules if compile_it else ():
            module.compile()
        start = time.perf_counter()
        variant.step()
        if compile_it:
            result.compile_seconds = time.perf_counter() - start
    except Exception as error:
        pipe.send(Result(label, [], skipped=in_words(error)))
        return
    pipe.send(result)
    while pipe.recv() == "turn":
        _seconds_of_step(variant, settings)
        pipe.send(statistics.mean(_seconds_of_step(variant, settings) for _ in range(steps)))
    pipe.send(_peak(settings) - before)


def in_words(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    reason = str(error).strip().splitlines()
    return f"{type(error).__name__}: {reason[0] if reason else ''}"


def _seconds_of_step(variant: Variant, settings: Settings) -> float:
    start = time.perf_counter()
    variant.step()
    if settings.device != "cpu":
        torch.cuda.synchronize()
    return variant.seconds() if variant.seconds else (time.perf_counter() - start) / variant.passes


def _count(variant: Variant, result: Result) -> None:
    """Everything that can be counted exactly; the first step makes the optimizers' state."""
    variant.step()
    with saved_for_backward(variant.parameters) as saved, Course(saved) as course:
        variant.step()
    with Alive() as alive:
        variant.step()
    result.operations = course.operations // variant.passes
    result.saved_peak = saved.peak
    if variant.saved_peak:  # what it runs again in backward is hidden from the hooks
        result.saved_peak = variant.saved_peak()
    elif variant.passes == 1:
        result.course = (*course.points, (course.operations, saved.now))
    result.tensor_peak = max(alive.history)
    result.gradients = _most_gradients(variant)
    states = [value for o in variant.optimizers for of_one in o.state.values() for value in of_one.values()]
    result.optimizer = sum(value.nbytes for value in states if isinstance(value, Tensor))


def _most_gradients(variant: Variant) -> int:
    """Bytes of the gradients of a step that are alive at once, at most."""
    parameters, found = variant.parameters, []

    def note(_: Tensor) -> None:
        found.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    handles = [cast(Any, p).register_post_accumulate_grad_hook(note) for p in parameters]
    variant.step()
    for handle in handles:
        handle.remove()
    return max(found)


def _memory(settings: Settings) -> int:
    """Bytes in use now."""
    if settings.device != "cpu":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak(settings: Settings) -> int:
    """Most bytes in use so far."""
    if settings.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
