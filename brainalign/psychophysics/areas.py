"""Channels of brain areas: which band of noise moves the response that an encoder predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from brainalign.encoding.model import sources_of
from brainalign.encoding.rois import roi_members
from brainalign.errors import ConfigError, SchemaError
from brainalign.features.differentiable import ImageFeatures
from brainalign.features.models import Model
from brainalign.psychophysics.analysis import (
    UNIT_SD,
    WIDEST,
    Channel,
    bounded_draws,
    percentile_intervals,
    probability_correct,
    told_open,
)
from brainalign.psychophysics.observers import prepared
from brainalign.psychophysics.stimuli import CONTRAST, MEAN, mask

__all__ = ["AreaFit", "area_responses", "fidelity", "fit_area", "move_areas", "network_responses"]

#: Returns a representation (n, unit) of grey pictures (n, height, width).
Respond = Callable[[Tensor], NDArray[np.float64]]


def move_areas(
    areas: Mapping[str, Respond],
    design: xr.Dataset,
    images: Tensor,
    stimulus_id: Sequence[str],
    *,
    contrast: float = CONTRAST,
    mean: float = MEAN,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> xr.Dataset:
    r"""Measure how far noise moves what areas respond to pictures.

    .. math:: e_i(f, c) = \lVert r(I_i + n) - r(I_i) \rVert^2, \qquad
              s_i = \lVert r(I_i) - \bar r \rVert^2

    with r the pattern over an area's neuroids, I the picture of low contrast without noise and
    :math:`\bar r` the mean pattern.

    Parameters
    ----------
    areas : mapping of str to callable
        Each returns its responses (n, unit) to grey pictures, such as of `area_responses`; all
        units of one area in one scale.
    design : xarray.Dataset
        Of `masking_design`, crossed: every image in every condition.
    images : Tensor, shape (n, height, width)
        Grey images, intensities in 0..1.
    stimulus_id : sequence of str, length n
        Names of the images.
    contrast, mean : float
        See `brainalign.psychophysics.stimuli.low_contrast`.
    batch_size : int
        Pictures at once.
    device : str
        Where pictures are made.

    Returns
    -------
    xarray.Dataset
        ``energy`` (area, stimulus, cell), ``spread`` (area, stimulus), with coordinates ``area``,
        ``stimulus_id``, and ``frequency`` and ``noise_sd`` (cell).

    Raises
    ------
    SchemaError
        If the design is not crossed, or there are fewer than 2 images.
    ConfigError
        If there is no area.
    """
    if not areas:
        raise ConfigError("No area was given.")
    ids = [str(s) for s in stimulus_id]
    noisy = design.isel(trial=design["noise_sd"].values > 0)
    cells = sorted(
        {
            (float(f), float(c))
            for f, c in zip(noisy["frequency"].values, noisy["noise_sd"].values, strict=True)
        }
    )
    if len(ids) < 2 or noisy.sizes["trial"] != len(ids) * len(cells):
        raise SchemaError(
            f"Every one of 2 images or more must be in every condition once; got {len(ids)} images "
            f"and {noisy.sizes['trial']} trials in {len(cells)} conditions.",
            "Make the design with crossed=True.",
        )
    place = {s: i for i, s in enumerate(ids)}
    column = {cell: i for i, cell in enumerate(cells)}

    def shown(rows: Sequence[int], part: xr.Dataset | None) -> Tensor:
        n = len(rows)
        sd, band, seeds = (
            (np.zeros(n), np.zeros(n, dtype=int), np.zeros(n, dtype=int))
            if part is None
            else tuple(part[v].values for v in ("noise_sd", "band", "seed"))
        )
        return mask(images[list(rows)].to(device), sd, band, seeds, contrast=contrast, mean=mean)

    clean: dict[str, NDArray[np.float64]] = {}
    for name, respond in areas.items():
        parts = [
            respond(shown(range(start, min(start + batch_size, len(ids))), None))
            for start in range(0, len(ids), batch_size)
        ]
        clean[name] = np.concatenate(parts)
    energy = np.zeros((len(areas), len(ids), len(cells)))
    size = noisy.sizes["trial"]
    for start in tqdm(range(0, size, batch_size), desc="areas", unit="batch", disable=None):
        part = noisy.isel(trial=slice(start, start + batch_size))
        rows = [place[str(s)] for s in part["stimulus_id"].values]
        keys = zip(part["frequency"].values.tolist(), part["noise_sd"].values.tolist(), strict=True)
        columns = [column[key] for key in keys]
        pictures = shown(rows, part)
        for a, (name, respond) in enumerate(areas.items()):
            energy[a, rows, columns] = ((respond(pictures) - clean[name][rows]) ** 2).sum(1)
    spread = [((r - r.mean(0)) ** 2).sum(1) for r in clean.values()]
    f, c = np.array(cells).T
    return xr.Dataset(
        {
            "energy": (("area", "stimulus", "cell"), energy),
            "spread": (("area", "stimulus"), np.array(spread)),
        },
        coords={
            "area": list(areas),
            "stimulus_id": ("stimulus", np.array(ids)),
            "frequency": ("cell", f, {"units": "cycles/image"}),
            "noise_sd": ("cell", c),
        },
        attrs={"contrast": contrast, "mean": mean},
    )


def area_responses(
    encoders: Mapping[str, xr.Dataset], model: Model, rois: Sequence[str] | None = None
) -> dict[str, Respond]:
    """Return what predicts each ROI's responses to grey pictures.

    Pictures go through the preprocessing that the encoder was fitted with, a cropping included.

    Parameters
    ----------
    encoders : mapping of str to Dataset
        By layer, as of `brainalign.encoding.read_result`: each neuroid on one layer.
    model : Model
        Whose features they take.
    rois : sequence of str, optional
        See `brainalign.encoding.rois.roi_members`.

    Returns
    -------
    dict of str to callable
        By ROI; each neuroid's prediction is divided by the norm of its weights for standardised
        features, so that none weighs more for its unit or its reliability.

    Raises
    ------
    ConfigError
        If an encoder is of another model, of several layers at once, or of time series.
    UnknownNameError
        For a ROI that no neuroid has.
    """
    parts = []
    for encoder in encoders.values():
        sources = sources_of(encoder)
        if len(sources) != 1 or "delay" in encoder.dims or sources[0]["model"] != model.name:
            raise ConfigError(
                f"Areas need encoders of one layer of {model.name} without delays; got "
                f"{[s['model'] for s in sources]}."
            )
        source = sources[0]
        features = ImageFeatures(model, [(str(source["layer"]), source["pooling"])]).eval()
        parts.append((features, encoder.load()))
    joined = xr.concat(
        [e[["intercept"]].drop_vars(["layer"], errors="ignore") for _, e in parts],
        dim="neuroid", coords="minimal", compat="override", join="override",
    )  # fmt: skip
    members = roi_members(joined, rois)
    cache: dict[int, tuple[Tensor, NDArray[np.float64]]] = {}

    def everything(pictures: Tensor) -> NDArray[np.float64]:
        # The ROIs ask for the same pictures one after the other.
        held = cache.get(0)
        if held is not None and held[0] is pictures:
            return held[1]
        out = []
        with torch.inference_mode():
            coloured = pictures[:, None].expand(-1, 3, -1, -1).to(model.device)
            for features, encoder in parts:
                x = features(coloured)[0].flatten(1).double().cpu().numpy()
                x = (x - encoder["feature_mean"].values) / encoder["feature_scale"].values
                w = encoder["weights"].values.astype(np.float64)
                scale = np.linalg.norm(w, axis=1)
                out.append(x @ (w / np.where(scale > 0, scale, 1)[:, None]).T)
        cache[0] = pictures, np.concatenate(out, axis=1)
        return cache[0][1]

    def part_of(index: NDArray[np.intp]) -> Respond:
        return lambda pictures: everything(pictures)[:, index]

    return {roi: part_of(index) for roi, index in members.items()}


def network_responses(model: Model) -> Respond:
    """Return what gives a network's own output for grey pictures, as a representation.

    Pictures go in as for `brainalign.psychophysics.observers.Classifier`: not cropped.
    """

    def respond(pictures: Tensor) -> NDArray[np.float64]:
        with torch.inference_mode():
            output = model.encode_image(prepared(model, pictures))
        return output.flatten(1).double().cpu().numpy()

    return respond


def fidelity(energy: ArrayLike, spread: ArrayLike) -> NDArray[np.float64]:
    r"""Return what noise leaves of the differences among pictures.

    .. math:: F(f, c) = \frac{1}{1 + D^2}, \qquad D^2 = \frac{\sum_i e_i(f, c)}{\sum_i s_i}

    It is 1 where noise moves nothing, and 1/2 where it moves a pattern as far as pictures lie from
    their mean.

    Parameters
    ----------
    energy : array-like, shape (..., n_stimuli, n_cells)
        e.
    spread : array-like, shape (..., n_stimuli)
        s.

    Returns
    -------
    ndarray, shape (..., n_cells)
    """
    e, s = np.asarray(energy, dtype=np.float64), np.asarray(spread, dtype=np.float64)
    return 1 / (1 + e.sum(-2) / s.sum(-1)[..., None])


@dataclass(frozen=True)
class AreaFit:
    """The channel of an area.

    Parameters
    ----------
    channel : Channel
        Its flags are ``flat`` (noise moves no band more than another, or nothing),
        ``bandwidth_open``, ``centre_open`` and ``sensitivity_open`` (an interval is open).
    intervals : dict of str to (float, float)
        Of ``bandwidth``, ``centre`` and ``sensitivity``, by drawing images with replacement; 0 or
        inf at an open end.
    slope, floor : float
        Of the fall of fidelity; where it ends.
    fidelity : xarray.Dataset
        ``value`` and ``fitted`` (cell), with ``frequency`` and ``noise_sd``.
    draws : xarray.Dataset
        The values of each draw.
    level : float
        Coverage of the intervals.
    """

    channel: Channel
    intervals: dict[str, tuple[float, float]]
    slope: float
    floor: float
    fidelity: xr.Dataset
    draws: xr.Dataset
    level: float


def fit_area(
    moved: xr.Dataset, *, level: float = 0.95, n_bootstrap: int = 100, seed: int = 0
) -> AreaFit:
    r"""Fit the channel of an area to how far noise moves it.

    .. math:: F(f, c) \approx \gamma + \frac{1 - \gamma}{1 + (c\,S(f) / 0.01)^\beta}, \qquad
              S(f) = s\, 2^{-(2 \log_2(f / f_0) / b)^2}

    by least squares. It is the form of `brainalign.psychophysics.probability_correct`, so that the
    channels of areas, networks and people are in one unit. For an area that is linear in the
    picture :math:`\beta = 2` and :math:`\gamma = 0` hold exactly, and S is the gain of its filter
    at the noise's band over the spread of its responses; one that saturates ends at a floor.

    Parameters
    ----------
    moved : xarray.Dataset
        One area of `move_areas`.
    level : float
        Coverage of the intervals.
    n_bootstrap, seed : int
        Draws of images, and their seed.

    Returns
    -------
    AreaFit

    Raises
    ------
    SchemaError
        If there are fewer than 3 bands, or the area responds to all pictures alike.
    """
    f, c = moved["frequency"].values, moved["noise_sd"].values
    e, s = moved["energy"].values, moved["spread"].values
    if e.ndim != 2 or len(np.unique(f)) < 3:
        raise SchemaError(
            f"A channel needs one area and 3 bands or more; got energy of shape {e.shape} and "
            f"{len(np.unique(f))} bands."
        )
    if not s.sum() > 0:
        raise SchemaError("The area responds to all pictures alike; noise has no scale to it.")
    measured = fidelity(e, s)
    lower, upper = _bounds(f, c)
    theta = _least_squares(measured, f, c, _area_starts(f, c), lower, upper)
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(len(s), np.full(len(s), 1 / len(s)), n_bootstrap)
    drawn = 1 / (1 + (weight @ e) / (weight @ s)[:, None])
    thetas = np.array([_least_squares(d, f, c, theta[None], lower, upper) for d in drawn])
    flat = _least_squares(measured, f, c, theta[None], lower, upper, flat=True)
    draws = bounded_draws(thetas, lower, upper)
    intervals = percentile_intervals(draws, level)
    # A channel is worth its two parameters if it explains most of what bands differ by.
    residual = [((measured - _model(t, f, c)) ** 2).sum() for t in (theta, flat)]
    is_flat = measured.min() > 0.9 or residual[0] > 0.5 * residual[1]
    sensitivity, centre, bandwidth = (float(2.0**t) for t in theta[:3])
    return AreaFit(
        told_open(Channel(bandwidth, centre, sensitivity, ("flat",) if is_flat else ()), intervals),
        intervals,
        float(2.0 ** theta[3]),
        float(theta[4]),
        xr.Dataset(
            {"value": ("cell", measured), "fitted": ("cell", _model(theta, f, c))},
            coords={"frequency": ("cell", f), "noise_sd": ("cell", c)},
        ),
        draws,
        level,
    )


def _model(
    theta: NDArray[np.float64], f: NDArray[np.float64], c: NDArray[np.float64]
) -> NDArray[np.float64]:
    return probability_correct(
        f, c, sensitivity=2.0 ** theta[0], centre=2.0 ** theta[1], bandwidth=2.0 ** theta[2],
        slope=2.0 ** theta[3], guess=theta[4], lapse=0.0,
    )  # fmt: skip


def _bounds(f: ArrayLike, c: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and largest log2 s, log2 f0, log2 b, log2 slope, and floor."""
    log_f, log_c = np.log2(np.asarray(f)), np.log2(np.asarray(c) / UNIT_SD)
    low, high = log_f.min(), log_f.max()
    return (
        np.array([-log_c.max() - 3, low - 2, np.log2(0.3), -1.5, 0.0]),
        np.array([-log_c.min() + 12, high + 2, np.log2(2 * WIDEST), 4.0, 0.6]),
    )


def _area_starts(f: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    bands = np.unique(np.log2(f))
    loudest = np.log2(np.max(c) / UNIT_SD)
    return np.array(
        [[-loudest + 1.5, m, w, 1.0, 0.05] for m in bands[1::2] for w in np.log2([1.5, 4.0])]
    )


def _least_squares(
    measured: NDArray[np.float64],
    f: NDArray[np.float64],
    c: NDArray[np.float64],
    starts: NDArray[np.float64],
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    *,
    flat: bool = False,
) -> NDArray[np.float64]:
    from scipy.optimize import least_squares

    free = np.array([0, 3, 4]) if flat else np.arange(5)
    best, loss = starts[0], np.inf
    for start in starts:
        whole = np.clip(start, lower + 1e-6, upper - 1e-6)
        if flat:
            whole[2] = 20.0  # a width of a million octaves

        def residuals(x: NDArray[np.float64], whole: NDArray = whole) -> NDArray[np.float64]:
            theta = whole.copy()
            theta[free] = x
            return _model(theta, f, c) - measured

        found = least_squares(residuals, whole[free], bounds=(lower[free], upper[free]))
        if found.cost < loss:
            loss = found.cost
            best = whole.copy()
            best[free] = found.x
    return best
