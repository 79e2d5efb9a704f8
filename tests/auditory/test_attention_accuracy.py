"""Evaluation against values worked out by hand, and against simulation elsewhere."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import xarray as xr

from brainalign.auditory.evaluation import (
    accuracy_curve,
    chance_band,
    correlation_of_correlations,
    distinct_windows,
    effective_samples,
    expected_accuracy,
    expected_switch_duration,
    mesd,
    switch_curve,
    switch_latency,
    trial_interval,
)
from brainalign.auditory.trials import ListeningTrial
from brainalign.errors import ConfigError, SchemaError


def test_switch_duration_by_hand():
    # p = 4/5, r = 4: kbar(5) = floor(ln(4^5 / 5 + 4/5) / ln 4 + 1) = floor(4.84) = 4, and
    # 3/4 >= .65, so N = 5 and k_c = ceil(.65 * 4 + 1) = 4.
    h = [Fraction(285, 64), Fraction(205, 64), Fraction(105, 64)]
    total = sum(x / 4**i for i, x in enumerate(h, 1))
    exact = Fraction(4**5 - 4**4, 4**4 - 4) * total
    assert exact == Fraction(5485, 1344)
    assert expected_switch_duration(1.0, 0.8) == (pytest.approx(float(exact), rel=1e-12), 5, 4)
    assert expected_switch_duration(2.5, 0.8)[0] == pytest.approx(2.5 * float(exact))
    # Always right: k_c - 1 = 3 steps.
    assert expected_switch_duration(2.0, 1.0) == (pytest.approx(6.0, rel=1e-6), 5, 4)


def stationary(p, n):
    r = p / (1 - p)
    share = r ** np.arange(1, n + 1)
    return share / share.sum()


@pytest.mark.parametrize("p", [0.55, 0.6, 0.7, 0.9])
def test_switch_duration_is_the_chain_s(p):
    """Mean hitting times of the chain itself, from linear equations."""
    duration, n, target = expected_switch_duration(1.0, p)
    states = np.arange(1, target)  # below the target
    step = np.eye(len(states))
    for i, k in enumerate(states):
        up, down = i + 1, max(i - 1, 0)  # the lowest state stays where it is
        if k + 1 < target:
            step[i, up] -= p
        step[i, down] -= 1 - p
    hitting = np.linalg.solve(step, np.ones(len(states)))
    # From the other talker's stationary distribution, mirrored, among the states below the target.
    start = stationary(p, n)[::-1][: target - 1]
    assert duration == pytest.approx((start / start.sum()) @ hitting, rel=1e-9)

    # N is the smallest for which P0 of the time is spent at or above a state in the comfort region.
    def holds(size):
        tail = np.cumsum(stationary(p, size)[::-1])[::-1]
        lowest = max(k for k in range(1, size + 1) if tail[k - 1] >= 0.8 - 1e-12)
        return (lowest - 1) / (size - 1) >= 0.65

    assert holds(n) and (n == 5 or not holds(n - 1))


@pytest.mark.parametrize(("confidence", "comfort"), [(0.8, 0.65), (0.7, 0.31), (0.9, 0.9)])
def test_the_states_are_the_fewest(confidence, comfort):
    """As by trying one number after the other, in the paper's words."""
    for p in np.concatenate([0.5 + np.geomspace(1e-3, 0.1, 25), np.linspace(0.61, 0.99, 25)]):
        r, n = p / (1 - p), 5
        while True:
            inside = np.logaddexp(n * np.log(r) + np.log(1 - confidence), np.log(confidence))
            if (math.floor(inside / np.log(r) + 1) - 1) / (n - 1) >= comfort:
                break
            n += 1
        found = expected_switch_duration(1.0, p, confidence=confidence, comfort=comfort)
        assert found[1] == n
        i = np.arange(1, found[2])
        h = (found[2] - i) / (2 * p - 1) + p * (r ** -float(found[2]) - r**-i) / (2 * p - 1) ** 2
        assert found[0] == pytest.approx((r**-i * h).sum() / (r**-i).sum(), rel=1e-8)


def test_switch_duration_next_to_chance():
    """States grow as the inverse of the distance from one half, seconds as its square."""
    near = mesd([1, 2], [0.4999, 0.5001])
    assert (near.length, near.accuracy) == (2, 0.5001)
    one, ten = (expected_switch_duration(1.0, 0.5 + d) for d in (1e-7, 1e-6))
    assert one[1] == pytest.approx(10 * ten[1], rel=1e-5)
    assert one[0] == pytest.approx(100 * ten[0], rel=1e-4)
    assert 1e25 < mesd([1, 2], [0.5, 0.5000000000000002]).duration < math.inf
    assert mesd([1, 2], [0.5, np.nextafter(0.5, 1)]).n_states > 2**52


