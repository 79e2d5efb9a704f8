"""Kay & Yeatman 2017: words and faces in VWFA and FFA, two experiments and template models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.schema import validate
from brainalign.data.store import sha256_of
from brainalign.data.studies import (
    Study,
    cached_stimuli,
    data_home,
    fetch_study,
    kriegeskorte2008,
    open_study,
    read_registry,
)

__all__ = [
    "BIBTEX",
    "CITATION",
    "FOLDER",
    "LICENCE",
    "MUST_AGREE",
    "REGISTRY",
    "TERMS",
    "TITLE",
    "decode_luminance",
    "fetch",
    "load",
    "niko_images",
]

TITLE = "Words and faces in VWFA and FFA: responses, stimuli, template models"
LICENCE = "CC BY 3.0"
TERMS = (
    "Creative Commons Attribution 3.0 Unported: cite the article. The 92 object photographs of "
    "experiment 2 are greyscale versions of the stimuli of Kriegeskorte et al. 2008."
)
MUST_AGREE = False
CITATION = (
    "Kay KN, Yeatman JD. Bottom-up and top-down computations in word- and face-selective cortex. "
    "eLife 2017;6:e22341. doi:10.7554/eLife.22341"
)
BIBTEX = """@article{kay2017,
  author = {Kay, Kendrick N. and Yeatman, Jason D.},
  title = {Bottom-up and Top-down Computations in Word- and Face-Selective Cortex},
  journal = {eLife},
  volume = {6},
  pages = {e22341},
  year = {2017},
  doi = {10.7554/eLife.22341}
}
"""
FOLDER = "kay2017_vwfa_ffa"
REGISTRY = read_registry("kay2017")

#: Number of conditions of experiment 1, and of images in each.
N_STIMULI, N_IMAGES = 23, 10

_VERSION = 1
_UNITS = "% BOLD signal change"


def niko_images() -> NDArray[np.intp]:
    """Return the image number (1-92) of each of the conditions NIKO01 ... NIKO92.

    The authors' conditions follow the images' numbers sorted as text: 1, 10, 11, ..., 19, 2, 20,
    ...
    """
    return np.array(sorted(range(1, 93), key=str), dtype=np.intp)


def decode_luminance(png: ArrayLike) -> NDArray[np.float64]:
    """Recover linear luminance from the images of experiment 1.

    L = round(254 (p / 255)^2), as the files hold p = 255 sqrt(L / 254); the background is 127.

    Parameters
    ----------
    png : array of uint8
        Grey values of a PNG file.

    Returns
    -------
    array of float
        Luminance, 0-254.
    """
    return np.round(254 * (np.asarray(png, dtype=np.float64) / 255) ** 2)


def fetch(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch the study (11 MB); see `brainalign.data.studies.fetch_study`."""
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
    """Load both experiments.

    Parameters
    ----------
    folder : path, optional
        Where `fetch` put the files. Default: the cache.
    stimuli_folder : path, optional
        Where the images are written as PNG files, once. Default: a folder of the cache.

    Returns
    -------
    Study
        ``responses["subject1"]``: experiment 2, betas (presentation 115, neuroid VWFA and FFA) in %
        signal change, with ``standard_error`` (presentation, neuroid) and ``bootstrap`` (bootstrap
        100, presentation, neuroid). No condition comes twice; the coord ``ncsnr`` (neuroid) follows
        from the standard errors se: the noise variance is the mean of se^2, the signal variance
        max(0, Var[beta] - mean se^2), and one beta counts as one repetition, so that ncsnr^2 /
        (ncsnr^2 + 1) is its noise ceiling. ``stimuli``: its 115 images, 750 x 750, linear luminance
        on 127. Stimulus ids are the authors' names for the first 23 and, in the order and with the
        ids of Kriegeskorte 2008, ``image01`` ... ``image92`` for the rest (the authors' NIKO01 ...
        are sorted as text; the coord ``condition`` keeps them). ``extras``:

        - ``experiment1``: group means over 9 subjects (presentation 23, neuroid), with
          ``standard_error``; coord ``category`` is the observers' judgement: WORD, FACE, OTHER or
          "" (blank).
        - ``experiment1_stimuli``: its 230 images, 500 x 500, linear luminance on 127, ids
          ``<condition>-<01...10>``.
        - ``v1``: features Dataset (stimulus 230, feature 8192) of V1-like energy channels; coords
          ``row``, ``column``, ``orientation`` (degrees) on feature, and scalar ``model``,
          ``layer``.
        - ``templates``: (template_name WORD, FACE; feature); ``projections``: ``template_match``
          (template_name, stimulus), S.T per image, and ``energy`` (stimulus), the mean of the
          channels.
        - ``gabors``: (phase, orientation, row, column).
        - ``models``: ``fit`` and ``prediction`` (leave-one-stimulus-out) (model, neuroid,
          presentation), ``performance`` (model, neuroid) and ``parameters`` (model, neuroid,
          parameter), NaN where a model has fewer.
        - ``noise_ceiling``: ``ceiling`` (neuroid), % R2, the median of ``samples`` (sample,
          neuroid).

    Raises
    ------
    UnavailableError, ChecksumError
        The study was not fetched, or its files differ from the published ones.

    References
    ----------
    Kay & Yeatman 2017, eLife 6:e22341.
    """
    root = open_study(__name__, REGISTRY, FOLDER, folder)
    home = data_home() / "stimuli" / "kay2017" if stimuli_folder is None else Path(stimuli_folder)
    second = _experiment2(root / "experiment2.mat", home / "experiment2")
    extras = _experiment1(root, second["names"], home / "experiment1")
    return Study(
        "kay2017",
        responses={"subject1": second["responses"]},
        stimuli=second["stimuli"],
        extras=extras,
    )


