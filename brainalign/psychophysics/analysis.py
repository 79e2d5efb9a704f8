"""From accuracy in octave noise to the channel of spatial frequencies that an observer uses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import ConfigError, SchemaError
from brainalign.psychophysics.likelihood import (
    Curve,
    fit_binomial,
    log_likelihood,
    profile_intervals,
)

__all__ = [
    "FREQUENCIES",
    "NOISE_SDS",
    "Channel",
    "ChannelFit",
    "accuracy_matrix",
    "as_record",
    "bootstrap_channel",
    "bounded_draws",
    "compare_channels",
    "count_cells",
    "fit_channel",
    "fit_channels",
    "fit_index_channel",
    "fit_thresholds",
    "percentile_intervals",
    "probability_correct",
    "recovery_error",
    "repeated_over",
    "threshold_indices",
    "told_open",
    "trials_record",
]

#: Centres of the seven bands of noise, cycles/image, for images of 224 pixels.
FREQUENCIES = tuple(1.75 * 2.0**f for f in range(7))
#: Standard deviations of the noise before it is filtered; image intensities lie in 0..1.
NOISE_SDS = (0.0, 0.02, 0.04, 0.08, 0.16)

#: Noise by which sensitivities are told: one of 1 means a threshold at this standard deviation.
UNIT_SD = 0.01
#: No channel is as wide as this, in octaves.
WIDEST = 12.0
_UNUSABLE = {"below_half", "flat", "diverged"}


def threshold_indices(accuracy: ArrayLike, criterion: float = 0.5) -> NDArray[np.int64]:
    r"""Return how many steps each band's noise must be lowered before the observer is right.

    .. math:: j_f = \min \{ j : a_{n - 1 - j, f} > criterion \}, \quad n - 1 \text{ if none is}

    Parameters
    ----------
    accuracy : array-like, shape (n_levels, n_bands)
        Shares of correct answers in 0..1, from no noise to the strongest.
    criterion : float
        What accuracy must exceed.

    Returns
    -------
    ndarray of int, shape (n_bands,)
        0 (strongest noise is tolerated) to n_levels - 1.

    Raises
    ------
    SchemaError
        If the accuracies are no matrix or leave 0..1.

    References
    ----------
    Subramanian et al. 2023, NeurIPS (arXiv:2309.13190).
    """
    share = np.asarray(accuracy, dtype=np.float64)
    if share.ndim != 2 or not ((share >= 0) & (share <= 1)).all():
        raise SchemaError(
            "Accuracies must be shares in 0..1 of shape (n_levels, n_bands); got "
            f"shape {share.shape} with values {np.min(share):g}..{np.max(share):g}.",
            "Divide per cents by 100.",
        )
    above = share[::-1] > criterion
    return np.where(above.any(0), above.argmax(0), len(share) - 1)


@dataclass(frozen=True)
class Channel:
    """A channel of spatial frequencies.

    Parameters
    ----------
    bandwidth : float
        Full width at half the maximum, octaves.
    centre : float
        Cycles/image.
    sensitivity : float
        Peak sensitivity to noise: 0.01 over the threshold's standard deviation. NaN, as the others,
        where no channel can be told.
    flags : tuple of str
        ``amplitude_at_bound`` (kept in averages), and what makes a fit no estimate: ``below_half``
        (accuracy above the criterion nowhere), ``flat`` (all bands alike), ``diverged``.
    """

    bandwidth: float
    centre: float
    sensitivity: float
    flags: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it may enter an average."""
        return not _UNUSABLE & set(self.flags)


