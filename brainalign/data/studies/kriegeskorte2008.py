"""Kriegeskorte et al. 2008: 92 images, IT RDMs of man and monkey, judged similarity, models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.schema import validate
from brainalign.data.store import sha256_of
from brainalign.data.studies import (
    Study,
    cached_stimuli,
    data_home,
    fetch_study,
    open_study,
    read_registry,
)

__all__ = [
    "BIBTEX",
    "CATEGORIES",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "TERMS",
    "TITLE",
    "fetch",
    "image_ids",
    "load",
]

TITLE = "92 object images with RDMs of human and monkey inferior temporal cortex"
LICENCE = "MIT (rsatoolbox, (c) 2019 rsatoolbox authors)"
TERMS = (
    "Distributed with rsatoolbox under the MIT licence. The photographs carry no separate terms. "
    "Cite Kriegeskorte et al. 2008; for the similarity judgements also Mur et al. 2013."
)
MUST_AGREE = False
CITATION = (
    "Kriegeskorte N, Mur M, Ruff DA, et al. Matching categorical object representations in "
    "inferior temporal cortex of man and monkey. Neuron 2008;60:1126-1141. "
    "Mur M, et al. Human object-similarity judgments reflect and transcend the primate-IT object "
    "representation. Front Psychol 2013;4:128."
)
BIBTEX = """@article{kriegeskorte2008,
  author = {Kriegeskorte, Nikolaus and Mur, Marieke and Ruff, Douglas A. and Kiani, Roozbeh and
            Bodurka, Jerzy and Esteky, Hossein and Tanaka, Keiji and Bandettini, Peter A.},
  title = {Matching Categorical Object Representations in Inferior Temporal Cortex of Man and
           Monkey},
  journal = {Neuron},
  volume = {60},
  number = {6},
  pages = {1126--1141},
  year = {2008},
  doi = {10.1016/j.neuron.2008.10.043}
}
@article{mur2013,
  author = {Mur, Marieke and Meys, Mirjam and Bodurka, Jerzy and Goebel, Rainer and
            Bandettini, Peter A. and Kriegeskorte, Nikolaus},
  title = {Human Object-Similarity Judgments Reflect and Transcend the Primate-{IT} Object
           Representation},
  journal = {Frontiers in Psychology},
  volume = {4},
  pages = {128},
  year = {2013},
  doi = {10.3389/fpsyg.2013.00128}
}
"""
FOLDER = "kriegeskorte2008_92images"
REGISTRY = read_registry("kriegeskorte2008")

#: Name and number of images of each category, in the order of the images.
CATEGORIES = (
    ("human body part", 12),
    ("human face", 12),
    ("non-human body part", 12),
    ("non-human face", 12),
    ("natural object", 23),
    ("artificial object", 21),
)

_MAIN = "Kriegeskorte_Neuron2008_supplementalData.mat"
_VERSION = 1


def image_ids() -> list[str]:
    """Return the ids of the 92 images in order: ``image01`` ... ``image92``."""
    return [f"image{i:02d}" for i in range(1, 93)]


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the study (5 MB); see `brainalign.data.studies.fetch_study`."""
    return fetch_study(
        sys.modules[__name__],
        folder,
        mirror=mirror,
        accept_terms=accept_terms,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    stimuli_folder: str | os.PathLike[str] | None = None,
) -> Study:
    """Load the images and all RDMs.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    stimuli_folder : path, optional
        Where the images are written as PNG files, once. Default: a folder of the cache.

    Returns
    -------
    Study
        ``stimuli``: 92 RGB images of 175 x 175 pixels on grey, ids `image_ids`, with columns
        ``category`` and the flags ``human``, ``face``, ``animal``, ``natural``. No responses.
        ``extras``:

        - ``human_it``: 8 RDMs, correlation distance, coords ``subject`` (BE, KO, SN, TI) and
          ``session`` (1, 2); ``human_it_mean``: their plain mean.
        - ``monkey_it``: one RDM, 674 neurons.
        - ``behaviour``: 16 RDMs of judged similarity, coord ``subject``; arbitrary scale, other
          people.
        - ``models``: animacy, FaceBodyManmadeNatobj, monkeyIT, EVA, HMAX, V1, Silhouette, RADON.
        - ``category``: Dataset with ``member`` (stimulus, category_name), the 12 category vectors.

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.

    References
    ----------
    Kriegeskorte et al. 2008, Neuron 60:1126-1141; Mur et al. 2013, Front Psychol 4:128.
    """
    from scipy.io import loadmat

    root = open_study(__name__, REGISTRY, FOLDER, folder)
    main = loadmat(root / _MAIN)
    objects = main["stimuli_92objs"].ravel()
    flags = {
        flag: [bool(o[flag].item()) for o in objects]
        for flag in ("human", "face", "animal", "natural")
    }
    category = [name for name, count in CATEGORIES for _ in range(count)]
    stimuli = cached_stimuli(
        data_home() / "stimuli" / "kriegeskorte2008"
        if stimuli_folder is None
        else Path(stimuli_folder),
        lambda: (o["image"] for o in objects),
        image_ids(),
        sha256_of({_MAIN: REGISTRY[_MAIN].sha256, "version": _VERSION}),
        extra={"category": category, **flags},
    )

    both = main["RDMs_mIT_hIT_fig1"].ravel()
    brain = loadmat(root / "92_brainRDMs.mat")["RDMs"][0]
    behaviour = loadmat(root / "92_behavRDMs.mat")["rdms_behav_92"].ravel()
    models = loadmat(root / "92_modelRDMs.mat")["Models"].ravel()
    human = {
        f"{_field(r, 1)} session {session + 1}": r["RDM"]
        for row in brain
        for session, r in enumerate(row)
    }
    vectors = xr.Dataset(
        {"member": (("stimulus", "category_name"), main["categoryVectors"].astype(bool))},
        coords={
            "stimulus_id": ("stimulus", image_ids()),
            "category_name": [str(label.item()) for label in main["categoryLabels"].ravel()],
        },
    )
    return Study(
        "kriegeskorte2008",
        stimuli=stimuli,
        extras={
            "human_it": _rdms(
                human,
                "correlation distance",
                subject=[name.split()[0] for name in human],
                session=[int(name.split()[-1]) for name in human],
            ),
            "human_it_mean": _rdms(
                {"human IT": _square(both[1]["RDM"])}, "correlation distance, 316 voxels"
            ),
            "monkey_it": _rdms(
                {"monkey IT": _square(both[0]["RDM"])}, "correlation distance, 674 neurons"
            ),
            "behaviour": _rdms(
                {_field(r, 1): r["RDM"] for r in behaviour},
                "judged dissimilarity, arbitrary scale",
                subject=[_field(r, 1) for r in behaviour],
            ),
            "models": _rdms({str(m["name"].item()): m["RDM"] for m in models}, "as distributed"),
            "category": vectors,
        },
    )


def _field(record: Any, position: int) -> str:
    """Return one part of a name such as ``hIT | BE | Session: 1``."""
    return str(record["name"].item()).split("|")[position].strip()


def _square(upper: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import squareform

    return squareform(upper.ravel())


def _rdms(by_name: Mapping[str, np.ndarray], measure: str, **coords: Sequence[Any]) -> xr.Dataset:
    ids = image_ids()
    ds = xr.Dataset(
        {
            "rdm": (
                ("rdm_name", "stimulus", "stimulus_2"),
                np.stack([np.asarray(r, dtype=np.float64) for r in by_name.values()]),
            )
        },
        coords={
            "rdm_name": list(by_name),
            "stimulus_id": ("stimulus", ids),
            "stimulus_id_2": ("stimulus_2", ids),
            **{name: ("rdm_name", list(values)) for name, values in coords.items()},
        },
        attrs={"measure": measure},
    )
    return validate(ds, "rdms")
