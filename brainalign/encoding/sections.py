"""Encoding models as a section of the report: quality, maps, layers, models, and the planted truth.

Everything here reads what `encode` wrote; nothing is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from brainalign.data.bundle import read_bundle
from brainalign.data.cortex import N_VERTICES
from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.stimuli import StimulusSet
from brainalign.encoding.compare import (
    compare_models,
    compare_subjects,
    layer_roi,
    partition_roi,
)
from brainalign.encoding.result import EncodingResult, read_result
from brainalign.encoding.rois import ALL_ROIS, roi_members
from brainalign.errors import ConfigError

__all__ = ["encoding_section", "section_from_folders"]

Results = Mapping[str, Mapping[str, EncodingResult]]

_SPACE = "fsaverage5"
_FEW = 20
_MOST_POINTS = 3000
_SUBJECTS_MAPPED = 3
_FAMILIES = ("people", "bodies", "places", "words", "food", "objects")


def section_from_folders(
    encoded: Sequence[str | Path],
    *,
    data: str | Path,
    stimuli: StimulusSet,
    titles: Mapping[str, str],
    baselines: Sequence[str] = (),
    fdr: float = 0.05,
) -> Section:
    """Describe the results in folders ``.../<subject>/<model>``, one a subject and model.

    Parameters
    ----------
    encoded : sequence of path
        Folders of `brainalign.encoding.write_result`.
    data : path
        The bundle that was encoded; a simulated one holds the truth.
    stimuli : StimulusSet
        The images, with their ``category`` where known.
    titles : mapping of str to str
        Title by model.
    baselines : sequence of str
        Models that others are compared with.
    fdr : float
        As in `encoding_section`.
    """
    if not encoded:
        raise ConfigError(
            "No model could be had to encode with.", "See what was left out, at the end."
        )
    results: dict[str, dict[str, EncodingResult]] = {}
    for folder in map(Path, encoded):
        results.setdefault(folder.parent.name, {})[folder.name] = read_result(folder)
    extras = read_bundle(data).extras
    truth = {s: extras[f"truth_{s}"] for s in results if f"truth_{s}" in extras}
    category = None
    if "category" in stimuli.index:
        names = stimuli.index["category"].values.astype(str).tolist()
        category = dict(zip(stimuli.ids, names, strict=True))
    return encoding_section(
        results,
        titles=titles,
        baselines=baselines,
        category=category,
        truth=truth,
        fdr=fdr,
    )


def encoding_section(
    results: Results,
    *,
    titles: Mapping[str, str],
    baselines: Sequence[str] = (),
    category: Mapping[str, str] | None = None,
    truth: Mapping[str, xr.Dataset] | None = None,
    fdr: float = 0.05,
) -> Section:
    """Describe encoding models of one or more subjects.

    Parameters
    ----------
    results : mapping of subject to mapping of model to EncodingResult
        The first model that is no baseline is the one whose layers and maps are shown.
    titles : mapping of str to str
        Title by model.
    baselines : sequence of str
        Models that others are compared with.
    category : mapping of stimulus id to str, optional
        Category of each stimulus.
    truth : mapping of subject to xarray.Dataset, optional
        Truth of simulated subjects (`brainalign.data.simulate.Simulation`).
    fdr : float
        False-discovery rate at which neuroids are counted as predicted.

    Returns
    -------
    Section
    """
    models = list(dict.fromkeys(m for by in results.values() for m in by))
    main = next((m for m in models if m not in baselines), models[0])
    shown = {s: by[main] for s, by in results.items()}
    title = titles.get(main, main)
    first = next(iter(shown.values()))
    few = first.best.sizes["neuroid"] <= _FEW
    comparison = _comparison(results, models)
    rois = comparison["roi"].values.astype(str).tolist()
    layer_table = _over_subjects([layer_roi(r) for r in shown.values()])
    figures: list[Figure] = []
    figures += _quality(shown, few)
    figures += [
        _surface(result, subject, title, fdr)
        for subject, result in list(shown.items())[:_SUBJECTS_MAPPED]
        if "vertex" in result.best.coords and result.best.attrs.get("space") == _SPACE
    ]
    figures.append(_layers_figure(layer_table, title, len(shown)))
    figures.append(_models_figure(comparison, titles, baselines, len(shown)))
    figures += [
        _partition_figure([by[m] for by in results.values()], m, titles.get(m, m))
        for m in models
        if all("share" in by[m].best for by in results.values())
    ]
    if len(shown) > 1 and len(models) > 1:
        figures.append(_subjects_figure(results, main, titles, baselines, rois))
    figures += _scatter(shown, title) if few else _against_ceiling(shown, title)
    if category and not few:
        figures += _categories(shown, category, title)
    summary = _model_estimates(comparison, models, main, titles, baselines, rois)
    for subject, result in shown.items():
        q = result.best["q"].values
        if np.isfinite(q).any():
            summary.append(
                Estimate(
                    f"Neuroids predicted by {title}, {subject}",
                    100 * float((q[np.isfinite(q)] < fdr).mean()),
                    unit="%",
                    note=f"q < {fdr:g} by {result.best.attrs['permutations']} permutations, "
                    f"of {int(np.isfinite(q).sum()):,} neuroids",
                )
            )
    if truth:
        planted, found = _truth(shown, truth, category, fdr)
        figures += planted
        summary += found
    exclusions = [
        f"{subject}, {titles.get(m, m)}: {text}"
        for subject, by in results.items()
        for m, result in by.items()
        for text in result.exclusions
    ]
    unkept = [
        f"{subject}, {title}: predictions were not kept, so single responses and categories are "
        "not shown"
        for subject, result in shown.items()
        if result.predictions is None
    ]
    attrs = {**first.best.attrs, **first.bootstrap.attrs}
    methods = _methods(attrs, [titles.get(m, m) for m in models], len(results), fdr)
    methods += _joint_methods({titles.get(m, m): next(iter(results.values()))[m] for m in models})
    return Section(
        id="encoding",
        title="Encoding models",
        intro=f"How well do the layers of {title} predict each neuroid's response to images that "
        "the model was not fitted on, and do they do better than "
        + (", ".join(titles.get(b, b) for b in models if b in baselines) or "one another")
        + "?",
        figures=figures,
        summary=summary,
        methods=methods,
        references={k: v for k, v in _REFERENCES.items() if f"@{k}" in methods},
        exclusions=list(dict.fromkeys(exclusions + unkept)),
        facts={
            "subjects": str(len(results)),
            "stimuli": str(attrs.get("n_stimuli", "")),
            "presentations a stimulus": f"{float(attrs.get('mean_repeats', np.nan)):g}",
            "neuroids": f"{first.best.sizes['neuroid']:,}",
            "layers": str(len(first.layers)),
        },
        order=20,
    )


def _over_subjects(tables: Sequence[xr.Dataset]) -> xr.Dataset:
    """Mean over subjects; the interval is that of the mean with the subjects as they are."""
    if len(tables) == 1:
        return tables[0]
    value = np.mean([t["value"].values for t in tables], axis=0)
    half = np.sqrt(sum(((t["high"].values - t["low"].values) / 2) ** 2 for t in tables)) / len(
        tables
    )
    out = tables[0].copy()
    dims = tables[0]["value"].dims
    return out.assign(value=(dims, value), low=(dims, value - half), high=(dims, value + half))


def _comparison(results: Results, models: list[str]) -> xr.Dataset:
    """Compare all models in every ROI and in all ROIs together, for the mean of the subjects."""
    tables = []
    for by in results.values():
        rois = list(roi_members(by[models[0]].best))
        rois = [ALL_ROIS, *rois] if len(rois) > 1 else rois
        tables.append(compare_models({m: by[m] for m in models}, rois=rois))
    pooled = _over_subjects(tables)
    per_subject = np.stack([t["value"].values for t in tables])
    return pooled.assign(per_subject=(("subject", "model", "roi"), per_subject)).assign_coords(
        subject=list(results)
    )


def _model_estimates(
    comparison: xr.Dataset,
    models: list[str],
    main: str,
    titles: Mapping[str, str],
    baselines: Sequence[str],
    rois: list[str],
) -> list[Estimate]:
    measure = "mean r of measured and predicted responses, layer chosen in the training folds"
    rivals = [m for m in models if m in baselines]
    out = []
    for roi in rois:
        here = comparison.sel(roi=roi)
        reference = ""
        if rivals:
            best = max(rivals, key=lambda m: float(here["value"].sel(model=m)))
            reference = f"{titles.get(best, best)} {float(here['value'].sel(model=best)):.2f}"
        value, low, high = (float(here[k].sel(model=main)) for k in ("value", "low", "high"))
        name = titles.get(main, main)
        out.append(Estimate(f"{name} in {roi}", value, low, high, "r", measure, reference))
    return out


def _quality(shown: Mapping[str, EncodingResult], few: bool) -> list[Figure]:
    """Show the noise ceilings of every ROI."""
    groups: dict[str, list[NDArray[np.float64]]] = {}
    for result in shown.values():
        ceiling = result.best["ceiling"].values.astype(float)
        if not np.isfinite(ceiling).any():
            return []
        members = roi_members(result.best)
        rest = np.setdiff1d(np.arange(len(ceiling)), np.concatenate(list(members.values())))
        for roi, index in {**members, "outside ROIs": rest}.items():
            if len(index):
                groups.setdefault(roi, []).append(ceiling[index])
    if few:
        names = list(groups)
        values = [float(np.mean(np.concatenate(groups[n]))) for n in names]
        ds = xr.Dataset({"value": ("item", values)}, coords={"item": names})
        ds["value"].attrs = {"long_name": "noise ceiling", "units": "r²"}
        return [
            Figure(
                "quality",
                "bars",
                "Noise ceilings",
                "Share of the variance of the responses that any model could explain, given their "
                "noise.",
                ds,
            )
        ]
    drawn: list[NDArray[np.float64]] = []
    labels: list[str] = []
    for roi, parts in groups.items():
        joined = np.concatenate(parts)
        joined = _thinned(joined[np.isfinite(joined)])
        drawn.append(joined)
        labels += [roi] * len(joined)
    ds = xr.Dataset(
        {"value": ("observation", np.concatenate(drawn).astype("float32"))},
        coords={"group": ("observation", labels)},
    )
    ds["value"].attrs = {"long_name": "noise ceiling", "units": "r²"}
    return [
        Figure(
            "quality",
            "distribution",
            "Data quality: noise ceilings",
            "Share of the variance of each neuroid's averaged responses that any model could "
            "explain, estimated from repeats. Regions with low ceilings cannot be explained well "
            "by any model; a model is judged against the ceiling, not against 1.",
            ds,
        )
    ]


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) <= _MOST_POINTS:
        return values
    order = np.sort(values)
    return order[np.linspace(0, len(order) - 1, _MOST_POINTS).astype(int)]


def _on_mesh(result: EncodingResult, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Spread values of neuroids over both hemispheres' vertices."""
    out = np.full(2 * N_VERTICES, np.nan, dtype=np.float32)
    right = result.best["hemisphere"].values.astype(str) == "R"
    out[result.best["vertex"].values + N_VERTICES * right] = values
    return out