def _text(file: Any, reference: Any) -> str:
    """Read a MATLAB char array; an empty one holds its shape instead of characters."""
    dataset = file[reference]
    if dataset.attrs.get("MATLAB_empty", 0):
        return ""
    return "".join(map(chr, dataset[:].ravel()))


def _cells(file: Any, name: str) -> list[str]:
    return [_text(file, reference) for reference in file[name][:].ravel()]


def _source(*files: str) -> str:
    return sha256_of({f: REGISTRY[f].sha256 for f in files} | {"version": _VERSION})


def _neuroids(names: list[str]) -> dict[str, Any]:
    return {
        "neuroid_id": ("neuroid", names),
        "roi": ("neuroid", names),
        "hemisphere": ("neuroid", ["", ""]),
    }


def _presentations(ids: list[str], subject: str) -> dict[str, Any]:
    once = np.zeros(len(ids), dtype=np.int64)
    return {
        "stimulus_id": ("presentation", ids),
        "repetition": ("presentation", once),
        "session": ("presentation", once),
        "run": ("presentation", once),
        "subject": ("presentation", [subject] * len(ids)),
    }


def _ncsnr(beta: NDArray[Any], standard_error: NDArray[Any]) -> NDArray[np.float64]:
    """Signal over noise standard deviation of each neuroid, from (condition, neuroid)."""
    noise = np.mean(np.square(standard_error, dtype=np.float64), axis=0)
    signal = np.maximum(0, np.var(beta, axis=0, ddof=1, dtype=np.float64) - noise)
    return np.asarray(np.sqrt(signal / noise))


def _experiment2(path: Path, stimuli_folder: Path) -> dict[str, Any]:
    import h5py

    with h5py.File(path) as file:
        rois, conditions = _cells(file, "roilabels"), _cells(file, "stimlabels")
        beta = file["subjectbeta"][:, :, 0]
        error = file["subjectbetase"][:, :, 0]
        bootstrap = file["subjectbetaboot"][:, :, :, 0]
        # [condition, x, y] in the file; an image is [row, column].
        images = file["stimuli"][:, 0].transpose(0, 2, 1)

    number = np.zeros(len(conditions), dtype=np.int64)
    number[N_STIMULI:] = niko_images()
    order = np.argsort(number, kind="stable")
    number = number[order]
    ids = [
        f"image{n:02d}" if n else conditions[i] for i, n in zip(order, number.tolist(), strict=True)
    ]
    categories = [name for name, count in kriegeskorte2008.CATEGORIES for _ in range(count)]
    category = [""] * N_STIMULI + categories
    responses = xr.Dataset(
        {
            "responses": (("presentation", "neuroid"), beta[order]),
            "standard_error": (("presentation", "neuroid"), error[order]),
            "bootstrap": (("resample", "presentation", "neuroid"), bootstrap[:, order]),
        },
        coords={
            **_presentations(ids, "subject1"),
            "condition": ("presentation", [conditions[i] for i in order]),
            "image_number": ("presentation", number),
            "category": ("presentation", category),
            **_neuroids(rois),
            "ncsnr": ("neuroid", _ncsnr(beta, error)),
        },
        attrs={
            "units": _UNITS,
            "subject": "subject1",
            "space": "region of interest means",
            "task": "fixation",
        },
    )
    stimuli = cached_stimuli(
        stimuli_folder,
        lambda: iter(images[order]),
        ids,
        _source("experiment2.mat"),
        extra={"category": category, "image_number": number.tolist()},
    )
    names = [conditions[i] for i in range(N_STIMULI)]
    return {"responses": validate(responses, "responses"), "stimuli": stimuli, "names": names}


