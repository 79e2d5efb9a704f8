"""Ridge: agreement with scikit-learn over shapes, its own estimator checks, and clear errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from brainalign.errors import ConfigError
from brainalign.linear import (
    AlphaEdgeWarning,
    BandedRidge,
    Ridge,
    factorise,
    ridge_gcv,
    ridge_kfold,
    ridge_loo,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")
ALPHAS = np.array([0.01, 0.3, 2.0, 50.0, 1e4])


def problem(n, p, t, seed, *, offset=0.0, rank=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    if rank is not None:
        X = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, p))
    W = rng.standard_normal((p, t)) * np.logspace(-1.5, 0.5, t)
    Y = X @ W + rng.standard_normal((n, t)) * np.sqrt(p) + offset
    return (X + offset).astype(dtype), Y.astype(dtype)


shapes = st.tuples(
    st.integers(8, 40), st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**31 - 1)
)


@parametrize_with_checks([Ridge(), Ridge(cv="loo"), Ridge(cv="gcv"), Ridge(1.0)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, intercept=st.booleans(), offset=st.sampled_from([0.0, 3.0, 100.0]))
def test_fit_agrees_with_sklearn(shape, intercept, offset):
    n, p, t, seed = shape
    X, Y = problem(n, p, t, seed, offset=offset)
    for alpha in (0.3, 20.0):
        ours = Ridge(alpha, fit_intercept=intercept).fit(X, Y)
        peer = SklearnRidge(alpha, fit_intercept=intercept).fit(X, Y)
        scale = max(1.0, np.abs(peer.coef_).max())
        np.testing.assert_allclose(
            ours.coef_, np.atleast_2d(peer.coef_).reshape(t, p), rtol=0, atol=1e-8 * scale
        )
        expected = peer.predict(X).reshape(n, t)
        np.testing.assert_allclose(ours.predict(X), expected, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.filterwarnings("ignore::brainalign.linear.RankWarning")
@settings(max_examples=60, deadline=None)
@given(shape=shapes, intercept=st.booleans(), rank=st.sampled_from([None, 2]))
def test_leave_one_out_agrees_with_ridgecv(shape, intercept, rank):
    n, p, t, seed = shape
    X, Y = problem(n, p, t, seed, offset=1.0, rank=rank)
    alphas = ALPHAS[1:]
    peer = RidgeCV(alphas, fit_intercept=intercept, alpha_per_target=True, store_cv_results=True)
    peer.fit(X, Y)
    mse = peer.cv_results_.reshape(n, t, len(alphas)).mean(axis=0).T
    expected = 1 - n * mse / ((Y - Y.mean(0)) ** 2).sum(axis=0)
    ours = Ridge(alphas, cv="loo", fit_intercept=intercept).fit(X, Y)
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(ours.alpha_, np.atleast_1d(peer.alpha_))
    np.testing.assert_allclose(ours.coef_, peer.coef_.reshape(t, p), rtol=1e-6, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, intercept=st.booleans(), folds=st.integers(2, 4))
def test_kfold_agrees_with_refitting(shape, intercept, folds):
    n, p, t, seed = shape
    X, Y = problem(n, p, t, seed, offset=2.0)
    cv = KFold(folds, shuffle=True, random_state=0)
    expected = np.zeros((len(ALPHAS), t))
    for train, test in cv.split(X):
        for a, alpha in enumerate(ALPHAS):
            peer = SklearnRidge(alpha, fit_intercept=intercept, solver="svd")
            peer.fit(X[train], Y[train])
            predicted = peer.predict(X[test]).reshape(len(test), t)
            expected[a] += r2_score(Y[test], predicted, multioutput="raw_values") / folds
    ours = Ridge(ALPHAS, cv=cv, fit_intercept=intercept).fit(X, Y)
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(ours.alpha_, ALPHAS[expected.argmax(axis=0)])


@pytest.mark.parametrize("shape", [(30, 8), (12, 40), (20, 20)])
@pytest.mark.parametrize("intercept", [True, False])
def test_gcv_is_its_definition(shape, intercept):
    n, p = shape
    X, Y = problem(n, p, 4, 0, offset=1.0)
    Xc = X - X.mean(0) if intercept else X
    got = ridge_gcv(*map(torch.as_tensor, (X, Y, ALPHAS)), fit_intercept=intercept).numpy()
    for a, alpha in enumerate(ALPHAS):
        H = Xc @ np.linalg.solve(Xc.T @ Xc + alpha * np.eye(p), Xc.T)
        H = H + (np.ones((n, n)) / n if intercept else 0)
        residual = ((Y - H @ Y) ** 2).sum(0)
        gcv = residual / (np.trace(np.eye(n) - H) / n) ** 2
        np.testing.assert_allclose(got[a], 1 - gcv / ((Y - Y.mean(0)) ** 2).sum(0), atol=1e-8)


def test_form_follows_shape_and_both_agree():
    X, Y = problem(15, 13, 3, 1)
    more = np.hstack([X, np.zeros((15, 1))])
    tall, wide = factorise(torch.as_tensor(X)), factorise(torch.as_tensor(more))
    assert tall.primal and not wide.primal
    for cv in (3, "loo", "gcv"):
        a, b = Ridge(ALPHAS, cv=cv).fit(X, Y), Ridge(ALPHAS, cv=cv).fit(more, Y)
        np.testing.assert_allclose(a.cv_scores_, b.cv_scores_, rtol=1e-8)
        np.testing.assert_allclose(a.coef_, b.coef_[:, :-1], atol=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), [(45, 12), (30, 30), (30, 29), (24, 50)])
def test_float64_is_exact_where_squaring_x_is_not(n, p, intercept):
    """Features of scales from 0.01 to 100 beside a penalty of 0.001."""
    X, Y = problem(n, p, 4, 0)
    X = X * np.logspace(-2, 2, p)
    alphas = np.array([1e-3, 1.0, 1e3])

    def svd_ridge(X, Y, alpha):
        mean, level = (X.mean(0), Y.mean(0)) if intercept else (0, 0)
        U, s, V = np.linalg.svd(X - mean, full_matrices=False)
        coef = V.T @ ((s / (s**2 + alpha))[:, None] * (U.T @ (Y - level)))
        return coef, level - mean @ coef if intercept else np.zeros(Y.shape[1])

    for cv, splits in (
        ("loo", [(np.delete(np.arange(n), i), [i]) for i in range(n)]),
        (KFold(3), list(KFold(3).split(X))),
    ):
        ours = Ridge(alphas, cv=cv, fit_intercept=intercept).fit(X, Y)
        expected = []
        for alpha in alphas:
            error = []
            for train, test in splits:
                coef, level = svd_ridge(X[train], Y[train], alpha)
                error.append(((Y[test] - X[test] @ coef - level) ** 2).sum(0))
            spread = [((Y[test] - Y[test].mean(0)) ** 2).sum(0) for _, test in splits]
            if cv == "loo":
                expected.append(1 - np.sum(error, axis=0) / ((Y - Y.mean(0)) ** 2).sum(0))
            else:
                expected.append(np.mean([1 - e / s for e, s in zip(error, spread, strict=True)], 0))
        size = np.maximum(1, np.abs(expected))
        np.testing.assert_array_less(np.abs(ours.cv_scores_ - expected) / size, 1e-8)
        for t in range(4):
            coef, level = svd_ridge(X, Y, ours.alpha_[t])
            predicted = X @ coef + level if intercept else X @ coef
            np.testing.assert_allclose(ours.predict(X)[:, t], predicted[:, t], atol=1e-8)


@pytest.mark.parametrize("cv", [3, "loo", "gcv"])
@pytest.mark.parametrize("shape", [(60, 20), (30, 80)])
def test_float32_is_close_to_float64(cv, shape):
    X, Y = problem(*shape, 20, 2, offset=30.0)
    wide = Ridge(ALPHAS, cv=cv).fit(X, Y)
    narrow = Ridge(ALPHAS, cv=cv).fit(X.astype(np.float32), Y.astype(np.float32))
    assert narrow.coef_.dtype == np.float32
    top = wide.cv_scores_ > -1
    np.testing.assert_allclose(narrow.cv_scores_[top], wide.cv_scores_[top], atol=1e-4)
    assert (narrow.alpha_ == wide.alpha_).all()
    np.testing.assert_allclose(narrow.predict(X), wide.predict(X), atol=1e-3)


@pytest.mark.parametrize("cv", [3, "loo", "gcv"])
@pytest.mark.parametrize("shape", [(30, 50), (20, 20), (40, 8)])
@pytest.mark.parametrize("scale", [1e-13, 1e-6, 1e6])
@pytest.mark.parametrize("intercept", [True, False])
def test_units_of_x_change_nothing(cv, shape, scale, intercept):
    X, Y = problem(*shape, 3, 0)
    options = {"cv": cv, "fit_intercept": intercept}
    one = Ridge(ALPHAS, **options).fit(X, Y)
    other = Ridge(ALPHAS * scale**2, **options).fit(X * scale, Y)
    np.testing.assert_allclose(other.cv_scores_, one.cv_scores_, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(other.coef_ * scale, one.coef_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cv", [3, "loo", "gcv"])
@pytest.mark.parametrize("scale", [1e-20, 1e-13, 1e10])
def test_float32_of_any_unit(cv, scale):
    """MEG in tesla from MEG in tesla: the squares of products leave float32."""
    X, Y = (v.astype(np.float32) for v in problem(60, 10, 4, 0))
    one = Ridge(ALPHAS, cv=cv).fit(X, Y)
    scale = np.float32(scale)
    other = Ridge(ALPHAS * float(scale) ** 2, cv=cv).fit(X * scale, Y * scale)
    np.testing.assert_allclose(other.cv_scores_, one.cv_scores_, atol=1e-4)
    np.testing.assert_allclose(other.coef_, one.coef_, atol=1e-4)
    kept = Ridge(ALPHAS, cv=cv, dtype="float32").fit(X * scale, Y)
    assert kept.coef_.dtype == np.float32


def test_kfold_without_intercept_of_data_far_from_zero():
    X, Y = problem(20, 3, 3, 0, offset=200.0)
    folds = list(KFold(2).split(X))
    ours = Ridge(ALPHAS, cv=folds, fit_intercept=False).fit(X, Y).cv_scores_
    for alpha, found in zip(ALPHAS, ours, strict=True):
        peer = SklearnRidge(alpha, fit_intercept=False, solver="svd")
        expected = [
            r2_score(Y[b], peer.fit(X[a], Y[a]).predict(X[b]), multioutput="raw_values")
            for a, b in folds
        ]
        np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-8, atol=1e-8)


def test_batches_of_targets_change_nothing():
    X, Y = problem(25, 10, 11, 3)
    for cv in (3, "loo", "gcv"):
        whole = Ridge(ALPHAS, cv=cv).fit(X, Y)
        parts = Ridge(ALPHAS, cv=cv, target_batch=4).fit(X, Y)
        np.testing.assert_allclose(whole.cv_scores_, parts.cv_scores_, rtol=1e-12)
        np.testing.assert_allclose(whole.coef_, parts.coef_, rtol=1e-12)


def test_groups_stay_whole():
    X, Y = problem(24, 5, 2, 4)
    groups = np.repeat(np.arange(8), 3)
    by_splitter = Ridge(ALPHAS, cv=GroupKFold(4)).fit(X, Y, groups=groups)
    by_list = Ridge(ALPHAS, cv=list(GroupKFold(4).split(X, Y, groups))).fit(X, Y)
    np.testing.assert_array_equal(by_splitter.cv_scores_, by_list.cv_scores_)
    unlike = Ridge(ALPHAS, cv=4).fit(X, Y)
    assert not np.allclose(by_splitter.cv_scores_, unlike.cv_scores_)


def test_one_alpha_for_all():
    X, Y = problem(40, 10, 8, 5)
    each = Ridge(ALPHAS).fit(X, Y)
    shared = Ridge(ALPHAS, alpha_per_target=False).fit(X, Y)
    assert len(np.unique(each.alpha_)) > 1
    assert np.unique(shared.alpha_).tolist() == [ALPHAS[each.cv_scores_.mean(axis=1).argmax()]]


def test_constant_target_takes_largest_alpha_and_is_predicted_by_its_value():
    X, Y = problem(20, 5, 3, 6)
    Y[:, 1] = 7.0
    for cv in (4, "loo", "gcv"):
        model = Ridge(ALPHAS, cv=cv).fit(X, Y)
        assert np.isnan(model.cv_scores_[:, 1]).all()
        assert model.alpha_[1] == ALPHAS.max()
        np.testing.assert_allclose(model.predict(X)[:, 1], 7.0)


def test_known_weights_are_recovered():
    rng = np.random.default_rng(7)
    X = rng.standard_normal((2000, 30))
    W = rng.standard_normal((12, 30))
    Y = X @ W.T + 0.3 * rng.standard_normal((2000, 12)) + np.arange(12)
    model = Ridge(np.logspace(-2, 4, 13)).fit(X, Y)
    np.testing.assert_allclose(model.coef_, W, atol=0.04)
    np.testing.assert_allclose(model.intercept_, np.arange(12), atol=0.04)


def test_edge_of_the_grid_warns_with_the_share():
    rng = np.random.default_rng(8)
    X = rng.standard_normal((60, 5))
    Y = X @ rng.standard_normal((5, 10)) + 0.01 * rng.standard_normal((60, 10))
    with pytest.warns(AlphaEdgeWarning, match=r"100% of the 10 targets .* lower end"):
        Ridge([10.0, 100.0]).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ridge(np.logspace(-2, 4, 13)).fit(X, Y + 3 * rng.standard_normal(Y.shape))
        Ridge([1.0, 1e6]).fit(X, rng.standard_normal((60, 4)))  # nothing to predict: top is right


def test_errors_name_counts():
    X, Y = problem(20, 5, 3, 9)
    bad = X.copy()
    bad[2, 3], bad[4, 3], bad[5, 1] = np.nan, np.nan, np.inf
    with pytest.raises(ConfigError, match=r"2 NaN and 1 infinite .* 2 of 5 features .* 3 of 20"):
        Ridge().fit(bad, Y)
    with pytest.raises(ConfigError, match=r"y holds 1 NaN"):
        Ridge().fit(X, np.where(np.arange(60).reshape(20, 3) == 7, np.nan, Y))
    with pytest.raises(ConfigError, match=r"n_samples=9 is too few for cv=5"):
        Ridge().fit(X[:9], Y[:9])
    with pytest.raises(ConfigError, match=r"above 0"):
        Ridge([0.0, 1.0]).fit(X, Y)
    with pytest.raises(ConfigError, match="cv is 'leave'"):
        Ridge(cv="leave").fit(X, Y)
    with pytest.raises(ConfigError, match="Validation fold 0 has 1 row"):
        ridge_kfold(*map(torch.as_tensor, (X, Y, ALPHAS)), [(np.arange(1, 20), np.array([0]))])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cannot use device"):
            Ridge(device="cuda").fit(X, Y)


@pytest.mark.parametrize("estimator", [Ridge, BandedRidge])
def test_folds_are_rows_that_are_there(estimator):
    X, Y = problem(12, 5, 3, 9)
    folds = list(KFold(3).split(X))
    one = estimator(cv=folds).fit(X, Y)
    mask = np.zeros(12, dtype=bool)
    mask[9:] = True
    for same in (
        [(train, test - 12) for train, test in folds],
        [(np.isin(range(12), train), test.tolist()) for train, test in folds],
    ):
        np.testing.assert_allclose(estimator(cv=same).fit(X, Y).cv_scores_, one.cv_scores_)
    for cv, message in (
        ([(~mask[1:], mask[1:])], r"training rows .* bool of shape \(11,\).* shape \(12,\)"),
        ([(~mask, [3, 12])], "validation rows .* below n_samples=12"),
        ([(np.arange(6.0), mask)], "training rows of a fold are float64"),
        ([([], mask)], "no training rows"),
        ([], "no folds"),
    ):
        with pytest.raises(ConfigError, match=message):
            estimator(cv=cv).fit(X, Y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cv", [4, "loo", "gcv"])
def test_cuda_agrees_with_cpu(cv):
    X, Y = problem(50, 70, 9, 10)
    cpu = Ridge(ALPHAS, cv=cv, device="cpu").fit(X, Y)
    gpu = Ridge(ALPHAS, cv=cv, device="cuda").fit(X, Y)
    np.testing.assert_allclose(gpu.cv_scores_, cpu.cv_scores_, atol=1e-9)
    np.testing.assert_allclose(gpu.coef_, cpu.coef_, atol=1e-9)


def test_leave_one_out_is_leaving_one_out():
    X, Y = problem(10, 25, 2, 11)
    error = np.zeros((len(ALPHAS), 2))
    for i in range(10):
        keep = np.arange(10) != i
        for a, alpha in enumerate(ALPHAS):
            peer = SklearnRidge(alpha, solver="svd").fit(X[keep], Y[keep])
            error[a] += (Y[i] - peer.predict(X[i : i + 1])[0]) ** 2
    got = ridge_loo(*map(torch.as_tensor, (X, Y, ALPHAS))).numpy()
    np.testing.assert_allclose(got, 1 - error / ((Y - Y.mean(0)) ** 2).sum(0), rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leave_one_out_of_constant_features(dtype):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((30, 2)).astype(dtype)
    ours = Ridge([1.0, 10.0], cv="loo").fit(np.full((30, 4), 3, dtype=dtype), y)
    expected = 1 - (30 / 29) ** 2  # the mean of the other rows predicts each
    np.testing.assert_allclose(ours.cv_scores_, expected, rtol=1e-5)
    np.testing.assert_array_equal(ours.coef_, 0)


def test_groups_and_batches_that_cannot_be_kept():
    X, Y = problem(20, 3, 2, 0)
    for cv in ("loo", "gcv"):
        with pytest.raises(ConfigError, match="cannot be kept whole"):
            Ridge(ALPHAS, cv=cv).fit(X, Y, groups=np.arange(20) // 2)
    for batch in (-1, 0):
        with pytest.raises(ConfigError, match="target_batch"):
            Ridge(ALPHAS, target_batch=batch).fit(X, Y)


@pytest.mark.parametrize(("n", "p"), [(60, 120), (100, 30)])
@pytest.mark.parametrize("size", [10, 100, 1000])
def test_leave_one_out_in_float32_with_a_row_that_decides_its_own_prediction(n, p, size):
    X, Y = problem(n, p, 3, 0)
    X[0] *= size
    alphas = np.logspace(-1, 5, 7)
    X, Y = X.astype(np.float32), Y.astype(np.float32)
    narrow = Ridge(alphas, cv="loo").fit(X, Y)
    wide = Ridge(alphas, cv="loo").fit(X.astype(float), Y.astype(float))
    scale = np.maximum(1, np.abs(wide.cv_scores_))
    np.testing.assert_array_less(np.abs(narrow.cv_scores_ - wide.cv_scores_) / scale, 1e-4)
    np.testing.assert_array_equal(narrow.alpha_, wide.alpha_)