def _surface(result: EncodingResult, subject: str, title: str, fdr: float) -> Figure:
    best = result.best
    r = best["r"].values.astype(float)
    layers = result.layers
    chosen = np.array([layers.index(x) for x in best["best_layer"].values.astype(str)], dtype=float)
    significant = best["q"].values < fdr
    rois = sorted(set(best["roi"].values.astype(str).tolist()) - {""})
    place = {roi: i for i, roi in enumerate(rois)}
    roi = np.array([place.get(x, np.nan) for x in best["roi"].values.astype(str)])
    short = _short(layers)
    maps: dict[str, tuple[NDArray[np.float64], dict[str, str]]] = {
        "r_significant": (
            np.where(significant, r, np.nan),
            {"long_name": f"Accuracy where q < {fdr:g}", "units": "r", "cmap": "sequential"},
        ),
        "r": (r, {"long_name": "Accuracy everywhere", "units": "r", "cmap": "sequential"}),
        "normalised": (
            best["normalised"].values.astype(float),
            {"long_name": "Share of the ceiling", "units": "r²/ceiling", "cmap": "sequential"},
        ),
        "best_layer": (
            np.where(significant, chosen, np.nan),
            {
                "long_name": f"Best layer (q < {fdr:g})",
                "cmap": "categorical",
                "labels": json.dumps(short),
            },
        ),
        "ceiling": (
            best["ceiling"].values.astype(float),
            {"long_name": "Noise ceiling", "units": "r²", "cmap": "sequential"},
        ),
    }  # fmt: skip
    if rois:
        attrs = {"long_name": "ROI", "cmap": "categorical", "labels": json.dumps(rois)}
        maps["roi_map"] = (roi, attrs)
    kept = {k: v for k, v in maps.items() if np.isfinite(v[0]).any()}
    ds = xr.Dataset(
        {k: ("vertex", _on_mesh(result, values), attrs) for k, (values, attrs) in kept.items()},
        coords={
            "vertex": ("vertex", np.tile(np.arange(N_VERTICES), 2)),
            "hemisphere": ("vertex", np.repeat(["L", "R"], N_VERTICES)),
        },
    )
    return Figure(
        f"surface-{subject}",
        "surface",
        f"{subject}: where {title} predicts the response",
        "Accuracy on images that the model was not fitted on, on the inflated fsaverage5 surface. "
        "Look for accuracy that follows the regions selective for the stimuli, and for early "
        "layers towards the occipital pole and late layers in front of it. Turn the brain with "
        "the mouse; choose the map above it.",
        ds,
    )


