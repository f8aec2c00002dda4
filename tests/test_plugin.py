"""`LocalNet.loss` and `LocalNet.local_losses` in training loops that are not ours."""

import copy
import socket

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ff_lightning import LocalNet
from ff_lightning.heads import GoodnessHead
from ff_lightning.training.averaging import Averaging
from tests.conftest import small_net

BATCH, STEPS = 8, 4


def plain_head(channels, classes):
    return GoodnessHead(channels, classes, depth=0)


def make():
    torch.manual_seed(0)
    return LocalNet(small_net(norm=False), num_classes=10, input_shape=(1, 8, 8), head=plain_head)


def images():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(BATCH * STEPS, 1, 8, 8, generator=generator), torch.arange(BATCH * STEPS) % 10)


def batches():
    return DataLoader(images(), batch_size=BATCH)


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def reference(clip=None, accumulate=1):
    """The weights after the plainest loop there is: one backward for each block, one step for all."""
    net = make()
    optimizer = optimizer_of(net)
    for i, (x, y) in enumerate(batches()):
        for loss in net.local_losses(x, y):
            (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


def assert_same(one, two, **tolerance):
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, **(tolerance or {"atol": 1e-6, "rtol": 1e-5}), msg=key)


class Own(pl.LightningModule):
    """A user's own module."""

    def __init__(self):
        super().__init__()
        self.net = make()

    def training_step(self, batch, batch_idx):
        return self.net.loss(*batch)

    def configure_optimizers(self):
        return optimizer_of(self.net)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_in_a_lightning_module(clip, accumulate, make_trainer):
    model = Own()
    trainer = make_trainer(
        max_epochs=1, limit_train_batches=1.0, gradient_clip_val=clip, accumulate_grad_batches=accumulate
    )
    trainer.fit(model, batches())
    assert_same(reference(clip, accumulate), model.net.state_dict())


def test_in_fabric():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = make()
    wrapped, optimizer = fabric.setup(net, optimizer_of(net))
    wrapped.mark_forward_method("loss")
    for x, y in fabric.setup_dataloaders(batches()):
        optimizer.zero_grad()
        fabric.backward(wrapped.loss(x, y))
        optimizer.step()
    assert_same(reference(), net.state_dict())


def test_in_plain_pytorch_with_mixed_precision():
    runs = []
    for whole in (True, False):  # LocalNet.loss against one backward for each block
        net = make()
        optimizer = optimizer_of(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                if whole:
                    loss = net.loss(x, y, scaler)
                else:
                    for loss in net.local_losses(x, y):
                        scaler.scale(loss).backward()
            if whole:
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(net.state_dict())
    assert_same(*runs)


def in_two_processes(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sampler = DistributedSampler(images(), 2, rank, shuffle=False)
    loader = DataLoader(images(), batch_size=BATCH // 2, sampler=sampler)

    class Loss(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return self.net.loss(x, y)

    wrapped = make()
    parallel = nn.parallel.DistributedDataParallel(Loss(wrapped))
    optimizer = optimizer_of(wrapped)
    for x, y in loader:
        optimizer.zero_grad()
        parallel(x, y).backward()
        optimizer.step()

    blockwise = make()
    optimizers = [torch.optim.SGD(blockwise.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
    for x, y in loader:
        for k, loss in enumerate(blockwise.local_losses(x, y)):
            optimizers[k].zero_grad()
            loss.backward()
            Averaging(blockwise.block_parameters(k)).wait()
            optimizers[k].step()

    results[rank] = copy.deepcopy((wrapped.state_dict(), blockwise.state_dict()))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_in_plain_pytorch_on_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.start_processes(in_two_processes, (port, results), nprocs=2, start_method="fork")
        for net in (*results[0], *results[1]):
            assert_same(reference(), net)
        for one, two in zip(results[0], results[1], strict=True):
            assert_same(one, two, atol=0, rtol=0)
