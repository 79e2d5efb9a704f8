"""Layers and models compared over ROIs, with intervals over stimuli and neuroids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.encoding.result import EncodingResult
from brainalign.encoding.rois import ALL_ROIS, MEASURES, NESTED, roi_members
from brainalign.errors import ConfigError, SchemaError
from brainalign.evaluation.group import compare_samples
from brainalign.evaluation.significance import percentiles

__all__ = [
    "compare_models",
    "compare_subjects",
    "layer_roi",
    "partition_roi",
    "sampled_score",
]

_OVER = ("stimuli", "neuroids", "both")


def layer_roi(
    result: EncodingResult,
    *,
    measure: str = "r",
    rois: Sequence[str] | None = None,
    over: str = "stimuli",
    level: float = 0.95,
) -> xr.Dataset:
    """Mean score of every layer in every ROI, with bootstrap intervals.

    Parameters
    ----------
    result : EncodingResult
        One subject and model. The samples over stimuli are those that `encode` drew.
    measure : {"r", "normalised"}
        Mean over neuroids of r, or of r^2 (with its sign) over the noise ceiling.
    rois : sequence of str, optional
        See `roi_members`. "all" has intervals only where there is no ROI, or over neuroids.
    over : {"stimuli", "neuroids", "both"}
        What is resampled. Fits are not repeated: the interval is that of these fitted models on
        other test stimuli (neuroids of the ROI). For "both", neuroids have Poisson weights.
    level : float
        Coverage of the intervals.

    Returns
    -------
    Dataset
        ``value, low, high`` (layer, roi), the last row being `NESTED`; ``n_neuroids`` (roi).
        ROIs without a neuroid that has the measure are NaN.

    Raises
    ------
    ConfigError
        If the result holds no samples of a ROI.
    """
    rows = [*result.layers, NESTED]
    members = roi_members(result.best, rois)
    samples = _roi_samples(result, rows, members, measure, over)
    value = _roi_values(result, rows, members, measure)
    low, high = percentiles(samples, level)
    dims = ("layer", "roi")
    return xr.Dataset(
        {
            "value": (dims, value),
            "low": (dims, low),
            "high": (dims, high),
            "n_neuroids": ("roi", [len(m) for m in members.values()]),
        },
        coords={"layer": rows, "roi": list(members), "model": result.model},
        attrs={"measure": measure, "over": over, "level": level, **_drawn(result)},
    )


def partition_roi(
    result: EncodingResult, *, rois: Sequence[str] | None = None, level: float = 0.95
) -> xr.Dataset:
    """Mean share of explained variance of every part in every ROI, with bootstrap intervals.

    Parameters
    ----------
    result : EncodingResult
        Of `encode` with a partition.
    rois : sequence of str, optional
        See `roi_members`.
    level : float
        Coverage of the intervals over stimuli.

    Returns
    -------
    Dataset
        ``value, low, high`` (part, roi).

    Raises
    ------
    ConfigError
        If the explained variance was not divided, or a ROI has no samples.
    """
    if "share" not in result.best:
        raise ConfigError("The explained variance was not divided.", "Encode with a partition.")
    members = roi_members(result.best, rois)
    share = result.best["share"].values
    value = np.stack([np.nanmean(share[:, m], axis=1) for m in members.values()], axis=1)
    low = high = np.full(value.shape, np.nan)
    if _drawn(result)["n_bootstrap"]:
        missing = [roi for roi in members if roi not in result.bootstrap["roi"].values]
        if missing:
            raise ConfigError(f"encode drew no samples of stimuli for {missing[0]!r}.")
        sums = result.bootstrap.sel(roi=list(members))
        drawn = sums["share_total"] / sums["share_count"]
        low, high = percentiles(drawn.transpose("sample", "part", "roi").values, level)
    dims = ("part", "roi")
    return xr.Dataset(
        {"value": (dims, value), "low": (dims, low), "high": (dims, high)},
        coords={"part": result.best["part"].values.astype(str), "roi": list(members)},
    )


def compare_models(
    results: Mapping[str, EncodingResult],
    *,
    measure: str = "r",
    rois: Sequence[str] | None = None,
    over: str = "stimuli",
    level: float = 0.95,
) -> xr.Dataset:
    """Compare models (baselines among them) in every ROI, by a paired bootstrap.

    All models are resampled with the same stimuli (and neuroids). Each model predicts each
    neuroid from the layer chosen for it in the training folds.

    Parameters
    ----------
    results : dict of model name to EncodingResult
        The same subject, neuroids, test rows, folds and bootstrap samples.
    measure, rois, over, level
        As in `layer_roi`.

    Returns
    -------
    Dataset
        ``value, low, high`` (model, roi); ``difference, difference_low, difference_high, p``
        (model, model_2, roi), the two-sided bootstrap p of model minus model_2;
        ``n_neuroids`` (roi).

    Raises
    ------
    SchemaError
        If the results do not hold the same test rows, neuroids or samples.
    """
    if not results:
        raise ConfigError("There are no results to compare.")
    _check_same(results)
    first = next(iter(results.values()))
    members = roi_members(first.best, rois)
    values, samples = [], []
    for result in results.values():
        values.append(_roi_values(result, [NESTED], members, measure)[0])
        samples.append(_roi_samples(result, [NESTED], members, measure, over)[:, 0])
    value, drawn = np.stack(values), np.stack(samples, axis=1)
    low, high = percentiles(drawn, level)
    pairs = drawn[:, :, None] - drawn[:, None, :]
    d_low, d_high = percentiles(pairs, level)
    share = np.minimum((pairs <= 0).sum(axis=0), (pairs >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * (1 + share) / (1 + len(drawn)))
    two = ("model", "model_2", "roi")
    return xr.Dataset(
        {
            "value": (("model", "roi"), value),
            "low": (("model", "roi"), low),
            "high": (("model", "roi"), high),
            "difference": (two, value[:, None] - value[None]),
            "difference_low": (two, d_low),
            "difference_high": (two, d_high),
            "p": (two, np.where(np.isnan(value[:, None] - value[None]), np.nan, p)),
            "n_neuroids": ("roi", [len(m) for m in members.values()]),
        },
        coords={"model": list(results), "model_2": list(results), "roi": list(members)},
        attrs={"measure": measure, "over": over, "level": level, **_drawn(first)},
    )


def compare_subjects(
    results: Mapping[str, Mapping[str, EncodingResult]],
    *,
    measure: str = "r",
    rois: Sequence[str] | None = None,
    level: float = 0.95,
) -> xr.Dataset:
    """Compare models in every ROI so that the result holds for other subjects and other stimuli.

    The bootstrap samples of the results draw the same stimuli for every subject and model; the
    tests are those of `brainalign.evaluation.two_factor_test`, paired within subjects. Each model
    predicts each neuroid from the layer chosen for it in the training folds.

    Parameters
    ----------
    results : dict of subject to dict of model name to EncodingResult
        The same models for each of at least two subjects, tested on the same stimuli.
    measure, rois, level
        As in `layer_roi`; a ROI that a subject lacks is tested on the others.

    Returns
    -------
    Dataset
        See `brainalign.evaluation.compare_over_subjects`.

    Raises
    ------
    ConfigError
        With fewer than two subjects.
    SchemaError
        If models, tested stimuli or samples differ between subjects.
    """
    if len(results) < 2:
        raise ConfigError(f"Subjects are compared from two on; there are {len(results)}.")
    name, first = next(iter(results.items()))
    models = list(first)
    regions = list(roi_members(first[models[0]].best, rois)) if rois is None else list(rois)
    tested = np.unique(first[models[0]].bootstrap["stimulus_id"].values.astype(str))
    for subject, by in results.items():
        if list(by) != models:
            raise SchemaError(f"{name!r} has the models {models}; {subject!r} has {list(by)}.")
        _check_same(by)
        one = by[models[0]]
        theirs = np.unique(one.bootstrap["stimulus_id"].values.astype(str))
        if not np.array_equal(tested, theirs) or _drawn(one) != _drawn(first[models[0]]):
            raise SchemaError(
                f"{name!r} and {subject!r} were not tested on the same stimuli, or hold different "
                "bootstrap samples.",
                "Encode all with the same stimuli, n_bootstrap and seed; for subjects with stimuli "
                "of their own use brainalign.evaluation.compare_over_subjects on predictions.",
            )
    values = np.full((len(results), len(regions), len(models)), np.nan)
    n_bootstrap = _drawn(first[models[0]])["n_bootstrap"]
    samples = np.full((n_bootstrap, *values.shape), np.nan)
    n_neuroids = np.zeros(values.shape[:2], dtype=np.int64)
    for s, by in enumerate(results.values()):
        known = [*roi_members(by[models[0]].best), ALL_ROIS, "all"]
        own = [roi for roi in regions if roi in known]
        at = [regions.index(roi) for roi in own]
        members = roi_members(by[models[0]].best, own)
        n_neuroids[s, at] = [len(m) for m in members.values()]
        for m, result in enumerate(by.values()):
            values[s, at, m] = _roi_values(result, [NESTED], members, measure)[0]
            samples[:, s, at, m] = _roi_samples(result, [NESTED], members, measure, "stimuli")[:, 0]
    ds = compare_samples(
        values, samples, subjects=list(results), rois=regions, models=models,
        n_stimuli=np.full(len(results), len(tested)), n_neuroids=n_neuroids, level=level,
    )  # fmt: skip
    return ds.assign_attrs(measure=measure, **_drawn(first[models[0]]))


def sampled_score(
    result: EncodingResult, *, measure: str = "normalised", roi: str | None = None
) -> tuple[float, NDArray[np.float64]]:
    """Mean score of a region, and the same in every bootstrap sample of the stimuli.

    Parameters
    ----------
    result : EncodingResult
        One subject and model; each neuroid is predicted from the layer chosen for it in the
        training folds.
    measure : {"r", "normalised"}
        As in `layer_roi`.
    roi : str, optional
        By default all neuroids that lie in a region, or all where there is no region.

    Returns
    -------
    value : float
    samples : ndarray, shape (n_bootstrap,)
    """
    if roi is None:
        regions = list(roi_members(result.best))
        roi = ALL_ROIS if len(regions) > 1 else regions[0]
    members = roi_members(result.best, [roi])
    value = _roi_values(result, [NESTED], members, measure)[0, 0]
    return float(value), _roi_samples(result, [NESTED], members, measure, "stimuli")[:, 0, 0]


def _drawn(result: EncodingResult) -> dict[str, int]:
    """Return the number of samples and their seed."""
    return {name: int(result.bootstrap.attrs[name]) for name in ("n_bootstrap", "seed")}


def _check_same(results: Mapping[str, EncodingResult]) -> None:
    names = list(results)
    first = results[names[0]]
    for name in names[1:]:
        other = results[name]
        for coord in ("stimulus_id", "fold"):
            if not np.array_equal(first.bootstrap[coord].values, other.bootstrap[coord].values):
                raise SchemaError(
                    f"{names[0]!r} and {name!r} were not tested on the same rows: {coord} differs.",
                    "Encode both with the same splits and seed.",
                )
        ours, theirs = (r.best["neuroid_id"].values.astype(str) for r in (first, other))
        if not np.array_equal(ours, theirs):
            raise SchemaError(
                f"{names[0]!r} and {name!r} do not hold the same neuroids: {len(ours)} and "
                f"{len(theirs)}, {len(np.intersect1d(ours, theirs))} in common.",
                "Encode both with the same responses and stimuli.",
            )
        if _drawn(first) != _drawn(other):
            raise SchemaError(
                f"{names[0]!r} and {name!r} hold different bootstrap samples: {_drawn(first)} and "
                f"{_drawn(other)}.",
                "Encode both with the same n_bootstrap and seed.",
            )


def _mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN if there is nothing else."""
    defined = np.isfinite(x)
    count = defined.sum(axis=-1)
    total = np.where(defined, x, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _neuroid_scores(result: EncodingResult, row: str, measure: str) -> NDArray[np.float64]:
    if measure not in MEASURES:
        raise ConfigError(f"measure is {measure!r}; expected 'r' or 'normalised'.")
    ds = result.best if row == NESTED else result.scores.sel(layer=row)
    return np.asarray(ds[measure].values, dtype=np.float64)


def _roi_values(
    result: EncodingResult, rows: Sequence[str], members: dict[str, NDArray], measure: str
) -> NDArray[np.float64]:
    scores = [_neuroid_scores(result, row, measure) for row in rows]
    return np.array([[_mean(x[m]) for m in members.values()] for x in scores])


def _roi_samples(
    result: EncodingResult,
    rows: Sequence[str],
    members: dict[str, NDArray],
    measure: str,
    over: str,
) -> NDArray[np.float64]:
    """Bootstrap samples (n_bootstrap, rows, rois) of the mean score."""
    if over not in _OVER:
        raise ConfigError(f"over is {over!r}; expected one of {', '.join(_OVER)}.")
    drawn = _drawn(result)
    if not drawn["n_bootstrap"]:
        raise ConfigError("The result holds no bootstrap samples.", "Encode with n_bootstrap=1000.")
    if over == "neuroids":
        scores = [_neuroid_scores(result, row, measure) for row in rows]
        rng = np.random.default_rng([drawn["seed"], 2])
        out = np.empty((drawn["n_bootstrap"], len(rows), len(members)))
        for j, m in enumerate(members.values()):
            weights = rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=len(out))
            for i, x in enumerate(scores):
                defined = np.isfinite(x[m])
                total, count = weights @ np.where(defined, x[m], 0.0), weights @ defined
                out[:, i, j] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return out
    sums = result.bootstrap
    missing = [roi for roi in members if roi not in sums["roi"].values]
    if missing:
        raise ConfigError(
            f"encode drew no samples of stimuli for {missing[0]!r}, only for ROIs.",
            "Give these neuroids a roi before encoding.",
        )
    chosen = sums.sel(over=over, measure=measure, layer=list(rows), roi=list(members))
    total, count = chosen["total"].values, chosen["count"].values
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
