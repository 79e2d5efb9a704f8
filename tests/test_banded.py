"""Banded ridge and stacking: agreement with scikit-learn and himalaya, known truth, errors."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit
from sklearn.utils.estimator_checks import parametrize_with_checks

from brainalign.errors import ConfigError, UnknownNameError
from brainalign.linear import (
    AlphaEdgeWarning,
    BandedRidge,
    RankWarning,
    Ridge,
    Stacking,
    banded_fit,
    banded_kfold,
    feature_spaces,
    sample_gammas,
    simplex_weights,
    solvers,
)
from brainalign.linear import banded as module
from brainalign.linear.banded import REACH, SHRINKAGE_ERROR
from brainalign.linear.search import compress

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning"),
    pytest.mark.filterwarnings("ignore::brainalign.linear.RankWarning"),
]
ALPHAS = np.logspace(-1, 4, 9)
GAMMAS = np.array([[1, 1, 1], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.5, 0.5, 0]]) / [
    [3], [1], [1], [1]
]  # fmt: skip


def problem(n, p, t, seed, *, offset=0.0, spaces=3, dtype=np.float64):
    """Targets that space 0 predicts most and the last not at all, features interleaved."""
    rng = np.random.default_rng(seed)
    labels = np.arange(p) % spaces
    X = rng.standard_normal((n, p)) * np.logspace(0, 0.7, p)
    W = rng.standard_normal((p, t)) / np.sqrt(p)
    W *= np.linspace(1, 0, spaces)[labels][:, None] if spaces > 1 else 1
    signal = X @ W
    Y = signal + signal.std() * np.logspace(-1, 0.5, t) * rng.standard_normal((n, t)) + offset
    return (X + offset).astype(dtype), Y.astype(dtype), labels


def refitted_score(X, y, labels, penalties, splits):
    """Cross-validated R^2 of one target from scikit-learn's ridge on scaled features."""
    scale = 1 / np.sqrt(penalties[labels])
    scores = []
    for train, test in splits:
        peer = SklearnRidge(1.0, solver="svd").fit(X[train] * scale, y[train])
        scores.append(r2_score(y[test], peer.predict(X[test] * scale)))
    return np.mean(scores)


shapes = st.tuples(
    st.integers(12, 40), st.integers(3, 50), st.integers(1, 5), st.integers(0, 2**31 - 1)
)


@parametrize_with_checks(
    [BandedRidge(n_iter=3), BandedRidge(gammas=[[1.0]], alphas=1.0), Stacking()]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, intercept=st.booleans(), offset=st.sampled_from([0.0, 3.0, 100.0]))
def test_given_penalties_are_ridge_on_scaled_features(shape, intercept, offset):
    n, p, t, seed = shape
    X, Y, labels = problem(n, p, t, seed, offset=offset)
    penalties = 10 ** np.random.default_rng(seed).uniform(-1, 3, (3, t))
    columns = [torch.as_tensor(np.flatnonzero(labels == s)) for s in range(3)]
    coef, constant = banded_fit(
        torch.as_tensor(X), torch.as_tensor(Y), columns, torch.as_tensor(penalties),
        fit_intercept=intercept,
    )  # fmt: skip
    for k in range(t):
        scale = 1 / np.sqrt(penalties[labels, k])
        peer = SklearnRidge(1.0, fit_intercept=intercept, solver="svd").fit(X * scale, Y[:, k])
        expected = peer.coef_ * scale
        bound = 1e-8 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(coef[k].numpy(), expected, rtol=0, atol=bound)
        predicted = X @ coef[k].numpy() + constant[k].item()
        np.testing.assert_allclose(predicted, peer.predict(X * scale), rtol=1e-8, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, intercept=st.booleans())
