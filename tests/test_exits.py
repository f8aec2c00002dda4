"""Early exit: what leaves where, and that it is answered as the network cut off there would answer."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ff_lightning import EarlyExit, LocalNet
from ff_lightning.cli import main
from ff_lightning.local.exits import RULES, margin, multiply_adds
from ff_lightning.local.ffnet import FFNet, mlp
from tests.conftest import small_net

ROOT = Path(__file__).parents[1]


def local_net(**arguments):
    torch.manual_seed(0)
    return LocalNet(small_net(), 10, "layer", input_shape=(1, 8, 8), **arguments).eval()


def ff_net(**arguments):
    torch.manual_seed(0)
    return FFNet(mlp(64, [12, 8, 8]), 10, (1, 8, 8), **arguments).eval()


NETS = {
    "LocalNet": local_net,
    "export": lambda: local_net(vote="depth").export(),
    "voters": lambda: ff_net(voters=[1, 2]),
    "FF": ff_net,
}


@pytest.mark.parametrize("rule", [*RULES, lambda scores: -scores.std(1)])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_each_sample_leaves_at_the_first_block_that_is_sure(make, rule):
    net = make()
    x = torch.rand(40, 1, 8, 8)
    exiting = EarlyExit(net, rule).calibrate([torch.rand(30, 1, 8, 8), (torch.rand(30, 1, 8, 8), "labels")])
    scores, exits = exiting.answers_and_exits(x)
    with torch.no_grad():
        goodness = net.goodness(x)
    sure = exiting.rule if callable(rule) else RULES[rule]
    for i in range(len(x)):
        answers = [net.decide(goodness[: k + 1, i : i + 1]) for k in range(len(net.blocks))]
        left = next((k for k, at in enumerate(exiting.thresholds) if sure(answers[k]) >= at), len(net.blocks) - 1)
        assert exits[i] == left
        torch.testing.assert_close(scores[i], answers[left][0], atol=1e-4, rtol=1e-4)
    assert 0 < exits.float().mean() < len(net.blocks) - 1


def test_only_those_that_are_not_sure_go_on():
    net, seen = local_net(), []
    for block in net.blocks:
        block.register_forward_hook(
            lambda module, args, out: seen.append(len(args[0][0] if isinstance(args[0], tuple) else args[0]))
        )
    exiting = EarlyExit(net).calibrate([torch.rand(40, 1, 8, 8)])
    seen.clear()
    exits = exiting.exits(torch.rand(20, 1, 8, 8))
    assert seen == [n for k in range(len(net.blocks)) if (n := int((exits >= k).sum()))]


def test_the_target_is_the_share_that_leaves():
    x = torch.rand(201, 1, 8, 8)
    for target in (0.3, 0.9):
        exits = EarlyExit(local_net(), target=target).calibrate([x]).exits(x)
        assert (exits == 0).float().mean() == pytest.approx(target, abs=0.01)


def test_the_thresholds_of_mean_std_are_those_of_the_predicted_class():
    net, x = ff_net(), torch.rand(50, 1, 8, 8)
    first = EarlyExit(net, "mean_std").calibrate([x]).thresholds[0]
    best = net.goodness(x)[0].amax(1)
    torch.testing.assert_close(first, best.mean() - best.std(correction=0))


def test_thresholds_are_in_the_state_dict():
    trained = EarlyExit(local_net()).calibrate([torch.rand(40, 1, 8, 8)])
    again = EarlyExit(local_net())
    again.load_state_dict(trained.state_dict())
    x = torch.rand(9, 1, 8, 8)
    assert torch.equal(trained(x), again(x))


def test_multiply_adds_are_those_of_the_layers():
    counts = multiply_adds(ff_net(), torch.rand(2, 1, 8, 8))
    assert counts == [10 * 64 * 12, 10 * (64 * 12 + 12 * 8), 10 * (64 * 12 + 12 * 8 + 8 * 8)]


def test_what_cannot_work_is_said():
    net, x = local_net(), torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"no thresholds yet: call calibrate\(batches\)"):
        EarlyExit(net)(x)
    for empty in ([], [x[:0]]):
        with pytest.raises(ValueError, match="no sample to calibrate on"):
            EarlyExit(net).calibrate(empty)
    with pytest.raises(ValueError, match="none of 4 samples leaves before the last block"):
        EarlyExit(net, lambda scores: scores.amax(1) * torch.nan).calibrate([x])
    with pytest.warns(UserWarning, match="single block"):
        one = LocalNet(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 2, input_shape=(4,))
    with pytest.raises(ValueError, match="single block"):
        EarlyExit(one)
    with pytest.raises(ValueError, match=r"rule='margins'.*did you mean 'margin'"):
        EarlyExit(net, "margins")
    with pytest.raises(ValueError, match=r"target=0\.5 has no effect on rule='mean_std'"):
        EarlyExit(net, "mean_std", 0.5)
    with pytest.raises(ValueError, match=r"target=1\.0: must be above 0 and below 1"):
        EarlyExit(net, target=1.0)
    with pytest.raises(ValueError, match="net=Linear: early exit is for networks whose blocks answer, a LocalNet"):
        EarlyExit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="all at once"):
        EarlyExit(ff_net(negatives="hybrid"))


def test_the_margin_is_that_of_the_two_best():
    assert margin(torch.tensor([[1.0, 5.0, 3.5]])).tolist() == [1.5]


def test_the_command_prints_each_depth_and_each_rule(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/ff/digits.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml"),
          "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "4"])  # fmt: skip
    (path,) = Path().rglob("last.ckpt")
    capsys.readouterr()
    main(["exits", "--ckpt_path", str(path), "--out", "exits.png", "--rules", "margin", "mean_std"])
    printed = capsys.readouterr().out
    assert "blocks 0 to 1" in printed
    assert "margin, target 0.95" in printed
    assert Path("exits.png").stat().st_size > 0
    rows = [line.split("│")[1:4] for line in printed.splitlines() if "margin" in line]
    shares = [float(row[2]) for row in rows]
    assert shares == sorted(shares, reverse=True), "the more leave, the less it costs"
    with pytest.raises(SystemExit):
        main(["exits", "--ckpt_path", "nothing.ckpt"])
