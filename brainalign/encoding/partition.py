"""Variance of brain responses divided among feature spaces, by models tested on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.evaluation.partition import subsets, unique_variance, variance_partition
from brainalign.evaluation.significance import bootstrap_counts, percentiles
from brainalign.linear.banded import BandedRidge, Spaces, feature_spaces

__all__ = ["FULL", "METHODS", "models_of", "partition_variance", "shares_of"]

METHODS = ("product", "leave_one_out", "subsets")
#: Joins the names of spaces that share a part.
JOINED = " & "
#: Name of the model of all spaces.
FULL = "all"
#: Neuroids fitted and resampled at a time.
NEUROIDS_AT_ONCE = 5000


def models_of(method: str, spaces: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the sets of spaces whose models a method needs, that of all spaces last.

    Raises
    ------
    ConfigError
        If there is no such method, or there are fewer than two spaces.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    every = tuple(spaces)
    if len(every) < 2:
        raise ConfigError(f"A partition needs at least two feature spaces; got {list(every)}.")
    if method == "product":
        return [every]
    if method == "leave_one_out":
        return [tuple(s for s in every if s != out) for out in every] + [every]
    return subsets(every)


def shares_of(
    method: str, explained: Mapping[tuple[str, ...], NDArray[np.float64]]
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """Divide explained variance by one of `METHODS`.

    Parameters
    ----------
    method : str
        How.
    explained : mapping of tuple of str to ndarray
        For "product" the part of each space, by `product_measure`; else R^2 of the models of
        `models_of`. Arrays of any one shape; sums over neuroids are divided likewise.

    Returns
    -------
    dict of tuple of str to ndarray
        By the spaces that share a part.
    """
    if method == "product":
        return dict(explained)
    if method == "subsets":
        return variance_partition(explained)
    *without, every = explained
    unique = unique_variance(explained[every], np.stack([explained[m] for m in without]))
    return {(s,): u for s, u in zip(every, unique, strict=True)}


def partition_variance(
    X: ArrayLike,
    Y: ArrayLike,
    spaces: Spaces,
    splits: Iterable[tuple[Any, Any]],
    *,
    method: str = "product",
    groups: ArrayLike | None = None,
    stimulus_id: ArrayLike | None = None,
    neuroid_id: Sequence[Any] | None = None,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    **ridge: Any,
) -> xr.Dataset:
    r"""Divide each neuroid's held-out R^2 among feature spaces.

    .. math:: R^2 = 1 - \frac{\sum_i (y_i - \hat y_i)^2}{\sum_i (y_i - m_i)^2}

    over the test rows of all splits, with m the mean of the training rows of the row's split (0
    without an intercept).
    Banded ridge chooses its penalties inside the training rows; a model of fewer spaces is fitted
    and chosen anew.

    Parameters
    ----------
    X : array-like, shape (n_samples, n_features)
        Features of all spaces, on a common scale (z-scored, say), as penalties depend on it.
    Y : array-like, shape (n_samples, n_neuroids)
        Responses.
    spaces : sequence or dict
        Feature spaces, as in `BandedRidge`.
    splits : iterable of (train, test)
        Row indices or masks; a row is tested at most once.
    method : {"product", "leave_one_out", "subsets"}
        - ``"product"``: `product_measure` of one model of all spaces; parts sum to its R^2.
        - ``"leave_one_out"``: R^2 of all spaces less that of all but one, its unique variance.
        - ``"subsets"``: `variance_partition` from models of every subset of the spaces; parts
          are unique and shared by each set of spaces, and sum to the R^2 of all.
    groups : array-like, shape (n_samples,), optional
        Groups of rows that the inner folds keep whole; needs a `cv` that takes them.
    stimulus_id : array-like, shape (n_samples,), optional
        Rows of a stimulus are resampled together. By default every row is its own.
    neuroid_id : sequence, optional
        Names of the neuroids.
    n_bootstrap : int
        Bootstrap samples of the test stimuli; fits are not repeated. 0 leaves the intervals out.
    level : float
        Of the intervals.
    seed : int
        Seed of the bootstrap and of the gammas.
    **ridge
        Options of `BandedRidge`.

    Returns
    -------
    Dataset
        ``share`` (part, neuroid) and ``r2`` (model, neuroid), each with ``_low`` and ``_high``.
        Parts are named by their spaces; models are the fitted sets of spaces, the last being
        `FULL`. Neuroids that do not vary in the test rows are NaN.

    Raises
    ------
    ConfigError
        If the method is unknown, or there are fewer than two spaces.
    LeakError
        If a row is tested twice, or trained and tested in one split.

    References
    ----------
    Lescroart, Stansbury & Gallant (2015), Frontiers in Computational Neuroscience 9, 135
    (subsets); Dupre la Tour et al. (2022), NeuroImage 264, 119728 (product measure).
    """
    data, responses = np.asarray(X), np.asarray(Y)
    if responses.ndim != 2 or data.ndim != 2 or len(data) != len(responses):
        raise SchemaError(
            f"X has shape {data.shape} and Y {responses.shape}; expected the same number of rows "
            "of features and neuroids."
        )
    names = [str(c) for c in X.columns] if hasattr(X, "columns") else None
    columns = feature_spaces(spaces, data.shape[1], names)
    models = models_of(method, list(columns))
    pairs = _checked(splits, len(data))
    rows = np.concatenate([test for _, test in pairs])
    ids = np.arange(len(data)) if stimulus_id is None else np.asarray(stimulus_id)
    counts = bootstrap_counts(len(rows), n_bootstrap, groups=ids[rows], seed=seed)
    weights = np.vstack([np.ones((1, len(rows))), counts])  # the data first

    grouped = None if groups is None else np.asarray(groups)
    options = {"seed": seed, **ridge}
    blocks = []
    starts = range(0, responses.shape[1], NEUROIDS_AT_ONCE)
    for start in tqdm(starts, desc="variance partition", disable=None, leave=False):
        block = responses[:, start : start + NEUROIDS_AT_ONCE]
        shares, r2 = _scores(data, block, columns, models, method, pairs, grouped, weights, options)
        constant = np.concatenate([block[test] for _, test in pairs])
        constant = (constant == constant[:1]).all(axis=0)
        blocks.append(_dataset(shares, r2, constant, level))
    out = xr.concat(blocks, "neuroid") if len(blocks) > 1 else blocks[0]
    if neuroid_id is not None:
        out = out.assign_coords(neuroid=list(neuroid_id))
    return out.assign_attrs(method=method, n_bootstrap=n_bootstrap, level=level, seed=seed)


def _checked(splits: Iterable[tuple[Any, Any]], n: int) -> list[tuple[NDArray, NDArray]]:
    pairs = []
    for split in splits:
        train, test = (np.asarray(s) for s in split)
        train, test = (np.flatnonzero(s) if s.dtype == bool else s for s in (train, test))
        if np.intersect1d(train, test).size:
            raise LeakError("A split trains and tests on the same rows.")
        pairs.append((train, test))
    if not pairs:
        raise ConfigError("There are no splits.")
    count = np.bincount(np.concatenate([test for _, test in pairs]), minlength=n)
    if (count > 1).any():
        raise LeakError(f"{int((count > 1).sum())} rows are tested in more than one split.")
    return pairs


def _scores(
    X: NDArray[Any],
    Y: NDArray[Any],
    columns: dict[str, NDArray[np.intp]],
    models: Sequence[tuple[str, ...]],
    method: str,
    pairs: Sequence[tuple[NDArray, NDArray]],
    groups: NDArray[Any] | None,
    weights: NDArray[np.float64],
    options: dict[str, Any],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Return the parts and the R^2 of the models, each (weightings of the rows, neuroids)."""
    centred = options.get("fit_intercept", True)
    y = np.concatenate(
        [
            Y[test] - (Y[train].mean(axis=0, dtype=np.float64) if centred else 0.0)
            for train, test in pairs
        ]
    )
    r2: dict[tuple[str, ...], NDArray[np.float64]] = {}
    shares: dict[tuple[str, ...], NDArray[np.float64]] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights @ (y * y)
        for chosen in models:
            spaces = {s: columns[s] for s in chosen}
            parts = _contributions(X, Y, spaces, pairs, groups, options)
            whole = parts.sum(axis=0)
            r2[chosen] = 1 - weights @ (y - whole) ** 2 / total
            if method == "product":
                # As in product_measure, for all weightings of the rows at once.
                shares = {
                    (s,): weights @ (own * (2 * y - whole)) / total
                    for s, own in zip(spaces, parts, strict=True)
                }
    every = models[-1]
    if method != "product":
        shares = shares_of(method, r2)
    return (
        {JOINED.join(part): v for part, v in shares.items()},
        {FULL if m == every else JOINED.join(m): v for m, v in r2.items()},
    )


