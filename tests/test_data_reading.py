"""Images as they lie on disk: odd modes, damaged files, duplicates, and the cache of what was decoded."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ff_lightning import data
from ff_lightning.data.images.reading import load_image


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_images_of_other_modes_among_rgb_ones(image_folder, mode):
    root = image_folder()
    path = root / "test" / "cat" / "3.png"
    image = Image.open(path).convert(mode)
    path.unlink()
    image.save(path.with_suffix(".tif"))
    module = data.ImageFolder(str(root))
    module.setup("test")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(module.test_set[3][0], expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_cut_off(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = load_image(tmp_path / f"deep.{suffix}")
    assert image.mode == "RGB"
    assert np.array(image)[..., 0].ravel().tolist() == list(range(256))


def test_pixels_of_unknown_range_are_refused(tmp_path):
    for number, values in enumerate((np.full((4, 4), 70000, np.int32), np.ones((4, 4), np.float32))):
        Image.fromarray(values).save(tmp_path / f"{number}.tif")
        with pytest.raises(OSError, match=rf"cannot read the image .*{number}.tif: .* give 8 or 16 bits"):
            load_image(tmp_path / f"{number}.tif")


@pytest.mark.parametrize(
    ("in_memory", "workers", "content"), [(True, 0, b"no image"), (True, 0, None), (False, 0, None), (False, 1, b"no")]
)
def test_an_unreadable_image_is_named(image_folder, in_memory, workers, content):
    root = image_folder(size=(64, 64))
    path = root / "test" / "dog" / "3.png"
    path.write_bytes(content or path.read_bytes()[:2000])  # or half of it
    module = data.ImageFolder(str(root), num_workers=workers, in_memory=in_memory)

    def read():
        module.setup("test")
        return list(module.test_dataloader())

    with pytest.raises(OSError, match=r"cannot read the image .*test/dog/3.png"):
        read()


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_left_out_and_reported(image_folder, in_memory, caplog):
    root = image_folder()
    good = data.ImageFolder(str(root), cache_dir=str(root / "other"))
    good.setup("test")
    (root / "test" / "dog" / "3.png").write_bytes(b"no image")
    module = data.ImageFolder(str(root), on_error="skip", in_memory=in_memory)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        module.setup("test")
        assert "left out 1 of 20 images" in caplog.text
        assert f"cannot read the image {root}/test/dog/3.png" in caplog.text
        assert module.test_set.numbers.tolist() == [i for i in range(20) if i != 13]
        batches = list(module.test_dataloader())
        assert sum(len(y) for _, y in batches) == 19
        assert torch.equal(module.test_set[13][0], good.test_set[14][0])


def test_images_in_two_splits_are_reported(image_folder, caplog):
    root = image_folder()
    module = data.ImageFolder(str(root))
    module.prepare_data()
    assert "too" not in caplog.text
    (root / "test" / "dog" / "copy.png").write_bytes((root / "train" / "cat" / "1.png").read_bytes())
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        module.prepare_data()
        assert "1 images of 'test' are in 'train' too" in caplog.text
        assert "test/dog/copy.png" in caplog.text
        assert "train/cat/1.png" in caplog.text


# ----------------------------------------------------------------------------------------------------------- cache


def pixels(root, **arguments):
    module = data.ImageFolder(str(root), **arguments)
    module.setup("test")
    return module.test_set.source.inputs


def cache_file(cache):
    (path,) = cache.glob("*-test-16.pt")
    return path


def test_decoded_images_are_kept(image_folder, cache):
    root = image_folder()
    first = pixels(root)
    written = cache_file(cache).stat()
    for path in (root / "test").rglob("*.png"):  # same listing, other content: proof that the files are not read
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(pixels(root), first)
    assert cache_file(cache).stat().st_ino == written.st_ino
    assert [path.suffix for path in cache.iterdir()] == [".pt"], "nothing temporary is left"


def test_a_stale_cache_is_made_anew(image_folder):
    root = image_folder()
    first = pixels(root)
    Image.new("RGB", (16, 16), "blue").save(root / "test" / "cat" / "0.png")
    second = pixels(root)
    assert torch.equal(second[1:], first[1:])
    assert second[0, 2].eq(255).all()
    (root / "test" / "cat" / "1.png").unlink()
    assert torch.equal(pixels(root), torch.cat([second[:1], second[2:]]))


class Inverted(data.ImageFolder):
    """A class of the user's with an argument of its own."""

    def __init__(self, root, inverted=False):
        super().__init__(root)
        self.inverted = inverted

    def read_test(self):
        images = super().read_test()
        if self.inverted:
            images.loader = lambda path: ImageOps.invert(Image.open(path))
        return images


def test_a_cache_knows_the_arguments_of_a_class_of_the_user(image_folder):
    root, found = image_folder(), []
    for inverted in (False, True, False):
        module = Inverted(str(root), inverted)
        module.setup("test")
        found.append(module.test_set.source.inputs.clone())
    assert torch.equal(found[1], 255 - found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_is_made_anew(image_folder, cache, damage):
    root = image_folder()
    first = pixels(root).clone()
    content = cache_file(cache).read_bytes()
    start = content.index(first[0].numpy().tobytes())
    cache_file(cache).write_bytes(
        {"cut": content[: len(content) // 2], "empty": b"",
         "flip": content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]}[damage]
    )  # fmt: skip
    assert torch.equal(pixels(root), first)
    written = cache_file(cache).stat()
    assert torch.equal(pixels(root), first)
    assert cache_file(cache).stat().st_ino == written.st_ino, "it is whole again"


def test_a_cache_that_cannot_be_written_is_done_without(image_folder, caplog):
    root = image_folder()
    (root / "file").write_text("not a folder")
    first = pixels(root, cache_dir=str(root / "file" / "cache"))
    assert "the decoded images are not kept for the next run" in caplog.text
    assert torch.equal(pixels(root), first)


def test_a_part_of_a_folder_is_read_without_the_rest(image_folder, cache):
    root = image_folder()
    (root / "train" / "dog" / "3.png").write_bytes(b"no image")
    module = data.ImageFolder(str(root), classes=["cat", "dog"], samples_per_class=2, val_fraction=0.5)
    module.setup("fit")
    assert len(module.train_set) == 2
    assert not list(cache.glob("*train*"))
