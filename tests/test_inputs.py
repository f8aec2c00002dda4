"""Networks for anything but images: vectors, signals, volumes, token ids with a padding mask, several inputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ff_lightning import partition
from ff_lightning.partition.inputs import Inputs

GRANULARITIES = ["layer", "block", "stage"]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, bias):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, bias):
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A transformer that makes a bias of its mask once, and uses it in every layer."""

    def __init__(self, width=16, depth=2, length=12, vocabulary=50):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(length, width) / 10)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.fc = nn.Linear(width, 10)

    def features(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) + self.places[: input_ids.shape[1]]
        bias = None if attention_mask is None else (1 - attention_mask[:, None, None, :].to(x.dtype)) * -1e9
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def forward(self, input_ids, attention_mask=None):
        x = self.features(input_ids, attention_mask)
        if attention_mask is None:
            return self.fc(x.mean(1))
        counts = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.fc((x * counts).sum(1) / counts.sum(1))


class Plain(nn.Module):
    """Convolutions of one, two or three axes, the second one at half the resolution."""

    def __init__(self, kind, norm):
        super().__init__()
        self.body = nn.Sequential(kind(3, 8, 3, padding=1), norm(8), nn.ReLU(), kind(8, 8, 3, 2, 1), nn.ReLU())
        self.positions = [*range(2, self.body[0].weight.ndim)]
        self.fc = nn.Linear(8, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.features(x).mean(self.positions))


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.fc = nn.Linear(12, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.features(x))


class Recurrent(nn.Module):
    """A recurrent network: channels last, behind a layer whose weights have four times as many rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.mix = nn.Embedding(20, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 5)
        self.fc = nn.Linear(5, 10)

    def features(self, x):
        return self.mix(self.lstm(self.embed(x))[0])

    def forward(self, x):
        return self.fc(self.features(x).mean(1))


class Fusion(nn.Module):
    """A second input that takes part late, and the main one twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8 + 4, 8), nn.Linear(8, 10)

    def features(self, x, extra):
        return self.c(torch.cat([self.b(self.a(x).relu()).relu(), extra], 1)).relu()

    def forward(self, x, *, extra):
        return self.fc(self.features(x, extra))


IDS = torch.arange(18).view(2, 9) % 17
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
KINDS = {  # network, inputs, channels of each layer's features, units of each granularity
    "vectors": (Vectors, torch.randn(2, 7), [1, 1], (2, 2, 1)),
    "signals": (lambda: Plain(nn.Conv1d, nn.BatchNorm1d), torch.randn(2, 3, 16), [1, 1], (2, 2, 2)),
    "volumes": (lambda: Plain(nn.Conv3d, nn.BatchNorm3d), torch.randn(2, 3, 4, 6, 8), [1, 1], (2, 2, 2)),
    "ids": (Encoder, IDS, [2] * 7, (7, 3, 1)),
    "masked": (Encoder, {"attention_mask": MASK, "input_ids": IDS}, [2] * 7, (7, 3, 1)),
    "in order": (Encoder, (IDS, MASK), [2] * 7, (7, 3, 1)),
    "recurrent": (Recurrent, torch.arange(48).view(2, 24) % 20, [2] * 3, (3, 3, 1)),
    "fusion": (Fusion, {"x": torch.randn(2, 7), "extra": torch.randn(2, 4)}, [1] * 3, (3, 3, 1)),
}


def run(blocks, state):
    for block in blocks:
        state = block(state)
    return state


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_order_equal_the_network(kind, granularity):
    make, example, channel_dims, units = KINDS[kind]
    model = make().eval()
    blocks = partition(model, granularity, example)
    assert len(blocks) == units[GRANULARITIES.index(granularity)]
    if granularity == "layer":
        assert [block.channel_dim for block in blocks] == channel_dims
    values = Inputs.of(model, example).values(example)
    expected = model.features(*values)
    if kind in ("masked", "in order"):
        expected = expected * MASK[..., None]  # the masked mean begins so; pooling is left out, this is not
    assert torch.equal(run(blocks, values if len(values) > 1 else values[0]), expected)


