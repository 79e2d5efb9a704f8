"""Models of several feature spaces: banded ridge, stacking, and what each space explains."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from brainalign.encoding import (
    encode,
    gather,
    partition_variance,
    predict,
    read_result,
    write_result,
)
from brainalign.encoding.partition import FULL
from brainalign.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")

N, V = 900, 15
OPTIONS = {
    "splits": 3, "inner_cv": 2, "alphas": np.logspace(0, 4, 5), "n_iter": 4, "n_permutations": 60,
    "n_bootstrap": 100,
}  # fmt: skip
#: Variance of the responses from a alone, from b alone, and from what both hold.
OWN_A, OWN_B, SHARED = 0.2, 0.1, 0.3


def dataset(x, ids, layer, model="net"):
    return xr.Dataset(
        {"features": (("stimulus", "feature"), x.astype(np.float32))},
        coords={"stimulus_id": ("stimulus", ids), "model": model, "layer": layer},
        attrs={"pooling": "mean"},
    )


@pytest.fixture(scope="module")
def study():
    """Space a holds (u, s), b in two layers (v) and (s'), with s' = s; c holds noise."""
    rng = np.random.default_rng(0)
    u, v, s, c = (rng.standard_normal((N, k)) for k in (5, 5, 5, 8))
    ids = [f"im{i:03d}" for i in range(N)]
    layers = {
        "a": dataset(np.hstack([u, s]), ids, "a"),
        "b1": dataset(v, ids, "b1", "other"),
        "b2": dataset(s + 1e-3 * rng.standard_normal(s.shape), ids, "b2", "other"),
        "c": dataset(c, ids, "c", "other"),
    }

    def part(x, share):
        w = rng.standard_normal((x.shape[1], V))
        return x @ (w / np.linalg.norm(w, axis=0)) * np.sqrt(share)

    y = part(u, OWN_A) + part(v, OWN_B) + part(s, SHARED)
    y += np.sqrt(1 - OWN_A - OWN_B - SHARED) * rng.standard_normal((N, V))
    zeros = ("presentation", np.zeros(N, int))
    responses = xr.Dataset(
        {"responses": (("presentation", "neuroid"), y.astype(np.float32))},
        coords={
            "stimulus_id": ("presentation", ids), "repetition": zeros, "session": zeros,
            "run": zeros, "subject": ("presentation", ["s1"] * N),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(V)]),
            "roi": ("neuroid", ["V1"] * 10 + ["V2"] * 5), "hemisphere": ("neuroid", ["L"] * V),
        },
    )  # fmt: skip
    return layers, responses


SPACES = {"a": ["a"], "b": ["b1", "b2"], "c": ["c"]}
# R^2 of one neuroid over 900 rows has a standard error of about 0.03; these are means of 15.
CLOSE = 0.03


@pytest.mark.parametrize("method", ["subsets", "leave_one_out", "product"])
def test_a_known_partition_is_recovered(study, method):
    layers, responses = study
    got = encode(
        layers, responses, regression="banded", spaces=SPACES, partition=method,
        permutation="none", **{**OPTIONS, "n_permutations": 1},
    )  # fmt: skip
    share = got.best["share"].mean("neuroid").to_series().to_dict()
    total = float(got.best["r2"].mean())
    assert total == pytest.approx(OWN_A + OWN_B + SHARED, abs=CLOSE)
    expected = {
        "subsets": {"a": OWN_A, "b": OWN_B, "c": 0, "a & b": SHARED, "a & c": 0, "b & c": 0,
                    "a & b & c": 0},
        "leave_one_out": {"a": OWN_A, "b": OWN_B, "c": 0},
        # What both hold is divided between them.
        "product": {"c": 0},
    }[method]  # fmt: skip
    for name, value in expected.items():
        assert share[name] == pytest.approx(value, abs=CLOSE), name
    if method != "leave_one_out":
        np.testing.assert_allclose(got.best["share"].sum("part"), got.best["r2"], atol=1e-5)
    if method == "product":
        assert share["a"] > OWN_A + 0.02 and share["b"] > OWN_B + 0.02
    # Samples of stimuli: their mean is the estimate, and the truth lies within four of their sd.
    sums = got.bootstrap
    drawn = (sums["share_total"] / sums["share_count"]).sel(roi="V1")
    first = got.best["share"].isel(neuroid=slice(10)).mean("neuroid")
    assert (abs(drawn.mean("sample") - first) < drawn.std("sample")).all()
    for name, value in expected.items():
        one = drawn.sel(part=name)
        assert abs(float(first.sel(part=name)) - value) < 4 * float(one.std()) + 0.01


def test_the_partition_is_that_of_the_library(study):
    """With the same folds, spaces and candidates as `partition_variance`, which fits on its own."""
    layers, responses = study
    split = (np.arange(600), np.arange(600, N))
    got = encode(
        layers, responses, regression="banded", spaces=SPACES, partition="leave_one_out",
        permutation="none", **{**OPTIONS, "splits": [split], "seed": 4, "n_bootstrap": 0},
    )  # fmt: skip
    X = np.hstack([layers[k]["features"].values for k in ("a", "b1", "b2", "c")]).astype(float)
    X = (X - X[:600].mean(0)) / X[:600].std(0)
    labels = np.repeat(["a", "b", "c"], [10, 10, 8])
    theirs = partition_variance(
        X, responses["responses"].values.astype(float), labels, [split], n_bootstrap=0,
        method="leave_one_out", alphas=OPTIONS["alphas"], n_iter=4, cv=2,
    )  # fmt: skip
    # The inner folds are others, and the choice of penalties is local.
    for ours, other in ((got.best["share"], theirs["share"]), (got.scores["r2"], theirs["r2"])):
        np.testing.assert_allclose(ours.mean("neuroid"), other.mean("neuroid"), atol=0.01)


@pytest.mark.parametrize("regression", ["banded", "stacking"])
def test_a_joint_model_beats_its_spaces_and_predicts_with_nothing_else(study, regression, tmp_path):
    layers, responses = study
    got = encode(layers, responses, regression=regression, spaces=SPACES, **OPTIONS)
    alone = encode(layers, responses, **OPTIONS)
    assert got.layers == [FULL] and set(got.best["best_layer"].values) == {FULL}
    gain = got.best["r2"].values - alone.best["r2"].values
    # b alone adds 0.1; weights that sum to 1 cannot take all of a and of b.
    assert gain.mean() > (0.05 if regression == "banded" else 0.015)
    assert (got.best["q"].values < 0.05).all()
    assert got.best["penalty"].dims == ("space", "neuroid")
    # The space that tells nothing is left nearly out.
    assert (got.best["penalty"].sel(space="c") > got.best["penalty"].sel(space="a")).mean() > 0.9
    if regression == "stacking":
        np.testing.assert_allclose(got.best["weight"].sum("space"), 1)
        assert np.isnan(got.best["alpha"]).all()
    read = read_result(write_result(got, tmp_path / "r"))
    truth = responses["responses"].values
    predicted = predict(read.encoders, layers)
    r = [np.corrcoef(truth[:, i], predicted.values[:, i])[0, 1] for i in range(V)]
    assert np.mean(r) > np.sqrt(0.6) - (0.05 if regression == "banded" else 0.1)
    encoder = read.encoders[FULL]
    assert set(encoder["feature_space"].values) == {"a", "b", "c"}
    short = {k: v for k, v in layers.items() if k != "b2"}
    with pytest.raises(ValueError, match="no features of layer 'b2' of model 'other'"):
        predict(read.encoders, short)


def test_parts_of_a_joint_model_gather(study, tmp_path):
    layers, responses = study
    options = {
        **OPTIONS, "regression": "banded", "spaces": SPACES, "partition": "product",
        "permutation": "none", "splits": [(np.arange(600), np.arange(600, N))],
    }  # fmt: skip
    whole = encode(layers, responses, **options)
    parts = [encode(layers, responses, part=(k, 2), **options) for k in (1, 2)]
    parts = [read_result(write_result(p, tmp_path / str(i))) for i, p in enumerate(parts)]
    both = gather(parts)
    for name in ("r", "share"):
        np.testing.assert_allclose(both.best[name], whole.best[name], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(both.best["penalty"], whole.best["penalty"], rtol=0.01)
    for name in ("share_total", "share_count"):
        np.testing.assert_allclose(both.bootstrap[name], whole.bootstrap[name], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"regression": "lasso"}, "regression is 'lasso'"),
        ({"regression": "banded", "inner_cv": "loo"}, "validated in folds"),
        ({"spaces": SPACES}, "regression is 'ridge'"),
        ({"partition": "product"}, "need a model of all of them"),
        ({"regression": "banded", "spaces": {"a": ["A"]}}, "no features 'A'. Did you mean 'a'"),
        ({"regression": "banded", "spaces": {"all": ["a"], "b": ["c"]}}, "other than 'all'"),
        ({"regression": "banded", "spaces": {"a": ["a"]}, "partition": "subsets"}, "at least two"),
    ],
)
def test_options_that_cannot_be_used(study, options, what):
    with pytest.raises(ConfigError, match=what):
        encode(*study, **{**OPTIONS, **options})
