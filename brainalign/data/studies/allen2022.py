"""Allen et al. 2022, the Natural Scenes Dataset: eight subjects, 7 T, up to 30,000 trials each.

The study's own folders are read as they lie (``nsddata``, ``nsddata_betas``, ``nsddata_stimuli``).
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.bids import add_rois
from brainalign.data.cortex import N_VERTICES
from brainalign.data.fetch import RemoteFile, mirror_folder
from brainalign.data.schema import validate
from brainalign.data.stimuli import StimulusSet, index_hdf5
from brainalign.data.store import read, require_disk, sha256_of, write
from brainalign.data.studies import LazyMapping, Study, check_agreement, data_home
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError, near

__all__ = [
    "BASE",
    "BIBTEX",
    "BUCKET",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "SESSIONS",
    "TERMS",
    "TITLE",
    "addresses",
    "choose_voxels",
    "fetch",
    "load",
    "stimulus_ids",
    "zscore_sessions",
]

logger = logging.getLogger(__name__)

TITLE = "The Natural Scenes Dataset"
LICENCE = "Terms and conditions of the Natural Scenes Dataset; photographs from Microsoft COCO"
TERMS = (
    "Read and accept the terms and conditions of the Natural Scenes Dataset "
    "(https://naturalscenesdataset.org) before use: among them, do not try to identify the "
    "subjects, and cite the article. The photographs are cropped from Microsoft COCO, whose images "
    "carry the terms of Flickr and of their authors: a report that shows them must keep to these."
)
MUST_AGREE = True
CITATION = (
    "Allen EJ, St-Yves G, Wu Y, et al. A massive 7T fMRI dataset to bridge cognitive neuroscience "
    "and artificial intelligence. Nat Neurosci 2022;25:116-126. doi:10.1038/s41593-021-00962-x"
)
BIBTEX = """@article{allen2022,
  author = {Allen, Emily J. and St-Yves, Ghislain and Wu, Yihan and Breedlove, Jesse L. and
            Prince, Jacob S. and Dowdle, Logan T. and Nau, Matthias and Caron, Brad and
            Pestilli, Franco and Charest, Ian and Hutchinson, J. Benjamin and
            Naselaris, Thomas and Kay, Kendrick},
  title = {A Massive 7{T} {fMRI} Dataset to Bridge Cognitive Neuroscience and Artificial
           Intelligence},
  journal = {Nature Neuroscience},
  volume = {25},
  number = {1},
  pages = {116--126},
  year = {2022},
  doi = {10.1038/s41593-021-00962-x}
}
"""
FOLDER = "allen2022"
#: Empty, as the study publishes no hashes: `load` checks what the files hold instead.
REGISTRY: dict[str, RemoteFile] = {}

BUCKET = "s3://natural-scenes-dataset"
BASE = "https://natural-scenes-dataset.s3.amazonaws.com/"
#: Sessions of the core experiment that each subject completed.
SESSIONS = {
    "subj01": 40, "subj02": 40, "subj03": 32, "subj04": 30,
    "subj05": 40, "subj06": 32, "subj07": 40, "subj08": 30,
}  # fmt: skip

_SPACE = "func1pt8mm"
_BETAS = "betas_fithrf_GLMdenoise_RR"
_DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
_INFO = "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
_STIMULI = "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
_IMAGES = "imgBrick"
_FLOC = ("floc-faces", "floc-bodies", "floc-places", "floc-words")
_EARLY, _HCP, _GENERAL = "prf-visualrois", "HCP_MMP1", "nsdgeneral"
#: Integers hold percent signal change times this.
_INTEGER_SCALE = 300.0
_VERSION = 1
#: Places in the volume of a subject's vertices at middle depth, and vertices of fsaverage.
_TO_SURFACE = ("func1pt8-to-layerB2", "white-to-fsaverage")
_NOWHERE = 9999


def addresses(subjects: Sequence[str] | None = None) -> dict[str, str]:
    """Return the public https address of every file that `load` reads, by its path in the study.

    Betas are named as HDF5, which is read voxel by voxel; `load` also takes the smaller NIfTI
    files. (Files with ``lh.`` and ``rh.`` are optional: they tell the hemispheres, and the voxel of
    each vertex of fsaverage5.)

    Parameters
    ----------
    subjects : sequence of str, optional
        ``subj01`` ... ``subj08``. Default: all.
    """
    names = [_DESIGN, _INFO, _STIMULI]
    for subject in _checked_subjects(subjects):
        names += [_roi_file(subject, roi) for roi in (*_FLOC, _EARLY, _HCP, _GENERAL)]
        names += [_roi_file(subject, f"{side}.{_HCP}") for side in ("lh", "rh")]
        names += [_names_file(subject, roi) for roi in (*_FLOC, _EARLY, _HCP)]
        names += [_transform(subject, f"{side}.{t}") for side in ("lh", "rh") for t in _TO_SURFACE]
        names.append(f"{_beta_folder(subject)}/ncsnr.nii.gz")
        names += [
            f"{_beta_folder(subject)}/betas_session{s:02d}.hdf5"
            for s in range(1, SESSIONS[subject] + 1)
        ]
    return {name: BASE + name for name in names}


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
) -> Path:
    """Find the user's own copy of the study: hundreds of GB that are not downloaded from here.

    Parameters
    ----------
    folder : path, optional
        The folder that holds ``nsddata`` and the others. Default: ``allen2022`` in `data_home`,
        else in the mirror, where that is a folder.
    mirror : path, optional
        Default: `BRAINALIGN_MIRROR`.
    accept_terms : bool
        The user agrees to the study's terms.
    progress : bool
        Without effect.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UnavailableError
        The agreement was not given, or there is no copy; the message says how to make one.
    """
    check_agreement(sys.modules[__name__], accept_terms)
    root = _root(folder, mirror)
    present = [s for s in SESSIONS if (root / _beta_folder(s)).is_dir()]
    missing = [name for name in (_DESIGN, _INFO, _STIMULI) if not (root / name).is_file()]
    if missing or not present:
        lacks = missing[0] if missing else f"{_beta_folder('subj01')} or that of another subject"
        raise UnavailableError(f"{TITLE} in {root}: there is no {lacks}.", _how_to_copy(root))
    logger.info("%s: %s in %s", TITLE, ", ".join(present), root)
    return root


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    subjects: Sequence[str] | None = None,
    voxels: Literal["higher", "nsdgeneral"] = "higher",
    parcels: int = 45,
    food: str | None = None,
    sessions: int | None = None,
    missing: Literal["raise", "exclude"] = "raise",
    bad: Literal["raise", "exclude"] = "exclude",
    normalise: Literal["session", "none"] = "session",
    scratch: str | os.PathLike[str] | None = None,
    stimuli_folder: str | os.PathLike[str] | None = None,
) -> Study:
    r"""Load single-trial responses (``betas_fithrf_GLMdenoise_RR``, 1.8 mm) with their images.

    .. math:: z_{tv} = (y_{tv} - \bar y_{sv}) / \sigma_{sv}

    for trial t of session s and voxel v. Presentations are kept: encoding averages them.

    A subject is read when it is asked for, a session at a time, into a temporary file of its final
    size; what is in memory is one session of the chosen voxels (for NIfTI betas, one whole
    session, about 1 GB).

    Parameters
    ----------
    folder : path, optional
        The folder that holds ``nsddata``, ``nsddata_betas`` and ``nsddata_stimuli``. Default: as in
        `fetch`.
    subjects : sequence of str, optional
        ``subj01`` ... ``subj08``. Default: all.
    voxels : {"higher", "nsdgeneral"}
        As in `choose_voxels`, or the study's general ROI.
    parcels : int
        For "higher": parcels of HCP_MMP1 with the highest mean ncsnr.
    food : str, optional
        NIfTI mask of food-selective voxels, absolute or from `folder`; ``{subject}`` stands for the
        subject. Becomes the ROI ``food``.
    sessions : int, optional
        Use the first so many sessions (37 were public at first). Default: all.
    missing : {"raise", "exclude"}
        What to do about sessions that are not there.
    bad : {"raise", "exclude"}
        What to do about voxels that are constant or not finite in a session, as at the edges of the
        imaged volume.
    normalise : {"session", "none"}
        z-score each voxel within each session, or keep percent signal change.
    scratch : path, optional
        Where the temporary file lies: 4 bytes x trials x voxels. Default: the cache folder.
    stimuli_folder : path, optional
        Where the index of the images is kept. Default: a folder of the cache.

    Returns
    -------
    Study
        ``responses`` by subject (presentation, neuroid), with ``session`` and ``run`` from 1,
        ``trial`` (position in the experiment, from 0), ``ncsnr`` as published, ``roi_mask`` of
        every ROI with voxels, and unions: FFA of FFA-1 and FFA-2, FBA, VWFA. ``stimuli``: the
        images that these subjects saw, read from ``nsd_stimuli.hdf5``; ids ``nsd00000`` ...
        ``nsd72999`` count from 0 as the study's ``nsdId``. Columns: ``coco_id``, ``coco_split``;
        ``shared1000``; and ``seen_by_all``, those that all eight subjects saw in their sessions.
        ``extras["surface_SUBJECT"]``, where the study's transforms are there: ``neuroid_id``
        (vertex), the voxel in which each vertex of fsaverage5 lies at middle depth, ``""`` for
        none, with ``vertex`` and ``hemisphere``.

    Raises
    ------
    UnavailableError
        Files are missing.
    SchemaError
        Files do not fit each other: shapes, numbers of trials or images, masks.
    ConfigError
        An argument cannot be used.

    References
    ----------
    Allen et al. 2022, Nature Neuroscience 25:116-126; the NSD Data Manual.
    """
    for name, value, known in (
        ("voxels", voxels, ("higher", "nsdgeneral")),
        ("missing", missing, ("raise", "exclude")),
        ("bad", bad, ("raise", "exclude")),
        ("normalise", normalise, ("session", "none")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(known)}.")
    for name, number in (("sessions", sessions), ("parcels", parcels)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; expected at least 1.")
    root = _root(folder, None)
    chosen = _checked_subjects(subjects)
    design = _Design(root / _DESIGN, sessions)
    plans = {s: _Plan(root, s, design, voxels, parcels, food, missing) for s in chosen}
    seen = np.unique(np.concatenate([plan.images for plan in plans.values()]))
    home = data_home() / "stimuli" / FOLDER if stimuli_folder is None else Path(stimuli_folder)
    stimuli = _stimuli(root, seen, design, home)
    temporary = data_home() if scratch is None else Path(scratch)

    def of(subject: str) -> xr.Dataset:
        return _read(plans[subject], bad, normalise, temporary)

    surfaces = {f"surface_{s}": _surface(root, s) for s in chosen}
    extras = {name: ds for name, ds in surfaces.items() if ds is not None}
    return Study("allen2022", responses=LazyMapping(chosen, of), stimuli=stimuli, extras=extras)


def stimulus_ids(nsd_id: ArrayLike) -> list[str]:
    """Return the names of images by the study's ``nsdId`` (from 0): ``nsd00000`` ..."""
    return [f"nsd{int(i):05d}" for i in np.ravel(np.asarray(nsd_id))]


