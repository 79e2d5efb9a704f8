"""A stream is decided as the whole recording would be, with bounded memory and known latency."""

from __future__ import annotations

import numpy as np
import pytest
from paced_speech import paced

from brainalign.auditory.decoders import (
    CanonicalCorrelation,
    ForwardResponse,
    Oracle,
    StimulusReconstruction,
    TalkerCluster,
)
from brainalign.auditory.evaluation import switch_latency
from brainalign.auditory.experiment import ResponsiveDecoder
from brainalign.auditory.listener import SimulatedListener, switching
from brainalign.auditory.streaming import StreamingDecoder
from brainalign.errors import ConfigError, SchemaError

RATE = 32
VOICES = np.array([[0.0, 1.0], [1.0, 0.0]])
DECODERS = {
    "reconstruction": StimulusReconstruction(alphas=1e3),
    "forward": ForwardResponse(alphas=(1e2, 1e3)),
    "cca": CanonicalCorrelation(sound_span=0.3, n_components=3, n_folds=2),
    "talkers": TalkerCluster(2, epochs=1, hidden=4, stride=8),
}


def record(seconds, attended=0, seed=0, snr_db=-8.0):
    rng = np.random.default_rng(seed)
    listener = SimulatedListener(6, RATE, snr_db=snr_db, unattended=0.2)
    features = {"envelope": paced((2, RATE * seconds, 1), rng, RATE)}
    return listener.listen(features, attended, name=str(seed), voices=VOICES)


@pytest.fixture(scope="module")
def training():
    return [record(30, i % 2, seed=i) for i in range(6)]


def feed(stream, trial, size):
    made, most = [], 0
    for a in range(0, len(trial.neural), size):
        made += stream.push(
            trial.neural[a : a + size], {k: f[:, a : a + size] for k, f in trial.features.items()}
        )
        most = max(most, stream.n_buffered)
    return made, most


@pytest.mark.parametrize("name", DECODERS)
def test_streaming_is_the_offline_result(name, training):
    decoder = DECODERS[name].fit(training)
    trial = record(8, seed=9)
    offline = decoder.score_windows([trial], 4.0, hop=0.25)
    for size in (3, 50, 10_000):
        stream = StreamingDecoder(decoder, 4.0, hop=0.25, voices=VOICES)
        made, most = feed(stream, trial, size)
        on_time = len(made)
        made += stream.flush()
        assert [d.start for d in made] == offline["start"].values.tolist()
        assert np.array([d.scores for d in made]) == pytest.approx(
            offline["score"].values, abs=1e-6 if name == "talkers" else 1e-12
        )
        assert [d.talker for d in made] == decoder.decide(offline).tolist()
        assert all(d.probability.sum() == pytest.approx(1) for d in made)
        # What waits for the end is what the filters look ahead for.
        assert (len(made) > on_time) == (stream.latency > 0)
        before, after = decoder.reach
        assert most <= 4 * RATE + 2 * (before + after)


def test_nothing_is_looked_ahead(training):
    """Decisions are the same, and there, whatever comes later."""
    decoder = DECODERS["reconstruction"].fit(training)
    trial, other = record(20, seed=9), record(20, seed=10)
    cut = RATE * 12
    stream = StreamingDecoder(decoder, 4.0, hop=0.5)
    first, _ = feed(stream, trial.cut(0, cut), 16)
    assert max(d.time for d in first) <= 12 < max(d.time for d in first) + 0.5
    assert all(d.time == pytest.approx(d.stop + stream.latency) for d in first)
    whole, _ = feed(StreamingDecoder(decoder, 4.0, hop=0.5), trial, 16)
    mixed = StreamingDecoder(decoder, 4.0, hop=0.5)
    spliced = feed(mixed, trial.cut(0, cut), 16)[0] + feed(mixed, other.cut(cut, 640), 16)[0]
    for d, e, f in zip(first, whole, spliced, strict=False):
        assert np.array_equal(d.scores, e.scores) and np.array_equal(d.scores, f.scores)
    assert not np.allclose(spliced[-1].scores, whole[-1].scores)


def test_memory_does_not_grow(training):
    decoder = DECODERS["cca"].fit(training)
    stream = StreamingDecoder(decoder, 2.0, hop=0.25)
    trial = record(60, seed=3)
    _, early = feed(stream, trial.cut(0, RATE * 10), 16)
    _, late = feed(stream, trial.cut(RATE * 10, RATE * 60), 16)
    assert late == early


@pytest.mark.parametrize("length", [2.0, 4.0])
def test_switch_latency_is_half_a_window_and_the_delay(length, training):
    """Attention switches every 20 s: a window follows when more than half of it is new."""
    decoder = DECODERS["reconstruction"].fit(training)
    n = RATE * 400
    trial = record(400, switching(n, RATE, 20.0), seed=5, snr_db=0.0)
    stream = StreamingDecoder(decoder, length, hop=0.125)
    made, _ = feed(stream, trial, 512)
    switches = np.arange(20.0, 400, 20)
    latency = switch_latency(
        [d.time for d in made], [d.talker for d in made], switches,
        trial.attended[(switches * RATE).astype(int)],
    )  # fmt: skip
    assert np.isfinite(latency).all()
    assert latency.mean() == pytest.approx(length / 2 + stream.latency, abs=0.2)


def test_what_a_stream_refuses(training):
    decoder = DECODERS["forward"].fit(training)
    for oracle in (
        Oracle(),
        ResponsiveDecoder(Oracle()),
        ResponsiveDecoder(ResponsiveDecoder(Oracle())),
    ):
        with pytest.raises(ConfigError, match="oracle"):
            StreamingDecoder(oracle.fit(training), 2.0)
    with pytest.raises(ConfigError, match="longer than the window"):
        StreamingDecoder(decoder, 2.0, hop=3.0)
    stream = StreamingDecoder(decoder, 2.0)
    assert stream.flush() == [] and stream.push(np.empty((0, 6)), {}) == []
    with pytest.raises(SchemaError):
        stream.push(np.zeros((4, 5)), {"envelope": np.zeros((2, 4, 1))})
    stream.push(np.zeros((4, 6)), {"envelope": np.zeros((2, 4, 1))})
    with pytest.raises(SchemaError, match="other talkers"):
        stream.push(np.zeros((4, 6)), {"envelope": np.zeros((3, 4, 1))})


def test_the_delay_of_filters_before_is_told(training):
    decoder = StimulusReconstruction(alphas=1e3).fit(training)
    trial = record(8, seed=9)
    (at_once, *_), _ = feed(StreamingDecoder(decoder, 4.0), trial, 50)
    stream = StreamingDecoder(decoder, 4.0, delay=0.25)
    (later, *_), _ = feed(stream, trial, 50)
    assert stream.latency == pytest.approx(decoder.reach[1] / RATE + 0.25)
    # It is decided at the same time, on what took place before.
    assert later.time == at_once.time == pytest.approx(later.stop + stream.latency)
    assert (later.start, later.stop) == (-0.25, 3.75)
    np.testing.assert_array_equal(later.scores, at_once.scores)
