"""Inference over subjects: models compared over subjects and stimuli together, and group maps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from brainalign.device import resolve_device
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.ceilings import normalised_score
from brainalign.evaluation.scores import undefined
from brainalign.evaluation.significance import (
    bootstrap_counts,
    bootstrap_r,
    fdr,
    max_statistic_p,
    percentiles,
    permutation_p,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "GroupEstimate",
    "SignFlipTest",
    "compare_over_subjects",
    "compare_samples",
    "group_map",
    "sign_flip_test",
    "two_factor_test",
    "two_factor_variance",
]

logger = logging.getLogger(__name__)

_NEUROIDS_AT_ONCE = 4096
_NATIVE = ("T1w", "T2w", "func", "orig", "fsnative", "individual", "boldref")


class GroupEstimate(NamedTuple):
    """A mean over subjects with its standard error, interval and two-sided p against 0."""

    value: NDArray[np.float64]
    se: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]
    dof: NDArray[np.float64]


class SignFlipTest(NamedTuple):
    """Mean over subjects of each target with its interval, t and sign-flip p-values.

    `p_max` is corrected for all targets by the maximum statistic, `q` for the false discovery
    rate; `n_subjects` counts who has a value; `null_max` is the largest t of each flip.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    t: NDArray[np.float64]
    p: NDArray[np.float64]
    p_max: NDArray[np.float64]
    q: NDArray[np.float64]
    n_subjects: NDArray[np.int64]
    null_max: NDArray[np.float64]


def two_factor_variance(
    both: ArrayLike,
    subjects: ArrayLike,
    stimuli: ArrayLike,
    *,
    n_subjects: ArrayLike,
    n_stimuli: ArrayLike,
) -> NDArray[np.float64]:
    r"""Combine three bootstrap variances into that over new subjects and new stimuli.

    .. math:: \hat\sigma^2 = c_u \sigma_u^2 + c_s \sigma_s^2
              - c_u c_s (\sigma_{us}^2 - \sigma_u^2 - \sigma_s^2), \qquad c_n = n / (n - 1)

    With large numbers this is :math:`2(\sigma_u^2 + \sigma_s^2) - \sigma_{us}^2`. Let A, B and C be
    the variances of the mean that subjects, stimuli, and their interaction with the measurement
    noise bring. A bootstrap over subjects has A + C, one over stimuli B + C, one over both
    A + B + 3C, since it draws the noise of the cells with each factor and once more; the
    combination above has A + B + C, which is what other subjects and stimuli would show. The
    interaction (the bracket) is not taken below 0, nor the result below what either factor alone
    gives.

    Parameters
    ----------
    both, subjects, stimuli : array-like
        Bootstrap variances with both factors, only subjects, and only stimuli resampled.
    n_subjects, n_stimuli : array-like of int
        Numbers that were resampled.

    Returns
    -------
    ndarray

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566, eq. 7-9.
    """
    us, u, s = (np.asarray(v, dtype=np.float64) for v in (both, subjects, stimuli))
    return _variance_parts(us, u, s, np.asarray(n_subjects), np.asarray(n_stimuli))[0]


