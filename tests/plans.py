"""What Snakemake would run for a configuration of the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from brainalign.config import workflow_root


def plan(name: str, folder: Path) -> str:
    """Return the plan of a configuration, on a machine that has none of its data."""
    pytest.importorskip("snakemake")
    environment = {k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"}
    root = workflow_root()
    finished = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(root / "Snakefile"), "-n", "-p",
         "--configfile", str(root / "configs" / f"{name}.yaml")],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    text = finished.stdout + finished.stderr
    assert finished.returncode == 0, text[-6000:]
    return text
