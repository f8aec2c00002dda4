"""CIFAR-10 and CIFAR-100, read by torchvision."""

from typing import Any

from torch.utils.data import Dataset
from torchvision import datasets

from ff_lightning.data.base import ImageData, Sample


class CIFAR10(ImageData):
    """60,000 colour images of 32x32 pixels in 10 classes, 10,000 of them the test set.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        download: Whether to download to `root` what is not there (170 MB).
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader: type[datasets.CIFAR10] = datasets.CIFAR10
    class_names: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    input_shape = (3, 32, 32)
    statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    def __init__(self, download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is not there."""
        for train in (True, False):
            self.reader(self.root, train=train, download=self.download)

    def read_train(self) -> Dataset[Sample]:
        """50,000 images."""
        return self.reader(self.root, train=True)

    def read_test(self) -> Dataset[Sample]:
        """10,000 images."""
        return self.reader(self.root, train=False)


class CIFAR100(CIFAR10):
    """60,000 colour images of 32x32 pixels in 100 classes, 10,000 of them the test set.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        download: Whether to download to `root` what is not there (170 MB).
        kwargs: root, image_size, batch_size, augment, val_fraction, seed, ...; see `ImageData`.
    """

    reader = datasets.CIFAR100
    class_names = tuple(
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
    statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
