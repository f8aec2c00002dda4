"""Signals: arrays and wav files of one length, standardised, and what is said of files that do not fit."""

import logging

import numpy as np
import pytest
import torch
from scipy.fft import dct
from scipy.io import wavfile

from ff_lightning import data
from tests.conftest import REAL_DATA


def tones(count=40, length=50, seed=0):
    """Fast and slow waves in two channels of different size under noise, and which they are."""
    generator = np.random.default_rng(seed)
    y = np.arange(count) % 2
    waves = np.sin(np.arange(length) * (0.3 + 0.5 * y[:, None]) + generator.uniform(0, 6, (count, 1)))
    x = np.stack([waves, 5 + 3 * waves], 1) + generator.normal(0, 0.1, (count, 2, length))
    return x.astype(np.float32), y


@pytest.fixture
def write(tmp_path):
    """Writes an npz file and returns its path."""

    def written(name="signals.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return written


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of wav files and returns its path."""

    def written(signals, names, rate=8000, root="wavs"):
        for i, (signal, name) in enumerate(zip(signals, names, strict=True)):
            (tmp_path / root / name).mkdir(parents=True, exist_ok=True)
            wavfile.write(tmp_path / root / name / f"{i:03}.wav", rate, signal)
        return str(tmp_path / root)

    return written


def ready(path, **arguments):
    module = data.Signals(path, **arguments)
    module.setup("fit")
    module.setup("test")
    return module


def inputs_of(split):
    return split.source.read(split.numbers)


def test_each_channel_is_standardised_by_the_training_split(write):
    x, y = tones()
    module = ready(write(x=x, y=y))
    assert (module.input_shape, module.num_classes, module.class_names) == ((2, 50), 2, ["0", "1"])
    train = inputs_of(module.train_set)
    torch.testing.assert_close(train.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std((0, 2), correction=0), torch.ones(2))
    mean, std = (torch.tensor(values)[:, None] for values in module.statistics)
    torch.testing.assert_close(inputs_of(module.test_set) * std + mean, torch.from_numpy(x[module._test.rows]))
    assert module.test_set.targets.tolist() == y[module._test.rows].tolist()


def test_one_channel_needs_no_axis(write):
    x, y = tones()
    one, two = ready(write("one.npz", x=x[:, 0], y=y)), ready(write("two.npz", x=x[:, :1], y=y))
    assert one.input_shape == (1, 50)
    assert torch.equal(inputs_of(one.train_set), inputs_of(two.train_set))


@pytest.mark.parametrize("length", [None, 5, 9])
def test_signals_are_cut_off_or_followed_by_zeros_which_count_for_no_mean(length, folder):
    generator = np.random.default_rng(0)
    signals = [generator.integers(100, 20000, 3 + i % 6).astype(np.int16) for i in range(40)]
    module = ready(folder(signals, ["ab"[i % 2] for i in range(40)]), length=length)
    length = length or 8
    assert module.input_shape == (1, length)
    assert module.sample_rate == 8000
    rows_of_train = module._train.rows[module.train_set.numbers]
    kept = np.concatenate([signals[int(path[-7:-4])][:length] for path in rows_of_train])
    mean, std = kept.mean(), kept.std()
    for split, rows in (
        (module.train_set, module._train.rows[module.train_set.numbers]),
        (module.test_set, module._test.rows),
    ):
        for found, path in zip(inputs_of(split), rows, strict=True):
            expected = np.zeros(length, np.float32)
            signal = signals[int(path[-7:-4])][:length]
            expected[: len(signal)] = (signal - mean) / std
            torch.testing.assert_close(found[0], torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32"])
def test_wav_files_of_each_depth_give_the_same_signal(kind, folder):
    x, _ = tones(length=200)
    x = (x / 10).transpose(0, 2, 1)  # (N, T, C), within full scale
    scale = {"uint8": 128, "int16": 2**15, "int32": 2**31, "float32": 1}[kind]
    stored = (x.astype(np.float64) * scale + (128 if kind == "uint8" else 0)).round(0 if kind != "float32" else 9)
    path = folder(stored.astype(kind), ["ab"[i % 2] for i in range(40)])
    module = data.Signals(path)
    found = np.stack([*module._train.inputs, *module._test.inputs])
    order = [int(row[-7:-4]) for row in [*module._train.rows, *module._test.rows]]
    np.testing.assert_allclose(found, x[order].transpose(0, 2, 1), atol=1 / 128 if kind == "uint8" else 1e-4)


def test_coefficients_are_those_of_another_library_and_take_the_place_of_the_signal(folder):
    audio = pytest.importorskip("transformers").audio_utils
    signals = [
        np.random.default_rng(i).integers(-9000, 9000, (900 + 300 * (i % 3), 2)).astype(np.int16) for i in range(20)
    ]
    root = folder(signals, ["ab"[i % 2] for i in range(20)])
    module = ready(root, mfcc=5, test_fraction=0.2)
    bands = audio.mel_filter_bank(201, 64, 0, 4000, 8000)
    for split, samples in ((module.train_set, module._train), (module.test_set, module._test)):
        for found, path in zip(inputs_of(split), samples.rows[split.numbers], strict=True):
            both = [
                dct(audio.spectrogram(channel / 2**15, audio.window_function(400), 400, 200, mel_filters=bands, power=2,
                                      pad_mode="constant", log_mel="dB", db_range=80).T, norm="ortho").T[:5]
                for channel in signals[int(path[-7:-4])].T
            ]  # fmt: skip
            mean, std = (np.array(values)[:, None] for values in module.statistics)
            expected = (np.concatenate(both) - mean) / std
            np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-3)
            assert not found[:, expected.shape[1] :].any()
    assert module.input_shape == (10, 8)
    with pytest.raises(ValueError, match="mfcc=65: must be at most 64"):
        data.Signals(root, mfcc=65)


def test_files_for_each_split_and_other_files_are_passed_over(folder, caplog, tmp_path):
    x, y = tones(count=20)
    x, names = x[:, 0], [f"{'ab'[k]}" for k in y]
    paths = {name: folder(x, names, root=name) for name in ("train", "val", "test")}
    (tmp_path / "train" / "a" / "notes.txt").write_text("")
    module = ready(paths["train"], val=paths["val"], test=paths["test"])
    assert [len(split) for split in (module.train_set, module.val_set, module.test_set)] == [20, 20, 20]
    assert torch.equal(inputs_of(module.train_set), inputs_of(module.test_set))
    assert "passed over 1 files in" in caplog.text


@pytest.mark.parametrize(("task", "shape"), [("regression", ()), ("regression", (3,)), ("multilabel", (3,))])
def test_other_tasks_from_arrays(task, shape, write):
    x, y = tones()
    y = np.broadcast_to(y[:, None] * (10.0 if task == "regression" else 1), (40, 3))[:, : shape[0] if shape else 1]
    module = ready(write(x=x, y=y if shape else y[:, 0]), task=task)
    assert module.num_classes == (shape[0] if shape else 1)
    targets = module.test_set.targets
    assert targets.dtype == torch.float32
    np.testing.assert_array_equal(targets, (y if shape else y[:, 0])[module._test.rows])


X, Y = tones()


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({"x": X, "label": Y}, {}, r"signals.npz: must hold the arrays 'x' and 'y', it holds \['x', 'label'\]"),
        ({"x": X[0, 0], "y": Y}, {}, r"x must be numbers of shape \(N, T\) or \(N, C, T\), it is float32 \(50,\)"),
        ({"x": X.astype(str), "y": Y}, {}, "x must be numbers of shape"),
        ({"x": X[:0], "y": Y[:0]}, {}, "x must be numbers of shape"),
        ({"x": X, "y": Y[:-1]}, {}, "x has 40 signals, y has 39 targets"),
        ({"x": np.where(X[7, 0, 3] == X, np.nan, X), "y": Y}, {}, "signals.npz, signal 7: x holds a value that is not"),
        ({"x": X.astype(object), "y": Y}, {}, "signals.npz: must be an npz file of plain arrays"),
        ({"x": X, "y": Y + 0.5}, {}, r"y must be classes \(N,\), whole numbers or names, it is float64 \(40,\)"),
        ({"x": X, "y": np.eye(2)[Y]}, {}, r"y must be classes \(N,\).*is it another task"),
        ({"x": X, "y": Y}, {"task": "multilabel"}, r"y must be numbers \(N, K\) for task='multilabel', it is int64"),
        ({"x": X, "y": np.eye(2)[Y] * 2}, {"task": "multilabel"}, r"signal 0: y must be 0 or 1, it is \[2.0, 0.0\]"),
        ({"x": X, "y": np.full(40, np.nan)}, {"task": "regression"}, r"signal 0: y must be finite, it is nan"),
        ({"x": X, "y": Y * 0}, {}, r"two or more classes, it holds \['0'\]"),
        ({"x": X, "y": Y}, {"length": 0}, "length=0: must be at least 1"),
        ({"x": X, "y": Y}, {"mfcc": 0}, "mfcc=0: must be at least 1"),
        ({"x": X, "y": Y}, {"mfcc": 9}, "mfcc=9: .*signals.npz has no sample rate: give folders of wav files"),
    ],
)  # fmt: skip
def test_arrays_that_are_not_as_they_should_be(arrays, arguments, message, write):
    with np.errstate(all="ignore"), pytest.raises((ValueError, OSError), match=message):
        ready(write(**arrays), **arguments)


def test_files_that_are_not_as_they_should_be(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz: there is no such file or folder"):
        data.Signals(str(tmp_path / "nowhere.npz"))
    (tmp_path / "text.npz").write_text("time,value\n")
    with pytest.raises(OSError, match=r"text.npz: must be an npz file of plain arrays, or a folder of wav files"):
        data.Signals(str(tmp_path / "text.npz"))
    signals = (X[:, 0] * 3000).astype(np.int16)
    root = folder(signals, ["ab"[k] for k in Y])
    with pytest.raises(ValueError, match=r"wavs: folders hold classes, not what task='regression' needs"):
        data.Signals(root, task="regression")
    odd = tmp_path / "wavs" / "b" / "odd.wav"
    for content, message in (
        ((16000, signals[0]), r"b/odd.wav: has a sample rate of 16000 Hz, others have 8000"),
        ((8000, signals[:2].T), r"b/odd.wav: has 2 channels, others have 1"),
        ((8000, signals[0][:0]), r"b/odd.wav: holds no samples"),
        ((8000, X[0, 0] * np.nan), r"b/odd.wav: holds values that are not finite"),
    ):
        wavfile.write(odd, *content)
        with pytest.raises(ValueError, match=message):
            ready(root)
    for content in (b"", b"RIFF", odd.read_bytes()[:30]):
        odd.write_bytes(content)
        with pytest.raises(OSError, match=r"cannot read the signal .*b/odd.wav"):
            ready(root)
    odd.unlink()
    (tmp_path / "wavs" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder of .wav files for each of .*\['c'\] hold none"):
        ready(root)
    with pytest.raises(FileNotFoundError, match=r"it holds the folders \[\]"):
        ready(str(tmp_path / "wavs" / "c"))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:, :1], Y, "test.npz, signal 0: has 1 channels, others have 2"),
        (X, Y + 1, "test.npz, signal 1: class '2' is none of the classes of the training samples"),
    ],
)
def test_a_test_file_that_does_not_fit(x, y, message, write):
    module = data.Signals(write(x=X, y=Y), test=write("test.npz", x=x, y=y))
    with pytest.raises(ValueError, match=message):
        module.setup("test")


@pytest.mark.skipif(not (REAL_DATA / "ecg_pvc.npz").exists(), reason=f"no real signals in {REAL_DATA} (see FF_DATA)")
def test_real_heartbeats(caplog):
    with caplog.at_level(logging.WARNING):
        module = ready(str(REAL_DATA / "ecg_pvc.npz"))
    assert (module.input_shape, module.num_classes, caplog.text) == ((1, 128), 2, "")
    assert sum(map(len, (module.train_set, module.val_set, module.test_set))) == 25302
