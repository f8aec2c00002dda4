"""Self-contrastive Forward-Forward: the loss against closed forms, turns of the layers, and that it learns."""

import re
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ff_lightning import SCFF, data, views
from ff_lightning.local.contrast import ContrastNet, contrast_loss, convolutional_layers, dense_layers, goodness
from ff_lightning.local.probes import accuracy, features_of, fit_probe

SHAPE = {"input_shape": (1, 8, 8)}
CONV = {"channels": [6, 8], "kernels": [5, 3], "pools": ["max4", "avg2"], "readout_pools": [2, 1], **SHAPE}
RECURRENT = {"widths": None, "recurrent": 6, "input_shape": (3, 5)}


def make(**arguments):
    torch.manual_seed(0)
    return SCFF(**{"widths": [20, 16], **SHAPE, **arguments})


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one, two):
    assert all(torch.equal(value, two[key]) for key, value in one.items())


# ------------------------------------------------------------------------------------------------------ equations


def by_hand(x):
    """Each sample less its mean, over its deviation."""
    flat = x.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(x)


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_the_output_of_a_pair_is_the_sum_of_both(kind):
    torch.manual_seed(0)
    a, b = torch.randn(5, 2, 8, 8), torch.randn(5, 2, 8, 8) * 3 + 1
    if kind == "dense":
        (layer,) = dense_layers(128, [7])
        both = by_hand(torch.cat([a.flatten(1), b.flatten(1)], 1)).unflatten(1, (2, 128))
    else:
        (layer,) = convolutional_layers(2, [7], 5)
        both = by_hand(torch.stack([F.pad(each, [2] * 4, mode="reflect") for each in (a, b)], 1))
    torch.testing.assert_close(layer.of_pairs(a, b), layer.linear(both[:, 0]) + layer.linear(both[:, 1]))
    torch.testing.assert_close(layer.of_pairs(a, a), 2 * layer(a))


def test_goodness_and_loss_are_those_of_the_paper():
    y = torch.tensor([[[[3.0, -1.0]], [[1.0, 2.0]]]])  # two channels, two positions
    assert goodness(y).tolist() == [[5.0, 2.0]]
    assert goodness(torch.tensor([[2.0, -2.0]])).tolist() == [[2.0]]
    plus, minus = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [900.0, 0.0]])
    expected = torch.log1p((2 - plus).exp()).mean() + F.softplus(minus - 3).mean() + 0.5 * (5 + 1) / 2
    torch.testing.assert_close(contrast_loss(plus, minus, (2.0, 3.0), 0.5), expected)


@pytest.mark.parametrize("pairs", [[True, False], [True, True]])
def test_the_losses_of_a_network_are_those_of_a_plain_loop(pairs):
    torch.manual_seed(0)
    layers = dense_layers(64, [12, 8])
    net = ContrastNet(layers, (1, 8, 8), [[1.0, 2.0], [0.5, 0.7]], [0.1, 0.0], pairs)
    x = torch.randn(6, 1, 8, 8)
    torch.manual_seed(1)
    found = [loss for _, loss in net.local_losses(x)]
    torch.manual_seed(1)
    a = x.flatten(1)
    plus, minus = a, None
    for k, (layer, (th1, th2), lam) in enumerate(zip(layers, net.thresholds, net.lam, strict=True)):
        if pairs[k]:
            other = plus.roll(int(torch.randint(1, 6, ())), 0)
            both = by_hand(torch.stack([plus, other], 1))
            minus = layer.linear(both[:, 0]) + layer.linear(both[:, 1])
            plus = 2 * layer.linear(by_hand(plus))
        else:
            plus, minus = layer.linear(by_hand(plus)), layer.linear(by_hand(minus))
        good, bad = (each.relu().square().mean(1) for each in (plus, minus))
        loss = F.softplus(th1 - good).mean() + F.softplus(bad - th2).mean() + lam * good.mean()
        torch.testing.assert_close(found[k], loss)
        gradients = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        assert all(
            torch.allclose(one, two, atol=1e-6)
            for one, two in zip(gradients, torch.autograd.grad(found[k], list(layer.parameters())), strict=True)
        )
        plus, minus = ((each - each.mean(1, keepdim=True)).relu().detach() for each in (plus, minus))


