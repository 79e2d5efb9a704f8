"""The compressed grid of alphas: exact to its tolerance over shapes, folds, offsets and spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit, TimeSeriesSplit

from brainalign.errors import ConfigError
from brainalign.linear import RankWarning, Ridge, RidgeSolver, ridge_kfold, ridge_loo, solvers
from brainalign.linear.search import compress

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore::brainalign.linear.AlphaEdgeWarning", "ignore::brainalign.linear.RankWarning"
)
#: More than the grid has dimensions, so that it is compressed in float64 too.
ALPHAS = np.logspace(-1, 4, 40)


def problem(n, p, t, seed, *, decay=0.0, offset=0.0):
    """Features of a given spectrum; targets along single directions, dense, and noise alone."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) * np.arange(1, p + 1) ** (-decay / 2)
    X = X @ np.linalg.qr(rng.standard_normal((p, p)))[0]
    W = rng.standard_normal((p, t)) * np.logspace(-2, 0.5, t)
    Y = X @ W / np.sqrt(p) + 0.3 * rng.standard_normal((n, t))
    U = np.linalg.svd(X, full_matrices=False)[0]
    Y[:, : t // 3] = U[:, -(t // 3) :][:, : t // 3] * 5 + 0.1 * rng.standard_normal((n, 1))
    return X + offset, Y + offset


def refitted(X, Y, splits, alphas, intercept):
    total = np.zeros((len(alphas), Y.shape[1]))
    for train, test in splits:
        for a, alpha in enumerate(alphas):
            peer = SklearnRidge(alpha, fit_intercept=intercept, solver="svd")
            predicted = peer.fit(X[train], Y[train]).predict(X[test])
            total[a] += r2_score(Y[test], predicted, multioutput="raw_values")
    return total / len(splits)


splitters = st.sampled_from(
    [
        KFold(3),
        KFold(4, shuffle=True, random_state=1),
        ShuffleSplit(3, test_size=0.3, random_state=0),
        TimeSeriesSplit(3),
        TimeSeriesSplit(2, gap=3),
    ]
)
shapes = st.sampled_from([(40, 9), (40, 24), (40, 40), (36, 90), (50, 30)])


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes, cv=splitters, intercept=st.booleans(), seed=st.integers(0, 999),
    decay=st.sampled_from([0.0, 1.5]), offset=st.sampled_from([0.0, 20.0]),
)  # fmt: skip
def test_kfold_agrees_with_refitting(shape, cv, intercept, seed, decay, offset):
    X, Y = problem(*shape, 6, seed, decay=decay, offset=offset)
    splits = list(cv.split(X))
    some = slice(0, None, 6)
    expected = refitted(X, Y, splits, ALPHAS[some], intercept)
    grid = torch.as_tensor(ALPHAS)
    got = ridge_kfold(*map(torch.as_tensor, (X, Y)), grid, splits, fit_intercept=intercept)
    size = np.maximum(1, np.abs(expected))
    np.testing.assert_array_less(np.abs(got.numpy()[some] - expected) / size, 1e-8)
    if offset and not intercept:
        return  # float32 cannot hold the small differences of the rows beside their large mean
    single = [torch.as_tensor(v.astype(np.float32)) for v in (X, Y)]
    narrow = ridge_kfold(*single, grid, splits, fit_intercept=intercept)
    exact = refitted(*(v.double().numpy() for v in single), splits, ALPHAS[some], intercept)
    size = np.maximum(1, np.abs(exact))
    np.testing.assert_array_less(np.abs(narrow.numpy()[some] - exact) / size, 1e-4)


@settings(max_examples=30, deadline=None)
@given(
    shape=shapes, intercept=st.booleans(), seed=st.integers(0, 999),
    decay=st.sampled_from([0.0, 1.5]), offset=st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_leave_one_out_agrees_with_scikit_learn(shape, intercept, seed, decay, offset):
    X, Y = problem(*shape, 6, seed, decay=decay, offset=offset)
    X, Y = (v.astype(np.float32).astype(float) for v in (X, Y))
    # The default of scikit-learn squares X, as ours does; this form is exact.
    options = {"alpha_per_target": True, "store_cv_results": True, "gcv_mode": "svd"}
    peer = RidgeCV(ALPHAS, fit_intercept=intercept, **options)
    error = peer.fit(X, Y).cv_results_.sum(axis=0).T
    expected = 1 - error / ((Y - Y.mean(axis=0)) ** 2).sum(axis=0)
    got = ridge_loo(*map(torch.as_tensor, (X, Y, ALPHAS)), fit_intercept=intercept).numpy()
    size = np.maximum(1, np.abs(expected))
    np.testing.assert_array_less(np.abs(got - expected) / size, 1e-8)
    if offset and not intercept:
        return  # float32 cannot hold the small differences of the rows beside their large mean
    single = [torch.as_tensor(v.astype(np.float32)) for v in (X, Y)]
    narrow = ridge_loo(*single, torch.as_tensor(ALPHAS), fit_intercept=intercept).numpy()
    np.testing.assert_array_less(np.abs(narrow - expected) / size, 1e-4)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), decay=st.sampled_from([0.0, 1.5]))
