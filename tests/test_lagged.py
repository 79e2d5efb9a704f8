"""Lagged models: exact Gram matrices, agreement with scikit-learn and mTRFpy, known responses."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gamma
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.model_selection import ShuffleSplit
from sklearn.utils.estimator_checks import parametrize_with_checks

from brainalign.errors import ConfigError
from brainalign.linear import (
    LaggedRidge,
    RankWarning,
    TimeBlocks,
    delayed,
    delays,
    lagged_cross,
    lagged_gram,
    lagged_kernel,
    lagged_predict,
    solvers,
)
from brainalign.linear import lagged as module

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")
ALPHAS = (0.1, 3.0, 50.0, 2000.0)


def explicit(x, lags):
    """Delayed data one element at a time, as the definition says."""
    x = np.asarray(x, dtype=np.float64)
    n, p = x.shape
    out = np.zeros((n, p, len(lags)))
    for i, lag in enumerate(lags):
        for s in range(max(0, lag), min(n, n + lag)):
            out[s, :, i] = x[s - lag]
    return out.reshape(n, -1)


def problem(lengths, p, t, lags, seed, *, noise=1.0, offset=0.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    coef = rng.standard_normal((p * len(lags), t)) * np.logspace(-1, 0.5, t)
    X = [rng.standard_normal((n, p)).cumsum(axis=0) / 3 + offset for n in lengths]
    Y = [explicit(x, lags) @ coef for x in X]
    Y = [y + noise * rng.standard_normal(y.shape) * y.std() + offset for y in Y]
    return [x.astype(dtype) for x in X], [y.astype(dtype) for y in Y]


def pink(rng, n, columns):
    """1/f noise of unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal((n, columns)), axis=0)
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))[:, None]
    spectrum[0] = 0
    x = np.fft.irfft(spectrum, n=n, axis=0)
    return x / x.std(axis=0)


lag_sets = st.one_of(
    st.tuples(st.integers(-6, 6), st.integers(0, 8)).map(lambda a: list(range(a[0], sum(a) + 1))),
    st.lists(st.integers(-9, 9), min_size=1, max_size=5, unique=True).map(sorted),
)
trial_sets = st.lists(st.integers(1, 25), min_size=1, max_size=4)


