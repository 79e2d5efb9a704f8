"""Groups of neuroids by the direction of their weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import ConfigError, SchemaError

__all__ = ["spherical_kmeans"]

_MOST_ROUNDS = 300


def spherical_kmeans(
    weights: ArrayLike, n_clusters: int, *, seed: int = 0, n_init: int = 10
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    r"""Cluster vectors by direction.

    .. math:: \max_{c, l} \sum_v \hat w_v^\top c_{l(v)}, \qquad
              \hat w_v = w_v / \lVert w_v \rVert, \quad \lVert c_k \rVert = 1

    by alternating the nearest centre of every vector and the normalised sum of every cluster,
    from centres drawn far apart; the best of `n_init` starts is kept.

    Parameters
    ----------
    weights : array-like, shape (n_neuroids, n_features)
        One vector a neuroid; only its direction counts.
    n_clusters : int
        How many clusters.
    seed : int
        Draws the starts.
    n_init : int
        How many starts.

    Returns
    -------
    labels : ndarray of int, shape (n_neuroids,)
        The cluster of each vector; clusters are numbered from the largest to the smallest, those
        of one size by their first member.
    centres : ndarray, shape (n_clusters, n_features)
        Unit-norm mean directions.

    Raises
    ------
    ConfigError
        If there are fewer than 1 cluster or start, or more clusters than different directions.
    SchemaError
        If a weight is not finite, or a vector is zero.

    References
    ----------
    Dhillon & Modha (2001), Concept decompositions for large sparse text data using clustering,
    Machine Learning 42.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2:
        raise SchemaError(f"Weights are (neuroid, feature); these have {w.ndim} dimensions.")
    finite = np.asarray(np.isfinite(w).all(axis=1))
    norm = np.linalg.norm(np.where(np.isfinite(w), w, 0.0), axis=1)
    lost = np.flatnonzero(~finite | (norm == 0))
    if len(lost):
        first = int(lost[0])
        what = "no weight" if finite[first] else "weights that are not finite"
        raise SchemaError(
            f"Neuroid {first} has {what}; {len(lost)} of {len(w)} have no direction.",
            "Leave them out.",
        )
    if n_clusters < 1 or n_init < 1:
        raise ConfigError(f"n_clusters and n_init are at least 1; got {n_clusters} and {n_init}.")
    unit = w / norm[:, None]
    if n_clusters > 1 and len(np.unique(unit.round(12), axis=0)) < n_clusters:
        raise ConfigError(
            f"{n_clusters} clusters were asked of {len(w)} neuroids with fewer different weights.",
            "Ask for fewer clusters.",
        )
    best: tuple[float, NDArray[np.intp], NDArray[np.float64]] | None = None
    for start in range(n_init):
        found = _climb(unit, _spread(unit, n_clusters, np.random.default_rng([seed, start])))
        if best is None or found[0] > best[0] * (1 + 1e-12):
            best = found
    assert best is not None
    _, labels, centres = best
    _, earliest, members = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((earliest, -members))
    return np.argsort(order)[labels], centres[order]


def _spread(
    unit: NDArray[np.float64], n_clusters: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw centres among the vectors, each with probability 1 - cosine to the nearest so far."""
    centres = [unit[rng.integers(len(unit))]]
    distance = np.full(len(unit), np.inf)
    for _ in range(n_clusters - 1):
        distance = np.minimum(distance, np.clip(1 - unit @ centres[-1], 0, None))
        distance[distance < 1e-12] = 0
        centres.append(unit[rng.choice(len(unit), p=distance / distance.sum())])
    return np.stack(centres)


def _climb(
    unit: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[float, NDArray[np.intp], NDArray[np.float64]]:
    """Return the objective, labels and centres that a start leads to."""
    k = len(centres)
    labels = np.full(len(unit), -1)
    for _ in range(_MOST_ROUNDS):
        cosine = unit @ centres.T
        nearest = cosine.argmax(axis=1)
        own = cosine[np.arange(len(unit)), nearest]
        for empty in np.flatnonzero(np.bincount(nearest, minlength=k) == 0):
            # The vector that fits worst, of a cluster that has others, founds the cluster anew.
            counts = np.bincount(nearest, minlength=k)
            lone = counts[nearest] < 2
            far = int(np.where(lone, np.inf, own).argmin())
            nearest[far], own[far] = empty, np.inf
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, unit)
        size = np.linalg.norm(sums, axis=1, keepdims=True)
        # A cluster of opposite vectors has no mean direction; it keeps the one it had.
        centres = np.where(size > 1e-12, sums / np.where(size > 1e-12, size, 1), centres)
    return float((unit * centres[labels]).sum()), labels, centres
