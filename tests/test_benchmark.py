import json
import os
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from ff_lightning import LocalNet
from ff_lightning.benchmark.__main__ import main
from ff_lightning.benchmark.fits import largest_batch
from ff_lightning.benchmark.frontier import FRONTIER, REFERENCES
from ff_lightning.benchmark.measure import Alive, Course, Result, _count, answer, measure, ratio_of_times, start
from ff_lightning.benchmark.report import print_table
from ff_lightning.benchmark.variants import Settings, build
from ff_lightning.util.memory import saved_for_backward

SETTINGS = Settings("cnn", "standard", 10, 4, 16, "paper", 2, 2, "cpu", "32", False)


def test_tensors_alive_are_counted_exactly():
    with Alive() as alive:
        a = torch.ones(100)
        b = a.view(10, 10) + 1  # a view takes no room
        a += 1
        del a
        assert alive.now == 400
        del b
    assert alive.now == 0
    assert max(alive.history) == 800


@pytest.mark.parametrize(
    "name",
    [name for name in FRONTIER if "reach" not in name]
    + ["sff 2", "sff block reach 0.9", "sff block reach 1.0", "sff block reach 0.9 recompute"],
)
def test_a_step_trains_every_parameter_and_leaves_no_gradient(name):
    variant = build(SETTINGS, name)
    before = [p.detach().clone() for p in variant.parameters]
    variant.step()
    assert all(not torch.equal(p, old) for p, old in zip(variant.parameters, before, strict=True))
    assert all(p.grad is None for p in variant.parameters)


def test_windows_come_back_in_a_step_to_where_they_were_and_train_as_the_loss_of_each_pass():
    variant = build(SETTINGS, "sff block reach 0.9")
    net = LocalNet(SETTINGS.model(), 10, "block", "paper", reach=0.9, input_shape=(3, 16, 16))
    x, y = SETTINGS.batch_of_noise()
    variant.step()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for _ in net.windows.placements:
        optimizer.zero_grad()
        net.loss(x, y).backward()
        optimizer.step()
    assert variant.passes == len(net.windows.placements) > 1
    of_net = [p for k in range(3) for p in net.block_parameters(k)]
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(variant.parameters, of_net, strict=True))
    _count(build(SETTINGS, "sff block reach 0.9"), mean := Result("", []))
    _count(build(SETTINGS, "sff block"), shortest := Result("", []))
    _count(build(SETTINGS, "sff block reach 1.0"), longest := Result("", []))
    assert shortest.operations < mean.operations < longest.operations


def test_gradients_of_a_window_are_alive_at_once():
    found = {}
    for name in ("backprop", "sff block", "sff block reach 1.0"):
        variant = build(SETTINGS, name)
        _count(variant, result := Result(name, []))
        found[name] = result.gradients
        total = sum(p.nbytes for p in variant.parameters)
        assert (result.gradients == total) == (name != "sff block")
    assert found["sff block"] < found["backprop"] < found["sff block reach 1.0"], "the heads have gradients, too"


def test_blocks_that_run_again_keep_less_and_do_more():
    plain, again = Result("plain", []), Result("again", [])
    _count(build(SETTINGS, "sff block reach 1.0"), plain)
    _count(build(SETTINGS, "sff block reach 1.0 recompute"), again)
    assert again.saved_peak < plain.saved_peak
    assert again.operations > plain.operations, "the first convolution runs twice"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sff block reach 0.1", "reach=0.1: block .* by itself keeps"),
        ("sff block reach", "may be 'reach R', 'head NAME', 'recompute'"),
        ("sff block recompute", "recompute=True has no effect"),
        ("backprop recompute", "may be 'reach R'"),
        ("sff block speed 3", "may be 'reach R', 'head NAME', 'recompute'"),
    ],
)
def test_a_variant_that_is_none_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        build(SETTINGS, name)


def test_saved_by_checkpointing_is_the_inputs_and_one_block():
    variant = build(SETTINGS, "checkpointing")
    blocks = variant.modules  # what is compiled: the blocks, one by one
    x, inputs, peak = torch.zeros(4, 3, 16, 16), 0, 0
    for block in blocks:
        with saved_for_backward(left_out=[*block.parameters(), x]) as saved:
            out = block(x)
        inputs += x.nbytes
        peak = max(peak, inputs + saved.now)
        x = out.detach().requires_grad_()
    assert variant.saved_peak() == peak


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_selective_checkpointing_gives_the_gradients_of_checkpointing_and_computes_no_product_again():
    gradients, operations = {}, {}
    for name in ("backprop", "selective", "checkpointing"):
        _count(build(SETTINGS, name), result := Result(name, []))
        operations[name] = result.operations
        variant = build(SETTINGS, name)
        for optimizer in variant.optimizers:
            optimizer.step = optimizer.zero_grad = lambda: None
        variant.step()
        gradients[name] = [p.grad for p in variant.parameters]
    assert operations["selective"] == operations["backprop"] < operations["checkpointing"]
    assert all(map(torch.allclose, gradients["selective"], gradients["checkpointing"]))


