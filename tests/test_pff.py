"""Predictive Forward-Forward: a step against the equations with dense matrices, the module by what a run must do."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

import ff_lightning
from ff_lightning import PFF, data, views
from ff_lightning.cli import main
from ff_lightning.local.pffnet import PFFNet

ROOT = Path(__file__).parents[1]
SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def network(units=(20, 10), **arguments):
    torch.manual_seed(0)
    return PFFNet(64, 10, units, **{"steps": 1, "noise": 0.0, **arguments})


def dense_lateral(layer):
    """The authors' matrix: L' = relu(L) M (1 - I) - relu(L) I, with the whole L of N x N and a mask M of blocks."""
    matrix = torch.block_diag(*layer.lateral)
    eye = torch.eye(len(matrix))
    return matrix.relu() * (1 - eye) - matrix.relu() * eye


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


class Identity(torch.autograd.Function):
    """A ReLU whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, z):
        return z.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def naive_losses(net, x, y, wrong):
    """The losses of the first step as the authors' code has them, from start states, with a latent of 0."""
    relu = Identity.apply
    one, two = net.layers
    x = x.flatten(1)
    x = (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    x, labels = torch.cat([x, x]), F.one_hot(torch.cat([y, wrong]), 10).float()
    z1 = relu(unit(x) @ one.up.weight.T + one.up.bias).detach()
    z2 = relu(unit(z1) @ two.up.weight.T + two.up.bias).detach()
    a = unit(x) @ one.up.weight.T + unit(z2) @ one.down.weight.T - z1 @ dense_lateral(one) + one.up.bias
    b = unit(z1) @ two.up.weight.T + 5 * labels @ two.down.weight.T - z2 @ dense_lateral(two) + two.up.bias
    new1, new2 = 0.7 * relu(a) + 0.3 * z1, 0.7 * relu(b) + 0.3 * z2
    losses = []
    for z in (new1, new2):
        logit = net.sign * (z.square().sum(1) - 10)
        losses.append(torch.cat([F.softplus(-logit[: len(y)]), F.softplus(logit[len(y) :])]).mean())
    new1, new2 = new1.detach(), new2.detach()
    drawn0 = (unit(new1) @ one.predict.weight.T).clamp(0, 1)
    drawn1 = relu(unit(new2) @ two.predict.weight.T)
    losses[0] = losses[0] + (drawn0 - x).square().sum(1).mean()
    losses[1] = losses[1] + (drawn1 - new1).square().sum(1).mean() + new2.square().sum(1).mean()
    return losses


class TestNet:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_step_is_that_of_the_equations(self, sign):
        net = network(sign=sign)
        net.generative_noise = 0.0
        x, y = torch.rand(6, 1, 8, 8) * 3 - 1, torch.arange(6)
        torch.manual_seed(1)
        (losses,) = net.local_losses(x, y)
        torch.manual_seed(1)
        expected = naive_losses(net, x, y, views.wrong_labels(y, 10))
        for loss, naive in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss, naive)
        parameters = [*net.layers.parameters()]
        for gradients in zip(*(torch.autograd.grad(sum(each), parameters) for each in (losses, expected)), strict=True):
            torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)

    def test_no_gradient_crosses_a_layer(self):
        net = network(units=(20, 10, 20), steps=2)
        units = [[p for module in modules for p in module.parameters()] for modules in net.units().values()]
        assert {id(p) for own in units for p in own} == {id(p) for p in net.parameters()} - {
            id(p) for p in net.readout.parameters()
        }
        for losses in net.local_losses(torch.rand(4, 1, 8, 8), torch.arange(4)):
            for k, loss in enumerate(losses):
                for other, own in enumerate(units):
                    found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
                    assert all((gradient is not None) == (other == k) for gradient in found)
        assert not net.representation(torch.rand(2, 1, 8, 8)).requires_grad, "the read-out trains itself alone"

    @pytest.mark.parametrize("sign", [1, -1])
    def test_training_moves_activity_by_the_sign(self, sign):
        net = network((40, 40), sign=sign, generative=False, steps=3)
        x, y = torch.rand(50, 1, 8, 8), torch.arange(50) % 10
        optimizer = torch.optim.Adam(net.layers.parameters(), lr=0.003)
        for _ in range(60):
            for losses in net.local_losses(x, y):
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
        activity = sign * net.goodness(x)[1]  # of the last layer, less theta
        assert sign * (activity[range(50), y].mean() - activity.mean()) > 0.05

    def test_goodness_is_that_of_each_label_in_turn_in_the_middle_of_settling(self):
        net, x = network(steps=6), torch.rand(5, 1, 8, 8)
        goodness = net.goodness(x)
        assert goodness.shape == (2, 5, 10)
        for label in range(10):
            states, seen = net.start(net.scaled(x)), []
            for _ in range(4):
                states = net.step(states, net.scaled(x), F.one_hot(torch.full((5,), label), 10).float())
                seen.append([10 - state.square().sum(1) for state in states])
            for k in range(2):
                torch.testing.assert_close(goodness[k, :, label], (seen[2][k] + seen[3][k]) / 2)

    def test_a_latent_does_not_depend_on_the_others_of_its_batch_and_predicts_better_from_step_to_step(self):
        net = network()
        states = net.start(net.scaled(torch.rand(8, 1, 8, 8)))[-1].detach()
        latent, errors = torch.zeros(8, 20), []
        for _ in range(8):
            latent = net.move_latent(latent, states)
            errors.append(float((net.predict_top(latent) - states).square().sum().detach()))
        assert errors == sorted(errors, reverse=True)
        alone = net.move_latent(torch.zeros(1, 20), states[:1])
        torch.testing.assert_close(alone, net.move_latent(torch.zeros(8, 20), states)[:1])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"units": (20, 15)}, r"units=\(20, 15\): 15 is no multiple of groups=10"),
            ({"units": ()}, r"units=\(\): must be a list"),
            ({"units": (20, 0.5)}, "units=0.5: must be a whole number"),
            ({"steps": 0}, "steps=0: must be at least 1"),
            ({"groups": 0}, "groups=0: must be at least 1"),
            ({"theta": 0}, "theta=0: must be above 0"),
            ({"alpha": 1}, "alpha=1: must be at least 0 and below 1"),
            ({"noise": -1}, "noise=-1"),
            ({"label_gain": 0}, "label_gain=0"),
            ({"generative": "no"}, "generative='no'"),
            ({"sign": 0}, "sign=0: must be 1 or -1"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            network(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimization": "automatic"}, "optimization='automatic': PFF takes a step after each of its 12 steps"),
        ({"accumulate": 2}, "accumulate=2: PFF takes a step after each of its 12 steps"),
        ({"task": "MultiLabel"}, "task=MultiLabel: PFF tries the labels of classes"),
        ({"readout_lr": 0}, "readout_lr=0"),
    ],
)
def test_what_cannot_work_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        PFF(units=[20, 20], **SHAPE, **arguments)