def test_shared_factorisations_give_the_same_weights(shape, intercept):
    """Conjugate gradients from a centre up to 20 times away end where a factorisation does."""
    n, p, t, seed = shape
    X, Y, labels = problem(n, p, t, seed, offset=1.0)
    rng = np.random.default_rng(seed)
    centre = np.array([0.6, 0.3, 0.1])[:, None].repeat(t, axis=1)
    penalties = 10 ** rng.uniform(-1, 3, t) / centre * np.exp(rng.uniform(-2.9, 2.9, (3, t)))
    columns = [torch.as_tensor(np.flatnonzero(labels == s)) for s in range(3)]
    data = (torch.as_tensor(X), torch.as_tensor(Y), columns, torch.as_tensor(penalties))
    own = banded_fit(*data, fit_intercept=intercept)
    shared = banded_fit(*data, centres=torch.as_tensor(centre), fit_intercept=intercept)
    for a, b in zip(own, shared, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * max(1, float(a.abs().max())))


@pytest.mark.parametrize("shape", [(60, 20), (30, 60), (40, 40)])
@pytest.mark.parametrize("intercept", [True, False])
def test_one_space_is_ridge(shape, intercept):
    X, Y, _ = problem(*shape, 6, 0, offset=2.0, spaces=1)
    options = {"cv": 4, "fit_intercept": intercept}
    ours = BandedRidge(alphas=ALPHAS, refine=False, **options).fit(X, Y)
    ridge = Ridge(ALPHAS, **options).fit(X, Y)
    np.testing.assert_allclose(ours.alphas_[0], ridge.alpha_)
    np.testing.assert_allclose(ours.best_score_, ridge.best_score_, atol=1e-8)
    np.testing.assert_allclose(ours.coef_, ridge.coef_, atol=1e-8)
    np.testing.assert_allclose(ours.predict(X), ridge.predict(X), rtol=1e-8, atol=1e-8)


@settings(max_examples=12, deadline=None)
@given(shape=shapes, folds=st.integers(2, 4))
def test_scores_agree_with_refitting(shape, folds):
    n, p, t, seed = shape
    X, Y, labels = problem(n, p, t, seed, offset=2.0)
    alphas = ALPHAS[::4]
    splits = list(KFold(folds, shuffle=True, random_state=0).split(X))
    model = BandedRidge(labels, alphas=alphas, gammas=GAMMAS, cv=splits, refine=False).fit(X, Y)
    expected = np.empty((len(GAMMAS), len(alphas), t))
    with np.errstate(divide="ignore"):
        for j, gamma in enumerate(GAMMAS):
            for a, alpha in enumerate(alphas):
                for k in range(t):
                    expected[j, a, k] = refitted_score(X, Y[:, k], labels, alpha / gamma, splits)
    np.testing.assert_allclose(model.cv_scores_, expected.max(axis=1), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(model.best_score_, expected.max(axis=(0, 1)), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(80, 25), (40, 90)])
@pytest.mark.parametrize("cv", [4, ShuffleSplit(3, test_size=0.3, random_state=0)])
def test_refinement_reports_the_score_of_its_penalties(shape, cv):
    X, Y, labels = problem(*shape, 8, 1, offset=5.0)
    rough = BandedRidge(labels, alphas=ALPHAS, n_iter=6, refine=False, cv=cv).fit(X, Y)
    fine = BandedRidge(labels, alphas=ALPHAS, n_iter=6, cv=cv).fit(X, Y)
    splits = list((KFold(cv) if isinstance(cv, int) else cv).split(X))
    for k in range(8):
        expected = refitted_score(X, Y[:, k], labels, fine.alphas_[:, k], splits)
        assert fine.best_score_[k] == pytest.approx(expected, abs=1e-8)
    assert (fine.best_score_ >= rough.best_score_).all()
    assert (fine.best_score_ > rough.best_score_ + 1e-4).mean() > 0.5
    np.testing.assert_array_equal(fine.cv_scores_, rough.cv_scores_)


def test_refinement_ends_at_a_peak_of_cross_validation():
    """A general optimiser, started there, finds no better penalties within reach."""
    X, Y, labels = problem(60, 12, 4, 2)
    splits = list(KFold(3).split(X))
    options = {"alphas": ALPHAS, "n_iter": 6, "cv": splits}
    rough = BandedRidge(labels, refine=False, **options).fit(X, Y)
    fine = BandedRidge(labels, **options).fit(X, Y)
    for k in range(4):
        found = minimize(
            lambda x, k=k: -refitted_score(X, Y[:, k], labels, np.exp(x), splits),
            np.log(fine.alphas_[:, k]),
            method="Nelder-Mead",
            bounds=np.log(rough.alphas_[:, k])[:, None] + [[-REACH, REACH]],
            options={"xatol": 1e-3, "fatol": 1e-7, "maxiter": 200},
        )
        assert -found.fun <= fine.best_score_[k] + 1e-4


