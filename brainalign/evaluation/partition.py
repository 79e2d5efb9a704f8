"""Which feature space predicts what: explained variance divided among spaces. Nothing refits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import ConfigError, SchemaError

__all__ = ["product_measure", "subsets", "unique_variance", "variance_partition"]


def product_measure(
    measured: ArrayLike,
    contributions: ArrayLike,
    *,
    measure: str = "r2",
    baseline: ArrayLike | None = None,
) -> NDArray[np.float64]:
    r"""Divide the score of a sum of predictions among its terms.

    .. math:: R^2_s = \frac{\sum_i \hat y_{si} (2 y_i - \hat y_i)}{\sum_i y_i^2}, \qquad
              r_s = \frac{\sum_i \hat y_{si} y_i}{\|\hat y\| \|y\|}, \qquad
              \hat y = \sum_s \hat y_s

    The parts sum to the score of :math:`\hat y` exactly. A part is negative where a space's
    prediction makes that of all spaces worse.

    Parameters
    ----------
    measured : array-like, shape (n_samples, n_targets) or (n_samples,)
        Measured values.
    contributions : array-like, shape (n_spaces, n_samples, n_targets) or (n_spaces, n_samples)
        What each space adds to the prediction, as deviations from `baseline`; for example
        ``BandedRidge.predict(X, split=True)`` with the training mean.
    measure : {"r2", "r"}
        R^2 relative to `baseline`, or Pearson's r, for which everything is centred.
    baseline : array-like, optional
        Subtracted from `measured`: the training mean. By default the mean of `measured`.

    Returns
    -------
    ndarray, shape (n_spaces, n_targets)
        NaN where a measured (for r: or predicted) target is constant or not finite.

    Raises
    ------
    SchemaError
        If the shapes do not fit.

    References
    ----------
    Hoffman (1960), Psychological Bulletin 57, 116-131; Pratt (1987), Proc. 2nd Tampere Conf. in
    Statistics, 245-260.
    """
    y = np.asarray(measured, dtype=np.float64)
    parts = np.asarray(contributions, dtype=np.float64)
    if y.ndim not in (1, 2) or parts.shape[1:] != y.shape or len(y) < 2:
        raise SchemaError(
            f"measured has shape {y.shape} and contributions {parts.shape}; expected "
            "(n_samples, n_targets) of at least two samples and (n_spaces, n_samples, n_targets)."
        )
    if measure not in ("r2", "r"):
        raise ConfigError(f"measure is {measure!r}; expected 'r2' or 'r'.")
    y = y.reshape(len(y), -1)
    parts = parts.reshape(len(parts), *y.shape)
    constant = (y == y[:1]).all(axis=0)
    mean = y.mean(axis=0) if baseline is None or measure == "r" else np.asarray(baseline)
    y = y - mean
    if measure == "r":
        predicted = parts.sum(axis=0)
        constant |= (predicted == predicted[:1]).all(axis=0)
        parts = parts - parts.mean(axis=1, keepdims=True)
    whole = parts.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if measure == "r2":
            shares = np.einsum("sit,it->st", parts, 2 * y - whole) / (y * y).sum(axis=0)
        else:
            norm = np.sqrt((y * y).sum(axis=0) * (whole * whole).sum(axis=0))
            shares = np.einsum("sit,it->st", parts, y) / norm
    bad = constant if baseline is None or measure == "r" else (y == 0).all(axis=0)
    return np.where(bad | ~np.isfinite(shares).all(axis=0), np.nan, shares)


def subsets(spaces: Iterable[str]) -> list[tuple[str, ...]]:
    """Return all non-empty subsets of the spaces, small ones first, in the spaces' order."""
    names = list(spaces)
    return [c for size in range(1, len(names) + 1) for c in combinations(names, size)]


def variance_partition(
    r2_of_subsets: Mapping[tuple[str, ...], ArrayLike],
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    r"""Divide explained variance into what each set of spaces, and no other, shares.

    .. math:: V_A = \sum_{B \subseteq A} (-1)^{|B| + 1} R^2(B \cup A^c), \qquad
              \sum_A V_A = R^2(\text{all})

    with :math:`A^c` the spaces that are not in A, and :math:`R^2(\emptyset) = 0`. For one space,
    :math:`V` is its unique variance. Parts can be negative: by estimation noise, or where spaces
    predict more together than the sum of what each does (suppression).

    Parameters
    ----------
    r2_of_subsets : dict of tuple of str to array-like
        R^2 of models fitted to each non-empty subset of the spaces (`subsets`), in any order
        within a tuple; arrays of one shape, for example (n_targets,).

    Returns
    -------
    dict of tuple of str to ndarray
        Each part under the spaces that share it, in the order of `subsets`.

    Raises
    ------
    ConfigError
        If a subset is missing.

    References
    ----------
    Borcard, Legendre & Drapeau (1992), Ecology 73, 1045-1055; Lescroart, Stansbury & Gallant
    (2015), Frontiers in Computational Neuroscience 9, 135.
    """
    known = {frozenset(k): np.asarray(v, dtype=np.float64) for k, v in r2_of_subsets.items()}
    names = list(dict.fromkeys(name for key in r2_of_subsets for name in key))
    missing = [s for s in subsets(names) if frozenset(s) not in known]
    if missing or not names:
        raise ConfigError(
            f"R^2 is needed for all {2 ** len(names) - 1} subsets of {names}; "
            f"{len(missing)} are missing (first: {missing[:1]})."
        )
    parts = {}
    for own in subsets(names):
        rest = frozenset(names) - set(own)
        start = known[rest] if rest else np.zeros_like(known[frozenset(names)])
        total = -start
        for b in subsets(own):
            total = total + (-1) ** (len(b) + 1) * known[rest | set(b)]
        parts[own] = total
    return parts


def unique_variance(full: ArrayLike, without: ArrayLike) -> NDArray[np.float64]:
    r"""Variance that only one space explains: :math:`R^2(\text{all}) - R^2(\text{all but } s)`.

    Parameters
    ----------
    full : array-like, shape (n_targets,)
        R^2 of the model of all spaces.
    without : array-like, shape (n_spaces, n_targets) or (n_targets,)
        R^2 of the model refitted without each space.

    Returns
    -------
    ndarray, of the shape of `without`
    """
    full, without = np.asarray(full, dtype=np.float64), np.asarray(without, dtype=np.float64)
    if without.shape[-full.ndim :] != full.shape:
        raise SchemaError(
            f"full has shape {full.shape} and without {without.shape}; expected (n_targets,) and "
            "(n_spaces, n_targets)."
        )
    return np.asarray(full - without)
