"""Encoders: linear maps from features to responses that predict from features with nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.schema import validate
from brainalign.encoding.align import Aligned, align, feature_matrix, neuroid_coords
from brainalign.encoding.fits import Chosen
from brainalign.encoding.nested import ALL_ROWS, Solvers, check_inner
from brainalign.errors import ConfigError, SchemaError
from brainalign.linear.lagged import lagged_predict
from brainalign.linear.ridge import DEFAULT_ALPHAS, check_alphas, warn_edges

__all__ = ["feature_weights", "fit_encoder", "predict", "sources_of"]

#: What features must share with those that an encoder was fitted to.
_PREPROCESSING = ("pooling", "preprocessing", "weights_sha256")


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
    chosen = fit_all(solvers, layer, aligned.responses, target_batch)
    if len(grid) > 1:
        index = np.abs(grid[:, None] - chosen.alpha).argmin(axis=0)
        warn_edges(index, chosen.score, grid)
    return encoder_dataset(solvers, layer, aligned, chosen, target_batch=target_batch)


def predict(
    encoder: xr.Dataset | Mapping[str, xr.Dataset],
    features: xr.Dataset | Mapping[str, xr.Dataset],
) -> xr.DataArray:
    r"""Predict responses to new stimuli.

    .. math:: \hat y = W \, \frac{x - \mu}{\sigma} + b, \qquad
              \hat y_s = \sum_l W_l \, \frac{x_{s-l} - \mu}{\sigma} + b

    the second for an encoder with delays l.

    Parameters
    ----------
    encoder : Dataset or dict of layer to Dataset
        ``encoder`` schema; several layers with different neuroids are joined.
    features : Dataset or dict of layer to Dataset
        Features of the encoder's model and layer, or of all of those that it joins. With delays,
        samples of time, ``(time, feature)``; each ``stimulus_id`` is a trial of its own.

    Returns
    -------
    DataArray, dimensions (stimulus, neuroid) or (time, neuroid)
        In the unit of the responses, with stimulus_id and the neuroids' coordinates.

    Raises
    ------
    SchemaError
        If model, layer, preprocessing or the number of features are not those of the encoder.
    """
    if isinstance(encoder, Mapping) and not isinstance(encoder, xr.Dataset):
        if not isinstance(features, Mapping) or isinstance(features, xr.Dataset):
            raise ConfigError("Encoders of several layers need the features of each, by layer.")
        parts = [predict(e, features) for e in encoder.values()]
        return xr.concat(parts, dim="neuroid", coords="minimal", compat="override", join="exact")
    validate(encoder, "encoder")
    given = [features] if isinstance(features, xr.Dataset) else list(features.values())
    sources = sources_of(encoder)
    layers = [_matching(source, given) for source in sources]
    expected = [int(s["n_features"]) for s in sources]
    for n, ds in zip(expected, layers, strict=True):
        if n != ds.sizes["feature"]:
            raise SchemaError(
                f"The encoder takes {n} features; there are {ds.sizes['feature']} of layer "
                f"{str(ds['layer'].values)!r}."
            )
    along = str(layers[0]["features"].dims[0])
    if (along == "time") != ("delay" in encoder.dims):
        raise SchemaError(
            f"The features are ({along}, feature), and the encoder has "
            f"{'delays' if 'delay' in encoder.dims else 'no delays'}.",
            "Features over time go with delays.",
        )
    coords: dict[str, Any] = {}
    if along == "stimulus":
        ids = layers[0]["stimulus_id"].values.astype(str)
        X = np.concatenate([feature_matrix(ds, ids.tolist()) for ds in layers], axis=1)
        coords["stimulus_id"] = (along, ids)
    else:
        X = np.concatenate([np.asarray(ds["features"].values) for ds in layers], axis=1)
        if "stimulus_id" in layers[0].coords:
            coords["stimulus_id"] = (along, layers[0]["stimulus_id"].values.astype(str))
    X = (X.astype(np.float64) - encoder["feature_mean"].values) / encoder["feature_scale"].values
    weights = encoder["weights"].values.astype(np.float64)
    if along == "stimulus":
        y = X @ weights.T + encoder["intercept"].values
    else:
        lags = np.rint(encoder["delay"].values * encoder.attrs["sampling_rate"]).astype(np.int64)
        clips = coords["stimulus_id"][1] if coords else np.zeros(len(X), dtype=int)
        y = np.empty((len(X), len(weights)))
        for clip in dict.fromkeys(clips.tolist()):
            rows = np.flatnonzero(clips == clip)
            x, w, constant = (
                torch.as_tensor(a) for a in (X[rows], weights, encoder["intercept"].values)
            )
            y[rows] = lagged_predict(x, w, lags, constant.to(x.dtype)).numpy()
    out = xr.DataArray(
        y.astype(np.float32),
        dims=(along, "neuroid"),
        coords=coords,
        name="predicted",
        attrs={"units": encoder.attrs.get("units", "")},
    )
    own = neuroid_coords(encoder).coords
    return out.assign_coords({n: c for n, c in own.items() if c.dims == ("neuroid",)})


def feature_weights(encoder: xr.Dataset) -> NDArray[np.float64]:
    r"""Return an encoder's weights for its features as they are, not standardised.

    .. math:: \hat y = W \frac{x - \mu}{\sigma} + b = (W / \sigma) \, x + \mathrm{const}

    :math:`W / \sigma` is the direction in the space of the features along which the prediction
    grows, whatever the spread of single features.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema, without delays.

    Returns
    -------
    ndarray, shape (n_neuroids, n_features)
        In the unit of the responses over that of the features.

    Raises
    ------
    SchemaError
        If it has delays.
    """
    if "delay" in encoder.dims:
        raise SchemaError(
            "The encoder has delays: its weights are no direction of features.",
            "Fit an encoder without delays.",
        )
    weights = np.asarray(encoder["weights"].values, dtype=np.float64)
    return weights / np.asarray(encoder["feature_scale"].values, dtype=np.float64)


def sources_of(encoder: xr.Dataset) -> list[dict[str, Any]]:
    """Return what the columns of an encoder are features of, in order."""
    if "sources" in encoder.attrs:
        sources: list[dict[str, Any]] = json.loads(encoder.attrs["sources"])
        return sources
    one = {k: encoder.attrs[k] for k in _PREPROCESSING if k in encoder.attrs}
    named = {k: str(encoder[k].values) for k in ("model", "layer")}
    return [{**named, "n_features": encoder.sizes["feature"], **one}]


def _matching(source: Mapping[str, Any], given: Sequence[xr.Dataset]) -> xr.Dataset:
    """Return the features that a source names."""
    for ds in given:
        validate(ds, "features")
    named = [[str(ds[k].values) for k in ("model", "layer")] for ds in given]
    wanted = [source["model"], source["layer"]]
    if not named:
        raise ConfigError("There are no features.")
    if wanted not in named:
        for k, (ours, theirs) in enumerate(zip(wanted, named[0], strict=True)):
            if len(given) == 1 and ours != theirs:
                kind = ("model", "layer")[k]
                raise SchemaError(
                    f"The encoder was fitted to {kind} {ours!r}; the features are of {theirs!r}."
                )
        raise SchemaError(f"There are no features of layer {wanted[1]!r} of model {wanted[0]!r}.")
    found = given[named.index(wanted)]
    for name in _PREPROCESSING:
        if name in source and source[name] != found.attrs.get(name):
            raise SchemaError(
                f"The encoder was fitted to features with {name} {source[name]!r}; these "
                f"have {found.attrs.get(name)!r}."
            )
    return found


@dataclass(frozen=True)
class Choices:
    """What was chosen for all targets of one model, on all rows.

    Parameters
    ----------
    penalties, weights : ndarray, shape (n_spaces, n_targets)
    score : ndarray, shape (n_targets,)
        See `brainalign.encoding.fits.Chosen`.
    """

    penalties: NDArray[np.float64]
    score: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def alpha(self) -> NDArray[np.float64]:
        """Common penalty, alpha / gamma of each space being its own, and gammas summing to 1."""
        return 1 / (1 / self.penalties).sum(axis=0)


def fit_all(
    solvers: Solvers, model: str, responses: NDArray[np.float32], target_batch: int | None
) -> Choices:
    """Choose the penalties of one model on all rows."""
    fit = solvers(model, ALL_ROWS)
    shape = len(solvers.models[model]), responses.shape[1]
    out = Choices(np.empty(shape), np.empty(shape[1]), np.empty(shape))
    for t in fit.batches(responses.shape[1], target_batch):
        chosen = fit.choose(_columns(responses, t, fit.mean.device))
        for name in ("penalties", "score", "weights"):
            getattr(out, name)[..., t] = getattr(chosen, name).cpu().numpy()
    return out


def encoder_dataset(
    solvers: Solvers,
    model: str,
    aligned: Aligned,
    choices: Choices,
    keep: NDArray[np.intp] | None = None,
    *,
    target_batch: int | None = None,
) -> xr.Dataset:
    """Put the fit of some neuroids, at the penalties chosen for them, into an ``encoder``."""
    fit = solvers(model, ALL_ROWS)
    keep = np.arange(aligned.responses.shape[1]) if keep is None else keep
    lags = solvers.regression.lags
    layers = [(space, name) for space in solvers.models[model] for name in solvers.spaces[space]]
    width = [solvers.features[name].shape[1] for _, name in layers]
    weights = np.empty((len(keep), sum(width) * len(lags)), dtype=np.float32)
    intercept = np.empty(len(keep))
    for part in fit.batches(len(keep), target_batch):
        where = fit.mean.device
        chosen = Chosen(
            *(
                torch.as_tensor(a[..., keep[part]], device=where)
                for a in (choices.penalties, choices.score, choices.weights)
            )
        )
        coef, constant = fit.coefficients(_columns(aligned.responses, keep[part], where), chosen)
        weights[part], intercept[part] = coef.cpu().numpy(), constant.cpu().numpy()
    metas = [aligned.meta[name] for _, name in layers]
    sources = [
        {
            "model": str(m["model"].values), "layer": str(m["layer"].values), "n_features": n,
            **{k: m.attrs[k] for k in _PREPROCESSING if k in m.attrs},
        }
        for m, n in zip(metas, width, strict=True)
    ]  # fmt: skip
    joint = len(sources) > 1
    attrs: dict[str, Any] = {
        "units": str(aligned.attrs.get("units", "")),
        "subject": str(aligned.attrs.get("subject", "")),
        "space": str(aligned.attrs.get("space", "")),
        "n_stimuli": len(aligned.stimulus_id),
        **({"sources": json.dumps(sources)} if joint else {}),
        **{k: v for k, v in sources[0].items() if k in _PREPROCESSING and not joint},
    }
    dims: tuple[str, ...] = ("neuroid", "feature")
    coords: dict[str, Any] = {
        "model": " + ".join(dict.fromkeys(s["model"] for s in sources)),
        "layer": model if joint else sources[0]["layer"],
    }
    if joint:
        coords["feature_space"] = ("feature", np.repeat([space for space, _ in layers], width))
    if solvers.regression.delays is not None:
        rate = float(solvers.regression.sampling_rate or 1)
        attrs |= {"sampling_rate": rate}
        dims = (*dims, "delay")
        weights = weights.reshape(len(keep), -1, len(lags))
        coords["delay"] = ("delay", lags / rate, {"units": "s"})
    stacked = solvers.regression.kind == "stacking"
    ds = xr.Dataset(
        {
            "weights": (dims, weights),
            "intercept": ("neuroid", intercept),
            "alpha": ("neuroid", np.where(stacked, np.nan, choices.alpha[keep])),
            "feature_mean": ("feature", fit.mean.double().cpu().numpy()),
            "feature_scale": ("feature", fit.scale.double().cpu().numpy()),
        },
        coords=coords,
        attrs=attrs,
    )
    neuroids = aligned.neuroids.isel(neuroid=keep)
    return validate(ds.merge(neuroids, combine_attrs="override"), "encoder")


def _columns(
    responses: NDArray[np.float32], t: slice | NDArray[np.intp], where: torch.device
) -> torch.Tensor:
    return torch.as_tensor(np.require(responses[:, t], requirements="W"), device=where)
