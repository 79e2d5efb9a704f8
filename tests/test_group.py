"""Inference over subjects against simulations with a known truth."""

from __future__ import annotations

from itertools import product

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.data import cortex, maps
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.evaluation import (
    compare_over_subjects,
    fdr,
    group_map,
    normalised_score,
    pearson_r,
    sign_flip_test,
    two_factor_test,
    two_factor_variance,
)


def population(rng, subjects, n, *, shared=1.0, by_subject=0.4, by_stimulus=0.7, worse=0.0, v=6):
    """Measured and predicted values of two models whose errors vary over subjects and stimuli.

    Each model misreads each stimulus in its own way, the same for all subjects, and each subject
    suits it more or less; `worse` adds to the misreading of the second.
    """
    common = round(n * shared)
    total = common + subjects * (n - common)
    z, a, b = rng.standard_normal((3, total, 4))
    latent = {"a": z + by_stimulus * a, "b": z + (by_stimulus + worse) * b}
    measured, predicted, ids = [], {"a": [], "b": []}, []
    for s in range(subjects):
        own = np.r_[:common, common + s * (n - common) : common + (s + 1) * (n - common)]
        w = rng.standard_normal((4, v))
        measured.append(z[own] @ w + 2 * rng.standard_normal((n, v)))
        ids.append(own.astype(str))
        for m, values in latent.items():
            noise = 2 * np.exp(by_subject * rng.standard_normal())
            predicted[m].append(values[own] @ w + noise * rng.standard_normal((n, v)))
    return measured, predicted, ids


def rejections(n_studies, subjects, n, seed=0, **options):
    rng = np.random.default_rng(seed)
    p = []
    for i in range(n_studies):
        y, x, ids = population(rng, subjects, n, **options)
        ds = compare_over_subjects(y, x, stimulus_id=ids, n_bootstrap=100, seed=i, device="cpu")
        p.append(float(ds["p"].sel(model="a", model_2="b")))
    return int((np.array(p) < 0.05).sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"by_subject": 0.0}, {"shared": 0.2}],
    ids=["both vary", "only stimuli vary", "mostly own stimuli"],
)
def test_equal_models_differ_as_rarely_as_they_should(options):
    found = rejections(80, 8, 50, **options)
    # What a test of size 5 % exceeds once in 1000 times.
    assert found <= scipy.stats.binom.ppf(0.999, 80, 0.05)


def test_a_worse_model_is_found():
    assert rejections(25, 8, 150, worse=1.5) >= 20


def test_two_factor_variance_is_that_of_new_subjects_and_stimuli():
    # Scores with known effects of subjects, stimuli and cells: the mean has variance A + B + C.
    rng = np.random.default_rng(1)
    u, n = 10, 30
    a, b, c = 0.3, 0.5, 1.5
    truth = a**2 / u + b**2 / n + c**2 / (u * n)
    estimates, p = [], []
    counts = rng.multinomial(n, np.full(n, 1 / n), size=300)
    for _ in range(400):
        x = (
            a * rng.standard_normal((u, 1))
            + b * rng.standard_normal(n)
            + c * rng.standard_normal((u, n))
        )
        made = two_factor_test(x.mean(axis=1), counts @ x.T / n, n_stimuli=n)
        estimates.append(float(made.se) ** 2)
        p.append(float(made.p))
        assert u - 1 <= made.dof <= u + n - 2
    assert 1 < np.mean(estimates) / truth < 1.25  # above: it is held over either factor's alone
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08


def test_variance_parts_and_bounds():
    got = two_factor_variance(6.0, 2.0, 3.0, n_subjects=10**9, n_stimuli=10**9)
    assert got == pytest.approx(2 * (2 + 3) - 6)
    assert two_factor_variance(9.0, 2.0, 3.0, n_subjects=10**9, n_stimuli=10**9) == pytest.approx(3)
    assert two_factor_variance(4.0, 2.0, 3.0, n_subjects=10**9, n_stimuli=10**9) == pytest.approx(5)
    few = two_factor_variance(2.0, 2.0, 0.0, n_subjects=3, n_stimuli=100)
    assert few == pytest.approx(3)


