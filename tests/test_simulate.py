"""A simulated subject carries the truth it claims: ceiling, weights, layer, preference, nulls."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from brainalign.data import cortex, store
from brainalign.data.schema import validate
from brainalign.data.simulate import (
    GENERATORS,
    simulate,
    simulate_timeseries,
    simulate_to,
    true_responses,
)
from brainalign.errors import ConfigError, DiskSpaceError, SchemaError, UnknownNameError

CATEGORIES = ("people", "bodies", "places", "words", "food", "objects")


def make_features(n=300, p=24, seed=0):
    """Correlated features whose mean differs between categories."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % len(CATEGORIES)
    x = rng.normal(size=(n, p))
    x[np.arange(n), kind] += 2
    return (x @ rng.normal(size=(p, p))).astype(np.float32), np.array(CATEGORIES)[kind]


def by_repetition(ds):
    """Responses as (repetition, stimulus, neuroid), stimuli in sorted order."""
    rep, ids = ds["repetition"].values, ds["stimulus_id"].values
    return np.stack(
        [
            ds["responses"].values[np.flatnonzero(rep == r)[np.argsort(ids[rep == r])]]
            for r in np.unique(rep)
        ]
    )


def standardised(x, truth, layer=0):
    return (x - truth["feature_mean"].values[layer]) / truth["feature_scale"].values[layer]


@pytest.fixture(scope="module")
def subject():
    x, category = make_features()
    return x, category, simulate(x, category=category, neuroids=600, null=0.4, seed=3)


def test_patches_lie_where_the_areas_are():
    c = cortex.fsaverage5()
    assert c.xyz.shape == (20484, 3) and (c.edges.diagonal() == 0).all()
    assert abs(c.edges - c.edges.T).max() == 0
    for name, roi in cortex.ROIS.items():
        rows = np.flatnonzero(c.roi == name)
        assert len(rows) >= 20
        sides = {"L" if centre[0] < 0 else "R" for centre in roi.centres}
        assert set(c.hemisphere[rows]) == sides
        gap = np.linalg.norm(c.xyz[rows][:, None] - np.array(roi.centres), axis=-1).min(axis=1)
        assert gap.max() < roi.radius + 6
        assert not c.medial_wall[rows].any()
    centre = {n: np.abs(c.xyz[c.roi == n]).mean(axis=0) for n in cortex.ROIS}
    assert centre["PPA"][0] < centre["FFA"][0] < centre["EBA"][0]
    assert c.xyz[c.roi == "V1"][:, 1].mean() < c.xyz[c.roi == "OFA"][:, 1].mean()


def test_distances_follow_the_surface():
    c = cortex.fsaverage5()
    near = c.within([5, 12000], 15.0)
    assert near[0, 5] == 0 and near.shape == (2, 20484)
    assert near.data.max() <= 15
    assert near[[1]].indices.min() >= cortex.N_VERTICES
    straight = np.linalg.norm(c.xyz[near[[0]].indices] - c.xyz[5], axis=1)
    assert (near[[0]].data >= straight - 1e-9).all()


@pytest.mark.parametrize("n", [1, 50, 1500, 20484, 45000])
def test_any_number_of_neuroids(n):
    ds = cortex.neuroids(n, seed=1)
    assert ds.sizes["neuroid"] == n
    assert len(np.unique(ds["neuroid_id"])) == n


def test_cortex_refuses_nonsense():
    with pytest.raises(UnknownNameError, match="Did you mean 'FFA'"):
        cortex.neuroids(10, rois=["FFFA"])
    with pytest.raises(ConfigError, match="at least 1"):
        cortex.neuroids(0)


def test_responses_follow_the_schema(subject):
    _, _, made = subject
    validate(made.responses, "responses")
    assert made.responses.sizes == {"presentation": 900, "neuroid": 600}
    ids, count = np.unique(made.responses["stimulus_id"], return_counts=True)
    assert len(ids) == 300 and (count == 3).all()
    assert "ncsnr" not in made.responses.coords