def _experiment1(root: Path, names: list[str], stimuli_folder: Path) -> dict[str, Any]:
    import h5py

    with h5py.File(root / "model_template.mat") as file:
        value = {
            name: file[name][:]
            for name in ("data", "datase", "f", "templates", "A", "B", "modelfit", "modelpred",
                         "modelperformance", "nc", "ncdist")
        }  # fmt: skip
        category = _cells(file, "categories")
        models = _cells(file, "modelnames")
        gabors = np.stack([[file[r][:].T for r in row] for row in file["gbrs"][:, :, 0]])
        parameters = np.full((len(models), 2, 3), np.nan)
        for i, reference in enumerate(file["modelparams"][:].ravel()):
            stored = file[reference][:]
            parameters[i, :, : stored.shape[1]] = stored
    rois = ["VWFA", "FFA"]
    images = [f"{name}-{i:02d}" for name in names for i in range(1, N_IMAGES + 1)]

    responses = xr.Dataset(
        {
            "responses": (("presentation", "neuroid"), value["data"].T),
            "standard_error": (("presentation", "neuroid"), value["datase"].T),
        },
        coords={
            **_presentations(names, "group"),
            "category": ("presentation", category),
            **_neuroids(rois),
        },
        attrs={
            "units": _UNITS,
            "subject": "mean of 9 subjects",
            "space": "region of interest means",
            "task": "fixation",
        },
    )
    # f[stimulus, :, image] unfolds to [x, y, orientation]; rows run along y.
    grid: dict[str, Any] = {
        "column": np.repeat(np.arange(32), 32 * 8),
        "row": np.tile(np.repeat(np.arange(32), 8), 32),
        "orientation": np.tile(np.arange(8) * 22.5, 32 * 32),
    }
    feature = {name: ("feature", values) for name, values in grid.items()}
    v1 = xr.Dataset(
        {"features": (("stimulus", "feature"), value["f"].transpose(0, 2, 1).reshape(-1, 8192))},
        coords={
            "stimulus_id": ("stimulus", images),
            "model": "kay2017-v1",
            "layer": "energy",
            **feature,
        },
        attrs={"pooling": "none", "units": "divisively normalised contrast energy"},
    )
    stimulus = {"stimulus_id": ("stimulus", images)}
    template = {"template_name": ["WORD", "FACE"]}
    three = ("model", "neuroid", "presentation")
    neuroid = {"neuroid_id": ("neuroid", rois)}
    files = [
        f"experiment1stimuli/stimulus{s:02d}_{i:02d}.png"
        for s in range(1, N_STIMULI + 1)
        for i in range(1, N_IMAGES + 1)
    ]
    return {
        "experiment1": validate(responses, "responses"),
        "experiment1_stimuli": cached_stimuli(
            stimuli_folder,
            lambda: _luminance_images(root, files),
            images,
            _source(*files),
            extra={
                "category": [c for c in category for _ in range(N_IMAGES)],
                "condition": [n for n in names for _ in range(N_IMAGES)],
            },
        ),
        "v1": validate(v1, "features"),
        "templates": xr.Dataset(
            {"template": (("template_name", "feature"), value["templates"].T)},
            coords={**template, **feature},
        ),
        "projections": xr.Dataset(
            {
                "template_match": (("template_name", "stimulus"), value["A"].astype(np.float64)),
                "energy": ("stimulus", value["B"][0].astype(np.float64)),
            },
            coords={**template, **stimulus},
        ),
        "gabors": xr.Dataset(
            {"gabor": (("phase", "orientation", "row", "column"), gabors)},
            coords={"orientation": np.arange(8) * 22.5},
        ),
        "models": xr.Dataset(
            {
                "fit": (three, value["modelfit"]),
                "prediction": (three, value["modelpred"]),
                "performance": (("model", "neuroid"), value["modelperformance"]),
                "parameters": (("model", "neuroid", "parameter"), parameters),
            },
            coords={"model": models, **neuroid, "stimulus_id": ("presentation", names)},
            attrs={"units": _UNITS, "performance": "% R2 relative to zero"},
        ),
        "noise_ceiling": xr.Dataset(
            {
                "ceiling": ("neuroid", value["nc"][0]),
                "samples": (("sample", "neuroid"), value["ncdist"]),
            },
            coords=neuroid,
            attrs={"units": "% R2 relative to zero"},
        ),
    }


def _luminance_images(root: Path, files: list[str]) -> Iterator[NDArray[np.uint8]]:
    from PIL import Image

    for name in files:
        with Image.open(root / name) as image:
            yield decode_luminance(np.asarray(image)).astype(np.uint8)
