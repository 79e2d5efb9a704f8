"""Encoding models recover what was planted in simulated subjects, and refuse what would mislead."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from brainalign.data.simulate import Simulation, simulate, true_responses
from brainalign.encoding import (
    compare_models,
    compare_subjects,
    encode,
    fit_encoder,
    layer_roi,
    predict,
    read_result,
    record_choice,
    roi_members,
    select,
    write_result,
)
from brainalign.encoding.nested import Solvers, nested_cv
from brainalign.errors import (
    ConfigError,
    LeakError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)
from brainalign.evaluation import noise_ceiling, simulated_ceiling

CATEGORIES = np.array(["people", "bodies", "places", "words", "food", "objects"])
ALPHAS = tuple(np.logspace(-1, 5, 13))


def make_layers(
    n: int = 240, p: int = 20, names: tuple[str, ...] = ("early", "middle", "late"), seed: int = 0
) -> tuple[dict[str, xr.Dataset], np.ndarray]:
    """Independent layers; the features of the last differ between categories."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % len(CATEGORIES)
    ids = [f"stim{seed}-{i:04d}" for i in range(n)]
    out = {}
    for name in names:
        x = rng.standard_normal((n, p))
        if name == names[-1]:
            x[np.arange(n), kind] += 2
        out[name] = features(x, ids, layer=name)
    return out, CATEGORIES[kind]


def features(x: np.ndarray, ids: list[str], layer: str = "late", model: str = "net") -> xr.Dataset:
    """Return a Dataset of the features schema."""
    return xr.Dataset(
        {"features": (("stimulus", "feature"), np.asarray(x, dtype=np.float32))},
        coords={"stimulus_id": ("stimulus", ids), "model": model, "layer": layer},
        attrs={"pooling": "mean"},
    )


def responses(y: np.ndarray, ids: list[str], roi: str = "V1") -> xr.Dataset:
    """Return a Dataset of the responses schema."""
    rows, n = np.zeros(len(y), dtype=int), y.shape[1]
    return xr.Dataset(
        {"responses": (("presentation", "neuroid"), np.asarray(y, dtype=np.float32))},
        coords={
            "stimulus_id": ("presentation", ids),
            **{name: ("presentation", rows) for name in ("repetition", "session", "run")},
            "subject": ("presentation", ["s"] * len(y)),
            "neuroid_id": ("neuroid", [f"n{i}" for i in range(n)]),
            "roi": ("neuroid", [roi] * n),
            "hemisphere": ("neuroid", ["L"] * n),
        },
        attrs={"units": "z", "subject": "s", "space": "none"},
    )


def noise(n: int, v: int, seed: int = 0, p: int = 15, layers: int = 2) -> tuple[dict, xr.Dataset]:
    """Features and responses that know nothing of each other."""
    rng = np.random.default_rng(seed)
    ids = [f"s{i:03d}" for i in range(n)]
    x = {f"l{i}": features(rng.standard_normal((n, p)), ids, f"l{i}") for i in range(layers)}
    return x, responses(rng.standard_normal((n, v)), ids)


def subject(generator: str = "linear") -> tuple[dict, dict, np.ndarray, Simulation]:
    """Layers, layers of other stimuli, the categories of these, and a simulated subject."""
    layers, category = make_layers()
    new, kind = make_layers(seed=1)
    made = simulate(
        layers, category=category, neuroids=360, ncsnr=(0.8, 1.5), null=0.4, generator=generator,
        variation=0.4, seed=5,
    )  # fmt: skip
    return layers, new, kind, made


@pytest.fixture(scope="module")
def linear():
    layers, new, kind, made = subject()
    result = encode(layers, made.responses, n_permutations=1000, inner_cv="gcv", seed=2)
    return layers, new, kind, made, result


def preferred(result, new, kind, truth) -> dict[str, tuple[str, str]]:
    """The category each ROI is predicted to prefer among new images, and the planted one."""
    predicted = predict(result.encoders, new)
    assert set(predicted["neuroid_id"].values) == set(result.best["neuroid_id"].values)
    out = {}
    for roi in sorted(set(truth["roi"].values[truth["preference"].values != ""])):
        mean = predicted.values[:, predicted["roi"].values == roi].mean(axis=1)
        by_kind = [mean[kind == c].mean() for c in CATEGORIES]
        planted = truth["preference"].values[truth["roi"].values == roi][0]
        out[roi] = (str(CATEGORIES[int(np.argmax(by_kind))]), str(planted))
    assert len(out) >= 6
    return out


# What was planted comes back.


