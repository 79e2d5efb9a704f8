"""Recordings over time from EEG and intracranial EEG: through MNE and MNE-BIDS into `responses`.

What BIDS says in sidecar files (types and status of channels, positions of electrodes) is matched
by the channels' names, so that rows without a signal, and signals without a row, do no harm.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.schema import validate
from brainalign.errors import (
    MissingDependencyError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
    near,
)

__all__ = [
    "from_array",
    "from_raw",
    "join_runs",
    "read_bids_recording",
    "read_channels",
    "read_electrodes",
    "read_raw",
    "standard_positions",
]

#: Kinds of channels that record the brain, as MNE names them.
KINDS = ("eeg", "ecog", "seeg", "dbs")
#: Millimetres of the units that BIDS allows for positions.
_MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0}


def from_array(
    data: NDArray[Any],
    names: Sequence[str],
    sampling_rate: float,
    *,
    subject: str,
    session: int = 0,
    run: int = 0,
    units: str = "uV",
    electrodes: pd.DataFrame | None = None,
    status: Sequence[str] | None = None,
    bad: NDArray[np.bool_] | None = None,
    space: str | None = None,
) -> xr.Dataset:
    """Return one run of a recording as responses.

    Parameters
    ----------
    data : array, shape (n_times, n_channels)
        Samples, in `units`.
    names : sequence of str, shape (n_channels,)
        Names of the channels.
    sampling_rate : float
        Hz.
    subject : str
        Whose.
    session, run : int
        Numbers, at least 0.
    units : str
        Unit of the data.
    electrodes : DataFrame, optional
        Index: names; columns ``x``, ``y``, ``z`` in mm; see `read_electrodes`.
    status : sequence of str, optional
        ``good`` or ``bad``, for each channel.
    bad : array of bool, shape (n_times,), optional
        Samples marked as bad.
    space : str, optional
        Space of the positions. In a template's (``MNI...``, ``fsaverage``) the sign of x tells the
        hemisphere.

    Returns
    -------
    Dataset
        Schema ``responses`` (time, neuroid), float32; on neuroid ``electrode``, ``status`` and
        ``x y z`` (NaN where unknown); on time ``session``, ``run`` and ``bad``.

    Raises
    ------
    SchemaError
        If names and data do not go together.
    """
    if data.ndim != 2 or data.shape[1] != len(names):
        raise SchemaError(
            f"{subject}: the recording has shape {data.shape} for {len(names)} channels; expected "
            "(n_times, n_channels)."
        )
    n, names = len(data), [str(c) for c in names]
    hemisphere = np.full(len(names), "", dtype="U1")
    coords: dict[str, Any] = {
        "session": ("time", np.full(n, session)),
        "run": ("time", np.full(n, run)),
        "bad": ("time", np.zeros(n, dtype=bool) if bad is None else np.asarray(bad, dtype=bool)),
        "subject": subject,
        "neuroid_id": ("neuroid", names),
        "electrode": ("neuroid", names),
        "roi": ("neuroid", np.full(len(names), "", dtype="U1")),
        "status": ("neuroid", ["good"] * len(names) if status is None else list(status)),
    }
    attrs: dict[str, Any] = {
        "units": units,
        "sampling_rate": float(sampling_rate),
        "subject": subject,
    }
    if electrodes is not None:
        xyz = electrodes.reindex(names)[["x", "y", "z"]].to_numpy(dtype=np.float64)
        coords |= {a: ("neuroid", xyz[:, i], {"units": "mm"}) for i, a in enumerate("xyz")}
        attrs["space"] = space or "unknown"
        if str(space).startswith(("MNI", "fsaverage")):
            hemisphere = np.select([xyz[:, 0] < 0, xyz[:, 0] > 0], ["L", "R"], "")
    coords["hemisphere"] = ("neuroid", hemisphere)
    ds = xr.Dataset(
        {"responses": (("time", "neuroid"), np.asarray(data, dtype=np.float32))},
        coords=coords,
        attrs=attrs,
    )
    return validate(ds, "responses")


def from_raw(
    raw: Any,
    *,
    subject: str,
    session: int = 0,
    run: int = 0,
    kinds: Sequence[str] = KINDS,
    electrodes: pd.DataFrame | None = None,
    space: str | None = None,
) -> xr.Dataset:
    """Return an MNE recording as responses in microvolts.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        Any recording that MNE reads.
    subject, session, run
        As in `from_array`.
    kinds : sequence of str
        Kinds of channels to keep, as MNE names them.
    electrodes, space
        Positions; by default those of the recording's montage (mm, in MNE's head coordinates), if
        it has one.

    Returns
    -------
    Dataset
        See `from_array`. ``status`` is ``bad`` for the recording's bad channels; samples within
        annotations that start with ``BAD`` are ``bad``.

    Raises
    ------
    SchemaError
        If no channel is of these kinds.
    """
    found = raw.get_channel_types()
    picks = [i for i, kind in enumerate(found) if kind in kinds]
    if not picks:
        raise SchemaError(
            f"{subject}: no channel is of the kinds {', '.join(kinds)}; there are "
            f"{', '.join(sorted(set(found)))}.",
            "Say the kinds of the channels in channels.tsv, or with raw.set_channel_types.",
        )
    names = [raw.ch_names[i] for i in picks]
    if electrodes is None:
        at = np.array([raw.info["chs"][i]["loc"][:3] for i in picks]) * 1000
        # MNE writes zeros for a position that is not known.
        at[~np.isfinite(at).all(axis=1) | (at == 0).all(axis=1)] = np.nan
        if np.isfinite(at).any():
            electrodes = pd.DataFrame(at, index=names, columns=list("xyz"))
            space = space or "head"
    bad = np.zeros(raw.n_times, dtype=bool)
    rate = float(raw.info["sfreq"])
    for mark in raw.annotations:
        if str(mark["description"]).upper().startswith("BAD"):
            start = mark["onset"] - raw.first_time
            # 0.1 s at 100 Hz is sample 10, though 1 - 0.9 is less than 0.1.
            first = int(np.floor(round(start * rate, 6)))
            last = int(np.ceil(round((start + mark["duration"]) * rate, 6)))
            bad[max(0, first) : max(0, last)] = True
    return from_array(
        raw.get_data(picks).T * 1e6,
        names,
        rate,
        subject=subject,
        session=session,
        run=run,
        electrodes=electrodes,
        status=["bad" if name in raw.info["bads"] else "good" for name in names],
        bad=bad,
        space=space,
    )


def join_runs(runs: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join runs of one subject along time.

    Channels that are not in every run are left out; one that is bad in any run is bad.

    Raises
    ------
    SchemaError
        If rates differ, or no channel is in all runs.
    """
    if not runs:
        raise SchemaError("There are no runs to join.")
    rates = {float(r.attrs["sampling_rate"]) for r in runs}
    if len(rates) > 1:
        raise SchemaError(f"The runs have sampling rates {sorted(rates)} Hz; expected one rate.")
    shared = set.intersection(*(set(r["neuroid_id"].values.tolist()) for r in runs))
    if not shared:
        raise SchemaError("No channel is in all runs.")
    order = [c for c in runs[0]["neuroid_id"].values.tolist() if c in shared]
    aligned = []
    for r in runs:
        at = {c: i for i, c in enumerate(r["neuroid_id"].values.tolist())}
        aligned.append(r.isel(neuroid=[at[c] for c in order]))
    first = aligned[0]
    status = np.where(
        np.any([r["status"].values.astype(str) == "bad" for r in aligned], axis=0), "bad", "good"
    )
    over_time = [str(c) for c, v in first.coords.items() if v.dims == ("time",)]
    ds = xr.Dataset(
        {
            "responses": (
                ("time", "neuroid"),
                np.concatenate([r["responses"].values for r in aligned]),
            )
        },
        coords={
            **{c: ("time", np.concatenate([r[c].values for r in aligned])) for c in over_time},
            **{str(c): v for c, v in first.coords.items() if v.dims != ("time",)},
            "status": ("neuroid", status),
        },
        attrs=first.attrs,
    )
    return validate(ds, "responses")


