"""Maximum likelihood for shares of correct answers, many data sets at once, and its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import SchemaError

__all__ = ["fit_binomial", "log_likelihood", "profile_intervals"]

#: Maps parameters (data set, parameter) to probabilities (data set, cell) and their derivatives
#: (data set, cell, parameter).
Curve = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]

_EDGE = 1e-9
_MOST_STEPS = 200
_GAIN = 1e-10
_HALVINGS = 30


def log_likelihood(
    probability: NDArray[np.float64], correct: NDArray[np.float64], n: NDArray[np.float64]
) -> NDArray[np.float64]:
    r"""Return the binomial log-likelihood, without its constant.

    .. math:: \ell = \sum_c k_c \log p_c + (n_c - k_c) \log (1 - p_c)

    Parameters
    ----------
    probability, correct, n : ndarray, shape (..., n_cells)
        Probability of a correct answer, number of correct answers, number of trials.

    Returns
    -------
    ndarray, shape (...,)
    """
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    return (correct * np.log(p) + (n - correct) * np.log1p(-p)).sum(-1)


def fit_binomial(
    curve: Curve,
    start: ArrayLike,
    correct: ArrayLike,
    n: ArrayLike,
    *,
    lower: ArrayLike,
    upper: ArrayLike,
    fixed: Sequence[int] | NDArray[np.bool_] = (),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Maximise the binomial likelihood of a curve within bounds, by damped Fisher scoring.

    .. math:: \theta \leftarrow \theta + (I + \mu\,\mathrm{diag}\,I)^{-1} J^\top
              \frac{k - n p}{p (1 - p)}, \qquad I = J^\top \frac{n}{p (1 - p)} J

    Steps that lower the likelihood are refused and the damping :math:`\mu` grows; parameters at a
    bound that the gradient points beyond stay there. All data sets are fitted together.

    Parameters
    ----------
    curve : callable
        Maps parameters (n_sets, n_parameters) to probabilities (n_sets, n_cells) and their
        derivatives (n_sets, n_cells, n_parameters).
    start : array-like, shape (n_sets, n_parameters)
        First values.
    correct : array-like, shape (n_sets, n_cells)
        Correct answers.
    n : array-like, shape (n_cells,) or (n_sets, n_cells)
        Trials.
    lower, upper : array-like, shape (n_parameters,)
        Bounds.
    fixed : sequence of int, or flags of shape (n_sets, n_parameters)
        Parameters kept at their first values.

    Returns
    -------
    theta : ndarray, shape (n_sets, n_parameters)
    likelihood : ndarray, shape (n_sets,)
        As of `log_likelihood`.

    Raises
    ------
    SchemaError
        If there are more correct answers than trials, or fewer than 0.
    """
    k = np.atleast_2d(np.asarray(correct, dtype=np.float64))
    total = np.broadcast_to(np.asarray(n, dtype=np.float64), k.shape)
    if (k < 0).any() or (k > total).any():
        raise SchemaError("The number of correct answers must lie between 0 and that of trials.")
    lower, upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    theta = np.clip(np.atleast_2d(np.asarray(start, dtype=np.float64)), lower, upper)
    held = np.zeros(theta.shape, dtype=bool)
    fixed = np.asarray(fixed)
    if fixed.dtype == bool:
        held |= fixed
    elif fixed.size:
        held[:, fixed] = True
    best = log_likelihood(curve(theta)[0], k, total)
    damping = np.full(len(theta), 1e-3)
    going = np.arange(len(theta))
    diagonal = np.arange(theta.shape[1])
    for _ in range(_MOST_STEPS):
        at = theta[going]
        p, jacobian = curve(at)
        p = np.clip(p, _EDGE, 1 - _EDGE)
        variance = p * (1 - p)
        weighted = jacobian * (total[going] / variance)[..., None]
        information = jacobian.transpose(0, 2, 1) @ weighted
        residual = (k[going] - total[going] * p) / variance
        gradient = (jacobian.transpose(0, 2, 1) @ residual[..., None])[..., 0]
        still = held[going] | ((at <= lower) & (gradient < 0)) | ((at >= upper) & (gradient > 0))
        gradient[still] = 0
        information[still[:, :, None] | still[:, None, :]] = 0
        scale = information[:, diagonal, diagonal]
        information[:, diagonal, diagonal] += damping[going, None] * scale + 1e-9
        moved = np.clip(
            at + np.linalg.solve(information, gradient[..., None])[..., 0], lower, upper
        )
        likelihood = log_likelihood(curve(moved)[0], k[going], total[going])
        gain = likelihood - best[going]
        better = gain >= 0
        theta[going[better]], best[going[better]] = moved[better], likelihood[better]
        damping[going] = np.where(better, damping[going] / 4, damping[going] * 5)
        done = (better & (gain < _GAIN)) | (damping[going] > 1e8)
        going = going[~done]
        if not going.size:
            break
    return theta, best