@pytest.mark.parametrize("shape", [(90, 24), (36, 60)])
def test_agrees_with_himalaya(shape):
    himalaya = pytest.importorskip("himalaya.ridge")
    from himalaya.scoring import r2_score as peer_r2

    X, Y, labels = problem(*shape, 12, 3)
    # The peer takes squared errors of a fold about its own mean, as we do, for centred data.
    X, Y = X - X.mean(0), Y - Y.mean(0)
    gammas = sample_gammas(8, 3, seed=4)
    peer = himalaya.GroupRidgeCV(
        groups=labels, cv=3, fit_intercept=True, random_state=0,
        solver_params={"n_iter": gammas, "alphas": ALPHAS, "progress_bar": False, "warn": False,
                       "score_func": peer_r2},
    ).fit(X, Y)  # fmt: skip
    ours = BandedRidge(labels, alphas=ALPHAS, gammas=gammas, cv=3, refine=False).fit(X, Y)
    np.testing.assert_allclose(ours.cv_scores_, peer.cv_scores_, atol=1e-5)
    np.testing.assert_allclose(-np.log(ours.alphas_), peer.deltas_, atol=1e-6)
    np.testing.assert_allclose(ours.predict(X), peer.predict(X), atol=1e-6)


@pytest.mark.parametrize("shape", [(150, 40), (60, 120)])
def test_float32_is_close_to_float64(shape):
    X, Y, labels = problem(*shape, 20, 5, offset=20.0)
    splits = list(KFold(3).split(X))
    options = {"alphas": ALPHAS, "gammas": GAMMAS, "cv": splits}
    wide = BandedRidge(labels, refine=False, **options).fit(X, Y)
    narrow = BandedRidge(labels, refine=False, **options)
    narrow.fit(X.astype(np.float32), Y.astype(np.float32))
    assert narrow.coef_.dtype == np.float32
    top = wide.cv_scores_ > -1
    np.testing.assert_allclose(narrow.cv_scores_[top], wide.cv_scores_[top], atol=1e-4)
    np.testing.assert_allclose(narrow.best_score_, wide.best_score_, atol=1e-4)
    np.testing.assert_allclose(narrow.alphas_, wide.alphas_)
    np.testing.assert_allclose(narrow.predict(X), wide.predict(X), atol=1e-3 * Y.std())
    # Refinement may end in another optimum; what it reports there is as exact.
    fine = BandedRidge(labels, **options).fit(X.astype(np.float32), Y.astype(np.float32))
    with np.errstate(divide="ignore"):
        exact = [refitted_score(X, Y[:, k], labels, fine.alphas_[:, k], splits) for k in range(20)]
    np.testing.assert_allclose(fine.best_score_, exact, atol=1e-4)
    assert (fine.best_score_ >= wide.best_score_ - 1e-4).all()


def test_batches_of_targets_change_nothing():
    for n, p in ((50, 20), (30, 45)):
        X, Y, labels = problem(n, p, 6, 6)
        whole = BandedRidge(labels, n_iter=2, cv=3).fit(X, Y)
        parts = BandedRidge(labels, n_iter=2, cv=3, target_batch=4).fit(X, Y)
        np.testing.assert_allclose(whole.cv_scores_, parts.cv_scores_, rtol=1e-10)
        np.testing.assert_allclose(whole.best_score_, parts.best_score_, rtol=1e-8)
        np.testing.assert_allclose(whole.coef_, parts.coef_, rtol=1e-6, atol=1e-8)


