"""Forward-Forward: views and thresholds against closed forms, the module against a plain loop."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ff_lightning import FF, LocalNet, data, views
from ff_lightning.callbacks import Thresholds
from ff_lightning.cli import main
from ff_lightning.local.ffnet import FFNet, PassThroughReLU, mlp

ROOT = Path(__file__).parents[1]
SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def one_hot(*classes, k=3):
    return F.one_hot(torch.tensor(classes), k).float()


class TestLabels:
    def test_overlay_writes_the_range_of_the_sample_over_its_first_values(self):
        x = torch.rand(2, 1, 2, 4) * 5 - 1
        seen = views.overlay(x, one_hot(0, 2))
        low, high = x.flatten(1).amin(1), x.flatten(1).amax(1)
        assert torch.equal(seen[:, 0, 0, :3].argmax(1), torch.tensor([0, 2]))
        torch.testing.assert_close(seen[:, 0, 0, :3].amax(1), high)
        torch.testing.assert_close(seen[:, 0, 0, :3].amin(1), low)
        assert torch.equal(seen.flatten(1)[:, 3:], x.flatten(1)[:, 3:])
        neutral = views.overlay(x, torch.full((2, 3), 1 / 3))
        torch.testing.assert_close(neutral[:, 0, 0, :3], (low + (high - low) / 3)[:, None].expand(2, 3))

    def test_concat_puts_it_in_front(self):
        x = torch.rand(2, 5)
        assert torch.equal(views.concat(x, one_hot(1, 2)), torch.cat([one_hot(1, 2), x], 1))

    def test_map_is_a_wave_of_its_own_for_each_class(self):
        x = torch.rand(4, 2, 8, 8)
        seen = views.label_map(x, torch.cat([one_hot(0, 1, k=2), torch.full((2, 2), 0.5)]))
        assert torch.equal(seen[:, :2], x)
        wave = torch.cos(torch.arange(8) * math.pi / 2)
        torch.testing.assert_close(seen[0, 2], wave.expand(8, 8))  # angle 0: along the columns
        torch.testing.assert_close(seen[1, 2], wave[:, None].expand(8, 8), atol=1e-5, rtol=0)  # a right angle
        torch.testing.assert_close(seen[2, 2], (seen[0, 2] + seen[1, 2]) / 2)

    @pytest.mark.parametrize("label", ["overlay", "concat", "map"])
    def test_the_shape_is_the_one_that_is_told(self, label):
        seen = views.PLACEMENTS[label](torch.rand(2, 3, 4, 4), one_hot(0, 1))
        assert tuple(seen.shape[1:]) == views.labelled_shape(label, (3, 4, 4), 3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("overlay", (1, 3, 3), 9), "9 labels leave nothing of the 9 values.*'concat'"),
            (("map", (30,), 9), r"label='map' is for images.*\(30,\)"),
            (("overlai", (1, 3, 3), 2), "did you mean 'overlay'"),
        ],
    )
    def test_no_room(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            views.labelled_shape(*arguments)


class TestNegatives:
    @pytest.mark.parametrize("k", [2, 5])
    def test_uniform_ones_are_all_other_classes_alike(self, k):
        y = torch.arange(k).repeat_interleave(4000)
        wrong = views.wrong_labels(y, k)
        counts = torch.zeros(k, k).index_put((y, wrong), torch.ones(len(y)), accumulate=True) / 4000
        assert counts.diagonal().sum() == 0
        torch.testing.assert_close(counts, (1 - torch.eye(k)) / (k - 1), atol=0.05, rtol=0)

    def test_hard_ones_follow_the_soft_max_of_the_other_classes(self):
        scores = torch.tensor([5.0, 0.0, math.log(3.0)]).expand(20000, 3)
        wrong = views.hard_labels(torch.zeros(20000, dtype=torch.long), scores)
        torch.testing.assert_close(
            wrong.bincount(minlength=3) / 20000, torch.tensor([0, 0.25, 0.75]), atol=0.02, rtol=0
        )
        two = views.hard_labels(torch.tensor([0, 1]), torch.tensor([[900.0, -900.0]] * 2))
        assert two.tolist() == [1, 0], "of two classes the other one, however unlikely"

    def test_a_blur_is_the_binomial_one(self):
        masks = torch.zeros(1, 1, 9, 9)
        masks[..., 4, :] = 1
        assert views.blurred_masks(masks, 1).sum() == 0, "a line of one pixel has a half at most: it goes"
        masks[..., 3:6, :] = 1
        assert torch.equal(views.blurred_masks(masks, 1), masks), "[1/4, 3/4, 1, 3/4, 1/4] above a half"
        ones = torch.ones(1, 1, 4, 4)
        assert torch.equal(views.blurred_masks(ones, 6), ones), "nothing comes in at the border"

    def test_a_hybrid_has_each_pixel_from_one_of_two_images(self):
        x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 16, 16) + torch.rand(1, 1, 16, 16) / 2
        mixed = views.hybrids(x)
        sources = mixed.floor().flatten(1)
        for k, row in enumerate(sources):
            found = set(row.tolist())
            assert len(found) == 2, "two images, not more"
            assert k in found
        torch.testing.assert_close(mixed - mixed.floor(), (x - x.floor()))

    @pytest.mark.parametrize(
        ("shape", "message"), [((4, 9), r"images.*\(4, 9\)"), ((1, 1, 4, 4), "another batch_size")]
    )
    def test_hybrids_need_images_and_two_of_them(self, shape, message):
        with pytest.raises(ValueError, match=message):
            views.hybrids(torch.rand(shape))


def network(**arguments):
    torch.manual_seed(0)
    return FFNet(mlp(64, [12, 8]), 10, (1, 8, 8), **arguments)


class TestNet:
    @pytest.mark.parametrize("goodness", ["sum", "mean"])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_loss_is_the_one_of_the_paper(self, goodness, sign):
        net = network(goodness=goodness, sign=sign, theta=[0.5, 2.0], peer=0)
        x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
        torch.manual_seed(1)
        losses = list(net.local_losses(x, y))
        torch.manual_seed(1)
        h = views.overlay(torch.cat([x, x]), F.one_hot(torch.cat([y, views.wrong_labels(y, 10)]), 10).float()).flatten(
            1
        )
        for loss, layer, width, theta in zip(losses, (net.blocks[0], net.blocks[1]), (12, 8), (0.5, 2.0), strict=True):
            (linear,) = (module for module in layer.modules() if isinstance(module, nn.Linear))
            h = h / h.square().mean(1, keepdim=True).sqrt()
            h = linear(h.detach()).relu()
            of_a_feature = h.square().sum(1) - theta * width
            logit = sign * of_a_feature / (width if goodness == "mean" else 1)
            torch.testing.assert_close(loss, torch.cat([F.softplus(-logit[:6]), F.softplus(logit[6:])]).mean())

    def test_the_peer_term_is_the_variance_of_running_means_and_reaches_units_that_are_off(self):
        net = network(peer=1.0)
        objective, (linear,) = net.objectives[0], [m for m in net.blocks[0].modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            linear.bias[0] = -100.0
        features = PassThroughReLU()(linear(torch.rand(4, 64)))
        means = 0.9 * 0.5 + 0.1 * features[:2].mean(0)
        with_peer = objective.loss(features, torch.tensor([1.0, 1, 0, 0]))
        torch.testing.assert_close(objective.activity, means)
        objective.peer = 0.0
        without = objective.loss(features, torch.tensor([1.0, 1, 0, 0]))
        torch.testing.assert_close(with_peer - without, means.var(correction=0))
        with_peer.backward(retain_graph=True)
        assert linear.bias.grad[0] < 0, "a step raises the unit that is always off"
        linear.zero_grad()
        without.backward()
        assert linear.bias.grad[0] == 0

    def test_goodness_is_that_of_each_label_in_turn(self):
        net = network()
        x = torch.rand(5, 1, 8, 8)
        goodness = net.goodness(x)
        assert goodness.shape == (2, 5, 10)
        for label in range(10):
            h = net.with_label(x, torch.full((5,), label))
            for k, logits in enumerate(LocalNet.local_goodness(net, h)):
                torch.testing.assert_close(logits, goodness[k, :, label])

    def test_inputs_have_mean_square_1(self):
        seen = network().with_label(torch.rand(3, 1, 8, 8) * 100)
        torch.testing.assert_close(seen.square().flatten(1).mean(1), torch.ones(3))

    def test_hard_negatives_are_what_the_readout_confuses(self):
        net = network(negatives="hard")
        x, y = torch.rand(50, 1, 8, 8), torch.zeros(50, dtype=torch.long)
        with torch.no_grad():
            net.readout.weight.zero_()
            net.readout.bias.copy_(torch.tensor([9.0, 0, 0, 9.0, 0, 0, 0, 0, 0, 0]))
        both, kind = net.pairs(x, y)
        assert torch.equal(both[kind == 0], net.with_label(x, torch.full((50,), 3)))

    def test_the_blocks_that_count(self):
        net, x = network(voters=[1]), torch.rand(3, 1, 8, 8)
        assert torch.equal(net(x), net.goodness(x)[1])

    def test_an_export_answers_alike(self):
        net, x = network(), torch.rand(3, 1, 8, 8)
        assert torch.equal(net.export()(x), net(x))
        program = torch.export.export(net.export(), (x,), strict=False)
        torch.testing.assert_close(program.module()(x), net(x))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"theta": [1.0]}, r"theta=\[1.0\]: must be 2, one for each block"),
            ({"theta": [1.0, 1.0, 1.0]}, "must be 2, one for each block"),
            ({"theta": -1.0}, "theta=-1.0: must be above 0"),
            ({"sign": 0}, "sign=0: must be 1 or -1"),
            ({"goodness": "max"}, "goodness='max'"),
            ({"peer": -1}, "peer=-1"),
            ({"negatives": "uniforme"}, "did you mean 'uniform'"),
            ({"voters": [2]}, r"voters=\[2\]: the blocks are 0 to 1"),
            ({"readout_from": 2}, "readout_from=2: the blocks are 0 to 1"),
            ({"label": "concat"}, r"label='concat' makes samples of shape \(74,\), which the network does not take"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            network(**arguments)


@pytest.mark.parametrize("label", ["concat", "map"])
def test_labels_beside_the_input_are_learnt(label, make_trainer):
    """Only the label tells positive from negative data here: the input is noise around the mean of its class."""
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    shape = (20,) if label == "concat" else (1, 6, 6)
    centres = torch.randn(3, *shape)
    loader = DataLoader(TensorDataset(centres[y] + 0.3 * torch.randn(300, *shape), y), batch_size=30)
    net = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    backbone = {"backbone": net} if label == "map" else {"widths": [60, 60]}
    model = FF(**backbone, label=label, num_classes=3, input_shape=shape, goodness="mean", lr=0.5)
    trainer = make_trainer(max_epochs=12, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val/acc"] > 0.9
    assert trainer.callback_metrics["val/readout_acc"] > 0.9


def test_hybrids_are_learnt_without_labels(make_trainer):
    images = data.Digits(batch_size=32, augment=False)
    model = FF(widths=[60, 60], negatives="hybrid", task="Unlabelled", input_shape=(1, 8, 8))
    trainer = make_trainer(max_epochs=4, limit_train_batches=20)
    images.setup("fit")
    loaders = [DataLoader(torch.cat([x for x, _ in loader]), batch_size=32) for loader in
               (images.train_dataloader(), images.val_dataloader())]  # fmt: skip
    before = trainer.validate(model, loaders[1], verbose=False)[0]["val/loss"]
    trainer.fit(model, *loaders)
    assert trainer.callback_metrics["val/loss"] < before / 2
    with_labels = FF(widths=[60, 60], negatives="hybrid", **SHAPE, lr=1e-2)
    trainer = make_trainer(max_epochs=5, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(with_labels, images)
    logged = trainer.callback_metrics
    assert logged["val/acc"] == logged["val/readout_acc"] > 0.7
    with pytest.raises(ValueError, match="negatives='uniform' are wrong labels: without labels give 'hybrid'"):
        FF(task="Unlabelled", input_shape=(1, 8, 8))


def test_the_readout_has_a_rate_of_its_own_and_trains_nothing_else(make_trainer, digits):
    model = FF(widths=[20, 20], **SHAPE, readout_lr=0.3, readout_decay=0.2, lr_scheduler="constant")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    groups = [optimizer.param_groups[0] for optimizer in trainer.optimizers]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.3]
    assert [group["weight_decay"] for group in groups] == [3e-4, 3e-4, 0.2]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in model.net.readout.parameters()}
    assert not model.net.states(torch.rand(2, 1, 8, 8)).requires_grad


def test_thresholds_move_are_logged_and_are_in_the_checkpoint(make_trainer, digits, tmp_path):
    model = FF(widths=[20, 20], **SHAPE)
    trainer = make_trainer(
        max_epochs=5, callbacks=[Thresholds([0.2, 0.4], rate=1.5, every=2)], logger=CSVLogger(tmp_path)
    )
    trainer.fit(model, digits)
    assert trainer.callback_metrics["train/block01_theta"] == pytest.approx(0.4 * 1.5**2)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    again = FF.load_from_checkpoint(tmp_path / "five.ckpt")
    assert [o.theta.item() for o in again.net.objectives] == pytest.approx([0.2 * 1.5**2, 0.4 * 1.5**2])
    with pytest.raises(ValueError, match=r"multiplier=\[0.1\]: must be 2, one for each block"):
        make_trainer(callbacks=[Thresholds([0.1])]).fit(model, digits)


def test_greedy_layers_are_trained_one_after_the_other(make_trainer, digits):
    from ff_lightning.callbacks import GreedyBlocks

    model = FF(widths=[20, 20], **SHAPE)
    seen = []

    class Watch(GreedyBlocks):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append([p.clone() for p in pl_module.net.blocks.parameters()])

    make_trainer(max_epochs=2, callbacks=[Watch(1)]).fit(model, digits)
    first, second = seen
    assert torch.equal(first[0], second[0]), "layer 0 had its turn"
    assert not torch.equal(first[2], second[2])


def test_a_model_brings_its_own_defaults_on_the_command_line(capsys):
    for name, expected in (
        ("FF", ["lr_scheduler: cosine", "backbone: null"]),
        ("Backprop", ["optimization: automatic"]),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--model", name, "--print_config"])
        printed = capsys.readouterr().out
        assert all(line in printed for line in expected)


def test_hybrids_pass_over_a_single_image_that_an_epoch_ends_with(make_trainer):
    images = DataLoader(TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9)), batch_size=4)
    trainer = make_trainer(max_epochs=1, limit_train_batches=1.0)
    trainer.fit(FF(widths=[10, 10], negatives="hybrid", **SHAPE), images)
    assert trainer.global_step == 3, "batches"


def test_the_plain_network_begins_with_the_weights_of_a_file(tmp_path):
    first = FF(widths=[20, 20], num_classes=10, input_shape=(1, 8, 8))
    torch.save({"state_dict": first.state_dict(), "pytorch-lightning_version": "2.5.0"}, tmp_path / "first.ckpt")
    again = FF(widths=[20, 20], num_classes=10, input_shape=(1, 8, 8), weights=str(tmp_path / "first.ckpt"))
    for one, other in zip(first.net.blocks.parameters(), again.net.blocks.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"weights='nowhere\.ckpt': must be a file"):
        FF(widths=[20, 20], num_classes=10, input_shape=(1, 8, 8), weights="nowhere.ckpt")