def profile_intervals(
    curve: Curve,
    theta: ArrayLike,
    correct: ArrayLike,
    n: ArrayLike,
    parameters: Sequence[int],
    *,
    lower: ArrayLike,
    upper: ArrayLike,
    level: float = 0.95,
    **options: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return intervals of parameters by their profile likelihood.

    .. math:: \{\vartheta : 2 [\ell(\hat\theta) - \max_{\theta: \theta_i = \vartheta} \ell(\theta)]
              \le \chi^2_{1, level}\}

    Parameters
    ----------
    curve, correct, n, lower, upper
        As of `fit_binomial`.
    theta : array-like, shape (n_sets, n_parameters)
        The estimates.
    parameters : sequence of int
        Those wanted.
    level : float
        Coverage.
    **options
        To `fit_binomial`.

    Returns
    -------
    low, high : ndarray, shape (n_sets, len(parameters))
        ``-inf`` or ``inf`` where the data do not exclude the bound.
    """
    from scipy.stats import chi2

    estimate = np.atleast_2d(np.asarray(theta, dtype=np.float64))
    k = np.atleast_2d(np.asarray(correct, dtype=np.float64))
    total = np.broadcast_to(np.asarray(n, dtype=np.float64), k.shape)
    lower, upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    least = log_likelihood(curve(estimate)[0], k, total) - chi2.ppf(level, 1) / 2
    sets, n_parameters = estimate.shape
    # One row for each data set, parameter and side.
    side = np.array([(i, s) for i in parameters for s in (0, 1)])
    row = np.repeat(np.arange(sets), len(side))
    which, up = np.tile(side, (sets, 1)).T
    lines = np.arange(len(row))
    held = np.zeros((len(row), n_parameters), dtype=bool)
    held[lines, which] = True
    inner = estimate[row, which]
    outer = np.where(up == 1, upper[which], lower[which])
    warm = estimate[row]

    def inside(value: NDArray[np.float64], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        start = warm[rows].copy()
        start[np.arange(len(rows)), which[rows]] = value
        found, best = fit_binomial(
            curve, start, k[row[rows]], total[row[rows]],
            lower=lower, upper=upper, fixed=held[rows], **options,
        )  # fmt: skip
        within = best >= least[row[rows]]
        warm[rows[within]] = found[within]
        return within

    open_ended = inside(outer, lines)
    warm[:] = estimate[row]
    todo = lines[~open_ended]
    for _ in range(_HALVINGS):
        middle = (inner[todo] + outer[todo]) / 2
        within = inside(middle, todo)
        inner[todo] = np.where(within, middle, inner[todo])
        outer[todo] = np.where(within, outer[todo], middle)
    bound = np.where(open_ended, np.where(up == 1, np.inf, -np.inf), inner)
    bound = bound.reshape(sets, len(parameters), 2)
    return bound[..., 0], bound[..., 1]