def test_chunks_of_targets_change_nothing(monkeypatch):
    X, Y, labels = problem(50, 20, 11, 6)
    whole = BandedRidge(labels, n_iter=2, cv=3).fit(X, Y)
    monkeypatch.setattr("brainalign.linear.banded.CHUNK_ELEMENTS", 3 * 38 * 4)
    parts = BandedRidge(labels, n_iter=2, cv=3).fit(X, Y)
    np.testing.assert_allclose(whole.cv_scores_, parts.cv_scores_, rtol=1e-10)
    np.testing.assert_allclose(whole.best_score_, parts.best_score_, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compressed_alphas_are_within_tolerance(dtype):
    spectrum = 3000 / torch.arange(1, 1001, dtype=torch.float64)
    for values in (spectrum, torch.cat([spectrum, torch.zeros(100, dtype=torch.float64)])):
        alphas = torch.logspace(0, 5, 100, dtype=torch.float64)
        exact, least = 1 / (values[:, None] + alphas), values + alphas.min()
        vectors, mix = compress(exact, least, SHRINKAGE_ERROR[dtype])
        assert ((mix @ vectors - exact.T) * least).abs().max() <= SHRINKAGE_ERROR[dtype]
        assert len(vectors) <= (15 if dtype == torch.float32 else 30)


def test_contributions_sum_to_the_prediction():
    for n, p in ((50, 20), (30, 45)):
        X, Y, labels = problem(n, p, 4, 7, offset=3.0)
        for model in (BandedRidge(labels, n_iter=2), Stacking(labels)):
            model.fit(X, Y)
            parts = model.predict(X, split=True)
            assert parts.shape == (3, n, 4)
            np.testing.assert_allclose(parts.mean(axis=1), 0, atol=1e-10)
            np.testing.assert_allclose(parts.sum(axis=0) + Y.mean(0), model.predict(X))
            one = model.fit(X, Y[:, 0])
            np.testing.assert_allclose(one.predict(X, split=True), parts[:, :, 0], atol=1e-5)


def test_space_with_weight_zero_is_left_out():
    X, Y, labels = problem(40, 12, 3, 8)
    model = BandedRidge(labels, alphas=5.0, gammas=[[0.5, 0.5, 0]]).fit(X, Y)
    assert np.isinf(model.alphas_[2]).all() and (model.coef_[:, labels == 2] == 0).all()
    left = Ridge(10.0).fit(X[:, labels < 2], Y)
    np.testing.assert_allclose(model.coef_[:, labels < 2], left.coef_, atol=1e-9)
    searched = BandedRidge(labels, gammas=[[0.5, 0.5, 0], [0, 0, 1]], cv=3).fit(X, Y)
    assert np.isinf(searched.alphas_).any(axis=0).all()


def test_constant_target_takes_the_largest_penalty():
    X, Y, labels = problem(40, 12, 3, 9)
    Y[:, 1] = 7.0
    model = BandedRidge(labels, alphas=ALPHAS, n_iter=3, cv=4).fit(X, Y)
    assert np.isnan(model.cv_scores_[:, 1]).all() and np.isnan(model.best_score_[1])
    np.testing.assert_allclose(model.alphas_[:, 1], 3 * ALPHAS.max())
    np.testing.assert_allclose(model.predict(X)[:, 1], 7.0)
    assert np.isfinite(model.best_score_[[0, 2]]).all()


def test_groups_of_rows_stay_whole():
    X, Y, labels = problem(48, 9, 2, 10)
    groups = np.repeat(np.arange(16), 3)
    by_splitter = BandedRidge(labels, n_iter=3, cv=GroupKFold(4)).fit(X, Y, groups=groups)
    listed = list(GroupKFold(4).split(X, Y, groups))
    by_list = BandedRidge(labels, n_iter=3, cv=listed).fit(X, Y)
    np.testing.assert_array_equal(by_splitter.cv_scores_, by_list.cv_scores_)


def test_bands_help_where_spaces_differ():
    """Few useful features beside many useless ones: banded ridge predicts new rows better."""
    rng = np.random.default_rng(11)
    X = rng.standard_normal((700, 220))
    labels = np.repeat(["small", "large"], [20, 200])
    Y = X[:, :20] @ rng.standard_normal((20, 30)) + 4 * rng.standard_normal((700, 30))
    banded = BandedRidge(labels, n_iter=20, cv=4).fit(X[:200], Y[:200])
    plain = Ridge(cv=4).fit(X[:200], Y[:200])
    ours, theirs = (
        r2_score(Y[200:], m.predict(X[200:]), multioutput="raw_values") for m in (banded, plain)
    )
    assert ours.mean() > theirs.mean() + 0.05
    small, large = (banded.alphas_[list(banded.spaces_).index(s)] for s in ("small", "large"))
    assert (large > small).mean() > 0.9


def test_spaces_are_read_in_every_form():
    expected = {"a": [0, 2], "b": [1, 3, 4]}
    names = ["u", "v", "w", "x", "y"]
    for spaces in (
        ["a", "b", "a", "b", "b"],
        {"a": [0, 2], "b": slice(1, 5, 2)} | {"b": [1, 3, 4]},
        {"a": ["u", "w"], "b": ["v", "x", "y"]},
        {"a": np.array([1, 0, 1, 0, 0], bool), "b": (1, 3, 4)},
    ):
        found = feature_spaces(spaces, 5, names)
        assert {k: v.tolist() for k, v in found.items()} == expected
    assert [v.tolist() for v in feature_spaces([slice(2), slice(2, 5)], 5).values()] == [
        [0, 1], [2, 3, 4],
    ]  # fmt: skip
    X, Y, _ = problem(40, 5, 2, 12)
    by_label = BandedRidge(["a", "b", "a", "b", "b"], gammas=[[0.9, 0.1]]).fit(X, Y)
    by_name = BandedRidge({"a": ["u", "w"], "b": ["v", "x", "y"]}, gammas=[[0.9, 0.1]])
    by_name.fit(pd.DataFrame(X, columns=names), Y)
    np.testing.assert_allclose(by_label.coef_, by_name.coef_, rtol=1e-5)


def test_errors_say_what_is_wrong():
    X, Y, labels = problem(20, 6, 2, 13)
    with pytest.raises(ConfigError, match="5 labels for 6 features"):
        BandedRidge(labels[:5]).fit(X, Y)
    with pytest.raises(ConfigError, match="'1' is empty"):
        BandedRidge([slice(0, 6), slice(6, 6)]).fit(X, Y)
    with pytest.raises(ConfigError, match="1 of 6 are in none and 1 in several"):
        BandedRidge({"a": [0, 1, 2], "b": [2, 3, 4]}).fit(X, Y)
    with pytest.raises(ConfigError, match="indices are 0 to 5"):
        BandedRidge({"a": [0, 1, 2], "b": [3, 4, 6]}).fit(X, Y)
    with pytest.raises(UnknownNameError, match="no column 'depht'. Did you mean 'depth'"):
        feature_spaces({"a": ["depht"]}, 1, ["depth"])
    with pytest.raises(ConfigError, match=r"gammas has shape \(1, 2\); expected \(n_gammas, 3\)"):
        BandedRidge(labels, gammas=[[0.5, 0.5]]).fit(X, Y)
    with pytest.raises(ConfigError, match="at least 0, and not all 0"):
        BandedRidge(labels, gammas=[[0.0, 0.0, 0.0]]).fit(X, Y)
    with pytest.raises(ConfigError, match="n_iter must be at least 1"):
        BandedRidge(labels, n_iter=0).fit(X, Y)
    with pytest.raises(ConfigError, match="above 0"):
        BandedRidge(labels, alphas=[0.0, 1.0]).fit(X, Y)
    with pytest.raises(ConfigError, match="n_samples=9 is too few for cv=5"):
        BandedRidge(labels).fit(X[:9], Y[:9])
    with pytest.raises(ConfigError, match="cv is 'loo'"):
        BandedRidge(labels, cv="loo").fit(X, Y)
    with pytest.raises(ConfigError, match="y holds 1 NaN"):
        BandedRidge(labels).fit(X, np.where(np.arange(40).reshape(20, 2) == 7, np.nan, Y))
    columns = [torch.as_tensor(np.flatnonzero(labels == s)) for s in range(3)]
    Xt, Yt = torch.as_tensor(X), torch.as_tensor(Y)
    with pytest.raises(ConfigError, match="Validation fold 0 has 1 row"):
        banded_kfold(
            Xt, Yt, columns, torch.as_tensor(GAMMAS), torch.as_tensor(ALPHAS),
            [(np.arange(1, 20), np.array([0]))],
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"above 0 and have shape \(3, 2\)"):
        banded_fit(Xt, Yt, columns, torch.zeros(3, 2))


def test_edge_of_the_grid_warns():
    X, Y, labels = problem(80, 40, 5, 14)
    with pytest.warns(AlphaEdgeWarning, match="lower end"):
        BandedRidge(labels, alphas=[1e3, 1e5], n_iter=3).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BandedRidge(labels, alphas=np.logspace(-4, 5, 15), n_iter=1).fit(X, Y)


def rank_warnings(model, X, Y):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y)
    return [str(w.message) for w in caught if w.category is RankWarning]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("options", [{"n_iter": 5}, {"gammas": [[0.1, 0.3, 0.6]], "alphas": 1.0}])
