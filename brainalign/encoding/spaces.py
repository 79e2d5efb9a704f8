"""Feature spaces put together from layers of several models, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import xarray as xr

from brainalign.errors import ConfigError, UnknownNameError, near

__all__ = ["joint_features"]


def joint_features(
    models: Mapping[str, Mapping[str, xr.Dataset]],
    spaces: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, xr.Dataset], dict[str, list[str]]]:
    """Name the layers of several models, and those of each feature space.

    Parameters
    ----------
    models : mapping of model to mapping of layer to Dataset
        Features.
    spaces : mapping of str to sequence of str, optional
        ``"model"`` for all its layers, or ``"model/layer"`` with a name or pattern. By default
        every model is a space.

    Returns
    -------
    features : dict of str to Dataset
        By ``model/layer``: those that some space holds.
    spaces : dict of str to list of str
        The names of each space's layers.

    Raises
    ------
    UnknownNameError
        For a model that is not given, or a pattern that matches no layer.
    ConfigError
        If a layer is named twice.
    """
    wanted = {name: [name] for name in models} if spaces is None else spaces
    features: dict[str, xr.Dataset] = {}
    found: dict[str, list[str]] = {}
    for space, entries in wanted.items():
        found[space] = []
        for entry in entries:
            model, _, pattern = entry.partition("/")
            if model not in models:
                raise UnknownNameError(f"There is no model {model!r}.{near(model, models)}")
            layers = [x for x in models[model] if fnmatchcase(x, pattern or "*")]
            if not layers:
                raise UnknownNameError(
                    f"No layer of {model!r} matches {pattern!r}.{near(pattern, models[model])}"
                )
            found[space] += [f"{model}/{x}" for x in layers]
            features |= {f"{model}/{x}": models[model][x] for x in layers}
    every = [x for layers in found.values() for x in layers]
    twice = sorted({x for x in every if every.count(x) > 1})
    if twice:
        raise ConfigError(f"Layer {twice[0]!r} stands in the feature spaces more than once.")
    return features, found
