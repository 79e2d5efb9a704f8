"""Cross-validated predictions in which alphas and layers are chosen inside the training folds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from brainalign.data.splits import Split, nested
from brainalign.errors import ConfigError
from brainalign.linear.search import score_alphas
from brainalign.linear.solvers import (
    Factors,
    choose_alpha,
    factorise,
    resolve_device,
    target_batches,
)

__all__ = [
    "LayerFit",
    "NestedPredictions",
    "check_inner",
    "fit_layer",
    "group_best",
    "inner_folds",
    "nested_cv",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFit:
    """One layer fitted to training rows: z-scoring, factors, and the alpha of each target."""

    mean: Tensor
    scale: Tensor
    factors: Factors
    alpha: Tensor
    score: Tensor
    index: Tensor

    def project(self, X: Tensor) -> Tensor:
        """Z-score new rows by the training statistics and put them into the eigenbasis."""
        return self.factors.project((X - self.mean) / self.scale)


@dataclass(frozen=True)
class NestedPredictions:
    """What `nested_cv` returns; targets in the order given, folds in the order of the splits.

    Parameters
    ----------
    rows, fold : ndarray of int, shape (n_tested,)
        The tested rows, ascending, and the fold of each.
    training_mean : ndarray, shape (n_folds, n_kept)
        Mean response of the training rows.
    predicted : ndarray, shape (n_tested, n_kept)
        By the layer chosen in the training rows.
    predicted_layer : ndarray, shape (n_layers, n_tested, n_kept)
        By each layer.
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
    predicted: NDArray[np.float32]
    predicted_layer: NDArray[np.float32]
    r: NDArray[np.float64]
    r2: NDArray[np.float64]
    r_layer: NDArray[np.float64]
    r2_layer: NDArray[np.float64]
    choice: NDArray[np.int64]


class _Moments:
    """Running sums over folds from which r and R^2 of every target follow."""

    def __init__(self, n_targets: int, device: torch.device) -> None:
        self.n = 0
        self.sums = torch.zeros((6, n_targets), dtype=torch.float64, device=device)

    def add(self, y: Tensor, p: Tensor, targets: slice) -> None:
        y, p = y.double(), p.double()
        parts = (y, p, y * y, p * p, y * p, (y - p) ** 2)
        self.sums[:, targets] += torch.stack([x.sum(dim=0) for x in parts])

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sy, sp, yy, pp, yp, error = self.sums
        vy, vp = yy - sy * sy / self.n, pp - sp * sp / self.n
        defined = (vy > 1e-12 * yy) & (vp > 1e-12 * pp) & (vp > 0)
        r = ((yp - sy * sp / self.n) / (vy * vp).sqrt()).clamp(-1, 1)
        r = torch.where(defined, r, torch.nan)
        r2 = torch.where(yy > 0, 1 - error / yy, torch.nan)
        return r.cpu().numpy(), r2.cpu().numpy()


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


def fit_layer(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    cv: str | Sequence[tuple[Any, Any]],
    *,
    target_batch: int | None = None,
) -> LayerFit:
    """Z-score training features, choose each target's alpha by `cv` in these rows, and factorise.

    Parameters
    ----------
    X : Tensor, shape (n_rows, n_features)
        Training features.
    Y : Tensor, shape (n_rows, n_targets)
        Training responses.
    alphas : Tensor, shape (n_alphas,)
        Grid; penalties of z-scored features.
    cv : "loo", "gcv" or sequence of (train, test)
        How alphas are scored.
    """
    mean = X.mean(dim=0, dtype=torch.float64)
    scale = (X.double() - mean).square().mean(dim=0).sqrt()
    scale = torch.where(scale > 1e-6 * mean.abs().clamp(min=1e-30), scale, torch.ones_like(scale))
    mean, scale = mean.to(X.dtype), scale.to(X.dtype)
    Z = (X - mean) / scale
    factors = factorise(Z)
    scores = score_alphas(Z, Y, alphas, cv, target_batch=target_batch)
    index = choose_alpha(scores, alphas)
    score = scores.gather(0, index[None])[0]
    return LayerFit(mean, scale, factors, alphas.double()[index], score, index)


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
    n = int(groups.max()) + 1
    total = scores.new_zeros((len(scores), n))
    count = scores.new_zeros((len(scores), n))
    index = groups.expand(len(scores), -1)
    total.scatter_add_(1, index, scores.nan_to_num(nan=0.0))
    count.scatter_add_(1, index, (~scores.isnan()).to(scores.dtype))
    mean = torch.where(count > 0, total / count.clamp(min=1), -torch.inf)
    return mean.argmax(dim=0)[groups]


