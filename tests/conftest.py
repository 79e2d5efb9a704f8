"""Shared fixtures: real data where a mirror gives them, temporary folders, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _mirror() -> Path | None:
    named = os.environ.get("BRAINALIGN_MIRROR")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder.resolve() if folder.is_dir() else None


@pytest.fixture(scope="session")
def mirror() -> Path:
    """Return the folder with one sub-folder per study, or skip."""
    folder = _mirror()
    if folder is None:
        pytest.skip("no data mirror: set BRAINALIGN_MIRROR to a folder with one folder per study")
    return folder


@pytest.fixture(scope="session")
def weights_folder(mirror: Path) -> Path:
    """Return the folder of pretrained weights that stands beside the mirror, or skip."""
    named = os.environ.get("BRAINALIGN_WEIGHTS")
    folder = Path(named) if named else mirror.parent / "weights"
    if not folder.is_dir():
        pytest.skip("no pretrained weights: set BRAINALIGN_WEIGHTS to a folder of weights")
    return folder


@pytest.fixture(scope="session")
def kay2017_study(mirror: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the study of Kay & Yeatman 2017, whose images take seconds to write."""
    from brainalign.data.studies import kay2017

    images = tmp_path_factory.mktemp("kay2017")
    return kay2017.load(mirror / kay2017.FOLDER, stimuli_folder=images)
