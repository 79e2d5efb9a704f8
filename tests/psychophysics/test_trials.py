"""Trial files and what they say: by hand, and the published numbers of Geirhos et al. 2021."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import cohen_kappa_score

from brainalign.data.schema import validate
from brainalign.data.studies import geirhos2021
from brainalign.data.trials import read_trials
from brainalign.errors import SchemaError, UnavailableError, UnknownNameError
from brainalign.psychophysics import (
    accuracy,
    consistency_with_people,
    error_consistency,
    pairwise_consistency,
    shape_bias,
)
from brainalign.psychophysics.sections import _consistency_elsewhere

OWN = """subject,stimulus_id,category,response,noise_sd,frequency,rt
a,cat1,cat,cat,0.08,28,0.5
a,dog1,dog,na,0.08,28,NaN
a,cat2,cat,cat,0,,0.4
"""


def test_own_files(tmp_path):
    (tmp_path / "own.csv").write_text(OWN)
    trials = read_trials(tmp_path / "own.csv")
    assert trials["correct"].values.tolist() == [True, False, True]
    assert trials["noise_sd"].values.tolist() == [0.08, 0.08, 0.0]
    assert np.isnan(trials["frequency"].values).tolist() == [False, False, True]
    assert trials["response"].values.tolist()[1] == "na"
    assert np.isnan(trials["rt"].values[1]) and trials["rt"].attrs["units"] == "s"


def test_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "t.csv"
    with pytest.raises(UnavailableError, match="missing"):
        read_trials(file)
    for text, said in (
        ("response,rt\ncat,1\n", "no column 'category'"),
        ("response,category,rt\ncat,cat,fast\n", "'rt' is 'fast'"),
        ("correct\nmaybe\n", "'correct' is 'maybe'"),
        ("response,category,rt\ncat,cat,-1\n", "at least 0"),
    ):
        file.write_text(text)
        with pytest.raises(SchemaError, match=said):
            read_trials(file)
    other = tmp_path / "u.csv"
    other.write_text("response,category\ncat,cat\n")
    with pytest.raises(SchemaError, match="differ in their column 'rt'"):
        read_trials([file, other])


def test_kappa_by_hand_and_by_scikit_learn():
    a = [1, 1, 1, 0, 0, 1, 0, 1]
    b = [1, 0, 1, 0, 1, 1, 0, 1]
    # 6 of 8 agree; 5/8 right each: expected (25 + 9) / 64.
    assert error_consistency(a, b) == pytest.approx((6 / 8 - 34 / 64) / (1 - 34 / 64))
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 200)) < [[0.7], [0.4]]
    assert error_consistency(x, y) == pytest.approx(cohen_kappa_score(x, y))
    assert np.isnan(error_consistency([1, 1], [1, 1]))
    with pytest.raises(SchemaError, match="same stimuli"):
        error_consistency([1], [1, 0])


def small(**columns):
    return xr.Dataset({k: ("trial", np.array(v)) for k, v in columns.items()})


def test_pairs_match_by_stimulus_and_condition():
    trials = small(
        subject=["a", "a", "a", "b", "b", "b"],
        stimulus_id=["x", "y", "z", "z", "x", "w"],
        condition=["1"] * 6,
        response=["r"] * 6,
        correct=[True, False, False, False, True, True],
    )
    found = pairwise_consistency(trials)
    assert found["n"].values.tolist() == [[2]] and found["kappa"].values.tolist() == [[1.0]]
    twice = xr.concat([trials, trials.isel(trial=[0])], "trial")
    with pytest.raises(SchemaError, match="more than once"):
        pairwise_consistency(twice)
    with pytest.raises(SchemaError, match="2 subjects"):
        pairwise_consistency(trials.isel(trial=slice(3)))


def observers_of(n, seed, *, shared, people=3):
    """Return trials in which a share of stimuli is as hard for the model as for people."""
    rng = np.random.default_rng(seed)
    hard = rng.random((2, n)) < 0.4
    mine = np.where(rng.random(n) < shared, hard[0], hard[1])
    rows = [(f"p{i}", hard[0]) for i in range(people)] + [("net", mine)]
    right = np.concatenate([rng.random(n) < np.where(h, 0.2, 0.9) for _, h in rows])
    return small(
        subject=np.repeat([s for s, _ in rows], n),
        stimulus_id=np.tile([f"i{i}" for i in range(n)], len(rows)),
        condition=np.tile([str(i % 2) for i in range(n)], len(rows)),
        response=["r"] * len(right),
        correct=right,
    )


def test_consistency_with_people():
    people = ["p0", "p1", "p2"]
    trials = observers_of(200, 0, shared=0.0)
    found = consistency_with_people(trials, people, n_bootstrap=100)
    pairs = pairwise_consistency(trials)
    human = (pairs["subject_1"] != "net") & (pairs["subject_2"] != "net")
    value = found.set_index(observer="observer")
    assert float(value["kappa"].sel(observer="people")) == pytest.approx(
        float(pairs["kappa"].values[human.values].mean())
    )
    assert float(value["kappa"].sel(observer="net")) == pytest.approx(
        float(pairs["kappa"].values[~human.values].mean())
    )
    net = value.sel(observer="net")
    assert net["low"] < 0 < net["high"] and net["difference_high"] < 0
    alike = consistency_with_people(observers_of(200, 1, shared=1.0), people, n_bootstrap=100)
    assert alike["difference_low"].values[1] < 0 < alike["difference_high"].values[1]
    with pytest.raises(SchemaError, match="'x' has no trials"):
        consistency_with_people(trials, ["p0", "x"])
    with pytest.raises(SchemaError, match="Two people or more"):
        consistency_with_people(trials, ["p0"])


def test_intervals_of_kappa_cover():
    people = ["p0", "p1"]
    true = consistency_with_people(
        observers_of(20_000, 7, shared=0.5, people=2), people, n_bootstrap=2
    )["difference"].values[1]
    hits = [
        f["difference_low"].values[1] <= true <= f["difference_high"].values[1]
        for s in range(60)
        for f in [
            consistency_with_people(
                observers_of(100, s, shared=0.5, people=2),
                people,
                level=0.8,
                n_bootstrap=80,
                seed=s,
            )
        ]
    ]
    # Three standard errors of a share of 0.8 in 60 are 0.155.
    assert 0.645 < np.mean(hits) < 0.955


def test_accuracy_by_condition_in_order():
    trials = small(
        subject=["a"] * 5,
        condition=["10", "2", "2", "inf", "2"],
        response=["r"] * 5,
        correct=[True, True, False, True, False],
    )
    found = accuracy(trials)
    assert found["condition"].values.tolist() == ["2", "10", "inf"]
    assert found["accuracy"].values == pytest.approx([1 / 3, 1, 1])
    # Wilson's interval of 1 in 3, from the formula's own textbook form.
    p, n, z = 1 / 3, 3, 1.959963984540054
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert float(found["low"][0]) == pytest.approx(middle - half)
    assert float(found["high"][0]) == pytest.approx(middle + half)


def test_shape_bias_by_hand():
    trials = small(
        subject=["a"] * 5,
        stimulus_id=["cat1-dog2", "cat1-dog2", "bear3-cat1", "cat2-cat1", "car1-cat9"],
        response=["cat", "dog", "bear", "cat", "oven"],
    )
    found = shape_bias(trials)
    assert found["bias"].values == pytest.approx([2 / 3]) and found.attrs["n_conflict"] == 4
    with pytest.raises(SchemaError, match="names no cues"):
        shape_bias(trials.assign(stimulus_id=("trial", ["x"] * 5)))


# The published trials.

ACCURACY = {
    "low-pass": "0=.920 1=.914 3=.795 5=.630 7=.588 10=.380 15=.200 40=.061",
    "high-pass": "inf=.883 3=.808 1.5=.739 1=.616 .7=.353 .55=.178 .45=.073 .4=.064",
    "uniform-noise": "0=.797 .03=.834 .05=.764 .1=.770 .2=.647 .35=.398 .6=.148 .9=.070",
    "rotation": "0=.891 90=.841 180=.802 270=.846",
    "contrast": "c100=.856 c50=.827 c30=.795 c15=.734 c10=.595 c05=.353 c03=.150 c01=.063",
    "phase-scrambling": "0=.898 30=.880 60=.795 90=.686 120=.391 150=.106 180=.102",
    "colour": "cr=.909 bw=.887",
    "power-equalisation": "0=.900 pow=.759",
    "false-colour": "True=.903 False=.874",
}
POOLED = {
    "cue-conflict": 0.776,
    "edge": 0.871,
    "silhouette": 0.753,
    "sketch": 0.916,
    "stylized": 0.471,
}
KAPPA = {
    "low-pass": 0.358, "high-pass": 0.326, "uniform-noise": 0.361, "contrast": 0.349,
    "phase-scrambling": 0.336, "eidolonI": 0.346, "eidolonII": 0.310, "eidolonIII": 0.293,
    "rotation": 0.437, "colour": 0.448, "false-colour": 0.441, "power-equalisation": 0.481,
    "cue-conflict": 0.331, "edge": 0.318, "silhouette": 0.476, "sketch": 0.370, "stylized": 0.501,
}  # fmt: skip


@pytest.fixture(scope="module")
def human(mirror):
    folder = mirror / geirhos2021.FOLDER
    if not folder.is_dir():
        pytest.skip(f"the mirror holds no {geirhos2021.FOLDER}")
    return geirhos2021.load(folder).extras


def key(condition):
    try:
        return f"{float(condition):g}"
    except ValueError:
        return condition.lower()


def test_human_accuracy(human):
    for experiment, text in ACCURACY.items():
        found = accuracy(human[experiment])
        by_condition = {
            key(c): float(a)
            for c, a in zip(found["condition"].values, found["accuracy"].values, strict=True)
        }
        expected = {key(c): float(a) for c, _, a in (x.partition("=") for x in text.split())}
        assert by_condition == pytest.approx(expected, abs=0.00051), experiment
    for experiment, share in POOLED.items():
        assert float(human[experiment]["correct"].mean()) == pytest.approx(share, abs=0.00051)


def test_human_error_consistency(human):
    assert set(KAPPA) == set(geirhos2021.EXPERIMENTS) == set(human)
    for experiment, value in KAPPA.items():
        kappa = pairwise_consistency(human[experiment])["kappa"]
        assert float(kappa.mean()) == pytest.approx(value, abs=0.00051), experiment


def test_report_shows_how_far_people_err_alike(human):
    chosen = {e: human[e] for e in ("silhouette", "colour", "rotation")}
    shown = _consistency_elsewhere(chosen, 0.95, 60, 0).data
    assert shown["item"].values.tolist() == [*chosen]
    value, low, high = (shown[v].values for v in ("value", "low", "high"))
    assert value == pytest.approx([KAPPA[e] for e in chosen], abs=0.00051)
    assert (low > 0).all() and (low < value).all() and (value < high).all()


def test_human_shape_bias(human):
    found = shape_bias(human["cue-conflict"])
    assert found.attrs["n_conflict"] == 12_000 and found.sizes["subject"] == 10
    assert found.attrs["bias"] == pytest.approx(0.9587, abs=5e-5)
    assert float(found["bias"].mean()) == pytest.approx(0.9576, abs=5e-5)
    assert float(found["bias"].min()) == pytest.approx(0.919, abs=5e-4)
    assert float(found["bias"].max()) == pytest.approx(0.987, abs=5e-4)


def test_human_trials_are_of_the_known_classes(human):
    for trials in human.values():
        assert set(np.unique(trials["response"].values)) <= {*geirhos2021.CLASSES, "na"}
        validate(trials, "trials")
    with pytest.raises(UnknownNameError, match="Did you mean 'colour'"):
        geirhos2021.load("nowhere", experiments=["color"])
