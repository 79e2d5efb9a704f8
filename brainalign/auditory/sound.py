r"""What is heard, as features over time: envelopes, onsets, mel spectrograms.

Every function takes one channel of sound, shape (n_samples,), and its sampling rate in Hz, and
gives a feature at `rate_out` Hz whose sample k belongs to k / rate_out seconds after the first
sample of the sound. Filters that reach back in time only (the gammatone bank) keep their delay; it
is that of the cochlea which they model, a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import signal
from scipy.fft import next_fast_len
from scipy.special import comb

from brainalign.data.schema import validate
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near

__all__ = [
    "SPACES",
    "broadband_envelope",
    "erb",
    "erb_frequencies",
    "gammatone",
    "gammatone_envelope",
    "mel_filterbank",
    "mel_spectrogram",
    "onsets",
    "resample",
    "talker_features",
]

#: Samples that are filtered at once: bounds the memory for long sounds.
_CHUNK = 2**20
#: Power that counts as silence in a mel spectrogram: -100 dB of full scale.
_SILENCE = 1e-10


def resample(x: ArrayLike, rate: float, rate_out: float) -> NDArray[np.float64]:
    r"""Bring signals to another rate, with an anti-aliasing filter (polyphase, zero phase).

    The low pass is a Kaiser window of :math:`20 \max(u, d) + 1` samples for the ratio u / d, its
    half-amplitude at the lower of the two Nyquist frequencies; beyond 1.2 of it, what would alias
    is below -50 dB. Signals are continued at both ends by their end values.

    Parameters
    ----------
    x : array-like, shape (n_samples, ...)
        Time first.
    rate, rate_out : float
        Hz; their ratio must be one of whole numbers up to 20,000.

    Returns
    -------
    ndarray, shape (ceil(n_samples * rate_out / rate), ...)

    Raises
    ------
    ConfigError
        For rates that are not above 0 or whose ratio cannot be formed.
    """
    x = np.asarray(x, dtype=np.float64)
    _check_rates(rate, rate_out)
    ratio = Fraction(rate_out / rate).limit_denominator(20_000)
    if abs(float(ratio) * rate / rate_out - 1) > 1e-9:
        raise ConfigError(
            f"{rate} Hz cannot be brought to {rate_out} Hz by a ratio of whole numbers.",
            "Choose a rate_out that divides the rate, or rounder rates.",
        )
    if ratio == 1:
        return x.copy()
    return np.asarray(
        signal.resample_poly(x, ratio.numerator, ratio.denominator, axis=0, padtype="edge")
    )


def broadband_envelope(
    sound: ArrayLike, rate: float, rate_out: float = 100.0, *, exponent: float = 1.0
) -> NDArray[np.float64]:
    r"""Amplitude envelope of the whole band.

    .. math:: e = \mathrm{lowpass}(|x + i \mathcal{H} x|^{\,p})

    Parameters
    ----------
    sound : array-like, shape (n_samples,)
        One channel.
    rate, rate_out : float
        Hz.
    exponent : float
        p, above 0; 0.3 to 0.6 compress as hearing does.

    Returns
    -------
    ndarray, shape (n_times,)
        At least 0; units of the sound to the power p.

    References
    ----------
    Biesmans et al. (2016), IEEE TNSRE 25, 402-412, compare such envelopes.
    """
    sound = _checked(sound, rate, rate_out)
    _check_exponent(exponent)
    n = len(sound)
    # A length with small factors: a prime one takes minutes.
    amplitude = np.abs(signal.hilbert(sound, next_fast_len(n))[:n])
    return np.maximum(resample(amplitude**exponent, rate, rate_out), 0)


def erb(frequency: ArrayLike) -> NDArray[np.float64]:
    r"""Equivalent rectangular bandwidth of an auditory filter.

    .. math:: \mathrm{ERB}(f) = 24.7\,(4.37 f / 1000 + 1)

    Parameters
    ----------
    frequency : array-like
        Centre frequency in Hz.

    Returns
    -------
    ndarray
        Hz.

    References
    ----------
    Glasberg & Moore (1990), Hearing Research 47, 103-138, eq. 3.
    """
    return np.asarray(24.7 * (4.37 * np.asarray(frequency, dtype=np.float64) / 1000 + 1))


def erb_frequencies(
    low: float = 150.0, high: float = 4000.0, spacing: float = 1.5
) -> NDArray[np.float64]:
    r"""Centre frequencies from `low` to at most `high`, in equal steps of the ERB-number scale.

    .. math:: E(f) = 21.4 \log_{10}(4.37 f / 1000 + 1)

    Parameters
    ----------
    low, high : float
        Hz, 0 < low < high.
    spacing : float
        Step in ERB numbers. The default with the default limits gives the 15 filters of Biesmans.

    Returns
    -------
    ndarray, shape (n_bands,)
        Hz, ascending.

    References
    ----------
    Glasberg & Moore (1990), eq. 4; Biesmans et al. (2016), IEEE TNSRE 25, 402-412.
    """
    if not (0 < low < high and spacing > 0):
        raise ConfigError(f"low={low}, high={high} Hz, spacing={spacing}; expected 0 < low < high.")

    def number(f: float) -> float:
        return 21.4 * math.log10(4.37 * f / 1000 + 1)

    steps = math.floor((number(high) - number(low)) / spacing + 1e-9)
    numbers = number(low) + spacing * np.arange(steps + 1)
    return np.asarray((10 ** (numbers / 21.4) - 1) * 1000 / 4.37)


def gammatone(
    sound: ArrayLike, rate: float, frequencies: ArrayLike, *, order: int = 4
) -> NDArray[np.complex128]:
    r"""Analytic output of gammatone filters: its real part is the band, its modulus the envelope.

    The impulse response of band f is

    .. math:: h_k = c \binom{k + n - 1}{n - 1} a^k, \quad
              a = \exp\bigl((-2 \pi b + 2 \pi i f) / \mathrm{rate}\bigr), \quad
              b = 1.019\,\mathrm{ERB}(f),

    that of n equal poles in cascade, scaled so that a tone at the centre frequency keeps its
    amplitude. It is applied by FFT, which is exact for low frequencies at high rates too, where the
    recursion with the expanded polynomial of order 2n is not.

    Parameters
    ----------
    sound : array-like, shape (n_samples,)
        One channel.
    rate : float
        Hz.
    frequencies : array-like, shape (n_bands,)
        Centre frequencies in Hz, above 0 and below the Nyquist frequency.
    order : int
        n.

    Returns
    -------
    ndarray of complex, shape (n_samples, n_bands)

    Raises
    ------
    ConfigError
        If a centre frequency is out of range or the order below 1.

    References
    ----------
    Hohmann (2002), Acta Acustica 88, 433-442, eq. 4-10; Patterson et al. (1987), the bandwidth.
    """
    sound = _checked(sound, rate, rate)
    frequencies = _bands(frequencies, rate, order)
    out = np.empty((len(sound), len(frequencies)), dtype=np.complex128)
    for i, f in enumerate(frequencies):
        at = 0
        for piece in _filtered(sound, rate, f, order):
            out[at : at + len(piece), i] = piece
            at += len(piece)
    return out


def gammatone_envelope(
    sound: ArrayLike,
    rate: float,
    rate_out: float = 100.0,
    *,
    frequencies: ArrayLike | None = None,
    exponent: float = 0.6,
    bands: bool = False,
) -> NDArray[np.float64]:
    r"""Envelope through a model of the ear: power-law compressed envelopes of gammatone bands.

    .. math:: e = \frac{1}{B} \sum_{f} \mathrm{lowpass}(|g_f * x|^{\,p})

    Parameters
    ----------
    sound : array-like, shape (n_samples,)
        One channel.
    rate, rate_out : float
        Hz.
    frequencies : array-like, shape (n_bands,), optional
        Centre frequencies in Hz. Default: those of `erb_frequencies` below the Nyquist frequency.
    exponent : float
        p, above 0.
    bands : bool
        Give each band, not their mean.

    Returns
    -------
    ndarray, shape (n_times,) or (n_times, n_bands)
        At least 0; units of the sound to the power p.

    References
    ----------
    Biesmans et al. (2016), IEEE TNSRE 25, 402-412: 15 filters from 150 Hz to 4 kHz, p = 0.6, do
    best of all envelopes for decoding attention.
    """
    sound = _checked(sound, rate, rate_out)
    _check_exponent(exponent)
    if frequencies is None:
        frequencies = erb_frequencies(high=min(4000.0, 0.49 * rate))
    centres = _bands(frequencies, rate, 4)

    def compressed(f: float) -> NDArray[np.float64]:
        pieces = _filtered(sound, rate, f, 4)
        return np.concatenate([(p.real**2 + p.imag**2) ** (exponent / 2) for p in pieces])

    if bands:
        each = [np.maximum(resample(compressed(f), rate, rate_out), 0) for f in centres]
        return np.stack(each, axis=1)
    # The low pass is linear: of the mean it is needed once.
    total = compressed(centres[0])
    for f in centres[1:]:
        total += compressed(f)
    return np.maximum(resample(total / len(centres), rate, rate_out), 0)


def onsets(envelope: ArrayLike, rate: float) -> NDArray[np.float64]:
    r"""Acoustic onsets: the rising part of an envelope's slope.

    .. math:: o_k = \max(0, (e_k - e_{k-1}) \cdot \mathrm{rate}), \quad o_0 = 0

    Parameters
    ----------
    envelope : array-like, shape (n_times, ...)
        Time first.
    rate : float
        Hz.

    Returns
    -------
    ndarray, shape (n_times, ...)
        Units of the envelope per second.

    References
    ----------
    Hertrich et al. (2012), Psychophysiology 49, 322-334.
    """
    envelope = np.asarray(envelope, dtype=np.float64)
    _check_rates(rate, rate)
    first = np.zeros_like(envelope[:1])
    return np.concatenate([first, np.maximum(np.diff(envelope, axis=0) * rate, 0)])


def mel_filterbank(
    n_fft: int, rate: float, n_mels: int = 28, low: float = 0.0, high: float | None = None
) -> NDArray[np.float64]:
    r"""Triangular filters in equal steps of the mel scale, each of unit area.

    .. math:: m(f) = \begin{cases} 3 f / 200 & f < 1000 \\
              15 + 27 \ln(f / 1000) / \ln 6.4 & f \ge 1000 \end{cases}

    Filter i rises from :math:`f_i` to :math:`f_{i+1}`, falls to :math:`f_{i+2}`, and is scaled by
    :math:`2 / (f_{i+2} - f_i)`.

    Parameters
    ----------
    n_fft : int
        Samples of a Fourier transform.
    rate : float
        Hz.
    n_mels : int
        Number of filters.
    low, high : float
        Limits in Hz; default 0 and the Nyquist frequency.

    Returns
    -------
    ndarray, shape (n_fft // 2 + 1, n_mels)

    Raises
    ------
    ConfigError
        For limits out of order, or filters too narrow to hold a frequency of the transform.

    References
    ----------
    Slaney (1998), Auditory Toolbox, Interval Research report 1998-010.
    """
    high = rate / 2 if high is None else high
    if not (0 <= low < high <= rate / 2 and n_mels >= 1):
        raise ConfigError(
            f"{n_mels} mel filters from {low} to {high} Hz at {rate} Hz; expected at least one, "
            "and 0 <= low < high <= rate / 2."
        )
    step = math.log(6.4) / 27

    def mel(f: float) -> float:
        return 3 * f / 200 if f < 1000 else 15 + math.log(f / 1000) / step

    mels = np.linspace(mel(low), mel(high), n_mels + 2)
    edges = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(step * (mels - 15)))
    bins = np.fft.rfftfreq(n_fft, 1 / rate)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    empty = int((filters.sum(axis=0) == 0).sum())
    if empty:
        raise ConfigError(
            f"{empty} of {n_mels} mel filters are narrower than the {rate / n_fft:.0f} Hz between "
            "the frequencies of the transform.",
            "Take fewer filters, or a longer window.",
        )
    return np.asarray(filters)


def mel_spectrogram(
    sound: ArrayLike,
    rate: float,
    rate_out: float = 100.0,
    *,
    n_mels: int = 28,
    low: float = 50.0,
    high: float | None = None,
    window: float = 0.04,
) -> NDArray[np.float64]:
    r"""Power in mel bands, in decibels.

    .. math:: S_{km} = 10 \log_{10} \max\Bigl(10^{-10},
              \sum_f W_{fm} |\mathrm{FFT}(w \cdot x_{k})_f|^2 / \textstyle\sum w^2\Bigr)

    Frame k is centred on sample round(k rate / rate_out), so that rates that do not divide one
    another do not drift apart. Sounds are continued by silence.

    Parameters
    ----------
    sound : array-like, shape (n_samples,)
        One channel, full scale 1.
    rate, rate_out : float
        Hz.
    n_mels : int
        Number of bands.
    low, high : float
        Limits in Hz. Default of `high`: 8 kHz, or the Nyquist frequency if that is lower.
    window : float
        Length of the Hann window in s.

    Returns
    -------
    ndarray, shape (ceil(n_samples * rate_out / rate), n_mels)
        dB, at least -100.

    Raises
    ------
    ConfigError
        See `mel_filterbank`.
    """
    sound = _checked(sound, rate, rate_out)
    size = round(window * rate)
    taper = signal.get_window("hann", size)
    filters = mel_filterbank(
        size, rate, n_mels, low, min(8000.0, rate / 2) if high is None else high
    )
    n = math.ceil(round(len(sound) * rate_out / rate, 6))
    centre = np.round(np.arange(n) * rate / rate_out).astype(np.int64)
    padded = np.pad(sound, (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)
    out = np.empty((n, n_mels))
    at_once = max(1, _CHUNK // size)
    for start in range(0, n, at_once):
        power = np.abs(np.fft.rfft(frames[centre[start : start + at_once]] * taper)) ** 2
        out[start : start + at_once] = power @ filters / (taper**2).sum()
    return np.asarray(10 * np.log10(np.maximum(out, _SILENCE)))


def _mel(sound: NDArray, rate: float, rate_out: float) -> NDArray:
    return mel_spectrogram(sound, rate, rate_out)


#: Feature spaces by name: functions of (sound, rate, rate_out) that give (n_times, n_features).
SPACES: Mapping[str, tuple[Callable[[NDArray, float, float], NDArray], str]] = {
    "envelope": (lambda x, r, o: gammatone_envelope(x, r, o)[:, None], "amplitude^0.6"),
    "broadband": (lambda x, r, o: broadband_envelope(x, r, o)[:, None], "amplitude"),
    "onsets": (
        lambda x, r, o: onsets(gammatone_envelope(x, r, o), o)[:, None],
        "amplitude^0.6 / s",
    ),
    "mel": (_mel, "dB"),
}


def _spaces_of(
    sound: NDArray, rate: float, rate_out: float, spaces: Sequence[str]
) -> list[NDArray[np.float64]]:
    """Return the features of a sound by space; the envelope that two spaces need is made once."""
    made: dict[str, NDArray[np.float64]] = {}
    if {"envelope", "onsets"} <= set(spaces):
        made["envelope"] = SPACES["envelope"][0](sound, rate, rate_out)
        made["onsets"] = onsets(made["envelope"], rate_out)
    return [made[s] if s in made else SPACES[s][0](sound, rate, rate_out) for s in spaces]


def talker_features(
    talkers: Sequence[Sequence[tuple[ArrayLike, float]]],
    spaces: Sequence[str] = ("envelope",),
    rate_out: float = 64.0,
    *,
    n_times: Sequence[int] | None = None,
) -> xr.Dataset:
    """Features of what each talker says, trial after trial.

    Parameters
    ----------
    talkers : sequence (trials) of sequence (talkers) of (sound, rate)
        Each sound has shape (n_samples,), its rate is in Hz.
    spaces : sequence of str
        Names of `SPACES`.
    rate_out : float
        Hz, that of the recording.
    n_times : sequence of int, optional
        Samples of each trial of the recording: longer sounds are cut. Default: the shortest talker.

    Returns
    -------
    Dataset
        Schema ``features`` (time, feature): coordinates ``run`` (the trial) on time; ``talker``
        (integer), ``space`` and ``units`` on feature.

    Raises
    ------
    UnknownNameError
        If there is no such space.
    SchemaError
        If trials differ in the number of talkers, or a sound ends before the recording.
    """
    unknown = [s for s in spaces if s not in SPACES]
    if unknown:
        raise UnknownNameError(
            f"There is no feature space {unknown[0]!r}.{near(unknown[0], SPACES)}",
            f"Known: {', '.join(SPACES)}.",
        )
    counts = {len(trial) for trial in talkers}
    if len(counts) != 1 or not talkers:
        raise SchemaError(
            f"Trials have {sorted(counts)} talkers; expected the same number in each."
        )
    blocks, run = [], []
    for t, trial in enumerate(talkers):
        made = [_spaces_of(np.asarray(x), r, rate_out, spaces) for x, r in trial]
        shortest = min(len(f) for fs in made for f in fs)
        n = shortest if n_times is None else int(n_times[t])
        if n > shortest:
            raise SchemaError(
                f"Trial {t}: a sound lasts {shortest / rate_out:.2f} s and the recording "
                f"{n / rate_out:.2f} s.",
                "Cut the recording to the sound.",
            )
        blocks.append(np.concatenate([f[:n] for fs in made for f in fs], axis=1))
        run.append(np.full(n, t))
    width = [f.shape[1] for f in made[0]]
    space = np.repeat(list(spaces), width)
    n_talkers = counts.pop()
    return validate(
        xr.Dataset(
            {"features": (("time", "feature"), np.concatenate(blocks).astype(np.float32))},
            coords={
                "run": ("time", np.concatenate(run)),
                "talker": ("feature", np.repeat(np.arange(n_talkers), len(space))),
                "space": ("feature", np.tile(space, n_talkers)),
                "units": (
                    "feature",
                    np.tile(np.repeat([SPACES[s][1] for s in spaces], width), n_talkers),
                ),
                "model": "sound",
                "layer": "+".join(spaces),
            },
            attrs={"sampling_rate": float(rate_out)},
        ),
        "features",
    )


def _filtered(
    sound: NDArray, rate: float, frequency: float, order: int
) -> Iterator[NDArray[np.complex128]]:
    """Yield the analytic output of one gammatone filter, chunk by chunk."""
    decay = 2 * np.pi * 1.019 * float(erb(frequency)) / rate
    # Beyond these samples the response is below 1e-15 of its peak.
    k = np.arange(math.ceil(60 / decay))
    # Twice, since a real tone has half its amplitude at the positive frequency.
    gain = 2 * (-math.expm1(-decay)) ** order
    response = (
        gain * comb(k + order - 1, order - 1) * np.exp((2j * np.pi * frequency / rate - decay) * k)
    )
    for start in range(0, len(sound), _CHUNK):
        before = max(0, start - len(k) + 1)
        piece = sound[before : start + _CHUNK]
        yield signal.oaconvolve(piece, response)[start - before : len(piece)]


def _bands(frequencies: ArrayLike, rate: float, order: int) -> NDArray[np.float64]:
    frequencies = np.atleast_1d(np.asarray(frequencies, dtype=np.float64))
    if (
        order < 1
        or not len(frequencies)
        or not ((frequencies > 0) & (frequencies < rate / 2)).all()
    ):
        raise ConfigError(
            f"Gammatone filters of order {order} at {frequencies.tolist()} Hz, sound at {rate} Hz; "
            "expected an order of at least 1 and frequencies above 0 and below half the rate."
        )
    return frequencies


def _checked(sound: ArrayLike, rate: float, rate_out: float) -> NDArray[np.float64]:
    sound = np.asarray(sound, dtype=np.float64)
    _check_rates(rate, rate_out)
    if sound.ndim != 1 or not len(sound):
        raise SchemaError(
            f"A sound has shape (n_samples,); this one has {sound.shape}.",
            "Average its channels, or take one.",
        )
    if not np.isfinite(sound).all():
        raise SchemaError(f"The sound has {int((~np.isfinite(sound)).sum())} samples not finite.")
    return sound


def _check_rates(rate: float, rate_out: float) -> None:
    if not (np.isfinite([rate, rate_out]).all() and rate > 0 and rate_out > 0):
        raise ConfigError(f"Sampling rates are {rate!r} and {rate_out!r}; expected Hz, above 0.")


def _check_exponent(exponent: float) -> None:
    if not exponent > 0:
        raise ConfigError(f"The exponent is {exponent!r}; expected a number above 0.")