def test_features_that_others_hold_are_warned_of_once(options, dtype):
    X, Y, labels = problem(60, 12, 3, 20, offset=2.0, dtype=dtype)
    assert rank_warnings(BandedRidge(labels, **options), X, Y) == []
    X[:, 4] = X[:, 0]  # of another space
    X[:, 7] = 1.0
    (told,) = rank_warnings(BandedRidge(labels, **options), X, Y)
    assert "X spans 10 of 12" in told
    (same,) = rank_warnings(Ridge(ALPHAS), X, Y)
    assert same == told
    # Weights of many features in few rows are never unique, and as many rows lose the mean.
    assert rank_warnings(BandedRidge(labels, cv=2, **options), X[:8], Y[:8]) == []
    X, Y, labels = problem(12, 12, 3, 21)
    assert rank_warnings(BandedRidge(labels, cv=2, **options), X, Y) == []


def test_a_failed_factorisation_on_a_gpu_is_repeated_on_the_cpu(monkeypatch, caplog):
    """Every other factorisation fails, as if on a GPU."""
    X, Y, labels = problem(60, 12, 4, 22)
    Z, V, bands = problem(20, 30, 4, 23)
    options = {"n_iter": 4, "alphas": ALPHAS, "cv": 3}
    expected = [BandedRidge(labels, **options).fit(X, Y), BandedRidge(bands, **options).fit(Z, V)]
    real, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix.shape)
        if len(calls) % 2:
            if len(calls) % 4 == 1:
                raise torch.linalg.LinAlgError("did not converge")
            values, vectors = real(matrix)
            return values, vectors * torch.nan
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(solvers, "_accelerated", lambda matrix: True)
    monkeypatch.setattr(module, "_accelerated", lambda matrix: True)
    got = [BandedRidge(labels, **options).fit(X, Y), BandedRidge(bands, **options).fit(Z, V)]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.coef_, b.coef_)
    assert {len(shape) for shape in calls} == {2, 3}
    assert "repeated on the CPU" in caplog.text