def _short(layers: Iterable[str]) -> list[str]:
    """Drop what all layer names have in common at the front."""
    split = [name.split(".") for name in layers]
    n = 0
    while len(split) > 1 and all(len(s) > n + 1 for s in split) and len({s[n] for s in split}) == 1:
        n += 1
    return [".".join(s[max(n - 1, 0) :]) for s in split]


def _layers_figure(table: xr.Dataset, title: str, n_subjects: int) -> Figure:
    rows = table["layer"].values.astype(str).tolist()
    dims = ("row", "column")
    ds = xr.Dataset(
        {k: (dims, table[k].values) for k in ("value", "low", "high")},
        coords={"row": [*_short(rows[:-1]), rows[-1]], "column": table["roi"].values.astype(str)},
    )
    ds["value"].attrs = {"long_name": "mean r", "units": "r"}
    return Figure(
        "layers",
        "heatmap",
        f"Layers of {title} by region",
        "Mean accuracy of each layer in each region"
        + (f", averaged over {n_subjects} subjects" if n_subjects > 1 else "")
        + "; the frame marks each region's best layer, and intervals over stimuli show on "
        "hovering and in the data. The last row is the honest one: there each neuroid's layer was "
        "chosen in the training folds, while the best of the rows above it is chosen on the scores "
        "shown.",
        ds,
        {"best_in": "column", "x_label": "region", "y_label": "layer"},
    )


