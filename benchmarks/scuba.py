"""Projection of voxel weights on a large library of embeddings, streamed from disk.

    OMP_NUM_THREADS=2 python benchmarks/scuba.py [--size small]

The rate counts both matrix products (logits, and weighted sums), and is compared with that of a
square product measured between the chunks of the very run, so that both meet the same machine. The
time includes reading, normalising, the softmax and the five draws.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, checked, peak_mib, record

from brainalign.captioning import DRAWS, TEMPERATURE, draw_of, project

#: (embeddings, voxels, features)
CASES = {"full": (1_000_000, 20_000, 512), "small": (60_000, 2000, 512)}
REQUIRED = 0.5
MEMORY_MIB = 8 * 1024
CHECKED_VOXELS = 64
_BLOCK = 20_000
_SQUARE = 1500


def write_library(path: Path, n: int, d: int) -> np.ndarray:
    """Embeddings in clusters about a common direction, as those of CLIP, with norms that vary."""
    library = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
    first = np.random.default_rng(0)
    centres = first.standard_normal((200, d)) + first.standard_normal(d)
    for start in range(0, n, _BLOCK):
        rng = np.random.default_rng([1, start])
        part = library[start : start + _BLOCK]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        part += centres[rng.integers(200, size=len(part))]
        part *= rng.uniform(0.3, 0.6, (len(part), 1))
    library.flush()
    return np.load(path, mmap_mode="r")


def dense(weights: np.ndarray, library: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The same in float64, for few voxels: logits whole, then a softmax over them."""
    w = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    n = np.empty(len(library))
    logits = np.empty((len(w), len(library)))
    for start in range(0, len(library), _BLOCK):
        e = library[start : start + _BLOCK].astype(np.float64)
        n[start : start + _BLOCK] = np.linalg.norm(e, axis=1)
        logits[:, start : start + _BLOCK] = w @ (e / n[start : start + _BLOCK, None]).T
    out = np.empty((DRAWS, *w.shape))
    for k in range(DRAWS):
        own = draw == k
        s = np.exp((logits[:, own] - logits[:, own].max(1, keepdims=True)) / TEMPERATURE)
        s /= s.sum(1, keepdims=True)
        place = np.zeros_like(logits)
        place[:, own] = s
        mean = np.zeros_like(w)
        for start in range(0, len(library), _BLOCK):
            e = library[start : start + _BLOCK].astype(np.float64)
            mean += (place[:, start : start + _BLOCK] / n[start : start + _BLOCK]) @ e
        out[k] = (s @ n[own])[:, None] * mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return out


def clocks() -> np.ndarray:
    """Seconds by the clock, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


class Watched:
    """Chunks of a library, between which a square product is timed now and then."""

    def __init__(self, library: np.ndarray) -> None:
        self.library, self.away = library, np.zeros(2)
        self.squares: list[np.ndarray] = []
        self.a, self.b = torch.randn(2, _SQUARE, _SQUARE).unbind()
        self.out = torch.empty(_SQUARE, _SQUARE)

    def __iter__(self) -> Iterator[np.ndarray]:
        step = 16_384
        for i, start in enumerate(range(0, len(self.library), step)):
            if i % 4 == 0:
                began = clocks()
                torch.mm(self.a, self.b, out=self.out)
                once = clocks()
                for _ in range(3):
                    torch.mm(self.a, self.b, out=self.out)
                ended = clocks()
                self.squares.append((ended - once) / 3)
                self.away += ended - began
            yield self.library[start : start + step]


def measure(n: int, voxels: int, d: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        library = write_library(Path(folder) / "library.npy", n, d)
        # Mixtures of what is in the library, and noise: what an encoder's weights look like.
        weights = library[rng.integers(n, size=voxels)].astype(np.float64)
        weights -= weights.mean(axis=0)
        weights += rng.standard_normal(weights.shape) * weights.std()
        watched = Watched(library)
        done: dict[str, Any] = {}

        def work() -> None:
            began = clocks()
            done["out"] = project(weights, watched, device="cpu", progress=True)
            done["s"] = clocks() - began - watched.away

        peak = peak_mib(work)
        draw = draw_of(0, n, DRAWS, 0)
        some = np.linspace(0, voxels - 1, CHECKED_VOXELS).astype(int)
        expected = dense(weights[some], library, draw)
        error = np.linalg.norm(done["out"][:, some] - expected, axis=-1)
        error /= np.linalg.norm(expected, axis=-1)
    operations = 2.0 * 2 * n * voxels * d
    squares = 2 * _SQUARE**3 / np.median(watched.squares, axis=0)
    rates = operations / done["s"]
    (rate, _), (square, _) = rates.tolist(), squares.tolist()
    accuracy = {
        f"largest relative error of {CHECKED_VOXELS} voxels against float64": (
            float(error.max()), "<=", 1e-4,
        ),
        "share of the rate of matrix products": (rate / square, ">=", REQUIRED),
    }  # fmt: skip
    if peak is not None:
        accuracy["peak memory in MiB, mapped library included"] = (peak, "<=", MEMORY_MIB)
    checks = checked(accuracy)
    return {
        "case": f"{n:,} embeddings x {voxels:,} voxels, {d} features, {DRAWS} draws",
        "work": {"embeddings": n, "voxels": voxels, "features": d, "dtype": "float32",
                 "gflops": rate / 1e9, "matmul_gflops": square / 1e9,
                 "temperature": TEMPERATURE,
                 # What a busy machine does not change: by processor time, not by the clock.
                 "share_by_processor_time": float(rates[1] / squares[1])},
        "times": {"ours": {"median_s": done["s"][0], "all_s": [round(done["s"][0], 3)]}},
        "accuracy": checks,
        "accurate": all(c["holds"] for c in checks.values()),
        "passed": all(c["holds"] for c in checks.values()),
    }  # fmt: skip


def main() -> int:
    args = arguments(__doc__ or "")
    ok = record("scuba", [measure(*CASES[args.size])], args.out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
