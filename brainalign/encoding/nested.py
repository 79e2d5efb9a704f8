"""Cross-validated predictions in which alphas and layers are chosen inside the training folds."""

from __future__ import annotations

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
from brainalign.errors import ConfigError
from brainalign.linear.search import RidgeSolver, Solution
from brainalign.linear.solvers import Factors

__all__ = [
    "ALL_ROWS",
    "LayerSolver",
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
class LayerSolver:
    """What all targets share of one layer and one set of training rows.

    Parameters
    ----------
    mean, scale : Tensor, shape (n_features,)
        Of the training rows, by which features are z-scored.
    solver : RidgeSolver
        Of the z-scored training rows.
    projected : Tensor, shape (n_test, n_components)
        The test rows, z-scored likewise, in the solver's eigenbasis.
    """

    mean: Tensor
    scale: Tensor
    solver: RidgeSolver
    projected: Tensor

    @property
    def factors(self) -> Factors:
        """Of the z-scored training rows."""
        return self.solver.factors

    def score(self, solution: Solution) -> Tensor:
        """Return the validated R^2 (n_targets,) of each target at its alpha."""
        return solution.scores.gather(0, solution.index[None])[0]


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
    """The solvers of every layer and fold, each built when it is first asked for.

    Parameters
    ----------
    features : dict of layer to ndarray, shape (n_rows, n_features)
        float32, finite.
    splits : sequence of (train, test)
        Rows of the folds, with disjoint test sets.
    alphas : ndarray, shape (n_alphas,)
        Grid, for z-scored features.
    inner_cv : int, "loo" or "gcv"
        How alphas and layers are scored in the training rows.
    row_groups : array, shape (n_rows,)
        Stimulus of each row; inner folds keep these whole.
    seed : int
        Seed of the inner folds.
    device : str
        As in `brainalign.linear.Ridge`.
    keep : bool
        Keep every solver, for more targets; or only the one that was asked for last.
    """

    def __init__(
        self,
        features: Mapping[str, NDArray[np.float32]],
        splits: Sequence[Split],
        *,
        alphas: NDArray[np.float64],
        inner_cv: int | str,
        row_groups: NDArray[Any],
        seed: int = 0,
        device: str = "auto",
        keep: bool = True,
    ) -> None:
        self.features = dict(features)
        self.splits = list(splits)
        self.device = resolve_device(device)
        self.grid = np.asarray(alphas, dtype=np.float64)
        self._groups, self._inner, self._seed = row_groups, inner_cv, seed
        self._keep = keep
        self._made: dict[tuple[str, int], LayerSolver] = {}

    def __call__(self, layer: str, fold: int) -> LayerSolver:
        """Return the solver of one layer in the training rows of one fold, or in `ALL_ROWS`."""
        key = layer, fold
        if key not in self._made:
            if not self._keep:
                self._made.clear()
            self._made[key] = self._build(layer, fold)
        return self._made[key]

    def _build(self, layer: str, fold: int) -> LayerSolver:
        everything = np.arange(len(self._groups))
        split = (everything, everything[:0]) if fold == ALL_ROWS else self.splits[fold]
        inner = inner_folds(split, self._groups, self._inner, self._seed + 1 + fold)
        values = self.features[layer]
        X, X_test = (torch.as_tensor(values[rows], device=self.device) for rows in split)
        mean = X.mean(dim=0, dtype=torch.float64)
        scale = (X.double() - mean).square().mean(dim=0).sqrt()
        varies = scale > 1e-6 * mean.abs().clamp(min=1e-30)
        scale = torch.where(varies, scale, torch.ones_like(scale))
        mean, scale = mean.to(X.dtype), scale.to(X.dtype)
        # A single alpha stands there twice, so that it is scored: layers are compared by it.
        grid = self.grid if len(self.grid) > 1 else np.repeat(self.grid, 2)
        solver = RidgeSolver((X - mean) / scale, torch.as_tensor(grid), inner)
        projected = solver.factors.project((X_test - mean) / scale)
        return LayerSolver(mean, scale, solver, projected)


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
        total=len(splits) * len(solvers.features), desc="fits", unit="fit", disable=None,
        leave=False,
    )  # fmt: skip
    for i, layer in enumerate(solvers.features):
        for k, (train, _) in enumerate(splits):
            fit = solvers(layer, k)
            inside = torch.as_tensor(train, device=where)
            score = torch.empty(n_targets, dtype=torch.float64, device=where)
            for t in fit.solver.batches(n_targets, target_batch):
                solution = fit.solver.solve(Y[:, t][inside])
                deviation[places[k], t] = fit.projected @ fit.solver.weights(solution)
                score[t] = fit.score(solution)
            mean = _group_mean(score[None], groups)[0]
            better = (mean > best[k]) if i else torch.ones_like(mean, dtype=torch.bool)
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