def one_by_one(cell, x):
    """The outputs of one sample (F, T), step by step, (T, U)."""
    state, found = torch.zeros(cell.hidden_size), []
    for t in range(x.shape[1]):
        inputs, states = cell.weight_ih @ x[:, t] + cell.bias_ih, cell.weight_hh @ state + cell.bias_hh
        found.append((inputs + states).relu())
        state = by_hand(found[-1].detach()[None])[0]
    return torch.stack(found)


def test_the_loss_of_a_recurrent_layer_is_that_of_a_plain_loop():
    model = make(**RECURRENT, lam=0.3)
    (layer,) = model.net.layers
    x = torch.randn(4, 3, 5)
    torch.manual_seed(1)
    ((_, found),) = model.net.local_losses(x)
    torch.manual_seed(1)
    other = x.roll(int(torch.randint(1, 4, ())), 0)
    plus, minus = (
        torch.stack([
            torch.cat([one_by_one(layer.forth, each), one_by_one(layer.back, each.flip(1)).flip(0)], 1)
            for each in total
        ]).square().mean(2)
        for total in (x + x, x + other)
    )  # fmt: skip
    loss = F.softplus(0 - plus).mean() + F.softplus(minus - 1).mean() + 0.3 * plus.norm(dim=1).mean()
    torch.testing.assert_close(found, loss)
    parameters = list(layer.parameters())
    for one, two in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(found, parameters), strict=True):
        torch.testing.assert_close(one, two)


def test_a_recurrent_layer_passes_no_gradient_through_time_and_stops_where_a_sample_ends():
    model = make(**RECURRENT)
    (layer,) = model.net.layers
    x = torch.randn(2, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, :, 2].sum(), x)
    assert gradient.abs().sum((0, 1)).gt(0).tolist() == [False, False, True, False, False]
    seen = model.representation(x)
    for number, one in enumerate(2 * x):
        ends = torch.stack([one_by_one(layer.forth, one)[-1], one_by_one(layer.back, one.flip(1))[-1]])
        torch.testing.assert_close(seen[number], by_hand(ends).flatten())
    torch.testing.assert_close(model.representation(F.pad(x, (0, 3))), seen)


def test_no_gradient_crosses_a_border():
    model = make(**{**CONV, "widths": None})
    losses = [loss for _, loss in model.net.local_losses(torch.randn(4, 1, 8, 8))]
    losses[1].backward()
    assert all(p.grad is None for p in model.net.layers[0].parameters())
    assert all(p.grad is not None for p in model.net.layers[1].parameters())