def test_ncsnr_and_ceiling_are_recovered(subject):
    _, _, made = subject
    y = by_repetition(made.responses).astype(np.float64)
    noise = y.var(axis=0, ddof=1).mean(axis=0)
    signal = np.maximum(y.mean(axis=0).var(axis=0, ddof=1) - noise / 3, 0)
    ncsnr = np.sqrt(signal / noise)
    live = ~made.truth["null"].values
    truth = made.truth["ncsnr"].values
    # 300 stimuli x 3 repetitions: the standard error of ncsnr is about 0.05 in this range.
    error = (ncsnr - truth)[live]
    assert abs(np.median(error)) < 0.01
    assert error.std() < 0.06
    assert (ncsnr[~live] < 0.35).all() and (truth[~live] == 0).all()
    ceiling = ncsnr**2 / (ncsnr**2 + 1 / 3)
    assert np.abs(ceiling - made.truth["ceiling"].values)[live].mean() < 0.04
    np.testing.assert_allclose(noise**0.5, made.truth["noise_sd"].values, rtol=0.15)


def test_signal_has_unit_variance_and_noise_is_what_is_left(subject):
    x, _, made = subject
    ids = np.array([f"stim{i:05d}" for i in range(300)])
    signal = true_responses(made.truth, x, stimulus_id=ids)
    live = ~made.truth["null"].values
    np.testing.assert_allclose(signal.values[:, live].std(axis=0, ddof=1), 1, atol=1e-4)
    np.testing.assert_allclose(signal.values[:, ~live].std(axis=0), 0, atol=1e-6)
    rest = by_repetition(made.responses) - signal.values
    z = rest / made.truth["noise_sd"].values
    assert stats.kstest(z[:, ::7, ::11].ravel(), "norm").pvalue > 0.01


def test_weights_are_recovered_within_their_standard_error(subject):
    x, _, made = subject
    design = np.column_stack([np.ones(300), standardised(x.astype(np.float64), made.truth)])
    y = by_repetition(made.responses).mean(axis=0)
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    noise = made.truth["noise_sd"].values / np.sqrt(3)
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))[:, None] * noise
    z = (
        found - np.vstack([made.truth["intercept"].values, made.truth["weights"].values.T])
    ) / error
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05


def test_preference_of_each_roi_is_recovered(subject):
    _, category, made = subject
    y = by_repetition(made.responses).mean(axis=0)
    means = np.stack([y[category == c].mean(axis=0) for c in CATEGORIES])
    found = np.array(CATEGORIES)[means.argmax(axis=0)]
    wanted = made.truth["preference"].values
    selective = wanted != ""
    assert selective.sum() > 150
    assert (found == wanted)[selective].mean() > 0.95
    assert made.truth["selectivity"].values[selective].min() > 0.3
    for name, roi in cortex.ROIS.items():
        assert set(wanted[made.truth["roi"].values == name]) <= {roi.category}
    # Outside the ROIs no category is preferred more than chance allows.
    rest = found[(made.truth["roi"].values == "")]
    assert max(np.unique(rest, return_counts=True)[1]) < 0.35 * len(rest)


def test_parts_of_a_roi_prefer_each_their_own_category():
    x, category = make_features(120, 6)
    # One part shares the first label of another ROI's preference.
    options = {"category": category, "neuroids": 2000, "seed": 5}
    options["preference"] = {"EBA": ["people", "bodies"], "PPA": "places"}
    made = simulate(x, parts={"OPA": CATEGORIES[:2]}, **options)
    inside = made.truth["roi"].values == "OPA"
    wanted = made.truth["preference"].values[inside]
    assert set(np.unique(wanted)) <= {*CATEGORIES[:2], ""}
    y = by_repetition(made.responses).mean(axis=0)[:, inside]
    means = np.stack([y[category == c].mean(axis=0) for c in CATEGORIES])
    live = ~made.truth["null"].values[inside]
    assert (np.array(CATEGORIES)[means.argmax(axis=0)] == wanted)[live].mean() > 0.95
    for side in "LR":
        here = made.truth["hemisphere"].values[inside] == side
        front = made.truth["y"].values[inside][here & (wanted == CATEGORIES[1])]
        back = made.truth["y"].values[inside][here & (wanted == CATEGORIES[0])]
        assert abs(len(front) - len(back)) <= 1 and back.max() <= front.min()
    part = np.where(wanted == CATEGORIES[0], "OPA, part 1", "OPA, part 2")
    assert np.array_equal(made.truth["part"].values[inside][live], part[live])
    assert set(made.truth["part"].values[~inside]) == {""}
    signal = true_responses(made.truth, x).values[:, inside].astype(float)
    own = [signal[category == c, v].mean() - signal[category != c, v].mean()
           for v, c in enumerate(wanted)]  # fmt: skip
    selectivity = made.truth["selectivity"].values[inside]
    np.testing.assert_allclose(selectivity[live], np.array(own)[live], rtol=1e-4, atol=1e-5)
    # What is elsewhere is as without parts.
    plain = simulate(x, **options)
    for ours, theirs in ((made.truth, plain.truth), (made.responses, plain.responses)):
        xr.testing.assert_identical(ours.isel(neuroid=~inside), theirs.isel(neuroid=~inside))


