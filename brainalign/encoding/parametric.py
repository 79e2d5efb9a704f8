"""Parametric models of words and faces in VWFA and FFA: categories, and templates.

Category models say how large a response is by what observers see; template models compute it from
V1-like features of the image. All are judged by R^2 relative to zero on stimuli that were left out
of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.section import Estimate, Figure, Section
from brainalign.errors import SchemaError
from brainalign.evaluation.ceilings import simulated_ceiling
from brainalign.evaluation.scores import r2
from brainalign.evaluation.significance import bootstrap_ci

__all__ = [
    "PUBLISHED",
    "ParametricResult",
    "TemplateFit",
    "category_design",
    "evaluate_parametric",
    "fit_template",
    "leave_one_out",
    "r2_from_zero",
    "section",
    "section_from_folder",
    "template_inputs",
    "template_response",
]

#: Models of one or two categories: name -> the category told from all others (None: no category).
CATEGORY_MODELS: dict[str, str | None] = {
    "Flat": None,
    "CategoryWord": "WORD",
    "CategoryFace": "FACE",
}
#: Full template models: name -> the template.
TEMPLATE_MODELS = {"TemplateWord": "WORD", "TemplateFace": "FACE"}

#: Leave-one-out R^2 (%) that the authors' own predictions reach, by model, for VWFA and FFA.
PUBLISHED = {
    "Flat": (74.59, 57.68),
    "CategoryWord": (87.80, 55.95),
    "CategoryFace": (73.88, 75.32),
    "TemplateWord": (91.31, 56.88),
    "TemplateFace": (77.57, 84.79),
    "ceiling": (97.85, 97.62),
}

_SIGMA = (1e-3, 1e2)
_GRID = (61, 121)
_MAX_ZOOMS = 60


def r2_from_zero(measured: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """R^2 in % relative to zero: 100 (1 - sum_i (y_i - p_i)^2 / sum_i y_i^2).

    Parameters
    ----------
    measured, predicted : array, shape (n_stimuli, n_neuroids) or (n_stimuli,)
        The same unit.

    Returns
    -------
    array, shape (n_neuroids,)
        At most 100.

    References
    ----------
    Kay & Yeatman 2017, eLife 6:e22341, Methods.
    """
    return 100 * r2(measured, predicted, baseline=0)


def category_design(categories: Sequence[str], told: str | None) -> NDArray[np.float64]:
    """Return the design of a category model: one column a group of stimuli.

    Parameters
    ----------
    categories : sequence of str, length n_stimuli
        What observers see in each stimulus.
    told : str or None
        The category told from all others; None puts all stimuli into one group.

    Returns
    -------
    array, shape (n_stimuli, 1 or 2)
        1 where a stimulus belongs to the group.

    Raises
    ------
    SchemaError
        No stimulus is of the category.
    """
    labels = np.asarray(categories, dtype=str)
    if told is None:
        return np.ones((len(labels), 1))
    if told not in labels:
        raise SchemaError(
            f"No stimulus is of category {told!r}; there are {', '.join(sorted(set(labels)))}."
        )
    inside = labels == told
    return np.stack([inside, ~inside], axis=1).astype(np.float64)


def leave_one_out(design: ArrayLike, measured: ArrayLike) -> NDArray[np.float64]:
    """Least squares predictions of each stimulus from a fit to all the others.

    p_i = y_i - e_i / (1 - h_ii), with e the residuals and H = X (X'X)^-1 X' of the fit to all.

    Parameters
    ----------
    design : array, shape (n_stimuli, n_parameters)
        X, of full column rank also without any one stimulus.
    measured : array, shape (n_stimuli, n_neuroids)
        y.

    Returns
    -------
    array, shape (n_stimuli, n_neuroids)

    Raises
    ------
    SchemaError
        Shapes differ, or a parameter rests on a single stimulus.
    """
    x, y = np.asarray(design, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise SchemaError(f"Expected (n, parameters) and (n, neuroids), got {x.shape}, {y.shape}.")
    q, _ = np.linalg.qr(x)
    leverage = (q**2).sum(axis=1, keepdims=True)
    if (leverage > 1 - 1e-10).any():
        raise SchemaError(
            f"Stimulus {int(leverage.argmax())} alone decides a parameter: it cannot be left out."
        )
    return y - (y - q @ (q.T @ y)) / (1 - leverage)


def template_inputs(
    match: ArrayLike, energy: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale the two inputs of a template model to a mean of 1 over all images.

    Parameters
    ----------
    match : array, shape (n_stimuli, n_images)
        Inner product of the image's features with the template.
    energy : array, shape (n_stimuli, n_images)
        Mean of the image's features.
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (match, energy))
    return a / a.mean(), b / b.mean()


def template_response(
    a: ArrayLike, b: ArrayLike, gain: float, sigma: float, c: float
) -> NDArray[np.float64]:
    """Response of the template model: mean over images of g max(a - c b, 0) / (sigma + b).

    Parameters
    ----------
    a, b : array, shape (n_stimuli, n_images)
        Match with the template and mean energy, from `template_inputs`.
    gain : float
        g, in units of the response.
    sigma : float
        Semi-saturation, above 0.
    c : float
        Weight of the subtracted energy.

    Returns
    -------
    array, shape (n_stimuli,)

    References
    ----------
    Kay & Yeatman 2017, eLife 6:e22341, Methods, "Template model".
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (gain * np.maximum(a - c * b, 0) / (sigma + b)).mean(axis=-1)


class TemplateFit(NamedTuple):
    """Least-squares fit of a template model, to all stimuli and without each.

    Attributes
    ----------
    gain, sigma, c : float
        Parameters of the fit to all stimuli; c is -inf and gain 0 where the best response depends
        on the energy b alone.
    fit : array, shape (n_stimuli,)
        Responses of that fit.
    prediction : array, shape (n_stimuli,)
        Each stimulus as predicted by the fit to all the others.
    """

    gain: float
    sigma: float
    c: float
    fit: NDArray[np.float64]
    prediction: NDArray[np.float64]


def _shape(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    log_sigma: NDArray[np.float64],
    angle: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return responses at unit gain, for any leading shape of the two parameters."""
    sigma = np.exp(log_sigma)[..., None, None]
    angle = angle[..., None, None]
    return (np.maximum(np.cos(angle) * a - np.sin(angle) * b, 0) / (sigma + b)).mean(axis=-1)


def _explained(
    m: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the sum of squares that the best gain of at least 0 explains."""
    along = np.maximum((m * y * weight).sum(axis=-1), 0)
    norm = (m * m * weight).sum(axis=-1)
    return np.where(norm > 0, along**2 / np.where(norm > 0, norm, 1), 0)


def fit_template(
    a: ArrayLike, b: ArrayLike, measured: ArrayLike, *, n_starts: int = 6
) -> TemplateFit:
    """Fit the template model by least squares, to all stimuli and leaving out each in turn.

    min_(g, sigma, c) sum_i (y_i - mean_j g max(a_ij - c b_ij, 0) / (sigma + b_ij))^2, g >= 0, sigma
    > 0. With (g, g c) = k (cos t, sin t) the scale k has a closed form, so a grid over log sigma
    and t in [-pi/2, pi/2] covers every c; the best local optima of the grid are refined together.
    There is no random start, and the same data always give the same fit.

    Parameters
    ----------
    a, b : array, shape (n_stimuli, n_images)
        From `template_inputs`.
    measured : array, shape (n_stimuli,)
        y.
    n_starts : int
        Local optima of the grid that are refined, for each stimulus left out.

    Returns
    -------
    TemplateFit

    Raises
    ------
    SchemaError
        Shapes differ.

    Notes
    -----
    A fit can end at c = -inf, where the template plays no part and the response is that of the
    energy, b / (sigma + b). So it does for the word template in FFA (Kay & Yeatman 2017): squared
    error 1.180 against 1.543 of the authors' fit, reached by random starts as well, and 63.0 % R^2
    left out against 56.9.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    y = np.asarray(measured, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or y.shape != (len(a),):
        raise SchemaError(
            f"Expected a and b (n_stimuli, n_images) and y (n_stimuli,); got {a.shape}, "
            f"{b.shape}, {y.shape}."
        )
    n = len(y)
    limit = np.pi / 2
    log_sigma = np.linspace(np.log(_SIGMA[0]), np.log(_SIGMA[1]), _GRID[0])
    angle = np.linspace(-limit, limit, _GRID[1])
    grid = _shape(a, b, log_sigma[:, None], angle[None, :])
    # One weighting a fold: 0 for the stimulus left out; the last row leaves out none.
    weights = np.vstack([1 - np.eye(n), np.ones(n)])
    fitted = np.empty((n + 1, n))
    parameters = (0.0, 0.0, 0.0)
    for fold, weight in enumerate(weights):
        height = _explained(grid, y, weight)
        start = _peaks(height)[:n_starts]
        if not len(start):
            # No response goes along with any model: the best gain is 0.
            fitted[fold], parameters = 0, (0.0, 0.0, 0.0)
            continue
        s, t = log_sigma[start[:, 0]], angle[start[:, 1]]
        s, t = _climb(a, b, y, weight, s, t)
        m = _shape(a, b, s, t)
        winner = int(_explained(m, y, weight).argmax())
        m = m[winner]
        norm = (m * m * weight).sum()
        scale = max((m * y * weight).sum() / norm, 0.0) if norm > 0 else 0.0
        fitted[fold] = scale * m
        parameters = (float(scale), float(s[winner]), float(t[winner]))
    scale, s_all, t_all = parameters
    at_edge = limit - abs(t_all) < 1e-9
    return TemplateFit(
        gain=0.0 if at_edge else scale * float(np.cos(t_all)),
        sigma=float(np.exp(s_all)),
        c=float(np.copysign(np.inf, t_all)) if at_edge else float(np.tan(t_all)),
        fit=fitted[n],
        prediction=np.diag(fitted[:n]).copy(),
    )


def _climb(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    log_sigma: NDArray[np.float64],
    angle: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Refine all starts together: each moves to the best of a 5 x 5 grid around it.

    A start's grid halves when its best point is not on the rim and doubles when it is, so that it
    can follow a ridge.
    """
    low, high = np.log(_SIGMA)
    step = np.linspace(-1, 1, 5)
    wide = np.array([(high - low) / (_GRID[0] - 1), np.pi / (_GRID[1] - 1)])
    width = np.tile(wide, (len(log_sigma), 1))
    every = np.arange(len(log_sigma))
    for _ in range(_MAX_ZOOMS):
        s = log_sigma[:, None, None] + width[:, :1, None] * step[:, None] + 0 * step
        t = angle[:, None, None] + width[:, 1:, None] * step + 0 * step[:, None]
        s, t = np.clip(s, low, high), np.clip(t, -np.pi / 2, np.pi / 2)
        height = _explained(_shape(a, b, s, t), y, weight).reshape(len(every), -1)
        # Ties stay at the centre, so that no start drifts along a plateau.
        height[:, step.size**2 // 2] *= 1 + 1e-12
        best = height.argmax(axis=1)
        s, t = (v.reshape(len(every), -1)[every, best] for v in (s, t))
        moved = np.abs(np.stack([s - log_sigma, t - angle], axis=1))
        inside = (moved < 0.75 * width).all(axis=1, keepdims=True)
        width = np.where(inside, width / 2, np.minimum(2 * width, wide))
        log_sigma, angle = s, t
        if (width < 1e-5 * wide).all():
            break
    return log_sigma, angle


def _peaks(height: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the (row, column) of local maxima above 0, the highest first."""
    padded = np.pad(height, 1, constant_values=-np.inf)
    rows, columns = height.shape
    around = [
        padded[1 + i : 1 + i + rows, 1 + j : 1 + j + columns]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if (i, j) != (0, 0)
    ]
    where = np.argwhere((height >= np.max(around, axis=0)) & (height > 0))
    return where[np.argsort(-height[tuple(where.T)], kind="stable")]


@dataclass(frozen=True)
class ParametricResult:
    """Result of `evaluate_parametric`.

    Attributes
    ----------
    predictions : xarray.Dataset
        ``prediction`` (model, neuroid, presentation), leave-one-stimulus-out, and ``measured``
        (neuroid, presentation), % signal change.
    scores : xarray.Dataset
        ``r2``, ``low``, ``high`` (model, neuroid): % R^2 from zero with its 95 % bootstrap interval
        over stimuli; ``ceiling`` (neuroid).
    stored : xarray.Dataset or None
        ``r2`` (model, neuroid) of predictions that came with the data, for the same models.
    fits : dict of (model, neuroid) to TemplateFit
        Fits of the template models.
    """

    predictions: xr.Dataset
    scores: xr.Dataset
    stored: xr.Dataset | None
    fits: Mapping[tuple[str, str], TemplateFit]


def evaluate_parametric(
    experiment: xr.Dataset,
    projections: xr.Dataset,
    stored: xr.Dataset | None = None,
    *,
    n_starts: int = 6,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> ParametricResult:
    """Evaluate category and template models by leaving out one stimulus at a time.

    Parameters
    ----------
    experiment : xarray.Dataset
        ``responses`` and ``standard_error`` (presentation, neuroid), coord ``category``; extra
        ``experiment1`` of the study kay2017.
    projections : xarray.Dataset
        ``template_match`` (template_name, stimulus) and ``energy`` (stimulus), as many images for
        each presentation, in order; extra ``projections``.
    stored : xarray.Dataset, optional
        ``prediction`` (model, neuroid, presentation) to be scored beside; extra ``models``.
    n_starts : int
        See `fit_template`.
    n_bootstrap : int
        Resamplings of the stimuli for the intervals.
    seed : int
        Seed of the bootstrap and the simulated ceiling.

    Returns
    -------
    ParametricResult

    Raises
    ------
    SchemaError
        The images do not divide evenly over the presentations, or a category is missing.
    """
    y = np.asarray(experiment["responses"].values, dtype=np.float64)
    n, rois = len(y), [str(v) for v in experiment["neuroid_id"].values]
    categories = [str(c) for c in experiment["category"].values]
    if projections.sizes["stimulus"] % n:
        raise SchemaError(
            f"{projections.sizes['stimulus']} images do not divide over {n} presentations."
        )
    predictions = {
        name: leave_one_out(category_design(categories, told), y).T
        for name, told in CATEGORY_MODELS.items()
    }
    fits = {}
    for name, template in TEMPLATE_MODELS.items():
        match = projections["template_match"].sel(template_name=template).values
        a, b = template_inputs(match.reshape(n, -1), projections["energy"].values.reshape(n, -1))
        for i, roi in enumerate(rois):
            fits[name, roi] = fit_template(a, b, y[:, i], n_starts=n_starts)
        predictions[name] = np.stack([fits[name, roi].prediction for roi in rois])

    models = list(predictions)
    stacked = np.stack([predictions[m] for m in models])
    intervals = [
        bootstrap_ci(r2_from_zero, y, stacked[i].T, n_bootstrap=n_bootstrap, seed=seed)
        for i in range(len(models))
    ]
    coords = {"model": models, "neuroid_id": ("neuroid", rois)}
    both = ("model", "neuroid")
    ceiling = 100 * simulated_ceiling(y, experiment["standard_error"].values, seed=seed)
    return ParametricResult(
        predictions=xr.Dataset(
            {
                "prediction": ((*both, "presentation"), stacked),
                "measured": (("neuroid", "presentation"), y.T),
            },
            coords={
                **coords,
                "stimulus_id": ("presentation", experiment["stimulus_id"].values),
                "category": ("presentation", categories),
            },
            attrs={"units": experiment.attrs.get("units", "")},
        ),
        scores=xr.Dataset(
            {
                "r2": (both, np.stack([i.value for i in intervals])),
                "low": (both, np.stack([i.low for i in intervals])),
                "high": (both, np.stack([i.high for i in intervals])),
                "ceiling": ("neuroid", ceiling),
            },
            coords=coords,
            attrs={"units": "% R2 relative to zero"},
        ),
        stored=None
        if stored is None
        else xr.Dataset(
            {
                "r2": (
                    both,
                    np.stack(
                        [
                            r2_from_zero(y, stored["prediction"].sel(model=m).values.T)
                            for m in models
                        ]
                    ),
                )
            },
            coords=coords,
        ),
        fits=fits,
    )


def section(
    result: ParametricResult,
    *,
    id: str = "parametric",
    title: str = "Category and template models",
) -> Section:
    """Describe an evaluation of parametric models as a section of the report.

    Parameters
    ----------
    result : ParametricResult
        From `evaluate_parametric`.
    id, title : str
        The section's id and heading.
    """
    scores, predictions = result.scores, result.predictions
    models = [str(m) for m in scores["model"].values]
    rois = [str(v) for v in scores["neuroid_id"].values]
    value = np.array(scores["r2"].values)
    summary = []
    for j, roi in enumerate(rois):
        summary.append(
            Estimate(
                f"Noise ceiling, {roi}",
                float(scores["ceiling"][j]),
                unit="% R²",
                note="simulated from the standard errors",
                reference=_published("ceiling", roi, result),
            )
        )
        for i, model in enumerate(models):
            summary.append(
                Estimate(
                    f"{model}, {roi}",
                    float(value[i, j]),
                    float(scores["low"][i, j]),
                    float(scores["high"][i, j]),
                    "% R²",
                    "leave one stimulus out, relative to zero; bootstrap over stimuli",
                    _published(model, roi, result),
                )
            )

    bars = xr.Dataset(
        {k: (("item", "series"), scores[v].values) for k, v in _BARS.items()},
        coords={"item": models, "series": rois},
    )
    bars["value"].attrs = {"long_name": "R² relative to zero", "units": "%"}
    best = {roi: models[int(value[:, j].argmax())] for j, roi in enumerate(rois)}
    measured = predictions["measured"].values
    chosen = np.stack(
        [predictions["prediction"].values[models.index(best[roi]), j] for j, roi in enumerate(rois)]
    )
    names = predictions["stimulus_id"].values.tolist()
    scatter = xr.Dataset(
        {"x": ("observation", chosen.ravel()), "y": ("observation", measured.ravel())},
        coords={
            "label": ("observation", names * len(rois)),
            "group": (
                "observation",
                np.repeat([f"{roi}, {best[roi]}" for roi in rois], len(names)),
            ),
        },
    )
    units = str(predictions.attrs.get("units", ""))
    scatter["x"].attrs = {"long_name": "predicted without this stimulus", "units": units}
    scatter["y"].attrs = {"long_name": "measured", "units": units}
    ceilings = [
        {"label": f"ceiling {roi}", "value": float(scores["ceiling"][j])}
        for j, roi in enumerate(rois)
    ]
    fits = [
        f"{model} in {roi}: "
        + (
            f"g = {f.gain:.3g}, σ = {f.sigma:.3g}, c = {f.c:.3g}"
            if np.isfinite(f.c)
            else f"energy alone, ∝ b/(σ + b) with σ = {f.sigma:.3g} (c → −∞)"
        )
        for (model, roi), f in result.fits.items()
    ]
    return Section(
        id=id,
        title=title,
        intro="Do the responses to words, faces and other images follow the category that "
        "observers report, or how well the image matches a template? Each model predicts every "
        "stimulus from a fit to all the others.",
        figures=[
            Figure(
                "models",
                "bars",
                "Variance explained by each model",
                "R² relative to zero of the leave-one-stimulus-out predictions, with the 95 % "
                "bootstrap interval over stimuli; lines mark the noise ceilings. Compare the "
                "template models with the category models: a template that computes the response "
                "from the image should come nearer to the ceiling than the category alone, for "
                "words in VWFA and for faces in FFA.",
                bars,
                {"reference_lines": ceilings, "y_label": "R² (%)"},
            ),
            Figure(
                "predictions",
                "scatter",
                "Predicted and measured responses",
                "Each point is one stimulus in one region under the region's best model, "
                "predicted without that stimulus. Points far from the line of equality are the "
                "stimuli that the model misses.",
                scatter,
                {"identity_line": True},
            ),
        ],
        summary=summary,
        methods="Category models predict one response for all stimuli (Flat), or one for a "
        "category and one for the rest (CategoryWord, CategoryFace), by least squares. Template "
        "models predict the mean over a stimulus's images of g·max(a − c·b, 0)/(σ + b), where a is "
        "the inner product of V1-like features with the template (the mean features of the "
        "full-contrast words or faces; these two stimuli are thus known to the template even when "
        "left out) and b their mean, both divided by their mean over images [@kay2017]. "
        "Each was fitted leaving out one stimulus at a time; template models by a search over σ "
        "and c that covers all local optima of a fine grid, with g in closed form. "
        "R² = 100·(1 − Σ(y − p)²/Σy²), relative to zero. The noise ceiling is the median R² of a "
        "signal as prediction of signal plus noise, simulated from the standard errors. "
        "Intervals are percentile bootstraps over stimuli. Fits to all stimuli: "
        + "; ".join(fits)
        + ".",
        references=dict(_REFERENCES),
        facts={
            "stimuli": str(len(names)),
            "regions": ", ".join(rois),
            "models": ", ".join(models),
        },
    )


_BARS = {"value": "r2", "low": "low", "high": "high"}


def _published(model: str, roi: str, result: ParametricResult) -> str:
    """Return the authors' value, from their predictions where they came with the data."""
    if roi not in ("VWFA", "FFA"):
        return ""
    value = PUBLISHED[model][("VWFA", "FFA").index(roi)]
    if result.stored is not None and model in result.stored["model"]:
        j = result.stored["neuroid_id"].values.tolist().index(roi)
        value = float(result.stored["r2"].sel(model=model)[j])
    return f"authors' {value:.2f}"


def section_from_folder(data: str | Path, *, n_bootstrap: int = 1000, seed: int = 0) -> Section:
    """Evaluate the parametric models on a bundle (`brainalign.data.bundle`) of kay2017.

    Parameters
    ----------
    data : path
        The bundle, with the extras ``experiment1``, ``projections`` and, optionally, ``models``.
    n_bootstrap, seed : int
        See `evaluate_parametric`.

    Raises
    ------
    SchemaError
        The bundle lacks an extra.
    """
    from brainalign.data.bundle import read_bundle

    extras = read_bundle(data).extras
    for name in ("experiment1", "projections"):
        if name not in extras:
            raise SchemaError(
                f"The study in {data} has no {name!r}; the parametric models are those of kay2017."
            )
    return section(
        evaluate_parametric(
            extras["experiment1"],
            extras["projections"],
            extras.get("models"),
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
    )


_REFERENCES = {
    "kay2017": """@article{kay2017,
  author = {Kay, Kendrick N. and Yeatman, Jason D.},
  title = {Bottom-up and Top-down Computations in Word- and Face-Selective Cortex},
  journal = {eLife},
  volume = {6},
  pages = {e22341},
  year = {2017},
  doi = {10.7554/eLife.22341}
}""",
}
