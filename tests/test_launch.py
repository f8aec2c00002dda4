"""The command on several processes, started as a cluster starts it."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests import ddp_worker

pytestmark = [pytest.mark.ddp, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
COMMAND = [
    "-m", "ff_lightning", "fit", "--config", str(ROOT / "configs/sff/digits_cnn.yaml"),
    "--config", str(ROOT / "configs/trainer/ddp.yaml"),  # what follows makes it fit two cores without a GPU
    "--trainer.sync_batchnorm", "false", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
    "--trainer.devices", "2", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2",
    "--trainer.limit_train_batches", "4", "--last.every_n_train_steps", "1",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(folder, *more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launch, *COMMAND, "--trainer.default_root_dir", str(folder), *more], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def slurm(folder, rank, port, *more):
    """One of the two tasks that srun would start."""
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    arguments = [*COMMAND, "--trainer.default_root_dir", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, *arguments], env={**ENVIRONMENT, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def the_checkpoint(folder):
    (path,) = folder.rglob("last.ckpt")
    return torch.load(path, weights_only=True)


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_checkpoint(folder):
    wait_for(lambda: list(folder.rglob("last.ckpt")))


def test_a_process_that_dies_ends_the_others_and_another_launcher_goes_on_until_it_is_stopped(tmp_path):
    port = free_port()
    tasks = [slurm(tmp_path, rank, port, "--trainer.max_epochs", "1000") for rank in (0, 1)]
    wait_for_checkpoint(tmp_path)
    tasks[1].kill()
    output = tasks[0].communicate(timeout=60)[0]
    assert tasks[0].returncode not in (0, None)
    assert "Error" in output
    step = the_checkpoint(tmp_path)["global_step"]
    assert step > 0

    path = next(tmp_path.rglob("last.ckpt"))
    resumed = torchrun(tmp_path / "resumed", "--trainer.max_epochs", "1000", "--ckpt_path", str(path))
    wait_for_checkpoint(tmp_path / "resumed")
    os.kill(resumed.pid, signal.SIGTERM)  # torchrun hands it to the processes
    output = resumed.communicate(timeout=60)[0]
    assert resumed.returncode not in (0, None)
    assert "2 processes" in output, "gloo says how many there are"
    assert "stopped; go on with ckpt_path=" in output
    assert the_checkpoint(tmp_path / "resumed")["global_step"] > step


def test_slurm_requeues_once_after_the_same_batch_of_all_tasks(tmp_path, monkeypatch):
    asked = tmp_path / "asked.txt"
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    port, folder = free_port(), tmp_path / "run"
    tasks = [slurm(folder, rank, port, "--trainer.max_epochs", "1000") for rank in (0, 1)]
    wait_for_checkpoint(folder)
    tasks[1].send_signal(signal.SIGUSR1)  # to the one that does not write
    wait_for(lambda: asked.exists())
    for _ in range(2):  # the second interrupt stops the tasks in the middle of a batch, or the first was in time
        for task in tasks:
            task.send_signal(signal.SIGINT)
        time.sleep(0.05)
    outputs = [task.communicate(timeout=100)[0] for task in tasks]
    assert all(task.returncode not in (0, None) for task in tasks), outputs[0][-3000:]
    assert asked.read_text() == "requeue 7\n"
    step = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    assert the_checkpoint(folder)["global_step"] >= step > 0
    port = free_port()
    more = ("--trainer.max_epochs", "1000", "--trainer.max_steps", str(step + 3))
    tasks = [slurm(folder, rank, port, *more) for rank in (0, 1)]  # as the job that was queued again
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs[0][-3000:]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in outputs[1]
    steps = [torch.load(path, weights_only=True)["global_step"] for path in folder.rglob("last.ckpt")]
    assert step + 3 in steps, "it went on from the checkpoint of the job"


@pytest.fixture(scope="module")
def fresh():
    """A process of its own: torch does not fork one whose autograd has started threads, as another test may have."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("manual", "ddp_spawn"),
        ("automatic", "ddp_spawn"),
        ("manual", "ddp_fork"),
        ("automatic", "ddp_fork"),
        ("manual", {"gradient_as_bucket_view": True}),
        ("manual", {"find_unused_parameters": True}),
        ("automatic", {"gradient_as_bucket_view": True}),
        ("automatic", {"find_unused_parameters": True}),
        ("automatic", {"static_graph": True}),
    ],
    ids=str,
)
def test_other_ways_to_start_processes_and_settings_of_ddp(name, strategy, fresh):
    alone, together = fresh.submit(alone_and_together, name, strategy).result()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, atol=1e-6, rtol=1e-4, msg=key)


def alone_and_together(name, strategy):
    """The weights after a fit in one process with the joined batch, and in two processes."""
    torch.set_num_threads(1)
    if isinstance(strategy, dict):
        strategy = DDPStrategy(start_method="fork", **strategy)
    alone, together = ddp_worker.make(name), ddp_worker.make(name)
    loader = DataLoader(ddp_worker.images(), batch_size=2 * ddp_worker.BATCH)
    ddp_worker.trainer(devices=1).fit(alone, loader)
    ddp_worker.trainer(devices=2, strategy=strategy).fit(together, ddp_worker.SplitData())
    return alone.state_dict(), together.state_dict()