def test_values_are_means_of_r_over_the_neuroids_of_a_roi():
    rng = np.random.default_rng(2)
    y, x, ids = population(rng, 3, 40, v=7)
    y = [m[:, : 7 - s] for s, m in enumerate(y)]
    x = {k: [m[:, : 7 - s] for s, m in enumerate(v)] for k, v in x.items()}
    y[0][:, 2] = 1.0
    x["b"][1][3, 0] = np.nan
    roi = [np.array(list("VVVFFF"))[: m.shape[1]] for m in y]
    roi[0] = np.array(["V", "V", "V", "F", "F", "F", ""])
    roi[1] = np.array(["V"] * 6)
    ds = compare_over_subjects(y, x, stimulus_id=ids, roi=roi, subjects=["p", "q", "r"],
                               n_bootstrap=50)  # fmt: skip
    assert ds["per_subject"].dims == ("model", "roi", "subject")
    assert ds["difference"].dims == ("model", "model_2", "roi")
    assert ds["n_subjects"].sel(roi=["V", "F"]).values.tolist() == [3, 2]
    assert ds["n_neuroids"].sel(roi="V").values.tolist() == [2, 5, 3]
    for m in "ab":
        expected = pearson_r(y[0], x[m][0])[[0, 1]].mean()
        got = ds["per_subject"].sel(model=m, roi="V", subject="p")
        np.testing.assert_allclose(got, expected)
        # The neuroid that one model has no score for is left out of both.
        np.testing.assert_allclose(
            ds["per_subject"].sel(model=m, roi="V", subject="q"),
            pearson_r(y[1], x[m][1])[1:].mean(),
        )
        assert np.isnan(ds["per_subject"].sel(model=m, roi="F", subject="q"))
        np.testing.assert_allclose(ds["value"].sel(model=m),
                                   ds["per_subject"].sel(model=m).mean("subject"))  # fmt: skip
    np.testing.assert_allclose(ds["difference"].sel(model="a", model_2="b"),
                               ds["value"].sel(model="a") - ds["value"].sel(model="b"))  # fmt: skip
    np.testing.assert_allclose(ds["difference_low"].sel(model="a", model_2="b"),
                               -ds["difference_high"].sel(model="b", model_2="a"))  # fmt: skip
    assert (ds["p"].values[[0, 1], [0, 1]] == 1).all()
    assert (
        (ds["per_subject_low"] <= ds["per_subject_high"])
        .where(ds["per_subject"].notnull(), True)
        .all()
    )
    again = compare_over_subjects(y, x, stimulus_id=ids, roi=roi, subjects=["p", "q", "r"],
                                  n_bootstrap=50)  # fmt: skip
    xr.testing.assert_identical(ds, again)


def test_ceilings_and_the_order_of_rows():
    rng = np.random.default_rng(3)
    y, x, ids = population(rng, 4, 30, shared=0.5)
    ceiling = [rng.uniform(0.05, 0.9, 6) for _ in range(4)]
    ds = compare_over_subjects(y, x, stimulus_id=ids, ceiling=ceiling, n_bootstrap=40)
    assert ds.attrs["measure"] == "normalised" and ds.attrs["n_shared_stimuli"] == 15
    expected = np.nanmean(normalised_score(pearson_r(y[2], x["a"][2]), ceiling[2])[0])
    np.testing.assert_allclose(ds["per_subject"].sel(model="a", subject="3"), expected)
    order = [rng.permutation(30) for _ in range(4)]
    mixed = compare_over_subjects(
        [m[o] for m, o in zip(y, order, strict=True)],
        {k: [m[o] for m, o in zip(v, order, strict=True)] for k, v in x.items()},
        stimulus_id=[np.asarray(i)[o] for i, o in zip(ids, order, strict=True)],
        ceiling=ceiling, n_bootstrap=40,
    )  # fmt: skip
    xr.testing.assert_allclose(ds, mixed)


