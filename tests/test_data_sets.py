"""Each set in its own format on disk, written here with a few images; downloads that fail."""

import gzip
import hashlib
import os
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from ff_lightning import data
from ff_lightning.commands.sheet import contact_sheet
from ff_lightning.data.images.tiny import TinyImageNetFolder
from tests.test_data import write_cifar

RANDOM = np.random.default_rng(0)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(count, *shape):
    return RANDOM.integers(0, 256, (count, *shape), np.uint8)


def plain(module, split):
    """Pixels and classes of a split as they are held."""
    images = getattr(module, f"{split}_set")
    return torch.stack([image for image, _ in images]), images.targets.tolist()


def ready(module):
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    return module


def test_svhn(tmp_path, monkeypatch):
    splits = {}
    for split, count in (("train", 40), ("test", 20)):
        pixels, labels = noise(count, 32, 32, 3), np.arange(count) % 10 + 1  # ten is the digit 0
        scipy.io.savemat(tmp_path / f"{split}.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels[:, None]})
        splits[split] = ("", f"{split}.mat", md5(tmp_path / f"{split}.mat"))
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    module = ready(data.SVHN(root=str(tmp_path), val_fraction=0.25))
    images, classes = plain(module, "test")
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert classes == [*range(1, 10), 0] * 2
    assert [len(s) for s in (module.train_set, module.val_set)] == [30, 10]


def write_stl10(root, monkeypatch):
    folder = root / "stl10_binary"
    folder.mkdir()
    sums = {}
    for split, count in (("train", 40), ("test", 20), ("unlabeled", 1)):
        pixels, labels = noise(count, 3, 96, 96), (np.arange(count) % 10 + 1).astype(np.uint8)
        for name, content in (("X", pixels.transpose(0, 1, 3, 2)), ("y", labels)):  # column by column
            (folder / f"{split}_{name}.bin").write_bytes(content.tobytes())
            sums[f"{split}_{name}.bin"] = md5(folder / f"{split}_{name}.bin")
        if split == "test":
            test = pixels
    (folder / "fold_indices.txt").write_text("\n".join(" ".join(map(str, range(i, 20 + i))) for i in range(10)))
    lists = {"train_list": ["train_X.bin", "train_y.bin", "unlabeled_X.bin"], "test_list": ["test_X.bin", "test_y.bin"]}
    for name, files in lists.items():
        monkeypatch.setattr(datasets.STL10, name, [[file, sums[file]] for file in files])
    return test


def test_stl10_and_its_folds(tmp_path, monkeypatch):
    pixels = write_stl10(tmp_path, monkeypatch)
    images, classes = plain(ready(data.STL10(root=str(tmp_path), val_fraction=0.25)), "test")
    assert torch.equal(images, torch.from_numpy(pixels))
    assert classes == [*range(10)] * 2
    module = ready(data.STL10(root=str(tmp_path), val_fraction=0.5, fold=3))
    assert [len(s) for s in (module.train_set, module.val_set)] == [10, 10]
    with pytest.raises(ValueError, match="fold=10: must be from 0 to 9"):
        data.STL10(fold=10)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files(name, tmp_path):
    folder = tmp_path / name / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        pixels, labels = noise(count, 28, 28), (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, count], ">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    module = ready(getattr(data, name)(root=str(tmp_path), val_fraction=0.25))
    images, classes = plain(module, "test")
    assert torch.equal(images[:, 0], torch.from_numpy(pixels))
    assert classes == labels.tolist()
    assert module.input_shape == (1, 28, 28)


def test_cifar100_in_groups(tmp_path, served, monkeypatch):
    reader, contents = write_cifar(*served, fine=True)
    monkeypatch.setattr(data.CIFAR100, "reader", reader)
    module = ready(data.CIFAR100(labels="coarse", root=str(tmp_path / "data"), val_fraction=0.2))
    assert module.num_classes == len(module.class_names) == 20
    assert module.test_set.targets.tolist() == contents["test"]["coarse_labels"]
    with pytest.raises(ValueError, match="labels='rough'"):
        data.CIFAR100(labels="rough")


def colour(number, size=(40, 30)):
    return Image.new("RGB", size, (number * 20, 255 - number * 20, 100))


def is_colour(image, number):
    return (image.float().mean((1, 2)) - torch.tensor([number * 20, 255 - number * 20, 100])).abs().max() < 3


def test_imagenette(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number, wnid in enumerate(datasets.Imagenette._WNID_TO_CLASS):
            (tmp_path / "imagenette2-160" / split / wnid).mkdir(parents=True)
            for i in range(count):
                colour(number).save(tmp_path / "imagenette2-160" / split / wnid / f"{i}.JPEG")
    module = ready(data.Imagenette(root=str(tmp_path), image_size=24, val_fraction=0.25))
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [30, 10, 20]
    assert module.class_names[:2] == ("tench", "English springer")
    assert all(is_colour(image, label) for image, label in module.test_set)
    assert data.Imagenette(image_size=161).extracted == "imagenette2-320"
    assert data.Imagenette(image_size=321).extracted == "imagenette2"


def write_tiny_imagenet(root):
    base = root / "tiny-imagenet-200"
    wnids = [f"n{99 - i:08d}" for i in range(10)]
    for number, wnid in enumerate(sorted(wnids)):
        (base / "train" / wnid / "images").mkdir(parents=True)
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("box")
        for i in range(4):
            colour(number, (64, 64)).save(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    (base / "val" / "images").mkdir(parents=True)
    lines = []
    for i in range(20):
        colour(i % 10, (64, 64)).save(base / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{sorted(wnids)[i % 10]}\t0\t0\t9\t9\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(wnids))
    return sorted(wnids)


def test_tiny_imagenet(tmp_path):
    assert data.TinyImageNet(root=str(tmp_path)).num_classes == 200
    names = write_tiny_imagenet(tmp_path)
    module = ready(data.TinyImageNet(root=str(tmp_path), val_fraction=0.25))
    assert module.class_names == names
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [30, 10, 20]
    assert all(
        is_colour(image, label) for split in ("train", "test") for image, label in getattr(module, f"{split}_set")
    )
    assert sorted(module.test_set.targets.tolist()) == sorted([*range(10)] * 2)


def test_oxford_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for split, count in (("trainval", 4), ("test", 1)):
        lines = []
        for number, name in enumerate(data.OxfordPets.class_names):
            for i in range(count):
                colour(number % 12).save(base / "images" / f"{name}_{split}{i}.jpg")
                lines.append(f"{name}_{split}{i} {number + 1} 1 1\n")
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    module = ready(data.OxfordPets(root=str(tmp_path), image_size=16, val_fraction=0.25))
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [111, 37, 37]
    assert all(is_colour(image, label % 12) for image, label in module.test_set)
    titles = [name.title() for name in (n.replace("_", " ") for n in module.class_names)]
    assert titles == datasets.OxfordIIITPet(str(tmp_path)).classes


def test_flowers(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    labels = np.arange(306) % 102 + 1
    for i, label in enumerate(labels, 1):
        colour(label % 12).save(base / "jpg" / f"image_{i:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels[None]})
    ids = np.arange(1, 307).reshape(3, 1, 102)
    scipy.io.savemat(base / "setid.mat", {"trnid": ids[0], "valid": ids[1], "tstid": ids[2]})
    files = {
        name: (f"{stem}.mat", md5(base / f"{stem}.mat"))
        for name, stem in (("label", "imagelabels"), ("setid", "setid"))
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {"image": ("102flowers.tgz", ""), **files})
    module = ready(data.Flowers102(root=str(tmp_path), image_size=16))
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [102, 102, 102]
    assert all(is_colour(image, (label + 1) % 12) for image, label in module.val_set)


def test_dtd(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = []
        for number, name in enumerate(data.DTD.class_names):
            (base / "images" / name).mkdir(parents=True, exist_ok=True)
            colour(number % 12).save(base / "images" / name / f"{split}.jpg")
            lines.append(f"{name}/{split}.jpg\n")
        (base / "labels" / f"{split}1.txt").write_text("".join(lines))
    module = ready(data.DTD(root=str(tmp_path), image_size=16))
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [47, 47, 47]
    assert all(is_colour(image, label % 12) for image, label in module.test_set)


def test_fake_images_can_be_learned():
    module = ready(data.FakeImages(images=400, image_size=16))
    (train, labels), (test, expected) = plain(module, "train"), plain(module, "test")
    means = torch.stack([train[torch.tensor(labels) == k].float().mean(0) for k in range(10)])
    nearest = torch.cdist(test.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == torch.tensor(expected)).float().mean() > 0.95
    assert torch.equal(plain(ready(data.FakeImages(images=400, image_size=16)), "test")[0], test)
    assert not set(map(bytes, train.numpy())) & set(map(bytes, test.numpy()))


# ------------------------------------------------------------------------------------------------------- downloads


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
