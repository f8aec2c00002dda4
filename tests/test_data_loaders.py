"""Loaders go on where they stopped, with the same images."""

import itertools
import types

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ff_lightning import SFF, data
from tests.conftest import small_net


def state_after(module, batches, epoch):
    """The state of a loader that has given so many batches of an epoch."""
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    list(itertools.islice(loader, batches))
    return loader.state_dict()


@pytest.mark.parametrize(("workers", "in_memory"), [(0, True), (0, False), (2, False)])
@pytest.mark.parametrize("size", [16, 80])
def test_a_loader_goes_on_where_it_stopped_with_the_same_images(image_folder, workers, in_memory, size):
    def batches(loader):
        loader.sampler.set_epoch(3)
        return [torch.cat([x.flatten(), y.float()]) for x, y in loader]

    root = str(image_folder(count=20))
    module = data.ImageFolder(root, batch_size=4, num_workers=0, image_size=size, in_memory=in_memory)
    module.setup("fit")
    whole = batches(module.train_dataloader())
    module.num_workers = workers
    loader = module.train_dataloader()
    loader.load_state_dict(state_after(module, 7, epoch=3))
    rest, following = batches(loader), batches(loader)
    assert len(whole) == 10
    assert torch.equal(torch.stack(rest), torch.stack(whole[7:]))
    assert torch.equal(torch.stack(following), torch.stack(whole)), "the next epoch is whole again"


@pytest.mark.parametrize("in_memory", [True, False])
def test_reading_does_not_touch_the_random_numbers_of_the_model(image_folder, in_memory):
    module = data.ImageFolder(str(image_folder()), batch_size=4, num_workers=0, in_memory=in_memory)
    before = torch.get_rng_state()
    module.setup("fit")
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_more_processes_than_images(image_folder):
    module = data.ImageFolder(str(image_folder()), batch_size=4, num_workers=0)
    module.setup("fit")
    module.trainer = types.SimpleNamespace(world_size=50, global_rank=0)
    with pytest.raises(ValueError, match="20 samples for training on 50 processes"):
        module.train_dataloader()
    with pytest.raises(ValueError, match="20 samples for evaluation on 50 processes"):
        module.val_dataloader()


@pytest.mark.parametrize("flags", [{"overfit_batches": 2}, {"reload_dataloaders_every_n_epochs": 1}, {}])
def test_a_trainer_gives_the_batches_of_a_plain_loop(make_trainer, flags):
    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            seen.append(batch)

        def on_predict_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0):
            seen.append(batch)

    seen = []
    module = data.FakeImages(images=200, image_size=16, batch_size=32)
    model = SFF(backbone=small_net(3), num_classes=10, input_shape=(3, 16, 16))
    trainer = make_trainer(max_epochs=2, callbacks=[Watch()], **flags)
    trainer.fit(model, module)
    loader = module.train_dataloader()
    if "overfit_batches" in flags:
        assert len(seen) == 4
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True)), "the same batches each epoch"
    else:
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            for (x, y), (given, classes), _ in zip(loader, seen[3 * epoch :], range(3), strict=False):
                assert torch.equal(x, given)
                assert torch.equal(y, classes)
    seen.clear()
    trainer.predict(model, module)
    assert torch.equal(seen[0][0], next(iter(module.test_dataloader()))[0])


class Plain(pl.LightningModule):
    """A user's own module, which notes the epoch and the images of each batch that it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3 * 16 * 16, 10), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0]))
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("step", [3, 4, 5])  # of 5 or 4 batches in an epoch
def test_another_module_goes_on_with_the_same_batches_also_under_another_seed(
    step, limit, make_trainer, tmp_path, monkeypatch
):
    def fit(seed, path=None, **settings):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        model = Plain()
        trainer = make_trainer(max_epochs=2, limit_train_batches=limit, **settings)
        trainer.fit(model, data.FakeImages(images=200, image_size=16, batch_size=32, num_workers=0), ckpt_path=path)
        return model.seen

    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    whole = fit(5, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(6, tmp_path / f"step={step}.ckpt")
    assert len(whole) == 2 * (5 if limit == 1.0 else limit)
    assert [epoch for epoch, _ in resumed] == [epoch for epoch, _ in whole[step:]]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(resumed, whole[step:], strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_interrupted_in_mid_epoch_ends_in_the_same_weights(make_trainer, tmp_path, in_memory):
    def fit(path=None, **settings):
        module = data.FakeImages(images=200, image_size=16, batch_size=32, num_workers=0, in_memory=in_memory)
        model = SFF(backbone=small_net(3), num_classes=10, input_shape=(3, 16, 16), lr_scheduler="constant")
        trainer = make_trainer(limit_train_batches=1.0, **settings)
        trainer.fit(model, module, ckpt_path=path, weights_only=True)
        return model.state_dict(), trainer.global_step

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole, _ = fit(callbacks=[keep], enable_checkpointing=True)
    resumed, steps = fit(tmp_path / "epoch=0-step=3.ckpt")
    assert steps == 10
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