def test_kfold_agrees_with_himalaya(shape, seed, decay):
    pytest.importorskip("himalaya")
    from himalaya.backend import set_backend
    from himalaya.ridge import RidgeCV as Himalaya
    from himalaya.scoring import r2_score as score

    set_backend("numpy")
    X, Y = problem(*shape, 6, seed, decay=decay)
    cv = KFold(3)
    peer = Himalaya(ALPHAS, cv=cv, solver_params={"score_func": score, "warn": False}).fit(X, Y)
    ours = Ridge(ALPHAS, cv=cv, fit_intercept=False).fit(X, Y)
    np.testing.assert_allclose(ours.best_score_, np.ravel(peer.cv_scores_), atol=1e-8)
    np.testing.assert_allclose(ours.alpha_, peer.best_alphas_)
    np.testing.assert_allclose(ours.coef_, peer.coef_.T, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    q=st.integers(1, 60), alphas=st.integers(1, 50), seed=st.integers(0, 999),
    tolerance=st.sampled_from([1e-2, 1e-5, 1e-9]),
)  # fmt: skip
def test_compress_keeps_its_tolerance(q, alphas, seed, tolerance):
    rng = np.random.default_rng(seed)
    values = torch.as_tensor(10 ** rng.uniform(-6, 4, q))
    weight = torch.as_tensor(rng.uniform(0, 2, q) * (rng.random(q) > 0.2))
    grid = torch.logspace(-2, 5, alphas, dtype=torch.float64)
    profile = values[:, None] / (values[:, None] + grid)
    basis, mix = compress(profile, weight, tolerance)
    assert basis.shape[0] <= alphas
    error = weight[:, None] * (profile - basis.T @ mix.T)
    assert float(error.abs().max()) <= 1.001 * tolerance


def test_the_grid_costs_its_dimension_and_not_its_length():
    X, _ = problem(90, 30, 3, 0)
    X = torch.as_tensor(X.astype(np.float32))
    splits = list(KFold(3).split(X))
    ranks = []
    for n_alphas in (20, 100, 400):
        solver = RidgeSolver(X, torch.logspace(0, 5, n_alphas), splits)
        ranks.append(max(len(f.basis) for f in solver._score.folds))
    assert ranks[0] <= 12 and ranks[2] <= ranks[0] + 2


def test_one_pass_gives_scores_choice_and_weights():
    X, Y = problem(60, 20, 30, 3)
    for cv in ("gcv", "loo", list(KFold(3).split(X)), list(GroupKFold(3).split(X, groups=X[:, 0]))):
        solver = RidgeSolver(torch.as_tensor(X), torch.as_tensor(ALPHAS), cv)
        solution = solver.solve(torch.as_tensor(Y))
        coef, intercept = solver.coefficients(solution)
        ours = Ridge(ALPHAS, cv=cv).fit(X, Y)
        np.testing.assert_allclose(solution.scores, ours.cv_scores_, atol=1e-12)
        np.testing.assert_allclose(coef, ours.coef_, atol=1e-12)
        np.testing.assert_allclose(intercept, ours.intercept_, atol=1e-12)
        for i in range(0, 30, 7):
            peer = SklearnRidge(ours.alpha_[i]).fit(X, Y[:, i])
            np.testing.assert_allclose(coef[i], peer.coef_, atol=1e-9)


def test_many_features_are_kept_as_dual_weights():
    X, Y = problem(30, 200, 5, 1, offset=3.0)
    ours = Ridge(ALPHAS, cv=3).fit(X, Y)
    assert ours.dual_coef_.shape == (30, 5) and "_coef" not in vars(ours)
    np.testing.assert_allclose(X @ ours.coef_.T + ours.intercept_, ours.predict(X), atol=1e-9)
    ours.fit(X[:, :4], Y)
    assert not hasattr(ours, "dual_coef_") and ours.coef_.shape == (5, 4)


def test_failed_factorisation_is_repeated_on_the_cpu(monkeypatch, caplog):
    matrix = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    monkeypatch.setattr(solvers, "_accelerated", lambda m: True)
    exact = torch.linalg.eigh
    calls = []

    def fails_first(m):
        calls.append(m)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return exact(m)

    monkeypatch.setattr(torch.linalg, "eigh", fails_first)
    with caplog.at_level("WARNING"):
        values, _ = solvers.eigh(matrix)
    assert "did not converge" in caplog.text and "repeated on the CPU" in caplog.text
    np.testing.assert_allclose(values, [1, 2, 3, 4])

    def wrong_first(m):
        calls.append(m)
        values, vectors = exact(m)
        return (values, vectors) if len(calls) > 1 else (values * 1.01, vectors)

    calls.clear()
    caplog.clear()
    monkeypatch.setattr(torch.linalg, "eigh", wrong_first)
    with caplog.at_level("WARNING"):
        values, _ = solvers.eigh(matrix)
    assert "relative error" in caplog.text
    np.testing.assert_allclose(values, [1, 2, 3, 4])


def test_rank_deficient_features_are_named():
    X, Y = problem(50, 10, 3, 0)
    X[:, 3], X[:, 4] = 1.0, X[:, 5]
    with pytest.warns(RankWarning, match="8 of 10"):
        Ridge(1.0).fit(X, Y)


def test_tf32_stays_off():
    assert not torch.backends.cuda.matmul.allow_tf32


def test_folds_that_cannot_be_scored():
    X = torch.as_tensor(problem(10, 4, 3, 0)[0])
    with pytest.raises(ConfigError, match="at least two"):
        RidgeSolver(X, torch.as_tensor(ALPHAS), [(np.arange(9), np.array([9]))])
    with pytest.raises(ConfigError, match="expected a number of folds"):
        RidgeSolver(X, torch.as_tensor(ALPHAS), "kfold")
