"""Centred kernel alignment between two sets of features or responses."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainalign.errors import SchemaError

__all__ = ["linear_cka"]


def linear_cka(X: ArrayLike, Y: ArrayLike, *, debiased: bool = True) -> float:
    r"""Linear centred kernel alignment.

    .. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}
              {\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}, \quad K = XX', L = YY'

    The debiased form uses the unbiased estimator of HSIC: it is near 0 for unrelated data however
    many features there are, where the biased form grows towards 1.

    Parameters
    ----------
    X : array-like, shape (n_stimuli, n_features)
        One set, for example a layer.
    Y : array-like, shape (n_stimuli, n_neuroids)
        The other, for the same stimuli in the same order.
    debiased : bool
        Use the unbiased estimator of HSIC; needs at least 4 stimuli.

    Returns
    -------
    float
        At most 1, may be slightly negative if debiased; NaN if a set is constant.

    Raises
    ------
    SchemaError
        If the rows differ in number, values are not finite, or there are too few rows.

    References
    ----------
    Kornblith et al. (2019), ICML, eq. 3-5; Song et al. (2012), JMLR 13, 1393-1434, eq. 5.
    """
    a, b = (np.asarray(m, dtype=np.float64) for m in (X, Y))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise SchemaError(f"Expected two matrices with the same rows; got {a.shape}, {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise SchemaError(
            f"CKA needs finite values; X has {int((~np.isfinite(a)).sum())} others, "
            f"Y {int((~np.isfinite(b)).sum())}."
        )
    if len(a) < (4 if debiased else 2):
        raise SchemaError(f"CKA needs at least {4 if debiased else 2} stimuli; got {len(a)}.")
    # HSIC does not depend on the means; without them less is lost to rounding.
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    K, L = a @ a.T, b @ b.T
    hsic = _hsic_unbiased if debiased else _hsic_biased
    denominator = hsic(K, K) * hsic(L, L)
    return float(hsic(K, L) / np.sqrt(denominator)) if denominator > 0 else float("nan")


def _hsic_biased(K: NDArray[np.float64], L: NDArray[np.float64]) -> float:
    return float((K * L).sum())


def _hsic_unbiased(K: NDArray[np.float64], L: NDArray[np.float64]) -> float:
    n = len(K)
    K, L = K.copy(), L.copy()
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    value = (
        (K * L).sum()
        + K.sum() * L.sum() / ((n - 1) * (n - 2))
        - 2 * (K.sum(axis=0) @ L.sum(axis=0)) / (n - 2)
    )
    return float(value / (n * (n - 3)))
