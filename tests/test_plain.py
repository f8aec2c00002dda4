"""What is given as a path, a number of NumPy or a list of a config system can be read again from a checkpoint."""

import warnings
from collections.abc import MutableMapping, MutableSequence
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.optim.lr_scheduler import StepLR

from ff_lightning import SFF, Backprop, GoodnessHead, data
from ff_lightning.training.plain import make_plain, to_plain
from tests.conftest import small_net


class ConfigList(MutableSequence):
    """A list of a config system, such as Hydra's: not a list of Python's."""

    def __init__(self, *items):
        self.items = list(items)

    def __getitem__(self, index):
        return self.items[index]

    def __setitem__(self, index, item):
        self.items[index] = item

    def __delitem__(self, index):
        del self.items[index]

    def __len__(self):
        return len(self.items)

    def insert(self, index, item):
        self.items.insert(index, item)


class ConfigDict(MutableMapping):
    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, item):
        self.items_[key] = item

    def __delitem__(self, key):
        del self.items_[key]

    def __len__(self):
        return len(self.items_)

    def __iter__(self):
        return iter(self.items_)


class Norm(str, Enum):
    CHANNEL = "channel"


class Again(SFF):
    """Stores all arguments once more, as is usual in Lightning."""

    def __init__(self, note=None, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class NumbersAgain(data.Digits):
    def __init__(self, note=None, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Foreign(LightningDataModule):
    """A data module that is not one of this package."""

    def __init__(self, root, scale):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return torch.utils.data.DataLoader([(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)], 2)

    val_dataloader = test_dataloader = train_dataloader


class Network(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten(), nn.LazyLinear(10))


SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
SGD = partial(torch.optim.SGD, lr=np.float64(0.1), momentum=np.float32(0.5))
MODELS = {
    "numbers": (SFF, {"num_classes": np.int64(10), "input_shape": np.array([1, 8, 8]), "lr": np.float64(0.01)}),
    "more numbers": (
        SFF,
        {
            **{"lr": np.float32(0.01), "lr_decay": np.float64(0.5), "clip_norm": np.float32(1), "reach": np.int64(1)},
            **{"accumulate": np.int64(2), "label_smoothing": np.float64(0.1), "train_blocks": [np.int64(1)]},
            **{"compile": np.bool_(False), "granularity": np.int64(2)},
        },
    ),
    "tensors": (SFF, {"num_classes": torch.tensor(10), "input_shape": torch.Size([1, 8, 8]), "lr": torch.tensor(0.01)}),
    "baseline": (Backprop, {"num_classes": np.int64(10), "lr": np.float64(0.01), "probe": np.bool_(True)}),
    "config": (
        SFF,
        {
            **{"input_shape": ConfigList(1, 8, 8), "granularity": ConfigList("block1"), "train_blocks": ConfigList(0)},
            "optimizer": ConfigDict(class_path="torch.optim.AdamW", init_args=ConfigDict(betas=ConfigList(0.5, 0.9))),
            **{"norm": Norm.CHANNEL, "stem": np.str_("standard")},
        },
    ),
    "partials": (
        SFF,
        {"optimizer": SGD, "lr_scheduler": partial(StepLR, step_size=np.int64(1), gamma=np.float64(0.5))},
    ),
    "functions": (
        SFF,
        {
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=np.float64(0.1), momentum=np.float64(0.5)),
            "lr_scheduler": lambda optimizer: StepLR(optimizer, 1, gamma=np.float64(0.5)),
        },
    ),
    "network by its class": (
        SFF,
        {"backbone": {"class_path": f"{__name__}.Network", "init_args": {"width": np.int64(3)}}},
    ),
    "stored once more": (Again, {"note": np.int64(3), "lr": np.float64(0.01), "head": GoodnessHead}),
}
DATA = {
    "numbers": (data.Digits, {"batch_size": np.int64(16), "val_fraction": np.float64(0.1), "seed": np.int64(3)}),
    "paths": (data.Digits, {"root": Path("data"), "cache_dir": Path("cache")}),
    "classes": (data.Digits, {"classes": ConfigList(*map(np.int64, range(10)))}),
    "stored once more": (NumbersAgain, {"root": Path("data"), "note": np.float64(1)}),
    "of the user": (Foreign, {"root": Path("data"), "scale": np.float64(1)}),
}


def is_plain(value):
    if type(value) is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) in (int, float, bool, str, type(None))


