"""Checkpoint files: damaged ones are not loaded, broken networks not saved, and what stood there before stays."""

import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ff_lightning import SFF, Backprop, data
from ff_lightning.callbacks import BestCheckpoint, LastCheckpoint
from ff_lightning.training.checkpoint_io import WholeCheckpointIO
from ff_lightning.util.files import replacing
from tests.conftest import make_trainer_in, small_net
from tests.test_cli import run

FORK = multiprocessing.get_context("fork")


def in_a_process(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of the default network, as bytes, and where the data of its tensors lie."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = make_trainer_in(path.parent)(max_epochs=1, limit_train_batches=1)
    trainer.fit(SFF(num_classes=10, input_shape=(1, 8, 8)), data.Digits(batch_size=8))
    trainer.save_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    spans = []
    for info in tensors:  # the header of an entry in the file itself has a length of its own
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        spans.append((info.header_offset + 30 + lengths, info.file_size))
    return path.read_bytes(), spans


def damage(path, good, dice):
    content, spans = good
    start, length = dice.choices(spans, [length for _, length in spans])[0]
    content = bytearray(content)
    content[start + dice.randrange(length)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def test_every_flipped_bit_of_a_tensor_is_found(good, tmp_path):
    path, dice = tmp_path / "flipped.ckpt", random.Random(0)
    for _ in range(50):
        damage(path, good, dice)
        with pytest.raises(ValueError, match=r"flipped\.ckpt is damaged"):
            SFF.load_from_checkpoint(path)


def test_a_damaged_file_is_refused_wherever_it_is_read(good, tmp_path, make_trainer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "flipped.ckpt"
    damage(path, good, random.Random(1))
    arguments = {"num_classes": 10, "input_shape": (1, 8, 8)}
    digits = data.Digits(batch_size=8)
    ways = {
        "fit": lambda: make_trainer().fit(SFF(**arguments), digits, ckpt_path=path),
        "test": lambda: make_trainer().test(SFF(**arguments), digits, ckpt_path=path),
        "validate": lambda: make_trainer().validate(SFF(**arguments), digits, ckpt_path=path),
        "predict": lambda: make_trainer().predict(SFF(**arguments), digits, ckpt_path=path),
        "load": lambda: SFF.load_from_checkpoint(str(path)),
        "weights": lambda: SFF(weights=str(path), **arguments),
        "weights of backprop": lambda: Backprop(weights=str(path), **arguments),
    }
    for name, way in ways.items():
        with pytest.raises(ValueError, match=r"flipped\.ckpt is damaged"):
            pytest.fail(f"{name}: {way()}")
    for command in (["test"], ["fit", "--trainer.fast_dev_run", 1]):
        with pytest.raises(SystemExit, match=r"error: .*flipped\.ckpt is damaged"):
            run(*command, "--ckpt_path", path)
    with pytest.raises(SystemExit, match=r"error: .*flipped\.ckpt is damaged"):
        run("fit", "--trainer.fast_dev_run", 1, "--model.weights", path)


def test_weights_in_the_old_format_of_torch_are_read(tmp_path):
    model = SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8))
    stored = Backprop(backbone="cnn", num_classes=10, input_shape=(1, 8, 8)).net.state_dict()
    torch.save(stored, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = Backprop(backbone="cnn", num_classes=10, input_shape=(1, 8, 8), weights=str(tmp_path / "old.pth"))
    for key, value in stored.items():
        assert torch.equal(model.net.state_dict()[key], value)


def try_as_nobody(path):
    """In a process of its own; root may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError, match=r"secret\.ckpt"):
        WholeCheckpointIO().load_checkpoint(path)
    with pytest.raises(PermissionError, match=r"secret\.ckpt"):
        SFF.load_from_checkpoint(path)


def test_a_file_that_cannot_be_read_is_not_called_cut_off(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # the folder of the test is closed to others as a whole
        os.chmod(folder, 0o755)
        path = Path(folder, "secret.ckpt")
        path.write_bytes(b"secret")
        path.chmod(0)
        assert in_a_process(try_as_nobody, path) == 0
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        WholeCheckpointIO().load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        SFF.load_from_checkpoint(tmp_path / "none.ckpt")


# ------------------------------------------------------------------------------------------------------------ writing


def write_on_a_full_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # to a process it looks the same
    with pytest.raises(OSError, match=r"the checkpoint .*last\.ckpt cannot be written: .* bytes are free in /"):
        WholeCheckpointIO().save_checkpoint({"epoch": 2, "weights": torch.zeros(1_000_000)}, path)


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"epoch": 1}, path)
    assert in_a_process(write_on_a_full_disk, path) == 0
    assert list(tmp_path.iterdir()) == [path]
    assert WholeCheckpointIO().load_checkpoint(path) == {"epoch": 1}


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/last\.ckpt cannot be written: .*; .* bytes are free in"):
        WholeCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "file" / "last.ckpt")


def test_an_error_in_what_is_saved_stays_as_it_is(tmp_path):
    class Broken:
        def __reduce__(self):
            raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        WholeCheckpointIO().save_checkpoint({"epoch": Broken()}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def write_for_ever(path, pipe):
    with replacing(path) as part:
        part.write_text("half")
        pipe.send(part.name)
        time.sleep(100)


def test_what_a_killed_run_has_left_is_removed_but_nothing_that_is_being_written(tmp_path):
    receive, send = FORK.Pipe(duplex=False)
    processes = [FORK.Process(target=write_for_ever, args=(tmp_path / f"{name}.ckpt", send)) for name in "ab"]
    parts = []
    for process in processes:
        process.start()
        parts.append(receive.recv())
    (tmp_path / "film.part").write_text("of someone else")
    processes[0].kill()
    processes[0].join()
    assert {path.name for path in tmp_path.iterdir()} == {*parts, "film.part"}
    WholeCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "c.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {parts[1], "film.part", "c.ckpt"}
    processes[1].kill()
    processes[1].join()
    WholeCheckpointIO().save_checkpoint({"epoch": 2}, tmp_path / "c.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"film.part", "c.ckpt"}


# ---------------------------------------------------------------------------------------------------- broken networks


def loader(factor=1.0):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(factor * torch.randn(16, 1, 8, 8), torch.arange(16) % 10), batch_size=8)


def fit_and_keep(folder, model, train, **settings):
    callbacks = [BestCheckpoint(folder / "best", monitor="val/acc", mode="max"), LastCheckpoint(str(folder / "last"))]
    trainer = make_trainer_in(folder)(enable_checkpointing=True, callbacks=callbacks, **settings)
    trainer.fit(model, train, loader())
    return list(folder.rglob("*.ckpt"))


class Overflowing(nn.BatchNorm2d):
    """One whose running variance is soon beyond all numbers, as that of images of 1e20, while the loss is finite."""

    def forward(self, x):
        if self.training:
            self.running_var.fill_(torch.inf)
        return super().forward(x)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
@pytest.mark.parametrize("method", [SFF, Backprop])
def test_running_statistics_that_are_not_finite_are_not_saved(method, optimization, tmp_path):
    network = small_net()
    network[2].norm = Overflowing(4)
    model = method(backbone=network, num_classes=10, input_shape=(1, 8, 8), optimization=optimization)
    message = r"running statistics of block \d .* are not finite after step 2: .*untouched.*norm.running_var"
    with pytest.raises(FloatingPointError, match=message):
        fit_and_keep(tmp_path, model, loader(), num_sanity_val_steps=0)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "factor", "settings"),
    [({"lr": 1e6}, 1.0, {}), ({}, 1e20, {}), ({"lr": 1.0}, 1.0, {"precision": "16-true"})],
    ids=["lr", "images", "float16"],
)
def test_no_checkpoint_of_a_broken_network_is_written(arguments, factor, settings, tmp_path):
    model = SFF(backbone="cnn", num_classes=10, input_shape=(1, 8, 8), **arguments)
    with pytest.raises(FloatingPointError, match=r"last checkpoint is untouched") as error:
        fit_and_keep(tmp_path, model, loader(factor), **settings)
    for path in tmp_path.rglob("*.ckpt"):  # of before it broke
        assert all(t.isfinite().all() for t in torch.load(path, weights_only=True)["state_dict"].values())
    assert "precision" not in settings or "16-mixed" in str(error.value) or "loss" in str(error.value)


class Masked(nn.Module):
    """A layer with a mask of its own, infinite from the start."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("mask", torch.full((4, 8, 8), -torch.inf).triu(1))

    def forward(self, x):
        return torch.where(self.mask.isinf(), 0.0, self.conv(x)).relu()


def test_a_mask_that_is_infinite_by_nature_is_saved(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Masked())
    model = SFF(backbone=network, num_classes=10, input_shape=(1, 8, 8))
    assert len(fit_and_keep(tmp_path, model, loader())) == 2
