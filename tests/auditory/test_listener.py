"""The simulated listener is what it says: response functions, gains, noise."""

from __future__ import annotations

import numpy as np
import pytest
from paced_speech import paced

from brainalign.auditory.listener import (
    SimulatedListener,
    coloured_noise,
    switching,
    talker_streams,
)
from brainalign.auditory.trials import ListeningTrial
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.linear import LaggedRidge

RATE = 32


def speech(n=RATE * 60, p=1, seed=0):
    return {"envelope": paced((2, n, p), np.random.default_rng(seed), RATE)}


@pytest.mark.parametrize("tuning", [None, 1.0])
def test_response_functions_are_recovered(tuning):
    listener = SimulatedListener(3, RATE, snr_db=60, unattended=0.25, tuning=tuning, seed=4)
    sound = speech(p=4)
    trial = listener.listen(sound, 1)
    x = np.concatenate([sound["envelope"][1], sound["envelope"][0]], axis=1)
    model = LaggedRidge(0, listener.times[-1], RATE, alphas=1e-3).fit(
        (x - x.mean(axis=0)) / sound["envelope"].std(axis=(0, 1))[[0, 1, 2, 3] * 2], trial.neural
    )
    truth = listener.trfs(4)
    # The attended talker's functions, then those of the other at a quarter.
    assert model.coef_[:, :4] == pytest.approx(truth, abs=0.02)
    assert model.coef_[:, 4:] == pytest.approx(0.25 * truth, abs=0.02)
    peaks = listener.times[truth.max(axis=1).argmax(axis=1)]
    assert ((peaks >= 0.05 - 1 / RATE) & (peaks <= 0.15 + 1 / RATE)).all()


def test_noise_has_the_stated_level_and_does_not_tell_who_is_attended():
    sound = speech()
    sound["envelope"][1] *= 3  # one talker is louder
    quiet = {"snr_db": 200.0, "seed": 1, "unattended": 0.0}
    for attended in (0, 1):
        signal = SimulatedListener(2, RATE, **quiet).listen(sound, attended).neural
        noisy = SimulatedListener(2, RATE, **quiet | {"snr_db": -6.0}).listen(sound, attended)
        noise = noisy.neural - signal
        each = [
            SimulatedListener(2, RATE, **quiet).listen(sound, k).neural.var(axis=0) for k in (0, 1)
        ]
        assert noise.var(axis=0) == pytest.approx(np.mean(each, axis=0) * 10**0.6, rel=1e-3)


def test_noise_falls_with_frequency():
    noise = coloured_noise(2**15, 4, 1.0, np.random.default_rng(0))
    assert noise.mean(axis=0) == pytest.approx(0, abs=1e-9)
    assert noise.std(axis=0) == pytest.approx(1)
    power = (np.abs(np.fft.rfft(noise, axis=0)) ** 2).mean(axis=1)
    f = np.arange(1, len(power))
    assert np.polyfit(np.log(f), np.log(power[1:]), 1)[0] == pytest.approx(-1, abs=0.05)


def test_attention_switches_the_response():
    sound = speech()
    listener = SimulatedListener(2, RATE, snr_db=200, unattended=0.0)
    who = switching(RATE * 60, RATE, 20.0)
    assert who[RATE * 19] == 0 and who[RATE * 21] == 1 and who[RATE * 41] == 0
    both, first, second = (listener.listen(sound, w).neural for w in (who, 0, 1))
    # Where the response functions reach back over no switch.
    assert both[: RATE * 20] == pytest.approx(first[: RATE * 20], abs=1e-4)
    assert both[RATE * 21 : RATE * 40] == pytest.approx(second[RATE * 21 : RATE * 40], abs=1e-4)


def test_any_size_and_the_same_numbers_again():
    listener = SimulatedListener(500, RATE, seed=3)
    a, b = (listener.listen(speech(RATE * 5), 0, name=n).neural for n in ("a", "b"))
    assert a.shape == (RATE * 5, 500) and a.dtype == np.float32
    assert np.array_equal(a, listener.listen(speech(RATE * 5), 0, name="a").neural)
    assert not np.array_equal(a, b)
    with pytest.raises(ConfigError):
        SimulatedListener(0)
    with pytest.raises(SchemaError, match="'mel'"):
        SimulatedListener(2, RATE, space="mel").listen(speech())


def test_streams_of_any_length_are_equally_loud():
    rng = np.random.default_rng(0)
    clips = [[rng.standard_normal(300), 5 * rng.standard_normal(200)], [rng.standard_normal(150)]]
    streams = talker_streams(clips, 2000, seed=1)
    assert streams.shape == (2, 2000)
    assert (streams**2).mean(axis=1) == pytest.approx(1)
    # Each talker says only her own clips, whole, turned round.
    said, clip = streams[1][:150], clips[1][0]
    assert np.sort(said / said.std()) == pytest.approx(np.sort(clip / clip.std()))
    assert not np.allclose(said / said.std(), clip / clip.std(), atol=0.1)
    with pytest.raises(SchemaError, match="Talker 1"):
        talker_streams([clips[0], [np.zeros(10)]], 100)


def test_trials_say_what_does_not_go_together():
    sound = speech(100)
    neural = np.zeros((100, 3))
    assert ListeningTrial(neural, sound, 1, RATE).attended.tolist() == [1] * 100
    for wrong in (
        {"neural": np.zeros((99, 3))},
        {"attended": 2},
        {"attended": np.zeros(99, dtype=int)},
        {"attended": np.zeros(100)},
        {"neural": np.full((100, 3), np.nan)},
        {"sampling_rate": 0},
        {"voices": np.zeros((3, 4))},
        {"features": {}},
    ):
        given = {"neural": neural, "features": sound, "attended": 0, "sampling_rate": RATE}
        with pytest.raises(SchemaError):
            ListeningTrial(**given | wrong)
    with pytest.raises(UnknownNameError, match="Did you mean 'envelope'"):
        ListeningTrial(neural, sound, 0, RATE).space("envelop")
