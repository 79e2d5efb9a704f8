"""Recordings from BIDS derivatives: beta series, GLMsingle output, time series, ROIs, atlases.

Volumes (NIfTI) become neuroids with i, j, k and x, y, z in mm; surfaces (GIfTI, one file per
hemisphere) become neuroids with a vertex. Everything is checked before data are read: affines and
shapes agree between runs and masks, tables have one row per volume.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.faults import (
    constant_by_run,
    constant_runs,
    marked_by_run,
    non_finite_by_run,
)
from brainalign.data.schema import validate
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError, near

__all__ = [
    "Run",
    "add_atlas",
    "add_rois",
    "entities",
    "find_runs",
    "first_level",
    "presented",
    "read_atlas",
    "read_betas",
    "read_derivatives",
    "read_glmsingle",
    "read_roi",
    "read_timeseries",
]

logger = logging.getLogger(__name__)

PathLike = str | Path
Images = PathLike | Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]]
Tables = PathLike | pd.DataFrame | Sequence[PathLike | pd.DataFrame]
Bad = Literal["raise", "exclude"]
Marks = tuple[NDArray[np.intp], NDArray[np.intp]]

_STIMULUS_COLUMNS = ("stimulus_id", "stim_file", "stim_id", "stimulus", "trial_type")
_BETA_SUFFIXES = ("betas", "beta", "betaseries", "statmap")
_NO_LABEL = {"", "???", "unknown", "medial_wall", "medialwall", "medial wall", "background"}


@dataclass(frozen=True)
class Run:
    """One run of a derivatives folder.

    Parameters
    ----------
    images : dict of str to Path
        Under "" a volume, or under "L" and "R" the hemispheres.
    table : Path or None
        Its events or trials table.
    entities : dict of str to str
        BIDS entities of the image.
    """

    images: dict[str, Path]
    table: Path | None
    entities: dict[str, str]


def entities(path: PathLike) -> dict[str, str]:
    """Return the BIDS entities of a file name (``sub-01_ses-2`` gives sub and ses)."""
    parts = Path(path).name.split("_")
    return dict(p.split("-", 1) for p in parts if "-" in p and "." not in p.split("-", 1)[0])


def read_betas(
    images: Images,
    trials: Tables,
    *,
    mask: PathLike | Mapping[str, PathLike] | NDArray[np.bool_] | None = None,
    stimulus_column: str | None = None,
    subject: str | None = None,
    scale: float | None = None,
    bad: Bad = "raise",
    units: str = "beta",
) -> xr.Dataset:
    """Read a beta series: one volume (or surface map) per trial.

    Parameters
    ----------
    images : path, sequence of paths, or mapping of "L" and "R" to either
        4-D NIfTI files, or GIfTI files per hemisphere, one per run or session, in order; or 3-D
        files, one per trial.
    trials : path, DataFrame, or sequence of them
        Tables (tsv) with one row per volume, one per image or one for all. Rows whose stimulus
        is ``n/a`` are other events and are left out.
    mask : path, mapping of "L" and "R" to path, or bool array, optional
        Neuroids to keep. Default: those not 0 or NaN throughout the first image.
    stimulus_column : str, optional
        Column that names the stimulus. Default: the first of stimulus_id, stim_file, stim_id,
        stimulus, trial_type.
    subject : str, optional
        Default: the ``sub`` entity of the first image.
    scale : float, optional
        What stored values are multiplied with. Needed where betas are stored as integers without
        a scale of their own: the Natural Scenes Dataset stores 300 x percent (scale=1/300).
    bad : {"raise", "exclude"}
        What to do with neuroids that hold NaN or infinite values, are constant over all trials,
        or are stored as integers at the limit of their type (-32768 or 32767 for int16: values
        that did not fit). The message counts them run by run. Of a file with a scale of its own,
        which maps the extremes of the data to these limits, one value at a limit is allowed.
    units : str
        Unit of the betas, after `scale`.

    Returns
    -------
    xarray.Dataset
        Follows the ``responses`` schema. attrs hold ``affine`` (16 numbers, row by row) and
        ``volume_shape``, or ``n_vertices``; and the numbers of excluded neuroids.

    Raises
    ------
    SchemaError
        If affines, shapes or numbers of rows do not agree (both files are named), neuroids are
        bad and `bad` is "raise", or all volumes of a run are the same.
    UnavailableError
        If a file is missing.
    """
    _policy(bad)
    runs = _as_runs(images)
    grid = _Grid.of(runs)
    counts = [_n_volumes(r) for r in runs]
    keep = grid.mask(mask, runs[0])
    table = _trial_table(trials, runs, counts, stimulus_column)
    subject = subject or entities(next(iter(runs[0].values()))).get("sub", "")
    out = np.empty((sum(counts), int(keep.sum())), dtype=np.float32)
    saturated = []
    start = 0
    for run, n in zip(runs, counts, strict=True):
        values, (row, neuroid) = _values(run, keep, scale)
        out[start : start + n] = values
        saturated.append((row + start, neuroid))
        start += n
    return _finish(out, table, grid, keep, subject, bad, saturated, units)


def read_timeseries(
    images: Images,
    *,
    tr: float | None = None,
    mask: PathLike | Mapping[str, PathLike] | NDArray[np.bool_] | None = None,
    subject: str | None = None,
    bad: Bad = "raise",
    units: str = "BOLD",
) -> xr.Dataset:
    """Read preprocessed BOLD time series.

    Parameters
    ----------
    images : path, sequence of paths, or mapping of "L" and "R" to either
        4-D NIfTI files, or GIfTI files per hemisphere, one per run, in order.
    tr : float, optional
        Repetition time in s. Default: from the JSON sidecar, else the NIfTI header.
    mask, subject, bad, units
        As in `read_betas`.

    Returns
    -------
    xarray.Dataset
        ``responses`` with dims (time, neuroid); coordinates session, run, seconds (from the start
        of the run) on time; attrs sampling_rate (Hz).

    Raises
    ------
    SchemaError
        If runs do not agree in affine, shape or repetition time.
    ConfigError
        If the repetition time is nowhere to be found.
    """
    _policy(bad)
    runs = _as_runs(images)
    grid = _Grid.of(runs)
    counts = [_n_volumes(r) for r in runs]
    keep = grid.mask(mask, runs[0])
    rates = [tr or _repetition_time(r) for r in runs]
    if max(rates) - min(rates) > 1e-3:
        raise SchemaError(f"Runs differ in repetition time: {sorted(set(rates))} s.")
    parts = [_values(r, keep, 1.0) for r in runs]
    out = np.concatenate([values for values, _ in parts])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    saturated = [(row + i, n) for i, (_, (row, n)) in zip(starts, parts, strict=True)]
    numbers = _numbers(runs)
    coords = {
        "session": ("time", np.repeat([s for s, _ in numbers], counts)),
        "run": ("time", np.repeat([r for _, r in numbers], counts)),
        "seconds": ("time", np.concatenate([np.arange(n) * rates[0] for n in counts])),
    }
    subject = subject or entities(next(iter(runs[0].values()))).get("sub", "")
    good, attrs = _judge(out, bad, saturated, grid, keep, coords["session"][1], coords["run"][1])
    ds = xr.Dataset(
        {"responses": (("time", "neuroid"), out[:, good] if not good.all() else out)},
        coords={**coords, "subject": subject, **grid.coords(keep, good)},
        attrs={**grid.attrs(), **attrs, "units": units, "subject": subject,
               "sampling_rate": 1 / rates[0]},
    )  # fmt: skip
    ds["seconds"].attrs["units"] = "s"
    return validate(ds, "responses")


def first_level(
    bold: xr.Dataset,
    events: Tables,
    *,
    stimulus_column: str | None = None,
    hrf_model: str = "spm",
    drift_model: str | None = "cosine",
    high_pass: float = 0.01,
    noise_model: str = "ar1",
    confounds: Sequence[pd.DataFrame] | None = None,
    slice_time_ref: float = 0.0,
    signal_scaling: bool = True,
) -> xr.Dataset:
    """Estimate one beta per trial with nilearn's general linear model (least squares, all at once).

    Every trial has a regressor of its own; runs are fitted one by one.

    Parameters
    ----------
    bold : xarray.Dataset
        Time series with coordinates session, run and seconds on time, as `read_timeseries` gives.
    events : path, DataFrame, or sequence of them
        Onset and duration in s. One table per run, or one with columns session and run. Rows
        without a stimulus get one regressor per trial_type and no beta.
    stimulus_column : str, optional
        As in `read_betas`.
    hrf_model, drift_model, high_pass, noise_model, slice_time_ref
        As in `nilearn.glm.first_level.FirstLevelModel`.
    confounds : sequence of DataFrame, optional
        One per run, as `nilearn.interfaces.fmriprep.load_confounds` gives them; a column becomes a
        regressor. NaN (first rows of derivatives) become 0.
    signal_scaling : bool
        Divide each run by its mean, neuroid by neuroid, for betas in percent signal change.

    Returns
    -------
    xarray.Dataset
        Follows the ``responses`` schema, one presentation per trial.

    Raises
    ------
    SchemaError
        If a run has no events, an onset lies outside it, or a mean is 0 under `signal_scaling`.
    ConfigError
        If the regressors of a run are not independent of each other.
    """
    from nilearn.glm.first_level import make_first_level_design_matrix, run_glm

    if "time" not in bold["responses"].dims:
        raise SchemaError("first_level needs responses with dims (time, neuroid).")
    session, number = bold["session"].values, bold["run"].values
    order = list(dict.fromkeys(zip(session.tolist(), number.tolist(), strict=True)))
    tables = _event_tables(events, order)
    if confounds is not None and len(confounds) != len(order):
        raise SchemaError(f"There are {len(confounds)} confound tables for {len(order)} runs.")
    tr = 1 / float(bold.attrs["sampling_rate"])
    betas, rows = [], []
    for i, (key, table) in enumerate(zip(order, tables, strict=True)):
        where = f"session {key[0]}, run {key[1]}"
        scans = np.flatnonzero((session == key[0]) & (number == key[1]))
        y = bold["responses"].values[scans].astype(np.float64)
        times = np.arange(len(scans)) * tr + slice_time_ref * tr
        for column in ("onset", "duration"):
            if column not in table:
                raise SchemaError(f"The events of {where} have no column {column!r}."
                                  f"{near(column, map(str, table.columns))}")  # fmt: skip
        onset = pd.to_numeric(table["onset"])
        outside = (onset < 0) | (onset > times[-1])
        if outside.any():
            raise SchemaError(
                f"{int(outside.sum())} events of {where} start outside the run, whose last scan "
                f"is at {times[-1]:g} s (first: onset {onset[outside].iloc[0]:g} s).",
                "Onsets are counted in s from the first scan of their run.",
            )
        name = _stimulus_column(table, stimulus_column, where)
        stimulus = table[name].astype(object)
        trial = ~_missing(stimulus)
        if not trial.any():
            raise SchemaError(f"No event of {where} has a stimulus in column {name!r}.")
        labels = [f"trial{j:05d}" for j in range(int(trial.sum()))]
        kinds = np.array(
            table["trial_type"].astype(str)
            if "trial_type" in table
            else np.full(len(table), "other"),
            dtype=object,
        )
        kinds = np.array([f"other_{k}" for k in kinds], dtype=object)
        kinds[trial.to_numpy()] = labels
        design = make_first_level_design_matrix(
            times,
            pd.DataFrame(
                {
                    "onset": onset.to_numpy(float),
                    "duration": pd.to_numeric(table["duration"]).to_numpy(float),
                    "trial_type": kinds,
                }
            ),
            hrf_model=hrf_model,
            drift_model=drift_model,
            high_pass=high_pass,
            add_regs=None if confounds is None else confounds[i].fillna(0).to_numpy(float),
            add_reg_names=None if confounds is None else [f"confound_{c}" for c in confounds[i]],
        )
        rank = np.linalg.matrix_rank(design.to_numpy())
        if rank < design.shape[1]:
            raise ConfigError(
                f"The design of {where} has {design.shape[1]} regressors of rank {rank} over "
                f"{len(scans)} scans: its trials cannot be told apart.",
                "Leave out confounds, or use betas of a method made for dense designs (GLMsingle).",
            )
        if signal_scaling:
            mean = y.mean(axis=0)
            if (mean == 0).any():
                raise SchemaError(f"{int((mean == 0).sum())} neuroids have mean 0 in {where}.",
                                  "Exclude them, or pass signal_scaling=False.")  # fmt: skip
            y = 100 * (y / mean - 1)
        group, results = run_glm(y, design.to_numpy(), noise_model=noise_model)
        columns = [design.columns.get_loc(label) for label in labels]
        beta = np.empty((len(labels), y.shape[1]), dtype=np.float32)
        for label, result in results.items():
            beta[:, group == label] = result.theta[columns]
        betas.append(beta)
        rows.append(
            pd.DataFrame(
                {"stimulus_id": stimulus[trial].astype(str), "session": key[0], "run": key[1]}
            )
        )
    frame = pd.concat(rows, ignore_index=True)
    frame["repetition"] = frame.groupby("stimulus_id").cumcount() + 1
    keep = {str(c): bold[c] for c in bold.coords if bold[c].dims in (("neuroid",), ("roi_name",))}
    attrs = {k: v for k, v in bold.attrs.items() if k != "sampling_rate"}
    attrs["units"] = "percent signal change" if signal_scaling else str(attrs.get("units", "BOLD"))
    subject = str(np.ravel(bold["subject"].values)[0])
    ds = xr.Dataset(
        {"responses": (("presentation", "neuroid"), np.concatenate(betas))},
        coords={**_presentation_coords(frame, subject), **keep},
        attrs={**attrs, "first_level": f"nilearn, LSA, {hrf_model}, {noise_model}, {drift_model}"},
    )
    if "roi_mask" in bold:
        ds["roi_mask"] = bold["roi_mask"]
    return validate(ds, "responses")


def read_glmsingle(
    path: PathLike,
    trials: Tables,
    *,
    reference: PathLike | None = None,
    mask: PathLike | NDArray[np.bool_] | None = None,
    n_vertices: tuple[int, int] | None = None,
    stimulus_column: str | None = None,
    subject: str | None = None,
    scale: float | None = None,
    bad: Bad = "raise",
    units: str = "percent signal change",
) -> xr.Dataset:
    """Read single-trial betas as GLMsingle (or the Natural Scenes Dataset) stores them.

    Parameters
    ----------
    path : path
        A GLMsingle output folder (the last stage, ``TYPED_FITHRF_GLMDENOISE_RR``, is taken), or
        one file: ``.hdf5`` / ``.h5`` (dataset ``betasmd``; ``modelmd`` or ``betas`` with axes
        in MATLAB's order), ``.mat`` of MATLAB 7.3 (``modelmd``) or ``.npy`` of numbers.
    trials : path, DataFrame, or sequence of them
        One row per beta, over all runs in the order of the design.
    reference : path, optional
        A NIfTI image of the same grid, for the affine. Needed for volumes, which GLMsingle stores
        without one; `mask` serves as well.
    mask : path or bool array, optional
        Voxels to keep; where betas are stored as a list of voxels, which voxels these are.
    n_vertices : (int, int), optional
        Where betas are of surface vertices, left before right: how many.
    stimulus_column, subject, scale, bad, units
        As in `read_betas`.

    Returns
    -------
    xarray.Dataset
        Follows the ``responses`` schema.

    Raises
    ------
    SchemaError
        If the file holds Python pickles (they are never loaded), or shapes do not agree.
    UnavailableError
        If there is no such file; the message lists what was looked for.

    Notes
    -----
    GLMsingle: Prince et al. 2022, eLife 11:e77599.
    """
    _policy(bad)
    path = Path(path)
    if path.is_dir():
        stage = "TYPED_FITHRF_GLMDENOISE_RR"
        names = [f"{s}{e}" for s in (stage, stage.replace("TYPED_", "TYPED")) for e in
                 (".hdf5", ".h5", ".mat", ".npy")]  # fmt: skip
        found = [p for n in names for p in sorted(path.rglob(n))]
        if not found:
            _missing_file(path, names)
        path = found[0]
    if not path.exists():
        _missing_file(path.parent, [path.name])
    if n_vertices is None and reference is None and not isinstance(mask, str | Path):
        raise ConfigError(
            f"{path.name} holds no affine.",
            "Pass reference= or mask= (a NIfTI image of the same grid), or n_vertices= for a "
            "surface.",
        )
    with _open_betas(path) as (array, reverse):
        shape = tuple(reversed(array.shape)) if reverse else tuple(array.shape)
        n = shape[-1]
        spatial = tuple(s for s in shape[:-1])
        if n_vertices is not None:
            grid = _Grid("surface", n_vertices={"L": int(n_vertices[0]), "R": int(n_vertices[1])})
            keep = np.ones(sum(n_vertices), bool) if mask is None else np.asarray(mask, bool)
            listed = True
            if int(np.prod(spatial)) != len(keep):
                raise SchemaError(f"{path.name} has betas of {int(np.prod(spatial))} vertices; "
                                  f"n_vertices says {len(keep)}.")  # fmt: skip
            pick = np.flatnonzero(keep)
        else:
            named = Path(cast(PathLike, reference if reference is not None else mask))
            image = _load(named)
            grid = _Grid("volume", image.affine, tuple(map(int, image.shape[:3])), source=named)
            keep = np.ones(grid.shape, bool) if mask is None else grid.mask(mask, {})
            squeezed = tuple(s for s in spatial if s != 1)
            listed = len(squeezed) <= 1 and len(grid.shape) == 3 and spatial != grid.shape
            if listed:
                if int(np.prod(spatial)) != int(keep.sum()):
                    raise SchemaError(
                        f"{path.name} lists {int(np.prod(spatial))} voxels; the mask has "
                        f"{int(keep.sum())}.",
                        "Pass the mask that chose them.",
                    )
                pick = np.arange(int(keep.sum()))
            elif spatial != grid.shape:
                raise SchemaError(f"{path.name} has betas of shape {spatial}; {named.name} has "
                                  f"{grid.shape}.")  # fmt: skip
        dtype = np.dtype(array.dtype)
        factor = _factor(path, dtype, None, scale)
        table = _trial_table(trials, [{"": path}], [n], stimulus_column)
        out = np.empty((n, int(keep.sum())), dtype=np.float32)
        saturated = []
        step = max(1, int(2**28 // max(1, int(np.prod(spatial)) * dtype.itemsize)))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            block = np.asarray(array[rows] if reverse else array[..., rows])
            block = block.T if reverse else block
            flat = block.reshape(-1, block.shape[-1])[pick] if listed else block[keep]
            row, neuroid = _at_limit(flat, dtype)
            saturated.append((row + start, neuroid))
            out[rows] = flat.T * np.float32(factor)
    subject = subject or entities(path).get("sub") or _subject_of(path)
    if mask is None and n_vertices is None:
        silent = (np.nan_to_num(out) == 0).all(axis=0)
        keep[keep] = ~silent
        place = np.cumsum(~silent) - 1
        saturated = [(row[~silent[c]], place[c[~silent[c]]]) for row, c in saturated]
        out = out[:, ~silent]
    return _finish(out, table, grid, keep, subject, bad, saturated, units)


def find_runs(
    root: PathLike,
    subject: str,
    *,
    suffix: str | Sequence[str] = _BETA_SUFFIXES,
    tables: Sequence[str] = ("trials", "events"),
    tables_root: PathLike | None = None,
    **wanted: str,
) -> list[Run]:
    """Find the runs of a subject in a BIDS derivatives folder, with their tables.

    Parameters
    ----------
    root : path
        The derivatives folder.
    subject : str
        Label without ``sub-``.
    suffix : str or sequence of str
        Suffix of the images: betas, beta, betaseries, statmap; bold for time series.
    tables : sequence of str
        Suffixes of the tables, the better one first.
    tables_root : path, optional
        Where else to look for tables (the raw dataset).
    **wanted : str
        Entities the images must have: space="T1w", task="floc", ses="01", desc="preproc"; ""
        for none.

    Returns
    -------
    list of Run
        Ordered by session, task and run.

    Raises
    ------
    UnavailableError
        If nothing is found; the message says what was looked for and what is there.
    ConfigError
        If more than one space, resolution or desc remains: choose one.
    """
    root = Path(root)
    subject = str(subject).removeprefix("sub-")
    suffixes = (suffix,) if isinstance(suffix, str) else tuple(suffix)
    if not root.is_dir():
        raise UnavailableError(f"There is no folder {root}.", "Check the path.")
    pattern = re.compile(rf"_({'|'.join(suffixes)})\.(nii|nii\.gz|gii|func\.gii|shape\.gii)$")
    own = sorted(p for p in root.rglob(f"sub-{subject}_*") if p.is_file())
    fitting = [p for p in own if pattern.search(p.name)]
    chosen = [
        p for p in fitting if all(entities(p).get(k, "") == str(v) for k, v in wanted.items())
    ]
    if not chosen:
        subjects = sorted({s for p in root.rglob("sub-*") if (s := entities(p).get("sub"))})
        looked = f"sub-{subject}_*" + "".join(f"_{k}-{v}" for k, v in wanted.items())
        if subject not in subjects:
            there = f"there are subjects {', '.join(subjects) or 'none'}.{near(subject, subjects)}"
        elif fitting:
            there = f"there are {_names(fitting)}."
        else:
            there = f"of this subject there are {_names(own) or 'no files'}."
        raise UnavailableError(
            f"Found no image {looked}_({'|'.join(suffixes)}).nii[.gz] or .func.gii under {root}; "
            + there
        )
    for key in ("space", "res", "den", "desc", "label", "stat", "contrast"):
        values = sorted({entities(p).get(key, "") for p in chosen})
        if len(values) > 1:
            raise ConfigError(
                f"Images of sub-{subject} come with {key} "
                + ", ".join(repr(v) for v in values)
                + ".",
                f"Choose one with {key}=.",
            )
    groups: dict[tuple[tuple[str, str], ...], dict[str, Path]] = {}
    for p in chosen:
        e = entities(p)
        side = e.pop("hemi", "")
        groups.setdefault(tuple(sorted(e.items())), {})[side] = p
    sources = [root] + ([Path(tables_root)] if tables_root is not None else [])
    available = [
        p for s in sources for p in sorted(s.rglob(f"sub-{subject}_*.tsv"))
        if p.stem.split("_")[-1] in tables
    ]  # fmt: skip
    runs = []
    for key_, images in groups.items():
        e = dict(key_)
        runs.append(Run(images, _table_of(e, available, tables), e))
    return sorted(
        runs,
        key=lambda r: tuple(_natural(r.entities.get(k, "")) for k in ("ses", "task", "run")),
    )


def read_derivatives(
    root: PathLike,
    subject: str,
    *,
    kind: Literal["betas", "bold"] = "betas",
    suffix: str | Sequence[str] | None = None,
    tables_root: PathLike | None = None,
    mask: Any = "auto",
    stimulus_column: str | None = None,
    scale: float | None = None,
    bad: Bad = "raise",
    model: Mapping[str, Any] | None = None,
    **wanted: str,
) -> xr.Dataset:
    """Read a subject's responses from a BIDS derivatives folder.

    Parameters
    ----------
    root : path
        The derivatives folder, for example fMRIPrep's or one of GLMsingle betas in BIDS names.
    subject : str
        Label without ``sub-``.
    kind : {"betas", "bold"}
        Beta series as they are, or preprocessed BOLD through `first_level`.
    suffix : str or sequence of str, optional
        As in `find_runs`.
    tables_root : path, optional
        The raw dataset, if its events tables are not among the derivatives.
    mask : "auto", path, mapping, bool array or None
        "auto": voxels inside all ``desc-brain_mask`` images of the same space, if there are any.
    stimulus_column, scale, bad
        As in `read_betas`.
    model : mapping, optional
        Further arguments of `first_level`.
    **wanted : str
        Entities, as in `find_runs`.

    Returns
    -------
    xarray.Dataset
        Follows the ``responses`` schema.

    Raises
    ------
    UnavailableError
        If images or tables are missing.
    """
    if kind not in ("betas", "bold"):
        raise ConfigError(f"kind must be 'betas' or 'bold'; got {kind!r}.")
    suffix = suffix or (_BETA_SUFFIXES if kind == "betas" else "bold")
    order = ("trials", "events") if kind == "betas" else ("events",)
    runs = find_runs(root, subject, suffix=suffix, tables=order, tables_root=tables_root, **wanted)
    bare = [r for r in runs if r.table is None]
    if bare:
        name = next(iter(bare[0].images.values())).name
        raise UnavailableError(
            f"{len(bare)} of {len(runs)} runs have no table: looked for "
            f"{' or '.join('_' + t + '.tsv' for t in order)} with the entities of {name} under "
            + " and ".join(str(p) for p in (root, tables_root) if p is not None)
            + ".",
            "Pass the raw dataset as tables_root.",
        )
    if isinstance(mask, str) and mask == "auto":
        mask = _brain_mask(Path(root), runs)
    images: Any = [r.images[""] for r in runs] if "" in runs[0].images else {
        side: [r.images[side] for r in runs] for side in sorted(runs[0].images)
    }  # fmt: skip
    listed = [cast(Path, r.table) for r in runs]
    unique = list(dict.fromkeys(listed))
    if kind == "betas":
        return read_betas(images, unique, mask=mask, stimulus_column=stimulus_column,
                          scale=scale, bad=bad)  # fmt: skip
    bold = read_timeseries(images, mask=mask, bad=bad)
    return first_level(bold, listed, stimulus_column=stimulus_column, **(model or {}))


def presented(tables: Tables, stimulus_column: str | None = None) -> list[str]:
    """Return the stimuli that tables of trials name, each once, in order of first appearance.

    Parameters
    ----------
    tables : path, DataFrame, or sequence of them
        As for `read_betas`.
    stimulus_column : str, optional
        As in `read_betas`.

    Raises
    ------
    SchemaError, UnknownNameError
        If a table has no such column.
    """
    found: dict[str, None] = {}
    for where, table in _tables(tables):
        names = table[_stimulus_column(table, stimulus_column, where)].astype(object)
        found |= dict.fromkeys(names[~_missing(names)].astype(str).tolist())
    return list(found)


def read_roi(
    source: PathLike | Mapping[str, PathLike],
    like: xr.Dataset,
    *,
    label: int | str | None = None,
    hemisphere: str | None = None,
) -> NDArray[np.bool_]:
    """Read which neuroids lie in an ROI.

    Parameters
    ----------
    source : path, or mapping of "L" and "R" to path
        NIfTI mask or labels; GIfTI label, func or shape file; FreeSurfer ``.label`` or ``.mgz``.
    like : xarray.Dataset
        Responses whose neuroids are asked for.
    label : int or str, optional
        Which label; without it, everything above 0.
    hemisphere : {"L", "R"}, optional
        Of a surface file, if its name does not tell.

    Returns
    -------
    ndarray of bool, shape (n_neuroids,)

    Raises
    ------
    SchemaError
        If the image has another affine, shape or number of vertices than the responses.
    UnknownNameError
        If no vertex or voxel has the label.
    """
    values, names = _labels(source, like, hemisphere)
    if label is None:
        return values > 0
    if isinstance(label, str):
        index = [k for k, v in names.items() if v == label]
        if not index:
            raise UnknownNameError(f"{source} has no label {label!r}.{near(label, names.values())}")
        return np.isin(values, index)
    inside = values == label
    if not inside.any():
        known = sorted(set(np.unique(values).astype(int).tolist()))
        raise UnknownNameError(f"No neuroid has label {label} in {source}; there are {known[:20]}.")
    return inside


def read_atlas(
    source: PathLike | Mapping[str, PathLike],
    like: xr.Dataset,
    *,
    lookup: PathLike | Mapping[int, str] | None = None,
    hemisphere: str | None = None,
) -> NDArray[np.str_]:
    """Read the atlas label of each neuroid.

    Parameters
    ----------
    source : path, or mapping of "L" and "R" to path
        Labelled NIfTI; GIfTI label file; FreeSurfer ``.annot`` or ``.mgz``.
    like : xarray.Dataset
        Responses whose neuroids are asked for.
    lookup : path or mapping, optional
        Table (tsv) with columns index and name, as BIDS has for ``dseg`` images. Not needed where
        the file holds its names.
    hemisphere : {"L", "R"}, optional
        Of a surface file, if its name does not tell.

    Returns
    -------
    ndarray of str, shape (n_neuroids,)
        "" where there is no label.

    Raises
    ------
    SchemaError
        If the grid differs, or a label has no name.
    """
    values, names = _labels(source, like, hemisphere)
    if isinstance(lookup, Mapping):
        names = {int(k): str(v) for k, v in lookup.items()}
    elif lookup is not None:
        table = _read_tsv(Path(lookup))
        for column in ("index", "name"):
            if column not in table:
                raise SchemaError(f"{lookup} has no column {column!r}; it has "
                                  f"{', '.join(table.columns)}.")  # fmt: skip
        names = dict(zip(table["index"].astype(int).tolist(), table["name"].astype(str).tolist(),
                         strict=True))  # fmt: skip
    if not names:
        raise ConfigError(f"{source} holds no label names.", "Pass lookup=, a table of them.")
    index = values.astype(int)
    unnamed = sorted(set(index.tolist()) - set(names) - {0, -1})
    if unnamed:
        raise SchemaError(f"{source} has labels without a name: {unnamed[:10]}.",
                          "Add them to the lookup table.")  # fmt: skip
    found = {i: names.get(i, "") for i in set(index.tolist())}
    found = {i: "" if n.lower() in _NO_LABEL else n for i, n in found.items()}
    return np.array([found[i] for i in index.tolist()], dtype=str)


def add_rois(
    ds: xr.Dataset, rois: Mapping[str, PathLike | Mapping[str, PathLike] | NDArray[np.bool_]]
) -> xr.Dataset:
    """Add ROI masks, which may overlap, as ``roi_mask``; and as ``roi`` the first that holds.

    Parameters
    ----------
    ds : xarray.Dataset
        Responses.
    rois : mapping of name to file (as in `read_roi`) or bool array (n_neuroids,)
        In order of precedence for ``roi``. An ROI already there by that name is replaced.

    Returns
    -------
    xarray.Dataset
        A new Dataset.

    Raises
    ------
    SchemaError
        If a mask has the wrong length, or holds no neuroid.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    if "roi_mask" in ds:
        old = ds["roi_mask"]
        masks = {str(n): old.values[:, i] for i, n in enumerate(old["roi_name"].values)}
    for name, source in rois.items():
        mask = source if isinstance(source, np.ndarray) else read_roi(source, ds)
        if mask.shape != (ds.sizes["neuroid"],):
            raise SchemaError(f"The mask of {name!r} has shape {mask.shape}; there are "
                              f"{ds.sizes['neuroid']} neuroids.")  # fmt: skip
        if not mask.any():
            raise SchemaError(f"No neuroid lies in ROI {name!r} ({source}).",
                              "Check that it is in the space of the responses.")  # fmt: skip
        masks[name] = mask.astype(bool)
    roi = np.full(ds.sizes["neuroid"], "", dtype=object)
    for name in reversed(masks):
        roi[masks[name]] = name
    if "roi_mask" in ds:
        ds = ds.drop_dims("roi_name")
    ds = ds.assign_coords(roi=("neuroid", roi.astype(str)), roi_name=list(masks))
    return ds.assign(roi_mask=(("neuroid", "roi_name"), np.column_stack(list(masks.values()))))


def add_atlas(
    ds: xr.Dataset, source: PathLike | Mapping[str, PathLike], **options: Any
) -> xr.Dataset:
    """Add every label of an atlas that has neuroids as an ROI; `options` as in `read_atlas`."""
    labels = read_atlas(source, ds, **options)
    present = sorted(set(labels.tolist()) - {""})
    if not present:
        raise SchemaError(f"No neuroid has a label in {source}.",
                          "Check that it is in the space of the responses.")  # fmt: skip
    return add_rois(ds, {name: labels == name for name in present})


# --- grids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Where the values of an image stand: voxels of an affine, or vertices of two hemispheres."""

    kind: str
    affine: NDArray | None = None
    shape: tuple[int, ...] = ()
    n_vertices: dict[str, int] | None = None
    space: str = ""
    source: Path | None = None

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Path]]) -> _Grid:
        """Return the one grid of all runs, or raise with the names of two that differ."""
        first = runs[0]
        space = entities(next(iter(first.values()))).get("space", "")
        if "" in first:
            image = _load(first[""])
            if len(image.shape) not in (3, 4):
                raise SchemaError(f"{first[''].name} has {len(image.shape)} dimensions, not 4.")
            grid = cls("volume", np.asarray(image.affine), tuple(map(int, image.shape[:3])),
                       space=space, source=first[""])  # fmt: skip
            for run in runs[1:]:
                other = _load(run[""])
                grid.same(other.affine, tuple(other.shape[:3]), run[""])
            return grid
        sizes = {s: len(_surface(p)) for s, p in first.items()}
        for run in runs[1:]:
            for side, path in run.items():
                n = len(_surface(path))
                if n != sizes[side]:
                    raise SchemaError(f"{path.name} has {n} vertices, {first[side].name} has "
                                      f"{sizes[side]}.")  # fmt: skip
        return cls("surface", n_vertices={s: sizes.get(s, 0) for s in "LR"}, space=space)

    def same(self, affine: NDArray, shape: tuple[int, ...], path: PathLike) -> None:
        """Raise unless an image has this grid."""
        assert self.affine is not None
        mine = self.source.name if self.source else "the responses"
        if tuple(shape) != self.shape:
            raise SchemaError(
                f"{Path(path).name} has shape {tuple(map(int, shape))}, {mine} has {self.shape}.",
                "Resample one to the grid of the other.",
            )
        gap = float(np.abs(np.asarray(affine) - self.affine).max())
        if gap > 1e-3:
            raise SchemaError(
                f"{Path(path).name} and {mine} have different affines (largest difference "
                f"{gap:.4g} mm).",
                "Resample one to the grid of the other.",
            )

    def mask(self, mask: Any, first: Mapping[str, Path]) -> NDArray[np.bool_]:
        """Return which voxels (3-D) or vertices (1-D, left before right) are kept."""
        if isinstance(mask, np.ndarray):
            wanted = (
                self.shape if self.kind == "volume" else (sum((self.n_vertices or {}).values()),)
            )
            if mask.shape != wanted:
                raise SchemaError(f"The mask has shape {mask.shape}; expected {wanted}.")
            keep = mask.astype(bool)
        elif mask is not None and self.kind == "volume":
            image = _load(Path(mask))
            self.same(image.affine, tuple(image.shape[:3]), mask)
            keep = np.asarray(image.dataobj).reshape(self.shape) > 0
        elif mask is not None:
            if not isinstance(mask, Mapping):
                raise ConfigError("The mask of a surface is a mapping of 'L' and 'R' to files.")
            parts = []
            for side, n in (self.n_vertices or {}).items():
                part = _surface(Path(mask[side]))[:, 0] > 0 if side in mask else np.zeros(n, bool)
                if len(part) != n:
                    raise SchemaError(f"{mask[side]} has {len(part)} vertices, the images {n}.")
                parts.append(part)
            keep = np.concatenate(parts)
        elif self.kind == "volume":
            data = np.asarray(_load(first[""]).dataobj)
            keep = (np.nan_to_num(data.reshape(*self.shape, -1)) != 0).any(axis=-1)
        else:
            keep = np.concatenate(
                [(np.nan_to_num(_surface(first[s])) != 0).any(axis=1) if s in first else
                 np.zeros(n, bool) for s, n in (self.n_vertices or {}).items()]
            )  # fmt: skip
        if not keep.any():
            raise SchemaError("The mask holds no neuroid.", "Check its space and its values.")
        return keep

    def coords(self, keep: NDArray[np.bool_], good: NDArray[np.bool_]) -> dict[str, Any]:
        """Return the coordinates of the neuroids that are kept and good."""
        if self.kind == "volume":
            assert self.affine is not None
            ijk = np.argwhere(keep)[good]
            xyz = ijk @ self.affine[:3, :3].T + self.affine[:3, 3]
            # Left of x = 0 is the left hemisphere only where the midline is known to be there.
            known = self.space.startswith("MNI") or self.space == "Talairach"
            side = np.where(xyz[:, 0] < 0, "L", "R") if known else np.full(len(ijk), "")
            ids = [f"{i}_{j}_{k}" for i, j, k in ijk.tolist()]
            extra = {a: ijk[:, n] for n, a in enumerate("ijk")} | {
                a: xyz[:, n] for n, a in enumerate("xyz")
            }
        else:
            sizes = self.n_vertices or {}
            side = np.repeat(list(sizes), list(sizes.values()))[keep][good]
            vertex = np.concatenate([np.arange(n) for n in sizes.values()])[keep][good]
            ids = [f"{s}{v:05d}" for s, v in zip(side.tolist(), vertex.tolist(), strict=True)]
            extra = {"vertex": vertex}
        made: dict[str, Any] = {
            "neuroid_id": ("neuroid", np.array(ids, dtype=str)),
            "roi": ("neuroid", np.full(len(ids), "", dtype="<U1")),
            "hemisphere": ("neuroid", side.astype(str)),
        }
        for name, values in extra.items():
            made[name] = ("neuroid", values, {"units": "mm"} if name in "xyz" else {})
        return made

    def attrs(self) -> dict[str, Any]:
        """Return the attrs that let maps be written on this grid again."""
        if self.kind == "volume":
            assert self.affine is not None
            return {
                "space": self.space,
                "affine": [float(a) for a in self.affine.ravel()],
                "volume_shape": list(self.shape),
            }
        sizes = self.n_vertices or {}
        space = self.space or ("fsaverage5" if set(sizes.values()) == {10242} else "")
        return {"space": space, "n_vertices": [sizes.get("L", 0), sizes.get("R", 0)]}


