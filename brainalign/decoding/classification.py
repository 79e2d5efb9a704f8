"""Which category was shown: pattern classification of block-design recordings, one run left out.

Runs are the units: a run is standardised alone, and no block of the tested run is used in training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.schema import validate
from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.splits import by_run
from brainalign.errors import ConfigError, SchemaError
from brainalign.evaluation.significance import bootstrap_ci, permutation_p, permutation_rows

__all__ = [
    "Decoding",
    "binomial_interval",
    "block_patterns",
    "classify",
    "confusion",
    "decode",
    "identification",
    "nearest_mean",
    "permuted_accuracies",
    "section",
    "section_from_folder",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """Result of `decode` for one subject.

    Attributes
    ----------
    trials : xarray.Dataset
        The ``trials`` schema, one trial a block: ``condition`` (shown), ``response`` (predicted),
        ``correct``, ``run``.
    patterns : xarray.Dataset
        The patterns classified, from `block_patterns`.
    nearest_mean : float
        Accuracy of the nearest class mean by correlation.
    identification : float
        Result of `identification`, odd against even runs.
    shifts : dict of int to float
        Accuracy with the labels shifted by so many volumes.
    null : ndarray, shape (n_permutations,)
        Accuracies with labels permuted within runs.
    p : float
        ``(1 + #(null >= accuracy)) / (1 + n_permutations)``.
    C, seed
        Settings.
    """

    trials: xr.Dataset
    patterns: xr.Dataset
    nearest_mean: float
    identification: float
    shifts: Mapping[int, float]
    null: NDArray[np.float64]
    p: float
    C: float
    seed: int

    @property
    def accuracy(self) -> float:
        """Share of blocks classified rightly."""
        return float(self.trials["correct"].values.mean())

    @property
    def categories(self) -> list[str]:
        """The conditions, sorted."""
        return sorted(set(self.trials["condition"].values.tolist()))

    @property
    def chance(self) -> float:
        """One over the number of categories."""
        return 1 / len(self.categories)

    @property
    def subject(self) -> str:
        """Name of the subject."""
        return str(self.trials["subject"].values)


def block_patterns(responses: xr.Dataset, *, rest: str = "rest", shift: int = 0) -> xr.Dataset:
    """Average the volumes of each block after removing trend and scale run by run.

    In each run and neuroid: x <- x - (a + b t), least squares; z = (x - mean_rest) / sd_rest, mean
    and standard deviation over the volumes labelled rest; a pattern is the mean of z over the
    volumes of one block.

    Parameters
    ----------
    responses : xarray.Dataset, dims (time, neuroid)
        Time series with coords ``condition`` (text) and ``run`` on time. Runs are contiguous.
    rest : str
        Label of the volumes between blocks.
    shift : int
        Volumes by which the blocks are moved later (negative: earlier); the rest volumes that
        standardise stay where they are. For the check that the labels fit.

    Returns
    -------
    xarray.Dataset, dims (presentation, neuroid)
        Responses in units of the standard deviation at rest; ``stimulus_id`` and ``condition`` are
        the label, ``run`` the run's label. attrs ``excluded_neuroids`` (not finite, or constant at
        rest in some run) and ``excluded_runs`` (without a block) count what was left out.

    Raises
    ------
    SchemaError
        A coordinate is missing, a run has no rest, no neuroid varies, or there is no block.
    """
    from scipy.signal import detrend

    if "time" not in responses["responses"].dims:
        raise SchemaError(
            f"Expected a time series (time, neuroid), got {responses['responses'].dims}."
        )
    for name in ("condition", "run"):
        if name not in responses.coords or responses[name].dims != ("time",):
            raise SchemaError(f"The responses need a coordinate {name!r} on dimension 'time'.")
    condition = responses["condition"].values.astype(str)
    run = responses["run"].values
    if rest not in condition:
        raise SchemaError(
            f"No volume is labelled {rest!r}; labels are {', '.join(sorted(set(condition)))}."
        )

    means: list[NDArray[np.float64]] = []
    labels: list[str] = []
    runs: list[Any] = []
    empty: list[str] = []
    good = np.ones(responses.sizes["neuroid"], dtype=bool)
    for one in np.unique(run):
        here = run == one
        label = condition[here]
        at_rest = label == rest
        if at_rest.all():
            empty.append(str(one))
            continue
        if at_rest.sum() < 2:
            raise SchemaError(f"Run {one} has {int(at_rest.sum())} volumes of {rest!r}; 2 needed.")
        x = responses["responses"].values[here].astype(np.float64)
        finite = np.isfinite(x).all(axis=0)
        x[:, ~finite] = 0
        varies = np.ptp(x[at_rest], axis=0) > 0
        x = detrend(x, axis=0)
        scale = x[at_rest].std(axis=0)
        good &= finite & varies
        z = (x - x[at_rest].mean(axis=0)) / np.where(scale > 0, scale, 1)
        moved = _shifted(label, shift, rest)
        edges = np.flatnonzero(np.r_[True, moved[1:] != moved[:-1], True])
        for start, stop in pairwise(edges):
            if moved[start] != rest:
                means.append(z[start:stop].mean(axis=0))
                labels.append(str(moved[start]))
                runs.append(one)
    if not means:
        raise SchemaError(f"There is no block: every volume is labelled {rest!r}.")
    if not good.any():
        raise SchemaError("No neuroid is finite and varies at rest in every run.")
    if not good.all() or empty:
        logger.warning(
            "Left out: %d of %d neuroids (constant or not finite), runs without a block: %s.",
            int((~good).sum()),
            good.size,
            ", ".join(empty) or "none",
        )

    subject = str(np.atleast_1d(responses["subject"].values)[0]) if "subject" in responses else ""
    neuroid = {n: c for n, c in responses.coords.items() if "neuroid" in c.dims}
    ds = xr.Dataset(
        {"responses": (("presentation", "neuroid"), np.stack(means))},
        coords={
            "stimulus_id": ("presentation", labels),
            "condition": ("presentation", labels),
            "run": ("presentation", np.array(runs)),
            "session": ("presentation", np.zeros(len(runs), dtype=np.int64)),
            "repetition": ("presentation", _occurrence(labels)),
            "subject": ("presentation", [subject] * len(labels)),
            **neuroid,
        },
        attrs={
            "units": "standard deviations at rest",
            "subject": subject,
            "excluded_neuroids": int((~good).sum()),
            "excluded_runs": empty,
        },
    )
    return validate(ds.isel(neuroid=np.flatnonzero(good)), "responses")


def _shifted(label: NDArray[np.str_], shift: int, rest: str) -> NDArray[np.str_]:
    moved = np.full_like(label, rest)
    if shift >= 0:
        moved[shift:] = label[: len(label) - shift]
    else:
        moved[:shift] = label[-shift:]
    return moved


def _occurrence(labels: Sequence[str]) -> NDArray[np.int64]:
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        out.append(seen.get(label, 0))
        seen[label] = out[-1] + 1
    return np.array(out, dtype=np.int64)


def _inputs(
    patterns: ArrayLike, condition: ArrayLike, run: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.str_], NDArray[Any]]:
    x, y, r = np.asarray(patterns, dtype=np.float64), np.asarray(condition, str), np.asarray(run)
    if x.ndim != 2 or y.shape != (len(x),) or r.shape != (len(x),):
        raise SchemaError(
            f"Expected patterns (n, neuroids) with n conditions and runs; got {x.shape}, "
            f"{y.shape}, {r.shape}."
        )
    if not np.isfinite(x).all():
        raise SchemaError(f"The patterns hold {int((~np.isfinite(x)).sum())} values not finite.")
    if len(np.unique(y)) < 2:
        raise SchemaError(f"Classification needs two categories; there is only {y[0]!r}.")
    return x, y, r


def classify(
    patterns: ArrayLike, condition: ArrayLike, run: ArrayLike, *, C: float = 0.01
) -> NDArray[np.str_]:
    """Predict each block's category by linear support vector machines trained on the other runs.

    One category against the rest; the category with the largest ``w.x + b`` is predicted::

        min_(w,b) (|w|^2 + b^2) / 2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2

    Parameters
    ----------
    patterns : array, shape (n_blocks, n_neuroids)
        From `block_patterns`.
    condition : array of str, shape (n_blocks,)
        Category of each block.
    run : array, shape (n_blocks,)
        Run of each block; one is left out at a time.
    C : float
        Weight of the errors.

    Returns
    -------
    array of str, shape (n_blocks,)

    Raises
    ------
    SchemaError
        Shapes differ, values are not finite, or there is one category only.
    ConfigError
        There is one run only.

    References
    ----------
    Fan et al. (2008), LIBLINEAR, J. Mach. Learn. Res. 9, 1871-1874, eq. 1 (L2 loss).
    """
    x, y, r = _inputs(patterns, condition, run)
    return _classify(_rotated(x), y, by_run(r), C)


def _rotated(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return coordinates in the row space: all inner products stay, so the solution does too."""
    if x.shape[1] <= x.shape[0]:
        return x
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u * s