def test_a_mask_travels_as_far_as_it_is_needed():
    class Early(Encoder):
        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids) * attention_mask[..., None]
            for layer in self.layers:
                x = layer(x, None)
            return self.fc(x.mean(1))

    for make, states in [(Encoder, [tuple, tuple]), (Early, [torch.Tensor, torch.Tensor])]:
        model = make()
        model.places.requires_grad_(make is Encoder)
        blocks = partition(model, "block", (IDS, MASK))
        state = IDS, MASK
        for block, kind in zip(blocks, states, strict=False):
            state = block(state)
            assert isinstance(state, kind)
        assert isinstance(blocks[-1](state), torch.Tensor)


def test_samples_of_another_length_than_the_example():
    model = Encoder().eval()
    blocks = partition(model, "layer", {"input_ids": IDS, "attention_mask": MASK})
    assert torch.equal(run(blocks, (IDS[:, :4], MASK[:, :4])), model.features(IDS[:, :4], MASK[:, :4]))


def test_the_main_input_is_no_mask_and_names_come_in_the_order_of_forward():
    inputs = Inputs.of(Encoder(), {"attention_mask": MASK.bool(), "input_ids": IDS})
    assert inputs.names == ("input_ids", "attention_mask")
    for given in (IDS, (IDS,), {"input_ids": IDS}):  # nothing is masked
        ids, mask = inputs.values(given)
        assert ids is IDS
        assert mask.all()
    assert torch.equal(inputs.valid(inputs.values((IDS, MASK))), MASK.bool())


def test_the_mask_of_pytorch_is_true_where_padding_is():
    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(50, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x, key_padding_mask=None):
            return self.fc(self.mix(self.embed(x), src_key_padding_mask=key_padding_mask)[:, 0])

    example = {"x": IDS, "key_padding_mask": MASK == 0}
    blocks = partition(Torch().eval(), "block", example)
    assert [block.name for block in blocks] == ["embed", "mix"]
    inputs = Inputs.of(Torch(), example)
    assert torch.equal(inputs.valid(inputs.values((IDS, 1 - MASK))), MASK.bool())
    assert inputs.valid(inputs.values(IDS)).all()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_id": IDS}, "takes .*'input_ids', 'attention_mask'.*not input_id; did you mean 'input_ids'"),
        ({"attention_mask": MASK}, r"takes several inputs \['input_ids'\]|takes .* give an `example`"),
        ({}, r"example=\{\}: must be an input batch"),
        ((IDS, MASK, MASK), "not input 2"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :5]}, r"attention_mask of shape \(2, 5\): must be \(2, 9\)"),
        ({"input_ids": IDS, "attention_mask": [[1, 1]]}, "must be an input batch"),
        (torch.tensor(3), r"input_ids of shape \(\): must be a batch"),
    ],
)
def test_examples_that_do_not_fit(example, message):
    with pytest.raises(ValueError, match=message):
        partition(Encoder(), "block", example)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (IDS.float(), r"input_ids of shape \(2, 9\) and torch.float32: must be ids \(B, T\), int64"),
        (IDS[..., None], r"input_ids of shape \(2, 9, 1\) and torch.int64: must be ids"),
        (IDS + 50, "input_ids holds 66: vocabulary=50 allows 0 to 49"),
        (-IDS, "input_ids holds -16: vocabulary=50"),
        ((IDS, MASK[:, 1:]), r"attention_mask of shape \(2, 8\): must be \(2, 9\), one for each position of input_ids"),
        ((IDS, MASK.float()), "attention_mask of torch.float32: must be bool or whole numbers"),
        ((IDS, MASK, MASK), r"inputs \{.*'input 2': \(2, 9\)\}: the network was built for tensors \['input_ids'"),
        ({"ids": IDS, "more": IDS}, r"inputs \{'ids': \(2, 9\), 'more'.*the network was built for"),
        ({"input_ids": IDS, "attention_mask": None}, "'attention_mask': 'None'"),
        ("text", "the network was built for tensors"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        Inputs.of(Encoder(), (IDS, MASK), vocabulary=50).values(inputs)


def test_blocks_of_a_masked_network_survive_a_copy():
    blocks = partition(Encoder().eval(), "layer", (IDS, MASK))
    assert torch.equal(run(copy.deepcopy(blocks), (IDS, MASK)), run(blocks, (IDS, MASK)))
