"""Build the report: read sections, draw their figures, write one folder of HTML.

``index.html`` opens from disk: its scripts, styles, pictures and tables lie in ``assets``, and a
content security policy keeps every request on the disk. ``report.zip`` beside it holds both, to
send in one piece.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from brainalign.data.section import Figure, Section, read_section
from brainalign.data.store import atomic_dir
from brainalign.errors import MissingDependencyError, SchemaError
from brainalign.report.text import (
    bibliography,
    clean,
    csv_bytes,
    format_interval,
    format_number,
    numbered,
    safe_name,
    script_json,
)

__all__ = ["ZIP_NAME", "build_report"]

logger = logging.getLogger(__name__)

#: The report and its assets in one piece, in the report's own folder.
ZIP_NAME = "report.zip"

_HERE = Path(__file__).parent
_ROWS_OF_ALTERNATIVE = 40
_PLAIN_CSV_BYTES = 2_000_000
_HEADLINES = 8


def build_report(
    sections: Iterable[str | Path],
    out: str | Path,
    *,
    title: str,
    question: str = "",
    facts: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    left_out: Sequence[Mapping[str, str]] = (),
    problems: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run.

    Parameters
    ----------
    sections : iterable of path
        Folders of `brainalign.data.section.write_section`, shown by their ``order``.
    out : path
        The folder to write, replaced whole if it exists: ``index.html``, ``assets`` and
        ``report.zip`` with both.
    title, question : str
        The heading, and what the analysis asks.
    facts : mapping of str to str, optional
        What the summary says of data and models: ``{"Data": ..., "Models": ...}``.
    config : mapping, optional
        The configuration, shown whole.
    left_out : sequence of {"name", "reason"}
        Parts of the analysis that did not run, and why.
    problems : sequence of str
        Errors of the run that belong to no section.
    provenance : mapping, optional
        Versions, hashes, seed, hardware, commands; values may be nested or JSON text.

    Returns
    -------
    Path
        ``out / "index.html"``.

    Raises
    ------
    UnavailableError
        If a folder holds no section.
    SchemaError
        If two sections have one id, or a figure cannot be drawn. Nothing is written then.
    MissingDependencyError
        If Jinja2, plotly or matplotlib is not installed.
    """
    environment, plotly_script = _requirements()
    read = sorted((read_section(s) for s in sections), key=lambda s: (s.order, s.title))
    ids = [s.id for s in read]
    if len(set(ids)) != len(ids):
        raise SchemaError(f"Two sections of the report have one id: {sorted(ids)}.")
    keys = list(dict.fromkeys(k for s in read for k in s.references))
    numbers = {key: i + 1 for i, key in enumerate(keys)}
    entries = {k: v for s in read for k, v in s.references.items()}
    with atomic_dir(out, overwrite=True) as made:
        assets = made / "assets"
        for folder in ("figures", "images", "data"):
            (assets / folder).mkdir(parents=True)
        for name in ("report.css", "report.js"):
            shutil.copyfile(_HERE / "static" / name, assets / name)
        shutil.copyfile(plotly_script, assets / "plotly.min.js")
        if any(f.kind == "surface" for s in read for f in s.figures):
            from brainalign.report.surface import mesh_record

            record = script_json(mesh_record())
            (assets / "mesh.js").write_text(f"brainalign.mesh({record});\n", encoding="ascii")
        count = 0
        shown = []
        for section in read:
            figures = []
            for figure in section.figures:
                count += 1
                anchor = f"{safe_name(section.id)}--{safe_name(figure.id)}"
                logger.info("drawing %s", anchor)
                figures.append(_write_figure(figure, section, anchor, count, assets))
            _place(figures)
            for f in figures:
                _write_script(f["anchor"], f["spec"], assets)
            shown.append(_section_record(section, figures, numbers))
        page = environment.get_template("report.html.j2").render(
            title=title,
            question=question,
            facts=dict(facts or {}),
            sections=shown,
            headlines=_headlines([s["estimates"] for s in shown if s["estimates"]]),
            references=[
                {"key": k, "number": numbers[k], "line": line, "doi": doi, "bibtex": entries[k]}
                for k in keys
                for line, doi in [bibliography(entries[k])]
            ],
            bibtex="\n\n".join(entries[k].strip() for k in keys),
            problems=list(problems),
            n_problems=len(problems) + sum(len(s.problems) for s in read),
            n_exclusions=sum(len(s.exclusions) for s in read),
            left_out=[{"name": x.get("name", ""), "reason": x.get("reason", "")} for x in left_out],
            config=_as_yaml(config) if config else "",
            provenance=_provenance_rows(provenance or {}),
            n_figures=count,
        )
        (made / "index.html").write_text(page, encoding="utf-8")
        _write_zip(made, Path(out).name or "report")
    size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.name != ZIP_NAME)
    logger.info("the report has %d figures and %.1f MB", count, size / 1e6)
    return Path(out) / "index.html"


