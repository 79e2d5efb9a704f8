"""How well attention is decoded: accuracy by window length, chance, switches, expected accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.auditory.trials import ListeningTrial
from brainalign.errors import ConfigError, SchemaError

__all__ = [
    "Mesd",
    "accuracy_curve",
    "chance_band",
    "correlation_of_correlations",
    "distinct_windows",
    "effective_samples",
    "expected_accuracy",
    "expected_switch_duration",
    "mesd",
    "switch_curve",
    "switch_latency",
    "trial_interval",
]

#: Where the share of right answers is taken to be 1: the formulas hold only below it.
_CERTAIN = 1 - 1e-9


def accuracy_curve(
    scores: xr.Dataset, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Accuracy against window length, with intervals from trials that are drawn again.

    Parameters
    ----------
    scores : xarray.Dataset
        ``score`` (window, talker), larger for the talker that is thought to be attended, with the
        coordinates ``length`` and ``start`` (s), ``trial``, ``subject`` and ``attended`` (the
        talker's number, -1 where attention switches within the window), as
        `brainalign.auditory.decoders.cross_validate` returns. Windows with a switch do not count.
    level : float
        Coverage of the intervals and of the band of chance.
    n_bootstrap : int
        Draws of trials.
    seed : int
        Of the draws.

    Returns
    -------
    xarray.Dataset
        ``accuracy, low, high, chance_low, chance_high, n_windows, n_trials`` (length). A tie among
        talkers counts as the share of a guess.

    Raises
    ------
    SchemaError
        If no window has an attended talker.
    """
    attended = scores["attended"].values
    kept = scores.isel(window=np.flatnonzero(attended >= 0))
    if not kept.sizes["window"]:
        raise SchemaError("No window has an attended talker.")
    right = _right(kept["score"].values, kept["attended"].values)
    trial = np.array(
        [f"{s}/{t}" for s, t in zip(kept["subject"].values, kept["trial"].values, strict=True)]
    )
    lengths = np.unique(kept["length"].values)
    rows = []
    for length in lengths:
        here = kept["length"].values == length
        low, high = trial_interval(
            right[here], trial[here], level=level, n_bootstrap=n_bootstrap, seed=seed
        )
        n = distinct_windows(kept["start"].values[here], trial[here], float(length))
        band = chance_band(n, chance=1 / kept.sizes["talker"], level=level)
        rows.append((right[here].mean(), low, high, *band, here.sum(), len(np.unique(trial[here]))))
    names = ("accuracy", "low", "high", "chance_low", "chance_high", "n_windows", "n_trials")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return xr.Dataset(
        {name: ("length", np.array(values)) for name, values in columns.items()},
        coords={"length": ("length", lengths, {"units": "s"})},
        attrs={"level": level},
    )