def nested_cv(
    features: Mapping[str, NDArray[np.float32]],
    responses: NDArray[np.float32],
    splits: Sequence[Split],
    *,
    alphas: NDArray[np.float64],
    inner_cv: int | str,
    row_groups: NDArray[Any],
    target_groups: NDArray[np.int64] | None = None,
    keep: int | None = None,
    seed: int = 0,
    device: str = "auto",
    target_batch: int | None = None,
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
    features : dict of layer to ndarray, shape (n_rows, n_features)
        The same rows as `responses`.
    responses : ndarray, shape (n_rows, n_targets)
        Finite.
    splits : sequence of (train, test)
        Disjoint test sets.
    alphas : ndarray
        Grid, for z-scored features.
    inner_cv : int, "loo" or "gcv"
        How alphas and layers are scored in the training rows.
    row_groups : array, shape (n_rows,)
        Stimulus of each row; inner folds keep these whole.
    target_groups : ndarray of int, shape (n_targets,), optional
        Targets that share their layer; by default each has its own.
    keep : int, optional
        Return the predictions of the first `keep` targets only (scores: of all).
    seed : int
        Seed of the inner folds.
    device, target_batch
        As in `brainalign.linear.Ridge`.

    Returns
    -------
    NestedPredictions
    """
    where = resolve_device(device)
    n_targets = responses.shape[1]
    keep = n_targets if keep is None else keep
    Y = torch.as_tensor(np.require(responses, requirements="W"), device=where)
    grid = torch.as_tensor(alphas, device=where)
    groups = torch.as_tensor(
        np.arange(n_targets) if target_groups is None else target_groups, device=where
    )
    rows = np.sort(np.concatenate([test for _, test in splits]))
    place = np.full(len(responses), -1)
    place[rows] = np.arange(len(rows))
    shape = (len(rows), keep)
    predicted = np.empty(shape, dtype=np.float32)
    predicted_layer = np.empty((len(features), *shape), dtype=np.float32)
    fold_of = np.empty(len(rows), dtype=np.intp)
    training_mean = np.empty((len(splits), keep), dtype=np.float32)
    choice = np.empty((len(splits), n_targets), dtype=np.int64)
    moments = [_Moments(n_targets, where) for _ in features]
    chosen = _Moments(n_targets, where)
    inner = [
        inner_folds(split, row_groups, inner_cv, seed + 1 + k) for k, split in enumerate(splits)
    ]
    progress = tqdm(
        total=len(splits) * len(features), desc="encode", unit="fit", disable=None, leave=False
    )
    for k, split in enumerate(splits):
        train, test = (torch.as_tensor(s, dtype=torch.int64, device=where) for s in split)
        y_mean = Y[train].mean(dim=0, dtype=torch.float64).to(Y.dtype)
        target = Y[test] - y_mean
        y_train = Y[train]
        at = place[split[1]]
        fold_of[at] = k
        training_mean[k] = y_mean[:keep].cpu().numpy()
        deviations = []
        scores = []
        for i, values in enumerate(features.values()):
            X = torch.as_tensor(np.require(values, requirements="W"), device=where)
            fit = fit_layer(X[train], y_train, grid, inner[k], target_batch=target_batch)
            projected = fit.project(X[test])
            deviation = torch.empty_like(target)
            for t in target_batches(n_targets, len(X), target_batch, where):
                rotated = fit.factors.rotate(y_train[:, t] - y_mean[t])
                deviation[:, t] = projected @ fit.factors.weights(rotated, fit.alpha[t])
                moments[i].add(target[:, t], deviation[:, t], t)
            moments[i].n += len(test)
            predicted_layer[i, at] = (deviation + y_mean)[:, :keep].cpu().numpy()
            deviations.append(deviation)
            scores.append(fit.score)
            progress.update()
        best = group_best(torch.stack(scores), groups)
        choice[k] = best.cpu().numpy()
        which = best.expand(1, len(test), n_targets)
        nested_deviation = torch.stack(deviations).gather(0, which)[0]
        everything = slice(0, n_targets)
        chosen.add(target, nested_deviation, everything)
        chosen.n += len(test)
        predicted[at] = (nested_deviation + y_mean)[:, :keep].cpu().numpy()
    progress.close()
    by_layer = [m.scores() for m in moments]
    r, r2 = chosen.scores()
    return NestedPredictions(
        rows=rows,
        fold=fold_of,
        training_mean=training_mean,
        predicted=predicted,
        predicted_layer=predicted_layer,
        r=r,
        r2=r2,
        r_layer=np.stack([s[0] for s in by_layer]),
        r2_layer=np.stack([s[1] for s in by_layer]),
        choice=choice,
    )
