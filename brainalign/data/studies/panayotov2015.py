"""Panayotov et al. 2015, LibriSpeech: three clips of read speech, one talker each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from brainalign.data.studies import Study, fetch_study, open_study, read_registry

__all__ = [
    "BIBTEX",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "TERMS",
    "TITLE",
    "fetch",
    "load",
]

TITLE = "Three talkers of LibriSpeech"
LICENCE = "CC BY 4.0"
TERMS = (
    "Creative Commons Attribution 4.0: cite the article. Book and reader stand beside each clip."
)
MUST_AGREE = False
CITATION = (
    "Panayotov V, Chen G, Povey D, Khudanpur S. LibriSpeech: an ASR corpus based on public domain "
    "audio books. ICASSP 2015:5206-5210. doi:10.1109/ICASSP.2015.7178964"
)
BIBTEX = """@article{panayotov2015,
  author = {Panayotov, Vassil and Chen, Guoguo and Povey, Daniel and Khudanpur, Sanjeev},
  title = {{LibriSpeech}: An {ASR} Corpus Based on Public Domain Audio Books},
  journal = {IEEE International Conference on Acoustics, Speech and Signal Processing},
  pages = {5206--5210},
  year = {2015},
  doi = {10.1109/ICASSP.2015.7178964}
}
"""
FOLDER = "librispeech_clips"
REGISTRY = read_registry("panayotov2015")


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the clips (0.2 MB); see `brainalign.data.studies.fetch_study`."""
    return fetch_study(
        sys.modules[__name__],
        folder,
        mirror=mirror,
        accept_terms=accept_terms,
        progress=progress,
        **options,
    )


def load(folder: str | os.PathLike[str] | None = None) -> Study:
    """Find the clips.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.

    Returns
    -------
    Study
        No responses and no stimuli. ``extras["sounds"]``: paths of the clips, 14 to 17 s at 22,050
        Hz, by the talker's number in LibriSpeech.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.
    """
    root = open_study(__name__, REGISTRY, FOLDER, folder)
    clips = sorted(name for name in REGISTRY if name.endswith(".ogg"))
    return Study("panayotov2015", extras={"sounds": {c.partition("-")[0]: root / c for c in clips}})
