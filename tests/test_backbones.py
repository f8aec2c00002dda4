import logging

import pytest
import torch
from torch import nn
from torchvision import models

from ff_lightning import FF, SFF, Backprop, partition
from ff_lightning.backbones import LocallyConnected, build_backbone, load_weights
from tests.conftest import small_net

IMAGE = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("resnet18", [32, 32, 32, 16, 16, 8, 8, 4, 4]),
        ("mobilenet_v3_small", [32, 32, 16, 16, 8, 8, 8, 8, 8, 4, 4, 4, 4]),
        ("regnet_y_400mf", [32, 32, 16, 16, 16, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4]),
        ("convnext_tiny", [32] * 4 + [16] * 4 + [8] * 10 + [4] * 4),
    ],
)
def test_a_small_stem_leaves_an_eighth_of_the_resolution(name, sides):
    model = build_backbone(name, 10, IMAGE, stem="small")
    assert [block.map_shape[1] for block in partition(model, "block", torch.zeros(1, *IMAGE))] == sides
    assert model(torch.zeros(2, *IMAGE)).shape == (2, 10)


def test_a_small_stem_for_a_network_of_one_size_of_image_is_refused():
    with pytest.raises(ValueError, match="stem='small' does not suit this network, give stem='standard'"):
        build_backbone("vit_b_32", 10, IMAGE, stem="small")


def test_a_small_stem_of_a_resnet_is_the_usual_one():
    model = build_backbone("resnet18", 10, IMAGE, stem="small")
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(model.maxpool, nn.Identity)
    assert model.layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "timm/resnet18"])
def test_images_with_another_number_of_channels(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    assert build_backbone(name, 7, (1, 32, 32))(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def saved(tmp_path, state, name="weights.pt"):
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "prefix"])
def test_weights_are_loaded_and_the_classifier_may_be_another(wrapped, tmp_path, caplog):
    source = models.resnet18(num_classes=1000)
    state = source.state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items()}
    state = {"plain": state, "state_dict": {"state_dict": state}, "prefix": prefixed}
    with caplog.at_level(logging.WARNING):
        model = build_backbone("resnet18", 10, IMAGE, weights=saved(tmp_path, state[wrapped]))
    assert "the classifier fc starts anew" in caplog.text
    assert model.fc.out_features == 10
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in source.state_dict().items() if not key.startswith("fc"))


def test_weights_reach_the_blocks_and_a_checkpoint_does_not_need_their_file(tmp_path):
    source = models.resnet18(num_classes=10)
    path = saved(tmp_path, source.state_dict())
    model = SFF(backbone="resnet18", num_classes=10, weights=path)
    assert torch.equal(model.net.backbone_state_dict()["layer3.0.conv1.weight"], source.layer3[0].conv1.weight)
    assert torch.equal(Backprop(backbone="resnet18", num_classes=10, weights=path).net.fc.weight, source.fc.weight)
    assert "weights" not in model.hparams


@pytest.mark.parametrize(("name", "granularity"), [("cnn", "block"), ("mobilenet_v3_small", "layer")])
def test_weights_of_a_checkpoint_for_other_classes(name, granularity, tmp_path, caplog):
    trained = SFF(backbone=name, num_classes=5, granularity=granularity)
    path = saved(tmp_path, {"state_dict": trained.state_dict()}, "last.ckpt")
    features = trained.net.backbone_state_dict()
    with caplog.at_level(logging.WARNING):
        again = SFF(backbone=name, num_classes=7, weights=path)
        end_to_end = Backprop(backbone=name, num_classes=7, weights=path)
    assert "a checkpoint of SFF has none" in caplog.text
    own = end_to_end.net.state_dict()
    for key, value in features.items():
        assert torch.equal(again.net.backbone_state_dict()[key], value), key
        assert torch.equal(own[key], value), key
    with pytest.raises(ValueError, match="tensors differ"):
        Backprop(backbone="resnet18", num_classes=7, weights=path)


def test_weights_by_a_name_of_torchvision(monkeypatch):
    source = models.resnet18(num_classes=1000)
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, **kwargs: source.state_dict())
    model = build_backbone("resnet18", 10, IMAGE, weights="DEFAULT")
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_weights_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code was run",)

    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        build_backbone("resnet18", 10, IMAGE, weights=saved(tmp_path, {"conv1.weight": Evil()}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("DEFAUL", "weights='DEFAUL' is not known: give the path of a state dict, or one of .*did you mean 'DEFAULT'"),
        (
            "resnet34",
            r"do not fit ResNet: \d+ tensors differ, such as .*nothing in the network",
        ),
        ("wide", r"such as 'layer1.0.conv1.weight': \(64, 64, 1, 1\) in the weights, \(64, 64, 3, 3\) in the network"),
    ],
)
def test_weights_that_do_not_fit(weights, message, tmp_path):
    other = {"resnet34": models.resnet34, "wide": models.resnet50}.get(weights)
    path = saved(tmp_path, other().state_dict()) if other else weights
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet18", 10, IMAGE, weights=path)


