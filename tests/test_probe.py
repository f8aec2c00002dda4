"""Linear probes: beside a run, and after it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ff_lightning import FF, SCFF, SFF, Backprop, CwC, LocalLearner, cli, data
from ff_lightning.backbones import cfse
from ff_lightning.callbacks import OnlineProbe
from ff_lightning.cli import main
from ff_lightning.local.probes import LinearProbe, features_of, final_probe, fit_probe
from tests.conftest import small_net

ROOT = Path(__file__).parents[1]
SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
METHODS = {
    "SFF": lambda: SFF(small_net(), **SHAPE),
    "Backprop": lambda: Backprop(small_net(), **SHAPE),
    "FF": lambda: FF(widths=[12, 12], **SHAPE),
    "CwC": lambda: CwC(cfse(10, 1, (20, 20)), **SHAPE),
    "SCFF": lambda: SCFF(widths=[12, 12], input_shape=(1, 8, 8)),
}


def make(name):
    torch.manual_seed(0)
    return METHODS[name]()


@pytest.mark.parametrize("name", METHODS)
def test_the_model_ends_as_without_a_probe(name, make_trainer, digits):
    ends = []
    for callbacks in ([], [OnlineProbe()]):
        model, trainer = make(name), make_trainer(callbacks=callbacks)
        trainer.fit(model, data.Digits(batch_size=16))
        ends.append(model.state_dict())
        if callbacks:
            assert {"val/probe_acc", "train/probe_loss"} <= trainer.callback_metrics.keys()
            logged = trainer.test(model, digits, verbose=False)[0]
            assert 0 <= logged["test/probe_acc"] <= 1
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_its_steps_are_those_of_a_plain_loop(make_trainer):
    model = SFF(small_net(norm=False), **SHAPE)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(3)]
    online = OnlineProbe(lr=0.01)
    plain, features = LinearProbe(12, 10), []

    class Watch(OnlineProbe):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            features.append(pl_module.eval().representation(batch[0]).detach())
            pl_module.train()

    make_trainer(max_epochs=1, callbacks=[Watch(), online]).fit(model, DataLoader(batches, batch_size=None))
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for seen, (_, y) in zip(features, batches, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(plain(seen), y).backward()
        optimizer.step()
    for one, two in zip(plain.parameters(), online.probe.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_checkpoint_keeps_it(make_trainer, tmp_path):
    ends = []
    for stop in (None, 1):
        model, online = make("SCFF"), OnlineProbe()
        trainer = make_trainer(max_epochs=stop or 2, callbacks=[online])
        trainer.fit(model, data.Digits(batch_size=16))
        if stop:
            trainer.save_checkpoint(tmp_path / "one.ckpt")
            assert torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]
            model, online = make("SCFF"), OnlineProbe()
            trainer = make_trainer(max_epochs=2, callbacks=[online])
            trainer.fit(model, data.Digits(batch_size=16), ckpt_path=tmp_path / "one.ckpt")
        ends.append([*online.probe.state_dict().values(), trainer.callback_metrics["val/probe_acc"]])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_what_cannot_be_probed_is_said(make_trainer, digits):
    class Featureless(LocalLearner):
        def __init__(self):
            super().__init__(**SHAPE)
            self.set_units({"one": [nn.Linear(2, 2)]})

    with pytest.raises(ValueError, match="reads `representation`: Featureless has none"):
        make_trainer(callbacks=[OnlineProbe()]).fit(Featureless(), digits)
    images = [torch.randn(8, 1, 8, 8)] * 3
    labelled = DataLoader([(images[0], torch.arange(8))], batch_size=None)
    with pytest.raises(ValueError, match="a probe reads classes"):
        make_trainer(callbacks=[OnlineProbe(num_classes=3)]).fit(make("SCFF"), DataLoader(images, batch_size=None))
    with pytest.raises(ValueError, match="num_classes of OnlineProbe is missing"):
        make_trainer(callbacks=[OnlineProbe()]).fit(make("SCFF"), labelled)
    with pytest.raises(ValueError, match=r"lr=0: must be above 0"):
        OnlineProbe(lr=0)
    with pytest.raises(ValueError, match="there is no sample to probe"):
        features_of(make("SFF"), [])
    with pytest.raises(ValueError, match=r"decays=\[\]"):
        final_probe(make("SFF"), [(images[0], torch.arange(8))], [(images[0], torch.arange(8))], None, 10, [])
    with pytest.raises(ValueError, match=r"decay=0.0: must be above 0"):
        fit_probe(torch.randn(4, 3), torch.arange(4), 4, decay=0.0)


def test_it_is_the_minimum():
    torch.manual_seed(0)
    y = torch.randint(3, (600,))
    x = torch.randn(3, 20)[y] + 2 * torch.randn(600, 20)
    state = torch.random.get_rng_state()
    probe = fit_probe(x, y, 3, decay=1e-3)
    assert torch.equal(torch.random.get_rng_state(), state)
    inputs = ((x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).double()
    weight, bias = probe.linear.weight.double(), probe.linear.bias.double()
    excess = (inputs @ weight.T + bias).softmax(1) - F.one_hot(y, 3)
    assert (excess.T @ inputs / 600 + 1e-3 * weight).abs().max() < 1e-4, "its gradient, from the closed form"
    assert excess.mean(0).abs().max() < 1e-4
    again = fit_probe(x, y, 3, decay=1e-3, start=fit_probe(x, y, 3, decay=1.0))
    torch.testing.assert_close(again.linear.weight, probe.linear.weight, atol=5e-3, rtol=0)


def test_the_penalty_is_chosen_on_validation_samples(make_trainer):
    images = data.Digits(batch_size=64)
    images.setup("fit")
    images.setup("test")
    model = make("SCFF")
    loaders = [list(loader()) for loader in (images.train_dataloader, images.val_dataloader, images.test_dataloader)]
    found = final_probe(model, *loaders, 10, [1.0, 1e-3])
    single = [final_probe(model, *loaders, 10, [decay]) for decay in (1.0, 1e-3)]
    assert found.val == max(each.val for each in single)
    assert (found.decay, found.test) == (1e-3, pytest.approx(single[1].test, abs=0.01))
    assert model.training


def test_the_command_probes_trained_and_untrained_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/scff/digits.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml"),
          "--trainer.enable_progress_bar", "false", "--model.epochs", "[6, 3]", "--trainer.max_epochs", "9",
          "--model.widths", "[30, 30]"])  # fmt: skip
    assert "validation accuracy of the probe" in capsys.readouterr().out
    (path,) = Path().rglob("last.ckpt")
    main(["probe", "--ckpt_path", str(path), "--decays", "0.001"])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    trained, untrained, gain = ([float(cell) for cell in row[3:5]] for row in rows)
    assert trained[1] - untrained[1] == pytest.approx(gain[1], abs=0.011)
    assert gain[1] > 2
    main(["probe", "--ckpt_path", str(path), "--decays", "0.1", "--no_test"])
    assert "│      │" in capsys.readouterr().out
    lines = []
    monkeypatch.setattr(cli, "rank_zero_info", lines.append)
    main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1", "--trainer.logger", "false"])
    assert lines == [f"SCFF learns without labels; for an accuracy: ff-lightning probe --ckpt_path {path}"]
