"""Biesmans et al. 2016, the KU Leuven data set: EEG of 16 people who attend one of two stories."""

from __future__ import annotations

import io
import os
import re
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
from brainalign.data.sounds import read_sound
from brainalign.data.studies import LazyMapping, Study, check_agreement, data_home, read_struct
from brainalign.errors import SchemaError, UnavailableError, UnknownNameError, near

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
    "clean_story",
    "fetch",
    "load",
]

TITLE = "Auditory attention detection, KU Leuven"
LICENCE = "As the Zenodo record states it, kept in registry.json beside the files"
TERMS = (
    "Cite Biesmans et al. 2016. The authors ask for rigorous cross-validation: trials, and stories "
    "with their repetitions, must not be divided between training and test data."
)
MUST_AGREE = False
CITATION = (
    "Biesmans W, Das N, Francart T, Bertrand A. Auditory-inspired speech envelope extraction "
    "methods for improved EEG-based auditory attention detection in a cocktail party scenario. "
    "IEEE Trans Neural Syst Rehabil Eng 2017;25:402-412. doi:10.1109/TNSRE.2016.2571900"
)
BIBTEX = """@article{biesmans2016,
  author = {Biesmans, Wouter and Das, Neetha and Francart, Tom and Bertrand, Alexander},
  title = {Auditory-Inspired Speech Envelope Extraction Methods for Improved {EEG}-Based Auditory
           Attention Detection in a Cocktail Party Scenario},
  journal = {IEEE Transactions on Neural Systems and Rehabilitation Engineering},
  volume = {25},
  number = {5},
  pages = {402--412},
  year = {2017},
  doi = {10.1109/TNSRE.2016.2571900}
}
"""
FOLDER = "biesmans2016"
#: Empty, as Zenodo's record publishes the hashes: `fetch` keeps them in registry.json.
REGISTRY: dict[str, RemoteFile] = {}
RECORD = 4004271
SUBJECTS = tuple(f"S{n}" for n in range(1, 17))

_SOUNDS = "stimuli.zip"


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    subjects: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """Fetch the recordings and the stories; see `brainalign.data.archives.fetch_archive`.

    Parameters
    ----------
    folder, mirror, accept_terms, progress, options
        As for every study.
    subjects : sequence of str, optional
        ``S1`` ... ``S16``. Default: all.
    """
    check_agreement(sys.modules[__name__], accept_terms)
    files = [*(f"{s}.mat" for s in _checked(subjects)), _SOUNDS]
    return fetch_archive(
        FOLDER,
        data_home() / FOLDER if folder is None else folder,
        lambda: zenodo(RECORD, files),
        mirror=mirror,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None, *, subjects: Sequence[str] | None = None
) -> Study:
    """Load the EEG, and who said what.

    Every trial is a run. The talker in the left ear is number 0, the one in the right ear 1. What
    both said, without regard to sides, filters and repetitions, is the ``stimulus_id`` of a trial:
    trials that share it must stay on one side of a split.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    subjects : sequence of str, optional
        ``S1`` ... ``S16``. Default: all whose files are there.

    Returns
    -------
    Study
        ``responses`` by subject, read when asked for: (time, 64 channels) at 128 Hz in microvolts,
        high-passed at 0.5 Hz by the authors; coordinates on time: ``run``, ``attended``,
        ``stimulus_id``; ``x y z`` of the cap. ``extras``:

        - ``trials``: Dataset over trial: subject, run, attended, left, right (file names),
          condition (HRTF, dry), experiment, part, attended_track, repetition. Made when asked for,
          by subject.
        - ``talkers``: by subject, for each trial the (sound, rate) of the left and of the right
          talker, from the clean (dry) recordings as the authors advise, cut to the recording.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.
    SchemaError
        A file is not laid out as published.

    References
    ----------
    The README of Zenodo record 4004271.
    """
    root, archive = open_archive("biesmans2016", data_home() / FOLDER if folder is None else folder)
    there = [s for s in SUBJECTS if f"{s}.mat" in archive.files]
    names = there if subjects is None else _checked(subjects)
    absent = [s for s in names if s not in there]
    if absent:
        raise UnavailableError(
            f"{absent[0]}.mat was not fetched into {root}.", "Fetch the study again, whole."
        )
    return Study(
        "biesmans2016",
        responses=LazyMapping(names, lambda s: _responses(root, s)),
        extras={
            "trials": LazyMapping(names, lambda s: _trials(root, s)),
            "talkers": LazyMapping(names, lambda s: _talkers(root, s)),
        },
    )