def test_delays_are_whole_samples_and_inclusive():
    assert delays(0, 0.4, 100).tolist() == list(range(41))
    assert delays(-0.1, 0.29, 100).tolist() == list(range(-10, 30))
    assert delays(-0.015, 0.015, 100).tolist() == [-2, -1, 0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(trials=trial_sets, lags=lag_sets, p=st.integers(1, 3), t=st.integers(1, 4))
def test_products_are_those_of_the_delayed_data(trials, lags, p, t):
    rng = np.random.default_rng(len(trials) + p)
    X = [torch.as_tensor(rng.standard_normal((n, p)) + 2) for n in trials]
    Y = [torch.as_tensor(rng.standard_normal((n, t))) for n in trials]
    D = [explicit(x, lags) for x in X]
    for x, d in zip(X, D, strict=True):
        np.testing.assert_array_equal(delayed(x, lags), d)
    gram = sum(d.T @ d for d in D)
    scale = max(1.0, np.abs(gram).max())
    np.testing.assert_allclose(lagged_gram(X, lags), gram, rtol=0, atol=1e-12 * scale)
    cross = sum(d.T @ y.numpy() for d, y in zip(D, Y, strict=True))
    np.testing.assert_allclose(lagged_cross(X, Y, lags), cross, rtol=0, atol=1e-12 * scale)
    stacked = np.concatenate(D)
    np.testing.assert_allclose(
        lagged_kernel(X, lags), stacked @ stacked.T, rtol=0, atol=1e-12 * scale
    )
    coef = torch.as_tensor(rng.standard_normal((t, p, len(lags))))
    b = torch.as_tensor(rng.standard_normal(t))
    np.testing.assert_allclose(
        lagged_predict(X[0], coef, lags, b),
        D[0] @ coef.flatten(1).T.numpy() + b.numpy(),
        rtol=0,
        atol=1e-12 * scale,
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    lags=lag_sets,
    p=st.integers(1, 3),
)
def test_part_of_a_trial_sees_its_neighbours(n, cut, lags, p):
    a, b = sorted(round(c * n) for c in cut)
    x = np.random.default_rng(n).standard_normal((n, p))
    rows = explicit(x, lags)[a:b]
    got = module._gram([(torch.as_tensor(x), a, b)], np.array(lags))
    np.testing.assert_allclose(got, rows.T @ rows, rtol=0, atol=1e-11)
    np.testing.assert_allclose(
        module._total(torch.as_tensor(x), np.array(lags), a, b), rows.sum(0), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lags", [range(-5, 28), range(0, 66, 2), range(-40, 0)])
@pytest.mark.parametrize("held", [10**9, 0])
def test_spectra_give_the_same_cross_covariances(dtype, lags, held, monkeypatch):
    monkeypatch.setattr(module, "FFT_SAMPLES", 700)  # several pieces
    monkeypatch.setattr(module, "SPECTRUM_ELEMENTS", held)
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.standard_normal((1501, 3)), dtype=dtype)
    y = torch.as_tensor(rng.standard_normal((1300, 70)), dtype=dtype)
    lags = np.array(lags)
    rows = explicit(x, lags)
    # The second part is too short for spectra.
    expected = (rows[100:1400] + rows[200:1500]).T @ y.double().numpy()
    expected += rows[300:400].T @ y[:100].double().numpy()
    atol = 1e-10 if dtype == torch.float64 else 1e-3
    for columns in (0, 10**9):
        monkeypatch.setattr(module, "FFT_COLUMNS", {dtype: columns})
        cross = module._Cross(lags).add(x, y, 100).add(x, y[:100], 300).add(x, y, 200)
        assert (cross._spectrum is None) == (columns > 0 or held == 0)
        np.testing.assert_allclose(cross.total(), expected, rtol=0, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    trials=st.lists(st.integers(15, 40), min_size=1, max_size=4),
    lags=lag_sets,
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    intercept=st.booleans(),
    offset=st.sampled_from([0.0, 5.0]),
)
def test_fit_agrees_with_sklearn(trials, lags, shape, intercept, offset):
    X, Y = problem(trials, *shape, lags, 0, offset=offset)
    D, flat = np.concatenate([explicit(x, lags) for x in X]), np.concatenate(Y)
    for alpha in (0.5, 30.0):
        ours = LaggedRidge(
            sampling_rate=1, delays_s=lags, alphas=alpha, fit_intercept=intercept
        ).fit(X, Y)
        peer = SklearnRidge(alpha, fit_intercept=intercept, solver="svd").fit(D, flat)
        peer_coef = np.reshape(peer.coef_, ours.coef_.shape)
        scale = max(1.0, np.abs(peer_coef).max())
        np.testing.assert_allclose(ours.coef_, peer_coef, rtol=0, atol=1e-8 * scale)
        expected = peer.predict(D).reshape(flat.shape)
        np.testing.assert_allclose(
            np.concatenate(ours.predict(X)), expected, rtol=0, atol=1e-8 * np.abs(expected).max()
        )


def refit_scores(X, Y, lags, splits, metric, intercept, scale=1.0):
    """Scores by explicit refitting; splits of rows of all trials on top of each other."""
    D, flat = np.concatenate([explicit(x, lags) for x in X]) * scale, np.concatenate(Y)
    out = np.zeros((len(ALPHAS), flat.shape[1]))
    for train, test in splits:
        for a, alpha in enumerate(ALPHAS):
            peer = SklearnRidge(alpha, fit_intercept=intercept, solver="svd")
            predicted = peer.fit(D[train], flat[train]).predict(D[test])
            predicted = predicted.reshape(-1, flat.shape[1])
            y = flat[test]
            if metric == "r2":
                error = ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
                out[a] += (1 - error) / len(splits)
            else:
                out[a] += [
                    np.corrcoef(y[:, i], predicted[:, i])[0, 1] / len(splits)
                    for i in range(y.shape[1])
                ]
    return out


def rows_of(trials, lengths):
    starts = np.cumsum([0, *lengths])
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in trials])