def test_noise_free_responses_to_new_stimuli(linear):
    _, new, _, made, result = linear
    truth = true_responses(made.truth, new)
    predicted = predict(result.encoders, new)
    order = {n: i for i, n in enumerate(truth["neuroid_id"].values.tolist())}
    truth = truth.values[:, [order[n] for n in predicted["neuroid_id"].values.tolist()]]
    live = truth.std(axis=0) > 0.1
    # The signal has standard deviation 1: this is the share of it that the encoder misses.
    error = ((predicted.values - truth)[:, live] ** 2).mean(axis=0)
    assert live.sum() > 200
    assert np.median(error) < 0.08 and np.quantile(error, 0.95) < 0.2
    # A neuroid without signal is predicted to respond alike to everything.
    assert np.median(predicted.values[:, ~live].std(axis=0)) < 0.15


def test_weights_of_independent_features():
    layers, category = make_layers(n=300, names=("early", "late"))
    made = simulate(
        layers["early"], category=category, neuroids=80, ncsnr=1.0, null=0.0, n_repetitions=3
    )
    encoder = fit_encoder(layers["early"], made.responses, alphas=ALPHAS)
    live = ~made.truth["null"].values
    w, planted = encoder["weights"].values[live], made.truth["weights"].values[live]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(w, planted, strict=True)]
    assert live.sum() > 60 and min(r) > 0.9 and np.mean(r) > 0.97
    np.testing.assert_allclose((w * planted).sum(1) / (planted**2).sum(1), 1, atol=0.2)


def test_best_layer(linear):
    made, result = linear[3:]
    live = ~made.truth["null"].values
    found, planted = result.best["best_layer"].values[live], made.truth["layer"].values[live]
    assert set(planted) == {"early", "middle", "late"}
    assert (found == planted).mean() > 0.97
    assert result.best["layer_agreement"].values[live].mean() > 0.97
    # Nested choice costs little: the score is that of the planted layer.
    at = [result.layers.index(name) for name in planted]
    known = result.scores["r"].values[:, live][at, np.arange(live.sum())]
    assert np.abs(result.best["r"].values[live] - known).mean() < 0.01


def test_ceiling_and_share_of_it(linear):
    made, result = linear[3:]
    live = ~made.truth["null"].values
    error = result.best["ceiling"].values - made.truth["ceiling"].values
    assert np.abs(error[live]).mean() < 0.03 and abs(error[live].mean()) < 0.01
    assert result.best["ceiling"].values[~live].mean() < 0.1
    share = result.best["normalised"].values[live]
    assert 0.85 < np.median(share) < 1.0
    assert np.isnan(result.best["normalised"].values[~live]).mean() > 0.7
    assert any("noise ceiling" in line for line in result.exclusions)


def test_significance_tells_signal_from_none(linear):
    made, result = linear[3:]
    null = made.truth["null"].values
    rejected = result.best["q"].values < 0.05
    assert rejected[~null].mean() > 0.99
    assert rejected[null].sum() <= 0.15 * rejected.sum()


def test_roi_preference(linear):
    _, new, kind, made, result = linear
    found = preferred(result, new, kind, made.truth)
    assert all(a == b for a, b in found.values()), found


@pytest.mark.parametrize(
    ("generator", "least", "most"),
    # A linear model of the drive explains 93 % of the compressive and about 90 % of the rectified
    # signal, and 1 / (1 + 0.7^2) = 67 % of the interaction's.
    [("compressive", 0.75, 0.97), ("rectified", 0.7, 0.97), ("quadratic", 0.45, 0.8)],
)
def test_mismatched_generator(generator, least, most):
    layers, new, kind, made = subject(generator)
    result = encode(layers, made.responses, permutation="none", inner_cv="gcv")
    live = ~made.truth["null"].values
    error = result.best["ceiling"].values - made.truth["ceiling"].values
    assert np.abs(error[live]).mean() < 0.03
    assert least < np.median(result.best["normalised"].values[live]) < most
    found = preferred(result, new, kind, made.truth)
    assert all(a == b for a, b in found.values()), found
    assert (result.best["best_layer"].values == made.truth["layer"].values)[live].mean() > 0.95


# Where there is nothing, nothing is found.


def test_null_p_is_uniform_over_folds():
    x, y = noise(60, 400, seed=3)
    result = encode(x, y, inner_cv="gcv", n_permutations=4000)
    assert result.best.attrs["permutation"] == "pooled"
    assert stats.kstest(result.best["p"].values, "uniform").pvalue > 0.01
    for row in result.scores["p"].values:
        assert stats.kstest(row, "uniform").pvalue > 0.01


def test_null_p_is_uniform_for_one_split():
    x, y = noise(80, 400, seed=4)
    result = encode(
        x, y, splits=[(np.arange(40), np.arange(40, 80))], inner_cv="gcv", n_permutations=999
    )
    assert result.best.attrs["permutation"] == "predictions"
    assert stats.kstest(result.best["p"].values, "uniform").pvalue > 0.01
    # Corrected for all neuroids together, nothing is left.
    assert (result.best["p_max"].values >= result.best["p"].values).all()
    assert result.best["p_max"].values.min() > 0.01


