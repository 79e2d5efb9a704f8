"""Train and test rows that share no stimulus, run, group or embedding cluster, and the check of it.

Every splitter returns a list of ``(train, test)`` pairs of sorted row indices. Splits are made of
whole groups: all presentations of one stimulus (run, group, cluster) stand on the same side.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import ConfigError, LeakError, SchemaError, UnknownNameError, near

__all__ = [
    "Split",
    "by_cluster",
    "by_flag",
    "by_group",
    "by_run",
    "by_shared",
    "by_stimulus",
    "check_leak",
    "halves",
    "nested",
]

logger = logging.getLogger(__name__)

Split = tuple[NDArray[np.intp], NDArray[np.intp]]


def by_stimulus(stimulus_id: ArrayLike, n_splits: int = 5, seed: int = 0) -> list[Split]:
    """K folds over stimuli: every presentation of a stimulus falls into the same fold.

    Parameters
    ----------
    stimulus_id : array-like, shape (n_presentations,)
        Name of the stimulus of each row. Content hashes are better where two names may stand for
        the same image.
    n_splits : int
        Number of folds, at least 2 and at most the number of different stimuli.
    seed : int
        Seed of the shuffle.

    Returns
    -------
    list of (train, test)
        Sorted row indices; each row is in the test set of exactly one fold.

    Raises
    ------
    ConfigError
        If there are fewer stimuli than folds.
    """
    return _grouped(_labels(stimulus_id, "stimulus_id"), n_splits, seed, "stimuli")


def by_group(groups: ArrayLike, n_splits: int = 5, seed: int = 0) -> list[Split]:
    """K folds over any grouping of the rows (subject, session, category, film).

    Parameters
    ----------
    groups : array-like, shape (n_rows,)
        Group of each row.
    n_splits : int
        Number of folds, at least 2 and at most the number of different groups. Folds are made
        about equally large by handing the largest groups out first.
    seed : int
        Seed of the shuffle that breaks ties.

    Returns
    -------
    list of (train, test)
        Sorted row indices; each row is in the test set of exactly one fold.

    Raises
    ------
    ConfigError
        If there are fewer groups than folds.
    """
    return _grouped(_labels(groups, "groups"), n_splits, seed, "groups")


def by_run(run: ArrayLike, n_splits: int | None = None, seed: int = 0) -> list[Split]:
    """Leave one run out, or K folds of whole runs.

    A stimulus shown in several runs stands on both sides of such a split. That is what pattern
    classification over runs does on purpose; an encoding model should use `by_stimulus`.

    Parameters
    ----------
    run : array-like, shape (n_presentations,)
        Run of each row. Where run numbers start again in each session, pass labels that hold
        both (for example ``"ses-1_run-2"``).
    n_splits : int, optional
        Number of folds. By default one per run, in the order of the run labels.
    seed : int
        Seed of the shuffle; not used where one run is left out at a time.

    Returns
    -------
    list of (train, test)
        Sorted row indices; each row is in the test set of exactly one fold.

    Raises
    ------
    ConfigError
        If there are fewer than two runs, or fewer runs than folds.
    """
    labels = _labels(run, "run")
    unique, inverse = np.unique(labels, return_inverse=True)
    if n_splits is not None and n_splits != len(unique):
        return _grouped(labels, n_splits, seed, "runs")
    if len(unique) < 2:
        raise ConfigError(
            f"Leaving one run out needs at least 2 runs; all {len(labels)} rows are of run "
            f"{unique[0]!r}.",
            "Split by stimulus instead.",
        )
    return _from_folds(inverse, len(unique))


def by_shared(stimulus_id: ArrayLike, shared_ids: Iterable[Any]) -> list[Split]:
    """One split: the shared stimuli are the test set, all others the training set.

    Parameters
    ----------
    stimulus_id : array-like, shape (n_presentations,)
        Name of the stimulus of each row.
    shared_ids : iterable
        Names of the test stimuli, for example the 1,000 images that every subject of the Natural
        Scenes Dataset saw.

    Returns
    -------
    list of (train, test)
        A list of one pair of sorted row indices.

    Raises
    ------
    UnknownNameError
        If a shared stimulus was never presented; the message gives the nearest names.
    ConfigError
        If no shared stimulus is named, or none is left to train on.
    """
    labels = _labels(stimulus_id, "stimulus_id")
    wanted = np.unique(np.asarray([str(s) for s in shared_ids]))
    if len(wanted) == 0:
        raise ConfigError("No shared stimulus was named.", "Give the stimulus_id of at least one.")
    known = np.unique(labels)
    unknown = wanted[~np.isin(wanted, known)]
    if len(unknown):
        raise UnknownNameError(
            f"{len(unknown)} of {len(wanted)} shared stimuli are not among the {len(known)} "
            f"presented ones: {_some(unknown)}.{near(str(unknown[0]), known.tolist())}",
            "Leave out those that were not shown, or correct their names.",
        )
    in_test = np.isin(labels, wanted)
    if in_test.all():
        raise ConfigError(
            f"All {len(known)} presented stimuli are named as shared: none is left to train on.",
            "Name fewer shared stimuli, or split by stimulus.",
        )
    return [(np.flatnonzero(~in_test), np.flatnonzero(in_test))]


def by_flag(
    stimulus_id: ArrayLike, flagged: Mapping[str, bool], *, name: str = "the flag"
) -> list[tuple[list[str], list[str]]]:
    """One split by a column of the stimuli's index: what it flags is tested, the rest trained on.

    Unlike `by_shared`, the flag may name stimuli that this subject never saw.

    Parameters
    ----------
    stimulus_id : array-like
        What was presented; names may repeat.
    flagged : mapping of str to bool
        The flag of every stimulus.
    name : str
        Of the flag, for messages.

    Returns
    -------
    list of (train, test)
        One pair of lists of stimulus ids, each in order of first appearance.

    Raises
    ------
    UnknownNameError
        If a stimulus has no flag.
    ConfigError
        If all or none of the presented stimuli are flagged.
    """
    presented = list(dict.fromkeys(_labels(stimulus_id, "stimulus_id").astype(str).tolist()))
    unknown = [s for s in presented if s not in flagged]
    if unknown:
        raise UnknownNameError(
            f"{len(unknown)} of {len(presented)} presented stimuli are not in the index of "
            f"stimuli; the first is {unknown[0]!r}.{near(unknown[0], flagged)}"
        )
    test = [s for s in presented if flagged[s]]
    if not 0 < len(test) < len(presented):
        raise ConfigError(
            f"{name} is true for {len(test)} of {len(presented)} presented stimuli: no "
            f"{'test' if not test else 'training'} set.",
            "Name another column, or split by folds.",
        )
    return [([s for s in presented if not flagged[s]], test)]


def halves(keys: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    r"""Return the half, 1 or 2, that the stimulus of each row belongs to, by its content.

    .. math:: h = 1 + (\mathrm{SHA256}(\mathit{seed}, \mathit{key}) \bmod 2)

    A stimulus is in the same half for every subject and every selection of stimuli, so that what
    is fitted to one half may be judged by what is fitted to the other. Halves of n stimuli are
    equal up to about the square root of n.

    Parameters
    ----------
    keys : array-like, shape (n_rows,)
        Content hash of the stimulus of each row.
    seed : int
        Another seed divides the stimuli in another way.

    Returns
    -------
    ndarray of int, shape (n_rows,)
    """
    labels = _labels(keys, "keys").astype(str)
    half = {
        key: 1 + hashlib.sha256(f"{seed}:{key}".encode()).digest()[-1] % 2 for key in set(labels)
    }
    return np.array([half[key] for key in labels.tolist()], dtype=np.int64)


def by_cluster(
    embedding: ArrayLike,
    n_clusters: int = 10,
    n_splits: int = 5,
    seed: int = 0,
    *,
    stimulus_id: ArrayLike | None = None,
) -> list[Split]:
    """K folds of whole embedding clusters: the test images are of kinds never trained on.

    Rows are clustered by k-means; clusters are handed to folds so that these are about equally
    large.

    Parameters
    ----------
    embedding : array-like, shape (n_rows, n_dimensions)
        Embedding of the stimulus of each row.
    n_clusters : int
        Number of clusters, at least `n_splits` and at most the number of different stimuli.
    n_splits : int
        Number of folds.
    seed : int
        Seed of k-means and of the shuffle.
    stimulus_id : array-like, shape (n_rows,), optional
        Name of the stimulus of each row. Rows of one stimulus are averaged before clustering, so
        they stay together.

    Returns
    -------
    list of (train, test)
        Sorted row indices; each row is in the test set of exactly one fold.

    Raises
    ------
    ConfigError
        If there are more folds than clusters, or more clusters than stimuli.
    SchemaError
        If the embedding is not a matrix or has values that are not finite.
    """
    from sklearn.cluster import KMeans

    x = np.asarray(embedding, dtype=np.float64)
    if x.ndim != 2:
        raise SchemaError(f"embedding must be (row, dimension); it has shape {x.shape}.")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise SchemaError(
            f"embedding has NaN or infinite values in {len(bad)} of {len(x)} rows "
            f"(first row {bad[0]}).",
            "Leave these stimuli out or compute their embedding again.",
        )
    if stimulus_id is None:
        row = np.arange(len(x))
    else:
        labels = _labels(stimulus_id, "stimulus_id")
        if len(labels) != len(x):
            raise SchemaError(
                f"stimulus_id has {len(labels)} entries, embedding has {len(x)} rows."
            )
        _, row = np.unique(labels, return_inverse=True)
        summed = np.zeros((row.max() + 1, x.shape[1]))
        np.add.at(summed, row, x)
        x = summed / np.bincount(row)[:, None]
    distinct = len(np.unique(x, axis=0))
    if not n_splits <= n_clusters <= distinct:
        raise ConfigError(
            f"Cluster folds need n_splits <= n_clusters <= number of different stimuli; got "
            f"{n_splits}, {n_clusters} and {distinct}.",
        )
    cluster = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(x)
    return _grouped(cluster[row], n_splits, seed, "clusters")


def nested(
    split: Split, groups: ArrayLike, n_splits: int = 5, seed: int = 0, *, relative: bool = False
) -> list[Split]:
    """K folds inside the training rows of one outer split, for choices the test rows must not see.

    Parameters
    ----------
    split : (train, test)
        The outer split.
    groups : array-like, shape (n_rows,)
        Group of every row of the whole data (stimulus, run, cluster): groups stay whole.
    n_splits : int
        Number of inner folds.
    seed : int
        Seed of the shuffle.
    relative : bool
        Return positions within the outer training rows instead of rows of the whole data.

    Returns
    -------
    list of (train, test)
        Inner folds; none holds a row of the outer test set.
    """
    outer = np.asarray(split[0], dtype=np.intp)
    labels = _labels(groups, "groups")
    inner = _grouped(labels[outer], n_splits, seed, "groups in the outer training set")
    if relative:
        return inner
    return [(outer[train], outer[test]) for train, test in inner]


def check_leak(
    splits: Sequence[tuple[ArrayLike, ArrayLike]], keys: ArrayLike, *, allow: bool = False
) -> int:
    """Refuse splits in which one stimulus stands on both sides.

    Parameters
    ----------
    splits : sequence of (train, test)
        Row indices.
    keys : array-like, shape (n_rows,)
        What must not be shared: the sha256 of the stimulus' content, or its `stimulus_id` where
        there is no content. Hashes also find one image under two names.
    allow : bool
        Log a warning instead of raising, for designs that repeat stimuli over runs on purpose. A
        row that is itself on both sides is refused all the same.

    Returns
    -------
    int
        Number of leaking stimuli over all folds; 0 unless `allow`.

    Raises
    ------
    LeakError
        If a stimulus, or a row, stands on both sides; the message names examples and counts.
    ConfigError
        If there is no split, a side is empty, or an index is outside the rows.
    """
    labels = _labels(keys, "keys")
    if len(splits) == 0:
        raise ConfigError("There is no split to check.", "Make at least one (train, test) pair.")
    leaking: set[str] = set()
    found: list[str] = []
    for fold, pair in enumerate(splits):
        sides = {}
        for side, value in zip(("train", "test"), pair, strict=True):
            rows = np.asarray(value)
            if rows.dtype == bool:
                if rows.shape != labels.shape:
                    raise ConfigError(
                        f"Fold {fold}: the {side} mask has shape {rows.shape}, expected "
                        f"{labels.shape}."
                    )
                rows = np.flatnonzero(rows)
            if rows.ndim != 1 or len(rows) == 0:
                raise ConfigError(f"Fold {fold}: the {side} set must be a non-empty list of rows.")
            if not np.issubdtype(rows.dtype, np.integer):
                raise ConfigError(f"Fold {fold}: {side} indices are {rows.dtype}, expected int.")
            if rows.min() < 0 or rows.max() >= len(labels):
                raise ConfigError(
                    f"Fold {fold}: {side} indices run from {rows.min()} to {rows.max()}, but "
                    f"there are {len(labels)} rows."
                )
            sides[side] = rows
        same = np.intersect1d(sides["train"], sides["test"])
        if len(same):
            raise LeakError(
                f"Fold {fold}: {len(same)} rows are both trained and tested on (first: {same[0]}, "
                f"{labels[same[0]]!r}).",
                "Make train and test rows disjoint.",
            )
        shared = np.intersect1d(labels[sides["train"]], labels[sides["test"]])
        if len(shared):
            n_test = len(np.unique(labels[sides["test"]]))
            found.append(f"fold {fold}: {len(shared)} of {n_test} test stimuli ({_some(shared)})")
            leaking.update(shared.tolist())
    if found:
        message = (
            f"{len(leaking)} stimuli stand on both the train and the test side: "
            + "; ".join(found[:3])
            + (f"; and {len(found) - 3} more folds" if len(found) > 3 else "")
            + "."
        )
        if not allow:
            raise LeakError(
                message, "Split by stimulus, or allow the leak if the design repeats stimuli."
            )
        logger.warning("Leak allowed: %s", message)
    return len(leaking)


def _labels(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0:
        raise SchemaError(f"{name} must be a non-empty list with one entry per row; it has shape "
                          f"{array.shape}.")  # fmt: skip
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise SchemaError(f"{name} has {int((~np.isfinite(array)).sum())} missing values.")
    if array.dtype.kind in "iuf":
        return array
    missing = [i for i, v in enumerate(array.tolist()) if v is None or v != v or v == ""]
    if missing:
        raise SchemaError(f"{name} has {len(missing)} empty entries (first row {missing[0]}).")
    return array.astype(str)


def _grouped(labels: NDArray[Any], n_splits: int, seed: int, what: str) -> list[Split]:
    unique, inverse, size = np.unique(labels, return_inverse=True, return_counts=True)
    if n_splits < 2:
        raise ConfigError(f"n_splits must be at least 2; got {n_splits}.")
    if len(unique) < n_splits:
        raise ConfigError(
            f"{n_splits} folds need at least {n_splits} different {what}; there are "
            f"{len(unique)} in {len(labels)} rows.",
            f"Use n_splits <= {len(unique)}." if len(unique) > 1 else "Add data.",
        )
    order = np.random.default_rng(seed).permutation(len(unique))
    order = order[np.argsort(-size[order], kind="stable")]
    load = np.zeros(n_splits, dtype=np.int64)
    fold = np.empty(len(unique), dtype=np.intp)
    for group in order:
        fold[group] = np.argmin(load)
        load[fold[group]] += size[group]
    return _from_folds(fold[inverse], n_splits)


def _from_folds(fold: NDArray[np.intp], n_splits: int) -> list[Split]:
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(n_splits)]


def _some(values: NDArray[Any], n: int = 3) -> str:
    text = ", ".join(repr(str(v)) for v in values[:n])
    return text + (f" and {len(values) - n} more" if len(values) > n else "")