def _finish(
    out: NDArray,
    table: pd.DataFrame,
    grid: _Grid,
    keep: NDArray[np.bool_],
    subject: str,
    bad: Bad,
    saturated: list[Marks],
    units: str,
) -> xr.Dataset:
    session, run = (table[c].to_numpy(np.int64) for c in ("session", "run"))
    good, attrs = _judge(out, bad, saturated, grid, keep, session, run)
    ds = xr.Dataset(
        {"responses": (("presentation", "neuroid"), out if good.all() else out[:, good])},
        coords={**_presentation_coords(table, subject), **grid.coords(keep, good)},
        attrs={**grid.attrs(), **attrs, "units": units, "subject": subject},
    )
    return validate(ds, "responses")


def _presentation_coords(table: pd.DataFrame, subject: str) -> dict[str, Any]:
    return {
        "stimulus_id": ("presentation", table["stimulus_id"].to_numpy(str)),
        **{
            c: ("presentation", table[c].to_numpy(np.int64))
            for c in ("repetition", "session", "run")
        },
        "subject": ("presentation", np.full(len(table), subject)),
    }


def _judge(
    out: NDArray,
    bad: Bad,
    marks: list[Marks],
    grid: _Grid,
    keep: NDArray[np.bool_],
    session: NDArray[np.int64],
    run: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    missing = ~np.isfinite(out).all(axis=0)
    constant = ~missing & (out.max(axis=0) == out.min(axis=0)) & (len(out) > 1)
    row, neuroid = (np.concatenate([m[i] for m in marks]).astype(np.intp) for i in (0, 1))
    saturated = np.zeros(out.shape[1], dtype=bool)
    saturated[neuroid] = True
    faults = {
        "with NaN or infinite values": missing,
        "constant": constant,
        "stored at the limit of their integer type": saturated,
    }
    wrong = missing | constant | saturated
    parts = [f"{int(v.sum())} {k}" for k, v in faults.items() if v.any()]
    where = "".join(
        f" {title} by run: {text}."
        for title, text in (
            ("Not finite", non_finite_by_run(out, session, run) if missing.any() else ""),
            ("At the limit", marked_by_run(row, neuroid, session, run) if len(row) else ""),
        )
        if text
    )
    if wrong.any() and bad == "raise":
        first = grid.coords(keep, wrong)["neuroid_id"][1][0]
        raise SchemaError(
            f"Of {len(wrong)} neuroids, {' and '.join(parts)} (first: {first}).{where}",
            "Pass bad='exclude' to leave them out, or a mask without them.",
        )
    if wrong.all():
        raise SchemaError(f"No neuroid is left: all are constant or hold NaN.{where}")
    if wrong.any():
        logger.warning("Excluded %d of %d neuroids: %s.%s",
                       wrong.sum(), len(wrong), ", ".join(parts), where)  # fmt: skip
    dead = constant_runs(out, session, run)
    if dead:
        raise SchemaError(
            f"All volumes are the same in {len(dead)} of {len(set(zip(session, run, strict=True)))}"
            f" runs: {', '.join(dead[:5])}{' ...' if len(dead) > 5 else ''}.",
            "Leave these runs out: they were cut short or padded.",
        )
    still = constant_by_run(out, session, run)
    if still:
        logger.warning("Neuroids that are constant within a run: %s.", still)
    return ~wrong, {
        "excluded_nan": int(missing.sum()),
        "excluded_constant": int(constant.sum()),
        "excluded_saturated": int(saturated.sum()),
    }


def _policy(bad: str) -> None:
    if bad not in ("raise", "exclude"):
        raise ConfigError(f"bad must be 'raise' or 'exclude'; got {bad!r}.")


# --- files ----------------------------------------------------------------------------------------


def _missing_file(folder: Path, names: Sequence[str]) -> None:
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise UnavailableError(
        f"Found no {' or '.join(names)} in {folder}; there are: "
        f"{', '.join(there[:8]) or 'no files'}.{near(names[0], there)}"
    )


def _load(path: Path) -> Any:
    import nibabel as nib

    if not path.exists():
        _missing_file(path.parent, [path.name])
    try:
        return nib.load(path)
    except nib.filebasedimages.ImageFileError as error:
        raise SchemaError(f"{path} is no image that can be read: {error}") from error


def _surface(path: Path) -> NDArray:
    """Return the values of a surface file, shape (vertex, map)."""
    import nibabel as nib

    image = _load(path)
    if isinstance(image, nib.gifti.GiftiImage):
        if not image.darrays:
            raise SchemaError(f"{path} holds no data.")
        parts = [np.asarray(d.data) for d in image.darrays]
        return parts[0] if parts[0].ndim == 2 else np.stack(parts, axis=1)
    data = np.asarray(image.dataobj)
    return data.reshape(int(np.prod(data.shape[:3])), -1)


def _as_runs(images: Images) -> list[dict[str, Path]]:
    def several(value: Any) -> list[Path]:
        return [Path(value)] if isinstance(value, str | Path) else [Path(v) for v in value]

    if isinstance(images, Mapping):
        sides = {str(k): several(v) for k, v in images.items()}
        unknown = set(sides) - {"L", "R"}
        if unknown or not sides:
            raise ConfigError(f"Hemispheres are 'L' and 'R'; got {sorted(unknown) or 'none'}.")
        if len({len(v) for v in sides.values()}) > 1:
            counts = ", ".join(f"{k} has {len(v)}" for k, v in sides.items())
            raise SchemaError(f"Hemispheres differ in their number of runs: {counts}.")
        n = len(next(iter(sides.values())))
        runs = [{s: sides[s][i] for s in sorted(sides)} for i in range(n)]
    else:
        runs = [{"": p} for p in several(images)]
        surfaces = [r[""].name for r in runs if r[""].suffix == ".gii"]
        if surfaces:
            raise ConfigError(f"{surfaces[0]} is a surface.",
                              "Pass a mapping: {'L': left files, 'R': right files}.")  # fmt: skip
    if not runs:
        raise UnavailableError("No image was given.", "Name at least one file.")
    for run in runs:
        for path in run.values():
            if not path.exists():
                _missing_file(path.parent, [path.name])
    return runs


def _n_volumes(run: Mapping[str, Path]) -> int:
    if "" in run:
        shape = _load(run[""]).shape
        return int(shape[3]) if len(shape) == 4 else 1
    counts = {s: _surface(p).shape[1] for s, p in run.items()}
    if len(set(counts.values())) > 1:
        raise SchemaError("Hemispheres of one run differ in their number of maps: " + ", ".join(
            f"{run[s].name} has {n}" for s, n in counts.items()) + ".")  # fmt: skip
    return next(iter(counts.values()))


def _factor(path: Path, dtype: np.dtype, slope: float | None, scale: float | None) -> float:
    if scale is not None:
        if not np.isfinite(scale) or scale == 0:
            raise ConfigError(f"scale must be a finite number other than 0; got {scale}.")
        return float(scale)
    if dtype.kind in "iu" and slope is None:
        raise ConfigError(
            f"{path.name} stores betas as {dtype} without a scale of its own.",
            "Pass scale= (1/300 for the Natural Scenes Dataset; 1 if the integers are the betas).",
        )
    return 1.0


def _at_limit(flat: NDArray, dtype: np.dtype, *, scaled: bool = False) -> Marks:
    """Return volume and neuroid of the values (neuroid, volume) that stand at a limit of a type."""
    volume, neuroid = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        for limit in {limits.min, limits.max} - {0}:
            n, v = np.nonzero(flat == limit)
            # Who writes with a scale of its own maps the largest value to the limit: one is there.
            if len(n) > int(scaled):
                volume.append(v)
                neuroid.append(n)
    return np.concatenate(volume), np.concatenate(neuroid)


def _values(
    run: Mapping[str, Path], keep: NDArray[np.bool_], scale: float | None
) -> tuple[NDArray, Marks]:
    """Return (volume, neuroid) values as float32, and which are at the limit of their type."""
    if "" not in run:
        import nibabel as nib

        parts = []
        for side in "LR":
            if side in run:
                image = _load(run[side])
                assert isinstance(image, nib.gifti.GiftiImage)
                parts.append(_surface(run[side]))
        data = np.concatenate(parts)
        if len(data) != len(keep):
            raise SchemaError(f"The images have {len(data)} vertices, the mask {len(keep)}.")
        factor = _factor(next(iter(run.values())), data.dtype, None, scale)
        flat = data[keep]
        return flat.T.astype(np.float32) * np.float32(factor), _at_limit(flat, data.dtype)
    image = _load(run[""])
    proxy = image.dataobj
    dtype = np.dtype(image.get_data_dtype())
    scaled = (float(proxy.slope), float(proxy.inter)) != (1.0, 0.0)
    factor = _factor(run[""], dtype, 1.0 if scaled else None, scale)
    raw = np.asarray(proxy.get_unscaled()).reshape(*keep.shape, -1)[keep]
    full = _at_limit(raw, dtype, scaled=scaled)
    flat = raw.T.astype(np.float32)
    if scaled:
        flat = flat * np.float32(proxy.slope) + np.float32(proxy.inter)
    return flat * np.float32(factor), full


def _repetition_time(run: Mapping[str, Path]) -> float:
    path = next(iter(run.values()))
    sidecar = path.with_name(re.sub(r"(\.nii\.gz|\.nii|\.func\.gii|\.gii)$", ".json", path.name))
    if sidecar.exists():
        value = json.loads(sidecar.read_text(encoding="utf-8")).get("RepetitionTime")
        if isinstance(value, int | float) and value > 0:
            return float(value)
    if "" in run:
        zooms = _load(path).header.get_zooms()
        if len(zooms) == 4 and zooms[3] > 0:
            return float(zooms[3])
    raise ConfigError(
        f"Neither {sidecar.name} nor the header of {path.name} has a repetition time.",
        "Pass tr= in s.",
    )


class _open_betas:
    """Open single-trial betas lazily: yields the array and whether its axes are reversed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def __enter__(self) -> tuple[Any, bool]:
        if self.path.suffix == ".npy":
            try:
                return np.load(self.path, mmap_mode="r", allow_pickle=False), False
            except ValueError as error:
                raise SchemaError(
                    f"{self.path.name} holds Python pickles, which are never loaded: they can run "
                    "any code.",
                    "Let GLMsingle write HDF5 (wanthdf5=1), or save its 'betasmd' alone with "
                    "numpy.save.",
                ) from error
        import h5py

        try:
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise SchemaError(
                f"{self.path.name} is no HDF5 file.",
                "Save MATLAB files with -v7.3.",
            ) from error
        for key, reverse in (("betasmd", False), ("modelmd", True), ("betas", True)):
            if isinstance(self.file.get(key), h5py.Dataset):
                return self.file[key], reverse
        known = list(self.file)
        self.file.close()
        raise SchemaError(
            f"{self.path.name} has no dataset 'betasmd', 'modelmd' or 'betas'; it has {known}."
        )

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()


# --- tables ---------------------------------------------------------------------------------------


def _read_tsv(path: Path) -> pd.DataFrame:
    if not path.exists():
        _missing_file(path.parent, [path.name])
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values=["n/a"], dtype=object)


def _missing(values: pd.Series) -> pd.Series:
    return values.isna() | (values.astype(str).str.strip() == "")


def _stimulus_column(table: pd.DataFrame, wanted: str | None, where: str) -> str:
    columns = [str(c) for c in table.columns]
    if wanted is not None:
        if wanted not in columns:
            raise UnknownNameError(
                f"{where} has no column {wanted!r}.{near(wanted, columns)}",
                f"It has {', '.join(columns)}.",
            )
        return wanted
    for name in _STIMULUS_COLUMNS:
        if name in columns:
            return name
    raise SchemaError(
        f"{where} has none of the columns {', '.join(_STIMULUS_COLUMNS)}; it has "
        f"{', '.join(columns)}.",
        "Name the one that holds the stimulus with stimulus_column=.",
    )


def _natural(label: str) -> tuple[tuple[int, int | str], ...]:
    return tuple(
        (0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", str(label)) if p
    )


def _as_numbers(labels: Iterable[Any]) -> list[int]:
    """Return session or run labels as numbers: their digits, or else their place in order."""
    texts = [str(v) for v in labels]
    unique = sorted(set(texts), key=_natural)
    digits = [re.sub(r"\D", "", u.removesuffix(".0")) for u in unique]
    if all(digits) and len({int(d) for d in digits}) == len(unique):
        number = {u: int(d) for u, d in zip(unique, digits, strict=True)}
    else:
        number = {u: i + 1 for i, u in enumerate(unique)}
    return [number[t] for t in texts]


def _numbers(runs: Sequence[Mapping[str, Path]]) -> list[tuple[int, int]]:
    """Return session and run numbers of the images, from their names or their order."""
    named = [entities(next(iter(r.values()))) for r in runs]
    session = _as_numbers([e.get("ses", "1") for e in named])
    if all("run" in e for e in named):
        run = _as_numbers([e["run"] for e in named])
    else:
        run = [session[: i + 1].count(s) for i, s in enumerate(session)]
    pairs = list(zip(session, run, strict=True))
    if len(set(pairs)) < len(pairs):
        run = [session[: i + 1].count(s) for i, s in enumerate(session)]
    return list(zip(session, run, strict=True))


def _tables(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    listed = [tables] if isinstance(tables, str | Path | pd.DataFrame) else list(tables)
    return [
        ("the table", t) if isinstance(t, pd.DataFrame) else (Path(t).name, _read_tsv(Path(t)))
        for t in listed
    ]


def _trial_table(
    trials: Tables,
    runs: Sequence[Mapping[str, Path]],
    counts: Sequence[int],
    stimulus_column: str | None,
) -> pd.DataFrame:
    """Return stimulus_id, session, run and repetition of every volume, or raise."""
    named = _tables(trials)
    files = [next(iter(r.values())).name for r in runs]
    if len(named) not in (1, len(runs)):
        raise SchemaError(f"There are {len(named)} tables for {len(runs)} images.",
                          "Give one table per image, or one for all.")  # fmt: skip
    if len(named) == 1:
        files, sizes = [files[0] if len(runs) == 1 else f"{len(runs)} images"], [sum(counts)]
    else:
        sizes = list(counts)
    rows = []
    for (where, table), file, n in zip(named, files, sizes, strict=True):
        name = _stimulus_column(table, stimulus_column, where)
        present = ~_missing(table[name].astype(object))
        if int(present.sum()) != n:
            without = int((~present).sum())
            note = f" ({without} more without)" if without else ""
            raise SchemaError(
                f"{file} has {n} volumes, but {where} has {int(present.sum())} rows with a "
                f"stimulus in {name!r}{note}.",
                "There must be one row per volume, in the same order.",
            )
        chosen = table[present].reset_index(drop=True)
        row = pd.DataFrame({"stimulus_id": chosen[name].astype(str)})
        for column in ("session", "run"):
            row[column] = chosen[column].astype(str) if column in chosen else None
        rows.append(row)
    frame = pd.concat(rows, ignore_index=True)
    volume = np.repeat(np.arange(len(runs)), counts)
    from_images = np.array(_numbers(runs))[volume]
    if len(runs) > 1 and max(counts) == 1 and "run" not in entities(next(iter(runs[0].values()))):
        from_images[:, 1] = 1  # One image per trial: their number is no run.
    for i, column in enumerate(("session", "run")):
        empty = frame[column].isna().any()
        frame[column] = from_images[:, i] if empty else _as_numbers(frame[column])
    frame["repetition"] = frame.groupby("stimulus_id").cumcount() + 1
    return frame


def _event_tables(events: Tables, order: Sequence[tuple[int, int]]) -> list[pd.DataFrame]:
    named = [t for _, t in _tables(events)]
    if len(named) == len(order) and (len(named) > 1 or "run" not in named[0]):
        return named
    if len(named) != 1:
        raise SchemaError(f"There are {len(named)} events tables for {len(order)} runs.")
    table = named[0]
    if "run" not in table:
        raise SchemaError(f"One events table serves {len(order)} runs, but has no column 'run'.",
                          "Add it (and 'session'), or give one table per run.")  # fmt: skip
    run = np.array(_as_numbers(table["run"]))
    session = (
        np.array(_as_numbers(table["session"])) if "session" in table
        else np.full(len(table), order[0][0])
    )  # fmt: skip
    out = []
    for s, r in order:
        part = table[(session == s) & (run == r)]
        if len(part) == 0:
            raise SchemaError(f"Session {s}, run {r} has no events.")
        out.append(part.reset_index(drop=True))
    return out


def _table_of(e: Mapping[str, str], tables: Sequence[Path], order: Sequence[str]) -> Path | None:
    """Return the table whose entities are all those of the image, the most specific first."""
    best: tuple[tuple[int, int], Path] | None = None
    for path in tables:
        own = {k: v for k, v in entities(path).items() if k not in ("desc", "space", "res", "hemi")}
        if any(e.get(k) != v for k, v in own.items()):
            continue
        rank = (-len(own), list(order).index(path.stem.split("_")[-1]))
        if best is None or rank < best[0]:
            best = (rank, path)
    return None if best is None else best[1]


def _brain_mask(root: Path, runs: Sequence[Run]) -> NDArray[np.bool_] | None:
    """Return the voxels inside all brain masks of the runs' space, or None where there are none."""
    if "" not in runs[0].images:
        return None
    e = runs[0].entities
    found = [
        p for p in sorted(root.rglob(f"sub-{e['sub']}_*_mask.nii*"))
        if entities(p).get("desc") == "brain"
        and all(entities(p).get(k) == e.get(k) for k in ("space", "res"))
    ]  # fmt: skip
    if not found:
        return None
    grid = _Grid.of([{"": runs[0].images[""]}])
    return np.logical_and.reduce([grid.mask(p, {}) for p in found])


def _subject_of(path: Path) -> str:
    for part in reversed(path.parts[:-1]):
        if part.startswith("sub-"):
            return part.removeprefix("sub-")
    return ""


def _names(paths: Sequence[Path], n: int = 4) -> str:
    text = ", ".join(p.name for p in paths[:n])
    return text + (f" and {len(paths) - n} more" if len(paths) > n else "")


# --- labels ---------------------------------------------------------------------------------------


def _side(path: Path, given: str | None) -> str:
    if given in ("L", "R"):
        return given
    name = path.name
    found = entities(path).get("hemi", "")[:1].upper()
    if found in ("L", "R") and found:
        return found
    match = re.match(r"(lh|rh)[._]", name) or re.search(r"[._](L|R|lh|rh)[._]", name)
    if match:
        return match.group(1)[0].upper()
    raise ConfigError(f"The name of {name} does not tell its hemisphere.",
                      "Pass hemisphere='L' or 'R', or a mapping of both.")  # fmt: skip


def _labels(
    source: PathLike | Mapping[str, PathLike], like: xr.Dataset, hemisphere: str | None
) -> tuple[NDArray, dict[int, str]]:
    """Return the label value of each neuroid, and the names the files hold."""
    if isinstance(source, Mapping):
        values = np.zeros(like.sizes["neuroid"])
        names: dict[int, str] = {}
        for side, path in source.items():
            part, own = _labels(path, like, side)
            here = like["hemisphere"].values == side
            clash = [k for k in names if k in own and own[k] != names[k]]
            if clash:
                raise SchemaError(f"Label {clash[0]} is {names[clash[0]]!r} on one side and "
                                  f"{own[clash[0]]!r} on the other.")  # fmt: skip
            values[here] = part[here]
            names |= own
        return values, names
    path = Path(source)
    if not path.exists():
        _missing_file(path.parent, [path.name])
    if path.name.endswith((".nii", ".nii.gz")):
        if "affine" not in like.attrs:
            raise SchemaError(f"{path.name} is a volume, but the responses are not.")
        grid = _Grid("volume", np.reshape(like.attrs["affine"], (4, 4)),
                     tuple(int(n) for n in like.attrs["volume_shape"]))  # fmt: skip
        image = _load(path)
        grid.same(image.affine, tuple(image.shape[:3]), path)
        data = np.nan_to_num(np.asarray(image.dataobj)).reshape(*grid.shape, -1)[..., 0]
        return data[tuple(like[a].values for a in "ijk")], {}
    if "vertex" not in like.coords:
        raise SchemaError(f"{path.name} is a surface, but the responses are not.")
    import nibabel as nib

    side = _side(path, hemisphere)
    here = like["hemisphere"].values == side
    vertex = like["vertex"].values[here].astype(int)
    expected = {"L": 0, "R": 1}[side]
    size = int(np.ravel(like.attrs["n_vertices"])[expected]) if "n_vertices" in like.attrs else None
    names = {}
    if path.suffix == ".label":
        inside = nib.freesurfer.read_label(path)
        size = size or int(max(inside.max(initial=0), vertex.max(initial=0))) + 1
        if len(inside) and inside.max() >= size:
            raise SchemaError(
                f"{path.name} names vertex {inside.max()}; the responses have {size}."
            )
        data = np.zeros(size)
        data[inside] = 1
    elif path.suffix == ".annot":
        data, _, raw = nib.freesurfer.read_annot(path)
        names = {i: n.decode() for i, n in enumerate(raw)}
    else:
        data = _surface(path)[:, 0]
        table = getattr(_load(path), "labeltable", None)
        names = dict(table.get_labels_as_dict()) if table is not None else {}
    data = np.nan_to_num(data)
    if (size is not None and len(data) != size) or vertex.max(initial=-1) >= len(data):
        raise SchemaError(
            f"{path.name} has {len(data)} vertices; the responses' hemisphere has "
            f"{size if size is not None else vertex.max() + 1}.",
            "Use a file on the same mesh.",
        )
    values = np.zeros(like.sizes["neuroid"])
    values[here] = data[vertex]
    return values, names
