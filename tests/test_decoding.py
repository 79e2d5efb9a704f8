"""Pattern classification: planted answers, nothing from noise, the known answers of Haxby 2001."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.data.section import read_section, write_section
from brainalign.decoding import classification as dc
from brainalign.errors import ConfigError, SchemaError

CATEGORIES = ("cat", "face", "house", "shoe")


def recording(
    *, signal: float = 2.0, n_runs: int = 6, n_voxels: int = 40, delay: int = 0, seed: int = 0
) -> xr.Dataset:
    """A block design with one pattern a category, a drift, and another scale in each run."""
    rng = np.random.default_rng(seed)
    patterns = {c: rng.standard_normal(n_voxels) for c in CATEGORIES}
    data, labels, runs = [], [], []
    for run in range(n_runs):
        label = ["rest"] * 4
        for c in rng.permutation(CATEGORIES):
            label += [str(c)] * 5 + ["rest"] * 4
        effect = np.stack([signal * patterns.get(c, np.zeros(n_voxels)) for c in label])
        effect = np.roll(effect, delay, axis=0)
        n = len(label)
        x = effect + rng.standard_normal((n, n_voxels))
        x = (x + np.linspace(0, 20, n)[:, None]) * (1 + run) + 100 * rng.standard_normal(n_voxels)
        data.append(x)
        labels += label
        runs += [run] * n
    return xr.Dataset(
        {"responses": (("time", "neuroid"), np.concatenate(data))},
        coords={
            "condition": ("time", labels),
            "run": ("time", runs),
            "subject": "planted",
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(n_voxels)]),
            "roi": ("neuroid", [""] * n_voxels),
            "hemisphere": ("neuroid", [""] * n_voxels),
        },
        attrs={"sampling_rate": 0.5},
    )


def xyr(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(ds[n].values for n in ("responses", "condition", "run"))


@pytest.fixture(scope="module")
def planted() -> xr.Dataset:
    return recording()


@pytest.fixture(scope="module")
def patterns(planted) -> xr.Dataset:
    return dc.block_patterns(planted)


def test_patterns_forget_drift_and_scale(planted, patterns):
    assert patterns.sizes == {"presentation": 6 * 4, "neuroid": 40}
    moved = planted.copy(deep=True)
    run, n = planted["run"].values, planted.sizes["time"]
    moved["responses"] = planted["responses"] * xr.DataArray(1.0 + run, dims="time") + xr.DataArray(
        3.0 * np.arange(n) * (1 + run), dims="time"
    )
    np.testing.assert_allclose(
        dc.block_patterns(moved)["responses"], patterns["responses"], atol=1e-8
    )


def test_patterns_by_hand():
    """One voxel, no trend left: rest at -1 and 1 (mean 0, sd 1), blocks at 3."""
    x = np.array([1.0, -1, 3, 3, -1, 1, 1, -1, 3, 3, -1, 1])
    label = ["rest", "rest", "cat", "cat", "rest", "rest"] * 2
    assert abs(np.polyfit(np.arange(12), x, 1)[0]) < 1e-12
    ds = xr.Dataset(
        {"responses": (("time", "neuroid"), np.tile(x, 2)[:, None])},
        coords={
            "condition": ("time", label * 2),
            "run": ("time", [0] * 12 + [1] * 12),
            **{n: ("neuroid", ["v"]) for n in ("neuroid_id", "roi")},
            "hemisphere": ("neuroid", ["L"]),
        },
    )
    found = dc.block_patterns(ds)
    # Detrending takes the mean of the run (1) as well; standardising gives it back.
    np.testing.assert_allclose(found["responses"].values[:, 0], [3.0] * 4)
    assert found["run"].values.tolist() == [0, 0, 1, 1]


def test_planted_categories_are_found(patterns):
    x, y, r = xyr(patterns)
    assert np.mean(dc.classify(x, y, r) == y) == 1
    assert np.mean(dc.nearest_mean(x, y, r) == y) == 1
    assert dc.identification(x, y, r) == 1


def test_nothing_is_found_in_noise():
    """Mean over independent recordings of noise: at chance within four standard errors."""
    accuracies = []
    for seed in range(12):
        x, y, r = xyr(dc.block_patterns(recording(signal=0, seed=seed)))
        accuracies.append(np.mean(dc.classify(x, y, r) == y))
    assert abs(np.mean(accuracies) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (12 * 24))


def test_permuted_labels_fall_to_chance(patterns):
    null = dc.permuted_accuracies(*xyr(patterns), n_permutations=30, seed=1)
    assert null.mean() < 0.35 and null.max() < 1
    again = dc.permuted_accuracies(*xyr(patterns), n_permutations=30, seed=1)
    np.testing.assert_array_equal(null, again)


def test_tested_run_is_never_trained_on(patterns):
    """A run with its labels exchanged in pairs is decoded by the other runs' rule: all wrong."""
    x, y, r = xyr(patterns)
    wrong = dict(zip(CATEGORIES, np.roll(CATEGORIES, 1), strict=True))
    y = np.where(r == 2, np.array([wrong[c] for c in y]), y)
    said = dc.classify(x, y, r)
    assert not np.any(said[r == 2] == y[r == 2])


