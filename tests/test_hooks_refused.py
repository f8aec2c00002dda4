"""Networks cut by hooks: warnings, and what cannot be cut."""

import pytest
import torch
from torch import nn

from ff_lightning.partition.hooked import Hooked
from ff_lightning.partition.hooks import run_hooked
from tests.test_hooks import Choosy, hooked, make, outputs


def test_warnings():
    """Final norms and poolers are named, a classifier is expected."""
    model, inputs = make("bert")
    with pytest.warns(UserWarning, match=r"^'bert.pooler.dense.weight', 'bert.pooler.dense.bias' of .* left out"):
        hooked(model, inputs)
    tied = Choosy()
    tied.layers[2].linear.weight = tied.layers[0].linear.weight
    with pytest.warns(UserWarning, match=r"'layers.0.linear.weight' of Choosy are used by several blocks"):
        net = Hooked(tied, "block", lambda: tied(torch.ones(2, 4)))
    assert sum(tied.layers[0].linear.weight is p for block in net.blocks for p in block.parameters()) == 1


class Twice(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.depth = depth

    def forward(self, x):
        for _ in range(self.depth if x.sum() < 1e9 else 1):
            for layer in self.layers:
                x = layer(x)
        return x


class Parallel(Twice):
    def forward(self, x):
        return sum(layer(x) for layer in self.layers) if x.sum() < 1e9 else x


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("make_model", "granularity", "says"),
    [
        (Choosy, "layer", r"granularity='layer': no border .*give 'block'.* number, or a list"),
        (Choosy, "stage", r"granularity='stage': the layers of Choosy all work at one resolution"),
        (Choosy, 4, r"granularity=4: Choosy can be cut into 1 to 3 units"),
        (Choosy, ["layers.0", "layer.1"], r"granularity='layer.1'.*did you mean 'layers.1'"),
        (Choosy, ["layers.1", "layers.0"], r"'layers.0' ran before 'layers.1'"),
        (Choosy, ["layers.0", "layers.0"], r"granularity=\['layers.0', 'layers.0'\].*each once"),
        (Choosy, [], r"granularity=\[\]"),
        (Twice, "block", r"Twice has no repeated layers .*granularity=\['layers"),
        (Twice, ["layers.0", "layers.1"], r"'layers.0' runs 2 times"),
        (Parallel, "block", r"Parallel has no repeated layers"),
        (Parallel, ["layers.0", "layers.1"], r"'layers.1' does not depend on that of 'layers.0'"),
    ],
)
def test_what_cannot_be_cut(make_model, granularity, says):
    model = make_model()
    with pytest.raises(ValueError, match=says):
        Hooked(model, granularity, lambda: model(X))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_checkpointing_is_refused():
    model, inputs = make("vit")
    net = hooked(model, inputs)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"ViTForImageClassification checkpoints .*gradient_checkpointing_disable"):
        outputs(net, inputs)


def test_a_border_that_does_not_run():
    model = Choosy()
    with pytest.raises(ValueError, match=r"Choosy did not run 'layers.1' in this pass.*layerdrop"):
        run_hooked(model, ["layers.0", "layers.1"], lambda: model.layers[0](torch.ones(2, 8), 1), lambda k, out: out)