def _requirements() -> tuple[Any, Path]:
    """Return the template environment and plotly's script, or say what is missing."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
        import plotly
    except ImportError as error:
        raise MissingDependencyError(
            f"The report needs {error.name}, which is not installed.",
            'pip install "brainalign[report]"',
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Everything shown is made encodable first; what is already marked safe stays as it is.
        finalize=lambda v: clean(v) if isinstance(v, str) and not hasattr(v, "__html__") else v,
    )
    environment.filters["paragraphs"] = _paragraphs
    return environment, Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", clean(text)) if p.strip()]


def _write_figure(
    figure: Figure, section: Section, anchor: str, number: int, assets: Path
) -> dict[str, Any]:
    """Draw a figure, write its data and pictures, and return what the template says of it."""
    from brainalign.report.figures import ROWS_OF_TABLE, draw, frame

    try:
        drawn = draw(figure, anchor)
    except SchemaError as error:
        raise SchemaError(f"Section {section.id!r}: {error.message}", error.remedy) from error
    table = frame(figure)
    data = csv_bytes(table)
    csv = f"{anchor}.csv"
    if len(data) > _PLAIN_CSV_BYTES:
        csv, data = f"{anchor}.csv.gz", gzip.compress(data, mtime=0)
    (assets / "data" / csv).write_bytes(data)
    for name, content in drawn.pictures.items():
        (assets / "images" / name).write_bytes(content)
    is_table = figure.kind == "table"
    limit = ROWS_OF_TABLE if is_table else _ROWS_OF_ALTERNATIVE
    return {
        "anchor": anchor,
        "number": number,
        "kind": figure.kind,
        "title": figure.title,
        "caption": figure.caption,
        "note": drawn.note,
        "csv": f"assets/data/{csv}",
        "csv_size": _bytes(len(data)),
        "spec": drawn.spec,
        "maps": drawn.maps,
        "groups": _grouped(drawn.maps, "group"),
        "image_panels": {
            name: _grouped(items, "group")
            for name, items in _grouped(drawn.maps, "panel").items()
            if name
        },
        "panels": drawn.table["RDM"].tolist() if figure.kind == "rdm" else [],
        "table": _table_record(drawn.table, limit),
        "table_note": drawn.table_note,
        "wide": _is_wide(figure, drawn.wide),
        "place": "full",
    }


def _write_script(anchor: str, spec: Mapping[str, Any] | None, assets: Path) -> None:
    if spec is not None:
        script = f"brainalign.figure({json.dumps(anchor)},{script_json(spec)});\n"
        (assets / "figures" / f"{anchor}.js").write_text(script, encoding="ascii")


def _headlines(estimates: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each section's first estimates: as many of each as fill the summary's cards."""
    each = max(1, _HEADLINES // max(len(estimates), 1))
    return [e for of_section in estimates for e in of_section[:each]][:_HEADLINES]


def _grouped(maps: list[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in maps:
        groups.setdefault(record.get(by, ""), []).append(record)
    return groups


def _is_wide(figure: Figure, otherwise: bool) -> bool:
    """Return whether a figure takes the whole width; its option ``width`` has the last word."""
    width = figure.options.get("width")
    if width not in (None, "full", "half"):
        raise SchemaError(
            f"Figure {figure.id!r}: option width is {width!r}; it may be 'full' or 'half'."
        )
    return otherwise if width is None else bool(width == "full")


def _place(figures: list[dict[str, Any]]) -> None:
    """Pair neighbouring narrow figures, of one height; one alone has its words beside it."""
    i = 0
    while i < len(figures):
        if figures[i]["wide"]:
            i += 1
        elif i + 1 < len(figures) and not figures[i + 1]["wide"]:
            pair = figures[i : i + 2]
            plots = [f["spec"] for f in pair if f["spec"] and "height" in f["spec"]]
            height = max((spec["height"] for spec in plots), default=0)
            for f in pair:
                f["place"] = "half"
            for spec in plots:
                spec["height"] = height
            i += 2
        else:
            figures[i]["place"] = "side"
            i += 1


def _section_record(
    section: Section, figures: list[dict[str, Any]], numbers: Mapping[str, int]
) -> dict[str, Any]:
    anchor = f"section-{safe_name(section.id)}"
    estimates = []
    for e in section.summary:
        value, interval = format_interval(e.value, e.low, e.high)
        estimates.append(
            {
                "label": e.label,
                "value": value,
                "interval": interval,
                "unit": e.unit,
                "note": e.note,
                "reference": e.reference,
                "section": section.title,
                "anchor": anchor,
            }
        )
    return {
        "anchor": anchor,
        "title": section.title,
        "intro": section.intro,
        "facts": section.facts,
        "figures": figures,
        "estimates": estimates,
        "methods": [numbered(p, numbers) for p in _paragraphs(section.methods)],
        "methods_source": section.methods.strip(),
        "exclusions": section.exclusions,
        "problems": section.problems,
    }


def _table_record(table: pd.DataFrame, limit: int) -> dict[str, Any]:
    """Return the head of a table as text: columns (name, is number), rows."""
    from brainalign.report.figures import said

    head = table.head(limit)
    numeric = [
        pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in head.dtypes
    ]
    cells = []
    for column, is_number in zip(head.columns, numeric, strict=True):
        values = head[column].tolist()
        cells.append([format_number(float(v)) if is_number else said(v) for v in values])
    return {
        "columns": [{"name": str(c), "number": n} for c, n in zip(head, numeric, strict=True)],
        "rows": [list(row) for row in zip(*cells, strict=True)] if cells else [],
        "total": len(table),
        "shown": len(head),
    }


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1000 else f"{n / 1e3:.0f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"


def _as_yaml(value: Any) -> str:
    import yaml

    plain = json.loads(json.dumps(value, default=str))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=88))


def _provenance_rows(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, text and whether the text is a block, reading JSON text for the eye."""
    rows = []
    for name, value in provenance.items():
        if isinstance(value, str) and value[:1] in "[{":
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                logger.debug("provenance %s is text that only looks like JSON", name)
        nested = isinstance(value, (Mapping, list, tuple))
        text = _as_yaml(value).rstrip() if nested else str(value)
        label = str(name).replace("_", " ")
        rows.append({"name": label[:1].upper() + label[1:], "text": text, "block": nested})
    return rows


def _write_zip(made: Path, folder: str) -> None:
    """Put everything in `made` into one zip there, with fixed times: same report, same bytes."""
    files = sorted(p for p in made.rglob("*") if p.is_file())
    with zipfile.ZipFile(made / ZIP_NAME, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in files:
            entry = zipfile.ZipInfo(f"{folder}/{file.relative_to(made).as_posix()}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
