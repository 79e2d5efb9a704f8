"""Temporal response functions: ours against mTRFpy on the same trials, lags and penalties.

    python benchmarks/trf.py [--size small] [--only cross-validated]

Both work in float64 on as many threads. The peer averages over trials and divides by the sampling
interval, so its penalty is ours over (trials x sampling rate) and its weights are ours times the
sampling rate. A last case has no peer: a banded model of an intracranial recording, in a fresh
process whose peak memory is recorded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from harness import arguments, checked, median_times, record, row
from mtrf.model import TRF
from threadpoolctl import threadpool_limits

from brainalign.linear import LaggedRidge, lagged_predict
from brainalign.memory import peak_bytes

REQUIRED = 5.0
RATE, TMIN, TMAX, N_LAGS = 100, 0.0, 0.4, 41
SEED = 0
#: Standard deviation of the noise over that of the responses without it.
NOISE = 3.0
LAMBDAS = np.logspace(-4, 5, 10)
#: (name, trials, seconds, features, channels, penalties).
CASES = {
    "full": [
        ("one penalty, 18 features", 10, 60, 18, 64, LAMBDAS[4:5]),
        ("cross-validated, 3 features", 10, 60, 3, 300, LAMBDAS),
        ("cross-validated, 18 features", 10, 60, 18, 64, LAMBDAS),
    ],
    "small": [
        ("one penalty, 18 features", 5, 20, 18, 32, LAMBDAS[4:5]),
        ("cross-validated, 3 features", 5, 20, 3, 32, LAMBDAS),
    ],
}
#: (trials, seconds, electrodes) of the case without a peer; its limit in GiB is the claim.
LARGE = {"full": (10, 180, 1330), "small": (5, 30, 100)}
SPACES = ["envelope", "onset", *["mel"] * 16]
LIMIT_GIB = 8.0


def smooth(rng: np.random.Generator, n: int, p: int) -> np.ndarray:
    """Features that vary slowly, as those of speech do, with independent noise on top."""
    x = rng.standard_normal((n, p)).cumsum(axis=0)
    x[20:] -= x[:-20].copy()
    return x / x.std(axis=0) + 0.3 * rng.standard_normal((n, p))


def make(
    trials: int, seconds: int, features: int, channels: int, dtype: type = np.float64
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Trials of a stimulus and of responses to it with noise."""
    rng = np.random.default_rng(SEED)
    lags = np.arange(N_LAGS)
    peaks = rng.uniform(5, 30, (channels, features, 1))
    truth = np.exp(-0.5 * ((lags - peaks) / 4) ** 2) * rng.standard_normal((channels, features, 1))
    coef = torch.as_tensor(truth.astype(dtype))
    X = [smooth(rng, seconds * RATE, features).astype(dtype) for _ in range(trials)]
    Y = []
    for x in X:
        y = lagged_predict(torch.as_tensor(x), coef, lags, coef.new_zeros(channels)).numpy()
        noise = rng.standard_normal(y.shape, dtype=np.float32)
        noise *= NOISE * y.std(axis=0, dtype=np.float64).astype(np.float32)
        y += noise
        Y.append(y)
    return X, Y


def compare(
    name: str,
    trials: int,
    seconds: int,
    features: int,
    channels: int,
    lambdas: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    X, Y = make(trials, seconds, features, channels)
    alphas = lambdas * trials * RATE

    def ours() -> LaggedRidge:
        model = LaggedRidge(
            TMIN, TMAX, RATE, alphas=alphas, cv="trials", metric="r", alpha_per_target=False,
            device="cpu",
        )  # fmt: skip
        return model.fit(X, Y)

    def peer() -> TRF:
        model = TRF()
        penalty = list(lambdas) if len(lambdas) > 1 else float(lambdas[0])
        model.train(list(X), list(Y), RATE, TMIN, TMAX, penalty, k=-1, verbose=False)
        return model

    with threadpool_limits(args.threads):
        times = median_times({"ours": ours, "mtrf": peer}, args.repeats)
        a, b = ours(), peer()
    weights = b.weights.transpose(2, 0, 1) / RATE
    error = np.abs(a.coef_ - weights).max() / np.abs(weights).max()
    other = np.abs(alphas - a.alpha_[0]).argmin() != np.abs(lambdas - b.regularization).argmin()
    return row(
        name,
        times,
        peer="mtrf",
        required=REQUIRED,
        accuracy={
            "largest difference of weights, relative": (float(error), "<=", 1e-5),
            "another penalty was chosen": (int(other), "<=", 0),
        },
        work={
            "trials": trials, "seconds": seconds, "rate": RATE, "features": features,
            "lags": N_LAGS, "channels": channels, "penalties": len(lambdas),
            "folds": trials if len(lambdas) > 1 else 0, "dtype": "float64",
        },
    )  # fmt: skip


def _large(trials: int, seconds: int, electrodes: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    X, Y = make(trials, seconds, len(SPACES), electrodes, np.float32)
    start = time.perf_counter()
    model = LaggedRidge(
        TMIN, TMAX, RATE, alphas=np.logspace(0, 9, 10), spaces=SPACES, n_iter=10, cv=5,
        device="cpu",
    ).fit(X, Y)  # fmt: skip
    wall = time.perf_counter() - start
    peak = peak_bytes() / 2**30
    return {"wall": wall, "peak_gib": peak, "r2": float(np.median(model.best_score_))}


def large(trials: int, seconds: int, electrodes: int, threads: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        got = pool.submit(_large, trials, seconds, electrodes, threads).result()
    checks = {
        "peak memory in GiB, data included": (got["peak_gib"], "<=", LIMIT_GIB),
        # The stimulus explains 1 / (1 + NOISE^2) = 0.1 of the variance.
        "median cross-validated R^2, of at most 0.1": (got["r2"], ">=", 0.09),
    }
    accuracy = checked(checks)
    return {
        "case": f"banded, {electrodes} electrodes: {got['wall']:.0f} s",
        "work": {
            "trials": trials, "seconds": seconds, "rate": RATE, "features": len(SPACES),
            "spaces": 3, "lags": N_LAGS, "channels": electrodes, "penalties": 10, "gammas": 10,
            "folds": 5, "dtype": "float32",
        },
        "times": {"ours": {"median_s": got["wall"], "all_s": [got["wall"]]}},
        "accuracy": accuracy,
        "accurate": all(c["holds"] for c in accuracy.values()),
        "passed": all(c["holds"] for c in accuracy.values()),
    }  # fmt: skip


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--size", choices=list(CASES), default="full")
    chosen, sys.argv[1:] = own.parse_known_args()
    args = arguments(__doc__ or "")
    rows = [compare(*case, args) for case in CASES[chosen.size] if args.only in case[0]]
    if args.only in "banded":
        trials, seconds, electrodes = LARGE[chosen.size]
        rows.append(large(trials, seconds, electrodes, args.threads))
    return 0 if record("trf", rows, args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
