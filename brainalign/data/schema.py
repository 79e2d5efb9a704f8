"""The schemas of everything that flows between two steps, and the validator that holds them.

Every artefact is an `xarray.Dataset`. A schema names its variables with their dimensions, the
coordinates it must and may carry, and the rules its values follow; `validate` raises on the first
dimension, coordinate or value at fault and says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from brainalign.errors import SchemaError, UnknownNameError, near

__all__ = ["SCHEMAS", "Field", "Schema", "validate"]

Dims = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """One variable or coordinate of a schema.

    Parameters
    ----------
    dims : tuple of tuple of str
        The dimension tuples it may have; ``((),)`` for a scalar.
    kind : str
        ``"number"``, ``"integer"``, ``"text"`` or ``"flag"``.
    required : bool
        Whether it must be there.
    check : callable, optional
        Takes the values and returns a boolean array, True where a value is allowed.
    rule : str
        What `check` asks for, in words.
    lazy : bool
        True for arrays too large to look at: only dtype and dimensions are checked.
    """

    dims: tuple[Dims, ...]
    kind: str = "number"
    required: bool = True
    check: Callable[[np.ndarray], np.ndarray] | None = None
    rule: str = ""
    lazy: bool = False


@dataclass(frozen=True)
class Schema:
    """The fields of one kind of artefact, its free-form extras, and rules over several fields.

    Parameters
    ----------
    name : str
        The kind.
    fields : dict of str to Field
        Variables and coordinates by name. Others are allowed on the same dimensions.
    unique : tuple of str
        Coordinates whose values must not repeat.
    rules : tuple of callable
        Each takes the Dataset and returns an error message or None.
    """

    name: str
    fields: dict[str, Field]
    unique: tuple[str, ...] = ()
    rules: tuple[Callable[[xr.Dataset], str | None], ...] = field(default=())


_KINDS = {"number": "fiu", "integer": "iu", "text": "UOT", "flag": "b"}


def _at_most_one(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) | (x <= 1 + 1e-6)


def _unit_interval(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) | ((x >= 0) & (x <= 1))


def _correlation(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) | (np.abs(x) <= 1 + 1e-6)


def _not_negative(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) | (x >= 0)


def _positive(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) | (x > 0)


def _hemisphere(x: np.ndarray) -> np.ndarray:
    return np.isin(x.astype(str), ["L", "R", ""])


def _filled(x: np.ndarray) -> np.ndarray:
    return x.astype(str) != ""


def _sha256(x: np.ndarray) -> np.ndarray:
    return np.array([len(s) == 64 and set(s) <= set("0123456789abcdef") for s in x.astype(str)])


_NEUROID = (("neuroid",),)
_NEUROID_COORDS = {
    "neuroid_id": Field(_NEUROID, "text", check=_filled, rule="a non-empty name"),
    "roi": Field(_NEUROID, "text"),
    "hemisphere": Field(_NEUROID, "text", check=_hemisphere, rule='"L", "R" or ""'),
    **{c: Field(_NEUROID, "integer", required=False) for c in ("vertex", "i", "j", "k")},
    **{c: Field(_NEUROID, required=False) for c in ("x", "y", "z")},
    "electrode": Field(_NEUROID, "text", required=False),
    "ncsnr": Field(_NEUROID, required=False, check=_not_negative, rule="at least 0"),
    "roi_mask": Field((("neuroid", "roi_name"),), "flag", required=False),
}
_STIMULUS_ID = Field((("stimulus",),), "text", check=_filled, rule="a non-empty name")
_PRESENTATION = (("presentation",), ("time",))
_CAPTION = (("caption",), ("neuroid", "draw"))


def _time_needs_rate(ds: xr.Dataset) -> str | None:
    if "time" in ds["responses"].dims:
        rate = ds.attrs.get("sampling_rate")
        if not isinstance(rate, int | float | np.number) or not rate > 0:
            return (
                "a time series needs attrs['sampling_rate'] in Hz, a number above 0; "
                f"it is {rate!r}"
            )
        return None
    missing = [
        c for c in ("stimulus_id", "repetition", "session", "run", "subject") if c not in ds.coords
    ]
    return f"coordinate {missing[0]!r} on 'presentation' is missing" if missing else None


def _presented(ds: xr.Dataset) -> str | None:
    if "stimulus_id" not in ds.variables or ds["stimulus_id"].dims == ("time",):
        return None
    empty = int((ds["stimulus_id"].values.astype(str) == "").sum())
    return f"'stimulus_id' is empty for {empty} presentations" if empty else None


def _captions_of_voxels(ds: xr.Dataset) -> str | None:
    if "neuroid" not in ds["caption"].dims:
        return None
    missing = [c for c in ("neuroid_id", "roi", "hemisphere") if c not in ds.variables]
    if missing:
        return f"captions of voxels need {missing[0]!r} on 'neuroid'"
    ids = ds["neuroid_id"].values.astype(str)
    return None if len(set(ids.tolist())) == len(ids) else "'neuroid_id' must not repeat"


def _symmetric(ds: xr.Dataset) -> str | None:
    rdm = ds["rdm"].values
    if rdm.shape[1] != rdm.shape[2]:
        return f"an RDM is square; 'rdm' has {rdm.shape[1]} x {rdm.shape[2]} stimuli"
    ids, ids2 = ds["stimulus_id"].values.astype(str), ds["stimulus_id_2"].values.astype(str)
    if not np.array_equal(ids, ids2):
        return "'stimulus_id' and 'stimulus_id_2' must hold the same stimuli in the same order"
    for name, matrix in zip(ds["rdm_name"].values.astype(str).tolist(), rdm, strict=True):
        if not np.allclose(matrix, matrix.T, atol=1e-5, equal_nan=True):
            return f"RDM {name!r} is not symmetric"
        if not np.allclose(np.diag(matrix), 0, atol=1e-5):
            return f"RDM {name!r} has a diagonal that is not 0"
    return None


SCHEMAS: dict[str, Schema] = {
    s.name: s
    for s in (
        Schema(
            "responses",
            {
                "responses": Field(
                    (("presentation", "neuroid"), ("time", "neuroid")), "number", lazy=True
                ),
                # Over time, empty where no stimulus is shown.
                "stimulus_id": Field(_PRESENTATION, "text", required=False),
                **{
                    c: Field(
                        _PRESENTATION,
                        "integer",
                        required=False,
                        check=_not_negative,
                        rule="at least 0",
                    )
                    for c in ("repetition", "session", "run")
                },
                "subject": Field((*_PRESENTATION, ()), "text", required=False),
                **_NEUROID_COORDS,
            },
            unique=("neuroid_id",),
            rules=(_time_needs_rate, _presented),
        ),
        Schema(
            "features",
            {
                "features": Field((("stimulus", "feature"), ("time", "feature")), lazy=True),
                "stimulus_id": Field(
                    (("stimulus",), ("time",)),
                    "text",
                    required=False,
                    check=_filled,
                    rule="a non-empty name",
                ),
                "model": Field(((),), "text"),
                "layer": Field(((),), "text"),
            },
            unique=("stimulus_id",),
        ),
        Schema(
            "token_features",
            {
                "features": Field((("stimulus", "token", "feature"),), lazy=True),
                "stimulus_id": _STIMULUS_ID,
                "model": Field(((),), "text"),
                "layer": Field(((),), "text"),
            },
            unique=("stimulus_id",),
        ),
        Schema(
            "encoder",
            {
                "weights": Field(
                    (("neuroid", "feature"), ("neuroid", "feature", "delay")), lazy=True
                ),
                "delay": Field((("delay",),), required=False),
                "intercept": Field(_NEUROID),
                "alpha": Field(_NEUROID, check=_not_negative, rule="at least 0"),
                "feature_mean": Field((("feature",),)),
                "feature_scale": Field((("feature",),), check=_positive, rule="above 0"),
                "model": Field(((),), "text"),
                "layer": Field(((),), "text"),
                **_NEUROID_COORDS,
            },
            unique=("neuroid_id",),
        ),
        Schema(
            "scores",
            {
                "r": Field(
                    (("neuroid",), ("layer", "neuroid")),
                    check=_correlation,
                    rule="between -1 and 1",
                ),
                "r2": Field(
                    (("neuroid",), ("layer", "neuroid")), check=_at_most_one, rule="at most 1"
                ),
                "ceiling": Field(
                    (("neuroid",),), required=False, check=_unit_interval, rule="between 0 and 1"
                ),
                "normalised": Field((("neuroid",), ("layer", "neuroid")), required=False),
                **{
                    c: Field(
                        (("neuroid",), ("layer", "neuroid")),
                        required=False,
                        check=_unit_interval,
                        rule="between 0 and 1",
                    )
                    for c in ("p", "q")
                },
                "alpha": Field(
                    (("neuroid",), ("layer", "neuroid")),
                    required=False,
                    check=_not_negative,
                    rule="at least 0",
                ),
                **_NEUROID_COORDS,
            },
            unique=("neuroid_id",),
        ),
        Schema(
            "trials",
            {
                "response": Field((("trial",),), "any"),
                "subject": Field((("trial",), ()), "text"),
                "stimulus_id": Field((("trial",),), "text", required=False),
                "correct": Field((("trial",),), "any", required=False),
                "rt": Field((("trial",),), required=False, check=_not_negative, rule="at least 0"),
                "condition": Field((("trial",),), "text", required=False),
            },
        ),
        Schema(
            "captions",
            {
                # Of stimuli, one after the other; of voxels, one for each draw of the library.
                "caption": Field(_CAPTION, "text"),
                "stimulus_id": Field((("caption",),), "text", required=False),
                "neuroid_id": Field((("caption",), ("neuroid",)), "text", required=False),
                "prediction": Field(_CAPTION, required=False),
                "percentile": Field(
                    _CAPTION, required=False, check=_unit_interval, rule="between 0 and 1"
                ),
                "source_id": Field(_CAPTION, "text", required=False),
                "captioner": Field(((),), "text", required=False),
                "model": Field(((),), "text", required=False),
                "layer": Field(((),), "text", required=False),
            },
            rules=(_captions_of_voxels,),
        ),
        Schema(
            "images",
            {
                "stimulus_id": _STIMULUS_ID,
                "filename": Field((("stimulus",),), "text", check=_filled, rule="a file name"),
                "sha256": Field(
                    (("stimulus",),), "text", check=_sha256, rule="64 hexadecimal digits"
                ),
                "caption": Field((("stimulus",),), "text", required=False),
                "category": Field((("stimulus",),), "text", required=False),
            },
            unique=("stimulus_id", "filename"),
        ),
        Schema(
            "rdms",
            {
                "rdm": Field((("rdm_name", "stimulus", "stimulus_2"),)),
                "rdm_name": Field((("rdm_name",),), "text"),
                "stimulus_id": _STIMULUS_ID,
                "stimulus_id_2": Field((("stimulus_2",),), "text"),
            },
            unique=("rdm_name", "stimulus_id"),
            rules=(_symmetric,),
        ),
    )
}


def _shape(dims: tuple[Dims, ...]) -> str:
    return " or ".join("(" + ", ".join(d) + ")" if d else "a scalar" for d in dims)


def _check_field(ds: xr.Dataset, kind: str, name: str, spec: Field) -> None:
    if name not in ds.variables:
        if spec.required:
            raise SchemaError(
                f"{kind}: {name!r} is missing.{near(name, map(str, ds.variables))}",
                f"It must have dimensions {_shape(spec.dims)}.",
            )
        return
    variable = ds[name]
    dims = tuple(map(str, variable.dims))
    if dims not in spec.dims:
        came = "(" + ", ".join(dims) + ")" if dims else "no dimension"
        raise SchemaError(f"{kind}: {name!r} has {came}; expected {_shape(spec.dims)}.")
    if spec.kind != "any" and variable.dtype.kind not in _KINDS[spec.kind]:
        raise SchemaError(f"{kind}: {name!r} is {variable.dtype}; expected {spec.kind} values.")
    if spec.check is None or spec.lazy:
        return
    values = np.asarray(variable.values)
    good = np.asarray(spec.check(values))
    if not good.all():
        first = tuple(int(i) for i in np.argwhere(~good)[0])
        where = ", ".join(f"{d} {i}" for d, i in zip(dims, first, strict=True)) or "the scalar"
        raise SchemaError(
            f"{kind}: {name!r} is {values[first].item()!r} at {where} "
            f"({int((~good).sum())} such values); expected {spec.rule}."
        )


def validate(ds: xr.Dataset, kind: str) -> xr.Dataset:
    """Check a Dataset against the schema of its kind.

    Large arrays (responses, features, encoder weights) are checked by dimension and dtype only,
    so that a lazily opened store is not read; what fits them checks their values.

    Parameters
    ----------
    ds : xarray.Dataset
        The artefact.
    kind : str
        A key of `SCHEMAS`.

    Returns
    -------
    xarray.Dataset
        The same object.

    Raises
    ------
    SchemaError
        Naming the dimension, coordinate or value at fault.
    UnknownNameError
        If there is no such kind.
    """
    if kind not in SCHEMAS:
        raise UnknownNameError(
            f"There is no schema {kind!r}.{near(kind, SCHEMAS)}", f"Known: {', '.join(SCHEMAS)}."
        )
    if not isinstance(ds, xr.Dataset):
        raise SchemaError(f"{kind}: expected an xarray.Dataset, got {type(ds).__name__}.")
    schema = SCHEMAS[kind]
    for name, spec in schema.fields.items():
        _check_field(ds, kind, name, spec)
    empty = [str(d) for d, n in ds.sizes.items() if n == 0]
    if empty:
        raise SchemaError(f"{kind}: dimension {empty[0]!r} has length 0.")
    for name in schema.unique:
        # A clip is named at each of its samples.
        if name not in ds.variables or ds[name].dims == ("time",):
            continue
        values, counts = np.unique(ds[name].values.astype(str), return_counts=True)
        if (counts > 1).any():
            raise SchemaError(
                f"{kind}: {name!r} must not repeat; {str(values[counts > 1][0])!r} "
                f"stands {int(counts.max())} times."
            )
    for rule in schema.rules:
        message = rule(ds)
        if message:
            raise SchemaError(f"{kind}: {message}.")
    return ds
