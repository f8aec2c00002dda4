"""What only a GPU can show: `python -m pytest -m gpu`. Skipped where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ff_lightning import SFF, LocalNet, data
from ff_lightning.backbones import build_backbone
from ff_lightning.benchmark.__main__ import main as benchmark
from ff_lightning.benchmark.fits import _fits
from ff_lightning.benchmark.variants import Settings
from ff_lightning.callbacks import LastCheckpoint
from tests import methods
from tests.conftest import make_trainer_in, small_net
from tests.ddp_worker import BATCH, images

DEVICE, ACCELERATOR = "cuda", "gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch.cuda.is_available() is false"),
]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Float32 that is float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def fit(folder, model, module=None, accelerator=ACCELERATOR, **settings):
    """A trained model on the CPU, and its Trainer."""
    settings = {"limit_train_batches": 8, "max_epochs": 1, **settings}
    trainer = make_trainer_in(folder)(accelerator=accelerator, **settings)
    trainer.fit(model, module or data.Digits(batch_size=32))
    return model.cpu(), trainer


def assert_same_weights(one, other, atol=0.0):
    other = other.state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, other[key], atol=atol, rtol=10 * atol, msg=key)


def resnet(**arguments):
    torch.manual_seed(0)
    return LocalNet(build_backbone("resnet18", 10, (3, 64, 64)), 10, input_shape=(3, 64, 64), **arguments).to(DEVICE)


def noise(images=16, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, size, size, generator=generator).to(DEVICE), (torch.arange(images) % 10).to(DEVICE)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_step_of_every_method_is_that_of_the_cpu(name, tmp_path):
    trained = {}
    for accelerator in ("cpu", ACCELERATOR):
        pl.seed_everything(0, verbose=False)
        model = methods.make(name, joined=True, optimizer={"class_path": "torch.optim.SGD"}, lr=0.01)
        trained[accelerator], trainer = fit(tmp_path, model, accelerator=accelerator, limit_train_batches=1)
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
    if methods.CASES[name].joined is not None:  # the others draw their negatives or noise on the device
        assert_same_weights(trained["cpu"], trained[ACCELERATOR], atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"reach": 0.95, "own_loss": 0.3}, {"head": "lookahead"}])
def test_manual_and_automatic_optimization_give_the_same_weights(arguments, tmp_path):
    both = []
    for optimization in ("manual", "automatic"):
        pl.seed_everything(0, verbose=False)
        model = SFF("cnn", **methods.SHAPE, optimization=optimization, **arguments)
        both.append(fit(tmp_path, model, deterministic=True)[0])
    assert_same_weights(*both, atol=1e-6)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_digits_are_learned_in_every_precision(precision, optimization, tmp_path):
    model = SFF("cnn", 10, (1, 8, 8), optimization=optimization)
    module = data.Digits(batch_size=32)
    _, trainer = fit(tmp_path, model, module, precision=precision, max_epochs=3, limit_train_batches=1.0)
    (figures,) = trainer.test(model, module, verbose=False)
    assert figures["test/acc"] > 0.9
    if precision == "16-mixed":
        assert trainer.precision_plugin.scaler.get_scale() > 1


@pytest.mark.parametrize("backbone", ["cnn", "resnet18"])
def test_deterministic_runs_are_bit_equal(backbone, tmp_path):
    both = []
    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        images = TensorDataset(torch.randn(64, 3, 48, 48), torch.arange(64) % 10)  # 6 x 6 is no multiple of 4 regions
        model = SFF(backbone, 10, (3, 48, 48))
        both.append(fit(tmp_path, model, DataLoader(images, 16), deterministic=True, limit_val_batches=0)[0])
    assert_same_weights(*both)


def test_a_resumed_run_is_bit_equal_to_one_that_was_not_cut_off(tmp_path):
    def run(epochs, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer_in(tmp_path)(
            accelerator=ACCELERATOR, max_epochs=epochs, limit_train_batches=4, deterministic=True,
            callbacks=[LastCheckpoint(str(tmp_path / "keep"))], enable_checkpointing=True,
        )  # fmt: skip
        model = SFF("cnn", 10, (1, 8, 8), lr_scheduler="constant")
        trainer.fit(model, data.Digits(batch_size=16), ckpt_path=ckpt_path)
        return model

    whole = run(3)
    run(2)
    assert_same_weights(whole, run(3, tmp_path / "keep/last.ckpt"))


def test_compiled_blocks_give_the_losses_of_eager_ones():
    x, y = noise()
    eager, compiled = resnet(), resnet()
    compiled.compile_blocks()
    for one, other in zip(eager.local_losses(x, y), compiled.local_losses(x, y), strict=True):
        one.backward()
        other.backward()
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-2 * p.grad.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_losses_and_gradients_are_those_of_the_cpu(memory_format):
    x, y = noise()
    ours = resnet().to(memory_format=memory_format)
    theirs = resnet().cpu().double()
    for one, other in zip(
        ours.local_losses(x.to(memory_format=memory_format), y),
        theirs.local_losses(x.cpu().double(), y.cpu()),
        strict=True,
    ):
        one.backward()
        other.backward()
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad.cpu().double() - q.grad).norm() <= 1e-2 * q.grad.norm()


def test_a_step_block_by_block_takes_less_memory_than_backpropagation():
    x, y = noise(64, 128)
    peaks = {}
    for reach in (1, 1.0):  # a window over all blocks is backpropagation with deep supervision
        net = resnet(reach=reach)
        net.loss(x, y).backward()  # libraries have taken theirs
        net.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        net.loss(x, y).backward()
        peaks[type(reach)] = torch.cuda.max_memory_allocated() - before
        del net
    assert peaks[int] < 0.5 * peaks[float]


SCRIPT = """
import sys
import lightning.pytorch as pl, torch
from ff_lightning import SFF
from tests.ddp_worker import SplitData
from tests.conftest import small_net
class Norms(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):  # behind the run they are ordinary ones again
        self.found = [m for m in pl_module.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        assert torch.distributed.get_backend() == "nccl"
norms = Norms()
pl.seed_everything(0, verbose=False)
model = SFF(small_net(), 10, (1, 8, 8), lr=0.01, optimizer={"class_path": "torch.optim.SGD"})
trainer = pl.Trainer(max_epochs=1, accelerator="gpu", devices=int(sys.argv[2]), strategy="ddp", sync_batchnorm=True,
                     callbacks=[norms],
                     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, SplitData())
assert norms.found
if trainer.is_global_zero:
    torch.save(model.cpu().state_dict(), sys.argv[1])
"""


def test_processes_over_nccl_with_synchronised_norms_train_as_one(tmp_path):
    count = min(torch.cuda.device_count(), 2)  # a process by itself takes the road of several, and averages nothing
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "weights.pt"), str(count)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(tmp_path / "weights.pt")
    pl.seed_everything(0, verbose=False)
    model = SFF(small_net(), 10, (1, 8, 8), lr=0.01, optimizer={"class_path": "torch.optim.SGD"})
    trained, _ = fit(tmp_path, model, DataLoader(images(), BATCH * count), limit_train_batches=1.0, limit_val_batches=0)
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(together[key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_the_benchmark_measures_the_memory_of_the_device(capsys):
    arguments = ["--backbone", "cnn", "--stem", "standard", "--batch", "64", "--repetitions", "1", "--steps", "1"]
    benchmark([*arguments, "--granularity", "block", "--device", DEVICE, "--precision", "bf16", "--channels-last"])
    shown = capsys.readouterr().out
    assert "memory MB" in shown
    assert "skipped" not in shown


def test_a_step_fits_into_a_part_of_the_device_and_not_into_next_to_nothing():
    settings = Settings("cnn", "standard", 10, 64, 32, "pooled", 2, 2, DEVICE, "32", False)
    assert _fits(settings, "sff block", 1.0)
    assert not _fits(settings, "sff block", 1e-3)