def test_null_p_of_refitted_permutations():
    x, y = noise(30, 150, seed=5, p=6)
    result = encode(x, y, splits=3, choose="all", inner_cv="gcv", n_permutations=150)
    assert result.best.attrs["permutation"] == "refit"
    assert stats.kstest(result.best["p"].values, "uniform").pvalue > 0.01


def test_false_discovery_rate_holds():
    share, found = [], 0
    for seed in range(30):
        rng = np.random.default_rng([7, seed])
        x, y = noise(60, 60, seed=seed, layers=1)
        signal = x["l0"]["features"].values @ rng.standard_normal((15, 30)) / np.sqrt(15)
        y["responses"].values[:, :30] += 0.6 * signal.astype(np.float32)
        result = encode(x, y, inner_cv="gcv", n_permutations=500, alphas=(1, 10, 100, 1000))
        rejected = result.best["q"].values < 0.2
        share.append(rejected[30:].sum() / max(1, rejected.sum()))
        found += rejected[:30].sum()
    # At most 0.2 (0.1 here, as half of the neuroids have signal), with its standard error.
    assert np.mean(share) < 0.2 + 2 * np.std(share) / np.sqrt(len(share))
    assert 0.02 < np.mean(share)
    assert found > 0.5 * 30 * 30


def test_nested_choice_of_layers_does_not_double_dip():
    x, y = noise(60, 500, seed=8, layers=8)
    result = encode(x, y, inner_cv="gcv", permutation="none")
    r = result.best["r"].values
    # r of 60 independent rows has a standard deviation of about 0.13.
    assert abs(r.mean()) < 4 * 0.13 / np.sqrt(len(r))
    best_of_all = result.scores["r"].values.max(axis=0)
    assert best_of_all.mean() > 0.1  # what choosing on the test rows would have reported


def test_test_rows_reach_no_choice_and_no_prediction():
    x, y = noise(50, 20, seed=9, layers=3)
    split = [(np.arange(35), np.arange(35, 50))]
    options = {"splits": split, "permutation": "none", "inner_cv": 3}
    before = encode(x, y, **options).predictions
    changed = y.copy(deep=True)
    changed["responses"].values[35:] = 100 * np.random.default_rng(0).random((15, 20))
    others = {n: ds.copy(deep=True) for n, ds in x.items()}
    for ds in others.values():
        ds["features"].values[36:] *= 50  # all test rows but the first
    after = encode(others, changed, **options).predictions
    np.testing.assert_array_equal(after["training_mean"], before["training_mean"])
    np.testing.assert_array_equal(after["predicted"].values[0], before["predicted"].values[0])
    assert not np.allclose(after["predicted"].values[1:], before["predicted"].values[1:])


def test_folds_equal_a_model_fitted_by_hand():
    x, y = noise(40, 5, seed=10, layers=1)
    got = encode(x, y, splits=4, alphas=30.0, permutation="none")
    values = x["l0"]["features"].values.astype(float)
    for k in range(4):
        test = np.flatnonzero(got.predictions["fold"].values == k)
        train = np.setdiff1d(np.arange(40), test)
        mean, sd = values[train].mean(0), values[train].std(0)
        z, z_test = (values[train] - mean) / sd, (values[test] - mean) / sd
        b = y["responses"].values[train].mean(0)
        w = np.linalg.solve(z.T @ z + 30 * np.eye(15), z.T @ (y["responses"].values[train] - b))
        np.testing.assert_allclose(
            got.predictions["predicted"].values[test], z_test @ w + b, atol=1e-5
        )


# Repetitions.


def test_kept_and_averaged_repetitions_agree(linear):
    layers, _, _, made, averaged = linear
    kept = encode(layers, made.responses, repetitions="keep", inner_cv=3, permutation="none")
    live = ~made.truth["null"].values
    np.testing.assert_allclose(
        kept.best["ceiling"], noise_ceiling(kept.best["ncsnr"].values, 1), rtol=1e-6
    )
    assert (kept.best["ceiling"].values < averaged.best["ceiling"].values)[live].all()
    both = [r.best["normalised"].values[live] for r in (kept, averaged)]
    assert np.nanmean(np.abs(both[0] - both[1])) < 0.05
    assert kept.best.attrs["mean_repeats"] == 1 and averaged.best.attrs["mean_repeats"] == 3
    # The presentations of a stimulus are on one side, in inner folds as well.
    fold = kept.predictions["fold"].to_series().groupby(kept.predictions["stimulus_id"].values)
    assert (fold.nunique() == 1).all()


