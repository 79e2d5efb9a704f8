"""Scores, ceilings, permutation tests and intervals against known truths."""

from __future__ import annotations

import logging
import warnings

import h5py
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from brainalign.errors import ConfigError, SchemaError
from brainalign.evaluation import (
    bootstrap_ci,
    bootstrap_counts,
    bootstrap_r,
    fdr,
    kept_variance,
    leave_one_subject_out,
    linear_cka,
    max_statistic_p,
    ncsnr,
    noise_ceiling,
    normalised_score,
    pearson_r,
    permutation_p,
    permutation_test,
    r2,
    significance,
    simulated_ceiling,
    split_half,
    undefined,
)
from brainalign.evaluation.significance import percentiles, permutation_rows


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(3, 30),
    t=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_scores_agree_with_scipy_and_sklearn(n, t, seed, offset):
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((n, t)) + offset
    p = 0.5 * (y - offset) + rng.standard_normal((n, t))
    expected = [scipy.stats.pearsonr(a, b).statistic for a, b in zip(y.T, p.T, strict=True)]
    np.testing.assert_allclose(pearson_r(y, p), expected, atol=1e-9)
    np.testing.assert_allclose(r2(y, p), r2_score(y, p, multioutput="raw_values"), rtol=1e-7)
    zero = 1 - ((y - p) ** 2).sum(0) / (y**2).sum(0)
    np.testing.assert_allclose(r2(y, p, baseline=0.0), zero, rtol=1e-9)


def test_undefined_targets_are_nan_and_counted(caplog):
    rng = np.random.default_rng(0)
    y, p = rng.standard_normal((2, 20, 6))
    y[:, 1] = 0.1  # constant; its mean is not exactly 0.1
    y[:, 2] = np.nan
    p[3, 3] = np.inf
    p[:, 4] = -2.0
    with caplog.at_level(logging.WARNING):
        r = pearson_r(y, p)
    assert np.isnan(r).tolist() == [False, True, True, True, True, False]
    assert "4 of 6 targets" in caplog.text
    assert undefined(y, p).sum() == 4
    assert np.isnan(r2(y, p)).tolist() == [False, True, True, True, False, False]
    with pytest.raises(SchemaError, match="shape"):
        pearson_r(y, p[:, :2])


def simulate(n_stimuli, repeats, snr, t, seed):
    rng = np.random.default_rng(seed)
    k = np.broadcast_to(repeats, n_stimuli)
    ids = np.repeat(np.arange(n_stimuli), k).astype(str)
    signal = snr * rng.standard_normal((n_stimuli, t))
    y = np.repeat(signal, k, axis=0) + rng.standard_normal((len(ids), t))
    return signal, y, ids, k


@pytest.mark.parametrize("snr", [0.3, 1.0, 2.0])
def test_ncsnr_and_ceiling_recover_truth_with_mixed_repeats(snr):
    repeats = np.tile([1, 2, 3], 100)
    signal, y, ids, k = simulate(300, repeats, snr, 200, 1)
    got = ncsnr(y, ids)
    assert abs(np.mean(got**2) - snr**2) < 0.04 * max(1, snr**2)
    truth = snr**2 / (snr**2 + np.mean(1 / k))
    assert abs(noise_ceiling(got, k).mean() - truth) < 0.02
    means = np.stack([y[ids == s].mean(0) for s in np.unique(ids)])
    order = np.unique(ids).astype(int)
    reached = pearson_r(means, signal[order]) ** 2
    assert abs(reached.mean() - truth) < 0.02


def test_ceilings_of_two_kinds_agree_and_null_is_zero():
    _, y, ids, _ = simulate(200, 4, 0.7, 100, 2)
    by_ncsnr = noise_ceiling(ncsnr(y, ids), 4)
    by_halves = split_half(y, ids, n_splits=20)
    truth = 0.49 / (0.49 + 0.25)
    assert abs(by_ncsnr.mean() - truth) < 0.02
    assert abs(by_halves.mean() - truth) < 0.02
    _, null, ids, _ = simulate(200, 4, 0.0, 100, 3)
    assert noise_ceiling(ncsnr(null, ids), 4).mean() < 0.06
    assert split_half(null, ids).mean() < 0.06