def choose_voxels(
    localised: ArrayLike, early: ArrayLike, parcel: ArrayLike, ncsnr: ArrayLike, n_parcels: int = 45
) -> tuple[NDArray[np.bool_], list[int]]:
    """Choose higher visual cortex: localised voxels and the most reliable parcels, less early ones.

    Parameters
    ----------
    localised : array-like of bool
        Voxels of any category-selective ROI; all arrays have one shape.
    early : array-like of bool
        Voxels of retinotopic areas, which are left out.
    parcel : array-like of int
        Parcel of each voxel; none at 0 and below.
    ncsnr : array-like of float
        Noise-ceiling signal-to-noise ratio of single trials; NaN where there is none.
    n_parcels : int
        How many parcels of the highest mean ncsnr are taken.

    Returns
    -------
    voxels : ndarray of bool
        The chosen voxels.
    parcels : list of int
        The chosen parcels, the most reliable first; the lower number where means are equal.

    Raises
    ------
    SchemaError
        Shapes differ, or no voxel is left.

    References
    ----------
    Luo et al. 2023, Brain Diffusion for Visual Exploration, NeurIPS.
    """
    inside, out = np.asarray(localised, dtype=bool), np.asarray(early, dtype=bool)
    label, snr = np.asarray(parcel).astype(int), np.asarray(ncsnr, dtype=np.float64)
    shapes = {a.shape for a in (inside, out, label, snr)}
    if len(shapes) > 1:
        raise SchemaError(f"The masks and ncsnr have different shapes: {sorted(shapes)}.")
    known = (label > 0) & np.isfinite(snr)
    n = np.bincount(label[known])
    total = np.bincount(label[known], weights=snr[known])
    means = {i: total[i] / n[i] for i in np.flatnonzero(n).tolist()}
    best = sorted(means, key=lambda i: (-means[i], i))[:n_parcels]
    voxels = (inside | np.isin(label, best)) & ~out
    if not voxels.any():
        raise SchemaError("No voxel is left: the masks hold none outside the early areas.")
    return voxels, best


