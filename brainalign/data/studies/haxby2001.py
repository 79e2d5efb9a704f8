"""Haxby et al. 2001: objects, faces and houses in blocks; subject 1 in small, all six in full."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.fetch import mirror_folder
from brainalign.data.schema import validate
from brainalign.data.studies import Study, data_home, fetch_study, open_study, read_registry
from brainalign.errors import ConfigError, SchemaError, UnavailableError

__all__ = [
    "BIBTEX",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "REST",
    "TERMS",
    "TITLE",
    "TR",
    "fetch",
    "load",
    "load_full",
]

TITLE = "Faces and objects in ventral temporal cortex"
LICENCE = "CC BY-SA 3.0 (data, the original authors); MIT (the rest of PyMVPA)"
TERMS = (
    "Copyright of the original authors, Creative Commons Attribution-ShareAlike 3.0: cite the "
    "article, and distribute what is derived from the data under the same licence."
)
MUST_AGREE = False
CITATION = (
    "Haxby JV, Gobbini MI, Furey ML, Ishai A, Schouten JL, Pietrini P. Distributed and overlapping "
    "representations of faces and objects in ventral temporal cortex. Science 2001;293:2425-2430."
)
BIBTEX = """@article{haxby2001,
  author = {Haxby, James V. and Gobbini, M. Ida and Furey, Maura L. and Ishai, Alumit and
            Schouten, Jennifer L. and Pietrini, Pietro},
  title = {Distributed and Overlapping Representations of Faces and Objects in Ventral Temporal
           Cortex},
  journal = {Science},
  volume = {293},
  number = {5539},
  pages = {2425--2430},
  year = {2001},
  doi = {10.1126/science.1063736}
}
@article{hanke2009,
  author = {Hanke, Michael and Halchenko, Yaroslav O. and Sederberg, Per B. and
            Hanson, Stephen Jos{\\'e} and Haxby, James V. and Pollmann, Stefan},
  title = {{PyMVPA}: a {Python} Toolbox for Multivariate Pattern Analysis of {fMRI} Data},
  journal = {Neuroinformatics},
  volume = {7},
  number = {1},
  pages = {37--53},
  year = {2009},
  doi = {10.1007/s12021-008-9041-y}
}
"""
FOLDER = "haxby2001_slices"
REGISTRY = read_registry("haxby2001")

#: Repetition time in seconds.
TR = 2.5
#: Label of the volumes between blocks.
REST = "rest"

_MASKS = ("vt", "face", "house", "face_little", "house_little")


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the small subset (4 MB); see `brainalign.data.studies.fetch_study`."""
    return fetch_study(
        sys.modules[__name__],
        folder,
        mirror=mirror,
        accept_terms=accept_terms,
        progress=progress,
        **options,
    )


def load(
    folder: str | os.PathLike[str] | None = None, *, full: Sequence[int] | None = None
) -> Study:
    """Load subject 1: the posterior half of one axial slice over 12 runs, and 25 mm volumes.

    The labels already include the haemodynamic delay: do not shift them. The study distributes no
    stimuli, and the order of the images within a block is not known. Runs are the units to
    cross-validate over.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    full : sequence of int, optional
        Load these subjects of the full study instead, each as `load_full` does.

    Returns
    -------
    Study
        ``responses["sub001"]``: time series (time 1452, neuroid 530), in scanner units and not
        detrended. Coords on time: ``condition`` (rest, or one of 8 categories), ``run`` (0-11),
        ``volume`` (within the run); on neuroid: ``i j k`` and ``x y z`` (mm). ``extras``:

        - ``coarse``: 25 mm voxels of the brain mask (time 1452, neuroid 129), with ``roi_mask``
          (brain, gray, white, vt) and ``hoc`` (label of the Harvard-Oxford atlas).
        - ``events``: Dataset of the 96 blocks: run, onset (s), duration (s), trial_type.
        - ``motion``: motion estimates (time, parameter 6).

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.

    References
    ----------
    Haxby et al. 2001, Science 293:2425-2430.
    """
    import nibabel

    if full is not None:
        parts = [load_full(subject) for subject in full]
        return Study("haxby2001", {k: v for part in parts for k, v in part.responses.items()})
    root = open_study(__name__, REGISTRY, FOLDER, folder)
    mask = _image(root / "mask.nii.gz")
    labels = _labels(root / "attributes_literal.txt")
    responses = _time_series(
        _image(root / "bold.nii.gz"),
        np.asarray(mask.dataobj) > 0,
        labels,
        subject="sub001",
        space="scanner space of the subject, posterior half of one axial slice",
    )

    sub = root / "haxby2001" / "sub001"
    runs = [sub / "BOLD" / f"task001_run{run:03d}" for run in range(1, 13)]
    rows: list[tuple[Any, ...]] = [
        (run, *line.split("\t"))
        for run, path in enumerate(runs)
        for line in (path / "bold_events.tsv").read_text().splitlines()[1:]
    ]
    events = xr.Dataset(
        {
            "run": ("event", np.array([run for run, *_ in rows])),
            "onset": ("event", np.array([float(row[1]) for row in rows]), {"units": "s"}),
            "duration": ("event", np.array([float(row[2]) for row in rows]), {"units": "s"}),
            "trial_type": ("event", np.array([row[3] for row in rows])),
        }
    )
    motion = xr.Dataset(
        {
            "motion": (
                ("time", "parameter"),
                np.concatenate([np.loadtxt(path / "bold_moest.txt") for path in runs]),
            )
        }
    )
    masks = {
        name: np.asarray(_image(sub / "masks" / "25mm" / f"{name}.nii.gz").dataobj)
        for name in ("brain", "gray", "white", "vt", "hoc")
    }
    volumes = [_image(path / "bold_25mm.nii.gz") for path in runs]
    coarse = _time_series(
        nibabel.Nifti1Image(
            np.concatenate([np.asarray(v.dataobj) for v in volumes], axis=3), volumes[0].affine
        ),
        masks["brain"] > 0,
        labels,
        subject="sub001",
        space="scanner space of the subject, 25 mm voxels",
        roi={name: masks[name] > 0 for name in ("brain", "gray", "white", "vt")},
    )
    coarse = coarse.assign_coords(hoc=("neuroid", masks["hoc"][masks["brain"] > 0].astype(int)))
    return Study(
        "haxby2001",
        responses={"sub001": responses},
        extras={"coarse": coarse, "events": events, "motion": motion},
    )


def load_full(
    subject: int,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    mask: str = "brain",
) -> Study:
    """Load one subject of the full study through nilearn, downloading it (300 MB) where needed.

    Run 8 of subject 5 was corrupted: its labels are all rest.

    Parameters
    ----------
    subject : int
        1-6.
    data_dir : path, optional
        Folder that holds, or will hold, nilearn's folder ``haxby2001``. Default: the mirror where
        it is a folder that holds this subject, else the cache.
    mask : {"brain", "vt"}
        Which voxels to load.

    Returns
    -------
    Study
        ``responses["subj<N>"]``: time series (time, neuroid) as in `load`, with ``roi_mask`` over
        vt, face, house, face_little, house_little (the authors' masks). ``extras``: ``anatomy``,
        the path of the anatomical image or None.

    Raises
    ------
    ConfigError
        There is no such subject or mask.
    UnavailableError
        The files are neither there nor to be had.
    SchemaError
        A mask and the recording do not lie on one grid, or labels and volumes differ in number.
    """
    from nilearn.datasets import fetch_haxby

    if subject not in range(1, 7):
        raise ConfigError(f"Haxby 2001 has subjects 1 to 6, not {subject!r}.")
    if mask not in ("brain", "vt"):
        raise ConfigError(f"The mask is 'brain' or 'vt', not {mask!r}.")
    if data_dir is None:
        near_by = mirror_folder()
        held = near_by is not None and (near_by / "haxby2001" / f"subj{subject}").is_dir()
        data_dir = near_by if held else data_home()
    try:
        files = fetch_haxby(data_dir=str(data_dir), subjects=[subject], verbose=0)
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"Subject {subject} of Haxby 2001 could not be fetched through nilearn: {error}.",
            f"Check the network, or put nilearn's folder haxby2001 into {data_dir}.",
        ) from error

    bold = _image(files.func[0])
    rois = {}
    for name in ("brain", *_MASKS):
        image = _image(files.mask if name == "brain" else files[f"mask_{name}"][0])
        if image.shape[:3] != bold.shape[:3] or not np.allclose(
            image.affine, bold.affine, atol=1e-3
        ):
            raise SchemaError(
                f"Subject {subject}: the mask {name} has shape {image.shape[:3]} and affine "
                f"{image.affine.tolist()}, the recording {bold.shape[:3]} and "
                f"{bold.affine.tolist()}."
            )
        rois[name] = np.asarray(image.dataobj).reshape(bold.shape[:3]) > 0
    name = f"subj{subject}"
    responses = _time_series(
        bold,
        rois[mask],
        _labels(files.session_target[0], header=True),
        subject=name,
        space="scanner space of the subject",
        roi={roi: rois[roi] for roi in _MASKS},
    )
    return Study("haxby2001", responses={name: responses}, extras={"anatomy": files.anat[0]})


def _image(path: Any) -> Any:
    import nibabel

    return nibabel.load(path)


def _labels(path: str | os.PathLike[str], header: bool = False) -> list[tuple[str, int]]:
    rows = Path(path).read_text().split("\n")[1 if header else 0 :]
    pairs = [row.split() for row in rows if row.strip()]
    return [(label.strip('"'), int(run)) for label, run in pairs]


def _time_series(
    bold: Any,
    mask: np.ndarray,
    labels: list[tuple[str, int]],
    *,
    subject: str,
    space: str,
    roi: Mapping[str, np.ndarray] | None = None,
) -> xr.Dataset:
    """Return the voxels of a mask as a time-series responses Dataset."""
    if len(labels) != bold.shape[3]:
        raise SchemaError(f"{subject}: {len(labels)} labels for {bold.shape[3]} volumes.")
    ijk = np.argwhere(mask)
    xyz = ijk @ bold.affine[:3, :3].T + bold.affine[:3, 3]
    run = np.array([r for _, r in labels])
    volume = np.concatenate([np.arange(np.sum(run == r)) for r in np.unique(run)])
    data = np.asarray(bold.dataobj)[mask].T.astype(np.float32)
    coords: dict[str, Any] = {
        "condition": ("time", np.array([label for label, _ in labels])),
        "run": ("time", run),
        "session": ("time", np.zeros_like(run)),
        "volume": ("time", volume),
        "subject": subject,
        "neuroid_id": ("neuroid", [f"{i}-{j}-{k}" for i, j, k in ijk.tolist()]),
        "roi": ("neuroid", np.full(len(ijk), "", dtype="U1")),
        "hemisphere": ("neuroid", np.full(len(ijk), "", dtype="U1")),
        **{name: ("neuroid", ijk[:, axis]) for axis, name in enumerate("ijk")},
        **{name: ("neuroid", xyz[:, axis]) for axis, name in enumerate("xyz")},
    }
    ds = xr.Dataset(
        {"responses": (("time", "neuroid"), data)},
        coords=coords,
        attrs={
            "units": "scanner units",
            "sampling_rate": 1 / TR,
            "space": space,
            "subject": subject,
            "shape": [int(n) for n in mask.shape],
            "affine": bold.affine.ravel().tolist(),
        },
    )
    if roi:
        ds = ds.assign_coords(
            roi_name=list(roi),
            roi_mask=(("neuroid", "roi_name"), np.stack([r[mask] for r in roi.values()], axis=1)),
        )
    return validate(ds, "responses")