def test_a_readout_sees_each_layer_standardised():
    model = make(**{**CONV, "widths": None})
    x = torch.randn(3, 1, 8, 8)
    seen = model.representation(x)
    assert seen.shape == (3, 6 * 2 * 2 + 8 * 2 * 2)
    for part in seen.split([24, 32], 1):
        torch.testing.assert_close(part.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(1, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert not seen.requires_grad
    torch.testing.assert_close(model.representation(x * 9 - 4), seen, atol=1e-3, rtol=1e-3)


def test_shifted_views_are_windows_of_the_image():
    x = torch.arange(2 * 36.0).view(2, 1, 6, 6)
    one, other = views.shifts(x.repeat(200, 1, 1, 1))
    padded = F.pad(x, [2] * 4, mode="replicate")
    for number in (0, 1):
        windows = {
            tuple(padded[number, 0, i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)
        }
        assert {tuple(view.flatten().tolist()) for view in one[number::2]} <= windows
        assert len({tuple(view.flatten().tolist()) for view in one[number::2]}) == 25
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("arguments", [{"epochs": [1, 2]}, {}, {**CONV, "widths": None, "views": "shifts"}])
def test_both_modes_end_in_the_same_weights(arguments, make_trainer, digits):
    ends = []
    for optimization in ("manual", "automatic"):
        model = make(**arguments, optimization=optimization, lr=[0.01, 0.002])
        trainer = make_trainer(max_epochs=3)
        trainer.fit(model, digits)
        assert trainer.global_step == 9
        ends.append(weights(model))
    assert_same(*ends)


def test_layers_below_are_frozen_bit_by_bit(make_trainer, digits):
    model = make(epochs=[1, 1])
    states = [weights(model)]

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append(weights(pl_module))

    make_trainer(max_epochs=3, callbacks=[Keep()]).fit(model, digits)
    moved = [
        [not torch.equal(one[f"net.layers.{k}.linear.weight"], two[f"net.layers.{k}.linear.weight"]) for k in (0, 1)]
        for one, two in pairwise(states)
    ]
    assert moved == [[True, False], [False, True], [False, True]]


def test_rates_and_decays_are_those_of_the_layer(make_trainer, digits):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make(lr=[0.01, 0.002], weight_decay=[0.1, 0.0]), digits)
    groups = [optimizer.param_groups[0] for optimizer in trainer.optimizers]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.002])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(optimization, make_trainer, tmp_path):
    def run(**settings):
        model = make(epochs=[1, 1], views="shifts", optimization=optimization)
        keep = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=5)  # in the turn of the second layer
        trainer = make_trainer(max_epochs=2, limit_train_batches=1.0, limit_val_batches=0, callbacks=[keep],
                               enable_checkpointing=True)  # fmt: skip
        trainer.fit(model, data.Digits(batch_size=400), **settings)  # three batches an epoch
        return weights(model)

    assert_same(run(), run(ckpt_path=tmp_path / "mid.ckpt"))


def test_the_file_is_read_again(make_trainer, digits, tmp_path):
    model, trainer = (
        make(**{**CONV, "widths": None}, thresholds=[[1.0, 2.0], [3.0, 4.0]], lr=[0.01, 0.02]),
        make_trainer(),
    )
    trainer.fit(model, digits)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = SCFF.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model.eval().representation(x), again.eval().representation(x))
    assert (again.net.thresholds, again.rates) == ([[1.0, 2.0], [3.0, 4.0]], [0.01, 0.02])


@pytest.mark.parametrize(
    ("optimization", "arguments"), [("manual", {}), ("automatic", {}), ("manual", RECURRENT), ("automatic", RECURRENT)]
)
def test_labels_are_not_looked_at(optimization, arguments, make_trainer):
    x = torch.randn(30, *arguments.get("input_shape", (1, 8, 8)))
    ends = []
    for samples in (x, [(image, -1.5) for image in x]):
        model = make(optimization=optimization, **arguments)
        trainer = make_trainer(limit_train_batches=1.0)
        loader = DataLoader(samples, batch_size=10)
        trainer.fit(model, loader, loader)
        assert "val/loss" in trainer.callback_metrics
        assert "val/loss" not in (trainer.test(model, loader, verbose=False)[0])
        ends.append(weights(model))
        assert torch.cat(trainer.predict(model, loader)).shape == (20, 12 if arguments else 36)
    assert_same(*ends)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_single_sample_that_is_left_over_changes_nothing(optimization, accumulate, make_trainer):
    x = torch.randn(21, 1, 8, 8)
    ends = []
    for number in (20, 21):
        of_trainer, of_model = ({"accumulate_grad_batches": accumulate}, {}) if optimization == "automatic" else (
            {}, {"accumulate": accumulate})  # fmt: skip
        model = make(optimization=optimization, **of_model)
        trainer = make_trainer(limit_train_batches=1.0, max_epochs=1, limit_val_batches=1.0, num_sanity_val_steps=0,
                               **of_trainer)  # fmt: skip
        loader = DataLoader(x[:number], batch_size=10)
        torch.manual_seed(3)
        trainer.fit(model, loader, loader)
        assert trainer.callback_metrics["val/loss"].isfinite()
        ends.append(weights(model))
    assert_same(*ends)


