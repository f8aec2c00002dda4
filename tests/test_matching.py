"""A checkpoint is compared with the model, the data and the run that read it."""

import functools
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from ff_lightning import SFF, Backprop, data
from ff_lightning.heads import GoodnessHead, PooledHead
from ff_lightning.training import matching
from tests.conftest import make_trainer_in, small_net
from tests.test_cli import checkpoint, run

BATCHES = 3
SGD = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}


class Ten(data.Digits):
    """Digits with names that another set may have in another order."""

    class_names = tuple(f"digit {k}" for k in range(10))


class Turned(Ten):
    class_names = Ten.class_names[::-1]


class Letters(Ten):
    class_names = tuple("abcdefghij")


class Brighter(Ten):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.statistics = ([0.5], [0.5])


class SaveAt(Callback):
    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def make(method=SFF, **arguments):
    torch.manual_seed(0)
    arguments = {"lr": 0.01, "optimization": "manual", **arguments}
    return method(**{"backbone": small_net(), "num_classes": 10, "input_shape": (1, 8, 8)} | arguments)


def fit(folder, model, images=None, ckpt_path=None, **settings):
    trainer = make_trainer_in(folder)(limit_train_batches=BATCHES, **settings)
    trainer.fit(model, images or Ten(batch_size=8), ckpt_path=ckpt_path)
    return trainer


@functools.cache
def written(folder, **arguments):
    """The checkpoint of a run of two epochs that was interrupted in the second batch."""
    path = folder / f"{'-'.join(arguments.values())}.ckpt"
    fit(folder, make(**arguments), max_epochs=2, callbacks=[SaveAt(1, path)])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("checkpoints")


# ------------------------------------------------------------------------------------------------------------ resumed


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": SGD}, r"optimizer='AdamW' there, 'SGD' here"),
        ({}, {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9)}, r"optimizer='AdamW' there, 'SGD' here"),
        ({"lr_scheduler": "constant"}, {"lr_scheduler": "onecycle"}, r"lr_scheduler='constant' there, 'onecycle' here"),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler": "constant"}, r"lr_scheduler='cosine' there, 'constant' here"),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler": STEP}, r"lr_scheduler='cosine' there, 'StepLR' here"),
        ({}, {"optimization": "automatic"}, r"optimization='manual' there, 'automatic' here"),
        ({"optimization": "automatic"}, {"optimization": "manual"}, r"optimization='automatic' there, 'manual' here"),
        ({}, {"granularity": "layer"}, r"'granularity': \"'layer' here, 'block' there\""),
        ({}, {"head": "deep"}, r"'head': \"'deep' here, 'pooled' there\""),
        ({}, {"norm": "none"}, r"norm='layer' there, 'none' here"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_run_is_not_resumed_with_other_settings(before, after, message, folder):
    path = written(folder, **before)
    with pytest.raises(ValueError, match=message):
        fit(folder, make(**{**before, **after}), ckpt_path=path, max_epochs=2)


@pytest.mark.parametrize("optimization", ["manual", "automatic"])
def test_a_run_is_not_resumed_with_other_parameters(optimization, folder):
    path = written(folder, optimization=optimization)
    model = make(optimization=optimization)
    model.net.blocks[0].requires_grad_(False)
    model.net.heads[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained other parameters: .*requires_grad"):
        fit(folder, model, ckpt_path=path, max_epochs=2)


def test_a_scheduler_per_epoch_is_not_resumed_per_step(folder):
    path = folder / "interval.ckpt"
    fit(folder, make(lr_scheduler=STEP), max_epochs=1).save_checkpoint(path)
    with pytest.raises(ValueError, match="lr_interval='epoch' there, 'step' here"):
        fit(folder, make(lr_scheduler=STEP, lr_interval="step"), ckpt_path=path, max_epochs=2)


def test_a_window_is_finished_with_its_length(folder):
    path = folder / "window.ckpt"
    model = make(accumulate=3, lr_scheduler="constant")
    saves = SaveAt(1, path)
    fit(folder, model, max_epochs=1, callbacks=[saves])
    with pytest.raises(ValueError, match="in the middle of an accumulation of 3 batches, this run has accumulate=2"):
        fit(folder, make(accumulate=2, lr_scheduler="constant"), ckpt_path=path, max_epochs=2)
    saves.batch, saves.path = BATCHES - 1, folder / "border.ckpt"
    fit(folder, make(accumulate=3, lr_scheduler="constant"), max_epochs=1, callbacks=[saves])
    resumed = fit(folder, make(accumulate=1, lr_scheduler="constant"), ckpt_path=saves.path, max_epochs=2)
    assert resumed.global_step == 1 + BATCHES, "between two windows it may change"


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": {"class_path": "torch.optim.AdamW"}, "lr": 0.01},
        {"clip_norm": 0.1},
        {"train_blocks": [1, 2]},
        {"label_smoothing": 0.1},
        {"head": PooledHead},
    ],
    ids=str,
)
def test_what_may_differ_in_a_resumed_run(arguments, folder):
    model = make(**arguments)
    assert fit(folder, model, ckpt_path=written(folder), max_epochs=2).global_step == 2 * BATCHES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lr": 0.5}, "lr=0.01 there, 0.5 here"), ({"lr_decay": 0.5}, "lr_decay=1.0 there, 0.5 here")],
)
def test_a_rate_that_comes_to_nothing_is_said(arguments, message, folder):
    with pytest.warns(UserWarning, match=f"a resumed run keeps .*{message}.*no effect"):
        fit(folder, make(**arguments), ckpt_path=written(folder), max_epochs=2)


