"""What holds of every kind of data that is held in memory: epochs, processes, seeds, resuming and the test set."""

import types

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from ff_lightning import data

KINDS = ("BreastCancer", "Diabetes", "Tabular", "Signals", "Text")


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    """Makes a module of a kind with so many samples in a batch."""
    kind, path = request.param, tmp_path / "samples"
    arguments = {}
    if kind == "Tabular":
        rows = [f"{i % 7},{'ab'[i % 2]},{i % 2}" for i in range(100)]
        path = path.with_suffix(".csv")
        path.write_text("\n".join(["x,letter,y", *rows]))
        arguments = {"train": str(path), "target": "y"}
    elif kind == "Signals":
        y = np.arange(100) % 2
        x = np.random.default_rng(0).normal(size=(100, 2, 16)) + y[:, None, None]
        path = path.with_suffix(".npz")
        np.savez(path, x=x, y=y)
        arguments = {"train": str(path)}
    elif kind == "Text":
        pytest.importorskip("tokenizers")
        path = path.with_suffix(".csv")
        path.write_text("\n".join(["text,label", *(f"{('good', 'bad')[i % 2]} film {i},{i % 2}" for i in range(100))]))
        arguments = {"train": str(path), "length": 6}

    def made(**changes):
        return getattr(data, kind)(**{"batch_size": 16, **arguments, **changes})

    return made


def ready(module):
    module.setup("fit")
    module.setup("test")
    return module


def as_one(batches):
    """All numbers of some batches."""
    parts = []
    for x, y in batches:
        inputs = list(x.values()) if isinstance(x, dict) else [x]
        parts += [each.double().flatten() for each in (*inputs, y)]
    return torch.cat(parts)


def told(module, epochs):
    loader, found = module.train_dataloader(), []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        found.append(as_one(loader))
    return found


def test_epochs_are_shuffled_and_the_same_for_a_seed(make):
    one, two = told(ready(make()), (0, 1)), told(ready(make()), (1, 0))
    assert torch.equal(one[0], two[1])
    assert torch.equal(one[1], two[0])
    assert not torch.equal(one[0], one[1])


def test_splits_are_apart_and_the_test_set_hangs_on_no_seed_or_subset(make):
    whole, other, part = ready(make()), ready(make(seed=1)), ready(make(subset=40, val_from="rest"))
    for module in (whole, other, part):
        assert not set(module.train_set.numbers) & set(module.val_set.numbers)
        assert module._test.rows.tolist() == whole._test.rows.tolist()
        assert not set(module._train.rows) & set(module._test.rows)
    assert whole.train_set.numbers.tolist() != other.train_set.numbers.tolist()
    assert part.val_set.numbers.tolist() == whole.val_set.numbers.tolist()
    assert len(part.train_set) == 40


def test_every_sample_counts_once_over_processes(make):
    module = ready(make())

    def targets_of(loader):
        return torch.cat([y for _, y in loader])

    for split in ("train", "val", "test"):
        parts = []
        for rank in (0, 1, 2):
            module.trainer = types.SimpleNamespace(world_size=3, global_rank=rank)
            sampler = getattr(module, f"{split}_dataloader")().sampler
            parts += [i[1] if isinstance(i, tuple) else i for i in sampler]
        module.trainer = None
        size = len(getattr(module, f"{split}_set"))
        assert len(set(parts)) == len(parts) == (size - size % 3 if split == "train" else size)


class Linear(pl.LightningModule):
    """A user's own model of any of these data."""

    def __init__(self, module):
        super().__init__()
        self.layer = nn.Linear(int(np.prod(module.input_shape)), module.num_classes)
        self.vocabulary, self.tested = module.vocabulary, []

    def loss(self, batch):
        x, y = batch
        x = x["input_ids"] / self.vocabulary if isinstance(x, dict) else x
        scores = self.layer(x.flatten(1).float())
        return F.mse_loss(scores[:, 0], y) if y.is_floating_point() else F.cross_entropy(scores, y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_run_interrupted_in_mid_epoch_ends_in_the_same_weights(make, make_trainer, tmp_path):
    def fit(path=None, **settings):
        module = make()
        pl.seed_everything(0, verbose=False)
        model = Linear(module)
        trainer = make_trainer(limit_train_batches=1.0, **settings)
        trainer.fit(model, module, ckpt_path=path, weights_only=True)
        return model.state_dict()

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole = fit(callbacks=[keep], enable_checkpointing=True)
    resumed = fit(tmp_path / "step=3.ckpt")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_module_from_its_stored_arguments_gives_the_same_samples(make, make_trainer, tmp_path):
    module = make(subset=60, val_fraction=0.2)
    trainer = make_trainer(max_epochs=1, enable_checkpointing=True)
    trainer.fit(Linear(module), module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt")
    module.setup("test")
    assert torch.equal(as_one(ready(again).test_dataloader()), as_one(module.test_dataloader()))
    assert torch.equal(told(again, [0])[0], told(module, [0])[0])
    # a test alone: what is learned from the training split is there too
    alone, model = make(subset=60, val_fraction=0.2), Linear(module)
    make_trainer(limit_test_batches=1.0).test(model, alone, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(as_one(model.tested), as_one(module.test_dataloader()))


def test_reading_does_not_touch_the_random_numbers_of_the_model(make):
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()
    module = ready(make())
    list(module.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numbers