def test_gradients_are_cut_unless_told_otherwise():
    settings = [(model.clip_value, model.clip_norm) for model in (make(), make(clip_norm=0.5), make(clip_value=2.0))]
    assert settings == [(1.0, None), (None, 0.5), (2.0, None)]


def make(**arguments):
    torch.manual_seed(0)
    return PFF(**{"units": [20, 20], "steps": 3, **SHAPE, **arguments})


def test_every_stage_and_a_checkpoint(make_trainer, digits, tmp_path):
    model, trainer = make(), make_trainer()
    trainer.fit(model, digits)
    assert trainer.global_step == 6, "a batch is a step of the run, however many steps the states take"
    keys = {"acc", "loss", "reconstruction", "readout_acc", "block00_acc", "block01_acc"}
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        assert {f"{stage}/{key}" for key in keys} == set(run(model, digits, verbose=False)[0])
    assert torch.cat(trainer.predict(model, digits)).shape == (32, 10)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again, x = PFF.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True), torch.randn(4, 1, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))
    assert torch.equal(model.sample(5, seed=3), again.sample(5, seed=3))
    assert not torch.equal(model.sample(5, seed=3), model.sample(5, seed=4))
    predictor = ff_lightning.load(tmp_path / "model.ckpt")
    assert predictor is not None