def test_saved_by_selective_checkpointing_is_the_inputs_the_products_and_the_rest_of_one_block():
    variant = build(SETTINGS, "selective")
    x, before, peak = torch.zeros(4, 3, 16, 16), 0, 0
    for block in variant.modules:
        products = []
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, args, out, note=products.append: note(out))
        with saved_for_backward(left_out=[*block.parameters(), x]) as saved:
            out = block(x)
        of_products = sum(product.nbytes for product in products)
        before += x.nbytes + of_products
        peak = max(peak, before + saved.now - of_products)
        x = out.detach().requires_grad_()
    assert variant.saved_peak() == peak


@pytest.mark.parametrize("limit", [0, 1, 3, 100, 4096])
def test_the_largest_batch_is_found_up_to_a_sixteenth_and_none_is_tried_twice(limit, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ff_lightning.benchmark.fits._fits",
        lambda settings, name, gib: asked.append(settings.batch) or 0 < settings.batch <= limit,
    )
    assert limit - limit // 16 <= largest_batch(SETTINGS, "backprop", 1) <= limit
    assert len(asked) == len(set(asked))


def die(pipe):
    os._exit(1)


def test_a_process_that_dies_is_noticed():
    pipe, _ = start(die)
    with pytest.raises(RuntimeError, match="the process of 'backprop' has ended: it may have run out of memory"):
        answer(pipe, "backprop")


@pytest.mark.slow
def test_less_memory_takes_a_smaller_batch_and_too_little_takes_none():
    half, quarter = (largest_batch(replace(SETTINGS, batch=256), "backprop", gib) for gib in (0.2, 0.1))
    assert 0 < quarter < half
    assert largest_batch(replace(SETTINGS, batch=1), "backprop", 1e-5) == 0


def test_the_course_of_a_step_is_a_mountain_and_a_saw_tooth():
    courses = {}
    for name in ("backprop", "sff block"):
        _count(build(SETTINGS, name), result := Result(name, []))
        kept = [size for _, size in result.course]
        assert max(kept) == result.saved_peak
        end, done = kept[-1], [count for count, _ in result.course]  # behind the step: the batch, running statistics
        assert done == sorted(done)
        assert done[-1] == result.operations
        courses[name] = sum(before > end >= after for before, after in pairwise(kept))
    assert courses == {"backprop": 1, "sff block": 3}, "how often all is let go: once, and behind each block"


def test_spread_is_half_the_distance_between_the_quartiles():
    assert Result("", [1.0, 2.0, 3.0]).median == 2.0
    assert Result("", [1.0, 2.0, 3.0]).spread == 0.5


def test_a_slow_spell_of_the_machine_does_not_change_a_ratio():
    ours, theirs = Result("", [1.0, 8.0, 1.2]), Result("", [2.0, 20.0, 2.0])
    assert ratio_of_times(ours, theirs) == 0.5


@pytest.mark.slow
def test_the_command_reports_every_variant(tmp_path, capsys):
    arguments = ["--backbone", "cnn", "--stem", "standard", "--batch", "4", "--input-size", "16", "--repetitions", "1",
                 "--steps", "1"]  # fmt: skip
    main([*arguments, "--granularity", "block", "--classes", "5", "--json", str(tmp_path / "figures.json"),
          "--plot", str(tmp_path / "memory.png")])  # fmt: skip
    assert (31, 119, 180) in Image.open(tmp_path / "memory.png").convert("RGB").getdata(), "the first curve, in blue"
    (run,) = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in run["results"]] == [*REFERENCES, "sff block"]
    plain, again, selective, parts, ours = run["results"]
    assert all(row["seconds"] and not row["skipped"] for row in run["results"])
    assert plain["operations"] == parts["operations"] == selective["operations"] < again["operations"]
    assert again["saved_peak"] < selective["saved_peak"] < plain["saved_peak"]
    assert plain["gradients"] == 4 * sum(p.numel() for p in build(SETTINGS, "backprop").parameters) - 4 * 5 * 129
    assert ours["saved_peak"] < plain["saved_peak"]
    assert "5 classes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_frontier_shows_what_each_way_to_train_takes_and_the_accuracies_of_runs(tmp_path, capsys, monkeypatch):
    some = ["backprop", "sff block", "sff block reach 0.9"]  # the others: see above
    monkeypatch.setattr("ff_lightning.benchmark.__main__.FRONTIER", some)
    for seed, value in enumerate((0.8, 0.9)):
        folder = tmp_path / f"runs/few/sff-{seed}"
        folder.mkdir(parents=True)
        record = {
            "figures": {"test/acc": value},
            "shown": ["acc"],
            "epochs": 1,
            "command": "",
            "date": "",
            "versions": "",
        }
        (folder / "run.json").write_text(json.dumps(record))
    main(["--backbone", "cnn", "--stem", "standard", "--batch", "4", "--input-size", "16", "--repetitions", "0",
          "--frontier", str(tmp_path / "frontier.svg"), "--accuracy", f"sff block={tmp_path}/runs/few/sff",
          ])  # fmt: skip
    printed, drawn = capsys.readouterr().out, (tmp_path / "frontier.svg").read_text()
    assert all(name in printed for name in some)
    assert "skipped" not in printed
    assert "SFF by block: 85.0 %" in drawn
    assert "operations of a step" in drawn, "nothing was timed"


