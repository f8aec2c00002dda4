"""The features of blocks in the plane: which classes lie apart.

Shapes: N samples, B batch, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ff_lightning.drawing.figure import short, shown_units, small_multiples

SAMPLES, CLASSES = 300, 10
"""What is drawn at most: in all, and of how many classes."""


class Samples:
    """The features of some samples: alike many of each class, of `CLASSES` of them where there are more.

    Args:
        classes: Their number in the data.
    """

    def __init__(self, classes: int) -> None:
        shown = {round(k) for k in torch.linspace(0, classes - 1, min(CLASSES, classes)).tolist()}
        self.left = dict.fromkeys(sorted(shown), SAMPLES // len(shown))
        self.features: list[list[Tensor]] = []  # of each batch, of each block (B, D)
        self.classes: list[int] = []

    def wanted(self, target: Tensor) -> list[int]:
        """The samples of a batch whose features are wanted, by their classes (B,)."""
        chosen = []
        for i, number in enumerate(target.tolist()):
            if self.left.get(number, 0):
                self.left[number] -= 1
                chosen.append(i)
        return chosen

    def add(self, features: Sequence[Tensor], target: Tensor) -> None:
        """Take features (B, D) of each block, and the classes."""
        self.features.append([of_block.float().cpu() for of_block in features])
        self.classes += target.tolist()


def rows(inputs: Sequence[Any], chosen: Sequence[int]) -> tuple[Any, ...]:
    """Some of the samples of a batch."""
    return tuple(
        {name: value[chosen] for name, value in part.items()} if isinstance(part, Mapping) else part[chosen]
        for part in inputs
    )


def in_plane(features: Tensor) -> Tensor:
    """Places in the plane by t-SNE, from the two main directions: neighbours stay neighbours, (N, D) -> (N, 2)."""
    from sklearn.manifold import TSNE  # here, since it takes a second to import

    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
    return torch.from_numpy(tsne.fit_transform(features.numpy()))


def draw_plane(samples: Samples, titles: Sequence[str], names: Sequence[str]) -> Any:
    """A panel for each block, with a point for each sample in the colour of its class.

    Args:
        samples: With three or more of them.
        titles: Of the blocks.
        names: Of the classes.
    """
    of_blocks = [torch.cat(parts) for parts in zip(*samples.features, strict=True)]
    chosen = shown_units(len(of_blocks))
    figure, every, _ = small_multiples(len(chosen), 2.6)
    classes = torch.tensor(samples.classes)
    for axes, k in zip(every, chosen, strict=True):
        places = in_plane(of_blocks[k])
        for colour, number in enumerate(samples.left):
            own = places[classes == number]
            axes.plot(*own.T.numpy(), ".", color=f"C{colour}", markersize=4, label=short(names[number]))
        axes.set(xticks=[], yticks=[])
        axes.set_title(titles[k], fontsize="small")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    return figure