def test_rotation_does_not_change_the_solution():
    rng = np.random.default_rng(0)
    x, y, r = rng.standard_normal((24, 60)), np.tile(["a", "b", "c"], 8), np.repeat(range(4), 6)
    x[y == "a", 0] += 2
    from sklearn.svm import LinearSVC

    expected = np.empty_like(y)
    for run in range(4):
        machine = LinearSVC(C=0.01, dual=False, tol=1e-5).fit(x[r != run], y[r != run])
        expected[r == run] = machine.predict(x[r == run])
    np.testing.assert_array_equal(dc.classify(x, y, r), expected)


def test_shift_finds_the_delay():
    ds = recording(delay=2, signal=1.0, seed=3)
    accuracy = {}
    for shift in (-2, 0, 2, 4):
        x, y, r = xyr(dc.block_patterns(ds, shift=shift))
        accuracy[shift] = np.mean(dc.classify(x, y, r) == y)
    assert accuracy[2] == max(accuracy.values()) and accuracy[2] > accuracy[-2]


def test_shift_moves_blocks_and_does_not_wrap():
    label = np.array(["rest", "cat", "cat", "rest", "face"])
    assert dc._shifted(label, 1, "rest").tolist() == ["rest", "rest", "cat", "cat", "rest"]
    assert dc._shifted(label, -1, "rest").tolist() == ["cat", "cat", "rest", "face", "rest"]
    assert dc._shifted(label, 0, "rest").tolist() == label.tolist()


def test_constant_and_missing_voxels_are_left_out_and_counted(planted):
    bad = planted.copy(deep=True)
    bad["responses"][:, 3] = 7.0
    bad["responses"][5, 8] = np.nan
    # Constant in one run only.
    bad["responses"][(bad["run"] == 1).values, 11] = 0.0
    found = dc.block_patterns(bad)
    assert found.attrs["excluded_neuroids"] == 3
    assert not {"v3", "v8", "v11"} & set(found["neuroid_id"].values)
    assert np.isfinite(found["responses"]).all()


def test_run_without_blocks_is_left_out(planted):
    bad = planted.copy(deep=True)
    bad["condition"] = ("time", np.where(bad["run"] == 4, "rest", bad["condition"]))
    found = dc.block_patterns(bad)
    assert found.attrs["excluded_runs"] == ["4"] and 4 not in found["run"]
    section = dc.section([dc.decode(bad, n_permutations=0, shifts=(0,))])
    assert section.exclusions == ["planted: run 4, which has no block."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("condition"), "'condition'"),
        (lambda d: d.drop_vars("run"), "'run'"),
        (lambda d: d.rename(time="presentation"), "time series"),
        (lambda d: d.assign(responses=d["responses"] * 0), "No neuroid"),
        (lambda d: d.assign_coords(condition=("time", ["rest"] * d.sizes["time"])), "no block"),
        (lambda d: d.assign_coords(condition=("time", ["cat"] * d.sizes["time"])), "labelled"),
    ],
)
def test_unusable_recordings_are_refused(planted, change, message):
    with pytest.raises(SchemaError, match=message):
        dc.block_patterns(change(planted))


