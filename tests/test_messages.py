"""What is wrong with an argument is said in one sentence: which argument, its value, what is allowed."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from ff_lightning import SFF, Backprop, GoodnessHead, LocalNet, PooledHead, data, partition
from ff_lightning.callbacks import GreedyBlocks, LastCheckpoint
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
        "own_loss": [0], "recompute": SWITCH,
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
        "loss": OPTIONAL, "reach": [], "own_loss": [0], "recompute": SWITCH,
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
    again = r"the head of the checkpoint was given as a function and is not stored: give it again, head=\.\.\."
    with pytest.raises(ValueError, match=again) as error:
        SFF.load_from_checkpoint(tmp_path / "a.ckpt", backbone=small_net())
    assert "the backbone of" not in str(error.value), "that was given again"
    with pytest.raises(ValueError, match=r"the backbone of the checkpoint was given as a module.*" + again):
        SFF.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="head is a function"):
        SFF.load_from_checkpoint(
            tmp_path / "a.ckpt", backbone=small_net(), head=lambda c, k: GoodnessHead(c, k, depth=0)
        )
