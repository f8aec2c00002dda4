"""Each set in its own format on disk, written here with a few images; downloads that fail."""

import hashlib

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from ff_lightning import data
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
