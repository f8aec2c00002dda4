"""Channel-wise competition: groups and losses against closed forms, windows, and that it learns."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from ff_lightning import SFF, CwC, EarlyExit, LocalNet, data
from ff_lightning.backbones import cfse
from ff_lightning.heads.groups import GroupHead
from ff_lightning.losses import GroupLoss

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


def small():
    torch.manual_seed(0)
    return cfse(10, 1, (20, 40, 40))


def test_goodness_is_the_mean_square_of_a_group():
    features = torch.randn(3, 6, 4, 5)
    expected = torch.stack([features[:, 2 * k : 2 * k + 2].square().mean((1, 2, 3)) for k in range(3)], 1)
    torch.testing.assert_close(GroupHead(6, 3)(features), expected)
    assert not list(GroupHead(6, 3).parameters())
    torch.testing.assert_close(GroupHead(6, 3)(features[..., 0, 0]), features[..., 0, 0].square().view(3, 3, 2).mean(2))


def test_losses_are_those_of_the_paper():
    g, y = torch.rand(5, 4) * 3, torch.tensor([0, 1, 2, 3, 0])
    true = g[range(5), y]
    others = torch.stack([(row.sum() - row[k]) / 3 for row, k in zip(g, y, strict=True)])
    ce = F.cross_entropy(g, y)
    pvn = (F.softplus(2 - true) + F.softplus(others - 2)).mean() / 2
    torch.testing.assert_close(GroupLoss("ce")(g, y), ce)
    torch.testing.assert_close(GroupLoss("pvn")(g, y), pvn)
    torch.testing.assert_close(GroupLoss("cwg")(g, y), 0.28 * ce + 0.72 * pvn)


def test_a_block_ends_behind_its_batch_norm_and_groups_stay_apart():
    net = LocalNet(small(), 10, "layer", "groups", "none", input_shape=(1, 8, 8))
    assert [block.map_shape for block in net.blocks] == [(20, 8, 8), (40, 4, 4), (40, 4, 4)]
    assert net.blocks[1].body.get_submodule("1.0").groups == 10
    assert not list(net.objectives.parameters())


def test_windows_say_which_block_learns_when(make_trainer, digits):
    model = CwC(small(), **SHAPE, windows=[[0, 1], [0, 2], [1, 2]])

    def weights():
        of_blocks = [model.net.blocks[k].body.state_dict()[f"{k}.0.weight"] for k in range(3)]
        return [weight.detach().clone() for weight in (*of_blocks, model.readout.weight)]

    states = [weights()]

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append(weights())

    make_trainer(max_epochs=3, callbacks=[Keep()]).fit(model, digits)
    moved = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(states)]
    assert moved == [[True, True, False, True], [False, True, True, True], [False, False, False, True]]
    assert model.net.trained == {0, 1, 2}, "a further run trains all of them"


def test_it_learns_and_leaves_early(make_trainer):
    torch.manual_seed(0)
    images = data.Digits(batch_size=32, augment=False)
    model = CwC(cfse(10, 1, (20, 80, 160)), **SHAPE)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, images)
    assert trainer.callback_metrics["val/acc"] > 0.8
    assert trainer.callback_metrics["val/readout_acc"] > 0.9
    x = torch.cat([batch[0] for batch in images.val_dataloader()])
    exits = EarlyExit(model.eval(), target=0.5).calibrate([x]).exits(x)
    assert (exits == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_what_cannot_work_is_said():
    with pytest.raises(ValueError, match="shares 32 channels out among 10 classes"):
        SFF("cnn", **SHAPE, head="groups")
    with pytest.raises(ValueError, match=r"channels=\[20, 25\]: 25 is no multiple of the 10 classes"):
        cfse(10, 1, (20, 25))
    with pytest.raises(ValueError, match=r"windows=\[\[0, 1\]\]: must be 3, one for each block"):
        CwC(small(), **SHAPE, windows=[[0, 1]])
    with pytest.raises(ValueError, match=r"\[2, 1\] is no pair"):
        CwC(small(), **SHAPE, windows=[[0, 1], [2, 1], [0, 1]])
    with pytest.raises(ValueError, match="loss='pwn'"):
        CwC(small(), **SHAPE, loss="pwn")