def read_electrodes(path: str | Path) -> tuple[pd.DataFrame, str]:
    """Read positions from a BIDS ``electrodes.tsv`` with the ``coordsystem.json`` beside it.

    Parameters
    ----------
    path : path
        ``sub-01_space-MNI152NLin2009aSym_electrodes.tsv``.

    Returns
    -------
    electrodes : DataFrame
        Index: names; ``x y z`` in mm, NaN where not known, and the file's other columns.
    space : str
        The coordinate system as the JSON file names it, else the file's ``space`` entity, else
        ``unknown``.

    Raises
    ------
    UnavailableError
        If the file is not there.
    SchemaError
        If columns are missing, names repeat, or the unit is not known.
    """
    path = Path(path)
    table = _read_tsv(path)
    missing = [c for c in ("name", "x", "y", "z") if c not in table]
    if missing:
        raise SchemaError(f"{path.name} has no column {missing[0]!r}: {', '.join(table.columns)}.")
    table = table.set_index("name")
    if table.index.duplicated().any():
        raise SchemaError(f"{path.name}: {table.index[table.index.duplicated()][0]!r} repeats.")
    described = path.with_name(path.name.replace("_electrodes.tsv", "_coordsystem.json"))
    system = json.loads(described.read_text()) if described.is_file() else {}
    space, unit = "", "mm"
    for kind in ("iEEG", "EEG"):
        space = space or system.get(f"{kind}CoordinateSystem", "")
        unit = system.get(f"{kind}CoordinateUnits", unit)
    if unit not in _MM:
        raise SchemaError(f"{described.name}: positions are in {unit!r}; expected mm, cm or m.")
    if space.lower() in ("", "other", "n/a"):
        entity = [p for p in path.name.split("_") if p.startswith("space-")]
        space = entity[0].removeprefix("space-") if entity else "unknown"
    for axis in "xyz":
        table[axis] = pd.to_numeric(table[axis], errors="coerce") * _MM[unit]
    return table, space


