"""What TensorBoard shows of a run."""

import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from ff_lightning import FF, SFF
from ff_lightning.callbacks import BestCheckpoint, Charts
from tests.conftest import small_net

SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}


@pytest.fixture
def logged(make_trainer, digits, tmp_path):
    """Trains a model; returns its Trainer and what TensorBoard reads."""

    def fit(model, **changes):
        logger = TensorBoardLogger(tmp_path, name="")
        trainer = make_trainer(logger=logger, callbacks=[Charts(), *changes.pop("callbacks", [])], **changes)
        trainer.fit(model, digits)
        return trainer, EventAccumulator(logger.log_dir).Reload()

    return fit


def charts_of(events):
    """Name of each chart, and the names of all figures that it shows."""
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    tags = events.Tags()["scalars"]
    return {
        chart.title: [tag for tag in tags if any(re.match(one, tag) for one in chart.multiline.tag)]
        for chart in category.chart
    }


def test_blocks_are_in_one_chart(logged):
    _, events = logged(SFF(small_net(), metrics=["balanced_acc"], **SHAPE))
    assert {name: sorted(tags) for name, tags in charts_of(events).items()} == {
        "validation: acc": ["val/acc", *(f"val/block0{k}_acc" for k in range(3))],
        "validation: balanced_acc": ["val/balanced_acc", *(f"val/block0{k}_balanced_acc" for k in range(3))],
        "training: loss": [*(f"train/block0{k}_loss" for k in range(3)), "train/loss"],
        "learning rate": ["lr"],
    }


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_rates_are_those_of_the_steps(logged, optimization):
    _, events = logged(SFF(small_net(), lr_decay=0.5, optimization=optimization, **SHAPE))
    assert sorted(charts_of(events)["learning rate"]) == ["lr/block00", "lr/block01", "lr/block02"]
    rates = [[scalar.value for scalar in events.Scalars(f"lr/block0{k}")] for k in range(3)]
    assert len(rates[2]) == 6, "of each step"
    assert rates[0] == pytest.approx([rate / 4 for rate in rates[2]])
    assert max(rates[2]) < 5e-3 * 1.001


def test_a_read_out_has_a_rate_of_its_own(logged):
    _, events = logged(FF(widths=[20, 20], readout_lr=0.02, lr_scheduler="constant", **SHAPE))
    assert sorted(charts_of(events)["learning rate"]) == ["lr/block00", "lr/block01", "lr/readout"]
    assert events.Scalars("lr/readout")[0].value == pytest.approx(0.02)
    assert "val/readout_acc" in charts_of(events)["validation: acc"]


@pytest.mark.parametrize("monitor", ["val/acc", "val/loss"])
def test_the_monitored_figure_stands_beside_the_hyper_parameters(logged, tmp_path, monitor):
    best = BestCheckpoint(dirpath=tmp_path, monitor=monitor)
    trainer, events = logged(SFF(small_net(), **SHAPE), callbacks=[best], enable_checkpointing=True)
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(trainer.callback_metrics[monitor].item())
    assert [scalar.step for scalar in events.Scalars("hp_metric")] == [0, 3, 6]
