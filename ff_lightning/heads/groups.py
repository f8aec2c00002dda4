"""A head without parameters: each class has a group of channels of its own.

Shapes: B batch, C channels, K classes.
"""

from torch import Tensor, nn

from ff_lightning.util.arguments import check_whole


class GroupHead(nn.Module):
    """The goodness of a class is the mean square of its group of channels, over its channels and all positions.

    Args:
        in_channels: C, channels of the block's features: a multiple of K.
        num_classes: K.

    Raises:
        ValueError: If the channels cannot be shared out alike.

    Source: Papachristodoulou et al., Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm,
    arXiv 2312.12668.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        check_whole("in_channels", in_channels)
        check_whole("num_classes", num_classes)
        if in_channels % num_classes:
            raise ValueError(
                f"head='groups' shares {in_channels} channels out among {num_classes} classes: each block must have a "
                "multiple of the classes, as backbone='cfse' has"
            )
        self.num_classes = num_classes

    def forward(self, features: Tensor) -> Tensor:
        """Goodness of each class.

        Args:
            features: (B, C, ...), any floating dtype.

        Returns:
            (B, K), float32.
        """
        return features.float().square().unflatten(1, (self.num_classes, -1)).flatten(2).mean(2)

    def maps(self, features: Tensor) -> Tensor:
        """The part of each position in the goodness: features (B, C, ...) -> (B, K, ...), float32."""
        parts = features.float().square().unflatten(1, (self.num_classes, -1)).mean(2)
        return parts / max(1, parts[0, 0].numel())
