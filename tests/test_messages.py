"""What is wrong with an argument is said in one sentence: which argument, its value, what is allowed."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ff_lightning import SFF, Backprop, GoodnessHead, LocalNet, PooledHead, data, partition
from ff_lightning.callbacks import BlockTable, GreedyBlocks, LastCheckpoint
from ff_lightning.losses import LogSumExpLoss
from tests.conftest import small_net

SHAPE = (1, 8, 8)


def tiny():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ReLU())


def classifier():
    return nn.Sequential(tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))


MODEL = {"num_classes": 3, "input_shape": SHAPE}
MAKERS = {
    "SFF": lambda **arguments: SFF(**{"backbone": tiny(), **MODEL, **arguments}),
    "Backprop": lambda **arguments: Backprop(**{"backbone": classifier(), **MODEL, **arguments}),
    "LocalNet": lambda **arguments: LocalNet(**{"model": tiny(), **MODEL, **arguments}),
    "partition": lambda **arguments: partition(**{"model": tiny(), "example": torch.zeros(1, *SHAPE), **arguments}),
    "PooledHead": lambda **arguments: PooledHead(**{"in_channels": 2, "num_classes": 3, **arguments}),
    "GoodnessHead": lambda **arguments: GoodnessHead(**{"in_channels": 2, "num_classes": 3, **arguments}),
    "LogSumExpLoss": LogSumExpLoss,
    "GreedyBlocks": GreedyBlocks,
    "LastCheckpoint": LastCheckpoint,
    "Digits": data.Digits,
    "FakeImages": data.FakeImages,
    "CIFAR100": data.CIFAR100,
    "STL10": data.STL10,
}
EVERYTHING = [None, math.nan, math.inf, -1, 0, 1.5, "x", [], True, {}, object()]
SWITCH, WHOLE, OPTIONAL = [0, True], [], [None]
ALLOWED = {
    "SFF": {
        "backbone": [], "num_classes": [], "input_shape": [None], "stem": [], "weights": OPTIONAL, "granularity": [],
        "head": [], "norm": [], "vote": [], "label_smoothing": [0], "reach": [], "train_blocks": OPTIONAL,
        "own_loss": [0],
        "optimizer": OPTIONAL, "lr": [None, 1.5], "lr_decay": [], "lr_scheduler": [], "lr_interval": [],
        "optimization": [], "clip_norm": [None, 1.5], "clip_value": [None, 1.5], "accumulate": [],
        "compile": SWITCH, "memory_format": OPTIONAL,
    },
    "Backprop": {
        "backbone": [], "num_classes": [], "input_shape": OPTIONAL, "stem": [], "label_smoothing": [0],
        "norm": OPTIONAL, "probe": SWITCH, "weights": OPTIONAL, "lr": [None, 1.5],
    },
    "LocalNet": {
        "model": [], "num_classes": [], "granularity": [], "head": [], "norm": [], "vote": [], "input_shape": [],
        "loss": OPTIONAL, "reach": [], "own_loss": [0],
    },
    "partition": {"model": [], "granularity": [], "example": OPTIONAL},
    "PooledHead": {
        "in_channels": [], "num_classes": [], "regions": OPTIONAL, "width": OPTIONAL, "kernel_size": [],
        "size": [None, []],
    },
    "GoodnessHead": {
        "in_channels": [], "num_classes": [], "kernel_size": [], "temperature": [1.5], "learn_temperature": SWITCH,
        "depth": [0], "width": OPTIONAL,
    },
    "LogSumExpLoss": {"label_smoothing": [0]},
    "GreedyBlocks": {"epochs_per_block": []},
    "LastCheckpoint": {"dirpath": [None, "x"], "every_n_train_steps": [None, 0]},
    "Digits": {
        "root": ["x"], "batch_size": [], "num_workers": [None, 0], "image_size": OPTIONAL, "augment": SWITCH,
        "val_fraction": [], "seed": [0], "samples_per_class": OPTIONAL, "subset": OPTIONAL, "val_from": [],
        "classes": OPTIONAL, "download": SWITCH, "in_memory": [None, *SWITCH], "cache_dir": [None, "x"],
        "on_error": [],
    },
    "FakeImages": {"images": []},
    "CIFAR100": {"labels": []},
    "STL10": {"fold": [None, 0]},
}  # fmt: skip
"""What of these values each argument takes; all others are refused."""


@pytest.mark.parametrize(("what", "argument"), [(what, name) for what, allowed in ALLOWED.items() for name in allowed])
def test_an_argument_is_taken_or_named_with_its_value(what, argument):
    for value in EVERYTHING:
        taken = any(
            value is known or (value == known and type(value) is type(known)) for known in ALLOWED[what][argument]
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                MAKERS[what](**{argument: value})
        except ValueError as error:
            if (what, argument, value) == ("SFF", "input_shape", None):
                continue  # (3, 32, 32), which this network does not take
            message = str(error)
            assert not taken, message
            assert argument in message
            assert repr(value) in message or (argument == "num_classes" and value is None)
            assert len(message.splitlines()) == 1
        else:
            assert taken, f"{argument}={value!r} was taken"


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("SFF", {"num_classes": 3.0}, r"num_classes=3.0: must be a whole number of at least 2"),
        ("SFF", {"num_classes": "10"}, r"num_classes='10': must be a whole number"),
        ("SFF", {"input_shape": (32, 32)}, r"input_shape=\(32, 32\): must be \(C, H, W\)"),
        ("SFF", {"backbone": "cnn", "input_shape": (32, 32)}, r"input_shape=\(32, 32\): must be \(C, H, W\)"),
        ("SFF", {"input_shape": (1, 0, 8)}, r"input_shape=\(1, 0, 8\): must be"),
        ("SFF", {"input_shape": ("1", 8, 8)}, r"input_shape=\('1', 8, 8\): must be"),
        ("SFF", {"input_shape": "1,8,8"}, "input_shape='1,8,8': must be"),
        ("SFF", {"backbone": nn.Sequential}, r"backbone=Sequential is a class: give a network made of it"),
        ("LocalNet", {"model": nn.Sequential}, r"model=Sequential is a class: give a network"),
        ("LocalNet", {"loss": 3}, r"loss=3 is not known: give one of \['logsumexp'"),
        ("LocalNet", {"loss": "predsin"}, "loss='predsin' is not known.*did you mean 'predsim'"),
        ("LocalNet", {"loss": lambda: 3}, "makes 3: it must make an Objective, or a module"),
        ("SFF", {"task": "Regresion"}, "task='regresion' is not known.*did you mean 'regression'"),
        ("SFF", {"metrics": ["f2"]}, "metrics='f2' is not known: give one of"),
        ("SFF", {"stem": "smal"}, "stem='smal' is not known.*did you mean 'small'"),
        ("SFF", {"train_blocks": "block1"}, "train_blocks='block1': must be a list"),
        ("SFF", {"train_blocks": [True]}, "True is neither the number nor the name"),
        ("SFF", {"vote": max}, "vote=<built-in function max> is not known: give one of"),
        ("Backprop", {"norm": "layr"}, "norm='layr' is not known.*did you mean 'layer'"),
        ("Backprop", {"granularity": "layr"}, "granularity='layr' is not known.*did you mean 'layer'"),
        ("Digits", {"classes": "12"}, "classes='12': must be a list"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(what, arguments, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[what](**arguments)


def test_what_is_a_number_to_numpy_is_a_number():
    numpy = pytest.importorskip("numpy")
    model = MAKERS["SFF"](num_classes=numpy.int64(3), lr=numpy.float64(0.1), granularity=numpy.int64(2))
    assert len(model.net.blocks) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFF(granulrity="layer"), "SFF got an unexpected keyword argument 'granulrity'; did you mean 'granul"),
        (lambda: SFF(acumulate=2), "SFF got an unexpected keyword argument 'acumulate'; did you mean 'accumulate'"),
        (lambda: Backprop(clip_nrm=1), "Backprop got an .* 'clip_nrm'; did you mean 'clip_norm'"),
        (lambda: data.CIFAR10(batchsize=4), "CIFAR10 got an .* 'batchsize'; did you mean 'batch_size'"),
        (lambda: data.FakeImages(image=50), "FakeImages got an .* 'image'; did you mean 'images'"),
        (lambda: data.Digits(wholly_unknown=1), "Digits got an unexpected keyword argument 'wholly_unknown'$"),
    ],
)
def test_an_argument_that_does_not_exist_is_answered_with_a_close_one(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_subclass_may_take_arguments_of_its_own():
    class Own(data.Digits):
        def __init__(self, **kwargs):
            self.colour = kwargs.pop("colour", "grey")
            super().__init__(**kwargs)

    assert Own(colour="red", batch_size=4).colour == "red"
    with pytest.raises(TypeError, match=r"Own got .*'colr'"):
        Own(colr="red")


# ---------------------------------------------------------------------------------------------------------------- heads


class Head(nn.Module):
    """A head that answers with what `answer` makes of the features."""

    def __init__(self, answer):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.ones(1)), answer

    def forward(self, features):
        return self.answer(features * self.weight)


def heads_of(answer):
    return lambda channels, classes: Head(answer)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (GoodnessHead(2, 3), r"head=GoodnessHead\(.* is a head that is already made: give its class"),
        (lambda channels, classes: "head", "makes 'head': it must make an nn.Module"),
        (lambda channels: nn.Flatten(), r"cannot be called with \(channels, classes\): too many positional"),
        (partial(nn.Conv2d, kernel_size=1), r"head=Conv2d makes \(2, 3, 8, 8\) of features \(2, 2, 8, 8\).*\(2, 3\)"),
        (nn.Linear, r"head=Linear fails for features of shape \(2, 2, 8, 8\): mat1 and mat2"),
        (heads_of(lambda features: features.mean((2, 3))), r"makes \(2, 2\) of features"),
        (heads_of(lambda features: features.sum()), r"makes \(\) of features"),
        (heads_of(lambda features: features.mean((2, 3))[:, :1].expand(-1, 3).long()), "floating-point number"),
        (heads_of(lambda features: [features]), "it must make goodness of shape"),
    ],
)
def test_what_is_no_head_is_said_at_construction(head, message):
    with pytest.raises(ValueError, match=message):
        LocalNet(tiny(), 3, head=head, input_shape=SHAPE)
    with pytest.raises(ValueError, match=message):
        MAKERS["SFF"](head=head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_check_of_a_head_leaves_it_as_it_was(dtype):
    made = []

    def factory(channels, classes):
        layers = (
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(channels, classes),
        )
        made.append(nn.Sequential(*layers).to(dtype))
        return made[-1]

    LocalNet(tiny(), 3, head=factory, input_shape=SHAPE)
    assert len(made) == 2
    assert all(module.training for head in made for module in head.modules())
    assert all(head[0].num_batches_tracked == 0 for head in made)
    assert all(parameter.grad is None for head in made for parameter in head.parameters())


def test_a_function_as_head_is_asked_for_again(make_trainer, digits, tmp_path):
    with pytest.warns(UserWarning, match="head is a function and is not stored"):
        model = SFF(
            backbone=small_net(), num_classes=10, input_shape=SHAPE, head=lambda c, k: GoodnessHead(c, k, depth=0)
        )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, digits)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = r"its head was given as a function and is not stored: give it again, head=\.\.\."
    with pytest.raises(ValueError, match=again) as error:
        SFF.load_from_checkpoint(tmp_path / "a.ckpt", backbone=small_net())
    assert "its backbone" not in str(error.value), "that was given again"
    with pytest.raises(ValueError, match=r"its backbone was given as a module.*" + again):
        SFF.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="head is a function"):
        SFF.load_from_checkpoint(
            tmp_path / "a.ckpt", backbone=small_net(), head=lambda c, k: GoodnessHead(c, k, depth=0)
        )


# ------------------------------------------------------------------------------------------------- optimizer, schedule


PLATEAU = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler": StepLR}, r"lr_scheduler=StepLR: missing a required argument: 'step_size'; .* init_args: \{"),
        ({"lr_scheduler": partial(StepLR, step_sise=3)}, "lr_scheduler=StepLR: .*'step_size'"),
        ({"lr_scheduler": partial(StepLR, step_size=3, gama=2)}, "'gama'; did you mean 'gamma'"),
        ({"lr_scheduler": LambdaLR}, "lr_scheduler=LambdaLR: missing a required argument: 'lr_lambda'"),
        ({"lr_scheduler": nn.Linear}, "lr_scheduler=Linear: must be a subclass of torch.optim.lr_scheduler.LRSched"),
        ({"lr_scheduler": PLATEAU, "lr_interval": "step"}, "lr_interval='step': ReduceLROnPlateau watches"),
        ({"optimizer": partial(torch.optim.SGD, momentun=0.9)}, "optimizer=SGD: .*'momentun'; did you mean 'momentum'"),
        (
            {"optimizer": partial(torch.optim.SGD, lr=0.1), "lr": 0.2},
            "lr=0.2 and lr=0.1 of the optimizer SGD: give one",
        ),
        ({"optimizer": nn.Linear}, "optimizer=Linear: must be a subclass of torch.optim.optimizer.Optimizer"),
        ({"optimizer": torch.optim.SparseAdam}, "optimizer=SparseAdam takes sparse gradients"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer=LBFGS computes the loss several times"),
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"nestrov": True}}}, "mean 'nesterov'"),
    ],
)
def test_optimizers_and_schedules_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        MAKERS["SFF"](**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, momentum=-1.0)}, "optimizer=SGD: Invalid momentum value: -1.0"),
        ({"optimizer": lambda groups: torch.optim.LBFGS(groups)}, "optimizer=LBFGS computes"),
        ({"optimizer": torch.optim.LBFGS, "optimization": "automatic"}, "optimizer=LBFGS: LBFGS doesn't support"),
        (
            {"lr_scheduler": lambda o: ReduceLROnPlateau(o, monitor="val/loss"), "lr_interval": "step"},
            "lr_interval='step'",
        ),
    ],
)
def test_what_only_shows_when_they_are_made(arguments, message, make_trainer, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SFF(backbone=tiny(), num_classes=10, input_shape=SHAPE, **arguments)
    with pytest.raises(ValueError, match=message):
        make_trainer(max_epochs=1).fit(model, digits)


def test_the_optimizer_and_lr_may_agree():
    assert MAKERS["SFF"](optimizer=partial(torch.optim.SGD, lr=0.1), lr=0.1).lr == 0.1
    assert MAKERS["SFF"](optimizer=torch.optim.SGD, lr=0.1).lr == 0.1


# ------------------------------------------------------------------------------------------------------ nothing to run


class Nothing(IterableDataset):
    """Images of which there are none, without saying so."""

    def __iter__(self):
        return iter(())


FULL = TensorDataset(torch.zeros(8, *SHAPE), torch.zeros(8, dtype=torch.long))
EMPTY = {
    "no images": lambda: DataLoader(TensorDataset(*FULL[:0]), batch_size=4),
    "less than a batch": lambda: DataLoader(FULL, batch_size=9, drop_last=True),
    "a stream": lambda: DataLoader(Nothing(), batch_size=4),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("function", ["fit", "validate", "test", "predict"])
def test_a_loader_without_a_batch_is_not_passed_over(name, function, make_trainer):
    if (name, function) == ("less than a batch", "predict"):
        pytest.skip("Lightning predicts the last partial batch too")
    limits = {f"limit_{stage}_batches": 1.0 for stage in ("train", "val", "test", "predict")}
    for schedule in ("constant", "onecycle", "cosine") if function == "fit" and name != "a stream" else ("constant",):
        model = MAKERS["SFF"](lr_scheduler=schedule)
        with pytest.raises(ValueError, match=f"no batch to {function}: the loader is empty, or holds fewer"):
            getattr(make_trainer(max_epochs=1, **limits), function)(model, EMPTY[name]())


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
@pytest.mark.parametrize(
    ("function", "flag"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")]
)
def test_a_limit_of_no_batches_is_not_passed_over(function, flag, optimization, make_trainer):
    trainer = make_trainer(**{f"limit_{flag}_batches": 0})
    with pytest.raises(ValueError, match=f"limit_{flag}_batches=0 of the Trainer: must be above 0"):
        getattr(trainer, function)(MAKERS["SFF"](optimization=optimization), DataLoader(FULL, batch_size=4))


@pytest.mark.parametrize("changes", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_val_batches": 0}])
def test_a_run_that_is_asked_for_no_step_or_no_validation_is_one(changes, make_trainer):
    loader = DataLoader(FULL, batch_size=4)
    make_trainer(**changes).fit(MAKERS["SFF"](), loader, loader)


# ------------------------------------------------------------------------------------------------------------- tables


class Tagged(nn.Module):
    """A network whose modules have names that look like markup."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"[v1]": nn.Conv2d(1, 2, 3), "[/b]": nn.Conv2d(2, 2, 3)})

    def forward(self, x):
        for part in self.parts.values():
            x = part(x).relu()
        return x


