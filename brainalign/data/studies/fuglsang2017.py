"""Fuglsang et al. 2017, the DTU data set: EEG of 18 people who attend one of two talkers."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.archives import fetch_archive, open_archive, zenodo
from brainalign.data.electrophysiology import from_array, join_runs, standard_positions
from brainalign.data.fetch import RemoteFile
from brainalign.data.schema import validate
from brainalign.data.store import sha256_of
from brainalign.data.studies import LazyMapping, Study, check_agreement, data_home, read_struct
from brainalign.errors import SchemaError, UnknownNameError, near

__all__ = [
    "BIBTEX",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "RECORD",
    "REGISTRY",
    "SUBJECTS",
    "TERMS",
    "TITLE",
    "fetch",
    "load",
]

TITLE = "EEG and audio for auditory attention decoding, DTU"
LICENCE = "As the Zenodo record states it, kept in registry.json beside the files"
TERMS = "Cite Fuglsang et al. 2017 and the Zenodo record 1199011."
MUST_AGREE = False
CITATION = (
    "Fuglsang SA, Dau T, Hjortkjaer J. Noise-robust cortical tracking of attended speech in "
    "real-world acoustic scenes. NeuroImage 2017;156:435-444. "
    "doi:10.1016/j.neuroimage.2017.04.026"
)
BIBTEX = """@article{fuglsang2017,
  author = {Fuglsang, S{\\o}ren Asp and Dau, Torsten and Hjortkj{\\ae}r, Jens},
  title = {Noise-Robust Cortical Tracking of Attended Speech in Real-World Acoustic Scenes},
  journal = {NeuroImage},
  volume = {156},
  pages = {435--444},
  year = {2017},
  doi = {10.1016/j.neuroimage.2017.04.026}
}
"""
FOLDER = "fuglsang2017"
#: Empty, as Zenodo's record publishes the hashes: `fetch` keeps them in registry.json.
REGISTRY: dict[str, RemoteFile] = {}
RECORD = 1199011
SUBJECTS = tuple(f"S{n}" for n in range(1, 19))

_DATA = "DATA_preproc.zip"


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the preprocessed EEG with its envelopes, one archive of 1.8 GB.

    See `brainalign.data.archives.fetch_archive`.
    """
    check_agreement(sys.modules[__name__], accept_terms)
    return fetch_archive(
        FOLDER,
        data_home() / FOLDER if folder is None else folder,
        lambda: zenodo(RECORD, [_DATA]),
        mirror=mirror,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None, *, subjects: Sequence[str] | None = None
) -> Study:
    """Load the authors' preprocessed EEG and envelopes, 64 Hz.

    Every trial (50 s, two talkers) is a run. The man is talker 0, the woman talker 1. The
    ``stimulus_id`` of a trial is a hash of both envelopes: trials that share it must stay on one
    side of a split.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the file. Default: the cache.
    subjects : sequence of str, optional
        ``S1`` ... ``S18``. Default: all in the archive.

    Returns
    -------
    Study
        ``responses`` by subject, read when asked for: (time, channels): the cap and the mastoids
        (EXG1, EXG2; no position), eye artefacts removed and average reference by the authors;
        coordinates on time: ``run``, ``attended``, ``stimulus_id``. ``extras["features"]``: by
        subject, the envelopes (gammatone filters, amplitude^0.3, mean of the bands; features
        schema with ``talker`` and ``space``), of the same samples.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its file differs from the published one.
    SchemaError
        A file is not laid out as published.

    References
    ----------
    ``preproc_data.m`` of Zenodo record 1199011, by which the files were made.
    """
    root, _ = open_archive("fuglsang2017", data_home() / FOLDER if folder is None else folder)
    with zipfile.ZipFile(root / _DATA) as archive:
        members = {
            Path(n).name.split("_")[0]: n
            for n in archive.namelist()
            if n.endswith("_data_preproc.mat")
        }
    there = [s for s in SUBJECTS if s in members]
    names = there if subjects is None else list(subjects)
    unknown = [s for s in names if s not in there]
    if unknown or not names:
        raise UnknownNameError(
            f"{_DATA} holds no subject {unknown[0] if unknown else 'at all'!r}."
            f"{near(unknown[0], there) if unknown else ''}",
            f"It holds {', '.join(there) or 'none'}.",
        )
    kept: dict[str, Any] = {}

    def data(subject: str) -> Any:
        # Responses and features of one subject are asked for in turn.
        if subject not in kept:
            kept.clear()
            with zipfile.ZipFile(root / _DATA) as archive:
                kept[subject] = read_struct(io.BytesIO(archive.read(members[subject])), "data")
        return kept[subject]

    return Study(
        "fuglsang2017",
        responses=LazyMapping(names, lambda s: _responses(data(s), s)),
        extras={"features": LazyMapping(names, lambda s: _features(data(s), s))},
    )


