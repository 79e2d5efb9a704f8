"""Networks trained several times: conditions compared over training runs, stimuli and subjects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.group import two_factor_test

__all__ = ["compare_trainings"]

#: Fewer subjects than this are no sample of a population: their mean is taken as it is.
LEAST_SUBJECTS = 4


def compare_trainings(
    values: ArrayLike,
    samples: ArrayLike,
    *,
    conditions: Sequence[str],
    seeds: Sequence[int],
    reference: str,
    n_stimuli: int,
    level: float = 0.95,
) -> xr.Dataset:
    r"""Compare conditions (architectures, tasks) that were each trained with the same seeds.

    .. math:: \hat\sigma^2 = \hat\sigma_{data}^2 + \hat\sigma_{seeds}^2, \qquad
              \mathrm{dof} = \frac{\hat\sigma^4}{\hat\sigma_{data}^4 / \nu_{data}
              + \hat\sigma_{seeds}^4 / \nu_{seeds}}

    for the mean over subjects and seeds of a condition, and likewise for its difference from the
    reference, paired by seed (one seed stands for one set of first weights and one order of
    batches), subject and sample of stimuli. :math:`\hat\sigma_{data}^2` is the sampling variance of
    the mean over seeds: over new subjects and new stimuli (see
    `brainalign.evaluation.two_factor_test`) from 4 subjects on, else over new stimuli only.
    :math:`\hat\sigma_{seeds}^2` is estimated from all C conditions together, as few seeds say
    little of one: for a mean, the variance over seeds within conditions over their number S, with
    :math:`\nu = C (S - 1)`; for a difference, twice the mean square of what condition and seed
    leave unexplained (randomised blocks) over S, with :math:`\nu = (C - 1)(S - 1)`. This takes it
    that training varies as much in all conditions: look at `per_seed`. What a seed and the stimuli
    do together is counted in both terms, so the intervals err on the wide side.

    Parameters
    ----------
    values : array-like, shape (n_subjects, n_conditions, n_seeds)
        Scores.
    samples : array-like, shape (n_bootstrap, n_subjects, n_conditions, n_seeds)
        The same after resampling stimuli; a sample draws the same stimuli for all.
    conditions : sequence of str
        Names.
    seeds : sequence of int
        Of the training runs. With one, intervals hold for these very networks.
    reference : str
        The condition that others are compared with.
    n_stimuli : int
        Stimuli that were resampled.
    level : float
        Coverage of the intervals.

    Returns
    -------
    xarray.Dataset
        ``value, low, high, se, se_seeds`` (condition); ``per_seed`` (condition, seed), mean over
        subjects; ``difference, difference_low, difference_high, difference_se`` (condition),
        ``difference_per_seed`` (condition, seed); ``p`` of the difference, two-sided from t, and
        ``p_holm``, corrected for the number of conditions compared; NaN for the reference.

    Raises
    ------
    SchemaError
        If the shapes do not fit each other.
    UnknownNameError
        If the reference is no condition.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566 (subjects and stimuli); Dunnett (1955), Journal of the
    American Statistical Association 50, 1096-1121 (a pooled variance for comparisons with one
    reference; the correction here is Holm's); Satterthwaite (1946), Biometrics
    Bulletin 2, 110-114; Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    x, drawn = np.asarray(values, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    names = [str(c) for c in conditions]
    if x.ndim != 3 or x.shape[1:] != (len(names), len(seeds)) or drawn.shape[1:] != x.shape:
        raise SchemaError(
            f"values have shape {x.shape} and samples {drawn.shape}; expected (subjects, "
            f"{len(names)} conditions, {len(seeds)} seeds), and samples before that."
        )
    if reference not in names:
        raise UnknownNameError(
            f"There is no condition {reference!r}.{near(reference, names)}",
            f"Known: {', '.join(names)}.",
        )
    at = names.index(reference)
    single = _estimate(x, drawn, _within(x.mean(axis=0)), n_stimuli, level)
    paired = _estimate(
        x - x[:, [at]], drawn - drawn[:, :, [at]], _blocks(x.mean(axis=0)), n_stimuli, level
    )
    for name in ("low", "high", "se"):
        paired[name][at] = 0.0
    p = paired["p"]
    p[at] = np.nan
    others = np.flatnonzero(np.arange(len(names)) != at)
    holm = np.full(len(names), np.nan)
    holm[others] = _holm(p[others])
    one = "condition"
    return xr.Dataset(
        {
            **{k: (one, single[k]) for k in ("value", "low", "high", "se", "se_seeds")},
            "per_seed": ((one, "seed"), x.mean(axis=0)),
            "difference": (one, paired["value"]),
            **{f"difference_{k}": (one, paired[k]) for k in ("low", "high", "se")},
            "difference_per_seed": ((one, "seed"), (x - x[:, [at]]).mean(axis=0)),
            "p": (one, p),
            "p_holm": (one, holm),
        },
        coords={"condition": names, "seed": list(seeds)},
        attrs={
            "reference": reference, "level": level, "n_stimuli": n_stimuli,
            "n_subjects": len(x), "n_seeds": len(seeds),
            "over": "seeds, stimuli and subjects" if len(x) >= LEAST_SUBJECTS
            else "seeds and stimuli",
        },
    )  # fmt: skip


def _within(x: NDArray[np.float64]) -> tuple[float, int]:
    """Variance of the mean over seeds of one condition (condition, seed), and its dof."""
    n_conditions, n_seeds = x.shape
    if n_seeds < 2:
        return 0.0, 0
    return float(x.var(axis=1, ddof=1).mean() / n_seeds), n_conditions * (n_seeds - 1)


def _blocks(x: NDArray[np.float64]) -> tuple[float, int]:
    """Variance of the difference of two conditions (condition, seed), and its dof."""
    n_conditions, n_seeds = x.shape
    dof = (n_conditions - 1) * (n_seeds - 1)
    if dof < 1:
        return 0.0, 0
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean()
    return float(2 * (rest**2).sum() / dof / n_seeds), dof


def _estimate(
    x: NDArray[np.float64],
    drawn: NDArray[np.float64],
    seeds: tuple[float, int],
    n_stimuli: int,
    level: float,
) -> dict[str, NDArray[np.float64]]:
    """Estimate the mean of (subject, condition, seed) over subjects and seeds."""
    value = x.mean(axis=(0, 2))
    if len(x) >= LEAST_SUBJECTS:
        tested = two_factor_test(x.mean(axis=2), drawn.mean(axis=3), n_stimuli=n_stimuli)
        data, dof_data = tested.se**2, tested.dof
    else:
        if n_stimuli < 2:
            raise ConfigError(f"Stimuli cannot be resampled: there are {n_stimuli}.")
        data = drawn.mean(axis=(1, 3)).var(axis=0, ddof=1) * n_stimuli / (n_stimuli - 1)
        dof_data = np.full(len(value), n_stimuli - 1.0)
    between, dof_seeds = seeds
    rest = between**2 / dof_seeds if dof_seeds else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = (data + between) ** 2 / (data**2 / dof_data + rest)
        se = np.sqrt(data + between)
        t = np.where(value == 0, 0.0, value / se)
    dof = np.where(np.isfinite(dof), dof, dof_data)
    half = se * stats.t.ppf((1 + level) / 2, dof)
    return {
        "value": value, "low": value - half, "high": value + half, "se": se,
        "se_seeds": np.full(len(value), np.sqrt(between) if dof_seeds else np.nan),
        "p": 2 * stats.t.sf(np.abs(t), dof),
    }  # fmt: skip


def _holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