def _contributions(
    X: NDArray[Any],
    Y: NDArray[Any],
    columns: dict[str, NDArray[np.intp]],
    pairs: Sequence[tuple[NDArray, NDArray]],
    groups: NDArray[Any] | None,
    options: dict[str, Any],
) -> NDArray[np.float64]:
    """Contribution of each space (n_spaces, test rows, neuroids) to models of these spaces."""
    used = np.concatenate(list(columns.values()))
    labels = np.repeat(list(columns), [len(c) for c in columns.values()])
    made = []
    for train, test in pairs:
        model = BandedRidge(labels, **options)
        model.fit(X[train][:, used], Y[train], None if groups is None else groups[train])
        made.append(model.predict(X[test][:, used], split=True))
    return np.concatenate(made, axis=1).astype(np.float64)


def _dataset(
    shares: dict[str, NDArray[np.float64]],
    r2: dict[str, NDArray[np.float64]],
    constant: NDArray[np.bool_],
    level: float,
) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for name, dim, values in (("share", "part", shares), ("r2", "model", r2)):
        samples = np.where(constant, np.nan, np.stack(list(values.values()), axis=1))
        variables[name] = ((dim, "neuroid"), samples[0])
        if len(samples) > 1:
            low, high = percentiles(samples[1:], level)
            variables[f"{name}_low"] = ((dim, "neuroid"), low)
            variables[f"{name}_high"] = ((dim, "neuroid"), high)
    return xr.Dataset(variables, coords={"part": list(shares), "model": list(r2)})
