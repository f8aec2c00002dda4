"""Folders as they are found: what programs leave behind, what cannot be read, and in which way in it is met."""

import contextlib
import io
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from torchvision import datasets

from ff_lightning import data
from tests.test_data_sets import write_tiny_imagenet


def read(root, **arguments):
    """A folder read in all ways in: the first image, the comparison of splits, the splits and the loader."""
    module = data.ImageFolder(str(root), **{"num_workers": 0, "batch_size": 2, **arguments})
    module.prepare_data()
    module.setup("fit")
    list(module.train_dataloader())
    list(module.val_dataloader())
    return module


# ------------------------------------------------------------------------------------------ what programs leave behind


def litter(folder):
    """Write what file managers, notebooks and archives leave in a folder, with images in it."""
    image = next(path for path in sorted(folder.parent.rglob("*.png")) if "." not in path.parts[-2])
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        (folder / name / "cat").mkdir(parents=True)
        shutil.copy(image, folder / name / "0-checkpoint.png")
        shutil.copy(image, folder / name / "cat" / "0.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\26\7")


def test_what_programs_leave_behind_is_no_class_and_no_image(image_folder, caplog):
    root = image_folder(count=4)
    clean = read(root)
    for folder in [root, *(path for path in root.glob("*")), *(path for path in root.glob("*/*"))]:
        litter(folder)
    caplog.clear()
    for arguments in ({}, {"in_memory": False}, {"on_error": "skip"}):
        module = read(root, **arguments)
        assert module.class_names == ["cat", "dog"]
        assert [len(s) for s in (module.train_set, module.val_set)] == [8, 8]
        pairs = zip(module.train_set, clean.train_set, strict=True)
        assert all(torch.equal(x, y) and a == b for (x, a), (y, b) in pairs)
    assert "passed over" not in caplog.text
    assert " too, such as" not in caplog.text


