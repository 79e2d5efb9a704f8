"""Decoders on simulated listeners, of whom it is known what can be told and what cannot."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from paced_speech import paced
from scipy.stats import norm

from brainalign.auditory import decoders as module
from brainalign.auditory.decoders import (
    CanonicalCorrelation,
    ForwardResponse,
    Oracle,
    StimulusReconstruction,
    TalkerCluster,
    calibrate,
    cross_validate,
    make_splits,
)
from brainalign.auditory.evaluation import (
    accuracy_curve,
    correlation_of_correlations,
    effective_samples,
    expected_accuracy,
)
from brainalign.auditory.listener import SimulatedListener, switching
from brainalign.auditory.trials import content_groups
from brainalign.errors import ConfigError, LeakError, SchemaError

RATE = 32
ALPHAS = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
BANDS = 6
#: Four voices that differ in the loudness of their bands.
VOICES = np.exp(np.random.default_rng(3).standard_normal((4, BANDS)) * 0.8)


def session(listener, n_trials, seconds, *, seed=0, subject="", stories=None):
    rng = np.random.default_rng(seed)
    trials = []
    for i in range(n_trials):
        who = rng.permutation(len(VOICES))[:2]
        story = np.random.default_rng([seed if stories is None else stories, i])
        bands = np.exp(0.5 * paced((2, RATE * seconds, BANDS), story, RATE)) * VOICES[who][:, None]
        features = {"mel": bands, "envelope": bands.sum(axis=2, keepdims=True)}
        trials.append(
            listener.listen(features, i % 2, name=str(i), subject=subject, voices=VOICES[who])
        )
    return trials


def decoders():
    return {
        "envelope": StimulusReconstruction(alphas=ALPHAS),
        "mel": StimulusReconstruction("mel", alphas=ALPHAS),
        "forward": ForwardResponse(["mel"], alphas=ALPHAS, n_iter=1),
        "cca": CanonicalCorrelation("mel", sound_span=0.3, n_components=4, n_folds=3),
        "talkers": TalkerCluster(4, hidden=16, epochs=12, learning_rate=1e-2, stride=8),
        "oracle": Oracle(),
    }


def mel_listener(unattended, **options):
    return SimulatedListener(
        10, RATE, space="mel", tuning=0.5, unattended=unattended, exponent=0.5,
        centre=(VOICES.mean(axis=0) * np.exp(0.125)), scale=VOICES.mean(axis=0), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mel_trials():
    return session(mel_listener(0.2, snr_db=-6), 30, 20)


def accuracy(decoder, trials, length=2, n_folds=2):
    scores = cross_validate(decoder, trials, [length], splits=make_splits(trials, n_folds=n_folds))
    return accuracy_curve(scores, n_bootstrap=500).isel(length=0)


def test_accuracy_follows_the_analytic_curve():
    """The curve from three correlations and the pace of the series, at five window lengths."""
    listener = SimulatedListener(8, RATE, snr_db=-20, unattended=0.3, seed=0)
    rng = np.random.default_rng(1)
    trials = [
        listener.listen({"envelope": paced((2, RATE * 200, 1), rng, RATE)}, i % 2, name=str(i))
        for i in range(16)
    ]
    decoder = StimulusReconstruction(alphas=ALPHAS).fit(trials[:6])
    rest = trials[6:]
    lengths = [1, 2, 5, 10, 20]
    scores = xr.concat([decoder.score_windows(rest, w) for w in lengths], "window")
    found = accuracy_curve(scores)
    r, share = [], []
    for trial in rest:
        neural, talkers = decoder.project(trial)
        own, other = talkers[trial.attended[0], :, 0], talkers[1 - trial.attended[0], :, 0]
        r.append(np.corrcoef([neural[:, 0], own, other])[[0, 0, 1], [1, 2, 2]])
        share.append(effective_samples(neural[:, 0], own, max_lag=2 * RATE) / len(own))
    attended, unattended, between = np.mean(r, axis=0)
    n = np.mean(share) * RATE * np.array(lengths)
    expected = expected_accuracy(attended, unattended, n, r_talkers=between)
    assert 0.6 < expected[0] < 0.8 and expected[-1] > 0.95
    assert found["accuracy"].values == pytest.approx(expected, abs=0.035)
    assert (found["low"] <= found["accuracy"]).all() and (found["accuracy"] <= found["high"]).all()


@pytest.mark.parametrize("name", ["mel", "forward"])
def test_means_of_correlations_follow_the_analytic_curve(name):
    """Independent bands or channels: D = sum w dz, var D = sum w^2 2 (1 - c) / (N - 3).

    Noise is white, since a window does not see the slow part of the recording that correlations
    over long stretches have in them.
    """
    rng = np.random.default_rng(1)
    listener = SimulatedListener(
        8, RATE, space="mel", tuning=0.1, snr_db=-22, unattended=0.3, exponent=0.0
    )
    trials = [
        listener.listen({"mel": paced((2, RATE * 200, 3), rng, RATE)}, i % 2, name=str(i))
        for i in range(24)
    ]
    alphas = (*ALPHAS, 1e6, 1e7)
    decoder = {
        "mel": StimulusReconstruction("mel", alphas=alphas),
        "forward": ForwardResponse(["mel"], alphas=alphas),
    }[name].fit(trials[:6])
    rest, lengths = trials[6:], np.array([1, 2, 5, 10, 20])
    scores = xr.concat([decoder.score_windows(rest, w) for w in lengths], "window")
    found = accuracy_curve(scores)["accuracy"].values
    r, share = [], []
    for trial in rest:
        neural, talkers = decoder.project(trial)
        own, other = talkers[trial.attended[0]], talkers[1 - trial.attended[0]]
        columns = range(neural.shape[1])
        r.append(
            [
                np.corrcoef([neural[:, k], own[:, k], other[:, k]])[[0, 0, 1], [1, 2, 2]]
                for k in columns
            ]
        )
        share.append(
            [effective_samples(neural[:, k], own[:, k], max_lag=2 * RATE) for k in columns]
        )
    attended, unattended, between = np.mean(r, axis=0).T
    weights = getattr(decoder, "weights_", np.ones(len(attended)))
    n = np.mean(share, axis=0) / len(trial.neural) * RATE * lengths[:, None]
    dz = np.arctanh(attended) - np.arctanh(unattended)
    variance = 2 * (1 - correlation_of_correlations(attended, unattended, between)) / (n - 3)
    expected = norm.cdf(dz @ weights / np.sqrt(variance @ weights**2))
    assert 0.6 < expected[0] < 0.8 and expected[-1] > 0.95
    assert found == pytest.approx(expected, abs=0.035)


def test_decoders_rank_as_simulated(mel_trials):
    found = {n: float(accuracy(d, mel_trials)["accuracy"]) for n, d in decoders().items()}
    band = float(accuracy(Oracle(), mel_trials)["chance_high"])
    assert found["oracle"] == 1.0
    assert min(found.values()) > band
    # Electrodes are tuned to single bands, whose sum says less than they do.
    for better in ("mel", "forward", "cca"):
        assert found["oracle"] >= found[better] > found["envelope"] + 0.03
    # A listener to the envelope has nothing of the bands to offer.
    whole = SimulatedListener(10, RATE, snr_db=-16, unattended=0.2)
    trials = session(whole, 20, 20)
    a, b = (float(accuracy(decoders()[n], trials)["accuracy"]) for n in ("envelope", "mel"))
    assert a > b + 0.03
    # And with more noise there is less to tell.
    noisy = session(SimulatedListener(10, RATE, snr_db=-26, unattended=0.2), 20, 20)
    assert float(accuracy(decoders()["envelope"], noisy)["accuracy"]) < a - 0.1


def test_without_attention_all_are_at_chance():
    trials = session(mel_listener(1.0, snr_db=0), 150, 4)
    for name, decoder in decoders().items():
        if name != "oracle":
            found = accuracy(decoder, trials)
            assert found["low"] <= 0.5 <= found["high"], name
            # Trials are what is independent: two standard errors of 150.
            assert abs(float(found["accuracy"]) - 0.5) < 2 * 0.5 / np.sqrt(150), name


def test_talkers_are_told_by_the_voice_alone(mel_trials):
    """The network gets no sound: a decoder by correlation would be lost without it."""
    silent = [
        type(t)(t.neural, {"none": np.zeros((2, len(t.neural), 1))}, t.attended, RATE, t.name,
                voices=t.voices)
        for t in mel_trials
    ]  # fmt: skip
    decoder = decoders()["talkers"].fit(silent[:20])
    scores = decoder.score_windows(silent[20:], 5)
    assert accuracy_curve(scores)["accuracy"].item() > 0.65
    assert decoder.losses_[-1] < 0.7 * decoder.losses_[0]
    again = decoders()["talkers"].fit(silent[:20]).score_windows(silent[20:], 5)
    assert np.array_equal(scores["score"], again["score"])
    with pytest.raises(ConfigError, match="there are 4"):
        TalkerCluster(8).fit(silent)
    bare = [type(t)(t.neural, t.features, t.attended, RATE) for t in silent]
    with pytest.raises(SchemaError, match="no voices"):
        TalkerCluster(4).fit(bare)


def test_eight_clusters_of_voices():
    """Sixteen talkers in eight kinds of voice, as many clusters as published: they are found."""
    rng = np.random.default_rng(0)
    kinds = np.exp(np.random.default_rng(4).standard_normal((8, BANDS)))
    voices = np.repeat(kinds, 2, axis=0) * np.exp(0.05 * rng.standard_normal((16, BANDS)))
    listener = SimulatedListener(
        10, RATE, space="mel", tuning=0.5, unattended=0.2, exponent=0.5, snr_db=-3,
        centre=voices.mean(axis=0) * np.exp(0.125), scale=voices.mean(axis=0),
    )  # fmt: skip
    trials = []
    for i in range(64):
        who = rng.permutation(16)[:2]
        bands = np.exp(0.5 * paced((2, RATE * 12, BANDS), rng, RATE)) * voices[who][:, None]
        trials.append(
            listener.listen({"mel": bands}, i % 2, name=str(i), voices=np.log(voices[who]))
        )
    decoder = TalkerCluster(8, hidden=16, epochs=8, learning_rate=1e-2, stride=8).fit(trials[:48])
    near = ((np.log(voices)[:, None] - decoder.centres_) ** 2).sum(axis=2).argmin(axis=1)
    # A cluster for each kind, in which its two talkers meet.
    assert (near[::2] == near[1::2]).all() and len(set(near)) == 8
    found = accuracy_curve(decoder.score_windows(trials[48:], 4)).isel(length=0)
    assert found["n_windows"] == 48 and found["low"] > found["chance_high"]
    assert decoder.losses_[-1] < 0.8 * np.log(8)


@pytest.mark.parametrize("name", ["envelope", "mel", "forward", "cca", "talkers", "oracle"])
def test_one_interface(name, mel_trials):
    from sklearn.base import clone

    decoder = clone(decoders()[name]).set_params()
    with pytest.raises(Exception, match="not fitted"):
        decoder.score_windows(mel_trials, 2)
    assert decoder.fit(mel_trials[:8]) is decoder
    scores = decoder.score_windows(mel_trials[8:10], 5, hop=2.5)
    assert scores["score"].dims == ("window", "talker") and scores.sizes["window"] == 14
    assert scores["start"].values[:3].tolist() == [0, 2.5, 5]
    assert np.array_equal(decoder.decide(scores), scores["score"].values.argmax(axis=1))
    assert decoder.score_windows(mel_trials[:1], 21).sizes["window"] == 0
    # Talkers are scored by what they say, not by their number.
    trial = mel_trials[8]
    turned = type(trial)(
        trial.neural, {s: f[::-1] for s, f in trial.features.items()}, 1 - trial.attended, RATE,
        voices=trial.voices[::-1],
    )  # fmt: skip
    swapped = decoder.score_windows([turned], 5, hop=2.5)["score"].values[:, ::-1]
    assert swapped == pytest.approx(scores["score"].values[:7], abs=1e-6)
    with pytest.raises(SchemaError, match="channels"):
        decoder.score_windows([type(trial)(trial.neural[:, :3], trial.features, 0, RATE)], 5)
    with pytest.raises(ConfigError, match="Windows of"):
        decoder.score_windows(mel_trials[:1], 0.0)


def test_windows_with_a_switch_have_no_attended_talker(mel_trials):
    listener = mel_listener(0.2)
    n = RATE * 20
    trial = listener.listen(mel_trials[0].features, switching(n, RATE, 6.0), voices=VOICES[:2])
    scores = Oracle().fit([trial]).score_windows([trial], 4)
    assert scores["attended"].values.tolist() == [0, -1, 1, 0, -1]
    assert scores["score"].values[1].tolist() == [0.5, 0.5]


def test_leaks_are_found_by_content(mel_trials):
    labels = content_groups(mel_trials[:4])
    assert len(set(labels)) == 4
    # Overlapping windows of one trial, under names of their own.
    trial = mel_trials[0]
    cut = [trial.cut(0, 320), trial.cut(160, 480), trial.cut(480, 640)]
    assert len(set(content_groups(cut))) == 2
    with pytest.raises(LeakError):
        cross_validate(Oracle(), cut, [1])
    # Silence is no content.
    still = np.zeros((2, 320, 1))
    quiet = [type(trial)(np.zeros((320, 2)), {"envelope": still}, 0, RATE) for _ in range(2)]
    assert len(set(content_groups(quiet))) == 2
    # One story for two listeners: found when a listener is left out, whatever the offset.
    first = session(mel_listener(0.2, seed=1), 4, 20, subject="a", stories=7)
    second = session(mel_listener(0.2, seed=2), 4, 20, subject="b", stories=7)
    both = first + [t.cut(100, 600) for t in second]
    with pytest.raises(LeakError, match="both the train and the test side"):
        cross_validate(Oracle(), both, [1], splits="subject")
    scores = cross_validate(Oracle(), both, [1], splits="subject", allow_leak=True)
    assert set(scores["subject"].values) == {"a", "b"}
    apart = first + session(mel_listener(0.2, seed=2), 4, 20, subject="b", seed=9)
    assert cross_validate(Oracle(), apart, [1], splits="subject").sizes["window"] == 160


def test_leave_one_trial_or_one_subject_out(mel_trials):
    a = session(mel_listener(0.2), 3, 20, subject="a")
    b = session(mel_listener(0.2), 4, 20, subject="b", seed=1)
    splits = make_splits(a + b)
    assert [t.tolist() for _, t in splits] == [[0], [1], [2], [3], [4], [5], [6]]
    assert splits[3][0].tolist() == [4, 5, 6]
    out = sorted(t.tolist() for _, t in make_splits(a + b, "subject"))
    assert out == [[0, 1, 2], [3, 4, 5, 6]]
    with pytest.raises(ConfigError, match="expected 'trial' or 'subject'"):
        make_splits(a, "window")
    with pytest.raises(ConfigError, match="one training trial"):
        CanonicalCorrelation().fit(a[:1])


def test_the_penalty_is_chosen_from_training_trials_alone(mel_trials):
    decoder = decoders()["mel"]
    whole = decoder.fit(mel_trials[:6]).model_.alpha_.copy()
    held_out = [type(t)(t.neural * 0 + 1, t.features, 0, RATE) for t in mel_trials[6:8]]
    spoilt = mel_trials[:6] + held_out
    seen: list[int] = []

    class Watching(StimulusReconstruction):
        def _fit(self, trials):
            seen.append(len(trials))
            super()._fit(trials)
            assert np.array_equal(self.model_.alpha_, whole)

    splits = [(np.arange(6), np.array([6, 7]))]
    cross_validate(Watching("mel", alphas=ALPHAS), spoilt, [2], splits=splits)
    assert seen == [6]


def test_channels_that_respond_are_kept():
    rng = np.random.default_rng(0)
    listener = SimulatedListener(3, RATE, snr_db=-6)
    trials = []
    for i in range(4):
        heard = listener.listen({"envelope": paced((2, RATE * 30, 1), rng, RATE)}, i % 2)
        noise = rng.standard_normal((RATE * 30, 5))
        both = np.concatenate([noise[:, :2], heard.neural, noise[:, 2:]], axis=1)
        trials.append(type(heard)(both, heard.features, heard.attended, RATE))
    fitted = StimulusReconstruction(n_channels=3, alphas=ALPHAS).fit(trials)
    assert fitted.channels_.tolist() == [2, 3, 4]
    assert fitted.model_.coef_.shape[1] == 3
    weights = ForwardResponse(alphas=ALPHAS).fit(trials).weights_
    assert set(np.argsort(-weights)[:3].tolist()) == {2, 3, 4}


def test_what_does_not_fit_into_memory_is_said_before(monkeypatch, mel_trials):
    monkeypatch.setattr(module, "free_bytes", lambda: 1e5)
    with pytest.raises(ConfigError, match="10 channels and 14 delays"):
        StimulusReconstruction().fit(mel_trials[:4])


def test_probabilities_are_calibrated(mel_trials):
    slope = calibrate(decoders()["forward"], mel_trials[:20], 1.0, n_folds=4)
    fitted = decoders()["forward"].fit(mel_trials[:20])
    scores = fitted.score_windows(mel_trials[20:], 1.0)
    margin = slope * np.diff(scores["score"].values, axis=1)[:, 0]
    p = 1 / (1 + np.exp(-margin))
    right = np.where(scores["attended"].values == 1, p, 1 - p)
    assert abs((right > 0.5).mean() - np.maximum(p, 1 - p).mean()) < 0.07
    assert calibrate(Oracle(), [t.cut(0, 64) for t in mel_trials[:4]], 1.0) > 1