def _models_figure(
    comparison: xr.Dataset, titles: Mapping[str, str], baselines: Sequence[str], n_subjects: int
) -> Figure:
    models = comparison["model"].values.astype(str).tolist()
    ds = xr.Dataset(
        {
            k: (("item", "series"), comparison[k].transpose("roi", "model").values)
            for k in ("value", "low", "high")
        },
        coords={
            "item": comparison["roi"].values.astype(str),
            "series": [titles.get(m, m) for m in models],
        },
    )
    ds["value"].attrs = {"long_name": "mean r", "units": "r"}
    named = ", ".join(titles.get(m, m) for m in models if m in baselines)
    return Figure(
        "models",
        "points",
        "Models and baselines",
        "Mean accuracy in each region, layer chosen in the training folds, with 95 % intervals of "
        "a bootstrap over stimuli that is the same for all models"
        + (f" (mean of {n_subjects} subjects)" if n_subjects > 1 else "")
        + (f". A model says something of a region only where it passes {named}." if named else "."),
        ds,
        {"y_label": "mean r"},
    )


def _partition_figure(results: Sequence[EncodingResult], model: str, title: str) -> Figure:
    """Show how the variance that a joint model explains is divided among its feature spaces."""
    table = _over_subjects([partition_roi(r) for r in results])
    method = str(results[0].best.attrs["partition"])
    ds = table.rename({"roi": "item", "part": "series"}).transpose("item", "series")
    ds["value"].attrs = {"long_name": "share of variance", "units": "R²"}
    return Figure(
        f"partition-{model}",
        "bars",
        f"What each feature space of {title} explains",
        "Mean over the neuroids of each region of the variance of held-out responses that is "
        + {
            "product": "explained by each space in the model of all, by the product measure. The "
            "parts sum to what all explain together; what two spaces share is divided between "
            "them.",
            "leave_one_out": "explained by one space and no other: what is lost when the model is "
            "fitted without it.",
            "subsets": "unique to each space, or shared by those that are named together, from "
            "models of every set of spaces. The parts sum to what all explain together.",
        }[method]
        + " Parts can be negative, where a space adds noise. Intervals are 95 % of a bootstrap "
        "over stimuli.",
        ds,
        {"y_label": "share of variance (R²)"},
    )


def _subjects_figure(
    results: Results,
    main: str,
    titles: Mapping[str, str],
    baselines: Sequence[str],
    rois: Sequence[str],
) -> Figure:
    """Show by how much the main model passes its best rival, for subjects and stimuli together."""
    tested = compare_subjects(results, rois=rois)
    models = tested["model"].values.astype(str).tolist()
    rivals = [m for m in models if m in baselines and m != main]
    rivals = rivals or [m for m in models if m != main]
    best = [max(rivals, key=lambda m: float(tested["value"].sel(model=m, roi=r))) for r in rois]
    here = [tested.sel(model=main, model_2=b, roi=r) for b, r in zip(best, rois, strict=True)]
    each = np.array(
        [
            tested["per_subject"].sel(model=main, roi=r) - tested["per_subject"].sel(model=b, roi=r)
            for b, r in zip(best, rois, strict=True)
        ]
    )
    none = np.full_like(each, np.nan)
    stacked = {
        "value": np.column_stack([[float(h["difference"]) for h in here], each]),
        "low": np.column_stack([[float(h["difference_low"]) for h in here], none]),
        "high": np.column_stack([[float(h["difference_high"]) for h in here], none]),
    }
    ds = xr.Dataset(
        {k: (("item", "series"), v) for k, v in stacked.items()},
        coords={
            "item": [f"{r} − {titles.get(b, b)}" for b, r in zip(best, rois, strict=True)],
            "series": ["over subjects and stimuli", *tested["subject"].values.astype(str)],
        },
    )
    ds["value"].attrs = {"long_name": "difference of mean r", "units": "r"}
    p = ", ".join(f"{r} {_p(float(h['p']))}" for r, h in zip(rois, here, strict=True))
    return Figure(
        "subjects",
        "points",
        f"{titles.get(main, main)} against its best rival, for other subjects and stimuli",
        "Difference of mean r from the best other model of each region, for each subject and, with "
        "its 95 % interval, for the mean of subjects: the interval is that for new subjects and "
        "new images, so few subjects make it wide. Above 0, the model explains more. "
        f"Two-sided p, not corrected for the number of regions: {p}.",
        ds,
        {"y_label": "difference of r", "reference_lines": [{"label": "no difference", "value": 0}]},
    )


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def _against_ceiling(shown: Mapping[str, EncodingResult], title: str) -> list[Figure]:
    values, ceilings, labels = [], [], []
    for result in shown.values():
        r = result.best["r"].values.astype(float)
        ceiling = result.best["ceiling"].values.astype(float)
        for roi, index in roi_members(result.best).items():
            values.append(r[index] * np.abs(r[index]))
            ceilings.append(ceiling[index])
            labels += [roi] * len(index)
    value, ceiling = np.concatenate(values), np.concatenate(ceilings)
    good = np.isfinite(value)
    variables = {"value": ("observation", value[good].astype("float32"))}
    if np.isfinite(ceiling).any():
        variables["ceiling"] = ("observation", ceiling[good].astype("float32"))
    ds = xr.Dataset(variables, coords={"group": ("observation", np.array(labels)[good])})
    ds["value"].attrs = {"long_name": "r², with the sign of r", "units": "r²"}
    return [
        Figure(
            "against-ceiling",
            "distribution",
            "Accuracy against the noise ceiling",
            f"Explained variance of {title} for the neuroids of each region beside their noise "
            "ceilings. The gap between the two is what a better model could still explain.",
            ds,
        )
    ]


