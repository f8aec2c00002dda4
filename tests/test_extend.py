"""The code of docs/extend.md runs as it stands there, and what it makes learns."""

import pytest
import torch

from ff_lightning import SFF, data
from tests.conftest import small_net
from tests.pages import ROOT, code

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


@pytest.fixture(scope="module")
def made():
    names = {"__name__": __name__}
    for _, block in code(ROOT / "docs/extend.md", "python"):
        exec(block, names)
    return names


@pytest.mark.parametrize("what", ["GreedyLayers", "Focal", "SofterBelow", "MeanHead", "Ordinal"])
def test_it_learns(what, made, make_trainer):
    torch.manual_seed(0)
    argument = {"Focal": "loss", "SofterBelow": "loss", "MeanHead": "head", "Ordinal": "task"}.get(what)
    model = SFF(small_net(), **SHAPE, **{argument: made[what]}) if argument else made[what](**SHAPE)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    trainer.fit(model, data.Digits(batch_size=32))
    logged = trainer.callback_metrics
    assert logged["val/acc"] > (0.25 if what == "MeanHead" else 0.8)  # the means of four channels say little
    assert ("val/distance" in logged) == (what == "Ordinal")