def test_what_programs_leave_behind_in_sets_that_were_downloaded(tmp_path):
    names = write_tiny_imagenet(tmp_path)
    for wnid in datasets.Imagenette._WNID_TO_CLASS:
        for split in ("train", "val"):
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20), (len(split), 0, 0)).save(folder / "0.JPEG")
            Image.new("RGB", (20, 20), (len(split), 9, 0)).save(folder / "1.JPEG")
    for base, name in (("tiny-imagenet-200", names[0]), ("imagenette2-160", "n01440764")):
        for folder in (tmp_path / base / "train", tmp_path / base / "train" / name):
            (folder / ".ipynb_checkpoints").mkdir()
            shutil.copy(next(folder.rglob("*.JPEG")), folder / ".ipynb_checkpoints" / "0-checkpoint.JPEG")
            (folder / "._0.JPEG").write_bytes(b"\0\5\26\7")
    for module, images in ((data.TinyImageNet(root=str(tmp_path)), 40), (data.Imagenette(root=str(tmp_path)), 20)):
        module.prepare_data()
        assert len(module.read_train()) == images
        assert module.read_train().targets == sorted([*range(10)] * (images // 10))


@pytest.mark.parametrize(
    ("train", "val", "test"), [("Train", "valid", "Test"), ("training", "Validation", "testing"), ("TRAIN", "VAL", "")]
)
def test_splits_by_other_names(train, val, test, image_folder):
    root = image_folder(("train", "val", "test") if test else ("train", "val"))
    for name, other in (("train", train), ("val", val), ("test", test)):
        if other:
            (root / name).rename(root / other)
    module = read(root)
    assert module.folders["train"].name == train
    assert module.folders["test"].name == (test or val)
    assert ("val" in module.folders) == bool(test)


def test_two_folders_for_a_split(image_folder):
    root = image_folder()
    shutil.copytree(root / "val", root / "valid")
    with pytest.raises(ValueError, match=r"holds \['val', 'valid'\], which are names of the same split"):
        data.ImageFolder(str(root))


def test_files_that_are_passed_over_are_counted(image_folder, caplog):
    root = image_folder()
    for i in range(3):
        (root / "train" / "cat" / f"{i}.gif").write_bytes(b"GIF89a")
    (root / "train" / "dog" / "notes.TXT").write_text("a note")
    shutil.copy(root / "train" / "dog" / "0.png", root / "train" / "loose.png")
    data.ImageFolder(str(root))
    assert f"passed over 5 files in {root}/train that are no images of a class: 3 .gif, 1 " in caplog.text
    assert "1 in no class folder" in caplog.text
    assert "1 .txt" in caplog.text
    assert caplog.text.count("passed over") == 1


def test_of_many_loose_images_five_are_listed(tmp_path):
    for folder, message in ((tmp_path, "must hold a folder 'train'"), (tmp_path / "train", "each of two or more")):
        folder.mkdir(exist_ok=True)
        for i in range(1000):
            (folder / f"{i}.png").touch()
        with pytest.raises(FileNotFoundError, match=message) as caught:
            data.ImageFolder(str(tmp_path))
        assert str(caught.value).count(".png") == 5
        assert " and 99" in str(caught.value)


# ------------------------------------------------------------------------------------------------ what cannot be read


def damaged_avif():
    """A file with one wrong byte that the decoder answers with something else than OSError."""
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(file, "AVIF")
    for at in range(len(file.getvalue())):
        content = bytearray(file.getvalue())
        content[at] ^= 255
        try:
            Image.open(io.BytesIO(content)).load()
        except RuntimeError:
            return bytes(content)
        except Exception:
            continue
    raise AssertionError("the decoder has become more tolerant")


def spoil(path, kind):
    """Put something in the place of an image that cannot be read."""
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # paths of sockets are short
            made.bind(path.name)
    elif kind == "link to nowhere":
        path.symlink_to("nowhere.png")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "folder":
        (path / "more").mkdir(parents=True)
        (path / "more" / "image.png").write_bytes(content)
    elif kind == "link up":
        path.with_name("up").symlink_to("..")
    else:
        path.write_bytes(
            {"empty": b"", "text": b"no image", "half": content[: len(content) // 2], "avif": damaged_avif()}[kind]
        )


KINDS = ["pipe", "socket", "link to nowhere", "link to itself", "folder", "link up", "empty", "text", "half", "avif"]
NAMES = {"link up": "up"}


@pytest.mark.parametrize("arguments", [{}, {"in_memory": False}], ids=["in memory", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_named_or_left_out(kind, arguments, image_folder, caplog):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    root = image_folder(size=(32, 32))
    spoil(root / "train" / "cat" / "0.png", kind)  # the first image, too
    name = f"cannot read the image {root}/train/cat/{NAMES.get(kind, '0.png')}: "
    with pytest.raises(OSError, match=name):
        read(root, **arguments)
    with pytest.raises(OSError, match=name):
        read(root, image_size=16, **arguments)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        module = read(root, on_error="skip", **arguments)
        assert module.input_shape == (3, 32, 32)
        assert module.class_names == ["cat", "dog"]
        assert module.train_set.targets.tolist() == [0] * 9 + [1] * 10
        assert name in caplog.text
        assert "left out 1 of 20 images" in caplog.text


def test_what_cannot_be_read_in_a_worker(image_folder):
    root = image_folder()
    spoil(root / "train" / "dog" / "3.png", "pipe")
    with pytest.raises(OSError, match=f"cannot read the image {root}/train/dog/3.png"):
        read(root, in_memory=False, num_workers=1)


def test_a_class_folder_that_leads_back_up(image_folder, caplog):
    root = image_folder()
    (root / "train" / "all").symlink_to("../train")
    with pytest.raises(OSError, match=f"class folder {root}/train/all: it leads back to a folder above it"):
        data.ImageFolder(str(root))
    assert read(root, on_error="skip").class_names == ["cat", "dog"]
    assert f"{root}/train/all" in caplog.text


def test_links_to_folders_elsewhere_are_followed(image_folder, tmp_path):
    root = image_folder()
    (root / "train" / "dog").rename(tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "elsewhere" / "0.png", tmp_path / "more" / "0.png")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    assert read(root).train_set.targets.bincount().tolist() == [11, 10]


@contextlib.contextmanager
def nobody():
    """Without the rights of root, if these are root's."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder(image_folder, monkeypatch):
    """A folder of images that anybody may read, beside a cache that anybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o777)
        root = base / "images"
        shutil.copytree(image_folder(), root)
        monkeypatch.setenv("FF_LIGHTNING_CACHE", str(base / "cache"))
        read(root)  # imports what is imported late
        shutil.rmtree(base / "cache")
        yield root


@pytest.mark.parametrize("place", ["train/cat/0.png", "train/cat/more"])
def test_what_may_not_be_read_is_named_or_left_out(place, open_folder, caplog):
    if place.endswith("more"):
        (open_folder / place).mkdir()
    (open_folder / place).chmod(0)
    left = 9 if place.endswith("png") else 10
    with nobody():
        for arguments in ({}, {"in_memory": False}):
            with pytest.raises(OSError, match=f"cannot read the image {open_folder / place}"):
                read(open_folder, **arguments)
            for _ in range(2):
                caplog.clear()
                module = read(open_folder, on_error="skip", **arguments)
                assert module.train_set.targets.bincount().tolist() == [left, 10]
                assert f"cannot read the image {open_folder / place}" in caplog.text
    (open_folder / place).chmod(0o755)
    if left == 9:  # the same name, size and time, but readable by now
        assert len(read(open_folder, on_error="skip").train_set) == 20


def test_a_cache_that_may_not_be_written_is_a_warning(open_folder, monkeypatch, caplog):
    first = read(open_folder).train_set.source.inputs
    cache = open_folder.parent / "closed"
    cache.mkdir()
    for mode in (0o555, 0):
        cache.chmod(mode)
        with nobody():
            module = read(open_folder, cache_dir=str(cache))
        assert torch.equal(module.train_set.source.inputs, first)
        assert "not kept for the next run" in caplog.text
    assert not list(cache.iterdir())


def test_a_full_disk_is_a_warning(image_folder, cache, caplog):
    resource = pytest.importorskip("resource")
    root = image_folder()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # no file may become larger
    try:
        module = read(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(module.train_set) == 20
    assert "not kept for the next run" in caplog.text
    assert all(path.suffix == ".pt" for path in cache.iterdir()), "nothing of it is left"


def test_a_class_without_any_readable_image(image_folder):
    root = image_folder(count=2)
    for split in ("val", "train"):
        for path in (root / split / "dog").iterdir():
            path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"there is no sample for training of \['dog'\]"):
        read(root, on_error="skip")
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"no image")
    for arguments in ({}, {"image_size": 16}, {"image_size": 16, "in_memory": False}):
        with pytest.raises(OSError, match=r"none of the .*training.* can be read"):
            read(root, on_error="skip", **arguments)
