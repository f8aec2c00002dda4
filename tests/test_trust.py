"""Nothing runs by being named in a checkpoint; what the user names himself is used."""

import contextlib
import sys
import warnings
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningDataModule

from ff_lightning import SFF, Backprop, LocalLearner, data
from ff_lightning.training.factories import to_factory
from ff_lightning.training.trust import check_stored, named_class
from tests.test_cli import DIGITS, QUICK, checkpoint, run

QUIET = [*QUICK[:8], "--trainer.logger", "false"]
MODEL, DATA = "hyper_parameters", "datamodule_hyper_parameters"
TOUCH = {"class_path": "os.system", "init_args": {"command": "touch RAN"}}

EVIL = """
import pathlib
import torch
pathlib.Path("RAN").touch()
class Evil(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
def make(*args, **kwargs):
    return Evil()
"""

OWN = """
import torch
from ff_lightning import SFF, GoodnessHead
from ff_lightning.data import Digits
class Head(GoodnessHead):
    pass
class Numbers(Digits):
    pass
class Method(SFF):
    pass
class Network(torch.nn.Sequential):
    def __init__(self, width: int = 4):
        super().__init__(
            torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10),
        )
def make_head(channels: int, classes: int) -> GoodnessHead:
    return Head(channels, classes)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of a run of the command line, and of one from Python."""
    folder = tmp_path_factory.mktemp("written")
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else pytest.MonkeyPatch.context() as patch:
        if patch is not None:
            patch.chdir(folder)
        run(*DIGITS, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1)
    return torch.load(checkpoint(folder), weights_only=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder that holds what an attacker could put beside a checkpoint, and a user's own module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("evil.py").write_text(EVIL)
    Path("evil.yaml").write_text("class_path: evil.Evil\n")
    Path("ownmodule.py").write_text(OWN)
    yield
    for name in ("evil", "ownmodule"):
        sys.modules.pop(name, None)


def forge(written, part=None, argument=None, value=None, drop=()):
    """A checkpoint that says something else of an argument."""
    forged = dict(written)
    if part:
        forged[part] = {**written[part], argument: value}
        for name in drop:
            forged[part].pop(name)
        if part == MODEL:
            forged["ff_lightning"] = {**written.get("ff_lightning", {}), "arguments": forged[part]}
    torch.save(forged, "forged.ckpt")
    return "forged.ckpt"


WAYS = {
    **{f"{name} calls": (MODEL, name, TOUCH) for name in ("optimizer", "lr_scheduler", "head", "backbone")},
    **{f"{name} imports": (MODEL, name, "evil.Evil") for name in ("optimizer", "lr_scheduler", "head")},
    "head imports a class": (MODEL, "head", {"class_path": "evil.Evil"}),
    "head is a function": (MODEL, "head", "os.kill"),
    "head is a partial": (MODEL, "head", {"class_path": "functools.partial", "init_args": {"func": "os.system"}}),
    "head through another module": (MODEL, "head", {"class_path": "torch.os.system"}),
    "head through another module, longer": (MODEL, "head", {"class_path": "torch.nn.modules.module.functools.partial"}),
    "head of another kind": (MODEL, "head", {"class_path": "subprocess.Popen", "init_args": {"args": "touch RAN"}}),
    "backbone imports": (MODEL, "backbone", {"class_path": "evil.Evil"}),
    "backbone as YAML": (MODEL, "backbone", '{"cl\\u0061ss_path": "evil.Evil"}'),
    "backbone in a file": (MODEL, "backbone", "evil.yaml"),
    "backbone in a list": (MODEL, "backbone", "- evil.Evil"),
    "within a head": (MODEL, "head", {"class_path": "ff_lightning.PooledHead", "init_args": {"width": TOUCH}}),
    "within a backbone": (
        MODEL,
        "backbone",
        {"class_path": "torchvision.models.resnet.ResNet", "init_args": {"block": "evil.Evil", "layers": [1, 1, 1, 1]}},
    ),
    "in a list": (MODEL, "train_blocks", [TOUCH]),
    "name with a point": (MODEL, "head.class_path", "evil.Evil"),
    "unknown argument": (MODEL, "anything", TOUCH),
    "model": (MODEL, "_class_path", "evil.Evil"),
    "model is a function": (MODEL, "_class_path", "os.system"),
    "model is a file": (MODEL, "_class_path", "evil.yaml"),
    "data": (DATA, "_class_path", "evil.Evil"),
    "data is a network": (DATA, "_class_path", "torch.nn.Linear"),
    "argument of data": (DATA, "root", {"class_path": "evil.Evil"}),
}


def nothing_ran():
    return not Path("RAN").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("way", WAYS)
def test_a_forged_checkpoint_runs_nothing_on_the_command_line(way, written, place):
    with pytest.raises(SystemExit, match=r"^error: the checkpoint names what no checkpoint may name: .*\n.*\n$"):
        run("test", "--ckpt_path", forge(written, *WAYS[way]), *QUIET)
    assert nothing_ran()


@pytest.mark.parametrize("subcommand", ["fit", "validate", "predict"])
@pytest.mark.parametrize("way", ["optimizer calls", "head imports a class", "data"])
def test_a_forged_checkpoint_runs_nothing_in_any_subcommand(subcommand, way, written, place):
    with pytest.raises(SystemExit, match=r"^error: the checkpoint names what"):
        run(subcommand, "--ckpt_path", forge(written, *WAYS[way]), *QUIET)
    assert nothing_ran()


@pytest.mark.parametrize("by_cli", [True, False], ids=["written by the command line", "written from Python"])
@pytest.mark.parametrize("way", WAYS)
def test_a_forged_checkpoint_runs_nothing_in_python(way, by_cli, written, place):
    part, argument, value = WAYS[way]
    if argument == "_class_path" and not by_cli:
        pytest.skip("not read")
    drop = () if by_cli else ("_instantiator", "_class_path")
    path = forge(written, part, argument, value, drop)
    cls = SFF if part == MODEL else data.Digits
    with pytest.raises((ValueError, TypeError, AttributeError)):  # text is no class then: it is a wrong value
        cls.load_from_checkpoint(path)
    assert nothing_ran()


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_the_keys_of_old_checkpoints_are_no_way_in(key, written, place):
    torch.save({**written, key: {"head": TOUCH}, MODEL: {}}, "forged.ckpt")
    with pytest.raises(ValueError, match=r"head: class_path='os\.system' is not a subclass of"):
        SFF.load_from_checkpoint("forged.ckpt", num_classes=10, input_shape=(1, 8, 8))
    assert nothing_ran()


def test_other_models_and_other_instantiators_are_no_way_in(written, place):
    for cls in (Backprop, LocalLearner):
        with pytest.raises(ValueError, match=r"optimizer: class_path='os\.system'"):
            cls.load_from_checkpoint(forge(written, *WAYS["optimizer calls"], drop=("_class_path",)))
    with pytest.raises(ValueError, match=r"names _instantiator='os\.system'"):
        SFF.load_from_checkpoint(forge(written, MODEL, "_instantiator", "os.system"))
    torch.save({**written, "hparams_name": "head", MODEL: TOUCH}, "forged.ckpt")
    with pytest.raises(ValueError, match="names what no checkpoint may name"):
        SFF.load_from_checkpoint("forged.ckpt")
    assert nothing_ran()


def test_a_trainer_makes_nothing_of_what_a_checkpoint_names(written, place, make_trainer, digits):
    model = SFF(num_classes=10, input_shape=(1, 8, 8))
    make_trainer().test(model, digits, ckpt_path=forge(written, *WAYS["optimizer calls"]))
    assert nothing_ran()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TOUCH, r"class_path='os\.system' is not a subclass of Module"),
        ({"class_path": "os.kill"}, "is not a subclass of Module"),
        ({"class_path": "torch.optim.SGD"}, "is not a subclass of Module"),
        ({"class_path": "evil.Evil"}, "is not imported: import evil first"),
        ({"class_path": "torch.nn.Nothing"}, "cannot be imported"),
        ({"class_path": "evil"}, "is not imported"),
        ({"class_path": 3}, "is not imported"),
        ({"class_path": "torch.nn.Linear", "init_args": "touch"}, "init_args='touch' must be a dict"),
    ],
)
def test_a_class_path_in_python_obeys_the_same_rules(value, message, place):
    with pytest.raises(ValueError, match=f"head: .*{message}"):
        to_factory("head", value, torch.nn.Module)
    assert nothing_ran()