# -------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "none"}, "norm='layer' there, 'none' here"),
        ({"norm": "length"}, "norm='layer' there, 'length' here"),
        ({"granularity": ["1", "2"]}, r"granularity='block' there, \['1', '2'\] here"),
        ({"input_shape": (1, 9, 9)}, r"input_shape=\(1, 8, 8\) there, \(1, 9, 9\) here"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["test", "load"])
def test_weights_do_not_go_into_a_network_that_computes_something_else(stage, arguments, message, folder):
    path = written(folder)
    with pytest.raises(ValueError, match=message):
        take(stage, path, arguments)


def take(stage, path, arguments):
    if stage == "test":
        make_trainer_in(path.parent)().test(make(**arguments), Ten(), ckpt_path=path, verbose=False)
    else:
        SFF.load_from_checkpoint(path, backbone=small_net(), **arguments)


def test_the_norm_of_backprop_is_compared_too(folder):
    path = folder / "joined.ckpt"
    fit(folder, make(Backprop, norm="layer"), max_epochs=1).save_checkpoint(path)
    with pytest.raises(ValueError, match="norm='layer' there, 'length' here"):
        make_trainer_in(folder)().validate(make(Backprop, norm="length"), Ten(), ckpt_path=path)


@pytest.mark.parametrize("head", ["pooled", PooledHead, functools.partial(PooledHead)], ids=str)
def test_another_way_to_write_an_argument_is_the_same(head, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint")
        model = SFF.load_from_checkpoint(written(folder), backbone=small_net(), head=head)
    assert model.hparams.norm == "layer"


@pytest.mark.parametrize("stage", ["test", "load"])
def test_a_head_with_another_argument_is_another_head(stage, folder):
    cooler = functools.partial(GoodnessHead, temperature=0.1)
    with pytest.raises(ValueError, match=r"head='deep' there, .*temperature.* here"):
        take(stage, written(folder, head="deep"), {"head": cooler})


def test_another_vote_is_allowed_and_said(folder):
    with pytest.warns(UserWarning, match="trained with other arguments: vote='mean' there, 'last' here"):
        model = SFF.load_from_checkpoint(written(folder), backbone=small_net(), vote="last")
    assert model.net.vote == "last"


class Own(SFF):
    def __init__(self, margin=1.0, **kwargs):
        super().__init__(**kwargs)
        self.margin = margin


def test_an_argument_of_a_class_of_ones_own_is_said(folder):
    path = folder / "own.ckpt"
    fit(folder, make(Own, margin=2.0), max_epochs=1).save_checkpoint(path)
    with pytest.warns(UserWarning, match=r"margin=2\.0 there, 1\.0 here"):
        make_trainer_in(folder)().test(make(Own), Ten(), ckpt_path=path, verbose=False)


# ----------------------------------------------------------------------------------------------------------- the data

STAGES = ["test", "validate", "predict", "fit"]


def use(folder, stage, model, images, ckpt_path=None):
    trainer = make_trainer_in(folder)(max_epochs=2, limit_train_batches=BATCHES)
    getattr(trainer, stage)(model, images, ckpt_path=ckpt_path)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Turned, r"in another order: number 0 is \['digit 0'\] there, \['digit 9'\] here; give the data classes=\["),
        (Letters, r"others: number 0 is \['digit 0'\] there, \['a'\] here"),
    ],
)
def test_other_classes_than_those_of_the_checkpoint_are_refused(images, message, stage, folder):
    path = written(folder)
    with pytest.raises(ValueError, match=message):
        use(folder, stage, make(), images(batch_size=8), path)
    if stage == "fit":
        return
    with pytest.raises(ValueError, match=message):
        use(folder, stage, SFF.load_from_checkpoint(path, backbone=small_net()), images(batch_size=8))