def test_parts_of_a_roi_that_no_neuroid_has_are_without_effect():
    x, category = make_features(60, 6)
    where = cortex.neuroids(200, seed=0)
    options = {"category": category, "neuroids": where.isel(neuroid=where["roi"].values != "OPA")}
    made, plain = (simulate(x, parts=p, **options) for p in ({"OPA": ["food", "words"]}, None))
    xr.testing.assert_identical(made.truth, plain.truth)
    xr.testing.assert_identical(made.responses, plain.responses)


def test_parts_that_cannot_be_are_refused():
    x, category = make_features(60, 6)
    where = cortex.neuroids(2000, seed=0)
    opa = where["roi"].values == "OPA"
    two = list(CATEGORIES[:2])
    few = where.isel(neuroid=np.flatnonzero(~opa | (opa.cumsum() <= 1)))

    def made(parts, neuroids=where, **options):
        return simulate(x, category=category, neuroids=neuroids, parts=parts, **options)

    with pytest.raises(SchemaError, match="'y'"):
        made({"OPA": two}, where.drop_vars("y"))
    with pytest.raises(ConfigError, match="'OPA' has 1 neuroids in hemisphere .*too few"):
        made({"OPA": two}, few)
    for given in ({"preference": {"OPA": "food"}}, {"directions": {"OPA": np.ones(6)}}):
        with pytest.raises(ConfigError, match="'OPA' is in parts, and"):
            made({"OPA": two}, **given)
    for wrong in ("food", two[:1], [], ["food", ""], ["food", []]):
        with pytest.raises(ConfigError, match="list of two categories or more for 'OPA'"):
            made({"OPA": wrong})
    with pytest.raises(UnknownNameError, match="'OPA' prefers 'foot'.*Did you mean 'food'"):
        made({"OPA": ["people", "foot"]})
    with pytest.raises(UnknownNameError, match="Did you mean 'OPA'"):
        made({"OPB": two})


