"""What trials say of observers: accuracy, consistency of their errors, shape bias."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.schema import validate
from brainalign.errors import SchemaError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "accuracy",
    "consistency_with_people",
    "error_consistency",
    "pairwise_consistency",
    "shape_bias",
]


def accuracy(trials: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    r"""Return the share of correct answers by condition, pooled over subjects.

    Intervals are Wilson's, which take trials as independent:

    .. math:: \frac{k + z^2/2 \pm z \sqrt{k (n - k)/n + z^2/4}}{n + z^2}

    Parameters
    ----------
    trials : xarray.Dataset
        The ``trials`` schema with ``correct`` and ``condition``.
    level : float
        Coverage of the intervals.

    Returns
    -------
    xarray.Dataset
        ``accuracy, low, high, n`` (condition). Conditions that are numbers come in rising order.

    Raises
    ------
    SchemaError
        If a variable is missing.
    """
    _require(trials, "correct", "condition")
    names = trials["condition"].values.astype(str)
    conditions = sorted(np.unique(names).tolist(), key=_rank)
    right = trials["correct"].values.astype(bool)
    n = np.array([(names == c).sum() for c in conditions])
    k = np.array([right[names == c].sum() for c in conditions])
    low, high = _wilson(k, n, level)
    return xr.Dataset(
        {
            "accuracy": ("condition", k / n),
            "low": ("condition", low),
            "high": ("condition", high),
            "n": ("condition", n),
        },
        coords={"condition": conditions},
        attrs={"level": level},
    )


def _rank(condition: str) -> tuple[int, float, str]:
    try:
        return 0, float(condition), condition
    except ValueError:
        return 1, 0.0, condition


def _require(trials: xr.Dataset, *names: str) -> None:
    validate(trials, "trials")
    missing = [name for name in names if name not in trials.variables]
    if missing:
        raise SchemaError(f"trials: {missing[0]!r} is missing.")


def _wilson(
    k: NDArray[np.int64], n: NDArray[np.int64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from scipy.stats import norm

    z = norm.ppf((1 + level) / 2)
    half = z * np.sqrt(k * (n - k) / n + z**2 / 4)
    return (k + z**2 / 2 - half) / (n + z**2), (k + z**2 / 2 + half) / (n + z**2)


def error_consistency(first: ArrayLike, second: ArrayLike) -> float:
    r"""Return Cohen's kappa of two observers being right on the same stimuli.

    .. math:: \kappa = \frac{c_{obs} - c_{exp}}{1 - c_{exp}}, \qquad
              c_{exp} = p_1 p_2 + (1 - p_1)(1 - p_2)

    with :math:`c_{obs}` the share of stimuli that both get right or both wrong, and
    :math:`p_1, p_2` the observers' accuracies.

    Parameters
    ----------
    first, second : array-like of bool, shape (n_stimuli,)
        Whether each observer was right.

    Returns
    -------
    float
        NaN where both are always right or both always wrong.

    Raises
    ------
    SchemaError
        If the lengths differ.

    References
    ----------
    Geirhos, Meding & Wichmann 2020, NeurIPS (arXiv:2006.16736), equations 1 and 3.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise SchemaError(f"Observers must judge the same stimuli; got {a.shape} and {b.shape}.")
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    if expected == 1:
        return float("nan")
    return float(((a == b).mean() - expected) / (1 - expected))


def pairwise_consistency(trials: xr.Dataset) -> xr.Dataset:
    """Return the error consistency of every two subjects in every condition.

    A model whose trials stand among those of people is a subject like them.

    Parameters
    ----------
    trials : xarray.Dataset
        The ``trials`` schema with ``subject``, ``stimulus_id``, ``condition`` and ``correct``.

    Returns
    -------
    xarray.Dataset
        ``kappa`` and ``n`` (pair, condition) over the stimuli that both saw, with ``subject_1`` and
        ``subject_2`` (pair). NaN where there are none or accuracy leaves nothing to agree on.

    Raises
    ------
    SchemaError
        If a variable is missing, there are fewer than 2 subjects, or a subject saw a stimulus twice
        in a condition.
    """
    table = _by_stimulus(trials)
    conditions = sorted(table["condition"].unique().tolist(), key=_rank)
    subjects = sorted(table["subject"].unique().tolist())
    if len(subjects) < 2:
        raise SchemaError(f"Consistency needs 2 subjects or more; there is {subjects[0]!r}.")
    pairs = list(combinations(subjects, 2))
    kappa = np.full((len(pairs), len(conditions)), np.nan)
    n = np.zeros(kappa.shape, dtype=int)
    for j, condition in enumerate(conditions):
        wide = table[table["condition"] == condition].pivot(
            index="stimulus_id", columns="subject", values="correct"
        )
        for i, pair in enumerate(pairs):
            if not set(pair) <= set(wide.columns):
                continue
            both = wide[list(pair)].dropna().astype(bool)
            n[i, j] = len(both)
            if len(both):
                kappa[i, j] = error_consistency(both[pair[0]], both[pair[1]])
    return xr.Dataset(
        {"kappa": (("pair", "condition"), kappa), "n": (("pair", "condition"), n)},
        coords={
            "subject_1": ("pair", [a for a, _ in pairs]),
            "subject_2": ("pair", [b for _, b in pairs]),
            "condition": conditions,
        },
    )