def test_weights_for_a_module_are_those_of_a_checkpoint(make_trainer, digits, tmp_path):
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    one = small_net()
    trainer.fit(SFF(backbone=one, num_classes=10, input_shape=(1, 8, 8)), digits)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    other = small_net()
    SFF(backbone=other, num_classes=10, input_shape=(1, 8, 8), weights=str(tmp_path / "first.ckpt"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one[:4].state_dict().items())
    with pytest.raises(ValueError, match="weights='DEFAULT': must be a file for a backbone that is given as a module"):
        SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), weights="DEFAULT")


def test_load_weights_of_the_same_network_changes_everything():
    one, two = models.resnet18(num_classes=10), models.resnet18(num_classes=10)
    load_weights(one, two.state_dict())
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_unknown_names():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"backbone='timm/resnet8x'.*give a timm model"):
        build_backbone("timm/resnet8x", 10, IMAGE)
    with pytest.raises(ValueError, match="torchvision has no weights for 'cnn'"):
        build_backbone("cnn", 10, IMAGE, weights="DEFAULT")


class TestLocallyConnected:
    @pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 0), (4, 3, 1), (2, 2, 2)])
    def test_the_same_weights_everywhere_make_a_convolution(self, kernel, stride, padding):
        convolution = nn.Conv2d(3, 5, kernel, stride, padding)
        layer = LocallyConnected(3, 5, (9, 7), kernel, stride, padding)
        with torch.no_grad():
            layer.weight.copy_(convolution.weight.flatten(1)[..., None].expand_as(layer.weight))
            layer.bias.copy_(convolution.bias[:, None].expand_as(layer.bias))
        x = torch.randn(2, 3, 9, 7)
        torch.testing.assert_close(layer(x), convolution(x))

    def test_each_position_has_weights_of_its_own(self):
        layer, x = LocallyConnected(2, 4, (8, 6), 3, 2, 1), torch.randn(3, 2, 8, 6)
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        found = layer(x)
        assert found.shape == (3, 4, 4, 3)
        for row in range(4):
            for column in range(3):
                field = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten(1)
                k = 3 * row + column
                torch.testing.assert_close(found[:, :, row, column], field @ layer.weight[:, :, k].T + layer.bias[:, k])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((1, 8, (28, 9), 10), r"size=\(28, 9\): no field fits, must be at least .* = 10"),
            ((1, 8, 28, 10), "size=28: must be the height and width"),
            ((1, 8, (28, 28), 3, 0), "stride=0: must be at least 1"),
            ((1, 8, (28, 28), 3, 1, -1), "padding=-1: must be at least 0"),
            ((1, 0, (28, 28), 3), "out_channels=0"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LocallyConnected(*arguments)

    def test_an_input_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"a sample has the shape \(1, 9, 8\): .* made for \(1, 8, 8\)"):
            LocallyConnected(1, 2, (8, 8), 3)(torch.zeros(2, 1, 9, 8))

    def test_the_network_of_the_paper_is_cut_at_each_layer_and_trained_by_forward_forward(self):
        model = FF("local", negatives="hybrid", num_classes=10, input_shape=(1, 28, 28))
        assert [block.map_shape for block in model.net.blocks] == [(128, 4, 4), (220, 3, 3), (512, 2, 2)]
        assert [sum(p.numel() for p in block.parameters()) for block in model.net.blocks] == [
            16 * 128 * 101, 9 * 220 * (128 * 4 + 1), 4 * 512 * (220 * 4 + 1)
        ]  # fmt: skip
        for loss in model.net.local_losses(torch.rand(4, 1, 28, 28), torch.arange(4)):
            loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.net.blocks.parameters())
        for granularity in ("block", "stage"):
            assert len(partition(build_backbone("local", 10, (1, 28, 28)), granularity, torch.zeros(1, 1, 28, 28))) == 3
        with pytest.raises(ValueError, match=r"input_shape=\(1, 8, 8\): backbone='local' needs images of at least 22"):
            build_backbone("local", 10, (1, 8, 8))
