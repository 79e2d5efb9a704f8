"""Variance partitioning: identities of the formulas, and known shares of a simulated subject."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from brainalign.encoding import partition_variance
from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.evaluation import (
    pearson_r,
    product_measure,
    r2,
    subsets,
    unique_variance,
    variance_partition,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")

seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=40, deadline=None)
@given(spaces=st.integers(1, 5), seed=seeds, offset=st.sampled_from([0.0, 10.0]))
def test_product_measure_sums_to_the_score(spaces, seed, offset):
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((spaces, 30, 4))
    y = parts.sum(axis=0) + rng.standard_normal((30, 4)) + offset
    mean = y.mean(axis=0)
    shares = product_measure(y, parts)
    np.testing.assert_allclose(shares.sum(axis=0), r2(y, parts.sum(axis=0) + mean), atol=1e-12)
    train_mean = mean + 0.3
    shares = product_measure(y, parts, baseline=train_mean)
    expected = r2(y, parts.sum(axis=0) + train_mean, baseline=train_mean)
    np.testing.assert_allclose(shares.sum(axis=0), expected, atol=1e-12)
    shares = product_measure(y, parts + offset, measure="r")
    np.testing.assert_allclose(shares.sum(axis=0), pearson_r(y, parts.sum(axis=0)), atol=1e-12)


def test_product_measure_of_independent_spaces_is_their_variance():
    """Orthogonal contributions of the right size: each share is its part of the variance."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 5)))[0]
    q = q - q.mean(axis=0)
    q = np.linalg.qr(q)[0][:, :4]
    q = q - q.mean(axis=0)
    sizes = np.array([3.0, 2.0, 1.0])
    parts = (q[:, :3] * sizes).T
    y = parts.sum(axis=0) + 2 * q[:, 3]
    np.testing.assert_allclose(product_measure(y, parts)[:, 0], sizes**2 / 18, atol=1e-12)


def test_product_measure_is_undefined_where_nothing_varies():
    y = np.random.default_rng(1).standard_normal((20, 3))
    y[:, 1] = 4.0
    shares = product_measure(y, np.stack([0.5 * y, 0.2 * y]))
    assert np.isnan(shares[:, 1]).all() and np.isfinite(shares[:, [0, 2]]).all()
    assert np.isnan(product_measure(y[:, 0], np.full((2, 20), 0.1), measure="r")).all()
    with pytest.raises(SchemaError, match="contributions"):
        product_measure(y, y)
    with pytest.raises(ConfigError, match="measure is 'R2'"):
        product_measure(y, y[None], measure="R2")


@settings(max_examples=30, deadline=None)
@given(spaces=st.integers(1, 5), seed=seeds)
def test_partition_is_that_of_sets(spaces, seed):
    """R^2 made as the measure of a union of regions gives these regions back."""
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(spaces)]
    regions = {part: rng.standard_normal(3) for part in subsets(names)}
    explained = {
        chosen: sum(v for part, v in regions.items() if set(part) & set(chosen))
        for chosen in subsets(names)
    }
    parts = variance_partition(explained)
    assert list(parts) == subsets(names)
    for part, expected in regions.items():
        np.testing.assert_allclose(parts[part], expected, atol=1e-12)
    np.testing.assert_allclose(sum(parts.values()), explained[tuple(names)], atol=1e-12)
    without = [explained[tuple(n for n in names if n != s)] for s in names if spaces > 1]
    if spaces > 1:
        unique = unique_variance(explained[tuple(names)], without)
        np.testing.assert_allclose(unique, [parts[(s,)] for s in names], atol=1e-12)


def test_a_missing_subset_is_named():
    with pytest.raises(ConfigError, match=r"all 3 subsets of \['a', 'b'\]; 1 are missing"):
        variance_partition({("a",): 0.1, ("a", "b"): 0.2})
    with pytest.raises(SchemaError, match="full has shape"):
        unique_variance(np.zeros(3), np.zeros((2, 4)))


def subject(n=1600, t=24, seed=0):
    """Space "a" and "b" share a part of what they predict; "c" predicts nothing.

    Features of a are (u, s), of b (v, s'), with s' = s + 0.001 noise: s can be had from either.
    The responses have variance 1: 0.2 from u, 0.1 from v, 0.3 from s, the rest noise.
    """
    rng = np.random.default_rng(seed)
    u, v, s, c = (rng.standard_normal((n, k)) for k in (6, 6, 6, 12))
    X = np.hstack([u, s, v, s + 1e-3 * rng.standard_normal(s.shape), c])
    labels = np.repeat(["a", "b", "c"], [12, 12, 12])

    def part(features, share):
        weights = rng.standard_normal((features.shape[1], t))
        return features @ (weights / np.linalg.norm(weights, axis=0)) * np.sqrt(share)

    Y = part(u, 0.2) + part(v, 0.1) + part(s, 0.3)
    Y += np.sqrt(0.4) * rng.standard_normal((n, t))
    return X, Y, labels


OPTIONS = {"alphas": np.logspace(-1, 5, 7), "n_iter": 12, "cv": 3, "refine": False}
# R^2 of one neuroid over n test rows has a standard error of about 2 sqrt(R^2) (1 - R^2) / sqrt(n)
# (0.016 for R^2 = 0.6 and n = 1600), less by the 24 neuroids' mean, whose noise is independent.
# Fitting 24 weights on 1067 rows costs about 24 / 1067 of the noise variance: 0.01.
MEAN, EACH = 0.03, 0.08


