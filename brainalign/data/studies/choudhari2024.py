"""Choudhari et al. 2024: correlations and accuracies of attention decoders, intracranial EEG."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from brainalign.data.studies import Study, fetch_study, open_study, read_registry

__all__ = [
    "BIBTEX",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "PATIENTS",
    "REGISTRY",
    "TERMS",
    "TITLE",
    "fetch",
    "load",
]

TITLE = "Intracranial attention decoding of moving talkers: correlations of each window"
LICENCE = "MIT (AAD-MovingSpeakers, (c) 2023 naplab)"
TERMS = (
    "Distributed with the authors' code under the MIT licence. Results only: correlations of each "
    "window and accuracies of two of the three published patients, no recordings. Cite the article."
)
MUST_AGREE = False
CITATION = (
    "Choudhari V, Han C, Bickel S, Mehta AD, Schevon C, McKhann GM, Mesgarani N. Brain-controlled "
    "augmented hearing for spatially moving conversations in multi-talker environments. Adv Sci "
    "2024;11:2401379. doi:10.1002/advs.202401379"
)
BIBTEX = """@article{choudhari2024,
  author = {Choudhari, Vishal and Han, Cong and Bickel, Stephan and Mehta, Ashesh D. and
            Schevon, Catherine and McKhann, Guy M. and Mesgarani, Nima},
  title = {Brain-Controlled Augmented Hearing for Spatially Moving Conversations in Multi-Talker
           Environments},
  journal = {Advanced Science},
  volume = {11},
  pages = {2401379},
  year = {2024},
  doi = {10.1002/advs.202401379}
}
"""
FOLDER = "naplab_ieeg_aad"
REGISTRY = read_registry("choudhari2024")

PATIENTS = tuple(sorted({name.split("/")[0] for name in REGISTRY if "/" in name}))


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the result files (9 MB); see `brainalign.data.studies.fetch_study`."""
    return fetch_study(
        sys.modules[__name__],
        folder,
        mirror=mirror,
        accept_terms=accept_terms,
        progress=progress,
        **options,
    )


def load(folder: str | os.PathLike[str] | None = None) -> Study:
    """Find the result files, and the electrodes that they are made of.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.

    Returns
    -------
    Study
        No responses and no stimuli. ``extras``, by patient: ``results`` (paths by features: Spec,
        Traj, Both) for `brainalign.auditory.read_results`, ``accuracies`` (paths of the authors'
        tables, likewise), and ``electrodes``, the numbers of the responsive electrodes, from 1.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.
    """
    from scipy.io import loadmat

    root = open_study(__name__, REGISTRY, FOLDER, folder)
    extras: dict[str, Any] = {}
    for patient in PATIENTS:
        paths = sorted((root / patient).glob("Step_15_*"))
        numbers = loadmat(root / patient / "ResponsiveElectrodes.mat")
        extras[patient] = {
            kind: {
                p.name.split("_")[2].removesuffix("Only"): p for p in paths if p.suffix == suffix
            }
            for kind, suffix in (("results", ".mat"), ("accuracies", ".csv"))
        } | {"electrodes": np.ravel(numbers["thisSubjectResponsiveElectrodes"]).astype(int)}
    return Study("choudhari2024", extras=extras)
