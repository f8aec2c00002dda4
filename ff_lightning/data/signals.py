"""Signals over time: arrays of an npz file, or wav files, as (C, T), or as coefficients over steps of time.

Shapes: N signals, C channels, T samples of a channel over time.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor

from ff_lightning.data.columns import as_name
from ff_lightning.data.listing import class_files
from ff_lightning.data.memory import FileData, Samples
from ff_lightning.data.mfcc import FILTERS, mfcc
from ff_lightning.data.splits import Targets
from ff_lightning.training.plain import to_plain
from ff_lightning.util.arguments import check_whole
from ff_lightning.util.files import check_kind, printable

Signal = np.ndarray[Any, Any]


class SignalEncoder:
    """Signals of one length, each channel standardised. Shorter signals are filled up with 0, the mean.

    Args:
        length: T; None: that of the longest signal of the training split.
    """

    input_shape: tuple[int, ...]
    statistics: tuple[list[float], list[float]]

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def fit(self, samples: Samples) -> None:
        """Learn the length, and the mean and deviation of each channel over all that is kept of the signals."""
        channels = samples.inputs[0].shape[0]
        length = self.length or max(signal.shape[1] for signal in samples.inputs)
        self.input_shape = (channels, length)
        kept = [self._kept(samples, row) for row in range(len(samples.rows))]
        count = sum(signal.shape[1] for signal in kept)
        mean = sum(signal.sum(1, dtype=np.float64) for signal in kept) / count
        variance = sum(((signal - mean[:, None]) ** 2).sum(1) for signal in kept) / count
        self.statistics = (mean.tolist(), np.where(variance > 0, np.sqrt(variance), 1).tolist())

    def transform(self, samples: Samples) -> Tensor:
        """All signals, float32 (N, C, T).

        Raises:
            ValueError: If one has another number of channels than the training split.
        """
        found = torch.zeros(len(samples.rows), *self.input_shape)
        mean, std = (np.array(values)[:, None] for values in self.statistics)
        for row in range(len(samples.rows)):
            signal = self._kept(samples, row)
            found[row, :, : signal.shape[1]] = torch.from_numpy((signal - mean) / std)
        return found

    def _kept(self, samples: Samples, row: int) -> Signal:
        """A signal, cut off at the length."""
        signal = samples.inputs[row]
        channels, length = self.input_shape
        if signal.shape[0] != channels:
            raise ValueError(f"{samples.place(row)}: has {signal.shape[0]} channels, others have {channels}")
        return signal[:, :length]


class Signals(FileData):
    """Your own signals: an npz file, or a folder of wav files. A sample is float32 (C, T).

    Each channel is standardised by the training split. Signals are cut off at `length`; shorter ones are filled up with
    zeros.

    Args:
        train: An npz file with the arrays ``x`` (N, T) or (N, C, T) and ``y``: classes (N,), zeros and ones (N, K), or
            numbers (N,) or (N, K), as `task` says. Or a folder with a folder of wav files for each class.
        length: T; None: that of the longest signal of the training split.
        mfcc: Coefficients (MFCC) of each step of 25 ms of a wav file, 64 at most. A sample is then (C * mfcc, steps),
            and `length` counts steps. None: the signal itself.
        kwargs: val, test, test_fraction, task, batch_size, val_fraction, seed, ...; see `FileData` and `DataModule`.

    Attributes:
        sample_rate: Of wav files, in Hz.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If a file cannot be read.
        ValueError: If an argument or a file is not as it should be.
    """

    sample_rate: int | None = None

    def __init__(self, train: str, length: int | None = None, mfcc: int | None = None, **kwargs: Any) -> None:
        length, mfcc = to_plain((length, mfcc))
        check_whole("length", length, optional=True)
        check_whole("mfcc", mfcc, optional=True)
        if mfcc and mfcc > FILTERS:
            raise ValueError(f"mfcc={mfcc}: must be at most {FILTERS}")
        self.length, self.mfcc = length, mfcc
        super().__init__(train=train, **kwargs)

    def read_file(self, path: str) -> Samples:
        """All signals of a file or folder."""
        if Path(path).expanduser().is_dir():
            return self._read_folder(path)
        if self.mfcc:
            raise ValueError(f"mfcc={self.mfcc}: {path} has no sample rate: give folders of wav files")
        return _read_npz(path, self.task)

    def make_encoder(self) -> SignalEncoder:
        """To one length."""
        return SignalEncoder(self.length)

    def _read_folder(self, path: str) -> Samples:
        if self.task != "classification":
            raise ValueError(f"{path}: folders hold classes, not what task={self.task!r} needs: give an npz file")
        files, names = class_files(path, (".wav",))
        signals = np.empty(len(files), object)
        for i, file in enumerate(files):
            rate, signals[i] = read_wav(file)
            self.sample_rate = self.sample_rate or rate
            if rate != self.sample_rate:
                raise ValueError(
                    f"{printable(file)}: has a sample rate of {rate} Hz, others have {self.sample_rate}: resample them "
                    "to one rate"
                )
            if self.mfcc:
                signals[i] = np.concatenate([mfcc(channel, rate, self.mfcc) for channel in signals[i]])
        return Samples(signals, np.array(names, object), path, np.array([printable(file) for file in files], object))


def read_wav(path: str) -> tuple[int, Signal]:
    """The sample rate of a wav file, and its signal, float32 (C, T), full scale from -1 to 1.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds no samples, or one that is not finite.
    """
    try:
        check_kind(Path(path).stat().st_mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of notes in the file that are not understood
            rate, signal = wavfile.read(path)
    except Exception as error:  # whatever damaged bytes lead to
        raise OSError(f"cannot read the signal {printable(path)}: {error}") from error
    if not signal.size:
        raise ValueError(f"{printable(path)}: holds no samples")
    if signal.dtype == np.uint8:
        signal = (signal.astype(np.float32) - 128) / 128
    elif signal.dtype.kind == "i":
        signal = signal.astype(np.float32) / 2 ** (8 * signal.itemsize - 1)
    if not np.isfinite(signal).all():
        raise ValueError(f"{printable(path)}: holds values that are not finite")
    return rate, signal.astype(np.float32).reshape(len(signal), -1).T


def _read_npz(path: str, task: str) -> Samples:
    if not Path(path).expanduser().exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "y") if name in file}
            names = list(file)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise OSError(f"{path}: must be an npz file of plain arrays, or a folder of wav files: {error}") from error
    if len(arrays) < 2:
        raise ValueError(f"{path}: must hold the arrays 'x' and 'y', it holds {names}")
    x, y = arrays["x"], arrays["y"]
    if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or not x.size:
        raise ValueError(f"{path}: x must be numbers of shape (N, T) or (N, C, T), it is {x.dtype} {x.shape}")
    if len(x) != len(y):
        raise ValueError(f"{path}: x has {len(x)} signals, y has {len(y)} targets")
    samples = Samples(x[:, None] if x.ndim == 2 else x, y, path, np.arange(len(y)), "signal")
    for row in map(int, np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))):
        raise ValueError(f"{samples.place(row)}: x holds a value that is not finite")
    samples.targets = _targets(samples, task)
    return samples


def _targets(samples: Samples, task: str) -> Targets:
    """The array y as targets."""
    y = samples.targets
    if task == "classification":
        whole = y.dtype.kind in "iubU" or (y.dtype.kind == "f" and bool((y == np.round(y)).all()))
        if y.ndim != 1 or not whole:
            raise ValueError(
                f"{samples.path}: y must be classes (N,), whole numbers or names, it is {y.dtype} {y.shape}: is it "
                "another task?"
            )
        return np.array([as_name(value) for value in y.tolist()], object)
    least = 2 if task == "multilabel" else 1
    if y.dtype.kind not in "iufb" or not least <= y.ndim <= 2:
        shapes = "(N, K)" if task == "multilabel" else "(N,) or (N, K)"
        raise ValueError(f"{samples.path}: y must be numbers {shapes} for task={task!r}, it is {y.dtype} {y.shape}")
    y = y.astype(np.float32)
    wrong = ~np.isfinite(y) if task == "regression" else (y != 0) & (y != 1)
    for row in map(int, np.flatnonzero(wrong.reshape(len(y), -1).any(1))):
        kind = "0 or 1" if task == "multilabel" else "finite"
        raise ValueError(f"{samples.place(row)}: y must be {kind}, it is {y[row].tolist()}")
    return y