def two_factor_test(
    values: ArrayLike, samples: ArrayLike, *, n_stimuli: int, level: float = 0.95
) -> GroupEstimate:
    r"""Mean over subjects, tested against 0 for new subjects and new stimuli.

    .. math:: t = \frac{\bar x}{\hat\sigma}, \qquad
              \mathrm{dof} = \frac{(\hat\sigma_u^2 + \hat\sigma_b^2)^2}
              {\hat\sigma_u^4 / (n_u - 1) + \hat\sigma_b^4 / (n_s - 1)}

    with :math:`\hat\sigma^2` from `two_factor_variance`; its parts are
    :math:`\hat\sigma_u^2` (subjects and noise) and :math:`\hat\sigma_b^2` (the rest, common to all
    subjects), whose degrees of freedom are weighted as Satterthwaite does: :math:`n_u - 1` where
    subjects differ most. Only stimuli are drawn at random: given the samples over stimuli, the
    variance that resampled subjects add is known exactly.

    Parameters
    ----------
    values : array-like, shape (n_subjects, ...)
        What is tested, for each subject: a difference of scores, for example. NaN leaves a subject
        out.
    samples : array-like, shape (n_bootstrap, n_subjects, ...)
        The same after resampling stimuli; a sample draws the same stimuli for all subjects.
    n_stimuli : int
        Stimuli that were resampled; the smallest number any subject has.
    level : float
        Coverage of the interval.

    Returns
    -------
    GroupEstimate
        Of the shape of one subject's value; NaN with fewer than two subjects.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566, eq. 7-9; Satterthwaite (1946), Biometrics Bulletin 2,
    110-114.
    """
    x, drawn = np.asarray(values, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if drawn.ndim != x.ndim + 1 or drawn.shape[1:] != x.shape or len(drawn) < 2:
        raise SchemaError(
            f"values have shape {x.shape} and samples {drawn.shape}; expected (n_subjects, ...) "
            "and (n_bootstrap, n_subjects, ...)."
        )
    if n_stimuli < 2:
        raise ConfigError(f"Stimuli cannot be resampled: there are {n_stimuli}.")
    _level(level)
    present = np.isfinite(x)
    n = present.sum(axis=0)
    weight = np.where(present, 1.0, 0.0) / np.maximum(n, 1)
    usable = np.isfinite(np.where(present, drawn, 0.0)).all(axis=tuple(range(1, drawn.ndim)))
    if usable.sum() < 2:
        raise ConfigError(f"Only {int(usable.sum())} of {len(drawn)} samples are finite.")
    drawn = np.where(present, drawn[usable], 0.0)
    value = (weight * np.where(present, x, 0.0)).sum(axis=0)

    def spread(data: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        mean = (weight * data).sum(axis=axis, keepdims=True)
        squares: NDArray[np.float64] = (weight * (data - mean) ** 2).sum(axis=axis)
        return squares / np.maximum(n, 1)

    by_subject = spread(np.where(present, x, 0.0), 0)
    by_stimulus = (weight * drawn).sum(axis=1).var(axis=0, ddof=1)
    both = by_stimulus + spread(drawn, 1).mean(axis=0)
    several = np.maximum(n, 2)
    variance, part, rest = _variance_parts(
        both, by_subject, by_stimulus, several, np.asarray(n_stimuli)
    )
    enough = n > 1
    se = np.where(enough, np.sqrt(variance), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = (part + rest) ** 2 / (part**2 / (several - 1) + rest**2 / (n_stimuli - 1))
    dof = np.where(enough, np.where(np.isfinite(dof), dof, several - 1), np.nan)
    half = se * stats.t.ppf((1 + level) / 2, dof)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(value == 0, 0.0, value / se)
    p = 2 * stats.t.sf(np.abs(t), dof)
    value = np.where(n > 0, value, np.nan)
    return GroupEstimate(value, se, value - half, value + half, p, dof)


def compare_over_subjects(
    measured: Sequence[ArrayLike],
    predicted: Mapping[str, Sequence[ArrayLike]],
    *,
    stimulus_id: Sequence[ArrayLike] | None = None,
    roi: Sequence[ArrayLike] | None = None,
    ceiling: Sequence[ArrayLike] | None = None,
    subjects: Sequence[str] | None = None,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> xr.Dataset:
    """Compare models (feature spaces, layers) so that the result holds for subjects and stimuli.

    A subject's score is the mean over its neuroids of r between measured and predicted values.
    Stimuli are resampled by their id in all subjects together, whether subjects saw the same
    stimuli, partly the same, or each their own; fits are not repeated. Tests are those of
    `two_factor_test`, paired within subjects.

    Parameters
    ----------
    measured : sequence of array-like, shape (n_stimuli_s, n_neuroids_s)
        One per subject: held-out responses, whose numbers of rows and neuroids may differ.
    predicted : dict of model name to sequence of array-like
        Predictions of the same rows and neuroids, one per subject. Of values pooled over folds,
        subtract the training mean of the fold from both first.
    stimulus_id : sequence of array-like of str, optional
        The stimulus of each row, one array per subject. By default all subjects have the same
        stimuli in the same order.
    roi : sequence of array-like of str, optional
        The ROI of each neuroid, one array per subject; neuroids with "" are left out. Without it
        all neuroids are averaged.
    ceiling : sequence of array-like, optional
        Noise ceilings in units of r^2, one array per subject: scores are then r^2, with its sign,
        over the ceiling (see `brainalign.evaluation.normalised_score`).
    subjects : sequence of str, optional
        Names.
    n_bootstrap : int
        Samples of stimuli.
    level : float
        Coverage of the intervals.
    seed : int
        Seed.
    device : str or torch.device
        As in `brainalign.evaluation.permutation_test`.

    Returns
    -------
    Dataset
        ``per_subject`` (model, subject) with ``per_subject_low, per_subject_high``, percentiles
        over stimuli; ``value, se, low, high`` (model); ``difference, difference_se,
        difference_low, difference_high, p`` (model, model_2), p two-sided and not corrected for
        the number of pairs; ``n_neuroids, n_stimuli`` (subject); ``n_subjects``. With `roi` each
        but ``n_stimuli`` has the dimension roi as well; a subject without a ROI is left out there.

    Raises
    ------
    ConfigError
        With fewer than two subjects, or no model.
    SchemaError
        If shapes do not agree; the subject and the model are named.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566, eq. 7-9.
    """
    _level(level)
    names = _subject_names(subjects, len(measured))
    y, p, ids = _checked(measured, predicted, stimulus_id, names)
    regions, members = _regions(roi, y, names)
    limits = _ceilings(ceiling, y, names)
    unique, index = np.unique(np.concatenate(ids), return_inverse=True)
    rows = np.split(index, np.cumsum([len(i) for i in ids])[:-1])
    n_stimuli = np.array([len(np.unique(r)) for r in rows])
    if n_stimuli.min() < 3:
        raise SchemaError(
            f"Subject {names[int(n_stimuli.argmin())]!r} has {n_stimuli.min()} stimuli; a "
            "bootstrap over stimuli needs at least 3."
        )
    counts = bootstrap_counts(len(unique), n_bootstrap, seed=seed)
    shape = (len(names), len(regions), len(p))
    value, drawn = np.full(shape, np.nan), np.full((n_bootstrap, *shape), np.nan)
    n_neuroids = np.zeros(shape[:2], dtype=np.int64)
    for s, truth in enumerate(y):
        # Row 0 is the measured sample itself; all models are scored on the same neuroids.
        weight = np.vstack([np.ones(len(truth)), counts[:, rows[s]]])
        good = ~np.logical_or.reduce([undefined(truth, p[m][s]) for m in p])
        if limits is not None:
            good &= np.isfinite(normalised_score(np.zeros(len(good)), limits[s])[0])
        n_neuroids[s] = [(good & here).sum() for here in members[s]]
        for m, model in enumerate(p):
            means = _region_means(
                truth, p[model][s], weight, good, members[s],
                None if limits is None else limits[s], device,
            )  # fmt: skip
            value[s, :, m], drawn[:, s, :, m] = means[0], means[1:]
    if not np.isfinite(value).any():
        raise SchemaError("No subject has a neuroid with a score: all are constant or not finite.")
    ds = compare_samples(
        value, drawn, subjects=names, rois=regions, models=list(p), n_stimuli=n_stimuli,
        n_neuroids=n_neuroids, level=level,
    )  # fmt: skip
    ds.attrs |= {
        "measure": "r" if ceiling is None else "normalised", "n_bootstrap": n_bootstrap,
        "seed": seed, "n_shared_stimuli": _n_shared(rows),
    }  # fmt: skip
    return ds if roi is not None else ds.squeeze("roi", drop=True)


def compare_samples(
    values: ArrayLike,
    samples: ArrayLike,
    *,
    subjects: Sequence[str],
    rois: Sequence[str],
    models: Sequence[str],
    n_stimuli: ArrayLike,
    n_neuroids: ArrayLike,
    level: float = 0.95,
) -> xr.Dataset:
    """Compare models over subjects and stimuli, from scores whose bootstrap is at hand.

    Parameters
    ----------
    values : array-like, shape (n_subjects, n_rois, n_models)
        Scores. NaN leaves a subject out.
    samples : array-like, shape (n_bootstrap, n_subjects, n_rois, n_models)
        The same after resampling stimuli; a sample draws the same stimuli for all subjects.
    subjects, rois, models : sequence of str
        Names.
    n_stimuli : array-like of int, shape (n_subjects,)
        Stimuli that were resampled.
    n_neuroids : array-like of int, shape (n_subjects, n_rois)
        Neuroids behind each score.
    level : float
        Coverage of the intervals.

    Returns
    -------
    Dataset
        As of `compare_over_subjects`, with the dimension roi.
    """
    value, drawn = np.asarray(values, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    smallest = int(np.min(n_stimuli))
    single = two_factor_test(value, drawn, n_stimuli=smallest, level=level)
    pairs = [
        two_factor_test(
            value[:, r, :, None] - value[:, r, None, :],
            drawn[:, :, r, :, None] - drawn[:, :, r, None, :],
            n_stimuli=smallest,
            level=level,
        )
        for r in range(len(rois))
    ]
    low, high = percentiles(drawn, level)
    one, two, each = ("roi", "model"), ("roi", "model", "model_2"), ("subject", "roi", "model")
    ds = xr.Dataset(
        {
            "per_subject": (each, value),
            "per_subject_low": (each, low),
            "per_subject_high": (each, high),
            "value": (one, single.value),
            "se": (one, single.se),
            "low": (one, single.low),
            "high": (one, single.high),
            "difference": (two, np.stack([t.value for t in pairs])),
            "difference_se": (two, np.stack([t.se for t in pairs])),
            "difference_low": (two, np.stack([t.low for t in pairs])),
            "difference_high": (two, np.stack([t.high for t in pairs])),
            "p": (two, np.stack([t.p for t in pairs])),
            "n_subjects": ("roi", np.isfinite(value).all(axis=-1).sum(axis=0)),
            "n_neuroids": (("subject", "roi"), np.asarray(n_neuroids)),
            "n_stimuli": ("subject", np.asarray(n_stimuli)),
        },
        coords={"model": list(models), "model_2": list(models), "subject": list(subjects),
                "roi": list(rois)},
        attrs={"over": "subjects and stimuli", "level": level},
    )  # fmt: skip
    return ds.transpose("model", "model_2", "roi", "subject", missing_dims="ignore")


def sign_flip_test(
    maps: ArrayLike,
    *,
    n_permutations: int = 10_000,
    tail: str = "greater",
    level: float = 0.95,
    min_subjects: int = 2,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> SignFlipTest:
    r"""Test whether the mean over subjects differs from 0, by flipping signs of subjects.

    .. math:: t = \frac{\bar x}{s / \sqrt{n}}

    Under the null hypothesis a subject's value is as likely to be x as -x. A flip is applied to
    all targets of a subject. Where subjects have no more than `n_permutations` flips, all are
    taken once and the test is exact; with few subjects p cannot be small: at least 1/2^n.

    Parameters
    ----------
    maps : array-like, shape (n_subjects, n_targets)
        One value per subject, as a difference from chance: r, accuracy minus chance, the
        difference of two models. NaN where a subject has none.
    n_permutations : int
        Flips, at most.
    tail : {"greater", "two-sided"}
        The alternative.
    level : float
        Coverage of the interval of the mean, :math:`\bar x \pm t_{n-1}\, s/\sqrt{n}`: subjects
        are a random sample.
    min_subjects : int
        Targets with fewer subjects get NaN, and their number of subjects.
    seed : int
        Seed.
    device : str or torch.device
        As in `brainalign.evaluation.permutation_test`.

    Returns
    -------
    SignFlipTest
        NaN also where all subjects have the same absolute value.

    Raises
    ------
    ConfigError
        With fewer than two subjects.

    References
    ----------
    Nichols & Holmes (2002), Human Brain Mapping 15, 1-25; Winkler et al. (2014), NeuroImage 92,
    381-397.
    """
    import torch

    _level(level)
    if tail not in ("greater", "two-sided"):
        raise ConfigError(f"tail is {tail!r}; expected 'greater' or 'two-sided'.")
    x = np.asarray(maps, dtype=np.float64)
    if x.ndim != 2:
        raise SchemaError(f"Expected maps of shape (n_subjects, n_targets); got {x.shape}.")
    if len(x) < 2 or min_subjects < 2:
        raise ConfigError(
            f"A test over subjects needs at least two; got {len(x)} (min_subjects {min_subjects})."
        )
    where = resolve_device(device)
    present = np.isfinite(x)
    n = present.sum(axis=0)
    filled = np.where(present, x, 0.0)
    size = np.abs(filled)
    widest = size.max(axis=0)
    even = widest - np.where(present, size, np.inf).min(axis=0) <= 1e-12 * widest
    usable = np.flatnonzero((n >= min_subjects) & ~even)
    flips = _flips(len(x), n_permutations, seed)
    hits = np.zeros(x.shape[1])
    null_max = np.full(len(flips), -np.inf)
    mean, se = (np.full(x.shape[1], np.nan) for _ in range(2))
    signs = torch.as_tensor(flips, device=where)
    for start in range(0, len(usable), _NEUROIDS_AT_ONCE):
        part = usable[start : start + _NEUROIDS_AT_ONCE]
        data = torch.as_tensor(filled[:, part], device=where)
        count = torch.as_tensor(n[part], dtype=torch.float64, device=where)
        squares, slack = (data**2).sum(dim=0), 1e-12 * data.abs().sum(dim=0)

        def error(total: Any, count: Any = count, squares: Any = squares) -> Any:
            # The sum of squares is the same for all flips: only the sum changes.
            return ((squares - total**2 / count).clamp(min=0) / (count - 1) / count).sqrt()

        observed = data.sum(dim=0)
        null = signs @ data
        null_t = null / count / error(null)
        if tail == "two-sided":
            null, null_t = null.abs(), null_t.abs()
            reached = null >= observed.abs() - slack
        else:
            reached = null >= observed - slack
        hits[part] = reached.sum(dim=0).cpu().numpy()
        if len(flips):
            null_max = np.maximum(null_max, null_t.amax(dim=1).cpu().numpy())
        mean[part] = (observed / count).cpu().numpy()
        se[part] = error(observed).cpu().numpy()
    t = mean / se
    p = np.full(x.shape[1], np.nan)
    p[usable] = permutation_p(hits[usable], len(flips))
    half = se * stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1))
    strength = np.abs(t) if tail == "two-sided" else t
    # The same t from another order of the sum differs by rounding, which grows with t.
    strength = strength * (1 - 1e-9 * np.sign(strength))
    return SignFlipTest(
        mean, mean - half, mean + half, t, p,
        max_statistic_p(strength, null_max), fdr(p), n.astype(np.int64), null_max,
    )  # fmt: skip


def group_map(
    scores: Sequence[xr.Dataset] | Mapping[str, xr.Dataset],
    measure: str = "r",
    *,
    layer: str | None = None,
    n_permutations: int = 10_000,
    tail: str = "greater",
    level: float = 0.95,
    min_subjects: int = 2,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> xr.Dataset:
    """Map over subjects in a common space: mean, interval, t and p-values of every neuroid.

    Neuroids are matched by hemisphere and vertex, or by voxel i, j, k, never by their order.

    Parameters
    ----------
    scores : sequence or dict of Dataset
        One per subject, with coordinates hemisphere and vertex, or i, j, k; a dict names subjects.
    measure : str
        The variable to average: 0 must be what chance gives.
    layer : str, optional
        Which layer, of a variable (layer, neuroid).
    n_permutations, tail, level, min_subjects, seed, device
        As in `sign_flip_test`.

    Returns
    -------
    Dataset
        ``mean, low, high, t, p, p_max, q, n_subjects`` (neuroid), over all neuroids that some
        subject has, with the coordinates and attrs that `brainalign.data.maps` writes files from.

    Raises
    ------
    SchemaError
        If subjects are not in one space (another grid, mesh or name of the space), a space is a
        subject's own, a neuroid is there twice, or neuroids have no place.
    ConfigError
        With fewer than two subjects, or one of them twice.
    UnknownNameError
        If a subject has no such measure or layer.
    """
    named, parts = _named(scores)
    kind = _place(parts, named)
    attrs = _one_space(parts, named, kind)
    values = [_map_of(ds, measure, layer, name) for ds, name in zip(parts, named, strict=True)]
    places = [_places(ds, kind, name) for ds, name in zip(parts, named, strict=True)]
    common, index = np.unique(np.concatenate(places), axis=0, return_inverse=True)
    rows = np.split(np.ravel(index), np.cumsum([len(k) for k in places])[:-1])
    maps = np.full((len(parts), len(common)), np.nan)
    for s, (here, own) in enumerate(zip(rows, values, strict=True)):
        maps[s, here] = own
    test = sign_flip_test(
        maps, n_permutations=n_permutations, tail=tail, level=level,
        min_subjects=min_subjects, seed=seed, device=device,
    )  # fmt: skip
    partial = int((test.n_subjects < len(parts)).sum())
    if partial:
        logger.warning("%d of %d neuroids lack a value in some of %d subjects.",
                       partial, len(common), len(parts))  # fmt: skip
    fields = ("mean", "low", "high", "t", "p", "p_max", "q", "n_subjects")
    return xr.Dataset(
        {f: ("neuroid", getattr(test, f)) for f in fields},
        coords=_group_coords(parts, rows, common, kind),
        attrs={
            **attrs, "measure": measure, "tail": tail, "level": level, "seed": seed,
            "subjects": named, "n_flips": len(test.null_max), "neuroids_partial": partial,
            **({} if layer is None else {"layer": layer}),
        },
    )  # fmt: skip


def _variance_parts(
    both: NDArray[np.float64],
    subjects: NDArray[np.float64],
    stimuli: NDArray[np.float64],
    n_subjects: NDArray[np.int64],
    n_stimuli: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the corrected variance, its part of subjects and noise, and the rest of it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        cu, cs = n_subjects / (n_subjects - 1), n_stimuli / (n_stimuli - 1)
    interaction = np.maximum(both - subjects - stimuli, 0)
    part = np.asarray(cu * subjects)
    rest = np.maximum(cs * stimuli - cu * cs * interaction, 0)
    return np.maximum(part + rest, cs * stimuli), part, rest


def _level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1; got {level}.")


def _subject_names(subjects: Sequence[str] | None, n: int) -> list[str]:
    names = [str(i + 1) for i in range(n)] if subjects is None else [str(s) for s in subjects]
    if len(names) != n or len(set(names)) < n:
        raise ConfigError(f"There are {n} subjects; their names are {names}.",
                          "Give each a name of its own.")  # fmt: skip
    if n < 2:
        raise ConfigError(
            f"A comparison over subjects needs at least two; there is {n}.",
            "One subject's interval over stimuli says nothing about other subjects.",
        )
    return names


def _checked(
    measured: Sequence[ArrayLike],
    predicted: Mapping[str, Sequence[ArrayLike]],
    stimulus_id: Sequence[ArrayLike] | None,
    names: list[str],
) -> tuple[list[NDArray[Any]], dict[str, list[NDArray[Any]]], list[NDArray[np.str_]]]:
    if not predicted:
        raise ConfigError("There are no models to compare.")
    y = [_columns(m) for m in measured]
    p: dict[str, list[NDArray[Any]]] = {}
    for model, arrays in predicted.items():
        if len(arrays) != len(y):
            raise SchemaError(
                f"Model {model!r} has predictions of {len(arrays)} subjects; there are {len(y)}."
            )
        p[str(model)] = [_columns(a) for a in arrays]
        for name, truth, guess in zip(names, y, p[str(model)], strict=True):
            if truth.shape != guess.shape:
                raise SchemaError(
                    f"Subject {name!r}: measured has shape {truth.shape}, the predictions of "
                    f"{model!r} {guess.shape}.",
                    "Pass the same rows and neuroids for all models.",
                )
    if stimulus_id is None:
        if len({len(m) for m in y}) > 1:
            raise SchemaError(
                f"Subjects have different numbers of rows ({[len(m) for m in y]}).",
                "Pass stimulus_id, one array per subject.",
            )
        stimulus_id = [np.arange(len(y[0]))] * len(y)
    if len(stimulus_id) != len(y):
        raise SchemaError(f"stimulus_id has {len(stimulus_id)} arrays for {len(y)} subjects.")
    ids = [np.asarray(i).astype(str) for i in stimulus_id]
    for name, truth, own in zip(names, y, ids, strict=True):
        if own.shape != (len(truth),):
            raise SchemaError(
                f"Subject {name!r} has {len(truth)} rows and stimulus_id of shape {own.shape}."
            )
    return y, p, ids


def _columns(x: ArrayLike) -> NDArray[Any]:
    array = np.asarray(x)
    return array.reshape(len(array), -1)


def _regions(
    roi: Sequence[ArrayLike] | None, y: list[NDArray[Any]], names: list[str]
) -> tuple[list[str], list[list[NDArray[np.bool_]]]]:
    """Return ROI names and, for each subject and ROI, which neuroids it has."""
    if roi is None:
        return ["all"], [[np.ones(m.shape[1], dtype=bool)] for m in y]
    if len(roi) != len(y):
        raise SchemaError(f"roi has {len(roi)} arrays for {len(y)} subjects.")
    labels = [np.asarray(r).astype(str) for r in roi]
    for name, m, own in zip(names, y, labels, strict=True):
        if own.shape != (m.shape[1],):
            raise SchemaError(
                f"Subject {name!r} has {m.shape[1]} neuroids and roi of shape {own.shape}."
            )
    regions = sorted(set(np.concatenate(labels).tolist()) - {""})
    if not regions:
        raise SchemaError("No neuroid has a ROI.")
    return regions, [[own == r for r in regions] for own in labels]


def _ceilings(
    ceiling: Sequence[ArrayLike] | None, y: list[NDArray[Any]], names: list[str]
) -> list[NDArray[np.float64]] | None:
    if ceiling is None:
        return None
    limits = [np.asarray(c, dtype=np.float64) for c in ceiling]
    wanted = [(m.shape[1],) for m in y]
    if [c.shape for c in limits] != wanted:
        raise SchemaError(f"ceiling has shapes {[c.shape for c in limits]}; expected {wanted}, one "
                          f"array for each of {', '.join(names)}.")  # fmt: skip
    return limits


def _region_means(
    measured: NDArray[Any],
    predicted: NDArray[Any],
    weight: NDArray[np.float64],
    good: NDArray[np.bool_],
    members: list[NDArray[np.bool_]],
    ceiling: NDArray[np.float64] | None,
    device: str | torch.device,
) -> NDArray[np.float64]:
    """Return the mean score of each ROI in each weighted sample, (n_samples, n_rois)."""
    total, count = np.zeros((2, len(weight), len(members)))
    used = np.flatnonzero(good & np.logical_or.reduce(members))
    for start in range(0, len(used), _NEUROIDS_AT_ONCE):
        part = used[start : start + _NEUROIDS_AT_ONCE]
        score = bootstrap_r(measured[:, part], predicted[:, part], weight, device=device)
        if ceiling is not None:
            score = normalised_score(score, ceiling[part])[0]
        defined = np.isfinite(score)
        inside = np.column_stack([here[part] for here in members]).astype(np.float64)
        total += np.where(defined, score, 0.0) @ inside
        count += defined @ inside
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / count, dtype=np.float64)


def _n_shared(rows: list[NDArray[np.intp]]) -> int:
    shared = set(rows[0].tolist())
    for own in rows[1:]:
        shared &= set(own.tolist())
    return len(shared)


def _flips(n: int, n_permutations: int, seed: int) -> NDArray[np.float64]:
    """Return signs (n_flips, n_subjects): all but the identity if these are few, else random."""
    if n_permutations < 1:
        raise ConfigError(f"n_permutations must be at least 1; got {n_permutations}.")
    if n <= 40 and 2**n - 1 <= n_permutations:
        number = np.arange(1, 2**n)
        return np.asarray(1 - 2 * ((number[:, None] >> np.arange(n)) & 1), dtype=np.float64)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, n))


def _named(
    scores: Sequence[xr.Dataset] | Mapping[str, xr.Dataset],
) -> tuple[list[str], list[xr.Dataset]]:
    if isinstance(scores, Mapping):
        names, parts = [str(k) for k in scores], list(scores.values())
    else:
        parts = list(scores)
        names = [_own_name(ds) or str(i + 1) for i, ds in enumerate(parts)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"Subject {twice[0]!r} is there more than once.",
                          "Pass one Dataset per subject, or a dict that names them.")  # fmt: skip
    if len(parts) < 2:
        raise ConfigError(f"A group map needs at least two subjects; there is {len(parts)}.")
    return names, parts


def _own_name(ds: xr.Dataset) -> str:
    if "subject" in ds.coords:
        found = np.unique(np.ravel(ds["subject"].values).astype(str))
        if len(found) == 1:
            return str(found[0])
    return str(ds.attrs.get("subject", ""))


def _place(parts: list[xr.Dataset], names: list[str]) -> str:
    kinds = []
    for ds, name in zip(parts, names, strict=True):
        if {"vertex", "hemisphere"} <= set(ds.coords):
            kinds.append("vertex")
        elif {"i", "j", "k"} <= set(ds.coords):
            kinds.append("voxel")
        else:
            raise SchemaError(
                f"Neuroids of subject {name!r} have neither hemisphere and vertex nor i, j, k.",
                "A group map needs neuroids of a common space.",
            )
    if len(set(kinds)) > 1:
        raise SchemaError(
            f"Subject {names[0]!r} has a {kinds[0]} per neuroid, subject "
            f"{names[kinds.index('voxel' if kinds[0] == 'vertex' else 'vertex')]!r} does not."
        )
    return kinds[0]


def _one_space(parts: list[xr.Dataset], names: list[str], kind: str) -> dict[str, Any]:
    """Return the attrs of the common space, or raise where two subjects differ."""
    keys = ("space", "n_vertices") if kind == "vertex" else ("space", "affine", "volume_shape")
    found: dict[str, tuple[str, Any]] = {}
    for ds, name in zip(parts, names, strict=True):
        for key in keys:
            value = ds.attrs.get(key)
            if value is None or np.size(value) == 0 or (key == "space" and not str(value)):
                continue
            if key not in found:
                found[key] = (name, value)
                continue
            first, known = found[key]
            same = (
                str(known) == str(value) if key == "space"
                else np.shape(np.ravel(known)) == np.shape(np.ravel(value))
                and np.allclose(np.ravel(known), np.ravel(value), atol=1e-3)
            )  # fmt: skip
            if not same:
                raise SchemaError(
                    f"Subjects {first!r} and {name!r} are not in one space: {key} is {known} and "
                    f"{value}.",
                    "Bring all subjects into one space, on one grid or mesh, first.",
                )
    space = str(found["space"][1]) if "space" in found else ""
    if space.startswith(_NATIVE):
        raise SchemaError(
            f"The scores are in space {space!r}, which is each subject's own.",
            "Bring them to a common space first (fsaverage, MNI).",
        )
    if not space:
        logger.warning("The space of the scores is not known; the same %s is taken to be the same "
                       "place in all subjects.", kind)  # fmt: skip
    return {key: value for key, (_, value) in found.items()}


def _map_of(ds: xr.Dataset, measure: str, layer: str | None, name: str) -> NDArray[np.float64]:
    if measure not in ds.variables:
        raise UnknownNameError(
            f"Subject {name!r} has no {measure!r}.{near(measure, map(str, ds.data_vars))}"
        )
    found = ds[measure]
    if "layer" in found.dims:
        layers = found["layer"].values.astype(str).tolist()
        if layer is None:
            raise ConfigError(f"{measure!r} has {len(layers)} layers.", "Name one with layer=.")
        if layer not in layers:
            raise UnknownNameError(f"Subject {name!r} has no layer {layer!r}.{near(layer, layers)}")
        found = found.isel(layer=layers.index(layer))
    if found.dims != ("neuroid",):
        raise SchemaError(f"{measure!r} has dimensions {found.dims}; a map is on 'neuroid'.")
    values = found.values.astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _places(ds: xr.Dataset, kind: str, name: str) -> NDArray[np.int64]:
    if kind == "vertex":
        side = ds["hemisphere"].values.astype(str)
        if not np.isin(side, ["L", "R"]).all():
            raise SchemaError(
                f"{int((~np.isin(side, ['L', 'R'])).sum())} neuroids of subject {name!r} have no "
                "hemisphere."
            )
        columns = [side == "R", ds["vertex"].values]
    else:
        columns = [ds[a].values for a in "ijk"]
    places = np.column_stack(columns).astype(np.int64)
    unique = len(np.unique(places, axis=0))
    if unique < len(places):
        raise SchemaError(
            f"Subject {name!r} has {len(places)} neuroids at {unique} places.",
            "Average those of one place first.",
        )
    return places


def _group_coords(
    parts: list[xr.Dataset], rows: list[NDArray[np.intp]], common: NDArray[np.int64], kind: str
) -> dict[str, Any]:
    """Return the neuroids' coordinates; a ROI only where all subjects that have one agree."""
    n = len(common)
    if kind == "vertex":
        side = np.where(common[:, 0] == 1, "R", "L")
        ids = [f"{s}{v:05d}" for s, v in zip(side.tolist(), common[:, 1].tolist(), strict=True)]
        extra: dict[str, Any] = {"vertex": common[:, 1]}
    else:
        side = np.full(n, "", dtype="<U1")
        ids = ["_".join(map(str, place)) for place in common.tolist()]
        extra = {a: common[:, k] for k, a in enumerate("ijk")}
    roi = np.full(n, "", dtype=object)
    clash = np.zeros(n, dtype=bool)
    for ds, here in zip(parts, rows, strict=True):
        if kind == "voxel":
            side[here] = ds["hemisphere"].values.astype(str) if "hemisphere" in ds.coords else ""
        for axis in "xyz":
            if axis in ds.coords:
                extra.setdefault(axis, np.full(n, np.nan))[here] = ds[axis].values
        if "roi" in ds.coords:
            own = ds["roi"].values.astype(str)
            clash[here] |= (roi[here] != "") & (own != "") & (roi[here] != own)
            roi[here] = np.where(own != "", own, roi[here])
    roi[clash] = ""
    columns = {"neuroid_id": np.array(ids, dtype=str), "roi": roi.astype(str), "hemisphere": side}
    return {name: ("neuroid", values) for name, values in (columns | extra).items()}
