"""A stop is answered between two batches or leaves the checkpoint before; the signals are given back afterwards."""

import os
import signal
import stat
import threading

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback

from ff_lightning import SFF, data
from ff_lightning.callbacks import LastCheckpoint
from ff_lightning.training import checkpoint_io
from ff_lightning.training.lightning_private import cluster_environment
from tests.conftest import make_trainer_in, small_net

BATCHES = 4
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C interrupts, also where a shell that runs the tests in its background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make(**arguments):
    torch.manual_seed(0)
    return SFF(backbone=small_net(), num_classes=10, input_shape=(1, 8, 8), lr=0.01, **arguments)


class At(Callback):
    """Does something in a hook at a batch of the run, or in the middle of it: when the network is at its last block."""

    def __init__(self, batch, hook, do):
        self.batch, self.hook, self.do = batch, hook, do
        self.was_done = False

    def at(self, trainer, hook):
        if (trainer.fit_loop.epoch_loop.total_batch_idx, hook) == (self.batch, self.hook) and not self.was_done:
            self.was_done = True
            self.do()

    def on_train_start(self, trainer, pl_module):
        def before_the_last_block(block, inputs):
            if trainer.training:
                self.at(trainer, "middle")

        pl_module.net.blocks[-1].register_forward_pre_hook(before_the_last_block)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at(trainer, "start")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not trainer.sanity_checking:
            self.at(trainer, "validation")


def fit(make_trainer, folder, *callbacks, model=None, ckpt_path=None, every=1, **settings):
    model = model or make()
    last = LastCheckpoint(str(folder / "checkpoints"), every_n_train_steps=every)
    settings = {"limit_train_batches": BATCHES, "default_root_dir": folder, **settings}
    trainer = make_trainer(enable_checkpointing=True, callbacks=[*callbacks, last], **settings)
    trainer.fit(model, data.Digits(batch_size=16), ckpt_path=ckpt_path)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights after a run that was left alone."""
    torch.set_num_threads(1)
    return fit(make_trainer_in(tmp_path_factory.mktemp("whole")), tmp_path_factory.mktemp("whole")).state_dict()


def assert_same(whole, model):
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def once(number):
    return lambda: signal.raise_signal(number)


def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def interrupt():
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------- a run that breaks off


@pytest.mark.parametrize(
    ("batch", "hook", "do"),
    [
        (5, "middle", twice), (4, "start", twice), (5, "start", interrupt), (5, "middle", interrupt),
        (BATCHES - 1, "validation", interrupt),
    ],
    ids=["second Ctrl-C in a batch", "and before it", "a callback's own", "in a batch", "in validation"],
)  # fmt: skip
def test_a_run_that_breaks_off_leaves_the_checkpoint_before(batch, hook, do, whole, make_trainer, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    before = []

    def remember_and_do():
        before.append(path.read_bytes())
        do()

    with pytest.raises(SystemExit):
        fit(make_trainer, tmp_path, At(batch, hook, remember_and_do))
    assert before == [path.read_bytes()]
    assert_same(whole, fit(make_trainer, tmp_path, ckpt_path=path))


def test_a_second_interrupt_in_the_first_batch_leaves_no_checkpoint(make_trainer, tmp_path):
    with pytest.raises(SystemExit):
        fit(make_trainer, tmp_path, At(0, "middle", twice))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_interrupt_while_a_checkpoint_is_written_leaves_the_one_before(
    whole, make_trainer, tmp_path, monkeypatch
):
    save, saved = torch.save, []

    def slow(content, path):
        save(content, path)
        saved.append(path)
        if len(saved) == 3:
            twice()

    monkeypatch.setattr(checkpoint_io.torch, "save", slow)
    with pytest.raises(SystemExit):
        fit(make_trainer, tmp_path)
    monkeypatch.undo()
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert_same(whole, fit(make_trainer, tmp_path, ckpt_path=path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_stop_in_a_window_of_accumulation_goes_on_in_it(number, code, make_trainer, tmp_path):
    whole = fit(make_trainer, tmp_path / "whole", model=make(accumulate=3)).state_dict()
    with pytest.raises(SystemExit) as stop:
        fit(make_trainer, tmp_path, At(1, "middle", once(number)), model=make(accumulate=3), every=None)
    assert stop.value.code == code
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["ff_lightning"]["gradients"]
    assert_same(whole, fit(make_trainer, tmp_path, model=make(accumulate=3), ckpt_path=path))


def test_fast_dev_run_writes_no_checkpoint_when_it_is_stopped(make_trainer, tmp_path):
    with pytest.raises(SystemExit):
        fit(make_trainer, tmp_path, At(0, "start", once(signal.SIGINT)), fast_dev_run=2)
    assert not list(tmp_path.rglob("*.ckpt"))


# ------------------------------------------------------------------------------------------- the signals afterwards


@pytest.fixture
def own_handlers():
    """Handlers of the user's own, and what they got."""
    got = []
    before = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in NUMBERS}
    own = {number: signal.getsignal(number) for number in NUMBERS}
    yield got, lambda: {number: signal.getsignal(number) for number in NUMBERS} == own
    for number, handler in before.items():
        signal.signal(number, handler)


def wrong():
    raise RuntimeError("wrong")


