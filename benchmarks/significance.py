"""Permutation test and bootstrap of r against the plain float64 loops that they replace."""

from __future__ import annotations

import argparse
from typing import Any

import harness
import numpy as np

from brainalign.evaluation import bootstrap_counts, bootstrap_r, pearson_r, permutation_test
from brainalign.evaluation.significance import permutation_rows


def data(n: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((n, t), dtype=np.float32)
    return y, (0.05 * y + rng.standard_normal((n, t), dtype=np.float32)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=0, dtype=np.float64)
    return x / np.sqrt((x * x).sum(axis=0))


def loop(y: np.ndarray, p: np.ndarray, n_permutations: int) -> tuple[np.ndarray, np.ndarray]:
    observed, a, b = pearson_r(y, p), unit(y), unit(p)
    hits, largest = np.zeros(y.shape[1]), []
    for order in permutation_rows(len(y), n_permutations, seed=0):
        null = np.einsum("nt,nt->t", a[order], b)
        hits += null >= observed - 1e-12
        largest.append(null.max())
    return (1 + hits) / (1 + n_permutations), np.array(largest)


def resample(y: np.ndarray, p: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draw rows and correlate, sample by sample."""
    out = []
    for c in counts:
        rows = np.repeat(np.arange(len(y)), c.astype(int))
        out.append((unit(y[rows]) * unit(p[rows])).sum(axis=0))
    return np.array(out)


def permutation_case(n: int, t: int, n_permutations: int, repeats: int) -> dict[str, Any]:
    y, p = data(n, t)
    got: dict[str, Any] = {}
    times = harness.median_times(
        {
            "ours": lambda: got.update(
                ours=permutation_test(y, p, n_permutations=n_permutations, device="cpu")
            ),
            "numpy loop": lambda: got.update(loop=loop(y, p, n_permutations)),
        },
        repeats,
    )
    return harness.row(
        f"permutation test, {n} stimuli x {t} targets x {n_permutations} permutations",
        times,
        peer="numpy loop",
        required=3.0,
        accuracy={
            "targets with another p": (float((got["ours"].p != got["loop"][0]).sum()), "<=", 0),
            "null maximum": (
                float(np.abs(got["ours"].null_max - got["loop"][1]).max()),
                "<=",
                1e-12,
            ),
        },
        work={"n": n, "targets": t, "permutations": n_permutations, "dtype": "float32"},
    )


def bootstrap_case(n: int, t: int, n_bootstrap: int, repeats: int) -> dict[str, Any]:
    y, p = data(n, t)
    counts = bootstrap_counts(n, n_bootstrap, seed=0)
    got: dict[str, Any] = {}
    times = harness.median_times(
        {
            "ours": lambda: got.update(ours=bootstrap_r(y, p, counts, device="cpu")),
            "numpy loop": lambda: got.update(loop=resample(y, p, counts)),
        },
        repeats,
    )
    return harness.row(
        f"bootstrap of r, {n} stimuli x {t} targets x {n_bootstrap} samples",
        times,
        peer="numpy loop",
        required=5.0,
        accuracy={"r": (float(np.abs(got["ours"] - got["loop"]).max()), "<=", 1e-5)},
        work={"n": n, "targets": t, "samples": n_bootstrap, "dtype": "float32"},
    )


def main(args: argparse.Namespace) -> bool:
    cases = {
        "permutation": lambda: permutation_case(1000, 10_000, 200, args.repeats),
        "bootstrap": lambda: bootstrap_case(1000, 5_000, 100, args.repeats),
    }
    rows = [make() for name, make in cases.items() if args.only in name]
    return harness.record("significance", rows, args.out)


if __name__ == "__main__":
    raise SystemExit(not main(harness.arguments(str(__doc__))))