@pytest.mark.parametrize("inner", ["loo", "gcv"])
def test_single_rows_cannot_be_left_out_where_stimuli_repeat(linear, inner):
    layers, _, _, made, _ = linear
    with pytest.raises(ConfigError, match="give a stimulus away"):
        encode(layers, made.responses, repetitions="keep", inner_cv=inner)


def test_rows_that_are_means_already():
    layers, category = make_layers(names=("late",))
    made = simulate(
        layers["late"], category=category, neuroids=100, ncsnr=0.8, null=0.0, n_repetitions=4
    )
    single = made.responses
    ids, rep = single["stimulus_id"].values, single["repetition"].values
    order = np.lexsort((rep, ids))
    y = single["responses"].values[order].reshape(-1, 2, 100).mean(axis=1)
    pairs = responses(y, ids[order][::2].tolist())
    options = {"permutation": "none", "inner_cv": "gcv", "splits": 3}
    direct = encode(layers, single, **options)
    paired = encode(layers, pairs, repeats=2, **options)
    np.testing.assert_allclose(direct.best["r"], paired.best["r"], atol=1e-4)
    difference = direct.best["ceiling"].values - paired.best["ceiling"].values
    assert np.abs(difference).mean() < 0.03
    assert abs(np.median(paired.best["ncsnr"]) - 0.8) < 0.05
    # Means of four, each stimulus once: the ceiling comes from a known ncsnr.
    y = y.reshape(-1, 2, 100).mean(axis=1)
    once = responses(y, ids[order][::4].tolist())
    once = once.assign_coords(ncsnr=("neuroid", np.full(100, 0.8)))
    final = encode(layers, once, repeats=4, **options)
    np.testing.assert_allclose(final.best["ceiling"], 0.64 / (0.64 + 0.25))


# The artefact.


def test_encoder_predicts_with_nothing_else(linear, tmp_path):
    _, new, _, _, result = linear
    read = read_result(write_result(result, tmp_path / "r", provenance={"code": "1"}))
    assert read.best.attrs["code"] == "1"
    for name in ("scores", "best", "predictions", "bootstrap", "null"):
        xr.testing.assert_equal(getattr(read, name).load(), getattr(result, name))
    assert read.exclusions == result.exclusions and list(read.encoders) == list(result.encoders)
    a, b = predict(read.encoders, new), predict(result.encoders, new)
    np.testing.assert_array_equal(a.values, b.values)
    # The formula of the schema, from the file alone.
    e = xr.open_zarr(tmp_path / "r" / "encoders" / "00.zarr", consolidated=False).load()
    x = new[str(e["layer"].values)]["features"].values
    by_hand = (x - e["feature_mean"].values) / e["feature_scale"].values @ e["weights"].values.T
    by_hand = by_hand + e["intercept"].values
    first = read.encoders[str(e["layer"].values)]
    np.testing.assert_allclose(predict(first, new).values, by_hand, atol=1e-4)
    with pytest.raises(UnavailableError, match="no encoding result"):
        read_result(tmp_path)


def test_encoder_refuses_other_features(linear):
    _, new, _, _, result = linear
    layer, encoder = next(iter(result.encoders.items()))
    good = new[layer]
    for bad, what in (
        (good.assign_coords(model="other"), "model 'net'"),
        (good.assign_coords(layer="other"), "layer"),
        (good.assign_attrs(pooling="class"), "pooling 'mean'"),
        (good.isel(feature=slice(5)), "takes 20 features; there are 5"),
    ):
        with pytest.raises(SchemaError, match=what):
            predict(encoder, bad)
    with pytest.raises(SchemaError, match="no features of layer"):
        predict(result.encoders, {n: new[n] for n in list(new)[:2]})


# What would mislead, or cannot be used, is refused before work starts.


@pytest.fixture
def no_work(monkeypatch):
    """Fail if fitting starts."""

    def fail(*args, **options):
        raise AssertionError("work has started")

    module = importlib.import_module("brainalign.encoding.encode")
    monkeypatch.setattr(module, "nested_cv", fail)
    monkeypatch.setattr(module, "fit_all", fail)


@pytest.mark.usefixtures("no_work")
def test_planted_double_dipping_is_refused():
    x, y = noise(60, 100, seed=11)
    ids = y["stimulus_id"].values.tolist()
    # Voxels by their correlation with a feature, on the stimuli that will be tested too.
    r = np.corrcoef(x["l0"]["features"].values[:, 0], y["responses"].values.T)[0, 1:]
    dipped = select(y, r > np.quantile(r, 0.8), chosen_on=ids, name="feature 0")
    with pytest.raises(LeakError, match=r"20 of 100 neuroids were chosen by 'feature 0'.*60"):
        encode(x, dipped)
    half = select(y, r > 0, chosen_on=ids[:30])
    with pytest.raises(LeakError, match="Double dipping"):
        encode(x, half, splits=[(np.arange(30, 60), np.arange(30))])


