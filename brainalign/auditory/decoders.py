"""Decoders of auditory attention behind one interface: fit, score windows, decide."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from tqdm.auto import tqdm

from brainalign.auditory.trials import ListeningTrial, content_groups, trial_labels
from brainalign.data.splits import Split, by_group, check_leak
from brainalign.errors import ConfigError, SchemaError
from brainalign.linear import AlphaEdgeWarning
from brainalign.linear.lagged import (
    LaggedRidge,
    delayed,
    delays,
    lagged_cross,
    lagged_gram,
    lagged_predict,
)
from brainalign.memory import free_bytes, readable

__all__ = [
    "ALPHAS",
    "AttentionDecoder",
    "CanonicalCorrelation",
    "ForwardResponse",
    "Oracle",
    "Projection",
    "StimulusReconstruction",
    "TalkerCluster",
    "calibrate",
    "cross_validate",
    "make_splits",
    "windowed_correlation",
]

logger = logging.getLogger(__name__)

#: Penalties that are tried: half decades from 10^-2 to 10^6.
ALPHAS = tuple(float(a) for a in 10 ** np.arange(-2, 6.25, 0.5))
#: Gram matrices of this size that a fit holds at once.
_GRAMS = 4
#: Windows that are worked on at once, in elements.
_ELEMENTS = 2**24


class Projection(NamedTuple):
    """What a decoder compares, sample by sample.

    Attributes
    ----------
    neural : ndarray, shape (n_samples, n_components)
    talkers : ndarray, shape (n_talkers, n_samples, n_components)
        The last axis may differ from that of `neural` where they are not correlated.
    """

    neural: NDArray[np.floating]
    talkers: NDArray[np.floating]


class AttentionDecoder(BaseEstimator):
    """What all decoders share: windows of a trial are scored for every talker.

    A decoder projects recording and talkers sample by sample (`project`), and scores windows of the
    projections (`score`). That is all a stream needs as well; see
    `brainalign.auditory.streaming.StreamingDecoder`.

    Attributes
    ----------
    sampling_rate_ : float
    n_channels_ : int
    """

    sampling_rate_: float
    n_channels_: int

    def fit(self, trials: Sequence[ListeningTrial]) -> Self:
        """Fit to trials in which the attended talker is known.

        Parameters
        ----------
        trials : sequence of ListeningTrial
            With the same channels, rate and feature spaces.

        Returns
        -------
        AttentionDecoder
            Itself.

        Raises
        ------
        SchemaError
            If the trials do not go together.
        """
        _check_together(trials)
        self.sampling_rate_ = float(trials[0].sampling_rate)
        self.n_channels_ = trials[0].neural.shape[1]
        self._fit(list(trials))
        return self

    @abstractmethod
    def _fit(self, trials: list[ListeningTrial]) -> None: ...

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and after a sample that its projection needs."""
        return 0, 0

    @abstractmethod
    def project(self, trial: ListeningTrial) -> Projection:
        """Return what windows are scored from; the trial is continued by zeros at both ends."""

    @abstractmethod
    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Score windows of projections.

        Parameters
        ----------
        neural : ndarray, shape (n_windows, n_samples, n_components)
        talkers : ndarray, shape (n_windows, n_talkers, n_samples, n_components)

        Returns
        -------
        ndarray, shape (n_windows, n_talkers)
            Larger for the talker who is thought to be attended.
        """

    def score_windows(
        self, trials: Sequence[ListeningTrial], length: float, *, hop: float | None = None
    ) -> xr.Dataset:
        """Score every window of some trials.

        Parameters
        ----------
        trials : sequence of ListeningTrial
            Trials shorter than the window have none.
        length : float
            Of the windows, seconds.
        hop : float, optional
            Seconds from window to window; by default they do not overlap.

        Returns
        -------
        xarray.Dataset
            ``score`` (window, talker) with coordinates on window: ``length`` and ``start`` (s, in
            the trial that a piece was cut from), ``trial``, ``subject``, ``attended`` (-1 where
            attention switches within).

        Raises
        ------
        SchemaError
            If the trials are not like those of the fit.
        ConfigError
            If the window or the hop is shorter than a sample.
        """
        check_is_fitted(self)
        parts = [self._score_trial(trial, length, hop) for trial in trials]
        return xr.concat(parts, dim="window", coords="minimal")

    def decide(self, scores: xr.Dataset) -> NDArray[np.int64]:
        """Return the talker with the highest score in each window; of equals the first.

        Parameters
        ----------
        scores : xarray.Dataset
            From `score_windows`.

        Returns
        -------
        ndarray of int, shape (n_windows,)
        """
        return scores["score"].values.argmax(axis=1)

    def _score_trial(self, trial: ListeningTrial, length: float, hop: float | None) -> xr.Dataset:
        self._check_like(trial)
        size, step = window_samples(length, hop, self.sampling_rate_)
        starts = np.arange(0, len(trial.neural) - size + 1, step)
        score = np.empty((len(starts), trial.n_talkers))
        if len(starts):
            neural, talkers = self.project(trial)
            rows = max(1, _ELEMENTS // (size * max(1, neural.shape[1]) * (1 + trial.n_talkers)))
            for a in range(0, len(starts), rows):
                at = starts[a : a + rows, None] + np.arange(size)
                score[a : a + rows] = self.score(neural[at], talkers[:, at].swapaxes(0, 1))
        windows = trial.attended[starts[:, None] + np.arange(size)]
        who = np.where((windows == windows[:, :1]).all(axis=1), windows[:, 0], -1)
        n = len(starts)
        return xr.Dataset(
            {"score": (("window", "talker"), score)},
            coords={
                "length": ("window", np.full(n, float(length)), {"units": "s"}),
                "start": ("window", (trial.offset + starts) / self.sampling_rate_, {"units": "s"}),
                "trial": ("window", np.full(n, trial.name, dtype=object)),
                "subject": ("window", np.full(n, trial.subject, dtype=object)),
                "attended": ("window", who),
            },
        )

    def _check_like(self, trial: ListeningTrial) -> None:
        if trial.neural.shape[1] != self.n_channels_ or trial.sampling_rate != self.sampling_rate_:
            raise SchemaError(
                f"Trial {trial.name!r} has {trial.neural.shape[1]} channels at "
                f"{trial.sampling_rate} Hz; the decoder was fitted to {self.n_channels_} at "
                f"{self.sampling_rate_} Hz."
            )


def window_samples(length: float, hop: float | None, sampling_rate: float) -> tuple[int, int]:
    """Return samples of a window and from window to window, both at least 1 (a window 2)."""
    size = round(length * sampling_rate)
    step = size if hop is None else round(hop * sampling_rate)
    if size < 2 or step < 1:
        raise ConfigError(
            f"Windows of {length} s every {hop} s at {sampling_rate} Hz are {size} samples every "
            f"{step}; expected at least 2 and 1."
        )
    return size, step


def windowed_correlation(
    first: NDArray[np.floating], second: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Pearson correlation over the samples of each window, 0 where one is constant.

    Parameters
    ----------
    first, second : ndarray, shape (..., n_samples, n_components)

    Returns
    -------
    ndarray, shape (..., n_components)
    """
    a = first - first.mean(axis=-2, keepdims=True, dtype=np.float64)
    b = second - second.mean(axis=-2, keepdims=True, dtype=np.float64)
    norm = np.sqrt((a * a).sum(axis=-2) * (b * b).sum(axis=-2))
    product = (a * b).sum(axis=-2)
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 0)


