"""Banded ridge against himalaya's GroupRidgeCV: the same candidates, alphas, folds and type.

Both search the same gammas and alphas for three feature spaces and refit all targets. Ours runs
without refinement, so that both have the same budget; with it is a row of its own, without a peer.
The peer runs on each of its CPU backends, at the batch of targets that was fastest of a few.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import harness
import numpy as np
from himalaya.backend import set_backend
from himalaya.ridge import GroupRidgeCV
from himalaya.scoring import r2_score

from brainalign.linear import BandedRidge, sample_gammas

REQUIRED = 3.0
#: Mean cross-validated R^2 may be lower than the peer's by no more than this.
LOWER = 1e-4
#: n_samples, features of the three spaces, n_targets, n_gammas
SIZES = {
    "full": (3000, (300, 300, 400), 2000, 3),
    "small": (300, (30, 30, 40), 200, 3),
}
N_ALPHAS, N_FOLDS = 20, 3
ALPHAS = np.logspace(0, 5, N_ALPHAS)


def subject(n: int, widths: tuple[int, ...], n_targets: int, seed: int = 0) -> tuple[Any, ...]:
    """Spaces with decaying spectra, of which each target uses its own mixture; float32."""
    rng = np.random.default_rng(seed)
    spaces, signal = [], np.zeros((n, n_targets), dtype=np.float32)
    mixture = rng.dirichlet(np.full(len(widths), 0.5), size=n_targets).astype(np.float32)
    for s, p in enumerate(widths):
        decay = np.arange(1, p + 1, dtype=np.float32) ** -0.5
        turn = np.linalg.qr(rng.standard_normal((p, p)))[0].astype(np.float32)
        x = (rng.standard_normal((n, p), dtype=np.float32) * decay) @ turn
        x /= x.std(axis=0)
        own = x @ rng.standard_normal((p, n_targets), dtype=np.float32)
        signal += np.sqrt(mixture[:, s]) * own / own.std(axis=0)
        spaces.append(x)
    share = rng.uniform(0, 0.6, n_targets).astype(np.float32)
    noise = rng.standard_normal((n, n_targets), dtype=np.float32)
    Y = np.sqrt(share) * signal / signal.std(axis=0) + np.sqrt(1 - share) * noise
    labels = np.repeat(np.arange(len(widths)), widths)
    return np.hstack(spaces), Y.astype(np.float32), labels


def peer(backend: str, batch: int | None, labels: Any, gammas: Any) -> Any:
    """Return a fit of the peer on one backend."""

    def fit(X: Any, Y: Any) -> Any:
        set_backend(backend)
        model = GroupRidgeCV(
            groups=labels,
            cv=N_FOLDS,
            fit_intercept=True,
            solver_params={
                "n_iter": gammas, "alphas": ALPHAS.astype(np.float32), "score_func": r2_score,
                "n_targets_batch": batch, "progress_bar": False, "warn": False,
            },
        )  # fmt: skip
        return model.fit(X, Y)

    return fit


def fastest_batch(backend: str, labels: Any, gammas: Any, X: Any, Y: Any) -> int | None:
    """Batch of targets at which the peer scores one gamma fastest; None is all at once."""
    times = {}
    for batch in (None, 1000, 250):
        if batch is None or batch < Y.shape[1]:
            start = time.perf_counter()
            peer(backend, batch, labels, gammas[:1])(X, Y)
            times[batch] = time.perf_counter() - start
    return min(times, key=lambda b: times[b])


def cv_score(model: Any) -> float:
    """Mean over the targets of the best cross-validated R^2."""
    return float(np.asarray(model.cv_scores_).max(axis=0).mean())


def main() -> int:
    """Run the comparison; 0 if all rows pass."""
    args = harness.arguments(__doc__ or "")
    size = args.size
    warnings.simplefilter("ignore")
    n, widths, n_targets, n_gammas = SIZES[size]
    X, Y, labels = subject(n, widths, n_targets)
    gammas = sample_gammas(n_gammas, len(widths), seed=1)

    def ours(refine: bool) -> BandedRidge:
        model = BandedRidge(
            labels, alphas=ALPHAS, gammas=gammas, cv=N_FOLDS, refine=refine, device="cpu"
        )
        return model.fit(X, Y)

    rows = []
    mine = ours(False)
    work = {"n_samples": n, "n_features": sum(widths), "n_spaces": len(widths),
            "n_targets": n_targets, "n_gammas": n_gammas, "n_alphas": N_ALPHAS,
            "n_folds": N_FOLDS, "dtype": "float32"}  # fmt: skip
    for backend in ("torch", "numpy"):
        case = f"banded ridge, {backend}, {size}"
        if args.only not in case:
            continue
        single = gammas.astype(np.float32)
        batch = fastest_batch(backend, labels, single, X, Y)
        fit = peer(backend, batch, labels, single)
        theirs = fit(X, Y)
        lower = cv_score(theirs) - float(np.mean(mine.best_score_))
        times = harness.median_times(
            {"ours": lambda: ours(False), f"himalaya {backend}": partial(fit, X, Y)}, args.repeats
        )
        rows.append(
            harness.row(
                case,
                times,
                peer=f"himalaya {backend}",
                required=REQUIRED,
                accuracy={"mean R^2, theirs minus ours": (lower, "<=", LOWER)},
                work={**work, "peer_target_batch": batch},
            )
        )
    case = f"banded ridge refined, {size}"
    if args.only in case:
        refined = ours(True)
        gain = float(np.mean(refined.best_score_) - np.mean(mine.best_score_))
        times = harness.median_times({"ours": lambda: ours(True)}, args.repeats)
        rows.append(
            {
                "case": case,
                "work": work,
                "times": times,
                "gain in mean R^2": gain,
                "passed": gain >= 0,
            }
        )
    return 0 if harness.record("banded", rows, args.out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
