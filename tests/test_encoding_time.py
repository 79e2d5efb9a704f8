"""Encoding models of time series: delays, trials, clips, and decoders of features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from brainalign.data.schema import validate
from brainalign.data.simulate import simulate_timeseries
from brainalign.encoding import encode, predict, read_result, write_result
from brainalign.encoding.timeseries import as_rows, backward, on_time
from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.linear import LaggedRidge, delayed

pytestmark = pytest.mark.filterwarnings(
    "ignore::brainalign.linear.AlphaEdgeWarning", "ignore::brainalign.linear.RankWarning"
)

RATE, TRIALS, SAMPLES, V, NULL = 4.0, 8, 150, 12, 40
LAGS = np.arange(-1, 5)  # -0.25 to 1 s
OPTIONS = {
    "delays": (-0.25, 1.0), "splits": 4, "inner_cv": 3, "alphas": np.logspace(-1, 4, 6),
    "n_permutations": 300, "n_bootstrap": 60,
}  # fmt: skip


def series(x, layer, clip=None, run=None):
    coords = {"model": "net", "layer": layer}
    if clip is not None:
        coords["stimulus_id"] = ("time", clip)
    if run is not None:
        coords["run"] = ("time", run)
    return xr.Dataset(
        {"features": (("time", "feature"), np.asarray(x, dtype=np.float32))},
        coords=coords,
        attrs={"sampling_rate": RATE},
    )


def recording(y, run, clip=None):
    n = y.shape[1]
    coords = {
        "session": ("time", np.zeros(len(y), int)),
        "run": ("time", run),
        "subject": "s1",
        "neuroid_id": ("neuroid", [f"e{i}" for i in range(n)]),
        "roi": ("neuroid", ["STG"] * n),
        "hemisphere": ("neuroid", ["L"] * n),
    }
    if clip is not None:
        coords["stimulus_id"] = ("time", clip)
    ds = xr.Dataset({"responses": (("time", "neuroid"), y.astype(np.float32))}, coords=coords)
    return validate(ds.assign_attrs(sampling_rate=RATE), "responses")


@pytest.fixture(scope="module")
def study():
    """Envelope and pitch drive the first electrodes with known kernels; the others are noise."""
    rng = np.random.default_rng(0)
    n = TRIALS * SAMPLES
    x = {"envelope": rng.standard_normal((n, 2)), "pitch": rng.standard_normal((n, 2)),
         "nothing": rng.standard_normal((n, 3))}  # fmt: skip
    run = np.repeat(np.arange(TRIALS), SAMPLES)
    weights = {"envelope": rng.standard_normal((2, len(LAGS), V)) * np.sqrt(0.4 / 12),
               "pitch": rng.standard_normal((2, len(LAGS), V)) * np.sqrt(0.2 / 12)}  # fmt: skip
    for name, share in (("envelope", 0.4), ("pitch", 0.2)):
        weights[name] *= np.sqrt(share / (weights[name] ** 2).sum(axis=(0, 1)))
    y = np.sqrt(0.4) * rng.standard_normal((n, V + NULL))
    y[:, V:] /= np.sqrt(0.4)
    for name, w in weights.items():
        for r in range(TRIALS):
            rows = run == r
            late = delayed(torch.as_tensor(x[name][rows]), LAGS).numpy()
            y[rows, :V] += late @ w.reshape(-1, V)
    return {k: series(v, k, run=run) for k, v in x.items()}, recording(y, run), weights


@pytest.fixture(scope="module")
def joint(study):
    return encode(study[0], study[1], regression="banded", partition="subsets", n_iter=6, **OPTIONS)


def test_kernels_variance_and_noise_are_recovered(study, joint, tmp_path):
    features, responses, weights = study
    assert joint.best.attrs["permutation"] == "pooled"
    r2, p = joint.best["r2"].values, joint.best["p"].values
    # 1200 samples: an R^2 of 0.6 has a standard error of 0.02, less what fitting costs.
    assert r2[:V].mean() == pytest.approx(0.6, abs=0.03)
    assert (joint.best["q"].values[:V] < 0.05).all()
    assert stats.kstest(p[V:], "uniform").pvalue > 0.01
    share = joint.best["share"].isel(neuroid=slice(V)).mean("neuroid")
    found = {str(k): float(share.sel(part=k)) for k in share["part"].values}
    expected = {"envelope": 0.4, "pitch": 0.2, "nothing": 0.0, "envelope & pitch": 0.0}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.03), name
    encoder = read_result(write_result(joint, tmp_path / "r")).encoders["all"]
    assert encoder["weights"].dims == ("neuroid", "feature", "delay")
    np.testing.assert_allclose(encoder["delay"], LAGS / RATE)
    space = encoder["feature_space"].values
    got = encoder["weights"].values / encoder["feature_scale"].values[:, None]
    for name, w in weights.items():
        own = got[:V][:, space == name]
        np.testing.assert_allclose(own, w.transpose(2, 0, 1), atol=0.12)
        assert np.corrcoef(own.ravel(), w.transpose(2, 0, 1).ravel())[0, 1] > 0.97
    # The file alone predicts each run, none reaching into the next.
    clip = np.char.add("run", responses["run"].values.astype(str))
    named = {k: ds.assign_coords(stimulus_id=("time", clip)) for k, ds in features.items()}
    predicted = predict({"all": encoder}, named)
    r = stats.pearsonr(predicted.values[:, :V], responses["responses"].values[:, :V])[0]
    assert r.mean() == pytest.approx(np.sqrt(0.6), abs=0.03)
    whole = predict({"all": encoder}, features)
    assert (abs(whole - predicted.values).max("neuroid") > 1e-4).sum() <= (TRIALS - 1) * 5


def test_layers_are_chosen_among(study):
    features, responses, _ = study
    got = encode(features, responses, **{**OPTIONS, "n_permutations": 50})
    assert set(got.best["best_layer"].values[:V]) == {"envelope"}
    assert got.best["r2"].values[:V].mean() == pytest.approx(0.4, abs=0.04)
    pitch = got.scores["r2"].sel(layer="pitch").values[:V].mean()
    assert pitch == pytest.approx(0.2, abs=0.04)


def test_a_fold_is_the_library_model_on_the_other_trials(study):
    features, responses, _ = study
    x = features["envelope"]
    names = [str(r) for r in range(TRIALS)]
    got = encode(
        {"envelope": x}, responses, permutation="none",
        **{**OPTIONS, "splits": [(names[:6], names[6:])], "alphas": 30.0},
    )  # fmt: skip
    run = responses["run"].values
    train = run < 6
    values = x["features"].values
    z = (values - values[train].mean(0)) / values[train].std(0)
    y = responses["responses"].values
    trials = [[a[run == r] for r in range(6)] for a in (z, y)]
    model = LaggedRidge(-0.25, 1.0, RATE, alphas=30.0).fit(*trials)
    expected = np.concatenate(model.predict([z[run == r] for r in (6, 7)]))
    np.testing.assert_allclose(got.predictions["predicted"], expected, atol=1e-4)


def test_one_recording_is_cut_into_blocks_with_a_gap():
    rng = np.random.default_rng(1)
    n = 900
    x, drift = rng.standard_normal((n, 1)), np.cumsum(rng.standard_normal((n, 6)), axis=0)
    one = np.zeros(n, int)
    got = encode({"x": series(x, "x")}, recording(drift, one), **{**OPTIONS, "permutation": "none"})
    fold = got.predictions["fold"].values
    assert sorted(set(fold.tolist())) == [0, 1, 2, 3]
    assert (np.diff(fold) != 0).sum() == 3  # four stretches
    # Slow noise that features know nothing of is not predicted.
    assert got.best["r2"].values.max() < 0.1
    _features, rows, timing = as_rows({"x": series(x, "x")}, recording(drift, one), LAGS)
    for train, test in timing.splits(rows["stimulus_id"].values, 4):
        assert np.abs(train[:, None] - test).min() > timing.span


def test_repeated_clips_are_averaged_and_give_a_ceiling():
    rng = np.random.default_rng(2)
    clips, length = [f"c{i}" for i in range(6)], 120
    x = rng.standard_normal((6 * length, 2))
    clip = np.repeat(clips, length)
    signal = np.concatenate(
        [delayed(torch.as_tensor(x[clip == c]), [0, 1]).numpy() for c in clips]
    ) @ rng.standard_normal((4, 5))
    signal /= signal.std(axis=0)
    # The second time in another order of the clips, as a run of its own.
    order = rng.permutation(6)
    again = np.concatenate([np.flatnonzero(clip == clips[i]) for i in order])
    y = np.concatenate([signal, signal[again]]) + rng.standard_normal((2 * len(signal), 5))
    both = np.concatenate([clip, clip[again]])
    run = np.repeat([0, 1], len(signal))
    features = {"x": series(x, "x", clip=clip)}
    got = encode(features, recording(y, run, both), **{**OPTIONS, "splits": 3})
    assert got.predictions.sizes["presentation"] == len(signal)
    np.testing.assert_allclose(got.best["ceiling"], 2 / 3, atol=0.06)  # ncsnr 1, two repeats
    np.testing.assert_allclose(got.best["normalised"], 1, atol=0.12)
    assert json.loads(got.best.attrs["stimuli"]) == clips
    with pytest.raises(LeakError, match="both the train and the test side"):
        split = [(np.arange(630), np.arange(630, 720))]
        encode(features, recording(y, run, both), **{**OPTIONS, "splits": split})
    with pytest.raises(SchemaError, match="120 of the responses have no features: 'c5@000000'"):
        short = {"x": features["x"].isel(time=slice(600))}
        encode(short, recording(y, run, both), **OPTIONS)


def image_features(n=60, p=3):
    rng = np.random.default_rng(3)
    ids = [f"im{i:02d}" for i in range(n)]
    return xr.Dataset(
        {"features": (("stimulus", "feature"), rng.standard_normal((n, p)).astype(np.float32))},
        coords={"stimulus_id": ("stimulus", ids), "model": "net", "layer": "l"},
    )


def test_images_on_time_predict_simulated_bold():
    """A FIR model finds the neuroids with signal, and an HRF that peaks after some seconds."""
    features = image_features()
    made = simulate_timeseries(
        features, neuroids=60, ncsnr=3.0, null=0.5, n_repetitions=1, n_runs=6, tr=2.0,
        drift=0.0, noise_sd=0.1, seed=4,
    )  # fmt: skip
    got = encode(features, made.bold, delays=(0.0, 14.0), splits=3, inner_cv=3, n_permutations=200)
    null = made.truth["null"].values
    r = got.best["r"].values
    # The mean response to any image is predicted everywhere; what it is of only where planted.
    assert r[~null].min() > 0.5
    encoder = got.encoders["l"]
    kernel = np.abs(encoder["weights"].values[~null, :-1]).mean(axis=(0, 1))
    assert 4 <= encoder["delay"].values[kernel.argmax()] <= 8
    assert kernel[0] < 0.3 * kernel.max()
    # Tuning to the planted features, at the peak of the response.
    peak = encoder["weights"].values[:, :-1, kernel.argmax()]
    planted = made.truth["weights"].values
    agree = [np.corrcoef(a, b)[0, 1] for a, b in zip(peak[~null], planted[~null], strict=True)]
    assert np.median(agree) > 0.9


def test_images_that_repeat_over_runs_leak():
    features = image_features()
    made = simulate_timeseries(
        features, neuroids=8, n_repetitions=2, n_runs=6, drift=0.0, seed=5, tr=2.0
    )
    options = {"delays": (0.0, 10.0), "splits": 3, "inner_cv": 3, "permutation": "none"}
    with pytest.raises(LeakError, match="6 clips show stimuli of only 1 groups"):
        encode(features, made.bold, **options)
    assert encode(features, made.bold, allow_leak=True, **options).best.sizes["neuroid"] == 8
    # Two names of one image are one image.
    once = simulate_timeseries(
        features, neuroids=8, n_repetitions=1, n_runs=2, drift=0.0, seed=5, tr=2.0
    )
    options["splits"] = 2
    encode(features, once.bold, **options)
    shown = once.bold["stimulus_id"].values.astype(str)
    run = once.bold["run"].values
    a, b = (next(s for s in shown[run == r] if s) for r in (run.min(), run.max()))
    sha = {s: s for s in features["stimulus_id"].values.tolist()} | {b: a}
    with pytest.raises(LeakError, match="2 clips show stimuli of only 1 groups"):
        encode(features, once.bold, stimulus_sha256=sha, **options)


def test_refitted_shifts_give_uniform_p():
    rng = np.random.default_rng(6)
    n, run = 320, np.repeat(np.arange(4), 80)
    slow = np.zeros((n, 151))
    for i in range(n):
        slow[i] = (0.8 * slow[i - 1] if i % 80 else 0) + rng.standard_normal(151)
    got = encode(
        {"x": series(slow[:, :1], "x", run=run)}, recording(slow[:, 1:], run),
        **{**OPTIONS, "permutation": "refit", "n_permutations": 99, "delays": (0.0, 0.5)},
    )  # fmt: skip
    # 150 tests that share their feature: wider than for independent ones.
    assert (got.best["p"].values < 0.05).mean() < 0.12
    assert stats.kstest(got.best["p"].values, "uniform").statistic < 0.2
    assert got.null["maximum"].sizes["permutation"] == 99


def test_a_decoder_of_features(study):
    features, responses, _ = study
    source, target = backward(features, responses)
    got = encode(source, target, direction="backward", **{**OPTIONS, "n_permutations": 50})
    r = got.best["r"].groupby(got.best["roi"]).mean().to_series().to_dict()
    assert r["envelope"] > 0.8 and r["pitch"] > 0.6 and abs(r["nothing"]) < 0.05
    # What a recording says of features lies after them, and not before.
    later = {**OPTIONS, "n_permutations": 50, "delays": (0.5, 1.0)}
    after, before = (
        encode(source, target, direction=d, **later).best["r"].isel(neuroid=slice(2))
        for d in ("backward", "forward")
    )
    assert after.mean() > 0.5 and abs(before.mean()) < 0.1


def test_circular_shifts_keep_trials_whole(study):
    features, responses, _ = study
    _, rows, timing = as_rows(features, responses, LAGS)
    ids = rows["stimulus_id"].values.astype(str)
    order = timing.exchange(ids, np.random.default_rng(0))
    trial = timing.trials(ids)
    assert (trial[order] == trial).all() and sorted(order) == list(range(len(ids)))
    step = (order - np.arange(len(ids)))[trial == 0] % SAMPLES
    assert len(set(step.tolist())) == 1 and timing.span < step[0] < SAMPLES - timing.span
    rng = np.random.default_rng(0)
    all_shifts = [timing.exchange(ids, rng, away=False)[0] for _ in range(600)]
    assert set(all_shifts) > {0, 1, SAMPLES - 1}


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"inner_cv": "loo"}, ConfigError, "time series are validated in folds"),
        ({"regression": "stacking"}, ConfigError, "Stacking takes no delays"),
        ({"permutation": "predictions"}, ConfigError, "samples of time are not exchangeable"),
        ({"delays": None}, SchemaError, "give the delays of a lagged model"),
        ({"delays": (1.0, 0.0)}, ConfigError, "tmin=1.0 and tmax=0.0"),
    ],
)
def test_options_that_cannot_be_used(study, options, error, what):
    with pytest.raises(error, match=what):
        encode(study[0], study[1], **{**OPTIONS, **options})


def test_features_that_do_not_fit_the_recording(study):
    features, responses, _ = study
    slow = {"x": features["pitch"].assign_attrs(sampling_rate=1.0)}
    with pytest.raises(SchemaError, match="sampling_rate 1.0 Hz and the responses 4 Hz"):
        encode(slow, responses, **OPTIONS)
    images = image_features()
    with pytest.raises(SchemaError, match="do not say which stimulus"):
        encode(images, responses, **OPTIONS)
    with pytest.raises(SchemaError, match="1 stimuli that are shown have no features"):
        on_time(images, ["im00", "", "nowhere"])
    betas = responses.rename(time="presentation").assign_coords(
        stimulus_id=("presentation", [f"s{i}" for i in range(TRIALS * SAMPLES)]),
        repetition=("presentation", np.zeros(TRIALS * SAMPLES, int)),
        subject=("presentation", ["s1"] * TRIALS * SAMPLES),
    )
    with pytest.raises(SchemaError, match="delays need time series"):
        encode(features, betas, **OPTIONS)
