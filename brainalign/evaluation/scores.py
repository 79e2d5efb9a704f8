"""Scores of predictions, one per target."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import SchemaError

__all__ = ["pearson_r", "r2", "undefined"]

logger = logging.getLogger(__name__)


def pearson_r(measured: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    r"""Pearson correlation of each target.

    .. math:: r = \frac{\sum_i (y_i - \bar y)(\hat y_i - \bar{\hat y})}
                  {\|y - \bar y\| \, \|\hat y - \bar{\hat y}\|}

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets) or (n_samples,)
        The same rows and targets, in any unit.

    Returns
    -------
    ndarray, shape (n_targets,)
        NaN where a target is constant or not finite; how many is logged, and `undefined` tells
        which.

    Raises
    ------
    SchemaError
        If the shapes differ.
    """
    y, p = _pair(measured, predicted)
    bad = undefined(y, p)
    with np.errstate(invalid="ignore", divide="ignore"):
        y, p = y - y.mean(axis=0), p - p.mean(axis=0)
        norm = np.sqrt((y * y).sum(axis=0)) * np.sqrt((p * p).sum(axis=0))
        r = np.clip((y * p).sum(axis=0) / norm, -1, 1)
    return _mask(r, bad, "Pearson r")


def r2(
    measured: ArrayLike, predicted: ArrayLike, *, baseline: ArrayLike | None = None
) -> NDArray[np.float64]:
    r"""Share of the variance that is predicted, for each target.

    .. math:: R^2 = 1 - \frac{\sum_i (y_i - \hat y_i)^2}{\sum_i (y_i - b)^2}

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets) or (n_samples,)
        The same rows and targets, in the same unit.
    baseline : array-like, optional
        ``b``: what one would predict without features, for example the training mean, or 0 for
        R^2 relative to zero. By default the mean of `measured`.

    Returns
    -------
    ndarray, shape (n_targets,)
        At most 1; NaN where the measured target is constant or anything is not finite.

    Raises
    ------
    SchemaError
        If the shapes differ.
    """
    y, p = _pair(measured, predicted)
    reference = y.mean(axis=0) if baseline is None else np.asarray(baseline, dtype=np.float64)
    finite = np.isfinite(y).all(axis=0) & np.isfinite(p).all(axis=0)
    total = ((y - reference) ** 2).sum(axis=0)
    bad = ~finite | (total == 0) | (_constant(y) if baseline is None else False)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1 - ((y - p) ** 2).sum(axis=0) / total
    return _mask(value, bad, "R^2")


def undefined(measured: ArrayLike, predicted: ArrayLike) -> NDArray[np.bool_]:
    """Targets without a correlation: measured or predicted values constant or not finite.

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets) or (n_samples,)
        The same rows and targets.

    Returns
    -------
    ndarray of bool, shape (n_targets,)
    """
    y, p = _pair(measured, predicted)
    finite = np.isfinite(y).all(axis=0) & np.isfinite(p).all(axis=0)
    bad: NDArray[np.bool_] = ~finite | _constant(y) | _constant(p)
    return bad


def _constant(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((x == x[:1]).all(axis=0))


def _pair(
    measured: ArrayLike, predicted: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, p = same_targets(measured, predicted)
    return y.astype(np.float64, copy=False), p.astype(np.float64, copy=False)


def same_targets(measured: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both as (n_samples, n_targets), in the type they have, or raise if they differ."""
    y, p = np.asarray(measured), np.asarray(predicted)
    if y.shape != p.shape or y.ndim not in (1, 2):
        raise SchemaError(
            f"measured has shape {y.shape} and predicted {p.shape}; expected the same "
            "(n_samples, n_targets)."
        )
    if len(y) < 2:
        raise SchemaError(f"A score needs at least two samples; there is {len(y)}.")
    return y.reshape(len(y), -1), p.reshape(len(p), -1)


def _mask(value: NDArray[np.float64], bad: NDArray[np.bool_], name: str) -> NDArray[np.float64]:
    log_undefined(bad, name)
    return np.where(bad, np.nan, value)


def log_undefined(bad: NDArray[np.bool_], name: str) -> None:
    """Warn of targets that have no score, with their number."""
    if bad.any():
        logger.warning(
            "%s is undefined (NaN) for %d of %d targets: constant or not finite.",
            name, int(bad.sum()), len(bad),
        )  # fmt: skip