def read_channels(path: str | Path) -> pd.DataFrame:
    """Read a BIDS ``channels.tsv``: index names; ``type`` and ``status`` in lower case.

    Raises
    ------
    UnavailableError
        If the file is not there.
    SchemaError
        If columns are missing.
    """
    table = _read_tsv(Path(path))
    missing = [c for c in ("name", "type") if c not in table]
    if missing:
        raise SchemaError(f"{Path(path).name} has no column {missing[0]!r}.")
    if "status" not in table:
        table["status"] = "good"
    table["type"] = table["type"].str.lower()
    table["status"] = table["status"].str.lower()
    return table.drop_duplicates("name").set_index("name")


def read_bids_recording(
    root: str | Path,
    subject: str,
    task: str,
    *,
    datatype: str = "ieeg",
    space: str | None = None,
    kinds: Sequence[str] = KINDS,
) -> tuple[xr.Dataset, pd.DataFrame]:
    """Read all runs of a subject's recording from a BIDS folder.

    Parameters
    ----------
    root : path
        Folder with ``dataset_description.json`` or at least ``sub-*``.
    subject, task : str
        Entities, without ``sub-`` and ``task-``.
    datatype : {"ieeg", "eeg"}
        Which recording.
    space : str, optional
        Which ``electrodes.tsv``, by its entity. Default: one of a template (MNI...) if there is
        one, else the first.
    kinds : sequence of str
        Kinds of channels to keep.

    Returns
    -------
    responses : Dataset
        See `from_array`; ``session`` and ``run`` count from 0 in the order of the files' names.
    events : DataFrame
        Rows of all ``events.tsv`` with ``session`` and ``run``; ``onset`` and ``duration`` in s
        from the start of the run.

    Raises
    ------
    MissingDependencyError
        If MNE or MNE-BIDS is not installed.
    UnavailableError
        If there is no such recording.
    UnknownNameError
        If there are no positions in that space.
    """
    mne_bids = _package("mne_bids", "mne-bids")
    subject = subject.removeprefix("sub-")
    if not Path(root).is_dir():
        raise UnavailableError(f"There is no folder {root}.")
    found = mne_bids.BIDSPath(
        root=root, subject=subject, task=task, datatype=datatype, suffix=datatype, check=False
    ).match()
    # One recording may be several files.
    headers = [p for p in found if p.extension not in (".json", ".eeg", ".vmrk", ".fdt", ".tsv")]
    headers.sort(key=lambda p: str(p.fpath))
    if not headers:
        raise UnavailableError(
            f"{root} holds no {datatype} recording of sub-{subject}, task {task}.",
            f"Expected sub-{subject}[/ses-*]/{datatype}/sub-{subject}_*task-{task}_*_{datatype}.*.",
        )
    sessions = sorted({str(p.session) for p in headers})
    runs, tables = [], []
    for k, path in enumerate(headers):
        with warnings.catch_warnings():
            # What differs between signal and sidecar files is matched by name below.
            warnings.simplefilter("ignore", RuntimeWarning)
            raw = mne_bids.read_raw_bids(path, on_ch_mismatch="warn", verbose="error")
        side = Path(path.fpath).name.removesuffix(f"_{datatype}{path.extension}")
        folder = Path(path.fpath).parent
        if (folder / f"{side}_channels.tsv").is_file():
            _apply_channels(raw, folder / f"{side}_channels.tsv", kinds)
        positions = _positions(folder, side, space)
        electrodes, where = (None, None) if positions is None else read_electrodes(positions)
        session = sessions.index(str(path.session))
        runs.append(
            from_raw(
                raw,
                subject=f"sub-{subject}",
                session=session,
                run=k,
                kinds=kinds,
                electrodes=electrodes,
                space=where,
            )
        )
        events = folder / f"{side}_events.tsv"
        if events.is_file():
            tables.append(_read_tsv(events).assign(session=session, run=k))
    events_table = (
        pd.concat(tables, ignore_index=True)
        if tables
        else pd.DataFrame(columns=["onset", "duration", "session", "run"])
    )
    return join_runs(runs), events_table