def test_names_and_paths_are_not_markup(make_trainer, digits, tmp_path, capsys):
    model = SFF(backbone=Tagged(), num_classes=10, input_shape=SHAPE, granularity="layer")
    folder = tmp_path / "[v1]" / "[bold]"
    keep = LastCheckpoint(dirpath=str(folder))
    make_trainer(max_epochs=1, callbacks=[BlockTable(), keep], enable_checkpointing=True).fit(model, digits)
    printed = capsys.readouterr().out
    assert printed.count("parts.[v1]") == 2
    assert printed.count("parts.[/b]") == 2
    assert f"last: {folder}/last.ckpt" in printed


def test_the_benchmark_prints_names_as_they_are(capsys):
    from rich.console import Console

    from ff_lightning.benchmark.measure import Result
    from ff_lightning.benchmark.report import print_table
    from ff_lightning.benchmark.variants import Settings

    settings = Settings("[b]one", "small", 10, 4, 8, "pooled", 1, 1, "cpu", "32", False)
    print_table((settings, [Result("sff [block]", [1.0, 1.0])]), 4, Console(width=200))
    printed = capsys.readouterr().out
    assert "[b]one" in printed
    assert "sff [block]" in printed


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("backbone", ["cnn", "resnet18"])
def test_a_folder_as_weights(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"weights='.*' is .*a folder"):
        SFF(backbone=backbone, num_classes=10, weights=str(tmp_path))


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), {"a": 1}])
def test_a_file_of_something_else_as_weights(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"weights='.*w.pt' holds no state dict"):
        SFF(num_classes=10, weights=str(tmp_path / "w.pt"))