def test_selection_on_scores_knows_its_stimuli():
    x, y = noise(60, 40, seed=12)
    first = encode(x, y, splits=[(np.arange(20), np.arange(20, 40))], permutation="none")
    chosen = select(y, first.best["r"] > 0, chosen_on=first.best)
    with pytest.raises(LeakError, match="Double dipping"):
        encode(x, chosen)
    ids = y["stimulus_id"].values.tolist()
    honest = select(y, np.arange(40) < 10, chosen_on=ids[:40], name="first half")
    result = encode(
        x, honest, splits=[(np.arange(40), np.arange(40, 60))], permutation="none", inner_cv=3
    )
    assert result.best.sizes["neuroid"] == 10
    assert "first half" in result.best.attrs["selections"]


@pytest.mark.usefixtures("no_work")
def test_layers_rois_and_voxels_chosen_on_the_same_images_are_refused():
    """Chosen in another session, in which the images had other names."""
    x, y = noise(60, 40, seed=12)
    ids = y["stimulus_id"].values.tolist()
    content = {s: f"{i:064x}" for i, s in enumerate(ids)}
    theirs = [f"other {i}" for i in range(30)]
    sha = {s: f"{i:064x}" for i, s in enumerate(theirs)}
    given = {"chosen_on": theirs, "stimulus_sha256": sha}
    best = record_choice(x["l0"], name="best layer", **given)
    rois = record_choice(y, name="localiser", **given)
    voxels = select(y, np.arange(40) < 10, name="reliable", **given)
    options = {"stimulus_sha256": content}
    for features_, responses_, what in (
        ({"l0": best}, y, "a choice was made by 'best layer' on 30 stimuli, and 30 of these"),
        (x, rois, "a choice was made by 'localiser'"),
        (x, voxels, "10 of 40 neuroids were chosen by 'reliable'"),
    ):
        with pytest.raises(LeakError, match=what):
            encode(features_, responses_, **options)
        # Without hashes the names are all that is known; on other images the choice is honest.
        for allowed in ({}, {**options, "splits": [(ids[:30], ids[30:])]}):
            with pytest.raises(AssertionError, match="work has started"):
                encode(features_, responses_, **allowed)


def test_scores_carry_the_content_they_were_computed_from():
    x, y = noise(60, 40, seed=12)
    ids = y["stimulus_id"].values.tolist()
    content = {s: f"{i:064x}" for i, s in enumerate(ids)}
    first = encode(x, y, permutation="none", stimulus_sha256=content)
    renamed = {s: f"new {s}" for s in ids}
    again = y.assign_coords(stimulus_id=("presentation", [renamed[s] for s in ids]))
    chosen = select(again, first.best["r"] > 0, chosen_on=first.best, name="r > 0")
    others = {
        n: ds.assign_coords(stimulus_id=("stimulus", [renamed[s] for s in ids]))
        for n, ds in x.items()
    }
    with pytest.raises(LeakError, match="by 'r > 0' on 60 stimuli, and 60 of these are tested"):
        encode(others, chosen, stimulus_sha256={renamed[s]: h for s, h in content.items()})


def test_folds_of_clusters_test_other_kinds():
    x, y = noise(90, 6)
    rng = np.random.default_rng(0)
    ids = y["stimulus_id"].values.tolist()
    kind = np.arange(90) % 9
    centres = 10 * rng.standard_normal((9, 4))
    where = features(centres[kind] + rng.standard_normal((90, 4)), ids, "embedding")
    order = rng.permutation(90)
    got = encode(
        x, y, splits=3, clusters=9, embedding=where.isel(stimulus=order), permutation="none"
    )
    fold = got.predictions["fold"].values
    assert all(len(set(fold[kind == k].tolist())) == 1 for k in range(9))
    assert got.best.attrs["clusters"] == 9 and len(set(fold.tolist())) == 3
    plain = encode(x, y, splits=3, permutation="none").predictions["fold"].values
    assert not all(len(set(plain[kind == k].tolist())) == 1 for k in range(9))
    for bad, what in (
        ({"clusters": 9}, "their number and an embedding"),
        ({"clusters": 2, "embedding": where, "splits": 3}, "n_splits <= n_clusters"),
        ({"clusters": 9, "embedding": where, "splits": [(ids[:50], ids[50:])]}, "as their number"),
    ):
        with pytest.raises(ConfigError, match=what):
            encode(x, y, permutation="none", **bad)


