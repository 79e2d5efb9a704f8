"""Zada et al. 2025, "Podcast": electrocorticography of 9 people who listen to a radio story."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.archives import fetch_archive, open_archive, openneuro
from brainalign.data.electrophysiology import from_raw, read_electrodes, read_raw
from brainalign.data.fetch import RemoteFile
from brainalign.data.sounds import read_sound
from brainalign.data.studies import LazyMapping, Study, check_agreement, data_home
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError, near

__all__ = [
    "BIBTEX",
    "CITATION",
    "DATASET",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "SUBJECTS",
    "TERMS",
    "TITLE",
    "VERSION",
    "fetch",
    "load",
]

TITLE = "The Podcast ECoG dataset"
LICENCE = "CC0"
TERMS = "Public domain (CC0). Cite Zada et al. 2025."
MUST_AGREE = False
CITATION = (
    'Zada Z, Nastase SA, Aubrey B, et al. The "Podcast" ECoG dataset for modeling neural activity '
    "during natural language comprehension. Sci Data 2025;12:1135. doi:10.1038/s41597-025-05462-2"
)
BIBTEX = """@article{zada2025,
  author = {Zada, Zaid and Nastase, Samuel A. and Aubrey, Bobbi and Jalon, Itamar and
            Michelmann, Sebastian and Wang, Haocheng and Hasenfratz, Liat and Doyle, Werner and
            Friedman, Daniel and Dugan, Patricia and Melloni, Lucia and Devore, Sasha and
            Flinker, Adeen and Devinsky, Orrin and Goldstein, Ariel and Hasson, Uri},
  title = {The ``{Podcast}'' {ECoG} Dataset for Modeling Neural Activity during Natural Language
           Comprehension},
  journal = {Scientific Data},
  volume = {12},
  pages = {1135},
  year = {2025},
  doi = {10.1038/s41597-025-05462-2}
}
"""
FOLDER = "zada2025"
DATASET, VERSION = "ds005574", "1.0.2"
#: Empty, as OpenNeuro's tag holds the hashes: `fetch` keeps them in registry.json.
REGISTRY: dict[str, RemoteFile] = {}
SUBJECTS = tuple(f"sub-{n:02d}" for n in range(1, 10))

Signal = Literal["highgamma", "raw"]

_SPACE = "MNI152NLin2009aSym"
_SOUND, _WORDS = "stimuli/podcast.wav", "stimuli/podcast_transcript.csv"


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    subjects: Sequence[str] | None = None,
    signals: Sequence[Signal] = ("highgamma",),
    **options: Any,
) -> Path:
    """Fetch recordings, electrodes, and what was heard.

    Parameters
    ----------
    folder, mirror, accept_terms, progress, options
        As for every study; see `brainalign.data.archives.fetch_archive`.
    subjects : sequence of str, optional
        ``sub-01`` ... ``sub-09``, with or without ``sub-``. Default: all.
    signals : sequence of {"highgamma", "raw"}
        The authors' high-gamma amplitude (0.3 to 0.9 GB a subject), the recording as it was made,
        or both.
    """
    check_agreement(sys.modules[__name__], accept_terms)
    files = ["dataset_description.json", _SOUND, _WORDS]
    for subject in _checked(subjects):
        files += [_tables(_label(subject))[k] for k in ("channels", "electrodes", "coordsystem")]
        files += [_signal(_label(subject), s) for s in signals]
    return fetch_archive(
        FOLDER,
        data_home() / FOLDER if folder is None else folder,
        lambda: openneuro(DATASET, VERSION, files),
        mirror=mirror,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    subjects: Sequence[str] | None = None,
    signal: Signal = "highgamma",
) -> Study:
    """Load recordings with the places of their electrodes, and what was heard.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    subjects : sequence of str, optional
        ``sub-01`` ... ``sub-09``, with or without ``sub-``. Default: all whose files are there.
    signal : {"highgamma", "raw"}
        The authors' high-gamma amplitude, or the recording as it was made.

    Returns
    -------
    Study
        ``responses`` by subject as named, read when asked for: (time, electrodes) at 512 Hz, with
        ``status`` (bad: noisy, or not localised) and ``x y z`` in MNI152NLin2009aSym (mm); one run,
        which ends with the sound at the latest, and one talker who is attended throughout.
        ``extras``: ``talkers``, by subject, the (sound, rate)
        of the podcast; ``words``: Dataset over word: onset and offset in s.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.
    MissingDependencyError
        If MNE is not installed.

    References
    ----------
    Zada et al. 2025, Scientific Data 12:1135.
    """
    if signal not in ("highgamma", "raw"):
        raise ConfigError(f"signal is {signal!r}; expected 'highgamma' or 'raw'.")
    root, archive = open_archive("zada2025", data_home() / FOLDER if folder is None else folder)
    there = [s for s in SUBJECTS if _signal(s, signal) in archive.files]
    names = there if subjects is None else _checked(subjects)
    absent = [s for s in names if _label(s) not in there]
    if absent or not names:
        raise UnavailableError(
            f"The signal {signal!r} of {absent[0] if absent else 'all subjects'} was not fetched "
            f"into {root}.",
            "Fetch it into another folder: fetch(folder, signals=...).",
        )
    words = pd.read_csv(root / _WORDS, keep_default_na=False)
    lacking = [c for c in ("word", "start", "end") if c not in words]
    if lacking:
        raise SchemaError(f"{_WORDS} has no column {lacking[0]!r}.")
    timed = words[pd.to_numeric(words["start"], errors="coerce").notna()]
    return Study(
        "zada2025",
        responses=LazyMapping(names, lambda s: _responses(root, _label(s), signal)),
        extras={
            "talkers": LazyMapping(names, lambda s: [[read_sound(root / _SOUND)]]),
            "words": xr.Dataset(
                {
                    "onset": ("word", timed["start"].astype(float).to_numpy(), {"units": "s"}),
                    "offset": ("word", timed["end"].astype(float).to_numpy(), {"units": "s"}),
                },
                coords={"word": timed["word"].astype(str).to_numpy()},
            ),
        },
    )


def _checked(subjects: Sequence[str] | None) -> list[str]:
    names = list(SUBJECTS if subjects is None else subjects)
    unknown = [s for s in names if _label(s) not in SUBJECTS]
    if unknown:
        raise UnknownNameError(
            f"There is no subject {unknown[0]!r}.{near(unknown[0], SUBJECTS)}", "sub-01 ... sub-09."
        )
    return names


def _label(subject: str) -> str:
    return f"sub-{subject.removeprefix('sub-')}"


def _tables(subject: str) -> dict[str, str]:
    start = f"{subject}/ieeg/{subject}"
    return {
        "channels": f"{start}_task-podcast_channels.tsv",
        "electrodes": f"{start}_space-{_SPACE}_electrodes.tsv",
        "coordsystem": f"{start}_space-{_SPACE}_coordsystem.json",
    }


def _signal(subject: str, signal: Signal) -> str:
    if signal == "raw":
        return f"{subject}/ieeg/{subject}_task-podcast_ieeg.edf"
    name = f"{subject}_task-podcast_desc-highgamma_ieeg.fif"
    return f"derivatives/ecogprep/{subject}/ieeg/{name}"


def _responses(root: Path, subject: str, signal: Signal) -> xr.Dataset:
    tables = _tables(subject)
    raw = read_raw(root / _signal(subject, signal), root / tables["channels"])
    electrodes, space = read_electrodes(root / tables["electrodes"])
    ds = from_raw(raw, subject=subject, electrodes=electrodes, space=space)
    sound, rate = read_sound(root / _SOUND)
    ds = ds.isel(time=slice(int(len(sound) / rate * ds.attrs["sampling_rate"])))
    n = ds.sizes["time"]
    attended: NDArray[np.int64] = np.zeros(n, dtype=np.int64)
    return ds.assign_coords(
        attended=("time", attended), stimulus_id=("time", np.full(n, "podcast"))
    )