def _classify(
    x: NDArray[np.float64], y: NDArray[np.str_], splits: Sequence[Any], C: float
) -> NDArray[np.str_]:
    from sklearn.svm import LinearSVC

    predicted = np.empty_like(y)
    for train, test in splits:
        if len(np.unique(y[train])) < 2:
            raise SchemaError("A training set holds one category only; every run needs several.")
        machine = LinearSVC(C=C, dual=False, tol=1e-5)
        predicted[test] = machine.fit(x[train], y[train]).predict(x[test])
    return predicted


def nearest_mean(patterns: ArrayLike, condition: ArrayLike, run: ArrayLike) -> NDArray[np.str_]:
    """Predict the category whose mean over the other runs correlates most with each block.

    Parameters, result and errors as for `classify`.
    """
    x, y, r = _inputs(patterns, condition, run)
    predicted = np.empty_like(y)
    for train, test in by_run(r):
        names = np.unique(y[train])
        means = np.stack([x[train][y[train] == name].mean(axis=0) for name in names])
        predicted[test] = names[_correlations(x[test], means).argmax(axis=1)]
    return predicted


def identification(
    patterns: ArrayLike, condition: ArrayLike, run: ArrayLike, *, half: ArrayLike | None = None
) -> float:
    """Pairwise identification of categories between two halves of the runs.

    For each category a of the first half and each other category b, right if
    r(first_a, second_a) > r(first_a, second_b); class means, with the grand mean of each half
    removed.

    Parameters
    ----------
    patterns, condition, run
        As for `classify`.
    half : array of bool, shape (n_blocks,), optional
        True for the first half. By default every other run, starting with the first.

    Returns
    -------
    float
        Share of the ordered pairs identified rightly; chance 0.5.

    References
    ----------
    Haxby et al. (2001), Science 293, 2425-2430.
    """
    x, y, r = _inputs(patterns, condition, run)
    first = np.unique(r, return_inverse=True)[1] % 2 == 0 if half is None else np.asarray(half)
    names = np.unique(y)
    means = []
    for side in (first, ~first):
        absent = [str(n) for n in names if not ((y == n) & side).any()]
        if absent:
            raise SchemaError(f"Category {absent[0]!r} is missing in one half of the runs.")
        mean = np.stack([x[(y == n) & side].mean(axis=0) for n in names])
        means.append(mean - mean.mean(axis=0))
    r_ab = _correlations(*means)
    right = np.diag(r_ab)[:, None] > r_ab
    return float(right[~np.eye(len(names), dtype=bool)].mean())