def _scatter(shown: Mapping[str, EncodingResult], title: str) -> list[Figure]:
    x, y, label, group = [], [], [], []
    for subject, result in shown.items():
        kept = result.predictions
        if kept is None:
            return []
        ids = kept["stimulus_id"].values.astype(str).tolist()
        for i, roi in enumerate(kept["neuroid_id"].values.astype(str).tolist()):
            x.append(kept["predicted"].values[:, i])
            y.append(kept["measured"].values[:, i])
            label += ids
            group += [roi if len(shown) == 1 else f"{subject} {roi}"] * len(ids)
    ds = xr.Dataset(
        {"x": ("observation", np.concatenate(x)), "y": ("observation", np.concatenate(y))},
        coords={"label": ("observation", label), "group": ("observation", group)},
    )
    units = str(next(iter(shown.values())).best.attrs.get("units", ""))
    ds["x"].attrs = {"long_name": "predicted", "units": units}
    ds["y"].attrs = {"long_name": "measured", "units": units}
    return [
        Figure(
            "predictions",
            "scatter",
            "Predicted and measured responses",
            f"Each point is one image in one region, predicted by {title} from a fit that did not "
            "see it. Points far from the line of equality are what the model misses.",
            ds,
            {"identity_line": True},
        )
    ]


def _preference(
    result: EncodingResult, category: Mapping[str, str]
) -> tuple[NDArray[np.float64], list[str], list[str]] | None:
    """Mean z-scored predicted response (roi, category), where predictions were kept."""
    if result.predictions is None:
        return None
    ids = result.predictions["stimulus_id"].values.astype(str)
    labels = np.array([category.get(s, "") for s in ids])
    present = set(labels.tolist()) - {""}
    names = [c for c in _FAMILIES if c in present] + sorted(present - set(_FAMILIES))
    members = roi_members(result.best)
    out = np.empty((len(members), len(names)))
    for i, index in enumerate(members.values()):
        response = result.predictions["predicted"].isel(neuroid=index).values.mean(axis=1)
        z = stats.zscore(response)
        out[i] = [z[labels == c].mean() for c in names]
    return out, list(members), names


def _categories(
    shown: Mapping[str, EncodingResult], category: Mapping[str, str], title: str
) -> list[Figure]:
    tables = [t for result in shown.values() if (t := _preference(result, category)) is not None]
    if len(tables) < len(shown):
        return []
    _, rois, names = tables[0]
    if len(names) < 2 or len(names) > 30:
        return []
    ds = xr.Dataset(
        {"value": (("row", "column"), np.mean([t[0] for t in tables], axis=0))},
        coords={"row": rois, "column": names},
    )
    ds["value"].attrs = {"long_name": "mean predicted response", "units": "z", "cmap": "diverging"}
    return [
        Figure(
            "categories",
            "heatmap",
            "What each region would respond to",
            f"Mean response that {title} predicts for images of each category, z-scored over "
            "images; no image was in the fit that predicts it. The frame marks the category each "
            "region prefers.",
            ds,
            {"best_in": "row", "cmap": "diverging", "x_label": "category", "y_label": "region"},
        )
    ]