# ----------------------------------------------------------------------------------------- what may be named


def test_classes_of_torch_and_of_modules_that_are_imported(written, place):
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}
    path = forge(written, MODEL, "optimizer", sgd)
    run("test", "--ckpt_path", path, *QUIET)
    assert SFF.load_from_checkpoint(path).hparams["optimizer"]["init_args"]["momentum"] == 0.5
    sys.modules.pop("lightning.pytorch.demos.mnist_datamodule", None)
    check_stored(
        "data", {"_class_path": "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"}, LightningDataModule
    )


@pytest.mark.parametrize(
    ("part", "argument", "value", "given"),
    [
        (MODEL, "head", {"class_path": "ownmodule.Head"}, ["--model.head", "ownmodule.Head"]),
        (MODEL, "head", "ownmodule.make_head", ["--model.head", "ownmodule.make_head"]),
        (MODEL, "_class_path", "ownmodule.Method", ["--model", "ownmodule.Method"]),
        (DATA, "_class_path", "ownmodule.Numbers", ["--data", "ownmodule.Numbers"]),
    ],
)
def test_what_the_command_line_names_is_used(part, argument, value, given, written, place):
    path = forge(written, part, argument, value)
    name = value["class_path"] if isinstance(value, dict) else value
    with pytest.raises(SystemExit, match=rf"class_path='{name}' is not imported: import ownmodule first.*{given[0]} "):
        run("validate", "--ckpt_path", path, *QUIET)
    assert "ownmodule" not in sys.modules
    with contextlib.suppress(SystemExit):  # another head than that of the weights
        run("validate", "--ckpt_path", path, *QUIET, *given)
    assert "ownmodule" in sys.modules


