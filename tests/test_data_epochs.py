"""Epochs of loops without a Trainer, and runs that go on with another batch size or number of processes."""

import itertools
import types

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ff_lightning import SFF, data
from tests.conftest import small_net


def ready(images=200, **arguments):
    module = data.FakeImages(**{"images": images, "image_size": 16, "batch_size": 32, "num_workers": 0, **arguments})
    module.setup("fit")
    return module


def as_one(batches):
    return torch.cat([torch.cat([x.flatten(), y.float()]) for x, y in batches])


def told(module, epochs=(0, 1, 2)):
    """The batches of epochs that are named."""
    loader, found = module.train_dataloader(), []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        found.append(as_one(loader))
    return found


def same(one, two):
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 1)])
def test_a_plain_loop_has_new_epochs(in_memory, workers):
    module = ready(in_memory=in_memory, num_workers=workers)
    expected = told(module)
    assert not torch.equal(expected[0].sort().values, expected[1].sort().values), "other crops, not only another order"
    loader = module.train_dataloader()
    assert same([as_one(loader) for _ in range(3)], expected)


def test_a_loader_for_each_epoch_has_new_epochs():
    module = ready()
    expected = told(module)
    assert same([as_one(module.train_dataloader()) for _ in range(3)], expected)


def test_a_pass_that_was_broken_off_was_an_epoch():
    module = ready()
    expected, loader = told(module), module.train_dataloader()
    next(iter(loader))
    assert torch.equal(as_one(loader), expected[1])


