"""Layers and models compared over ROIs, with intervals over stimuli and neuroids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.encoding.encode import EncodingResult, deviations
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.significance import bootstrap_counts, bootstrap_r, percentiles

__all__ = ["NESTED", "compare_models", "layer_roi", "roi_members"]

#: Name of the row of `layer_roi` in which each neuroid's layer is chosen in the training folds.
NESTED = "chosen layer"
_OVER = ("stimuli", "neuroids", "both")
_NEUROIDS_AT_ONCE = 2000


def roi_members(neuroids: xr.Dataset, rois: Sequence[str] | None = None) -> dict[str, NDArray]:
    """Return the indices of the neuroids of each ROI, from the ``roi`` coordinate and ``roi_mask``.

    Parameters
    ----------
    neuroids : Dataset
        Any Dataset with the neuroids' coordinates.
    rois : sequence of str, optional
        Which, in order; by default all, in order of name. ``"all"`` stands for every neuroid.

    Raises
    ------
    UnknownNameError
        For a ROI that no neuroid has.
    SchemaError
        If ROI masks have no names.
    """
    names = neuroids["roi"].values.astype(str)
    members = {r: np.flatnonzero(names == r) for r in sorted(set(names.tolist()) - {""})}
    if "roi_mask" in neuroids.variables:
        if "roi_name" not in neuroids.coords:
            raise SchemaError("'roi_mask' has no coordinate 'roi_name' with the ROIs' names.")
        for name in neuroids["roi_name"].values.astype(str).tolist():
            mask = neuroids["roi_mask"].sel(roi_name=name).values
            if mask.any():
                members[name] = np.flatnonzero(mask)
    everything = np.arange(len(names))
    if rois is None:
        return members or {"all": everything}
    known = {**members, "all": everything}
    for name in rois:
        if name not in known:
            raise UnknownNameError(f"There is no ROI {name!r}.{near(name, known)}")
    return {name: known[name] for name in rois}


def layer_roi(
    result: EncodingResult,
    *,
    measure: str = "r",
    rois: Sequence[str] | None = None,
    over: str = "stimuli",
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Mean score of every layer in every ROI, with bootstrap intervals.

    Parameters
    ----------
    result : EncodingResult
        One subject and model.
    measure : {"r", "normalised"}
        Mean over neuroids of r, or of r^2 (with its sign) over the noise ceiling.
    rois : sequence of str, optional
        See `roi_members`.
    over : {"stimuli", "neuroids", "both"}
        What is resampled. Fits are not repeated: the interval is that of these fitted models on
        other test stimuli (neuroids of the ROI).
    n_bootstrap, level, seed
        As in `brainalign.evaluation.bootstrap_ci`.

    Returns
    -------
    Dataset
        ``value, low, high`` (layer, roi), the last row being `NESTED`; ``n_neuroids`` (roi).
        ROIs without a neuroid that has the measure are NaN.
    """
    rows = [*result.layers, NESTED]
    members = roi_members(result.predictions, rois)
    samples = _roi_samples(result, rows, members, measure, over, n_bootstrap, seed)
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
        attrs={"measure": measure, "over": over, "n_bootstrap": n_bootstrap, "level": level,
               "seed": seed},
    )  # fmt: skip