def test_own_classes_of_a_run_are_used_again_when_a_config_names_them(place):
    Path("own.yaml").write_text(
        "model: {class_path: ownmodule.Method, init_args: {head: ownmodule.make_head, "
        "backbone: {class_path: ownmodule.Network}}}\ndata: {class_path: ownmodule.Numbers}\n"
    )
    run(*DIGITS, "--config", "own.yaml")
    path = checkpoint(".")
    sys.modules.pop("ownmodule")
    with pytest.raises(SystemExit, match="import ownmodule first"):
        run("test", "--ckpt_path", path, *QUIET)
    assert "test accuracy" in run("test", "--config", "own.yaml", "--ckpt_path", path, *QUIET)


def test_text_that_only_looks_like_a_class_is_text(written, place, image_folder):
    granular = forge(written, MODEL, "granularity", ["block1", "block2"])
    run("validate", "--ckpt_path", granular, *QUIET)
    run("validate", "--ckpt_path", forge(written, DATA, "root", "evil.Evil"), *QUIET)
    assert nothing_ran()


# -------------------------------------------------------------------------- what a run with own classes stores


def test_a_run_of_the_command_line_is_loaded_as_it_was_stored(place, make_trainer, digits):
    run(
        *(*DIGITS, "--model.optimizer", "SGD", "--model.optimizer.momentum", "0.5", "--model.lr", "0.001"),
        *("--model.head", "ownmodule.Head", "--model.head.depth", "0", "--model.lr_scheduler", "StepLR"),
        *("--model.lr_scheduler.step_size", "1", "--model.backbone", "ownmodule.Network", "--model.backbone.width", 5),
    )
    path = checkpoint(".")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = SFF.load_from_checkpoint(path)
        stored = torch.load(path, weights_only=True)
        assert dict(model.hparams) == stored[MODEL]
        assert stored[MODEL]["head"]["init_args"]["depth"] == 0
        assert stored[MODEL]["backbone"] == {"class_path": "ownmodule.Network", "init_args": {"width": 5}}
        assert model.make_optimizer([torch.zeros(1, requires_grad=True)], lr=1).defaults["momentum"] == 0.5
        assert all(torch.equal(value, stored["state_dict"][key]) for key, value in model.state_dict().items())
        path, trainer = "again.ckpt", make_trainer(limit_train_batches=1, max_epochs=1)
        trainer.fit(model, digits)
        trainer.save_checkpoint(path)


