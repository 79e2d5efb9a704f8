"""Noise ceilings: the best score that any model could reach on data of this quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import ConfigError, SchemaError

__all__ = [
    "SubjectCeiling",
    "leave_one_subject_out",
    "ncsnr",
    "noise_ceiling",
    "normalised_score",
    "repeat_counts",
    "simulated_ceiling",
    "split_half",
]


class SubjectCeiling(NamedTuple):
    """Lower and upper bound of the ceiling of a group, and how many subjects they come from."""

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    n_subjects: NDArray[np.int64]


def ncsnr(responses: ArrayLike, stimulus_id: ArrayLike) -> NDArray[np.float64]:
    r"""Noise-ceiling signal-to-noise ratio of each neuroid, from repeated stimuli.

    .. math:: \mathrm{ncsnr} = \sigma_s / \sigma_n, \qquad
              \hat\sigma_s^2 = \max(0, \mathrm{Var}_s[\bar y_s] - \hat\sigma_n^2 \, \overline{1/k})

    with the noise variance pooled over the stimuli shown more than once, and ``k`` the repeats.

    Parameters
    ----------
    responses : array-like, shape (n_presentations, n_neuroids)
        Single presentations.
    stimulus_id : array-like, shape (n_presentations,)
        Stimulus of each presentation.

    Returns
    -------
    ndarray, shape (n_neuroids,)
        At least 0; infinite where repeats are identical and stimuli differ; NaN where all values
        are equal.

    Raises
    ------
    SchemaError
        If no stimulus is repeated.

    References
    ----------
    Allen et al. (2022), Nature Neuroscience 25, 116-126, Methods, "Noise ceiling estimation".
    """
    y = _matrix(responses)
    index, count = _index(stimulus_id, len(y))
    if (count < 2).all():
        raise SchemaError(
            f"No stimulus is repeated among {len(y)} presentations: there is no noise estimate.",
            "Pass an ncsnr coordinate, or a ceiling, if one is known.",
        )
    if len(count) < 2:
        raise SchemaError("Signal variance needs at least two stimuli; there is one.")
    mean = _group_mean(y, index, count)
    noise = ((y - mean[index]) ** 2).sum(axis=0) / (count - 1).sum()
    signal = np.maximum(0, mean.var(axis=0, ddof=1) - noise * np.mean(1 / count))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(_constant(y), np.nan, np.sqrt(signal / noise))


def noise_ceiling(ncsnr: ArrayLike, repeats: ArrayLike) -> NDArray[np.float64]:
    r"""Largest r^2 that a model can reach with the mean of `repeats` presentations.

    .. math:: \mathrm{NC} = \frac{\mathrm{ncsnr}^2}{\mathrm{ncsnr}^2 + \overline{1/k}}

    Parameters
    ----------
    ncsnr : array-like, shape (n_neuroids,)
        Signal-to-noise ratio of single presentations.
    repeats : int or array-like, shape (n_stimuli,)
        ``k``, presentations averaged per stimulus; where stimuli differ, the mean of 1/k counts.

    Returns
    -------
    ndarray, shape (n_neuroids,)
        Between 0 and 1.

    References
    ----------
    Allen et al. (2022), Nature Neuroscience 25, 116-126, Methods, "Noise ceiling estimation".
    """
    k = np.asarray(repeats, dtype=np.float64)
    if k.size == 0 or not (k > 0).all():
        raise ConfigError(f"repeats must be above 0; got {repeats!r}.")
    squared = np.asarray(ncsnr, dtype=np.float64) ** 2
    noise = np.mean(1 / k)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(squared), 1.0, squared / (squared + noise))


def split_half(
    responses: ArrayLike, stimulus_id: ArrayLike, *, n_splits: int = 50, seed: int = 0
) -> NDArray[np.float64]:
    r"""Reliability of the mean over repeats, by random halves with Spearman-Brown correction.

    .. math:: \rho = \frac{m \bar r}{1 + (m - 1) \bar r}, \qquad
              m = \frac{\langle 1 / h \rangle}{\langle 1 / k \rangle}

    ``r`` is the correlation over stimuli between the means of two random halves of ``h`` repeats
    each, out of ``k``; with an even number of repeats, the same for all stimuli, m is 2.
    The reliability estimates the largest r^2 a model can reach, as `noise_ceiling` does.

    Parameters
    ----------
    responses : array-like, shape (n_presentations, n_neuroids)
        Single presentations. Stimuli shown once are left out; of an odd number of repeats, one
        (drawn at random) is in neither half, for which m makes up.
    stimulus_id : array-like, shape (n_presentations,)
        Stimulus of each presentation.
    n_splits : int
        Random splits to average r over.
    seed : int
        Seed of the splits.

    Returns
    -------
    ndarray, shape (n_neuroids,)
        Negative estimates are 0; NaN where all values are equal.

    Raises
    ------
    SchemaError
        If fewer than three stimuli are repeated.
    """
    y = _matrix(responses)
    index, count = _index(stimulus_id, len(y))
    rows = [np.flatnonzero(index == s) for s in np.flatnonzero(count >= 2)]
    if len(rows) < 3:
        raise SchemaError(f"Split-half needs at least 3 repeated stimuli; there are {len(rows)}.")
    rng = np.random.default_rng(seed)
    total = np.zeros(y.shape[1])
    for _ in range(n_splits):
        halves = np.empty((2, len(rows), y.shape[1]))
        for s, members in enumerate(rows):
            drawn = rng.permutation(members)
            half = len(drawn) // 2
            halves[0, s] = y[drawn[:half]].mean(axis=0)
            halves[1, s] = y[drawn[half : 2 * half]].mean(axis=0)
        total += _correlate(halves[0], halves[1])
    r = total / n_splits
    repeats = np.array([len(members) for members in rows])
    m = np.mean(1 / (repeats // 2)) / np.mean(1 / repeats)
    reliability = np.clip(m * r / (1 + (m - 1) * np.maximum(r, 0)), 0, 1)
    return np.where(_constant(y[np.concatenate(rows)]), np.nan, reliability)


def leave_one_subject_out(responses: ArrayLike, *, units: str = "r") -> SubjectCeiling:
    r"""Ceiling of a group: how well the other subjects predict each subject.

    .. math:: \mathrm{lower} = \frac1n \sum_s \mathrm{corr}(y_s, \bar z_{-s}), \qquad
              \mathrm{upper} = \frac1n \sum_s \mathrm{corr}(y_s, \bar z)

    with :math:`\bar z` the mean of the z-scored responses of all subjects and
    :math:`\bar z_{-s}` that of the others. A model that is the same for all subjects reaches, with
    the true group response, a mean between the two; a model fitted to each subject may exceed them.

    Parameters
    ----------
    responses : array-like, shape (n_subjects, n_stimuli, n_neuroids) or (n_subjects, n_stimuli)
        Responses of each subject to the same stimuli in the same units of measurement (voxels of
        a common space, ROI means, RDM entries as stimuli). A subject whose responses of a neuroid
        are constant or not all finite is left out of that neuroid: NaN stands for a neuroid that a
        subject does not have.
    units : {"r", "r2"}
        Mean correlation; or mean squared correlation, with its sign, which compares with r^2.

    Returns
    -------
    SubjectCeiling
        `lower`, `upper` and `n_subjects`, all of shape (n_neuroids,); NaN where a neuroid has fewer
        than two subjects.

    Raises
    ------
    SchemaError
        With fewer than two subjects or three stimuli, or if subjects differ in shape.

    References
    ----------
    Nili et al. (2014), PLoS Computational Biology 10, e1003553.
    """
    if units not in ("r", "r2"):
        raise ConfigError(f"units is {units!r}; expected 'r' or 'r2'.")
    y = _subjects(responses)
    there = np.isfinite(y).all(axis=1) & (y != y[:, :1]).any(axis=1)
    y = np.where(there[:, None], y, 0.0)
    z = y - y.mean(axis=1, keepdims=True)
    z /= np.where(there, z.std(axis=1), 1.0)[:, None]
    n = there.sum(axis=0)
    total = z.sum(axis=0)
    bounds = np.zeros((2, y.shape[2]))
    for own, here in zip(z, there, strict=True):
        for bound, reference in zip(bounds, (total - own, total), strict=True):
            r = _correlate(own, reference)
            bound += np.where(here, r if units == "r" else r * np.abs(r), 0.0)
    lower, upper = np.where(n > 1, bounds / np.maximum(n, 1), np.nan)
    return SubjectCeiling(lower, upper, n.astype(np.int64))


def simulated_ceiling(
    data: ArrayLike,
    standard_error: ArrayLike,
    *,
    n_simulations: int = 10_000,
    relative_to: str = "zero",
    seed: int = 0,
) -> NDArray[np.float64]:
    r"""Largest expected R^2 given the standard errors of the data, by simulation.

    Signals are drawn from a normal distribution with the mean of the data and the variance
    :math:`\max(0, \mathrm{Var}[y] - \overline{se^2})`; noise with the standard error of each
    value is added; the ceiling is the median R^2 of the signal as prediction of signal + noise.

    Parameters
    ----------
    data : array-like, shape (n_stimuli, n_neuroids) or (n_stimuli,)
        Mean responses.
    standard_error : array-like, same shape
        Their standard errors, same unit.
    n_simulations : int
        Number of simulated data sets.
    relative_to : {"zero", "mean"}
        What R^2 compares with: ``1 - SS(y - signal) / SS(y)``, or about the mean of y.
    seed : int
        Seed.

    Returns
    -------
    ndarray, shape (n_neuroids,)
        At most 1.

    References
    ----------
    Kay & Yeatman (2017), eLife 6, e22341, Methods, "Noise ceiling".
    """
    y = _matrix(data)
    se = _matrix(standard_error)
    if y.shape != se.shape:
        raise SchemaError(f"data has shape {y.shape}, standard_error {se.shape}.")
    if relative_to not in ("zero", "mean"):
        raise ConfigError(f"relative_to is {relative_to!r}; expected 'zero' or 'mean'.")
    rng = np.random.default_rng(seed)
    out = np.empty(y.shape[1])
    for t in range(y.shape[1]):
        spread = np.sqrt(max(0.0, y[:, t].var(ddof=1) - np.mean(se[:, t] ** 2)))
        signal = y[:, t].mean() + spread * rng.standard_normal((n_simulations, len(y)))
        noise = se[:, t] * rng.standard_normal(signal.shape)
        simulated = signal + noise
        if relative_to == "mean":
            simulated = simulated - simulated.mean(axis=1, keepdims=True)
        out[t] = np.median(1 - (noise**2).sum(axis=1) / (simulated**2).sum(axis=1))
    return out


def normalised_score(
    r: ArrayLike, ceiling: ArrayLike, *, threshold: float = 0.1
) -> tuple[NDArray[np.float64], int]:
    r"""Share of the explainable variance that is explained.

    .. math:: \mathrm{normalised} = \mathrm{sign}(r) \, r^2 / \mathrm{NC}

    The sign is kept, so that predictions that go the wrong way do not raise an average.

    Parameters
    ----------
    r : array-like, shape (..., n_neuroids)
        Pearson r between measured and predicted responses.
    ceiling : array-like, shape (n_neuroids,)
        Noise ceiling, in units of r^2.
    threshold : float
        Neuroids with a ceiling below it are excluded: NaN.

    Returns
    -------
    normalised : ndarray, shape of `r`
        May exceed 1 by estimation noise.
    n_excluded : int
        Neuroids without a ceiling or below the threshold.
    """
    r = np.asarray(r, dtype=np.float64)
    nc = np.asarray(ceiling, dtype=np.float64)
    usable = np.isfinite(nc) & (nc >= threshold) & (nc > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(usable, r * np.abs(r) / nc, np.nan)
    return value, int((~usable).sum())


def repeat_counts(stimulus_id: ArrayLike) -> dict[str, int]:
    """Return the number of presentations of each stimulus, in order of first appearance."""
    counts: dict[str, int] = {}
    for s in np.asarray(stimulus_id).astype(str).tolist():
        counts[s] = counts.get(s, 0) + 1
    return counts


def _subjects(responses: ArrayLike) -> NDArray[np.float64]:
    """Return responses as (subject, stimulus, neuroid), or raise naming the shapes that differ."""
    if not isinstance(responses, np.ndarray) and isinstance(responses, Sequence):
        shapes = [np.shape(s) for s in responses]
        if len(set(shapes)) > 1:
            raise SchemaError(
                f"Subjects differ in shape: {shapes}.",
                "Take the stimuli all have, and NaN for neuroids that a subject does not have.",
            )
    y = np.asarray(responses, dtype=np.float64)
    if y.ndim == 2:
        y = y[:, :, None]
    if y.ndim != 3 or len(y) < 2 or y.shape[1] < 3:
        raise SchemaError(
            "Expected (n_subjects, n_stimuli, n_neuroids) with at least two subjects and three "
            f"stimuli; got {np.shape(responses)}."
        )
    return y


def _matrix(x: ArrayLike) -> NDArray[np.float64]:
    y = np.asarray(x, dtype=np.float64)
    if y.ndim not in (1, 2):
        raise SchemaError(f"Expected a matrix (rows, neuroids); got shape {y.shape}.")
    return y.reshape(len(y), -1)


def _index(stimulus_id: ArrayLike, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    ids = np.asarray(stimulus_id).astype(str)
    if ids.shape != (n,):
        raise SchemaError(f"stimulus_id has shape {ids.shape}; expected ({n},).")
    _, index, count = np.unique(ids, return_inverse=True, return_counts=True)
    return index, count


def _group_mean(
    y: NDArray[np.float64], index: NDArray[np.intp], count: NDArray[np.intp]
) -> NDArray[np.float64]:
    order = np.argsort(index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    return np.asarray(np.add.reduceat(y[order], starts, axis=0) / count[:, None])


def _constant(y: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((y == y[:1]).all(axis=0))


def _correlate(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0)))