def test_a_subject_with_few_stimuli_of_its_own_is_missing_from_some_samples_only():
    rng = np.random.default_rng(9)
    y, x, ids = population(rng, 3, 40)
    y[2], ids[2] = y[2][:4], np.array(list("wxyz"))
    x = {k: [*v[:2], v[2][:4]] for k, v in x.items()}
    ds = compare_over_subjects(y, x, stimulus_id=ids, n_bootstrap=200)
    assert ds["n_stimuli"].values.tolist() == [40, 40, 4]
    assert all(np.isfinite(ds[name]).all() for name in ("per_subject_low", "se", "difference_low"))


def test_what_cannot_be_compared_is_refused():
    rng = np.random.default_rng(4)
    y, x, ids = population(rng, 2, 20)
    with pytest.raises(ConfigError, match="at least two; there is 1.*other subjects"):
        compare_over_subjects(y[:1], {"a": x["a"][:1]})
    with pytest.raises(ConfigError, match="no models"):
        compare_over_subjects(y, {})
    with pytest.raises(SchemaError, match="'2': measured has shape .* predictions of 'b'"):
        compare_over_subjects(y, {"a": x["a"], "b": [x["b"][0], x["b"][1][:5]]})
    with pytest.raises(SchemaError, match="'a' has predictions of 1 subjects"):
        compare_over_subjects(y, {"a": x["a"][:1]})
    with pytest.raises(SchemaError, match="different numbers of rows"):
        compare_over_subjects([y[0], y[1][:9]], {"a": [x["a"][0], x["a"][1][:9]]})
    with pytest.raises(SchemaError, match="stimulus_id of shape"):
        compare_over_subjects(y, x, stimulus_id=[ids[0], ids[1][:3]])
    with pytest.raises(SchemaError, match="at least 3"):
        compare_over_subjects(y, x, stimulus_id=[ids[0], ["s"] * 20])
    with pytest.raises(ConfigError, match="a name of its own"):
        compare_over_subjects(y, x, subjects=["s", "s"])
    with pytest.raises(SchemaError, match="constant or not finite"):
        compare_over_subjects([np.ones((20, 2))] * 2, {"a": [np.ones((20, 2))] * 2})


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_sign_flips_are_enumerated(n, v, two_sided, seed):
    x = np.random.default_rng(seed).standard_normal((n, v)) + 0.5
    got = sign_flip_test(x, tail="two-sided" if two_sided else "greater", device="cpu")
    flipped = np.array([(np.array(f)[:, None] * x) for f in product([1, -1], repeat=n)])
    t = flipped.mean(axis=1) / (flipped.std(axis=1, ddof=1) / np.sqrt(n))
    observed = scipy.stats.ttest_1samp(x, 0)
    np.testing.assert_allclose(got.t, observed.statistic)
    if two_sided:
        t = np.abs(t)
    reference = np.abs(got.t) if two_sided else got.t
    slack = 1e-8 * np.abs(reference)
    np.testing.assert_allclose(got.p, (t >= reference - slack).mean(axis=0))
    np.testing.assert_allclose(
        got.p_max, (t.max(axis=1)[:, None] >= reference - slack).mean(axis=0)
    )
    np.testing.assert_allclose(got.q, fdr(got.p))
    interval = observed.confidence_interval(0.95)
    np.testing.assert_allclose([got.low, got.high], [interval.low, interval.high])
    assert (got.n_subjects == n).all() and len(got.null_max) == 2**n - 1