def clean_story(name: str) -> str:
    """Return the clean recording of a story: no repetition, no head-related filter.

    Examples
    --------
    >>> clean_story("rep_part1_track2_hrtf.wav")
    'part1_track2_dry.wav'
    """
    return re.sub(r"_(hrtf|dry)(?=\.wav$)", "_dry", name.removeprefix("rep_"), flags=re.I)


def _checked(subjects: Sequence[str] | None) -> list[str]:
    names = list(SUBJECTS if subjects is None else subjects)
    unknown = [s for s in names if s not in SUBJECTS]
    if unknown:
        raise UnknownNameError(
            f"There is no subject {unknown[0]!r}.{near(unknown[0], SUBJECTS)}", "S1 ... S16."
        )
    return names


def _read(root: Path, subject: str) -> list[Any]:
    trials = np.ravel(read_struct(root / f"{subject}.mat", "trials"))
    for k, trial in enumerate(trials):
        lacking = [
            f for f in ("RawData", "FileHeader", "attended_ear", "stimuli") if not hasattr(trial, f)
        ]
        if lacking:
            raise SchemaError(f"{subject}.mat: trial {k + 1} has no field {lacking[0]}.")
        if str(trial.attended_ear) not in ("L", "R") or np.size(trial.stimuli) != 2:
            raise SchemaError(
                f"{subject}.mat: trial {k + 1} attends {trial.attended_ear!r} of "
                f"{np.size(trial.stimuli)} stories; expected L or R, of 2."
            )
    return list(trials)


def _sides(trial: Any) -> tuple[list[str], int]:
    """Names of the left and the right story, and which one is attended."""
    return [str(s) for s in np.ravel(trial.stimuli)], int(str(trial.attended_ear) == "R")


def _responses(root: Path, subject: str) -> xr.Dataset:
    positions = standard_positions("biosemi64")
    runs = []
    for k, trial in enumerate(_read(root, subject)):
        sides, attended = _sides(trial)
        eeg = np.asarray(trial.RawData.EegData)
        if eeg.ndim != 2 or eeg.shape[1] != len(positions):
            raise SchemaError(
                f"{subject}.mat: trial {k + 1} has EEG of shape {eeg.shape}; expected "
                "(samples, 64)."
            )
        run = from_array(
            eeg,
            positions.index.tolist(),
            float(trial.FileHeader.SampleRate),
            subject=subject,
            run=k,
            electrodes=positions,
            space="head",
        )
        shown = "+".join(sorted(clean_story(s).removesuffix("_dry.wav") for s in sides))
        runs.append(
            run.assign_coords(
                attended=("time", np.full(len(eeg), attended)),
                stimulus_id=("time", np.full(len(eeg), shown)),
            )
        )
    return join_runs(runs)


def _trials(root: Path, subject: str) -> xr.Dataset:
    rows = []
    for k, trial in enumerate(_read(root, subject)):
        sides, attended = _sides(trial)
        rows.append(
            {
                "run": k,
                "attended": attended,
                "left": sides[0],
                "right": sides[1],
                **{
                    name: getattr(trial, name)
                    for name in ("condition", "experiment", "part", "attended_track", "repetition")
                    if hasattr(trial, name)
                },
            }
        )
    columns = {name: ("trial", np.array([row[name] for row in rows])) for name in rows[0]}
    return xr.Dataset(columns, attrs={"subject": subject})


def _talkers(root: Path, subject: str) -> list[list[tuple[NDArray, float]]]:
    trials = _read(root, subject)
    with zipfile.ZipFile(root / _SOUNDS) as archive:
        members = {Path(n).name: n for n in archive.namelist() if n.lower().endswith(".wav")}
        read: dict[str, tuple[NDArray, float]] = {}
        out = []
        for trial in trials:
            seconds = len(trial.RawData.EegData) / float(trial.FileHeader.SampleRate)
            pair = []
            for name in map(clean_story, _sides(trial)[0]):
                if name not in members:
                    raise SchemaError(f"{_SOUNDS} holds no {name}.{near(name, members)}")
                if name not in read:
                    read[name] = read_sound(io.BytesIO(archive.read(members[name])))
                sound, rate = read[name]
                # A little more than the recording, so that features fill its last sample.
                pair.append((sound[: round((seconds + 1) * rate)], rate))
            out.append(pair)
    return out