def test_null_neuroids_give_uniform_p():
    x, category = make_features(120, 6)
    made = simulate(x, category=category, neuroids=1200, null=0.9, n_repetitions=2, seed=5)
    y = by_repetition(made.responses).mean(axis=0)[:, made.truth["null"].values].astype(float)
    design = np.column_stack([np.ones(120), x])
    rss = ((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum(axis=0)
    tss = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    p = stats.f.sf(((tss - rss) / 6) / (rss / (120 - 7)), 6, 120 - 7)
    assert len(p) > 500
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_a_region_can_be_without_signal():
    x, category = make_features(60, 6)
    options = {"category": category, "neuroids": 600, "n_repetitions": 1, "seed": 5}
    truth = simulate(x, null={"": 0.9, "RSC": 1, "FFA": 0.5}, **options).truth
    silent = truth["null"].to_series().groupby(truth["roi"].values).mean()
    whole = simulate(x, null=0.9, **options).truth
    outside = truth["roi"].values == ""
    assert np.array_equal(truth["null"].values[outside], whole["null"].values[outside])
    assert silent["RSC"] == 1 and silent["FFA"] == pytest.approx(0.5, abs=0.1)
    assert silent["PPA"] == silent["V1"] == 0
    assert set(truth["preference"].values[truth["roi"].values == "RSC"]) == {""}
    for wrong, error in (({"": 2}, ConfigError), ({"RCS": 1}, UnknownNameError)):
        with pytest.raises(error):
            simulate(x, null=wrong, **options)


def test_layer_that_drives_a_roi_is_recovered():
    x, category = make_features(400, 12, seed=1)
    rng = np.random.default_rng(2)
    layers = {"early": rng.normal(size=(400, 10)), "late": x}
    made = simulate(layers, category=category, neuroids=300, layers={"OFA": "early"},
                    preference={"FFA": "people"}, null=0.0)  # fmt: skip
    truth = made.truth
    expected = {"V1": "early", "OFA": "early", "FFA": "late", "PPA": "late"}
    for roi, name in expected.items():
        assert set(truth["layer"].values[truth["roi"].values == roi]) == {name}
    assert set(truth["layer"].values[truth["roi"].values == ""]) == {"early", "late"}
    y = by_repetition(made.responses).mean(axis=0).astype(float)
    y -= y.mean(axis=0)
    score = {}
    for name, features in layers.items():
        f = features - features.mean(axis=0)
        train, test = slice(0, 300), slice(300, 400)
        b = np.linalg.lstsq(f[train], y[train], rcond=None)[0]
        score[name] = 1 - ((y[test] - f[test] @ b) ** 2).sum(0) / (y[test] ** 2).sum(0)
    best = np.where(score["early"] > score["late"], "early", "late")
    assert (best == truth["layer"].values).mean() > 0.97


@pytest.mark.parametrize("generator", [g for g in GENERATORS if g != "linear"])
def test_mismatched_generators_keep_the_ceiling_but_not_the_line(generator):
    x, category = make_features()
    made = simulate(x, category=category, neuroids=200, null=0.0, ncsnr=np.inf, n_repetitions=1,
                    generator=generator)  # fmt: skip
    y = by_repetition(made.responses)[0].astype(float)
    live = made.truth["ncsnr"].values > 0
    np.testing.assert_allclose(y.std(axis=0, ddof=1)[live], 1, rtol=1e-4)
    ids = np.array([f"stim{i:05d}" for i in range(300)])
    np.testing.assert_allclose(y, true_responses(made.truth, x, stimulus_id=ids), atol=1e-4)
    design = np.column_stack([np.ones(300), standardised(x, made.truth)])
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r2 = 1 - rest.var(axis=0)[live]
    assert 0.3 < np.median(r2) < 0.99
    # The right function of the true drive explains everything; preference survives.
    wanted = made.truth["preference"].values
    means = np.stack([y[category == c].mean(axis=0) for c in CATEGORIES])
    found = np.array(CATEGORIES)[means.argmax(axis=0)]
    assert (found == wanted)[wanted != ""].mean() > (0.6 if generator == "quadratic" else 0.9)


def test_correlated_noise_has_the_kernel_it_claims():
    x, _ = make_features(60, 6)
    made = simulate(x, neuroids=cortex.neuroids(None), null=1.0, ncsnr=1.0, noise_fwhm_mm=12.0,
                    n_repetitions=4)  # fmt: skip
    y = made.responses["responses"].values[:, made.truth["null"].values]
    assert abs(y.var(axis=0, ddof=1).mean() - 1) < 0.01
    full = made.responses["responses"].values
    c = cortex.fsaverage5()
    rows = np.flatnonzero(c.roi == "")[::400]
    near = c.within(rows, 40.0)
    pairs = [(r, j, d) for i, r in enumerate(rows)
             for j, d in zip(near[[i]].indices, near[[i]].data, strict=True)
             if r != j and c.roi[j] == ""]  # fmt: skip
    a, b, distance = (np.array(v) for v in zip(*pairs, strict=True))
    z = (full - full.mean(axis=0)) / full.std(axis=0)
    r = (z[:, a] * z[:, b]).mean(axis=0)
    # Smoothing white noise with a Gaussian gives a correlation of exp(-d^2 / (4 sigma^2)).
    sigma = 12.0 / 2.3548
    for low, high in ((3, 5), (6, 8), (9, 11), (30, 40)):
        inside = (distance >= low) & (distance < high)
        expected = np.exp(-(distance[inside] ** 2) / (4 * sigma**2)).mean()
        assert abs(r[inside].mean() - expected) < 0.08
    across = np.corrcoef(full[:, rows[c.hemisphere[rows] == "L"][:20]].T,
                         full[:, rows[c.hemisphere[rows] == "R"][:20]].T)[:20, 20:]  # fmt: skip
    assert abs(across.mean()) < 0.02
    assert across.std() == pytest.approx(1 / np.sqrt(240), rel=0.2)


def test_noise_over_straight_distances_for_volumes():
    rng = np.random.default_rng(0)
    ijk = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3) * 2.0
    where = xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(216)]),
            "roi": ("neuroid", ["FFA"] * 108 + [""] * 108),
            "hemisphere": ("neuroid", [""] * 216),
            **{a: ("neuroid", ijk[:, k]) for k, a in enumerate("xyz")},
        }
    )
    x = rng.normal(size=(50, 5))
    kw = {"neuroids": where, "null": np.ones(216, bool), "n_repetitions": 20, "ncsnr": 1.0}
    y = simulate(x, noise_fwhm_mm=5.0, **kw).responses["responses"].values
    r = np.corrcoef(y.T)
    gap = np.linalg.norm(ijk[:, None] - ijk[None], axis=-1)
    sigma = 5.0 / np.sqrt(8 * np.log(2))
    kernel = np.exp(-0.5 * (gap / sigma) ** 2) * (gap <= 3 * sigma)
    kernel /= np.linalg.norm(kernel, axis=1, keepdims=True)
    # 1,000 presentations: a correlation of 0 has a standard error of 0.03.
    assert np.abs(r - kernel @ kernel.T).mean() < 0.03
    assert np.abs(r - kernel @ kernel.T).max() < 0.16
    with pytest.raises(SchemaError, match="x, y, z"):
        simulate(x, noise_fwhm_mm=5.0, **{**kw, "neuroids": where.drop_vars("x")})


