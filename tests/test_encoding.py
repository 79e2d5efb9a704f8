"""Encoding models recover known truths, never see what they are scored on, and refuse bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from brainalign.data.schema import validate
from brainalign.data.section import read_section, write_section
from brainalign.data.simulate import simulate
from brainalign.encoding import (
    align,
    compare_models,
    deviations,
    encode,
    fit_encoder,
    layer_roi,
    make_splits,
    predict,
    read_result,
    roi_members,
    select,
    selections,
    write_result,
)
from brainalign.encoding.sections import encoding_section
from brainalign.errors import ConfigError, LeakError, SchemaError, UnknownNameError
from brainalign.evaluation import pearson_r

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")
QUICK = {"alphas": np.logspace(-1, 4, 6), "inner_cv": "gcv", "permutation": "none"}


def features(n=60, p=12, layers=("early", "late"), seed=0, model="net", ids=None):
    rng = np.random.default_rng(seed)
    ids = [f"im{i:03d}" for i in range(n)] if ids is None else ids
    return {
        layer: xr.Dataset(
            {
                "features": (
                    ("stimulus", "feature"),
                    (3 * rng.standard_normal((n, p)) + 5).astype(np.float32),
                )
            },
            coords={"stimulus_id": ("stimulus", ids), "model": model, "layer": layer},
            attrs={"pooling": "mean"},
        )
        for layer in layers
    }


def responses(y, ids, *, roi=None, repetition=None, subject="s1"):
    n, t = y.shape
    return xr.Dataset(
        {"responses": (("presentation", "neuroid"), y.astype(np.float32))},
        coords={
            "stimulus_id": ("presentation", list(ids)),
            "repetition": ("presentation", np.zeros(n, int) if repetition is None else repetition),
            "session": ("presentation", np.zeros(n, int)),
            "run": ("presentation", np.zeros(n, int)),
            "subject": ("presentation", np.broadcast_to(subject, n).astype(str)),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(t)]),
            "roi": ("neuroid", ["IT"] * t if roi is None else roi),
            "hemisphere": ("neuroid", ["L"] * t),
        },
        attrs={"units": "% signal change", "subject": "s1"},
    )


def driven(layers, weights, *, repeats=1, noise=1.0, seed=1, **options):
    """Responses that the named layer drives: {layer: (n_features, n_neuroids)}."""
    rng = np.random.default_rng(seed)
    first = next(iter(layers.values()))
    ids = np.tile(first["stimulus_id"].values, repeats)
    parts = []
    for name, w in weights.items():
        x = layers[name]["features"].values
        parts.append(((x - x.mean(0)) / x.std(0)) @ w)
    signal = np.tile(np.hstack(parts), (repeats, 1))
    y = signal + noise * rng.standard_normal(signal.shape)
    repetition = np.repeat(np.arange(repeats), len(first["stimulus_id"]))
    return responses(y + 10, ids, repetition=repetition, **options)


def null(t, n=60, repeats=1, seed=2):
    rng = np.random.default_rng(seed)
    ids = [f"im{i:03d}" for i in range(n)] * repeats
    return responses(rng.standard_normal((n * repeats, t)), ids)


# Known truths


def test_weights_layer_and_intercept_are_recovered():
    rng = np.random.default_rng(3)
    layers = features(n=400)
    W = rng.standard_normal((12, 20))
    data = driven(layers, {"early": W[:, :10], "late": W[:, 10:]}, noise=0.3)
    result = encode(layers, data, **QUICK)
    assert result.best["best_layer"].values.tolist() == ["early"] * 10 + ["late"] * 10
    assert (result.best["layer_agreement"] == 1).all()
    assert result.best["r"].min() > 0.97
    early = result.encoders["early"]
    np.testing.assert_allclose(early["weights"].values, W[:, :10].T, atol=0.08)
    np.testing.assert_allclose(early["intercept"].values, 10, atol=0.1)
    assert early["neuroid_id"].values.tolist() == [f"v{i}" for i in range(10)]
    x = layers["early"]["features"].values
    np.testing.assert_allclose(early["feature_mean"], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(early["feature_scale"], x.std(axis=0), rtol=1e-5)


def test_encoder_predicts_from_features_alone(tmp_path):
    layers = features(n=200)
    rng = np.random.default_rng(4)
    W = rng.standard_normal((12, 6))
    result = encode(layers, driven(layers, {"early": W[:, :3], "late": W[:, 3:]}), **QUICK)
    write_result(result, tmp_path / "result", provenance={"by": "test"})
    again = read_result(tmp_path / "result")
    new = features(n=50, seed=9, ids=[f"new{i}" for i in range(50)])
    predicted = predict(again.encoders, new)
    assert predicted["neuroid_id"].values.tolist() == [f"v{i}" for i in range(6)]
    x = {
        name: (new[name]["features"] - layers[name]["features"].values.mean(0))
        / layers[name]["features"].values.std(0)
        for name in new
    }
    truth = np.hstack([x["early"].values @ W[:, :3], x["late"].values @ W[:, 3:]])
    assert pearson_r(truth, predicted.values).min() > 0.98
    one = predict(again.encoder, new)
    assert one.shape == (50, 6) and one.attrs["units"] == "% signal change"
    for name in ("scores", "best", "predictions"):
        assert getattr(again, name).attrs["by"] == "test"
        xr.testing.assert_equal(getattr(again, name).compute(), getattr(result, name))


def test_simulated_subject(tmp_path):
    layers = features(n=240, p=20)
    neuroids = xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(120)]),
            "roi": ("neuroid", ["A"] * 40 + ["B"] * 40 + [""] * 40),
            "hemisphere": ("neuroid", ["L"] * 120),
        }
    )
    for generator in ("linear", "rectified"):
        rng = np.random.default_rng(0)
        sim = simulate(
            layers,
            neuroids=neuroids,
            layers={"A": "early", "B": "late", "": "late"},
            directions={"A": rng.standard_normal(20), "B": rng.standard_normal(20)},
            generator=generator,
            null=1.0,
            seed=5,
        )
        result = encode(
            layers, sim.responses, alphas=np.logspace(-1, 4, 6), inner_cv="gcv", permutation="none"
        )
        best = result.best["best_layer"].values[:80] == np.repeat(["early", "late"], 40)
        assert best.mean() > 0.95
        truth = sim.truth["ceiling"].values
        assert abs(result.best["ceiling"].values[:80] - truth[:80]).mean() < 0.06
        assert abs((result.best["ceiling"].values - truth)[:80].mean()) < 0.03
        share = result.best["normalised"].values[:80].mean()
        assert (0.9 if generator == "linear" else 0.7) < share < 1.03
        assert result.best["r"].values[80:].mean() < 0.03


def test_scores_are_their_definitions():
    layers = features()
    data = driven(layers, {"early": np.random.default_rng(0).standard_normal((12, 8))}, noise=4)
    splits = make_splits(align(layers, data), 4, seed=3)
    result = encode(layers, data, splits=splits, **QUICK)
    measured = data["responses"].values.astype(float)
    predicted, baseline = np.empty_like(measured), np.empty_like(measured)
    for train, test in splits:
        baseline[test] = measured[train].mean(axis=0)
    place = result.predictions["stimulus_id"].values
    assert place.tolist() == data["stimulus_id"].values.tolist()
    predicted = result.predictions["predicted"].values.astype(float)
    np.testing.assert_allclose(result.predictions["measured"], measured, rtol=1e-6)
    y, p = deviations(result.predictions)
    np.testing.assert_allclose(y, measured - baseline, atol=1e-5)
    np.testing.assert_allclose(result.best["r"], pearson_r(y, p), atol=1e-5)
    r2 = 1 - ((measured - predicted) ** 2).sum(0) / ((measured - baseline) ** 2).sum(0)
    np.testing.assert_allclose(result.best["r2"], r2, atol=1e-5)
    for layer in layers:
        r = pearson_r(*deviations(result.predictions, layer))
        np.testing.assert_allclose(result.scores["r"].sel(layer=layer), r, atol=1e-5)


# Nothing that is scored takes part in a choice


@pytest.mark.parametrize("inner", [3, "gcv", "loo"])
@pytest.mark.parametrize("choose", ["neuroid", "roi"])
def test_predictions_do_not_depend_on_the_test_responses(inner, choose):
    layers = features()
    data = driven(layers, {"late": np.random.default_rng(0).standard_normal((12, 10))}, noise=6)
    options = {**QUICK, "inner_cv": inner, "choose": choose}
    pairs = make_splits(align(layers, data), 5, seed=0)
    before = encode(layers, data, splits=pairs, **options).predictions
    changed = data.copy(deep=True)
    test = pairs[2][1]
    changed["responses"][test] = np.random.default_rng(7).standard_normal((len(test), 10)) * 50
    after = encode(layers, changed, splits=pairs, **options).predictions
    np.testing.assert_array_equal(before["predicted"][test], after["predicted"][test])
    np.testing.assert_array_equal(
        before["predicted_layer"][:, test], after["predicted_layer"][:, test]
    )
    others = np.setdiff1d(np.arange(60), test)
    assert not np.allclose(before["predicted"][others], after["predicted"][others])


def test_predictions_of_one_stimulus_do_not_depend_on_other_test_features():
    layers = features()
    data = driven(layers, {"late": np.random.default_rng(0).standard_normal((12, 5))})
    pairs = [(np.arange(45), np.arange(45, 60))]
    before = encode(layers, data, splits=pairs, **QUICK).predictions["predicted"].values
    changed = {k: v.copy(deep=True) for k, v in layers.items()}
    for ds in changed.values():
        ds["features"][46:] *= 100
    after = encode(changed, data, splits=pairs, **QUICK).predictions["predicted"].values
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.allclose(before[1:], after[1:])


def test_nested_choice_of_many_useless_layers_gains_nothing():
    layers = features(n=50, layers=[f"l{i}" for i in range(12)])
    result = encode(layers, null(300, n=50), **QUICK)
    best_of_all = result.scores["r"].max("layer").mean().item()
    assert best_of_all > 0.12
    assert result.best["r"].mean().item() < 0.03


def test_double_dipping_is_refused():
    layers = features(n=80)
    data = null(400, n=80)
    first = encode(layers, data, **QUICK)
    mask = first.best["r"] > first.best["r"].quantile(0.95).item()
    chosen = select(data, mask, chosen_on=first.best, name="best 5 % of voxels")
    # What would be reported of pure noise:
    assert first.best["r"].values[mask.values].mean() > 0.2
    with pytest.raises(LeakError, match=r"20 of 400 neuroids were chosen by 'best 5 % of voxels'"):
        encode(layers, chosen, **QUICK)
    with pytest.raises(LeakError, match="Double dipping"):
        encode(layers, select(chosen, np.ones(20, bool), chosen_on=[]), **QUICK)


def test_choices_on_other_stimuli_are_allowed_and_travel_to_disk(tmp_path):
    layers = features(n=80)
    data = null(100, n=80)
    ids = data["stimulus_id"].values.astype(str)
    train, test = ids[:50], ids[50:]
    localiser = data.isel(presentation=slice(0, 50))
    mask = localiser["responses"].values.std(axis=0) > 1
    chosen = select(data, mask, chosen_on=localiser, name="varying")
    assert selections(chosen)[0]["stimuli"] == sorted(train.tolist())
    result = encode(layers, chosen, splits=[(train, test)], **QUICK)
    assert result.best.sizes["neuroid"] == mask.sum()
    assert selections(result.best)[0]["name"] == "varying"
    with pytest.raises(LeakError, match="1 of these are tested"):
        encode(layers, chosen, splits=[(ids[:49], ids[49:])], **QUICK)
    # A mask computed from scores of already chosen neuroids inherits their history.
    nested = select(data, np.ones(100, bool), chosen_on=result.best)
    assert [s["name"] for s in selections(nested)] == ["varying", "selection"]


def test_leaks_are_refused():
    layers = features()
    data = null(5)
    ids = data["stimulus_id"].values.astype(str)
    with pytest.raises(LeakError, match="im010"):
        encode(layers, data, splits=[(ids[:11], ids[10:])], **QUICK)
    same = {s: (f"{0:064d}" if s in ("im000", "im030") else f"{i + 1:064d}")
            for i, s in enumerate(ids)}  # fmt: skip
    pairs = [(ids[:30], ids[30:])]
    with pytest.raises(LeakError):
        encode(layers, data, splits=pairs, stimulus_sha256=same, **QUICK)
    encode(layers, data, splits=pairs, **QUICK)
    encode(layers, data, splits=pairs, stimulus_sha256=same, allow_leak=True, **QUICK)
    # Folds made here keep both names of one image on one side.
    for train, test in make_splits(align(layers, data), 5, stimulus_sha256=same):
        assert (0 in train) == (30 in train) and (0 in test) == (30 in test)


# Significance


@pytest.mark.parametrize(
    ("permutation", "splits", "repeats"),
    [("pooled", 5, 1), ("refit", 4, 1), ("refit", 3, 2), ("predictions", "held out", 1)],
)
def test_p_values_of_null_neuroids_are_uniform(permutation, splits, repeats):
    layers = features(n=50, p=8)
    t = 300
    data = null(t, n=50, repeats=repeats, seed=11)
    ids = data["stimulus_id"].values.astype(str)[:50]
    result = encode(
        layers,
        data,
        splits=[(ids[:25], ids[25:])] if splits == "held out" else splits,
        alphas=np.logspace(0, 3, 4),
        inner_cv=3,
        repetitions="keep" if repeats > 1 else "average",
        permutation=permutation,
        n_permutations=3000 if permutation == "pooled" else 99,
        seed=1,
    )
    for p in (result.best["p"].values, *result.scores["p"].values):
        assert stats.kstest(p, "uniform").pvalue > 0.001
        assert (p <= 0.05).mean() < 0.09


def test_exchanging_predictions_of_folds_is_not_exact_and_says_so(caplog):
    layers = features(n=50, p=8)
    data = null(1000, n=50, seed=12)
    options = {"alphas": np.logspace(0, 3, 4), "inner_cv": "gcv", "n_permutations": 199}
    result = encode(layers, data, permutation="predictions", **options)
    assert "not exact" in caplog.text
    assert stats.kstest(result.best["p"].values, "uniform").pvalue < 1e-6


def test_false_discovery_rate_is_held_beside_real_effects():
    layers = features(n=60, p=8)
    false, found, power = 0, 0, []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        W = np.hstack([rng.standard_normal((8, 40)), np.zeros((8, 160))])
        data = driven(layers, {"early": W}, noise=3.5, seed=seed)
        result = encode(layers, data, alphas=np.logspace(0, 3, 4), inner_cv="gcv",
                        permutation="pooled", n_permutations=2000, seed=seed)  # fmt: skip
        rejected = result.best["q"].values <= 0.1
        false += rejected[40:].sum()
        found += rejected.sum()
        power.append(rejected[:40].mean())
    assert np.mean(power) > 0.5
    assert false / found < 0.12


def test_family_wise_p_of_refits():
    layers = features(n=50, p=8)
    rng = np.random.default_rng(0)
    W = np.hstack([2 * rng.standard_normal((8, 3)), np.zeros((8, 40))])
    result = encode(layers, driven(layers, {"early": W}), **{**QUICK, "permutation": "refit"},
                    n_permutations=39, choose="all")  # fmt: skip
    assert (result.best["p_max"].values[:3] == 1 / 40).all()
    assert (result.best["p_max"].values >= result.best["p"].values).all()


# Options


def test_repeats_are_averaged_or_kept():
    layers = features(n=60)
    rng = np.random.default_rng(0)
    data = driven(layers, {"early": rng.standard_normal((12, 30))}, repeats=3, noise=5)
    averaged = encode(layers, data, **QUICK)
    kept = encode(layers, data, **{**QUICK, "inner_cv": 3}, repetitions="keep")
    assert averaged.predictions.sizes["presentation"] == 60
    assert kept.predictions.sizes["presentation"] == 180
    assert averaged.best["ceiling"].mean() > kept.best["ceiling"].mean() + 0.1
    truth = 12 / (12 + 25 / np.array([3, 1]))
    assert averaged.best["ceiling"].mean().item() == pytest.approx(truth[0], abs=0.06)
    assert kept.best["ceiling"].mean().item() == pytest.approx(truth[1], abs=0.06)
    mean = data.groupby("stimulus_id").mean()["responses"].values
    np.testing.assert_allclose(averaged.predictions["measured"], mean, rtol=1e-4)


def test_roi_and_all_share_one_layer():
    layers = features(n=100)
    rng = np.random.default_rng(0)
    w = {"early": rng.standard_normal((12, 6)), "late": rng.standard_normal((12, 6))}
    data = driven(layers, w, noise=1, roi=["A"] * 4 + ["B"] * 8)
    by_roi = encode(layers, data, choose="roi", **QUICK)
    assert by_roi.best["best_layer"].values.tolist() == ["early"] * 4 + ["late"] * 8
    for_all = encode(layers, data, choose="all", **QUICK)
    assert len(set(for_all.best["best_layer"].values.tolist())) == 1
    assert list(for_all.encoders) == [str(for_all.encoder["layer"].values)]


def test_same_seed_same_numbers():
    layers, data = features(), null(20)
    options = {"alphas": [1.0, 100.0], "permutation": "pooled", "n_permutations": 50}
    one, two = (encode(layers, data, seed=4, **options) for _ in range(2))
    xr.testing.assert_identical(one.best, two.best)
    xr.testing.assert_identical(one.predictions, two.predictions)
    other = encode(layers, data, seed=5, **options)
    assert not np.allclose(one.best["r"], other.best["r"])


def test_batches_of_targets_change_nothing():
    layers = features()
    data = driven(layers, {"late": np.random.default_rng(0).standard_normal((12, 9))}, noise=4)
    whole = encode(layers, data, **QUICK)
    parts = encode(layers, data, target_batch=4, **QUICK)
    np.testing.assert_allclose(whole.best["r"], parts.best["r"], atol=1e-5)
    np.testing.assert_allclose(whole.encoder["weights"], parts.encoder["weights"], atol=1e-5)


# Layers, ROIs, models


@pytest.fixture(scope="module")
def two_models():
    layers = features(n=120)
    rng = np.random.default_rng(0)
    w = {"early": rng.standard_normal((12, 20)), "late": rng.standard_normal((12, 20))}
    data = driven(layers, w, repeats=2, noise=4, roi=["A"] * 20 + ["B"] * 15 + [""] * 5)
    other = features(n=120, seed=77, model="random")
    return encode(layers, data, **QUICK), encode(other, data, **QUICK)


@pytest.mark.parametrize("over", ["stimuli", "neuroids", "both"])
def test_layers_by_roi(two_models, over):
    result = two_models[0]
    table = layer_roi(result, over=over, n_bootstrap=200)
    assert table["layer"].values.tolist() == ["early", "late", "chosen layer"]
    assert table["roi"].values.tolist() == ["A", "B"]
    assert table["n_neuroids"].values.tolist() == [20, 15]
    for roi, index in roi_members(result.best).items():
        for layer in ("early", "late"):
            expected = result.scores["r"].sel(layer=layer).values[index].mean()
            assert table["value"].sel(roi=roi, layer=layer).item() == pytest.approx(expected)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert table["low"].sel(roi="A", layer="early") > table["high"].sel(roi="A", layer="late")
    normalised = layer_roi(
        result, measure="normalised", over=over, n_bootstrap=50, rois=["A", "all"]
    )
    value = normalised["value"].sel(roi="A", layer="chosen layer").item()
    assert value == pytest.approx(result.best["normalised"].values[:20].mean())


def test_models_are_compared_on_the_same_stimuli(two_models):
    net, random = two_models
    table = compare_models({"net": net, "random": random, "again": net}, n_bootstrap=300)
    assert (table["difference_low"].sel(model="net", model_2="random") > 0).all()
    assert (table["p"].sel(model="net", model_2="random") < 0.01).all()
    assert (table["difference"].sel(model="net", model_2="again") == 0).all()
    assert (table["p"].sel(model="net", model_2="again") == 1).all()
    width = table["difference_high"] - table["difference_low"]
    assert (width.sel(model="net", model_2="again") == 0).all()
    other = encode(features(n=120), null(40, n=120), splits=4, **QUICK)
    with pytest.raises(SchemaError, match="fold differs"):
        compare_models({"net": net, "other": other})


def test_models_compare_on_their_common_neuroids(two_models):
    net, random = two_models
    part = np.r_[0:10, 20:40]
    smaller = type(net)(random.scores.isel(neuroid=part), random.best.isel(neuroid=part),
                        random.predictions.isel(neuroid=part), random.encoder, {})  # fmt: skip
    table = compare_models({"net": net, "random": smaller}, n_bootstrap=20)
    assert table["n_neuroids"].values.tolist() == [10, 15]
    assert table["value"].sel(model="net", roi="A").item() == pytest.approx(
        net.best["r"].values[:10].mean()
    )


def test_overlapping_roi_masks(two_models):
    net = two_models[0]
    mask = np.zeros((40, 2), dtype=bool)
    mask[:5, 0] = mask[:30, 1] = True
    marked = net.best.assign(roi_mask=(("neuroid", "roi_name"), mask))
    with pytest.raises(SchemaError, match="roi_name"):
        roi_members(marked)
    marked = marked.assign_coords(roi_name=["face", "wide"])
    members = roi_members(marked)
    assert {k: len(v) for k, v in members.items()} == {"A": 20, "B": 15, "face": 5, "wide": 30}
    with pytest.raises(UnknownNameError, match="Did you mean 'face'"):
        roi_members(marked, ["faces"])


def test_section_holds_what_a_reader_needs(two_models, tmp_path):
    net, random = two_models
    section = encoding_section(
        {"s1": {"net": net, "random": random}},
        titles={"net": "A <b>net</b>", "random": "Random"},
        baselines=["random"],
        bootstraps=50,
    )
    write_section(section, tmp_path / "section")
    read = read_section(tmp_path / "section")
    kinds = {f.kind for f in read.figures}
    assert {"distribution", "heatmap", "points"} <= kinds
    assert all(f.caption.strip() for f in read.figures)
    assert any(e.low is not None and e.low <= e.value <= e.high for e in read.summary)
    for key in ("naselaris2011", "allen2022"):
        assert f"@{key}" in read.methods and key in read.references
    assert "6 penalties from 0.1 to 10000" in read.methods


# Errors come before the work


def test_stimuli_without_partners():
    layers = features()
    data = null(5)
    fewer = {k: v.isel(stimulus=slice(2, None)) for k, v in layers.items()}
    with pytest.raises(SchemaError, match=r"2 of the responses have no features: 'im000', 'im001'"):
        encode(fewer, data, **QUICK)
    with pytest.raises(SchemaError, match=r"3 with features have no responses: 'im000'"):
        encode(layers, data.isel(presentation=slice(3, None)), **QUICK)
    result = encode(fewer, data.isel(presentation=slice(0, 50)), stimuli="intersect", **QUICK)
    assert result.predictions.sizes["presentation"] == 48
    assert "2 stimuli of the responses have no features" in result.exclusions
    elsewhere = features(ids=[f"x{i}" for i in range(60)])
    with pytest.raises(SchemaError, match="Only 0 of 60 stimuli"):
        encode(elsewhere, data, stimuli="intersect", **QUICK)


def test_order_of_stimuli_does_not_matter():
    layers = features()
    data = driven(layers, {"early": np.random.default_rng(0).standard_normal((12, 4))})
    order = np.random.default_rng(1).permutation(60)
    shuffled = {k: v.isel(stimulus=order) for k, v in layers.items()}
    a, b = encode(layers, data, **QUICK), encode(shuffled, data, **QUICK)
    xr.testing.assert_identical(a.best, b.best)


def test_bad_neuroids_are_counted_or_refused():
    layers = features()
    data = driven(layers, {"early": np.random.default_rng(0).standard_normal((12, 6))})
    data["responses"][5, 1] = np.nan
    data["responses"][:, 2] = 3.0
    result = encode(layers, data, **QUICK)
    assert result.best["neuroid_id"].values.tolist() == ["v0", "v3", "v4", "v5"]
    assert "1 neuroids: NaN or infinite" in result.exclusions
    assert "1 neuroids: constant" in result.exclusions
    with pytest.raises(SchemaError, match=r"1 of 6 neuroids are NaN or infinite: 'v1'"):
        encode(layers, data, bad_neuroids="raise", **QUICK)
    data["responses"][7] = np.nan
    with pytest.raises(SchemaError, match=r"No neuroid is left: .* 1 whole rows are NaN"):
        encode(layers, data, **QUICK)


def test_other_errors():
    layers, data = features(), null(5)
    broken = {k: v.copy(deep=True) for k, v in layers.items()}
    broken["late"]["features"][4, 2] = np.inf
    with pytest.raises(SchemaError, match=r"'late' hold 1 values .* 'im004'"):
        encode(broken, data, **QUICK)
    with pytest.raises(SchemaError, match="2 subjects"):
        mixed = ["s1", "s2"] * 30
        encode(layers, data.assign_coords(subject=("presentation", mixed)), **QUICK)
    series = data.rename(presentation="time").assign_attrs(sampling_rate=1.0)
    with pytest.raises(SchemaError, match="time series"):
        encode(layers, series, **QUICK)
    with pytest.raises(ConfigError, match="choose is 'voxel'"):
        encode(layers, data, choose="voxel", **QUICK)
    with pytest.raises(ConfigError, match="unknown stimuli: 'nosuch'"):
        encode(layers, data, splits=[(["im000"], ["nosuch"])], **QUICK)
    with pytest.raises(ConfigError, match="tested in more than one fold"):
        pairs = [(np.arange(30), np.arange(30, 60)), (np.arange(20), np.arange(30, 60))]
        encode(layers, data, splits=pairs, **QUICK)
    with pytest.raises(ConfigError, match='needs choose="neuroid"'):
        encode(layers, data, choose="roi", permutation="pooled", alphas=[1.0])
    with pytest.raises(SchemaError, match=r"ceiling has shape \(3,\)"):
        encode(layers, data, ceiling=[1.0, 1.0, 1.0], **QUICK)
    unequal = data.isel(presentation=np.r_[0:60, 0:5])
    with pytest.raises(ConfigError, match="cannot be exchanged"):
        encode(layers, unequal, repetitions="keep", alphas=[1.0, 10.0], inner_cv=3)


def test_predict_refuses_other_features():
    layers = features()
    data = driven(layers, {"early": np.random.default_rng(0).standard_normal((12, 4))})
    encoder = fit_encoder(layers["early"], data, alphas=[0.1, 1.0, 10.0])
    validate(encoder, "encoder")
    assert pearson_r(data["responses"].values, predict(encoder, layers).values).min() > 0.9
    with pytest.raises(SchemaError, match="layer 'early'; the features are of 'late'"):
        predict(encoder, layers["late"])
    with pytest.raises(SchemaError, match="model 'net'; the features are of 'other'"):
        predict(encoder, features(model="other")["early"])
    with pytest.raises(SchemaError, match="pooling 'mean'"):
        predict(encoder, layers["early"].assign_attrs(pooling="class"))
    with pytest.raises(SchemaError, match="takes 12 features; there are 9"):
        predict(encoder, layers["early"].isel(feature=slice(9)))


def test_a_given_ceiling_and_its_threshold():
    layers, data = features(), null(4)
    result = encode(layers, data, ceiling=[0.5, 0.05, np.nan, 1.0], ceiling_threshold=0.1, **QUICK)
    assert np.isfinite(result.best["normalised"].values).tolist() == [True, False, False, True]
    assert any("2 of 4 neuroids have a noise ceiling below 0.1" in e for e in result.exclusions)
