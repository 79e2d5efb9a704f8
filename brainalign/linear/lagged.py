r"""Ridge regression on delayed copies of the data: FIR models and temporal response functions.

The model of a target with delays l is

.. math:: \hat y_s = b + \sum_f \sum_l w_{fl} x_{s-l,f} ,

where samples before the start and after the end of a trial are 0. The delayed data are never formed
as a whole. Their Gram matrix is nearly block Toeplitz: the sums over samples ``start .. stop - 1``
for one pair of delays give those for both delays one step later by

.. math:: G_{l+1, m+1} = G_{l, m} + x_{start-1-l} x_{start-1-m}' - x_{stop-1-l} x_{stop-1-m}' ,

which is exact. So one row of blocks and the samples at both ends are all it takes. Scores in
cross-validation follow from Gram matrices of the test samples, without predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import BaseCrossValidator, KFold, LeaveOneOut, check_cv
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor
from tqdm.auto import tqdm

from brainalign.device import resolve_device
from brainalign.errors import ConfigError
from brainalign.evaluation.scores import pearson_r, r2
from brainalign.linear.banded import Spaces, feature_spaces, sample_gammas, warn_spanned
from brainalign.linear.ridge import check_alphas, check_finite, warn_edges
from brainalign.linear.solvers import choose_alpha, eigh

__all__ = [
    "LaggedRidge",
    "TimeBlocks",
    "delayed",
    "delays",
    "lagged_cross",
    "lagged_gram",
    "lagged_kernel",
    "lagged_predict",
]

#: Sums over many samples: larger than those of `Ridge`.
DEFAULT_ALPHAS = tuple(float(a) for a in np.logspace(-1, 7, 17))
#: Elements of a temporary piece of the delayed data.
PIECE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
#: Fewest samples of the targets that are worked on at once.
TARGET_ROWS = 4096
#: Columns of the smaller delayed side from which cross-covariances are cheaper by FFT, on a CPU.
FFT_COLUMNS = {torch.float32: 500, torch.float64: 250}
#: Fewest delays for the same.
FFT_LAGS = 16
#: Targets of one FFT batch, and the most samples that are transformed at once.
FFT_TARGETS, FFT_SAMPLES = 32, 2**16
#: Most elements of spectra that are summed before they are turned back into delays.
SPECTRUM_ELEMENTS = 2**24
#: Elements of the cross-covariances of all parts of the data that are held at once.
CROSS_ELEMENTS = 2**27

TRAIN, TEST = 1, 2


def delays(tmin: float, tmax: float, sampling_rate: float) -> NDArray[np.int64]:
    """Delays in samples from `tmin` to `tmax`, both included.

    Parameters
    ----------
    tmin, tmax : float
        First and last delay in seconds; a positive delay relates data to later targets. The range
        is widened to whole samples.
    sampling_rate : float
        Samples per second.

    Returns
    -------
    ndarray of int, shape (n_lags,)

    Raises
    ------
    ConfigError
        If `tmax` is before `tmin`, or the rate is not above 0.

    Examples
    --------
    >>> delays(-0.02, 0.03, 100).tolist()
    [-2, -1, 0, 1, 2, 3]
    """
    if not (np.isfinite(sampling_rate) and sampling_rate > 0):
        raise ConfigError(f"sampling_rate is {sampling_rate!r}; expected samples per second, > 0.")
    if not (np.isfinite([tmin, tmax]).all() and tmin <= tmax):
        raise ConfigError(f"tmin={tmin!r} and tmax={tmax!r} s; expected finite, tmin <= tmax.")
    # 0.29 s at 100 Hz is sample 29, though the product is 28.999999999999996.
    first = math.floor(round(tmin * sampling_rate, 6))
    last = math.ceil(round(tmax * sampling_rate, 6))
    return np.arange(first, last + 1, dtype=np.int64)


def delayed(X: Tensor, lags: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Delayed copies of one trial, side by side; zeros where a delay reaches out of the trial.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        One trial.
    lags : sequence of int, shape (n_lags,)
        Delays in samples; below 0 for copies that run ahead.

    Returns
    -------
    Tensor, shape (n_samples, n_features * n_lags)
        Column ``f * n_lags + i`` holds feature f, delayed by ``lags[i]``.
    """
    return _delayed(X, _checked_lags(lags), 0, len(X)).flatten(1)


