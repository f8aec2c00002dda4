"""Private names of torch and Lightning do what the package takes them for, and stand in two files alone."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

import ff_lightning
from ff_lightning import SFF
from ff_lightning.training import lightning_private
from ff_lightning.util import torch_private
from tests.conftest import small_net

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def test_hooks_of_tensors_come_back():
    p, calls = nn.Parameter(torch.ones(3)), []
    handle = p.register_hook(lambda gradient: calls.append(1))
    with torch_private.without_tensor_hooks([p]):
        torch.autograd.grad(p.sum(), p)
    assert calls == []
    p.sum().backward()
    assert calls == [1]
    handle.remove()
    p.sum().backward()
    assert calls == [1]


def test_compiled_modules_hooks_and_buffers_are_seen():
    layer = nn.BatchNorm2d(3)
    assert torch_private.original_of_compiled(torch.compile(layer)) is layer
    assert torch_private.original_of_compiled(layer) is None
    assert not torch_private.has_forward_hooks(layer)
    layer.register_forward_hook(lambda *args: None)
    assert torch_private.has_forward_hooks(layer)
    assert set(torch_private.own_buffers(layer)) == {"running_mean", "running_var", "num_batches_tracked"}
    torch_private.leave_out_of_state(layer, ["running_mean"])
    assert "running_mean" not in layer.state_dict()


def test_no_step_on_the_cpu_looks_for_a_gpu(make_trainer, digits, monkeypatch):
    looked = []
    find = torch.accelerator.is_available
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: looked.append(1) or find())
    counts = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(len(looked))

    model = SFF(small_net(), **SHAPE)
    make_trainer(max_epochs=1, limit_train_batches=3, callbacks=[Watch()]).fit(model, digits)
    assert len(set(counts)) == 1, counts


def test_steps_are_counted_and_logs_are_due(make_trainer, digits):
    due = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            due.append(lightning_private.logs_are_due(trainer))

        def on_train_end(self, trainer, pl_module):
            before = trainer.global_step
            lightning_private.count_step(trainer)
            assert trainer.global_step == before + 1
            assert lightning_private.train_loaders(trainer)

    make_trainer(max_epochs=1, limit_train_batches=4, log_every_n_steps=2, callbacks=[Watch()]).fit(
        SFF(small_net(), **SHAPE), digits
    )
    assert due == [False, True, False, True]


def test_before_a_step_hooks_run_and_gradients_are_clipped(make_trainer, digits):
    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.automatic_optimization, self.seen = nn.Linear(64, 10), False, []

        def training_step(self, batch):
            self.manual_backward(self.layer(batch[0].flatten(1)).sum())
            lightning_private.before_step(self, self.trainer.optimizers[0])

        def on_before_optimizer_step(self, optimizer):
            self.seen.append(optimizer)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Model()
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, digits)
    assert model.seen == model.trainer.optimizers


@pytest.mark.parametrize("folder", ["training", "modules", "callbacks", "local", "partition", "commands", "data"])
def test_no_private_name_of_others_stands_elsewhere(folder):
    private = re.compile(r"(?:trainer|loop|strategy|plugin|optimizer|module)\._(?!_)\w+|from (?:torch|lightning)\S*\._")
    own = ("self._", "cls._")
    for path in (Path(ff_lightning.__file__).parent / folder).rglob("*.py"):
        if path.name not in ("lightning_private.py", "torch_private.py"):
            found = [match for match in private.findall(path.read_text()) if not match.startswith(own)]
            assert not found, f"{path.name}: {found}"