def test_a_network_made_by_a_function_of_ours_is_made_again(place, make_trainer):
    run(*DIGITS, "--model.backbone", "ff_lightning.backbones.mlp", "--model.backbone.in_features", 64,
        "--model.backbone.widths", "[20, 30]")  # fmt: skip
    path = checkpoint(".")
    model = SFF.load_from_checkpoint(path)
    assert [block.map_shape for block in model.net.blocks] == [(20,), (30,)]
    assert "test accuracy" in run("test", "--ckpt_path", path, "--trainer.logger", "false")
    make_trainer(max_epochs=1, limit_train_batches=1).fit(model, data.Digits())
    assert model.hparams["backbone"]["init_args"]["widths"] == [20, 30]


@pytest.mark.parametrize("path", ["ff_lightning.backbones.cfse", "ff_lightning.backbones.text.text"])
def test_functions_that_make_networks_may_be_named(path):
    assert callable(named_class("backbone", path, (torch.nn.Module,)))
    with pytest.raises(ValueError, match="is not a subclass of Optimizer"):
        named_class("optimizer", path, (torch.optim.Optimizer,))


@pytest.mark.parametrize(
    "path",
    ["ff_lightning.backbones.build_backbone", "torchvision.models.get_model", "torch.hub.load", "torch.load",
     "torchvision.models.resnet18", "torchvision.models.detection.fcos_resnet50_fpn", "ff_lightning.local.ffnet.mlp"],
)  # fmt: skip
def test_other_functions_may_not(path):
    with pytest.raises(ValueError, match="is not a subclass of Module"):
        named_class("backbone", path, (torch.nn.Module,))


def test_what_another_command_line_makes_of_a_class_is_stored():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFF, "model", fail_untyped=False)
    head = {"class_path": "ff_lightning.GoodnessHead", "init_args": {"depth": 0}}
    config = parser.parse_object({"model": {"num_classes": 10, "head": head}})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not stored")
        model = parser.instantiate_classes(config).model
    assert model.hparams["head"]["class_path"] == "ff_lightning.heads.squared.GoodnessHead"
    assert model.hparams["head"]["init_args"]["depth"] == 0


def test_data_of_the_command_line_is_loaded_as_it_was_stored(written, place):
    path = forge(written, DATA, "batch_size", 7)
    loaded = data.Digits.load_from_checkpoint(path)
    assert loaded.batch_size == 7
    assert dict(loaded.hparams) == torch.load(path, weights_only=True)[DATA]


def test_load_from_checkpoint_is_for_classes(written, place):
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        SFF(num_classes=10).load_from_checkpoint(forge(written))


# --------------------------------------------------------------------------------------------------------- elsewhere


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("RAN"),)


def test_a_checkpoint_at_a_url_is_read_without_its_code(written, place, served, make_trainer, digits):
    folder, url = served
    torch.save(written, folder / "last.ckpt")
    torch.save({**written, "callbacks": Runs()}, folder / "evil.ckpt")
    run("test", "--ckpt_path", f"{url}/last.ckpt", *QUIET)
    assert SFF.load_from_checkpoint(f"{url}/last.ckpt").hparams["lr"] == written[MODEL]["lr"]
    model = SFF(num_classes=10, input_shape=(1, 8, 8))
    make_trainer().test(model, digits, ckpt_path=f"{url}/last.ckpt")
    with pytest.raises(SystemExit, match=r"evil\.ckpt' is no checkpoint, or holds more than tensors and plain values"):
        run("test", "--ckpt_path", f"{url}/evil.ckpt", *QUIET)
    for load in (
        lambda: SFF.load_from_checkpoint(f"{url}/evil.ckpt"),
        lambda: make_trainer().test(model, digits, ckpt_path=f"{url}/evil.ckpt"),
    ):
        with pytest.raises(Exception, match="Weights only load failed"):
            load()
    assert nothing_ran()


def test_a_file_that_is_trusted_may_bring_code(written, place):
    torch.save({**written, "callbacks": Runs()}, "own.ckpt")
    SFF.load_from_checkpoint("own.ckpt", weights_only=False)
    assert Path("RAN").exists()
