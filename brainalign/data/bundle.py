"""Bundles: everything a study gives, as artefacts in one folder.

``responses/<subject>.zarr`` (schema responses), ``stimuli/`` (schema images), ``extras/<name>.nc``
(whatever else, e.g. RDMs).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import xarray as xr

from brainalign.data.stimuli import read_stimuli
from brainalign.data.store import atomic_dir, read, write
from brainalign.data.studies import Study
from brainalign.errors import UnknownNameError, near

__all__ = ["read_bundle", "write_bundle"]


def write_bundle(
    study: Study,
    folder: str | Path,
    *,
    subjects: Sequence[str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write a study as a bundle, atomically, over what stands there.

    Parameters
    ----------
    study : Study
        As loaded or simulated; extras that are Datasets are written, others are not.
    folder : path
        Where.
    subjects : sequence of str, optional
        Which subjects; default all.
    provenance : mapping of str to str, optional
        Attrs of every artefact.

    Raises
    ------
    UnknownNameError
        If a subject is not in the study.
    """
    chosen = list(study.responses) if subjects is None else list(subjects)
    unknown = [s for s in chosen if s not in study.responses]
    if unknown:
        raise UnknownNameError(
            f"The study {study.name} has no subject {unknown[0]!r}."
            f"{near(unknown[0], study.responses)}",
            f"Subjects: {', '.join(study.responses)}.",
        )
    with atomic_dir(folder, overwrite=True) as made:
        for subject in chosen:
            path = made / "responses" / f"{subject}.zarr"
            write(study.responses[subject], path, "responses", provenance=provenance)
        for name, extra in study.extras.items():
            if isinstance(extra, xr.Dataset):
                write(extra, made / "extras" / f"{name}.nc", None, provenance=provenance)
        if study.stimuli is not None:
            for source in dict.fromkeys(study.stimuli.paths):
                target = made / "stimuli" / source.relative_to(study.stimuli.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                if study.stimuli.container is None:
                    shutil.copyfile(source, target)
                else:
                    # Tens of GB that nothing changes.
                    target.symlink_to(source.resolve())
            # The index of these images: a folder of plain images has none, a selection another.
            write(study.stimuli.index, made / "stimuli" / "index.nc", "images")
    return Path(folder)


def read_bundle(folder: str | Path) -> Study:
    """Read a bundle; responses are opened lazily, extras read whole."""
    folder = Path(folder)
    stimuli = folder / "stimuli"
    return Study(
        name=folder.name,
        responses={p.stem: read(p) for p in sorted((folder / "responses").glob("*.zarr"))},
        stimuli=read_stimuli(stimuli) if (stimuli / "index.nc").is_file() else None,
        extras={p.stem: read(p) for p in sorted((folder / "extras").glob("*.nc"))},
    )