@pytest.mark.parametrize("metric", ["r2", "r"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("p", [2, 40])  # Gram matrix, and products between samples
def test_cross_validation_agrees_with_refitting(metric, intercept, p):
    lengths, lags = [30, 41, 25, 37], list(range(-1, 5))
    X, Y = problem(lengths, p, 3, lags, 1, offset=1.0)
    options = dict(sampling_rate=1, delays_s=lags, alphas=ALPHAS, metric=metric,
                   fit_intercept=intercept)  # fmt: skip
    rest = [[j for j in range(4) if j != i] for i in range(4)]
    trials = [(rows_of(r, lengths), rows_of([i], lengths)) for i, r in enumerate(rest)]
    ours = LaggedRidge(cv="trials", **options).fit(X, Y)
    expected = refit_scores(X, Y, lags, trials, metric, intercept)
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(ours.alpha_, np.array(ALPHAS)[expected.argmax(0)])

    blocks = []
    for k in range(2):
        role = [np.ones(n) for n in lengths]
        for r, n in zip(role, lengths, strict=True):
            a, b = round(k * n / 2), round((k + 1) * n / 2)
            r[max(0, a - 5) : b + 5] = 0
            r[a:b] = 2
        role = np.concatenate(role)
        blocks.append((np.flatnonzero(role == 1), np.flatnonzero(role == 2)))
    ours = LaggedRidge(cv=TimeBlocks(2), **options).fit(X, Y)
    expected = refit_scores(X, Y, lags, blocks, metric, intercept)
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-8, atol=1e-8)


def test_folds_by_number_splitter_and_list_are_the_same():
    X, Y = problem([20, 25, 30, 22], 2, 2, [0, 1, 2], 2)
    options = dict(tmin=0, tmax=2, sampling_rate=1, alphas=ALPHAS)
    by_number = LaggedRidge(cv=2, **options).fit(X, Y)
    by_list = LaggedRidge(cv=[([2, 3], [0, 1]), ([0, 1], [2, 3])], **options).fit(X, Y)
    np.testing.assert_array_equal(by_number.cv_scores_, by_list.cv_scores_)
    # Trials that are in no fold's test set, or left out of training, count as such.
    some = LaggedRidge(cv=[([2], [0])], **options).fit(X, Y)
    alone = LaggedRidge(cv=[([1], [0])], **options).fit([X[0], X[2]], [Y[0], Y[2]])
    np.testing.assert_allclose(some.cv_scores_, alone.cv_scores_, rtol=1e-9)
    LaggedRidge(cv=ShuffleSplit(2, random_state=0), **options).fit(X, Y)
    one = LaggedRidge(cv=3, **options).fit(X[2], Y[2])
    blocks = LaggedRidge(cv=TimeBlocks(3), **options).fit(X[2], Y[2])
    np.testing.assert_array_equal(one.cv_scores_, blocks.cv_scores_)


@pytest.mark.parametrize("p", [2, 30])
def test_banded_is_ridge_on_scaled_spaces(p):
    lags, lengths = [0, 1, 2, 3], [30, 40, 35]
    X, Y = problem(lengths, p, 3, lags, 3)
    groups = ["b", *["a"] * (p - 1)]
    weights = np.array([[0.8, 0.2], [0.1, 0.9], [1.0, 0.0]])  # of b, a
    ours = LaggedRidge(0, 3, 1, alphas=ALPHAS, cv="trials", spaces=groups, gammas=weights).fit(X, Y)
    trials = [(rows_of([j for j in range(3) if j != i], lengths), rows_of([i], lengths))
              for i in range(3)]  # fmt: skip
    scale = [
        np.repeat(np.sqrt(w[[0, *[1] * (p - 1)]]), len(lags)) for w in weights
    ]  # column f * n_lags + l
    expected = np.stack([refit_scores(X, Y, lags, trials, "r2", True, s) for s in scale])
    np.testing.assert_allclose(ours.cv_scores_, expected.max(axis=0), rtol=1e-7, atol=1e-8)
    flat = expected.reshape(-1, 3).argmax(axis=0)
    assert list(ours.spaces_) == ["b", "a"]
    np.testing.assert_array_equal(ours.alpha_, np.array(ALPHAS)[flat % len(ALPHAS)])
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(ours.alphas_, ours.alpha_ / weights[flat // len(ALPHAS)].T)
    D = np.concatenate([explicit(x, lags) for x in X])
    for t in range(3):
        s = scale[flat[t] // len(ALPHAS)]
        peer = SklearnRidge(ours.alpha_[t], solver="svd").fit(D * s, np.concatenate(Y)[:, t])
        np.testing.assert_allclose(
            ours.coef_[t].ravel(), peer.coef_ * s, rtol=0, atol=1e-8 * np.abs(peer.coef_).max()
        )


def test_random_weights_find_the_space_that_matters():
    rng = np.random.default_rng(4)
    X = [rng.standard_normal((300, 13)) for _ in range(4)]
    lags = np.arange(3)
    Y = [explicit(x[:, :1], lags) @ [[1.0], [2.0], [-1.0]] for x in X]
    Y = [y + 6 * rng.standard_normal(y.shape) for y in Y]
    groups = ["envelope", *["mel"] * 12]
    options = dict(tmin=0, tmax=2, sampling_rate=1, cv="trials")
    banded = LaggedRidge(spaces=groups, **options).fit(X, Y)
    plain = LaggedRidge(**options).fit(X, Y)
    assert banded.alphas_[0, 0] < banded.alphas_[1, 0] / 4
    assert banded.best_score_[0] > plain.best_score_[0] + 0.005
    again = LaggedRidge(spaces=groups, **options).fit(X, Y)
    np.testing.assert_array_equal(banded.coef_, again.coef_)


@pytest.mark.parametrize("p", [2, 40])
def test_float32_is_close_to_float64(p):
    X, Y = problem([200, 150, 180], p, 20, [0, 1, 2, 3, 4, 5, 6], 5, offset=3.0)
    options = dict(tmin=0, tmax=6, sampling_rate=1, alphas=(30.0, 300.0, 3000.0), cv="trials")
    wide = LaggedRidge(**options).fit(X, Y)
    X32, Y32 = ([a.astype(np.float32) for a in b] for b in (X, Y))
    narrow = LaggedRidge(**options).fit(X32, Y32)
    assert narrow.coef_.dtype == narrow.predict(X32)[0].dtype == np.float32
    np.testing.assert_allclose(narrow.cv_scores_, wide.cv_scores_, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(narrow.alpha_, wide.alpha_)
    scale = np.abs(wide.coef_).max()
    np.testing.assert_allclose(narrow.coef_, wide.coef_, rtol=0, atol=1e-4 * scale)


def test_trials_are_never_straddled():
    X, Y = problem([50, 60], 2, 2, [0, 1, 2, 3], 6)
    model = LaggedRidge(-2, 5, 1, alphas=1.0).fit(X, Y)
    before = model.predict(X)
    X[0][-8:] += 100
    after = model.predict(X)
    assert not np.allclose(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(after[1], model.predict(X[1]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_agreement_with_mtrf(direction):
    mtrf = pytest.importorskip("mtrf")
    rng = np.random.default_rng(7)
    rate, tmin, tmax, n = 50, -0.04, 0.2, 5
    stimulus = [rng.standard_normal((160, 2)) for _ in range(n)]
    response = [
        explicit(s, range(4)) @ rng.standard_normal((8, 3)) + rng.standard_normal((160, 3))
        for s in stimulus
    ]
    X, Y = (stimulus, response) if direction == "forward" else (response, stimulus)
    lambdas = np.logspace(-3, 2, 6)
    peer = mtrf.TRF(direction=1 if direction == "forward" else -1)
    scores = peer.train(
        [s.copy() for s in stimulus], [r.copy() for r in response], rate, tmin, tmax,
        list(lambdas), k=-1, verbose=False,
    )  # fmt: skip
    # The peer averages over trials of a fold and divides by the sampling interval.
    options = dict(tmin=tmin, tmax=tmax, sampling_rate=rate, direction=direction, cv="trials",
                   metric="r", alpha_per_target=False)  # fmt: skip
    chosen = LaggedRidge(alphas=(n - 1) * rate * lambdas, **options).fit(X, Y)
    np.testing.assert_allclose(chosen.cv_scores_.mean(axis=1), scores, rtol=1e-9)
    assert (chosen.alpha_ == (n - 1) * rate * float(peer.regularization)).all()
    ours = LaggedRidge(alphas=n * rate * float(peer.regularization), **options).fit(X, Y)
    np.testing.assert_allclose(ours.times_, peer.times, atol=1e-12)
    weights = peer.weights.transpose(2, 0, 1) / rate
    np.testing.assert_allclose(ours.coef_, weights, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.intercept_, peer.bias[0] / rate, rtol=0, atol=1e-10)
    theirs = peer.predict(stimulus=stimulus if direction == "forward" else None,
                          response=None if direction == "forward" else response)  # fmt: skip
    np.testing.assert_allclose(np.stack(ours.predict(X)), np.stack(theirs), atol=1e-9)


def test_derivative_penalty_is_that_of_mtrf_for_one_feature():
    mtrf = pytest.importorskip("mtrf")
    X, Y = problem([120, 120, 120], 1, 2, list(range(12)), 8, noise=2.0)
    peer = mtrf.TRF(method="tikhonov")
    peer.train([x.copy() for x in X], [y.copy() for y in Y], 10, 0, 1.1, 3.0, verbose=False)
    # Theirs is half the sum of squared differences.
    ours = LaggedRidge(0, 1.1, 10, alphas=3 * 10 * 3.0 / 2, regularisation="derivative")
    ours.fit(X, Y)
    np.testing.assert_allclose(ours.coef_, peer.weights.transpose(2, 0, 1) / 10, atol=1e-9)


def test_derivative_grid_agrees_with_refitting():
    lags, lengths = list(range(6)), [60, 70, 50]
    X, Y = problem(lengths, 2, 2, lags, 9)
    ours = LaggedRidge(0, 5, 1, alphas=ALPHAS, regularisation="derivative", cv="trials").fit(X, Y)
    step = np.kron(np.eye(2), np.diff(np.eye(6), axis=0))
    D, flat = [explicit(x, lags) for x in X], Y
    expected = np.zeros((len(ALPHAS), 2))
    for i in range(3):
        d, y = (np.concatenate([v[j] for j in range(3) if j != i]) for v in (D, flat))
        dm, ym = d.mean(0), y.mean(0)
        for a, alpha in enumerate(ALPHAS):
            gram = (d - dm).T @ (d - dm) + alpha * step.T @ step
            w = np.linalg.solve(gram, (d - dm).T @ (y - ym))
            error = flat[i] - ym - (D[i] - dm) @ w
            spread = ((flat[i] - flat[i].mean(0)) ** 2).sum(0)
            expected[a] += (1 - (error**2).sum(0) / spread) / 3
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-8, atol=1e-8)


def test_a_listener_is_recovered_in_both_directions():
    rng = np.random.default_rng(10)
    rate, n = 64, 64 * 60
    times = delays(0, 0.4, rate) / rate
    bump = lambda centre, width: np.exp(-0.5 * ((times - centre) / width) ** 2)  # noqa: E731
    truth = np.stack([
        bump(0.1, 0.03) - 0.7 * bump(0.2, 0.04),
        0.5 * bump(0.15, 0.05),
        np.zeros_like(times),
    ])  # fmt: skip
    envelope = [np.abs(pink(rng, n, 1)) + 0.3 * rng.standard_normal((n, 1)) for _ in range(8)]
    eeg = [explicit(e, range(len(times))) @ truth.T + 1.5 * pink(rng, n, 3) + 40 for e in envelope]
    forward = LaggedRidge(0, 0.4, rate, cv="trials").fit(envelope[:6], eeg[:6])
    got = forward.coef_[:, 0]
    assert np.corrcoef(got[0], truth[0])[0, 1] > 0.95
    assert np.corrcoef(got[1], truth[1])[0, 1] > 0.9
    assert abs(forward.times_[got[0].argmax()] - 0.1) <= 1.5 / rate
    assert np.abs(got[2]).max() < 0.2
    assert abs(forward.best_score_[2]) < 0.01 and (forward.best_score_[:2] > 0.05).all()
    decoder = LaggedRidge(0, 0.4, rate, cv="trials", direction="backward", metric="r").fit(
        eeg[:6], envelope[:6]
    )
    assert decoder.lags_[0] == -26 and decoder.lags_[-1] == 0
    assert decoder.score(eeg[6:], envelope[6:]) > 0.5
    # The other way round nothing is known of the stimulus but its own past.
    wrong = LaggedRidge(0, 0.4, rate, cv="trials", metric="r").fit(eeg[:6], envelope[:6])
    assert wrong.score(eeg[6:], envelope[6:]) < decoder.score(eeg[6:], envelope[6:]) - 0.05


def test_blocks_of_time_do_not_leak():
    """Unrelated smooth noise is not predicted across the gap; neighbouring samples would be."""
    rng = np.random.default_rng(11)
    kernel = np.ones(20) / np.sqrt(20)
    smooth = lambda c: np.apply_along_axis(  # noqa: E731
        np.convolve, 0, rng.standard_normal((2000, c)), kernel, "same"
    )
    X, Y = [smooth(30)], [smooth(40)]
    options = dict(tmin=0, tmax=9, sampling_rate=1, alphas=1.0, metric="r",
                   gammas=[[1.0], [2.0]])  # fmt: skip
    honest = LaggedRidge(cv=TimeBlocks(5, gap=40), **options).fit(X, Y)
    assert abs(honest.best_score_.mean()) < 0.05
    D = explicit(X[0], range(10))
    order = rng.permutation(2000)
    leaky = SklearnRidge(1.0).fit(D[order[:1600]], Y[0][order[:1600]])
    predicted = leaky.predict(D[order[1600:]])
    r = [np.corrcoef(predicted[:, i], Y[0][order[1600:], i])[0, 1] for i in range(40)]
    assert np.mean(r) > 0.3
    roles = TimeBlocks(5).roles([100], 9, 1.0)
    for (role,) in roles:
        train, test = np.flatnonzero(role == 1), np.flatnonzero(role == 2)
        assert np.abs(train[:, None] - test).min() == 10
    assert sum((fold[0] == 2).astype(int) for fold in roles).tolist() == [1] * 100


def test_fir_recovers_a_haemodynamic_response():
    rng = np.random.default_rng(12)
    tr, n = 2.0, 240
    times = np.arange(0, 20, tr)
    hrf = gamma.pdf(times, 6) - 0.35 * gamma.pdf(times, 12)
    amplitudes = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])  # voxel, condition
    runs = [(rng.random((n, 2)) < 0.1).astype(float) for _ in range(4)]
    bold = [
        explicit(r, range(len(times))) @ np.kron(amplitudes, hrf).T + 100
        + 0.05 * rng.standard_normal((n, 3))
        for r in runs
    ]  # fmt: skip
    model = LaggedRidge(
        delays_s=times.tolist(), sampling_rate=1 / tr, alphas=np.logspace(-2, 3, 6), cv="trials"
    ).fit(runs, bold)
    np.testing.assert_allclose(model.times_, times)
    expected = amplitudes[:, :, None] * hrf
    np.testing.assert_allclose(model.coef_, expected, atol=0.03)
    np.testing.assert_allclose(model.intercept_, 100, atol=0.05)
    assert (model.best_score_[:2] > 0.8).all() and model.best_score_[2] > 0.2
    few = LaggedRidge(delays_s=[2, 4, 6, 8], sampling_rate=0.5, alphas=1.0).fit(runs, bold)
    assert few.lags_.tolist() == [1, 2, 3, 4] and few.coef_.shape == (3, 2, 4)


#: The samples of a trial are a series: what a sample predicts depends on those before it.
SERIES = {
    "check_methods_sample_order_invariance": "samples have an order",
    "check_methods_subset_invariance": "samples have neighbours",
}


@parametrize_with_checks(
    [LaggedRidge(0, 1, 1), LaggedRidge(0, 0, 1, alphas=1.0), LaggedRidge(0, 1, 1, dtype="float32")],
    expected_failed_checks=lambda model: SERIES if model.tmax else {},
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_columns_go_by_their_names():
    X, Y = problem([60, 50], 3, 2, [0, 1], 17)
    frames = [pd.DataFrame(x, columns=["loud", "low", "high"]) for x in X]
    options = {"alphas": ALPHAS, "n_iter": 4, "cv": 2}
    spaces = {"level": ["loud"], "pitch": ["high", "low"]}
    named = LaggedRidge(0, 1, 1, spaces=spaces, **options).fit(frames, Y)
    assert named.feature_names_in_.tolist() == ["loud", "low", "high"]
    assert named.n_features_in_ == 3
    by_place = LaggedRidge(0, 1, 1, spaces={"level": [0], "pitch": [2, 1]}, **options).fit(X, Y)
    np.testing.assert_array_equal(named.coef_, by_place.coef_)
    np.testing.assert_array_equal(named.predict(frames)[1], by_place.predict(X)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named.score(frames, Y) == by_place.score(X, Y)
    with pytest.raises(ConfigError, match="feature names"):
        named.predict(frames[0].rename(columns={"low": "bass"}))
    with pytest.raises(ConfigError, match="trial 1.*feature names"):
        named.fit([frames[0], frames[1][["low", "loud", "high"]]], Y)


@pytest.mark.parametrize(("trials", "folds"), [(2, 2), (3, 3), (5, 5), (7, 5)])
def test_folds_are_five_or_as_many_as_there_are_trials(trials, folds):
    X, Y = problem([30] * trials, 2, 2, [0, 1], 18)
    default = LaggedRidge(0, 1, 1, alphas=ALPHAS).fit(X, Y)
    given = LaggedRidge(0, 1, 1, alphas=ALPHAS, cv=folds).fit(X, Y)
    np.testing.assert_array_equal(default.cv_scores_, given.cv_scores_)
    one = LaggedRidge(0, 1, 1, alphas=ALPHAS).fit(X[0], Y[0])
    blocks = LaggedRidge(0, 1, 1, alphas=ALPHAS, cv=TimeBlocks(5)).fit(X[0], Y[0])
    np.testing.assert_array_equal(one.cv_scores_, blocks.cv_scores_)


@pytest.mark.parametrize("regularisation", ["ridge", "derivative"])
@pytest.mark.parametrize("alphas", [1.0, ALPHAS])
def test_features_that_others_hold_are_warned_of_once(regularisation, alphas):
    X, Y = problem([60, 50], 3, 2, [0, 1], 19, offset=2.0)
    model = LaggedRidge(0, 2, 1, alphas=alphas, regularisation=regularisation)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankWarning)
        model.fit(X, Y)
    for x in X:
        x[:, 1] = x[:, 0]
    with pytest.warns(RankWarning, match="X spans 6 of 9") as caught:
        model.fit(X, Y)
    assert len([w for w in caught if w.category is RankWarning]) == 1


@pytest.mark.parametrize("p", [2, 40])  # Gram matrix, and products between samples
@pytest.mark.parametrize("regularisation", ["ridge", "derivative"])
def test_a_failed_factorisation_on_a_gpu_is_repeated_on_the_cpu(
    p, regularisation, monkeypatch, caplog
):
    X, Y = problem([20, 25, 30], p, 12, [0, 1, 2], 20)
    model = LaggedRidge(0, 2, 1, regularisation=regularisation)
    expected = model.fit(X, Y).coef_
    real, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix.shape)
        if len(calls) % 2:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(solvers, "_accelerated", lambda matrix: True)
    np.testing.assert_array_equal(model.fit(X, Y).coef_, expected)
    assert calls and "repeated on the CPU" in caplog.text


def test_one_target_and_one_trial_keep_their_shape():
    X, Y = problem([80], 2, 1, [0, 1], 13)
    model = LaggedRidge(0, 1, 1, cv=2).fit(X[0], Y[0][:, 0])
    assert model.predict(X[0]).shape == (80,)
    assert [p.shape for p in model.predict([X[0], X[0][:5]])] == [(80,), (5,)]
    assert model.coef_.shape == (1, 2, 2)
    assert 0 < model.score(X[0], Y[0][:, 0]) <= 1


def test_a_constant_target_has_no_score():
    X, Y = problem([60, 60, 60], 2, 2, [0, 1], 14)
    for y in Y:
        y[:, 1] = 7.1
    model = LaggedRidge(0, 1, 1, cv="trials").fit(X, Y)
    assert np.isnan(model.cv_scores_[:, 1]).all() and not np.isnan(model.cv_scores_[:, 0]).any()
    np.testing.assert_allclose(model.predict(X[0])[:, 1], 7.1)


def test_singular_data_have_the_smallest_solution():
    X, Y = problem([60, 60], 1, 2, [0, 1], 15)
    X = [np.hstack([x, x, 0 * x]) for x in X]
    with pytest.warns(RankWarning, match="2 of 6"):
        model = LaggedRidge(0, 1, 1, alphas=1e-13).fit(X, Y)
    assert np.isfinite(model.coef_).all() and np.abs(model.coef_).max() < 1e3
    np.testing.assert_allclose(model.coef_[:, 0], model.coef_[:, 1], rtol=1e-2, atol=1e-6)


x, y = np.zeros((50, 2)), np.zeros((50, 1))
ok = dict(tmin=0, tmax=3, sampling_rate=1)


@pytest.mark.parametrize(
    ("options", "X", "Y", "words"),
    [
        (dict(tmin=0, tmax=3), x, y, "sampling_rate is missing"),
        (dict(sampling_rate=1), x, y, "tmin and tmax, or as delays_s"),
        (dict(tmin=0, sampling_rate=1), x, y, "tmin and tmax, or as delays_s"),
        (dict(ok, delays_s=[1]), x, y, "tmin and tmax, or as delays_s"),
        (dict(delays_s=[2, 3], sampling_rate=0.5), x, y, "whole numbers"),
        (dict(tmin=3, tmax=0, sampling_rate=1), x, y, "tmin <= tmax"),
        (dict(ok, sampling_rate=-1), x, y, "samples per second"),
        (ok, [x, x], [y], "2 trial.s. and y 1"),
        (ok, [x, x], [y, y[:40]], "Trial 1 has 50 samples in X and 40 in y"),
        (ok, [x, x[:3]], [y, y[:3]], "longest delay is 3"),
        (ok, [x, x[:, :1]], [y, y], "trial 1.*1 features, but LaggedRidge is expecting 2"),
        (ok, [x, x], [y, np.hstack([y, y])], "2 columns and trial 0 1"),
        (ok, x + 1j, y, "[Cc]omplex data not supported"),
        (ok, x, y + 1j, "[Cc]omplex data not supported"),
        (ok, x[:, 0], y, r"x\[:, None\]"),
        (ok, np.zeros((3, 50, 2)), y, "list for several trials"),
        (ok, [], [], "empty list"),
        (ok, [x, x + np.nan], [y, y], r"X \(trial 1\) holds 100 NaN"),
        (dict(ok, cv="loo"), [x, x], [y, y], "'trials'"),
        (dict(ok, cv=5), [x, x], [y, y], "at most 2 folds"),
        (dict(ok, cv="trials"), x, y, "TimeBlocks"),
        (dict(ok, cv=[([0, 1], [1])]), [x, x], [y, y], "same trial in training and test"),
        (dict(ok, cv=TimeBlocks(5, gap=2)), x, y, "would share samples"),
        (dict(ok, cv=TimeBlocks(2, gap=30)), x, y, "too short for 2 blocks"),
        (dict(ok, cv=TimeBlocks(1)), x, y, "at least 2"),
        (dict(ok, alphas=0.0), x, y, "above 0"),
        (dict(ok, direction="sideways"), x, y, "'forward' or 'backward'"),
        (dict(ok, metric="mse"), x, y, "r2, r"),
        (dict(ok, regularisation="lasso"), x, y, "ridge, derivative"),
        (dict(ok, spaces=[0]), x, y, "1 labels for 2 features"),
        (dict(ok, spaces=[0, 1], gammas=[[1, -1]]), x, y, "at least 0"),
        (dict(ok, gammas=[[1, 1]]), x, y, r"expected .candidates, 1."),
        (dict(ok, dtype="float16"), x, y, "float32"),
    ],
)
def test_errors_say_what_to_do(options, X, Y, words):
    with pytest.raises(ConfigError, match=words):
        LaggedRidge(**options).fit(X, Y)


def test_new_data_must_have_the_features_of_the_fit():
    X, Y = problem([60], 2, 2, [0, 1], 16)
    model = LaggedRidge(0, 1, 1, alphas=1.0).fit(X, Y)
    with pytest.raises(ConfigError, match="expecting 2 features"):
        model.predict(X[0][:, :1])


@pytest.mark.slow
def test_dtu_listener(mirror):
    """Speech envelope to EEG and back, above the same envelope shifted in time."""
    folder = mirror / "dtu_eeg_s1"
    if not folder.is_dir():
        pytest.skip("no DTU recording in the mirror")
    trials = [np.load(f) for f in sorted(folder.glob("*.npz"))]
    z = lambda a: ((a - a.mean(0)) / a.std(0)).astype(np.float64)  # noqa: E731
    eeg, envelope = [z(t["eeg"]) for t in trials], [z(t["envelope"]) for t in trials]
    # All trials have the same envelope: only blocks of time keep the stimulus out of training.
    options = dict(sampling_rate=64, cv=TimeBlocks(5), metric="r", alphas=(1e3, 1e4))

    def r(shift, direction):
        moved = [np.roll(e, shift, axis=0) for e in envelope]
        pair = (moved, eeg) if direction == "forward" else (eeg, moved)
        model = LaggedRidge(0, 26 / 64, direction=direction, **options)
        return float(np.nanmean(model.fit(*pair).cv_scores_[1]))

    assert r(0, "backward") == pytest.approx(0.264, abs=0.02)
    null = [r(64 * s, "forward") for s in (10, 20, 30)]
    assert r(0, "forward") > max(null) + 0.01


@pytest.mark.parametrize(("n", "p"), [(120, 3), (30, 12)])
def test_rows_that_are_left_out_serve_only_the_delays(n, p):
    """Primal and kernel form equal ridge on the delayed rows that are used, formed as a whole."""
    rng = np.random.default_rng(0)
    X = [rng.standard_normal((n, p)), rng.standard_normal((n + 10, p))]
    Y = [x @ rng.standard_normal((p, 4)) + rng.standard_normal((len(x), 4)) + 3 for x in X]
    rows = [rng.random(len(x)) > 0.3 for x in X]
    model = LaggedRidge(0, 4, 1.0, alphas=5.0).fit(X, Y, rows)
    late = [
        delayed(torch.as_tensor(x), model.lags_).numpy()[u] for x, u in zip(X, rows, strict=True)
    ]
    D, y = np.concatenate(late), np.concatenate([a[u] for a, u in zip(Y, rows, strict=True)])
    D_c = D - D.mean(axis=0)
    w = np.linalg.solve(D_c.T @ D_c + 5 * np.eye(D.shape[1]), D_c.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(model.coef_.reshape(4, -1), w.T, atol=1e-10)
    np.testing.assert_allclose(model.intercept_, y.mean(axis=0) - D.mean(axis=0) @ w, atol=1e-10)
    # Alphas are chosen among the same rows: changing the targets of the others changes nothing.
    grid = {"alphas": [1.0, 100.0], "cv": TimeBlocks(3)}
    one = LaggedRidge(0, 4, 1.0, **grid).fit(X, Y, rows)
    other = [np.where(u[:, None], a, 1e3) for a, u in zip(Y, rows, strict=True)]
    two = LaggedRidge(0, 4, 1.0, **grid).fit(X, other, rows)
    np.testing.assert_allclose(one.coef_, two.coef_, atol=1e-10)
    np.testing.assert_allclose(one.best_score_, two.best_score_, atol=1e-10)


def test_rows_must_be_masks_of_the_trials():
    x, y = np.random.default_rng(0).standard_normal((2, 30, 2))
    with pytest.raises(ConfigError, match="one mask of bool for each trial, of 30 samples"):
        LaggedRidge(0, 1, 1.0, alphas=1.0).fit(x, y, np.ones(29, bool))
    with pytest.raises(ConfigError, match="fewer than two samples"):
        LaggedRidge(0, 1, 1.0, alphas=1.0).fit(x, y, np.zeros(30, bool))
