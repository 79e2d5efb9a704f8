"""``python -m brainalign_kernels.golden FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from brainalign_kernels.golden.check import check_folder


def main(argv: list[str] | None = None) -> int:
    """Print one line per golden file; 0 if all hold."""
    parser = argparse.ArgumentParser(
        prog="python -m brainalign_kernels.golden",
        description="Check every attention mechanism against stored outputs and gradients.",
    )
    parser.add_argument("folder", type=Path, help="one folder per mechanism, with *.npz files")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        print(f"FAIL  {folder}: no such folder")
        return 1
    missed = 0
    for good, line in check_folder(folder):
        print(line, flush=True)
        missed += not good
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
