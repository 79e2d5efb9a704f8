"""Preprocessing of recordings: what filters keep and drop, what is marked, what is selected."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
from scipy import signal
from scipy.stats import pearsonr
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainalign.auditory.preprocessing import (
    CausalFilter,
    ResponsiveChannels,
    artefacts,
    band_pass,
    bipolar_pairs,
    common_average,
    high_gamma,
    notch,
    preprocess,
)
from brainalign.errors import ConfigError, SchemaError

pytest.importorskip("mne")

RATE = 500.0
TIME = np.arange(5000) / RATE


def sine(f):
    return np.sin(2 * np.pi * f * TIME)


def amplitude(x, f):
    """Amplitude at one frequency, away from the ends."""
    middle = slice(1000, 4000)
    return 2 * np.abs(np.mean(x[middle] * np.exp(-2j * np.pi * f * TIME[middle])))


def test_notch_removes_the_line_and_keeps_the_rest():
    x = notch((sine(20) + sine(60) + sine(120))[:, None], RATE, 60)[:, 0]
    assert amplitude(x, 20) == pytest.approx(1, abs=0.01)
    assert amplitude(x, 60) < 0.01 and amplitude(x, 120) < 0.01


def test_band_pass_has_zero_phase():
    x = band_pass((7 + sine(5) + sine(40))[:, None], RATE, 1, 9)[:, 0]
    np.testing.assert_allclose(x[1000:4000], sine(5)[1000:4000], atol=0.005)


def test_high_gamma_is_the_amplitude_of_its_band():
    slow = 1 + 0.7 * np.sin(2 * np.pi * 2 * TIME)
    carrier = sum(sine(f) for f in range(75, 150, 10))
    x = np.stack([slow * sine(110) + 20 * sine(10), slow * carrier + 20 * sine(10)], axis=1)
    middle = slice(50, 950)
    one = high_gamma(x, RATE, n_bands=1)
    np.testing.assert_allclose(one[middle, 0], slow[::5][middle], atol=0.01)
    eight = high_gamma(x, RATE)
    assert eight.shape == (1000, 2)
    assert eight[:, 1].mean() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(eight[middle, 1], slow[::5][middle])[0, 1] > 0.95


def test_common_average_by_hand():
    x = np.array([[1.0, 3.0, 100.0]])
    assert common_average(x, [True, True, False]).tolist() == [[-1, 1, 98]]
    with pytest.raises(ConfigError, match="at least 2"):
        common_average(x, [True, False, False])


def test_neighbours_of_a_shaft():
    names = ["LA1", "LA2", "LA4", "LB1", "LB2", "REF", "LA3"]
    assert bipolar_pairs(names) == [(0, 1), (1, 6), (3, 4), (6, 2)]
    xyz = np.zeros((7, 3))
    xyz[2], xyz[3] = 50, np.nan
    assert bipolar_pairs(names, xyz) == [(0, 1), (1, 6), (3, 4)]


def test_artefacts_are_marked_and_nothing_else():
    x = np.random.default_rng(0).normal(size=(5000, 3))
    x[1000, 0] = 30
    x[2000:2100, 1] = x[2000, 1]
    marked = artefacts(x, RATE, pad=0.01)
    assert np.flatnonzero(marked[:, 0]).tolist() == list(range(995, 1007))
    assert np.flatnonzero(marked[:, 1]).tolist() == list(range(1996, 2105))
    assert not marked[:, 2].any()


def recording(n_runs=2):
    rng = np.random.default_rng(1)
    n, names = 4000, ["LA1", "LA2", "LA3", "LB1", "noisy"]
    x = rng.normal(size=(n * n_runs, 5))
    x[6000, :2] += 200, -200
    return xr.Dataset(
        {"responses": (("time", "neuroid"), x)},
        coords={
            "run": ("time", np.repeat(np.arange(n_runs), n)),
            "attended": ("time", np.repeat(np.arange(4) % 2, n * n_runs // 4)),
            "subject": "s1",
            "neuroid_id": ("neuroid", names),
            "roi": ("neuroid", ["STG", "STG", "MTG", "HG", ""]),
            "hemisphere": ("neuroid", ["L"] * 5),
            "status": ("neuroid", ["good"] * 4 + ["bad"]),
            **{a: ("neuroid", np.arange(5.0) * 4) for a in "xyz"},
        },
        attrs={"sampling_rate": RATE, "units": "uV"},
    )


def test_a_recording_from_end_to_end():
    ds = preprocess(recording(), line=60, bands=("high_gamma", "low"), rate_out=100)
    assert ds.sizes == {"time": 1600, "neuroid": 8} and ds.attrs["sampling_rate"] == 100
    assert ds["neuroid_id"].values[[0, 4]].tolist() == ["LA1:high_gamma", "LA1:low"]
    assert np.bincount(ds["run"]).tolist() == [800, 800]
    assert ds["attended"].values[[399, 400, 799, 800]].tolist() == [0, 1, 1, 0]
    # The artefact at 12 s and a quarter of a second on either side.
    bad = np.flatnonzero(ds["bad"].values)
    assert bad[0] == 1175 and bad[-1] == 1225 and len(bad) == 51
    assert "reference: average" in ds.attrs["preprocessing"]
    assert np.isfinite(ds["responses"]).all()


def test_runs_do_not_leak_into_one_another():
    one = recording()
    other = one.copy(deep=True)
    other["responses"].values[:4000] += 1000
    a, b = (preprocess(d, bands=[(1, 9)], rate_out=50, threshold=None) for d in (one, other))
    np.testing.assert_array_equal(a["responses"][400:], b["responses"][400:])


def test_bipolar_recording():
    ds = preprocess(recording(), reference="bipolar", bands=["low"], rate_out=100)
    assert ds["neuroid_id"].values.tolist() == ["LA1-LA2", "LA2-LA3"]
    assert ds["x"].values.tolist() == [2, 6] and ds["roi"].values.tolist() == ["STG", ""]


def test_what_cannot_be_done():
    with pytest.raises(ConfigError, match="cannot be kept at 50 Hz"):
        preprocess(recording(), bands=["low"], rate_out=50)
    with pytest.raises(ConfigError, match="narrower band"):
        high_gamma(np.zeros((500, 1)), 128.0)
    with pytest.raises(SchemaError, match=r"1 samples are not finite, in 1 channels"):
        notch(np.where(np.arange(10)[:, None] == 3, np.nan, 0.0), RATE)
    with pytest.raises(ConfigError, match="at least 19"):
        ResponsiveChannels().fit(np.zeros((100, 1)), np.zeros(100))


def slow_noise(rng, *shape):
    """Noise as slow as envelopes, whose correlations are far from those of white noise."""
    x = rng.normal(size=shape)
    kernel = np.exp(-np.arange(100) / 25)
    return np.apply_along_axis(np.convolve, 0, x, kernel)[: shape[0]]


def test_responsive_channels_are_found_and_slow_noise_is_not():
    rng = np.random.default_rng(2)
    y = slow_noise(rng, 12_000)
    x = slow_noise(rng, 12_000, 103)
    x[:, :3] += 0.5 * np.roll(y, 12)[:, None]
    x[:, 102] = 1.0
    fitted = ResponsiveChannels(100.0).fit(x, y)
    assert set(fitted.get_support(indices=True)) >= {0, 1, 2} and fitted.get_support().sum() < 7
    np.testing.assert_allclose(fitted.lags_[:3], 0.12, atol=0.03)
    # Without an effect p is uniform; that of a correlation at one delay rejects most channels.
    assert fitted.scores_[102] == 0 and not fitted.get_support()[102]
    assert (fitted.p_[3:] < 0.05).mean() < 0.12
    textbook = np.array([pearsonr(x[:, i], y).pvalue for i in range(3, 102)])
    assert (textbook < 0.05).mean() > 0.5


def test_selection_is_a_step_of_a_pipeline_and_takes_trials():
    rng = np.random.default_rng(3)
    y = [rng.normal(size=1500) for _ in range(3)]
    x = [rng.normal(size=(1500, 4)) + 5 * i for i, _ in enumerate(y)]
    for trial, sound in zip(x, y, strict=True):
        trial[:, 2] += sound
    chosen = ResponsiveChannels(100.0).fit(x, y)
    assert chosen.get_support().tolist() == [False, False, True, False]
    assert [t.shape for t in chosen.transform(x)] == [(1500, 1)] * 3
    flat = make_pipeline(StandardScaler(), ResponsiveChannels(100.0, at_least=2))
    assert flat.fit_transform(np.concatenate(x), np.concatenate(y)).shape == (4500, 2)


@pytest.mark.parametrize(("amplitude", "band"), [(False, (1.0, 9.0)), (True, (70.0, 150.0))])
def test_a_causal_filter(amplitude, band):
    rate, rate_out = 512.0, 64.0
    rng = np.random.default_rng(0)
    slow = 1 + 0.8 * np.sin(2 * np.pi * 2.0 * np.arange(512 * 20) / rate)
    x = slow[:, None] * rng.standard_normal((512 * 20, 3))
    made = CausalFilter(rate, rate_out, *band, amplitude=amplitude)
    whole = made.push(x)
    assert whole.shape == (64 * 20, 3)
    made.reset()
    cuts = [0, 1, 3, 3, 500, 1111, 6000, len(x)]
    parts = [made.push(x[a:b]) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-12)
    # What is to come changes nothing.
    made.reset()
    changed = x.copy()
    changed[5001:] = 0
    np.testing.assert_array_equal(made.push(changed)[:626], whole[:626])
    # The amplitude of a burst in the middle of the band lags behind by what it says.
    time, centre = np.arange(512 * 20) / rate, np.sqrt(band[0] * band[1])
    width = 3 / centre
    burst = np.exp(-0.5 * ((time - 8) / width) ** 2) * np.sin(2 * np.pi * centre * time)
    made.reset()
    out = made.push(burst[:, None])[:, 0]
    if not amplitude:
        out = np.abs(signal.hilbert(out))
    lag = (out * np.arange(len(out)) / rate_out).sum() / out.sum() - 8
    assert lag == pytest.approx(made.delay, rel=0.1) and made.delay > 0.03
    # At its height the burst passes whole.
    assert out.max() == pytest.approx(1, abs=0.15)


def test_causal_filters_that_cannot_be():
    for given, says in (
        ((512, 60, 1, 9), "no multiple"), ((512, 64, 1, 30), "fold over"),
        ((512, 64, 9, 1), "low < high"), ((512, 64, 1, 300), "low < high"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            CausalFilter(*given)