def read_raw(
    path: str | Path, channels: str | Path | None = None, *, kinds: Sequence[str] = KINDS
) -> Any:
    """Open a recording with MNE (EDF, BDF, FIF, BrainVision ...), not yet reading its samples.

    Parameters
    ----------
    path : path
        The recording.
    channels : path, optional
        A BIDS ``channels.tsv`` that tells types and status of its channels.
    kinds : sequence of str
        Types that stay; all others become ``misc``.

    Returns
    -------
    mne.io.BaseRaw

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    UnavailableError
        If there is no such file.
    SchemaError
        If MNE cannot read it.
    """
    mne = _package("mne", "MNE")
    if not Path(path).exists():
        raise UnavailableError(f"There is no recording {path}.")
    try:
        with warnings.catch_warnings():
            # MNE's wishes about names of files.
            warnings.simplefilter("ignore", RuntimeWarning)
            raw = mne.io.read_raw(path, verbose="error")
    except (ValueError, OSError, RuntimeError) as error:
        raise SchemaError(f"{path} is no recording that MNE reads: {error}") from error
    if channels is not None:
        _apply_channels(raw, Path(channels), kinds)
    return raw


def standard_positions(montage: str = "biosemi64") -> pd.DataFrame:
    """Return the positions of a standard EEG montage of MNE: index names; ``x y z`` in mm.

    Raises
    ------
    MissingDependencyError
        If MNE is not installed.
    UnknownNameError
        If there is no such montage.
    """
    channels = _package("mne", "MNE").channels
    known = channels.get_builtin_montages()
    if montage not in known:
        raise UnknownNameError(
            f"There is no montage {montage!r}.{near(montage, known)}", f"Known: {', '.join(known)}."
        )
    at: Mapping[str, NDArray] = channels.make_standard_montage(montage).get_positions()["ch_pos"]
    return pd.DataFrame(np.stack(list(at.values())) * 1000, index=list(at), columns=list("xyz"))


def _apply_channels(raw: Any, path: Path, kinds: Sequence[str]) -> None:
    """Set types and status of the channels of a recording from its sidecar file."""
    table = read_channels(path)
    table = table.loc[[name for name in table.index if name in raw.ch_names]]
    types = {name: kind if kind in kinds else "misc" for name, kind in table["type"].items()}
    with warnings.catch_warnings():
        # The units of channels change with their type, which is meant.
        warnings.simplefilter("ignore", RuntimeWarning)
        raw.set_channel_types(types, verbose="error")
    bads = set(raw.info["bads"]) | set(table.index[table["status"] == "bad"])
    raw.info["bads"] = [name for name in raw.ch_names if name in bads]


def _positions(folder: Path, side: str, space: str | None) -> Path | None:
    """Return the ``electrodes.tsv`` of a recording, or None if there is none."""
    entities = [p for p in side.split("_") if p.startswith(("sub-", "ses-"))]
    paths = sorted(folder.glob("_".join([*entities, "*electrodes.tsv"])))
    by_space = {
        next((p for p in path.name.split("_") if p.startswith("space-")), "").removeprefix(
            "space-"
        ): path
        for path in paths
    }
    if space is not None:
        if space not in by_space:
            raise UnknownNameError(
                f"{folder} has no positions in the space {space!r}.{near(space, by_space)}",
                f"Spaces: {', '.join(by_space) or 'none'}.",
            )
        return by_space[space]
    templates = [p for s, p in by_space.items() if s.startswith(("MNI", "fsaverage"))]
    return next(iter([*templates, *paths]), None)


def _read_tsv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UnavailableError(f"There is no file {path}.")
    # Only what BIDS calls missing is: NA may be the name of an electrode.
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values=["n/a", ""])


def _package(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"Recordings of this kind need the package {package}.",
            'Install it: pip install "brainalign[auditory]".',
        ) from error
