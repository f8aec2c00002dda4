"""CIFAR-10 and CIFAR-100, read by torchvision."""

import pickle
from pathlib import Path
from typing import Any, Literal

from torchvision import datasets

from ff_lightning.data.images.download import BY_FLAG, DownloadedData
from ff_lightning.util.arguments import check_choice

CIFAR100_FINE = tuple(
    (  # noqa: SIM905
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
        "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
        "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
        "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange "
        "orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit "
        "raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel "
        "streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
        "turtle wardrobe whale willow_tree wolf woman worm"
    ).split()
)
CIFAR100_COARSE = tuple(
    (  # noqa: SIM905
        "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
        "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
        "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
        "vehicles_1 vehicles_2"
    ).split()
)


class CIFAR10(DownloadedData):
    """60,000 colour images of 32x32 pixels in 10 classes, 10,000 of them the test set.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader = datasets.CIFAR10
    splits = BY_FLAG
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    input_shape = (3, 32, 32)
    statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class CIFAR100(DownloadedData):
    """60,000 colour images of 32x32 pixels in 100 classes, or in 20 groups of them; 10,000 are the test set.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        labels: ``"fine"``: 100 classes. ``"coarse"``: 20.
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.

    Raises:
        ValueError: If `labels` is neither.
    """

    reader = datasets.CIFAR100
    splits = BY_FLAG
    class_names = CIFAR100_FINE
    input_shape = (3, 32, 32)
    statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

    def __init__(self, labels: Literal["fine", "coarse"] = "fine", **kwargs: Any) -> None:
        check_choice("labels", labels, ["fine", "coarse"])
        self.labels = labels
        if labels == "coarse":
            self.class_names = CIFAR100_COARSE
        super().__init__(**kwargs)

    def _read(self, split: str) -> Any:
        images = super()._read(split)
        if self.labels == "coarse":  # torchvision leaves them out
            (name, _), *_ = images.train_list if images.train else images.test_list
            content = pickle.loads((Path(images.root) / images.base_folder / name).read_bytes(), encoding="latin1")
            images.targets = content["coarse_labels"]
        return images
