"""Training only some of the blocks, one after the other, or new ones on top."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from ff_lightning import SFF, Backprop, LocalNet, data
from ff_lightning.backbones import load_weights
from ff_lightning.callbacks import GreedyBlocks
from ff_lightning.util.memory import saved_for_backward
from tests.conftest import small_net

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
MODES = pytest.mark.parametrize("optimization", ["manual", "automatic"])


def make(**arguments):
    torch.manual_seed(0)
    return SFF(backbone=small_net(), **{**SHAPE, **arguments})


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved_blocks(model, before):
    """Numbers of the blocks with a weight or a running statistic that changed, in the block or in its head."""
    after = model.state_dict()
    keys = [key for key, value in before.items() if key.startswith("net.") and not torch.equal(value, after[key])]
    return {int(key.split(".")[2]) for key in keys if not key.endswith("_extra_state")}


@MODES
@pytest.mark.parametrize(("blocks", "moved"), [([1], {1}), (["3", 0], {0, 2}), ([-1], {2}), (None, {0, 1, 2})])
def test_only_chosen_blocks_move(optimization, blocks, moved, make_trainer, digits):
    decay = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.5}}
    model = make(train_blocks=blocks, optimization=optimization, optimizer=decay)
    before = state(model)
    trainer = make_trainer()
    trainer.fit(model, digits)
    assert moved_blocks(model, before) == moved
    assert trainer.global_step == 6
    losses = {key for key in trainer.callback_metrics if key.startswith("train/block")}
    assert losses == {f"train/block{k:02d}_loss" for k in moved}


@MODES
def test_the_lowest_block_does_not_care_whether_the_others_are_trained(optimization, make_trainer, digits):
    both = [make(train_blocks=blocks, optimization=optimization) for blocks in (None, [0])]
    for model in both:
        make_trainer().fit(model, digits)
    for key, value in both[0].net.blocks[0].state_dict().items():
        assert torch.equal(value, both[1].net.blocks[0].state_dict()[key])


def test_what_is_not_trained_keeps_nothing_for_backward():
    net = make().net
    net.train_only([1])
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    kept = []
    with saved_for_backward(net.parameters()) as saved:
        for loss in net.local_losses(x, y):
            kept.append((loss.requires_grad, saved.now > 0))
            del loss
    assert kept == [(False, False), (True, True)], "block 2 did not run"


class OneDropout(nn.Module):
    """Two blocks that share their dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.b(self.drop(self.a(x).relu())).relu())


def test_a_shared_dropout_is_at_work_in_the_trained_block_only():
    net = LocalNet(OneDropout(), 10, "layer", input_shape=(1, 8, 8))
    net.train_only([1])
    x = torch.randn(8, 1, 8, 8)
    (held, trained), (held_again, trained_again) = (list(net.local_goodness(x)) for _ in range(2))
    assert torch.equal(held, held_again)
    assert not torch.equal(trained, trained_again)


@pytest.mark.parametrize("blocks", [None, [0, 1]])
def test_a_module_that_was_put_into_evaluation_stays_there(blocks, make_trainer, digits):
    network = small_net()
    held = network[2].norm.eval()
    make_trainer().fit(SFF(backbone=network, train_blocks=blocks, **SHAPE), digits)
    assert not held.training
    assert torch.equal(held.running_mean, torch.zeros(4))
    assert network[3].norm.running_mean.any() == (blocks is None)


def test_a_frozen_backbone_trains_the_heads(make_trainer, digits):
    model = make()
    model.net.blocks.requires_grad_(False)
    before = state(model)
    make_trainer().fit(model, digits)
    changed = {key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])}
    assert {
        key.split(".")[1] for key in changed if not key.endswith(("running_mean", "running_var", "tracked", "_state"))
    } == {"objectives"}


