"""RDMs and their comparison, against published values and against rsatoolbox."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform

from brainalign.data.studies import kriegeskorte2008
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.evaluation.rdm_bootstrap import COMPARISONS, draw_samples, resampled_similarity
from brainalign.evaluation.rsa import (
    average_rdms,
    compare_rdms,
    evaluate_rdms,
    rdm,
    rdm_noise_ceiling,
    rdms_dataset,
    stack_rdms,
)


@pytest.fixture(scope="module")
def study(mirror, tmp_path_factory):
    folder = mirror / kriegeskorte2008.FOLDER
    stimuli = tmp_path_factory.mktemp("stimuli")
    return kriegeskorte2008.load(folder, stimuli_folder=stimuli / "92").extras


def random_rdms(n_rdms, n, seed, *, noise=1.0, shared=None):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((n, 5)) if shared is None else shared
    patterns = [base + noise * rng.standard_normal(base.shape) for _ in range(n_rdms)]
    matrices = [squareform(pdist(p, "sqeuclidean")) for p in patterns]
    return rdms_dataset(matrices, [f"s{i}" for i in range(n_rdms)], [f"im{i}" for i in range(n)])


def subject_means(human):
    subject = human["subject"].values.astype(str)
    names = list(dict.fromkeys(subject))
    means = [human["rdm"].values[subject == s].mean(axis=0) for s in names]
    return rdms_dataset(means, names, human["stimulus_id"].values)


def test_monkey_and_human_it(study):
    human, monkey = study["human_it_mean"], study["monkey_it"]
    for method, published in (("corr", 0.4912), ("spearman", 0.4389), ("kendall", 0.3040)):
        assert compare_rdms(monkey, human, method=method).item() == pytest.approx(
            published, abs=5e-5
        )


def test_models_against_human_it(study):
    published = {
        "animacy": (0.577, 0.588), "FaceBodyManmadeNatobj": (0.418, 0.405), "EVA": (0.374, 0.354),
        "HMAX": (0.217, 0.222), "V1": (0.042, 0.039), "Silhouette": (0.162, 0.125),
        "RADON": (0.055, 0.061),
    }  # fmt: skip
    for method, column in (("corr", 0), ("spearman", 1)):
        got = compare_rdms(study["models"], study["human_it_mean"], method=method)[:, 0]
        for name, values in published.items():
            assert got.sel(model=name).item() == pytest.approx(values[column], abs=6e-4)


def test_noise_ceilings(study):
    human = subject_means(study["human_it"])
    assert rdm_noise_ceiling(human, method="corr") == pytest.approx((0.394, 0.680), abs=6e-4)
    assert rdm_noise_ceiling(human, method="spearman") == pytest.approx((0.372, 0.666), abs=6e-4)
    behaviour = study["behaviour"]
    assert rdm_noise_ceiling(behaviour, method="corr") == pytest.approx((0.572, 0.635), abs=6e-4)
    spearman = rdm_noise_ceiling(behaviour, method="spearman")
    assert spearman == pytest.approx((0.477, 0.577), abs=6e-4)


def test_published_models_are_ranked_with_intervals(study):
    human = subject_means(study["human_it"])
    for over in ("stimuli", "both"):
        result = evaluate_rdms(study["models"], human, method="spearman", over=over, n_bootstrap=60)
        value = result["value"].to_series()
        assert value["animacy"] == value.drop("monkeyIT").max()
        assert (result["low"] < result["value"]).all() and (result["value"] < result["high"]).all()
        assert result["p"].sel(model="animacy") < 0.05
        assert result["ceiling"].sel(bound="lower") == pytest.approx(0.3723, abs=1e-3)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("correlation", lambda x: pdist(x, "correlation")),
        ("euclidean", lambda x: pdist(x, "sqeuclidean") / x.shape[1]),
    ],
)
def test_measures_are_their_definitions(measure, expected):
    x = np.random.default_rng(0).standard_normal((12, 7))
    ds = xr.Dataset(
        {"features": (("stimulus", "feature"), x.astype(np.float32))},
        coords={
            "stimulus_id": ("stimulus", [f"b{i}" for i in range(12)]),
            "model": "m",
            "layer": "conv1",
        },
    )
    order = [f"b{i}" for i in (5, 2, 9, 0)]
    got = rdm(ds, measure=measure, stimulus_id=order)
    assert got["rdm_name"].values.tolist() == ["conv1"]
    assert got["stimulus_id"].values.tolist() == order
    np.testing.assert_allclose(
        squareform(got["rdm"].values[0]), expected(x[[5, 2, 9, 0]]), atol=1e-6
    )


def responses(n_stimuli=10, repeats=4, t=30, signal=0.0, seed=0):
    rng = np.random.default_rng(seed)
    base = np.tile(signal * rng.standard_normal((n_stimuli, t)), (repeats, 1))
    y = base + rng.standard_normal((n_stimuli * repeats, t))
    n = len(y)
    return xr.Dataset(
        {"responses": (("presentation", "neuroid"), y)},
        coords={
            "stimulus_id": ("presentation", [f"im{i}" for i in range(n_stimuli)] * repeats),
            "repetition": ("presentation", np.repeat(np.arange(repeats), n_stimuli)),
            "session": ("presentation", np.zeros(n, int)),
            "run": ("presentation", np.zeros(n, int)),
            "subject": ("presentation", ["s1"] * n),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(t)]),
            "roi": ("neuroid", ["IT"] * t),
            "hemisphere": ("neuroid", ["L"] * t),
        },
    )


def test_presentations_are_averaged_and_crossnobis_is_unbiased():
    null = responses()
    mean = null["responses"].values.reshape(4, 10, 30).mean(axis=0)
    got = rdm(null, measure="correlation")
    np.testing.assert_allclose(squareform(got["rdm"].values[0]), pdist(mean, "correlation"))
    biased = squareform(rdm(null, measure="euclidean")["rdm"].values[0])
    unbiased = squareform(rdm(null, measure="crossnobis")["rdm"].values[0])
    assert biased.mean() > 0.3
    assert abs(unbiased.mean()) < 0.08
    assert squareform(rdm(responses(signal=1.0), measure="crossnobis")["rdm"].values[0]).mean() > 1


def test_dual_bootstrap_has_the_variance_of_rsatoolbox():
    from rsatoolbox.util.inference_util import extract_variances

    from brainalign.evaluation.rsa import corrected_variance

    rng = np.random.default_rng(1)
    draws = rng.standard_normal((3, 50, 4)) * np.array([2.0, 1.0, 0.7])[:, None, None]
    covariance = np.stack([np.cov(d.T) for d in draws])
    model, diff, _ = extract_variances(covariance, False, n_rdm=5, n_pattern=20)
    np.testing.assert_allclose(corrected_variance(draws.var(axis=1, ddof=1), (5, 20)), model)
    pairs = draws[..., :, None] - draws[..., None, :]
    upper = corrected_variance(pairs.var(axis=1, ddof=1), (5, 20))[np.triu_indices(4, 1)]
    np.testing.assert_allclose(upper, diff)
    one, _, _ = extract_variances(covariance[2], False, n_pattern=20)
    np.testing.assert_allclose(corrected_variance(draws[2:].var(axis=1, ddof=1), (20,)), one)


def test_standard_error_is_that_of_new_stimuli():
    rng = np.random.default_rng(2)
    values, claimed = [], []
    for i in range(30):
        shared = rng.standard_normal((30, 6))
        model = random_rdms(1, 30, 1000 + i, shared=shared)
        data = random_rdms(1, 30, 5000 + i, shared=shared)
        result = evaluate_rdms(model, data, method="corr", n_bootstrap=60, seed=i)
        values.append(result["value"].item())
        claimed.append(result["se"].item())
    ratio = np.mean(claimed) / np.std(values)
    assert 0.7 < ratio < 1.6


def test_models_that_are_equal_do_not_differ():
    data = random_rdms(4, 20, 3, shared=np.random.default_rng(9).standard_normal((20, 5)))
    a = random_rdms(1, 20, 4)
    models = stack_rdms({"a": a, "b": a, "best": average_rdms(data)})
    result = evaluate_rdms(models, data, over="both", n_bootstrap=50, seed=0)
    assert result["difference"].sel(model="a", model_2="b") == 0
    assert not result["p_difference"].sel(model="a", model_2="b") < 0.05
    assert result["p_difference"].sel(model="best", model_2="a") < 0.05
    again = evaluate_rdms(models, data, over="both", n_bootstrap=50, seed=0)
    xr.testing.assert_identical(result, again)


def test_order_of_stimuli_does_not_matter_but_their_identity_does():
    a, b = random_rdms(1, 8, 5), random_rdms(1, 8, 6)
    order = np.random.default_rng(0).permutation(8)
    shuffled = b.isel(stimulus=order, stimulus_2=order)
    assert compare_rdms(a, b).item() == compare_rdms(a, shuffled).item()
    other = b.assign_coords(
        stimulus_id=("stimulus", [f"x{i}" for i in range(8)]),
        stimulus_id_2=("stimulus_2", [f"x{i}" for i in range(8)]),
    )
    with pytest.raises(SchemaError, match=r"8 missing \['im0'"):
        compare_rdms(a, other)


def test_comparison_is_scipy():
    a, b = random_rdms(2, 10, 7), random_rdms(3, 10, 8)
    got = compare_rdms(a, b, method="spearman")
    x, y = squareform(a["rdm"].values[1]), squareform(b["rdm"].values[2])
    assert got.values[1, 2] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


def square(rng, n_rdms, n, levels=0):
    """Random RDMs; with `levels`, dissimilarities are tied at so many values."""
    x = rng.random((n_rdms, n, n))
    x = np.round((x + x.transpose(0, 2, 1)) * levels / 2) if levels else x + x.transpose(0, 2, 1)
    x[:, np.arange(n), np.arange(n)] = 0
    return x


def by_rsatoolbox(models, data, counts, method):
    from rsatoolbox.rdm import RDMs, compare

    out = []
    for row in counts.astype(int):
        drawn = np.repeat(np.arange(len(row)), row)
        pair = (RDMs(x).subsample_pattern("index", drawn) for x in (models, data))
        out.append(compare(*pair, method))
    return np.array(out)


@pytest.mark.parametrize("method", COMPARISONS)
@pytest.mark.parametrize("n", [7, 33])
def test_every_sample_is_that_of_rsatoolbox(method, n):
    rng = np.random.default_rng(n)
    models = np.concatenate([square(rng, 2, n), square(rng, 2, n, levels=3)])
    data = np.concatenate([square(rng, 2, n), square(rng, 1, n, levels=5)])
    counts, _ = draw_samples(n, 1, 12, seed=n)
    subsets = (rng.random((3, n)) < 0.8).astype(float)
    counts = np.concatenate([counts, subsets, np.ones((1, n))])
    counts = counts[(counts > 0).sum(axis=1) > 3]
    got = resampled_similarity(models, data, counts, method=method)
    np.testing.assert_allclose(got, by_rsatoolbox(models, data, counts, method), atol=1e-10)


@given(
    n=st.integers(4, 12), levels=st.sampled_from([0, 1, 2, 4]), seed=st.integers(0, 10_000),
    method=st.sampled_from(["spearman", "rho-a", "kendall", "tau-a"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_weighted_ranks_are_those_of_a_sample_written_out(n, levels, seed, method):
    rng = np.random.default_rng(seed)
    models, data = square(rng, 1, n, levels), square(rng, 1, n)
    counts = rng.integers(0, 4, (1, n)).astype(float)
    counts[0, rng.choice(n, 3, replace=False)] += 1
    drawn = np.repeat(np.arange(n), counts[0].astype(int))
    i, j = (drawn[k] for k in np.triu_indices(len(drawn), 1))
    x, y = models[0][i, j][i != j], data[0][i, j][i != j]
    got = resampled_similarity(models, data, counts, method=method).item()
    if method == "spearman":
        want = scipy.stats.spearmanr(x, y).statistic if np.ptp(x) and np.ptp(y) else 0
    elif method == "rho-a":
        centred = [scipy.stats.rankdata(v) - (len(v) + 1) / 2 for v in (x, y)]
        want = 12 * (centred[0] @ centred[1]) / (len(x) ** 3 - len(x))
    else:
        signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
        pairs = len(x) * (len(x) - 1)
        untied = [(v[:, None] != v).sum() for v in (x, y)]
        norm = pairs if method == "tau-a" else np.sqrt(float(untied[0]) * untied[1])
        want = signs.sum() / norm if norm else np.nan
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_samples_too_small_are_no_samples_and_missing_pairs_are_left_out():
    rng = np.random.default_rng(0)
    models, data = square(rng, 2, 8), square(rng, 2, 8)
    counts = np.array([[4, 4, 0, 0, 0, 0, 0, 0], [1, 2, 1, 0, 2, 1, 1, 0]], dtype=float)
    for x in (models, data):
        x[:, 1, 4] = x[:, 4, 1] = np.nan
    for method in COMPARISONS:
        got = resampled_similarity(models, data, counts, method=method)
        assert np.isnan(got[0]).all()
        np.testing.assert_allclose(
            got[1:], by_rsatoolbox(models, data, counts[1:], method), atol=1e-10
        )
    models[0, 2, 3] = models[0, 3, 2] = np.nan
    with pytest.raises(SchemaError, match="NaN in some RDMs only"):
        resampled_similarity(models, data, counts)


@pytest.mark.parametrize("over", ["stimuli", "subjects", "both"])
@pytest.mark.parametrize("method", ["corr", "rho-a"])
def test_inference_is_that_of_rsatoolbox_on_the_same_samples(method, over, monkeypatch):
    from rsatoolbox.inference import evaluate
    from rsatoolbox.model import ModelFixed
    from rsatoolbox.rdm import RDMs
    from rsatoolbox.util.inference_util import t_test_0

    n, n_subjects, n_bootstrap = 14, 4, 25
    shared = np.random.default_rng(1).standard_normal((n, 5))
    models = random_rdms(3, n, 2, shared=shared)
    data = random_rdms(n_subjects, n, 3, shared=shared, noise=2)
    stimuli, subjects = draw_samples(n, n_subjects, n_bootstrap, seed=5)
    rows = iter([np.repeat(np.arange(n), c.astype(int)) for c in stimuli])
    who = iter([np.repeat(np.arange(n_subjects), c.astype(int)) for c in subjects])

    def sample(rdms, rdm_descriptor="index", pattern_descriptor="index"):
        r, w = next(rows), next(who)
        return rdms.subsample("index", w).subsample_pattern("index", r), w, r

    def sample_pattern(rdms, pattern_descriptor="index"):
        r = next(rows)
        return rdms.subsample_pattern("index", r), r

    def sample_rdm(rdms, rdm_descriptor="index"):
        w = next(who)
        return rdms.subsample("index", w), w

    monkeypatch.setattr(evaluate, "bootstrap_sample", sample)
    monkeypatch.setattr(evaluate, "bootstrap_sample_pattern", sample_pattern)
    monkeypatch.setattr(evaluate, "bootstrap_sample_rdm", sample_rdm)
    run = {
        "both": evaluate.eval_dual_bootstrap,
        "stimuli": evaluate.eval_bootstrap_pattern,
        "subjects": evaluate.eval_bootstrap_rdm,
    }[over]
    i, j = np.triu_indices(n, 1)
    fixed = [ModelFixed(str(k), RDMs(x[i, j][None])) for k, x in enumerate(models["rdm"].values)]
    targets = RDMs(data["rdm"].values[:, i, j])
    theirs = run(fixed, targets, method=method, N=n_bootstrap)
    whole = evaluate.eval_fixed(fixed, targets, method=method)
    ours = evaluate_rdms(models, data, method=method, over=over, n_bootstrap=n_bootstrap, seed=5)
    np.testing.assert_allclose(ours["value"], whole.evaluations[0].mean(axis=1), atol=1e-10)
    np.testing.assert_allclose(ours["se"], np.sqrt(theirs.model_var), atol=1e-10)
    one_sided = t_test_0(whole.evaluations, theirs.model_var, theirs.dof)
    np.testing.assert_allclose(ours["p"], 2 * np.minimum(one_sided, 1 - one_sided), atol=1e-10)
    upper = np.triu_indices(3, 1)
    difference = ours["difference"].values[upper] / np.sqrt(theirs.diff_var)
    p = 2 * scipy.stats.t.sf(np.abs(difference), theirs.dof)
    np.testing.assert_allclose(ours["p_difference"].values[upper], p, atol=1e-10)


def test_unrelated_models_are_found_no_more_often_than_stated():
    rng = np.random.default_rng(0)
    n, t = 20, 150
    p = []
    for seed in range(t):
        model, data = (
            rdm(rng.standard_normal((n, 6)), stimulus_id=[f"s{i}" for i in range(n)])
            for _ in range(2)
        )
        p.append(evaluate_rdms(model, data, n_bootstrap=60, seed=seed)["p"].item())
    assert (np.array(p) < 0.05).sum() <= scipy.stats.binom.ppf(0.999, t, 0.05)


@pytest.mark.parametrize("measure", ["correlation", "euclidean", "mahalanobis"])
def test_measures_are_those_of_rsatoolbox(measure):
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm

    data = responses(signal=0.5)
    x = data["responses"].values
    root = np.random.default_rng(4).standard_normal((30, 30))
    precision = root @ root.T + np.eye(30)
    options = {"noise": precision} if measure == "mahalanobis" else {}
    stimulus = np.unique(data["stimulus_id"].values, return_inverse=True)[1]
    theirs = calc_rdm(
        Dataset(x + 100, obs_descriptors={"s": stimulus}), method=measure, descriptor="s", **options
    ).get_matrices()[0]
    np.fill_diagonal(theirs, 0)
    shifted = data.assign(responses=data["responses"] + 100)
    precision = {"noise_precision": precision} if options else {}
    ours = rdm(shifted, measure=measure, **precision)["rdm"].values[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_errors():
    data = random_rdms(1, 8, 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'spearman'"):
        compare_rdms(data, data, method="spearmann")
    with pytest.raises(UnknownNameError, match="Did you mean 'correlation'"):
        rdm(np.eye(4), measure="correlations", stimulus_id=list("abcd"))
    with pytest.raises(SchemaError, match=r"1 of 3 patterns .* constant \('b'\)"):
        rdm(np.array([[1.0, 2, 3], [5, 5, 5], [3, 1, 2]]), stimulus_id=list("abc"))
    with pytest.raises(UnknownNameError, match="'im99'"):
        rdm(responses(), stimulus_id=["im1", "im99"])
    with pytest.raises(SchemaError, match="at least two RDMs"):
        rdm_noise_ceiling(data)
    with pytest.raises(ConfigError, match="at least two data RDMs"):
        evaluate_rdms(data, data, over="subjects")