def fit_index_channel(
    indices: ArrayLike,
    *,
    lowest: float = FREQUENCIES[0],
    n_levels: int = len(NOISE_SDS),
    accuracy: ArrayLike | None = None,
    criterion: float = 0.5,
) -> Channel:
    r"""Fit the published Gaussian to threshold indices.

    .. math:: j_f \approx A \exp\left(-\frac{(f - \mu)^2}{2 \sigma^2}\right), \quad 0 \le A \le 4

    by least squares from (1, 0, 1). Bandwidth is :math:`2 \sqrt{\ln 4}\,\sigma` octaves, the centre
    :math:`f_0 2^\mu` cycles/image, the sensitivity :math:`2^{A - 4}`. The rule is coarse and its
    bandwidth biased (it is a width in log sensitivity, which steps round up); `fit_channel` has
    neither fault. It is here since published channels are by it.

    Parameters
    ----------
    indices : array-like of int, shape (n_bands,)
        Of `threshold_indices`, from the lowest band to the highest, an octave apart.
    lowest : float
        Centre of the lowest band, cycles/image.
    n_levels : int
        Levels of noise, none among them; A is at most one less.
    accuracy : array-like, shape (n_levels, n_bands), optional
        What the indices are from: tells whether accuracy exceeded `criterion` anywhere.
    criterion : float
        As of `threshold_indices`.

    Returns
    -------
    Channel

    Raises
    ------
    SchemaError
        If the indices are not whole numbers in 0..n_levels - 1, or fewer than 3.
    ConfigError
        If `lowest` is no frequency, or there are fewer than 2 levels of noise.

    References
    ----------
    Subramanian et al. 2023, NeurIPS (arXiv:2309.13190).
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    if not (np.isfinite(lowest) and lowest > 0):
        raise ConfigError(f"lowest must be a frequency above 0; got {lowest:g}.")
    if n_levels < 2:
        raise ConfigError(f"A channel needs 2 levels of noise or more; got {n_levels}.")
    j = np.asarray(indices, dtype=np.float64)
    most = n_levels - 1
    if j.ndim != 1 or len(j) < 3 or not np.isin(j, np.arange(n_levels)).all():
        raise SchemaError(
            f"Threshold indices must be 3 or more whole numbers in 0..{most}, one a band; got "
            f"{np.asarray(indices).tolist()}."
        )
    flags = []
    if accuracy is not None and not (np.asarray(accuracy) > criterion).any():
        flags.append("below_half")
    if (j == j[0]).all():
        return Channel(np.nan, np.nan, np.nan, (*flags, "flat"))

    def gaussian(x: NDArray, a: float, mu: float, sigma: float) -> NDArray:
        return a * np.exp(-((x - mu) ** 2) / (2 * sigma**2))

    bounds = ([0, -np.inf, -np.inf], [most, np.inf, np.inf])
    x = np.arange(len(j), dtype=np.float64)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)
            (a, mu, sigma), _ = curve_fit(gaussian, x, j, p0=(1.0, 0.0, 1.0), bounds=bounds)
    except RuntimeError:  # no convergence
        return Channel(np.nan, np.nan, np.nan, (*flags, "diverged"))
    bandwidth = float(2 * np.sqrt(np.log(4)) * abs(sigma))
    if bandwidth >= WIDEST or not -1 <= mu <= len(j):
        flags.append("diverged")
    if a > most - 1e-3:
        flags.append("amplitude_at_bound")
    centre = float(lowest * 2.0 ** np.clip(mu, -99, 99))
    return Channel(bandwidth, centre, float(2 ** (a - most)), tuple(flags))


def probability_correct(
    frequency: ArrayLike,
    noise_sd: ArrayLike,
    *,
    bandwidth: ArrayLike,
    centre: ArrayLike,
    sensitivity: ArrayLike,
    slope: ArrayLike = 2.0,
    guess: ArrayLike = 1 / 16,
    lapse: ArrayLike = 0.02,
) -> NDArray[np.float64]:
    r"""Return how often an observer with a log-Gaussian channel is right.

    .. math:: S(f) = s\, 2^{-(2 \log_2(f / f_0) / b)^2}, \qquad
              p(f, c) = \gamma + \frac{1 - \gamma - \lambda}{1 + (c\,S(f) / 0.01)^\beta}

    :math:`b` is the full width of S at half its maximum. :math:`0.01 / S(f)` is the threshold: the
    standard deviation of the noise at which accuracy is half-way between its best and guessing.

    Parameters
    ----------
    frequency : array-like
        Centre of the noise's band, cycles/image.
    noise_sd : array-like
        Standard deviation of the noise before filtering.
    bandwidth, centre, sensitivity : array-like
        b (octaves), f0 (cycles/image), s.
    slope : array-like
        beta.
    guess, lapse : array-like
        gamma, the share right by chance; lambda, the share missed without noise.

    Returns
    -------
    ndarray
        All arguments broadcast against each other.
    """
    distance = np.log2(np.asarray(frequency, dtype=np.float64) / np.asarray(centre))
    log_s = np.log2(sensitivity) - (2 * distance / np.asarray(bandwidth)) ** 2
    with np.errstate(divide="ignore"):
        log_c = np.log2(np.asarray(noise_sd, dtype=np.float64) / UNIT_SD)
    resisted = _resisted(np.asarray(slope) * (log_c + log_s))
    return np.asarray(guess) + (1 - np.asarray(guess) - np.asarray(lapse)) * resisted


def _resisted(doublings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / (1 + 2**doublings)."""
    return 0.5 * (1 - np.tanh(doublings * (np.log(2) / 2)))