def test_a_failed_factorisation_on_the_cpu_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        module._eigh_each(torch.full((2, 3, 3), torch.nan, dtype=torch.float64))


def test_gammas_are_on_the_simplex_and_seeded():
    gammas = sample_gammas(30, 4, seed=1)
    assert gammas.shape == (30, 4) and (gammas >= 0).all()
    np.testing.assert_allclose(gammas.sum(axis=1), 1)
    np.testing.assert_allclose(gammas[0], 0.25)
    np.testing.assert_array_equal(gammas, sample_gammas(30, 4, seed=1))
    assert not np.allclose(gammas, sample_gammas(30, 4, seed=2))
    # Concentration 0.1 (every second draw) leaves most to one space.
    assert np.median(gammas[1::2].max(axis=1)) > np.median(gammas[2::2].max(axis=1)) + 0.2
    assert sample_gammas(9, 1).tolist() == [[1.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(80, 25), (40, 90)])
def test_cuda_agrees_with_cpu(shape):
    X, Y, labels = problem(*shape, 9, 15)
    cpu = BandedRidge(labels, n_iter=5, device="cpu").fit(X, Y)
    gpu = BandedRidge(labels, n_iter=5, device="cuda").fit(X, Y)
    np.testing.assert_allclose(gpu.cv_scores_, cpu.cv_scores_, atol=1e-9)
    np.testing.assert_allclose(gpu.best_score_, cpu.best_score_, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(spaces=st.integers(1, 6), seed=st.integers(0, 2**31 - 1), shared=st.floats(0, 3))
def test_simplex_weights_agree_with_scipy(spaces, seed, shared):
    rng = np.random.default_rng(seed)
    errors = rng.standard_normal((10, spaces + 4, spaces)) * rng.uniform(0.3, 2, spaces)
    errors += shared * rng.standard_normal((10, spaces + 4, 1))
    P = np.einsum("tis,tir->tsr", errors, errors)
    weights = simplex_weights(torch.as_tensor(P)).numpy()
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights >= 0).all()
    for p, w in zip(P, weights, strict=True):
        peer = minimize(
            lambda x, p=p: x @ p @ x, np.full(spaces, 1 / spaces), jac=lambda x, p=p: 2 * p @ x,
            bounds=[(0, 1)] * spaces, method="SLSQP", options={"ftol": 1e-15, "maxiter": 500},
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        )  # fmt: skip
        assert w @ p @ w <= peer.fun * (1 + 1e-9)
        # The gradient is the same where weights are above 0, and not lower elsewhere.
        gradient = p @ w
        assert (gradient >= w @ p @ w * (1 - 1e-8)).all()