@pytest.mark.usefixtures("no_work")
def test_one_image_under_two_names_is_found():
    x, y = noise(40, 5)
    ids = y["stimulus_id"].values.tolist()
    sha = {s: f"hash of {s}" for s in ids} | {"s030": "hash of s000"}
    split = [(np.arange(30), np.arange(30, 40))]
    with pytest.raises(LeakError, match="hash of s000"):
        encode(x, y, splits=split, stimulus_sha256=sha)
    with pytest.raises(LeakError, match="s005"):
        encode(x, y, splits=[(ids[:30], ids[5:6] + ids[30:])])
    with pytest.raises(ConfigError, match="1 stimuli have no content hash: \\['s039'\\]"):
        encode(x, y, stimulus_sha256={s: s for s in ids[:39]})


def test_folds_keep_one_image_together():
    x, y = noise(40, 5)
    ids = y["stimulus_id"].values.tolist()
    sha = {s: f"{i // 2}" for i, s in enumerate(ids)}
    got = encode(x, y, stimulus_sha256=sha, permutation="none").predictions["fold"].values
    assert (got[::2] == got[1::2]).all()


@pytest.mark.usefixtures("no_work")
def test_missing_and_extra_stimuli():
    x, y = noise(30, 5)
    short = {n: ds.isel(stimulus=slice(2, None)) for n, ds in x.items()}
    with pytest.raises(SchemaError, match=r"'l0'.*2 of the responses have no features: 's000'"):
        encode(short, y)
    with pytest.raises(SchemaError, match=r"1 with features have no responses: 's029'"):
        encode(x, y.isel(presentation=slice(29)))
    renamed = {n: ds.assign_coords(stimulus_id=ds["stimulus_id"] + "x") for n, ds in x.items()}
    with pytest.raises(SchemaError, match="Only 0 of 30"):
        encode(renamed, y, stimuli="intersect")


def test_common_stimuli_only():
    x, y = noise(30, 5)
    short = {n: ds.isel(stimulus=slice(29, 1, -1)) for n, ds in x.items()}
    result = encode(short, y, stimuli="intersect", permutation="none")
    assert result.predictions.sizes["presentation"] == 28
    assert "2 stimuli of the responses have no features" in result.exclusions
    same = encode(x, y.isel(presentation=slice(2, None)), stimuli="intersect", permutation="none")
    np.testing.assert_allclose(result.best["r"], same.best["r"], atol=1e-5)


def test_nan_and_constant_neuroids():
    x, y = noise(30, 6)
    y["responses"].values[3, 1] = np.nan
    y["responses"].values[:, 4] = 2.5
    result = encode(x, y, permutation="none")
    assert result.best["neuroid_id"].values.tolist() == ["n0", "n2", "n3", "n5"]
    assert result.exclusions[:2] == ["1 neuroids: NaN or infinite", "1 neuroids: constant"]
    ceiling = np.arange(6) / 10
    with_ceiling = encode(x, y, permutation="none", ceiling=ceiling)
    np.testing.assert_allclose(with_ceiling.best["ceiling"], ceiling[[0, 2, 3, 5]])
    first = "1 of 6 neuroids are NaN or infinite: 'n1'. run 0 of session 0: 1 NaN in 1 neuroid"
    with pytest.raises(SchemaError, match=first):
        encode(x, y, bad_neuroids="raise")
    y["responses"].values[7] = np.nan
    with pytest.raises(SchemaError, match="No neuroid is left.*1 whole rows are NaN"):
        encode(x, y)


def test_neuroid_constant_in_the_test_rows_has_no_score():
    x, y = noise(40, 3)
    y["responses"].values[30:, 1] = 0
    result = encode(x, y, splits=[(np.arange(30), np.arange(30, 40))], n_permutations=20)
    assert np.isnan(result.best["r"].values).tolist() == [False, True, False]
    assert np.isnan(result.best["p"].values).tolist() == [False, True, False]
    assert np.isnan(result.best["q"].values).tolist() == [False, True, False]
    assert "1 of 3 neuroids have no score (constant in the test rows)" in result.exclusions


