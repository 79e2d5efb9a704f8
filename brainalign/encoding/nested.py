"""Cross-validated predictions in which alphas and layers are chosen inside the training folds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from brainalign.data.splits import Split, nested
from brainalign.device import resolve_device
from brainalign.encoding.fits import Fit, Regression, make_fit
from brainalign.errors import ConfigError

__all__ = [
    "ALL_ROWS",
    "NestedPredictions",
    "Solvers",
    "check_inner",
    "group_best",
    "inner_folds",
    "nested_cv",
]

logger = logging.getLogger(__name__)

#: In place of a fold's number: every row is a training row.
ALL_ROWS = -1
_SCORED_AT_ONCE = 1024


@dataclass(frozen=True)
class NestedPredictions:
    """What `nested_cv` returns; targets in the order given, folds in the order of the splits.

    Parameters
    ----------
    rows, fold : ndarray of int, shape (n_tested,)
        The tested rows, ascending, and the fold of each.
    training_mean : ndarray, shape (n_folds, n_kept)
        Mean response of the training rows.
    measured, predicted : ndarray, shape (n_tested, n_kept)
        Deviations from the training mean of the row's fold, predicted by the layer chosen in the
        training rows.
    r, r2 : ndarray, shape (n_targets,)
        Of the chosen layers; see `nested_cv`.
    r_layer, r2_layer : ndarray, shape (n_layers, n_targets)
        Of each layer.
    choice : ndarray of int, shape (n_folds, n_targets)
        Layer chosen in each fold.
    parts : ndarray, shape (n_spaces, n_tested, n_kept), or None
        What each feature space contributes to the predictions of the last model.
    """

    rows: NDArray[np.intp]
    fold: NDArray[np.intp]
    training_mean: NDArray[np.float32]
    measured: NDArray[np.float32]
    predicted: NDArray[np.float32]
    r: NDArray[np.float64]
    r2: NDArray[np.float64]
    r_layer: NDArray[np.float64]
    r2_layer: NDArray[np.float64]
    choice: NDArray[np.int64]
    parts: NDArray[np.float32] | None = None


def check_inner(cv: int | str, row_stimulus: NDArray[np.intp] | None = None) -> None:
    """Refuse ways to choose alphas that do not exist, or that would see a left-out stimulus.

    Raises
    ------
    ConfigError
        For an unknown `cv`, or one that leaves out single rows where stimuli have several.
    """
    if isinstance(cv, str):
        if cv not in ("loo", "gcv"):
            raise ConfigError(f'inner_cv is {cv!r}; expected a number of folds, "loo" or "gcv".')
        if row_stimulus is not None and len(np.unique(row_stimulus)) < len(row_stimulus):
            raise ConfigError(
                f"inner_cv={cv!r} leaves out single rows, but {len(row_stimulus)} rows show only "
                f"{len(np.unique(row_stimulus))} stimuli: the others give a stimulus away.",
                'Use a number of folds, or repetitions="average".',
            )
    elif cv < 2:
        raise ConfigError(f"inner_cv is {cv}; at least 2 folds are needed.")


def inner_folds(split: Split, groups: NDArray[Any], cv: int | str, seed: int) -> str | list[Split]:
    """Folds inside the training rows (positions among them), or "loo" / "gcv" as they are."""
    if isinstance(cv, str):
        return cv
    return nested(split, groups, cv, seed, relative=True)


class Solvers:
    """The fits of every model and fold, each built when it is first asked for.

    Parameters
    ----------
    features : dict of str to ndarray, shape (n_rows, n_features)
        By layer or feature space; float32, finite.
    splits : sequence of (train, test)
        Rows of the folds, with disjoint test sets.
    alphas : ndarray, shape (n_alphas,)
        Grid, for z-scored features.
    inner_cv : int, "loo" or "gcv"
        How alphas and layers are scored in the training rows.
    row_groups : array, shape (n_rows,)
        Stimulus of each row; inner folds keep these whole.
    regression : Regression
        By default ridge regression on every layer.
    trials : ndarray of int, shape (n_rows,), optional
        Trial of each row, for lagged models.
    seed : int
        Seed of the inner folds.
    device : str
        As in `brainalign.linear.Ridge`.
    keep : bool
        Keep every fit, for more targets; or only the one that was asked for last.
    """

    def __init__(
        self,
        features: Mapping[str, NDArray[np.float32]],
        splits: Sequence[Split],
        *,
        alphas: NDArray[np.float64],
        inner_cv: int | str,
        row_groups: NDArray[Any],
        regression: Regression | None = None,
        trials: NDArray[np.intp] | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        keep: bool = True,
    ) -> None:
        self.features = dict(features)
        self.splits = list(splits)
        self.device = resolve_device(device)
        self.grid = np.asarray(alphas, dtype=np.float64)
        self.regression = regression or Regression()
        layers = self.regression.spaces or {name: (name,) for name in self.features}
        self.spaces = {name: tuple(own) for name, own in layers.items()}
        given = self.regression.models or {name: (name,) for name in self.spaces}
        self.models = {name: tuple(spaces) for name, spaces in given.items()}
        names = list(self.models)
        self.eligible = [names.index(m) for m in self.regression.eligible or names]
        self._groups, self._inner, self._seed = row_groups, inner_cv, seed
        self._trials, self._keep = trials, keep
        self._made: dict[tuple[str, int], Fit] = {}

    def __call__(self, model: str, fold: int) -> Fit:
        """Return the fit of one model in the training rows of one fold, or in `ALL_ROWS`."""
        key = model, fold
        if key not in self._made:
            if not self._keep:
                self._made.clear()
            self._made[key] = self._build(model, fold)
        return self._made[key]

    def on(self, device: torch.device) -> Solvers:
        """Return the same with fits of their own on another device."""
        other = copy.copy(self)
        other.device, other._made = device, {}
        return other

    def space(self, name: str) -> NDArray[np.float32]:
        """Return the features (n_rows, n_features) of a space."""
        own = [self.features[layer] for layer in self.spaces[name]]
        return own[0] if len(own) == 1 else np.concatenate(own, axis=1)

    def _build(self, model: str, fold: int) -> Fit:
        everything = np.arange(len(self._groups))
        split = (everything, everything[:0]) if fold == ALL_ROWS else self.splits[fold]
        seed = self._seed + 1 + fold
        inner: str | list[Split] = []
        if self.regression.delays is None:
            inner = inner_folds(split, self._groups, self._inner, seed)
        return make_fit(
            self.regression,
            {space: self.space(space) for space in self.models[model]},
            split,
            inner,
            self.grid,
            self._groups,
            trials=self._trials,
            n_inner=self._inner if isinstance(self._inner, int) else 5,
            seed=seed,
            device=self.device,
        )


def group_best(scores: Tensor, groups: Tensor) -> Tensor:
    """Layer with the best mean score in each group of targets, for every target.

    Parameters
    ----------
    scores : Tensor, shape (n_layers, n_targets)
        NaN counts for nothing.
    groups : Tensor of int, shape (n_targets,)
        Targets that share their layer.

    Returns
    -------
    Tensor of int, shape (n_targets,)
    """
    return _group_mean(scores, groups).argmax(dim=0)


def _group_mean(scores: Tensor, groups: Tensor) -> Tensor:
    """Mean score (n_layers, n_targets) of each target's group; minus infinity without any."""
    n = int(groups.max()) + 1
    total = scores.new_zeros((len(scores), n))
    count = scores.new_zeros((len(scores), n))
    index = groups.expand(len(scores), -1)
    total.scatter_add_(1, index, scores.nan_to_num(nan=0.0))
    count.scatter_add_(1, index, (~scores.isnan()).to(scores.dtype))
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)[:, groups]