def test_ncsnr_edges():
    assert noise_ceiling(np.inf, 1) == 1
    np.testing.assert_array_equal(ncsnr(np.array([1.0, 1, 2, 2]), list("aabb")), [np.inf])
    assert np.isnan(ncsnr(np.ones(4), list("aabb"))).all()
    # A mean of equal numbers need not be that number.
    assert np.isnan(ncsnr(np.full(30, 0.1), np.repeat(np.arange(10), 3))).all()
    with pytest.raises(SchemaError, match="No stimulus is repeated among 3"):
        ncsnr(np.ones((3, 2)), list("abc"))
    with pytest.raises(ConfigError):
        noise_ceiling(1.0, [1, 0])


def test_leave_one_subject_out_brackets_the_truth():
    rng = np.random.default_rng(4)
    truth = rng.standard_normal((400, 30))
    subjects = truth + 0.8 * rng.standard_normal((6, 400, 30))
    reached = np.array([pearson_r(s, truth) for s in subjects])
    for units, score in (("r", reached), ("r2", reached**2)):
        lower, upper, n = leave_one_subject_out(subjects, units=units)
        assert (lower.mean() < score.mean()) and (score.mean() < upper.mean())
        assert (n == 6).all()
        # Signal variance 1, noise 0.64 in a subject, 0.64 / 5 in the others' mean, 0.64 / 6 in all.
        expected = np.array([1 / 1.64 / (1 + 0.64 / 5), (1 + 0.64 / 6) / 1.64])
        expected = np.sqrt(expected) if units == "r" else expected
        np.testing.assert_allclose([lower.mean(), upper.mean()], expected, atol=0.01)


def test_leave_one_subject_out_takes_those_that_have_a_neuroid():
    rng = np.random.default_rng(5)
    subjects = rng.standard_normal((50, 4)) + rng.standard_normal((5, 50, 4))
    holes = subjects.copy()
    holes[1, :, 0] = np.nan
    holes[2, 7, 0] = np.inf
    holes[3, :, 1] = 0.1
    holes[1:, :, 2] = np.nan
    lower, upper, n = leave_one_subject_out(holes)
    assert n.tolist() == [3, 4, 1, 5]
    for v, who in ((0, [0, 3, 4]), (1, [0, 1, 2, 4]), (3, range(5))):
        alone = leave_one_subject_out(subjects[list(who)][:, :, v])
        np.testing.assert_allclose([lower[v], upper[v]], [alone.lower[0], alone.upper[0]])
    assert np.isnan([lower[2], upper[2]]).all()
    with pytest.raises(SchemaError, match=r"differ in shape: \[\(50, 4\), \(49, 4\)\]"):
        leave_one_subject_out([subjects[0], subjects[1, 1:]])
    with pytest.raises(SchemaError, match="at least two subjects and three"):
        leave_one_subject_out(subjects[:1])
    with pytest.raises(ConfigError, match="'r' or 'r2'"):
        leave_one_subject_out(subjects, units="z")


def test_simulated_ceiling_of_kay_and_yeatman(mirror):
    with h5py.File(mirror / "kay2017_vwfa_ffa" / "model_template.mat") as f:
        data, se, stored = (np.array(f[k]).T for k in ("data", "datase", "nc"))
    ceiling = 100 * simulated_ceiling(data, se, seed=0)
    np.testing.assert_allclose(ceiling, stored.ravel(), atol=0.1)


def test_simulated_ceiling_about_the_mean_is_the_variance_ratio():
    rng = np.random.default_rng(5)
    y = 3 + 2 * rng.standard_normal(500)
    got = simulated_ceiling(y, np.full(500, 1.0), relative_to="mean", n_simulations=500)
    assert abs(got[0] - (y.var() - 1) / y.var()) < 0.01


def test_normalised_score_keeps_sign_and_counts_exclusions():
    value, n = normalised_score([0.6, -0.6, 0.3, 0.2], [0.72, 0.72, 0.05, np.nan])
    np.testing.assert_allclose(value, [0.5, -0.5, np.nan, np.nan])
    assert n == 2