def _log_noise(noise_sd: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log2 of the noise in units; no noise is far below every threshold."""
    return np.log2(np.maximum(noise_sd / UNIT_SD, 2.0**-100))


def _channel_curve(
    log_frequency: NDArray[np.float64], noise_sd: NDArray[np.float64], guess: float
) -> Curve:
    """Return `probability_correct` of (log2 s, log2 f0, log2 b, log2 slope, lapse)."""
    log_c = _log_noise(noise_sd)
    ln2 = np.log(2)

    def curve(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        peak, centre, width, log_slope, lapse = theta.T[..., None]
        slope, octaves = 2**log_slope, 2**width
        away = log_frequency - centre
        drop = (2 * away / octaves) ** 2
        u = log_c + peak - drop
        share = _resisted(slope * u)
        top = 1 - guess - lapse
        d_u = -top * slope * ln2 * share * (1 - share)
        jacobian = np.stack(
            [d_u, d_u * 8 * away / octaves**2, d_u * 2 * ln2 * drop, d_u * u * ln2, -share], -1
        )
        return guess + top * share, jacobian

    return curve


def _threshold_curve(band: NDArray[np.intp], noise_sd: NDArray[np.float64], guess: float) -> Curve:
    """Return the accuracy for (log2 threshold of each band, log2 slope, lapse)."""
    log_c = _log_noise(noise_sd)
    n_bands = int(band.max()) + 1
    member = np.eye(n_bands)[band]
    ln2 = np.log(2)

    def curve(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        slope, lapse = 2 ** theta[:, [n_bands]], theta[:, [n_bands + 1]]
        u = log_c - theta[:, band]
        share = _resisted(slope * u)
        top = 1 - guess - lapse
        d_u = -top * slope * ln2 * share * (1 - share)
        jacobian = np.concatenate(
            [-d_u[..., None] * member, (d_u * u * ln2)[..., None], -share[..., None]], -1
        )
        return guess + top * share, jacobian

    return curve


@dataclass(frozen=True)
class ChannelFit:
    """A channel fitted by maximum likelihood.

    Parameters
    ----------
    channel : Channel
        Flags beside those of `Channel`: ``bandwidth_open``, ``centre_open``, ``sensitivity_open``
        where the data do not exclude a bound, so that the interval has no end on one side.
    intervals : dict of str to (float, float)
        Of ``bandwidth``, ``centre`` and ``sensitivity``, by profile likelihood; 0 or inf at an open
        end.
    slope, lapse, guess : float
        Of the psychometric function.
    log_likelihood : float
        Of the counts, without the binomial's constant and the prior.
    n_trials : int
        Number of trials.
    level : float
        Coverage of the intervals.
    """

    channel: Channel
    intervals: dict[str, tuple[float, float]]
    slope: float
    lapse: float
    guess: float
    log_likelihood: float
    n_trials: int
    level: float


@dataclass(frozen=True)
class _Cells:
    """Conditions with a band's frequency and a level of noise."""

    log_frequency: NDArray[np.float64]
    noise_sd: NDArray[np.float64]
    guess: float
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    ceiling: NDArray[np.float64]

    @property
    def curve(self) -> Curve:
        return _channel_curve(self.log_frequency, self.noise_sd, self.guess)


def _cells(frequency: ArrayLike, noise_sd: ArrayLike, guess: float) -> _Cells:
    f = np.asarray(frequency, dtype=np.float64)
    c = np.asarray(noise_sd, dtype=np.float64)
    if f.shape != c.shape or f.ndim != 1:
        raise SchemaError(f"One frequency and one noise_sd a cell; got {f.shape} and {c.shape}.")
    noisy = c > 0
    if not (np.isfinite(c).all() and (c >= 0).all()):
        raise SchemaError("noise_sd must be a number of at least 0 in every trial.")
    if not (np.isfinite(f[noisy]).all() and (f[noisy] > 0).all()):
        raise SchemaError("frequency must be a number above 0 where there is noise.")
    if len(np.unique(f[noisy])) < 3:
        raise SchemaError(
            f"A channel needs noise in 3 bands or more; got {np.unique(f[noisy]).tolist()} "
            "cycles/image."
        )
    if not 0 <= guess < 1:
        raise ConfigError(f"guess must lie in 0..1; got {guess:g}.")
    log_f = np.log2(np.where(noisy, f, 1.0))
    weakest, strongest = np.log2(c[noisy].min() / UNIT_SD), np.log2(c.max() / UNIT_SD)
    low, high = log_f[noisy].min(), log_f[noisy].max()
    return _Cells(
        np.where(noisy, log_f, (low + high) / 2), c, guess,
        # A threshold 8 times the strongest noise is out of sight; a peak between bands may be high.
        np.array([-strongest - 3, low - 2, np.log2(0.3), -1.5, 0.0]),
        np.array([-weakest + 12, high + 2, np.log2(2 * WIDEST), 4.0, 0.98 * (1 - guess)]),
        # Half the weakest noise, and less, is told of by nothing that was shown.
        np.array([1 - weakest, np.inf, np.inf, np.inf, np.inf]),
    )  # fmt: skip


def _starts(
    cells: _Cells, k: NDArray[np.float64], n: NDArray[np.float64], kept: int = 3
) -> NDArray[np.float64]:
    """Return the likeliest of a grid of parameters, shape (n_sets, kept, n_parameters)."""
    low, high = cells.lower, cells.upper
    axes = (
        np.arange(low[0] + 1, high[0] - 9, 1.0),
        np.arange(low[1] + 1.5, high[1] - 1, 0.5),
        np.log2([0.7, 1.5, 3.0, 6.0]),
        np.array([1.0]),
        np.array([0.02, 0.2, 0.5]) * (1 - cells.guess),
    )
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    p = np.clip(cells.curve(grid)[0], 1e-9, 1 - 1e-9)
    likelihood = k @ np.log(p).T + (n - k) @ np.log1p(-p).T
    order = np.argsort(-likelihood, axis=1)
    # The likeliest are neighbours: go on from the best, and from the best of other widths.
    first = [order[:, 0]]
    for _ in range(kept - 1):
        widths = np.stack([grid[i, 2] for i in first], 1)
        other = (grid[order, 2][:, :, None] != widths[:, None, :]).all(-1)
        first.append(np.take_along_axis(order, other.argmax(1)[:, None], 1)[:, 0])
    return grid[np.stack(first, 1)]


def fit_channels(
    correct: ArrayLike,
    n: ArrayLike,
    frequency: ArrayLike,
    noise_sd: ArrayLike,
    *,
    guess: float = 1 / 16,
    level: float = 0.95,
    intervals: bool = True,
) -> list[ChannelFit]:
    r"""Fit the channel of `probability_correct` to many data sets by maximum likelihood.

    .. math:: \max_{s, f_0, b, \beta, \lambda} \sum_c k_c \log p_c + (n_c - k_c) \log (1 - p_c)
              - \tfrac{1}{2} d^2, \qquad d = \max(0, \log_2 (s\, c_1 / 0.02))

    d is by how many octaves the peak's threshold lies below half the weakest noise :math:`c_1`, of
    which trials tell little. Elsewhere this prior is zero; intervals and flags are without it.

    Parameters
    ----------
    correct : array-like, shape (n_sets, n_cells)
        Correct answers.
    n : array-like, shape (n_cells,) or (n_sets, n_cells)
        Trials.
    frequency, noise_sd : array-like, shape (n_cells,)
        Of each cell; the frequency counts for nothing where there is no noise.
    guess : float
        Share right by chance.
    level : float
        Coverage of the intervals, which are by profile likelihood.
    intervals : bool
        Whether to compute them.

    Returns
    -------
    list of ChannelFit

    Raises
    ------
    SchemaError
        If shapes or counts do not fit, or there are fewer than 3 bands.
    """
    cells = _cells(frequency, noise_sd, guess)
    _check_level(level)
    k = np.atleast_2d(np.asarray(correct, dtype=np.float64))
    total = np.broadcast_to(np.asarray(n, dtype=np.float64), k.shape)
    if k.shape[1:] != cells.noise_sd.shape:
        raise SchemaError(f"{k.shape[1]} counts came for {len(cells.noise_sd)} cells.")
    starts = _starts(cells, k, total)
    theta, best = _likeliest(cells, starts, k, total)
    low = np.full((len(k), 3), np.nan)
    high = low.copy()
    if intervals:
        low, high = profile_intervals(
            cells.curve, theta, k, total, (0, 1, 2), level=level, lower=cells.lower,
            upper=cells.upper,
        )  # fmt: skip
    flat = _is_flat(cells, theta, best, k, total, level)
    beyond = np.flatnonzero(theta[:, 0] > cells.ceiling[0])
    if beyond.size:
        theta[beyond], _ = _likeliest(
            cells, starts[beyond], k[beyond], total[beyond], ceiling=cells.ceiling
        )
    best = log_likelihood(cells.curve(theta)[0], k, total)
    return [
        _described(cells, theta[i], best[i], low[i], high[i], flat[i], total[i], level)
        for i in range(len(k))
    ]


def _likeliest(
    cells: _Cells,
    starts: NDArray[np.float64],
    k: NDArray[np.float64],
    n: NDArray[np.float64],
    **options: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the best fit of each data set from its starts, of shape (n_sets, n_starts, ...)."""
    sets, kept, _ = starts.shape
    theta, best = fit_binomial(
        cells.curve, starts.reshape(sets * kept, -1), np.repeat(k, kept, 0),
        np.repeat(n, kept, 0), lower=cells.lower, upper=cells.upper, **options,
    )  # fmt: skip
    chosen = best.reshape(sets, kept).argmax(1) + kept * np.arange(sets)
    return theta[chosen], best[chosen]


def _is_flat(
    cells: _Cells,
    theta: NDArray[np.float64],
    best: NDArray[np.float64],
    k: NDArray[np.float64],
    n: NDArray[np.float64],
    level: float,
) -> NDArray[np.bool_]:
    """Whether one sensitivity for all bands explains the counts as well as a channel."""
    from scipy.stats import chi2

    start = theta.copy()
    start[:, 1] = (cells.lower[1] + cells.upper[1]) / 2
    start[:, 2] = 20.0  # a width of a million octaves
    lower, upper = cells.lower.copy(), cells.upper.copy()
    upper[2] = 20.0
    likelihoods = []
    for peak in (0.0, -3.0, 2.0):
        start[:, 0] = np.clip(peak, lower[0], upper[0])
        likelihoods.append(
            fit_binomial(cells.curve, start, k, n, lower=lower, upper=upper, fixed=(1, 2))[1]
        )
    return 2 * (best - np.max(likelihoods, 0)) < chi2.ppf(level, 2)


def _described(
    cells: _Cells,
    theta: NDArray[np.float64],
    best: np.float64,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    flat: np.bool_,
    n: NDArray[np.float64],
    level: float,
) -> ChannelFit:
    flags = []
    slope, lapse = float(2 ** theta[3]), float(theta[4])
    if 1 - lapse <= 0.5:
        flags.append("below_half")
    if flat:
        flags.append("flat")
    sensitivity, centre, bandwidth = (float(2**t) for t in theta[:3])
    ends = {name: (float(2.0 ** low[i]), float(2.0 ** high[i])) for i, name in enumerate(_ORDER)}
    channel = told_open(Channel(bandwidth, centre, sensitivity, tuple(flags)), ends)
    return ChannelFit(channel, ends, slope, lapse, cells.guess, float(best), int(n.sum()), level)


def fit_channel(
    trials: xr.Dataset, *, guess: float | None = None, level: float = 0.95
) -> ChannelFit:
    """Fit the channel of an observer to trials by maximum likelihood; see `fit_channels`.

    Parameters
    ----------
    trials : xarray.Dataset
        The ``trials`` schema with ``correct``, ``noise_sd`` and ``frequency``; all are pooled.
    guess : float, optional
        Share right by chance; by default one over the number of categories in ``category``.
    level : float
        Coverage of the intervals.

    Returns
    -------
    ChannelFit

    Raises
    ------
    SchemaError
        If a variable is missing or there are fewer than 3 bands.
    """
    counts = count_cells(trials)
    return fit_channels(
        counts["correct"].values[None], counts["n"].values, counts["frequency"].values,
        counts["noise_sd"].values, guess=_guess(trials, guess), level=level,
    )[0]  # fmt: skip


def _guess(trials: xr.Dataset, guess: float | None) -> float:
    if guess is not None:
        return guess
    if "category" not in trials:
        raise SchemaError("trials: 'category' is missing.", "Give it, or the share of guesses.")
    known = np.unique(trials["category"].values.astype(str))
    if len(known) < 2:
        raise SchemaError(
            f"trials: the category is always {str(known[0])!r}, which tells no share of guesses.",
            "Give it: one over the number of classes that could be answered.",
        )
    return 1 / len(known)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"The level of intervals must lie between 0 and 1; got {level:g}.")


def _check_draws(n_bootstrap: int) -> None:
    if n_bootstrap < 1:
        raise ConfigError(f"Intervals need 1 draw or more; n_bootstrap is {n_bootstrap}.")


_VALUES = ("bandwidth", "centre", "sensitivity")
#: As they come among the parameters of a fit.
_ORDER = ("sensitivity", "centre", "bandwidth")
#: How near its bound, relatively, a value counts as resting on it.
_NEAR_BOUND = 1e-3


def bootstrap_channel(
    trials: xr.Dataset,
    *,
    over: Sequence[str] = ("stimulus_id",),
    guess: float | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> xr.Dataset:
    r"""Fit the channel to samples of images, or of images and subjects, drawn with replacement.

    .. math:: k_c^* = \sum_t \prod_u w_{u(t)}\, [t \in c]\, y_t

    with w how often image or subject u was drawn and y whether trial t was right. A network that
    sees the same pictures in every condition errs on the same ones: its trials are no independent
    sample, and intervals that take them for one are too narrow.

    Parameters
    ----------
    trials, guess
        As of `fit_channel`.
    over : sequence of str
        What is drawn: ``stimulus_id``, ``subject`` or both; if nothing, single trials, which holds
        where they have neither in common.
    n_bootstrap : int
        Draws.
    seed : int
        Of the draws. Trials of the same images get the same draws of them.

    Returns
    -------
    xarray.Dataset
        Of `bounded_draws`.

    Raises
    ------
    SchemaError
        As `fit_channel`, or if a name is missing or has one value alone.
    """
    _check_draws(n_bootstrap)
    cells = count_cells(trials)
    rate = _guess(trials, guess)
    size = trials.sizes["trial"]
    places = np.empty((len(over), size), dtype=int) if over else np.arange(size)[None]
    for i, name in enumerate(over):
        if name not in trials.variables:
            raise SchemaError(f"trials: {name!r} is missing, over which to resample.")
        values = np.broadcast_to(trials[name].values.astype(str), size)
        known, places[i] = np.unique(values, return_inverse=True)
        if len(known) < 2:
            raise SchemaError(
                f"trials: {name!r} is always {str(known[0])!r}; there is nothing to draw."
            )
    # Counts of each image (and subject) in each cell.
    groups, group = np.unique(places, axis=1, return_inverse=True)
    n = np.zeros((groups.shape[1], cells.sizes["cell"]))
    k = np.zeros(n.shape)
    at = (group.reshape(-1), _cell_of(trials, cells))
    np.add.at(n, at, 1)
    np.add.at(k, at, trials["correct"].values.astype(float))
    weight = np.ones((n_bootstrap, groups.shape[1]))
    for i, row in enumerate(groups):
        count = int(row.max()) + 1
        rng = np.random.default_rng([seed, i])
        weight *= rng.multinomial(count, np.full(count, 1 / count), n_bootstrap)[:, row]
    drawn, total = weight @ k, weight @ n
    design = _cells(cells["frequency"].values, cells["noise_sd"].values, rate)
    theta, _ = _likeliest(design, _starts(design, drawn, total), drawn, total)
    return bounded_draws(theta, design.lower, design.upper, over=", ".join(over), seed=seed)


def _cell_of(trials: xr.Dataset, cells: xr.Dataset) -> NDArray[np.intp]:
    """Return the row of `count_cells` that each trial belongs to."""

    def keys(f: NDArray[np.float64], ds: xr.Dataset) -> list[tuple[float, float]]:
        sd = ds["noise_sd"].values.astype(float)
        return list(zip(np.nan_to_num(f, nan=-1.0).tolist(), sd.tolist(), strict=True))

    place = {key: i for i, key in enumerate(keys(cells["frequency"].values, cells))}
    return np.array([place[key] for key in keys(_frequency(trials), trials)])


def _frequency(trials: xr.Dataset) -> NDArray[np.float64]:
    """Return the band of each trial; NaN for one without noise that is of none of the bands."""
    f = trials["frequency"].values.astype(float)
    noisy = trials["noise_sd"].values.astype(float) > 0
    return np.where(noisy | np.isin(f, f[noisy]), f, np.nan)


def percentile_intervals(draws: xr.Dataset, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Return the middle of the draws of each value, of `bootstrap_channel` and its like.

    Parameters
    ----------
    draws : xarray.Dataset
        As of `bounded_draws`.
    level : float
        Share of the draws that lie between the ends.

    Returns
    -------
    dict of str to (float, float)
        For bandwidth, centre and sensitivity; 0 or inf where draws that rest on a bound make the
        end.
    """
    log = {name: np.log2(draws[name].values) for name in _VALUES}
    stuck = _stuck(draws)
    return {name: _middle(log[name], *stuck[name], level)[1:] for name in _VALUES}


def bounded_draws(
    theta: NDArray[np.float64], lower: ArrayLike, upper: ArrayLike, **attrs: Any
) -> xr.Dataset:
    """Return draws of a channel, with the bounds within which they were sought.

    Parameters
    ----------
    theta : ndarray, shape (n_draws, 3 or more)
        Base-2 logarithms of sensitivity, centre and bandwidth come first.
    lower, upper : array-like, shape (3 or more,)
        Their bounds.
    **attrs
        Of the dataset.

    Returns
    -------
    xarray.Dataset
        ``bandwidth, centre, sensitivity`` (draw), each with attrs ``lower`` and ``upper``.
    """
    low, high = np.asarray(lower), np.asarray(upper)
    columns = [_ORDER.index(name) for name in _VALUES]
    return xr.Dataset(
        {
            name: (
                "draw",
                2.0 ** theta[:, i],
                {"lower": float(2.0 ** low[i]), "upper": float(2.0 ** high[i])},
            )
            for name, i in zip(_VALUES, columns, strict=True)
        },
        attrs=attrs,
    )


def _stuck(draws: xr.Dataset) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Return which draws of each value have no end below, and which none above."""
    near = 1 + _NEAR_BOUND
    stuck = {
        name: (
            draws[name].values <= draws[name].attrs.get("lower", 0) * near,
            draws[name].values * near >= draws[name].attrs.get("upper", np.inf),
        )
        for name in _VALUES
    }
    # The peak of a channel that is ever so narrow, or ever so far from all bands, has no end.
    below, above = stuck["sensitivity"]
    beyond = stuck["bandwidth"][0] | stuck["centre"][0] | stuck["centre"][1]
    return stuck | {"sensitivity": (below, above | beyond)}


def _middle(
    log: NDArray[np.float64], below: NDArray[np.bool_], above: NDArray[np.bool_], level: float
) -> tuple[float, float, float]:
    """Return the median of 2**log and the ends of its middle, open where stuck draws make them."""
    tail = (1 - level) / 2
    middle, low, high = (float(2.0 ** np.nanquantile(log, q)) for q in (0.5, tail, 1 - tail))
    return (
        middle, 0.0 if below.mean() > tail else low, np.inf if above.mean() > tail else high,
    )  # fmt: skip


def told_open(channel: Channel, intervals: Mapping[str, tuple[float, float]]) -> Channel:
    """Return the channel with a flag for each value whose interval is open, and no other such."""
    flags = [f for f in channel.flags if not f.endswith("_open")]
    flags += [f"{n}_open" for n, (low, high) in intervals.items() if low == 0 or np.isinf(high)]
    return replace(channel, flags=tuple(sorted(flags)))


def compare_channels(
    first: xr.Dataset, second: xr.Dataset, *, level: float = 0.95
) -> dict[str, tuple[float, float, float]]:
    r"""Compare two observers, such as a network and people, by draws of `bootstrap_channel`.

    .. math:: \log_2 \frac{v_1}{v_2}

    Draws with one seed over the same images are paired, so that what the images have in common
    cancels.

    Parameters
    ----------
    first, second : xarray.Dataset
        As many draws of each.
    level : float
        Coverage of the intervals.

    Returns
    -------
    dict of str to (float, float, float)
        For bandwidth, centre and sensitivity the median ratio first to second and its interval,
        with 0 or inf for an end made by draws that rest on a bound.

    Raises
    ------
    SchemaError
        If the numbers of draws differ.
    """
    if first.sizes["draw"] != second.sizes["draw"]:
        raise SchemaError(
            f"{first.sizes['draw']} draws cannot be compared with {second.sizes['draw']}."
        )
    ours, theirs = _stuck(first), _stuck(second)
    out = {}
    for name in _VALUES:
        ratio = np.log2(first[name].values / second[name].values)
        below = ours[name][0] | theirs[name][1]
        above = ours[name][1] | theirs[name][0]
        out[name] = _middle(ratio, below, above, level)
    return out


def recovery_error(
    n_trials: Sequence[int],
    *,
    bandwidth: float,
    centre: float,
    sensitivity: float,
    slope: float = 2.0,
    guess: float = 1 / 16,
    lapse: float = 0.02,
    frequencies: Sequence[float] = FREQUENCIES,
    noise_sds: Sequence[float] = NOISE_SDS,
    n_simulations: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""Return how far estimates stray from a known channel, by the number of trials.

    .. math:: \sqrt{\frac{1}{m} \sum_i \left(\log_2 \frac{\hat v_i}{v}\right)^2}

    Parameters
    ----------
    n_trials : sequence of int
        Of the whole experiment, divided among the conditions.
    bandwidth, centre, sensitivity, slope, guess, lapse : float
        The observer; see `probability_correct`.
    frequencies, noise_sds : sequence of float
        The conditions.
    n_simulations : int
        Experiments m for each number.
    seed : int
        Of the experiments.

    Returns
    -------
    xarray.Dataset
        ``bandwidth, centre, sensitivity`` (n_trials), in octaves: an error of 1 is a factor of 2.
        Estimates that stray further than 3 octaves count as 3.
    """
    f = np.tile(np.asarray(frequencies, dtype=float), len(noise_sds))
    sd = np.repeat(np.asarray(noise_sds, dtype=float), len(frequencies))
    true = {"bandwidth": bandwidth, "centre": centre, "sensitivity": sensitivity}
    p = probability_correct(f, sd, slope=slope, guess=guess, lapse=lapse, **true)
    rng = np.random.default_rng(seed)
    error = np.empty((len(n_trials), len(true)))
    for row, total in enumerate(n_trials):
        n = np.full(len(f), total // len(f))
        n[: total % len(f)] += 1
        n = rng.permuted(np.tile(n, (n_simulations, 1)), axis=1)
        fits = fit_channels(rng.binomial(n, p), n, f, sd, guess=guess, intervals=False)
        for column, (name, value) in enumerate(true.items()):
            away = np.log2([getattr(fit.channel, name) / value for fit in fits])
            error[row, column] = np.sqrt((np.clip(away, -3, 3) ** 2).mean())
    return xr.Dataset(
        {name: ("n_trials", error[:, i], {"units": "octaves"}) for i, name in enumerate(true)},
        coords={"n_trials": np.asarray(n_trials)},
        attrs={**true, "slope": slope, "guess": guess, "lapse": lapse, "seed": seed},
    )


def count_cells(trials: xr.Dataset) -> xr.Dataset:
    """Count trials and correct answers by band and level of noise.

    Parameters
    ----------
    trials : xarray.Dataset
        The ``trials`` schema with ``correct``, ``noise_sd`` and ``frequency``. The frequency of a
        trial without noise may be NaN, or none of those with noise; it then belongs to no band.

    Returns
    -------
    xarray.Dataset
        ``n`` and ``correct`` (cell), with coordinates ``frequency`` and ``noise_sd``.

    Raises
    ------
    SchemaError
        If a variable is missing, or noise has no frequency.
    """
    import pandas as pd

    missing = [v for v in ("correct", "noise_sd", "frequency") if v not in trials]
    if missing:
        raise SchemaError(
            f"trials: {missing[0]!r} is missing.",
            "Critical band masking needs 'correct', 'noise_sd' and 'frequency' (cycles/image).",
        )
    table = pd.DataFrame(
        {
            "frequency": _frequency(trials),
            "noise_sd": trials["noise_sd"].values.astype(float),
            "correct": trials["correct"].values.astype(float),
        }
    )
    if (table["frequency"].isna() & (table["noise_sd"] > 0)).any():
        raise SchemaError("trials: 'frequency' is missing for trials with noise.")
    cells = table.groupby(["frequency", "noise_sd"], dropna=False)["correct"]
    counted = cells.agg(["size", "sum"]).reset_index()
    return xr.Dataset(
        {"n": ("cell", counted["size"].to_numpy()), "correct": ("cell", counted["sum"].to_numpy())},
        coords={
            "frequency": ("cell", counted["frequency"].to_numpy(), {"units": "cycles/image"}),
            "noise_sd": ("cell", counted["noise_sd"].to_numpy()),
        },
    )


def accuracy_matrix(trials: xr.Dataset) -> xr.DataArray:
    """Return the share of correct answers by level of noise and band.

    Parameters
    ----------
    trials : xarray.Dataset
        As of `count_cells`. Trials without noise and frequency count for every band.

    Returns
    -------
    xarray.DataArray
        Dims ``noise_sd`` and ``frequency``, both rising.

    Raises
    ------
    SchemaError
        If a combination of noise and band has no trials.
    """
    counts = count_cells(trials).to_dataframe()
    anywhere = counts[counts["frequency"].isna()]
    counts = counts.dropna()
    tables = {
        c: counts.pivot(index="noise_sd", columns="frequency", values=c) for c in ("n", "correct")
    }
    n, correct = tables["n"], tables["correct"]
    if len(anywhere):
        n = n.reindex(n.index.union([0.0])).fillna({} if 0.0 in n.index else 0.0)
        correct = correct.reindex(n.index).fillna(0.0)
        n.loc[0.0] = n.loc[0.0].fillna(0) + anywhere["n"].sum()
        correct.loc[0.0] = correct.loc[0.0] + anywhere["correct"].sum()
    share = correct / n
    if share.isna().any(axis=None):
        sd, f = share.stack(future_stack=True)[lambda s: s.isna()].index[0]
        raise SchemaError(f"trials: there is none with noise_sd {sd:g} at {f:g} cycles/image.")
    return xr.DataArray(
        share.to_numpy(),
        dims=("noise_sd", "frequency"),
        coords={"noise_sd": share.index.to_numpy(), "frequency": share.columns.to_numpy()},
    )


def fit_thresholds(
    trials: xr.Dataset,
    *,
    guess: float | None = None,
    level: float = 0.95,
    n_bootstrap: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    r"""Fit a psychometric function to each band, with bootstrap intervals.

    .. math:: p(f, c) = \gamma + \frac{1 - \gamma - \lambda}{1 + (c / t_f)^\beta}

    Thresholds :math:`t_f` are free; slope and lapse rate, which few trials a band cannot tell, are
    shared by the bands. Intervals are percentiles over fits to counts drawn from the fit.

    Parameters
    ----------
    trials, guess, level
        As of `fit_channel`.
    n_bootstrap : int
        Draws.
    seed : int
        Of the draws.

    Returns
    -------
    xarray.Dataset
        ``threshold, low, high`` (frequency), standard deviations of noise; ``inf`` where the
        strongest noise does not mask and 0 where the weakest does (beyond 8 times either);
        attrs ``slope`` and ``lapse``.

    Raises
    ------
    SchemaError
        As `fit_channel`.
    """
    _check_level(level)
    _check_draws(n_bootstrap)
    counts = count_cells(trials)
    rate = _guess(trials, guess)
    cells = _cells(counts["frequency"].values, counts["noise_sd"].values, rate)
    f = counts["frequency"].values
    noisy = cells.noise_sd > 0
    bands = np.unique(f[noisy])
    band = np.searchsorted(bands, np.where(noisy, f, bands[0]))
    curve = _threshold_curve(band, cells.noise_sd, rate)
    m = len(bands)
    # Thresholds from an eighth of the weakest noise to 8 times the strongest are told.
    weakest = np.log2(cells.noise_sd[noisy].min() / UNIT_SD)
    lower = np.r_[np.full(m, weakest - 3), cells.lower[3:]]
    upper = np.r_[np.full(m, -cells.lower[0]), cells.upper[3:]]
    k, n = counts["correct"].values.astype(float), counts["n"].values.astype(float)

    def fit(sets: NDArray[np.float64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
        fits = [
            fit_binomial(
                curve, np.broadcast_to(s, (len(sets), m + 2)), sets, n, lower=lower, upper=upper
            )
            for s in starts
        ]
        likelihood = np.stack([best for _, best in fits])
        theta = np.stack([t for t, _ in fits])
        return theta[likelihood.argmax(0), np.arange(len(sets))]

    starts = np.stack(
        [np.r_[np.full(m, t), 1.0, lapse] for t in (0.5, 2.5) for lapse in (0.05, 0.4)]
    )
    theta = fit(k[None], starts)[0]
    draws = np.random.default_rng(seed).binomial(
        n.astype(int), np.clip(curve(theta[None])[0][0], 0, 1), (n_bootstrap, len(n))
    )
    drawn = fit(draws.astype(float), theta[None])[:, :m]
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0, method="closest_observation")

    def noise(log_threshold: NDArray[np.float64]) -> NDArray[np.float64]:
        t = UNIT_SD * 2.0**log_threshold
        t = np.where(log_threshold >= upper[:m] - 1e-6, np.inf, t)
        return np.where(log_threshold <= lower[:m] + 1e-6, 0.0, t)

    return xr.Dataset(
        {
            name: ("frequency", noise(values))
            for name, values in (("threshold", theta[:m]), ("low", low), ("high", high))
        },
        coords={"frequency": ("frequency", bands, {"units": "cycles/image"})},
        attrs={
            "slope": float(2 ** theta[m]), "lapse": float(theta[m + 1]), "guess": rate,
            "level": level, "seed": seed,
        },
    )  # fmt: skip


def as_record(channel: Channel) -> dict[str, Any]:
    """Return a channel as values that JSON takes; what is NaN is None."""
    return {
        "bandwidth": _finite(channel.bandwidth),
        "centre": _finite(channel.centre),
        "sensitivity": _finite(channel.sensitivity),
        "flags": list(channel.flags),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def trials_record(
    trials: xr.Dataset,
    *,
    guess: float | None = None,
    level: float = 0.95,
    n_bootstrap: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all that trials say of an observer's channel, as values that JSON takes.

    Parameters
    ----------
    trials, guess, level
        As of `fit_channel`.
    n_bootstrap, seed : int
        As of `fit_thresholds`.

    Returns
    -------
    dict
        ``bandwidth`` (octaves), ``centre`` (cycles/image), ``sensitivity``, ``flags`` and
        ``intervals`` of the maximum-likelihood fit, its ``slope``, ``lapse``, ``guess``; ``level``
        and ``n_trials``; ``resampled``, the intervals of `bootstrap_channel` over images that were
        shown more than once and over subjects, or None where there is neither or the channel is no
        estimate; the ``thresholds`` of `fit_thresholds` by band; ``published_rule``, what
        `fit_index_channel` makes of the same trials, or None where a band lacks a level of noise or
        levels are not the published ones. None stands for an end that is open.

    Raises
    ------
    SchemaError
        As `fit_channel`.
    """
    _check_draws(n_bootstrap)
    fit = fit_channel(trials, guess=guess, level=level)
    bands = fit_thresholds(trials, guess=guess, level=level, n_bootstrap=n_bootstrap, seed=seed)
    thresholds = [
        {
            "frequency": float(f),
            **{name: _finite(float(bands[name][i])) for name in ("threshold", "low", "high")},
        }
        for i, f in enumerate(bands["frequency"].values)
    ]
    return {
        **as_record(fit.channel),
        "intervals": {k: [_finite(end) for end in ends] for k, ends in fit.intervals.items()},
        "slope": fit.slope,
        "lapse": fit.lapse,
        "guess": fit.guess,
        "level": fit.level,
        "n_trials": fit.n_trials,
        "resampled": _resampled(trials, guess, level, n_bootstrap, seed)
        if fit.channel.usable
        else None,
        "thresholds": thresholds,
        "published_rule": _published(trials),
    }


def repeated_over(trials: xr.Dataset) -> tuple[str, ...]:
    """Return what groups trials: images shown more than once, and subjects if there are several."""
    size = trials.sizes["trial"]
    values = {
        name: len(np.unique(np.broadcast_to(trials[name].values.astype(str), size)))
        for name in ("stimulus_id", "subject")
        if name in trials.variables
    }
    grouped = [n for n in ("stimulus_id",) if 1 < values.get(n, 0) < size]
    grouped += [n for n in ("subject",) if 1 < values.get(n, 0) < size]
    return tuple(grouped)


def _resampled(
    trials: xr.Dataset, guess: float | None, level: float, n_bootstrap: int, seed: int
) -> dict[str, Any] | None:
    over = repeated_over(trials)
    if not over:
        return None
    draws = bootstrap_channel(trials, over=over, guess=guess, n_bootstrap=n_bootstrap, seed=seed)
    ends = percentile_intervals(draws, level)
    return {
        "over": list(over),
        "intervals": {name: [_finite(end) for end in pair] for name, pair in ends.items()},
    }


def _published(trials: xr.Dataset) -> dict[str, Any] | None:
    """Return the channel by the published rule, where the trials follow its design."""
    try:
        accuracy = accuracy_matrix(trials)
    except SchemaError:
        return None
    f = accuracy["frequency"].values
    same = np.allclose(accuracy["noise_sd"].values, NOISE_SDS) if len(accuracy) == 5 else False
    if not same or not np.allclose(np.diff(np.log2(f)), 1):
        return None
    indices = threshold_indices(accuracy.values)
    channel = fit_index_channel(indices, lowest=float(f[0]), accuracy=accuracy.values)
    return {**as_record(channel), "indices": indices.tolist()}