def fit_load_test_resume(model_class, arguments, module, make_trainer, folder):
    """Every way in which a checkpoint is read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a function and is not stored")
        warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
        model = model_class(**arguments)
        trainer = make_trainer(max_epochs=1, limit_train_batches=2)
        trainer.fit(model, module)
        path = folder / "last.ckpt"
        trainer.save_checkpoint(path)
        stored = torch.load(path, weights_only=True)
        assert is_plain(stored["hyper_parameters"])
        assert is_plain(stored.get("datamodule_hyper_parameters", {}))
        functions = {name: value for name, value in arguments.items() if name not in stored["hyper_parameters"]}
        again = model_class.load_from_checkpoint(path, **functions)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
        make_trainer().test(model_class(**arguments), module, ckpt_path=path)
        longer = make_trainer(max_epochs=1, max_steps=trainer.global_step, limit_train_batches=2)
        longer.fit(model_class(**arguments), module, ckpt_path=path)
        type(module).load_from_checkpoint(path)


@pytest.mark.parametrize("case", MODELS)
def test_models_are_read_again(case, make_trainer, tmp_path):
    cls, arguments = MODELS[case]
    fit_load_test_resume(cls, {**SHAPE, **arguments}, data.Digits(batch_size=16), make_trainer, tmp_path)


@pytest.mark.parametrize("case", DATA)
def test_data_are_read_again(case, make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cls, arguments = DATA[case]
    fit_load_test_resume(SFF, SHAPE, cls(**arguments), make_trainer, tmp_path)


class Remembers(Callback):
    def state_dict(self):
        return {"best": np.float64(0.5), "epochs": [np.int64(1)]}


def test_numbers_of_callbacks_are_read_again(make_trainer, digits, tmp_path):
    trainer = make_trainer(max_epochs=1, callbacks=[Remembers()])
    trainer.fit(SFF(**SHAPE), digits)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert stored["Remembers"] == {"best": 0.5, "epochs": [1]}


def test_a_folder_given_as_a_path(make_trainer, image_folder, tmp_path):
    arguments = {"cache_dir": tmp_path / "cache", "image_size": np.int64(8), "batch_size": np.int64(4)}
    for _ in range(2):  # the second time from the cache
        module = data.ImageFolder(root=image_folder(), **arguments)
        model = {"num_classes": np.int64(2), "input_shape": module.input_shape}
        fit_load_test_resume(SFF, model, module, make_trainer, tmp_path)
    assert data.ImageFolder.load_from_checkpoint(tmp_path / "last.ckpt").root == str(image_folder())


class Holder:
    """Something of the user's own."""


@pytest.mark.parametrize("make", [partial(Again, **SHAPE), NumbersAgain])
def test_what_cannot_be_stored_is_refused(make):
    for value in (Holder(), [Holder()], {"a": Holder()}):
        with pytest.raises(ValueError, match=r"^note=.*cannot be stored in a checkpoint.*of type Holder is not plain"):
            make(note=value)


def test_functions_are_left_out_with_a_warning():
    class Local(nn.Module):
        """Nobody finds it again by its name."""

    for value, verb in ((print, "is"), (Local, "is"), ([print], "holds"), (partial(GoodnessHead, act=nn.ReLU), "is")):
        with pytest.warns(UserWarning, match=f"^note {verb} a function and is not stored in checkpoints"):
            assert make_plain({"note": value, "lr": 1}) == {"lr": 1}
    assert make_plain({"backbone": nn.Linear(1, 1)}) == {}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (torch.Size([1, 2]), (1, 2)),
        (torch.tensor(2), 2),
        (Path("a/b"), "a/b"),
        (Norm.CHANNEL, "channel"),
        (range(2), [0, 1]),
        (frozenset({1}), {1}),
        (ConfigDict(a=ConfigList(np.int64(1), (Path("b"), None))), {"a": [1, ("b", None)]}),
        (np.str_("a"), "a"),
        (bytearray(b"ab"), b"ab"),
        (torch.float32, torch.float32),
    ],
)
def test_plain_values(value, plain, tmp_path):
    found = to_plain(value)
    assert (type(found), found) == (type(plain), plain)
    torch.save(found, tmp_path / "value.pt")
    assert torch.load(tmp_path / "value.pt", weights_only=True) == plain


def test_a_network_is_not_copied_to_be_left_out():
    class Uncopied(nn.Sequential):
        def __deepcopy__(self, memo):
            raise AssertionError

    backbone = Uncopied(*small_net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SFF(backbone=backbone, **SHAPE)
    assert set(SHAPE) <= set(model.hparams)
    assert "backbone" not in model.hparams
