"""Ridge regression with one penalty per target, as a scikit-learn estimator on torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.model_selection import BaseCrossValidator, check_cv
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from brainalign.errors import ConfigError
from brainalign.linear.solvers import (
    choose_alpha,
    resolve_device,
    ridge_fit,
    score_alphas,
)

__all__ = ["DEFAULT_ALPHAS", "AlphaEdgeWarning", "Ridge", "check_alphas", "check_finite"]

DEFAULT_ALPHAS = tuple(float(a) for a in np.logspace(-1, 5, 13))
#: Share of the targets at one end of the grid from which a warning is given.
EDGE_SHARE = 0.1
#: Cross-validated R^2 from which a target counts as predicted there.
PREDICTED = 0.01


class AlphaEdgeWarning(UserWarning):
    """Many targets chose the smallest or the largest alpha of the grid."""


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
        Type of the computation; "auto" takes that of X.
    target_batch : int, optional
        Targets in flight; by default as many as fit a temporary of a few hundred MB.

    Attributes
    ----------
    coef_ : ndarray, shape (n_targets, n_features) or (n_features,)
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
            For non-finite values (with their count), alphas that are not above 0, or more folds
            than samples.
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
        check_consistent_length(data, target)
        check_finite(data, "X", "features")
        check_finite(target.reshape(len(target), -1), "y", "targets")
        device = resolve_device(self.device)
        Xt = torch.as_tensor(np.require(data, requirements="W"), device=device)
        Yt = torch.as_tensor(
            np.require(target.reshape(len(target), -1), requirements="W"), device=device
        )
        grid = torch.as_tensor(alphas, device=device)
        one = target.ndim == 1

        if len(alphas) > 1:
            scores = self._score_alphas(data, target, Xt, Yt, grid, groups)
            index = choose_alpha(scores, grid, per_target=self.alpha_per_target)
            best = scores.gather(0, index[None])[0].cpu().numpy()
            self.cv_scores_ = scores.cpu().numpy()
            self.best_score_ = float(best[0]) if one else best
            warn_edges(index.cpu().numpy(), best, alphas)
        else:
            index = torch.zeros(Yt.shape[1], dtype=torch.int64, device=device)
        coef, intercept = ridge_fit(
            Xt, Yt, grid[index], fit_intercept=self.fit_intercept, target_batch=self.target_batch
        )
        alpha = grid[index].cpu().numpy()
        self.coef_ = coef.cpu().numpy()[0] if one else coef.cpu().numpy()
        self.intercept_ = float(intercept[0]) if one else intercept.cpu().numpy()
        self.alpha_ = float(alpha[0]) if one else alpha
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
        predicted: NDArray[np.floating] = data @ self.coef_.T + self.intercept_
        return predicted

    def _dtypes(self) -> list[Any]:
        known: dict[str, list[Any]] = {
            "auto": [np.float64, np.float32],
            "float32": [np.float32],
            "float64": [np.float64],
        }
        if self.dtype not in known:
            raise ConfigError(f"dtype is {self.dtype!r}; expected one of {', '.join(known)}.")
        return known[self.dtype]

    def _score_alphas(
        self,
        X: NDArray[Any],
        y: NDArray[Any],
        Xt: torch.Tensor,
        Yt: torch.Tensor,
        grid: torch.Tensor,
        groups: ArrayLike | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {
            "fit_intercept": self.fit_intercept,
            "target_batch": self.target_batch,
        }
        if isinstance(self.cv, str):
            return score_alphas(Xt, Yt, grid, self.cv, **options)
        cv = check_cv(self.cv)
        n_splits = cv.get_n_splits(X, y, groups)
        if isinstance(self.cv, int) and len(X) < 2 * n_splits:
            raise ConfigError(
                f"n_samples={len(X)} is too few for cv={n_splits}: every fold needs at least two.",
                'Use fewer folds, or cv="loo".',
            )
        return score_alphas(Xt, Yt, grid, list(cv.split(X, y, groups)), **options)


def check_alphas(alphas: float | Sequence[float]) -> NDArray[np.float64]:
    """Return the grid as a float64 vector; raise `ConfigError` unless all are finite and > 0."""
    grid = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    if grid.ndim != 1 or len(grid) == 0 or not (np.isfinite(grid) & (grid > 0)).all():
        raise ConfigError(f"alphas must be finite numbers above 0; got {alphas!r}.")
    return grid


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
