"""The code of docs/extend.md runs as it stands there, and what it makes learns."""

import pytest
import torch

from ff_lightning import SFF, data, partition
from tests.conftest import small_net
from tests.pages import ROOT, code

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


@pytest.fixture(scope="module")
def made():
    names = {"__name__": __name__}
    for _, block in code(ROOT / "docs/extend.md", "python"):
        exec(block, names)
    return names


@pytest.mark.parametrize("what", ["GreedyLayers", "Focal", "SofterBelow", "MeanHead", "Ordinal", "ThreeBlocks"])
def test_it_learns(what, made, make_trainer):
    torch.manual_seed(0)
    argument = {"Focal": "loss", "SofterBelow": "loss", "MeanHead": "head", "Ordinal": "task"}.get(what)
    if argument:
        model = SFF(small_net(), **SHAPE, **{argument: made[what]})
    else:
        model = SFF(made[what](width=8), **SHAPE) if what == "ThreeBlocks" else made[what](**SHAPE)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, data.Digits(batch_size=32))
    logged = trainer.callback_metrics
    assert logged["val/acc"] > (0.25 if what == "MeanHead" else 0.8)  # the means of four channels say little
    assert ("val/distance" in logged) == (what == "Ordinal")


def test_the_data_set_is_learned(made, make_trainer):
    torch.manual_seed(0)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    model, wine = SFF("mlp", num_classes=3, input_shape=(13,)), made["Wine"]()
    trainer.fit(model, wine)
    assert trainer.callback_metrics["val/acc"] > 0.9
    assert trainer.test(model, wine, verbose=False)[0]["test/acc"] > 0.9


def test_the_network_is_cut_as_the_page_says(made):
    blocks = partition(made["ThreeBlocks"](), "block", torch.zeros(1, 1, 8, 8))
    assert ", ".join(f"{block.name} {block.map_shape}" for block in blocks) in (ROOT / "docs/extend.md").read_text()
