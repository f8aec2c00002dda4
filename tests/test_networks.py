"""Every network of docs/networks.md, in every granularity."""

import copy
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torchvision import models

from ff_lightning import LocalNet, partition
from tests.conftest import small_net

TABLE = (Path(__file__).parents[1] / "docs/networks.md").read_text()
ROWS = {
    name: tuple(map(int, counts))
    for name, *counts in re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (\d+) \|", TABLE, re.M)
}
FEATURES = {  # the module whose output is the feature map, where it is not called `features`
    "resnet": "layer4", "resnext": "layer4", "wide": "layer4", "timm/resnet": "layer4", "regnet": "trunk_output",
    "shufflenet": "conv5", "vit": "encoder", "swin": "permute", "googlenet": "inception5b", "timm/mobilenetv3": "act2",
    "timm/vit": "norm",
}  # fmt: skip


def build(name):
    """The network and a batch of images that are large enough for it."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        return timm.create_model(name[5:], num_classes=10), 224 if "vit" in name else 64
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    arguments |= {"image_size": 32} if name.startswith("vit") else {}
    return models.get_model(name, num_classes=10, **arguments), 32 if name.startswith("vit") else 64


def features_of(name, model, x):
    """The features by the model itself."""
    where = next((FEATURES[key] for key in FEATURES if name.startswith(key)), "features")
    kept = []
    model.get_submodule(where).register_forward_hook(lambda *args: kept.append(args[2]))
    model(x)
    return kept[0].relu() if name.startswith("densenet") else kept[0]


FAST = (
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "timm/vit_tiny_patch16_224",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ROWS])
def test_units_in_order_equal_the_network(name):
    model, size = build(name)
    x = torch.randn(2, 3, size, size)
    own = dict(model.named_parameters())
    for granularity, count in zip(("layer", "block", "stage"), ROWS[name], strict=True):
        blocks = partition(model, granularity, x[:1])
        assert len(blocks) == count, granularity
        for training in (False, True):
            reference = copy.deepcopy(model).train(training)
            for block in blocks:
                block.train(training)
            with torch.no_grad():
                torch.manual_seed(1)
                expected = features_of(name, reference, x)
                state = x
                torch.manual_seed(1)
                for block in blocks:
                    state = block(state)
            assert torch.equal(state, expected), (granularity, training)
            expected_state = reference.state_dict()
            for block in blocks:
                for key, value in block.body.state_dict().items():
                    assert torch.equal(value, expected_state[key]), key
        held = [key for block in blocks for key, _ in block.body.named_parameters()]
        assert len(held) == len(set(held)), "each parameter is in one unit"
        assert all(own[key] is value for block in blocks for key, value in block.body.named_parameters())
        left_out = {key.split(".")[0] for key in set(own) - set(held)}
        assert len(left_out) == 1, f"the classifier alone is left out, not {left_out}"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "swin_t", "timm/vit_tiny_patch16_224"])
def test_every_unit_learns(name):
    model, size = build(name)
    net = LocalNet(model, 10, "layer", head="paper", input_shape=(3, size, size))
    net.loss(torch.randn(2, 3, size, size), torch.tensor([0, 1])).backward()
    for block in net.blocks:
        grads = [parameter.grad for parameter in block.parameters()]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), block.name
    assert all(len(block.map_shape) == 3 for block in net.blocks)


@pytest.mark.parametrize(
    ("make", "granularity"),
    [(small_net, "layer"), pytest.param(models.mobilenet_v3_small, "block", marks=pytest.mark.slow)],
)
def test_export_runs_without_training_code(make, granularity, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = LocalNet(make(3) if make is small_net else make(), 10, granularity, input_shape=(3, 64, 64)).export()
    x = torch.randn(3, 3, 64, 64)
    expected = net(x)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x[:2]), expected[:2])
    torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (scores,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected[:2], atol=1e-4, rtol=1e-4)


def test_weights_go_to_the_plain_network_and_back():
    net = LocalNet(models.resnet18(), 10, "layer", input_shape=(3, 64, 64))
    plain = models.resnet18().eval()
    missing = plain.load_state_dict(net.backbone_state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert not missing.unexpected_keys
    state = x = torch.randn(2, 3, 64, 64)
    for block in net.eval().blocks:
        state = block(state)
    torch.testing.assert_close(state, features_of("resnet18", plain, x), atol=0, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 4, 9, 14, 20])
def test_a_number_gives_so_many_balanced_units(count):
    def cost(blocks):
        return max(block.saved_bytes for block in blocks)

    x = torch.zeros(1, 3, 64, 64)
    blocks = partition(models.resnet18(), count, x)
    assert len(blocks) == count
    fine = partition(models.resnet18(), "block" if count <= 9 else "layer", x)
    assert cost(blocks) >= cost(fine)
    if count < 9:  # no better way to join the blocks: all ways are tried
        costs = [block.saved_bytes for block in fine]
        ways = ([0, *ends, len(costs)] for ends in combinations(range(1, len(costs)), count - 1))
        best = min(max(sum(costs[a:b]) for a, b in pairwise(way)) for way in ways)
        assert cost(blocks) <= best * 1.05


def test_a_number_out_of_range():
    with pytest.raises(ValueError, match="granularity=21: ResNet can be cut into 1 to 20 units"):
        partition(models.resnet18(), 21, torch.zeros(1, 3, 64, 64))


def test_tokens_and_channels_last_maps_are_understood():
    swin = partition(models.swin_t(), "block", torch.zeros(1, 3, 64, 64))
    assert [block.map_shape for block in swin[:4]] == [(96, 16, 16), (96, 16, 16), (96, 16, 16), (192, 8, 8)]
    vit = partition(models.vit_b_16(image_size=32), "block", torch.zeros(1, 3, 32, 32))
    assert {block.map_shape for block in vit} == {(768, 5, 1)}
