"""What was chosen from data carries the stimuli it was chosen on, so that scoring can refuse it.

Choosing voxels, ROIs or a layer by scores on some stimuli and then reporting scores on the same
stimuli inflates the result (double dipping). `select` and `record_choice` write the stimuli, and
the hashes of their content, into responses or features; `encode` raises if one of them is in a test
set, under whatever name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from brainalign.errors import ConfigError, LeakError, SchemaError

__all__ = ["check_double_dipping", "record_choice", "select", "selections"]

_KEY = "selections"


def select(
    responses: xr.Dataset,
    mask: ArrayLike | xr.DataArray,
    *,
    chosen_on: Sequence[str] | xr.Dataset,
    name: str = "selection",
    stimulus_sha256: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Keep some neuroids, and remember on which stimuli they were chosen.

    Parameters
    ----------
    responses : Dataset
        ``responses`` schema.
    mask : array-like of bool, shape (n_neuroids,)
        Which to keep. A DataArray with coordinate neuroid_id is matched by id (others: not kept).
    chosen_on, name, stimulus_sha256
        See `record_choice`.

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
    record = {"kept": int(keep.sum()), "of": len(keep)}
    known = _recorded(responses, chosen_on, name, stimulus_sha256, record)
    return responses.isel(neuroid=keep).assign_attrs({_KEY: known})


def record_choice(
    ds: xr.Dataset,
    *,
    chosen_on: Sequence[str] | xr.Dataset,
    name: str,
    stimulus_sha256: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Remember on which stimuli something that a Dataset holds was chosen.

    Parameters
    ----------
    ds : Dataset
        Responses whose ROIs were drawn from data, or features of a layer that was chosen by its
        scores.
    chosen_on : sequence of str, or Dataset
        The stimuli whose responses took part in the choice: their ids; or a scores Dataset of
        `encode`, or any Dataset with stimulus_id, that it was computed from. Pass an empty list for
        a choice that saw none of these stimuli (anatomy, a separate localiser).
    name : str
        What the choice is called in messages.
    stimulus_sha256 : mapping of str to str, optional
        Content hash of each stimulus, by which it is known under another name too. A scores Dataset
        brings those that `encode` was given.

    Returns
    -------
    Dataset
        The same with the attribute ``selections``.
    """
    return ds.assign_attrs({_KEY: _recorded(ds, chosen_on, name, stimulus_sha256, {})})


def _recorded(
    ds: xr.Dataset,
    chosen_on: Sequence[str] | xr.Dataset,
    name: str,
    stimulus_sha256: Mapping[str, str] | None,
    more: Mapping[str, int],
) -> str:
    """Return the choices that a Dataset has been through, and this one, as JSON."""
    if isinstance(chosen_on, str):
        raise ConfigError("chosen_on must be a list of stimulus ids, not one string.")
    hashes = dict(stimulus_sha256 or {})
    earlier: list[dict[str, Any]] = []
    if isinstance(chosen_on, xr.Dataset):
        ids, earlier = _stimuli_behind(chosen_on), selections(chosen_on)
        own = json.loads(chosen_on.attrs.get("stimuli_sha256", "[]"))
        if own:
            hashes = dict(zip(json.loads(chosen_on.attrs["stimuli"]), own, strict=True)) | hashes
    else:
        ids = sorted({str(s) for s in chosen_on})
    record: dict[str, Any] = {"name": name, "stimuli": ids, **more}
    known = [hashes[i] for i in ids if i in hashes]
    if known:
        record["sha256"] = known
    before = selections(ds)
    return json.dumps([*before, *(e for e in earlier if e not in before), record])


def selections(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return the choices that what a Dataset holds has been through."""
    records: list[dict[str, Any]] = json.loads(ds.attrs.get(_KEY, "[]"))
    return records


def check_double_dipping(
    ds: xr.Dataset,
    test_stimuli: Sequence[str],
    stimulus_sha256: Mapping[str, str] | None = None,
) -> None:
    """Refuse to score neuroids, ROIs or layers on stimuli that they were chosen on.

    Parameters
    ----------
    ds : Dataset
        Responses or features.
    test_stimuli : sequence of str
        Ids of the tested stimuli.
    stimulus_sha256 : mapping of str to str, optional
        Their content hashes: a stimulus is then told by its content, whatever its name.

    Raises
    ------
    LeakError
        Naming the choice and some of the stimuli.
    """
    tested = sorted(set(map(str, test_stimuli)))
    hashes = stimulus_sha256 or {}
    for record in selections(ds):
        names = set(record["stimuli"])
        content = {hashes[s] for s in names if s in hashes} | set(record.get("sha256", []))
        shared = [s for s in tested if s in names or hashes.get(s) in content]
        if shared:
            what = (
                f"{record['kept']} of {record['of']} neuroids were chosen"
                if "kept" in record
                else "a choice was made"
            )
            raise LeakError(
                f"Double dipping: {what} by {record['name']!r} on {len(names)} stimuli, and "
                f"{len(shared)} of these are tested ({', '.join(map(repr, shared[:3]))}).",
                "Choose on other stimuli, or test on stimuli that the choice never saw.",
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
