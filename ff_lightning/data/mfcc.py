"""Mel-frequency cepstral coefficients: what a sound is like, step by step, in a few numbers.

Shapes: T samples of a signal, S steps, F coefficients.
"""

from typing import Any

import numpy as np
from scipy.fft import dct

FILTERS = 64
"""Bands of the mel scale; there are no more coefficients than bands."""
_STEP = 0.025  # seconds; a window is twice as long

Numbers = np.ndarray[Any, Any]


def mel_filters(rate: int, size: int) -> Numbers:
    """Weights of the frequencies in each band, (`FILTERS`, size // 2 + 1): triangles, equally spaced in mel.

    Args:
        rate: Samples in a second.
        size: Samples in a window.
    """
    mels = np.linspace(0, 2595 * np.log10(1 + rate / 1400), FILTERS + 2)  # up to half the rate
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    return np.maximum(0, np.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre)))


def mfcc(signal: Numbers, rate: int, count: int) -> Numbers:
    """The cosine transform of the power in each mel band, in decibels, of windows of 50 ms every 25 ms.

    Windows (Hann) are centred on their step; in front of the signal and behind it there is silence. What is 80 dB or
    more below the loudest band counts as 80 dB below.

    Args:
        signal: (T,).
        rate: Samples in a second.
        count: F, of at most `FILTERS`.

    Returns:
        float32 (F, S), S = 1 + T // (samples in 25 ms).

    Raises:
        ValueError: If a step holds no sample.
    """
    step = round(_STEP * rate)
    if step < 1:
        raise ValueError(f"rate={rate}: a step of {_STEP} s holds no sample")
    size = 2 * step
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(signal, size // 2), size)[::step]
    power = np.abs(np.fft.rfft(windows * np.hanning(size + 1)[:-1])) ** 2 @ mel_filters(rate, size).T
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    coefficients: Numbers = dct(np.maximum(decibels, decibels.max() - 80), norm="ortho")
    return coefficients[:, :count].T.astype(np.float32)
