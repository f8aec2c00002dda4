import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from ff_lightning import data
from tests.conftest import REAL_DATA


def all_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_splits_are_apart_stratified_and_always_the_same():
    module = data.Digits(batch_size=32)
    module.setup("fit")
    module.setup("test")
    train, val, test = (all_of(module._eval_loader(s)) for s in (module.train_set, module.val_set, module.test_set))
    assert [len(labels) for _, labels in (train, val, test)] == [1293, 144, 360]
    for _, labels in (train, val, test):
        share = labels.bincount() / len(labels)
        assert (share - 0.1).abs().max() < 0.015
    images = torch.cat([images.flatten(1) for images, _ in (train, val, test)])
    original = datasets_digits()
    assert sorted(images.sum(1).tolist()) == pytest.approx(sorted(original), abs=0.1)  # rounded to 256 levels
    again = data.Digits(batch_size=32)
    again.setup("fit")
    assert torch.equal(all_of(again._eval_loader(again.val_set))[0], val[0])


def datasets_digits():
    """Sums of the normalised scans, straight from scikit-learn."""
    from sklearn.datasets import load_digits

    module = data.Digits()
    (mean,), (std,) = module.statistics
    return (((load_digits().data / 16) - mean) / std).sum(1).tolist()


def test_digits_are_normalised_by_the_training_scans():
    module = data.Digits(val_fraction=0.01)
    module.setup("fit")
    images, _ = all_of(module._eval_loader(module.train_set))
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_digits_can_be_resized():
    module = data.Digits(image_size=16)
    module.setup("fit")
    assert next(iter(module.train_dataloader()))[0].shape == (128, 1, 16, 16)
    with pytest.raises(ValueError, match="image_size=4"):
        data.Digits(image_size=4)


def test_epochs_are_shuffled_differently_but_reproducibly():
    module = data.Digits()
    module.setup("fit")
    loader = module.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(set(orders[0]))


def test_folder_with_all_splits(image_folder):
    module = data.ImageFolder(str(image_folder()), batch_size=4, num_workers=0)
    module.setup("fit")
    module.setup("test")
    assert (module.num_classes, module.input_shape, module.class_names) == (2, (3, 16, 16), ["cat", "dog"])
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [20, 20, 20]
    images, labels = all_of(module.test_dataloader())
    assert images.shape == (20, 3, 16, 16)
    red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
    assert torch.equal(red > green, labels == 0), "cats are red, dogs are green"


def test_folder_without_test_uses_val_as_test(image_folder, caplog):
    module = data.ImageFolder(str(image_folder(("train", "val"))), num_workers=0, val_fraction=0.2)
    assert "'val' is the test set; with val_as='val' it is the validation set" in caplog.text
    module.setup("fit")
    module.setup("test")
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [16, 4, 20]
    assert not set(module.train_set.numbers) & set(module.val_set.numbers)
    assert sorted(label for _, label in module.val_set) == [0, 0, 1, 1]


def test_folder_without_test_keeps_val_for_validation(image_folder, caplog):
    module = data.ImageFolder(str(image_folder(("train", "val"))), val_as="val", num_workers=0)
    module.setup("fit")
    assert "cut from 'train'" not in caplog.text
    assert [len(s) for s in (module.train_set, module.val_set)] == [20, 20]
    with pytest.raises(FileNotFoundError, match="has no folder 'test', and val_as='val': there is nothing to test on"):
        module.setup("test")
    with pytest.raises(ValueError, match="val_as='valid' is not known: give one of"):
        data.ImageFolder(module.root, val_as="valid")


@pytest.mark.parametrize("val_as", ["test", "val"])
def test_folder_with_all_splits_needs_no_word_on_val(val_as, image_folder):
    module = data.ImageFolder(str(image_folder()), val_as=val_as)
    assert {split: folder.name for split, folder in module.folders.items()} == {
        name: name for name in ("train", "val", "test")
    }


def test_folder_with_train_alone_has_nothing_to_test_on(image_folder):
    module = data.ImageFolder(str(image_folder(("train",))), num_workers=0)
    module.setup("fit")
    assert len(module.val_set) == 2
    with pytest.raises(FileNotFoundError, match="neither a folder 'test' nor 'val'"):
        module.setup("test")


def test_folder_resizes_and_crops_to_a_square(image_folder):
    module = data.ImageFolder(str(image_folder(size=(20, 30))), image_size=12, num_workers=0)
    module.setup("fit")
    assert module.train_set[0][0].shape == module.val_set[0][0].shape == (3, 12, 12)
    image = Image.open(f"{module.root}/val/cat/0.png")
    expected = v2.Compose([v2.Resize(12), v2.CenterCrop(12)])(v2.functional.pil_to_tensor(image))
    assert torch.equal(module.val_set[0][0], expected)
    assert data.ImageFolder(module.root).input_shape == (3, 20, 20)


def test_augmentation_changes_training_images_only(image_folder):
    root = str(image_folder())
    batches = {}
    for augment in (False, True):
        module = data.ImageFolder(root, augment=augment, batch_size=20)
        module.setup("fit")
        for epoch in (0, 1, 0):
            loader = module.train_dataloader()
            loader.sampler.set_epoch(epoch)
            ((images, labels),) = loader
            order = torch.tensor([index for _, index in list(loader.sampler)]).argsort()
            assert torch.equal(labels[order], module.train_set.targets)
            batches.setdefault((augment, epoch), images[order])
            assert torch.equal(batches[augment, epoch], images[order]), "same epoch, same images"
        batches[augment, "val"] = all_of(module.val_dataloader())[0]
    assert torch.equal(batches[False, 0], batches[False, 1])
    assert not torch.equal(batches[True, 0], batches[True, 1])
    assert torch.equal(batches[True, "val"], batches[False, "val"])