def test_mesd_is_the_minimum_over_the_curve():
    one = mesd([4.0], [0.8])
    assert one.duration == pytest.approx(4 * 5485 / 1344) and (one.n_states, one.target) == (5, 4)
    # The linear decoder's published curve of the DTU recordings, whose published MESD is 12.2 s:
    # that is the mean of single subjects', the curve here their mean accuracy.
    lengths, accuracy = [1, 2, 5, 10, 20, 40], [0.606, 0.666, 0.746, 0.811, 0.869, 0.923]
    found = mesd(lengths, accuracy)
    grid = np.linspace(1, 40, 1000)
    each = [expected_switch_duration(t, np.interp(t, lengths, accuracy))[0] for t in grid]
    assert found.duration == pytest.approx(min(each)) and 10 < found.duration < 25
    assert mesd(lengths[::-1], accuracy[::-1]) == found
    assert math.isinf(mesd([1, 2], [0.5, 0.4]).duration)
    assert mesd([1, 2, 4], [0.3, 0.45, 0.8]).accuracy > 0.5
    for lengths, accuracy in (([1, 1], [0.6, 0.7]), ([0, 1], [0.6, 0.7]), ([1, 2], [60, 70])):
        with pytest.raises(ConfigError):
            mesd(lengths, accuracy)
    with pytest.raises(ConfigError, match="shape"):
        mesd([1], [0.6, 0.7])
    with pytest.raises(ConfigError, match="above 0.5"):
        expected_switch_duration(1.0, 0.5)


def test_chance_band():
    # P(X <= 1) = 11/1024, P(X <= 2) = 56/1024 of 10: the 2.5 % quantile is 2.
    assert chance_band(10) == (0.2, 0.8)
    low, high = chance_band(10_000)
    assert high - low == pytest.approx(2 * 1.96 * 0.005, rel=0.02)
    assert chance_band(1000, chance=0.25)[1] < 0.29
    with pytest.raises(ConfigError):
        chance_band(0)


def test_windows_without_overlap():
    # 0, 1, 2, 3, 4 s of 2 s each: three fit into trial a; b has a gap.
    starts, trial = [0, 1, 2, 3, 4, 0, 5], list("aaaaabb")
    assert distinct_windows(starts, trial, 2) == 5
    assert distinct_windows([0.0, 0.1, 0.2, 0.30000000000000004], list("aaaa"), 0.1) == 4


def test_trials_are_resampled_not_windows():
    """Trials all right or all wrong: the interval is that of as many coins as there are trials."""
    correct = np.repeat([1, 0] * 20, 50)
    trial = np.repeat(np.arange(40), 50)
    low, high = trial_interval(correct, trial, n_bootstrap=4000)
    assert (low, high) == (pytest.approx(0.345, abs=0.02), pytest.approx(0.655, abs=0.02))
    low, high = trial_interval(correct, np.arange(2000))
    assert high - low < 0.05
    assert all(math.isnan(v) for v in trial_interval([1, 0], ["a", "a"]))
    with pytest.raises(SchemaError):
        trial_interval([1, 0], ["a"])


def test_curve_counts_ties_as_guesses_and_leaves_switches_out():
    scores = xr.Dataset(
        {"score": (("window", "talker"), [[1.0, 0], [0, 1], [1, 1], [0, 1], [9, 0]])},
        coords={
            "length": ("window", [2.0, 2, 2, 2, 4]),
            "start": ("window", [0.0, 2, 0, 2, 0]),
            "trial": ("window", list("aabba")),
            "subject": ("window", ["s"] * 5),
            "attended": ("window", [0, 0, 1, -1, 0]),
        },
    )
    curve = accuracy_curve(scores)
    assert curve["length"].values.tolist() == [2, 4]
    assert curve["accuracy"].values.tolist() == [0.5, 1]
    assert curve["n_windows"].values.tolist() == [3, 1] and curve["n_trials"].values[0] == 2
    with pytest.raises(SchemaError, match="No window"):
        accuracy_curve(scores.isel(window=[3]))


def test_switch_latency():
    time = np.arange(10.0)
    decision = [0, 0, 0, 1, 0, 1, 1, 1, 0, 0]
    found = switch_latency(time, decision, [1.5, 7.5], [1, 0], hold=2)
    assert found.tolist() == [3.5, 0.5]
    assert switch_latency(time, decision, [1.5], [1], hold=1).tolist() == [1.5]
    assert np.isnan(switch_latency(time, decision, [7.5], [0], hold=3)).all()
    with pytest.raises(SchemaError, match="ascend"):
        switch_latency(time[::-1], decision, [1.0], [1])