def zscore_sessions(values: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    r"""z-score the trials of one session, and tell voxels for which that is not possible.

    .. math:: z_{tv} = (y_{tv} - \bar y_v) / \sigma_v, \qquad
              \sigma_v^2 = \tfrac1T \sum_t (y_{tv} - \bar y_v)^2

    Parameters
    ----------
    values : array-like, shape (n_trials, n_voxels)
        One session.

    Returns
    -------
    z : ndarray of float32, shape (n_trials, n_voxels)
        NaN in bad voxels.
    bad : ndarray of bool, shape (n_voxels,)
        Constant, or not finite in some trial.
    """
    y = np.asarray(values, dtype=np.float64)
    bad = np.asarray(~np.isfinite(y).all(axis=0) | (y == y[:1]).all(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        y = y - y.mean(axis=0)
        y /= y.std(axis=0)
    y[:, bad] = np.nan
    return y.astype(np.float32), bad


class _Design:
    """Which image each subject saw in each trial."""

    def __init__(self, path: Path, sessions: int | None) -> None:
        from scipy.io import loadmat

        if not path.is_file():
            raise UnavailableError(f"{path} is missing.", _how_to_copy(path.parents[3]))
        design = loadmat(path)
        wanted = ("masterordering", "subjectim", "sharedix", "stimpattern")
        lacking = [name for name in wanted if name not in design]
        if lacking:
            raise SchemaError(f"{path} holds no {lacking[0]!r}.")
        order = design["masterordering"].ravel().astype(int) - 1
        images = design["subjectim"].astype(int) - 1
        pattern = design["stimpattern"]
        #: Trials in each run of each session.
        self.runs = pattern.reshape(*pattern.shape[:2], -1).sum(axis=2).astype(int)
        if len(images) != len(SESSIONS) or order.min() < 0 or order.max() >= images.shape[1]:
            raise SchemaError(
                f"{path}: subjectim is {images.shape} and masterordering goes to "
                f"{order.max() + 1}; expected 8 subjects and all images of each."
            )
        per_session = set(self.runs.sum(axis=1).tolist())
        self.n_trials = len(order) // len(self.runs)
        if per_session != {self.n_trials} or self.n_trials * len(self.runs) != len(order):
            raise SchemaError(
                f"{path}: stimpattern has sessions of {sorted(per_session)} trials, and "
                f"masterordering {len(order)} trials in {len(self.runs)} sessions."
            )
        #: nsdId (from 0) of each trial, by subject.
        self.shown = {s: images[k][order] for k, s in enumerate(SESSIONS)}
        most = len(self.runs) if sessions is None else min(sessions, len(self.runs))
        self.sessions = {s: min(n, most) for s, n in SESSIONS.items()}
        self.shared = np.sort(design["sharedix"].ravel().astype(int) - 1)

    def rows(self, session: int) -> slice:
        """Return the trials of a session (from 1)."""
        return slice((session - 1) * self.n_trials, session * self.n_trials)

    def run_of(self, session: int) -> NDArray[np.int64]:
        """Return the run (from 1) of each trial of a session."""
        counts = self.runs[session - 1]
        return np.repeat(np.arange(1, len(counts) + 1), counts)

    @property
    def seen_by_all(self) -> NDArray[np.int64]:
        """The images that all eight subjects saw in their sessions."""
        common = set(self.shared.tolist())
        for subject, n in self.sessions.items():
            common &= set(self.shown[subject][: n * self.n_trials].tolist())
        return np.array(sorted(common), dtype=np.int64)


class _Plan:
    """What is read of one subject, found and checked before any beta is read."""

    def __init__(
        self,
        root: Path,
        subject: str,
        design: _Design,
        voxels: str,
        parcels: int,
        food: str | None,
        missing: str,
    ) -> None:
        self.root, self.subject, self.design = root, subject, design
        betas = root / _beta_folder(subject)
        self.files: dict[int, Path] = {}
        absent = []
        for session in range(1, design.sessions[subject] + 1):
            stem = betas / f"betas_session{session:02d}"
            found = [
                p for e in (".hdf5", ".nii.gz") if (p := stem.with_name(stem.name + e)).is_file()
            ]
            if found:
                self.files[session] = found[0]
            else:
                absent.append(session)
        if absent and (missing == "raise" or not self.files):
            raise UnavailableError(
                f"{subject}: betas of {len(absent)} of {design.sessions[subject]} sessions are "
                f"missing in {betas}; the first is betas_session{absent[0]:02d}, as .hdf5 or "
                ".nii.gz.",
                f"Copy {BUCKET}/{_beta_folder(subject)}, or use what is there with "
                "missing='exclude'.",
            )
        if absent:
            logger.warning("%s: without sessions %s.", subject, ", ".join(map(str, absent)))
        self.absent = absent
        self._find_voxels(voxels, parcels, food)
        rows = [np.arange(design.n_trials * len(design.runs))[design.rows(s)] for s in self.files]
        self.trial = np.concatenate(rows)
        self.images = design.shown[subject][self.trial]
        for path in self.files.values():
            _check_betas(path, (*self.shape, design.n_trials))

    def _find_voxels(self, voxels: str, parcels: int, food: str | None) -> None:
        subject = self.subject
        reliability = self.root / _beta_folder(subject) / "ncsnr.nii.gz"
        image = _image(reliability)
        self.shape: tuple[int, ...] = tuple(int(n) for n in image.shape[:3])
        self.affine = np.asarray(image.affine)
        ncsnr = np.asarray(image.dataobj, dtype=np.float64).reshape(self.shape)
        early = self._labels(_EARLY)
        self.labels = {roi: self._labels(roi) for roi in _FLOC}
        localised = np.any([v > 0 for v in self.labels.values()], axis=0)
        self.food: NDArray[np.bool_] | None = None
        if food is not None:
            path = Path(food.replace("{subject}", subject)).expanduser()
            self.food = self._volume(path if path.is_absolute() else self.root / path) > 0
            localised |= self.food
        hcp = self._labels(_HCP)
        if voxels == "higher":
            inside, best = choose_voxels(localised, early > 0, hcp, ncsnr, parcels)
        else:
            inside, best = self._labels(_GENERAL) > 0, []
            self.labels = {_EARLY: early, **self.labels}
        self.labels[_HCP] = np.where(np.isin(hcp, best), hcp, 0)
        self.ijk = np.argwhere(inside)
        if not len(self.ijk):
            raise SchemaError(f"{subject}: {_GENERAL} holds no voxel.")
        here = tuple(self.ijk.T)
        self.labels = {roi: v[here] for roi, v in self.labels.items()}
        self.food = None if self.food is None else self.food[here]
        # Single-trial data have no signal where ncsnr is NaN.
        self.ncsnr = np.nan_to_num(ncsnr[here])
        self.hemisphere = self._hemisphere()[here]

    def _labels(self, roi: str) -> NDArray[np.int64]:
        return self._volume(self.root / _roi_file(self.subject, roi)).astype(np.int64)

    def _volume(self, path: Path) -> NDArray[np.float64]:
        image = _image(path)
        if tuple(image.shape[:3]) != self.shape or not np.allclose(
            image.affine, self.affine, atol=1e-3
        ):
            raise SchemaError(
                f"{path} has shape {image.shape[:3]} and affine "
                f"{np.asarray(image.affine).tolist()}; ncsnr of {self.subject} has {self.shape} "
                f"and {self.affine.tolist()}.",
                f"Use files of {_SPACE}.",
            )
        return np.nan_to_num(np.asarray(image.dataobj, dtype=np.float64).reshape(self.shape))

    def _hemisphere(self) -> NDArray[np.str_]:
        out = np.full(self.shape, "", dtype="U1")
        for side, name in (("lh", "L"), ("rh", "R")):
            path = self.root / _roi_file(self.subject, f"{side}.{_HCP}")
            if path.is_file():
                out[self._volume(path) > 0] = name
        return out

    def rois(self) -> dict[str, NDArray[np.bool_]]:
        """Return the masks of all ROIs with voxels, and unions of numbered ones."""
        masks: dict[str, NDArray[np.bool_]] = {}
        for roi, label in self.labels.items():
            names = _read_names(self.root / _names_file(self.subject, roi))
            for value in np.unique(label[label > 0]).tolist():
                if value not in names:
                    raise SchemaError(
                        f"{self.subject}: label {value} of {roi} has no name in "
                        f"{_names_file(self.subject, roi)}."
                    )
                name = names[value]
                masks[name] = label == value
                union, _, number = name.rpartition("-")
                if roi in _FLOC and number.isdigit():
                    masks[union] = masks.get(union, False) | masks[name]
        if self.food is not None and self.food.any():
            masks["food"] = self.food
        return masks


def _read(plan: _Plan, bad: str, normalise: str, scratch: Path) -> xr.Dataset:
    """Read one subject, a session at a time, into a temporary file that lives while it is used."""
    from tqdm import tqdm

    design, n, n_voxels = plan.design, len(plan.trial), len(plan.ijk)
    scratch.mkdir(parents=True, exist_ok=True)
    require_disk(scratch, 4 * n * n_voxels)
    with tempfile.TemporaryFile(dir=scratch) as file:
        # By voxel, as it is stored: each chunk is then read in one piece.
        values = np.memmap(file, dtype=np.float32, mode="w+", shape=(n_voxels, n))
    worst = np.zeros(n_voxels, dtype=bool)
    faults: dict[int, int] = {}
    bar = tqdm(plan.files.items(), desc=plan.subject, unit="session", disable=None)
    for i, (session, path) in enumerate(bar):
        betas = _read_betas(path, plan.ijk)
        z, broken = zscore_sessions(betas)
        if broken.any():
            faults[session] = int(broken.sum())
            worst |= broken
        values[:, i * design.n_trials : (i + 1) * design.n_trials] = (
            z if normalise == "session" else betas
        ).T
    good = np.flatnonzero(~worst)
    if len(good) < n_voxels:
        first = min(faults)
        message = (
            f"{plan.subject}: {n_voxels - len(good)} of {n_voxels} voxels are constant or not "
            f"finite in a session ({faults[first]} in session {first}; {len(faults)} sessions have "
            "some)"
        )
        if bad == "raise" or not len(good):
            raise SchemaError(message + ".", "Leave them out with bad='exclude'.")
        logger.warning("%s; left out.", message)
        for start in range(0, len(good), 1024):
            # In place: a voxel never moves behind one that is still to be moved.
            part = good[start : start + 1024]
            values[start : start + len(part)] = values[part]
    ijk = plan.ijk[good]
    xyz = ijk @ plan.affine[:3, :3].T + plan.affine[:3, 3]
    ids = np.array(stimulus_ids(plan.images))
    ds = xr.Dataset(
        {"responses": (("presentation", "neuroid"), values[: len(good)].T)},
        coords={
            "stimulus_id": ("presentation", ids),
            "repetition": ("presentation", _repetition(plan.images)),
            "session": ("presentation", np.repeat(list(plan.files), design.n_trials)),
            "run": ("presentation", np.concatenate([design.run_of(s) for s in plan.files])),
            "trial": ("presentation", plan.trial),
            "subject": ("presentation", np.full(n, plan.subject)),
            "neuroid_id": ("neuroid", [f"{i}-{j}-{k}" for i, j, k in ijk.tolist()]),
            "roi": ("neuroid", np.full(len(good), "", dtype="U1")),
            "hemisphere": ("neuroid", plan.hemisphere[good]),
            "ncsnr": ("neuroid", plan.ncsnr[good]),
            **{name: ("neuroid", ijk[:, axis]) for axis, name in enumerate("ijk")},
            **{name: ("neuroid", xyz[:, axis]) for axis, name in enumerate("xyz")},
        },
        attrs={
            "units": "z-score within session" if normalise == "session" else "% signal change",
            "subject": plan.subject,
            "space": _SPACE,
            "volume_shape": list(plan.shape),
            "affine": plan.affine.ravel().tolist(),
            "sessions": list(plan.files),
            "missing_sessions": plan.absent,
            "excluded_neuroids": n_voxels - len(good),
        },
    )
    masks = {name: mask[good] for name, mask in plan.rois().items()}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    return validate(add_rois(ds, masks) if masks else ds, "responses")


def _surface(root: Path, subject: str) -> xr.Dataset | None:
    """Return the voxel of each vertex of fsaverage5, or None without the study's transforms.

    For every vertex of fsaverage the study names the nearest vertex of the subject, and for each of
    those its place in the functional volume; both count from 1. The first vertices of fsaverage are
    those of fsaverage5.
    """
    found = []
    for side in ("lh", "rh"):
        to_volume, to_average = (root / _transform(subject, f"{side}.{t}") for t in _TO_SURFACE)
        if not to_volume.is_file() or not to_average.is_file():
            return None
        place = np.asarray(_image(to_volume).dataobj, dtype=np.float64).reshape(-1, 3, order="F")
        nearest = np.asarray(_image(to_average).dataobj).ravel().astype(int)[:N_VERTICES] - 1
        if len(nearest) < N_VERTICES or not ((nearest >= 0) & (nearest < len(place))).all():
            raise SchemaError(
                f"{to_average} and {to_volume} do not fit: {len(nearest)} vertices of fsaverage "
                f"with numbers up to {nearest.max() + 1}, {len(place)} of the subject.",
                "Copy both again.",
            )
        ijk = place[nearest] - 1
        known = (place[nearest] < _NOWHERE).all(axis=1)
        rounded = np.rint(np.where(known[:, None], ijk, 0)).astype(int).tolist()
        found += [
            f"{i}-{j}-{k}" if yes else ""
            for (i, j, k), yes in zip(rounded, known.tolist(), strict=True)
        ]
    return xr.Dataset(
        {"neuroid_id": ("vertex", found)},
        coords={
            "vertex": ("vertex", np.tile(np.arange(N_VERTICES), 2)),
            "hemisphere": ("vertex", np.repeat(["L", "R"], N_VERTICES)),
        },
        attrs={"space": "fsaverage5", "subject": subject},
    )


def _repetition(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each trial's image was shown before."""
    order = np.argsort(images, kind="stable")
    _, start, count = np.unique(images[order], return_index=True, return_counts=True)
    out = np.empty(len(images), dtype=np.int64)
    out[order] = np.arange(len(images)) - np.repeat(start, count)
    return out


def _check_betas(path: Path, expected: tuple[int, ...]) -> None:
    """Raise unless a file of betas has this shape (i, j, k, trial)."""
    if path.suffix == ".hdf5":
        import h5py

        with h5py.File(path, "r") as file:
            betas = file.get("betas")
            came = None if betas is None else betas.shape[::-1]
    else:
        came = _image(path).shape
    if came != expected:
        raise SchemaError(
            f"{path} holds {'no betas' if came is None else f'betas of shape {came}'}; expected "
            f"{expected} (voxels as ncsnr, trials as the design).",
            "Copy the file again.",
        )


def _read_betas(path: Path, ijk: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the betas (trial, voxel) of one session in percent signal change."""
    if path.suffix == ".hdf5":
        import h5py

        with h5py.File(path, "r") as file:
            betas = file["betas"]
            out = np.empty((betas.shape[0], len(ijk)), dtype=betas.dtype)
            # MATLAB's order: (trial, k, j, i), stored voxel by voxel.
            order = np.lexsort((ijk[:, 0], ijk[:, 1], ijk[:, 2]))
            line = ijk[order, 2] * (ijk[:, 1].max() + 1) + ijk[order, 1]
            for part in np.split(order, np.flatnonzero(np.diff(line)) + 1):
                i, j, k = ijk[part].T
                out[:, part] = betas[:, k[0], j[0], i[0] : i[-1] + 1][:, i - i[0]]
    else:
        out = np.asanyarray(_image(path).dataobj)[tuple(ijk.T)].T
    scale = _INTEGER_SCALE if np.issubdtype(out.dtype, np.integer) else 1.0
    return out.astype(np.float64) / scale


def _stimuli(root: Path, seen: NDArray[np.int64], design: _Design, home: Path) -> StimulusSet:
    """Return the images that were seen; their hashes are kept while the file stays as it is."""
    import pandas as pd

    source = root / _STIMULI
    if not source.is_file() or not (root / _INFO).is_file():
        lost = _STIMULI if not source.is_file() else _INFO
        raise UnavailableError(f"{root / lost} is missing.", _how_to_copy(root))
    wanted = ["nsdId", "cocoId", "cocoSplit", "shared1000"]
    info = pd.read_csv(root / _INFO, usecols=lambda c: c in wanted)
    lacking = [c for c in wanted if c not in info]
    if lacking:
        raise SchemaError(f"{root / _INFO} has no column {lacking[0]!r}.")
    info = info.set_index("nsdId")
    shared = np.sort(info.index[info["shared1000"].astype(bool)].to_numpy())
    if not np.array_equal(shared, design.shared):
        raise SchemaError(
            f"{_INFO} and {_DESIGN} name different shared images "
            f"({len(shared)} and {len(design.shared)} of them).",
            "Copy both again.",
        )
    unknown = np.setdiff1d(seen, info.index.to_numpy())
    if len(unknown):
        raise SchemaError(f"{_INFO} has no row for nsdId {unknown[0]} and {len(unknown) - 1} more.")
    rows = info.loc[seen]
    extra: dict[str, Any] = {
        "coco_id": rows["cocoId"].to_numpy(),
        "coco_split": rows["cocoSplit"].astype(str).to_numpy(),
        "shared1000": rows["shared1000"].astype(bool).to_numpy(),
        "seen_by_all": np.isin(seen, design.seen_by_all),
    }
    stat = source.stat()
    key = sha256_of(
        {"version": _VERSION, "file": str(source), "bytes": stat.st_size, "time": stat.st_mtime_ns},
        seen,
        *(np.asarray(v) for k, v in extra.items() if k != "coco_split"),
    )
    index = home / f"index-{key[:16]}.nc"
    if index.is_file():
        return StimulusSet(read(index, "images"), source.parent)
    made = index_hdf5(
        source, _IMAGES, seen.tolist(), stimulus_ids(seen), extra=extra, progress="images"
    )
    try:
        write(made.index, index, "images", overwrite=True)
    except PermissionError as error:
        raise UnavailableError(
            f"The index of the images cannot be written to {home}: {error.strerror}.",
            "Set BRAINALIGN_DATA to a folder that can be written.",
        ) from error
    return made


def _checked_subjects(subjects: Sequence[str] | None) -> list[str]:
    chosen = list(SESSIONS) if subjects is None else [str(s) for s in subjects]
    unknown = [s for s in chosen if s not in SESSIONS]
    if unknown:
        raise UnknownNameError(
            f"{TITLE} has no subject {unknown[0]!r}.{near(unknown[0], SESSIONS)}",
            f"Subjects: {', '.join(SESSIONS)}.",
        )
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"subjects must be one or more different names; got {chosen}.")
    return chosen


def _beta_folder(subject: str) -> str:
    return f"nsddata_betas/ppdata/{subject}/{_SPACE}/{_BETAS}"


def _roi_file(subject: str, roi: str) -> str:
    return f"nsddata/ppdata/{subject}/{_SPACE}/roi/{roi}.nii.gz"


def _names_file(subject: str, roi: str) -> str:
    return f"nsddata/freesurfer/{subject}/label/{roi}.mgz.ctab"


def _transform(subject: str, name: str) -> str:
    return f"nsddata/ppdata/{subject}/transforms/{name}.mgz"


def _read_names(path: Path) -> dict[int, str]:
    """Read a FreeSurfer colour table: number, name, and perhaps a colour."""
    if not path.is_file():
        raise UnavailableError(f"{path} is missing.", f"Copy it from {BUCKET}.")
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].lstrip("-").isdigit()}


def _image(path: Path) -> Any:
    import nibabel

    if not path.is_file():
        raise UnavailableError(f"{path} is missing.", f"Copy it from {BUCKET}.")
    try:
        return nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise SchemaError(f"{path} is no NIfTI image: {error}.", "Copy the file again.") from error


def _root(folder: str | os.PathLike[str] | None, mirror: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser().absolute()
    own = data_home() / FOLDER
    near_by = mirror_folder() if mirror is None else Path(mirror)
    if not own.is_dir() and near_by is not None and (near_by / FOLDER).is_dir():
        return near_by / FOLDER
    return own


def _how_to_copy(root: Path) -> str:
    return (
        "The study is hundreds of GB and is copied with Amazon's own client, which checks what it "
        "transfers; docs/nsd.md lists every command, and "
        "`brainalign.data.studies.allen2022.addresses` every file. For one subject's betas: "
        f"aws s3 sync --no-sign-request {BUCKET}/{_beta_folder('subj01')} "
        f"{root / _beta_folder('subj01')} --exclude '*' --include 'betas_session*.hdf5' "
        "--include ncsnr.nii.gz"
    )