def _correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b = (m - m.mean(axis=1, keepdims=True) for m in (a, b))
    return (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def permuted_accuracies(
    patterns: ArrayLike,
    condition: ArrayLike,
    run: ArrayLike,
    *,
    C: float = 0.01,
    n_permutations: int = 200,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Accuracies of `classify`, fitted anew, with the labels permuted within each run.

    Parameters
    ----------
    patterns, condition, run, C
        As for `classify`.
    n_permutations : int
        Number of permutations.
    seed : int
        Seed.

    Returns
    -------
    array, shape (n_permutations,)
    """
    from tqdm import tqdm

    x, y, r = _inputs(patterns, condition, run)
    rotated, splits = _rotated(x), by_run(r)
    orders = permutation_rows(len(y), n_permutations, groups=r, seed=seed)
    accuracies = [
        np.mean(_classify(rotated, y[order], splits, C) == y[order])
        for order in tqdm(orders, total=n_permutations, desc="permutations", disable=None)
    ]
    return np.array(accuracies)


def confusion(
    condition: ArrayLike, predicted: ArrayLike, categories: Sequence[str]
) -> NDArray[np.float64]:
    """Share of the blocks of each shown category (row) called each category (column)."""
    shown, said = np.asarray(condition, str), np.asarray(predicted, str)
    counts = np.array(
        [[np.sum((shown == a) & (said == b)) for b in categories] for a in categories]
    )
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def binomial_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a proportion.

    Parameters
    ----------
    k, n : int
        Successes and trials.
    level : float
        Coverage.

    References
    ----------
    Clopper & Pearson (1934), Biometrika 26, 404-413.
    """
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def decode(
    responses: xr.Dataset,
    *,
    rest: str = "rest",
    C: float = 0.01,
    shifts: Sequence[int] = (-2, -1, 0, 1, 2),
    n_permutations: int = 200,
    seed: int = 0,
) -> Decoding:
    """Classify the blocks of one subject, with controls.

    Parameters
    ----------
    responses : xarray.Dataset, dims (time, neuroid)
        As for `block_patterns`.
    rest : str
        Label of the volumes between blocks.
    C : float
        See `classify`.
    shifts : sequence of int
        Label shifts in volumes to try, as a check that the labels fit the data.
    n_permutations : int
        Permutations of the labels within runs.
    seed : int
        Seed.

    Returns
    -------
    Decoding

    Raises
    ------
    SchemaError, ConfigError
        See `block_patterns` and `classify`.
    """
    if n_permutations < 0:
        raise ConfigError(f"n_permutations must be 0 or more; it is {n_permutations}.")
    patterns = block_patterns(responses, rest=rest)
    x, y, run = (patterns[n].values for n in ("responses", "condition", "run"))
    predicted = classify(x, y, run, C=C)
    accuracy = float(np.mean(predicted == y))
    moved = {}
    for shift in shifts:
        if shift == 0:
            moved[0] = accuracy
            continue
        p = block_patterns(responses, rest=rest, shift=shift)
        said = classify(p["responses"].values, p["condition"].values, p["run"].values, C=C)
        moved[shift] = float(np.mean(said == p["condition"].values))
    null = permuted_accuracies(x, y, run, C=C, n_permutations=n_permutations, seed=seed)
    trials = xr.Dataset(
        {
            "response": ("trial", predicted),
            "correct": ("trial", predicted == y),
            "condition": ("trial", y),
            "run": ("trial", run),
        },
        coords={"subject": patterns.attrs["subject"]},
    )
    return Decoding(
        trials=validate(trials, "trials"),
        patterns=patterns,
        nearest_mean=float(np.mean(nearest_mean(x, y, run) == y)),
        identification=identification(x, y, run),
        shifts=moved,
        null=null,
        p=float(permutation_p(np.sum(null >= accuracy - 1e-12), n_permutations)),
        C=C,
        seed=seed,
    )


def _by(decodings: Sequence[Decoding], key: str, values: Sequence[Any]) -> xr.Dataset:
    """Accuracy in % with exact intervals by category or run, one series a subject."""
    value = np.full((len(values), len(decodings), 3), np.nan)
    for s, d in enumerate(decodings):
        correct, labels = d.trials["correct"].values, d.trials[key].values
        for i, one in enumerate(values):
            n = int(np.sum(labels == one))
            if n:
                k = int(correct[labels == one].sum())
                value[i, s] = 100 * np.array([k / n, *binomial_interval(k, n)])
    item = [f"run {v}" if key == "run" else str(v) for v in values]
    return _points(value, item, [d.subject for d in decodings])


def _points(value: NDArray[np.float64], item: Sequence[str], series: Sequence[str]) -> xr.Dataset:
    ds = xr.Dataset(
        {n: (("item", "series"), value[..., i]) for i, n in enumerate(("value", "low", "high"))},
        coords={"item": list(item), "series": list(series)},
    )
    ds["value"].attrs = {"long_name": "accuracy", "units": "%"}
    return ds


def section(
    decodings: Sequence[Decoding],
    *,
    id: str = "classification",
    title: str = "Pattern classification",
    seed: int = 0,
) -> Section:
    """Describe classifications as a section of the report.

    Parameters
    ----------
    decodings : sequence of Decoding
        One a subject, over the same categories.
    id, title : str
        The section's id and heading.
    seed : int
        Seed of the bootstrap over runs.

    Raises
    ------
    SchemaError
        There is no subject, or subjects differ in categories.
    """
    if not decodings:
        raise SchemaError("A section needs the decoding of one subject at least.")
    categories = decodings[0].categories
    if any(d.categories != categories for d in decodings):
        raise SchemaError("The subjects were shown different categories.")
    chance = 100 * decodings[0].chance
    line = {"label": "chance", "value": chance}
    n_categories = len(categories)
    subjects = [d.subject for d in decodings]
    runs = sorted({r for d in decodings for r in d.trials["run"].values.tolist()})

    summary = []
    for d in decodings:
        correct = d.trials["correct"].values.astype(float)
        over_runs = bootstrap_ci(np.mean, correct, groups=d.trials["run"].values, seed=seed)
        low, high = binomial_interval(int(correct.sum()), correct.size)
        summary.append(
            Estimate(
                f"{n_categories}-way classification, {d.subject}",
                100 * d.accuracy,
                100 * float(over_runs.low),
                100 * float(over_runs.high),
                "%",
                f"{int(correct.sum())} of {correct.size} blocks, one run left out; bootstrap over "
                f"runs (binomial {100 * low:.1f} to {100 * high:.1f}); "
                + (f"permutation p = {d.p:.2g}" if d.null.size else "no permutation"),
                f"chance {chance:.1f} %",
            )
        )
        summary.append(
            Estimate(
                f"Nearest class mean, {d.subject}",
                100 * d.nearest_mean,
                unit="%",
                note="correlation with the class means of the other runs",
                reference=f"chance {chance:.1f} %",
            )
        )
        summary.append(
            Estimate(
                f"Odd-even identification, {d.subject}",
                100 * d.identification,
                unit="%",
                note="pairs of categories, correlation of class means between halves of the runs",
                reference="chance 50 %",
            )
        )

    matrices = np.stack(
        [confusion(d.trials["condition"], d.trials["response"], categories) for d in decodings]
    )
    matrix = xr.Dataset(
        {"value": (("row", "column"), 100 * matrices.mean(axis=0))},
        coords={"row": categories, "column": categories},
    )
    matrix["value"].attrs = {"long_name": "blocks of the shown category", "units": "%"}
    who = subjects[0] if len(subjects) == 1 else f"the mean of {len(subjects)} subjects"
    shifts = sorted(set.intersection(*(set(d.shifts) for d in decodings)))
    moved = np.array([[d.shifts[s] for d in decodings] for s in shifts])
    moved = 100 * np.stack([moved, np.full_like(moved, np.nan), np.full_like(moved, np.nan)], -1)
    figures = [
        Figure(
            "confusion",
            "matrix",
            "What was shown and what was decoded",
            f"Share of the blocks of each category shown (rows) that were called each category "
            f"(columns), {who}; {chance:.1f} % is chance. A strong diagonal means that the pattern "
            "tells the category; errors off the diagonal show which categories look alike to it.",
            matrix,
            {"x_label": "decoded", "y_label": "shown"},
        ),
        Figure(
            "accuracy-category",
            "points",
            "Accuracy by category",
            "Share of blocks decoded rightly, with the exact 95 % binomial interval. Look for "
            "categories whose interval reaches chance (dashed): the pattern does not tell them.",
            _by(decodings, "condition", categories),
            {"reference_lines": [line], "y_label": "accuracy (%)", "y_range": [0, 105]},
        ),
        Figure(
            "accuracy-run",
            "points",
            "Accuracy by run left out",
            "Share of blocks decoded rightly in each run when it was left out of training, with "
            "the exact 95 % binomial interval. Runs far below the rest hint at a fault in the "
            "recording or its labels.",
            _by(decodings, "run", runs),
            {"reference_lines": [line], "y_label": "accuracy (%)", "y_range": [0, 105]},
        ),
    ]
    if len(shifts) > 1:
        figures.append(
            Figure(
                "label-shift",
                "points",
                "Do the labels fit the recording?",
                "Accuracy when the blocks are moved by so many volumes. It should be highest at "
                "0: a peak elsewhere means that the labels miss the haemodynamic delay, or hold "
                "it twice.",
                _points(moved, [f"{s:+d}" if s else "0" for s in shifts], subjects),
                {
                    "reference_lines": [line],
                    "x_label": "shift (volumes)",
                    "y_label": "accuracy (%)",
                },
            )
        )
    if all(d.null.size for d in decodings):
        null = xr.Dataset(
            {"value": ("observation", 100 * np.concatenate([d.null for d in decodings]))},
            coords={
                "group": (
                    "observation",
                    np.repeat(
                        [f"permuted, {s}" for s in subjects], [d.null.size for d in decodings]
                    ),
                )
            },
        )
        null["value"].attrs = {"long_name": "accuracy", "units": "%"}
        observed = [
            {"label": f"observed, {d.subject}", "value": 100 * d.accuracy} for d in decodings
        ]
        figures.append(
            Figure(
                "permutations",
                "distribution",
                "Accuracy when the labels mean nothing",
                "Accuracies after the labels were permuted within each run and all machines "
                "trained anew. The observed accuracy should lie outside; the permuted ones should "
                "centre on chance.",
                null,
                {"reference_lines": [*observed, line]},
            )
        )

    exclusions = []
    for d in decodings:
        if n := d.patterns.attrs["excluded_neuroids"]:
            exclusions.append(
                f"{d.subject}: {n} of {n + d.patterns.sizes['neuroid']} neuroids, constant or not "
                "finite in some run."
            )
        for run in d.patterns.attrs["excluded_runs"]:
            exclusions.append(f"{d.subject}: run {run}, which has no block.")
    first = decodings[0]
    permuted = (
        f" Significance: the labels were permuted {first.null.size} times within runs and the "
        "whole analysis repeated, p = (1 + hits) / (1 + permutations) [@phipson2010]."
        if first.null.size
        else ""
    )
    return Section(
        id=id,
        title=title,
        intro=f"Which of {n_categories} categories was shown, read from the pattern of a whole "
        "block. Each run is decoded by classifiers that saw only the other runs.",
        figures=figures,
        summary=summary,
        methods="In each run the time series of every voxel was linearly detrended and "
        "standardised by the mean and standard deviation of the rest volumes; the volumes of a "
        "block were averaged. Linear support vector machines (one category against the rest, "
        f"squared hinge loss, C = {first.C:g}; [@fan2008]) were trained on all runs but one and "
        "tested on that run. Intervals are percentile bootstraps over runs and exact binomial "
        "intervals [@clopper1934]. Controls: the nearest class mean by correlation; "
        "identification of categories between odd and even runs by correlation [@haxby2001]; "
        f"labels shifted by single volumes.{permuted}",
        references=dict(_REFERENCES),
        exclusions=exclusions,
        facts={
            "subjects": str(len(decodings)),
            "categories": ", ".join(categories),
            "blocks": ", ".join(str(d.trials.sizes["trial"]) for d in decodings),
            "runs": ", ".join(str(len(np.unique(d.trials["run"]))) for d in decodings),
            "voxels": ", ".join(str(d.patterns.sizes["neuroid"]) for d in decodings),
        },
    )


def section_from_folder(data: str | Path, *, n_permutations: int = 200, seed: int = 0) -> Section:
    """Decode every subject of a bundle (`brainalign.data.bundle`) and describe it.

    Parameters
    ----------
    data : path
        The bundle; its responses are time series with ``condition`` and ``run``.
    n_permutations, seed : int
        See `decode`.
    """
    from brainalign.data.bundle import read_bundle

    study = read_bundle(data)
    decodings = [
        decode(responses, n_permutations=n_permutations, seed=seed)
        for responses in study.responses.values()
    ]
    return section(decodings, seed=seed)


_REFERENCES = {
    "haxby2001": """@article{haxby2001,
  author = {Haxby, James V. and Gobbini, M. Ida and Furey, Maura L. and Ishai, Alumit and
            Schouten, Jennifer L. and Pietrini, Pietro},
  title = {Distributed and Overlapping Representations of Faces and Objects in Ventral Temporal
           Cortex},
  journal = {Science},
  volume = {293},
  number = {5539},
  pages = {2425--2430},
  year = {2001},
  doi = {10.1126/science.1063736}
}""",
    "fan2008": """@article{fan2008,
  author = {Fan, Rong-En and Chang, Kai-Wei and Hsieh, Cho-Jui and Wang, Xiang-Rui and Lin,
  Chih-Jen}, title = {{LIBLINEAR}: A Library for Large Linear Classification}, journal = {Journal of
  Machine Learning Research}, volume = {9}, pages = {1871--1874}, year = {2008}
}""",
    "clopper1934": """@article{clopper1934,
  author = {Clopper, C. J. and Pearson, E. S.},
  title = {The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial},
  journal = {Biometrika},
  volume = {26},
  number = {4},
  pages = {404--413},
  year = {1934},
  doi = {10.1093/biomet/26.4.404}
}""",
    "phipson2010": """@article{phipson2010,
  author = {Phipson, Belinda and Smyth, Gordon K.},
  title = {Permutation {P}-values Should Never Be Zero: Calculating Exact {P}-values When
           Permutations Are Randomly Drawn},
  journal = {Statistical Applications in Genetics and Molecular Biology},
  volume = {9},
  number = {1},
  pages = {39},
  year = {2010},
  doi = {10.2202/1544-6115.1585}
}""",
}