def test_simplex_weights_without_a_unique_answer():
    same = simplex_weights(torch.ones(2, 3, 3))
    np.testing.assert_allclose(same.sum(dim=1), 1)
    np.testing.assert_allclose(simplex_weights(torch.zeros(2, 4, 4)), 0.25)


@pytest.mark.parametrize("n_features", [30, 600])
def test_stacking_recovers_the_mixing(n_features):
    """Of spaces that each predict well alone, with independent errors, the weights are known."""
    rng = np.random.default_rng(16)
    n, t = 500, 40
    truth = rng.standard_normal((n, t))
    noise = np.array([0.5, 1.0, 2.0])
    # Each space holds the targets with its own noise; the best weights are as 1 / noise^2.
    spaces = [truth + s * rng.standard_normal((n, t)) for s in noise]
    X = np.hstack([np.repeat(s[:, :1], 1, axis=1) for s in spaces])
    y = truth[:, 0]
    if n_features > 30:
        X = np.hstack([X, 0.01 * rng.standard_normal((n, n_features - 3))])
    labels = np.r_[0, 1, 2, np.arange(X.shape[1] - 3) % 3]
    model = Stacking(labels, alphas=np.logspace(-3, 3, 7)).fit(X, y)
    assert model.best_score_ >= model.space_scores_.max() - 1e-12
    assert model.weights_[0] > model.weights_[1] > model.weights_[2]


def test_stacking_is_never_worse_than_the_best_space():
    X, Y, labels = problem(80, 24, 15, 17, offset=4.0)
    model = Stacking(labels, cv=4).fit(X, Y)
    assert (model.best_score_ >= model.space_scores_.max(axis=0) - 1e-9).all()
    np.testing.assert_allclose(model.weights_.sum(axis=0), 1)
    mixed = np.zeros_like(Y)
    for s in range(3):
        own = Ridge(cv="loo").fit(X[:, labels == s], Y)
        mixed += model.weights_[s] * own.predict(X[:, labels == s])
        np.testing.assert_allclose(model.alphas_[s], own.alpha_)
    np.testing.assert_allclose(model.predict(X), mixed, rtol=1e-9, atol=1e-9)


