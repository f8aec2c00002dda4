"""What cannot work in a run is said in one sentence."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ff_lightning import SFF
from ff_lightning.callbacks import BlockTable, LastCheckpoint
from tests.test_messages import MAKERS, SHAPE, tiny

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
