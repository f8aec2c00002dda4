"""The largest batch that a training step of a variant takes in some memory, by trying."""

import multiprocessing
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

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
    progress = Console(stderr=True)
    found = {
        name: largest_batch(settings, name, gib)
        for name in track(names, "trying batches", console=progress, transient=True)
    }
    heading = title(settings).replace(f"batch {settings.batch}", f"{gib:g} GiB")
    table = Table("", "largest batch", "x", title=heading, title_justify="left")
    base = found[names[0]]
    for name, batch in found.items():
        table.add_row(label(name, settings), f"{batch}", f"{batch / base:.2f}" if base else "")
    console.print(table)


def _fits(settings: Settings, name: str, gib: float) -> bool:
    """Whether two steps fit: the first one makes the optimizer's state."""
    if settings.batch < 1:
        return False
    process = multiprocessing.get_context("spawn").Process(target=_try, args=(settings, name, gib), daemon=True)
    process.start()
    process.join()
    return process.exitcode == 0


def _try(settings: Settings, name: str, gib: float) -> None:
    """What the process of a trial does; it ends with an error where memory runs out."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if settings.device == "cpu":
        build(replace(settings, batch=2), name).step()  # threads and libraries are there
        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
        limit = used + int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    else:
        _, total = torch.cuda.mem_get_info(settings.device)
        torch.cuda.set_per_process_memory_fraction(min(gib * GIB / total, 1.0), settings.device)
    variant = build(settings, name)
    variant.step()
    variant.step()