def test_unusable_patterns_are_refused(patterns):
    x, y, r = xyr(patterns)
    with pytest.raises(SchemaError, match="two categories"):
        dc.classify(x, ["a"] * len(y), r)
    with pytest.raises(SchemaError, match="not finite"):
        dc.classify(np.where(x == x[0, 0], np.nan, x), y, r)
    with pytest.raises(SchemaError, match="Expected patterns"):
        dc.classify(x[:-1], y, r)
    with pytest.raises(ConfigError, match="2 runs"):
        dc.classify(x, y, np.zeros(len(y)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_confusion_rows_are_shares(pairs):
    shown, said = zip(*pairs, strict=True)
    matrix = dc.confusion(shown, said, ["a", "b", "c"])
    present = [c in shown for c in "abc"]
    np.testing.assert_allclose(matrix.sum(axis=1), np.array(present, dtype=float))
    accuracy = np.mean([a == b for a, b in pairs])
    share = np.array([shown.count(c) for c in "abc"]) / len(shown)
    assert np.isclose((np.diag(matrix) * share).sum(), accuracy)


def test_binomial_interval_known_values():
    low, high = dc.binomial_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4439, 0.9748)
    assert dc.binomial_interval(0, 10)[0] == 0 and dc.binomial_interval(10, 10)[1] == 1


def test_section_is_written_and_read(planted, tmp_path):
    other = planted.assign_coords(subject="second")
    decodings = [dc.decode(d, n_permutations=9, shifts=(-1, 0, 1)) for d in (planted, other)]
    written = dc.section(decodings)
    section = read_section(write_section(written, tmp_path / "s"))
    assert [f.id for f in section.figures] == [
        "confusion", "accuracy-category", "accuracy-run", "label-shift", "permutations",
    ]  # fmt: skip
    first = section.summary[0]
    assert first.value == 100 and first.reference == "chance 25.0 %" and "p = 0.1" in first.note
    cited = {k for k in section.references if f"[@{k}]" in section.methods}
    assert cited == set(section.references)
    assert decodings[0].trials.attrs == {} and decodings[0].trials.sizes["trial"] == 24


# Haxby 2001, subject 1, one slice: the known answers.


@pytest.fixture(scope="module")
def haxby(mirror) -> xr.Dataset:
    from brainalign.data.studies import haxby2001

    return haxby2001.load(mirror / haxby2001.FOLDER).responses["sub001"]


@pytest.fixture(scope="module")
def haxby_decoded(haxby) -> dc.Decoding:
    return dc.decode(haxby, n_permutations=20, seed=0)


def test_haxby_eight_way(haxby_decoded):
    assert haxby_decoded.trials.sizes["trial"] == 96
    assert int(haxby_decoded.trials["correct"].sum()) == 76
    assert haxby_decoded.patterns.sizes["neuroid"] == 530
    assert haxby_decoded.chance == 0.125


def test_haxby_by_category(haxby_decoded):
    matrix = dc.confusion(
        haxby_decoded.trials["condition"],
        haxby_decoded.trials["response"],
        haxby_decoded.categories,
    )
    found = dict(zip(haxby_decoded.categories, np.round(100 * np.diag(matrix)), strict=True))
    assert found == {
        "face": 100, "house": 100, "shoe": 92, "bottle": 83, "scrambledpix": 83, "cat": 75,
        "scissors": 75, "chair": 25,
    }  # fmt: skip


def test_haxby_shifted_labels_are_worse(haxby_decoded):
    found = {k: round(100 * v, 1) for k, v in haxby_decoded.shifts.items()}
    assert found == {-2: 70.8, -1: 74.0, 0: 79.2, 1: 77.1, 2: 66.7}


def test_haxby_controls(haxby_decoded):
    assert round(100 * haxby_decoded.nearest_mean, 1) == 60.4
    assert round(100 * haxby_decoded.identification, 1) == 98.2


def test_haxby_permutations(haxby_decoded):
    """Known: mean 15.0 %, highest 21.9 %, of 20 other permutations; standard error about 1 %."""
    assert 0.11 < haxby_decoded.null.mean() < 0.18 and haxby_decoded.null.max() < 0.27
    assert haxby_decoded.p == pytest.approx(1 / 21)


def test_haxby_block_average(haxby):
    """The labels hold the delay: the response is there from the label's first volumes on."""
    x = haxby["responses"].values.astype(float)
    run, label = haxby["run"].values, haxby["condition"].values
    z = np.empty_like(x)
    for r in np.unique(run):
        k = run == r
        z[k] = (x[k] - x[k].mean(0)) / x[k].std(0)
    onset = np.flatnonzero((label[1:] != label[:-1]) & (label[1:] != "rest")) + 1
    driven = np.abs(np.corrcoef((label != "rest").astype(float), z.T)[0, 1:]) > 0.3
    sign = np.sign(np.corrcoef((label != "rest").astype(float), z.T)[0, 1:])
    course = [(z[onset + lag] * sign)[:, driven].mean() for lag in range(-3, 4)]
    assert len(onset) == 96
    assert course[0] < 0 < course[4] and course[5] > 2 * max(course[2], 0)
