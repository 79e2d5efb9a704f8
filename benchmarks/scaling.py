"""How time grows with targets, features and alphas: ours and himalaya on the same work."""

from __future__ import annotations

import warnings
from typing import Any

import harness
import numpy as np
from ridge import fitted, himalaya, problem
from sklearn.model_selection import KFold

from brainalign.linear import Ridge

BASE = {"targets": 2000, "features": 500, "alphas": 20}
GRID = {
    "targets": (500, 1000, 2000, 5000, 10_000),
    "features": (100, 250, 500, 1000, 2000),
    "alphas": (5, 10, 20, 50, 100),
}
N = 1500


def measure(axis: str, value: int, repeats: int) -> dict[str, Any]:
    size = {**BASE, axis: value}
    X, Y = problem(N, size["features"], size["targets"])
    alphas = np.logspace(0, 5, size["alphas"])
    ours = Ridge(alphas, cv=KFold(3), fit_intercept=False, device="cpu")
    peer = himalaya("RidgeCV", "torch", 1000, 5)
    peer.alphas = alphas
    times = harness.median_times(
        {"ours": lambda: fitted(ours, X, Y), "himalaya": lambda: fitted(peer, X, Y)}, repeats
    )
    return {
        "case": f"{axis} {value}",
        "axis": axis,
        "value": value,
        "work": {"n": N, **size, "folds": 3, "dtype": "float32"},
        "times": times,
    }


def main() -> None:
    args = harness.arguments(__doc__ or "")
    warnings.simplefilter("ignore")
    grid = GRID if args.size == "full" else {"targets": (50, 100), "alphas": (5, 10)}
    repeats = min(args.repeats, 3)
    rows = [measure(axis, v, repeats) for axis, values in grid.items() for v in values]
    harness.record("scaling", rows, args.out)


if __name__ == "__main__":
    main()