def _truth(
    shown: Mapping[str, EncodingResult],
    truth: Mapping[str, xr.Dataset],
    category: Mapping[str, str] | None,
    fdr: float,
) -> tuple[list[Figure], list[Estimate]]:
    """Compare with what was planted: layer, ceiling, null neuroids, preference."""
    layers = next(iter(shown.values())).layers
    confusion = np.zeros((len(layers), len(layers)))
    true_ceiling, ceiling, null_p, rejected, false = [], [], [], 0, 0
    agree, of, n_categories = 0, 0, 1
    for subject, result in shown.items():
        planted = truth[subject].sel(
            neuroid=_places(
                truth[subject]["neuroid_id"].values, result.best["neuroid_id"].values
            )
        ) if subject in truth else None  # fmt: skip
        if planted is None:
            continue
        null = planted["null"].values.astype(bool)
        p, q = result.best["p"].values, result.best["q"].values
        chosen = result.best["best_layer"].values.astype(str)
        meant = planted["layer"].values.astype(str)
        for i in np.flatnonzero(~null):
            if meant[i] in layers:
                confusion[layers.index(meant[i]), layers.index(chosen[i])] += 1
        true_ceiling.append(planted["ceiling"].values[~null])
        ceiling.append(result.best["ceiling"].values[~null])
        null_p.append(p[null])
        rejected += int((q < fdr).sum())
        false += int((q[null] < fdr).sum())
        preference = _preference(result, category) if category else None
        if preference is not None:
            table, rois, names = preference
            wanted: dict[str, set[str]] = {}
            for roi, kind in zip(
                planted["roi"].values.astype(str).tolist(),
                planted["preference"].values.astype(str).tolist(),
                strict=True,
            ):
                wanted.setdefault(roi, set()).add(kind)
            n_categories = len(names)
            for row, roi in zip(table, rois, strict=True):
                # A region of parts has several, none of which its mean has to show.
                several = wanted.get(roi, set()) & set(names)
                if len(several) == 1:
                    of += 1
                    agree += names[int(row.argmax())] in several
    if not ceiling:
        return [], []
    figures, found = [], []
    if len(layers) > 1 and confusion.sum():
        short = _short(layers)
        share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        ds = xr.Dataset(
            {"value": (("row", "column"), share)}, coords={"row": short, "column": short}
        )
        ds["value"].attrs = {"long_name": "share of neuroids", "units": ""}
        figures.append(
            Figure(
                "truth-layer",
                "matrix",
                "Planted and recovered layer",
                "Rows are the layer that drives a simulated neuroid, columns the layer chosen for "
                "it without knowing. A bright diagonal means that the choice can be trusted; "
                "neighbouring layers are easily taken for one another.",
                ds,
                {"x_label": "chosen layer", "y_label": "planted layer"},
            )
        )
        hits = float(np.trace(confusion) / confusion.sum())
        near = float(sum(np.trace(confusion, offset=k) for k in (-1, 0, 1)) / confusion.sum())
        found.append(
            Estimate(
                "Planted layer recovered",
                100 * hits,
                unit="%",
                note=f"of {int(confusion.sum()):,} neuroids with signal; within one layer "
                f"{near:.0%}",
                reference=f"chance {100 / len(layers):.0f} %",
            )
        )
    a, b = np.concatenate(true_ceiling), np.concatenate(ceiling)
    good = np.isfinite(a) & np.isfinite(b)
    a, b = a[good], b[good]
    if len(a):
        planted_figure, estimate = _ceiling_truth(a, b)
        figures.append(planted_figure)
        found.append(estimate)
    p = np.concatenate(null_p)
    p = np.sort(p[np.isfinite(p)])
    if len(p) > 1:
        at = np.linspace(0, 1, 101)
        share = np.searchsorted(p, at, side="right") / len(p)
        # The null distribution is itself a sample: its size limits how uniform p can be.
        draws = int(next(iter(shown.values())).best.attrs["permutations"]) * len(null_p)
        size = 1 / (1 / len(p) + 1 / max(draws, 1))
        half = stats.norm.ppf(0.975) * np.sqrt(at * (1 - at) / size)
        distance = float(stats.kstest(p, "uniform").statistic)
        uniform = float(stats.kstwobign.sf(distance * np.sqrt(size)))
        ds = xr.Dataset(
            {
                "value": (("x", "series"), np.stack([share, at], axis=1)),
                "low": (("x", "series"), np.stack([share * np.nan, at - half], axis=1)),
                "high": (("x", "series"), np.stack([share * np.nan, at + half], axis=1)),
            },
            coords={"x": at, "series": ["neuroids without signal", "uniform"]},
        )
        ds["value"].attrs = {"long_name": "share of neuroids with a p this small", "units": ""}
        figures.append(
            Figure(
                "truth-null",
                "curve",
                "p-values of neuroids without signal",
                "Cumulative share of the simulated neuroids that have no signal. A valid test "
                "follows the diagonal; a curve above it would find effects that are not there.",
                ds,
                {"x_label": "p", "y_label": "share"},
            )
        )
        found.append(
            Estimate(
                "Null neuroids with p < .05",
                100 * float((p < 0.05).mean()),
                unit="%",
                note=f"of {len(p):,} neuroids without signal; largest distance of their p from "
                f"uniform {distance:.3f}, Kolmogorov-Smirnov p {uniform:.2f}",
                reference="5 %",
            )
        )
    if rejected:
        found.append(
            Estimate(
                "False discoveries",
                100 * false / rejected,
                unit="%",
                note=f"{false} of {rejected:,} neuroids with q < {fdr:g} have no signal",
                reference=f"at most {100 * fdr:g} %",
            )
        )
    if of:
        found.append(
            Estimate(
                "ROIs whose planted preference is recovered",
                100 * agree / of,
                unit="%",
                note=f"{agree} of {of}: category with the largest predicted response",
                reference=f"chance {100 / n_categories:.0f} %",
            )
        )
    return figures, found


