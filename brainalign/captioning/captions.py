"""Captions of voxels: projected weights put into words, and how faithful the words are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.captioning.captioner import (
    BEAMS,
    MAX_TOKENS,
    SMALL_CAPTIONER,
    Captioner,
    load_captioner,
)
from brainalign.captioning.projection import (
    DRAWS,
    TEMPERATURE,
    embedding_weights,
    project,
)
from brainalign.captioning.words import Tagger, noun_prompts, nouns, top_nouns
from brainalign.data.schema import validate
from brainalign.data.store import provenance, read, write
from brainalign.encoding.align import feature_matrix, neuroid_coords
from brainalign.encoding.model import predict, sources_of
from brainalign.encoding.result import EncodingResult, read_result
from brainalign.encoding.rois import roi_members
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.features import load_model
from brainalign.features.layers import OUTPUT
from brainalign.features.manifest import read_manifest

if TYPE_CHECKING:
    from brainalign.features.models import Model

log = logging.getLogger(__name__)

__all__ = [
    "caption_best_images",
    "caption_encoder",
    "caption_result",
    "caption_voxels",
    "predict_texts",
    "voxel_table",
]

_TEXTS_AT_ONCE = 256
_OTHERS = 1000
_NEUROIDS_AT_ONCE = 4096


def predict_texts(
    encoder: xr.Dataset, texts: Sequence[str], model: Model | str | None = None
) -> NDArray[np.float32]:
    r"""Return what an encoder predicts for texts, through the model's text tower.

    .. math:: \hat y = W \frac{\rho \, \hat t - \mu}{\sigma} + b, \qquad
              \rho^2 = \sum_j \mu_j^2 + \sigma_j^2

    with :math:`\hat t` the unit embedding of a text and :math:`\rho` the root mean square norm of
    the embeddings that the encoder was fitted to, which is 1 where these were of unit norm.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema, of the output of a CLIP model.
    texts : sequence of str
    model : Model or str, optional
        The CLIP model; by default the encoder's own, by its name.

    Returns
    -------
    ndarray, shape (n_texts, n_neuroids)
        In the unit of the responses.
    """
    embeddings = _text_embeddings(encoder, texts, model)
    weights = np.asarray(encoder["weights"].values, dtype=np.float64)
    return (embeddings @ weights.T + encoder["intercept"].values).astype(np.float32)


def _text_embeddings(
    encoder: xr.Dataset, texts: Sequence[str], model: Model | str | None
) -> NDArray[np.float64]:
    """Return embeddings of texts, standardised as the encoder's features."""
    import torch

    embedding_weights(encoder)  # raises where the encoder is not one of embeddings
    named = str(encoder["model"].values) if model is None else model
    clip = load_model(named) if isinstance(named, str) else named
    with torch.no_grad():
        parts = [
            clip.encode_text([*texts[i : i + _TEXTS_AT_ONCE]]).float().cpu().numpy()
            for i in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
    t = np.concatenate(parts).astype(np.float64)
    mean, scale = encoder["feature_mean"].values, encoder["feature_scale"].values
    if t.shape[1] != len(mean):
        raise SchemaError(
            f"The texts have {t.shape[1]} features and the encoder {len(mean)}.",
            "Fit the encoder to the output of a CLIP model: images and texts share its space.",
        )
    t *= np.sqrt((mean**2 + scale**2).sum()) / np.linalg.norm(t, axis=1, keepdims=True)
    return (t - mean) / scale


def _require_space(
    captioner: Captioner, encoder: xr.Dataset, embeddings: Iterable[tuple[str, xr.Dataset]] = ()
) -> None:
    """Refuse embeddings of another model than the encoder's, and a captioner of another."""
    own = [str(encoder[k].values) for k in ("model", "layer")]
    for what, ds in embeddings:
        theirs = [str(ds[k].values) for k in ("model", "layer")]
        if theirs != own:
            raise SchemaError(
                f"The encoder was fitted to layer {own[1]!r} of {own[0]!r}; the {what} has "
                f"embeddings of layer {theirs[1]!r} of {theirs[0]!r}.",
                "Embed the images with the model that the encoder was fitted to.",
            )
    if captioner.clip is not None and captioner.clip != own[0]:
        raise SchemaError(
            f"The captioner reads embeddings of {captioner.clip!r}; the encoder was fitted to "
            f"those of {own[0]!r}, so the words would mean nothing.",
            f"Fit the encoder to {captioner.clip!r}, or use a captioner of {own[0]!r}.",
        )
    if captioner.n_features != encoder.sizes["feature"]:
        raise SchemaError(
            f"The encoder has {encoder.sizes['feature']} features and the captioner takes "
            f"{captioner.n_features}.",
            "Use the captioner of the model that the encoder was fitted to.",
        )


def _opened(library: Any, layer: str) -> Any:
    """Open what a library names by path, of a manifest the layer."""
    if isinstance(library, list | tuple):
        return [_opened(part, layer) for part in library]
    if isinstance(library, str | Path) and Path(library).suffix != ".npy":
        return _features(library, layer)
    return library


def _described(library: Any) -> Iterator[xr.Dataset]:
    """Yield the parts of an opened library that say which model made them."""
    if isinstance(library, list):
        for part in library:
            yield from _described(part)
    elif isinstance(library, xr.Dataset):
        yield validate(library, "features")


def _features(path: str | Path, layer: str) -> xr.Dataset:
    """Open a store of features, or a layer of a manifest."""
    if Path(path).suffix != ".json":
        return read(path, "features")
    layers = read_manifest(path)
    if layer not in layers:
        raise UnknownNameError(f"{path} has no layer {layer!r}.{near(layer, layers)}")
    return layers[layer]


def _text_model(
    encoder: xr.Dataset, model: Model | str | None, device: str = "auto"
) -> Model | None:
    """Return the model whose texts lie where an encoder's features do; None where none do."""
    named = str(encoder["model"].values) if model is None else model
    if str(encoder["layer"].values) != OUTPUT:
        return None
    if isinstance(named, str):
        if named.startswith("instance:"):
            return None
        named = load_model(named, device=device)
    return None if named.text is None else named


def _checker(
    encoder: xr.Dataset,
    check_with: xr.Dataset | None,
    model: Model | str | None,
    device: str = "auto",
) -> tuple[xr.Dataset, Model] | None:
    """Return the encoder that predicts responses to texts, and their model; None for none."""
    checks = encoder
    if check_with is not None:
        validate(check_with, "encoder")
        own, theirs = (ds["neuroid_id"].values.astype(str).tolist() for ds in (encoder, check_with))
        place = {n: i for i, n in enumerate(theirs)}
        missing = [n for n in own if n not in place]
        if missing:
            raise SchemaError(
                f"check_with lacks {len(missing)} of the {len(own)} neuroids that are captioned, "
                f"the first is {missing[0]!r}.",
                "Fit it to the same responses.",
            )
        checks = check_with.isel(neuroid=[place[n] for n in own])
    clip = _text_model(checks, model, device)
    if clip is not None:
        _text_embeddings(checks, ["a photo"], clip)  # raises where its texts do not fit
        return checks, clip
    about = f"layer {str(checks['layer'].values)!r} of {str(checks['model'].values)!r}"
    if check_with is not None:
        raise SchemaError(
            f"check_with was fitted to {about}, where no texts lie.",
            "Give an encoder of the output of a CLIP model.",
        )
    log.warning(
        "No texts lie where this encoder's features do (%s): its captions are not checked. An "
        "encoder of a CLIP model's output, given as check_with, checks them.", about,
    )  # fmt: skip
    return None


def caption_voxels(
    encoder: xr.Dataset,
    embeddings: ArrayLike,
    captioner: Captioner,
    *,
    check_with: xr.Dataset | None = None,
    model: Model | str | None = None,
    beams: int = BEAMS,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Caption an embedding of every voxel and draw, and check the words by the encoder.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema.
    embeddings : array-like, shape (n_draws, n_neuroids, n_features)
        Of `project`, not normalised.
    captioner : Captioner
        See `load_captioner`.
    check_with : Dataset, optional
        ``encoder`` schema: another encoder of the same neuroids that checks the words, of the
        output of a CLIP model. By default the encoder itself, where texts lie in its space.
    model : Model or str, optional
        The CLIP model of the encoder that checks; by default its own, by its name.
    beams, max_tokens, batch_size
        Of the search.
    seed : int
        Draws the captions of other voxels that a voxel's are ranked among.
    progress : bool, optional
        Whether to draw a progress bar; by default in a terminal.

    Returns
    -------
    Dataset
        ``captions`` schema: ``caption``; ``prediction``, the encoder's for the caption's text, in
        the unit of the responses; ``percentile``, the share of up to 1,000 captions of other voxels
        for which it predicts this voxel less (ties count half), all (neuroid, draw). The attribute
        ``checked_with`` names the model that embedded the words. Where there is none (states of a
        vision tower have no texts beside them) it is missing, and both are NaN.

    Raises
    ------
    SchemaError
        If the captioner reads embeddings of another model than the encoder's, or `check_with` lacks
        neuroids or has no texts in its space.
    """
    _require_space(captioner, encoder)
    checker = _checker(encoder, check_with, model)
    grid = _said(encoder, embeddings, captioner, beams, max_tokens, batch_size, progress)
    return _checked(encoder, grid, checker, seed)


def _said(
    encoder: xr.Dataset,
    embeddings: ArrayLike,
    captioner: Captioner,
    beams: int,
    max_tokens: int,
    batch_size: int,
    progress: bool | None,
) -> NDArray[np.str_]:
    """Return captions (neuroid, draw) of embeddings (draw, neuroid, feature)."""
    x = np.asarray(embeddings, dtype=np.float32)
    n = encoder.sizes["neuroid"]
    if x.ndim != 3 or x.shape[1] != n:
        raise SchemaError(
            f"Embeddings of voxels are (draw, neuroid, feature) of {n} neuroids; these have shape "
            f"{x.shape}."
        )
    flat = captioner.caption(
        np.swapaxes(x, 0, 1).reshape(n * len(x), -1),
        beams=beams, max_tokens=max_tokens, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return np.array(flat, dtype=str).reshape(n, len(x))


def _checked(
    encoder: xr.Dataset,
    grid: NDArray[np.str_],
    checker: tuple[xr.Dataset, Model] | None,
    seed: int,
) -> xr.Dataset:
    """Return captions (neuroid, draw) with the predictions for them, NaN without a checker."""
    prediction, percentile = np.full(grid.shape, np.nan), np.full(grid.shape, np.nan)
    attrs: dict[str, Any] = {"subject": str(encoder.attrs.get("subject", "")), "seed": seed}
    if checker is not None:
        prediction, percentile = _faithfulness(grid, *checker, seed)
        attrs["checked_with"] = checker[1].name
    ds = xr.Dataset(
        {
            "caption": (("neuroid", "draw"), grid),
            "prediction": (
                ("neuroid", "draw"), prediction.astype(np.float32),
                {"units": str(encoder.attrs.get("units", ""))},
            ),
            "percentile": (("neuroid", "draw"), percentile.astype(np.float32), {"units": ""}),
        },
        coords={k: str(encoder[k].values) for k in ("model", "layer")},
        attrs=attrs,
    )  # fmt: skip
    return validate(ds.merge(neuroid_coords(encoder), combine_attrs="override"), "captions")


def _faithfulness(
    grid: NDArray[np.str_], encoder: xr.Dataset, model: Model, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return predictions for captions (neuroid, draw), and their percentiles among others'."""
    distinct, number = np.unique(grid, return_inverse=True)
    number = number.reshape(grid.shape)
    embedded = _text_embeddings(encoder, distinct.tolist(), model)
    weights = np.asarray(encoder["weights"].values, dtype=np.float64)
    intercept = encoder["intercept"].values
    prediction = np.empty(grid.shape)
    percentile = np.full(grid.shape, np.nan)
    rng = np.random.default_rng(seed)
    flat = number.ravel()
    drawn = rng.choice(len(flat), size=min(_OTHERS, len(flat)), replace=False)
    source = drawn // grid.shape[1]
    for start in range(0, len(grid), _NEUROIDS_AT_ONCE):
        t = slice(start, start + _NEUROIDS_AT_ONCE)
        own = np.einsum("vkf,vf->vk", embedded[number[t]], weights[t])
        prediction[t] = own + intercept[t, None]
        others = weights[t] @ embedded[flat[drawn]].T
        mine = source[None] == np.arange(start, start + len(own))[:, None]
        count = (~mine).sum(axis=1)
        for k in range(grid.shape[1]):
            value = own[:, k : k + 1]
            # The same caption of another voxel is a tie, whatever the order of summation.
            same = (flat[drawn][None] == number[t][:, k : k + 1]) & ~mine
            below = ((others < value) & ~mine & ~same).sum(axis=1) + 0.5 * same.sum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                percentile[t, k] = below / count
    return prediction, percentile


def caption_encoder(
    encoder: xr.Dataset,
    library: Any,
    captioner: Captioner | str | Path,
    *,
    check_with: xr.Dataset | None = None,
    model: Model | str | None = None,
    temperature: float = TEMPERATURE,
    n_draws: int = DRAWS,
    seed: int = 0,
    beams: int = BEAMS,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 32,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Caption every voxel of an encoder: BrainSCUBA from the weights to the words.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema, of the output of a CLIP model; for a vision-language model of states
        of its vision tower.
    library : array-like, Dataset, path, or iterable of these
        See `project`; of a manifest the encoder's layer is read.
    captioner : Captioner, str or path
        Or its name, see `load_captioner`.
    check_with, model, beams, max_tokens, batch_size, progress
        See `caption_voxels`.
    temperature, n_draws, seed, device
        See `project`.

    Returns
    -------
    Dataset
        ``captions`` schema, see `caption_voxels`.

    Raises
    ------
    SchemaError
        If the captioner, or a library that names its model, is of another model than the encoder,
        or the words cannot be checked by what should check them.

    References
    ----------
    Luo et al. (2024), BrainSCUBA: Fine-grained natural language captions of visual cortex
    selectivity, ICLR.
    """
    validate(encoder, "encoder")
    weights = embedding_weights(encoder)
    said_by, captioner = _named(captioner, device)
    library = _opened(library, str(encoder["layer"].values))
    _require_space(captioner, encoder, (("library", ds) for ds in _described(library)))
    checker = _checker(encoder, check_with, model, device)
    embeddings = project(
        weights, library, temperature=temperature, n_draws=n_draws, seed=seed, device=device,
        progress=progress,
    )  # fmt: skip
    grid = _said(encoder, embeddings, captioner, beams, max_tokens, batch_size, progress)
    made = _checked(encoder, grid, checker, seed)
    made = made.assign_coords(captioner=said_by)
    return made.assign_attrs(method="projection", temperature=temperature, beams=beams)


def _named(captioner: Captioner | str | Path, device: str) -> tuple[str, Captioner]:
    if isinstance(captioner, str | Path):
        return str(captioner), load_captioner(captioner, device=device)
    return type(captioner).__name__, captioner


def caption_best_images(
    encoder: xr.Dataset,
    features: xr.Dataset,
    captioner: Captioner | str | Path,
    *,
    responses: xr.DataArray | None = None,
    n_images: int = 1,
    check_with: xr.Dataset | None = None,
    model: Model | str | None = None,
    seed: int = 0,
    beams: int = BEAMS,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 32,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Caption the real images that each voxel responds to most: the baseline of a projection.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema.
    features : Dataset
        ``features`` schema: embeddings, not normalised, of images that took no part in the fit.
    captioner : Captioner, str or path
        See `load_captioner`.
    responses : DataArray (stimulus, neuroid), optional
        With ``stimulus_id``: what is measured for these images. By default what the encoder
        predicts.
    n_images : int
        The best images of each voxel that are captioned, each in place of a draw.
    check_with, model, seed, beams, max_tokens, batch_size, device, progress
        See `caption_encoder`.

    Returns
    -------
    Dataset
        ``captions`` schema, see `caption_voxels`, with ``source_id`` (neuroid, draw), the image.
    """
    said_by, captioner = _named(captioner, device)
    _require_space(captioner, encoder, [("set of images", features)])
    checker = _checker(encoder, check_with, model, device)
    if responses is None:
        responses = predict(encoder, _as_fitted(encoder, features))
    ids = responses["stimulus_id"].values.astype(str)
    values = responses.transpose("stimulus", "neuroid").values
    if values.shape[1] != encoder.sizes["neuroid"]:
        raise SchemaError(
            f"The responses have {values.shape[1]} neuroids and the encoder "
            f"{encoder.sizes['neuroid']}."
        )
    if not 1 <= n_images <= len(ids):
        raise ConfigError(f"n_images is {n_images}; there are {len(ids)} images.")
    if not np.isfinite(values).all():
        raise SchemaError("Some responses are not finite, so that no image is the best.")
    best = np.argsort(-values, axis=0, kind="stable")[:n_images].T
    shown, number = np.unique(best, return_inverse=True)
    x = feature_matrix(features, ids[shown].tolist())
    said = captioner.caption(
        x, beams=beams, max_tokens=max_tokens, batch_size=batch_size, progress=progress
    )
    grid = np.array(said, dtype=str)[number.reshape(best.shape)]
    made = _checked(encoder, grid, checker, seed)
    made = made.assign(source_id=(("neuroid", "draw"), ids[best]))
    return made.assign_coords(captioner=said_by).assign_attrs(method="best images", beams=beams)


def _as_fitted(encoder: xr.Dataset, features: xr.Dataset) -> xr.Dataset:
    """Return embeddings as the encoder was fitted to them: of unit norm, or as they are."""
    if sources_of(encoder)[0].get("pooling") != "unit":
        return features
    x = features["features"]
    unit = features.assign(features=x / np.sqrt((x**2).sum("feature")))
    return unit.assign_attrs(pooling="unit")


def caption_result(
    encoded: str | Path,
    library: Any,
    out: str | Path,
    *,
    captioner: str = SMALL_CAPTIONER,
    tokenizer: str = "gpt2",
    clip: str | None = None,
    prompt: str | None = None,
    layer: str = OUTPUT,
    check_with: str | Path | None = None,
    q: float | None = 0.05,
    rois: Sequence[str] | None = None,
    held_out: str | Path | None = None,
    held_out_ids: Sequence[str] | None = None,
    model: str | None = None,
    temperature: float = TEMPERATURE,
    n_draws: int = DRAWS,
    seed: int = 0,
    beams: int = BEAMS,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 32,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Caption the voxels of an encoding result on disk, and write the captions.

    Parameters
    ----------
    encoded : path
        Folder of `brainalign.encoding.write_result`, of a CLIP model or a vision tower.
    library : path, or several
        See `project`: a feature manifest, a store or a ``.npy`` file.
    out : path
        A ``.zarr`` store that gets the captions; with `held_out` the baseline beside it, under
        ``NAME-best-images.zarr``.
    captioner, tokenizer, clip, prompt : str
        See `load_captioner`.
    layer : str
        The encoder's layer: the model's output; for a vision-language model, of its vision tower.
    check_with : path, optional
        An encoding result of the same neuroids and of a CLIP model, whose encoder of the output
        checks the words, see `caption_voxels`.
    q : float, optional
        Only voxels that are predicted with a q-value (false-discovery rate) below this; None for
        all. What an encoder does not predict has no caption that means anything.
    rois : sequence of str, optional
        Only the voxels of these regions.
    held_out : path, optional
        Store or manifest of embeddings of images that took no part in the fit, not normalised,
        for the baseline.
    held_out_ids : sequence of str, optional
        Only these of them.
    model, temperature, n_draws, seed, beams, max_tokens, batch_size, device
        See `caption_encoder`.
    overwrite : bool
        Whether to replace what stands at `out`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    UnknownNameError
        If the result has no encoder of this layer.
    ConfigError
        If no voxel is left.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Pass overwrite=True to replace it.")
    result = read_result(encoded)
    encoder = _encoder_of(result, encoded, layer)
    ids = encoder["neuroid_id"].values.astype(str)
    keep = np.ones(len(ids), dtype=bool)
    least = ""
    if q is not None:
        if "q" not in result.best:
            raise ConfigError(
                f"{encoded} has no q-values.", "Encode with permutations, or pass q=None."
            )
        known = dict(
            zip(result.best["neuroid_id"].values.astype(str), result.best["q"].values, strict=True)
        )
        of_each = np.array([known.get(i, np.nan) for i in ids.tolist()])
        keep &= of_each < q
        if np.isfinite(of_each).any():
            least = f" The smallest q of all is {np.nanmin(of_each):.3g}."
    if rois is not None:
        inside = np.unique(np.concatenate([*roi_members(encoder, rois).values()]))
        keep &= np.isin(np.arange(len(ids)), inside)
    if not keep.any():
        raise ConfigError(
            f"None of {len(ids)} neuroids of {encoded} has q < {q} in the regions asked for."
            + least,
            "Pass q=None, or other regions; n permutations give no p below 1 / (n + 1), so with "
            "few of them and many neuroids no q is small.",
        )
    encoder = encoder.isel(neuroid=np.flatnonzero(keep)).load()
    checks = None
    if check_with is not None:
        checks = _encoder_of(read_result(check_with), check_with, OUTPUT).load()
    texts = _text_model(encoder if checks is None else checks, model, device)
    decoder = load_captioner(
        captioner, tokenizer=tokenizer, clip=clip, prompt=prompt, device=device
    )
    config = {
        "captioner": captioner, "clip": decoder.clip, "prompt": prompt, "layer": layer, "q": q,
        "rois": [*rois] if rois else None, "temperature": temperature, "n_draws": n_draws,
        "beams": beams, "max_tokens": max_tokens,
    }  # fmt: skip
    about = provenance(config=config, seed=seed)
    made = caption_encoder(
        encoder, library, decoder, check_with=checks, model=texts, temperature=temperature,
        n_draws=n_draws, seed=seed, beams=beams, max_tokens=max_tokens, batch_size=batch_size,
        device=device,
    ).assign_coords(captioner=captioner)  # fmt: skip
    write(made, out, "captions", provenance=about, overwrite=overwrite)
    if held_out is not None:
        baseline = caption_best_images(
            encoder, _held_out(held_out, layer, held_out_ids), decoder, check_with=checks,
            model=texts, n_images=n_draws, seed=seed, beams=beams, max_tokens=max_tokens,
            batch_size=batch_size, device=device,
        ).assign_coords(captioner=captioner)  # fmt: skip
        beside = out.with_name(f"{out.stem}-best-images{out.suffix}")
        write(baseline, beside, "captions", provenance=about, overwrite=overwrite)
    return out


def _encoder_of(result: EncodingResult, path: str | Path, layer: str) -> xr.Dataset:
    if layer not in result.encoders:
        raise UnknownNameError(
            f"{path} has no encoder of layer {layer!r}.{near(layer, result.encoders)}",
            f"It has {', '.join(result.encoders)}. Encode with this layer alone.",
        )
    return result.encoders[layer]


def _held_out(path: str | Path, layer: str, ids: Sequence[str] | None) -> xr.Dataset:
    """Open embeddings, of a manifest those of `layer`, and keep those of some images."""
    features = _features(path, layer)
    if ids is None:
        return features
    keep = np.flatnonzero(np.isin(features["stimulus_id"].values.astype(str), list(ids)))
    if len(keep) != len(set(ids)):
        raise SchemaError(f"{path} has {len(keep)} of the {len(set(ids))} images asked for.")
    return features.isel(stimulus=keep)


def region_nouns(
    captions: str | Path,
    region: str | Sequence[str],
    *,
    top: int = 5,
    tagger: Tagger | None = None,
) -> dict[str, float]:
    """Return the nouns that captions on disk name most in one region, with their shares.

    Parameters
    ----------
    captions : path
        Of `caption_result`.
    region : str or sequence of str
        A ROI of `brainalign.encoding.roi_members`, or the ids of neuroids, such as those of a
        cluster; a region without a captioned voxel has no nouns.
    top : int
        How many.
    tagger : callable, optional
        See `nouns`.
    """
    found = _region_table(captions, region, top, tagger).sel(roi="region")
    order = np.argsort(found["rank"].values, kind="stable")[:top]
    return {str(found["noun"].values[i]): float(found["share"].values[i]) for i in order}


def region_prompts(
    captions: str | Path,
    region: str | Sequence[str],
    *,
    top: int = 5,
    tagger: Tagger | None = None,
) -> list[str]:
    """Return prompts of what captions on disk name most in one region: "A photo of a NOUN".

    Parameters
    ----------
    captions, region, top, tagger
        See `region_nouns`; a region without nouns has no prompts.
    """
    table = _region_table(captions, region, top, tagger)
    return [prompt for prompt, _ in noun_prompts(table, top=top)["region"]]


def _region_table(
    captions: str | Path, region: str | Sequence[str], top: int, tagger: Tagger | None
) -> xr.Dataset:
    ds = read(captions, "captions")
    if isinstance(region, str):
        rows = roi_members(ds).get(region, np.array([], dtype=int))
    else:
        rows = np.flatnonzero(np.isin(ds["neuroid_id"].values.astype(str), list(region)))
    return top_nouns(ds, {"region": rows}, top=top, tagger=tagger)


def voxel_table(
    captions: xr.Dataset, scores: xr.Dataset | None = None, tagger: Tagger | None = None
) -> pd.DataFrame:
    """Return one row a voxel, for a table that is searched.

    Parameters
    ----------
    captions : Dataset
        ``captions`` schema (neuroid, draw).
    scores : Dataset, optional
        ``scores`` schema (neuroid), for the encoder's accuracy.
    tagger : callable, optional
        See `nouns`.

    Returns
    -------
    DataFrame
        ``neuroid``, ``ROI``, ``hemisphere``, ``caption`` (the draw of the highest percentile, then
        of the highest prediction), ``nouns`` (of all draws, most frequent first), ``predicted``,
        ``percentile`` of that caption and, with scores, ``r``. Of captions that were not checked it
        is the first draw, without ``predicted`` and ``percentile``. Text that repeats is
        categorical, numbers are float32: 200,000 voxels need some tens of MiB.
    """
    grid = captions["caption"].values.astype(str)
    p, y = captions["percentile"].values, captions["prediction"].values
    checked = bool(np.isfinite(y).any())
    best = np.zeros(len(grid), dtype=np.intp)
    if checked:
        best = np.lexsort((y, np.nan_to_num(p, nan=-1.0)), axis=1)[:, -1]
    rows = np.arange(len(grid))
    found = nouns(grid.ravel().tolist(), tagger)
    k = grid.shape[1]
    words = [
        _frequent([n for one in found[i : i + k] for n in one]) for i in range(0, len(found), k)
    ]
    data: dict[str, Any] = {
        "neuroid": captions["neuroid_id"].values.astype(str),
        "ROI": pd.Categorical(captions["roi"].values.astype(str)),
        "hemisphere": pd.Categorical(captions["hemisphere"].values.astype(str)),
        "caption": pd.Categorical(grid[rows, best]),
        "nouns": pd.Categorical(words),
    }
    if checked:
        data["predicted"] = y[rows, best].astype(np.float32)
        data["percentile"] = p[rows, best].astype(np.float32)
    if scores is not None:
        known = dict(zip(scores["neuroid_id"].values.astype(str), scores["r"].values, strict=True))
        data["r"] = np.array([known.get(n, np.nan) for n in data["neuroid"]], dtype=np.float32)
    return pd.DataFrame(data)


def _frequent(found: list[str]) -> str:
    counts = {n: found.count(n) for n in dict.fromkeys(found)}
    return ", ".join(sorted(counts, key=lambda n: -counts[n]))