class WhoMoved(Callback):
    """Notes after each epoch which blocks have changed in it."""

    def __init__(self):
        self.turns = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = state(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.turns.append(moved_blocks(pl_module, self.before))


def test_greedy_trains_one_block_after_the_other(make_trainer, digits):
    model, who = make(lr=0.01), WhoMoved()
    before = state(model)
    trainer = make_trainer(max_epochs=6, callbacks=[GreedyBlocks(epochs_per_block=2), who])
    trainer.fit(model, digits)
    assert who.turns == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert trainer.global_step == 18
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    assert [(s.last_epoch, s.total_steps) for s in schedules] == [(6, 6)] * 3, "each the whole schedule in its turn"
    assert moved_blocks(model, before) == {0, 1, 2}
    assert (model.net.trained, model.net.voters) == (frozenset({0, 1, 2}), None)


def test_a_schedule_of_epochs_runs_in_the_turn_of_its_block(make_trainer, digits):
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    model = make(lr=8.0, lr_scheduler=scheduler, optimizer=torch.optim.SGD, clip_norm=1e-6)
    make_trainer(max_epochs=6, callbacks=[GreedyBlocks(2), Rates()]).fit(model, digits)
    assert rates == [[8, 8, 8], [4, 8, 8], [2, 8, 8], [2, 4, 8], [2, 2, 8], [2, 2, 4]]


def test_those_that_voted_when_a_checkpoint_was_written_vote_when_it_is_loaded(make_trainer, digits, tmp_path):
    class Save(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    make_trainer(max_epochs=3, callbacks=[GreedyBlocks(1), Save()]).fit(make(), digits)
    x = torch.randn(2, 1, 8, 8)
    for epoch in range(3):
        net = SFF.load_from_checkpoint(tmp_path / f"{epoch}.ckpt", backbone=small_net()).eval().net
        torch.testing.assert_close(net(x), net.goodness(x)[: epoch + 1].mean(0))


def test_after_their_turns_all_blocks_can_be_trained_together(make_trainer, digits):
    model = make()
    make_trainer(max_epochs=3, callbacks=[GreedyBlocks(1)]).fit(model, digits)
    trainer = make_trainer()
    trainer.fit(model, digits)
    assert [config.scheduler.total_steps for config in trainer.lr_scheduler_configs] == [6] * 3


def test_a_turn_is_training_of_that_block_alone(make_trainer, digits):
    greedy = make(lr_scheduler="constant")
    make_trainer(max_epochs=3, callbacks=[GreedyBlocks(1)]).fit(greedy, digits)
    by_hand = make(lr_scheduler="constant")
    loader = data.Digits(batch_size=16)
    for k in range(3):
        by_hand.net.train_only([k])
        trainer = make_trainer(max_epochs=k + 1)
        trainer.fit_loop.epoch_progress.current.processed = trainer.fit_loop.epoch_progress.current.completed = k
        trainer.fit(by_hand, loader)
    for key, value in greedy.state_dict().items():
        if not key.endswith("_extra_state"):  # which blocks are trained is not the same
            assert torch.equal(value, by_hand.state_dict()[key]), key


def test_only_trained_blocks_vote_while_blocks_take_turns():
    net = make().net.eval()
    x = torch.randn(2, 1, 8, 8)
    net.voters = frozenset({0, 1})
    torch.testing.assert_close(net(x), net.goodness(x)[:2].mean(0))


@MODES
def test_new_blocks_on_top_of_a_trained_network(optimization, make_trainer, digits):
    model = make(optimization=optimization)
    make_trainer().fit(model, digits)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        goodness = model.eval().net.goodness(x)
    before = state(model)
    top = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    assert model.append_blocks("top", top) == [3, 4]
    assert [block.name for block in model.net.blocks][3:] == ["top.0", "top.2"]
    model.train()
    trainer = make_trainer()
    trainer.fit(model, digits)
    assert moved_blocks(model, before) == set(), "those below did not move"
    with torch.no_grad():
        assert torch.equal(model.eval().net.goodness(x)[:3], goodness)
    assert {"val/block04_acc", "train/block04_loss"} <= trainer.callback_metrics.keys()
    assert torch.equal(top[0].weight, model.net.backbone_state_dict()["top.0.weight"]), "the user's own module"


def test_one_block_is_trained_on_from_a_checkpoint(make_trainer, digits, tmp_path):
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make(lr_scheduler="constant"), digits)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    model = make(lr_scheduler="constant", train_blocks=["2"])
    steps = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = state(pl_module)

        def on_train_end(self, trainer, pl_module):
            steps.extend(int(next(iter(o.state.values()))["step"]) for o in trainer.optimizers)

    watch = Watch()
    make_trainer(max_epochs=3, callbacks=[watch]).fit(model, digits, ckpt_path=tmp_path / "all.ckpt")
    assert moved_blocks(model, watch.before) == {1}, "the block named 2 is the second one"
    assert steps == [6, 9, 6], "its optimizer went on with the moments that it had"
    assert model.net.voters is None, "the checkpoint brought a trained head for each block"


@MODES
def test_a_block_with_a_head_that_was_never_trained_does_not_vote(optimization, make_trainer, digits, tmp_path):
    first = make_trainer(max_epochs=1)
    first.fit(make(), digits)
    first.save_checkpoint(tmp_path / "all.ckpt")
    torch.manual_seed(1)
    network = small_net()
    load_weights(network, torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"])
    model = SFF(backbone=network, train_blocks=[1], optimization=optimization, lr_scheduler="constant", **SHAPE)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().net(x), model.net.goodness(x)[1])

    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = make(optimization=optimization, lr_scheduler="constant", train_blocks=[2])
    make_trainer(max_epochs=2).fit(again, digits, ckpt_path=tmp_path / "one.ckpt")
    assert again.net.voters == {1, 2}, "one whose head was trained before, and one of this run"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["layer9"], "train_blocks='layer9' is not known: give one of"),
        ([3], "train_blocks: there is no block 3; the network has blocks 0 to 2"),
        ([], r"train_blocks=\[\]: at least one block must be trained"),
    ],
)
def test_blocks_that_do_not_exist(blocks, message):
    with pytest.raises(ValueError, match=message):
        make(train_blocks=blocks)


