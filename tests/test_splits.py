"""Subsets, validation and choices of classes: stratified, apart, and the same for a seed everywhere."""

import json

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from ff_lightning import data
from ff_lightning.commands.sheet import counts


def ready(name="Digits", **arguments):
    module = getattr(data, name)(**arguments)
    module.setup("fit")
    module.setup("test")
    return module


def per_class(split):
    return split.targets.bincount(minlength=10).tolist()


def test_so_many_of_each_class_and_validation_is_cut_from_them():
    module = ready(samples_per_class=20)
    assert per_class(module.train_set) == [18] * 10
    assert per_class(module.val_set) == [2] * 10
    assert len(module.test_set) == 360


def test_validation_from_the_rest_is_that_of_the_whole_set():
    whole = ready()
    for size in ({"samples_per_class": 20}, {"subset": 100}):
        module = ready(val_from="rest", **size)
        assert np.array_equal(module.val_set.numbers, whole.val_set.numbers)
        assert len(module.train_set) == 20 * 10 if "samples_per_class" in size else 100
        assert not set(module.train_set.numbers) & set(module.val_set.numbers)


def test_a_subset_has_its_share_of_each_class():
    module = ready(subset=500)
    assert len(module.train_set) + len(module.val_set) == 500
    share = np.array(per_class(module.train_set)) / len(module.train_set)
    whole = np.array(per_class(ready().train_set)) / 1293
    assert abs(share - whole).max() < 0.005
    assert len(ready(subset=1437).train_set) == 1293, "all of them"


def test_same_seed_same_images_other_seed_other_images():
    first, again, other = (ready(samples_per_class=20, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train_set.numbers, again.train_set.numbers)
    assert not np.array_equal(first.train_set.numbers, other.train_set.numbers)
    # on every machine: what it was when this was written
    assert first.train_set.numbers[:8].tolist() == [30, 38, 44, 52, 54, 65, 71, 77]


def test_a_validation_set_of_its_own_is_used_unless_there_is_a_subset(image_folder):
    root = str(image_folder(count=20))
    whole = ready("ImageFolder", root=root)
    assert (len(whole.train_set), len(whole.val_set)) == (40, 40)
    cut = ready("ImageFolder", root=root, samples_per_class=10)
    assert (len(cut.train_set), len(cut.val_set)) == (18, 2)
    assert cut.val_set.source is cut.train_set.source
    own = ready("ImageFolder", root=root, samples_per_class=10, val_from="rest")
    assert (len(own.train_set), len(own.val_set)) == (20, 40)


def test_classes_by_number_and_name_are_numbered_anew():
    whole, module = ready(), ready(classes=[7, "3", 5])
    assert (module.num_classes, module.class_names) == (3, ["7", "3", "5"])
    for split in ("train", "val", "test"):
        images, of_whole = getattr(module, f"{split}_set"), getattr(whole, f"{split}_set")
        assert set(images.targets.tolist()) == {0, 1, 2}
        if split == "test":
            expected = [([7, 3, 5].index(label), image) for image, label in of_whole if label in (7, 3, 5)]
            assert len(expected) == len(images)
            assert all(a == b and torch.equal(x, y) for (a, x), (y, b) in zip(expected, images, strict=True))


def test_classes_and_their_complement_share_no_image():
    parts = [ready(classes=classes) for classes in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
    used = [np.concatenate([m.train_set.numbers, m.val_set.numbers]).tolist() for m in parts]
    assert sorted(used[0] + used[1]) == list(range(1437))


def test_classes_of_a_folder(image_folder):
    root = str(image_folder(classes=("ant", "bee", "cat")))
    module = ready("ImageFolder", root=root, classes=["cat", "ant"])
    assert module.class_names == ["cat", "ant"]
    red, green, blue = torch.stack([image for image, _ in module.test_set]).float().mean((2, 3)).T
    assert torch.equal(module.test_set.targets == 0, blue > red), "cats are blue, ants are red"
    assert (green < torch.maximum(red, blue)).all()


@pytest.mark.parametrize("given", ['["2", "10"]', '["10", 0, "2"]'])
def test_classes_whose_names_are_numbers(given, image_folder):
    root = str(image_folder(classes=[str(number) for number in range(11)], count=1))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(data.ImageData, "data")
    arguments = ["--data=ff_lightning.data.ImageFolder", f"--data.root={root}", f"--data.classes={given}"]
    module = parser.instantiate(parser.parse_args(arguments)).data
    assert module.class_names == [str(name) for name in json.loads(given)]
    with pytest.raises(ValueError, match=r"classes=\[0, 2\]: 2 is the number of a class and the name of another one"):
        data.ImageFolder(root, classes=[0, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_class": 0}, "samples_per_class=0: must be at least 1"),
        ({"subset": 0}, "subset=0: must be at least 1"),
        ({"samples_per_class": 5, "subset": 5}, "samples_per_class=5 and subset=5: give one of them"),
        ({"val_from": "test"}, "val_from='test'"),
        ({"on_error": "hide"}, "on_error='hide'"),
        ({"classes": [1]}, "two or more classes"),
        ({"classes": [1, "1"]}, "each once"),
        ({"classes": [1, 10]}, "classes=10 is not known: give numbers from 0 to 9 or names"),
        ({"classes": [1, -1]}, "classes=-1 is not known"),
    ],
)
def test_bad_choices_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.Digits(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_class": 142}, r"samples_per_class=142: more than there are of \{'8': 139\}"),
        ({"subset": 1438}, "subset=1438: more than the 1437 training samples"),
        ({"subset": 5}, "subset=5 of 1437 training samples"),
        ({"samples_per_class": 3}, "val_fraction=0.1 of 30 training samples"),
    ],
)
def test_a_subset_that_cannot_be_taken(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(**arguments)


def test_a_class_missing_in_a_split(caplog):
    class Numbers(data.Digits):
        def read_train(self):
            return self.without(super().read_train(), 4 if self.seed else None)

        def read_test(self):
            return self.without(super().read_test(), 2)

        def without(self, images, missing):
            keep = images.targets != (-1 if missing is None else missing)
            images.images, images.targets = images.images[keep], images.targets[keep]
            return images

    Numbers().setup("test")
    assert "there is no sample for test of ['2']" in caplog.text
    with pytest.raises(ValueError, match=r"there is no sample for training of \['4'\]"):
        Numbers(seed=1).setup("fit")


def test_more_classes_than_names():
    class Numbers(data.Digits):
        class_names = tuple("012345678")

    with pytest.raises(ValueError, match="a sample for training is of class 9: there are 9 class names"):
        Numbers().setup("fit")


def test_counts_are_those_of_the_loaders():
    module = ready(classes=[3, 4])
    *_, total = (line.split() for line in counts(module).splitlines())
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    assert [int(n) for n in total[1:]] == [len(loader.dataset) for loader in loaders]


def test_the_arguments_are_stored_plainly(tmp_path):
    module = data.FakeImages(classes=[0, "pattern3"], samples_per_class=5, val_from="rest")
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    stored = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert stored["classes"] == [0, "pattern3"]
    again = data.FakeImages(**stored)
    assert again.class_names == module.class_names
