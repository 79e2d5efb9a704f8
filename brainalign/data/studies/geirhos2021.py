"""Geirhos et al. 2021: single trials of people who name objects in 17 kinds of changed images."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainalign.data.studies import Study, fetch_study, open_study, read_registry
from brainalign.data.trials import read_trials
from brainalign.errors import UnknownNameError, near

__all__ = [
    "BIBTEX",
    "CITATION",
    "CLASSES",
    "EXPERIMENTS",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "TERMS",
    "TITLE",
    "fetch",
    "load",
]

TITLE = "Trials of human object recognition under 17 image manipulations"
LICENCE = "MIT (model-vs-human, (c) 2021 Robert Geirhos)"
TERMS = (
    "Distributed with model-vs-human under the MIT licence, which has no separate statement for "
    "the responses. The stimuli are not included. Cite Geirhos et al. 2021."
)
MUST_AGREE = False
CITATION = (
    "Geirhos R, Narayanappa K, Mitzkus B, Thieringer T, Bethge M, Wichmann FA, Brendel W. Partial "
    "success in closing the gap between human and machine vision. NeurIPS 2021."
)
BIBTEX = """@article{geirhos2021,
  author = {Geirhos, Robert and Narayanappa, Kantharaju and Mitzkus, Benjamin and
            Thieringer, Tizian and Bethge, Matthias and Wichmann, Felix A. and Brendel, Wieland},
  title = {Partial success in closing the gap between human and machine vision},
  journal = {Advances in Neural Information Processing Systems},
  volume = {34},
  year = {2021},
  doi = {10.48550/arXiv.2106.07411}
}
"""
FOLDER = "geirhos2021_human_trials"
REGISTRY = read_registry("geirhos2021")

#: The categories that people chose from.
CLASSES = (
    "airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog",
    "elephant", "keyboard", "knife", "oven", "truck",
)  # fmt: skip
EXPERIMENTS = tuple(sorted({name.split("/")[1] for name in REGISTRY if name.endswith(".csv")}))


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the study (8 MB); see `brainalign.data.studies.fetch_study`."""
    return fetch_study(
        sys.modules[__name__],
        folder,
        mirror=mirror,
        accept_terms=accept_terms,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None, *, experiments: Sequence[str] = EXPERIMENTS
) -> Study:
    """Load the trials.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    experiments : sequence of str
        Some of `EXPERIMENTS`.

    Returns
    -------
    Study
        No responses and no stimuli. ``extras``: the ``trials`` of each experiment by its name, with
        ``response`` (one of `CLASSES`, or ``na`` for none, which is wrong), ``category`` (of a
        cue conflict: the shape), ``correct``, ``rt`` (s) and the coordinates ``subject``,
        ``stimulus_id`` (the same for all subjects) and ``condition`` (text as in the files).

    Raises
    ------
    UnknownNameError
        If there is no such experiment.
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.

    References
    ----------
    Geirhos et al. 2021, NeurIPS (arXiv:2106.07411).
    """
    unknown = [e for e in experiments if e not in EXPERIMENTS]
    if unknown:
        raise UnknownNameError(
            f"There is no experiment {unknown[0]!r}.{near(unknown[0], EXPERIMENTS)}",
            f"Known: {', '.join(EXPERIMENTS)}.",
        )
    files = {
        e: sorted(n for n in REGISTRY if n.startswith(f"raw-data/{e}/") and n.endswith(".csv"))
        for e in experiments
    }
    root = open_study(__name__, REGISTRY, FOLDER, folder, [n for f in files.values() for n in f])
    return Study(
        "geirhos2021",
        extras={e: read_trials([root / name for name in names]) for e, names in files.items()},
    )
