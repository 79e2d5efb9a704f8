"""Without a GPU, kernels run under Triton's interpreter: decided before they are imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """Where kernels are tested: a GPU if there is one."""
    return DEVICE


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of golden files, or skip."""
    named = os.environ.get("BRAINALIGN_GOLDEN")
    root = Path(__file__).resolve().parents[2]
    folder = Path(named) if named else root.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("no golden files: set BRAINALIGN_GOLDEN to their folder")
    return folder