def test_subsets_recover_the_shares_of_a_simulated_subject():
    X, Y, labels = subject()
    found = partition_variance(
        X, Y, labels, KFold(3).split(X), method="subsets", n_bootstrap=200, **OPTIONS
    )
    truth = {"a": 0.2, "b": 0.1, "c": 0.0, "a & b": 0.3, "a & c": 0.0, "b & c": 0.0, "a & b & c": 0}
    assert found["part"].values.tolist() == list(truth)
    assert found["model"].values.tolist()[-1] == "all" and found.sizes["model"] == 7
    for part, expected in truth.items():
        share = found["share"].sel(part=part)
        assert abs(float(share.mean()) - expected) < MEAN, part
        assert float(abs(share - expected).max()) < EACH, part
    np.testing.assert_allclose(found["share"].sum("part"), found["r2"].sel(model="all"), atol=1e-12)
    # Intervals of the parts hold most true values: 95 % of 24, each of which is nearly unbiased.
    for part in ("a", "b"):
        low, high = (found[f"share_{end}"].sel(part=part) for end in ("low", "high"))
        held = (low - 0.01 <= truth[part]) & (truth[part] <= high + 0.01)
        assert float(held.mean()) >= 0.75


def test_unique_variance_of_a_null_space_is_zero():
    X, Y, labels = subject(n=1200, t=12, seed=1)
    found = partition_variance(
        X, Y, labels, KFold(3).split(X), method="leave_one_out", n_bootstrap=0, **OPTIONS
    )
    assert found["part"].values.tolist() == ["a", "b", "c"]
    assert set(found.data_vars) == {"share", "r2"}
    unique = found["share"].mean("neuroid").values
    np.testing.assert_allclose(unique, [0.2, 0.1, 0.0], atol=MEAN)
    assert float(abs(found["share"].sel(part="c")).max()) < 0.02
    without_a = found["r2"].sel(model="b & c")
    np.testing.assert_allclose(found["r2"].sel(model="all") - without_a, found["share"][0])


def test_product_measure_of_a_simulated_subject():
    X, Y, labels = subject(n=1200, t=12, seed=2)
    splits = list(KFold(3).split(X))
    found = partition_variance(X, Y, labels, splits, n_bootstrap=100, **OPTIONS)
    share = found["share"]
    np.testing.assert_allclose(share.sum("part"), found["r2"].sel(model="all"), atol=1e-12)
    mean = share.mean("neuroid").values
    # What a and b share is divided between them; each keeps its own, and c gets nothing.
    assert mean[0] > 0.2 - MEAN and mean[1] > 0.1 - MEAN and abs(mean[2]) < 0.01
    assert abs(mean.sum() - 0.6) < MEAN
    assert (found["share_low"] <= share).all() and (share <= found["share_high"]).all()
    # One split tests the same as the pure function on that model's contributions.
    from brainalign.linear import BandedRidge

    train, test = splits[0]
    one = partition_variance(X, Y, labels, [splits[0]], n_bootstrap=0, **OPTIONS)
    model = BandedRidge(labels, seed=0, **OPTIONS).fit(X[train], Y[train])
    expected = product_measure(
        Y[test], model.predict(X[test], split=True), baseline=Y[train].mean(axis=0)
    )
    np.testing.assert_allclose(one["share"], expected, atol=1e-12)


def test_blocks_of_neuroids_change_nothing(monkeypatch):
    X, Y, labels = subject(n=90, t=7, seed=3)
    Y[:, 2] = 1.0
    frame = pd.DataFrame(X, columns=[f"f{i}" for i in range(X.shape[1])])
    spaces = {s: frame.columns[labels == s].tolist() for s in ("a", "b", "c")}
    options = {**OPTIONS, "n_bootstrap": 20, "neuroid_id": list("stuvwxy")}
    whole = partition_variance(X, Y, labels, KFold(3).split(X), **options)
    monkeypatch.setattr("brainalign.encoding.partition.NEUROIDS_AT_ONCE", 3)
    blocks = partition_variance(frame, Y, spaces, KFold(3).split(X), **options)
    assert np.isnan(whole["share"].sel(neuroid="u")).all()
    for name in whole.data_vars:
        np.testing.assert_allclose(whole[name], blocks[name], atol=1e-8)
    assert blocks.attrs == whole.attrs and blocks["neuroid"].values.tolist() == list("stuvwxy")


def test_presentations_of_a_stimulus_are_resampled_together():
    X, Y, labels = subject(n=60, t=3, seed=4)
    X, Y = np.repeat(X, 8, axis=0), np.repeat(Y, 8, axis=0)
    ids = np.repeat(np.arange(60), 8)
    splits = [(np.flatnonzero(ids < 30), np.flatnonzero(ids >= 30))]
    apart = partition_variance(X, Y, labels, splits, n_bootstrap=300, **OPTIONS)
    together = partition_variance(X, Y, labels, splits, stimulus_id=ids, n_bootstrap=300, **OPTIONS)
    width = [(d["r2_high"] - d["r2_low"]).mean() for d in (apart, together)]
    assert width[1] > 2 * width[0]


def test_errors_come_before_the_work():
    X, Y, labels = subject(n=30, t=2, seed=5)
    splits = list(KFold(3).split(X))
    with pytest.raises(ConfigError, match="method is 'shapley'"):
        partition_variance(X, Y, labels, splits, method="shapley")
    with pytest.raises(ConfigError, match="at least two feature spaces"):
        partition_variance(X, Y, ["a"] * 36, splits)
    with pytest.raises(LeakError, match="trains and tests on the same rows"):
        partition_variance(X, Y, labels, [(np.arange(20), np.arange(15, 30))])
    with pytest.raises(LeakError, match="10 rows are tested in more than one split"):
        partition_variance(X, Y, labels, [splits[0], splits[0]])
    with pytest.raises(ConfigError, match="no splits"):
        partition_variance(X, Y, labels, [])
    with pytest.raises(SchemaError, match="same number of rows"):
        partition_variance(X[:-1], Y, labels, splits)