@pytest.mark.usefixtures("no_work")
def test_features_that_are_not_finite():
    x, y = noise(30, 5)
    x["l1"]["features"].values[4, 2] = np.inf
    with pytest.raises(SchemaError, match=r"layer 'l1' hold 1 values .* \(first: 's004'\)"):
        encode(x, y)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"choose": "voxel"}, "choose is 'voxel'; expected one of neuroid, roi, all"),
        ({"permutation": "shuffle"}, "permutation is 'shuffle'"),
        ({"permutation": "pooled", "choose": "roi"}, 'needs choose="neuroid"'),
        ({"inner_cv": "lou"}, "inner_cv is 'lou'"),
        ({"inner_cv": 1}, "at least 2 folds"),
        ({"alphas": [1, -1]}, "alphas must be finite numbers above 0"),
        ({"repetitions": "mean"}, "repetitions is 'mean'; expected 'average' or 'keep'"),
        ({"stimuli": "inner"}, "stimuli is 'inner'"),
        ({"bad_neuroids": "drop"}, "bad_neuroids is 'drop'"),
        ({"n_permutations": 0}, "n_permutations is 0"),
        ({"target_batch": 0}, "target_batch is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"splits": 50}, "50 folds need at least 50"),
        ({"splits": [(["s000", "zz"], ["s001"])]}, "unknown stimuli: 'zz'"),
        ({"splits": [(np.arange(20), [20, 21])]}, "Only 2 rows are tested"),
        ({"splits": [([0, 1, 2], [5, 6, 7]), ([0, 1, 2], [7, 8])]}, "tested in more than one"),
        ({"splits": [(np.ones(3, bool), np.ones(3, bool))]}, "mask of shape"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_options_that_cannot_be_used(options, what):
    x, y = noise(30, 5)
    with pytest.raises(ConfigError, match=what):
        encode(x, y, **options)


@pytest.mark.usefixtures("no_work")
def test_responses_of_the_wrong_kind():
    x, y = noise(30, 5)
    with pytest.raises(SchemaError, match="ceiling has shape \\(4,\\)"):
        encode(x, y, ceiling=np.ones(4))
    two = y.assign_coords(subject=("presentation", ["a"] * 15 + ["b"] * 15))
    with pytest.raises(SchemaError, match="2 subjects"):
        encode(x, two)
    with pytest.raises(ConfigError, match="no features"):
        encode({}, y)
    series = y.rename(presentation="time").assign_attrs(sampling_rate=1.0)
    with pytest.raises(SchemaError, match="time series"):
        encode(x, series)
    unequal = y.isel(presentation=np.r_[0:30, 0:5])
    with pytest.raises(ConfigError, match="Stimuli with 1 to 2 rows cannot be exchanged"):
        encode(x, unequal, repetitions="keep")
    twice = y.isel(presentation=np.r_[0:30, 0:30])
    with pytest.raises(ConfigError, match="cannot be exchanged one by one"):
        encode(x, twice, repetitions="keep", permutation="predictions")


# Layers, ROIs and models compared.


def test_layer_by_roi_and_models(linear):
    layers, _, _, made, result = linear
    table = layer_roi(result, rois=["V1", "FFA"])
    members = roi_members(result.best, ["FFA"])["FFA"]
    expected = result.scores["r"].sel(layer="late").values[members].mean()
    assert float(table["value"].sel(layer="late", roi="FFA")) == pytest.approx(expected)
    assert table["value"].sel(roi="FFA").values[:3].argmax() == 2
    assert table["value"].sel(roi="V1").values[:3].argmax() == 0
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    with pytest.raises(UnknownNameError, match="'FFB'.*'FFA'"):
        layer_roi(result, rois=["FFB"])

    options = {"permutation": "none", "inner_cv": "gcv", "seed": 2}
    other = {"early": layers["early"].assign_coords(model="lesser")}
    lesser = encode(other, made.responses, **options)
    both = compare_models({"net": result, "lesser": lesser}, rois=["V1", "FFA"])
    difference = both["difference"].sel(model="net", model_2="lesser")
    assert float(difference.sel(roi="FFA")) > 0.2 and abs(float(difference.sel(roi="V1"))) < 0.02
    p = both["p"].sel(model="net", model_2="lesser")
    assert float(p.sel(roi="FFA")) < 0.05 < float(p.sel(roi="V1"))
    elsewhere = encode(other, made.responses, **{**options, "seed": 3})
    with pytest.raises(SchemaError, match="not tested on the same rows: fold"):
        compare_models({"net": result, "lesser": elsewhere})


def test_models_over_subjects_and_stimuli():
    rng = np.random.default_rng(4)
    n, v = 120, 8
    ids = [f"s{i:03d}" for i in range(n)]
    signal, other = rng.standard_normal((2, n, 10))
    models = {
        "net": features(signal, ids, model="net"), "lesser": features(other, ids, model="lesser")
    }  # fmt: skip
    results = {}
    for name in ("a", "b", "c", "d"):
        y = signal @ rng.standard_normal((10, v)) + 2 * rng.standard_normal((n, v))
        data = responses(y, ids)
        results[name] = {
            m: encode(x, data, permutation="none", inner_cv="gcv", seed=1, n_bootstrap=200)
            for m, x in models.items()
        }
    table = compare_subjects(results, rois=["V1"])
    gap = table.sel(model="net", model_2="lesser", roi="V1")
    assert float(gap["p"]) < 0.001 and float(gap["difference_low"]) > 0.5
    for name, by in results.items():
        mine = table["per_subject"].sel(subject=name, model="net", roi="V1")
        assert float(mine) == pytest.approx(float(by["net"].best["r"].mean()))
    mean = table["per_subject"].sel(model="net", roi="V1").mean()
    assert float(table["value"].sel(model="net", roi="V1")) == pytest.approx(float(mean))
    with pytest.raises(ConfigError, match="from two on"):
        compare_subjects({"a": results["a"]})
    fewer = encode(
        models["net"].isel(stimulus=slice(0, 100)), data.isel(presentation=slice(0, 100)),
        permutation="none", inner_cv="gcv", seed=1, n_bootstrap=200,
    )  # fmt: skip
    with pytest.raises(SchemaError, match="not tested on the same stimuli"):
        compare_subjects({"a": {"net": results["a"]["net"]}, "e": {"net": fewer}})
    with pytest.raises(SchemaError, match="has the models"):
        compare_subjects({"a": results["a"], "b": {"net": results["b"]["net"]}})


def test_order_of_features_and_seed():
    x, y = noise(40, 8, seed=16)
    order = np.random.default_rng(1).permutation(40)
    shuffled = {n: ds.isel(stimulus=order) for n, ds in x.items()}
    options = {"inner_cv": 3, "n_permutations": 50, "seed": 4}
    one, two = encode(x, y, **options), encode(shuffled, y, **options)
    xr.testing.assert_identical(one.best, two.best)
    xr.testing.assert_identical(one.predictions, two.predictions)
    other = encode(x, y, **{**options, "seed": 5})
    assert not np.allclose(one.best["r"], other.best["r"])


def test_batches_of_neuroids_change_nothing():
    x, y = noise(40, 30, seed=13)
    one = encode(x, y, inner_cv="loo", permutation="none", n_permutations=0)
    many = encode(x, y, inner_cv="loo", permutation="none", target_batch=7)
    np.testing.assert_allclose(one.best["r"], many.best["r"], atol=1e-5)
    np.testing.assert_array_equal(one.scores["alpha"], many.scores["alpha"])


def test_more_features_than_stimuli_equal_fewer():
    """The kernel form: features that repeat others change nothing but the scale of alpha."""
    x, y = noise(30, 4, seed=14, p=12, layers=1)
    wide = {"l0": features(np.tile(x["l0"]["features"].values, 5), y["stimulus_id"].values, "l0")}
    narrow = encode(x, y, alphas=10.0, permutation="none")
    twice = encode(wide, y, alphas=50.0, permutation="none")
    np.testing.assert_allclose(
        narrow.predictions["predicted"], twice.predictions["predicted"], atol=1e-4
    )


def test_scores_are_those_of_the_predictions():
    x, y = noise(40, 6, seed=15)
    pairs = [(np.arange(10, 40), np.arange(10)), (np.arange(10), np.arange(10, 40))]
    solvers = Solvers(
        {n: ds["features"].values for n, ds in x.items()},
        pairs,
        alphas=np.array([1.0, 100.0]),
        inner_cv=3,
        row_groups=np.arange(40),
    )
    out = nested_cv(solvers, y["responses"].values)
    mean = out.training_mean[out.fold]
    a, b = y["responses"].values[out.rows] - mean, out.predicted
    np.testing.assert_array_equal(a, out.measured)
    r = [np.corrcoef(a[:, t], b[:, t])[0, 1] for t in range(6)]
    np.testing.assert_allclose(out.r, r, atol=1e-5)
    np.testing.assert_allclose(out.r2, 1 - ((a - b) ** 2).sum(0) / (a**2).sum(0), atol=1e-5)


# Real recordings.


def test_ceilings_of_vwfa_and_ffa(kay2017_study):
    """Kay & Yeatman 2017, experiment 2: the standard errors give encoding models a ceiling."""
    y, stimuli = kay2017_study.responses["subject1"], kay2017_study.stimuli
    small = [stimuli.open(i).resize((12, 12)).convert("L") for i in range(len(stimuli))]
    pixels = features(np.stack([np.ravel(image) for image in small]), stimuli.ids, "pixels")
    result = encode(pixels, y, inner_cv="loo", n_permutations=200)
    ceiling = result.best["ceiling"].values
    simulated = simulated_ceiling(y["responses"], y["standard_error"], relative_to="mean")
    np.testing.assert_allclose(ceiling, simulated, atol=0.01)
    np.testing.assert_allclose(ceiling, [0.362, 0.934], atol=0.001)
    assert result.best["neuroid_id"].values.tolist() == ["VWFA", "FFA"]
    assert np.isfinite(result.best["normalised"]).all()
