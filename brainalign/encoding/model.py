"""Encoders: linear maps from features to responses that predict from features with nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.schema import validate
from brainalign.encoding.align import Aligned, align, feature_matrix, neuroid_coords
from brainalign.encoding.nested import ALL_ROWS, Solvers, check_inner
from brainalign.errors import ConfigError, SchemaError
from brainalign.linear.ridge import DEFAULT_ALPHAS, check_alphas, warn_edges

__all__ = ["fit_encoder", "predict"]


def fit_encoder(
    features: xr.Dataset,
    responses: xr.Dataset,
    *,
    alphas: float | Sequence[float] = DEFAULT_ALPHAS,
    inner_cv: int | str = 5,
    repetitions: str = "average",
    stimuli: str = "exact",
    bad_neuroids: str = "exclude",
    seed: int = 0,
    device: str = "auto",
    target_batch: int | None = None,
) -> xr.Dataset:
    """Fit one layer to all responses given; see `encode` for the options and for scores.

    Parameters
    ----------
    features : Dataset
        ``features`` schema.
    responses : Dataset
        ``responses`` schema.
    alphas, inner_cv, repetitions, stimuli, bad_neuroids, seed, device, target_batch
        As in `encode`.

    Returns
    -------
    Dataset
        ``encoder`` schema.
    """
    grid = check_alphas(alphas)
    check_inner(inner_cv)
    aligned = align(
        features,
        responses,
        repetitions=repetitions,
        stimuli=stimuli,
        bad_neuroids=bad_neuroids,
    )
    check_inner(inner_cv, aligned.row_stimulus)
    layer = next(iter(aligned.features))
    solvers = Solvers(
        {layer: aligned.rows(layer)}, [], alphas=grid, inner_cv=inner_cv,
        row_groups=aligned.row_stimulus, seed=seed, device=device,
    )  # fmt: skip
    index, score = fit_all(solvers, layer, aligned.responses, target_batch)
    if len(grid) > 1:
        warn_edges(index, score, grid)
    return encoder_dataset(solvers, layer, aligned, index, target_batch=target_batch)


def predict(
    encoder: xr.Dataset | Mapping[str, xr.Dataset],
    features: xr.Dataset | Mapping[str, xr.Dataset],
) -> xr.DataArray:
    r"""Predict responses to new stimuli.

    .. math:: \hat y = W \, \frac{x - \mu}{\sigma} + b

    Parameters
    ----------
    encoder : Dataset or dict of layer to Dataset
        ``encoder`` schema; several layers with different neuroids are joined.
    features : Dataset or dict of layer to Dataset
        Features of the encoder's model and layer.

    Returns
    -------
    DataArray, dimensions (stimulus, neuroid)
        In the unit of the responses, with stimulus_id and the neuroids' coordinates.

    Raises
    ------
    SchemaError
        If model, layer, preprocessing or the number of features are not those of the encoder.
    """
    if isinstance(encoder, Mapping) and not isinstance(encoder, xr.Dataset):
        if not isinstance(features, Mapping) or isinstance(features, xr.Dataset):
            raise ConfigError("Encoders of several layers need the features of each, by layer.")
        missing = [n for n in encoder if n not in features]
        if missing:
            raise SchemaError(f"There are no features of layer {missing[0]!r}.")
        parts = [predict(e, features[n]) for n, e in encoder.items()]
        return xr.concat(parts, dim="neuroid", coords="minimal", compat="override", join="exact")
    if not isinstance(features, xr.Dataset):
        name = str(encoder["layer"].values)
        if name not in features:
            raise SchemaError(f"There are no features of layer {name!r}.")
        features = features[name]
    validate(encoder, "encoder")
    validate(features, "features")
    for name in ("model", "layer"):
        ours, theirs = str(encoder[name].values), str(features[name].values)
        if ours != theirs:
            raise SchemaError(
                f"The encoder was fitted to {name} {ours!r}; the features are of {theirs!r}."
            )
    for name in ("pooling", "preprocessing", "weights_sha256"):
        if name in encoder.attrs and encoder.attrs[name] != features.attrs.get(name):
            raise SchemaError(
                f"The encoder was fitted to features with {name} {encoder.attrs[name]!r}; these "
                f"have {features.attrs.get(name)!r}."
            )
    if encoder.sizes["feature"] != features.sizes["feature"]:
        raise SchemaError(
            f"The encoder takes {encoder.sizes['feature']} features; there are "
            f"{features.sizes['feature']}."
        )
    ids = features["stimulus_id"].values.astype(str)
    X = feature_matrix(features, ids.tolist()).astype(np.float64)
    X = (X - encoder["feature_mean"].values) / encoder["feature_scale"].values
    y = X @ encoder["weights"].values.T.astype(np.float64) + encoder["intercept"].values
    out = xr.DataArray(
        y.astype(np.float32),
        dims=("stimulus", "neuroid"),
        coords={"stimulus_id": ("stimulus", ids)},
        name="predicted",
        attrs={"units": encoder.attrs.get("units", "")},
    )
    coords = neuroid_coords(encoder).coords
    return out.assign_coords({n: c for n, c in coords.items() if c.dims == ("neuroid",)})


def fit_all(
    solvers: Solvers, layer: str, responses: NDArray[np.float32], target_batch: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose alphas of one layer on all rows: their places in the grid, and their scores."""
    fit = solvers(layer, ALL_ROWS)
    index = np.empty(responses.shape[1], dtype=np.int64)
    score = np.empty(responses.shape[1])
    for t in fit.solver.batches(responses.shape[1], target_batch):
        solution = fit.solver.solve(_columns(responses, t, fit.mean.device))
        index[t], score[t] = solution.index.cpu().numpy(), fit.score(solution).cpu().numpy()
    return index.clip(max=len(solvers.grid) - 1), score


