"""What each of two processes runs for test_ddp.py: torchrun --nproc-per-node 2 -m tests.ddp_worker FOLDER."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ff_lightning import SFF, LocalNet, data
from ff_lightning.callbacks import OnlineProbe
from ff_lightning.heads import GoodnessHead
from tests import methods
from tests.conftest import small_net
from tests.methods import METHODS

SAMPLES, BATCH = 64, 4  # images; per process


class Unused(nn.Module):
    """A convolution with a weight that no loss reaches."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.idle = nn.Conv2d(channels, channels, 3, padding=1), nn.Parameter(torch.ones(3, 3))

    def forward(self, x):
        return self.conv(x).relu()


def plain_head(channels, classes):
    return GoodnessHead(channels, classes, depth=0)


def images():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 1, 8, 8, generator=generator), torch.arange(SAMPLES) % 10)


class SplitData(pl.LightningDataModule):
    """Each process gets its half of the images, in order."""

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(images(), batch_size=BATCH, sampler=DistributedSampler(images(), world, rank, shuffle=False))


def make(name):
    """The model of a scenario."""
    if name in METHODS:
        return methods.make(name, joined=True, lr=0.01)
    torch.manual_seed(0)
    norm = name.startswith("norm")
    network = nn.Sequential(*small_net(norm=norm)[:4], Unused(4)) if name.startswith("unused") else small_net(norm=norm)
    arguments = {
        "optimization": "automatic" if name.endswith("automatic") else "manual",
        "memory_format": "channels_last" if name == "channels_last" else None,
        "reach": {"reach": 2, "windows": 0.95, "recompute": 2}.get(name.split("_")[0], 1),
        "own_loss": 0.3 if name.startswith("windows") else 1.0,
        "recompute": name.startswith("recompute"),
        "accumulate": 2 if name == "accumulate" else 1,
        "clip_norm": 0.1 if name.startswith("clip") else None,
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"weight_decay": 0.5, "fused": name == "channels_last"},
        },
        "lr": 0.01,
    }
    method = Twice if name == "twice" else SFF
    return method(backbone=network, num_classes=10, input_shape=(1, 8, 8), head=plain_head, **arguments)


class Twice(SFF):
    """Each unit comes back: its second update needs the step of the first."""

    overlaps_steps = False

    def local_updates(self, batch):
        for _ in range(2):
            yield from super().local_updates(batch)
            self.net.passes -= 1


class Own(pl.LightningModule):
    """A user's own module with automatic optimization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = LocalNet(small_net(norm=False), num_classes=10, input_shape=(1, 8, 8), head=plain_head)

    def training_step(self, batch, batch_idx):
        loss = self.net.loss(*batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


OWN = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}


class SaveAt(pl.Callback):
    """Writes a checkpoint in the middle of an epoch, and of an accumulation."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == 10:
            trainer.save_checkpoint(self.path)


def interrupted(optimization, folder, rank, resume):
    """A run with dropout, other random numbers on each process and other ones where it resumes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.2), small_net())
    manual = optimization == "manual"
    model = SFF(
        backbone=network,
        num_classes=10,
        input_shape=(1, 8, 8),
        optimization=optimization,
        accumulate=2 if manual else 1,
    )
    torch.manual_seed(rank + 10 * resume)
    path = folder / f"{optimization}.ckpt"
    run = trainer(
        strategy="ddp", devices=2, callbacks=[SaveAt(path)], accumulate_grad_batches=1 if manual else 2,
        limit_train_batches=7,
    )  # fmt: skip
    run.fit(model, data.Digits(batch_size=8), ckpt_path=path if resume else None)
    return model.state_dict()


def trainer(**settings):
    return pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **settings,
    )  # fmt: skip


SCENARIOS = ["manual", "automatic", "accumulate", "clip", "clip_automatic", "unused", "unused_automatic"]
SCENARIOS += ["channels_last", "norm", "reach", "reach_automatic", "windows", "windows_automatic", "twice"]
SCENARIOS += ["recompute", "recompute_automatic"]
SCENARIOS += METHODS


def main(folder):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name in SCENARIOS:
        model = make(name)
        sampler = DistributedSampler(images(), num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(images(), batch_size=BATCH, sampler=sampler)
        sent = 0
        plain = dist.all_reduce

        def counting(tensor, *args, plain=plain, **kwargs):
            nonlocal sent
            sent += tensor.numel() * tensor.element_size()
            return plain(tensor, *args, **kwargs)

        dist.all_reduce = counting
        run = trainer(strategy="ddp", devices=2)
        run.fit(model, loader, DataLoader(images(), batch_size=BATCH, sampler=sampler))
        dist.all_reduce = plain
        result = {"weights": model.state_dict(), "steps": run.global_step, "sent": sent}
        result["logged"] = {key: value.clone() for key, value in run.callback_metrics.items()}
        torch.save(result, folder / f"{name}-{rank}.pt")
    probe = OnlineProbe(num_classes=10)
    loaders = [DataLoader(images(), batch_size=BATCH, sampler=DistributedSampler(images(), 2, rank, shuffle=False))] * 2
    run = trainer(strategy="ddp", devices=2, callbacks=[probe])
    run.fit(make("manual"), *loaders)
    torch.save({**probe.probe.state_dict(), "acc": run.callback_metrics["val/probe_acc"]}, folder / f"probe-{rank}.pt")
    own = Own()
    sampler = DistributedSampler(images(), num_replicas=2, rank=rank, shuffle=False)
    trainer(strategy="ddp", devices=2, **OWN).fit(own, DataLoader(images(), batch_size=BATCH, sampler=sampler))
    torch.save(own.state_dict(), folder / f"own-{rank}.pt")
    for optimization in ("manual", "automatic"):
        runs = [interrupted(optimization, folder, rank, resume) for resume in (False, True)]
        torch.save(runs, folder / f"interrupted_{optimization}-{rank}.pt")
    module = data.Digits(batch_size=7)
    model = SFF(num_classes=10, input_shape=(1, 8, 8))
    run = trainer(strategy="ddp", devices=2)
    run.test(model, module, verbose=False)
    samples = len(module.test_dataloader().sampler)
    torch.save({"samples": samples, "acc": run.callback_metrics["test/acc"]}, folder / f"test-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()  # or a thread of gloo may abort the process that ends first


if __name__ == "__main__":
    main(Path(sys.argv[1]))
