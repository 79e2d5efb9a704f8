"""CKA, and the tables of layers by regions, on data whose answers are known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.cli import main
from brainalign.data.bundle import write_bundle
from brainalign.data.section import read_section, write_section
from brainalign.data.simulate import simulate
from brainalign.data.stimuli import write_stimuli
from brainalign.data.store import read, write
from brainalign.data.studies import Study
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.evaluation import gram, layer_roi_cka, layer_roi_rsa, linear_cka, resampled_cka
from brainalign.evaluation.rsa import compare_rdms, dissimilarity, evaluate_rdms, rdm, stack_rdms
from brainalign.evaluation.sections import layer_roi_section
from brainalign.features import write_manifest

N = 40


def hsic(K, L, c):
    """Unbiased HSIC as its definition: a weighted mean over quadruples of different rows."""
    total = weights = 0.0
    for i, j, k, m in permutations(range(len(K)), 4):
        w = c[i] * c[j] * c[k] * c[m]
        total += w * (K[i, j] * L[i, j] + K[i, j] * L[k, m] - 2 * K[i, j] * L[i, k])
        weights += w
    return total / weights


@given(p=st.integers(1, 9), q=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=15)
def test_debiased_cka_is_its_definition_whatever_the_form_and_the_sample(p, q, seed):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((6, p)) + 3, rng.standard_normal((6, q)) - 2
    K, L = X @ X.T, Y @ Y.T
    for counts in (np.ones(6), np.array([2, 1, 0, 3, 1, 1])):
        norms = hsic(K, K, counts) * hsic(L, L, counts)
        want = hsic(K, L, counts) / np.sqrt(norms) if norms > 0 else np.nan
        got = resampled_cka(gram(X)[None], gram(Y)[None], counts[None]).item()
        if norms > 1e-6 and hsic(K, K, counts) > 0:
            assert got == pytest.approx(want, abs=1e-8)
            if counts.max() == 1:
                assert linear_cka(X, Y) == pytest.approx(want, abs=1e-8)
                wide = np.hstack([X, np.zeros((6, 60))])
                assert linear_cka(wide, Y) == pytest.approx(want, abs=1e-8)


def test_debiased_cka_ignores_rotation_scale_and_shift():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 8))
    Y = X @ rng.standard_normal((8, 12)) + rng.standard_normal((30, 12))
    turned = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    assert linear_cka(X, 7 * Y @ turned + 5) == pytest.approx(linear_cka(X, Y), abs=1e-12)
    assert linear_cka(X, -3 * X) == pytest.approx(1)


@pytest.mark.parametrize("n", [7, 10, 30, 999])
@pytest.mark.parametrize("debiased", [True, False])
def test_constant_features_have_no_cka_and_constant_patterns_no_correlation(n, debiased):
    Y = np.random.default_rng(0).standard_normal((n, 3))
    assert np.isnan(linear_cka(np.full((n, 3), 0.1), Y, debiased=debiased))
    assert not gram(np.full((n, 3), 0.1)).any()
    patterns = Y[:8]
    patterns[2] = 0.1
    pairs = dissimilarity(np.tile(patterns, n), measure="correlation")[2]
    assert np.isnan(np.delete(pairs, 2)).all()


def test_debiased_cka_is_0_for_independent_features_where_the_biased_is_not():
    rng = np.random.default_rng(1)
    pairs = [rng.standard_normal((2, 20, 400)) for _ in range(60)]
    debiased = np.array([linear_cka(*pair) for pair in pairs])
    assert abs(debiased.mean()) < 4 * debiased.std() / np.sqrt(60)
    assert min(linear_cka(*pair, debiased=False) for pair in pairs) > 0.8


def test_bootstrap_of_cka_covers_the_true_value_and_has_no_bias_from_copies():
    rng = np.random.default_rng(2)
    n, p, q, t = 50, 5, 20, 80
    A = rng.standard_normal((p, q)) / np.sqrt(p)
    true = (A**2).sum() / np.sqrt(p * ((A.T @ A + np.eye(q)) ** 2).sum())
    covered, null = 0, []
    for _ in range(t):
        X = rng.standard_normal((n, p))
        Y = X @ A + rng.standard_normal((n, q))
        counts = rng.multinomial(n, np.full(n, 1 / n), size=60)
        K, L, other = gram(X)[None], gram(Y)[None], gram(rng.standard_normal((n, q)))[None]
        samples = resampled_cka(K, np.concatenate([L, other]), counts)[:, 0]
        half = scipy.stats.t.ppf(0.975, n - 1) * samples[:, 0].std(ddof=1)
        covered += abs(linear_cka(X, Y) - true) < half
        null.append(samples[:, 1].mean())
    assert scipy.stats.binom.ppf(0.001, t, 0.95) <= covered
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(t)
    # Copies taken for other stimuli: what is avoided.
    rows = np.repeat(np.arange(n), counts[0])
    noise = rng.standard_normal((2, n, 200))
    assert linear_cka(noise[0][rows], noise[1][rows]) > 0.2


def features_of(values, layer, model="net"):
    ids = [f"s{i:02d}" for i in range(len(values))]
    return xr.Dataset(
        {"features": (("stimulus", "feature"), values.astype("float32"))},
        coords={"stimulus_id": ("stimulus", ids), "model": model, "layer": layer},
    )


@pytest.fixture(scope="module")
def planted():
    """Return layers and two subjects whose regions follow one layer each."""
    rng = np.random.default_rng(3)
    layers = {name: features_of(rng.standard_normal((N, 30)), name) for name in "abc"}
    category = np.array(["people", "places"])[np.arange(N) % 2]
    driven = {"V1": "a", "FFA": "b", "PPA": "c"}
    responses = {
        s: simulate(
            layers, category=category, neuroids=2000, layers=driven, ncsnr=(1.0, 2.0),
            n_repetitions=2, variation=0.8, subject=s, seed=i,
        ).responses
        for i, s in enumerate(("s1", "s2"))
    }  # fmt: skip
    return layers, responses, driven


@pytest.mark.parametrize("table", [layer_roi_rsa, layer_roi_cka])
def test_the_planted_layer_wins_in_its_region(planted, table):
    layers, responses, driven = planted
    made = table(layers, responses, rois=list(driven), n_bootstrap=60, n_permutations=199)
    assert made["value"].idxmax("layer").values.tolist() == list(driven.values())
    for region, layer in driven.items():
        here = made.sel(roi=region)
        assert here["p_max"].sel(layer=layer) < 0.05
        others = here.drop_sel(layer=layer)
        assert (others["high"] < here["low"].sel(layer=layer)).all()
        assert here["ceiling"].values[0] < here["ceiling"].values[1] <= 1
    np.testing.assert_allclose(made["per_subject"].mean("subject"), made["value"])


def region(responses, roi):
    return responses.isel(neuroid=np.flatnonzero(responses["roi"].values == roi))


@pytest.mark.parametrize(
    "method", ["spearman", "rho-a", "corr", "cosine", "corr_cov", "cosine_cov"]
)
def test_a_cell_is_what_the_functions_for_one_pair_give(planted, method):
    layers, responses, _ = planted
    options = {"n_bootstrap": 30, "seed": 4, "over": "both"}
    made = layer_roi_rsa(
        layers, responses, rois=["V1"], method=method, n_permutations=0, **options
    ).isel(roi=0)
    models = stack_rdms({name: rdm(ds) for name, ds in layers.items()})
    data = stack_rdms({s: rdm(region(ds, "V1")) for s, ds in responses.items()})
    similarity = compare_rdms(models, data, method=method)
    np.testing.assert_allclose(made["per_subject"], similarity, atol=1e-7)
    one = evaluate_rdms(models, data, method=method, **options)
    for name in ("se", "low", "high"):
        np.testing.assert_allclose(made[name], one[name], atol=1e-7)
    np.testing.assert_allclose(made["ceiling"], one["ceiling"], atol=1e-7)
    assert made["p"].isnull().all()


def test_cka_of_a_cell_is_linear_cka(planted):
    layers, responses, _ = planted
    made = layer_roi_cka(layers, responses["s1"], rois=["FFA"], n_bootstrap=0, n_permutations=0)
    ds = region(responses["s1"], "FFA")
    values = ds["responses"].values.astype(float)
    ids = ds["stimulus_id"].values.astype(str)
    for name, features in layers.items():
        means = np.stack([values[ids == s].mean(axis=0) for s in features["stimulus_id"].values])
        want = linear_cka(features["features"].values, means)
        assert made["value"].sel(layer=name).item() == pytest.approx(want, abs=1e-8)
    assert made["low"].isnull().all() and made["ceiling"].isnull().all()


@pytest.mark.parametrize("table", [layer_roi_rsa, layer_roi_cka])
def test_permutation_p_values_keep_their_level(table):
    rng = np.random.default_rng(6)
    n, neuroids = 16, 8
    p, p_max = [], []
    for seed in range(40):
        layers = {name: features_of(rng.standard_normal((n, 10)), name) for name in "abcde"}
        ids = layers["a"]["stimulus_id"].values
        zeros = ("presentation", np.zeros(n, int))
        noise = xr.Dataset(
            {"responses": (("presentation", "neuroid"), rng.standard_normal((n, neuroids)))},
            coords={
                "stimulus_id": ("presentation", ids),
                **{k: zeros for k in ("repetition", "session", "run")},
                "subject": ("presentation", ["s1"] * n),
                "neuroid_id": ("neuroid", [f"v{i}" for i in range(neuroids)]),
                "roi": ("neuroid", ["V1", "V2"] * (neuroids // 2)),
                "hemisphere": ("neuroid", ["L"] * neuroids),
            },
        )
        made = table(layers, noise, n_bootstrap=0, n_permutations=99, seed=seed)
        p.append(made["p"].values.ravel())
        p_max.append(made["p_max"].values.min())
    p = np.concatenate(p)
    # Cells of one region share its recordings: bounds for half as many independent tests.
    low, high = scipy.stats.binom.ppf([0.001, 0.999], len(p) // 2, 0.05) / (len(p) // 2)
    assert low <= (p <= 0.05).mean() <= high
    assert (np.array(p_max) <= 0.05).sum() <= scipy.stats.binom.ppf(0.999, 40, 0.05)


def test_section_shows_both_measures(planted, tmp_path):
    layers, responses, driven = planted
    rng = np.random.default_rng(8)
    noise = {"z": features_of(rng.standard_normal((N, 30)), "z", "noise")}
    section = layer_roi_section(
        {"net": layers, "noise": noise}, responses, titles={"net": "Net", "noise": "Noise"},
        baselines=["noise"], bootstraps=99,
    )  # fmt: skip
    assert [f.id for f in section.figures] == ["layers-rsa", "layers-cka"]
    for figure in section.figures:
        best = figure.data["value"].idxmax("row").to_series()
        assert all(best[r] == f"Net, {layer}" for r, layer in driven.items())
    found = {e.label: e for e in section.summary}
    assert found["Regions that resemble a layer, CKA"].value >= len(driven)
    write_section(section, tmp_path / "section")
    assert read_section(tmp_path / "section").summary == section.summary


def test_the_command_makes_the_section_of_a_study_with_responses(planted, tmp_path):
    layers, responses, driven = planted
    inside = [np.isin(ds["roi"].values, list(driven)) for ds in responses.values()]
    ids = layers["a"]["stimulus_id"].values.tolist()
    images = (
        np.zeros((N, 8, 8, 3), dtype=np.uint8) + np.arange(N, dtype=np.uint8)[:, None, None, None]
    )
    study = Study(
        name="planted",
        responses={
            s: ds.isel(neuroid=np.flatnonzero(keep))
            for (s, ds), keep in zip(responses.items(), inside, strict=True)
        },
        stimuli=write_stimuli(tmp_path / "stimuli", images, ids),
        extras={},
    )
    bundle = write_bundle(study, tmp_path / "data")
    for name, ds in layers.items():
        write(ds, tmp_path / f"{name}.zarr", "features")
    stored = {name: read(tmp_path / f"{name}.zarr") for name in layers}
    manifest = write_manifest(stored, tmp_path / "net.json")
    words = ["evaluate", "rsa", "--data", bundle, "--stimuli", tmp_path / "stimuli"]
    words += ["--features", manifest, "--models", '{"net": "Net"}', "--bootstraps", 60]
    assert main([*map(str, words), "--out", str(tmp_path / "section")]) == 0
    section = read_section(tmp_path / "section")
    assert [f.kind for f in section.figures] == ["heatmap", "heatmap"]
    best = section.figures[1].data["value"].idxmax("row").to_series()
    assert all(best[r] == f"Net, {layer}" for r, layer in driven.items())


def test_errors_name_what_is_wrong(planted):
    layers, responses, _ = planted
    with pytest.raises(UnknownNameError, match="Did you mean 'FFA'"):
        layer_roi_cka(layers, responses, rois=["FFA1"])
    with pytest.raises(ConfigError, match="rho-a"):
        layer_roi_rsa(layers, responses, method="kendall")
    with pytest.raises(ConfigError, match="at least two subjects"):
        layer_roi_cka(layers, responses["s1"], over="both")
    few = {"a": layers["a"].isel(stimulus=slice(5))}
    with pytest.raises(SchemaError, match="share 5 of 40"):
        layer_roi_rsa(few, responses)
    broken = responses["s1"].copy(deep=True)
    broken["responses"][3, np.flatnonzero(broken["roi"].values == "V1")[0]] = np.nan
    with pytest.raises(SchemaError, match="'V1' of subject 's1'"):
        layer_roi_cka(layers, broken, rois=["V1"])
