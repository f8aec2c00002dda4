"""Two processes with stock `strategy="ddp"` against one process with the joined batch."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from ff_lightning import SFF
from ff_lightning.callbacks import OnlineProbe
from ff_lightning.heads import PooledHead
from ff_lightning.training import checks
from tests import ddp_worker, methods
from tests.conftest import small_net

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the two processes found, one file for each scenario and process."""
    where = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.ddp_worker", str(where)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return where


def ranks(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def alone(name):
    """The same scenario in one process, with the batches of both joined."""
    model = ddp_worker.make(name)
    loader = DataLoader(ddp_worker.images(), batch_size=2 * ddp_worker.BATCH)
    run = ddp_worker.trainer(devices=1)
    run.fit(model, loader, loader)
    return model, run


@pytest.mark.parametrize("name", ddp_worker.SCENARIOS)
def test_processes_are_bit_identical(folder, name):
    one, two = ranks(folder, name)
    for key, value in one["weights"].items():
        assert torch.equal(value, two["weights"][key]), key


NOT_JOINED = {"norm"} | {name for name in methods.METHODS if methods.CASES[name].joined is None}


@pytest.mark.parametrize("name", [name for name in ddp_worker.SCENARIOS if name not in NOT_JOINED])
def test_two_processes_equal_one_with_the_joined_batch(folder, name):
    model, run = alone(name)
    together = ranks(folder, name)[0]
    assert together["steps"] == run.global_step
    for key, value in model.state_dict().items():
        torch.testing.assert_close(together["weights"][key], value, atol=1e-6, rtol=1e-4, msg=key)
    for key in ("train/loss", "val/acc", "val/loss", f"val/{model.unit_key(0)}_acc"):
        torch.testing.assert_close(together["logged"][key], run.callback_metrics[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["unused", "unused_automatic"])
def test_weight_decay_leaves_idle_parameters_alone(folder, name):
    assert torch.equal(ranks(folder, name)[0]["weights"]["net.blocks.3.body.4.idle"], torch.ones(3, 3))


def test_each_step_sends_the_gradients_of_one_model(folder):
    model = ddp_worker.make("manual")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    counts = 4 * len(list(model.parameters()))  # which of them have a gradient
    for name, steps in (("manual", 16), ("accumulate", 8)):
        result = ranks(folder, name)[0]
        assert result["steps"] == steps
        metrics = result["sent"] - steps * (size + counts)
        assert 0 <= metrics < 0.02 * result["sent"], "what is left are the metrics"


def test_every_test_sample_counts_once(folder):
    one, two = ranks(folder, "test")
    assert one["samples"] + two["samples"] == 360
    assert one["acc"] == two["acc"]
    assert float(one["acc"]) * 360 == pytest.approx(round(float(one["acc"]) * 360), abs=1e-3)


def test_a_probe_is_that_of_one_process_with_the_joined_batch(folder):
    probe, model = OnlineProbe(num_classes=10), ddp_worker.make("manual")
    run = ddp_worker.trainer(devices=1, callbacks=[probe])
    loader = DataLoader(ddp_worker.images(), batch_size=2 * ddp_worker.BATCH)
    run.fit(model, loader, loader)
    one, two = ranks(folder, "probe")
    for key, value in {**probe.probe.state_dict(), "acc": run.callback_metrics["val/probe_acc"]}.items():
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], value, atol=1e-5, rtol=1e-3, msg=key)


def test_loss_in_a_users_own_module(folder):
    model = ddp_worker.Own()
    run = ddp_worker.trainer(devices=1, **ddp_worker.OWN)
    run.fit(model, DataLoader(ddp_worker.images(), batch_size=2 * ddp_worker.BATCH))
    one, two = ranks(folder, "own")
    for key, value in model.state_dict().items():
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], value, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_interrupted_in_the_middle_of_an_accumulation(folder, optimization):
    for whole, resumed in ranks(folder, f"interrupted_{optimization}"):
        for key, value in whole.items():  # partial sums were averaged once before: a rounding more
            torch.testing.assert_close(resumed[key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_synchronised_batch_norms_take_the_place_of_the_others():
    head = partial(PooledHead, width=4)  # a head with a norm of its own
    net = SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), head=head).net.eval()
    x = torch.randn(4, 1, 8, 8)
    goodness = net.goodness(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    found = [module for module in synchronised.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(found) == 5
    assert all(isinstance(module, nn.SyncBatchNorm) for module in found)
    assert torch.equal(synchronised.goodness(x), goodness)
    found[0].running_mean += 1
    assert not torch.equal(synchronised.goodness(x), goodness), "the new ones are those that run"


def test_strategies_that_spread_parameters_are_refused():
    with pytest.raises(MisconfigurationException, match="FSDPStrategy does not see the gradients of local losses"):
        checks.check_strategy(FSDPStrategy())
