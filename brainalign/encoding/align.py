"""Features and responses of the same stimuli in the same rows, checked before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.faults import constant_by_run, non_finite_by_run
from brainalign.data.schema import validate
from brainalign.data.splits import Split, by_cluster, by_stimulus, check_leak
from brainalign.errors import ConfigError, SchemaError
from brainalign.evaluation.ceilings import ncsnr, repeat_counts

__all__ = [
    "Aligned",
    "Splits",
    "align",
    "content_keys",
    "feature_matrix",
    "make_splits",
    "neuroid_coords",
]

logger = logging.getLogger(__name__)

_NEUROIDS_AT_ONCE = 4096
#: K, or (train, test) pairs of row numbers, masks, or stimulus ids.
Splits = int | Sequence[tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True)
class Aligned:
    """What an encoding model is fitted to.

    Parameters
    ----------
    features : dict of str to ndarray, shape (n_stimuli, n_features)
        By layer, float32.
    responses : ndarray, shape (n_rows, n_neuroids)
        float32. A row is a stimulus (presentations averaged) or a presentation.
    stimulus_id : ndarray of str, shape (n_stimuli,)
        In order of first appearance in the responses.
    row_stimulus : ndarray of int, shape (n_rows,)
        Stimulus of each row.
    repeats : ndarray of int, shape (n_rows,)
        Presentations averaged in each row.
    neuroids : Dataset
        The coordinates of the neuroids that are kept.
    ncsnr : ndarray, shape (n_neuroids,), or None
        Of single presentations; measured from repeats, or taken from the responses' coordinate.
    excluded : dict of str to int
        Neuroids left out, by reason.
    meta : dict of str to Dataset
        Coordinates and attrs of each layer, without the values.
    attrs : dict
        Of the responses.
    """

    features: dict[str, NDArray[np.float32]]
    responses: NDArray[np.float32]
    stimulus_id: NDArray[np.str_]
    row_stimulus: NDArray[np.intp]
    repeats: NDArray[np.int64]
    neuroids: xr.Dataset
    ncsnr: NDArray[np.float64] | None
    excluded: dict[str, int] = field(default_factory=dict)
    meta: dict[str, xr.Dataset] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def row_id(self) -> NDArray[np.str_]:
        """The stimulus id of each row."""
        return self.stimulus_id[self.row_stimulus]

    def rows(self, layer: str) -> NDArray[np.float32]:
        """Return the features of one layer for every row of the responses."""
        return self.features[layer][self.row_stimulus]


def align(
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    responses: xr.Dataset,
    *,
    repetitions: str = "average",
    stimuli: str = "exact",
    bad_neuroids: str = "exclude",
    repeats: int | None = None,
) -> Aligned:
    """Bring features and responses into the same rows.

    Parameters
    ----------
    features : dict of layer name to Dataset, or one Dataset
        ``features`` schema, with the same stimuli in any order.
    responses : Dataset
        ``responses`` schema (presentation, neuroid), one subject.
    repetitions : {"average", "keep"}
        Average the presentations of a stimulus, or keep each as a row.
    stimuli : {"exact", "seen", "intersect"}
        Refuse stimuli that only one side has; allow features of stimuli that were not presented, as
        a study has more than one subject saw; or leave out what only one side has (logged).
    bad_neuroids : {"exclude", "raise"}
        Leave out neuroids with values that are not finite, or constant over the rows; or refuse.
    repeats : int, optional
        Presentations that each row of the responses is already the mean of. An ncsnr coordinate is
        that of single presentations.

    Returns
    -------
    Aligned

    Raises
    ------
    SchemaError
        Naming stimuli without a partner, neuroids that are NaN or constant, features that are not
        finite, or time series (which need a lagged model).
    """
    _one_of("repetitions", repetitions, ("average", "keep"))
    _one_of("stimuli", stimuli, ("exact", "seen", "intersect"))
    _one_of("bad_neuroids", bad_neuroids, ("exclude", "raise"))
    if repeats is not None and repeats < 1:
        raise ConfigError(f"repeats is {repeats}; expected at least 1, or None.")
    validate(responses, "responses")
    if "presentation" not in responses["responses"].dims:
        raise SchemaError(
            "The responses are a time series (time, neuroid); encoding takes (presentation, "
            "neuroid).",
            "Estimate responses to stimuli first (betas), or give the delays of a lagged model.",
        )
    layers = _layers(features)
    subjects = np.unique(np.ravel(responses["subject"].values).astype(str))
    if len(subjects) != 1:
        raise SchemaError(
            f"The responses hold {len(subjects)} subjects ({', '.join(subjects[:3])} ...); an "
            "encoding model is fitted to one.",
            "Select one subject at a time.",
        )
    ids = responses["stimulus_id"].values.astype(str)
    keep_ids = _common_stimuli(ids, layers, stimuli)
    rows = np.flatnonzero(np.isin(ids, keep_ids))
    values = np.asarray(responses["responses"].values, dtype=np.float32)[rows]
    ids = ids[rows]
    stimulus_id = np.array(list(dict.fromkeys(ids.tolist())))
    place = {s: i for i, s in enumerate(stimulus_id.tolist())}
    row_stimulus = np.array([place[s] for s in ids.tolist()], dtype=np.intp)

    good, excluded = _check_neuroids(values, bad_neuroids, responses.isel(presentation=rows))
    values = values[:, good]
    neuroids = neuroid_coords(responses).isel(neuroid=good)
    count = np.array(list(repeat_counts(ids).values()))
    if (count > 1).any() and len(count) > 1:
        # A row that is a mean of presentations already has less noise than one presentation.
        snr: NDArray[np.float64] | None = _by_columns(
            lambda y: ncsnr(y, ids) / np.sqrt(repeats or 1), values
        )
    elif "ncsnr" in neuroids:
        snr = neuroids["ncsnr"].values.astype(np.float64)
    else:
        snr = None
    each = np.ones(len(ids), dtype=np.int64)
    if repetitions == "average":
        values = _by_columns(lambda y: _stimulus_means(y, row_stimulus, count), values)
        row_stimulus, each = np.arange(len(stimulus_id)), count.astype(np.int64)
    return Aligned(
        features={n: feature_matrix(ds, stimulus_id.tolist()) for n, ds in layers.items()},
        responses=values,
        stimulus_id=stimulus_id,
        row_stimulus=row_stimulus,
        repeats=each * (repeats or 1),
        neuroids=neuroids,
        ncsnr=snr,
        excluded=excluded,
        meta={n: ds.drop_vars("features") for n, ds in layers.items()},
        attrs={**responses.attrs, "subject": str(subjects[0])},
    )


def make_splits(
    aligned: Aligned,
    splits: Splits,
    *,
    seed: int = 0,
    clusters: int | None = None,
    embedding: xr.Dataset | None = None,
    stimulus_sha256: Mapping[str, str] | None = None,
    allow_leak: bool = False,
) -> list[Split]:
    """Return (train, test) row numbers and refuse stimuli on both sides.

    Parameters
    ----------
    aligned : Aligned
        Rows.
    splits : int or sequence of (train, test)
        K folds over stimuli; or pairs of row numbers of `aligned`, masks, or stimulus ids.
    seed : int
        Seed of the K folds.
    clusters : int, optional
        K folds of whole clusters of stimuli, as many: what is tested is of kinds never trained on.
    embedding : Dataset, optional
        ``features`` schema, in which stimuli are clustered.
    stimulus_sha256 : dict of stimulus id to hash, optional
        Content hashes, so that one image under two names is found too.
    allow_leak : bool
        Warn of stimuli on both sides instead of raising.

    Raises
    ------
    LeakError
        If a stimulus stands on both sides of a split.
    ConfigError
        If a split is empty or names unknown stimuli, or test sets overlap.
    """
    keys = content_keys(aligned.row_id, stimulus_sha256)
    if (clusters is None) != (embedding is None):
        raise ConfigError("Clusters of stimuli need their number and an embedding.")
    if clusters is not None and embedding is not None:
        if not isinstance(splits, int | np.integer):
            raise ConfigError("Folds are made of clusters: give splits as their number.")
        where = feature_matrix(embedding, aligned.stimulus_id.tolist())[aligned.row_stimulus]
        pairs = by_cluster(where, clusters, int(splits), seed, stimulus_id=keys)
    elif isinstance(splits, int | np.integer):
        pairs = by_stimulus(keys, int(splits), seed)
    else:
        pairs = [
            (_rows(train, aligned, f"train set of fold {k}"),
             _rows(test, aligned, f"test set of fold {k}"))
            for k, (train, test) in enumerate(splits)
        ]  # fmt: skip
    check_leak(pairs, keys, allow=allow_leak)
    tested = np.concatenate([test for _, test in pairs])
    if len(np.unique(tested)) < len(tested):
        raise ConfigError(
            f"{len(tested) - len(np.unique(tested))} rows are tested in more than one fold.",
            "Give each row one prediction: make the test sets disjoint.",
        )
    if len(tested) < 3:
        raise ConfigError(f"Only {len(tested)} rows are tested; a correlation needs at least 3.")
    return pairs


def content_keys(
    row_id: NDArray[np.str_], stimulus_sha256: Mapping[str, str] | None
) -> NDArray[np.str_]:
    """Return what tells the stimulus of each row: its content hash, or its id without hashes.

    Raises
    ------
    ConfigError
        If a stimulus has no hash.
    """
    if stimulus_sha256 is None:
        return row_id
    missing = [s for s in dict.fromkeys(row_id.tolist()) if s not in stimulus_sha256]
    if missing:
        raise ConfigError(f"{len(missing)} stimuli have no content hash: {missing[:3]}.")
    return np.array([stimulus_sha256[s] for s in row_id.tolist()])


def feature_matrix(ds: xr.Dataset, stimulus_id: Sequence[str]) -> NDArray[np.float32]:
    """Return the features of these stimuli, in this order, as finite float32.

    Raises
    ------
    SchemaError
        If a stimulus is missing or a value is not finite.
    """
    own = ds["stimulus_id"].values.astype(str).tolist()
    place = {s: i for i, s in enumerate(own)}
    missing = [s for s in stimulus_id if s not in place]
    if missing:
        raise SchemaError(f"{len(missing)} stimuli have no features: {_names(missing)}.")
    order = np.array([place[s] for s in stimulus_id])
    values = np.asarray(ds["features"].values, dtype=np.float32)[order]
    bad = ~np.isfinite(values)
    if bad.any():
        first = stimulus_id[int(np.flatnonzero(bad.any(axis=1))[0])]
        raise SchemaError(
            f"The features of layer {str(ds['layer'].values)!r} hold {int(bad.sum())} values that "
            f"are not finite, for {int(bad.any(axis=1).sum())} stimuli (first: {first!r}).",
            "Extract them again, in float32 if they overflowed.",
        )
    return values


def neuroid_coords(ds: xr.Dataset) -> xr.Dataset:
    """Return what a Dataset says about its neuroids: coordinates and ROI masks."""
    names = [str(n) for n, v in ds.coords.items() if v.dims == ("neuroid",)]
    out = xr.Dataset(coords={n: ds[n].variable for n in names})
    if "roi_mask" in ds.variables:
        out["roi_mask"] = ds["roi_mask"]
    return out


def _by_columns(
    function: Callable[[NDArray[np.float32]], NDArray[Any]], values: NDArray[np.float32]
) -> NDArray[Any]:
    """Apply a function to some neuroids at a time, as its float64 copies would fill the memory."""
    starts = range(0, values.shape[1], _NEUROIDS_AT_ONCE)
    parts = [function(values[:, i : i + _NEUROIDS_AT_ONCE]) for i in starts]
    return np.concatenate(parts, axis=-1)


def _stimulus_means(
    values: NDArray[np.float32], row_stimulus: NDArray[np.intp], count: NDArray[np.intp]
) -> NDArray[np.float32]:
    order = np.argsort(row_stimulus, kind="stable")
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    total = np.add.reduceat(values[order].astype(np.float64), starts, axis=0)
    return np.asarray(total / count[:, None], dtype=np.float32)


def _layers(features: Mapping[str, xr.Dataset] | xr.Dataset) -> dict[str, xr.Dataset]:
    if isinstance(features, xr.Dataset):
        features = {str(features["layer"].values) if "layer" in features else "": features}
    if not features:
        raise ConfigError("There are no features.")
    for name, ds in features.items():
        validate(ds, "features")
        if "stimulus" not in ds["features"].dims or "stimulus_id" not in ds.coords:
            raise SchemaError(
                f"The features of {name!r} need dimensions (stimulus, feature) and stimulus_id."
            )
    return dict(features)


def _common_stimuli(
    ids: NDArray[np.str_], layers: dict[str, xr.Dataset], stimuli: str
) -> list[str]:
    measured = dict.fromkeys(ids.tolist())
    common = set(measured)
    for name, ds in layers.items():
        own = set(ds["stimulus_id"].values.astype(str).tolist())
        missing, extra = [s for s in measured if s not in own], sorted(own - set(measured))
        if (missing and stimuli == "seen") or ((missing or extra) and stimuli == "exact"):
            parts = []
            if missing:
                parts.append(f"{len(missing)} of the responses have no features: {_names(missing)}")
            if extra and stimuli == "exact":
                parts.append(f"{len(extra)} with features have no responses: {_names(extra)}")
            raise SchemaError(
                f"The stimuli of layer {name!r} and of the responses differ; "
                + "; ".join(parts) + ".",
                'Extract the missing ones, or use only the common stimuli: stimuli="intersect".',
            )  # fmt: skip
        common &= own
    if len(common) < 3:
        raise SchemaError(
            f"Only {len(common)} of {len(measured)} stimuli of the responses have features in "
            "every layer.",
            "Check that both use the same stimulus ids.",
        )
    if len(common) < len(measured):
        logger.warning("%d of %d stimuli are left out: no features for them.",
                       len(measured) - len(common), len(measured))  # fmt: skip
    return [s for s in measured if s in common]


def _check_neuroids(
    values: NDArray[np.float32],
    bad_neuroids: str,
    responses: xr.Dataset,
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    finite = np.isfinite(values)
    broken = np.asarray(~finite.all(axis=0))
    constant = np.asarray((values == values[:1]).all(axis=0) & ~broken)
    good = ~(broken | constant)
    excluded = {}
    names = responses["neuroid_id"].values.astype(str)
    session, run = responses["session"].values, responses["run"].values
    where = f" {non_finite_by_run(values, session, run)}." if broken.any() else ""
    for reason, bad in (("NaN or infinite", broken), ("constant", constant)):
        if bad.any():
            excluded[reason] = int(bad.sum())
            runs = where if bad is broken else ""
            if bad_neuroids == "raise":
                raise SchemaError(
                    f"{int(bad.sum())} of {len(bad)} neuroids are {reason}: "
                    f"{_names(names[bad].tolist())}.{runs}",
                    'Leave them out with bad_neuroids="exclude".',
                )
            logger.warning(
                "%d of %d neuroids are %s and left out.%s", bad.sum(), len(bad), reason, runs
            )
    if not good.any():
        rows = int((~finite.any(axis=1)).sum())
        hint = f" {rows} whole rows are NaN." if rows else ""
        raise SchemaError(
            f"No neuroid is left: {', '.join(f'{n} {r}' for r, n in excluded.items())}.{hint}"
            + where,
            "Remove bad presentations first." if rows else None,
        )
    still = constant_by_run(values, session, run)
    if still:
        logger.warning("Neuroids that are constant within a run: %s.", still)
    return good, excluded


def _rows(part: ArrayLike, aligned: Aligned, name: str) -> NDArray[np.intp]:
    array = np.asarray(part)
    if array.dtype.kind in "UOT":
        wanted = set(array.astype(str).tolist())
        unknown = wanted - set(aligned.stimulus_id.tolist())
        if unknown:
            raise ConfigError(
                f"The {name} names {len(unknown)} unknown stimuli: {_names(sorted(unknown))}."
            )
        return np.flatnonzero(np.isin(aligned.row_id, list(wanted)))
    if array.dtype == bool:
        if array.shape != (len(aligned.responses),):
            raise ConfigError(
                f"The {name} is a mask of shape {array.shape}; there are "
                f"{len(aligned.responses)} rows."
            )
        return np.flatnonzero(array)
    return array.astype(np.intp)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected {' or '.join(map(repr, allowed))}.")


def _names(values: Sequence[str], n: int = 3) -> str:
    text = ", ".join(repr(v) for v in list(values)[:n])
    return text + (f" and {len(values) - n} more" if len(values) > n else "")