def _by_stimulus(trials: xr.Dataset) -> pd.DataFrame:
    """Return a table of subject, condition, stimulus_id and correct, each stimulus once."""
    _require(trials, "correct", "condition", "stimulus_id", "subject")
    import pandas as pd

    columns = ("subject", "condition", "stimulus_id")
    size = trials.sizes["trial"]
    table = pd.DataFrame(
        {c: np.broadcast_to(trials[c].values.astype(str), size) for c in columns}
        | {"correct": trials["correct"].values.astype(bool)}
    )
    repeated = table.duplicated(list(columns))
    if repeated.any():
        row = table[repeated].iloc[0]
        raise SchemaError(
            f"trials: {row['subject']!r} saw {row['stimulus_id']!r} more than once in condition "
            f"{row['condition']!r}.",
            "Keep one trial a stimulus.",
        )
    return table


def consistency_with_people(
    trials: xr.Dataset,
    people: Sequence[str],
    *,
    level: float = 0.95,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    r"""Compare the error consistency of each model with people to that among people.

    .. math:: \bar\kappa_m = \operatorname{mean}_{p, c} \kappa_{mp}(c), \qquad
              \bar\kappa_0 = \operatorname{mean}_{p < q, c} \kappa_{pq}(c)

    over people p, q and conditions c, with intervals by drawing stimuli with replacement within
    each condition, the same for all observers, so that the difference is paired. They are of other
    stimuli, not of other people.

    Parameters
    ----------
    trials : xarray.Dataset
        As of `pairwise_consistency`, of people and models.
    people : sequence of str
        Which subjects are people; all others are models.
    level : float
        Coverage of the intervals.
    n_bootstrap, seed : int
        Draws, and their seed.

    Returns
    -------
    xarray.Dataset
        ``kappa, low, high`` (observer), the first observer being ``people`` (among themselves);
        ``difference, difference_low, difference_high`` from people, 0 for themselves.

    Raises
    ------
    SchemaError
        As `pairwise_consistency`, if a person has no trials, or there are fewer than 2 people.
    """
    table = _by_stimulus(trials)
    subjects = sorted(table["subject"].unique().tolist())
    missing = [p for p in people if p not in subjects]
    if missing or len(set(people)) < 2:
        said = f"{missing[0]!r} has no trials" if missing else f"got {list(people)}"
        raise SchemaError(f"Two people or more are compared with models; {said}.")
    human = sorted(set(people))
    models = [s for s in subjects if s not in human]
    pairs = {"people": list(combinations(human, 2))}
    pairs |= {m: [(p, m) for p in human] for m in models}
    rng = np.random.default_rng(seed)
    kappas: dict[str, list[NDArray[np.float64]]] = {name: [] for name in pairs}
    for _, part in table.groupby("condition"):
        wide = part.pivot(index="stimulus_id", columns="subject", values="correct")
        known = {s: np.asarray(wide[s].notna(), dtype=np.float64) for s in wide.columns}
        right = {s: np.asarray(wide[s].eq(True), dtype=np.float64) for s in wide.columns}
        n = len(wide)
        drawn = rng.multinomial(n, np.full(n, 1 / n), n_bootstrap)
        # The first row is the sample itself.
        weight = np.concatenate([np.ones((1, n)), drawn])
        for name, members in pairs.items():
            kappas[name] += [
                _weighted_kappa(right[a], right[b], known[a] * known[b], weight)
                for a, b in members
                if a in known and b in known
            ]
    tail = (1 - level) / 2
    with warnings.catch_warnings():
        # A draw in which no pair can be told gives NaN, which the quantiles leave out.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        mean = {name: np.nanmean(np.stack(found), 0) for name, found in kappas.items() if found}

    def ends(values: NDArray[np.float64]) -> list[float]:
        low, high = np.nanquantile(values[1:], [tail, 1 - tail])
        return [float(values[0]), float(low), float(high)]

    rows = {name: ends(v) + ends(v - mean["people"]) for name, v in mean.items()}
    names = ("kappa", "low", "high", "difference", "difference_low", "difference_high")
    return xr.Dataset(
        {c: ("observer", np.array([r[i] for r in rows.values()])) for i, c in enumerate(names)},
        coords={"observer": list(rows)},
        attrs={"level": level, "n_bootstrap": n_bootstrap, "seed": seed},
    )


def _weighted_kappa(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    both: NDArray[np.float64],
    weight: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return `error_consistency` over the stimuli of each row of weights."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weight @ both
        p, q = weight @ (both * a) / total, weight @ (both * b) / total
        agreed = weight @ (both * (a == b)) / total
        expected = p * q + (1 - p) * (1 - q)
        return np.where(expected < 1, (agreed - expected) / (1 - expected), np.nan)


_CUES = re.compile(r"(?P<shape>[a-z]+)\d*-(?P<texture>[a-z]+)\d*")


def shape_bias(trials: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    r"""Return how often shape wins over texture where the two disagree.

    .. math:: \frac{n_{shape}}{n_{shape} + n_{texture}}

    over trials whose response is the class of the shape or that of the texture.

    Parameters
    ----------
    trials : xarray.Dataset
        The ``trials`` schema with ``response`` and ``stimulus_id`` of the form ``shapeN-textureM``
        (such as ``cat3-clock1``), or with ``shape`` and ``texture``.
    level : float
        Coverage of Wilson's intervals, which take trials as independent.

    Returns
    -------
    xarray.Dataset
        ``bias, low, high, n_shape, n_texture`` (subject); attrs ``bias``, ``low``, ``high`` pooled
        over subjects, and ``n_conflict``, the trials whose cues disagree.

    Raises
    ------
    SchemaError
        If a stimulus has no two cues, or no response follows either.

    References
    ----------
    Geirhos et al. 2019, ICLR (arXiv:1811.12231).
    """
    _require(trials, "response", "subject")
    if "shape" in trials and "texture" in trials:
        shape, texture = (trials[c].values.astype(str) for c in ("shape", "texture"))
    else:
        _require(trials, "stimulus_id")
        cues = [_CUES.fullmatch(s) for s in trials["stimulus_id"].values.astype(str)]
        if not all(cues):
            odd = str(trials["stimulus_id"].values[[c is None for c in cues]][0])
            raise SchemaError(f"{odd!r} names no cues; expected shapeN-textureM.")
        shape = np.array([c["shape"] for c in cues if c])
        texture = np.array([c["texture"] for c in cues if c])
    conflict = shape != texture
    response = trials["response"].values.astype(str)
    by_shape, by_texture = conflict & (response == shape), conflict & (response == texture)
    subject = np.broadcast_to(trials["subject"].values.astype(str), response.shape)
    subjects = np.unique(subject)
    n_shape = np.array([by_shape[subject == s].sum() for s in subjects])
    n_texture = np.array([by_texture[subject == s].sum() for s in subjects])
    total = n_shape + n_texture
    if not total.all():
        raise SchemaError(f"No response of {subjects[total == 0][0]!r} follows shape or texture.")
    low, high = _wilson(n_shape, total, level)
    pooled = _wilson(n_shape.sum(keepdims=True), total.sum(keepdims=True), level)
    return xr.Dataset(
        {
            "bias": ("subject", n_shape / total),
            "low": ("subject", low),
            "high": ("subject", high),
            "n_shape": ("subject", n_shape),
            "n_texture": ("subject", n_texture),
        },
        coords={"subject": subjects},
        attrs={
            "bias": float(n_shape.sum() / total.sum()),
            "low": float(pooled[0][0]),
            "high": float(pooled[1][0]),
            "n_conflict": int(conflict.sum()),
            "level": level,
        },
    )
