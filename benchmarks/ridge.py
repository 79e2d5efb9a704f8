"""Ridge with one alpha per target against himalaya (k-fold) and scikit-learn (leave-one-out)."""

from __future__ import annotations

import warnings
from typing import Any

import harness
import numpy as np
import torch
from sklearn.linear_model import RidgeCV as SklearnRidgeCV
from sklearn.model_selection import KFold

from brainalign.linear import Ridge

ALPHAS = np.logspace(0, 5, 20)
FOLDS = 3
SIZES = {
    "full": {"tall": (3000, 1000, 10_000), "wide": (1000, 10_000, 10_000)},
    "small": {"tall": (300, 100, 500), "wide": (100, 500, 500)},
}
#: Backend, targets and alphas in flight that himalaya is tried with, once each; the best counts.
TRIES = (
    ("torch", 500, 5),
    ("torch", 1000, 5),
    ("torch", 1000, None),
    ("torch", 2500, 5),
    ("numpy", 1000, 5),
)


def problem(n: int, p: int, t: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets from noise alone to nearly noiseless, so that their best alphas differ."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p), dtype=np.float32)
    W = rng.standard_normal((p, t), dtype=np.float32) * np.logspace(-2, 0.7, t, dtype=np.float32)
    Y = X @ W / np.float32(np.sqrt(p)) + rng.standard_normal((n, t), dtype=np.float32)
    return X, Y


def himalaya(kind: str, backend: str, targets: int | None, alphas: int | None) -> Any:
    """Return one of himalaya's estimators, on one of its CPU backends."""
    from himalaya.backend import set_backend
    from himalaya.kernel_ridge import KernelRidgeCV
    from himalaya.ridge import RidgeCV
    from himalaya.scoring import r2_score

    set_backend(backend)
    options: dict[str, Any] = {
        "n_targets_batch": targets, "n_alphas_batch": alphas, "score_func": r2_score
    }  # fmt: skip
    if kind == "RidgeCV":
        options["warn"] = False
        return RidgeCV(alphas=ALPHAS, cv=KFold(FOLDS), solver_params=options)
    return KernelRidgeCV(alphas=ALPHAS, cv=KFold(FOLDS), kernel="linear", solver_params=options)


def best_himalaya(
    X: np.ndarray, Y: np.ndarray, kinds: tuple[str, ...]
) -> tuple[tuple[str, str, int | None, int | None], dict[str, float]]:
    """Try every estimator, backend and batch size once; return the fastest and all times.

    On a quarter of the targets: the largest batch tried is as large.
    """
    tried = {}
    Y = np.ascontiguousarray(Y[:, ::4])
    for kind in kinds:
        for options in TRIES:
            work = himalaya(kind, *options)
            times = harness.median_times({"fit": lambda w=work: fitted(w, X, Y)}, 1, warm=False)
            tried[(kind, *options)] = times["fit"]["median_s"]
    best = min(tried, key=lambda k: tried[k])
    return best, {" ".join(map(str, k)): round(v, 3) for k, v in tried.items()}


def fitted(model: Any, X: np.ndarray, Y: np.ndarray) -> Any:
    if hasattr(model, "solver_params"):
        from himalaya.backend import get_backend

        backend = get_backend()
        return model.fit(backend.asarray(X), backend.asarray(Y))
    return model.fit(X, Y)


def plain(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def kfold(shape: tuple[int, int, int], kinds: tuple[str, ...], required: float, args: Any) -> dict:
    X, Y = problem(*shape)
    best, tried = best_himalaya(X, Y, kinds)
    # himalaya centres by the mean of all folds, ours by that of the training folds: so neither.
    ours = Ridge(ALPHAS, cv=KFold(FOLDS), fit_intercept=False, device="cpu")
    peer = himalaya(*best)
    times = harness.median_times(
        {"ours": lambda: fitted(ours, X, Y), "himalaya": lambda: fitted(peer, X, Y)}, args.repeats
    )
    same = np.isclose(ours.alpha_, plain(peer.best_alphas_), rtol=1e-5)
    gap = np.abs(ours.best_score_ - plain(peer.cv_scores_).reshape(-1, shape[2])[-1])
    # Where two alphas are nearly as good, rounding decides: himalaya in float64 says who is right.
    right, differ = same.copy(), np.flatnonzero(~same)
    if len(differ):
        judge = fitted(himalaya(*best), X.astype(np.float64), Y[:, differ].astype(np.float64))
        right[differ] = np.isclose(ours.alpha_[differ], plain(judge.best_alphas_), rtol=1e-5)
    return harness.row(
        f"k-fold ridge, n {shape[0]}, p {shape[1]}",
        times,
        peer="himalaya",
        required=required,
        accuracy={
            "share of targets with the same alpha, or himalaya's in float64": (
                float(right.mean()), ">=", 0.999
            ),
            "largest difference of R2": (float(gap.max()), "<=", 1e-4),
            "distinct best alphas": (len(np.unique(ours.alpha_)), ">=", 8),
        },
        work={
            "n": shape[0], "p": shape[1], "targets": shape[2], "alphas": len(ALPHAS),
            "folds": FOLDS, "dtype": "float32", "himalaya": " ".join(map(str, best)),
            "same_alpha_in_float32": float(same.mean()), "fit_intercept": False,
            "himalaya_tried_on_a_quarter_s": tried,
        },
    )  # fmt: skip


def more_alphas(shape: tuple[int, int, int], args: Any) -> dict:
    X, Y = problem(*shape)
    few = Ridge(ALPHAS, cv=KFold(FOLDS), device="cpu")
    many = Ridge(np.logspace(0, 5, 100), cv=KFold(FOLDS), device="cpu")
    times = harness.median_times(
        {"ours": lambda: many.fit(X, Y), "ours, 20 alphas": lambda: few.fit(X, Y)}, args.repeats
    )
    worse = float((few.best_score_ - many.best_score_).max())
    return harness.row(
        "100 alphas against 20",
        times,
        peer="ours, 20 alphas",
        required=1 / 1.3,
        accuracy={"largest R2 lost by the finer grid": (worse, "<=", 0.02)},
        work={"n": shape[0], "p": shape[1], "targets": shape[2], "folds": FOLDS},
    )


def closed_form(shape: tuple[int, int, int], args: Any) -> list[dict]:
    X, Y = problem(*shape)
    peer = SklearnRidgeCV(ALPHAS, alpha_per_target=True)
    loo, gcv = Ridge(ALPHAS, cv="loo", device="cpu"), Ridge(ALPHAS, cv="gcv", device="cpu")
    times = harness.median_times(
        {
            "leave-one-out": lambda: loo.fit(X, Y),
            "GCV": lambda: gcv.fit(X, Y),
            "scikit-learn": lambda: peer.fit(X, Y),
        },
        args.repeats,
    )
    exact = SklearnRidgeCV(ALPHAS, alpha_per_target=True, store_cv_results=True)
    part = slice(0, shape[2], max(1, shape[2] // 200))
    exact.fit(X.astype(np.float64), Y[:, part].astype(np.float64))
    spread = ((Y[:, part] - Y[:, part].mean(axis=0, dtype=np.float64)) ** 2).sum(axis=0)
    r2 = 1 - exact.cv_results_.sum(axis=0).T / spread
    gap = float(np.abs(loo.cv_scores_[:, part] - r2).max())
    same = float(np.isclose(loo.alpha_, peer.alpha_).mean())
    near = np.abs(np.log(gcv.alpha_ / peer.alpha_)) < 1.01 * np.log(ALPHAS[1] / ALPHAS[0])
    work = {"n": shape[0], "p": shape[1], "targets": shape[2], "alphas": len(ALPHAS),
            "dtype": "float32"}  # fmt: skip
    rows = []
    for name, required, accuracy in (
        (
            "leave-one-out",
            6.0,
            {
                "share of targets with the same alpha": (same, ">=", 0.999),
                "largest difference of R2 (200 targets, float64)": (gap, "<=", 1e-4),
            },
        ),
        (
            "GCV",
            20.0,
            {"share of alphas within a step of leave-one-out": (float(near.mean()), ">=", 0.99)},
        ),
    ):
        pair = {"ours": times[name], "scikit-learn": times["scikit-learn"]}
        rows.append(
            harness.row(
                name, pair, peer="scikit-learn", required=required, accuracy=accuracy, work=work
            )
        )
    return rows


def main() -> None:
    args = harness.arguments(__doc__)
    warnings.simplefilter("ignore")
    sizes = SIZES[args.size]
    cases = {
        "kfold": lambda: [kfold(sizes["tall"], ("RidgeCV",), 5.0, args)],
        "alphas": lambda: [more_alphas(sizes["tall"], args)],
        "wide": lambda: [kfold(sizes["wide"], ("RidgeCV", "KernelRidgeCV"), 3.0, args)],
        "closed": lambda: closed_form(sizes["tall"], args),
    }
    chosen = {name: run for name, run in cases.items() if args.only in name}
    passed = [harness.record(f"ridge_{name}", run(), args.out) for name, run in chosen.items()]
    raise SystemExit(not all(passed))


if __name__ == "__main__":
    main()
