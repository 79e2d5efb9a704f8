"""Voxel weights projected onto the embeddings of natural images, streamed over a library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from brainalign.data.schema import validate
from brainalign.data.store import read
from brainalign.device import resolve_device
from brainalign.encoding.model import feature_weights
from brainalign.errors import ConfigError, SchemaError, UnavailableError
from brainalign.features import extract, load_model, read_manifest
from brainalign.features.layers import OUTPUT

if TYPE_CHECKING:
    from brainalign.features.extraction import Stimuli
    from brainalign.features.models import Model

__all__ = ["DRAWS", "TEMPERATURE", "build_library", "draw_of", "embedding_weights", "project"]

#: Of the softmax over the library.
TEMPERATURE = 1 / 150
#: Disjoint parts of the library, each of which gives every voxel a projection.
DRAWS = 5
#: Embeddings that are read and normalised at a time.
_CHUNK = 16_384
#: Embeddings and voxels of one product: the tile of the softmax stays in a core's cache.
_ROWS, _VOXELS = 1024, 512
_ON_A_GPU = 8192, 8192
#: Rows whose draws come from one random stream.
_STREAM = 65_536
#: Above this sum of a block, relative to what came before, the running reference moves.
_MOST = 2.0**40
#: Logits (base 2) below the reference by more are raised to this: smaller terms would be subnormal,
#: with which processors compute many times slower.
_LEAST = -64.0


def project(
    weights: ArrayLike,
    library: Any,
    *,
    temperature: float = TEMPERATURE,
    n_draws: int = DRAWS,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> NDArray[np.float32]:
    r"""Project weights onto a library of embeddings, in one pass over it.

    .. math:: s_i = \mathrm{softmax}_i \, \hat w^\top d_i / \tau, \qquad
              n^* = \sum_i s_i n_i, \qquad
              w_\mathrm{proj} = n^* \frac{\sum_i s_i d_i}{\lVert \sum_i s_i d_i \rVert}

    for weights of unit norm :math:`\hat w` and embeddings :math:`e_i = n_i d_i` of norm
    :math:`n_i`. The library is read once, whatever its size. The sums of every draw and voxel run
    relative to a reference, one of the voxel's terms, so that they are at least 1; terms below
    :math:`2^{-64}` are raised to it, which changes a sum over n embeddings by a share of less than
    :math:`2^{-64} n`.

    Parameters
    ----------
    weights : array-like, shape (n_voxels, n_features)
        In the space of the embeddings; see `embedding_weights`. Their norms do not matter.
    library : array-like, Dataset, path, or iterable of these
        Embeddings as the model gives them, not normalised, shape (n_embeddings, n_features): an
        array that is sliced by rows (ndarray, memmap, zarr array), a Dataset of the ``features``
        schema, a path to one, to a ``.npy`` file or to a feature manifest (its layer ``output``);
        or several, which are joined. Float16 is stored, float32 computed.
    temperature : float
        The softmax's :math:`\tau`, 1/150 in the paper. Errors of float32 grow with its inverse.
    n_draws : int
        Disjoint parts into which the embeddings fall at random; each gives a projection.
    seed : int
        Draws the parts; see `draw_of`.
    device : str or torch.device
        See `brainalign.device.resolve_device`.
    progress : bool, optional
        Whether to draw a progress bar; by default in a terminal.

    Returns
    -------
    ndarray, shape (n_draws, n_voxels, n_features)
        :math:`w_\mathrm{proj}`, with the norm of a natural embedding.

    Raises
    ------
    SchemaError
        If weights or embeddings are not finite, have another number of features, or no direction.
    ConfigError
        If a draw has no embedding, or an option makes no sense.

    References
    ----------
    Luo et al. (2024), BrainSCUBA: Fine-grained natural language captions of visual cortex
    selectivity, ICLR, equations 3 to 5.
    """
    unit = _unit_weights(weights)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; expected a number above 0.")
    if n_draws < 1:
        raise ConfigError(f"n_draws is {n_draws}; expected at least 1.")
    where = resolve_device(device)
    sums = _Sums(unit / temperature, n_draws, where)
    n = 0
    with tqdm(
        total=_length(library),
        desc="project",
        unit="embedding",
        disable=None if progress is None else not progress,
    ) as bar:
        for chunk in _chunks(library):
            embeddings = _checked(chunk, unit.shape[1], n).to(where)
            draw = torch.as_tensor(draw_of(n, len(embeddings), n_draws, seed), device=where)
            norms = torch.linalg.vector_norm(embeddings, dim=1)
            _require_norms(norms, n)
            directions = embeddings / norms[:, None]
            for k in range(n_draws):
                rows = torch.nonzero(draw == k)[:, 0]
                if len(rows):
                    sums.add(k, directions[rows], norms[rows])
            n += len(embeddings)
            bar.update(len(embeddings))
    empty = sums.empty()
    if empty:
        raise ConfigError(
            f"{len(empty)} of {n_draws} draws got none of the library's {n} embeddings.",
            "Use a larger library or fewer draws.",
        )
    return sums.projections().cpu().numpy()


class _Sums:
    """Running sums of s d, s n and s, for every draw and voxel.

    Logits are in base 2. ``reference`` is subtracted in the product itself, as one more feature.
    """

    def __init__(self, scaled: NDArray[np.float64], n_draws: int, device: torch.device) -> None:
        n, d = scaled.shape
        logits = torch.as_tensor(scaled / math.log(2), dtype=torch.float32)
        self.weights = torch.cat([logits, torch.zeros(n, 1)], dim=1).to(device)
        self.reference = torch.full((n_draws, n), -math.inf, device=device)
        self.sums = torch.zeros(n_draws, n, d + 2, device=device)
        self.rows, self.voxels = (_ROWS, _VOXELS) if device.type == "cpu" else _ON_A_GPU
        if device.type == "cpu":
            self.voxels *= torch.get_num_threads()
        # Kept: memory that is asked for anew costs as much as the softmax.
        self.tile = torch.empty(self.rows * min(n, self.voxels), device=device)
        self.block = torch.empty(min(n, self.voxels), d + 2, device=device)

    def add(self, draw: int, directions: Tensor, norms: Tensor) -> None:
        n_blocks = -(-len(directions) // self.rows)
        ones = torch.ones_like(norms)
        summed = torch.cat([directions, norms[:, None], ones[:, None]], dim=1)
        seen = torch.cat([directions, ones[:, None]], dim=1)
        for values, keys in zip(
            summed.tensor_split(n_blocks), seen.tensor_split(n_blocks), strict=True
        ):
            for start in range(0, len(self.weights), self.voxels):
                self._add(draw, slice(start, start + self.voxels), values, keys)

    def _add(self, draw: int, t: slice, values: Tensor, keys: Tensor) -> None:
        if not bool(torch.isfinite(self.reference[draw, t.start])):
            these = torch.arange(len(self.weights), device=self.weights.device)[t]
            self.sums[draw, t] += self._raised(draw, these, values, keys)
            return
        weights = self.weights[t]
        weights[:, -1] = -self.reference[draw, t]
        tile = self.tile[: len(weights) * len(keys)].view(len(weights), len(keys))
        terms = torch.mm(weights, keys.T, out=tile).clamp_(min=_LEAST).exp2_()
        block = torch.mm(terms, values, out=self.block[: len(terms)])
        high = torch.nonzero(~(block[:, -1] < _MOST))[:, 0]
        if len(high):
            block[high] = self._raised(draw, t.start + high, values, keys)
        self.sums[draw, t] += block

    def _raised(self, draw: int, these: Tensor, values: Tensor, keys: Tensor) -> Tensor:
        """Move the reference of some voxels up to their largest logit, and return their sums."""
        weights = self.weights[these]
        weights[:, -1] = 0
        logits = weights @ keys.T
        before = self.reference[draw, these]
        largest = torch.maximum(before, logits.amax(dim=1))
        self.sums[draw, these] *= torch.exp2(before - largest)[:, None]
        self.reference[draw, these] = largest
        return logits.sub_(largest[:, None]).clamp_(min=_LEAST).exp2_() @ values

    def empty(self) -> list[int]:
        return torch.nonzero(self.sums[:, 0, -1] == 0)[:, 0].tolist()

    def projections(self) -> Tensor:
        direction, norm, total = self.sums[..., :-2], self.sums[..., -2], self.sums[..., -1]
        length = torch.linalg.vector_norm(direction, dim=-1)
        return direction * (norm / total / length)[..., None]


def draw_of(start: int, n: int, n_draws: int, seed: int) -> NDArray[np.int64]:
    """Return the draw of embeddings `start` to ``start + n - 1`` of a library.

    It follows from the seed and the embedding's number alone, however the library is cut.

    Parameters
    ----------
    start, n : int
        The first embedding and how many.
    n_draws, seed : int
        As in `project`.

    Returns
    -------
    ndarray of int, shape (n,)
        In 0 to ``n_draws - 1``.
    """
    if n == 0:
        return np.empty(0, dtype=np.int64)
    first, last = start // _STREAM, (start + n - 1) // _STREAM
    drawn = [
        np.random.default_rng([seed, stream]).integers(0, n_draws, _STREAM)
        for stream in range(first, last + 1)
    ]
    at = start - first * _STREAM
    return np.concatenate(drawn)[at : at + n]


def embedding_weights(encoder: xr.Dataset) -> NDArray[np.float64]:
    r"""Return an encoder's weights in the space of the embeddings it was fitted to.

    .. math:: \hat y = W \frac{x - \mu}{\sigma} + b = (W / \sigma) \, x + \mathrm{const}

    An encoder is stored with weights for standardised features. What ranks embeddings x, and what
    `project` takes, is :math:`W / \sigma`; the constant cancels in the softmax.

    Parameters
    ----------
    encoder : Dataset
        ``encoder`` schema, of one layer and without delays: the output of a CLIP model, as it
        is or of unit norm.

    Returns
    -------
    ndarray, shape (n_neuroids, n_features)

    Raises
    ------
    SchemaError
        If it has delays or joins several layers.
    """
    validate(encoder, "encoder")
    if "delay" in encoder.dims or "sources" in encoder.attrs:
        raise SchemaError(
            "Weights that are projected act on the embedding of one model; this encoder "
            + ("has delays." if "delay" in encoder.dims else "joins several layers."),
            "Fit an encoder to the model's output alone.",
        )
    return feature_weights(encoder)


def build_library(
    model: Model | str,
    stimuli: Stimuli,
    store: str | Path,
    *,
    batch_size: int = 32,
    device: str = "auto",
    autocast: str | None = None,
    workers: int = 2,
) -> xr.Dataset:
    """Embed natural images into a store that `project` reads.

    Parameters
    ----------
    model : Model or str
        The CLIP model whose embeddings the encoder was fitted to.
    stimuli : StimulusSet
        The images; none that the encoder is tested on.
    store : path
        Folder of the feature store; a run that was cut off goes on.
    batch_size, device, autocast, workers
        As in `brainalign.features.extract`.

    Returns
    -------
    Dataset
        ``features`` schema, not normalised, opened lazily.
    """
    if isinstance(model, str):
        model = load_model(model, device=device)
    layers = extract(
        model, stimuli, [OUTPUT], store=store, batch_size=batch_size, device=device,
        autocast=autocast, workers=workers,
    )  # fmt: skip
    return layers[OUTPUT]


def _unit_weights(weights: ArrayLike) -> NDArray[np.float64]:
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or 0 in w.shape:
        raise SchemaError(f"Weights are (voxel, feature), some of each; they have shape {w.shape}.")
    bad = np.flatnonzero(~np.isfinite(w).all(axis=1))
    if len(bad):
        raise SchemaError(
            f"{len(bad)} of {len(w)} voxels have weights that are not finite, the first is "
            f"{int(bad[0])}.",
            "Leave them out.",
        )
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    none = np.flatnonzero(norm == 0)
    if len(none):
        raise SchemaError(
            f"{len(none)} of {len(w)} voxels have no weight, the first is {int(none[0])}: they "
            "have no direction.",
            "Leave them out.",
        )
    return w / norm


def _checked(chunk: Any, n_features: int, start: int) -> Tensor:
    values = np.asarray(chunk)
    if values.ndim != 2 or values.shape[1] != n_features:
        raise SchemaError(
            f"The weights have {n_features} features; the library's embeddings from number "
            f"{start} on have shape {values.shape}.",
            "Embed the library with the model that the encoder was fitted to.",
        )
    if values.dtype.kind != "f":
        raise SchemaError(f"Embeddings are floating-point numbers; the library has {values.dtype}.")
    return torch.as_tensor(np.require(values, dtype=np.float32, requirements=["W", "C"]))


def _require_norms(norms: Tensor, start: int) -> None:
    good = torch.isfinite(norms) & (norms > 0)
    if bool(good.all()):
        return
    first = int(torch.nonzero(~good)[0])
    what = "is zero" if float(norms[first]) == 0 else "is not finite"
    raise SchemaError(
        f"Embedding {start + first} of the library {what} ({int((~good).sum())} such nearby).",
        "Leave out images that the model could not embed.",
    )


def _opened(library: Any) -> Any:
    """Return what is read by rows, or an iterable of such."""
    if isinstance(library, str | Path):
        path = Path(library)
        if path.suffix == ".npy":
            if not path.is_file():
                raise UnavailableError(f"There is no library {path}.")
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".json":
            layers = read_manifest(path)
            if OUTPUT not in layers:
                raise SchemaError(
                    f"The manifest {path} has no layer {OUTPUT!r}; it has {', '.join(layers)}.",
                    f"Extract the model's layer {OUTPUT!r}.",
                )
            library = layers[OUTPUT]
        else:
            library = read(path, "features")
    if isinstance(library, xr.Dataset):
        return validate(library, "features")["features"]
    return library


def _by_rows(opened: Any) -> bool:
    return hasattr(opened, "shape") and not isinstance(opened, list | tuple)


def _length(library: Any) -> int | None:
    """Return how many embeddings there are, where that is known before reading."""
    if isinstance(library, list | tuple):
        known = [_length(part) for part in library]
        return None if None in known else sum(n for n in known if n is not None)
    opened = _opened(library)
    return int(opened.shape[0]) if _by_rows(opened) and len(opened.shape) else None


def _chunks(library: Any) -> Iterator[Any]:
    """Yield the embeddings some thousand at a time; small pieces are joined."""
    waiting: list[Any] = []
    n = 0
    for piece in _pieces(library):
        waiting.append(piece)
        n += len(piece)
        if n >= _CHUNK:
            yield _joined(waiting)
            waiting, n = [], 0
    if n:
        yield _joined(waiting)


def _joined(pieces: list[Any]) -> Any:
    if len({p.shape[1:] for p in pieces}) > 1:
        shapes = ", ".join(str(p.shape) for p in pieces[:4])
        raise SchemaError(f"The library's pieces differ in their features: {shapes}.")
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _pieces(library: Any) -> Iterator[Any]:
    opened = _opened(library)
    if _by_rows(opened):
        if len(opened.shape) != 2:
            raise SchemaError(
                f"Embeddings are (embedding, feature); the library has shape {tuple(opened.shape)}."
            )
        for start in range(0, opened.shape[0], _CHUNK):
            yield np.asarray(opened[start : start + _CHUNK])
    elif isinstance(opened, Iterable):
        for part in opened:
            yield from _pieces(part)
    else:
        raise SchemaError(
            f"A library is an array, a Dataset, a path or several of these; got "
            f"{type(library).__name__}."
        )
