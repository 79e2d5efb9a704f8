"""A simulated listener: electrodes that follow talkers by known response functions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import oaconvolve

from brainalign.auditory.trials import ListeningTrial
from brainalign.errors import ConfigError, SchemaError

__all__ = ["SimulatedListener", "coloured_noise", "switching", "talker_streams"]

#: Values of noise that are made at once.
_BLOCK = 2**23


class SimulatedListener:
    r"""Electrodes that respond to the attended talker, weakly to the others, and to noise.

    .. math:: y_e(t) = \sum_{l, f} h_{e f l} \Bigl( x^{att}_f(t - l)
              + g \sum_{o \ne att} x^{o}_f(t - l) \Bigr) + \sigma_e\, \epsilon_e(t)

    with standardised features x and noise whose power falls as :math:`1 / f^\beta`. It is scaled to
    the mean variance of the response over the talkers, so that its power does not tell who is
    attended.

    Parameters
    ----------
    n_electrodes : int
        Electrodes.
    sampling_rate : float
        Samples per second.
    space : str
        The feature space they respond to.
    unattended : float
        g, the gain of the talkers who are not attended; 1 removes attention.
    snr_db : float
        Variance of the response over that of the noise, in decibels.
    exponent : float
        :math:`\beta` of the noise; 0 is white.
    latency : tuple of float
        Range of the response functions' first peak in seconds; a second peak of opposite sign
        follows at twice the latency.
    tuning : float, optional
        Standard deviation of each electrode's tuning over neighbouring features, in features; by
        default every electrode responds to all features alike.
    centre, scale : array-like, shape (n_features,), optional
        What features are standardised by. By default their mean and standard deviation over the
        talkers and samples of each trial; with those of all talkers there are, what sets voices
        apart is heard from trial to trial.
    seed : int
        Of the response functions and of the noise.

    Raises
    ------
    ConfigError
        If a parameter is out of its range.
    """

    def __init__(
        self,
        n_electrodes: int = 32,
        sampling_rate: float = 64.0,
        *,
        space: str = "envelope",
        unattended: float = 0.3,
        snr_db: float = -10.0,
        exponent: float = 1.0,
        latency: tuple[float, float] = (0.05, 0.15),
        tuning: float | None = None,
        centre: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        seed: int = 0,
    ) -> None:
        if n_electrodes < 1 or not sampling_rate > 0 or not 0 < latency[0] <= latency[1]:
            raise ConfigError(
                f"n_electrodes={n_electrodes}, sampling_rate={sampling_rate}, latency={latency}; "
                "expected at least 1, Hz above 0, and a range of seconds above 0."
            )
        if exponent < 0 or (tuning is not None and not tuning > 0):
            raise ConfigError(f"exponent={exponent}, tuning={tuning}; expected >= 0 and > 0.")
        self.n_electrodes = n_electrodes
        self.sampling_rate = float(sampling_rate)
        self.space = space
        self.unattended = unattended
        self.snr_db = snr_db
        self.exponent = exponent
        self.latency = latency
        self.tuning = tuning
        self.centre = centre
        self.scale = scale
        self.seed = seed

    @property
    def times(self) -> NDArray[np.float64]:
        """Delays of the response functions, seconds."""
        return np.arange(1 + round(3 * self.latency[1] * self.sampling_rate)) / self.sampling_rate

    def trfs(self, n_features: int = 1) -> NDArray[np.float64]:
        """Return the response functions h, (n_electrodes, n_features, n_delays).

        Parameters
        ----------
        n_features : int
            Features of the space.
        """
        rng = np.random.default_rng([self.seed, 0])
        peak = rng.uniform(*self.latency, (self.n_electrodes, 1))
        depth = rng.uniform(0.2, 0.6, (self.n_electrodes, 1))
        width = peak / 3
        time = np.exp(-0.5 * ((self.times - peak) / width) ** 2)
        time -= depth * np.exp(-0.5 * ((self.times - 2 * peak) / (1.5 * width)) ** 2)
        gain = np.ones((self.n_electrodes, n_features))
        if self.tuning is not None:
            centre = rng.uniform(-0.5, n_features - 0.5, (self.n_electrodes, 1))
            gain = np.exp(-0.5 * ((np.arange(n_features) - centre) / self.tuning) ** 2)
        return gain[:, :, None] * time[:, None, :]

    def listen(
        self,
        features: Mapping[str, ArrayLike],
        attended: ArrayLike = 0,
        *,
        name: str = "",
        subject: str = "",
        voices: NDArray[np.floating] | None = None,
    ) -> ListeningTrial:
        """Record one trial.

        Parameters
        ----------
        features : mapping of str to array-like, shape (n_talkers, n_samples, n_features)
            Feature spaces of the talkers; the listener responds to `space`.
        attended : int or array-like of int, shape (n_samples,)
            The attended talker; see `switching`.
        name, subject : str
            Of the trial, which has noise of its own, and of the listener.
        voices : ndarray, shape (n_talkers, n_dimensions), optional
            Kept with the trial.

        Returns
        -------
        ListeningTrial
            The recording is float32.

        Raises
        ------
        SchemaError
            If the features lack the space or do not go together.
        """
        if self.space not in features:
            raise SchemaError(
                f"The listener responds to {self.space!r}; the features are {list(features)}."
            )
        heard = np.asarray(features[self.space], dtype=np.float64)
        if heard.ndim != 3:
            raise SchemaError(
                f"Features have shape {heard.shape}; expected (talkers, samples, features)."
            )
        _, n, p = heard.shape
        who = np.broadcast_to(np.asarray(attended), (n,)).astype(np.int64)
        trial = ListeningTrial(
            np.zeros((n, 1)),
            {s: np.asarray(f, dtype=np.float32) for s, f in features.items()},
            who,
            self.sampling_rate,
        )
        centre = heard.mean(axis=(0, 1)) if self.centre is None else np.asarray(self.centre)
        scale = heard.std(axis=(0, 1)) if self.scale is None else np.asarray(self.scale)
        z = (heard - centre) / np.where(scale > 0, scale, 1)
        total = z.sum(axis=0)
        own = z[trial.attended, np.arange(n)]
        drives = np.stack([x + self.unattended * (total - x) for x in (own, *z)], axis=1)
        trfs = self.trfs(p)
        rng = np.random.default_rng([self.seed, 1, zlib.crc32(f"{subject}/{name}".encode())])
        neural = np.empty((n, self.n_electrodes), dtype=np.float32)
        step = max(1, _BLOCK // (n * p))
        for e in range(0, self.n_electrodes, step):
            part = trfs[e : e + step].transpose(2, 0, 1)
            signal, *each = (
                oaconvolve(drives[:, k, None], part, axes=0)[:n].sum(axis=2)
                for k in range(drives.shape[1])
            )
            power = np.mean([r.var(axis=0) for r in each], axis=0)
            noise = coloured_noise(n, part.shape[1], self.exponent, rng)
            neural[:, e : e + step] = signal + np.sqrt(power) * 10 ** (-self.snr_db / 20) * noise
        return ListeningTrial(
            neural, trial.features, trial.attended, self.sampling_rate, name, subject, voices
        )


def coloured_noise(
    n_samples: int, n_channels: int, exponent: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    r"""Gaussian noise with power :math:`1 / f^\beta`, of mean 0 and variance 1 per channel.

    Parameters
    ----------
    n_samples, n_channels : int
        Its shape.
    exponent : float
        :math:`\beta`.
    rng : numpy.random.Generator
        Source of the noise.

    Returns
    -------
    ndarray, shape (n_samples, n_channels)
    """
    white = np.fft.rfft(rng.standard_normal((n_samples, n_channels)), axis=0)
    frequency = np.arange(len(white), dtype=np.float64)
    frequency[0] = np.inf
    noise = np.fft.irfft(white * frequency[:, None] ** (-exponent / 2), n_samples, axis=0)
    return noise / noise.std(axis=0)


def switching(
    n_samples: int, sampling_rate: float, every: float, *, n_talkers: int = 2, first: int = 0
) -> NDArray[np.int64]:
    """Attention that goes from talker to talker at a regular pace.

    Parameters
    ----------
    n_samples : int
        Samples.
    sampling_rate : float
        Samples per second.
    every : float
        Seconds between switches.
    n_talkers, first : int
        Number of talkers, and the one attended at the start.

    Returns
    -------
    ndarray of int, shape (n_samples,)
    """
    return (first + np.arange(n_samples) // max(1, round(every * sampling_rate))) % n_talkers


def talker_streams(
    talkers: Sequence[Sequence[ArrayLike]], n_samples: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Make streams of any length from clips of each talker, all equally loud.

    Clips follow each other in random order, each turned round in a circle by a random share of its
    length, so that a stream longer than its clips does not repeat in step with another.

    Parameters
    ----------
    talkers : sequence (talkers) of sequence (clips) of array-like, shape (n_samples,)
        Sound, one rate for all.
    n_samples : int
        Length of the streams.
    seed : int
        Of order and turns.

    Returns
    -------
    ndarray, shape (n_talkers, n_samples)
        Root mean square 1 each; their sum is the mixture.

    Raises
    ------
    SchemaError
        If a talker has no clip, or a clip is silent or not one channel.
    """
    rng = np.random.default_rng(seed)
    streams = []
    for k, clips in enumerate(talkers):
        sounds = [np.asarray(c, dtype=np.float64) for c in clips]
        if not sounds or any(s.ndim != 1 or not s.any() for s in sounds):
            raise SchemaError(
                f"Talker {k} has clips of shapes {[s.shape for s in sounds]}; expected at least "
                "one, each of one channel and not silent."
            )
        parts: list[NDArray[np.float64]] = []
        while sum(map(len, parts)) < n_samples:
            for i in rng.permutation(len(sounds)):
                sound = sounds[i] / np.sqrt((sounds[i] ** 2).mean())
                parts.append(np.roll(sound, int(rng.integers(len(sound)))))
        stream = np.concatenate(parts)[:n_samples]
        streams.append(stream / np.sqrt((stream**2).mean()))
    return np.stack(streams)