def test_the_way_out_leads_to_the_scores_of_before(folder):
    path = written(folder)
    trainer = make_trainer_in(folder)()
    expected = trainer.test(make(), Ten(batch_size=8), ckpt_path=path, verbose=False)
    classes = list(Ten.class_names)
    turned = Turned(batch_size=8, classes=classes)
    turned.class_numbers = None  # the same images: only their names were turned
    assert trainer.test(make(), turned, ckpt_path=path, verbose=False) == expected
    stored = torch.load(path, weights_only=True)["ff_lightning"]["data"]
    assert stored == {"class_names": classes, "statistics": [list(values) for values in Ten().statistics]}


def test_a_model_in_memory_is_compared_too(folder):
    model = make()
    fit(folder, model, max_epochs=1)
    with pytest.raises(ValueError, match="in another order"):
        use(folder, "test", model, Turned(batch_size=8))


def test_a_new_run_may_learn_other_classes_and_says_that_the_heads_stay(folder):
    model = SFF.load_from_checkpoint(written(folder), backbone=small_net())
    with pytest.warns(UserWarning, match="its heads go on from what they were"):
        fit(folder, model, images=Letters(batch_size=8), max_epochs=1)
    use(folder, "test", model, Letters(batch_size=8))


def test_heads_that_start_anew_learn_any_classes(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*classes")
        path = folder / "cnn.ckpt"
        fit(folder, make(backbone="cnn"), max_epochs=1).save_checkpoint(path)
        fit(folder, make(backbone="cnn", weights=str(path)), images=Letters(batch_size=8), max_epochs=1)


def test_a_classifier_that_is_taken_over_says_of_which_classes_it_is(folder):
    path = folder / "backprop.ckpt"
    arguments = {"method": Backprop, "backbone": "cnn"}
    fit(folder, make(**arguments), max_epochs=1).save_checkpoint(path)
    with pytest.warns(UserWarning, match="its heads go on from what they were"):
        fit(folder, make(**arguments, weights=str(path)), images=Letters(batch_size=8), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*classes")
        fit(folder, make(**arguments, weights=str(path)), max_epochs=1)
        fit(folder, make(backbone="cnn", weights=str(path)), images=Letters(batch_size=8), max_epochs=1)


def test_data_that_do_not_name_their_classes_are_not_compared(folder):
    images = Ten(batch_size=8)
    images.setup("test")
    results = make_trainer_in(folder)().test(make(), images.test_dataloader(), ckpt_path=written(folder), verbose=False)
    assert results


@pytest.mark.parametrize("stage", STAGES)
def test_another_normalisation_is_said(stage, folder):
    with pytest.warns(UserWarning, match=r"normalised with mean and deviation .* with \[\[0\.5\], \[0\.5\]\]"):
        use(folder, stage, make(), Brighter(batch_size=8), written(folder))


def test_names_of_any_kind_are_stored_as_text():
    class Numbers:
        class_names = (0, 1)
        statistics = torch.tensor([[0.5], [0.25]])

    assert matching.describe_data(Numbers()) == {"class_names": ["0", "1"], "statistics": [[0.5], [0.25]]}
    assert matching.describe_data(None) == {}


# ------------------------------------------------------------------------------------------ the command line


def test_the_command_says_which_argument_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1, "--data.batch_size", 8]
    quick += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    run("fit", *quick, "--trainer.max_epochs", 1)
    path = checkpoint(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*optimizer='AdamW' there, 'SGD' here"):
        run("fit", *quick, "--ckpt_path", path, "--trainer.max_epochs", 2, "--model.optimizer", "SGD")
    with pytest.raises(SystemExit, match=r"error: .*norm='layer' there, 'none' here"):
        run("test", "--ckpt_path", path, "--model.norm", "none")
    reordered = str([str(k) for k in reversed(range(10))]).replace("'", '"')
    with pytest.raises(SystemExit, match=r"error: .*in another order.*classes=\['0', '1', "):
        run("test", "--ckpt_path", path, "--data.classes", reordered)
    assert "test accuracy" in run("test", "--ckpt_path", path, "--model.vote", "last", *quick[4:])