@pytest.mark.parametrize(
    ("do", "ends"),
    [
        (lambda: None, None), (wrong, RuntimeError), (once(signal.SIGTERM), SystemExit), (interrupt, SystemExit),
        (once(signal.SIGINT), SystemExit),
    ],
    ids=["end", "error", "SIGTERM", "KeyboardInterrupt", "Ctrl-C"],
)  # fmt: skip
def test_the_signals_are_given_back(do, ends, own_handlers, make_trainer, tmp_path):
    _, are_back = own_handlers
    for _ in range(2):
        if ends is None:
            fit(make_trainer, tmp_path, At(1, "middle", do), max_epochs=1)
        else:
            with pytest.raises(ends):
                fit(make_trainer, tmp_path, At(1, "middle", do), max_epochs=1)
        assert are_back()


def test_default_handlers_are_given_back(make_trainer, tmp_path):
    before = {number: signal.getsignal(number) for number in NUMBERS}
    fit(make_trainer, tmp_path, max_epochs=1)
    assert {number: signal.getsignal(number) for number in NUMBERS} == before


def test_a_run_inside_another_gives_its_signals_back_to_it(own_handlers, make_trainer, tmp_path):
    _, are_back = own_handlers
    with pytest.raises(SystemExit):
        fit(
            make_trainer,
            tmp_path / "outer",
            At(1, "start", lambda: fit(make_trainer, tmp_path / "inner", max_epochs=1)),
            At(2, "middle", once(signal.SIGTERM)),
            every=None,
        )
    assert torch.load(tmp_path / "outer/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert are_back()


def test_a_handler_that_someone_sets_in_the_run_is_left_to_him(make_trainer, tmp_path):
    def other(number, frame):
        pass

    class Takes(Callback):
        def on_train_end(self, trainer, pl_module):
            signal.signal(signal.SIGINT, other)

    class Found(LastCheckpoint):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            found.append(signal.getsignal(signal.SIGINT))

    found, before = [], signal.getsignal(signal.SIGINT)
    trainer = make_trainer(enable_checkpointing=True, callbacks=[Takes(), Found(str(tmp_path))], max_epochs=1)
    trainer.fit(make(), data.Digits(batch_size=16))
    assert found == [other]
    assert signal.getsignal(signal.SIGINT) == before, "Lightning gives back what it found"


def test_a_run_in_a_thread_leaves_the_signals_alone(own_handlers, make_trainer, tmp_path):
    _, are_back = own_handlers
    steps = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            steps.append(are_back())

    thread = threading.Thread(target=fit, args=(make_trainer, tmp_path, Watch()), kwargs={"max_epochs": 1})
    thread.start()
    thread.join()
    assert steps == [True] * BATCHES
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_batch_is_handed_on(number, own_handlers, make_trainer, tmp_path):
    got, are_back = own_handlers

    class Late(Callback):
        def on_train_end(self, trainer, pl_module):
            signal.raise_signal(number)

    fit(make_trainer, tmp_path, Late(), max_epochs=1)
    assert (got, are_back()) == ([number], True)


# ------------------------------------------------------------------------------------------------------------ SLURM


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of SLURM with one task, and a command scontrol that writes down what it is asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command, asked = folder / "scontrol", tmp_path / "asked.txt"
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name, value in {
        "JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "127.0.0.1",
        "PROCID": "0", "LOCALID": "0", "NODEID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    return lambda: asked.read_text().splitlines() if asked.exists() else []


def test_the_environment_of_a_run_on_one_device_is_known(job, make_trainer):
    assert isinstance(cluster_environment(make_trainer()), SLURMEnvironment)


@pytest.mark.parametrize("batch", [1, BATCHES - 1], ids=["in an epoch", "in its last batch"])
def test_the_signal_of_slurm_waits_for_the_end_of_the_batch(batch, whole, job, make_trainer, tmp_path):
    folder = tmp_path / "run"
    assert_same(whole, fit(make_trainer, folder, At(batch, "middle", once(signal.SIGUSR1)), every=None))
    assert job() == ["requeue 7"]
    checkpoint = torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == batch + 1
    first = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            first.append(trainer.fit_loop.epoch_loop.total_batch_idx)

    resumed = fit(make_trainer, folder, First(), every=None)  # as the job does that was queued again
    assert first[0] == batch + 1
    assert_same(whole, resumed)


def test_the_signal_of_slurm_and_then_a_stop(job, make_trainer, tmp_path):
    def both():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        fit(make_trainer, folder, At(1, "middle", both), every=None)
    assert job() == ["requeue 7"]
    for path in (folder / "hpc_ckpt_1.ckpt", folder / "checkpoints/last.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] == 2


def test_the_signal_of_slurm_and_then_two_interrupts(job, make_trainer, tmp_path):
    def all_three():
        signal.raise_signal(signal.SIGUSR1)
        twice()

    with pytest.raises(SystemExit):
        fit(make_trainer, tmp_path / "run", At(1, "middle", all_three), every=None)
    assert not list((tmp_path / "run").rglob("*.ckpt")), "nothing from the middle of a batch"


def test_without_requeue_the_signal_is_not_ours(job, own_handlers, make_trainer, tmp_path):
    got, _ = own_handlers
    plugin = SLURMEnvironment(auto_requeue=False)
    fit(make_trainer, tmp_path / "run", At(1, "middle", once(signal.SIGUSR1)), plugins=[plugin], max_epochs=1)
    assert (got, job()) == ([signal.SIGUSR1], [])
