"""What an encoding analysis gives, in memory and as a folder of artefacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.store import atomic_dir, read, write
from brainalign.errors import UnavailableError

__all__ = ["EncodingResult", "deviations", "read_result", "write_result"]


@dataclass
class EncodingResult:
    """Scores, encoders and bootstrap sums of one subject and one model, or of a part of it.

    Parameters
    ----------
    scores : Dataset
        ``scores`` schema (layer, neuroid): r, r2, normalised, p, q, alpha, and validation_r2 by
        which alpha and layer were chosen on all data; ceiling (neuroid).
    best : Dataset
        ``scores`` schema (neuroid): the same for the layer chosen in the training folds, with
        ``best_layer`` (chosen on all data, as the encoders), ``layer_agreement`` (share of folds
        that chose it) and, where it was computed, ``p_max`` (family-wise).
    encoders : dict of layer to Dataset
        ``encoder`` schema: each neuroid on the layer chosen for it.
    bootstrap : Dataset
        Sums of `brainalign.encoding.rois.RoiSums`, with the tested rows: stimulus_id and fold
        (presentation).
    null : Dataset
        What joins the p-values of parts: ``r`` (layer, draw) of the pooled null, or ``maximum``
        (permutation) over the neuroids.
    predictions : Dataset or None
        ``measured``, ``predicted`` (presentation, neuroid) by the layer chosen in the training
        folds, and ``training_mean`` (fold_number, neuroid); coordinates stimulus_id and fold.
    excluded : dict of str to int
        Neuroids left out, by reason.
    notes : list of str
        What else was left out or should be known.
    """

    scores: xr.Dataset
    best: xr.Dataset
    encoders: dict[str, xr.Dataset]
    bootstrap: xr.Dataset
    null: xr.Dataset
    predictions: xr.Dataset | None = None
    excluded: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The name of the model."""
        return str(self.scores["model"].values)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return [str(n) for n in self.scores["layer"].values]

    @property
    def exclusions(self) -> list[str]:
        """What was left out, with counts."""
        out = [f"{count} neuroids: {reason}" for reason, count in self.excluded.items()]
        n = self.best.sizes["neuroid"]
        ceiling = self.best["ceiling"].values
        threshold = float(self.best.attrs["ceiling_threshold"])
        low = int((~((ceiling >= threshold) & (ceiling > 0))).sum())
        if low and np.isfinite(ceiling).any():
            out.append(
                f"{low} of {n} neuroids have a noise ceiling below {threshold:g} or none: no "
                "normalised score"
            )
        undefined = int(np.isnan(self.best["r"].values).sum())
        if undefined:
            out.append(f"{undefined} of {n} neuroids have no score (constant in the test rows)")
        return out + self.notes


def deviations(predictions: xr.Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measured and predicted responses as deviations from the training mean of their fold.

    Parameters
    ----------
    predictions : Dataset
        Of an `EncodingResult`.

    Returns
    -------
    measured, predicted : ndarray, shape (n_tested, n_neuroids)
    """
    mean = predictions["training_mean"].values[predictions["fold"].values]
    measured, predicted = predictions["measured"].values, predictions["predicted"].values
    return (measured - mean).astype(np.float64), (predicted - mean).astype(np.float64)


def write_result(
    result: EncodingResult,
    folder: str | Path,
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result as a folder of artefacts, atomically.

    The folder holds ``scores.zarr``, ``best.zarr``, ``encoders/NN.zarr`` (one per chosen layer),
    ``bootstrap.nc``, ``null.nc``, ``result.json`` and, where they were kept, ``predictions.zarr``.
    """
    with atomic_dir(folder, overwrite=overwrite) as made:
        write(result.scores, made / "scores.zarr", "scores", provenance=provenance)
        write(result.best, made / "best.zarr", "scores", provenance=provenance)
        write(result.bootstrap, made / "bootstrap.nc", None, provenance=provenance)
        write(result.null, made / "null.nc", None, provenance=provenance)
        if result.predictions is not None:
            write(result.predictions, made / "predictions.zarr", None, provenance=provenance)
        (made / "encoders").mkdir()
        for i, ds in enumerate(result.encoders.values()):
            write(ds, made / "encoders" / f"{i:02d}.zarr", "encoder", provenance=provenance)
        record = {
            "layers": list(result.encoders),
            "excluded": result.excluded,
            "notes": result.notes,
        }
        (made / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Path(folder)


def read_result(folder: str | Path) -> EncodingResult:
    """Read what `write_result` wrote; large arrays are read when they are used.

    Raises
    ------
    UnavailableError
        If the folder holds no result.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise UnavailableError(f"{folder} holds no encoding result (result.json).")
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = (folder / "predictions.zarr").is_dir()
    return EncodingResult(
        scores=read(folder / "scores.zarr", "scores"),
        best=read(folder / "best.zarr", "scores"),
        encoders={
            name: read(folder / "encoders" / f"{i:02d}.zarr", "encoder")
            for i, name in enumerate(record["layers"])
        },
        bootstrap=read(folder / "bootstrap.nc"),
        null=read(folder / "null.nc"),
        predictions=read(folder / "predictions.zarr") if kept else None,
        excluded=record["excluded"],
        notes=record["notes"],
    )
