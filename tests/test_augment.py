"""Augmentation of batches against a plain reading of the definitions, image by image."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from ff_lightning import data
from ff_lightning.data.images.augment import augment, crop_box, draws_of_epoch, resized, shifted
from ff_lightning.data.images.reading import to_pixels
from ff_lightning.data.images.split import Finish


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture
def draws():
    return torch.rand(64, 5)


def test_each_image_is_shifted_by_itself(images, draws):
    moved = shifted(images, draws, 2)
    for image, result, draw in zip(images, moved, draws, strict=True):
        top, left = int(draw[2] * 5), int(draw[3] * 5)
        assert torch.equal(result, v2.functional.crop(v2.functional.pad(image, 2), top, left, 16, 16))
    offsets = {(int(d[2] * 5), int(d[3] * 5)) for d in draws}
    assert len(offsets) > 15, "not all images have the same crop"


def test_half_of_the_images_is_mirrored(images, draws):
    result = augment(images, draws, "none", flips=True)
    for before, after, draw in zip(images, result, draws, strict=True):
        assert torch.equal(after, before.flip(2) if draw[4] < 0.5 else before)


def test_a_resized_crop_is_the_crop_resized(images):
    boxes = torch.tensor([[0, 0, 1, 1], [0.25, 0.5, 0.5, 0.5], [0, 0.25, 0.75, 0.5]]).repeat(22, 1)[:64]
    result = resized(images.float(), boxes)
    assert torch.allclose(result[0], images[0].float(), atol=1e-3)
    # without the edge of the result, which sees the neighbours of the crop
    for image, after, (top, left, h, w) in zip(images, result, (boxes * 16).int().tolist(), strict=True):
        crop = image[None, :, top : top + h, left : left + w].float()
        expected = F.interpolate(crop, (16, 16), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(after[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-3, rtol=0)


def test_crops_are_inside_and_of_the_right_size():
    draws = torch.rand(5000, 5)
    top, left, h, w = crop_box(draws, 100, 200)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 1 + 1e-6).all()
    assert (left + w <= 1 + 1e-6).all()
    whole = (h < 1) & (w < 1)
    area, ratio = (h * w)[whole], (w * 200 / (h * 100))[whole]
    assert area.min() + 1e-6 >= 0.35
    assert area.max() <= 1
    assert 0.75 - 1e-5 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-5


def test_a_worker_crops_the_same_part_out_of_the_full_image(draws):
    """In memory and from the file, the crop shows the same part of the image."""
    side = torch.linspace(0, 255, 64)
    image = torch.stack([side[:, None].expand(64, 64), side[None].expand(64, 64), torch.zeros(64, 64)]).to(torch.uint8)
    boxes = torch.stack(crop_box(draws, 64, 64), 1)
    small = to_pixels(image, (3, 32, 32))[None].expand(64, -1, -1, -1)
    in_memory = resized(small.float(), boxes)
    from_file = torch.stack([to_pixels(image, (3, 32, 32), box) for box in boxes]).float()
    assert (in_memory - from_file).abs().max() < 8  # of 255: half a pixel of the ramp is 2, rounding of the box 4


def test_draws_hang_on_seed_and_epoch_alone():
    first = draws_of_epoch(100, 0, 3).clone()
    torch.manual_seed(5)
    draws_of_epoch.cache_clear()
    assert torch.equal(draws_of_epoch(100, 0, 3), first)
    assert not torch.equal(draws_of_epoch(100, 0, 4), first)
    assert not torch.equal(draws_of_epoch(100, 1, 3), first)


def test_an_image_is_augmented_the_same_in_any_batch_and_process(image_folder):
    root = str(image_folder())
    seen = {}
    for batch_size, world in ((4, 1), (10, 1), (5, 2)):
        for rank in range(world):
            module = data.ImageFolder(root, batch_size=batch_size, num_workers=0)
            module.setup("fit")
            module._world = lambda world=world, rank=rank: (world, rank)
            loader = module.train_dataloader()
            loader.sampler.set_epoch(2)
            order = [index for _, index in list(loader.sampler)]
            images = torch.cat([x for x, _ in loader])
            assert len(images) == 20 // world
            for index, image in zip(order, images, strict=True):
                assert torch.equal(image, seen.setdefault(index, image))
    assert len(seen) == 20


def test_a_batch_is_normalised(images):
    module = data.FakeImages(images=40, val_fraction=0.3, augment=False, batch_size=40)
    module.setup("fit")
    ((x, y),) = module.train_dataloader()
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in module.statistics)
    raw, labels = zip(*module.train_set, strict=True)
    order = y.argsort(stable=True)
    assert sorted(labels) == y[order].tolist()
    assert {tuple(i.flatten().tolist()) for i in raw} == {
        tuple(((i * std + mean) * 255).round().flatten().tolist()) for i in x
    }


def test_the_work_is_done_on_the_device(images, draws):
    split = data.FakeImages(images=40, val_fraction=0.3)
    split.setup("fit")
    finish = Finish(split.train_set, split.statistics, torch.device("meta"))
    x, y = finish((images, torch.zeros(64, dtype=torch.int64), draws))
    assert x.device.type == y.device.type == "meta"
    assert x.shape == images.shape


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["FakeImages", "Digits"])
def test_images_in_memory_and_streamed_ones_are_the_same(name, in_memory):
    modules = [getattr(data, name)(num_workers=0, in_memory=chosen) for chosen in (True, in_memory)]
    batches = []
    for module in modules:
        module.setup("fit")
        batches.append(next(iter(module.train_dataloader())))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert np.array_equal(modules[0].train_set.numbers, modules[1].train_set.numbers)
