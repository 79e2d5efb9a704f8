r"""From a raw recording to what decoders use: notch, re-reference, bands, 100 Hz, marked artefacts.

The functions take arrays (n_times, n_channels) and change nothing they are given; `preprocess`
applies them to a ``responses`` Dataset, each run by itself. Filters are MNE's zero-phase FIR
filters. Bad stretches of time are marked and stay in the data: give the marks to `LaggedRidge.fit`
as `rows`, so that nothing is fitted or scored there, and nothing is invented either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, Self

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, signal
from scipy.fft import irfft, next_fast_len, rfft
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils.validation import check_is_fitted

from brainalign.auditory.sound import resample
from brainalign.data.schema import validate
from brainalign.errors import ConfigError, MissingDependencyError, SchemaError
from brainalign.evaluation.significance import fdr

__all__ = [
    "BANDS",
    "CausalFilter",
    "ResponsiveChannels",
    "artefacts",
    "band_pass",
    "bipolar_pairs",
    "common_average",
    "high_gamma",
    "notch",
    "preprocess",
]

#: Channels that are filtered at once: bounds the memory for many electrodes.
_CHANNELS = 16
#: Named bands in Hz: an amplitude envelope, and two band-passed signals.
BANDS = {"high_gamma": (70.0, 150.0), "low": (1.0, 30.0), "delta_theta": (1.0, 9.0)}


def notch(x: ArrayLike, rate: float, line: float = 50.0) -> NDArray[np.float64]:
    """Remove the power line and its harmonics below the Nyquist frequency.

    Parameters
    ----------
    x : array-like, shape (n_times, n_channels)
        Recording.
    rate : float
        Hz.
    line : float
        Frequency of the power line in Hz: 50, or 60 in the Americas and parts of Asia.

    Returns
    -------
    ndarray, shape (n_times, n_channels)

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    ConfigError
        If the line is not below the Nyquist frequency.
    """
    x = _recording(x, rate)
    if not 0 < line < rate / 2:
        raise ConfigError(f"The line at {line} Hz is not between 0 and {rate / 2} Hz (Nyquist).")
    # A harmonic whose stop band would reach the Nyquist frequency cannot be filtered.
    harmonics = np.arange(line, rate / 2 - 2, line)
    return np.asarray(
        _mne().filter.notch_filter(x.T, rate, harmonics, verbose="error"), dtype=np.float64
    ).T


def band_pass(
    x: ArrayLike,
    rate: float,
    low: float | None,
    high: float | None,
    *,
    transition: float | None = None,
) -> NDArray[np.float64]:
    """Filter to a band, with zero phase.

    Parameters
    ----------
    x : array-like, shape (n_times, n_channels)
        Recording.
    rate : float
        Hz.
    low, high : float or None
        Edges in Hz; None leaves that side open.
    transition : float, optional
        Width in Hz over which the filter falls, outside of the edges. Default: MNE's, a quarter of
        the edge and at least 2 Hz.

    Returns
    -------
    ndarray, shape (n_times, n_channels)

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    ConfigError
        For edges out of order or above the Nyquist frequency.
    """
    x = _recording(x, rate)
    edges = [e for e in (low, high) if e is not None]
    if not edges or edges != sorted(edges) or not 0 < edges[0] or not edges[-1] < rate / 2:
        raise ConfigError(
            f"The band {low} to {high} Hz of a recording at {rate} Hz; expected 0 < low < high < "
            f"{rate / 2} Hz.",
            "Take a narrower band, or a recording that was not brought to a lower rate before.",
        )
    falls = "auto" if transition is None else transition
    filtered = _mne().filter.filter_data(
        x.T, rate, low, high, l_trans_bandwidth=falls, h_trans_bandwidth=falls, verbose="error"
    )
    return np.asarray(filtered, dtype=np.float64).T


def high_gamma(
    x: ArrayLike,
    rate: float,
    rate_out: float = 100.0,
    *,
    low: float = 70.0,
    high: float = 150.0,
    n_bands: int = 8,
) -> NDArray[np.float64]:
    r"""Amplitude of high gamma by filter and Hilbert transform, in sub-bands.

    .. math:: a = \frac{1}{B} \sum_b \frac{|z_b|}{\overline{|z_b|}}, \quad
              z_b = x_b + i \mathcal{H} x_b

    Sub-bands are equally wide, and fall over half their width; each is divided by its mean, since
    the amplitude of the brain's activity falls with frequency and the lowest sub-band would
    otherwise stand for all.

    Parameters
    ----------
    x : array-like, shape (n_times, n_channels)
        Recording.
    rate, rate_out : float
        Hz; `rate` above twice `high`.
    low, high : float
        Limits in Hz.
    n_bands : int
        B.

    Returns
    -------
    ndarray, shape (ceil(n_times * rate_out / rate), n_channels)
        Relative to the channel's mean (1).

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    ConfigError
        For a band that the recording does not hold.

    References
    ----------
    Edwards et al. (2009), J. Neurophysiol. 102, 377-386; Crone et al. (2001), Clin. Neurophysiol.
    112, 565-582.
    """
    x = _recording(x, rate)
    if n_bands < 1:
        raise ConfigError(f"n_bands is {n_bands}; expected at least 1.")
    fast = next_fast_len(len(x))
    out = []
    for start in range(0, x.shape[1], _CHANNELS):
        part, total = x[:, start : start + _CHANNELS], 0.0
        for lower, upper in pairwise(np.linspace(low, high, n_bands + 1)):
            band = band_pass(
                part, rate, float(lower), float(upper), transition=(high - low) / n_bands / 2
            )
            amplitude = np.abs(signal.hilbert(band, fast, axis=0)[: len(x)])
            mean = amplitude.mean(axis=0)
            total = total + amplitude / np.where(mean > 0, mean, 1)
        out.append(resample(total / n_bands, rate, rate_out))
    return np.concatenate(out, axis=1)


def common_average(x: ArrayLike, good: ArrayLike | None = None) -> NDArray[np.float64]:
    """Subtract the mean of the good channels from all.

    Parameters
    ----------
    x : array-like, shape (n_times, n_channels)
        Recording.
    good : array-like of bool, shape (n_channels,), optional
        Channels that make the reference. Default: all.

    Returns
    -------
    ndarray, shape (n_times, n_channels)
    """
    x = np.asarray(x, dtype=np.float64)
    use = np.ones(x.shape[1], bool) if good is None else np.asarray(good, dtype=bool)
    if use.sum() < 2:
        raise ConfigError(f"{int(use.sum())} good channels; a common average needs at least 2.")
    return x - x[:, use].mean(axis=1, keepdims=True)


def bipolar_pairs(
    names: Sequence[str], xyz: ArrayLike | None = None, *, furthest: float = 20.0
) -> list[tuple[int, int]]:
    """Neighbouring contacts of one shaft, strip or grid, by their names.

    Contacts ``LA1`` and ``LA2`` are neighbours; ``LA2`` and ``LA4`` are not, nor are ``LA2`` and
    ``LB3``. A grid is numbered row after row: give positions, and pairs across its edge drop out.

    Parameters
    ----------
    names : sequence of str
        Names that end in the number of the contact.
    xyz : array-like, shape (n_channels, 3), optional
        Positions in mm; NaN where unknown.
    furthest : float
        Largest distance of a pair in mm, where positions are known.

    Returns
    -------
    list of (int, int)
        Indices of the contact and of the next one.
    """
    parts = [re.fullmatch(r"(.*?)(\d+)", n) for n in names]
    index = {(m[1], int(m[2])): i for i, m in enumerate(parts) if m is not None}
    pairs = [(i, index[s, k + 1]) for (s, k), i in index.items() if (s, k + 1) in index]
    if xyz is None:
        return pairs
    at = np.asarray(xyz, dtype=np.float64)
    # An unknown distance is not above the limit.
    return [(i, j) for i, j in pairs if not np.linalg.norm(at[i] - at[j]) > furthest]


def artefacts(
    x: ArrayLike, rate: float, *, threshold: float = 8.0, flat: float = 0.1, pad: float = 0.25
) -> NDArray[np.bool_]:
    r"""Mark samples that are too large, jump, or stand still.

    A sample is marked where :math:`|x - \mathrm{median}|` or the change from the sample before
    is above `threshold` robust standard deviations (1.4826 times the median absolute deviation)
    of the channel, or where the channel stays at one value for `flat` seconds.

    Parameters
    ----------
    x : array-like, shape (n_times, n_channels)
        Recording, without slow drifts.
    rate : float
        Hz.
    threshold : float
        Robust standard deviations.
    flat : float
        s.
    pad : float
        Seconds marked on either side, for what filters spread.

    Returns
    -------
    ndarray of bool, shape (n_times, n_channels)
        True where bad.
    """
    x = _recording(x, rate)
    bad = np.zeros(x.shape, dtype=bool)
    step = np.diff(x, axis=0, prepend=x[:1])
    for values in (x, step):
        away = np.abs(values - np.median(values, axis=0))
        spread = 1.4826 * np.median(away, axis=0)
        bad |= away > threshold * np.where(spread > 0, spread, np.inf)
    still = step == 0
    still[0] = still[1] if len(x) > 1 else True
    n = max(2, round(flat * rate))
    if n <= len(x):
        bad |= ndimage.binary_opening(still, np.ones((n, 1)))
    width = 2 * round(pad * rate) + 1
    return np.asarray(ndimage.binary_dilation(bad, np.ones((width, 1))))


def preprocess(
    responses: xr.Dataset,
    *,
    line: float | None = 50.0,
    reference: str | None = "average",
    bands: Sequence[str | tuple[float, float]] = ("high_gamma",),
    rate_out: float = 100.0,
    threshold: float | None = 8.0,
    share: float = 0.1,
    pad: float = 0.25,
) -> xr.Dataset:
    """Preprocess a recording, run by run: notch, reference, artefact marks, bands, lower rate.

    Parameters
    ----------
    responses : Dataset
        Schema ``responses`` (time, neuroid). Channels whose coordinate ``status`` is ``bad`` are
        left out first. A ``bad`` (time) coordinate, as from annotations, is kept.
    line : float or None
        Power line in Hz; None for no notch.
    reference : {"average", "bipolar", None}
        Common average, neighbouring contacts, or as recorded.
    bands : sequence of str or (low, high)
        ``"high_gamma"`` is an envelope (see `high_gamma`); other names of `BANDS` and pairs in Hz
        are band-passed signals. Several stand side by side, told by the coordinate ``band``.
    rate_out : float
        Hz, at least twice the upper edge of band-passed signals.
    threshold : float or None
        See `artefacts`; None marks nothing.
    share : float
        A sample is bad if more than this share of the channels is.
    pad : float
        Seconds marked on either side of an artefact.

    Returns
    -------
    Dataset
        Schema ``responses``, float32. On time: ``bad`` (bool) and what was there, of the nearest
        sample. On neuroid: ``band``, ``bad_share`` (of its samples), and what was there; of a
        bipolar pair the midpoint. ``attrs["preprocessing"]`` says what was done.

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    ConfigError, SchemaError
        For a recording that does not hold the bands, or without channels.
    """
    validate(responses, "responses")
    if "time" not in responses["responses"].dims:
        raise SchemaError("The responses are of presentations; expected a recording over time.")
    if reference not in ("average", "bipolar", None):
        raise ConfigError(f"reference is {reference!r}; expected 'average', 'bipolar' or None.")
    named = [_band(b) for b in bands]
    rate = float(responses.attrs["sampling_rate"])
    for name, (_, upper) in named:
        if name != "high_gamma" and 2 * upper > rate_out:
            raise ConfigError(
                f"Signals up to {upper} Hz cannot be kept at {rate_out} Hz.",
                f"Take rate_out of at least {2 * upper:g}, or a lower band.",
            )
    ds = responses
    if "status" in ds.coords:
        ds = ds.isel(neuroid=np.flatnonzero(ds["status"].values.astype(str) != "bad"))
    if not ds.sizes["neuroid"]:
        raise SchemaError("No channel is left: all have the status 'bad'.")
    pairs, neuroids = _montage(ds, reference)
    n = ds.sizes["time"]
    run = _runs(ds, n)
    blocks: list[NDArray] = []
    marks: list[NDArray] = []
    nearest: list[NDArray] = []
    bad_share = np.zeros(len(neuroids["neuroid_id"][1]))
    for start, stop in run:
        x = np.asarray(ds["responses"][start:stop].values, dtype=np.float64)
        if line is not None:
            x = notch(x, rate, line)
        if reference == "average":
            x = common_average(x)
        elif pairs is not None:
            x = x[:, pairs[:, 0]] - x[:, pairs[:, 1]]
        bad = np.zeros(len(x), dtype=bool)
        if threshold is not None:
            found = artefacts(x, rate, threshold=threshold, pad=pad)
            bad_share += found.sum(axis=0) / n
            bad = found.mean(axis=1) > share
        if "bad" in ds.coords:
            bad |= ds["bad"].values[start:stop].astype(bool)
        made = [
            high_gamma(x, rate, rate_out)
            if name == "high_gamma"
            else resample(band_pass(x, rate, *edges), rate, rate_out)
            for name, edges in named
        ]
        blocks.append(np.concatenate(made, axis=1).astype(np.float32))
        at = np.arange(len(made[0])) * rate / rate_out
        nearest.append(start + np.minimum(np.round(at).astype(int), stop - start - 1))
        marks.append(_any_within(bad, at, rate / rate_out))
    k = len(named)
    rows = np.concatenate(nearest)
    on_time = {
        str(c): ("time", v.values[rows])
        for c, v in ds.coords.items()
        if v.dims == ("time",) and c != "bad"
    }
    on_neuroid = {
        c: (d, np.concatenate([v] * k) if d[0] == "neuroid" else v)
        for c, (d, v) in neuroids.items()
    }
    labels = np.repeat([name for name, _ in named], len(bad_share))
    if k > 1:
        ids = on_neuroid["neuroid_id"][1]
        on_neuroid["neuroid_id"] = (
            ("neuroid",),
            np.array([f"{i}:{b}" for i, b in zip(ids, labels, strict=True)]),
        )
    done = [
        *([f"notch {line:g} Hz and harmonics"] if line is not None else []),
        *([f"reference: {reference}"] if reference else []),
        *([f"marked above {threshold:g} robust sd"] if threshold is not None else []),
        *[f"{name} ({low:g}-{high:g} Hz)" for name, (low, high) in named],
        f"{rate_out:g} Hz",
    ]
    return validate(
        xr.Dataset(
            {"responses": (("time", "neuroid"), np.concatenate(blocks))},
            coords={
                **on_time,
                **{str(c): v for c, v in ds.coords.items() if v.dims == ()},
                **on_neuroid,
                "bad": ("time", np.concatenate(marks)),
                "band": ("neuroid", labels),
                "bad_share": ("neuroid", np.tile(bad_share, k)),
            },
            attrs={
                **responses.attrs,
                "sampling_rate": float(rate_out),
                "preprocessing": "; ".join(done),
            },
        ),
        "responses",
    )


class CausalFilter:
    r"""A band, or its amplitude, at a lower rate, from the samples so far: for a stream.

    .. math:: y(t) = (h * x)(t) \quad\text{or}\quad
              y(t) = \tfrac{\pi}{2}\,\bigl(g * |h * x|\bigr)(t)

    with a Butterworth band-pass h and, for the amplitude, a low-pass g at a quarter of the rate
    that comes out; of y every q-th sample is kept. Chunks of any size give what the whole gives.
    `preprocess` has filters without delay, which see the future: a decoder for a stream is fitted
    to recordings that went through this filter.

    Parameters
    ----------
    rate, rate_out : float
        Hz; the first is a multiple of the second.
    low, high : float
        Edges of the band, Hz.
    amplitude : bool
        The amplitude of the band in place of the band.
    order : int
        Of h and g.

    Attributes
    ----------
    delay : float
        Seconds that y lags behind: the group delay of h at the geometric mean of its edges,
        and that of g at 0 Hz. Close to the lower edge h lags much more.

    Raises
    ------
    ConfigError
        For edges out of order or above the Nyquist frequency, a rate that does not divide the
        other, or a band that would fold over: it must end below a third of `rate_out`.
    """

    def __init__(
        self,
        rate: float,
        rate_out: float,
        low: float,
        high: float,
        *,
        amplitude: bool = False,
        order: int = 4,
    ) -> None:
        if not 0 < low < high < rate / 2:
            raise ConfigError(
                f"The band {low} to {high} Hz at {rate} Hz; expected 0 < low < high < {rate / 2}."
            )
        self.step = round(rate / rate_out) if rate_out > 0 else 0
        if self.step < 1 or not np.isclose(self.step * rate_out, rate):
            raise ConfigError(f"{rate} Hz is no multiple of rate_out, {rate_out} Hz.")
        if not amplitude and 3 * high > rate_out:
            raise ConfigError(
                f"A band up to {high} Hz would fold over at {rate_out} Hz.",
                f"Take rate_out of at least {3 * high:g}, or a lower band.",
            )
        self.rate, self.rate_out = float(rate), float(rate_out)
        self.amplitude = amplitude
        stages = [signal.butter(order, (low, high), "bandpass", fs=rate, output="sos")]
        self.delay = _group_delay(stages[0], float(np.sqrt(low * high)), rate)
        if amplitude:
            stages.append(signal.butter(order, rate_out / 4, fs=rate, output="sos"))
            self.delay += _group_delay(stages[1], 0.0, rate)
        self._stages = stages
        self.reset()

    def reset(self) -> None:
        """Forget the stream so far."""
        self._states: list[NDArray[np.float64]] = []
        self._seen = 0

    def push(self, x: ArrayLike) -> NDArray[np.float64]:
        """Take the next samples and return those that come out.

        Parameters
        ----------
        x : array-like, shape (n_times, n_channels)
            Any number of samples, at `rate`.

        Returns
        -------
        ndarray, shape (n_times_out, n_channels)
            At `rate_out`: the samples number 0, q, 2q ... of the stream.
        """
        y = np.asarray(x, dtype=np.float64)
        if not len(y):
            return y
        if not self._states:
            shapes = [(len(sos), 2, y.shape[1]) for sos in self._stages]
            self._states = [np.zeros(shape) for shape in shapes]
        for k, sos in enumerate(self._stages):
            y, self._states[k] = signal.sosfilt(sos, y, axis=0, zi=self._states[k])
            if self.amplitude and k == 0:
                y = np.pi / 2 * np.abs(y)
        first = -self._seen % self.step
        self._seen += len(y)
        return y[first :: self.step]


def _group_delay(sos: NDArray[np.float64], at: float, rate: float) -> float:
    """Return the group delay of a filter at a frequency (Hz), in seconds."""
    delays = [signal.group_delay((s[:3], s[3:]), [at], fs=rate)[1][0] for s in sos]
    return float(sum(delays) / rate)


class ResponsiveChannels(SelectorMixin, BaseEstimator):
    r"""Select the channels that follow a sound.

    The statistic of a channel is its largest correlation with the regressor over a range of delays,

    .. math:: s(u) = \max_{0 \le l \le L} |\mathrm{corr}(x_{t + l + u}, y_t)|,

    at no shift, u = 0. It is compared with itself at circular shifts u of the whole recording, L
    apart and at least L from 0: both signals keep their autocorrelation, which a t-test or the
    textbook p-value would take for evidence. In units of the mean and standard deviation over a
    channel's own shifts, the shifts of all channels make one null distribution. Channels are kept
    at a false discovery rate. Fit it on training trials only, as the step of a pipeline or inside a
    decoder.

    Parameters
    ----------
    sampling_rate : float
        Hz.
    max_lag : float
        L in s.
    rate : float
        False discovery rate, q.
    at_least : int
        If fewer channels pass, the best so many are kept, so that a decoder can be fitted; their
        `q_` tell.

    Attributes
    ----------
    scores_ : ndarray, shape (n_channels,)
        s(0).
    p_, q_ : ndarray, shape (n_channels,)
        From the shifts; p is at least 1 / (n_shifts * n_channels + 1).
    lags_ : ndarray, shape (n_channels,)
        Delay of the largest correlation in s.
    """

    def __init__(
        self,
        sampling_rate: float = 100.0,
        *,
        max_lag: float = 0.5,
        rate: float = 0.05,
        at_least: int = 1,
    ) -> None:
        self.sampling_rate = sampling_rate
        self.max_lag = max_lag
        self.rate = rate
        self.at_least = at_least

    def fit(self, X: Any, y: Any) -> Self:
        """Correlate channels with a regressor.

        Parameters
        ----------
        X : array-like, shape (n_times, n_channels), or list of them
            One trial, or a list of trials.
        y : array-like, shape (n_times,), or list of them
            Envelope of the attended talker, or 1 for speech and 0 for silence.

        Returns
        -------
        ResponsiveChannels
            Itself.

        Raises
        ------
        ConfigError
            If X and y do not go together, or the recording is too short to be shifted.
        """
        xs = [np.asarray(t, dtype=np.float64) for t in (X if isinstance(X, list) else [X])]
        ys = [np.asarray(t, dtype=np.float64) for t in (y if isinstance(y, list) else [y])]
        if [len(t) for t in xs] != [len(t) for t in ys] or any(t.ndim != 2 for t in xs):
            raise ConfigError(
                f"Trials of X have shapes {[t.shape for t in xs][:3]}, of y "
                f"{[t.shape for t in ys][:3]}; expected (n_times, n_channels) and (n_times,)."
            )
        lags = round(self.max_lag * self.sampling_rate) + 1
        # Each trial about its own mean: levels that differ between trials are no response.
        data = np.concatenate([t - t.mean(axis=0) for t in xs])
        target = np.concatenate([t.reshape(-1) - t.mean() for t in ys])
        n = len(data)
        shifts = (n - 2 * lags) // lags
        if shifts < 19:
            raise ConfigError(
                f"{n / self.sampling_rate:.1f} s of recording can be shifted {max(0, shifts)} "
                f"times by {self.max_lag} s; expected at least 19 times.",
                "Give more training data, or a shorter max_lag.",
            )
        scale = np.sqrt((data**2).sum(axis=0) * (target**2).sum())
        scale = np.where(scale > 0, scale, np.inf)
        spectrum = np.conj(rfft(target))
        self.scores_ = np.empty(data.shape[1])
        null = np.empty((shifts, data.shape[1]))
        self.lags_ = np.empty(data.shape[1])
        for start in range(0, data.shape[1], _CHANNELS):
            part = slice(start, start + _CHANNELS)
            # Circular cross-correlation at all shifts at once.
            cross = irfft(rfft(data[:, part], axis=0) * spectrum[:, None], n, axis=0)
            r = np.abs(cross) / scale[part]
            apart = r[lags : lags + shifts * lags].reshape(shifts, lags, -1)
            null[:, part] = apart.max(axis=1)
            self.scores_[part] = r[:lags].max(axis=0)
            self.lags_[part] = r[:lags].argmax(axis=0) / self.sampling_rate
        spread = null.std(axis=0)
        # A channel without any signal has the score 0 at every shift.
        spread[spread == 0] = np.inf
        below = np.sort(((null - null.mean(axis=0)) / spread).ravel())
        z = (self.scores_ - null.mean(axis=0)) / spread
        hits = below.size - np.searchsorted(below, z, side="left")
        self.p_ = (1 + hits) / (1 + below.size)
        self.q_ = fdr(self.p_)
        self.n_features_in_ = data.shape[1]
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        keep = self.q_ <= self.rate
        if keep.sum() < self.at_least:
            keep = np.zeros(len(keep), dtype=bool)
            keep[np.lexsort((-self.scores_, self.p_))[: self.at_least]] = True
        return np.asarray(keep)

    def transform(self, X: Any) -> Any:
        """Keep the selected channels of a trial (n_times, n_channels), or of each of a list."""
        if isinstance(X, list):
            return [super(ResponsiveChannels, self).transform(x) for x in X]
        return super().transform(X)


def _mne() -> Any:
    try:
        return import_module("mne")
    except ImportError as error:
        raise MissingDependencyError(
            "Filters of recordings need the package MNE.",
            'Install it: pip install "brainalign[auditory]".',
        ) from error


def _recording(x: ArrayLike, rate: float) -> NDArray[np.float64]:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise SchemaError(f"A recording has shape (n_times, n_channels); this one has {x.shape}.")
    if not rate > 0:
        raise ConfigError(f"The sampling rate is {rate!r}; expected Hz, above 0.")
    if not np.isfinite(x).all():
        where = np.flatnonzero(~np.isfinite(x).all(axis=0))
        raise SchemaError(
            f"{int((~np.isfinite(x)).sum())} samples are not finite, in {len(where)} channels "
            f"(the first is channel {where[0]}).",
            "Leave these channels out: filters would spread them over all of time.",
        )
    return x


def _band(band: str | Sequence[float]) -> tuple[str, tuple[float, float]]:
    if isinstance(band, str):
        if band not in BANDS:
            raise ConfigError(
                f"There is no band {band!r}.", f"Known: {', '.join(BANDS)}; or a pair in Hz."
            )
        return band, BANDS[band]
    low, high = (float(e) for e in band)
    return f"{low:g}-{high:g} Hz", (low, high)


def _runs(ds: xr.Dataset, n: int) -> list[tuple[int, int]]:
    """Return start and stop of each stretch of one session and run."""
    labels = [
        ds[c].values for c in ("session", "run") if c in ds.coords and ds[c].dims == ("time",)
    ]
    new = np.zeros(n, dtype=bool)
    for label in labels:
        new[1:] |= label[1:] != label[:-1]
    starts = [0, *np.flatnonzero(new).tolist()]
    return list(zip(starts, [*starts[1:], n], strict=True))


def _montage(
    ds: xr.Dataset, reference: str | None
) -> tuple[NDArray[np.intp] | None, dict[str, tuple[tuple[str, ...], NDArray]]]:
    """Return the pairs of a bipolar montage, and the coordinates of its neuroids."""
    coords = {
        str(c): (tuple(map(str, v.dims)), v.values)
        for c, v in ds.coords.items()
        if "neuroid" in v.dims or v.dims == ("roi_name",)
    }
    if reference != "bipolar":
        return None, coords
    names = ds["neuroid_id"].values.astype(str)
    axes = [a for a in "xyz" if a in ds.coords]
    xyz = np.stack([ds[a].values for a in axes], axis=1) if len(axes) == 3 else None
    pairs = np.array(bipolar_pairs(names.tolist(), xyz), dtype=np.intp).reshape(-1, 2)
    if not len(pairs):
        raise SchemaError(
            "No two channels are neighbours by their names (LA1 and LA2), so there is no bipolar "
            "pair.",
            "Take reference='average'.",
        )
    first, second = pairs.T
    made: dict[str, tuple[tuple[str, ...], NDArray]] = {}
    for c, (dims, v) in coords.items():
        if dims[0] != "neuroid":
            made[c] = (dims, v)
        elif c in ("neuroid_id", "electrode"):
            made[c] = (dims, np.array([f"{v[i]}-{v[j]}" for i, j in pairs]))
        elif v.dtype.kind == "f":
            made[c] = (dims, (v[first] + v[second]) / 2)
        elif v.dtype.kind in "UO":
            made[c] = (dims, np.where(v[first] == v[second], v[first], ""))
        elif v.dtype.kind == "b":
            made[c] = (dims, v[first] & v[second])
    return pairs, made


def _any_within(bad: NDArray[np.bool_], at: NDArray, width: float) -> NDArray[np.bool_]:
    """Whether any sample within half a new sample of each position is bad."""
    counts = np.concatenate([[0], np.cumsum(bad)])
    low = np.clip(np.floor(at - width / 2).astype(int), 0, len(bad))
    high = np.clip(np.ceil(at + width / 2).astype(int) + 1, 0, len(bad))
    return np.asarray(counts[high] > counts[low])
