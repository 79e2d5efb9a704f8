"""PCA and sparse random projection, fitted on training stimuli only."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import decomposition, random_projection
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from brainalign.data import store
from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.features import PCA, SparseRandomProjection, reduce


def features(n, p, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, p)) * np.linspace(2, 0.5, p) + 3).astype(np.float32)
    return xr.Dataset(
        {"features": (("stimulus", "feature"), x)},
        coords={
            "stimulus_id": ("stimulus", [f"s{i}" for i in range(n)]),
            "model": "m",
            "layer": "l",
        },
    )


@settings(deadline=None, max_examples=25)
@given(n=st.integers(4, 30), p=st.integers(2, 40), k=st.integers(1, 6), chunk=st.integers(1, 400))
def test_pca_equals_sklearn(n, p, k, chunk):
    ds = features(n, p, seed=n * p)
    train = [f"s{i}" for i in range(0, n - 1)]
    k = min(k, n - 2, p)
    whole = reduce.FLOATS_IN_MEMORY
    reduce.FLOATS_IN_MEMORY = chunk
    try:
        ours = PCA(k).fit(ds, train)
        got = ours.transform(ds)
    finally:
        reduce.FLOATS_IN_MEMORY = whole
    x = ds["features"].values.astype(np.float64)
    theirs = decomposition.PCA(k, svd_solver="full").fit(x[:-1])
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(
        ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-6
    )
    sign = np.sign((ours.components_ * theirs.components_).sum(1))
    np.testing.assert_allclose(got["features"], theirs.transform(x) * sign, atol=2e-3, rtol=1e-3)


def test_pca_looks_at_training_stimuli_only():
    ds = features(20, 50)
    train = [f"s{i}" for i in range(12)]
    changed = ds.copy(deep=True)
    changed["features"][12:] = 1e6
    a, b = PCA(5).fit(ds, train), PCA(5).fit(changed, train)
    np.testing.assert_array_equal(a.components_, b.components_)
    np.testing.assert_array_equal(a.components_, PCA(5).fit(ds, train[::-1]).components_)
    scores = a.transform(ds)["features"].values[:12]
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-5)


def test_whitening_and_fraction_of_variance():
    ds = features(40, 10)
    train = ds["stimulus_id"].values.tolist()
    white = PCA(4, whiten=True).fit_transform(ds, train)["features"].values
    np.testing.assert_allclose(np.cov(white.T), np.eye(4), atol=1e-5)
    part = PCA(0.7).fit(ds, train)
    assert part.explained_variance_ratio_.sum() >= 0.7
    assert part.explained_variance_ratio_[:-1].sum() < 0.7
    assert len(PCA(500).fit(ds, train).components_) == 10


@pytest.mark.parametrize("whiten", [False, True])
def test_weights_expand_to_the_features(whiten):
    ds = features(25, 30)
    pca = PCA(6, whiten=whiten).fit(ds, ds["stimulus_id"].values[:20])
    rng = np.random.default_rng(1)
    weights, intercept = rng.normal(size=(3, 6)), rng.normal(size=3)
    full, offset = pca.expand(weights, intercept)
    assert full.shape == (3, 30)
    np.testing.assert_allclose(
        ds["features"].values @ full.T + offset,
        pca.transform(ds)["features"].values @ weights.T + intercept,
        atol=1e-4,
    )


def test_random_projection_is_sklearns():
    ds = features(30, 200)
    train = ds["stimulus_id"].values[:20].tolist()
    ours = SparseRandomProjection(50, seed=4).fit(ds, train)
    theirs = random_projection.SparseRandomProjection(50, random_state=4).fit(
        ds["features"].values[:20]
    )
    np.testing.assert_allclose(
        ours.transform(ds)["features"],
        theirs.transform(ds["features"].values),
        rtol=1e-4,
        atol=1e-3,
    )
    other = SparseRandomProjection(50, seed=5).fit(ds, train)
    assert (other.components_ != ours.components_).nnz > 0
    with pytest.raises(ConfigError, match="Give n_components"):
        SparseRandomProjection("auto", eps=0.1).fit(ds, train)


@pytest.mark.parametrize("make", [PCA, SparseRandomProjection])
def test_schema_params_and_refusals(make, tmp_path):
    ds = features(20, 40)
    ids = ds["stimulus_id"].values.tolist()
    store.write(ds, tmp_path / "f.zarr", "features")
    lazy = store.read(tmp_path / "f.zarr")
    reduced = make(5).fit_transform(lazy, ids[:15], test_ids=ids[15:])
    store.write(reduced, tmp_path / "r.zarr", "features")
    assert reduced.sizes == {"stimulus": 20, "feature": 5}
    assert reduced["features"].dtype == np.float32
    assert json.loads(reduced.attrs["reduction"])["method"] == make.__name__
    assert clone(make(7)).get_params()["n_components"] == 7
    with pytest.raises(LeakError, match=r"1 stimuli .*'s3'"):
        make(5).fit(ds, ids[:15], test_ids=[*ids[15:], "s3"])
    with pytest.raises(SchemaError, match="'s99'"):
        make(5).fit(ds, [*ids, "s99"])
    with pytest.raises(SchemaError, match="at least 2"):
        make(5).fit(ds, ids[:1])
    with pytest.raises(NotFittedError):
        make(5).transform(ds)
    with pytest.raises(SchemaError, match=r"length 12.*fitted on 40"):
        make(5).fit(ds, ids).transform(features(5, 12))


def test_pca_out_of_range():
    ds = features(5, 4)
    ids = ds["stimulus_id"].values.tolist()
    for bad in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="n_components"):
            PCA(bad).fit(ds, ids)
    flat = ds.copy(deep=True)
    flat["features"][:] = 2
    with pytest.raises(SchemaError, match="constant"):
        PCA(2).fit(flat, ids)