def test_two_passes_at_once_keep_their_epochs():
    module = ready()
    expected, loader = told(module), module.train_dataloader()
    one, two = zip(*zip(loader, loader, strict=True), strict=True)
    assert same([as_one(one), as_one(two)], expected[:2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_of_fabric(workers):
    module = ready(in_memory=not workers, num_workers=workers)
    expected = told(module)
    loader = L.Fabric(accelerator="cpu", devices=1).setup_dataloaders(module.train_dataloader())
    assert same([as_one(loader) for _ in range(3)], expected)


def test_validation_images_are_the_same_in_each_pass():
    loader = ready().val_dataloader()
    assert torch.equal(as_one(loader), as_one(loader))


class Watch(Callback):
    """Notes the batches of training, and the epochs that were validated."""

    def __init__(self):
        self.seen, self.validated = [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, batch))

    def on_validation_end(self, trainer, model):
        if not trainer.sanity_checking:
            self.validated.append(trainer.current_epoch)

    def epoch(self, number):
        return [batch for epoch, _, batch in self.seen if epoch == number]


def fit(make_trainer, module, ckpt_path=None, callbacks=(), **arguments):
    watch = Watch()
    model = SFF(backbone=small_net(3), num_classes=10, input_shape=(3, 16, 16), **arguments)
    trainer = make_trainer(limit_train_batches=1.0, callbacks=[watch, *callbacks], enable_checkpointing=bool(callbacks))
    trainer.fit(model, module, ckpt_path=ckpt_path)
    return watch


def test_a_trainer_says_which_epoch_it_is(make_trainer):
    module = ready()
    expected = told(module)
    as_one(module.train_dataloader())
    loader = module.train_dataloader()
    as_one(loader)  # this one too had epochs of its own before
    watch = Watch()
    make_trainer(limit_train_batches=1.0, callbacks=[watch]).fit(
        SFF(backbone=small_net(3), num_classes=10, input_shape=(3, 16, 16)), loader
    )
    assert same([as_one(watch.epoch(0)), as_one(watch.epoch(1))], expected[:2])


def test_a_plain_loop_goes_on_where_it_stopped():
    module = ready()
    expected = told(module)
    loader = module.train_dataloader()
    list(loader)
    list(itertools.islice(loader, 2))
    middle = loader.state_dict()
    loader = module.train_dataloader()
    loader.load_state_dict({**middle, "epoch": 0})
    list(loader)
    end = loader.state_dict()
    for state, rest in ((middle, [expected[1].split(len(expected[1]) // 5)[2:], expected[2:]]), (end, [expected[1:2]])):
        loader = ready().train_dataloader()
        loader.load_state_dict(state)
        for part in rest:
            assert torch.equal(as_one(loader), torch.cat(list(part)))


# ------------------------------------------------------------------------------- another batch size, other processes


def pictures(batches):
    return torch.cat([x.flatten(1) for x, _ in batches])


@pytest.mark.parametrize(
    ("before", "after", "batches", "numbers", "schedule"),
    [
        (16, 32, 4, [2, 3, 4, 5], "onecycle"),
        (16, 32, 3, [2, 3, 4, 5], "constant"),
        (32, 16, 2, list(range(4, 12)), "constant"),
        (16, 32, 11, [], "constant"),  # less than a batch is left
        (16, 16, 5, list(range(5, 12)), "onecycle"),
    ],
)
def test_a_run_goes_on_with_another_batch_size(before, after, batches, numbers, schedule, make_trainer, tmp_path):
    def module(batch_size):
        return data.FakeImages(images=223, image_size=16, batch_size=batch_size, augment=False)  # 200 to train on

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=batches, save_top_k=-1, filename="{step}")
    whole = fit(make_trainer, module(before), callbacks=[keep], lr_scheduler=schedule)
    resumed = fit(make_trainer, module(after), tmp_path / f"step={batches}.ckpt", lr_scheduler=schedule)
    assert [number for epoch, number, _ in resumed.seen if epoch == 0] == numbers
    order = pictures(whole.epoch(0))
    seen = pictures([*whole.epoch(0)[:batches], *resumed.epoch(0)])
    assert len(seen) == len(seen.unique(dim=0)), "no image twice"
    shared = min(len(order), len(seen))
    assert torch.equal(seen[:shared], order[:shared]), "in the order of the epoch"
    assert [number for epoch, number, _ in resumed.seen if epoch == 1] == list(range(200 // after))
    assert resumed.validated == ([0, 1] if numbers else [1])


def test_a_run_that_overfits_a_few_batches_goes_on(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def run(ckpt_path=None, callbacks=()):
        model, watch = SFF(backbone=small_net(3), num_classes=10, input_shape=(3, 16, 16)), Watch()
        module = data.FakeImages(images=200, image_size=16, batch_size=32)
        trainer = make_trainer(callbacks=[watch, *callbacks], enable_checkpointing=bool(callbacks), overfit_batches=2)
        trainer.fit(model, module, ckpt_path=ckpt_path)
        return [(epoch, number) for epoch, number, _ in watch.seen]

    batches = run(callbacks=[keep])
    assert batches == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for step in (1, 2, 3):
        assert run(tmp_path / f"step={step}.ckpt") == batches[step:]


def on_processes(count, batch_size, state=None):
    """A loader on each of so many processes, in the middle of an epoch."""
    loaders = []
    for rank in range(count):
        module = ready(batch_size=batch_size, augment=False)
        strategy = types.SimpleNamespace(root_device=torch.device("cpu"))
        module.trainer = types.SimpleNamespace(world_size=count, global_rank=rank, strategy=strategy)
        loader = module.train_dataloader()
        loader.sampler.set_epoch(3)
        if state:
            loader.load_state_dict(state)
        loaders.append(loader)
    return loaders


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (3, 2), (1, 4), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after):
    given, states = [], []
    for loader in on_processes(before, 8):
        given += itertools.islice(loader, 3)
        states.append(loader.state_dict())
    assert states == [{"epoch": 3, "images": 24 * before}] * before
    for loader in on_processes(after, 4, states[0]):
        given += list(loader)
    seen = pictures(given)
    assert len(seen) == len(seen.unique(dim=0)), "no image twice"
    assert len(seen) > 180 - 5 * after, "none is left out but what fills no batch"


def test_the_position_of_another_loader_is_reported(caplog):
    module = ready()
    expected = told(module)
    for state in ({"epoch": 0, "given": 3}, {"_num_yielded": 3}, {}):
        loader = ready().train_dataloader()
        loader.load_state_dict(state)
        assert torch.equal(as_one(loader), expected[0])
    assert caplog.text.count("the checkpoint has the position of another loader") == 3