@pytest.mark.parametrize("extra", [{}, {"noise_fwhm_mm": 9.0, "generator": "quadratic"}])
def test_streamed_equals_in_memory(tmp_path, extra):
    x, category = make_features(80, 10)
    design = {"category": category, "neuroids": 700, "seed": 4, **extra}
    made = simulate({"a": x, "b": x[:, :6] ** 2}, **design)
    for max_bytes in (1, 2**21):
        folder = simulate_to(tmp_path / str(max_bytes), {"a": x, "b": x[:, :6] ** 2},
                             max_bytes=max_bytes, provenance={"config": "x"}, **design)  # fmt: skip
        read = store.read(folder / "responses.zarr", "responses")
        xr.testing.assert_identical(
            read["responses"].load().drop_attrs(), made.responses["responses"].drop_attrs()
        )
        assert read.attrs["config"] == "x" and read.attrs["space"] == "fsaverage5"
        truth = store.read(folder / "truth.zarr").load()
        xr.testing.assert_equal(truth, made.truth)
        store.verify(folder / "responses.zarr")


def test_streaming_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    x, _ = make_features(40, 6)

    def fail(*args, **kwargs):
        raise DiskSpaceError("full")

    monkeypatch.setattr(store, "require_disk", fail)
    with pytest.raises(DiskSpaceError):
        simulate_to(tmp_path / "s", x, neuroids=50)
    monkeypatch.undo()
    monkeypatch.setattr("brainalign.data.simulate._truth", fail)
    with pytest.raises(DiskSpaceError):
        simulate_to(tmp_path / "s", x, neuroids=50)
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_numbers_other_seed_others():
    x, category = make_features(60, 8)
    kw = {"category": category, "neuroids": 100, "noise_fwhm_mm": 6.0}
    first, again, other = simulate(x, **kw), simulate(x, **kw), simulate(x, seed=1, **kw)
    xr.testing.assert_identical(first.responses, again.responses)
    xr.testing.assert_identical(first.truth, again.truth)
    assert not np.array_equal(
        first.responses["responses"].values, other.responses["responses"].values
    )


def test_features_dataset_mixed_repeats_runs_and_directions():
    x, _ = make_features(30, 6)
    ids = [f"im{i}" for i in range(30)]
    ds = xr.Dataset(
        {"features": (("stimulus", "feature"), x)},
        coords={"stimulus_id": ("stimulus", ids), "model": "m", "layer": "blocks.4"},
    )
    direction = np.eye(6)[2]
    repetitions = np.where(np.arange(30) < 10, 3, 1)
    made = simulate(ds, neuroids=80, directions={"FFA": direction}, variation=0.0, null=0.0,
                    n_repetitions=repetitions, n_sessions=2, n_runs=5)  # fmt: skip
    assert made.truth["layer_name"].values.tolist() == ["blocks.4"]
    y = made.responses
    assert y.sizes["presentation"] == 50
    pairs = set(zip(y["session"].values.tolist(), y["run"].values.tolist(), strict=True))
    assert pairs == {(s, r) for s in (1, 2) for r in range(1, 6)}
    w = made.truth["weights"].values[made.truth["roi"].values == "FFA"]
    assert (w[:, 2] > 0).all() and np.abs(np.delete(w, 2, axis=1)).max() < 1e-6
    k = np.mean(1 / repetitions)
    snr = made.truth["ncsnr"].values
    np.testing.assert_allclose(made.truth["ceiling"].values, snr**2 / (snr**2 + k))


