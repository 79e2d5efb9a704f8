"""A decoder on a stream: chunks of recording and sound in, probabilities out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from brainalign.auditory.decoders import AttentionDecoder, Oracle, Projection, window_samples
from brainalign.auditory.trials import ListeningTrial
from brainalign.errors import ConfigError, SchemaError

__all__ = ["Decision", "StreamingDecoder"]


class Decision(NamedTuple):
    """What a stream's decoder says of one window.

    Attributes
    ----------
    start, stop : float
        The window, seconds from the start of the stream; of a front end with a delay, when what it
        shows took place.
    time : float
        When it could be decided: the end of the samples that it takes, seconds.
    talker : int
        With the highest score.
    scores : ndarray, shape (n_talkers,)
    probability : ndarray, shape (n_talkers,)
        They sum to 1.
    """

    start: float
    stop: float
    time: float
    talker: int
    scores: NDArray[np.float64]
    probability: NDArray[np.float64]


class StreamingDecoder:
    r"""Decide on windows of a stream as soon as their samples are there.

    The decisions are those of `AttentionDecoder.score_windows` on the whole trial. What is kept is
    the last window of projections and the samples that a projection reaches over, however long the
    stream is; a decision waits for the samples that the decoder's filters take after the window
    (for stimulus reconstruction, the brain's delay).

    .. math:: P(k) = e^{b s_k} \Big/ \sum_j e^{b s_j}

    Parameters
    ----------
    decoder : AttentionDecoder
        Fitted.
    length : float
        Of the windows, seconds.
    hop : float, optional
        Seconds from decision to decision; by default the length.
    slope : float
        b, from `brainalign.auditory.decoders.calibrate`.
    voices : ndarray, shape (n_talkers, n_dimensions), optional
        For a decoder that needs them.
    delay : float
        Seconds by which recording and features lag behind, both alike, when they come from causal
        filters; see `brainalign.auditory.preprocessing.CausalFilter`.

    Attributes
    ----------
    latency : float
        Seconds from the end of a window to its decision: the delay of the filters before, and what
        the decoder looks ahead.

    Raises
    ------
    ConfigError
        For the oracle, which knows what a stream does not tell, or a hop longer than the window.
    """

    def __init__(
        self,
        decoder: AttentionDecoder,
        length: float,
        *,
        hop: float | None = None,
        slope: float = 1.0,
        voices: NDArray[np.floating] | None = None,
        delay: float = 0.0,
    ) -> None:
        check_is_fitted(decoder)
        inner = decoder
        while hasattr(inner, "decoder_"):
            inner = inner.decoder_
        if isinstance(inner, Oracle):
            raise ConfigError("The oracle knows who is attended; a stream does not tell.")
        self.decoder = decoder
        self.size, self.step = window_samples(length, hop, decoder.sampling_rate_)
        if self.step > self.size:
            raise ConfigError(f"hop={hop} s is longer than the window of {length} s.")
        self.slope = slope
        self.voices = voices
        self.delay = delay
        self._before, self._after = decoder.reach
        self.latency = self._after / decoder.sampling_rate_ + delay
        self._neural: NDArray[np.floating] | None = None
        self._features: dict[str, NDArray[np.floating]] = {}
        self._base = 0  # number in the stream of the first sample that is kept
        self._done = 0  # samples that are projected
        self._projected: Projection | None = None
        self._next = 0  # start of the next window

    @property
    def n_buffered(self) -> int:
        """Samples that are kept: of the data, and of the projections."""
        raw = 0 if self._neural is None else len(self._neural)
        return raw + (0 if self._projected is None else len(self._projected.neural))

    def push(self, neural: ArrayLike, features: dict[str, NDArray[np.floating]]) -> list[Decision]:
        """Take the next samples.

        Parameters
        ----------
        neural : array-like, shape (n_samples, n_channels)
            Any number of samples.
        features : dict of str to ndarray, shape (n_talkers, n_samples, n_features)
            Of the same samples.

        Returns
        -------
        list of Decision
            On the windows that are complete now.

        Raises
        ------
        SchemaError
            If the chunk does not go with the decoder or those before.
        """
        y = np.asarray(neural)
        if not len(y):
            return []
        chunk = self._trial(y, features)
        self.decoder._check_like(chunk)
        if self._neural is None:
            self._neural, self._features = y, {k: np.asarray(f) for k, f in features.items()}
        else:
            if {k: (f.shape[0], f.shape[2]) for k, f in self._features.items()} != {
                k: (f.shape[0], f.shape[2]) for k, f in chunk.features.items()
            }:
                raise SchemaError("The chunk has other talkers or features than those before.")
            self._neural = np.concatenate([self._neural, y])
            self._features = {
                k: np.concatenate([f, features[k]], axis=1) for k, f in self._features.items()
            }
        return self._advance(self._base + len(self._neural) - self._after)

    def flush(self) -> list[Decision]:
        """End the stream: decide on what is left, with zeros in place of what would have come.

        Returns
        -------
        list of Decision
            As for the end of a whole trial.
        """
        if self._neural is None:
            return []
        return self._advance(self._base + len(self._neural))

    def _trial(
        self, neural: NDArray[np.floating], features: dict[str, NDArray[np.floating]]
    ) -> ListeningTrial:
        rate = self.decoder.sampling_rate_
        unknown = np.zeros(len(neural), dtype=np.int64)
        return ListeningTrial(neural, features, unknown, rate, "stream", voices=self.voices)

    def _advance(self, ready: int) -> list[Decision]:
        """Project samples up to `ready`, decide, and forget what is not needed again."""
        if ready <= self._done or self._neural is None:
            return []
        made = self.decoder.project(self._trial(self._neural, self._features))
        part = slice(self._done - self._base, ready - self._base)
        new = Projection(made.neural[part], made.talkers[:, part])
        old = self._projected
        if old is not None:
            new = Projection(
                np.concatenate([old.neural, new.neural]),
                np.concatenate([old.talkers, new.talkers], axis=1),
            )
        self._done = ready
        first = self._done - len(new.neural)
        decisions = []
        while self._next + self.size <= self._done:
            rows = slice(self._next - first, self._next - first + self.size)
            decisions.append(self._decide(new.neural[rows], new.talkers[:, rows]))
            self._next += self.step
        kept = min(self._next, self._done) - first
        self._projected = Projection(new.neural[kept:].copy(), new.talkers[:, kept:].copy())
        forget = max(0, self._done - self._before - self._base)
        self._base += forget
        self._neural = self._neural[forget:].copy()
        self._features = {k: f[:, forget:].copy() for k, f in self._features.items()}
        return decisions

    def _decide(self, neural: NDArray[np.floating], talkers: NDArray[np.floating]) -> Decision:
        scores = self.decoder.score(neural[None], talkers[None])[0]
        weight = np.exp(self.slope * (scores - scores.max()))
        rate, stop = self.decoder.sampling_rate_, self._next + self.size
        return Decision(
            self._next / rate - self.delay,
            stop / rate - self.delay,
            (stop + self._after) / rate,
            int(scores.argmax()),
            scores,
            weight / weight.sum(),
        )