def test_greedy_says_what_it_needs(make_trainer, digits):
    with pytest.raises(ValueError, match="epochs_per_block=0"):
        GreedyBlocks(0)
    with pytest.raises(ValueError, match="trains 3 blocks in 6 epochs: give the Trainer max_epochs=6, not 2"):
        make_trainer(callbacks=[GreedyBlocks(2)]).fit(make(), digits)
    with pytest.raises(ValueError, match="needs a model with optimization='manual'"):
        make_trainer(max_epochs=3, callbacks=[GreedyBlocks(1)]).fit(make(optimization="automatic"), digits)
    model = Backprop(backbone=small_net(), **SHAPE)
    with pytest.raises(ValueError, match="Backprop has none"):
        make_trainer(callbacks=[GreedyBlocks(1)]).fit(model, digits)


def test_channels_last_changes_nothing_but_the_layout():
    plain = LocalNet(small_net(), 10, input_shape=(1, 8, 8)).eval()
    turned = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(plain(x), turned(x))


def test_memory_format_reaches_weights_and_features(make_trainer, digits):
    model = make(memory_format="channels_last")
    make_trainer(max_epochs=1).fit(model, digits)
    assert model.net.blocks[1].body.get_submodule("2").conv1.weight.is_contiguous(memory_format=torch.channels_last)
    features = list(model.net.local_features(torch.randn(2, 1, 8, 8)))
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in features)


@pytest.mark.slow
@MODES
def test_compiled_blocks_end_in_the_same_weights(optimization, make_trainer, digits):
    models = []
    for chosen in (False, True):
        torch.manual_seed(0)
        network = small_net()[:3]
        arguments = {"optimization": optimization, "optimizer": torch.optim.SGD, "lr": 0.1, **SHAPE}
        models.append(SFF(backbone=network, compile=chosen, **arguments))
    for model in models:
        make_trainer(max_epochs=1).fit(model, digits)
    plain, compiled = map(state, models)
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-4, rtol=1e-3, msg=key)
