import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from ff_lightning import partition
from ff_lightning.backbones import cnn
from tests.conftest import Residual, small_net


def run(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class Inline(nn.Module):
    """Residual connection in the network's own forward, one activation shared by all, in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.relu, self.fc = nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 10)

    def features(self, x):
        x = self.stem(x)
        x = x + self.b(self.relu(self.a(self.relu(x))))  # the shortcut carries what the activation changed in place
        return self.relu(self.last(x))

    def forward(self, x, scale=None):
        return self.fc(self.features(x).mean((2, 3)))


NETWORKS = {  # network, the module whose output is the feature map (None: the network says), number of units
    "cnn": (lambda: cnn(10, 3, width=4), "block3", {"layer": 6, "block": 3, "stage": 3}),
    "small": (lambda: small_net(3), "3", {"layer": 5, "block": 3, "stage": 1}),
    "inline": (Inline, None, {"layer": 4, "block": 3, "stage": 2}),
    "resnet18": (lambda: models.resnet18(), "layer4", {"layer": 20, "block": 9, "stage": 4}),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(), "features", {"layer": 43, "block": 13, "stage": 5}),
}


@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_in_order_equal_the_features_of_the_model(name, training, granularity):
    make, feature_module, units = NETWORKS[name]
    x = torch.randn(2, 3, 64, 64)
    model = make().train(training)
    reference = copy.deepcopy(model)
    blocks = partition(model, granularity, x[:1])
    kept = []
    if feature_module is not None:
        reference.get_submodule(feature_module).register_forward_hook(lambda *args: kept.append(args[2]))
    torch.manual_seed(1)
    expected = reference.features(x.clone()) if feature_module is None else (reference(x.clone()), kept[0])[1]
    torch.manual_seed(1)
    assert torch.equal(run(blocks, x), expected)
    assert len(blocks) == units[granularity]
    for (key, value), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, other), f"{key}: the blocks moved another state than the model"
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_feature_parameter_is_in_one_block_under_its_own_name(name, granularity):
    model = NETWORKS[name][0]()
    blocks = partition(model, granularity, torch.zeros(1, 3, 64, 64))
    held = [(key, parameter) for block in blocks for key, parameter in block.body.named_parameters()]
    own = dict(model.named_parameters())
    assert len({key for key, _ in held}) == len(held)
    assert all(own[key] is parameter for key, parameter in held), "the blocks share the parameters of the model"
    left_out = set(own) - {key for key, _ in held}
    assert {key.split(".")[0] for key in left_out} in ({"fc"}, {"classifier"}, {"6"})


def test_a_module_without_a_cut_inside_stays_whole():
    model = small_net(3)
    blocks = partition(model, "block", torch.zeros(1, 3, 8, 8))
    calls = []
    model[2].register_forward_hook(lambda *args: calls.append(1))
    run(blocks, torch.zeros(1, 3, 8, 8))
    assert calls == [1]


def test_blocks_survive_deepcopy_and_pickle():
    blocks = partition(small_net(3).eval(), "layer", torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        assert torch.equal(run(other, x), run(blocks, x))
        assert [block.name for block in other] == [block.name for block in blocks]


def test_a_layer_used_twice_belongs_to_one_block():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x))))

    blocks = partition(Twice(), "layer", torch.zeros(1, 3, 16, 16))
    assert [sorted({k.split(".")[0] for k in b.body.state_dict()}) for b in blocks] == [["first"], ["again"], ["last"]]


def test_layers_that_share_a_weight_belong_to_one_block():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU())
    assert [block.name for block in partition(model, "layer", torch.zeros(1, 3, 16, 16))] == ["0", "2...4"]


class Functions(nn.Module):
    """Functions in the network's own forward: activations in place, whose result is not used, a dropout at the end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.kept = None

    def forward(self, x):
        x = self.a(x)
        F.relu(x, inplace=True)
        x = self.b(x)
        F.relu(x, inplace=True)
        self.kept = x
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))


def test_functions_in_place_and_a_dropout_of_the_classifier():
    model, x = Functions(), torch.randn(2, 3, 8, 8)
    blocks = partition(model, "layer", x[:1])
    assert [block.name for block in blocks] == ["a", "b"]
    model(x)
    assert torch.equal(run(blocks, x), model.kept)


def test_a_map_with_as_many_rows_as_the_last_layer_has_channels():
    model = models.densenet121()
    blocks = partition(model, "block", torch.zeros(1, 3, 128, 256))
    assert blocks[1].map_shape == (256, 32, 64), "32 is also what each layer of a dense block adds"
    assert [block.channel_dim for block in blocks] == [1] * len(blocks)


def test_names_cut_after_the_modules():
    blocks = partition(models.resnet18(), ["layer1", "layer3"], torch.zeros(1, 3, 64, 64))
    assert [block.name for block in blocks] == ["conv1...layer1.1.conv2", "layer2.0.conv1...layer3.1.conv2", "layer4"]


def test_tokens_count_channels_last():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix, self.fc = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 20), nn.Linear(20, 10)

        def forward(self, x):
            return self.fc(F.gelu(self.mix(self.patches(x).flatten(2).transpose(1, 2))).mean(1))

    blocks = partition(Tokens(), "layer", torch.zeros(1, 3, 16, 16))
    assert [block.map_shape for block in blocks] == [(12, 16), (20, 16)]


def test_mlp_and_headless_networks():
    layers = [nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU()]
    x = torch.zeros(1, 1, 8, 8)
    assert len(partition(nn.Sequential(*layers, nn.Linear(16, 10)), "layer", x)) == 2
    assert len(partition(nn.Sequential(*layers), "layer", x)) == 2
    headless = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert len(partition(headless, "block", x)) == 2


class UsesTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.b(F.dropout(self.a(x), 0.5, self.training)).mean((2, 3)))


class Branches(UsesTraining):
    def forward(self, x):
        x = self.a(x)
        return self.b(-x if x.sum() > 0 else x)


class TwoInputs(UsesTraining):
    def forward(self, x, y):
        return self.a(x) + y


@pytest.mark.parametrize(
    ("model", "granularity", "message"),
    [
        (cnn(), "layr", r"granularity='layr' is not known: give one of .*did you mean 'layer'"),
        (cnn(), ["block7"], r"granularity='block7' .*did you mean 'block\d'"),
        (cnn(), ["classifier"], "takes no part in the features"),
        (cnn(), ["block3"], "leave out 'block3', the unit after its cut has no layer"),
        (cnn(), ["block1.0", "block1.1"], "leave out 'block1.1', the unit before its cut has no layer"),
        (UsesTraining(), "block", "does something else in training than in evaluation"),
        (Branches(), "block", "cannot be traced .*control flow.*nn.Sequential"),
        (TwoInputs(), "block", r"several inputs \['x', 'y'\]"),
        (nn.Sequential(nn.ReLU()), "block", "no layer with weights"),
    ],
)
def test_bad_input_is_named(model, granularity, message):
    with pytest.raises(ValueError, match=message):
        partition(model, granularity, torch.zeros(1, 3, 32, 32))


def test_an_image_too_small_names_the_place():
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\) does not pass .*'block3.6' failed"):
        partition(cnn(), "block", torch.zeros(1, 3, 4, 4))


def test_control_flow_inside_a_block_is_left_alone():
    class Odd(Residual):
        def forward(self, x):
            return super().forward(-x if x.sum() > 0 else x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    blocks = partition(model, "block", x)
    assert [block.name for block in blocks] == ["0", "1", "2"]
    assert torch.equal(run(blocks, x), model(x))
