"""The largest batch that a training step of a variant takes in some memory, by trying."""

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ff_lightning.benchmark.measure import answer, in_words, start
from ff_lightning.benchmark.report import label, title
from ff_lightning.benchmark.variants import Settings, build

GIB = 2**30


def largest_batch(settings: Settings, name: str, gib: float) -> int:
    """The largest batch of which two steps fit, up to a sixteenth; 0: not a single image does.

    Args:
        settings: What variants share; the search begins with its batch.
        name: See `variants.build`.
        gib: Memory in GiB, beyond that of the process with all its libraries: for the network, its gradients and the
            optimizer's state, the batch, and what the steps keep.

    Raises:
        RuntimeError: If not even a step without a limit can be taken.
    """
    fits, too_large = 0, None
    batch = settings.batch
    while too_large is None or too_large - fits > max(fits // 16, 1):
        if _fits(replace(settings, batch=batch), name, gib):
            fits = batch
        else:
            too_large = batch
        batch = 2 * fits if too_large is None else (fits + too_large) // 2
    return fits


def print_batches(settings: Settings, names: Sequence[str], gib: float, console: Console) -> None:
    """Find the largest batch of each variant, and print them; ratios are to the first."""
    found: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name in track(names, "trying batches", console=Console(stderr=True), transient=True):
        try:
            found[name] = largest_batch(settings, name, gib)
        except RuntimeError as error:
            skipped[name] = str(error)
    heading = title(settings).replace(f"batch {settings.batch}", f"{gib:g} GiB")
    table = Table("", "largest batch", "x", title=heading, title_justify="left")
    base = found.get(names[0], 0)
    for name, batch in found.items():
        table.add_row(label(name, settings), f"{batch}", f"{batch / base:.2f}" if base else "")
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"{name}: skipped, {reason}", markup=False)


def _fits(settings: Settings, name: str, gib: float) -> bool:
    """Whether two steps fit: the first one makes the optimizer's state."""
    pipe, process = start(_try, settings, name, gib)
    if refused := answer(pipe, name):
        raise RuntimeError(refused)
    process.join()
    return process.exitcode == 0


def _try(pipe: Connection, settings: Settings, name: str, gib: float) -> None:
    """What the process of a trial does: a step without a limit, then with it; it ends with an error if memory ends."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        build(replace(settings, batch=2 * settings.micro_batches), name).step()  # threads and libraries are there
        _limit(settings.device, int(gib * GIB))
    except Exception as error:
        pipe.send(in_words(error))
        return
    pipe.send("")
    variant = build(settings, name)
    variant.step()
    variant.step()


def _limit(device: str, size: int) -> None:
    """From here on the process may take so many bytes more."""
    if device != "cpu":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0), torch.device(device).index or 0)
        return
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + size, used + size))
