"""Neuroids chosen from data carry the stimuli they were chosen on, so that scoring can refuse them.

Choosing voxels by their scores on some stimuli and then reporting their scores on the same stimuli
inflates the result (double dipping). `select` writes the stimuli into the responses; `encode`
raises if one of them is in a test set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from brainalign.errors import ConfigError, LeakError, SchemaError

__all__ = ["check_double_dipping", "select", "selections"]

_KEY = "selections"


def select(
    responses: xr.Dataset,
    mask: ArrayLike | xr.DataArray,
    *,
    chosen_on: Sequence[str] | xr.Dataset,
    name: str = "selection",
) -> xr.Dataset:
    """Keep some neuroids, and remember on which stimuli they were chosen.

    Parameters
    ----------
    responses : Dataset
        ``responses`` schema.
    mask : array-like of bool, shape (n_neuroids,)
        Which to keep. A DataArray with coordinate neuroid_id is matched by id (others: not kept).
    chosen_on : sequence of str, or Dataset
        The stimuli whose responses took part in the choice: their ids; or a scores Dataset of
        `encode`, or any Dataset with stimulus_id, that the mask was computed from. Pass an empty
        list for a choice that saw none of these stimuli (anatomy, a separate localiser).
    name : str
        What the choice is called in messages.

    Returns
    -------
    Dataset
        The responses with fewer neuroids and the attribute ``selections``.

    Raises
    ------
    SchemaError
        If the mask does not fit or keeps nothing.
    """
    if isinstance(mask, xr.DataArray) and "neuroid_id" in mask.coords:
        kept = set(mask["neuroid_id"].values.astype(str)[mask.values.astype(bool)].tolist())
        keep = np.array([n in kept for n in responses["neuroid_id"].values.astype(str).tolist()])
    else:
        keep = np.asarray(mask)
    if keep.dtype != bool or keep.shape != (responses.sizes["neuroid"],):
        raise SchemaError(
            f"The mask is {keep.dtype} of shape {keep.shape}; expected bool of shape "
            f"({responses.sizes['neuroid']},)."
        )
    if not keep.any():
        raise SchemaError(f"{name!r} keeps none of {len(keep)} neuroids.")
    if isinstance(chosen_on, str):
        raise ConfigError("chosen_on must be a list of stimulus ids, not one string.")
    if isinstance(chosen_on, xr.Dataset):
        ids = _stimuli_behind(chosen_on)
        earlier = selections(chosen_on)
    else:
        ids, earlier = sorted({str(s) for s in chosen_on}), []
    record = {"name": name, "stimuli": ids, "kept": int(keep.sum()), "of": len(keep)}
    known = selections(responses)
    everything = [*known, *(e for e in earlier if e not in known), record]
    out = responses.isel(neuroid=keep)
    out.attrs = {**responses.attrs, _KEY: json.dumps(everything)}
    return out


def selections(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return the choices that a Dataset's neuroids have been through."""
    records: list[dict[str, Any]] = json.loads(ds.attrs.get(_KEY, "[]"))
    return records


def check_double_dipping(responses: xr.Dataset, test_stimuli: Sequence[str]) -> None:
    """Refuse to score neuroids on stimuli that they were chosen on.

    Raises
    ------
    LeakError
        Naming the choice and some of the stimuli.
    """
    tested = set(map(str, test_stimuli))
    for record in selections(responses):
        shared = sorted(tested & set(record["stimuli"]))
        if shared:
            raise LeakError(
                f"Double dipping: {record['kept']} of {record['of']} neuroids were chosen by "
                f"{record['name']!r} on {len(record['stimuli'])} stimuli, and {len(shared)} of "
                f"these are tested ({', '.join(map(repr, shared[:3]))}).",
                "Choose neuroids on other stimuli, or test on stimuli that the choice never saw.",
            )


def _stimuli_behind(ds: xr.Dataset) -> list[str]:
    if "stimuli" in ds.attrs:
        return sorted(json.loads(ds.attrs["stimuli"]))
    if "stimulus_id" in ds.variables:
        return sorted(set(ds["stimulus_id"].values.astype(str).tolist()))
    raise SchemaError(
        "chosen_on does not say which stimuli it was computed from (attrs['stimuli'] or "
        "stimulus_id).",
        "Pass the list of stimulus ids.",
    )