def _ceiling_truth(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[Figure, Estimate]:
    """Compare planted and estimated noise ceilings."""
    estimate = Estimate(
        "Error of the noise ceiling",
        float(np.abs(a - b).mean()),
        unit="r²",
        note=f"mean absolute difference from the planted ceiling over {len(a):,} neuroids; "
        f"mean signed {float((b - a).mean()):+.3f}",
        reference="0",
    )
    thin = np.linspace(0, len(a) - 1, min(len(a), 1500)).astype(int)
    order = np.argsort(a)[thin]
    ds = xr.Dataset({"x": ("observation", a[order]), "y": ("observation", b[order])})
    ds["x"].attrs = {"long_name": "planted noise ceiling", "units": "r²"}
    ds["y"].attrs = {"long_name": "estimated", "units": "r²"}
    figure = Figure(
        "truth-ceiling",
        "scatter",
        "Planted and estimated noise ceiling",
        "Each point is a simulated neuroid. Points should lie about the line of equality; "
        "their spread is the error with which a ceiling is known from so few repeats.",
        ds,
        {"identity_line": True},
    )
    return figure, estimate


def _places(known: NDArray[np.str_], wanted: NDArray[np.str_]) -> NDArray[np.intp]:
    place = {str(n): i for i, n in enumerate(known)}
    return np.array([place[str(n)] for n in wanted])


def _methods(
    attrs: Mapping[str, object], models: Sequence[str], n_subjects: int, fdr: float
) -> str:
    alphas = np.ravel(np.asarray(attrs.get("alphas", []), dtype=float))
    inner = {"loo": "leave-one-out", "gcv": "generalised cross-validation"}.get(
        str(attrs.get("inner_cv")), f"{attrs.get('inner_cv')}-fold cross-validation"
    )
    grid = (
        f"{len(alphas)} penalties from {alphas.min():g} to {alphas.max():g}" if len(alphas) else ""
    )
    sharing = {"neuroid": "each neuroid", "roi": "each ROI", "all": "all neuroids together"}
    delays = attrs.get("delays")
    unit = "images" if delays is None else "samples"
    text = (
        f"Voxel-wise encoding models [@naselaris2011] predicted the responses of {n_subjects} "
        f"subject{'s' if n_subjects > 1 else ''} to {attrs.get('n_stimuli')} stimuli from features "
        f"of {', '.join(models)}. {_repeats_and_delays(attrs)} Features were z-scored "
        f"with the mean and standard deviation of the training {unit}, and ridge regression was "
        f"fitted with one penalty per neuroid out of {grid}. Scores were "
        f"computed in {attrs.get('folds')} folds over "
        f"{'images' if delays is None else 'whole trials, or blocks of time where trials are few'}"
        "; in each fold the penalty and, for "
        f"{sharing.get(str(attrs.get('choose')), 'each neuroid')}, the layer were chosen by "
        f"{inner} within the training {unit}, so that no reported score took part in a choice. "
        "Accuracy is the Pearson correlation of measured and predicted responses over held-out "
        f"{unit}. Noise ceilings are ncsnr² / (ncsnr² + 1/k) for the mean of k presentations "
        f"[@allen2022]; neuroids with a ceiling below {attrs.get('ceiling_threshold')} have no "
        f"normalised score. Intervals are percentiles of {attrs.get('n_bootstrap')} bootstrap "
        f"samples over {'images' if delays is None else 'stretches of time'}."
    )
    mode = str(attrs.get("permutation"))
    if mode != "none":
        exchanged = "exchanged between images" if delays is None else "shifted in a circle in time"
        how = {
            "pooled": "a null distribution of the whole procedure, choices included, on responses "
            f"{exchanged}, pooled over neuroids drawn at random",
            "refit": f"the whole procedure repeated on responses {exchanged}",
            "predictions": "the measured responses exchanged between held-out images",
        }.get(mode, mode)
        text += (
            f" p-values are (1 + hits) / (1 + {attrs.get('permutations')}) [@phipson2010] against "
            f"{how}; q-values control the false-discovery rate over neuroids [@benjamini1995], "
            f"reported at {fdr:g}."
        )
    return text


def _repeats_and_delays(attrs: Mapping[str, object]) -> str:
    delays = attrs.get("delays")
    if delays is None:
        return "Repetitions of an image were averaged."
    first, last = np.ravel(np.asarray(delays, dtype=float))
    return (
        f"Responses were sampled at {float(str(attrs['sampling_rate'])):g} Hz, and the features "
        f"were delayed by {first:g} to {last:g} s in steps of one sample, no trial reaching into "
        "another; repetitions of a trial were averaged."
    )


def _joint_methods(results: Mapping[str, EncodingResult]) -> str:
    """Say how models of several feature spaces were fitted."""
    text = ""
    for title, result in results.items():
        attrs = result.best.attrs
        if "penalty" not in result.best:
            continue
        spaces = ", ".join(result.best["space"].values.astype(str))
        text += f" {title} joined the feature spaces {spaces} " + (
            "by banded ridge regression [@duprelatour2022], with a penalty for each space and "
            "neuroid"
            if attrs["regression"] == "banded"
            else "by stacking [@lin2024]: ridge regression on each space, mixed with convex "
            "weights for each neuroid"
        )
        text += f", chosen in {attrs['inner_cv']} folds within the training data."
        text += {
            "product": " Explained variance was divided among the spaces by the product measure "
            "[@duprelatour2022].",
            "leave_one_out": " The unique variance of a space is what the model explains more "
            "than one without it.",
            "subsets": " Explained variance was divided into unique and shared parts by models of "
            "every set of spaces [@lescroart2015].",
        }.get(str(attrs["partition"]), "")
    return text


_REFERENCES = {
    "duprelatour2022": """@article{duprelatour2022,
  author = {Dupr{\\'e} la Tour, Tom and Eickenberg, Michael and Nunez-Elizalde, Anwar O. and Gallant, Jack L.},
  title = {Feature-space Selection with Banded Ridge Regression},
  journal = {NeuroImage}, volume = {264}, pages = {119728}, year = {2022},
  doi = {10.1016/j.neuroimage.2022.119728}
}""",  # noqa: E501
    "lescroart2015": """@article{lescroart2015,
  author = {Lescroart, Mark D. and Stansbury, Dustin E. and Gallant, Jack L.},
  title = {Fourier Power, Subjective Distance, and Object Categories All Provide Plausible Models of {BOLD} Responses in Scene-selective Visual Areas},
  journal = {Frontiers in Computational Neuroscience}, volume = {9}, pages = {135}, year = {2015},
  doi = {10.3389/fncom.2015.00135}
}""",  # noqa: E501
    "lin2024": """@article{lin2024,
  author = {Lin, Ruimin and Naselaris, Thomas and Kay, Kendrick and Wehbe, Leila},
  title = {Stacked Regressions and Structured Variance Partitioning for Interpretable Brain Maps},
  journal = {NeuroImage}, volume = {298}, pages = {120772}, year = {2024},
  doi = {10.1016/j.neuroimage.2024.120772}
}""",
    "naselaris2011": """@article{naselaris2011,
  author = {Naselaris, Thomas and Kay, Kendrick N. and Nishimoto, Shinji and Gallant, Jack L.},
  title = {Encoding and Decoding in {fMRI}},
  journal = {NeuroImage}, volume = {56}, pages = {400--410}, year = {2011},
  doi = {10.1016/j.neuroimage.2010.07.073}
}""",
    "allen2022": """@article{allen2022,
  author = {Allen, Emily J. and St-Yves, Ghislain and Wu, Yihan and others},
  title = {A Massive {7T} {fMRI} Dataset to Bridge Cognitive Neuroscience and Artificial Intelligence},
  journal = {Nature Neuroscience}, volume = {25}, pages = {116--126}, year = {2022},
  doi = {10.1038/s41593-021-00962-x}
}""",  # noqa: E501
    "phipson2010": """@article{phipson2010,
  author = {Phipson, Belinda and Smyth, Gordon K.},
  title = {Permutation {P}-values Should Never Be Zero},
  journal = {Statistical Applications in Genetics and Molecular Biology},
  volume = {9}, pages = {39}, year = {2010}, doi = {10.2202/1544-6115.1585}
}""",
    "benjamini1995": """@article{benjamini1995,
  author = {Benjamini, Yoav and Hochberg, Yosef},
  title = {Controlling the False Discovery Rate},
  journal = {Journal of the Royal Statistical Society B}, volume = {57}, pages = {289--300},
  year = {1995}, doi = {10.1111/j.2517-6161.1995.tb02031.x}
}""",
}
