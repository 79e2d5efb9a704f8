"""One's own recordings of listeners as a study: EEG-BIDS or iEEG-BIDS, and what was played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.electrophysiology import KINDS, read_bids_recording
from brainalign.data.schema import validate
from brainalign.data.sounds import read_sound
from brainalign.data.studies import LazyMapping, Study
from brainalign.errors import ConfigError, SchemaError, UnavailableError, near

__all__ = ["load"]


def load(
    root: str | Path,
    *,
    task: str,
    talkers: Mapping[str, str],
    attended: str | None = None,
    subjects: Sequence[str],
    datatype: str = "eeg",
    stimuli: str | Path = "stimuli",
    space: str | None = None,
    kinds: Sequence[str] = KINDS,
) -> Study:
    """Load trials of listening: what events tables say was played, and who was attended.

    A trial is a row of ``events.tsv`` that names a sound of every talker. It begins at the row's
    ``onset`` with the first sample of the sounds, and lasts for its ``duration``; without one, for
    as long as the shortest of the sounds. Rows without sounds are left out.

    Parameters
    ----------
    root : path
        The BIDS folder.
    task : str
        Entity, without ``task-``.
    talkers : mapping of str to str
        By the name of each talker, such as ``left``, the column of the events that holds the file
        of the sound.
    attended : str, optional
        The column that names the attended talker: a key of `talkers`, or the file. Not needed for
        one talker.
    subjects : sequence of str
        Labels, with or without ``sub-``.
    datatype : {"eeg", "ieeg"}
        Which recording.
    stimuli : path
        Folder of the sounds; relative paths start at the root.
    space, kinds
        As in `brainalign.data.electrophysiology.read_bids_recording`.

    Returns
    -------
    Study
        ``responses`` by subject as named, read when asked for: (time, neuroid), every trial a
        ``run``; on time also ``attended`` (the talker's number in the order of `talkers`),
        ``stimulus_id`` (the files, without regard to who said what) and ``recorded_run``, the run
        of the recording. ``extras``: ``talkers``, by subject, for each trial the (sound, rate) of
        each talker, cut to the recording.

    Raises
    ------
    ConfigError
        If arguments do not go together.
    UnavailableError
        If a recording or a sound is missing.
    SchemaError
        If the events lack a column, name no talker, or a trial does not fit into its recording or
        its sounds, or overlaps another one.
    """
    if datatype not in ("eeg", "ieeg"):
        raise ConfigError(f"datatype is {datatype!r}; expected 'eeg' or 'ieeg'.")
    if not talkers or (attended is None and len(talkers) > 1):
        raise ConfigError(
            f"There are {len(talkers)} talkers and attended is {attended!r}; expected at least one "
            "talker, and the column that names the attended one if there are several."
        )
    root = Path(root).expanduser()
    sounds = _Sounds(root / stimuli)

    # Responses and sounds are asked for one after the other.
    @lru_cache(maxsize=1)
    def read(subject: str) -> tuple[xr.Dataset, list[list[tuple[NDArray, float]]]]:
        recording, events = read_bids_recording(
            root, subject, task, datatype=datatype, space=space, kinds=kinds
        )
        return _trials(recording, events, talkers, attended, sounds)

    return Study(
        "bids_listening",
        responses=LazyMapping(subjects, lambda s: read(s)[0]),
        extras={"talkers": LazyMapping(subjects, lambda s: read(s)[1])},
    )


class _Sounds:
    """Sounds of a folder by their file, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[NDArray[np.float64], float]] = {}

    def __getitem__(self, file: str) -> tuple[NDArray[np.float64], float]:
        if file not in self._read:
            if not (self.folder / file).is_file():
                there = [p.name for p in self.folder.glob("*")] if self.folder.is_dir() else []
                raise UnavailableError(
                    f"There is no sound {file!r} in {self.folder}.{near(file, there)}",
                    "Paths of the events are relative to the folder of the stimuli.",
                )
            self._read[file] = read_sound(self.folder / file)
        return self._read[file]


def _trials(
    recording: xr.Dataset,
    events: pd.DataFrame,
    talkers: Mapping[str, str],
    attended: str | None,
    sounds: _Sounds,
) -> tuple[xr.Dataset, list[list[tuple[NDArray, float]]]]:
    subject = str(recording.attrs["subject"])
    columns = [*talkers.values(), *([] if attended is None else [attended])]
    lacking = [c for c in columns if c not in events]
    if lacking:
        raise SchemaError(
            f"The events of {subject} have no column {lacking[0]!r}."
            f"{near(lacking[0], map(str, events.columns))}",
            f"Columns: {', '.join(map(str, events.columns))}.",
        )
    played = events[events[list(talkers.values())].notna().all(axis=1)]
    if not len(played):
        raise SchemaError(f"No event of {subject} names a sound of every talker.")
    rate = float(recording.attrs["sampling_rate"])
    run = recording["run"].values
    rows, found, labels = [], [], []
    taken: NDArray[np.bool_] = np.zeros(len(run), dtype=bool)
    for event in played.sort_values(["run", "onset"]).to_dict("records"):
        where = f"{subject}, run {event['run']}, the event at {event['onset']} s"
        files = {name: str(event[column]) for name, column in talkers.items()}
        heard = [sounds[file] for file in files.values()]
        shortest = min(len(x) / r for x, r in heard)
        given: Any = event.get("duration", np.nan)
        lasts = pd.to_numeric(given, errors="coerce")
        seconds = float(lasts) if lasts > 0 else shortest
        own = np.flatnonzero(run == event["run"])
        start, n = round(float(event["onset"]) * rate), int(seconds * rate + 1e-6)
        if seconds > shortest or start < 0 or start + n > len(own) or n < 1:
            raise SchemaError(
                f"{where} lasts {seconds:g} s; its sounds have {shortest:g} s and the run "
                f"{len(own) / rate:g} s.",
                "Correct onset and duration, or leave duration n/a to take the whole sound.",
            )
        part = own[start : start + n]
        if taken[part].any():
            raise SchemaError(f"{where} overlaps the one before.", "Name a sound once a trial.")
        taken[part] = True
        rows.append(part)
        labels.append((_who(event, files, attended, where), "+".join(sorted(files.values()))))
        # A little more than the recording, so that features fill its last sample.
        found.append([(x[: round((n / rate + 1) * r)], r) for x, r in heard])
    sizes = [len(part) for part in rows]
    ds = recording.isel(time=np.concatenate(rows))
    ds = ds.assign_coords(
        recorded_run=("time", ds["run"].values),
        run=("time", np.repeat(np.arange(len(rows)), sizes)),
        attended=("time", np.repeat([who for who, _ in labels], sizes)),
        stimulus_id=("time", np.repeat([files for _, files in labels], sizes)),
    )
    return validate(ds, "responses"), found


def _who(
    event: Mapping[Any, Any], files: Mapping[str, str], attended: str | None, where: str
) -> int:
    """Return the number of the attended talker, who is named or whose sound is."""
    if attended is None:
        return 0
    said = str(event[attended])
    matches = [i for i, (name, file) in enumerate(files.items()) if said in (name, file)]
    if len(matches) != 1:
        raise SchemaError(
            f"{where} has {attended} {said!r}, which is no single talker of "
            f"{', '.join(f'{name} ({file})' for name, file in files.items())}."
        )
    return matches[0]