@pytest.mark.slow
def test_a_variant_that_cannot_run_is_skipped_with_its_reason(capsys):
    results = measure(SETTINGS, ["model", "vote 99"], compiled=False, repetitions=1, steps=1)
    print_table((SETTINGS, results), SETTINGS.batch, Console(width=200))
    printed = capsys.readouterr().out
    assert "vote 99: skipped, ValueError: granularity=99" in printed
    assert "images/s" in printed
    assert "saved MB" not in printed, "nothing is counted in prediction"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--granularity", "blok"], "did you mean 'block'"),
        (["--granularity", "99"], "granularity=99"),
        (["--backbone", "resnet81"], "did you mean 'resnet18'"),
        (["--classes", "10", "1"], "num_classes=1"),
        (["--device", "nothing"], "nothing"),
        (["--batch", "0"], "at least 1"),
        (["--repetitions", "-1"], "at least 1"),
        (["--json", "nowhere/figures.json"], "nowhere/figures.json does not exist"),
        (["--frontier", "nowhere/frontier.png"], "nowhere/frontier.png does not exist"),
        (["--frontier", "f.png", "--what", "inference"], "--frontier: takes --what train"),
        (["--frontier", "f.png", "--compile"], "and no --compile"),
        (["--frontier", "f.txt"], "f.txt: must end in .svg or .png"),
        (["--plot", "f.jpg"], "f.jpg: must end in .svg or .png"),
        (["--frontier", "f.png", "--accuracy", "sff blok=runs/a/sff"], "must be VARIANT=RUNS/RECIPE/METHOD"),
        (["--frontier", "f.png", "--accuracy", "sff block=nowhere/a/sff"], "no finished run nowhere/a/sff-SEED"),
        (["--accuracy", "sff block=runs/a/sff"], "is drawn by --frontier FILE alone"),
    ],
)
def test_bad_arguments_end_the_command_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--backbone", "cnn", "--stem", "standard", *arguments])
    assert message in capsys.readouterr().err


def test_operations_of_own_functions_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from ff_lightning.heads.squared import class_goodness

    features, weight = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(3, 8, 1, 1, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        class_goodness(features, weight).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * (2 * 3 * 8 * 16)  # forward, again in backward, and two gradients


def test_operations_are_those_of_pytorchs_counter_and_what_is_kept_is_not_changed_by_counting_them():
    from torch.utils.flop_counter import FlopCounterMode

    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    net = LocalNet(nn.Sequential(stem, nn.Conv2d(8, 8, 3)), 10, "layer", input_shape=(3, 16, 16))
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    with saved_for_backward(net.parameters()) as saved, Course(saved) as course:
        net.loss(x, y).backward()
    with FlopCounterMode(display=False) as counter:
        net.loss(x, y).backward()
    with saved_for_backward(net.parameters()) as alone:
        net.loss(x, y).backward()
    assert course.operations == counter.get_total_flops()
    assert saved.peak == alone.peak


def test_plot_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--plot", "memory.png"])
    assert "pip install 'ff-lightning[plot]'" in capsys.readouterr().err


def test_micro_batches_are_of_one_size():
    with pytest.raises(ValueError, match="batch=6: must be a multiple of micro_batches=4"):
        build(replace(SETTINGS, batch=6, micro_batches=4), "accumulation")


@pytest.mark.slow
def test_what_cannot_be_compiled_is_skipped():
    results = {r.name: r for r in measure(SETTINGS, ["backprop", "selective"], compiled=True, repetitions=0, steps=1)}
    assert "compiled code may write over" in results["selective compiled"].skipped
    assert not results["selective"].skipped
