"""RSA of many layers and subjects with bootstrap: ours against rsatoolbox, on the same samples.

    python benchmarks/rsa.py [--size small] [--only corr]

The peer is what rsatoolbox offers for the same conclusion: `eval_dual_bootstrap` over subjects and
stimuli, `eval_bootstrap_pattern` over stimuli. Both get one set of samples, so that every single
evaluation can be compared. Noise ceilings in every sample are taken from the peer's work (the dual
bootstrap has no option for that), as ours computes one from the whole data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from harness import arguments, median_times, record, row
from rsatoolbox.inference import eval_bootstrap_pattern, eval_dual_bootstrap, eval_fixed
from rsatoolbox.model import ModelFixed
from rsatoolbox.rdm import RDMs
from rsatoolbox.util.inference_util import t_test_0

from brainalign.evaluation.rdm_bootstrap import draw_samples, resampled_similarity
from brainalign.evaluation.rsa import evaluate_rdms, rdms_dataset

REQUIRED = 10.0
SEED = 0
#: (stimuli, layers, subjects, samples, method, over): so many samples that the peer takes some
#: seconds for one run.
CASES = {
    "full": [
        (92, 20, 4, 60, "corr", "both"),
        (92, 20, 4, 20, "rho-a", "both"),
        (92, 20, 4, 150, "corr", "stimuli"),
        (92, 20, 4, 40, "spearman", "stimuli"),
        (92, 20, 4, 16, "cosine_cov", "stimuli"),
        (92, 6, 4, 60, "tau-a", "both"),
        (200, 20, 8, 30, "corr", "both"),
        (200, 20, 8, 8, "spearman", "both"),
    ],
    "small": [
        (30, 4, 3, 40, "corr", "both"),
        (30, 4, 3, 40, "rho-a", "both"),
        (30, 4, 3, 40, "spearman", "stimuli"),
        (30, 4, 3, 40, "tau-a", "stimuli"),
        (30, 4, 3, 40, "cosine_cov", "stimuli"),
    ],
}


def make(n: int, n_models: int, n_data: int) -> tuple[Any, Any]:
    """RDMs of layers that drift from the geometry the subjects share."""
    rng = np.random.default_rng(SEED)
    shared = rng.standard_normal((n, 20))
    ids = [f"s{i:03d}" for i in range(n)]

    def rdms(noises: np.ndarray, prefix: str) -> Any:
        made = []
        for noise in noises:
            x = shared + noise * rng.standard_normal(shared.shape)
            square = ((x[:, None] - x[None]) ** 2).mean(axis=2)
            made.append(square)
        return rdms_dataset(made, [f"{prefix}{i}" for i in range(len(made))], ids)

    return rdms(np.linspace(0.5, 4, n_models), "layer"), rdms(np.full(n_data, 1.5), "subject")


@contextlib.contextmanager
def same_samples(stimuli: np.ndarray, subjects: np.ndarray) -> Iterator[None]:
    """Let rsatoolbox's bootstrap draw the given samples; it subsamples as it always does."""
    rows = [np.repeat(np.arange(len(c)), c.astype(int)) for c in stimuli]
    who = [np.repeat(np.arange(len(c)), c.astype(int)) for c in subjects]
    place = iter(range(len(rows)))

    def both(rdms: Any, rdm_descriptor: str, pattern_descriptor: str) -> tuple[Any, Any, Any]:
        b = next(place)
        sample = rdms.subsample(rdm_descriptor, who[b])
        return sample.subsample_pattern(pattern_descriptor, rows[b]), who[b], rows[b]

    def pattern(rdms: Any, pattern_descriptor: str) -> tuple[Any, Any]:
        b = next(place)
        return rdms.subsample_pattern(pattern_descriptor, rows[b]), rows[b]

    module = "rsatoolbox.inference.evaluate"
    quiet = contextlib.redirect_stderr(io.StringIO())
    with (
        mock.patch(f"{module}.bootstrap_sample", both),
        mock.patch(f"{module}.bootstrap_sample_pattern", pattern),
        mock.patch(f"{module}.boot_noise_ceiling", lambda *_, **__: (0.0, 0.0)),
        warnings.catch_warnings(),
        quiet,
    ):
        warnings.simplefilter("ignore")
        yield


def vectors(rdms: Any) -> np.ndarray:
    i, j = np.triu_indices(rdms.sizes["stimulus"], 1)
    return rdms["rdm"].values[:, i, j]


def compare(
    n: int, n_models: int, n_data: int, n_bootstrap: int, method: str, over: str, repeats: int
) -> dict[str, Any]:
    models, data = make(n, n_models, n_data)
    stimuli, subjects = draw_samples(n, n_data, n_bootstrap, seed=SEED)
    fixed = [ModelFixed(f"m{i}", RDMs(v[None])) for i, v in enumerate(vectors(models))]
    targets = RDMs(vectors(data))

    def peer() -> Any:
        with same_samples(stimuli, subjects):
            if over == "both":
                return eval_dual_bootstrap(fixed, targets, method=method, N=n_bootstrap)
            return eval_bootstrap_pattern(
                fixed, targets, method=method, N=n_bootstrap, boot_noise_ceil=False
            )

    def ours() -> Any:
        options = {"method": method, "over": over, "n_bootstrap": n_bootstrap, "seed": SEED}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluate_rdms(models, data, **options)

    times = median_times({"ours": ours, "rsatoolbox": peer}, repeats)
    theirs, mine = peer(), ours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = eval_fixed(fixed, targets, method=method)
    values = resampled_similarity(models["rdm"].values, data["rdm"].values, stimuli, method=method)
    if over == "both":
        weights = subjects / n_data
        by_draw = np.einsum("bmd,bd->bm", values, weights)
        drawn = theirs.evaluations[:, :, 0, 0, 0]
    else:
        by_draw, drawn = values.mean(axis=2), theirs.evaluations
    good = np.isfinite(drawn).all(axis=1)
    one_sided = t_test_0(whole.evaluations, theirs.model_var, theirs.dof)
    p = 2 * np.minimum(one_sided, 1 - one_sided)
    case = f"RSA {method} over {over}, {n} stimuli, {n_models} layers, {n_data} subjects"
    return row(
        case,
        times,
        peer="rsatoolbox",
        required=REQUIRED,
        accuracy={
            "largest difference of one evaluation in one sample": (
                float(np.abs(by_draw - drawn)[good].max()), "<=", 1e-8,
            ),
            "largest difference of a value": (
                float(np.abs(mine["value"].values - whole.evaluations[0].mean(axis=1)).max()),
                "<=", 1e-8,
            ),
            "largest difference of a standard error": (
                float(np.abs(mine["se"].values - np.sqrt(theirs.model_var)).max()), "<=", 1e-8,
            ),
            "largest difference of a p-value": (
                float(np.abs(mine["p"].values - p).max()), "<=", 1e-8,
            ),
        },
        work={
            "stimuli": n, "layers": n_models, "subjects": n_data, "samples": n_bootstrap,
            "method": method, "over": over,
        },
    )  # fmt: skip


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--size", choices=list(CASES), default="full")
    chosen, sys.argv[1:] = own.parse_known_args()
    args = arguments(__doc__ or "")
    rows = [
        compare(*case, args.repeats)
        for case in CASES[chosen.size]
        if args.only in f"{case[0]} {case[4]} {case[5]}"
    ]
    return 0 if record("rsa", rows, args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
