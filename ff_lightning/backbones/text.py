"""A small transformer encoder, for token ids.

Shapes: B batch, T tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def text(
    num_classes: int = 2,
    vocabulary: int = 20_000,
    length: int = 256,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
) -> nn.Module:
    """Token and position embeddings, pre-norm transformer layers with GELU, and a classifier on the mean of the tokens.

    Args:
        num_classes: Outputs of the classifier.
        vocabulary: Number of token ids.
        length: Most tokens of a text.
        width: D, a multiple of `heads`; the hidden layers have four times as many.
        depth: Number of layers.
        heads: Of the attention.
        dropout: Share of the values dropped after embeddings, attention and hidden layers.

    Returns:
        A network from `input_ids` (B, T), int64, and `attention_mask` (B, T) to (B, num_classes). The mask is true or 1
        at tokens, and false or 0 at padding, which may be at either end. Without a mask there is no padding.
    """
    return _Encoder(num_classes, vocabulary, length, width, depth, heads, dropout)


class _Encoder(nn.Module):
    """See `text`."""

    def __init__(
        self, num_classes: int, vocabulary: int, length: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = _Embedding(vocabulary, length, width, dropout)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids, mask)
        weights = mask.to(x.dtype)
        bias = (weights - 1)[:, None, None, :] * 1e4  # finite: in float16, and for a text that is all padding
        for layer in self.layers:
            x = layer(x, bias)
        sums = (self.norm(x) * weights[:, :, None]).sum(1)
        return self.classifier(sums / weights.sum(1, keepdim=True).clamp(min=1))


class _Embedding(nn.Module):
    """Of tokens and their places among those that are no padding, (B, T) -> (B, T, D)."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.dropout(self.tokens(ids) + self.places((mask.cumsum(1) - 1).clamp(min=0)))


class _Layer(nn.Module):
    """Attention and a hidden layer, each behind a norm and beside a shortcut, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), bias))
        return x + self.dropout(self.hidden(self.norm2(x)))


class _Attention(nn.Module):
    """Self-attention with a bias on its logits, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inputs, self.output, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inputs(x).chunk(3, 2))
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
