"""One's own recordings as a study: BIDS derivatives or GLMsingle betas, ROIs, and stimulus images.

Files that differ from subject to subject are named by patterns: ``{subject}`` stands for the label
without ``sub-``, ``*`` for anything. Relative patterns start at the root.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import xarray as xr

from brainalign.data import bids
from brainalign.data.stimuli import IMAGE_SUFFIXES, StimulusSet, index_images, read_stimuli
from brainalign.data.studies import Study
from brainalign.errors import ConfigError, SchemaError, UnavailableError, near

__all__ = ["load"]

logger = logging.getLogger(__name__)

Pattern = str | Path
Sides = Pattern | Mapping[str, Pattern]
_KINDS = ("betas", "bold", "glmsingle")
_PARTS = re.compile(r"\d+|\D+").findall
_GLMSINGLE = ("betas", "trials", "reference", "n_vertices")


def load(
    root: str | Path,
    *,
    stimuli: str | Path,
    subjects: Sequence[str] | None = None,
    kind: Literal["betas", "bold", "glmsingle"] = "betas",
    rois: Mapping[str, Sides] | None = None,
    atlas: Sides | None = None,
    lookup: Pattern | None = None,
    mask: Sides | None = "auto",
    entities: Mapping[str, str] | None = None,
    tables_root: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    betas: Pattern | None = None,
    trials: Pattern | None = None,
    reference: Pattern | None = None,
    n_vertices: Sequence[int] | None = None,
    stimulus_column: str | None = None,
    scale: float | None = None,
    bad: Literal["raise", "exclude"] = "raise",
    unseen: Literal["raise", "exclude"] = "raise",
) -> Study:
    """Load subjects of a derivatives folder, with their ROIs and the images they saw.

    Parameters
    ----------
    root : path
        The derivatives folder.
    stimuli : path
        The folder of images (relative to the working folder). A stimulus is named by its file
        without the ending; tables may name it with or without ending and folders.
    subjects : sequence of str, optional
        Labels, with or without ``sub-``. Default: every ``sub-*`` folder of the root.
    kind : {"betas", "bold", "glmsingle"}
        A beta series, one volume per trial; preprocessed BOLD, from which betas are estimated; or
        output of GLMsingle.
    rois : mapping of name to pattern, or to mapping of "L" and "R" to pattern
        Mask files, as in `brainalign.data.bids.read_roi`; they may overlap.
    atlas : pattern, or mapping of "L" and "R" to pattern, optional
        Labels, each of which becomes an ROI; as in `brainalign.data.bids.read_atlas`.
    lookup : pattern, optional
        Table of the atlas's label names.
    mask : "auto", pattern, mapping of "L" and "R" to pattern, or None
        Neuroids to keep; "auto" takes the brain masks of the derivatives, where there are any.
    entities : mapping of str to str, optional
        BIDS entities that images must have: ``{"space": "T1w", "task": "images"}``. Not for
        GLMsingle.
    tables_root : path, optional
        The raw dataset, if its events tables are not among the derivatives.
    model : mapping, optional
        For "bold": further arguments of `brainalign.data.bids.first_level`.
    betas, trials : pattern
        For "glmsingle": the file or output folder, and the table or tables (one row per beta).
    reference : pattern, optional
        For "glmsingle" volumes: an image with the affine, unless `mask` is one.
    n_vertices : (int, int), optional
        For "glmsingle" surfaces: how many vertices, left before right.
    stimulus_column, scale, bad
        As in `brainalign.data.bids.read_betas`.
    unseen : {"raise", "exclude"}
        What to do with images that no subject saw.

    Returns
    -------
    Study
        ``responses`` by subject, and ``stimuli``: the images that were shown.

    Raises
    ------
    UnavailableError
        If a file, a table or every image is missing.
    SchemaError
        If stimuli of the tables have no image, images were shown to nobody, or files do not fit
        each other. Names are checked before recordings are read.
    ConfigError
        If an argument cannot be used.
    """
    for name, value, known in (("kind", kind, _KINDS), ("unseen", unseen, ("raise", "exclude"))):
        if value not in known:
            raise ConfigError(
                f"{name} is {value!r}; expected one of {', '.join(known)}.{near(value, known)}"
            )
    given = {"betas": betas, "trials": trials, "reference": reference, "n_vertices": n_vertices}
    _check_arguments(kind, given, entities, model, mask)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UnavailableError(f"There is no folder {root}.", "Check the path.")
    labels = _subjects(root, subjects)
    images = _images(Path(stimuli).expanduser())

    plans = {}
    for label in labels:
        where = _Where(root, label)
        plan: dict[str, Any] = {
            "rois": {name: where.sides(p) for name, p in (rois or {}).items()},
            "atlas": None if atlas is None else where.sides(atlas),
            "lookup": None if lookup is None else where.one(lookup),
            "mask": mask if mask is None or mask == "auto" else where.sides(mask),
        }
        if kind == "glmsingle":
            plan |= {
                "betas": where.one(betas),
                "trials": where.several(trials),
                "reference": None if reference is None else where.one(reference),
            }
            tables = plan["trials"]
        else:
            tables = _tables(root, label, kind, tables_root, entities or {})
        shown = bids.presented(tables, stimulus_column) if tables else []
        plan["names"] = _names(shown, images, label)
        plans[label] = plan
    images = _only_shown(images, plans, unseen)

    options: dict[str, Any] = {"stimulus_column": stimulus_column, "scale": scale, "bad": bad}
    responses = {}
    for label, plan in plans.items():
        logger.info("reading sub-%s", label)
        if kind == "glmsingle":
            ds = bids.read_glmsingle(
                plan["betas"],
                plan["trials"],
                reference=plan["reference"],
                mask=None if mask == "auto" else plan["mask"],
                n_vertices=None if n_vertices is None else (n_vertices[0], n_vertices[1]),
                subject=label,
                **options,
            )
        else:
            ds = bids.read_derivatives(
                root,
                label,
                kind=kind,
                tables_root=tables_root,
                mask=plan["mask"],
                model=model,
                **{**options, **(entities or {})},
            )
        named = [plan["names"][s] for s in ds["stimulus_id"].values.tolist()]
        ds = ds.assign_coords(stimulus_id=("presentation", np.array(named, dtype=str)))
        responses[label] = _with_rois(ds, plan)
    return Study("bids", responses=responses, stimuli=images)


def _check_arguments(
    kind: str,
    given: Mapping[str, Any],
    entities: Mapping[str, str] | None,
    model: Mapping[str, Any] | None,
    mask: Sides | None,
) -> None:
    if kind == "glmsingle":
        missing = [n for n in ("betas", "trials") if given[n] is None]
        if missing:
            raise ConfigError(
                f"kind 'glmsingle' needs {' and '.join(missing)}: patterns of files under the root."
            )
        if entities:
            raise ConfigError("kind 'glmsingle' takes no entities; its files are named by betas.")
        if isinstance(mask, Mapping) or (given["n_vertices"] and mask not in ("auto", None)):
            raise ConfigError("The mask of GLMsingle betas is one volume, given as a pattern.")
    else:
        extra = [n for n in _GLMSINGLE if given[n] is not None]
        if extra:
            raise ConfigError(f"{extra[0]} goes with kind 'glmsingle', not with {kind!r}.")
    if model and kind != "bold":
        raise ConfigError(f"model goes with kind 'bold', not with {kind!r}.")


def _subjects(root: Path, subjects: Sequence[str] | None) -> list[str]:
    there = sorted(p.name.removeprefix("sub-") for p in root.glob("sub-*") if p.is_dir())
    if subjects is None:
        if not there:
            raise UnavailableError(f"{root} has no folder sub-*.", "Name the subjects.")
        return there
    labels = [str(s).removeprefix("sub-") for s in subjects]
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError(f"subjects must be one or more different labels; got {labels}.")
    return labels


class _Where:
    """Files of one subject, by pattern."""

    def __init__(self, root: Path, subject: str) -> None:
        self.root, self.subject = root, subject

    def several(self, pattern: Pattern | None) -> list[Path]:
        """Return the files that match, in natural order."""
        text = str(pattern)
        unknown = [n for n in re.findall(r"\{(.*?)\}", text) if n != "subject"]
        if unknown:
            raise ConfigError(
                f"{{{unknown[0]}}} in {text!r} stands for nothing.{near(unknown[0], ['subject'])}",
                "The one placeholder is {subject}.",
            )
        path = Path(text.replace("{subject}", self.subject)).expanduser()
        if not re.search(r"[*?\[]", str(path)):
            path = self.root / path
            found = [path] if path.exists() else []
        elif path.is_absolute():
            found = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        else:
            found = list(self.root.glob(str(path)))
        if not found:
            there = path.parent if path.is_absolute() else (self.root / path).parent
            names = sorted(p.name for p in there.iterdir()) if there.is_dir() else []
            raise UnavailableError(
                f"sub-{self.subject}: no file matches {self.root / path}."
                + near(path.name, names)
                + (f" There are {', '.join(names[:6])}." if names else "")
            )
        return sorted(
            found,
            key=lambda p: [(d.isdigit(), int(d) if d.isdigit() else d) for d in _PARTS(str(p))],
        )

    def one(self, pattern: Pattern | None) -> Path:
        """Return the one file that matches."""
        found = self.several(pattern)
        if len(found) > 1:
            raise ConfigError(
                f"sub-{self.subject}: {len(found)} files match {str(pattern)!r}: "
                f"{', '.join(p.name for p in found[:4])}.",
                "Make the pattern match one.",
            )
        return found[0]

    def sides(self, pattern: Sides) -> Path | dict[str, Path]:
        """Return one file, or one per hemisphere."""
        if not isinstance(pattern, Mapping):
            return self.one(pattern)
        unknown = sorted(set(map(str, pattern)) - {"L", "R"})
        if unknown or not pattern:
            raise ConfigError(f"Hemispheres are 'L' and 'R'; got {unknown or 'none'}.")
        return {side: self.one(p) for side, p in pattern.items()}


def _tables(
    root: Path,
    subject: str,
    kind: str,
    tables_root: str | Path | None,
    entities: Mapping[str, str],
) -> list[Path]:
    options: dict[str, Any] = {"tables": ("trials", "events")}
    if kind == "bold":
        options = {"tables": ("events",), "suffix": "bold"}
    runs = bids.find_runs(root, subject, tables_root=tables_root, **options, **entities)
    return list(dict.fromkeys(r.table for r in runs if r.table is not None))


def _images(folder: Path) -> StimulusSet:
    if not folder.is_dir():
        raise UnavailableError(f"There is no folder of stimuli {folder}.", "Check the path.")
    if (folder / "index.nc").is_file():
        return read_stimuli(folder)
    stems: dict[str, str] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
        if path.stem in stems:
            raise SchemaError(
                f"{folder} holds {stems[path.stem]} and {path.name}, which are one stimulus id.",
                "Rename or remove one.",
            )
        stems[path.stem] = path.name
    return index_images(folder)


def _names(shown: Sequence[str], images: StimulusSet, subject: str) -> dict[str, str]:
    """Return the image's id for every name in the tables, or raise."""
    known = set(images.ids)
    named: dict[str, str] = {}
    for name in shown:
        path = PurePosixPath(name.replace("\\", "/"))
        bare = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name
        named[name] = name if name in known else bare
    missing = [n for n, stem in named.items() if stem not in known]
    if missing:
        raise SchemaError(
            f"sub-{subject}: {len(missing)} of {len(named)} stimuli have no image in "
            f"{images.folder}, the first is {missing[0]!r}.{near(named[missing[0]], known)}",
            "Add the images, or name the column that holds the file names with stimulus_column.",
        )
    twice = {s: n for n, s in named.items()}
    clash = [n for n, s in named.items() if twice[s] != n]
    if clash:
        raise SchemaError(
            f"sub-{subject}: {clash[0]!r} and {twice[named[clash[0]]]!r} in the tables are one "
            f"image, {named[clash[0]]!r}.",
            "Give images of different folders different names.",
        )
    return named


def _only_shown(
    images: StimulusSet, plans: Mapping[str, Mapping[str, Any]], unseen: str
) -> StimulusSet:
    seen = {s for plan in plans.values() for s in plan["names"].values()}
    left = [s for s in images.ids if s not in seen]
    if left and seen:
        if unseen == "raise":
            raise SchemaError(
                f"{len(left)} of {len(images)} images in {images.folder} were shown to no subject "
                f"that is loaded, the first is {left[0]!r}.",
                "Leave them out with unseen='exclude'.",
            )
        logger.warning("%d of %d images are left out: shown to nobody.", len(left), len(images))
        return images.select([s for s in images.ids if s in seen])
    return images


def _with_rois(ds: xr.Dataset, plan: Mapping[str, Any]) -> xr.Dataset:
    if plan["rois"]:
        ds = bids.add_rois(ds, plan["rois"])
    if plan["atlas"] is not None:
        ds = bids.add_atlas(ds, plan["atlas"], lookup=plan["lookup"])
    return ds