def compare_models(
    results: Mapping[str, EncodingResult],
    *,
    measure: str = "r",
    rois: Sequence[str] | None = None,
    over: str = "stimuli",
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Compare models (baselines among them) in every ROI, by a paired bootstrap.

    All models are resampled with the same stimuli (and neuroids). Each model predicts each
    neuroid from the layer chosen for it in the training folds.

    Parameters
    ----------
    results : dict of model name to EncodingResult
        The same subject, test rows and folds; neuroids that some model lacks are left out.
    measure, rois, over, n_bootstrap, level, seed
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
        If the results do not hold the same test rows.
    """
    if not results:
        raise ConfigError("There are no results to compare.")
    results = _same_rows(results)
    first = next(iter(results.values()))
    members = roi_members(first.predictions, rois)
    values, samples = [], []
    for result in results.values():
        values.append(_roi_values(result, [NESTED], members, measure)[0])
        drawn = _roi_samples(result, [NESTED], members, measure, over, n_bootstrap, seed)
        samples.append(drawn[:, 0])
    value, drawn = np.stack(values), np.stack(samples, axis=1)
    low, high = percentiles(drawn, level)
    pairs = drawn[:, :, None] - drawn[:, None, :]
    d_low, d_high = percentiles(pairs, level)
    share = np.minimum((pairs <= 0).sum(axis=0), (pairs >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * (1 + share) / (1 + n_bootstrap))
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
        attrs={"measure": measure, "over": over, "n_bootstrap": n_bootstrap, "level": level,
               "seed": seed},
    )  # fmt: skip


def _same_rows(results: Mapping[str, EncodingResult]) -> dict[str, EncodingResult]:
    names = list(results)
    first = results[names[0]].predictions
    common = first["neuroid_id"].values.astype(str)
    for name in names[1:]:
        other = results[name].predictions
        for coord in ("stimulus_id", "fold"):
            if not np.array_equal(first[coord].values, other[coord].values):
                raise SchemaError(
                    f"{names[0]!r} and {name!r} were not tested on the same rows: {coord} differs.",
                    "Encode both with the same splits and seed.",
                )
        common = common[np.isin(common, other["neuroid_id"].values.astype(str))]
    if len(common) == 0:
        raise SchemaError("The results have no neuroid in common.")
    out = {}
    for name, result in results.items():
        own = result.predictions["neuroid_id"].values.astype(str).tolist()
        place = {n: i for i, n in enumerate(own)}
        index = np.array([place[n] for n in common.tolist()])
        out[name] = EncodingResult(
            scores=result.scores.isel(neuroid=index),
            best=result.best.isel(neuroid=index),
            predictions=result.predictions.isel(neuroid=index),
            encoder=result.encoder,
            encoders=result.encoders,
        )
    return out


def _measure(r: NDArray[np.float64], result: EncodingResult, measure: str) -> NDArray[np.float64]:
    """Turn r (..., neuroid) into the measure; NaN where it has none."""
    if measure == "r":
        return r
    if measure != "normalised":
        raise ConfigError(f"measure is {measure!r}; expected 'r' or 'normalised'.")
    usable = np.isfinite(result.best["normalised"].values)
    ceiling = np.where(usable, result.best["ceiling"].values, np.nan)
    return np.asarray(r * np.abs(r) / ceiling)


def _mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN if there is nothing else."""
    defined = np.isfinite(x)
    count = defined.sum(axis=-1)
    total = np.where(defined, x, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _roi_values(
    result: EncodingResult, rows: Sequence[str], members: dict[str, NDArray], measure: str
) -> NDArray[np.float64]:
    out = np.empty((len(rows), len(members)))
    for i, row in enumerate(rows):
        r = result.best["r"] if row == NESTED else result.scores["r"].sel(layer=row)
        values = _measure(r.values, result, measure)
        out[i] = [_mean(values[m]) for m in members.values()]
    return out


def _roi_samples(
    result: EncodingResult,
    rows: Sequence[str],
    members: dict[str, NDArray],
    measure: str,
    over: str,
    n_bootstrap: int,
    seed: int,
) -> NDArray[np.float64]:
    """Bootstrap samples (n_bootstrap, rows, rois) of the mean score."""
    if over not in _OVER:
        raise ConfigError(f"over is {over!r}; expected one of {', '.join(_OVER)}.")
    ids = result.predictions["stimulus_id"].values.astype(str)
    counts = bootstrap_counts(len(ids), n_bootstrap, groups=ids, seed=seed)
    if over == "neuroids":
        counts = np.ones((1, len(ids)))
    rng = np.random.default_rng([seed, 2])
    weights = {
        roi: np.ones((n_bootstrap, len(m)))
        if over == "stimuli"
        else rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=n_bootstrap).astype(float)
        for roi, m in members.items()
    }
    out = np.empty((n_bootstrap, len(rows), len(members)))
    used = np.unique(np.concatenate(list(members.values())))
    for i, row in enumerate(rows):
        measured, predicted = deviations(result.predictions, None if row == NESTED else row)
        total = {roi: np.zeros(n_bootstrap) for roi in members}
        weight = {roi: np.zeros(n_bootstrap) for roi in members}
        for start in range(0, len(used), _NEUROIDS_AT_ONCE):
            part = used[start : start + _NEUROIDS_AT_ONCE]
            r = bootstrap_r(measured[:, part], predicted[:, part], counts)
            full = np.full((len(r), measured.shape[1]), np.nan) if measure != "r" else None
            if full is not None:
                full[:, part] = r
                r = _measure(full, result, measure)[:, part]
            for roi, m in members.items():
                here = np.isin(part, m)
                if not here.any():
                    continue
                w = weights[roi][:, np.isin(m, part)]
                x = r[:, here]
                defined = np.isfinite(x)
                total[roi] += (np.where(defined, x, 0) * w).sum(axis=1)
                weight[roi] += (defined * w).sum(axis=1)
        for j, roi in enumerate(members):
            with np.errstate(invalid="ignore", divide="ignore"):
                out[:, i, j] = total[roi] / weight[roi]
    return out
