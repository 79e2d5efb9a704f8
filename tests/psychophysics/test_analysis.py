"""Channels: the published numbers, recovery of known channels, intervals that cover, flags."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.optimize import minimize
from scipy.stats import binom

from brainalign.errors import SchemaError
from brainalign.psychophysics import (
    FREQUENCIES,
    NOISE_SDS,
    fit_channel,
    fit_index_channel,
    fit_thresholds,
    probability_correct,
    threshold_indices,
)
from brainalign.psychophysics.analysis import (
    Channel,
    _cells,
    _likeliest,
    _starts,
    accuracy_matrix,
    bootstrap_channel,
    bounded_draws,
    compare_channels,
    count_cells,
    fit_channels,
    percentile_intervals,
    recovery_error,
    repeated_over,
    told_open,
)
from brainalign.psychophysics.likelihood import (
    fit_binomial,
    log_likelihood,
    profile_intervals,
)

F = np.tile(FREQUENCIES, 5)
SD = np.repeat(NOISE_SDS, 7)
KNOWN = {"sensitivity": 0.8, "slope": 2.0, "lapse": 0.05}


def simulated(bandwidth, centre, n=30, sets=1, seed=0, **known):
    p = probability_correct(F, SD, bandwidth=bandwidth, centre=centre, **(KNOWN | known))
    return np.random.default_rng(seed).binomial(n, p, (sets, len(p)))


def trials_of(k, n):
    """Return single trials with k of n correct in each cell."""
    n = np.broadcast_to(n, k.shape)
    correct = np.concatenate([np.arange(m) < hits for hits, m in zip(k, n, strict=True)])
    total = int(n.sum())
    category = np.array([f"c{i % 16}" for i in range(total)])
    return xr.Dataset(
        {
            "response": ("trial", np.where(correct, category, "other")),
            "correct": ("trial", correct),
            "category": ("trial", category),
            "noise_sd": ("trial", np.repeat(SD, n)),
            "frequency": ("trial", np.repeat(F, n)),
        },
        coords={"subject": "s"},
    )


@pytest.mark.parametrize(
    ("indices", "bandwidth", "centre", "sensitivity", "flags"),
    [
        ([0, 0, 0, 0, 2, 2, 0], 1.00, 39.6, 1.00, ("amplitude_at_bound",)),
        ([0, 0, 2, 2, 3, 4, 2], 3.99, 39.4, 0.71, ()),
        ([0, 0, 1, 2, 2, 3, 1], 3.51, 34.4, 0.39, ()),
        ([0, 0, 0, 2, 3, 3, 0], 2.29, 32.2, 0.70, ()),
    ],
)
def test_published_channels(indices, bandwidth, centre, sensitivity, flags):
    channel = fit_index_channel(indices)
    assert channel.bandwidth == pytest.approx(bandwidth, abs=0.005)
    assert channel.centre == pytest.approx(centre, abs=0.05)
    assert channel.sensitivity == pytest.approx(sensitivity, abs=0.005)
    assert channel.flags == flags and channel.usable


def test_threshold_indices_by_hand():
    accuracy = np.array([[0.9, 0.9, 0.5], [0.9, 0.6, 0.5], [0.8, 0.5, 0.2], [0.7, 0.9, 0.1]])
    # The second band is right again at the strongest noise, where the scan begins.
    assert threshold_indices(accuracy).tolist() == [0, 0, 3]
    accuracy[3, 1] = 0.5
    assert threshold_indices(accuracy).tolist() == [0, 2, 3]
    with pytest.raises(SchemaError, match="Divide per cents by 100"):
        threshold_indices(100 * accuracy)


def test_flags_of_the_index_rule():
    low = np.full((5, 7), 0.4)
    assert fit_index_channel(threshold_indices(low), accuracy=low).flags == ("below_half", "flat")
    assert fit_index_channel([0] * 7).flags == ("flat",)
    assert fit_index_channel([0, 0, 0, 0, 0, 4, 0]).flags == ("diverged",)
    wide = fit_index_channel([3, 3, 3, 3, 3, 4, 3])
    assert not wide.usable and "diverged" in wide.flags
    assert np.isnan(fit_index_channel([0] * 7).bandwidth)
    for wrong in ([0, 1], [0, 5, 1, 0, 0, 0, 0], [0, 0.5, 1, 0, 0, 0, 0]):
        with pytest.raises(SchemaError, match="whole numbers"):
            fit_index_channel(wrong)


def test_probability_by_hand():
    known = {"bandwidth": 2.0, "centre": 28.0, "sensitivity": 0.5, "guess": 0.1, "lapse": 0.1}
    # At the threshold 0.01 / 0.5 accuracy is half-way; an octave off, the sensitivity is halved.
    assert probability_correct(28.0, 0.02, **known) == pytest.approx(0.5)
    assert probability_correct(56.0, 0.04, **known) == pytest.approx(0.5)
    assert probability_correct(28.0, 0.0, **known) == pytest.approx(0.9)
    assert probability_correct(28.0, 0.04, slope=3, **known) == pytest.approx(0.1 + 0.8 / 9)


@pytest.mark.parametrize("bandwidth", [1, 2, 3, 5])
@pytest.mark.parametrize("centre", [28.0, 39.6])
def test_parametric_fit_is_unbiased(bandwidth, centre):
    # Centres on a band, and midway between two.
    fits = fit_channels(simulated(bandwidth, centre, n=100, sets=40), 100, F, SD, intervals=False)
    for name, true in (("bandwidth", bandwidth), ("centre", centre), ("sensitivity", 0.8)):
        error = np.log2([getattr(f.channel, name) / true for f in fits])
        assert abs(error.mean()) < 3.5 * error.std(ddof=1) / np.sqrt(len(error)), name
        assert abs(error.mean()) < 0.15 and error.std() < 0.35, name


def test_prior_speaks_of_peaks_alone_that_no_noise_has_shown():
    # Of the same counts, those of a peak within the noise that was shown are fitted by likelihood.
    k = np.concatenate([simulated(1.0, 39.6, n=20, sets=6, sensitivity=s) for s in (0.4, 2.0)])
    cells = _cells(F, SD, 1 / 16)
    total = np.full(k.shape, 20.0)
    theta, best = _likeliest(cells, _starts(cells, k, total), k, total)
    fits = fit_channels(k, 20, F, SD, intervals=False)
    beyond = theta[:, 0] > 0
    assert 0 < beyond.sum() < len(k)
    peak = np.log2([f.channel.sensitivity for f in fits])
    assert peak[~beyond] == pytest.approx(theta[~beyond, 0], abs=1e-9)
    assert (peak[beyond] < theta[beyond, 0]).all()
    for found, likelihood, held in zip(fits, best, beyond, strict=True):
        assert found.log_likelihood == pytest.approx(likelihood, abs=1e-9) or held


SCATTER = {1: (1.0, 1.4), 3: (3.1, 4.3), 5: (4.9, 6.7)}


@pytest.mark.parametrize("bandwidth", SCATTER)
def test_index_rule_is_biased_where_the_parametric_fit_is_not(bandwidth):
    def noiseless(sensitivity, centre):
        return probability_correct(
            F, SD, bandwidth=bandwidth, centre=centre, sensitivity=sensitivity, slope=8, lapse=0.0
        )

    def by_rule(sensitivity):
        p = [noiseless(sensitivity, c) for c in np.geomspace(36.3, 47.1, 5)]
        return [fit_index_channel(threshold_indices(q.reshape(5, 7))).bandwidth for q in p]

    wide = np.concatenate([by_rule(s) for s in (0.4, 0.5, 0.6)])
    assert (wide.min(), wide.max()) == pytest.approx(SCATTER[bandwidth], rel=0.1)
    # The width is one of the logarithm of sensitivity: it grows with the peak.
    assert np.mean(by_rule(0.3)) < np.mean(wide) < np.mean(by_rule(1.0))
    centres = (28.0, 30.0)
    p = np.stack([noiseless(0.6, c) for c in centres])
    fits = fit_channels(1e4 * p, 1e4, F, SD, intervals=False)
    for fit, centre in zip(fits, centres, strict=True):
        assert fit.channel.bandwidth == pytest.approx(bandwidth, rel=2e-3)
        assert fit.channel.centre == pytest.approx(centre, rel=1e-3)
        assert fit.slope == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(
    ("bandwidth", "centre"), [(1.0, 28.0), (2.0, 30.0), (3.0, 30.0), (5.0, 25.0)]
)
def test_intervals_cover_at_their_nominal_rate(bandwidth, centre):
    known = {"bandwidth": bandwidth, "centre": centre, "sensitivity": 0.8}
    fits = fit_channels(simulated(bandwidth, centre, n=20, sets=60, seed=1), 20, F, SD, level=0.8)
    for name, true in known.items():
        covered = sum(f.intervals[name][0] <= true <= f.intervals[name][1] for f in fits)
        least, most = binom.ppf([0.002, 0.998], len(fits), 0.8)
        assert least <= covered <= most, name


@pytest.mark.parametrize("n", [20, 300])
def test_open_ends_are_told(n):
    # Midway between two bands, a channel of one octave is seen by these two alone.
    p = probability_correct(F, SD, bandwidth=1.0, centre=39.6, **KNOWN)
    (exact,) = fit_channels([n * p], n, F, SD)
    assert exact.channel.flags == ("bandwidth_open", "sensitivity_open")
    low, high = exact.intervals["bandwidth"]
    assert low == 0 and 1 < high < 2 and exact.intervals["sensitivity"][1] == np.inf
    fits = fit_channels(simulated(1.0, 39.6, n=n, sets=12), n, F, SD)
    ends = np.array([[f.intervals["bandwidth"][0], f.intervals["sensitivity"][1]] for f in fits])
    assert (np.isinf(ends[:, 1]) == (ends[:, 0] == 0)).all()
    assert (ends[:, 0] == 0).sum() > 8 and (ends[ends[:, 0] > 0, 0] > 0.8).all()
    for fit in fits:
        assert ("bandwidth_open" in fit.channel.flags) == (fit.intervals["bandwidth"][0] == 0)
    # On a band the next two tell where it ends.
    on = probability_correct(F, SD, bandwidth=1.0, centre=28.0, **KNOWN)
    assert fit_channels([300 * on], 300, F, SD)[0].channel.flags == ()


def test_profile_passes_a_ridge():
    def curve(theta):
        # Two parameters of which only the sum is seen, and that ever less.
        p = 0.5 + 0.4 * np.tanh(theta.sum(1, keepdims=True))
        return p, np.broadcast_to((0.4 / np.cosh(theta.sum(1)) ** 2)[:, None, None], (len(p), 1, 2))

    bounds = {"lower": [-9.0, -9.0], "upper": [9.0, 9.0]}
    low, high = profile_intervals(curve, [[0.0, 0.0]], [[50]], [100], (0, 1), **bounds)
    assert (low == -np.inf).all() and (high == np.inf).all()
    low, high = profile_intervals(
        curve, [[0.0, 0.0]], [[50]], [100], (0,), lower=[-9, 0], upper=[9, 0]
    )
    # With the other held, 2 (l(0.5) - l(p)) = 3.84 at p = 0.4028 and 0.5972.
    end = np.arctanh(0.0972 / 0.4)
    assert (low[0, 0], high[0, 0]) == pytest.approx((-end, end), abs=1e-3)


def test_draws_at_a_bound_make_open_ends():
    theta = np.tile([0.0, 5.0, 1.0], (100, 1)) + np.linspace(-0.1, 0.1, 100)[:, None]
    lower, upper = np.array([-7.0, -1.0, -2.0]), np.array([11.0, 9.0, 4.0])
    free = percentile_intervals(bounded_draws(theta, lower, upper))
    assert all(0 < low < high < np.inf for low, high in free.values())
    theta[:4, 2] = lower[2]
    stuck = bounded_draws(theta, lower, upper)
    ends = percentile_intervals(stuck)
    # The peak of an ever narrower channel has no end either.
    assert ends["bandwidth"] == (0, free["bandwidth"][1]) and ends["sensitivity"][1] == np.inf
    assert ends["centre"] == free["centre"]
    assert percentile_intervals(stuck, 0.9)["bandwidth"][0] > 1
    flags = told_open(Channel(1.0, 32.0, 1.0, ("centre_open", "flat")), ends).flags
    assert flags == ("bandwidth_open", "flat", "sensitivity_open")
    ratio = compare_channels(bounded_draws(theta[50:].repeat(2, 0), lower, upper), stuck)
    assert ratio["bandwidth"][2] == np.inf and 1 <= ratio["bandwidth"][1] < 1.1
    assert ratio["sensitivity"][1] == 0


def test_few_trials_leave_wide_intervals():
    width = {}
    for n in (2, 200):
        (fit,) = fit_channels(simulated(2.0, 30.0, n=n, seed=3), n, F, SD)
        width[n] = np.ptp(np.log2(fit.intervals["bandwidth"]))
    # A hundred times the trials make an interval about ten times narrower.
    assert 6 < width[2] / width[200] < 16


def test_flags_of_the_parametric_fit():
    flat = np.random.default_rng(0).binomial(30, 0.6, (1, 35))
    assert "flat" in fit_channels(flat, 30, F, SD)[0].channel.flags
    poor = simulated(2.0, 30.0, n=60, lapse=0.6)
    assert "below_half" in fit_channels(poor, 60, F, SD)[0].channel.flags
    none = fit_channels(simulated(2.0, 30.0, sensitivity=1e-3), 30, F, SD)[0]
    assert {"flat", "bandwidth_open"} <= set(none.channel.flags)


def test_maximum_is_that_of_a_general_optimiser():
    k = simulated(2.5, 25.0, n=25, seed=5)
    (fit,) = fit_channels(k, 25, F, SD, intervals=False)

    def loss(t):
        p = probability_correct(
            F, SD, bandwidth=np.exp(t[0]), centre=np.exp(t[1]), sensitivity=np.exp(t[2]),
            slope=np.exp(t[3]), lapse=1 / (1 + np.exp(-t[4])) * 0.9,
        )  # fmt: skip
        return -log_likelihood(p, k[0], np.full(35, 25))

    other = minimize(
        loss, np.log([2, 30, 1, 2, 0.1]), method="Nelder-Mead",
        options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-6, "fatol": 1e-9},
    )  # fmt: skip
    assert fit.log_likelihood == pytest.approx(-other.fun, abs=1e-5)
    assert fit.channel.bandwidth == pytest.approx(np.exp(other.x[0]), rel=1e-3)


def test_fit_binomial_holds_and_bounds():
    def curve(theta):
        p = 1 / (1 + np.exp(-theta))
        return p, (p * (1 - p))[:, :, None] * np.eye(2)

    theta, _ = fit_binomial(curve, [[0.0, 0.0]], [[3, 9]], [10, 10], lower=[-1, -1], upper=[5, 1])
    assert theta[0] == pytest.approx([np.log(0.3 / 0.7), 1.0], abs=1e-5)
    theta, _ = fit_binomial(
        curve, [[0.5, 0.0]], [[3, 9]], [10, 10], lower=[-1, -1], upper=[5, 5], fixed=[0]
    )
    assert theta[0] == pytest.approx([0.5, np.log(9)], abs=1e-5)
    with pytest.raises(SchemaError, match="between 0 and that of trials"):
        fit_binomial(curve, [[0.0, 0.0]], [[11, 9]], [10, 10], lower=[-1, -1], upper=[5, 1])


def test_from_trials():
    k = simulated(2.0, 30.0, n=40, seed=2)[0]
    trials = trials_of(k, 40)
    assert accuracy_matrix(trials).values == pytest.approx(k.reshape(5, 7) / 40)
    fit = fit_channel(trials)
    assert fit.n_trials == 1400 and fit.guess == 1 / 16
    same = fit_channels(k[None], 40, F, SD)[0].channel
    assert fit.channel.bandwidth == pytest.approx(same.bandwidth) and same.flags == ()
    with pytest.raises(SchemaError, match="'frequency' is missing"):
        fit_channel(trials.drop_vars("frequency"))
    with pytest.raises(SchemaError, match="3 bands or more"):
        fit_channel(trials.isel(trial=trials["frequency"].values < 5))


def test_trials_without_noise_need_no_band():
    k = simulated(2.0, 30.0, n=40, seed=2)[0]
    trials = trials_of(k, 40)
    free = trials.assign(frequency=trials["frequency"].where(trials["noise_sd"] > 0))
    assert fit_channel(free).channel.bandwidth == pytest.approx(
        fit_channel(trials).channel.bandwidth, rel=1e-4
    )
    clean = accuracy_matrix(free).sel(noise_sd=0).values
    assert clean == pytest.approx(np.full(7, k[:7].sum() / 280))


def test_thresholds_of_bands():
    n = 60
    trials = trials_of(simulated(2.0, 28.0, n=n, seed=4)[0], n)
    found = fit_thresholds(trials, n_bootstrap=100)
    true = 0.01 / (0.8 * 2.0 ** -((np.log2(np.array(FREQUENCIES) / 28)) ** 2))
    seen = (true > 0.01) & (true < 0.16)
    assert seen.sum() == 3
    assert (found["low"].values[seen] < true[seen]).all()
    assert (found["high"].values[seen] > true[seen]).all()
    assert found["threshold"].values[seen] == pytest.approx(true[seen], rel=0.35)
    # Noise of the lowest band never masks.
    assert np.isinf(found["high"].values[0]) and found["threshold"].values[0] > 0.3
    again = fit_thresholds(trials, n_bootstrap=100)
    assert again.identical(found)


def clustered(n_images, seed, *, between=2.0, repeats=6):
    """Return trials of a network: images differ in how much noise they bear, in all conditions."""
    rng = np.random.default_rng(seed)
    ease = 2.0 ** rng.normal(0, between, n_images)
    f, sd = np.tile(F, repeats), np.tile(SD, repeats)
    known = KNOWN | {"sensitivity": 0.4}
    p = np.stack(
        [probability_correct(f, sd / e, bandwidth=2.0, centre=30.0, **known) for e in ease]
    )
    category = np.repeat([f"c{i % 4}" for i in range(n_images)], len(f))
    return xr.Dataset(
        {
            "response": ("trial", category),
            "correct": ("trial", (rng.random(p.shape) < p).ravel()),
            "category": ("trial", category),
            "noise_sd": ("trial", np.tile(sd, n_images)),
            "frequency": ("trial", np.tile(f, n_images)),
        },
        coords={
            "subject": "net",
            "stimulus_id": ("trial", np.repeat([f"i{i}" for i in range(n_images)], len(f))),
        },
    )


def test_images_drawn_anew_tell_what_trials_alone_do_not():
    # What other sets of images would give is what the intervals must be as wide as.
    counts = np.stack([count_cells(clustered(12, s))["correct"].values for s in range(40)])
    cells = count_cells(clustered(12, 0))
    fits = fit_channels(
        counts, cells["n"].values, cells["frequency"].values, cells["noise_sd"].values,
        guess=0.25, intervals=False,
    )  # fmt: skip

    def half(values):
        """Half of where the middle 68 % lie: a standard deviation that tails do not move."""
        return np.subtract(*np.quantile(np.log2(values), [0.84, 0.16])) / 2

    spread = half([f.channel.sensitivity for f in fits])
    alone = np.mean(
        [np.ptp(np.log2(fit_channel(clustered(12, s)).intervals["sensitivity"])) for s in range(4)]
    )
    drawn = np.mean(
        [half(bootstrap_channel(clustered(12, s), n_bootstrap=40)["sensitivity"].values)
         for s in range(6)]
    )  # fmt: skip
    assert drawn == pytest.approx(spread, rel=0.35)
    # An interval of 95 % is 3.92 standard errors wide.
    assert alone / 3.92 < 0.6 * spread


def test_resampling_by_hand():
    trials = clustered(4, 0, repeats=1)
    draws = bootstrap_channel(trials, n_bootstrap=8, seed=3)
    assert bootstrap_channel(trials, n_bootstrap=8, seed=3).identical(draws)
    weight = np.random.default_rng([3, 0]).multinomial(4, np.full(4, 1 / 4), 8)[5]
    rows = np.concatenate([np.repeat(np.arange(35 * i, 35 * (i + 1)), w)
                           for i, w in enumerate(weight)])  # fmt: skip
    assert fit_channel(trials.isel(trial=rows), guess=0.25).channel.centre == pytest.approx(
        float(draws["centre"][5])
    )
    assert repeated_over(trials) == ("stimulus_id",)
    # Single trials, where nothing is named: alike to what the likelihood says.
    alone = trials_of(simulated(2.0, 30.0, n=40, seed=2)[0], 40)
    assert repeated_over(alone) == ()
    spread = np.log2(bootstrap_channel(alone, over=(), n_bootstrap=60)["centre"]).std()
    told = np.ptp(np.log2(fit_channel(alone).intervals["centre"]))
    assert float(spread) == pytest.approx(told / 3.92, rel=0.35)
    with pytest.raises(SchemaError, match="always 'net'"):
        bootstrap_channel(trials, over=("subject",))
    with pytest.raises(SchemaError, match="'place' is missing"):
        bootstrap_channel(trials, over=("place",))


def test_channels_compared():
    first = xr.Dataset({n: ("draw", [2.0, 4.0, 4.0]) for n in KEYS})
    second = xr.Dataset({n: ("draw", [1.0, 2.0, 1.0]) for n in KEYS})
    found = compare_channels(first, second, level=0.9)
    assert found["centre"][0] == pytest.approx(2) and 2 <= found["centre"][1] < found["centre"][2]
    with pytest.raises(SchemaError, match="3 draws cannot be compared with 2"):
        compare_channels(first, second.isel(draw=[0, 1]))


KEYS = ("bandwidth", "centre", "sensitivity")


def test_error_falls_with_the_number_of_trials():
    error = recovery_error(
        [350, 5600], bandwidth=2.0, centre=30.0, sensitivity=0.8, n_simulations=40
    )
    few, many = error["bandwidth"].values
    # Sixteen times the trials, a quarter of the error.
    assert 2.5 < few / many < 6.5 and many < 0.15
    assert (error["centre"].values < error["bandwidth"].values).all()
