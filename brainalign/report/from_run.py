"""The report of a workflow run: what its configuration and status files add to its sections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from brainalign.config import read_config
from brainalign.data.store import provenance
from brainalign.report.build import build_report

__all__ = ["report_of_run"]

#: What needs no fetching is there.
_HERE = {"available": True}
_PACKAGES = ("torch", "scikit-learn", "nilearn", "rsatoolbox", "timm", "open_clip_torch", "zarr")


def _software() -> str:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return "; ".join(versions)


def report_of_run(
    config_file: str | Path,
    sections: Sequence[Path],
    study_files: Sequence[Path],
    model_files: Sequence[Path],
    out: str | Path,
) -> Path:
    """Write the report of a run of the workflow.

    Parameters
    ----------
    config_file : path
        The configuration that was run.
    sections : sequence of path
        Folders of sections.
    study_files : sequence of path
        ``<study>/fetched.json`` of every study that is fetched.
    model_files : sequence of path
        ``<model>.json``, the card of every model.
    out : path
        The folder to write.

    Returns
    -------
    Path
        The page.
    """
    config = read_config(config_file)
    studies = {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in study_files}
    models = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in model_files}
    left_out = [
        {"name": config["studies"][name]["title"], "reason": record["reason"]}
        for name, record in studies.items()
        if not record["available"]
    ] + [
        {"name": config["models"][name]["title"], "reason": record["reason"]}
        for name, record in models.items()
        if not record["available"]
    ]
    used = [s["title"] for n, s in config["studies"].items() if studies.get(n, _HERE)["available"]]
    shown = [m["title"] for n, m in config["models"].items() if models.get(n, _HERE)["available"]]
    record: dict[str, Any] = provenance(config=config, seed=config["seed"])
    record.pop("config")
    record["packages"] = _software()
    record["command"] = f"brainalign run {Path(config_file).name}"
    record["weights"] = {n: m["weights_sha256"] for n, m in models.items() if m["available"]}
    record["licences"] = {n: s["licence"] for n, s in studies.items() if s["available"]}
    return build_report(
        sections,
        out,
        title=config["title"],
        question=config["question"],
        facts={"Data": "; ".join(used)} | ({"Models": "; ".join(shown)} if shown else {}),
        config=config,
        left_out=left_out,
        provenance=record,
    )
