"""One subject of the size of NSD, streamed from zarr to zarr within a limit of memory.

The share of the matrix-product rate counts the products of the method alone: what it spends on
reading, writing, factorising and choosing lowers the share.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import zarr

from brainalign.linear import RidgeSolver, ridge_to_store
from brainalign.memory import peak_bytes

ALPHAS = np.logspace(0, 5, 20)
FOLDS = 3
LIMIT_GIB = 8.0
SIZES = {"full": (9000, 2048, 100_000, 4096), "small": (600, 128, 3000, 512)}


def features(n: int, p: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, p), dtype=np.float32)


def splits(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import KFold

    return list(KFold(FOLDS).split(np.empty((n, 1))))


def write_responses(path: Path, X: np.ndarray, n_targets: int, width: int) -> None:
    """Responses of random weights plus noise, in chunks of all rows x some targets."""
    n, p = X.shape
    made = zarr.create_array(path, shape=(n, n_targets), chunks=(n, width), dtype="f4",
                             compressors=(zarr.codecs.Crc32cCodec(),))  # fmt: skip
    rng = np.random.default_rng(1)
    for start in range(0, n_targets, width):
        t = min(width, n_targets - start)
        gain = np.logspace(-2, 0.5, t, dtype=np.float32) / np.float32(np.sqrt(p))
        y = X @ (rng.standard_normal((p, t), dtype=np.float32) * gain)
        made[:, start : start + t] = y + rng.standard_normal((n, t), dtype=np.float32)


def solver_of(X: np.ndarray) -> RidgeSolver:
    return RidgeSolver(torch.as_tensor(X), torch.as_tensor(ALPHAS), splits(len(X)))


def stream(folder: Path, out: Path, threads: int, limit: float) -> None:
    """What the measured process does."""
    torch.set_num_threads(threads)
    X = np.load(folder / "X.npy")
    Y = zarr.open_array(folder / "Y.zarr", mode="r")
    start = time.perf_counter()
    ridge_to_store(X, Y, out, alphas=ALPHAS, cv=splits(len(X)), memory_gib=limit, device="cpu")
    seconds = time.perf_counter() - start
    peak = peak_bytes() / 2**30
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


def main() -> None:
    args = harness.arguments(__doc__ or "")
    n, p, t, width = SIZES[args.size]
    folder = Path(tempfile.mkdtemp())
    try:
        X = features(n, p)
        np.save(folder / "X.npy", X)
        write_responses(folder / "Y.zarr", X, t, width)
        rate = harness.matmul_rate(torch.float32)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(folder), str(args.threads)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rate = (rate + harness.matmul_rate(torch.float32)) / 2
        measured = json.loads(done.stdout.splitlines()[-1])
        fit = zarr.open_group(folder / "fit.zarr", mode="r")
        some = np.arange(0, t, max(1, t // 16))
        Y = np.stack([zarr.open_array(folder / "Y.zarr")[:, i] for i in some], axis=1)
        gap = agreement(X, Y, fit, some)
    finally:
        shutil.rmtree(folder)
    flops = harness.ridge_products(solver_of(X)) * t
    share = flops / measured["seconds"] / rate
    size = f"n {n:,}, p {p:,}, {t:,} targets"
    checks = {
        "peak memory (GiB)": (measured["peak_gib"], "<=", LIMIT_GIB),
        "share of the matrix-product rate": (share, ">=", 0.6),
        "largest difference of weights from scikit-learn (relative)": (gap, "<=", 1e-4),
    }
    row = {
        "case": f"NSD size from zarr, {size}, {len(ALPHAS)} alphas, {FOLDS} folds",
        "work": {"n": n, "p": p, "targets": t, "alphas": len(ALPHAS), "folds": FOLDS,
                 "dtype": "float32", "matrix_products_tflop": flops / 1e12,
                 "matmul_gflops": rate / 1e9, "memory_limit_gib": LIMIT_GIB, "runs": 1},
        "times": {"ours": {"median_s": measured["seconds"], "all_s": [measured["seconds"]]}},
        "accuracy": harness.checked(checks),
    }  # fmt: skip
    row["passed"] = all(c["holds"] for c in row["accuracy"].values())
    raise SystemExit(not harness.record("nsd", [row], args.out))


def agreement(X: np.ndarray, Y: np.ndarray, fit: Any, some: np.ndarray) -> float:
    """Weights of some targets against scikit-learn in float64 at the alphas that were chosen."""
    from sklearn.linear_model import Ridge

    alpha = fit["alpha"][:][some]
    theirs = Ridge(alpha).fit(X.astype(np.float64), Y.astype(np.float64)).coef_
    ours = np.stack([fit["weights"][int(i)] for i in some])
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    if "--measure" in sys.argv:
        where = sys.argv.index("--measure")
        root = Path(sys.argv[where + 1])
        stream(root, root / "fit.zarr", int(sys.argv[where + 2]), LIMIT_GIB)
    else:
        main()
