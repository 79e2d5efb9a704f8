"""Feature series with the pace of speech, for tests of the auditory room."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter


def paced(shape: tuple[int, int, int], rng: np.random.Generator, rate: float) -> np.ndarray:
    """Gaussian series (talkers, samples, features) of variance 1 that forget in 80 ms."""
    decay = np.exp(-1 / (0.08 * rate))
    talkers, n, p = shape
    noise = rng.standard_normal((talkers, n + round(rate), p))
    return (lfilter([1], [1, -decay], noise, axis=1) * np.sqrt(1 - decay**2))[:, round(rate) :]