def test_missing_folders_and_classes_are_named(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold a folder 'train'.*it does not exist"):
        data.ImageFolder(str(tmp_path / "nowhere"))
    root = image_folder()
    for split in ("train", "val", "test"):
        (root / split / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class folder .*train/emu holds no image"):
        data.ImageFolder(str(root))
    Image.new("RGB", (16, 16)).save(root / "train" / "emu" / "0.png")
    (root / "val" / "emu").rmdir()
    with pytest.raises(FileNotFoundError, match=r"images/val and .*/train must hold the same classes.*\['emu'\]"):
        data.ImageFolder(str(root))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"batch_size": 0}, "batch_size=0"), ({"val_fraction": 1.0}, "val_fraction=1.0")]
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.Digits(**arguments)


def test_a_class_too_small_to_be_split(image_folder):
    module = data.ImageFolder(str(image_folder(("train",), count=1)), num_workers=0)
    with pytest.raises(ValueError, match=r"val_fraction=0.1 of 2 training samples"):
        module.setup("fit")


def write_cifar(folder, address, fine):
    """A small archive in the format of CIFAR-10 or -100, served at an address; returns torchvision's reader of it."""
    generator = np.random.default_rng(0)
    base = "cifar-100-python" if fine else "cifar-10-batches-py"
    names = {True: ["train"] if fine else ["data_batch_1", "data_batch_2"], False: ["test"] if fine else ["test_batch"]}
    key, classes, copies = ("fine_labels", 100, 2) if fine else ("labels", 10, 10)
    source = folder / "source" / base
    source.mkdir(parents=True)
    contents = {
        name: {"data": generator.integers(0, 256, (copies * classes, 3072), np.uint8), key: [*range(classes)] * copies}
        for name in names[True] + names[False]
    }
    for content in contents.values() if fine else ():
        content["coarse_labels"] = [label // 5 for label in content[key]]
    names_file = "meta" if fine else "batches.meta"
    class_names = {
        "fine_label_names" if fine else "label_names": list((data.CIFAR100 if fine else data.CIFAR10).class_names)
    }
    sums = {}
    for name, content in [*contents.items(), (names_file, class_names)]:
        (source / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((source / name).read_bytes()).hexdigest()
    with tarfile.open(folder / "source.tar.gz", "w:gz") as archive:
        archive.add(source, base)

    class Reader(datasets.CIFAR100 if fine else datasets.CIFAR10):
        url = f"{address}/source.tar.gz"
        filename = "copy.tar.gz"
        tgz_md5 = hashlib.md5((folder / "source.tar.gz").read_bytes()).hexdigest()
        train_list = [[name, sums[name]] for name in names[True]]
        test_list = [[name, sums[name]] for name in names[False]]
        meta = {"filename": names_file, "key": next(iter(class_names)), "md5": sums[names_file]}

    return Reader, contents


@pytest.mark.parametrize("fine", [False, True], ids=["CIFAR10", "CIFAR100"])
def test_cifar_is_downloaded_read_and_split(fine, tmp_path, served, monkeypatch):
    reader, contents = write_cifar(*served, fine)
    cls = data.CIFAR100 if fine else data.CIFAR10
    monkeypatch.setattr(cls, "reader", reader)
    module = cls(root=str(tmp_path / "data"), num_workers=0, batch_size=4, val_fraction=0.5)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    assert module.num_classes == len(module.class_names) == (100 if fine else 10)
    assert len(module.train_set) == len(module.val_set) == 100
    images, labels = all_of(module.test_dataloader())
    content = contents["test" if fine else "test_batch"]
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in module.statistics)
    expected = (torch.from_numpy(content["data"]).view(-1, 3, 32, 32) / 255 - mean) / std
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == content["fine_labels" if fine else "labels"]


def test_class_numbers_follow_the_order_of_the_archives():
    assert list(data.CIFAR100.class_names) == sorted(data.CIFAR100.class_names)  # numbered by name
    assert len(set(data.CIFAR100.class_names)) == 100


@pytest.mark.skipif(not (REAL_DATA / "cifar10").is_dir(), reason=f"no real images in {REAL_DATA} (see FF_DATA)")
def test_real_cifar_folder():
    module = data.ImageFolder(str(REAL_DATA / "cifar10"), num_workers=0, in_memory=False)
    module.setup("fit")
    module.setup("test")
    assert (module.num_classes, module.input_shape) == (10, (3, 32, 32))
    assert [len(s) for s in (module.train_set, module.val_set, module.test_set)] == [45000, 5000, 10000]
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (128, 3, 32, 32)
    assert images.abs().max() < 4
    assert labels.unique().numel() == 10


@pytest.mark.skipif(not (REAL_DATA / "imagenette2-128").is_dir(), reason=f"no real images in {REAL_DATA} (see FF_DATA)")
@pytest.mark.parametrize("name", ["ImageFolder", "Imagenette"])
def test_real_imagenette(name, tmp_path):
    (tmp_path / "imagenette2-160").symlink_to(REAL_DATA / "imagenette2-128")
    root = tmp_path / "imagenette2-160" if name == "ImageFolder" else tmp_path
    module = getattr(data, name)(root=str(root), image_size=128, samples_per_class=20, cache_dir=str(tmp_path))
    module.setup("fit")
    assert [len(s) for s in (module.train_set, module.val_set)] == [180, 20]
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (128, 3, 128, 128)
    assert 0.5 < images.std() < 1.5
    assert labels.unique().numel() == 10