def test_time_series_come_back_through_nilearns_first_level_model():
    nib = pytest.importorskip("nibabel")
    from nilearn.glm.first_level import FirstLevelModel

    x, category = make_features(12, 6)
    made = simulate_timeseries(x, category=category, neuroids=60, n_runs=2, n_repetitions=2,
                               noise_sd=0.05, drift=3.0, tr=1.5, seed=2)  # fmt: skip
    validate(made.bold, "responses")
    assert made.bold.attrs["sampling_rate"] == pytest.approx(1 / 1.5)
    assert len(made.events) == 24
    mask = nib.Nifti1Image(np.ones((3, 4, 5), np.int8), np.eye(4))
    found = []
    for run in (1, 2):
        bold = made.bold["responses"].values[made.bold["run"].values == run]
        events = made.events[made.events["run"] == run]
        labels = [f"trial{i:02d}" for i in range(len(events))]
        image = nib.Nifti1Image(bold.T.reshape(3, 4, 5, -1), np.eye(4))
        model = FirstLevelModel(
            t_r=1.5, hrf_model="spm", mask_img=mask, noise_model="ols", signal_scaling=False,
            minimize_memory=True, smoothing_fwhm=None,
        ).fit(image, events[["onset", "duration"]].assign(trial_type=labels))  # fmt: skip
        for label in labels:
            effect = model.compute_contrast(label, output_type="effect_size")
            found.append(np.asarray(effect.dataobj).ravel())
    truth = made.responses["responses"].values
    error = np.array(found) - truth
    assert np.corrcoef(np.ravel(found), truth.ravel())[0, 1] > 0.99
    assert abs(error.mean()) < 0.05
    assert error.std() < 0.2


def test_bad_input_is_named():
    x, category = make_features(20, 6)
    kw = {"neuroids": 40}
    with pytest.raises(SchemaError, match=r"NaN or infinite values in 1 of 20.*first row 3"):
        simulate(np.where(np.arange(20)[:, None] == 3, np.nan, x), **kw)
    with pytest.raises(SchemaError, match=r"must be \(stimulus, feature\)"):
        simulate(x[0], **kw)
    with pytest.raises(SchemaError, match="different numbers of stimuli"):
        simulate({"a": x, "b": x[:5]}, **kw)
    with pytest.raises(SchemaError, match="All features"):
        simulate(np.ones((20, 6)), **kw)
    with pytest.raises(SchemaError, match="same name twice"):
        simulate(x, stimulus_id=["a"] * 20, **kw)
    with pytest.raises(SchemaError, match="category has shape"):
        simulate(x, category=category[:4], **kw)
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        simulate(x, generator="linaer", **kw)
    with pytest.raises(UnknownNameError, match="Did you mean 'people'"):
        simulate(x, category=category, preference={"FFA": "peple"}, **kw)
    with pytest.raises(UnknownNameError, match="names the ROI 'FFAA'"):
        simulate(x, layers={"FFAA": "a"}, **kw)
    with pytest.raises(UnknownNameError, match="There is no layer 'c'"):
        simulate({"a": x}, layers={"FFA": "c"}, **kw)
    for bad in ({"variation": 2}, {"null": -0.1}, {"ncsnr": 0.0}, {"noise_fwhm_mm": -1.0},
                {"n_repetitions": 0}, {"n_runs": 100}):  # fmt: skip
        with pytest.raises(ConfigError):
            simulate(x, **{**kw, **bad})
    with pytest.raises(ConfigError, match="autocorrelation"):
        simulate_timeseries(x, autocorrelation=1.0, **kw)


def test_weights_of_uncorrelated_features_are_recovered_closely():
    x = np.random.default_rng(0).normal(size=(500, 24))
    made = simulate(x, neuroids=300, null=0.0)
    live = made.truth["ncsnr"].values > 0
    design = np.column_stack([np.ones(500), standardised(x, made.truth)])
    y = by_repetition(made.responses).mean(axis=0)
    found = np.linalg.lstsq(design, y, rcond=None)[0][1:].T
    r = [
        np.corrcoef(a, b)[0, 1]
        for a, b in zip(found[live], made.truth["weights"].values[live], strict=True)
    ]
    assert np.median(r) > 0.97 and min(r) > 0.85