def test_sign_flips_hold_their_rates_and_find_effects():
    rng = np.random.default_rng(5)
    family, p = 0, []
    for seed in range(150):
        x = rng.standard_normal((12, 40)) * rng.uniform(0.5, 2, (12, 1))
        test = sign_flip_test(x, n_permutations=199, seed=seed, device="cpu")
        family += (test.p_max <= 0.05).any()
        p.append(test.p[0])
    assert family <= scipy.stats.binom.ppf(0.999, 150, 0.05)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    x = rng.standard_normal((12, 40))
    x[:, :5] += 2
    found = sign_flip_test(x, device="cpu")
    assert (found.q[:5] < 0.05).all() and (found.p_max[:5] < 0.05).all()
    assert (sign_flip_test(-x, device="cpu").p[:5] > 0.9).all()
    assert (sign_flip_test(-x, tail="two-sided", device="cpu").p_max[:5] < 0.05).all()


def test_missing_subjects_are_counted():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((8, 6)) + 1
    holes = x.copy()
    holes[3:, 1] = np.nan
    holes[1:, 2] = np.nan
    holes[:, 3] = 0.0
    holes[:, 4] = [0.5, -0.5] * 4
    got = sign_flip_test(holes, device="cpu")
    assert got.n_subjects.tolist() == [8, 3, 1, 8, 8, 8]
    assert np.isnan(got.t).tolist() == [False, False, True, True, True, False]
    alone = sign_flip_test(x[:3, 1:2], device="cpu")
    np.testing.assert_allclose([got.mean[1], got.t[1], got.p[1], got.low[1]],
                               [alone.mean[0], alone.t[0], alone.p[0], alone.low[0]])  # fmt: skip
    assert np.isnan(sign_flip_test(holes, min_subjects=4, device="cpu").p[1])
    with pytest.raises(ConfigError, match="at least two"):
        sign_flip_test(x[:1])
    with pytest.raises(ConfigError, match="'greater' or 'two-sided'"):
        sign_flip_test(x, tail="less")


@pytest.fixture
def surfaces():
    """Scores of nine subjects on random parts of one mesh, in random order, by (side, vertex)."""
    rng = np.random.default_rng(7)
    where = cortex.neuroids(300, seed=1)
    truth = np.where(where["vertex"].values % 2 == 0, 0.4, 0.0)
    subjects, known = [], []
    for s in range(9):
        keep = rng.permutation(300)[: 300 - 10 * s]
        values = truth + 0.1 * rng.standard_normal(300)
        part = where.isel(neuroid=keep)
        subjects.append(part.assign(r=("neuroid", values[keep])).assign_attrs(
            subject=f"{s}", space="fsaverage5", n_vertices=[10242, 10242]))  # fmt: skip
        sides, vertices = part["hemisphere"].values.tolist(), part["vertex"].values.tolist()
        known.append(dict(zip(zip(sides, vertices, strict=True), values[keep], strict=True)))
    return subjects, known


def test_group_map_matches_neuroids_by_identity(surfaces, tmp_path):
    subjects, known = surfaces
    made = group_map(subjects, n_permutations=600)
    assert made.sizes["neuroid"] == 300 and made.attrs["subjects"] == list("012345678")
    for i in range(0, 300, 7):
        one = made.isel(neuroid=i)
        place = (str(one["hemisphere"].values), int(one["vertex"]))
        values = [k[place] for k in known if place in k]
        assert int(one["n_subjects"]) == len(values)
        np.testing.assert_allclose(one["mean"], np.mean(values))
        np.testing.assert_allclose(one["t"], scipy.stats.ttest_1samp(values, 0).statistic)
    effect = made["vertex"].values % 2 == 0
    assert (made["q"].values[effect] < 0.05).mean() > 0.9
    assert (made["q"].values[~effect] < 0.05).mean() < 0.1
    paths = maps.write_gifti(made, tmp_path / "group", ["mean", "t", "q", "n_subjects"])
    for side, path in paths.items():
        image = nib.load(path)
        rows = made["hemisphere"].values == side
        vertex = made["vertex"].values[rows]
        for data, name in zip(image.darrays, ["mean", "t", "q", "n_subjects"], strict=True):
            assert data.meta["Name"] == name
            np.testing.assert_allclose(data.data[vertex], made[name].values[rows], rtol=1e-5)
            assert np.isnan(np.delete(data.data, vertex)).all()