def _right(score: NDArray[np.float64], attended: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether each window's decision is right; 1 / k where k talkers share the highest score."""
    best = score == score.max(axis=1, keepdims=True)
    hit = best[np.arange(len(score)), attended]
    return np.where(hit, 1 / best.sum(axis=1).clip(min=1), 0.0)


def trial_interval(
    correct: ArrayLike,
    trial: ArrayLike,
    *,
    level: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the share of right windows, from trials drawn with replacement.

    Windows of one trial, overlapping or not, are not independent, so trials are drawn whole.

    Parameters
    ----------
    correct : array-like, shape (n_windows,)
        Whether each window is right.
    trial : array-like, shape (n_windows,)
        Which trial it is from.
    level : float
        Coverage.
    n_bootstrap : int
        Draws.
    seed : int
        Of the draws.

    Returns
    -------
    low, high : float
        NaN with fewer than two trials.

    Raises
    ------
    SchemaError
        If the lengths differ or are 0.
    """
    right, group = np.asarray(correct, dtype=np.float64), np.asarray(trial)
    if right.ndim != 1 or right.shape != group.shape or not len(right):
        raise SchemaError(f"correct has shape {right.shape} and trial {group.shape}.")
    _, place = np.unique(group, return_inverse=True)
    hits, size = np.bincount(place, right), np.bincount(place)
    if len(size) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(size), size=(n_bootstrap, len(size)))
    share = hits[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    low, high = np.quantile(share, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def distinct_windows(start: ArrayLike, trial: ArrayLike, length: float) -> int:
    """Count windows without overlap: the most that the time covered in each trial holds.

    Parameters
    ----------
    start : array-like, shape (n_windows,)
        Seconds.
    trial : array-like, shape (n_windows,)
        Which trial each is from.
    length : float
        Of the windows, seconds.

    Returns
    -------
    int
    """
    _, group = np.unique(np.asarray(trial), return_inverse=True)
    starts = np.asarray(start, dtype=np.float64)
    order = np.lexsort((starts, group))
    count, last, end = 0, -1, 0.0
    for g, s in zip(group[order].tolist(), starts[order].tolist(), strict=True):
        if g != last or s >= end - 1e-6 * length:
            count, last, end = count + 1, g, s + length
    return count


def chance_band(n: int, *, chance: float = 0.5, level: float = 0.95) -> tuple[float, float]:
    r"""Accuracies that guessing reaches in n independent windows.

    .. math:: \left[B^{-1}\left(\tfrac{1-\ell}{2}; n, p\right),
              B^{-1}\left(\tfrac{1+\ell}{2}; n, p\right)\right] / n

    with the binomial quantile function :math:`B^{-1}`.

    Parameters
    ----------
    n : int
        Windows without overlap; see `distinct_windows`.
    chance : float
        One over the number of talkers.
    level : float
        Coverage, at least.

    Returns
    -------
    low, high : float

    Raises
    ------
    ConfigError
        If n is below 1, or a share is not between 0 and 1.
    """
    from scipy.stats import binom

    if n < 1 or not (0 < chance < 1 and 0 < level < 1):
        raise ConfigError(f"n={n}, chance={chance}, level={level}; expected n >= 1 and shares.")
    low, high = binom.ppf([(1 - level) / 2, (1 + level) / 2], n, chance) / n
    return float(low), float(high)


class Mesd(NamedTuple):
    """Result of `mesd`.

    Attributes
    ----------
    duration : float
        Minimal expected switch duration, seconds; infinite where no accuracy is above one half.
    length, accuracy : float
        The window length (s) and accuracy it is reached at.
    n_states, target : int
        States of the chain there, and the first state of the comfort region.
    """

    duration: float
    length: float
    accuracy: float
    n_states: int
    target: int


def mesd(
    lengths: ArrayLike,
    accuracies: ArrayLike,
    *,
    confidence: float = 0.8,
    comfort: float = 0.65,
    min_states: int = 5,
    n_points: int = 1000,
) -> Mesd:
    r"""Minimal expected switch duration of a volume control that steps with each decision.

    .. math:: \mathrm{MESD} = \min_\tau \mathrm{ESD}(p(\tau), \tau, N_\tau)

    over the curve of accuracy p against window length :math:`\tau`, interpolated linearly; see
    `expected_switch_duration`.

    Parameters
    ----------
    lengths : array-like, shape (n_lengths,)
        Window lengths in seconds, of steps without overlap.
    accuracies : array-like, shape (n_lengths,)
        Shares of right decisions; those at or below one half are left out.
    confidence : float
        Share of time P0 that the gain is to be in the comfort region.
    comfort : float
        Lower end c of the comfort region.
    min_states : int
        Fewest states.
    n_points : int
        Of the interpolated curve.

    Returns
    -------
    Mesd

    Raises
    ------
    ConfigError
        If lengths are not above 0, repeat, or accuracies are not shares.

    References
    ----------
    Geirnaert, Francart & Bertrand (2020), IEEE Transactions on Neural Systems and Rehabilitation
    Engineering 28, 307-317.
    """
    tau, p = np.asarray(lengths, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    if tau.ndim != 1 or tau.shape != p.shape or not len(tau):
        raise ConfigError(f"lengths have shape {tau.shape} and accuracies {p.shape}.")
    order = np.argsort(tau)
    tau, p = tau[order], p[order]
    if not (tau > 0).all() or (np.diff(tau) == 0).any() or not ((p >= 0) & (p <= 1)).all():
        raise ConfigError(
            "Expected different lengths above 0 s and accuracies between 0 and 1; got "
            f"{tau.tolist()} and {p.tolist()}."
        )
    grid = np.linspace(tau[0], tau[-1], n_points) if len(tau) > 1 else tau
    best = Mesd(float("inf"), float("nan"), float("nan"), 0, 0)
    for length, accuracy in zip(grid, np.interp(grid, tau, p), strict=True):
        if accuracy > 0.5:
            duration, n, target = expected_switch_duration(
                float(length), float(accuracy),
                confidence=confidence, comfort=comfort, min_states=min_states,
            )  # fmt: skip
            if duration < best.duration:
                best = Mesd(duration, float(length), float(accuracy), n, target)
    return best


def expected_switch_duration(
    length: float,
    accuracy: float,
    *,
    confidence: float = 0.8,
    comfort: float = 0.65,
    min_states: int = 5,
) -> tuple[float, int, int]:
    r"""Return the expected time from a switch until a control with N states is comfortable again.

    With :math:`r = p / (1 - p)` the chain has the smallest :math:`N \ge N_{min}` for which

    .. math:: \bar k = \left\lfloor \frac{\ln(r^N (1 - P_0) + P_0)}{\ln r} + 1 \right\rfloor,
              \qquad \frac{\bar k - 1}{N - 1} \ge c ,

    and from the stationary distribution of the other side reaches state
    :math:`k_c = \lceil c (N - 1) + 1 \rceil` after

    .. math:: \mathrm{ESD} = \tau \frac{r^{k_c+1} - r^{k_c}}{r^{k_c} - r}
              \sum_{i=1}^{k_c-1} r^{-i} h_i, \qquad
              h_i = \frac{k_c - i}{2p - 1} + \frac{p (r^{-k_c} - r^{-i})}{(2p - 1)^2} .

    The sum is taken in closed form, and N found by halving: both grow without bound towards chance.

    Parameters
    ----------
    length : float
        Seconds :math:`\tau` of a step.
    accuracy : float
        Share p of right decisions, above one half. 1 stands for the limit.
    confidence, comfort, min_states
        As in `mesd`.

    Returns
    -------
    duration : float
        Seconds.
    n_states, target : int
        N and k_c.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """
    if not (0.5 < accuracy <= 1 and length > 0 and 0 < confidence < 1 and 0 < comfort < 1):
        raise ConfigError(
            f"length={length}, accuracy={accuracy}, confidence={confidence}, comfort={comfort}; "
            "expected seconds, an accuracy above 0.5, and shares."
        )
    p = min(accuracy, _CERTAIN)
    log_r = float(np.log(p / (1 - p)))
    n = _fewest_states(max(2, min_states), log_r, confidence, comfort)
    target = int(np.ceil(round(comfort * (n - 1) + 1, 9)))
    # r^-i weighs state i < k_c: the geometric sums of i and of h_i, divided by that of 1.
    drift, below = 2 * p - 1, target - 1
    rest = float(np.exp(-below * log_r))
    steps = (target - p / drift - below * rest / np.expm1(-below * log_r)) / drift
    steps += (1 - p) * ((1 - p) * rest - p) / drift**2
    return length * float(steps), n, target


def _fewest_states(n: int, log_r: float, confidence: float, comfort: float) -> int:
    """Return the fewest states, from n on, of which enough are held in the comfort region.

    Without the rounding down, what is held minus what is needed is a convex function of n that ends
    above 0. So it is below 0 on one stretch at most, whose end is found by halving; how many states
    are held grows with the inverse of the accuracy's distance from chance.
    """

    def needed(n: int, lowest: float) -> bool:
        return (lowest - 1) / (n - 1) < comfort

    while needed(n, np.floor(_lowest(n, log_r, confidence))):
        low, high = n, n + 1
        if needed(low, _lowest(low, log_r, confidence)):
            while needed(high, _lowest(high, log_r, confidence)):
                low, high = high, 2 * high
            while high - low > 1:
                middle = (low + high) // 2
                if needed(middle, _lowest(middle, log_r, confidence)):
                    low = middle
                else:
                    high = middle
        n = high
    return n


def _lowest(n: int, log_r: float, confidence: float) -> float:
    inside = np.logaddexp(n * log_r + np.log(1 - confidence), np.log(confidence))
    return float(inside / log_r + 1)


def switch_latency(
    time: ArrayLike, decision: ArrayLike, switch: ArrayLike, talker: ArrayLike, *, hold: int = 3
) -> NDArray[np.float64]:
    """Seconds from each switch of attention until the decisions follow.

    Parameters
    ----------
    time : array-like, shape (n_decisions,)
        When each decision was there, seconds, ascending.
    decision : array-like of int, shape (n_decisions,)
        The talker's number.
    switch : array-like, shape (n_switches,)
        When attention switched, seconds, ascending.
    talker : array-like of int, shape (n_switches,)
        To whom.
    hold : int
        Decisions in a row for the new talker that count as following; the time is that of the
        first of them.

    Returns
    -------
    ndarray, shape (n_switches,)
        NaN where the decisions did not follow before the next switch.

    Raises
    ------
    SchemaError
        If times do not ascend or lengths differ.
    """
    t, d = np.asarray(time, dtype=np.float64), np.asarray(decision)
    at, to = np.asarray(switch, dtype=np.float64), np.asarray(talker)
    if t.shape != d.shape or at.shape != to.shape or t.ndim != 1 or at.ndim != 1 or hold < 1:
        raise SchemaError(
            f"time {t.shape} and decision {d.shape}, switch {at.shape} and talker {to.shape}, hold "
            f"{hold}: expected two pairs of equal length, and hold of at least 1."
        )
    if (np.diff(t) <= 0).any() or (np.diff(at) <= 0).any():
        raise SchemaError("Times of decisions and of switches must ascend.")
    latency = np.full(len(at), np.nan)
    for k, (begin, end) in enumerate(zip(at, [*at[1:], np.inf], strict=True)):
        rows = np.flatnonzero((t >= begin) & (t < end))
        follows = d[rows] == to[k]
        if len(rows) >= hold:
            runs = np.lib.stride_tricks.sliding_window_view(follows, hold).all(axis=1)
            if runs.any():
                latency[k] = t[rows[int(runs.argmax())]] - begin
    return latency


def switch_curve(
    scores: xr.Dataset,
    trials: Sequence[ListeningTrial],
    *,
    level: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    r"""Tell how decisions follow switches of attention, by window length.

    A window that ends at t is decided at t + `look_ahead`. Decisions follow a switch from the first
    one on after which all are for the new talker for as long as a window lasts (`switch_latency`).
    For windows of :math:`\tau` seconds that is expected at :math:`\tau / 2` + `look_ahead`, when
    more than half of the window is new. Guesses are right for so long by chance too: they follow
    few switches, and their `share` stays where it was.

    Parameters
    ----------
    scores : xarray.Dataset
        From `brainalign.auditory.decoders.cross_validate`, with a `hop` shorter than all windows.
    trials : sequence of ListeningTrial
        Those that were scored, with the switches; whole ones, where pieces were scored.
    level : float
        Coverage of the intervals.
    n_bootstrap : int
        Draws of trials.
    seed : int
        Of the draws.

    Returns
    -------
    xarray.Dataset
        ``latency`` (length): the median over switches in seconds, those that are not followed
        before the next one or the trial's end being longer than all others, so that it may be
        infinite; ``latency_low`` and ``latency_high``, its interval from trials drawn with
        replacement; ``followed``, the share of switches; ``share`` (length, since), that of
        decisions for the new talker by the time since the switch in seconds; ``n_switches``.
        Lengths are left out where attention nowhere stays for the half window to follow and the
        whole one to hold. Switches are left out if windows are missing before the next one, where
        samples are marked.

    Raises
    ------
    SchemaError
        If attention never switches, a scored trial is not given, or windows do not overlap.
    """
    known = {(t.subject, t.name): t for t in trials}
    names = [
        (str(s), str(t))
        for s, t in zip(scores["subject"].values, scores["trial"].values, strict=True)
    ]
    missing = set(names) - set(known)
    if missing:
        subject, lost = sorted(missing)[0]
        raise SchemaError(f"Trial {lost!r} of {subject!r} was scored, but it is not given.")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    trial = np.array([order[n] for n in names])
    ahead = float(scores.attrs.get("look_ahead", 0.0))
    decision = scores["score"].values.argmax(axis=1)
    lengths = np.unique(scores["length"].values)
    switches = [1 + np.flatnonzero(np.diff(known[name].attended)) for name in order]
    if not sum(map(len, switches)):
        raise SchemaError("Attention never switches in these trials.")
    stay = max(
        float(np.diff([*at, len(known[name].attended)]).max(initial=0)) / known[name].sampling_rate
        for name, at in zip(order, switches, strict=True)
    )
    draws = np.random.default_rng(seed).integers(len(order), size=(n_bootstrap, len(order)))
    kept: list[float] = []
    rows, shares = [], []
    # Half a window to follow, and a whole one to hold.
    for length in [float(x) for x in lengths if 1.5 * x + ahead <= stay]:
        here = scores["length"].values == length
        of_trial = [np.flatnonzero(here & (trial == k)) for k in order.values()]
        steps = np.concatenate([np.diff(scores["start"].values[r]) for r in of_trial])
        step = float(steps.min(initial=np.inf))
        if step >= length:
            raise SchemaError(
                f"Windows of {length} s come every {step:g} s.", "Score them with a shorter hop."
            )
        # As many decisions as there are from a window to the one beside it.
        hold = 1 + round(length / step)
        latency, since, new = [], [], []
        for name, r, at in zip(order, of_trial, switches, strict=True):
            t = known[name]
            time, begins, talkers = (
                scores["start"].values[r] + length + ahead,
                (t.offset + at) / t.sampling_rate,
                t.attended[at],
            )
            ends = np.append(begins[1:], np.inf)
            gap = np.flatnonzero(np.diff(time) > 1.5 * step)
            whole = ~((time[gap] < ends[:, None]) & (time[gap + 1] > begins[:, None])).any(axis=1)
            latency.append(switch_latency(time, decision[r], begins, talkers, hold=hold)[whole])
            for begin, end, who in zip(begins[whole], ends[whole], talkers[whole], strict=True):
                within = (time >= begin) & (time < end)
                since.append(np.floor((time[within] - begin) / step + 1e-6) * step)
                new.append(decision[r][within] == who)
        if not sum(map(len, latency)):
            continue
        kept.append(length)
        every = np.nan_to_num(np.concatenate(latency), nan=np.inf)
        medians = [
            np.nan_to_num(np.concatenate([latency[i] for i in d]), nan=np.inf) for d in draws
        ]
        interval = _interval([float(np.median(m)) for m in medians if len(m)], level)
        if len(order) < 2:
            interval = (np.nan, np.nan)
        rows.append((np.median(every), *interval, np.isfinite(every).mean(), len(every)))
        places, bins = np.unique(np.concatenate(since).round(6), return_inverse=True)
        share = np.bincount(bins, np.concatenate(new)) / np.bincount(bins)
        shares.append(dict(zip(places.tolist(), share.tolist(), strict=True)))
    grid = sorted({place for s in shares for place in s})
    values = np.array([[s.get(place, np.nan) for place in grid] for s in shares])
    median, low, high, followed, n = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    seconds = {"units": "s"}
    return xr.Dataset(
        {
            "latency": ("length", median, seconds),
            "latency_low": ("length", low, seconds),
            "latency_high": ("length", high, seconds),
            "followed": ("length", followed),
            "n_switches": ("length", n.astype(np.int64)),
            "share": (("length", "since"), values.reshape(len(kept), len(grid))),
        },
        coords={"length": ("length", kept, seconds), "since": ("since", grid, seconds)},
        attrs={"level": level},
    )


def _interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Percentiles that are among the values, some of which may be infinite."""
    low = np.quantile(values, (1 - level) / 2, method="lower")
    high = np.quantile(values, (1 + level) / 2, method="higher")
    return float(low), float(high)


def effective_samples(x: ArrayLike, y: ArrayLike, *, max_lag: int | None = None) -> float:
    r"""Count the independent samples that a correlation of two time series of N is worth.

    .. math:: N_\mathrm{eff} = \frac{N}{1 + 2 \sum_{k=1}^{K} (1 - k/N) \rho_x(k) \rho_y(k)}

    with the autocorrelations :math:`\rho`.

    Parameters
    ----------
    x, y : array-like, shape (n_samples,)
        Series of one length.
    max_lag : int, optional
        K; by default a tenth of the samples, as later autocorrelations are mostly noise.

    Returns
    -------
    float
        At most N.

    Raises
    ------
    SchemaError
        If the series differ in length, are constant, or are shorter than 4 samples.

    References
    ----------
    Bartlett (1935), Journal of the Royal Statistical Society 98, 536-543.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 4 or not (a.std() and b.std()):
        raise SchemaError(
            f"Expected two series that vary, of one length; got {a.shape}, {b.shape}."
        )
    n = len(a)
    k = np.arange(1, 1 + (n // 10 if max_lag is None else min(max_lag, n - 1)))
    product = _autocorrelation(a)[k] * _autocorrelation(b)[k]
    return float(n / max(1.0, 1 + 2 * ((1 - k / n) * product).sum()))


def _autocorrelation(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """At lags 0 .. n - 1; each sum is over as many products as there are."""
    x = x - x.mean()
    n = len(x)
    power = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    covariance = np.fft.irfft(power)[:n] / np.arange(n, 0, -1)
    return covariance / covariance[0]


def correlation_of_correlations(r_1: ArrayLike, r_2: ArrayLike, r_12: ArrayLike) -> ArrayLike:
    r"""Correlation between two correlations that share a variable.

    .. math:: c = \frac{r_{12} (1 - r_1^2 - r_2^2)
              - \tfrac12 r_1 r_2 (1 - r_1^2 - r_2^2 - r_{12}^2)}{(1 - r_1^2)(1 - r_2^2)}

    Parameters
    ----------
    r_1, r_2 : array-like
        Correlations of the shared variable with two others, below 1.
    r_12 : array-like
        Correlation of these two.

    Returns
    -------
    ndarray or float

    References
    ----------
    Steiger (1980), Psychological Bulletin 87, 245-251, equation 3.
    """
    a, b, c = (np.asarray(v, dtype=np.float64) for v in (r_1, r_2, r_12))
    rest = 1 - a**2 - b**2
    return (c * rest - a * b * (rest - c**2) / 2) / ((1 - a**2) * (1 - b**2))


def expected_accuracy(
    r_attended: ArrayLike,
    r_unattended: ArrayLike,
    n_effective: ArrayLike,
    *,
    r_talkers: ArrayLike = 0.0,
) -> NDArray[np.float64]:
    r"""Share of windows in which the attended talker's correlation is the larger one.

    .. math:: P = \Phi\left(\frac{(z_a - z_u) \sqrt{N_\mathrm{eff} - 3}}{\sqrt{2 (1 - c)}}\right),
              \qquad z = \operatorname{artanh} r

    with c the correlation between both correlations (`correlation_of_correlations`).

    Parameters
    ----------
    r_attended, r_unattended : array-like
        Correlations of the reconstruction with both talkers, over long stretches.
    n_effective : array-like
        Effective samples in the window; see `effective_samples`. At or below 3 there is nothing to
        tell, and P is one half.
    r_talkers : array-like
        Correlation between the talkers.

    Returns
    -------
    ndarray

    Raises
    ------
    SchemaError
        If a correlation is not between -1 and 1.

    Notes
    -----
    Series whose variance changes over time, such as speech with pauses, fall short of it.
    """
    from scipy.stats import norm

    a, u = (np.asarray(r, dtype=np.float64) for r in (r_attended, r_unattended))
    if not ((np.abs(a) < 1).all() and (np.abs(u) < 1).all()):
        raise SchemaError("Correlations must be between -1 and 1.")
    c = np.asarray(correlation_of_correlations(a, u, r_talkers))
    size = np.asarray(n_effective, dtype=np.float64) - 3
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (np.arctanh(a) - np.arctanh(u)) * np.sqrt(size.clip(min=0)) / np.sqrt(2 * (1 - c))
    return np.asarray(norm.cdf(np.where(size > 0, z, 0.0)))
