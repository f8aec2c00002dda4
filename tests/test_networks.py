"""Every network of docs/networks.md, in every granularity."""

import copy
import warnings
from itertools import combinations, pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from ff_lightning import LocalNet, partition
from tests.conftest import small_net
from tests.networks import GRANULARITIES, ROW, ROWS, build, row

FEATURES = {  # the module whose output is the feature map, where it is not called `features`
    "resnet": "layer4", "resnext": "layer4", "wide": "layer4", "timm/resnet18": "layer4", "regnet": "trunk_output",
    "shufflenet": "conv5", "vit": "encoder", "swin": "permute", "googlenet": "inception5b", "timm/mobilenetv3": "act2",
    "timm/vit_tiny": "norm", "headless/timm/vit_tiny": "norm", "headless/vit": "encoder", "headless/swin_t": "permute",
    "mobilenet": "features", "efficientnet": "features", "convnext": "features", "vgg": "features",
}  # fmt: skip


def features_of(name, model, x):
    """The features by the model itself."""
    where = next(FEATURES[key] for key in FEATURES if name.startswith(key))
    kept = []
    hook = model.get_submodule(where).register_forward_hook(lambda *args: kept.append(args[2]))
    model(x)
    hook.remove()
    return kept[0]


class Computes(TorchDispatchMode):
    """Whether some operation of the model returns the very values of a tensor."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.found = wanted, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.shape == self.wanted.shape:
                self.found = self.found or torch.equal(value, self.wanted)
        return result


def computes(name, model, x, wanted):
    """Whether the model itself computes the features, at the right place where that is known."""
    if any(name.startswith(key) for key in FEATURES):
        return torch.equal(features_of(name, model, x), wanted)
    with Computes(wanted) as watch:
        model(x)
    return watch.found


FAST = (
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "timm/vit_tiny_patch16_224",
)
SIBLINGS = {  # other sizes of networks that are among the slow ones: for when the table is made anew
    "resnet34", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "mobilenet_v3_large", "vgg11", "vgg16_bn",
    "efficientnet_b3", "efficientnet_v2_s", "convnext_small", "densenet169", "regnet_y_1_6gf", "shufflenet_v2_x2_0",
    "maxvit_t", "vit_b_32", "timm/resnet50", "timm/efficientnetv2_rw_t", "timm/fbnetc_100", "timm/spnasnet_100",
    "timm/hardcorenas_a", "timm/mnasnet_small", "timm/tf_efficientnet_lite0", "timm/mobilenetv2_100",
    "timm/flexivit_small", "timm/coatnet_nano_rw_224", "timm/resmlp_12_224", "timm/gmixer_12_224", "timm/darknet53",
    "timm/cspresnet50",
}  # fmt: skip
CLASSIFIERS = {"classifier", "fc", "head", "heads", "head_dist", "aux_head", "last_linear"}


def marks(name):
    return pytest.mark.siblings if name in SIBLINGS else [] if name in FAST else pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in ROWS])
def test_units_in_order_equal_the_network(name):
    if "timm/" in name:
        pytest.importorskip("timm")
    model, size = build(name)
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    own, reference = dict(model.named_parameters()), copy.deepcopy(model)
    for granularity, count in zip(GRANULARITIES, ROWS[name], strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single unit, and of heads that only run in training
            net = LocalNet(model, 10, granularity, input_shape=(3, size, size))
        blocks = net.blocks
        assert len(blocks) == count, granularity
        for training in (False, True):
            reference.load_state_dict(model.state_dict())
            reference.train(training)
            net.train(training)
            with torch.no_grad():
                torch.manual_seed(1)
                state = x.clone()
                for block in blocks:
                    state = block(state)
                expected_state = {
                    key: value.clone() for block in blocks for key, value in block.body.state_dict().items()
                }
                torch.manual_seed(1)
                assert computes(name, reference, x.clone(), state), (granularity, training)
            for key, value in reference.state_dict().items():
                assert key not in expected_state or torch.equal(value, expected_state[key]), key
        held = [key for block in blocks for key, _ in block.body.named_parameters()]
        assert len(held) == len(set(held)), "each parameter is in one unit"
        assert all(own[key] is value for block in blocks for key, value in block.body.named_parameters())
        left_out = {key.split(".")[0] for key in set(own) - set(held)}
        assert left_out <= CLASSIFIERS, f"the classifier alone is left out, not {left_out}"
        assert left_out or name.startswith("headless/")
        for k, loss in enumerate(net.local_losses(x, y)):
            loss.backward()
            idle = [key for key, p in blocks[k].body.named_parameters() if p.grad is None and p.requires_grad]
            assert not idle, f"{granularity}: no gradient from the loss of their own unit"


def test_the_table_is_what_the_script_makes():
    assert ROW.fullmatch(row("resnet18"))
    assert row("resnet18") == "| `resnet18` | 20 | 9 | 4 | 64 |"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "swin_t", "timm/vit_tiny_patch16_224"])
def test_every_unit_learns(name):
    model, size = build(name)
    net = LocalNet(model, 10, "layer", head="paper", input_shape=(3, size, size))
    net.loss(torch.randn(2, 3, size, size), torch.tensor([0, 1])).backward()
    for block in net.blocks:
        grads = [parameter.grad for parameter in block.parameters()]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), block.name
    assert all(len(block.map_shape) == (2 if "vit" in name else 3) for block in net.blocks)


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
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=False)
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
    assert {block.map_shape for block in vit} == {(768, 5)}