def test_switches_are_followed():
    """Windows of 2 s every second, decided a second later: one trial follows, one does not."""
    attended = np.repeat([0, 1], 8)
    trials = [
        ListeningTrial(np.zeros((16, 1)), {"envelope": np.zeros((2, 16, 1))}, attended, 1.0, n, "s")
        for n in "ab"
    ]
    start = np.arange(15.0)
    followed = start + 2 + 1 >= 11
    followed[3] = True  # Once is not enough.
    right = np.concatenate([followed, np.zeros(15, dtype=bool)])
    scores = xr.Dataset(
        {"score": (("window", "talker"), np.stack([~right, right], axis=1).astype(float))},
        coords={
            "length": ("window", np.full(30, 2.0)),
            "start": ("window", np.tile(start, 2)),
            "trial": ("window", np.repeat(["a", "b"], 15)),
            "subject": ("window", np.full(30, "s")),
        },
        attrs={"look_ahead": 1.0},
    )
    found = switch_curve(scores, trials)
    assert found["latency"].values.tolist() == [np.inf] and found["followed"].values == 0.5
    assert (
        found["latency_low"] == 3 and np.isinf(found["latency_high"]) and found["n_switches"] == 2
    )
    np.testing.assert_array_equal(found["since"], np.arange(10))
    np.testing.assert_array_equal(found["share"][0], np.where(np.arange(10) < 3, 0, 0.5))
    first = switch_curve(scores.isel(window=slice(15)), trials)
    assert first["latency"] == 3 and first["followed"] == 1 and np.isnan(first["latency_low"])
    with pytest.raises(SchemaError, match="Trial 'b' of 's' was scored"):
        switch_curve(scores, trials[:1])
    with pytest.raises(SchemaError, match="shorter hop"):
        switch_curve(scores.isel(window=slice(None, None, 2)), trials)
    # The windows after the switch of one trial are missing: only the other one is judged.
    start = scores["start"].values
    marked = (np.arange(30) >= 15) & (start > 6) & (start < 9)
    part = switch_curve(scores.isel(window=~marked), trials)
    assert part["latency"] == 3 and part["n_switches"] == 1 and part["followed"] == 1
    marked = (start > 6) & (start < 9)
    assert switch_curve(scores.isel(window=~marked), trials).sizes["length"] == 0
    # Attention stays for 8 s: too short to follow windows of 5 s, and to hold.
    longer = switch_curve(scores.assign_coords(length=scores["length"] + 3), trials)
    assert longer.sizes == {"length": 0, "since": 0}
    with pytest.raises(SchemaError, match="never switches"):
        switch_curve(scores, [t.cut(0, 8) for t in trials])


def test_effective_samples_of_known_series():
    """First-order autoregressions: N (1 - a b) / (1 + a b)."""
    from scipy.signal import lfilter

    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 200_000))
    x, y = lfilter([1], [1, -0.9], noise[0]), lfilter([1], [1, -0.7], noise[1])
    share = effective_samples(x, y, max_lag=200) / len(x)
    assert share == pytest.approx((1 - 0.63) / (1 + 0.63), rel=0.03)
    assert effective_samples(noise[0], y, max_lag=200) == pytest.approx(len(y), rel=0.03)
    with pytest.raises(SchemaError):
        effective_samples(np.ones(10), np.arange(10))


def test_correlation_of_correlations_and_accuracy_in_samples():
    """Both formulas beside many draws of correlated Gaussians."""
    r_a, r_u, r_au, n = 0.45, 0.15, 0.3, 60
    rng = np.random.default_rng(1)
    mix = np.linalg.cholesky([[1, r_a, r_u], [r_a, 1, r_au], [r_u, r_au, 1]])
    z = rng.standard_normal((20_000, n, 3)) @ mix.T
    z -= z.mean(axis=1, keepdims=True)
    z /= np.sqrt((z**2).sum(axis=1, keepdims=True))
    a, u = (z[..., 0] * z[..., 1]).sum(axis=1), (z[..., 0] * z[..., 2]).sum(axis=1)
    c = correlation_of_correlations(r_a, r_u, r_au)
    assert c == pytest.approx(np.corrcoef(a, u)[0, 1], abs=0.02)
    found = expected_accuracy(r_a, r_u, n, r_talkers=r_au)
    assert found == pytest.approx((a > u).mean(), abs=0.01)
    assert expected_accuracy(0.3, 0.3, 50) == 0.5 and expected_accuracy(0.9, 0, 3) == 0.5
    # By hand: c = 0 without correlations to 0, z = artanh(.3) sqrt(97) / sqrt 2.
    by_hand = 0.5 * (1 + math.erf(math.atanh(0.3) * math.sqrt(97) / 2))
    assert expected_accuracy(0.3, 0.0, 100) == pytest.approx(by_hand)
    with pytest.raises(SchemaError):
        expected_accuracy(1.0, 0.0, 50)