def test_stacking_scores_are_those_of_held_out_predictions():
    X, Y, labels = problem(60, 12, 5, 18, offset=2.0)
    splits = list(KFold(3).split(X))
    model = Stacking(labels, alphas=ALPHAS, cv=splits).fit(X, Y)
    predicted = np.zeros((3, *Y.shape))
    total = np.zeros(5)
    for train, test in splits:
        for s in range(3):
            own = Ridge(ALPHAS, cv="loo").fit(X[train][:, labels == s], Y[train])
            predicted[s][test] = own.predict(X[test][:, labels == s])
        total += ((Y[test] - Y[test].mean(0)) ** 2).sum(0)
    each = 1 - ((Y - predicted) ** 2).sum(axis=1) / total
    np.testing.assert_allclose(model.space_scores_, each, atol=1e-9)
    mixed = np.einsum("st,sit->it", model.weights_, predicted)
    np.testing.assert_allclose(model.best_score_, 1 - ((Y - mixed) ** 2).sum(0) / total, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored by KFold")
def test_stacking_chooses_penalties_with_groups_whole():
    """Rows of a group are copies: leave-one-out among them would choose the least penalty."""
    rng = np.random.default_rng(24)
    groups = np.repeat(np.arange(20), 5)
    X = rng.standard_normal((20, 12))[groups]
    Y = rng.standard_normal((20, 6))[groups]  # of nothing in X
    labels = np.arange(12) % 2
    cv = GroupKFold(4)
    with pytest.raises(ConfigError, match="Leave alpha_cv out"):
        Stacking(labels, cv=cv, alpha_cv="loo").fit(X, Y, groups=groups)
    model = Stacking(labels, alphas=ALPHAS, cv=cv).fit(X, Y, groups=groups)
    for s in range(2):
        own = Ridge(ALPHAS, cv=GroupKFold(5)).fit(X[:, labels == s], Y, groups=groups)
        np.testing.assert_array_equal(model.alphas_[s], own.alpha_)
    listed = list(cv.split(X, Y, groups))
    leaky = Stacking(labels, alphas=ALPHAS, cv=listed).fit(X, Y)  # no groups: leave-one-out
    assert np.median(leaky.alphas_) < np.median(model.alphas_)
    given = Stacking(labels, alphas=ALPHAS, cv=cv, alpha_cv=GroupKFold(5))
    np.testing.assert_array_equal(given.fit(X, Y, groups=groups).alphas_, model.alphas_)
    alone = Stacking(labels, alphas=ALPHAS, cv=4, alpha_cv="loo")
    assert alone.fit(X, Y, groups=np.arange(100)).coef_.shape == (6, 12)


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored by KFold")
def test_stacking_refuses_folds_that_split_groups():
    X, Y, labels = problem(48, 9, 2, 25)
    groups = np.arange(48) % 12
    with pytest.raises(ConfigError, match="fold of cv=5 has .* both in training and test"):
        Stacking(labels).fit(X, Y, groups=groups)
    with pytest.raises(ConfigError, match="fold of alpha_cv=3"):
        Stacking(labels, cv=GroupKFold(3), alpha_cv=3).fit(X, Y, groups=groups)
    with pytest.raises(ConfigError, match="at least two groups"):
        Stacking(labels, cv=GroupKFold(2)).fit(X, Y, groups=groups % 2)
    one = Stacking(labels, alphas=10.0, cv=GroupKFold(2)).fit(X, Y, groups=groups % 2)
    assert one.coef_.shape == (2, 9)  # nothing is chosen
    with pytest.raises(ValueError, match="inconsistent"):
        Stacking(labels, cv=GroupKFold(3)).fit(X, Y, groups=groups[:-1])


def test_stacking_warns_once():
    X, Y, labels = problem(60, 12, 3, 26)
    X[:, 3] = X[:, 0]
    X[:, 5] = 2 * X[:, 2]
    (told,) = rank_warnings(Stacking(labels), X, Y)
    assert "Space '0': X spans 3 of 4" in told and "Space '2'" in told and "Space '1'" not in told
    with pytest.warns(AlphaEdgeWarning, match="Space '1'.*Space '2'") as caught:
        Stacking(labels, alphas=(30.0, 1e4)).fit(X, X @ np.ones((12, 2)))
    assert len([w for w in caught if w.category is AlphaEdgeWarning]) == 1
