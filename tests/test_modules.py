import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ff_lightning import SFF, Backprop
from ff_lightning.heads import GoodnessHead
from tests.conftest import small_net

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def make(method=SFF, norm=True, **arguments):
    torch.manual_seed(0)
    return method(backbone=small_net(norm=norm), **{**SHAPE, **arguments})


def plain_head(channels, classes):
    """A head without batch norm: its loss is a mean over samples that do not see each other."""
    return GoodnessHead(channels, classes, depth=0)


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one, two, exact=True):
    assert one.keys() == two.keys()
    for key in one:
        if exact:
            assert torch.equal(one[key], two[key]), key
        else:
            torch.testing.assert_close(one[key], two[key], msg=key)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize(
    ("granularity", "reach", "own_loss"),
    [("layer", 1, 1.0), ("block", 1, 1.0), ("block", 2, 1.0), ("block", 0.95, 0.3)],
)
def test_manual_and_automatic_end_in_the_same_weights(granularity, reach, own_loss, schedule, make_trainer, digits):
    runs = []
    for optimization in ("manual", "automatic"):
        model = make(
            granularity=granularity,
            reach=reach,
            own_loss=own_loss,
            optimization=optimization,
            lr_scheduler=schedule,
            clip_norm=0.5,
        )
        make_trainer(max_epochs=3).fit(model, digits)
        runs.append(weights(model))
    assert_same(*runs)


def test_backprop_equals_a_plain_training_loop(make_trainer):
    torch.manual_seed(1)
    x, y = torch.randn(24, 1, 8, 8), torch.arange(24) % 10
    model = make(Backprop, lr_scheduler="constant", lr=0.01)
    plain = copy.deepcopy(model.net)
    make_trainer(max_epochs=2).fit(model, DataLoader(TensorDataset(x, y), batch_size=8))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True)
    for _ in range(2):
        for i in range(0, 24, 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x[i : i + 8]), y[i : i + 8]).backward()
            optimizer.step()
    assert_same(plain.state_dict(), model.net.state_dict())


def test_accumulated_batches_equal_one_large_batch(make_trainer):
    torch.manual_seed(1)
    images = TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 10)
    runs = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        model = make(norm=False, head=plain_head, accumulate=accumulate, optimizer=torch.optim.SGD, lr=0.1)
        trainer = make_trainer(limit_train_batches=1.0)
        trainer.fit(model, DataLoader(images, batch_size=batch_size))
        assert trainer.global_step == 6
        runs.append(weights(model))
    for run in runs:
        run.pop("net._extra_state")  # passes are batches
    assert_same(*runs, exact=False)


def test_the_last_window_of_an_epoch_is_stepped(make_trainer, digits):
    model = make(accumulate=2)
    trainer = make_trainer(max_epochs=2, limit_train_batches=5)
    trainer.fit(model, digits)
    assert trainer.global_step == 6  # 2 + 2 + 1 batches, twice: and the one-cycle schedule is just as long


def test_clip_norm_bounds_the_gradient_of_each_block(make_trainer, digits):
    class Watching(SFF):
        norms: list[float]

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            grads = [p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            self.norms.append(torch.cat(grads).norm().item())

    seen = {}
    for clip in (None, 0.1):
        model = make(Watching, clip_norm=clip)
        model.norms = seen[clip] = []
        make_trainer(max_epochs=1).fit(model, digits)
        assert len(model.norms) == 9  # 3 blocks, 3 batches
    assert max(seen[0.1]) <= 0.1 + 1e-6
    assert min(seen[None]) > 0.1


def test_every_block_has_its_optimizer_and_its_learning_rate(make_trainer, digits, tmp_path):
    model = make(optimizer=torch.optim.SGD, lr=0.1)
    trainer = make_trainer()
    trainer.fit(model, digits)
    assert [group["name"] for o in trainer.optimizers for group in o.param_groups] == ["block00", "block01", "block02"]
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.net.parameters()}
    assert all(isinstance(optimizer, torch.optim.SGD) for optimizer in trainer.optimizers)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_lower_blocks_may_learn_more_slowly(optimization, make_trainer, digits):
    trainer = make_trainer()
    trainer.fit(make(lr=0.1, lr_decay=0.5, lr_scheduler="constant", optimization=optimization), digits)
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert rates == [0.025, 0.05, 0.1]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_a_scheduler_given_as_a_class_counts_steps_or_epochs(optimization, interval, make_trainer, digits):
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    model = make(lr=1.0, lr_scheduler=schedule, lr_interval=interval, optimization=optimization)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, digits)
    rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
    assert rates == {0.5**6 if interval == "step" else 0.5**2}


