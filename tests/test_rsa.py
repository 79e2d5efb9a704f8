"""RDMs and their comparison, against published values and against rsatoolbox."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from scipy.spatial.distance import pdist, squareform

from brainalign.data.studies import kriegeskorte2008
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
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