def nested_cv(
    solvers: Solvers,
    responses: NDArray[np.float32],
    *,
    target_groups: NDArray[np.int64] | None = None,
    keep: int | None = None,
    target_batch: int | None = None,
    each_layer: Callable[[int, NDArray[np.float32], NDArray[np.float32]], None] | None = None,
    parts: bool = False,
) -> NestedPredictions:
    r"""Predict held-out rows; choose alphas and layers inside the training rows of each fold.

    With ``m`` the training mean of the fold of row i, the scores are those of the pooled
    deviations from it:

    .. math:: r = \mathrm{corr}(y_i - m, \hat y_i - m), \qquad
              R^2 = 1 - \frac{\sum_i (y_i - \hat y_i)^2}{\sum_i (y_i - m)^2}

    Without the subtraction, pooled predictions of K folds correlate negatively with unpredictable
    responses: a training mean is low where the held-out responses are high.

    Parameters
    ----------
    solvers : Solvers
        Of the features, in the same rows as `responses`.
    responses : ndarray, shape (n_rows, n_targets)
        Finite.
    target_groups : ndarray of int, shape (n_targets,), optional
        Targets that share their layer; by default each has its own.
    keep : int, optional
        Return the predictions of the first `keep` targets only (scores: of all).
    target_batch : int, optional
        As in `brainalign.linear.Ridge`.
    each_layer : callable, optional
        Called with the number of a layer and the measured and predicted deviations
        (n_tested, n_kept) of that layer, while they are at hand: only one layer's are held.
    parts : bool
        Return what the feature spaces of the last model contribute.

    Returns
    -------
    NestedPredictions
    """
    where = solvers.device
    n_targets = responses.shape[1]
    keep = n_targets if keep is None else keep
    Y = torch.as_tensor(np.require(responses, requirements="W"), device=where)
    groups = torch.as_tensor(
        np.arange(n_targets) if target_groups is None else target_groups, device=where
    )
    splits = solvers.splits
    rows = np.sort(np.concatenate([test for _, test in splits]))
    fold_of = np.empty(len(rows), dtype=np.intp)
    target = Y[torch.as_tensor(rows, device=where)]
    means = Y.new_empty((len(splits), n_targets))
    places = []
    for k, (train, test) in enumerate(splits):
        at = np.searchsorted(rows, test)
        fold_of[at] = k
        places.append(torch.as_tensor(at, device=where))
        inside = torch.as_tensor(train, device=where)
        for t in _slices(n_targets, _SCORED_AT_ONCE):
            means[k, t] = Y[:, t][inside].mean(dim=0, dtype=torch.float64).to(Y.dtype)
        target[places[k]] -= means[k]
    predicted, deviation = torch.empty_like(target), torch.empty_like(target)
    best = torch.full((len(splits), n_targets), -torch.inf, dtype=torch.float64, device=where)
    choice = torch.zeros((len(splits), n_targets), dtype=torch.int64, device=where)
    by_layer = []
    progress = tqdm(
        total=len(splits) * len(solvers.models), desc="fits", unit="fit", disable=None,
        leave=False,
    )  # fmt: skip
    last, each = len(solvers.models) - 1, None
    if parts:
        each = Y.new_empty((len(solvers.models[list(solvers.models)[last]]), len(rows), keep))
    for i, layer in enumerate(solvers.models):
        for k, (train, _) in enumerate(splits):
            fit = solvers(layer, k)
            inside = torch.as_tensor(train, device=where)
            score = torch.empty(n_targets, dtype=torch.float64, device=where)
            for t in fit.batches(n_targets, target_batch):
                divide = each is not None and i == last and t.start < keep
                deviation[places[k], t], score[t], own = fit.predict(Y[:, t][inside], parts=divide)
                if each is not None and own is not None:
                    stop = min(t.stop, keep)
                    each[:, places[k], t.start : stop] = own[:, :, : stop - t.start]
            if i not in solvers.eligible:
                progress.update()
                continue
            mean = _group_mean(score[None], groups)[0]
            first = i == solvers.eligible[0]
            better = torch.ones_like(mean, dtype=torch.bool) if first else mean > best[k]
            best[k] = torch.where(better, mean, best[k])
            choice[k, better] = i
            for t in _slices(n_targets, _SCORED_AT_ONCE):
                both = deviation[places[k], t], predicted[places[k], t]
                predicted[places[k], t] = torch.where(better[t], *both)
            progress.update()
        by_layer.append(_scores(target, deviation))
        if each_layer is not None:
            each_layer(i, *(x[:, :keep].cpu().numpy() for x in (target, deviation)))
    progress.close()
    r, r2 = _scores(target, predicted)
    return NestedPredictions(
        rows=rows,
        fold=fold_of,
        training_mean=means[:, :keep].cpu().numpy(),
        measured=target[:, :keep].cpu().numpy(),
        predicted=predicted[:, :keep].cpu().numpy(),
        r=r,
        r2=r2,
        r_layer=np.stack([s[0] for s in by_layer]),
        r2_layer=np.stack([s[1] for s in by_layer]),
        choice=choice.cpu().numpy(),
        parts=None if each is None else each.cpu().numpy(),
    )


def _scores(target: Tensor, deviation: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pearson r and R^2 of each target, from sums in float64."""
    n, n_targets = target.shape
    both = np.empty((2, n_targets))
    for t in _slices(n_targets, _SCORED_AT_ONCE):
        y, p = target[:, t].double(), deviation[:, t].double()
        parts = (y, p, y * y, p * p, y * p, (y - p) ** 2)
        sy, sp, yy, pp, yp, error = torch.stack([x.sum(dim=0) for x in parts])
        vy, vp = yy - sy * sy / n, pp - sp * sp / n
        defined = (vy > 1e-12 * yy) & (vp > 1e-12 * pp) & (vp > 0)
        r = ((yp - sy * sp / n) / (vy * vp).sqrt()).clamp(-1, 1)
        both[0, t] = torch.where(defined, r, torch.nan).cpu().numpy()
        both[1, t] = torch.where(yy > 0, 1 - error / yy, torch.nan).cpu().numpy()
    return both[0], both[1]


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