def encoder_dataset(
    solvers: Solvers,
    layer: str,
    aligned: Aligned,
    index: NDArray[np.int64],
    keep: NDArray[np.intp] | None = None,
    *,
    target_batch: int | None = None,
) -> xr.Dataset:
    """Put the fit of some neuroids, at their alphas' places in the grid, into an ``encoder``."""
    fit = solvers(layer, ALL_ROWS)
    keep = np.arange(aligned.responses.shape[1]) if keep is None else keep
    weights = np.empty((len(keep), fit.factors.X.shape[1]), dtype=np.float32)
    intercept = np.empty(len(keep))
    for part in fit.solver.batches(len(keep), target_batch):
        where = fit.mean.device
        chosen = torch.as_tensor(index[keep[part]], device=where)
        solution = fit.solver.solve(_columns(aligned.responses, keep[part], where), index=chosen)
        coef, constant = fit.solver.coefficients(solution)
        weights[part], intercept[part] = coef.cpu().numpy(), constant.cpu().numpy()
    meta = aligned.meta[layer]
    copied = ("pooling", "preprocessing", "weights_sha256")
    attrs: dict[str, Any] = {n: meta.attrs[n] for n in copied if n in meta.attrs}
    attrs |= {
        "units": str(aligned.attrs.get("units", "")),
        "subject": str(aligned.attrs.get("subject", "")),
        "space": str(aligned.attrs.get("space", "")),
        "n_stimuli": len(aligned.stimulus_id),
    }
    ds = xr.Dataset(
        {
            "weights": (("neuroid", "feature"), weights),
            "intercept": ("neuroid", intercept),
            "alpha": ("neuroid", solvers.grid[index[keep]]),
            "feature_mean": ("feature", fit.mean.double().cpu().numpy()),
            "feature_scale": ("feature", fit.scale.double().cpu().numpy()),
        },
        coords={"model": str(meta["model"].values), "layer": str(meta["layer"].values)},
        attrs=attrs,
    )
    neuroids = aligned.neuroids.isel(neuroid=keep)
    return validate(ds.merge(neuroids, combine_attrs="override"), "encoder")


def _columns(
    responses: NDArray[np.float32], t: slice | NDArray[np.intp], where: torch.device
) -> torch.Tensor:
    return torch.as_tensor(np.require(responses[:, t], requirements="W"), device=where)