class _Scale(NamedTuple):
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]

    @classmethod
    def of(cls, arrays: Iterable[NDArray[np.floating]]) -> _Scale:
        n, total, square = 0, 0.0, 0.0
        listed = list(arrays)
        for a in listed:
            n, total = n + len(a), total + a.sum(axis=0, dtype=np.float64)
        mean = np.asarray(total / n)
        for a in listed:
            square = square + ((a - mean) ** 2).sum(axis=0)
        sd = np.sqrt(square / n)
        return cls(mean, np.where(sd > 0, sd, 1.0))

    def __call__(self, a: NDArray[np.floating]) -> NDArray[np.float64]:
        return (a - self.mean) / self.sd


class StimulusReconstruction(AttentionDecoder):
    r"""Reconstruct the attended talker's features from the recording, and compare all talkers'.

    .. math:: \hat x_f(t) = b_f + \sum_{c, l} w_{f c l}\, y_c(t + l), \qquad
              s_k = \frac1F \sum_f \operatorname{corr}_t(\hat x_f, x^k_f)

    for each talker k. With the envelope it is the linear decoder of the field; with a mel
    spectrogram, spectrogram reconstruction. The penalty is chosen by cross-validation over the
    trials of the fit.

    Parameters
    ----------
    space : str
        Feature space that is reconstructed.
    tmin, tmax : float
        First and last delay of the recording after the sound, seconds.
    alphas : float or sequence of float
        Penalties that are tried, on data of variance 1.
    cv : int, "trials", TimeBlocks ..., optional
        As for `brainalign.linear.LaggedRidge`; by default pieces of one trial stay together.
    n_channels : int, optional
        Keep the channels that a forward model of the same trials predicts best.
    device : str
        As for `brainalign.linear.LaggedRidge`.

    Attributes
    ----------
    model_ : LaggedRidge
    channels_ : ndarray of int
        Channels that are used.

    References
    ----------
    O'Sullivan et al. (2015), Cerebral Cortex 25, 1697-1706.
    """

    def __init__(
        self,
        space: str = "envelope",
        *,
        tmin: float = 0.0,
        tmax: float = 0.4,
        alphas: float | Sequence[float] = ALPHAS,
        cv: Any = None,
        n_channels: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.space = space
        self.tmin = tmin
        self.tmax = tmax
        self.alphas = alphas
        self.cv = cv
        self.n_channels = n_channels
        self.device = device

    def _fit(self, trials: list[ListeningTrial]) -> None:
        self.channels_ = np.arange(self.n_channels_)
        if self.n_channels is not None and self.n_channels < self.n_channels_:
            forward = ForwardResponse(
                [self.space], tmin=self.tmin, tmax=self.tmax, alphas=self.alphas, cv=self.cv,
                device=self.device,
            ).fit(trials)  # fmt: skip
            self.channels_ = np.sort(
                np.argsort(-forward.weights_, kind="stable")[: self.n_channels]
            )
        n_lags = len(delays(self.tmin, self.tmax, self.sampling_rate_))
        check_size(len(self.channels_), n_lags, sum(len(t.neural) for t in trials))
        self.neural_scale_ = _Scale.of(t.neural[:, self.channels_] for t in trials)
        features = [t.attended_features(self.space) for t in trials]
        self.feature_scale_ = _Scale.of(features)
        self.model_ = LaggedRidge(
            self.tmin, self.tmax, self.sampling_rate_, alphas=self.alphas,
            cv=_folds(self.cv, trials), direction="backward", metric="r", dtype="float64",
            device=self.device,
        )  # fmt: skip
        self.model_.fit(
            [self.neural_scale_(t.neural[:, self.channels_]) for t in trials],
            [self.feature_scale_(f) for f in features],
        )

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and after a sample that its projection needs."""
        return _reach(self.model_.lags_)

    def project(self, trial: ListeningTrial) -> Projection:
        """Return the reconstruction, and every talker's features."""
        rebuilt = self.model_.predict(self.neural_scale_(trial.neural[:, self.channels_]))
        return Projection(rebuilt, self.feature_scale_(trial.space(self.space)))

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the mean correlation over features; see `AttentionDecoder.score`."""
        return windowed_correlation(neural[:, None], talkers).mean(axis=2)


class ForwardResponse(AttentionDecoder):
    r"""Predict the recording from each talker, and compare the predictions with it.

    .. math:: \hat y^k_c(t) = b_c + \sum_{f, l} w_{c f l}\, x^k_f(t - l), \qquad
              s_k = \sum_c v_c \operatorname{corr}_t(\hat y^k_c, y_c) \Big/ \sum_c v_c

    with w fitted to the attended talker (temporal response functions), and channels weighted by
    their cross-validated correlation :math:`v_c` where it is above 0. Several feature spaces have a
    penalty each (banded ridge).

    Parameters
    ----------
    spaces : sequence of str
        Feature spaces that predict together.
    tmin, tmax : float
        First and last delay, seconds.
    alphas : float or sequence of float
        Penalties that are tried. A single one leaves all channels at weight 1.
    cv : int, "trials", TimeBlocks ..., optional
        As for `brainalign.linear.LaggedRidge`; by default pieces of one trial stay together.
    n_iter : int
        Weights of the spaces that are tried, if there are several.
    seed : int
        Of these.
    device : str
        As for `brainalign.linear.LaggedRidge`.

    Attributes
    ----------
    model_ : LaggedRidge
        Its `coef_` are the response functions, (n_channels, n_features, n_lags).
    weights_ : ndarray, shape (n_channels,)

    References
    ----------
    Crosse et al. (2016), Frontiers in Human Neuroscience 10, 604.
    """

    def __init__(
        self,
        spaces: Sequence[str] = ("envelope",),
        *,
        tmin: float = 0.0,
        tmax: float = 0.4,
        alphas: float | Sequence[float] = ALPHAS,
        cv: Any = None,
        n_iter: int = 20,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.spaces = spaces
        self.tmin = tmin
        self.tmax = tmax
        self.alphas = alphas
        self.cv = cv
        self.n_iter = n_iter
        self.seed = seed
        self.device = device

    def _fit(self, trials: list[ListeningTrial]) -> None:
        if isinstance(self.spaces, str) or not self.spaces:
            raise ConfigError(f"spaces is {self.spaces!r}; expected a list of feature spaces.")
        labels = np.repeat(self.spaces, [trials[0].space(s).shape[2] for s in self.spaces])
        self.neural_scale_ = _Scale.of(t.neural for t in trials)
        features = [
            np.concatenate([t.attended_features(s) for s in self.spaces], axis=1) for t in trials
        ]
        self.feature_scale_ = _Scale.of(features)
        self.model_ = LaggedRidge(
            self.tmin, self.tmax, self.sampling_rate_, alphas=self.alphas,
            cv=_folds(self.cv, trials), spaces=labels.tolist(), n_iter=self.n_iter, seed=self.seed,
            metric="r", dtype="float64", device=self.device,
        )  # fmt: skip
        self.model_.fit(
            [self.feature_scale_(f) for f in features],
            [self.neural_scale_(t.neural) for t in trials],
        )
        found = getattr(self.model_, "best_score_", np.ones(self.n_channels_))
        weights = np.nan_to_num(found).clip(min=0)
        self.weights_ = weights if weights.any() else np.ones_like(weights)

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and after a sample that its projection needs."""
        return _reach(self.model_.lags_)

    def project(self, trial: ListeningTrial) -> Projection:
        """Return the recording, and its prediction from every talker."""
        features = np.concatenate([trial.space(s) for s in self.spaces], axis=2)
        predicted = self.model_.predict(list(self.feature_scale_(features)))
        return Projection(self.neural_scale_(trial.neural), np.stack(predicted))

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the weighted mean correlation over channels; see `AttentionDecoder.score`."""
        r = windowed_correlation(neural[:, None], talkers)
        return r @ (self.weights_ / self.weights_.sum())


class CanonicalCorrelation(AttentionDecoder):
    r"""Correlate components of the recording and of each talker; a discriminant weighs them.

    Filters u of the recording and v of the attended talker maximise
    :math:`\operatorname{corr}(\sum u_{cl}\, y_c(t + l), \sum v_{fl}\, x_f(t - l))` in turn. In a
    window each talker has a vector :math:`r^k` of correlations, one per component, and scores

    .. math:: s_k = w' r^k, \qquad w = \operatorname{cov}(d)^{-1} \bar d, \qquad
              d = r^{att} - r^{other} ,

    linear discriminant analysis of d against -d, with d from windows of the same length of trials
    that the filters of an inner fold have not seen.

    Parameters
    ----------
    space : str
        Feature space of the talkers.
    n_components : int
        At most; as many as there are otherwise.
    tmax : float
        Last delay of the recording after the sound, seconds.
    sound_span : float
        Seconds of the sound that a filter spans.
    shrinkage : float
        Ridge of both covariances, as a share of their mean variance.
    n_folds : int
        Inner folds over the trials of the fit.
    seed : int
        Of the inner folds.

    Attributes
    ----------
    correlations_ : ndarray, shape (n_components,)
        In the trials of the fit.

    References
    ----------
    de Cheveigné et al. (2018), NeuroImage 172, 206-216.
    Geirnaert et al. (2021), IEEE Signal Processing Magazine 38(4), 89-102.
    """

    def __init__(
        self,
        space: str = "envelope",
        *,
        n_components: int = 10,
        tmax: float = 0.25,
        sound_span: float = 1.2,
        shrinkage: float = 0.01,
        n_folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.space = space
        self.n_components = n_components
        self.tmax = tmax
        self.sound_span = sound_span
        self.shrinkage = shrinkage
        self.n_folds = n_folds
        self.seed = seed

    def _fit(self, trials: list[ListeningTrial]) -> None:
        if not self.shrinkage >= 0 or self.n_components < 1:
            raise ConfigError(
                f"shrinkage={self.shrinkage}, n_components={self.n_components}; expected at least "
                "0 and 1."
            )
        rate = self.sampling_rate_
        self.neural_lags_ = -delays(0, self.tmax, rate)[::-1]
        self.sound_lags_ = delays(0, self.sound_span, rate)
        check_size(self.n_channels_, len(self.neural_lags_))
        self.neural_scale_ = _Scale.of(t.neural for t in trials)
        features = [t.attended_features(self.space) for t in trials]
        self.feature_scale_ = _Scale.of(features)
        sums = [self._sums(t.neural, f) for t, f in zip(trials, features, strict=True)]
        self._held: list[tuple[Projection, ListeningTrial]] = []
        self._weights: dict[int, NDArray[np.float64]] = {}
        for train, test in _inner(trials, self.n_folds, self.seed):
            self._filters([sums[i] for i in train])
            self._held += [(self.project(trials[i]), trials[i]) for i in test]
        self._filters(sums)

    def _sums(
        self, neural: NDArray[np.floating], features: NDArray[np.floating]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gram matrices of delayed recording and delayed sound, and their products."""
        y = torch.as_tensor(self.neural_scale_(neural))
        x = torch.as_tensor(self.feature_scale_(features))
        return (
            lagged_gram([y], self.neural_lags_),
            lagged_gram([x], self.sound_lags_),
            lagged_cross([y], [delayed(x, self.sound_lags_)], self.neural_lags_),
        )

    def _filters(self, sums: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        # Data of mean 0; what a delay pushes over a trial's end is too little to centre again.
        inner, outer, cross = (torch.stack(parts).sum(dim=0) for parts in zip(*sums, strict=True))
        whiten = []
        for gram in (inner, outer):
            gram.diagonal().add_(self.shrinkage * gram.diagonal().mean())
            whiten.append(torch.linalg.cholesky(gram))
        left = torch.linalg.solve_triangular(whiten[0], cross, upper=False)
        both = torch.linalg.solve_triangular(whiten[1], left.T, upper=False).T
        u, s, vt = torch.linalg.svd(both, full_matrices=False)
        n = min(self.n_components, len(s))
        filters = [
            torch.linalg.solve_triangular(w.T, f[:, :n].contiguous(), upper=True)
            for w, f in zip(whiten, (u, vt.T), strict=True)
        ]
        self.correlations_ = s[:n].numpy()
        shapes = ((-1, len(self.neural_lags_)), (-1, len(self.sound_lags_)))
        self.neural_filters_, self.sound_filters_ = (
            f.T.reshape(n, *shape).contiguous() for f, shape in zip(filters, shapes, strict=True)
        )

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and after a sample that its projection needs."""
        return _reach(np.concatenate([self.neural_lags_, self.sound_lags_]))

    def project(self, trial: ListeningTrial) -> Projection:
        """Return the components of the recording and of every talker."""
        zero = torch.zeros(len(self.neural_filters_), dtype=torch.float64)
        neural = lagged_predict(
            torch.as_tensor(self.neural_scale_(trial.neural)), self.neural_filters_,
            self.neural_lags_, zero,
        )  # fmt: skip
        talkers = [
            lagged_predict(torch.as_tensor(f), self.sound_filters_, self.sound_lags_, zero).numpy()
            for f in self.feature_scale_(trial.space(self.space))
        ]
        return Projection(neural.numpy(), np.stack(talkers))

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the discriminant of the correlations; see `AttentionDecoder.score`."""
        size = neural.shape[1]
        if size not in self._weights:
            self._weights[size] = self._discriminant(size)
        return windowed_correlation(neural[:, None], talkers) @ self._weights[size]

    def _discriminant(self, size: int) -> NDArray[np.float64]:
        """Weights of the components for windows of some samples."""
        differences = []
        for (neural, talkers), trial in self._held:
            for start in range(0, len(neural) - size + 1, size):
                part = slice(start, start + size)
                who = trial.attended[start]
                if (trial.attended[part] == who).all():
                    r = windowed_correlation(neural[None, part], talkers[:, part])
                    differences += [r[who] - r[k] for k in range(len(r)) if k != who]
        n = len(self.correlations_)
        if len(differences) <= n + 1:
            # Too few windows to tell the components' reliability apart.
            return np.asarray(self.correlations_ / self.correlations_.sum())
        d = np.array(differences)
        covariance = np.atleast_2d(np.cov(d, rowvar=False))
        covariance += 1e-3 * np.trace(covariance) / n * np.eye(n)
        return np.linalg.solve(covariance, d.mean(axis=0))


class TalkerCluster(AttentionDecoder):
    r"""Tell from the recording alone what kind of voice is attended: a recurrent network.

    The voices of the training trials' talkers are clustered (k-means, centres :math:`\mu_c`). A
    bidirectional LSTM maps a window of the recording on probabilities :math:`p_c` of the attended
    talker's cluster (cross-entropy), and a talker with voice v scores

    .. math:: s_k = - \sum_c p_c \|v_k - \mu_c\|^2 ,

    so that two talkers of one cluster are still told apart by their distance to the others.

    Parameters
    ----------
    n_clusters : int
        Clusters; there must be as many different voices.
    length : float
        Windows of the training, seconds. It scores windows of any length.
    hidden : int
        Units in each direction.
    epochs, batch_size : int
        Of the training; in each epoch a window is drawn around every place of every trial.
    learning_rate, weight_decay, dropout : float
        Of the training (AdamW).
    stride : int
        Samples that are averaged into one step of the network.
    seed : int
        Of clusters, initial weights, order and dropout.

    Attributes
    ----------
    centres_ : ndarray, shape (n_clusters, n_dimensions)
    losses_ : ndarray, shape (epochs,)
        Mean cross-entropy of the training.

    References
    ----------
    Jiang et al. (2025), ACL (AAD-LLM): clusters of talkers, K = 8.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        length: float = 2.0,
        hidden: int = 32,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        dropout: float = 0.2,
        stride: int = 4,
        seed: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.length = length
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.stride = stride
        self.seed = seed

    def _fit(self, trials: list[ListeningTrial]) -> None:
        from sklearn.cluster import KMeans

        voices = np.concatenate([_voices(t) for t in trials])
        different = len(np.unique(voices, axis=0))
        if different < self.n_clusters:
            raise ConfigError(
                f"{self.n_clusters} clusters need as many different voices; there are {different}.",
                f"Give n_clusters of at most {different}.",
            )
        found = KMeans(self.n_clusters, n_init=10, random_state=self.seed).fit(voices)
        self.centres_ = found.cluster_centers_.astype(np.float64)
        self.neural_scale_ = _Scale.of(t.neural for t in trials)
        size, _ = window_samples(self.length, None, self.sampling_rate_)
        if all(len(t.neural) < size for t in trials):
            raise ConfigError(f"No trial holds a window of {self.length} s.", "Shorten length.")
        data = [torch.as_tensor(self.neural_scale_(t.neural).astype(np.float32)) for t in trials]
        labels = [found.predict(_voices(t).astype(voices.dtype)) for t in trials]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = _Recurrent(
                self.n_channels_, self.hidden, self.n_clusters, self.dropout, self.stride
            )
            self.losses_ = self._train(trials, data, labels, size)
        self.network_.eval()

    def _train(
        self,
        trials: list[ListeningTrial],
        data: list[torch.Tensor],
        labels: list[NDArray[np.int64]],
        size: int,
    ) -> NDArray[np.float64]:
        rng = np.random.default_rng(self.seed)
        optimiser = torch.optim.AdamW(
            self.network_.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        losses = []
        for _ in tqdm(range(self.epochs), desc="BiLSTM", disable=None, leave=False):
            drawn = []
            for i, trial in enumerate(trials):
                last = len(trial.neural) - size
                for place in range(0, last + 1, size):
                    start = int(np.clip(place + rng.integers(-size // 2, size // 2 + 1), 0, last))
                    part = trial.attended[start : start + size]
                    if (part == part[0]).all():
                        drawn.append((i, start, int(labels[i][part[0]])))
            order = rng.permutation(len(drawn))
            total = 0.0
            for a in range(0, len(order), self.batch_size):
                batch = [drawn[j] for j in order[a : a + self.batch_size]]
                x = torch.stack([data[i][s : s + size] for i, s, _ in batch])
                target = torch.tensor([c for *_, c in batch])
                loss = torch.nn.functional.cross_entropy(self.network_(x), target)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network_.parameters(), 1.0)
                optimiser.step()
                total += loss.item() * len(batch)
            losses.append(total / max(1, len(order)))
        return np.array(losses)

    def project(self, trial: ListeningTrial) -> Projection:
        """Return the recording, and every talker's squared distances to the clusters."""
        away = ((_voices(trial)[:, None] - self.centres_) ** 2).sum(axis=2)
        n = len(trial.neural)
        talkers = np.broadcast_to(away[:, None], (len(away), n, self.n_clusters))
        return Projection(self.neural_scale_(trial.neural).astype(np.float32), talkers)

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return minus the expected squared distance; see `AttentionDecoder.score`."""
        with torch.inference_mode():
            logits = self.network_(torch.as_tensor(np.ascontiguousarray(neural)))
            p = torch.softmax(logits.double(), dim=1).numpy()
        return -np.einsum("wc,wkc->wk", p, talkers[:, :, 0])


class _Recurrent(torch.nn.Module):
    """Average over a stride, bidirectional LSTM, mean over time, linear."""

    def __init__(
        self, channels: int, hidden: int, classes: int, dropout: float, stride: int
    ) -> None:
        super().__init__()
        self.stride = stride
        self.lstm = torch.nn.LSTM(channels, hidden, batch_first=True, bidirectional=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.out = torch.nn.Linear(2 * hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stride = min(self.stride, x.shape[1])
        x = torch.nn.functional.avg_pool1d(x.transpose(1, 2), stride).transpose(1, 2)
        states, _ = self.lstm(x)
        return self.out(self.dropout(states.mean(dim=1)))


class Oracle(AttentionDecoder):
    """Know who is attended: the ceiling for what comes after a decoder.

    The score of a talker is the share of the window in which he or she is attended.
    """

    def _fit(self, trials: list[ListeningTrial]) -> None:
        pass

    def project(self, trial: ListeningTrial) -> Projection:
        """Return nothing of the recording, and 1 where a talker is attended."""
        attended = trial.attended == np.arange(trial.n_talkers)[:, None]
        return Projection(np.empty((len(trial.neural), 0)), attended[:, :, None].astype(float))

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return the share of the window; see `AttentionDecoder.score`."""
        return talkers[..., 0].mean(axis=2)


def make_splits(
    trials: Sequence[ListeningTrial],
    by: str = "trial",
    *,
    n_folds: int | None = None,
    seed: int = 0,
) -> list[Split]:
    """Leave out trials or subjects.

    Parameters
    ----------
    trials : sequence of ListeningTrial
        All of them.
    by : {"trial", "subject"}
        "trial" leaves out one trial, trained on the others of the same subject; "subject" leaves
        out all trials of one subject.
    n_folds : int, optional
        Folds of about as many trials (or subjects) in place of single ones.
    seed : int
        Of these folds.

    Returns
    -------
    list of (train, test)
        Indices of trials.

    Raises
    ------
    ConfigError
        For another `by`, or if there are too few trials or subjects.
    """
    subject = np.array([t.subject for t in trials])
    if by not in ("trial", "subject"):
        raise ConfigError(f"by is {by!r}; expected 'trial' or 'subject'.")
    if by == "subject":
        n = len(np.unique(subject)) if n_folds is None else n_folds
        return by_group(subject, n, seed)
    splits: list[Split] = []
    for name in np.unique(subject):
        own = np.flatnonzero(subject == name)
        if len(own) < 2:
            raise ConfigError(f"Subject {name!r} has one trial: none is left to train on.")
        if n_folds is None:
            splits += [(np.delete(own, i), own[i : i + 1]) for i in range(len(own))]
        else:
            pairs = by_group(np.arange(len(own)), n_folds, seed)
            splits += [(own[train], own[test]) for train, test in pairs]
    return splits


def cross_validate(
    decoder: AttentionDecoder,
    trials: Sequence[ListeningTrial],
    lengths: Sequence[float] = (1, 2, 5, 10, 20, 40),
    *,
    splits: str | Sequence[Split] = "trial",
    hop: float | None = None,
    allow_leak: bool = False,
) -> xr.Dataset:
    """Score windows of trials that the decoder was not fitted to.

    All windows of a trial fall on one side of a split. What is chosen from data (penalties,
    channels, the discriminant, clusters) is chosen within the training trials.

    Parameters
    ----------
    decoder : AttentionDecoder
        A clone is fitted for every split.
    trials : sequence of ListeningTrial
        All of them.
    lengths : sequence of float
        Lengths of windows, seconds.
    splits : {"trial", "subject"} or sequence of (train, test)
        See `make_splits`.
    hop : float, optional
        Seconds from window to window; by default they do not overlap.
    allow_leak : bool
        Accept that training and test trials share a stretch of sound or of recording, bit by bit;
        then it is logged. Stories that all listeners hear are the common case.

    Returns
    -------
    xarray.Dataset
        As `AttentionDecoder.score_windows` gives, of all lengths and trials; for
        `brainalign.auditory.evaluation.accuracy_curve`. In attrs the name of the ``decoder``, and
        the ``look_ahead``: seconds after a window that it takes.

    Raises
    ------
    LeakError
        If training and test trials share content and it is not allowed.

    Warns
    -----
    AlphaEdgeWarning
        Once, if fits choose an end of the grid of penalties.
    """
    _check_together(trials)
    pairs = make_splits(trials, splits) if isinstance(splits, str) else list(splits)
    check_leak(pairs, content_groups(trials), allow=allow_leak)
    parts, look_ahead = [], 0.0
    with edges_said_once(len(pairs)):
        for train, test in tqdm(pairs, desc=type(decoder).__name__, disable=None, leave=False):
            fitted = clone(decoder).fit([trials[i] for i in train])
            look_ahead = fitted.reach[1] / fitted.sampling_rate_
            held_out = [trials[i] for i in test]
            parts += [fitted.score_windows(held_out, length, hop=hop) for length in lengths]
    scores = xr.concat(parts, dim="window", coords="minimal")
    return scores.assign_attrs(decoder=type(decoder).__name__, look_ahead=look_ahead)


@contextmanager
def edges_said_once(n_fits: int) -> Iterator[None]:
    """Gather the warnings of penalties at an end of the grid, which every fit gives, into one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AlphaEdgeWarning)
        try:
            yield
        finally:
            edges = [w for w in caught if issubclass(w.category, AlphaEdgeWarning)]
            others = [w for w in caught if w not in edges]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    if edges:
        warnings.warn(
            f"In {n_fits} fits {len(edges)} times, and first: {edges[0].message}",
            AlphaEdgeWarning,
            stacklevel=4,
        )


def calibrate(
    decoder: AttentionDecoder,
    trials: Sequence[ListeningTrial],
    length: float,
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> float:
    r"""Find the slope that turns a decoder's scores into probabilities.

    .. math:: P(k) = e^{b s_k} \Big/ \sum_j e^{b s_j}

    b maximises the likelihood of the attended talker in windows of held-out trials, with Platt's
    prior of one window of either outcome, so that it stays finite.

    Parameters
    ----------
    decoder : AttentionDecoder
        A clone is fitted for every fold.
    trials : sequence of ListeningTrial
        Training trials.
    length : float
        Of the windows, seconds.
    n_folds : int
        Folds over trials that share no content.
    seed : int
        Of the folds.

    Returns
    -------
    float
        b, at least 0.
    """
    from scipy.optimize import minimize_scalar

    found = cross_validate(
        decoder, trials, [length], splits=_inner(trials, n_folds, seed), allow_leak=True
    )
    found = found.isel(window=np.flatnonzero(found["attended"].values >= 0))
    score, who = found["score"].values, found["attended"].values
    own = np.take_along_axis(score, who[:, None], 1)
    margin = (own - score)[np.arange(score.shape[1]) != who[:, None]]
    scale = np.sqrt((margin**2).mean())
    if not scale > 0:
        return 0.0
    margin = margin / scale
    share = (len(margin) + 1) / (len(margin) + 2)

    def loss(b: float) -> float:
        right, wrong = np.logaddexp(0, -b * margin), np.logaddexp(0, b * margin)
        return float((share * right + (1 - share) * wrong).mean())

    return float(minimize_scalar(loss, bounds=(0, 100), method="bounded").x / scale)


def check_size(n_channels: int, n_lags: int, n_samples: int | None = None) -> None:
    """Say before the work starts that a backward model would not fit into memory.

    With `n_samples` the products between samples serve where they are fewer.
    """
    size = n_channels * n_lags if n_samples is None else min(n_channels * n_lags, n_samples)
    need, free = _GRAMS * 8.0 * size**2, free_bytes()
    if need > free:
        raise ConfigError(
            f"A backward model of {n_channels} channels and {n_lags} delays holds {_GRAMS} "
            f"matrices of {size} x {size}, {readable(need)}; {readable(free)} are free.",
            "Use fewer channels (n_channels), fewer delays or a lower sampling rate.",
        )


def _reach(lags: ArrayLike) -> tuple[int, int]:
    values = np.asarray(lags)
    return max(0, int(values.max())), max(0, int(-values.min()))


def _voices(trial: ListeningTrial) -> NDArray[np.float64]:
    if trial.voices is None:
        raise SchemaError(
            f"Trial {trial.name!r} has no voices.",
            "Give each talker a vector, such as an x-vector.",
        )
    return np.asarray(trial.voices, dtype=np.float64)


def _check_together(trials: Sequence[ListeningTrial]) -> None:
    if not trials:
        raise SchemaError("There are no trials.")
    kinds = {
        (t.neural.shape[1], float(t.sampling_rate), t.n_talkers,
         tuple((name, f.shape[2]) for name, f in sorted(t.features.items())))
        for t in trials
    }  # fmt: skip
    if len(kinds) > 1:
        raise SchemaError(
            f"Trials differ in channels, rate, talkers or features: {sorted(kinds, key=str)[:3]}."
        )


def _folds(cv: Any, trials: Sequence[ListeningTrial]) -> Any:
    """Return folds that leave pieces of one trial together, if no others are given."""
    labels = trial_labels(trials)
    n = len(np.unique(labels))
    return cv if cv is not None or n in (1, len(trials)) else by_group(labels, min(5, n), 0)


def _inner(trials: Sequence[ListeningTrial], n_folds: int, seed: int) -> list[Split]:
    """Folds of training trials.

    Those that share content and pieces of one trial are together, where that leaves two sides.
    """
    if len(trials) < 2:
        raise ConfigError(
            "There is one training trial, and what is chosen needs held-out ones.",
            "Cut long recordings into trials (ListeningTrial.cut).",
        )
    groups = content_groups(trials, whole=True)
    if len(np.unique(groups)) < 2:
        groups = np.arange(len(trials)).astype(str)
    return by_group(groups, min(n_folds, len(np.unique(groups))), seed)