def lagged_gram(trials: Sequence[Tensor], lags: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Sum over trials of ``delayed(X, lags).T @ delayed(X, lags)``, without the delayed data.

    Parameters
    ----------
    trials : sequence of Tensor, shape (n_samples, n_features)
        Trials of any lengths.
    lags : sequence of int, shape (n_lags,)
        Delays in samples.

    Returns
    -------
    Tensor, shape (n_features * n_lags, n_features * n_lags), float64
    """
    lags = _checked_lags(lags)
    return _gram([(x, 0, len(x)) for x in trials], lags)


def lagged_cross(
    X: Sequence[Tensor], Y: Sequence[Tensor], lags: Sequence[int] | NDArray[np.int64]
) -> Tensor:
    """Sum over trials of ``delayed(X, lags).T @ Y``, without the delayed data.

    Parameters
    ----------
    X : sequence of Tensor, shape (n_samples, n_features)
        Trials.
    Y : sequence of Tensor, shape (n_samples, n_targets)
        The same trials.
    lags : sequence of int, shape (n_lags,)
        Delays in samples.

    Returns
    -------
    Tensor, shape (n_features * n_lags, n_targets), float64
        Products of float32 data are float32; sums of them float64.
    """
    lags = _checked_lags(lags)
    cross = _Cross(lags)
    for x, y in zip(X, Y, strict=True):
        cross.add(x, y, 0)
    return cross.total()


def lagged_kernel(trials: Sequence[Tensor], lags: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Products between all delayed samples of all trials: the kernel form of `lagged_gram`.

    Parameters
    ----------
    trials : sequence of Tensor, shape (n_samples, n_features)
        Trials of any lengths.
    lags : sequence of int, shape (n_lags,)
        Delays in samples.

    Returns
    -------
    Tensor, shape (n_all_samples, n_all_samples), float64
        ``D @ D.T`` with ``D`` the delayed trials on top of each other.
    """
    lags = _checked_lags(lags)
    X = torch.cat([x.double() for x in trials])
    plain = X @ X.T
    out = torch.zeros_like(plain)
    starts = np.cumsum([0, *(len(x) for x in trials)])
    for i, a in enumerate(starts[:-1]):
        for j, b in enumerate(starts[:-1]):
            n, m = len(trials[i]), len(trials[j])
            source, target = plain[a : a + n, b : b + m], out[a : a + n, b : b + m]
            for lag in lags.tolist():
                forth, back = max(lag, 0), max(-lag, 0)
                if forth + back < min(n, m):
                    target[forth : n - back, forth : m - back] += source[
                        back : n - forth, back : m - forth
                    ]
    return out


def lagged_predict(
    X: Tensor, coef: Tensor, lags: Sequence[int] | NDArray[np.int64], intercept: Tensor
) -> Tensor:
    """Predict one trial, piece by piece.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        One trial.
    coef : Tensor, shape (n_targets, n_features, n_lags)
        Coefficients.
    lags : sequence of int, shape (n_lags,)
        Delays in samples.
    intercept : Tensor, shape (n_targets,)
        Added to the prediction.

    Returns
    -------
    Tensor, shape (n_samples, n_targets)
    """
    lags = _checked_lags(lags)
    weights = coef.flatten(1).T
    out = X.new_empty((len(X), len(coef)))
    for a, b in _pieces(len(X), len(weights), X.device):
        out[a:b] = torch.addmm(intercept, _delayed(X, lags, a, b).flatten(1), weights)
    return out


@dataclass(frozen=True)
class TimeBlocks:
    """Folds over time: block k of every trial is held out, with a gap on both sides of it.

    The samples of the gap are used neither for training nor for testing. Use it for one long
    recording, or where trials share a stimulus, so that holding out a trial would hide nothing.

    Parameters
    ----------
    n_blocks : int
        Blocks per trial, about equally long; also the number of folds.
    gap : float, optional
        Seconds; by default the span of the delays, so that no sample of X serves a training and a
        test row both. It cannot be shorter. Make it longer where noise is correlated for longer.
    """

    n_blocks: int = 5
    gap: float | None = None

    def roles(self, lengths: Sequence[int], span: int, sampling_rate: float) -> list[list[Any]]:
        """Tell what each sample is in each fold: 1 train, 2 test, 0 neither.

        Parameters
        ----------
        lengths : sequence of int
            Samples of each trial.
        span : int
            Last delay minus first, in samples.
        sampling_rate : float
            Samples per second.

        Returns
        -------
        list (folds) of list (trials) of ndarray of int8, shape (n_samples,)

        Raises
        ------
        ConfigError
            For a gap that leaks, or trials that are too short for it.
        """
        if self.n_blocks < 2:
            raise ConfigError(f"n_blocks is {self.n_blocks}; expected at least 2.")
        gap = span if self.gap is None else round(self.gap * sampling_rate)
        if gap < span:
            raise ConfigError(
                f"gap is {self.gap} s, shorter than the {span / sampling_rate:g} s that the delays "
                "span: training and test rows would share samples.",
                "Leave gap out, or make it longer.",
            )
        folds: list[list[Any]] = []
        for k in range(self.n_blocks):
            fold = []
            for n in lengths:
                edges = np.linspace(0, n, self.n_blocks + 1).round().astype(int)
                role = np.full(n, TRAIN, dtype=np.int8)
                role[max(0, edges[k] - gap) : edges[k + 1] + gap] = 0
                role[edges[k] : edges[k + 1]] = TEST
                fold.append(role)
            folds.append(fold)
        shortest = min(lengths)
        if shortest < 2 * self.n_blocks or any(
            not any((role == TRAIN).any() for role in fold) for fold in folds
        ):
            raise ConfigError(
                f"Trials of {shortest} to {max(lengths)} samples are too short for {self.n_blocks} "
                f"blocks with a gap of {gap} samples: nothing would be left to train on.",
                "Use fewer blocks, a shorter range of delays, or longer trials.",
            )
        return folds


class LaggedRidge(BaseEstimator):
    r"""Ridge regression on delayed data: FIR models, temporal response functions, decoders.

    .. math:: \min_{w, b} \sum_s \Bigl(y_s - b - \sum_f \sum_l w_{fl} x_{s-l,f}\Bigr)^2
              + \alpha \sum_g \frac{1}{\gamma_g} \sum_{f \in g} \|w_f\|^2

    for each target, with one penalty :math:`\alpha` and weights :math:`\gamma_g` of feature
    spaces (one space with weight 1 by default). Sums run over the samples of all trials; a trial
    is continued by zeros and never by its neighbour. Scaling the data is left to the caller.

    Parameters
    ----------
    tmin, tmax : float, optional
        First and last delay in seconds, both included; see `delays`.
    sampling_rate : float
        Samples per second of X and y (for fMRI, 1 / TR).
    delays_s : sequence of float, optional
        Delays in seconds, instead of `tmin` and `tmax`; whole numbers of samples. A FIR model.
    alphas : float or sequence of float
        The grid, all above 0. One value is used as it is, without cross-validation unless several
        `gammas` are to be compared.
    cv : int, "trials", TimeBlocks, splitter or list of (train, test), optional
        How alphas are scored: K unshuffled folds over trials (over blocks of time, as
        ``TimeBlocks(K)``, if there is one trial), leave-one-trial-out, blocks of time within
        trials, any scikit-learn splitter over trials, or given pairs of trial indices. By default
        5 folds, or as many as there are trials if they are 2 to 4; a number that is given is kept.
    direction : {"forward", "backward"}
        "forward" predicts what follows X: y at time s from X at s - delay. "backward" is a decoder
        with X the recording and y the stimulus: y at s from X at s + delay.
    fit_intercept : bool
        Fit an unpenalised intercept, inside each training fold too.
    alpha_per_target : bool
        If False, all targets share the alpha and weights with the best mean score.
    spaces : sequence or dict, optional
        Feature spaces for banded ridge, as in `BandedRidge`: one label per feature; or a list of
        slices, of lists of indices or of lists of column names; or a dict of these by name. None
        is one space.
    gammas : array-like, shape (n_gammas, n_spaces) or (n_spaces,), optional
        Candidate weights :math:`\gamma`, at least 0, in place of `n_iter`, `concentration` and
        `seed`; a space with weight 0 is left out.
    n_iter : int
        Number of candidate gammas, the first with equal weights.
    concentration : float or sequence of float
        Concentrations of the Dirichlet distributions that gammas are drawn from, in turn.
    seed : int
        Seed of the gammas.
    regularisation : {"ridge", "derivative"}
        "derivative" penalises differences between neighbouring delays,
        :math:`\sum_l (w_{f,l+1} - w_{fl})^2`, in place of :math:`\|w_f\|^2`.
    metric : {"r2", "r"}
        What chooses alphas and what `score` returns: R^2 or the Pearson correlation.
    device : str
        ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
    dtype : {"auto", "float32", "float64"}
        Type of the data in the computation; "auto" takes that of X. Gram matrices are float64.

    Attributes
    ----------
    coef_ : ndarray, shape (n_targets, n_features, n_lags)
    intercept_ : ndarray, shape (n_targets,)
    lags_ : ndarray of int, shape (n_lags,)
        Delays of X in samples, ascending; reversed in sign for a decoder.
    times_ : ndarray, shape (n_lags,)
        The same in seconds.
    alpha_ : ndarray, shape (n_targets,)
        The chosen penalties.
    cv_scores_ : ndarray, shape (n_alphas, n_targets)
        Mean over the folds of `metric`, over the test samples of all trials of a fold, at the
        best weights for each alpha. Absent if nothing was to be chosen.
    best_score_ : ndarray, shape (n_targets,)
        At the chosen alpha. It took part in the choice.
    alphas_ : ndarray, shape (n_spaces, n_targets)
        The penalty of each space, alpha / gamma; infinite where gamma is 0.
    gammas_ : ndarray, shape (n_gammas, n_spaces)
        The candidates.
    spaces_ : dict of str to ndarray of int
        Features of each space, by name.
    n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (n_features,)
        Names of the columns, if the trials are data frames.

    References
    ----------
    Crosse et al. (2016), Frontiers in Human Neuroscience 10, 604 (TRF).
    Dupré la Tour et al. (2022), NeuroImage 264, 119728 (banded ridge).
    """

    def __init__(
        self,
        tmin: float | None = None,
        tmax: float | None = None,
        sampling_rate: float | None = None,
        *,
        delays_s: Sequence[float] | None = None,
        alphas: float | Sequence[float] = DEFAULT_ALPHAS,
        cv: int | str | TimeBlocks | BaseCrossValidator | Iterable[tuple[Any, Any]] | None = None,
        direction: str = "forward",
        fit_intercept: bool = True,
        alpha_per_target: bool = True,
        spaces: Spaces = None,
        gammas: ArrayLike | None = None,
        n_iter: int = 20,
        concentration: float | Sequence[float] = (0.1, 1.0),
        seed: int = 0,
        regularisation: str = "ridge",
        metric: str = "r2",
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.tmin = tmin
        self.tmax = tmax
        self.sampling_rate = sampling_rate
        self.delays_s = delays_s
        self.alphas = alphas
        self.cv = cv
        self.direction = direction
        self.fit_intercept = fit_intercept
        self.alpha_per_target = alpha_per_target
        self.spaces = spaces
        self.gammas = gammas
        self.n_iter = n_iter
        self.concentration = concentration
        self.seed = seed
        self.regularisation = regularisation
        self.metric = metric
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any, rows: Any = None) -> Self:
        """Choose penalties and fit.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features), or list of them
            One trial, or a list of trials of any lengths.
        y : array-like, shape (n_samples, n_targets) or (n_samples,), or list of them
            The same trials.
        rows : array-like of bool, shape (n_samples,), or list of them, optional
            The samples whose targets are fitted. X of the others still serves their delays.

        Returns
        -------
        LaggedRidge
            Itself.

        Raises
        ------
        ConfigError
            For trials that do not go together or are shorter than the delays, non-finite values
            (with their count), complex data, or parameters that cannot be used.
        TypeError
            For sparse data.

        Warns
        -----
        RankWarning
            If there are as many samples as delayed features, and some are sums of others.
        AlphaEdgeWarning
            If many targets choose an end of the grid.
        """
        lags = self._lags()
        alphas = check_alphas(self.alphas)
        for name, value, known in (
            ("regularisation", self.regularisation, ("ridge", "derivative")),
            ("metric", self.metric, ("r2", "r")),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        data, dtype = self._trials(X, "X", None, reset=True)
        target, _ = self._trials(y, "y", dtype)
        _check_pairs(data, target, lags)
        p, n_targets, n_lags = data[0].shape[1], target[0].shape[1], len(lags)
        columns, weights = self._candidates(p)
        span = int(lags[-1] - lags[0])
        choosing = len(alphas) * len(weights) > 1
        used = _used(rows, [len(x) for x in data])
        roles = _within(self._roles([len(x) for x in data], span), used) if choosing else []

        device = resolve_device(self.device)
        Xt = [torch.as_tensor(np.require(x, requirements="W"), device=device) for x in data]
        Yt = [torch.as_tensor(np.require(x, requirements="W"), device=device) for x in target]
        n = int(sum(u.sum() for u in used))
        penalty = _difference_penalty(p, n_lags) if self.regularisation == "derivative" else None
        kernel = penalty is None and n < p * n_lags
        scales = torch.as_tensor(weights, device=device).sqrt()  # (candidates, groups)
        grid = torch.as_tensor(alphas, device=device)
        if penalty is not None:
            penalty = penalty.to(device)
        # Targets are centred once; without an intercept nothing may be shifted.
        mean = torch.zeros(n_targets, dtype=torch.float64, device=device)
        if self.fit_intercept:
            mean = (
                _sum(
                    v[a:b].sum(dim=0, dtype=torch.float64)
                    for v, u in zip(Yt, used, strict=True)
                    for a, b in _stretches(u)
                )
                / n
            )
        problem_type = _Kernel if kernel else _Primal
        problem = problem_type(
            Xt, Yt, lags, roles, used, mean, columns, self.fit_intercept, penalty
        )
        if isinstance(problem, _Primal):
            warn_spanned(problem.whole_gram(), n, self.fit_intercept)
        index = torch.zeros(n_targets, dtype=torch.int64, device=device)
        if choosing:
            scores = problem.scores(scales, grid, self.metric)  # (candidates, alphas, targets)
            flat = scores.flatten(0, 1)
            index = choose_alpha(flat, grid.repeat(len(scales)), per_target=self.alpha_per_target)
            best = flat.gather(0, index[None])[0].cpu().numpy()
            self.cv_scores_ = scores.nan_to_num(nan=-torch.inf).amax(dim=0).cpu().numpy()
            self.cv_scores_[np.isinf(self.cv_scores_)] = np.nan
            self.best_score_ = best
            explained = best if self.metric == "r2" else best * np.abs(best)
            warn_edges((index % len(grid)).cpu().numpy(), explained, alphas)
        candidate, place = index // len(grid), index % len(grid)
        coef, intercept = problem.fit(scales, candidate, grid[place])
        self.coef_ = coef.view(n_targets, p, n_lags).to(Xt[0].dtype).cpu().numpy()
        self.intercept_ = intercept.to(Xt[0].dtype).cpu().numpy()
        self.alpha_ = grid[place].cpu().numpy()
        self.gammas_ = weights
        with np.errstate(divide="ignore"):
            self.alphas_ = self.alpha_ / weights[candidate.cpu().numpy()].T
        self.lags_ = lags
        self.times_ = lags / float(self.sampling_rate or 1)
        self._one_target = _first(y).ndim == 1
        return self

    def predict(self, X: Any) -> Any:
        """Predict the targets of new trials.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features), or list of them
            One trial or several.

        Returns
        -------
        ndarray, shape (n_samples, n_targets) or (n_samples,), or list of them
            One array for one array, a list for a list.
        """
        check_is_fitted(self)
        data, _ = self._trials(X, "X", self.coef_.dtype)
        device = resolve_device(self.device)
        coef = torch.as_tensor(self.coef_, device=device)
        intercept = torch.as_tensor(self.intercept_, device=device)
        out = []
        for x in data:
            xt = torch.as_tensor(np.require(x, requirements="W"), device=device)
            predicted = lagged_predict(xt, coef, self.lags_, intercept).cpu().numpy()
            out.append(predicted[:, 0] if self._one_target else predicted)
        return out if isinstance(X, list | tuple) else out[0]

    def score(self, X: Any, y: Any) -> float:
        """Mean over targets of `metric`, over the samples of all trials together.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features), or list of them
            Trials.
        y : array-like, shape (n_samples, n_targets) or (n_samples,), or list of them
            The same trials.

        Returns
        -------
        float
        """
        check_is_fitted(self)
        given = X if isinstance(X, list | tuple) else [X]
        predicted = [p.reshape(len(p), -1) for p in self.predict(given)]
        target, _ = self._trials(y, "y", self.coef_.dtype)
        _check_pairs(predicted, target, self.lags_[:0])
        metric = {"r2": r2, "r": pearson_r}[self.metric]
        return float(np.mean(metric(np.concatenate(target), np.concatenate(predicted))))

    def _lags(self) -> NDArray[np.int64]:
        rate = self.sampling_rate
        if rate is None:
            raise ConfigError(
                "sampling_rate is missing: delays are in seconds.",
                "Give samples per second, for fMRI 1 / TR.",
            )
        given = self.tmin is not None and self.tmax is not None
        if given == (self.delays_s is not None) or (self.tmin is None) != (self.tmax is None):
            raise ConfigError(
                "Give the delays either as tmin and tmax, or as delays_s; got "
                f"tmin={self.tmin!r}, tmax={self.tmax!r}, delays_s={self.delays_s!r}."
            )
        if self.direction not in ("forward", "backward"):
            raise ConfigError(f"direction is {self.direction!r}; expected 'forward' or 'backward'.")
        if self.tmin is not None and self.tmax is not None:
            lags = delays(self.tmin, self.tmax, rate)
        else:
            delays(0, 0, rate)  # checks the rate
            samples = np.asarray(self.delays_s, dtype=np.float64) * rate
            lags = np.unique(samples.round()).astype(np.int64)
            if (
                len(lags) == 0
                or len(lags) < samples.size
                or abs(samples - samples.round()).max() > 0.01
            ):
                raise ConfigError(
                    f"delays_s={self.delays_s!r} are {samples.tolist()} samples; expected "
                    "different whole numbers.",
                    "Use multiples of the sampling interval.",
                )
        return lags if self.direction == "forward" else -lags[::-1]

    def _trials(
        self, given: Any, name: str, dtype: Any, *, reset: bool = False
    ) -> tuple[list[NDArray[Any]], Any]:
        """Return finite trials of one type; with `reset`, the first one sets the features."""
        known = {"auto": dtype, "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
        if self.dtype not in known:
            raise ConfigError(f"dtype is {self.dtype!r}; expected one of {', '.join(known)}.")
        several = isinstance(given, list | tuple)
        trials = list(given) if several else [given]
        if not trials:
            raise ConfigError(f"{name} is an empty list; expected at least one trial.")
        arrays: list[NDArray[Any]] = []
        for i, trial in enumerate(trials):
            label = _trial(name, i, several)
            a = self._checked(trial, name, label, reset and i == 0)
            if a.shape[1] != (arrays or [a])[0].shape[1]:
                raise ConfigError(
                    f"{label} has {a.shape[1]} columns and trial 0 {arrays[0].shape[1]}; expected "
                    "the same in all trials."
                )
            check_finite(a, label, "features" if name == "X" else "targets")
            arrays.append(a)
        if known[self.dtype] is None:
            narrow = all(a.dtype == np.float32 for a in arrays)
            known["auto"] = np.dtype(np.float32 if narrow else np.float64)
        return [a.astype(known[self.dtype], copy=False) for a in arrays], known[self.dtype]

    def _checked(self, trial: Any, name: str, label: str, reset: bool) -> NDArray[Any]:
        """Return one trial as numbers (samples, columns), by scikit-learn's rules."""
        ndim = getattr(trial, "ndim", None)
        ndim = np.ndim(trial) if ndim is None else ndim
        if ndim != 2 and not (ndim == 1 and name == "y"):
            raise ConfigError(
                f"{label} has shape {np.shape(trial)}; expected (samples, "
                f"{'features' if name == 'X' else 'targets'}).",
                "Reshape your data: x[:, None] for one feature, and a list for several trials.",
            )
        options: dict[str, Any] = {"dtype": "numeric", "ensure_all_finite": False}  # counted later
        try:
            if name == "X":
                checked: Any = validate_data(self, trial, reset=reset, **options)
            else:
                checked = check_array(trial, ensure_2d=False, input_name="y", **options)
        except ValueError as error:
            raise ConfigError(f"{label} cannot be used: {error}") from error
        return checked[:, None] if checked.ndim == 1 else checked

    def _candidates(self, p: int) -> tuple[Tensor, NDArray[np.float64]]:
        """Place of every feature's space, and weights of the spaces (n_candidates, n_spaces)."""
        self.spaces_ = feature_spaces(self.spaces, p, getattr(self, "feature_names_in_", None))
        n = len(self.spaces_)
        place = torch.empty(p, dtype=torch.int64)
        for i, features in enumerate(self.spaces_.values()):
            place[torch.as_tensor(features)] = i
        if self.gammas is None:
            return place, sample_gammas(
                self.n_iter, n, concentration=self.concentration, seed=self.seed
            )
        weights = np.atleast_2d(np.asarray(self.gammas, dtype=np.float64))
        usable = np.isfinite(weights).all() and (weights >= 0).all() and weights.any(axis=1).all()
        if weights.ndim != 2 or weights.shape[1] != n or not usable:
            raise ConfigError(
                f"gammas has shape {weights.shape}; expected (candidates, {n}) finite values, at "
                f"least 0 and not all 0, for the spaces {list(self.spaces_)}."
            )
        return place, weights

    def _roles(self, lengths: list[int], span: int) -> list[list[NDArray[np.int8]]]:
        """Tell what every sample of every trial is in each fold."""
        rate, n = float(self.sampling_rate or 1), len(lengths)
        cv = self.cv
        if cv is None:
            cv = 5 if n == 1 else min(5, n)
        if n == 1 and isinstance(cv, int):
            cv = TimeBlocks(cv)
        if isinstance(cv, TimeBlocks):
            return cv.roles(lengths, span, rate)
        if isinstance(cv, str) and cv != "trials":
            raise ConfigError(
                f"cv is {cv!r}; expected a number of folds, 'trials' (leave one out), TimeBlocks, "
                "a splitter over trials, or a list of (train, test)."
            )
        if n == 1 or (isinstance(cv, int) and not 2 <= cv <= n):
            raise ConfigError(
                f"cv={cv!r} makes folds over trials, and there are {n}.",
                "Use cv=TimeBlocks(5) for folds over time within trials"
                + (f", or at most {n} folds." if n > 1 else "."),
            )
        if isinstance(cv, str):
            splits = LeaveOneOut().split(lengths)
        elif isinstance(cv, int):
            splits = KFold(cv).split(lengths)
        else:
            splits = check_cv(cv).split(np.zeros((n, 1)))
        folds = []
        for train, test in splits:
            role = np.zeros(n, dtype=np.int8)
            role[train] = TRAIN
            if (role[test] != 0).any():
                raise ConfigError("A fold of cv has the same trial in training and test.")
            role[test] = TEST
            folds.append([np.full(m, r, dtype=np.int8) for m, r in zip(lengths, role, strict=True)])
        return folds


@dataclass(frozen=True)
class _Part:
    """Samples that play the same role in every fold, with their sums."""

    ranges: list[tuple[int, int, int]]  # (trial, start, stop)
    roles: NDArray[np.int8]  # one per fold
    n: int
    gram: Tensor  # (q, q)
    total: Tensor  # (q,), sum of the delayed rows


@dataclass(frozen=True)
class _Sums:
    """Sums over the samples of a part or of a fold, for some targets."""

    n: int
    gram: Tensor  # (q, q)
    total: Tensor  # (q,)
    cross: Tensor  # (q, t)
    y: Tensor  # (t,)
    yy: Tensor  # (t,)


class _Primal:
    """Regression by the Gram matrix of the delayed data; q = n_features * n_lags columns."""

    def __init__(
        self,
        X: list[Tensor],
        Y: list[Tensor],
        lags: NDArray[np.int64],
        roles: list[list[NDArray[np.int8]]],
        used: list[NDArray[np.bool_]],
        mean: Tensor,
        columns: Tensor,
        centred: bool,
        penalty: Tensor | None,
    ) -> None:
        self.X, self.Y, self.lags, self.mean = X, Y, lags, mean
        self.centred, self.penalty = centred, penalty
        self.groups = columns.to(mean.device).repeat_interleave(len(lags))
        self.parts = []
        for signature, ranges in _parts(roles, used):
            gram = _gram([(X[i], a, b) for i, a, b in ranges], lags)
            total = _sum(_total(X[i], lags, a, b) for i, a, b in ranges)
            n = sum(b - a for _, a, b in ranges)
            self.parts.append(_Part(ranges, signature, n, gram, total))
        self.n_folds = len(roles)
        self._whole: list[Tensor] = []

    def scores(self, scales: Tensor, grid: Tensor, metric: str) -> Tensor:
        """Mean over folds, (n_candidates, n_alphas, n_targets)."""
        t = len(self.mean)
        out = torch.zeros((len(scales), len(grid), t), dtype=torch.float64, device=grid.device)
        q = len(self.groups)
        size = max(64, CROSS_ELEMENTS // (q * len(self.parts)))
        for start in range(0, t, size):
            cols = slice(start, min(t, start + size))
            sums = [self._sums(part, cols) for part in self.parts]
            self._whole.append(_sum(s.cross for s in sums))
            whole = _add(sums)
            count = torch.zeros_like(out[:1, :1, cols])
            work = [(k, c) for k in range(self.n_folds) for c in range(len(scales))]
            pair: tuple[_Sums, _Sums] | None = None
            for k, c in tqdm(work, desc="lagged ridge", disable=None, leave=False):
                if c == 0 or pair is None:
                    pair = self._fold(k, sums, whole)
                    count += _defined(pair[1])
                value = self._score(*pair, scales[c][self.groups], grid, metric)
                out[c, :, cols] += torch.where(_defined(pair[1]), value, 0.0)
            out[:, :, cols] = torch.where(count > 0, out[:, :, cols] / count, torch.nan)
        return out

    def whole_gram(self) -> Tensor:
        """Gram matrix of all samples, about their mean if there is an intercept, (q, q)."""
        gram: Tensor = _sum(part.gram for part in self.parts)
        if not self.centred:
            return gram
        total = _sum(part.total for part in self.parts)
        return gram - torch.outer(total, total) / sum(part.n for part in self.parts)

    def fit(self, scales: Tensor, candidate: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (n_targets, q) and intercepts, float64."""
        n = sum(part.n for part in self.parts)
        gram = self.whole_gram()  # the targets have mean 0 already
        total = _sum(part.total for part in self.parts)
        if self._whole:
            cross = torch.cat(self._whole, dim=1)
        else:
            cross = _sum(self._sums(p, slice(None)).cross for p in self.parts)
        coef = torch.empty((len(alpha), len(gram)), dtype=torch.float64, device=gram.device)
        for c in candidate.unique().tolist():
            scale = scales[c][self.groups]
            scaled = gram * scale * scale[:, None]
            for value in alpha[candidate == c].unique().tolist():
                which = (candidate == c) & (alpha == value)
                right = cross[:, which] * scale[:, None]
                coef[which] = (_solve(scaled, right, value, self.penalty) * scale[:, None]).T
        return coef, self.mean - coef @ (total / n) if self.centred else self.mean

    def _sums(self, part: _Part, cols: slice) -> _Sums:
        mean = self.mean[cols]
        cross = _Cross(self.lags)
        y_sum, y_squares = torch.zeros_like(mean), torch.zeros_like(mean)
        for i, a, b in part.ranges:
            rows = max(TARGET_ROWS, PIECE_ELEMENTS[mean.device.type] // len(mean))
            for first in range(a, b, rows):
                y = self.Y[i][first : min(b, first + rows), cols]
                if self.centred:
                    y = y - mean.to(y.dtype)
                cross.add(self.X[i], y, first)
                if self.n_folds:
                    y_sum += y.sum(dim=0, dtype=torch.float64)
                    y_squares += torch.linalg.vector_norm(y, dim=0, dtype=torch.float64).square()
        return _Sums(part.n, part.gram, part.total, cross.total(), y_sum, y_squares)

    def _fold(self, k: int, sums: list[_Sums], whole: _Sums) -> tuple[_Sums, _Sums]:
        """Training and test sums of a fold, each about its own mean if there is an intercept."""
        roles = [part.roles[k] for part in self.parts]
        out = [s for s, r in zip(sums, roles, strict=True) if r != TRAIN]
        inside = [s for s, r in zip(sums, roles, strict=True) if r == TRAIN]
        train = _subtract(whole, _add(out)) if len(out) <= len(inside) else _add(inside)
        test = _add([s for s, r in zip(sums, roles, strict=True) if r == TEST])
        return _about_mean(train) if self.centred else train, _about_mean(test)

    def _score(self, train: _Sums, test: _Sums, scale: Tensor, grid: Tensor, metric: str) -> Tensor:
        """Score (n_alphas, n_targets) in one fold, from sums alone.

        With c the deviation of the mean prediction from the mean of the test targets, the squared
        error is the one about both means plus n c^2.
        """
        gram = train.gram * scale * scale[:, None]
        start = train.cross * scale[:, None]
        # From here on coefficients are those of the scaled columns, or of their eigenvectors.
        inner = test.gram * scale * scale[:, None]
        cross = test.cross * scale[:, None]
        offset = scale * (test.total - train.total if self.centred else test.total)
        profile = None
        q, t = start.shape
        if len(grid) * (q + 5 * t) > 20 * q:  # one eigendecomposition is cheaper than Choleskys
            base, slope, vectors = _eigen(gram, self.penalty)
            profile = 1 / (base[:, None] + slope[:, None] * grid)
            start, cross, offset = vectors.T @ start, vectors.T @ cross, vectors.T @ offset
            # Nearly diagonal: no cancellation, so float32 data need no more than float32.
            inner = (vectors.T @ inner @ vectors).to(self.X[0].dtype)
        out = torch.empty((len(grid), t), dtype=torch.float64, device=grid.device)
        for a, alpha in enumerate(grid.tolist()):
            if profile is None:
                w = _solve(gram, start, alpha, self.penalty)
            else:
                w = start * profile[:, a, None]
            covariance = (w * cross).sum(dim=0)
            variance = (w * (inner @ w.to(inner.dtype))).sum(dim=0).clamp(min=0)
            if metric == "r":
                norm = (variance * test.yy).sqrt()
                out[a] = torch.where(norm > 0, covariance / norm, 0.0)
            else:
                bias = test.y - (train.y if self.centred else 0) - offset @ w
                error = test.yy - 2 * covariance + variance + test.n * bias.square()
                out[a] = 1 - error.clamp(min=0) / test.yy
        return out


class _Kernel:
    """Regression by the products between samples, where there are fewer samples than columns."""

    def __init__(
        self,
        X: list[Tensor],
        Y: list[Tensor],
        lags: NDArray[np.int64],
        roles: list[list[NDArray[np.int8]]],
        used: list[NDArray[np.bool_]],
        mean: Tensor,
        columns: Tensor,
        centred: bool,
        penalty: Tensor | None,
    ) -> None:
        self.X, self.lags, self.mean, self.centred = X, lags, mean, centred
        self.roles = [np.concatenate(fold) for fold in roles]
        self.columns = columns.to(mean.device)
        self.kernels = [
            lagged_kernel([x[:, self.columns == g] for x in X], lags)
            for g in range(int(columns.max()) + 1)
        ]
        self.used = used
        self.Y = torch.cat([y.double() - mean for y in Y])

    def scores(self, scales: Tensor, grid: Tensor, metric: str) -> Tensor:
        """Mean over folds, (n_candidates, n_alphas, n_targets)."""
        shape = (len(scales), len(grid), len(self.mean))
        out = torch.zeros(shape, dtype=torch.float64, device=grid.device)
        count = torch.zeros(shape[2], dtype=torch.float64, device=grid.device)
        for c, scale in enumerate(tqdm(scales, desc="lagged ridge", disable=None, leave=False)):
            kernel = self._combined(scale)
            for role in self.roles:
                train, test = (
                    torch.as_tensor(np.flatnonzero(role == r), device=grid.device)
                    for r in (TRAIN, TEST)
                )
                inner, outer = kernel[train][:, train], kernel[test][:, train]
                y_mean = torch.zeros_like(self.mean)
                if self.centred:
                    mean = inner.mean(dim=0)
                    outer = outer - outer.mean(dim=1, keepdim=True) - mean + mean.mean()
                    inner = inner - mean - mean[:, None] + mean.mean()
                    y_mean = self.Y[train].mean(dim=0)
                values, vectors = eigh(inner)
                rotated = vectors.T @ (self.Y[train] - y_mean)
                outer = outer @ vectors
                y = self.Y[test]
                about = y - y.mean(dim=0)
                yy = about.square().sum(dim=0)
                defined = yy > _NOTHING * y.square().sum(dim=0)
                if c == 0:
                    count += defined
                for a, alpha in enumerate(grid):
                    predicted = outer @ (rotated / (values + alpha)[:, None]) + y_mean
                    if metric == "r2":
                        score = 1 - (y - predicted).square().sum(dim=0) / yy
                    else:
                        deviation = predicted - predicted.mean(dim=0)
                        norm = (deviation.square().sum(dim=0) * yy).sqrt()
                        score = torch.where(norm > 0, (about * deviation).sum(dim=0) / norm, 0.0)
                    out[c, a] += torch.where(defined, score, 0.0)
        return torch.where(count > 0, out / count, torch.nan)

    def fit(self, scales: Tensor, candidate: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (n_targets, q) and intercepts, float64."""
        dual = torch.zeros_like(self.Y)
        rows = torch.as_tensor(np.flatnonzero(np.concatenate(self.used)), device=dual.device)
        Y = self.Y[rows]
        weight = torch.empty((len(self.columns), len(alpha)), dtype=torch.float64).to(dual)
        for c in candidate.unique().tolist():
            kernel = self._combined(scales[c])[rows][:, rows]
            if self.centred:
                mean = kernel.mean(dim=0)
                kernel = kernel - mean - mean[:, None] + mean.mean()
            weight[:, candidate == c] = scales[c].square()[self.columns][:, None]
            for value in alpha[candidate == c].unique().tolist():
                which = (candidate == c) & (alpha == value)
                solved = torch.zeros_like(dual[:, which])
                solved[rows] = _solve(kernel, Y[:, which], value, None)
                dual[:, which] = solved
        parts = dual.split([len(x) for x in self.X])
        cross = lagged_cross([x.double() for x in self.X], parts, self.lags)
        coef = (cross * weight.repeat_interleave(len(self.lags), dim=0)).T
        if not self.centred:
            return coef, self.mean
        total = _sum(
            _total(x, self.lags, a, b)
            for x, u in zip(self.X, self.used, strict=True)
            for a, b in _stretches(u)
        )
        return coef, self.mean - coef @ (total / len(rows))

    def _combined(self, scale: Tensor) -> Tensor:
        return _sum(s.square() * k for s, k in zip(scale, self.kernels, strict=True))


#: Share of the sum of squares below which a deviation is rounding.
_NOTHING = 1e-12


def _eigen(gram: Tensor, penalty: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b, V with (gram + alpha * penalty)^-1 = V diag(1 / (a + alpha b)) V'."""
    if penalty is None:
        values, vectors = eigh(gram)
        return values, torch.ones_like(values), vectors
    size = gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    values, vectors = eigh(gram / size + penalty)
    keep = values > values.max() * len(values) * torch.finfo(torch.float64).eps
    white = vectors[:, keep] / values[keep].sqrt()
    b, turn = eigh(white.T @ penalty @ white)
    b = b.clamp(max=1)
    return size * (1 - b), b, white @ turn


def _solve(gram: Tensor, right: Tensor, alpha: float, penalty: Tensor | None) -> Tensor:
    """(gram + alpha * penalty)^-1 right; the smallest solution where that is singular."""
    if penalty is None:
        whole = gram.clone()
        whole.diagonal().add_(alpha)
    else:
        whole = gram + alpha * penalty
    factor, info = torch.linalg.cholesky_ex(whole)
    diagonal = factor.diagonal()
    floor = len(gram) * torch.finfo(torch.float64).eps
    if int(info) == 0 and bool((diagonal.min() / diagonal.max()).square() > floor):
        return torch.cholesky_solve(right, factor)
    values, vectors = eigh(whole)
    keep = values > values.max() * floor
    vectors = vectors[:, keep]
    return vectors @ ((vectors.T @ right) / values[keep, None])


def _difference_penalty(p: int, n_lags: int) -> Tensor:
    """Squared differences between neighbouring delays of each feature, as a (q, q) form."""
    step = torch.eye(n_lags, dtype=torch.float64).diff(dim=0)
    return torch.kron(torch.eye(p, dtype=torch.float64), step.T @ step)


def _add(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(
        *(_sum(getattr(s, f) for s in parts) for f in ("n", "gram", "total", "cross", "y", "yy"))
    )


def _subtract(whole: _Sums, part: _Sums) -> _Sums:
    names = ("n", "gram", "total", "cross", "y", "yy")
    return _Sums(*(getattr(whole, f) - getattr(part, f) for f in names))


def _about_mean(s: _Sums) -> _Sums:
    """Subtract the means from sums of products; `total` and `y` become the means."""
    total, y = s.total / s.n, s.y / s.n
    return _Sums(
        s.n,
        s.gram - s.n * torch.outer(total, total),
        total,
        s.cross - s.n * torch.outer(total, y),
        y,
        s.yy - s.n * y.square(),
    )


def _defined(test: _Sums) -> Tensor:
    return test.yy > _NOTHING * (test.yy + test.n * test.y.square())


def _used(rows: Any, lengths: list[int]) -> list[NDArray[np.bool_]]:
    """Return which samples of each trial are fitted."""
    if rows is None:
        return [np.ones(n, dtype=bool) for n in lengths]
    masks = [np.asarray(m) for m in (rows if isinstance(rows, list | tuple) else [rows])]
    if [m.shape for m in masks] != [(n,) for n in lengths] or any(m.dtype != bool for m in masks):
        raise ConfigError(
            f"rows are {', '.join(f'{m.dtype} {m.shape}' for m in masks)}; expected one mask of "
            f"bool for each trial, of {', '.join(map(str, lengths))} samples."
        )
    if sum(int(m.sum()) for m in masks) < 2:
        raise ConfigError("rows leave fewer than two samples to fit.")
    return masks


def _within(
    roles: list[list[NDArray[np.int8]]], used: list[NDArray[np.bool_]]
) -> list[list[NDArray[np.int8]]]:
    """Folds among the samples that are used; those with nothing to train or test on are dropped."""
    masked = [[np.where(u, r, 0) for r, u in zip(fold, used, strict=True)] for fold in roles]
    kept = [f for f in masked if all(any((r == k).any() for r in f) for k in (TRAIN, TEST))]
    if not kept:
        raise ConfigError(
            "No fold of cv has samples to train and to test on among the rows that are used."
        )
    return kept


def _stretches(used: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _parts(
    roles: list[list[NDArray[np.int8]]], used: list[NDArray[np.bool_]]
) -> Iterator[tuple[NDArray[np.int8], list[tuple[int, int, int]]]]:
    """Yield ranges (trial, start, stop) of samples that play the same role in every fold."""
    found: dict[bytes, list[tuple[int, int, int]]] = {}
    for i, inside in enumerate(used):
        for start, stop in _stretches(inside):
            role = np.zeros((len(roles), stop - start), dtype=np.int8)
            for fold, own in zip(roles, role, strict=True):
                own[:] = fold[i][start:stop]
            change = np.flatnonzero((role[:, 1:] != role[:, :-1]).any(axis=0)) + 1
            for a, b in pairwise([0, *change.tolist(), stop - start]):
                found.setdefault(role[:, a].tobytes(), []).append((i, start + a, start + b))
    for signature, ranges in found.items():
        yield np.frombuffer(signature, dtype=np.int8), ranges


def _checked_lags(lags: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    out = np.asarray(lags)
    if out.ndim != 1 or len(out) == 0 or out.dtype.kind not in "iu" or (np.diff(out) <= 0).any():
        raise ConfigError(f"lags are {lags!r}; expected whole numbers of samples, ascending.")
    return out.astype(np.int64)


def _window(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1 of x, with zeros outside of it."""
    inside = x[max(0, start) : max(0, min(len(x), stop))]
    if len(inside) == stop - start:
        return inside
    out = x.new_zeros((stop - start, x.shape[1]))
    first = max(0, -start)
    out[first : first + len(inside)] = inside
    return out


def _delayed(x: Tensor, lags: NDArray[np.int64], start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1 of the delayed data, (rows, n_features, n_lags)."""
    lo, hi = int(lags[0]), int(lags[-1])
    windows = _window(x, start - hi, stop - lo).unfold(0, hi - lo + 1, 1)
    if len(lags) == hi - lo + 1:
        return windows.flip(2)
    return windows[:, :, torch.as_tensor(hi - lags, device=x.device)]


def _pieces(n: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    size = max(256, PIECE_ELEMENTS[device.type] // max(1, columns))
    for start in range(0, n, size):
        yield start, min(n, start + size)


class _Cross:
    """Sums over rows s of each added y of x[start + s - lag] y[s]', float64."""

    def __init__(self, lags: NDArray[np.int64]) -> None:
        self.lags = lags
        self.length = _fft_length(lags)
        self._sum: Any = 0.0
        self._spectrum: Tensor | None = None

    def add(self, x: Tensor, y: Tensor, start: int) -> Self:
        """Add the products of the rows of y with x, from row `start` of x on."""
        fewer = min(x.shape[1], y.shape[1]) * len(self.lags)
        enough = fewer >= FFT_COLUMNS[x.dtype] and len(y) >= self.length
        if enough and len(self.lags) >= FFT_LAGS:
            self._add_by_fft(x, y, start)
        else:
            self._sum = self._sum + _cross_directly(x, y, self.lags, start)
        return self

    def total(self) -> Tensor:
        """Return the sum over all that was added, (n_features * n_lags, n_targets)."""
        if self._spectrum is not None:
            # The spectra of x are conjugated, which turns time round.
            place = torch.as_tensor(self.lags - self.lags[-1], device=self._spectrum.device)
            wide = torch.fft.irfft(self._spectrum, n=self.length, dim=0)[place % self.length]
            self._sum = self._sum + wide.transpose(0, 1).flatten(0, 1)
            self._spectrum = None
        return self._sum

    def _add_by_fft(self, x: Tensor, y: Tensor, start: int) -> None:
        """Add products of spectra of overlapping segments, in pieces that fit a cache."""
        length, lo, hi = self.length, int(self.lags[0]), int(self.lags[-1])
        block = length - (hi - lo)
        most = max(1, FFT_SAMPLES // block) * block
        shape = (length // 2 + 1, x.shape[1], y.shape[1])
        if self._spectrum is None:
            self._spectrum = torch.zeros(shape, dtype=torch.complex128, device=x.device)
        for a in range(0, len(y), most):
            rows = min(most, len(y) - a)
            segments, whole = -(-rows // block), rows // block
            source = _window(x, start + a - hi, start + a - hi + segments * block + hi - lo)
            spectra = torch.fft.rfft(source.unfold(0, length, block).contiguous(), dim=2)
            # (frequency, feature, segment); bmm is slow on complex data that are not contiguous
            spectra = spectra.permute(2, 1, 0).contiguous().conj_physical_()
            for t in range(0, y.shape[1], FFT_TARGETS):
                part = y[a : a + rows, t : t + FFT_TARGETS]
                padded = part.new_zeros((part.shape[1], segments, length))
                filled = part[: whole * block].unflatten(0, (whole, block))
                padded[:, :whole, :block] = filled.permute(2, 0, 1)
                padded[:, whole:, : rows - whole * block] = part[whole * block :].T[:, None]
                other = torch.fft.rfft(padded, dim=2).permute(2, 1, 0).contiguous()
                self._spectrum[:, :, t : t + FFT_TARGETS] += torch.bmm(spectra, other)
        if self._spectrum.numel() > SPECTRUM_ELEMENTS:
            self.total()


def _fft_length(lags: NDArray[np.int64]) -> int:
    span = int(lags[-1] - lags[0])
    return max(256, 1 << (4 * span - 1).bit_length())


def _cross_directly(x: Tensor, y: Tensor, lags: NDArray[np.int64], start: int) -> Tensor:
    """Return what `_Cross` sums, by products with delayed data."""
    n, p, t = len(y), x.shape[1], y.shape[1]
    out = torch.zeros((p * len(lags), t), dtype=torch.float64, device=x.device)
    if p <= t:
        for a, b in _pieces(n, p * len(lags), x.device):
            rows = _delayed(x, lags, start + a, start + b).flatten(1)
            out += rows.T @ y[a:b]
        return out
    # The targets are fewer: they run ahead instead of x being delayed.
    ahead = -lags[::-1]
    first, last = start - int(lags[-1]), start + n - int(lags[0])
    view = out.view(p, len(lags), t)
    for a, b in _pieces(last - first, t * len(lags), x.device):
        rows = _delayed(y, ahead, first - start + a, first - start + b)
        product = _window(x, first + a, first + b).T @ rows.flatten(1)
        view += product.view(p, t, len(lags)).flip(2).transpose(1, 2)
    return out


def _gram(ranges: Sequence[tuple[Tensor, int, int]], lags: NDArray[np.int64]) -> Tensor:
    """Gram matrix of rows start .. stop - 1 of the delayed data of each (x, start, stop), (q, q).

    The blocks of the first delay, and the products of the rows before and at the end of each range,
    add up over ranges; only their sums are spread over all pairs of delays.
    """
    step = reduce(math.gcd, np.diff(lags).tolist(), 0) or 1
    even = np.arange(lags[0], lags[-1] + 1, step)
    p, n_lags = ranges[0][0].shape[1], len(even)
    cross = _Cross(even)
    before, after = [], []
    for x, start, stop in ranges:
        wide = _window(x, start - int(even[-1]) - step, stop - int(even[0])).double()
        start, stop = int(even[-1]) + step, len(wide) + int(even[0])
        cross.add(wide, _window(wide, start - int(even[0]), len(wide)), start)
        before.append(_delayed(wide, even, start - step, start).transpose(1, 2).flatten(1))
        after.append(_delayed(wide, even, stop - step, stop).transpose(1, 2).flatten(1))
    both = torch.cat([*before, *after])
    sign = torch.ones(len(both), 1, dtype=both.dtype, device=both.device)
    sign[len(both) // 2 :] = -1
    ends = ((sign * both).T @ both).view(n_lags, p, n_lags, p)
    row = cross.total()
    out = torch.empty((n_lags, p, n_lags, p), dtype=torch.float64, device=row.device)
    out[0] = row.view(p, n_lags, p).permute(2, 1, 0)
    out[1:, :, 0] = out[0, :, 1:].permute(1, 2, 0)
    for i in range(n_lags - 1):
        torch.add(out[i, :, :-1], ends[i, :, :-1], out=out[i + 1, :, 1:])
    if len(lags) < n_lags:
        keep = torch.as_tensor((lags - lags[0]) // step, device=out.device)
        out = out[keep][:, :, keep]
    return out.permute(1, 0, 3, 2).reshape(p * len(lags), p * len(lags))


def _total(x: Tensor, lags: NDArray[np.int64], start: int, stop: int) -> Tensor:
    """Sum of rows start .. stop - 1 of the delayed data, (q,), float64."""
    ones = torch.ones((stop - start, 1), dtype=torch.float64, device=x.device)
    return _Cross(lags).add(x.double(), ones, start).total()[:, 0]


def _sum(parts: Iterable[Any]) -> Any:
    total: Any = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _first(given: Any) -> NDArray[Any]:
    return np.asarray(given[0] if isinstance(given, list | tuple) else given)


def _trial(name: str, i: int, several: bool) -> str:
    return f"{name} (trial {i})" if several else name


def _check_pairs(X: list[NDArray[Any]], y: list[NDArray[Any]], lags: NDArray[np.int64]) -> None:
    if len(X) != len(y):
        raise ConfigError(f"X has {len(X)} trial(s) and y {len(y)}; expected the same trials.")
    reach = int(np.abs(lags).max()) if len(lags) else 0
    for i, (a, b) in enumerate(zip(X, y, strict=True)):
        if len(a) != len(b):
            raise ConfigError(
                f"Trial {i} has {len(a)} samples in X and {len(b)} in y.",
                "Resample or crop both to the same samples.",
            )
        if len(lags) and len(a) <= reach:
            raise ConfigError(
                f"Trial {i} has {len(a)} samples, and the longest delay is {reach}.",
                "Leave it out, or use shorter delays; check the unit of tmin, tmax (seconds).",
            )
