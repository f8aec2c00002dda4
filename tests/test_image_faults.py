"""Names, orientation and size of image files, and where their cache is."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ff_lightning.cli import main
from ff_lightning.data.images.reading import load_image, to_pixels
from tests.test_folder_faults import read


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_names_that_are_not_utf8(image_folder, tmp_path, caplog, capsys):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9"))
    image_folder(count=4).rename(root)
    for split in ("train", "val", "test"):
        os.rename(os.fsencode(root / split / "cat"), os.fsencode(root / split) + b"/caf\xe9")
    odd = os.fsencode(root / "train") + b"/caf\xe9/\xff.png"
    shutil.copy(root / "train" / "dog" / "0.png", os.fsdecode(odd))
    for arguments in ({}, {}, {"in_memory": False}):  # the second time from the cache
        module = read(root, **arguments)
        assert module.class_names == ["caf\\xe9", "dog"]
        assert module.train_set.targets.tolist() == [0] * 5 + [1] * 4
    torch.save(list(module.class_names), tmp_path / "names.pt")
    assert torch.load(tmp_path / "names.pt", weights_only=True) == module.class_names
    (tmp_path / "plain").symlink_to(root)  # the command line takes text only
    main(["sheet", "--data=ImageFolder", f"--data.root={tmp_path / 'plain'}", f"--out={tmp_path / 'sheet.png'}"])
    assert "caf\\xe9" in capsys.readouterr().out
    Path(os.fsdecode(odd)).write_bytes(b"no image")
    assert len(read(root, on_error="skip").train_set) == 8
    assert "train/caf\\xe9/\\xff.png: " in caplog.text
    caplog.text.encode()  # can be written
    with pytest.raises(OSError, match=r"train/caf\\xe9/\\xff.png") as caught:
        read(root)
    str(caught.value).encode()
    shutil.rmtree(root / "val")
    (root / "train" / "dog" / "x.gif").touch()
    with pytest.raises(OSError, match=r"r\\xe9/train/caf"):
        read(root, val_fraction=0.3)
    caplog.text.encode()


# ------------------------------------------------------------------------------------------------- as the camera meant


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_orientation_of_the_camera(ending, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{ending}"
        image.save(path, exif=exif)
        found, expected = load_image(path), ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        assert found.size == ((20, 12) if orientation < 5 else (12, 20))
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_orientation_of_deep_images_and_damaged_notes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], np.rot90(deep // 257, -1))
    Image.new("RGB", (20, 12), "red").save(tmp_path / "odd.jpg", exif=b"Exif\0\0no notes at all")
    assert load_image(tmp_path / "odd.jpg").size == (20, 12)


# ---------------------------------------------------------------------------------------------------------- too large


@contextlib.contextmanager
def at_most(mebibytes):
    """Fails if more memory was held inside at once."""

    def kibibytes(name):
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are read from Linux")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kibibytes("VmRSS:")
    yield
    assert (kibibytes("VmHWM:") - before) / 1024 < mebibytes


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(image_folder, caplog):
    root = image_folder()
    path = root / "train" / "cat" / "0.png"
    Image.new("1", (13000, 13000)).save(path)
    with at_most(100), pytest.raises(OSError, match=f"{path}: 13000 x 13000 pixels are more than PIL.Image.MAX_IMAGE"):
        read(root)
    with at_most(100):
        assert len(read(root, on_error="skip").train_set) == 19


@pytest.mark.parametrize(("mode", "ending"), [("1", "png"), ("L", "png"), ("RGB", "jpg")])
def test_large_pictures_are_reduced_before_all_else(mode, ending, tmp_path):
    path = tmp_path / f"large.{ending}"
    quarters = np.kron(np.eye(2, dtype=np.uint8), np.full((10, 10), 255, np.uint8))
    Image.fromarray(quarters).resize((5000, 5000), Image.Resampling.NEAREST).convert(mode).save(path)
    with at_most(200):  # 5000 x 5000 pixels take 95 MiB in colour
        pixels = to_pixels(load_image(path), (3, 20, 20))
    inner = np.ix_(*2 * [[1, 2, 3, 16, 17, 18]])  # the edges are soft
    assert abs(pixels[0].numpy()[inner].astype(int) - quarters[inner]).max() <= 1


def test_pictures_of_less_than_4096_pixels_keep_them_all(tmp_path):
    image = Image.effect_noise((4095, 40), 50)
    image.save(tmp_path / "wide.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "wide.png"))[..., 0], np.asarray(image))


def test_a_line_is_not_enlarged_as_a_whole():
    with at_most(100):
        assert to_pixels(Image.new("RGB", (20000, 1), "red"), (3, 224, 224)).float().mean((1, 2)).tolist() == [
            255,
            0,
            0,
        ]
        assert to_pixels(Image.new("RGB", (1, 20000), "red"), (3, 224, 224)).shape == (3, 224, 224)


# -------------------------------------------------------------------------------------------------------------- cache


def test_nothing_is_written_into_the_folder_of_the_images(image_folder, cache, caplog):
    root = image_folder()
    before = sorted(root.rglob("*"))
    for _ in range(2):
        read(root)
    assert sorted(root.rglob("*")) == before
    assert len(list(cache.iterdir())) == 3  # training, validation, and what compares them
    assert caplog.text.count(f"kept for the next run in {cache}") == 1


@pytest.mark.parametrize("variable", ["FF_LIGHTNING_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_where_the_cache_is(variable, image_folder, tmp_path, monkeypatch):
    for name in ("FF_LIGHTNING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "place"))
    read(image_folder())
    below = {"FF_LIGHTNING_CACHE": "", "XDG_CACHE_HOME": "ff_lightning", "HOME": ".cache/ff_lightning"}[variable]
    assert list((tmp_path / "place" / below).glob("*.pt"))


def test_two_folders_with_one_cache(image_folder, tmp_path, monkeypatch):
    first = image_folder()
    second = tmp_path / "second"
    shutil.copytree(first, second)
    Image.new("RGB", (16, 16), "blue").save(second / "train" / "cat" / "0.png")
    roots = (first, second, first, Path("images"))  # the last one is the first again
    monkeypatch.chdir(tmp_path)
    found, written = [], []
    for root in roots:
        found.append(read(root, cache_dir=str(tmp_path / "both")).train_set.source.inputs[0])
        written.append({path: path.stat().st_ino for path in (tmp_path / "both").iterdir()})
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert len(written[0]) == 3
    assert written[1] == written[2] == written[3], "no file takes the place of another"


def test_an_image_that_was_mended_is_taken_again(image_folder):
    root = image_folder()
    path = root / "train" / "cat" / "3.png"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(b"x" * len(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(read(root, on_error="skip").train_set) == 19
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    module = read(root, on_error="skip")
    assert len(module.train_set) == 20
    assert torch.equal(module.train_set[3][0], to_pixels(load_image(path), (3, 16, 16)))
