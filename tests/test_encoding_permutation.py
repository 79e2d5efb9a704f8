"""Which permutations of an encoding model are exact, and what neuroids share."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from brainalign.encoding import encode, roi_members, select, selections
from brainalign.errors import LeakError, SchemaError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")
QUICK = {"alphas": np.logspace(0, 3, 4), "inner_cv": "gcv"}


def study(n, signal, *, repeats=1, seed=0, p=8, **coords):
    """Two layers of features, and responses with these weights (p, n_neuroids) of the first."""
    rng = np.random.default_rng(seed)
    ids = [f"im{i:03d}" for i in range(n)]
    x = rng.standard_normal((2, n, p)).astype(np.float32)
    layers = {
        name: xr.Dataset(
            {"features": (("stimulus", "feature"), values)},
            coords={"stimulus_id": ("stimulus", ids), "model": "net", "layer": name},
        )
        for name, values in zip(("early", "late"), x, strict=True)
    }
    y = np.tile(x[0] @ signal, (repeats, 1))
    y = y + rng.standard_normal(y.shape)
    t = y.shape[1]
    zeros = ("presentation", np.zeros(len(y), int))
    data = xr.Dataset(
        {"responses": (("presentation", "neuroid"), y.astype(np.float32))},
        coords={
            "stimulus_id": ("presentation", ids * repeats),
            "repetition": ("presentation", np.repeat(np.arange(repeats), n)),
            "session": zeros,
            "run": zeros,
            "subject": ("presentation", ["s1"] * len(y)),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(t)]),
            "roi": ("neuroid", ["A"] * (t // 2) + ["B"] * (t - t // 2)),
            "hemisphere": ("neuroid", ["L"] * t),
            **coords,
        },
    )
    return layers, data


def test_exchanging_the_predictions_of_folds_is_not_exact_and_says_so(caplog):
    layers, data = study(50, np.zeros((8, 1000)), seed=12)
    cheap = encode(layers, data, permutation="predictions", n_permutations=199, **QUICK)
    assert "not exact" in caplog.text
    assert stats.kstest(cheap.best["p"].values, "uniform").pvalue < 1e-6
    honest = encode(layers, data, permutation="pooled", n_permutations=3000, **QUICK)
    assert stats.kstest(honest.best["p"].values, "uniform").pvalue > 0.001


def test_presentations_of_a_stimulus_are_exchanged_together():
    # Stimuli differ (a signal that no feature predicts), so that their repeats resemble each other.
    layers, data = study(50, np.zeros((8, 300)), repeats=2, seed=11)
    own = np.random.default_rng(0).standard_normal((50, 300))
    data["responses"] += np.tile(own, (2, 1)).astype(np.float32)
    result = encode(layers, data, splits=3, repetitions="keep", permutation="refit",
                    n_permutations=99, alphas=QUICK["alphas"], inner_cv=3)  # fmt: skip
    for p in (result.best["p"].values, *result.scores["p"].values):
        assert stats.kstest(p, "uniform").pvalue > 0.001


def test_family_wise_p_of_refits():
    signal = np.zeros((8, 43))
    signal[:, :3] = 2
    layers, data = study(50, signal)
    result = encode(layers, data, permutation="refit", n_permutations=39, choose="all", **QUICK)
    assert (result.best["p_max"].values[:3] == 1 / 40).all()
    assert (result.best["p_max"].values >= result.best["p"].values).all()


def test_neuroids_that_share_their_layer():
    signal = np.random.default_rng(1).standard_normal((8, 12))
    signal[:, :6] *= 3
    layers, data = study(100, signal)
    swapped = dict(zip(layers, reversed(layers.values()), strict=True))
    options = {"permutation": "none", **QUICK}
    data["responses"][:, 5] = np.random.default_rng(2).standard_normal(100)  # no layer of its own
    by_roi = encode(layers, data, choose="roi", **options)
    assert by_roi.best["best_layer"].values.tolist() == ["early"] * 12
    for_all = encode(swapped, data, choose="all", **options)
    assert list(for_all.encoders) == ["late"]
    assert for_all.encoders["late"].sizes["neuroid"] == 12


def test_overlapping_roi_masks():
    mask = np.zeros((40, 2), dtype=bool)
    mask[:5, 0] = mask[:30, 1] = True
    _, data = study(10, np.zeros((8, 40)))
    marked = data.assign(roi_mask=(("neuroid", "roi_name"), mask))
    with pytest.raises(SchemaError, match="roi_name"):
        roi_members(marked)
    members = roi_members(marked.assign_coords(roi_name=["face", "wide"]))
    assert {k: len(v) for k, v in members.items()} == {"A": 20, "B": 20, "face": 5, "wide": 30}
    with pytest.raises(UnknownNameError, match="Did you mean 'face'"):
        roi_members(marked.assign_coords(roi_name=["face", "wide"]), ["faces"])


def test_a_selection_keeps_its_history():
    layers, data = study(80, np.zeros((8, 60)))
    ids = data["stimulus_id"].values
    first = data.isel(presentation=slice(50))
    chosen = select(data, first["responses"].std("presentation") > 1, chosen_on=first, name="vary")
    result = encode(layers, chosen, splits=[(ids[:50], ids[50:])], permutation="none", **QUICK)
    assert selections(result.best)[0]["stimuli"] == sorted(ids[:50].tolist())
    with pytest.raises(LeakError, match="1 of these are tested"):
        encode(layers, chosen, splits=[(ids[:49], ids[49:])], permutation="none", **QUICK)
    again = select(data, np.ones(60, bool), chosen_on=result.best, name="all")
    assert [s["name"] for s in selections(again)] == ["vary", "all"]
