"""A head that answers at each token, for language models.

Shapes: B batch, C channels, T tokens, K classes.
"""

from torch import Tensor, nn

from ff_lightning.util.arguments import check_whole


class TokenHead(nn.Module):
    """Scores of each token: a layer norm over its channels and a linear layer.

    Args:
        in_channels: C, channels of the block's features.
        num_classes: K, the number of token ids for the task `NextToken`.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        check_whole("in_channels", in_channels)
        check_whole("num_classes", num_classes)
        self.norm = nn.LayerNorm(in_channels)
        self.classes = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of each token.

        Args:
            features: (B, C, T), any floating dtype.

        Returns:
            (B, T, K), float32.
        """
        scores: Tensor = self.classes(self.norm(features.mT))
        return scores.float()
