"""Two small JSON files between steps: the manifest of extracted layers, and the card of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainalign.data.store import atomic_file, read
from brainalign.errors import SchemaError, UnavailableError

if TYPE_CHECKING:
    import xarray as xr

    from brainalign.features.models import Model

__all__ = ["model_card", "read_manifest", "write_manifest"]


def write_manifest(layers: Mapping[str, xr.Dataset], path: str | Path) -> Path:
    """Write which store holds which layer.

    Parameters
    ----------
    layers : mapping of str to xarray.Dataset
        As `brainalign.features.extract` returns them from a store.
    path : path
        A JSON file; the stores are named relative to its folder.

    Raises
    ------
    SchemaError
        If a layer was extracted without a store.
    """
    path = Path(path)
    stores: dict[str, str] = {}
    for name, ds in layers.items():
        source = ds.encoding.get("source")
        if not source:
            raise SchemaError(f"Layer {name!r} lies in no store; extract it with store=FOLDER.")
        stores[name] = os.path.relpath(source, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as made:
        made.write_text(json.dumps({"layers": stores}, indent=1), encoding="utf-8")
    return path


def read_manifest(path: str | Path) -> dict[str, xr.Dataset]:
    """Open the layers of a manifest lazily, in the model's order.

    Raises
    ------
    UnavailableError
        If the manifest or a store it names is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UnavailableError(
            f"There is no feature manifest {path}.", "Run `brainalign features`."
        )
    stores = json.loads(path.read_text(encoding="utf-8"))["layers"]
    return {name: read(path.parent / store) for name, store in stores.items()}


def model_card(model: Model, select: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what a model is: name, hash of the weights, preprocessing, layers with their shapes.

    Parameters
    ----------
    model : Model
        As `brainalign.features.load_model` returns it.
    select : sequence of str, optional
        Names or patterns of the layers to list; default all.

    Raises
    ------
    UnknownNameError
        If a pattern matches no layer; with near matches.
    """
    names = list(model.traced) if select is None else model.select(list(select))
    return {
        "model": model.name,
        "available": True,
        "reason": "",
        "weights_sha256": model.weights_sha256,
        "trained_attention": model.attention,
        "preprocessing": model.preprocessing,
        "layers": {name: list(model.traced[name].shape) for name in names},
    }
