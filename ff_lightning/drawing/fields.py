"""What the units of the first layer look for: their weights, as images.

Shapes: N units, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ff_lightning.drawing.figure import small_multiples

FIELDS = 60
"""Units that are drawn, evenly spread from the first to the last."""


def first_fields(net: nn.Module, shape: Sequence[int]) -> Tensor | None:
    """The weights of the first layer, for some of its units, (N, C, h, w).

    Args:
        net: The network.
        shape: (C, H, W) of the images. What a linear layer sees before them, such as a label, is left out, and so is
            what a convolution sees in further channels.

    Returns:
        None where they are no images: of other than one or three channels, of single pixels, or where the first layer
        is neither linear nor a convolution.
    """
    leaves = (module for module in net.modules() if not any(True for _ in module.children()))
    layer = next((leaf for leaf in leaves if any(True for _ in leaf.parameters())), None)
    pixels = torch.Size(shape).numel()
    if isinstance(layer, nn.Linear) and len(shape) == 3 and layer.in_features >= pixels:
        fields = layer.weight[:, -pixels:].unflatten(1, tuple(shape))
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and len(shape) == 3:
        fields = layer.weight[:, : shape[0]]
    else:
        return None
    if fields.shape[1] not in (1, 3) or fields[0, 0].numel() == 1:
        return None
    chosen = torch.linspace(0, len(fields) - 1, min(FIELDS, len(fields))).round().long()
    return fields.detach().float().cpu()[chosen]


def draw_fields(fields: Tensor) -> Any:
    """Each unit by itself: grey is 0, or for colours the middle of them; its largest weight is white or black."""
    figure, every, _ = small_multiples(len(fields), 0.8, most=10)
    for axes, field in zip(every, fields, strict=True):
        axes.set_axis_off()
        seen = 0.5 + field / (2 * field.abs().max().clamp_min(1e-9))
        axes.imshow(seen.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    return figure
