"""Blocks and parts of the neuroids, each a result of its own, joined to that of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.encoding.result import EncodingResult, read_result, write_result
from brainalign.encoding.rois import NESTED
from brainalign.errors import ConfigError, SchemaError
from brainalign.evaluation.significance import fdr, max_statistic_p, permutation_p
from brainalign.linear.ridge import warn_edges

__all__ = ["gather", "gather_folders"]

#: What must be the same in all parts.
_SETTINGS = (
    "subject", "folds", "inner_cv", "alphas", "choose", "permutation", "seed", "repetitions",
    "n_stimuli", "n_tested", "ceiling_threshold", "stimuli", "regression", "partition",
)  # fmt: skip


def gather(parts: Sequence[EncodingResult]) -> EncodingResult:
    """Join results of disjoint neuroids, in the order given.

    Scores and encoders are put together; pooled null distributions are pooled over all parts, and
    maxima are taken over them, before p-values, and q-values over all neuroids, are computed;
    bootstrap sums are added.

    Parameters
    ----------
    parts : sequence of EncodingResult
        Of one subject and model, with the same options and seed.

    Returns
    -------
    EncodingResult

    Raises
    ------
    SchemaError
        If the parts do not belong together, one is missing, or a neuroid stands in two.
    """
    if not parts:
        raise ConfigError("There are no parts to gather.")
    _check(parts)
    first = parts[0]
    scores, best = _joined([p.scores for p in parts]), _joined([p.best for p in parts])
    null = _null([p.null for p in parts])
    mode = str(best.attrs["permutation"])
    if mode == "pooled":
        scores["p"] = scores["p"].copy(
            data=np.stack(
                [
                    _from_null(scores["r"].sel(layer=n).values, null["r"].sel(layer=n).values)
                    for n in first.layers
                ]
            )
        )
        chosen = null["r"].sel(layer=NESTED).values
        best["p"] = best["p"].copy(data=_from_null(best["r"].values, chosen))
    elif mode != "none":
        best["p_max"] = ("neuroid", max_statistic_p(best["r"].values, null["maximum"].values))
    scores["q"] = scores["q"].copy(data=np.stack([fdr(row) for row in scores["p"].values]))
    best["q"] = best["q"].copy(data=fdr(best["p"].values))
    for ds in (scores, best):
        ds.attrs.pop("part", None)
        if mode == "pooled":
            ds.attrs["permutations"] = null.sizes["draw"]
    grid = np.asarray(best.attrs["alphas"], dtype=np.float64)
    known = np.isfinite(best["alpha"].values)
    if len(grid) > 1 and known.any():
        alpha = best["alpha"].values[known]
        index = np.abs(np.log(alpha)[:, None] - np.log(grid)).argmin(axis=1)
        warn_edges(index, best["validation_r2"].values[known], grid)
    bootstrap = first.bootstrap
    if len(parts) > 1:
        bootstrap = bootstrap.assign(
            {
                name: (first.bootstrap[name].dims, sum(p.bootstrap[name].values for p in parts))
                for name in first.bootstrap.data_vars
            }
        )
    predictions = [p.predictions for p in parts if p.predictions is not None]
    excluded: dict[str, int] = {}
    for part in parts:
        for reason, count in part.excluded.items():
            excluded[reason] = excluded.get(reason, 0) + count
    return EncodingResult(
        scores=scores,
        best=best,
        encoders={
            name: _joined([p.encoders[name] for p in parts if name in p.encoders])
            for name in first.layers
            if any(name in p.encoders for p in parts)
        },
        bootstrap=bootstrap,
        null=null,
        predictions=_joined(predictions) if len(predictions) == len(parts) else None,
        excluded=excluded,
        notes=list(dict.fromkeys(note for p in parts for note in p.notes)),
    )


def gather_folders(
    parts: Sequence[str | Path],
    out: str | Path,
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Join folders of `write_result` to one, with the provenance of the first.

    Parameters
    ----------
    parts : sequence of path
        In any order: neuroids are joined in that of the parts.
    out : path
        The folder that is made.
    provenance : mapping of str to str, optional
        Attrs that replace those of the parts.
    overwrite : bool
        Replace what stands at `out`.
    """
    results = [read_result(p) for p in parts]
    results.sort(key=lambda r: _part(r)[0])
    return write_result(gather(results), out, provenance=provenance, overwrite=overwrite)


def _part(result: EncodingResult) -> tuple[int, int]:
    part, of = str(result.best.attrs.get("part", "1/1")).split("/")
    return int(part), int(of)


def _check(parts: Sequence[EncodingResult]) -> None:
    first = parts[0]
    for other in parts[1:]:
        for name in _SETTINGS:
            ours, theirs = first.best.attrs[name], other.best.attrs[name]
            if not np.array_equal(ours, theirs):
                if name == "stimuli":
                    ours, theirs = (f"{len(json.loads(x))} stimuli" for x in (ours, theirs))
                raise SchemaError(
                    f"The parts do not belong together: {name} is {ours!r} in one and {theirs!r} "
                    "in another.",
                    "Encode all parts with the same options.",
                )
        if (first.model, first.layers) != (other.model, other.layers):
            raise SchemaError(
                f"The parts are of different models or layers: {first.model!r} and {other.model!r}."
            )
        if not first.bootstrap.coords.equals(other.bootstrap.coords) or (
            first.bootstrap.attrs["n_bootstrap"] != other.bootstrap.attrs["n_bootstrap"]
        ):
            raise SchemaError(
                "The parts were not tested on the same rows, or by other bootstrap samples.",
                "Encode all parts with the same options.",
            )
    ids = np.concatenate([p.best["neuroid_id"].values.astype(str) for p in parts])
    if len(np.unique(ids)) < len(ids):
        raise SchemaError(f"{len(ids) - len(np.unique(ids))} neuroids stand in more than one part.")
    if any("part" in p.best.attrs for p in parts):
        of = _part(first)[1]
        missing = sorted(set(range(1, of + 1)) - {_part(p)[0] for p in parts})
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SchemaError(f"Part {missing[0]} of {of} is missing{more}.")


def _joined(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join along the neuroids; all else is that of the first."""
    if len(datasets) == 1:
        return datasets[0].copy()
    return xr.concat(
        datasets, "neuroid", data_vars="minimal", coords="minimal", compat="override",
        join="override", combine_attrs="override",
    )  # fmt: skip


def _null(nulls: Sequence[xr.Dataset]) -> xr.Dataset:
    """Draws of all parts; or the maximum of each permutation over them."""
    first = nulls[0]
    if len(nulls) > 1 and "r" in first:
        return xr.concat(nulls, "draw", combine_attrs="override")
    if len(nulls) > 1 and "maximum" in first:
        largest = np.fmax.reduce([n["maximum"].values for n in nulls])
        return first.assign(maximum=("permutation", largest))
    return first


def _from_null(r: NDArray[np.float64], null: NDArray[np.float64]) -> NDArray[np.float64]:
    null = np.sort(np.nan_to_num(null, nan=-np.inf))
    hits = len(null) - np.searchsorted(null, r - 1e-12, side="left")
    return np.where(np.isnan(r), np.nan, permutation_p(hits, len(null)))