def test_train_losses_are_logged_per_block(make_trainer, digits):
    model = make()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    logged = trainer.callback_metrics
    losses = [logged[f"train/block{k:02d}_loss"] for k in range(3)]
    torch.testing.assert_close(logged["train/loss"], torch.stack(losses).mean())


def test_losses_are_the_mean_since_the_last_report(make_trainer, digits):
    class Keeping(SFF):
        def report(self, update):
            self.kept += update.values
            super().report(update)

    model = make(Keeping)
    model.kept = []
    trainer = make_trainer(max_epochs=1, limit_train_batches=7, log_every_n_steps=4)
    trainer.fit(model, digits)
    torch.testing.assert_close(
        trainer.callback_metrics["train/loss"], torch.stack(model.kept[4 * len(model.unit_names) :]).mean()
    )


def test_accuracy_counts_every_sample_once(make_trainer):
    class Fixed(nn.Module):
        def forward(self, x):
            return x[:, 0, 0, :10]

    torch.manual_seed(1)
    x, y = torch.randn(25, 1, 1, 10), torch.arange(25) % 10
    model = Backprop(backbone=Fixed(), num_classes=10, input_shape=(1, 1, 10))
    result = make_trainer(limit_test_batches=1.0).test(
        model, DataLoader(TensorDataset(x, y), batch_size=8), verbose=False
    )
    expected = (x[:, 0, 0].argmax(1) == y).float().mean().item()
    assert result[0]["test/acc"] == pytest.approx(expected)
    assert result[0]["test/loss"] == pytest.approx(nn.functional.cross_entropy(x[:, 0, 0], y).item(), rel=1e-5)


class Breaking(SFF):
    """Goes wrong after four steps."""

    broken = torch.nan

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 4:
            with torch.no_grad():
                self.net.heads[1].classes.weight.fill_(self.broken)


def test_a_loss_that_is_not_finite_names_the_block_and_keeps_the_checkpoint(make_trainer, digits, tmp_path):
    model = make(Breaking)
    model.broken = torch.inf
    trainer = make_trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    with pytest.raises(FloatingPointError, match=r"block 1 \(2\) became (nan|inf) in epoch 1"):
        trainer.fit(model, digits)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_checkpoint_is_not_written_over_with_weights_that_are_not_finite(make_trainer, digits, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    trainer = make_trainer(max_epochs=3, log_every_n_steps=1000, enable_checkpointing=True, callbacks=[keep])
    with pytest.raises(FloatingPointError, match=r"weights of block 1 \(2\) are not finite after step 5.* untouched"):
        trainer.fit(make(Breaking), digits)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_loss_that_is_not_finite_is_noticed_before_validation(make_trainer, digits):
    model = make()
    nn.init.constant_(model.net.heads[0].classes.weight, torch.nan)
    with pytest.raises(FloatingPointError, match=r"block 0 \(0\)"):
        make_trainer(log_every_n_steps=1000, num_sanity_val_steps=0).fit(model, digits)


def test_backprop_goes_on_from_what_sff_trained(make_trainer, digits, tmp_path):
    trainer = make_trainer()
    sff = SFF(**SHAPE, granularity="layer")
    trainer.fit(sff, digits)
    trainer.save_checkpoint(tmp_path / "sff.ckpt")
    arguments = {"weights": str(tmp_path / "sff.ckpt"), "norm": "layer", "granularity": "layer"}
    joined = Backprop(**SHAPE, **arguments).eval()
    x = torch.randn(4, 1, 8, 8)
    (*_, features) = sff.eval().net.local_features(x)
    expected = joined.net.classifier(features.mean((2, 3)))
    torch.testing.assert_close(joined(x), expected)
    before = weights(joined)
    make_trainer().fit(joined.train(), digits)
    assert all(not torch.equal(p, before[key]) for key, p in joined.named_parameters()), "end to end"


@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_probe_trains_the_last_layer_alone(norm, make_trainer, digits):
    model = Backprop(**SHAPE, probe=True, norm=norm)
    before = weights(model)
    make_trainer().fit(model, digits)
    moved = {
        key for key, value in before.items() if key.startswith("net.") and not torch.equal(value, weights(model)[key])
    }
    assert len(moved) == 2
    assert all("classifier" in key for key in moved)
