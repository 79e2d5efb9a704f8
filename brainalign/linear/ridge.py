"""Ridge regression with one penalty per target, as a scikit-learn estimator on torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.model_selection import BaseCrossValidator, check_cv
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from brainalign.device import resolve_device
from brainalign.errors import ConfigError
from brainalign.linear.search import RidgeSolver
from brainalign.linear.solvers import Factors, choose_alpha

__all__ = [
    "DEFAULT_ALPHAS",
    "AlphaEdgeWarning",
    "RankWarning",
    "Ridge",
    "check_alphas",
    "check_finite",
    "check_folds",
    "check_groups",
    "warn_edges",
    "warn_rank",
]

logger = logging.getLogger(__name__)

DEFAULT_ALPHAS = tuple(float(a) for a in np.logspace(-1, 5, 13))
#: Share of the targets at one end of the grid from which a warning is given.
EDGE_SHARE = 0.1
#: Cross-validated R^2 from which a target counts as predicted there.
PREDICTED = 0.01


class AlphaEdgeWarning(UserWarning):
    """Many targets chose the smallest or the largest alpha of the grid."""


class RankWarning(UserWarning):
    """X spans fewer directions than it has features, so that weights are not unique."""


class Ridge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    r"""Ridge regression that chooses one alpha per target.

    .. math:: \min_{w, b} \|y_t - X w_t - b_t\|^2 + \alpha_t \|w_t\|^2

    Primal or kernel form is chosen from the shape of X. float32 data stay float32; Gram matrices
    and their eigenvectors are float64.

    Parameters
    ----------
    alphas : float or sequence of float
        The grid, all above 0. One value is used as it is, without cross-validation.
    cv : int, splitter, list of (train, test), "loo" or "gcv"
        How alphas are scored: K unshuffled folds, any scikit-learn splitter, given splits,
        leave-one-out in closed form, or generalised cross-validation.
    alpha_per_target : bool
        If False, all targets share the alpha with the best mean score.
    fit_intercept : bool
        Fit an unpenalised intercept, inside each training fold.
    device : str
        ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
    dtype : {"auto", "float32", "float64"}
        Type of the computation; "auto" takes that of X, or float64 where X or y are so large or
        small (largest value above 1e6 or below 1e-6, as MEG in tesla) that float32 may not hold
        their products.
    target_batch : int, optional
        Targets in flight; by default what suits the device.

    Attributes
    ----------
    coef_ : ndarray, shape (n_targets, n_features) or (n_features,)
        With fewer samples than features it is formed anew from `dual_coef_` on each access:
        it would be larger than everything else, and predictions do without.
    dual_coef_ : ndarray, shape (n_samples, n_targets)
        With fewer samples than features: ``coef_ = dual_coef_.T @ X_fit_``.
    X_fit_ : ndarray, shape (n_samples, n_features)
        With fewer samples than features: the centred training data.
    intercept_ : ndarray, shape (n_targets,), or float
    alpha_ : ndarray, shape (n_targets,), or float
        The chosen penalties.
    cv_scores_ : ndarray, shape (n_alphas, n_targets)
        Cross-validated R^2 of every alpha; absent if `alphas` holds one value.
    best_score_ : ndarray, shape (n_targets,), or float
        Cross-validated R^2 at the chosen alpha. It took part in the choice: it is no estimate of
        performance on new data.

    References
    ----------
    Hoerl & Kennard (1970), Technometrics 12, 55-67.
    """

    def __init__(
        self,
        alphas: float | Sequence[float] = DEFAULT_ALPHAS,
        *,
        cv: int | str | BaseCrossValidator | Iterable[tuple[Any, Any]] = 5,
        alpha_per_target: bool = True,
        fit_intercept: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        target_batch: int | None = None,
    ) -> None:
        self.alphas = alphas
        self.cv = cv
        self.alpha_per_target = alpha_per_target
        self.fit_intercept = fit_intercept
        self.device = device
        self.dtype = dtype
        self.target_batch = target_batch

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Choose alphas and fit.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
            Data.
        y : array-like, shape (n_samples,) or (n_samples, n_targets)
            Targets.
        groups : array-like, shape (n_samples,), optional
            Groups for a splitter that keeps them whole.

        Returns
        -------
        Ridge
            Itself.

        Raises
        ------
        ConfigError
            For non-finite values (with their count), alphas that are not above 0, more folds than
            samples, or groups with "loo" or "gcv".
        """
        alphas = check_alphas(self.alphas)
        finite = {"ensure_all_finite": False}  # counted below
        checked: Any = validate_data(
            self,
            X,
            y,
            validate_separately=(
                {"dtype": self._dtypes(), **finite},
                {"dtype": "numeric", "ensure_2d": False, **finite},
            ),
        )
        data: NDArray[Any] = checked[0]
        target = np.asarray(checked[1], dtype=data.dtype)
        if self.dtype == "auto" and data.dtype == np.float32 and (_far(data) or _far(target)):
            logger.info("Ridge in float64: float32 may not hold the products of such values.")
            data, target = data.astype(np.float64), np.asarray(checked[1], dtype=np.float64)
        check_consistent_length(data, target)
        check_finite(data, "X", "features")
        check_finite(target.reshape(len(target), -1), "y", "targets")
        device = resolve_device(self.device)
        one = target.ndim == 1
        Y = target.reshape(len(target), -1)
        solver = RidgeSolver(
            torch.as_tensor(np.require(data, requirements="W"), device=device),
            torch.as_tensor(alphas),
            self._folds(data, target, groups) if len(alphas) > 1 else "gcv",
            fit_intercept=self.fit_intercept,
        )
        warn_rank(solver.factors)
        chosen, intercept = self._fit_targets(solver, Y)
        if len(alphas) > 1:
            best = self.cv_scores_[chosen, np.arange(len(chosen))]
            warn_edges(chosen, best, alphas)
            self.best_score_ = float(best[0]) if one else best
        self.intercept_ = float(intercept[0]) if one else intercept
        self.alpha_ = float(alphas[chosen[0]]) if one else alphas[chosen]
        self._one = one
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.floating]:
        """Predict the targets of new rows.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray, shape (n_samples,) or (n_samples, n_targets)
        """
        check_is_fitted(self)
        data: Any = validate_data(
            self, X, dtype=self._dtypes(), reset=False, ensure_all_finite=False
        )
        check_finite(data, "X", "features")
        if hasattr(self, "dual_coef_"):
            predicted = (data - self._x_mean) @ self.X_fit_.T @ self.dual_coef_ + self._y_mean
        else:
            predicted = data @ np.atleast_2d(self._coef).T + self.intercept_
        return predicted[:, 0] if self._one else predicted

    @property
    def coef_(self) -> NDArray[np.floating]:
        """Weights (n_targets, n_features), or (n_features,) for a single target."""
        if not hasattr(self, "_one"):
            raise AttributeError("This Ridge has no coef_ before it is fitted.")
        coef = self.dual_coef_.T @ self.X_fit_ if hasattr(self, "dual_coef_") else self._coef
        return np.asarray(coef[0] if self._one else coef)

    def _dtypes(self) -> list[Any]:
        known: dict[str, list[Any]] = {
            "auto": [np.float64, np.float32],
            "float32": [np.float32],
            "float64": [np.float64],
        }
        if self.dtype not in known:
            raise ConfigError(f"dtype is {self.dtype!r}; expected one of {', '.join(known)}.")
        return known[self.dtype]

    def _folds(
        self, X: NDArray[Any], y: NDArray[Any], groups: ArrayLike | None
    ) -> str | list[tuple[Any, Any]]:
        if isinstance(self.cv, str):
            check_groups(self.cv, groups)
            return self.cv
        cv = check_cv(self.cv)
        check_folds(len(X), cv.get_n_splits(X, y, groups) if isinstance(self.cv, int) else 1)
        return list(cv.split(X, y, groups))

    def _fit_targets(
        self, solver: RidgeSolver, Y: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Fit some targets at a time; return the places of their alphas and the intercepts."""
        f, grid = solver.factors, solver.alphas
        n_targets = Y.shape[1]
        batches = list(solver.batches(n_targets, self.target_batch))
        chosen = np.empty(n_targets, dtype=np.int64)
        scores = np.empty((len(grid) if len(grid) > 1 else 0, n_targets))
        shared: torch.Tensor | None = None
        if not self.alpha_per_target and len(grid) > 1:
            for t in batches:
                scores[:, t] = solver.solve(_columns(Y, t, f)).scores.cpu().numpy()
            shared = choose_alpha(torch.as_tensor(scores), grid.cpu(), per_target=False)
        for name in ("_coef", "dual_coef_", "X_fit_", "_x_mean", "_y_mean"):
            self.__dict__.pop(name, None)  # of an earlier fit, which may have had the other form
        intercept, y_mean = (np.empty(n_targets, dtype=Y.dtype) for _ in range(2))
        rows = f.X.shape[1] if f.primal else len(f.X)
        weights = np.empty((n_targets, rows), dtype=Y.dtype)
        for t in batches:
            y = _columns(Y, t, f)
            index = None if shared is None else shared[t].to(grid.device)
            solution = solver.solve(y, index=index)
            w = solver.weights(solution)
            weights[t] = (w.T @ f.vectors.T).cpu().numpy()
            offset = w.T @ (f.vectors.T @ (f.mean if f.primal else f.X @ f.mean))
            y_mean[t] = solution.mean.cpu().numpy()
            intercept[t] = (solution.mean - offset).cpu().numpy()
            chosen[t] = solution.index.cpu().numpy()
            if shared is None:
                scores[:, t] = solution.scores.cpu().numpy()
        if len(grid) > 1:
            self.cv_scores_ = scores
        if f.primal:
            self._coef = weights
        else:
            self.dual_coef_ = weights.T
            self.X_fit_ = f.X.cpu().numpy()
            self._x_mean, self._y_mean = f.mean.cpu().numpy(), y_mean
        return chosen, intercept


def _columns(Y: NDArray[Any], t: slice, f: Factors) -> torch.Tensor:
    columns = np.require(Y[:, t], requirements=("C", "W"))
    return torch.as_tensor(columns, device=f.X.device)


def check_alphas(alphas: float | Sequence[float]) -> NDArray[np.float64]:
    """Return the grid as a float64 vector; raise `ConfigError` unless all are finite and > 0."""
    grid = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    if grid.ndim != 1 or len(grid) == 0 or not (np.isfinite(grid) & (grid > 0)).all():
        raise ConfigError(f"alphas must be finite numbers above 0; got {alphas!r}.")
    return grid


def _far(x: NDArray[Any]) -> bool:
    """Whether the largest value is so far from 1 that squared products may leave float32."""
    size = max(float(x.max()), -float(x.min())) if x.size else 0.0
    return size > 0 and not 1e-6 <= size <= 1e6


def check_finite(x: NDArray[Any], name: str, columns: str) -> None:
    """Raise `ConfigError` with the counts if `x` (rows, columns) holds a NaN or an infinity."""
    if np.isfinite(x.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(x)
    if not bad.any():
        return
    n_nan = int(np.isnan(x).sum())
    where = np.flatnonzero(bad.any(axis=0))
    raise ConfigError(
        f"{name} holds {n_nan} NaN and {int(bad.sum()) - n_nan} infinite (inf) values of {x.size}, "
        f"in {len(where)} of {x.shape[1]} {columns} (first: {where[0]}) and "
        f"{int(bad.any(axis=1).sum())} of {x.shape[0]} rows.",
        "Exclude or repair them.",
    )


def check_folds(n_samples: int, n_folds: int) -> None:
    """Raise `ConfigError` if there are too few rows for folds of at least two."""
    if n_samples < 2 * n_folds:
        raise ConfigError(
            f"n_samples={n_samples} is too few for cv={n_folds}: every fold needs at least two.",
            "Use fewer folds.",
        )


def check_groups(cv: str, groups: ArrayLike | None) -> None:
    """Raise `ConfigError` if groups are given to a way of scoring that cannot keep them whole."""
    if groups is not None:
        raise ConfigError(
            f"cv={cv!r} leaves out single rows, so groups cannot be kept whole.",
            "Pass a splitter such as GroupKFold, or no groups.",
        )


def warn_rank(factors: Factors) -> None:
    """Warn of features that others hold already: predictions do not mind, weights do."""
    n, p = factors.X.shape
    possible = min(n - int(factors.centred), p)
    if factors.rank < possible:
        warnings.warn(
            f"X spans {factors.rank} of {possible} possible directions: some features are constant "
            "or sums of others. Predictions are as good; single weights are not unique. Drop these "
            "features, or reduce X by PCA, before reading weights.",
            RankWarning,
            stacklevel=3,
        )


def warn_edges(index: NDArray[Any], best: NDArray[Any], alphas: NDArray[Any]) -> None:
    """Warn of targets at an end of the grid; those that nothing predicts belong at the top."""
    predicted = best > PREDICTED
    for end, value, word in (("lower", alphas.min(), "smaller"), ("upper", alphas.max(), "larger")):
        share = float((predicted & (alphas[index] == value)).mean())
        if share > EDGE_SHARE:
            warnings.warn(
                f"{share:.0%} of the {len(index)} targets are predicted (cross-validated R^2 > "
                f"{PREDICTED}) with alpha = {value:g}, the {end} end of the grid. "
                f"Add {word} alphas.",
                AlphaEdgeWarning,
                stacklevel=3,
            )