@pytest.mark.parametrize("arguments", [{}, RECURRENT])
def test_a_batch_of_one_has_nothing_to_be_compared_with(arguments, make_trainer):
    loader = DataLoader(torch.randn(4, *arguments.get("input_shape", (1, 8, 8))), batch_size=1)
    with pytest.raises(ValueError, match="the batch holds one: give another batch_size"):
        make_trainer().fit(make(**arguments), loader)
    with pytest.raises(ValueError, match="the batch holds one: give another batch_size"):
        make_trainer().validate(make(**arguments), loader, verbose=False)


def test_it_learns_without_labels(make_trainer):
    images = data.Digits(batch_size=32, augment=False)
    images.setup("fit")
    found = []
    for epochs in (0, 15):
        model = make(widths=[30, 30], epochs=[10, 5], lr=0.01)
        if epochs:
            make_trainer(max_epochs=epochs, limit_train_batches=1.0, limit_val_batches=0).fit(model, images)
        probe = fit_probe(*features_of(model, images.train_dataloader()), 10)
        found.append(accuracy(probe, *features_of(model, images.val_dataloader())))
    untrained, trained = found
    assert trained > max(0.88, untrained + 0.03), found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": [[1.0, 2.0]]}, r"thresholds=\[\[1.0, 2.0\]\]: must be 2, one for each layer"),
        ({"thresholds": [4.0, 6.0]}, "thresholds: 4.0 must be two numbers"),
        ({"thresholds": [[1.0, -2.0], [1.0, 1.0]]}, "thresholds=-2.0: must be at least 0"),
        ({"lam": [0.1]}, r"lam=\[0.1\]: must be 2, one for each layer"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"pairs": [False, True]}, "the first layer has nothing else to learn from"),
        ({"pairs": [True]}, r"pairs=\[True\]: must be 2"),
        ({"views": "shift"}, "did you mean 'shifts'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"epochs": [1]}, r"epochs=\[1\]: must be 2"),
        ({"epochs": [1, 0]}, "epochs=0: must be at least 1"),
        ({"epochs": [1, 1], "lr_scheduler": "cosine"}, "lr_scheduler='cosine' lasts for the whole run"),
        ({"lr": [0.1, 0.1, 0.1]}, "lr=.*must be 2, one for each layer"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"channels": [4]}, "give one of them"),
        ({"widths": [0]}, "widths=0: must be at least 1"),
        ({**CONV, "widths": None, "pools": "mean2"}, "pools='mean2': must be 'none'"),
        ({**CONV, "widths": None, "kernels": 4}, "kernels=4: must be odd"),
        ({**CONV, "widths": None, "kernels": [3]}, r"kernels=\[3\]: must be 2"),
        ({**CONV, "widths": None, "kernels": 17}, r"input_shape=\(1, 8, 8\) does not fit the layers"),
        ({**CONV, "widths": None, "input_shape": (20,)}, r"input_shape=\(20,\) does not fit the layers"),
        ({"views": "shifts", "input_shape": (20,)}, "views='shifts' moves images"),
        ({**RECURRENT, "input_shape": (3,)}, r"input_shape=\(3,\): recurrent=6 needs samples \(features, steps\)"),
        ({**RECURRENT, "recurrent": 0}, "recurrent=0: must be at least 1"),
        ({**RECURRENT, "widths": [4]}, r"widths=\[4\] and recurrent=6: give one of them"),
        ({**RECURRENT, "views": "shifts"}, "views='shifts' moves images"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_run_that_is_too_short_is_told_so(make_trainer, digits):
    with pytest.warns(UserWarning, match=re.escape("epochs=[3, 1]: a run of 1 epochs, and not 4")):
        make_trainer(max_epochs=1).fit(make(epochs=[3, 1]), digits)