def _first(value: Any) -> Any:
    """Return what lies in a cell, or cells of cells, or is there itself."""
    while isinstance(value, np.ndarray) and value.dtype == object:
        value = value.flat[0]
    return value


def _cells(data: Any, name: str, subject: str) -> list[NDArray]:
    """Return one array a trial; a single trial comes without its cell."""
    found = getattr(data, name, None)
    if found is None:
        raise SchemaError(f"{subject}_data_preproc.mat: data has no field {name}.")
    cells = list(found) if np.asarray(found).dtype == object else [found]
    return [np.asarray(_first(c), dtype=np.float64) for c in cells]


def _trials(data: Any, subject: str) -> tuple[list[NDArray], list[list[NDArray]], list[int]]:
    """Return the EEG, the envelopes of the man and the woman, and who is attended, by trial."""
    eeg, a, b = (_cells(data, name, subject) for name in ("eeg", "wavA", "wavB"))
    events = np.ravel(data.event.eeg)
    values = (
        [_first(e.value) for e in events]
        if len(events) == len(eeg)
        else [_first(v) for v in np.ravel(events[0].value)]
    )
    attended = [int(np.ravel(v)[0]) for v in values]
    if not len(eeg) == len(a) == len(b) == len(attended) or not set(attended) <= {1, 2}:
        raise SchemaError(
            f"{subject}_data_preproc.mat: {len(eeg)} trials of EEG, {len(a)} and {len(b)} "
            f"envelopes, events {sorted(set(attended))}; expected as many of each, and events of 1 "
            "(the man is attended) and 2 (the woman)."
        )
    envelopes = []
    for k, who in enumerate(attended):
        # wavA is the attended talker, whoever that is.
        pair = [a[k].reshape(-1), b[k].reshape(-1)]
        if len({len(eeg[k]), *map(len, pair)}) > 1:
            raise SchemaError(
                f"{subject}_data_preproc.mat: trial {k + 1} has EEG of {len(eeg[k])} samples and "
                f"envelopes of {len(pair[0])} and {len(pair[1])}; expected one length."
            )
        envelopes.append(pair if who == 1 else pair[::-1])
    return eeg, envelopes, [who - 1 for who in attended]


def _rate(data: Any) -> float:
    return float(np.ravel(_first(data.fsample.eeg))[0])


def _responses(data: Any, subject: str) -> xr.Dataset:
    eeg, envelopes, attended = _trials(data, subject)
    names = np.asarray(data.dim.chan.eeg, dtype=object)
    while isinstance(names.flat[0], np.ndarray):
        names = np.asarray(names.flat[0], dtype=object)
    positions = standard_positions("biosemi64")
    runs = []
    for k, (x, pair, who) in enumerate(zip(eeg, envelopes, attended, strict=True)):
        run = from_array(
            x,
            [str(n) for n in names.ravel()],
            _rate(data),
            subject=subject,
            run=k,
            units="uV",
            electrodes=positions,
            space="head",
        )
        runs.append(
            run.assign_coords(
                attended=("time", np.full(len(x), who)),
                stimulus_id=("time", np.full(len(x), sha256_of(*pair)[:16])),
            )
        )
    return join_runs(runs)


def _features(data: Any, subject: str) -> xr.Dataset:
    _, envelopes, _ = _trials(data, subject)
    lengths = [len(pair[0]) for pair in envelopes]
    return validate(
        xr.Dataset(
            {
                "features": (
                    ("time", "feature"),
                    np.concatenate([np.stack(p, axis=1) for p in envelopes]).astype(np.float32),
                )
            },
            coords={
                "run": (
                    "time",
                    np.repeat(np.arange(len(lengths)), lengths),
                ),
                "talker": ("feature", [0, 1]),
                "space": ("feature", ["envelope"] * 2),
                "units": ("feature", ["amplitude^0.3"] * 2),
                "model": "sound",
                "layer": "envelope",
            },
            attrs={"sampling_rate": _rate(data)},
        ),
        "features",
    )