def test_group_map_of_voxels_is_written_on_their_grid(tmp_path):
    rng = np.random.default_rng(8)
    affine = np.array([[-2.0, 0, 0, 6], [0, 2, 0, -8], [0, 0, 2.5, -3], [0, 0, 0, 1]])
    shape, places = (4, 5, 3), np.argwhere(np.ones((4, 5, 3), bool))
    subjects, total, count = {}, np.zeros(shape), np.zeros(shape)
    for s in "abc":
        ijk = rng.permutation(places)[:40]
        xyz = ijk @ affine[:3, :3].T + affine[:3, 3]
        values = rng.standard_normal((2, 40))
        total[tuple(ijk.T)] += values[1]
        count[tuple(ijk.T)] += 1
        subjects[s] = xr.Dataset(
            {"r": (("layer", "neuroid"), values)},
            coords={"layer": ["x", "y"], "roi": ("neuroid", np.where(ijk[:, 0] == 0, "V1", "")),
                    **{a: ("neuroid", ijk[:, k]) for k, a in enumerate("ijk")},
                    **{a: ("neuroid", xyz[:, k]) for k, a in enumerate("xyz")}},
            attrs={"space": "MNI152NLin2009cAsym", "affine": affine.ravel().tolist(),
                   "volume_shape": list(shape)},
        )  # fmt: skip
    made = group_map(subjects, layer="y")
    image = nib.load(maps.write_nifti(made, tmp_path / "g.nii.gz", ["mean", "n_subjects"], fill=0))
    np.testing.assert_allclose(image.affine, affine)
    data = image.get_fdata()
    np.testing.assert_array_equal(data[..., 1], count)
    several = count > 1
    np.testing.assert_allclose(data[..., 0][several], (total / count.clip(1))[several], rtol=1e-5)
    assert (made["roi"].values == np.where(made["i"].values == 0, "V1", "")).all()
    assert np.isnan(made["p"].values[made["n_subjects"].values == 1]).all()
    with pytest.raises(ConfigError, match="2 layers"):
        group_map(subjects)
    with pytest.raises(UnknownNameError, match="'a' has no layer 'z'"):
        group_map(subjects, layer="z")
    moved = dict(subjects, b=subjects["b"].assign_attrs(affine=(affine + 1).ravel().tolist()))
    with pytest.raises(SchemaError, match="'a' and 'b' are not in one space: affine"):
        group_map(moved, layer="y")


def test_subjects_of_different_spaces_are_refused(surfaces):
    subjects, _ = surfaces
    with pytest.raises(SchemaError, match="'0' and '1' are not in one space: space is fsaverage5"):
        group_map([subjects[0], subjects[1].assign_attrs(space="fsaverage6")])
    with pytest.raises(SchemaError, match="'T1w', which is each subject's own"):
        group_map([s.assign_attrs(space="T1w") for s in subjects])
    with pytest.raises(ConfigError, match="'0' is there more than once"):
        group_map([subjects[0], subjects[0]])
    with pytest.raises(UnknownNameError, match="no 'rr'"):
        group_map(subjects, "rr")
    with pytest.raises(SchemaError, match="at 270 places"):
        twice = subjects[3].isel(neuroid=[0, *range(270)])
        group_map([subjects[0], twice])
    with pytest.raises(SchemaError, match="neither hemisphere and vertex nor i, j, k"):
        group_map([subjects[0], subjects[1].drop_vars("vertex")])
    voxels = xr.Dataset({"r": ("neuroid", [1.0])}, coords={a: ("neuroid", [0]) for a in "ijk"})
    with pytest.raises(SchemaError, match="has a vertex per neuroid, subject 'v' does not"):
        group_map({"a": subjects[0], "v": voxels})
    with pytest.raises(ConfigError, match="at least two"):
        group_map(subjects[:1])
