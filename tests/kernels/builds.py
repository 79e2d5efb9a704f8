"""Run a program that builds kernels, in processes that know nothing of Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: BRAINALIGN_BUILDS=all builds every configuration; otherwise a selection, which takes seconds.
EVERY = os.environ.get("BRAINALIGN_BUILDS") == "all"


def run_builds(program, cache, *arguments):
    """Lines that the program prints for sm_80 and sm_90; both run at the same time."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    path = Path(__file__).with_name(program)
    running = [
        subprocess.Popen(
            [sys.executable, str(path), card, *arguments, *(["all"] if EVERY else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for card in ("80", "90")
    ]
    found = []
    for process in running:
        report = process.communicate(timeout=3600 if EVERY else 300)[0]
        assert process.returncode == 0, report[-3000:]
        found.append([line for line in report.splitlines() if line.startswith("built")])
    return found
