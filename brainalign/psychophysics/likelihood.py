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
#: Steps from one bound of a parameter to the other by which its profile is followed.
_STRIDES = 64
_HALVINGS = 12


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
    ceiling: ArrayLike = np.inf,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Maximise the binomial likelihood of a curve within bounds, by damped Fisher scoring.

    .. math:: \theta \leftarrow \theta + (I + \mu\,\mathrm{diag}\,I)^{-1} J^\top
              \frac{k - n p}{p (1 - p)}, \qquad I = J^\top \frac{n}{p (1 - p)} J

    Steps that lower the likelihood are refused and the damping :math:`\mu` grows; parameters at a
    bound that the gradient points beyond stay there. All data sets are fitted together. A parameter
    above its ceiling costs :math:`\tfrac{1}{2} (\theta - ceiling)^2`, a half-normal prior of one
    unit; below it the prior says nothing.

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
    ceiling : float or array-like, shape (n_parameters,)
        Where the prior of each parameter begins.

    Returns
    -------
    theta : ndarray, shape (n_sets, n_parameters)
    likelihood : ndarray, shape (n_sets,)
        As of `log_likelihood`, less what the prior costs.

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

    def above(at: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(at - np.asarray(ceiling, dtype=np.float64), 0)

    best = log_likelihood(curve(theta)[0], k, total) - (above(theta) ** 2).sum(1) / 2
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
        gradient = (jacobian.transpose(0, 2, 1) @ residual[..., None])[..., 0] - above(at)
        information[:, diagonal, diagonal] += above(at) > 0
        still = held[going] | ((at <= lower) & (gradient < 0)) | ((at >= upper) & (gradient > 0))
        gradient[still] = 0
        information[still[:, :, None] | still[:, None, :]] = 0
        scale = information[:, diagonal, diagonal]
        information[:, diagonal, diagonal] += damping[going, None] * scale + 1e-9
        moved = np.clip(
            at + np.linalg.solve(information, gradient[..., None])[..., 0], lower, upper
        )
        likelihood = log_likelihood(curve(moved)[0], k[going], total[going])
        likelihood -= (above(moved) ** 2).sum(1) / 2
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
        ``-inf`` or ``inf`` where the data do not exclude the bound, nor any value that is reached
        once the bounds of the other `parameters` give way.

    Notes
    -----
    The profile is followed outwards from the estimate in short steps, each begun where the last
    ended: begun from far, a fit may stop short on a ridge, where one parameter makes up for
    another, and the value be excluded for no reason.
    """
    from scipy.stats import chi2

    estimate = np.atleast_2d(np.asarray(theta, dtype=np.float64))
    k = np.atleast_2d(np.asarray(correct, dtype=np.float64))
    total = np.broadcast_to(np.asarray(n, dtype=np.float64), k.shape)
    lower, upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    least = log_likelihood(curve(estimate)[0], k, total) - chi2.ppf(level, 1) / 2
    sets, n_parameters = estimate.shape
    # One row for each data set, parameter and side.
    side = np.array([(i, s) for i in parameters for s in (-1, 1)])
    row = np.repeat(np.arange(sets), len(side))
    which, sign = np.tile(side, (sets, 1)).T
    held = np.zeros((len(row), n_parameters), dtype=bool)
    held[np.arange(len(row)), which] = True
    bound = np.where(sign > 0, upper[which], lower[which])
    stride = sign * (upper - lower)[which] / _STRIDES
    warm = estimate[row]

    def inside(
        value: NDArray[np.float64],
        rows: NDArray[np.intp],
        low: NDArray[np.float64] = lower,
        high: NDArray[np.float64] = upper,
    ) -> NDArray[np.bool_]:
        start = warm[rows].copy()
        start[np.arange(len(rows)), which[rows]] = value
        found, best = fit_binomial(
            curve, start, k[row[rows]], total[row[rows]],
            lower=low, upper=high, fixed=held[rows], **options,
        )  # fmt: skip
        within = best >= least[row[rows]]
        warm[rows[within]] = found[within]
        return within

    def ahead(step: NDArray[np.float64], rows: NDArray[np.intp]) -> NDArray[np.float64]:
        value = end[rows] + step[rows]
        return np.where(sign[rows] > 0, np.minimum(value, upper[which[rows]]),
                        np.maximum(value, lower[which[rows]]))  # fmt: skip

    # A bound that is found inside from afar is so; one that is not may be reached yet.
    end = np.where(inside(bound, np.arange(len(row))), bound, estimate[row, which])
    todo = np.flatnonzero(end != bound)
    for _ in range(_STRIDES):
        walking = todo
        while walking.size:
            value = ahead(stride, walking)
            within = inside(value, walking)
            walking, value = walking[within], value[within]
            end[walking] = value
            walking = walking[value != bound[walking]]
        todo = todo[end[todo] != bound[todo]]
        step = stride.copy()
        for _ in range(_HALVINGS):
            step /= 2
            value = ahead(step, todo)
            within = inside(value, todo)
            end[todo] = np.where(within, value, end[todo])
        # What was excluded a stride away is tried again from next to it, and what lies inside on
        # the way of one parameter does so for all.
        todo = todo[inside(ahead(2 * step, todo), todo)]
        met = warm.reshape(sets, -1, n_parameters)
        furthest = np.where(sign > 0, met.argmax(1)[row, which], met.argmin(1)[row, which])
        value = met[row, furthest, which]
        further = sign * (value - end) > np.abs(stride) / 16
        end[further], warm[further] = value[further], met[row, furthest][further]
        todo = np.union1d(todo, np.flatnonzero(further & (end != bound)))
        if not todo.size:
            break
    open_ended = end == bound
    # An end that lies where another parameter meets its bound is one of the bound's making.
    # A small step tells, since one may give way by the root of what the other does.
    others = np.setdiff1d(np.arange(n_parameters), parameters)
    at_bound = ((warm <= lower) | (warm >= upper)) & ~held
    at_bound[:, others] = False
    leaning = np.flatnonzero(at_bound.any(1) & ~open_ended)
    if leaning.size:
        room = np.isin(np.arange(n_parameters), parameters).astype(np.float64)
        open_ended[leaning] = inside(
            end[leaning] + stride[leaning] / 16, leaning, lower - room, upper + room
        )
    ends = np.where(open_ended, sign * np.inf, end).reshape(sets, len(parameters), 2)
    return ends[..., 0], ends[..., 1]