def test_p_values_are_never_zero_and_uniform_under_the_null():
    assert permutation_p(0, 999) == 1 / 1000
    rng = np.random.default_rng(6)
    y, p = rng.standard_normal((2, 40, 1500))
    test = permutation_test(y, p, n_permutations=499, seed=1)
    assert scipy.stats.kstest(test.p, "uniform").pvalue > 0.01
    assert abs((test.p <= 0.05).mean() - 0.05) < 0.015


@pytest.mark.filterwarnings("ignore:Rows in blocks")
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 40),
    t=st.integers(1, 9),
    scheme=st.sampled_from(["stimuli", "circular", "block"]),
    grouped=st.booleans(),
    ties=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_permutations_in_batches_are_the_plain_loop(n, t, scheme, grouped, ties, single, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.standard_normal((2, n, t))
    if ties:  # Few values: permutations often give exactly the observed correlation.
        y, p = np.sign(y), np.sign(p)
        y[0], p[0], y[1:4], p[1:4] = 2, 2, -1, 1
    if single:
        y, p = y.astype(np.float32), p.astype(np.float32)
    block = 2 if scheme == "block" else 1
    options = {"scheme": scheme, "block": block, "groups": np.arange(n) % 2 if grouped else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "_TARGETS_AT_ONCE", 4)
        patch.setattr(significance, "_ROWS_AT_ONCE", 7)
        patch.setattr(significance, "_GATHERED", {"cpu": 7 * 6})
        got = permutation_test(y, p, n_permutations=30, seed=seed, device="cpu", **options)
    a, b = (m.astype(np.float64) - m.mean(axis=0, dtype=np.float64) for m in (y, p))
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    null = np.array(
        [(a[order] * b).sum(axis=0) for order in permutation_rows(n, 30, seed=seed, **options)]
    )
    observed = pearson_r(y, p)
    np.testing.assert_array_equal(got.p, permutation_p((null >= observed - 1e-12).sum(axis=0), 30))
    np.testing.assert_allclose(got.null_max, null.max(axis=1), atol=1e-13)
    np.testing.assert_array_equal(got.p_max, max_statistic_p(observed, null.max(axis=1)))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    y = np.random.default_rng(0).standard_normal((10, 2))
    with pytest.raises(ConfigError, match="cannot use device"):
        permutation_test(y, y, device="cuda")
    assert permutation_test(y, y, n_permutations=9, device="auto").p.shape == (2,)
    with pytest.raises(ConfigError, match="needs at least 2 rows"):
        permutation_test(np.ones((3, 1)), np.ones((3, 1)), groups=[0, 0, 1])


def autoregressive(rng, n, t, coefficient=0.9):
    x = rng.standard_normal((n + 100, t))
    for i in range(1, n + 100):
        x[i] += coefficient * x[i - 1]
    return x[100:]


@pytest.mark.parametrize("n", [150, 400])
def test_circular_shifts_hold_for_time_series_where_free_exchange_does_not(n):
    """Each study has its own shifts: rejections of targets that share them are not independent."""
    rng = np.random.default_rng(7)
    rates = {"circular": [], "stimuli": []}
    for seed in range(10):
        y, p = autoregressive(rng, n, 200), autoregressive(rng, n, 200)
        for scheme, rate in rates.items():
            test = permutation_test(y, p, n_permutations=99, scheme=scheme, seed=seed)
            rate.append((test.p <= 0.05).mean())
    assert np.mean(rates["stimuli"]) > 0.2
    assert 0.035 < np.mean(rates["circular"]) < 0.07


def test_circular_shifts_of_rows_in_a_ring_are_exact():
    rng = np.random.default_rng(8)
    smooth = np.exp(-np.minimum(np.arange(60), 60 - np.arange(60)) / 6)
    smooth = np.fft.rfft(smooth)[:, None]
    y, p = (
        np.fft.irfft(smooth * np.fft.rfft(rng.standard_normal((60, 4000)), axis=0), n=60, axis=0)
        for _ in range(2)
    )
    rates = [
        (permutation_test(a, b, n_permutations=99, scheme="circular", seed=i).p <= 0.05).mean()
        for i, (a, b) in enumerate(
            zip(np.split(y, 20, axis=1), np.split(p, 20, axis=1), strict=True)
        )
    ]
    assert abs(np.mean(rates) - 0.05) < 0.015


def test_long_blocks_hold_for_time_series_and_few_blocks_are_warned_of():
    rng = np.random.default_rng(7)
    y, p = autoregressive(rng, 800, 300), autoregressive(rng, 800, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = permutation_test(y, p, n_permutations=199, scheme="block", block=40)
    assert (test.p <= 0.05).mean() < 0.09
    with pytest.warns(UserWarning, match="Blocks of 4 rows keep"):
        short = permutation_test(y, p, n_permutations=199, scheme="block", block=4)
    assert (short.p <= 0.05).mean() > 0.12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = rng.standard_normal((2, 800, 300))
        permutation_test(*noise, n_permutations=9, scheme="block", block=4)
    with pytest.warns(UserWarning, match="make 19 blocks"):
        permutation_test(y[:760], p[:760], n_permutations=9, scheme="block", block=40)


def test_variance_that_blocks_keep():
    rng = np.random.default_rng(3)
    y, p = autoregressive(rng, 4000, 50, 0.8), autoregressive(rng, 4000, 50, 0.8)
    a, lags = 0.8**2, np.arange(1, 20)
    expected = (1 + 2 * ((1 - lags / 20) * a**lags).sum()) / ((1 + a) / (1 - a))
    assert abs(kept_variance(y, p, 20) - expected) < 0.05
    assert kept_variance(y, p, 4000) == pytest.approx(1)


def test_permuted_rows_stay_in_their_group_and_keep_neighbours():
    runs = np.repeat([0, 1, 2], 24)
    for scheme in ("stimuli", "circular", "block"):
        block = 3 if scheme == "block" else 1
        for order in permutation_rows(72, 20, scheme=scheme, block=block, groups=runs, seed=0):
            np.testing.assert_array_equal(runs[order], runs)
            np.testing.assert_array_equal(np.sort(order), np.arange(72))
    shifts = set()
    for order in permutation_rows(12, 300, scheme="circular", seed=0):
        shifts.add(int(order[0]))
        np.testing.assert_array_equal(order, (np.arange(12) + order[0]) % 12)
    assert shifts == set(range(12))  # none is left out, not even those near 0
    with pytest.raises(ConfigError, match="at least 6 rows"):
        list(permutation_rows(5, 1, scheme="block", block=3))
    with pytest.raises(ConfigError, match="Leave block out"):
        list(permutation_rows(60, 1, scheme="circular", block=3))
    with pytest.raises(ConfigError, match="at least 1"):
        list(permutation_rows(60, 1, scheme="block", block=0))


def test_maximum_statistic_holds_the_family_wise_rate():
    rng = np.random.default_rng(8)
    rejected = 0
    for seed in range(100):
        y, p = rng.standard_normal((2, 25, 30))
        rejected += (permutation_test(y, p, n_permutations=99, seed=seed).p_max <= 0.05).any()
    assert rejected <= 12
    np.testing.assert_allclose(
        max_statistic_p([0.5, 0.1, np.nan], [0.2, 0.3, 0.1, 0.4]), [0.2, 1.0, np.nan]
    )


def test_false_discovery_rate_is_held_and_nan_is_not_counted():
    rng = np.random.default_rng(9)
    share, power = [], []
    for _ in range(300):
        z = rng.standard_normal(200)
        z[:40] += 3
        q = fdr(scipy.stats.norm.sf(z))
        found = q <= 0.1
        share.append(found[40:].sum() / max(1, found.sum()))
        power.append(found[:40].mean())
    assert np.mean(share) < 0.1
    assert np.mean(power) > 0.5
    p = np.array([0.01, np.nan, 0.04, 0.02])
    np.testing.assert_allclose(fdr(p)[[0, 2, 3]], fdr(p[[0, 2, 3]]))
    assert np.isnan(fdr(p)[1])


def test_weighted_bootstrap_of_r_is_that_of_resampled_rows():
    rng = np.random.default_rng(10)
    y = rng.standard_normal((15, 4)) + 50
    p = y + rng.standard_normal((15, 4))
    counts = bootstrap_counts(15, 20, seed=1)
    assert (counts.sum(axis=1) == 15).all()
    got = bootstrap_r(y, p, counts)
    for c, row in zip(counts, got, strict=True):
        rows = np.repeat(np.arange(15), c.astype(int))
        np.testing.assert_allclose(row, pearson_r(y[rows], p[rows]), atol=1e-10)
    grouped = bootstrap_counts(6, 50, groups=list("aabbcc"), seed=0)
    np.testing.assert_array_equal(grouped[:, ::2], grouped[:, 1::2])
    lonely = np.zeros((1, 15))
    lonely[0, 3] = 15
    assert np.isnan(bootstrap_r(y, p, lonely)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_bootstrap_in_float32_is_that_in_float64(n, t, seed):
    rng = np.random.default_rng(seed)
    y = (rng.standard_normal((n, t)) + 100).astype(np.float32)
    y[: n - 1, 0] = y[0, 0]  # Many samples are constant in this target, or all but.
    p = (y + rng.standard_normal((n, t))).astype(np.float32)
    counts = bootstrap_counts(n, 60, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "_TARGETS_AT_ONCE", 5)
        short = bootstrap_r(y, p, counts, device="cpu")
    exact = bootstrap_r(y.astype(np.float64), p.astype(np.float64), counts, device="cpu")
    np.testing.assert_allclose(short, exact, atol=2e-5)
    for row, c in zip(exact, counts, strict=True):
        rows = np.repeat(np.arange(n), c.astype(int))
        np.testing.assert_allclose(row, pearson_r(y[rows], p[rows]), atol=1e-6)


def test_bootstrap_interval_covers_the_correlation():
    rng = np.random.default_rng(14)
    rho, n, t = 0.4, 80, 600
    y = rng.standard_normal((n, t))
    p = rho * y + np.sqrt(1 - rho**2) * rng.standard_normal((n, t))
    low, high = percentiles(bootstrap_r(y, p, bootstrap_counts(n, 500, seed=0)), 0.95)
    # The percentile interval of r is known to be a little narrow at this size.
    assert 0.92 < np.mean((low <= rho) & (rho <= high)) < 0.97


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(200):
        x = rng.exponential(size=50)
        interval = bootstrap_ci(np.mean, x, n_bootstrap=200, seed=seed)
        covered += interval.low <= 1 <= interval.high
    assert 0.86 < covered / 200 < 0.99


@pytest.mark.parametrize("value", [0.1, 1e5 + 0.1])
@pytest.mark.parametrize("n", [12, 30, 999])
def test_constant_values_have_no_reliability(n, value):
    y = np.random.default_rng(0).standard_normal((n, 2))
    y[:, 0] = value
    ids = np.arange(n) // 3
    for found in (ncsnr(y, ids), split_half(y, ids)):
        np.testing.assert_array_equal(np.isnan(found), [True, False])


def test_cka():
    rng = np.random.default_rng(12)
    X = rng.standard_normal((50, 200))
    rotation = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    assert linear_cka(X, 3 * X @ rotation + 1) == pytest.approx(1)
    Y = rng.standard_normal((50, 300))
    assert linear_cka(X, Y, debiased=False) > 0.5
    null = [linear_cka(X, rng.standard_normal((50, 300))) for _ in range(20)]
    assert abs(np.mean(null)) < 0.05
    centre = np.eye(50) - 1 / 50
    K, L = centre @ X @ X.T @ centre, centre @ Y @ Y.T @ centre
    biased = np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert linear_cka(X, Y, debiased=False) == pytest.approx(biased)
    with pytest.raises(SchemaError, match="at least 4"):
        linear_cka(X[:3], Y[:3])


def test_debiased_hsic_is_unbiased_over_permutations():
    # The average of the unbiased statistic over all pairings of the rows is exactly 0.
    from itertools import permutations

    rng = np.random.default_rng(13)
    X, Y = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    values = [linear_cka(X, Y[list(order)]) for order in permutations(range(5))]
    assert abs(np.mean(values)) < 1e-10


@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_split_half_estimates_the_reliability_of_all_repeats(repeats):
    rng = np.random.default_rng(repeats)
    n = 4000
    signal = rng.standard_normal((n, 1, 8))
    y = (signal + rng.standard_normal((n, repeats, 8))).reshape(-1, 8)
    found = split_half(y, np.repeat(np.arange(n), repeats), n_splits=10)
    np.testing.assert_allclose(found.mean(), repeats / (repeats + 1), atol=0.01)