def test_the_reconstruction_is_a_share_of_the_error_of_an_empty_image(make_trainer, digits):
    model, trainer = make(), make_trainer(limit_val_batches=1.0)
    logged = trainer.validate(model, digits, verbose=False)[0]["val/reconstruction"]
    shares, sizes = [], []
    for x, _ in digits.val_dataloader():
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        image = (x - low) / (high - low)
        shares.append((model.reconstruct(x) - image).square().sum() / image.square().sum() * len(x))
        sizes.append(len(x))
    assert logged == pytest.approx(float(sum(shares)) / sum(sizes)), "mean over the batches"


def test_without_a_generative_circuit(make_trainer, digits):
    model, trainer = make(generative=False), make_trainer()
    trainer.fit(model, digits)
    assert "val/reconstruction" not in trainer.callback_metrics
    for draw in (lambda: model.sample(2), lambda: model.reconstruct(torch.rand(2, 1, 8, 8))):
        with pytest.raises(ValueError, match="generative=False"):
            draw()


def test_samples_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="label=None: 0 samples were trained on, 10 are needed"):
        make().sample(2)
    with pytest.raises(ValueError, match="label=10: must be a class from 0 to 9"):
        make().sample(2, label=10)
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        make().sample(0)


def test_a_resumed_run_ends_in_the_same_weights(make_trainer, digits, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    whole = make()
    make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(whole, digits)
    resumed = make()
    torch.manual_seed(5)
    make_trainer(max_epochs=2).fit(resumed, data.Digits(batch_size=16), ckpt_path=tmp_path / "epoch=0.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_the_config_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/pff/digits.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml"),
          "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "5",
          "--model.units", "[100, 100]", "--model.steps", "4", "--model.lr", "0.003"])  # fmt: skip
    (path,) = tmp_path.rglob("last.ckpt")
    model = PFF.load_from_checkpoint(path)
    images = data.Digits(batch_size=100)
    images.setup("validate")
    x, y = (torch.cat(parts) for parts in zip(*images.val_dataloader(), strict=True))
    scores = model.eval().scores(x)
    assert (model.vote(scores).argmax(1) == y).float().mean() > 0.75, "all labels; logistic regression: 95"
    assert (scores[-1].argmax(1) == y).float().mean() > 0.85, "one pass"
    error, empty = model.net.reconstruction_error(x)
    assert error / empty < 0.25
    drawn = torch.cat([model.sample(20, label=k) for k in range(10)])
    answers = model.net.readout_scores(drawn).argmax(1)
    assert (answers == torch.arange(10).repeat_interleave(20)).float().mean() > 0.4, "samples look like their class"


def test_in_float16_each_update_is_unscaled_by_the_scale_of_its_backward(make_trainer, digits):
    ends = []
    for interval in (1, 10**9):  # a scale that is doubled after every step, and one that stays
        torch.manual_seed(0)
        model = PFF([20, 20], **SHAPE, steps=3, noise=0.0, optimizer=torch.optim.SGD, lr=0.01, clip_value=None)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=interval)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        make_trainer(max_epochs=1, limit_train_batches=1, plugins=plugin).fit(model, digits)
        ends.append([p.detach().clone() for p in model.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_fit_after_a_validation(make_trainer, digits):
    model, trainer = PFF([20, 20], **SHAPE, steps=2), make_trainer(max_epochs=1)
    trainer.validate(model, digits, verbose=False)
    trainer.fit(model, digits)
    assert 0 < trainer.callback_metrics["val/reconstruction"] < 2
