"""Downloads that break off, and what is not there."""

import gzip
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from ff_lightning import data
from ff_lightning.commands.sheet import contact_sheet
from ff_lightning.data.images.tiny import TinyImageNetFolder
from tests.test_data import write_cifar
from tests.test_data_sets import md5, noise, ready, write_tiny_imagenet


def serve_imagenette(folder, address):
    """An archive in the format of Imagenette, and torchvision's reader of it."""
    source = folder.parent / "source" / "imagenette2-160"
    for split in ("train", "val"):
        for number, wnid in enumerate(datasets.Imagenette._WNID_TO_CLASS):
            (source / split / wnid).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(noise(1, 20, 20, 3)[0]).save(source / split / wnid / f"{number}{i}.JPEG")
    with tarfile.open(folder / "imagenette2-160.tgz", "w:gz") as archive:
        archive.add(source, "imagenette2-160")

    class Reader(datasets.Imagenette):
        _ARCHIVES = {"160px": (f"{address}/imagenette2-160.tgz", md5(folder / "imagenette2-160.tgz"))}

    return Reader


def test_a_download_that_breaks_off_is_repaired_by_the_next_run(tmp_path, served, monkeypatch):
    monkeypatch.setattr(data.Imagenette, "reader", serve_imagenette(*served))
    archive = served[0] / "imagenette2-160.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    module = data.Imagenette(root=str(tmp_path / "data"), image_size=20, val_fraction=0.25)
    with pytest.raises(OSError, match=r"Imagenette could not be downloaded to root='.*data'.*another run replaces"):
        module.prepare_data()
    with pytest.raises(FileNotFoundError, match="the download of Imagenette broke off"):
        module.setup("fit")
    archive.write_bytes(whole)
    assert len(ready(module).train_set) == 30


def test_an_archive_that_was_half_extracted_is_not_read(tmp_path, served, monkeypatch):
    monkeypatch.setattr(data.Imagenette, "reader", serve_imagenette(*served))
    module = data.Imagenette(root=str(tmp_path / "data"), image_size=20, val_fraction=0.25)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "chown", stop)
        patch.setattr(tarfile.TarFile, "utime", stop)
        with pytest.raises(KeyboardInterrupt):
            module.prepare_data()
    assert (tmp_path / "data" / "imagenette2-160").exists()
    with pytest.raises(FileNotFoundError, match="the download of Imagenette broke off"):
        module.setup("fit")
    assert len(ready(module).train_set) == 30


def test_a_wrong_checksum(tmp_path, served, monkeypatch):
    reader, _ = write_cifar(*served, fine=False)
    reader.tgz_md5 = "0" * 32
    monkeypatch.setattr(data.CIFAR10, "reader", reader)
    with pytest.raises(OSError, match=r"CIFAR10 could not be downloaded.*corrupted"):
        data.CIFAR10(root=str(tmp_path / "data")).prepare_data()


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    module = data.MNIST(root=str(tmp_path / "data" / "mnist"))
    with pytest.raises(OSError, match=r"MNIST could not be downloaded to root='.*mnist': .*Not a directory"):
        module.prepare_data()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_root_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"MNIST could not be downloaded to root=.*Permission denied"):
        data.MNIST(root=str(tmp_path)).prepare_data()


def test_nothing_is_written_where_all_is_there(tmp_path, served, monkeypatch):
    monkeypatch.setattr(data.Imagenette, "reader", serve_imagenette(*served))
    arguments = {"root": str(tmp_path / "data"), "image_size": 20, "cache_dir": str(tmp_path / "cache")}
    arguments["val_fraction"] = 0.25
    ready(data.Imagenette(**arguments))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    ready(data.Imagenette(**arguments))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_data_that_are_not_there_and_not_to_be_downloaded(tmp_path):
    module = data.SVHN(root=str(tmp_path), download=False)
    module.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"does not hold SVHN.*download=True"):
        module.setup("fit")


def test_tiny_imagenet_is_downloaded(tmp_path, served, monkeypatch):
    write_tiny_imagenet(tmp_path)
    archive = served[0] / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted((tmp_path / "tiny-imagenet-200").rglob("*")):
            zipped.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(TinyImageNetFolder, "url", f"{served[1]}/tiny-imagenet-200.zip")
    monkeypatch.setattr(TinyImageNetFolder, "md5", md5(archive))
    module = data.TinyImageNet(root=str(tmp_path / "data"))
    module.prepare_data()
    assert len(data.TinyImageNet(root=module.root).read_test()) == 20


def test_mnist_is_downloaded(tmp_path, served, monkeypatch):
    folder, address = served
    resources = []
    for prefix, count in (("train", 20), ("t10k", 10)):
        for kind, magic, content in (
            ("images-idx3", [0x803, count, 28, 28], noise(count, 28, 28)),
            ("labels-idx1", [0x801, count], (np.arange(count) % 10).astype(np.uint8)),
        ):
            file = folder / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(np.array(magic, ">i4").tobytes() + content.tobytes()))
            resources.append((file.name, md5(file)))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert len(ready(data.MNIST(root=str(tmp_path / "data"), val_fraction=0.5)).test_set) == 10


@pytest.mark.parametrize("size", [None, 16])
def test_images_are_vectors_on_request(size):
    flat, square = (data.Digits(flat=flat, image_size=size) for flat in (True, False))
    assert flat.input_shape == ((size or 8) ** 2,)
    for module in (flat, square):
        module.setup("fit")
        module.setup("test")
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for (x, y), (image, label) in zip(getattr(flat, loader)(), getattr(square, loader)(), strict=True):
            assert torch.equal(x, image.flatten(1))
            assert torch.equal(y, label)
    assert contact_sheet(flat).tobytes() == contact_sheet(square).tobytes()


@pytest.mark.parametrize(("name", "length"), [("MNIST", 784), ("FashionMNIST", 784), ("CIFAR10", 3072)])
def test_vectors_of_downloaded_sets(name, length):
    assert getattr(data, name)(flat=True).input_shape == (length,)
    with pytest.raises(ValueError, match="flat='yes': must be True or False"):
        getattr(data, name)(flat="yes")
