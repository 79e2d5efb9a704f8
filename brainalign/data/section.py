"""Sections: what a method hands to the report, as data only.

A section is a folder: ``section.json`` (text and numbers), one netCDF file per figure, and images.
The report draws every kind of figure in `FIGURE_KINDS`; a method computes what is drawn and says
what to look for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from brainalign.data.store import atomic_dir, read, write
from brainalign.errors import SchemaError, UnavailableError, near

__all__ = ["FIGURE_KINDS", "Estimate", "Figure", "Section", "read_section", "write_section"]

#: kind -> (variables it must have, the dimension sets allowed for the first of them)
FIGURE_KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "surface": (("hemisphere", "vertex"), (("vertex",),)),
    "heatmap": (("value",), (("row", "column"),)),
    "matrix": (("value",), (("row", "column"),)),
    "distribution": (("value", "group"), (("observation",),)),
    "points": (("value", "item"), (("item",), ("item", "series"))),
    "bars": (("value", "item"), (("item",), ("item", "series"))),
    "curve": (("value", "x"), (("x",), ("x", "series"))),
    "scatter": (("x", "y"), (("observation",),)),
    "rdm": (("rdm", "rdm_name", "stimulus_id"), (("rdm_name", "stimulus", "stimulus_2"),)),
    "image_grid": (("filename", "label"), (("image",),)),
    "table": ((), ()),
}


@dataclass
class Figure:
    """One figure, as the data to draw and the words to read it by.

    Parameters
    ----------
    id : str
        Unique in its section; letters, digits, ``-`` and ``_``.
    kind : str
        A key of `FIGURE_KINDS`.
    title : str
        A short heading.
    caption : str
        What is shown and what to look for.
    data : xarray.Dataset
        See `FIGURE_KINDS`. A surface has dimension ``vertex`` with coordinates ``hemisphere`` and
        ``vertex`` (index on fsaverage5), and one variable a map.
    options : dict
        JSON-able: ``reference_lines``, ``reference_bands``, axis labels ...
    images : dict of str to PIL.Image or path
        Pictures by the name the data use for them.
    """

    id: str
    kind: str
    title: str
    caption: str
    data: xr.Dataset
    options: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)


@dataclass
class Estimate:
    """One number of the summary, with its interval and what to compare it with.

    Parameters
    ----------
    label : str
        What was measured.
    value : float
        The estimate.
    low, high : float, optional
        Its interval.
    unit : str
        Its unit, ``""`` if none.
    note : str
        How it was measured, in a few words.
    reference : str
        A published value, chance level or baseline to compare with.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""
    reference: str = ""


@dataclass
class Section:
    """One section of the report.

    Parameters
    ----------
    id, title, intro : str
        Its anchor, heading and first paragraph.
    figures : list of Figure
        In the order to show.
    summary : list of Estimate
        The numbers for the top of the report.
    methods : str
        Text that can be pasted into an article, citing ``[@key]``.
    references : dict of str to str
        BibTeX entries by key.
    exclusions : list of str
        What was left out of the analysis, with counts and reasons.
    problems : list of str
        What went wrong.
    facts : dict of str to str
        Data and model in figures: subjects, stimuli, neuroids, layers.
    order : int
        Its place in the report.
    """

    id: str
    title: str
    intro: str
    figures: list[Figure] = field(default_factory=list)
    summary: list[Estimate] = field(default_factory=list)
    methods: str = ""
    references: dict[str, str] = field(default_factory=dict)
    exclusions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    order: int = 50


def _check_figure(figure: Figure) -> None:
    if figure.kind not in FIGURE_KINDS:
        raise SchemaError(
            f"Figure {figure.id!r} is of kind {figure.kind!r}.{near(figure.kind, FIGURE_KINDS)}",
            f"Known: {', '.join(FIGURE_KINDS)}.",
        )
    if not figure.id or not all(c.isalnum() or c in "-_" for c in figure.id):
        raise SchemaError(f"The figure id {figure.id!r} may hold only letters, digits, - and _.")
    if not figure.caption.strip():
        raise SchemaError(f"Figure {figure.id!r} has no caption.")
    names, dims = FIGURE_KINDS[figure.kind]
    for name in names:
        if name not in figure.data.variables:
            raise SchemaError(f"Figure {figure.id!r} ({figure.kind}) needs {name!r} in its data.")
    if names and tuple(map(str, figure.data[names[0]].dims)) not in dims:
        raise SchemaError(
            f"Figure {figure.id!r} ({figure.kind}): {names[0]!r} has dimensions "
            f"{figure.data[names[0]].dims}; expected {' or '.join(map(str, dims))}."
        )


def write_section(
    section: Section,
    folder: str | Path,
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a section as a folder, atomically.

    Raises
    ------
    SchemaError
        If a figure's kind, id, caption or data are at fault.
    """
    from PIL import Image

    for figure in section.figures:
        _check_figure(figure)
    ids = [f.id for f in section.figures]
    if len(set(ids)) != len(ids):
        raise SchemaError(f"Section {section.id!r} has two figures of one id: {ids}.")
    with atomic_dir(folder, overwrite=overwrite) as made:
        figures = []
        for figure in section.figures:
            write(figure.data, made / f"{figure.id}.nc", None, provenance=provenance)
            images: dict[str, str] = {}
            for i, (name, picture) in enumerate(figure.images.items()):
                images[name] = f"{figure.id}-images/{i:05d}.png"
                (made / images[name]).parent.mkdir(exist_ok=True)
                if isinstance(picture, Image.Image):
                    picture.save(made / images[name])
                else:
                    with Image.open(picture) as opened:
                        opened.save(made / images[name], format="PNG")
            figures.append(
                {
                    "id": figure.id,
                    "kind": figure.kind,
                    "title": figure.title,
                    "caption": figure.caption,
                    "options": figure.options,
                    "images": images,
                }
            )
        record = {
            **{k: v for k, v in vars(section).items() if k not in ("figures", "summary")},
            "summary": [asdict(e) for e in section.summary],
            "figures": figures,
            "provenance": dict(provenance or {}),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (made / "section.json").write_text(text, encoding="utf-8")
    return Path(folder)


def read_section(folder: str | Path) -> Section:
    """Read a section; its figures' images are paths.

    Raises
    ------
    UnavailableError
        If the folder holds no section.
    """
    folder = Path(folder)
    if not (folder / "section.json").is_file():
        raise UnavailableError(f"{folder} holds no section.json.")
    record = json.loads((folder / "section.json").read_text(encoding="utf-8"))
    figures = [
        Figure(
            id=f["id"],
            kind=f["kind"],
            title=f["title"],
            caption=f["caption"],
            data=read(folder / f"{f['id']}.nc"),
            options=f["options"],
            images={name: folder / path for name, path in f["images"].items()},
        )
        for f in record.pop("figures")
    ]
    summary = [Estimate(**e) for e in record.pop("summary")]
    record.pop("provenance")
    return Section(figures=figures, summary=summary, **record)
