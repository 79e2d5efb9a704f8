"""Ridge on a GPU: share of its matrix-product rate, peak memory, NSD size end to end.

Needs torch, numpy, scipy and scikit-learn alone: the package's other dependencies are not imported.
himalaya is measured beside where it is installed. TF32 stays off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def _bare(name: str) -> None:
    """Stand in for a package whose ``__init__`` imports more than this script needs."""
    package = types.ModuleType(name)
    package.__path__ = [str(HERE.parent.joinpath(*name.split(".")))]
    sys.modules[name] = package


_bare("brainalign.linear")
if importlib.util.find_spec("xarray") is None:
    stand_in = types.ModuleType("brainalign.data.store")
    for needed in ("require_disk", "sha256_of", "swap_in"):
        setattr(stand_in, needed, lambda *args: "")
    sys.modules["brainalign.data.store"] = stand_in

import harness  # noqa: E402
from sklearn.model_selection import KFold  # noqa: E402

from brainalign.linear import streaming  # noqa: E402
from brainalign.linear.search import RidgeSolver  # noqa: E402

ALPHAS = np.logspace(0, 5, 20)
SIZES = {
    "full": {"reference": (3000, 1000, 10_000, 3), "NSD": (9000, 2048, 100_000, 3)},
    "small": {"reference": (300, 100, 1000, 3), "NSD": (600, 128, 3000, 3)},
}


def problem(n: int, p: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets from noise alone to nearly noiseless, made in slices."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn((n, p), generator=generator)
    Y = np.empty((n, t), dtype=np.float32)
    for start in range(0, t, 4096):
        width = min(4096, t - start)
        W = torch.randn((p, width), generator=generator)
        gain = torch.logspace(-2, 0.7, width) / p**0.5
        noise = torch.randn((n, width), generator=generator)
        Y[:, start : start + width] = (X @ (W * gain) + noise).numpy()
    return X.numpy(), Y


def fit(X: np.ndarray, Y: Any, folds: int, device: torch.device, step: int) -> dict[str, Any]:
    """From arrays in host memory to weights in host memory, through the pipeline of the library."""
    splits = list(KFold(folds).split(X))
    solver = RidgeSolver(torch.as_tensor(X, device=device), torch.as_tensor(ALPHAS), splits)
    plan = streaming._Plan(Y.shape[1], step, np.arange(len(X)), np.arange(0), np.dtype("float32"))
    made = {"weights": np.empty((Y.shape[1], X.shape[1]), dtype=np.float32)}
    made |= {name: np.empty(Y.shape[1]) for name in ("intercept", "alpha", "score")}
    with tempfile.TemporaryDirectory() as marks:
        slices = list(streaming._slices(plan))
        streaming._stream([solver], X[:0], Y, slices, made, Path(marks), plan)
    return {"solver": solver, **made}


def case(name: str, size: tuple[int, int, int, int], device: torch.device, rate: float,
         repeats: int) -> dict[str, Any]:  # fmt: skip
    n, p, t, folds = size
    X, Y = problem(n, p, t)
    step = min(16_384, t)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    made = fit(X, Y, folds, device, step)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = fit(X, Y, folds, device, step)
        seconds.append(time.perf_counter() - start)
    solver = made["solver"]
    flops = harness.ridge_products(solver) * t
    y = torch.as_tensor(Y[:, :4096], device=device)
    solver.coefficients(solver.solve(y))
    start = time.perf_counter()
    parts = list(solver.batches(y.shape[1]))
    for part in parts:
        solver.coefficients(solver.solve(y[:, part]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    resident = time.perf_counter() - start
    some = np.arange(0, t, max(1, t // 64))
    exact = RidgeSolver(
        torch.as_tensor(X).double(), torch.as_tensor(ALPHAS), list(KFold(folds).split(X))
    )
    solution = exact.solve(torch.as_tensor(Y[:, some]).double())
    coef = exact.coefficients(solution)[0].numpy()
    same = np.isclose(made["alpha"][some], ALPHAS[solution.index.numpy()])
    gap = np.abs(made["weights"][some] - coef)[same].max() / np.abs(coef).max()
    checks = {
        "share of targets with the alpha of float64 on the CPU": (float(same.mean()), ">=", 0.98),
        "largest difference of weights (relative)": (float(gap), "<=", 1e-4),
    }
    if name == "NSD":
        share = harness.ridge_products(solver) * y.shape[1] / resident / rate
        checks["share of the matrix-product rate, targets on the device"] = (share, ">=", 0.5)
    row: dict[str, Any] = {
        "case": f"{name}: n {n:,}, p {p:,}, {t:,} targets, host memory to host memory",
        "work": {"n": n, "p": p, "targets": t, "alphas": len(ALPHAS), "folds": folds,
                 "dtype": "float32", "matrix_products_tflop": flops / 1e12,
                 "share_of_rate_end_to_end": flops / float(np.median(seconds)) / rate},
        "times": {"ours": {"median_s": float(np.median(seconds)), "all_s": seconds}},
        "accuracy": harness.checked(checks),
    }  # fmt: skip
    if device.type == "cuda":
        row["work"]["peak_device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if name == "reference" and importlib.util.find_spec("himalaya") and device.type == "cuda":
        row["times"]["himalaya"] = himalaya(X, Y, folds, repeats)
        row["ratio"] = row["times"]["himalaya"]["median_s"] / row["times"]["ours"]["median_s"]
        row |= {"peer": "himalaya", "required": 1.0}
    row["passed"] = all(c["holds"] for c in row["accuracy"].values())
    return row


def himalaya(X: np.ndarray, Y: np.ndarray, folds: int, repeats: int) -> dict[str, Any]:
    from himalaya.backend import set_backend
    from himalaya.ridge import RidgeCV

    backend = set_backend("torch_cuda")
    model = RidgeCV(alphas=ALPHAS, cv=KFold(folds), fit_intercept=True)

    def work() -> None:
        model.fit(backend.asarray(X), backend.asarray(Y))
        backend.to_numpy(model.coef_)

    return harness.median_times({"himalaya": work}, repeats)["himalaya"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if torch.backends.cuda.matmul.allow_tf32:
        raise SystemExit("TF32 is on; it must stay off for these numbers.")
    rate = harness.matmul_rate(torch.float32, 8192 if device.type == "cuda" else 1000, args.device)
    rows = [case(k, v, device, rate, args.repeats) for k, v in SIZES[args.size].items()]
    passed = harness.record("gpu", rows, args.out, device=args.device)
    print(json.dumps(rows, indent=1))
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
