"""Images of a test: the worst mistakes, and which part of an image speaks for its class.

Shapes: B images, C channels, H x W pixels, K classes, h x w positions of a map.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ff_lightning.drawing.figure import new_figure, short, small_multiples
from ff_lightning.local.net import LocalNet
from ff_lightning.partition.trace import evaluating


class Answered(NamedTuple):
    """An image with what it is and what it was taken for."""

    margin: float
    """Score of the best wrong class above that of the true one."""
    true: int
    rival: int
    """The best wrong class: the answer, where the margin is positive."""
    image: Tensor
    """(C, H, W), normalised."""


def draw_mistakes(worst: Sequence[Answered], names: Sequence[str], statistics: Any) -> Any:
    """The images whose answer is furthest from right.

    Args:
        worst: Wrong answers, the worst first.
        names: Of the classes.
        statistics: Mean and deviation that the images were normalised by, each with C numbers; None: each image is
            drawn from its smallest to its largest value.
    """
    figure, every, _ = small_multiples(len(worst), 1.9, most=6)
    for axes, one in zip(every, worst, strict=True):
        _draw_image(axes, one.image, statistics)
        axes.set_title(f"true: {short(names[one.true])}\nanswer: {short(names[one.rival])}", fontsize=8)
    return figure


def goodness_maps(net: LocalNet, x: Tensor) -> dict[int, Tensor]:
    """The part of each position in the goodness of each class, by number of the block.

    The sum over the positions is the goodness: what belongs to no position, such as a bias, is spread over all of them.
    Blocks whose head has no method `maps`, or whose map has a single position, are left out.

    Args:
        net: Whose blocks have heads.
        x: Images, (B, C, H, W).

    Returns:
        (B, K, h, w) each, float32.
    """
    found: dict[int, Tensor] = {}

    def looks(k: int) -> Any:
        def look(head: Any, inputs: tuple[Any, ...], goodness: Tensor) -> None:
            maps = head.maps(inputs[0])
            if maps.ndim == 4 and maps[0, 0].numel() > 1:
                rest = (goodness - maps.sum((2, 3))) / maps[0, 0].numel()
                found[k] = maps + rest[..., None, None]

        return look

    heads: list[Any] = [getattr(objective, "head", None) for objective in net.objectives]
    handles = [head.register_forward_hook(looks(k)) for k, head in enumerate(heads) if hasattr(head, "maps")]
    try:
        with evaluating(net):
            net.goodness(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def draw_maps(
    shown: Sequence[Answered], maps: Mapping[str, Tensor], names: Sequence[str], statistics: Any = None
) -> Any:
    """Where in the image the goodness of the true class is above that of the best wrong one, and where below.

    The values of a map add up to the number above it: how far the block is on the side of the true class.

    Args:
        shown: The images, a row for each.
        maps: For each block, by its title, the goodness of the classes at each position (B, K, h, w).
        names: Of the classes.
        statistics: See `draw_mistakes`.
    """
    figure = new_figure(1.5 * (len(maps) + 1) + 1, 1.6 * len(shown) + 0.6)
    every = figure.subplots(len(shown), len(maps) + 1, squeeze=False)
    for row, one in zip(every, shown, strict=True):
        _draw_image(row[0], one.image, statistics)
        wrong = f"answer: {short(names[one.rival])}" if one.margin > 0 else f"next: {short(names[one.rival])}"
        row[0].set_title(f"true: {short(names[one.true])}\n{wrong}", fontsize=8)
    rows = torch.arange(len(shown))
    true, rival = (torch.tensor([getattr(one, part) for one in shown]) for part in ("true", "rival"))
    for column, (title, of_block) in enumerate(maps.items(), start=1):
        margins = of_block[rows, true] - of_block[rows, rival]  # (B, h, w)
        for number, (axes, margin, one) in enumerate(zip(every[:, column], margins, shown, strict=True)):
            most = margin.abs().max().clamp_min(1e-9).item()
            height, width = one.image.shape[1:]
            _draw_image(axes, one.image.mean(0, keepdim=True), None)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            field = axes.imshow(margin.numpy(), cmap="RdBu", vmin=-most, vmax=most, extent=extent, alpha=0.75)
            side = f"{margin.sum():+.2g}"
            axes.set_title(f"{title}\n{side}" if number == 0 else side, fontsize=8)
    bar = figure.colorbar(field, ax=every, ticks=[-most, 0, most], shrink=0.5)
    bar.ax.set_yticklabels(["wrong class", "0", "true class"], fontsize="small")
    return figure


def _draw_image(axes: Any, image: Tensor, statistics: Any) -> None:
    if statistics is None:
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-9)
    else:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
        image = image * deviation + mean
    axes.set_axis_off()
    axes.imshow(image.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
