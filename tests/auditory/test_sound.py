"""Features of sound: against scipy's gammatone, against another mel spectrogram, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal

from brainalign.auditory.sound import (
    broadband_envelope,
    erb_frequencies,
    gammatone,
    gammatone_envelope,
    mel_filterbank,
    mel_spectrogram,
    onsets,
    resample,
    talker_features,
)
from brainalign.data.sounds import read_sound
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError

RATE = 16_000.0


def tone(frequency, seconds=1.0, rate=RATE):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("frequency", [150.0, 1000.0, 4000.0])
def test_gammatone_is_that_of_scipy(frequency):
    impulse = np.zeros(8192)
    impulse[0] = 1
    ours = np.fft.rfft(gammatone(impulse, RATE, [frequency])[:, 0].real)
    taps, _ = signal.gammatone(frequency, "fir", order=4, numtaps=8192, fs=RATE)
    theirs = np.fft.rfft(taps)
    bins = np.fft.rfftfreq(8192, 1 / RATE)
    near = np.abs(bins - frequency) < 2 * 24.7 * (4.37 * frequency / 1000 + 1)
    decibels = 20 * np.log10(np.abs(ours[near]) / np.abs(theirs[near]))
    assert np.abs(decibels - decibels[np.argmin(np.abs(bins[near] - frequency))]).max() < 0.3


def test_gammatone_keeps_a_tone_at_its_centre():
    band = gammatone(tone(500), RATE, [500, 2000])
    settled = slice(4000, None)
    np.testing.assert_allclose(np.abs(band[settled, 0]), 1, atol=2e-3)
    assert np.abs(band[settled, 1]).max() < 0.01


def test_gammatone_in_chunks_is_one_filter(monkeypatch):
    sound = np.random.default_rng(0).normal(size=5000)
    whole = gammatone(sound, RATE, [300.0])
    monkeypatch.setattr("brainalign.auditory.sound._CHUNK", 777)
    np.testing.assert_allclose(gammatone(sound, RATE, [300.0]), whole, atol=1e-12)


def test_gammatone_is_four_poles_in_cascade():
    sound = np.random.default_rng(0).normal(size=3000)
    decay = 2 * np.pi * 1.019 * 24.7 * (4.37 * 0.3 + 1) / RATE
    pole, out = np.exp(2j * np.pi * 300 / RATE - decay), 2 * sound.astype(complex)
    for _ in range(4):
        out = signal.lfilter([1 - abs(pole)], [1, -pole], out)
    np.testing.assert_allclose(gammatone(sound, RATE, [300.0])[:, 0], out, atol=1e-12)


def test_low_band_at_a_high_rate_is_stable():
    band = gammatone(np.r_[1.0, np.zeros(2 * 96_000)], 96_000.0, [20.0])
    assert np.isfinite(band).all() and np.abs(band[-100:]).max() < 1e-12 * np.abs(band).max()


def test_fifteen_bands_from_150_hz():
    f = erb_frequencies()
    assert len(f) == 15 and f[0] == pytest.approx(150) and f[-1] < 4000 < 1.2 * f[-1]


@pytest.mark.parametrize("envelope", [broadband_envelope, gammatone_envelope])
def test_envelope_follows_the_modulation(envelope):
    t = np.arange(4 * 16_000) / RATE
    slow = 1 + 0.8 * np.sin(2 * np.pi * 3 * t)
    noise = np.random.default_rng(0).normal(size=len(t))
    found = envelope(slow * noise, RATE, 64.0)
    assert len(found) == 256 and found.min() >= 0
    assert np.corrcoef(found[8:-8], resample(slow, RATE, 64.0)[8:-8])[0, 1] > 0.8


def test_exponent_compresses():
    # A gain of 8 becomes one of 8^0.6.
    sound = np.random.default_rng(0).normal(size=8000)
    ratio = gammatone_envelope(8 * sound, RATE) / gammatone_envelope(sound, RATE)
    np.testing.assert_allclose(ratio, 8**0.6)


def test_mean_of_the_bands():
    sound = np.random.default_rng(0).normal(size=8000)
    bands = gammatone_envelope(sound, RATE, bands=True)
    assert bands.shape == (50, 15)
    np.testing.assert_allclose(bands.mean(axis=1), gammatone_envelope(sound, RATE))


def test_onsets_by_hand():
    assert onsets([1.0, 3.0, 2.0, 2.5], 10).tolist() == [0, 20, 0, 5]


def test_resampling_keeps_low_and_drops_what_would_alias():
    kept, gone = resample(tone(20), RATE, 100.0), resample(tone(62), RATE, 100.0)
    np.testing.assert_allclose(
        kept[20:-20], np.sin(2 * np.pi * 0.2 * np.arange(100))[20:-20], atol=0.01
    )
    assert np.abs(gone[20:-20]).max() < 3e-3
    assert len(resample(np.zeros(1001), 1000, 100)) == 101
    assert resample(np.zeros((50, 3, 2)), 50, 64).shape == (64, 3, 2)
    np.testing.assert_allclose(resample(np.full(300, 7.0), 300, 100), 7, atol=0.02)


def test_mel_filters_are_those_of_slaney():
    audio = pytest.importorskip("transformers.audio_utils")
    theirs = audio.mel_filter_bank(321, 28, 50.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filterbank(640, RATE, 28, 50, 8000), theirs, atol=1e-12)


def test_mel_spectrogram_is_that_of_another_hand():
    audio = pytest.importorskip("transformers.audio_utils")
    sound = 0.1 * np.random.default_rng(0).normal(size=16_000)
    ours = mel_spectrogram(sound, RATE, 100.0)
    window = audio.window_function(640, "hann")
    theirs = audio.spectrogram(
        sound, window, 640, 160, power=2.0, center=True, pad_mode="constant",
        mel_filters=mel_filterbank(640, RATE, 28, 50, 8000), dtype=np.float64,
    ).T / (window**2).sum()  # fmt: skip
    # Their last frame starts where the sound ends.
    np.testing.assert_allclose(ours, 10 * np.log10(theirs[:100]), atol=1e-6)


def test_mel_frames_do_not_drift():
    # 22,050 / 100 is no whole number of samples.
    click = np.zeros(22_050 * 20)
    click[22_050 * 15] = 1
    frames = mel_spectrogram(click, 22_050.0, 100.0)
    assert len(frames) == 2000
    assert abs(np.flatnonzero(frames[:, 10] > -99).mean() - 1500) <= 0.5


def test_real_speech(mirror):
    sound, rate = read_sound(mirror / "librispeech_clips" / "198-209-0000.ogg")
    assert rate == 22_050 and len(sound) == 306_717
    envelope, whole = gammatone_envelope(sound, rate, 64.0), broadband_envelope(sound, rate, 64.0)
    assert len(envelope) == len(whole) == 891
    assert np.corrcoef(envelope, whole)[0, 1] > 0.8
    # Speech is modulated at the rate of syllables.
    power = np.abs(np.fft.rfft(envelope - envelope.mean())) ** 2
    f = np.fft.rfftfreq(len(envelope), 1 / 64)
    assert power[(f > 1) & (f < 9)].sum() > 5 * power[f >= 9].sum()


def test_features_of_talkers():
    rng = np.random.default_rng(0)
    sound = [[(rng.normal(size=8000 * n), 8000.0) for _ in range(2)] for n in (2, 3)]
    ds = talker_features(sound, ("envelope", "onsets", "mel"), 64.0, n_times=[128, 180])
    assert ds["features"].shape == (308, 60) and ds.attrs["sampling_rate"] == 64
    assert np.bincount(ds["run"]).tolist() == [128, 180]
    assert ds["talker"].values.tolist() == [0] * 30 + [1] * 30
    envelope = ds["features"].values[:128, (ds["talker"] == 1) & (ds["space"] == "envelope")]
    np.testing.assert_allclose(
        envelope[:, 0], gammatone_envelope(sound[0][1][0], 8000, 64), rtol=1e-5
    )
    with pytest.raises(SchemaError, match=r"Trial 0: a sound lasts 2\.00 s and the recording 3"):
        talker_features(sound, ("envelope",), 64.0, n_times=[192, 180])
    with pytest.raises(UnknownNameError, match="Did you mean 'onsets'"):
        talker_features(sound, ("onset",))


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(SchemaError, match=r"shape \(n_samples,\)"):
        broadband_envelope(np.zeros((10, 2)), RATE)
    with pytest.raises(ConfigError, match="below half the rate"):
        gammatone(np.zeros(10), RATE, [9000])
    with pytest.raises(ConfigError, match="narrower"):
        mel_filterbank(64, RATE, 80)
    with pytest.raises(ConfigError, match="ratio of whole numbers"):
        resample(np.zeros(10), 44_100, 100 * np.pi)
    with pytest.raises(UnavailableError, match="no sound file"):
        read_sound(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(UnavailableError, match="cannot be read"):
        read_sound(tmp_path / "text.wav")
