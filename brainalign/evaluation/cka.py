"""Centred kernel alignment between sets of features and responses, one pair or many."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.device import resolve_device
from brainalign.errors import SchemaError
from brainalign.evaluation.rdm_bootstrap import sample_blocks, weighted_products

__all__ = ["gram", "linear_cka", "resampled_cka"]

#: Elements of the block of columns that is held in float64 while a Gram matrix is summed.
_BLOCK = 2**22


def gram(X: NDArray | xr.DataArray, *, centre: str = "columns") -> NDArray[np.float64]:
    """Inner products of the rows of a matrix, summed in float64 over blocks of columns.

    Parameters
    ----------
    X : array or DataArray, shape (n_stimuli, n_features)
        May be opened lazily: one block of columns is read at a time.
    centre : {"columns", "rows"}
        What is subtracted: the mean over stimuli, or each stimulus' mean over features.

    Returns
    -------
    ndarray, shape (n_stimuli, n_stimuli)
    """
    n, p = X.shape
    step = max(1, _BLOCK // n)
    blocks = [slice(k, min(k + step, p)) for k in range(0, p, step)]
    # What is constant becomes 0 without rounding once its first value is subtracted.
    first, means = np.asarray(X[:, :1], dtype=np.float64), np.zeros((n, 1))
    if centre == "rows":
        for columns in blocks:
            block = np.asarray(X[:, columns], dtype=np.float64) - first
            means += block.sum(axis=1, keepdims=True) / p
    made = np.zeros((n, n))
    for columns in blocks:
        block = np.asarray(X[:, columns], dtype=np.float64)
        block = block - first - means if centre == "rows" else _centred(block)
        made += block @ block.T
    return made


def linear_cka(X: ArrayLike, Y: ArrayLike, *, debiased: bool = True) -> float:
    r"""Linear centred kernel alignment.

    .. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}
              {\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}, \quad K = XX', L = YY'

    The debiased form uses the unbiased estimator of HSIC: it is near 0 for unrelated data however
    many features there are, where the biased form grows towards 1. Where features are fewer than
    stimuli, products of features take the place of K and L.

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
    n, p, q = len(a), a.shape[1], b.shape[1]
    if n < (4 if debiased else 2):
        raise SchemaError(f"CKA needs at least {4 if debiased else 2} stimuli; got {n}.")
    # HSIC does not depend on the means; without them less is lost to rounding.
    a, b = _centred(a), _centred(b)
    k, m = (a * a).sum(axis=1), (b * b).sum(axis=1)
    if p * p + p * q + q * q < n * (p + q):
        inner = [float((u.T @ v).ravel() @ (u.T @ v).ravel()) for u, v in ((a, b), (a, a), (b, b))]
    else:
        K, L = a @ a.T, b @ b.T
        inner = [float(u.ravel() @ v.ravel()) for u, v in ((K, L), (K, K), (L, L))]
    if debiased:
        # Rows of a centred Gram matrix sum to 0; without the diagonal, to minus the diagonal.
        inner = [
            value + u.sum() * v.sum() / ((n - 1) * (n - 2)) - u @ v * n / (n - 2)
            for value, (u, v) in zip(inner, ((k, m), (k, k), (m, m)), strict=True)
        ]
    denominator = inner[1] * inner[2]
    return float(inner[0] / np.sqrt(denominator)) if denominator > 0 else float("nan")


def resampled_cka(
    K: ArrayLike, L: ArrayLike, counts: ArrayLike, *, device: str | torch.device = "cpu"
) -> NDArray[np.float64]:
    r"""Debiased CKA of every K with every L in many samples of the stimuli.

    The unbiased HSIC is the mean over quadruples of different stimuli of
    :math:`h_{ijkl} = K_{ij} L_{ij} + K_{ij} L_{kl} - 2 K_{ij} L_{ik}`. A bootstrap sample holds
    copies, and :math:`K_{ij}` of a stimulus with its copy is a squared norm: the bias that was
    removed would come back. So quadruples are of different stimuli here too, weighted by counts c:

    .. math:: \mathrm{HSIC}_c = \frac{\sum c_i c_j c_k c_l \, h_{ijkl}}{\sum c_i c_j c_k c_l},
              \qquad i, j, k, l \text{ all different},

    from which all sums over k and l are taken out in closed form.

    Parameters
    ----------
    K : array-like, shape (n_first, n_stimuli, n_stimuli)
        Gram matrices, such as those of layers (see `gram`).
    L : array-like, shape (n_second, n_stimuli, n_stimuli)
        Gram matrices of the same stimuli in the same order.
    counts : array-like of int, shape (n_samples, n_stimuli)
        How often each stimulus stands in each sample.
    device : str
        "cpu", "cuda" or "auto". Always in float64.

    Returns
    -------
    ndarray, shape (n_samples, n_first, n_second)
        NaN for a sample with fewer than 4 different stimuli, or with no variance left.

    References
    ----------
    Song et al. (2012), JMLR 13, 1393-1434, eq. 5; Bickel & Freedman (1981), Annals of Statistics
    9, 1196-1217 (bootstrap of U-statistics).
    """
    device = resolve_device(device)
    first, second = (
        torch.as_tensor(np.asarray(x, dtype=np.float64), device=device) for x in (K, L)
    )
    c = torch.as_tensor(np.asarray(counts, dtype=np.float64), device=device)
    n = c.shape[1]
    if first.shape[1:] != (n, n) or second.shape[1:] != (n, n):
        raise SchemaError(
            f"Expected Gram matrices ({n}, {n}); got {tuple(first.shape)}, {tuple(second.shape)}."
        )
    i, j = torch.triu_indices(n, n, 1, device=device)
    first, second = (_unit(x, i, j) for x in (first, second))
    x, y = first[:, i, j], second[:, i, j]
    parts = []
    for rows in sample_blocks(len(c), 8 * max(len(i), n * (len(x) + len(y)))):
        w = c[rows]
        w2 = w * w
        total, squared = w.sum(dim=1, keepdim=True), w2.sum(dim=1, keepdim=True)
        # The sum of the weights of all quadruples.
        n4 = (
            (total**2 - squared) ** 2
            - 4 * (w2 * (total - w) ** 2).sum(dim=1, keepdim=True)
            + 2 * (squared**2 - (w2 * w2).sum(dim=1, keepdim=True))
        )
        n4 = torch.where(((w > 0).sum(dim=1) >= 4)[:, None], n4, torch.nan)
        wi, wj = w[:, i], w[:, j]
        both, squares = wi + wj, wi * wi + wj * wj
        rest = (total - both) ** 2 - squared + squares
        pair = 2 * wi * wj * (rest + total * both - 2 * squares) / n4
        single, double = -2 * w * (total + w) / n4, 2 * w / n4
        (left, left2), (right, right2) = (
            [torch.einsum("bs,rts->brt", v, side) for v in (w, w2)] for side in (first, second)
        )
        sums = [torch.einsum("brt,bt->br", side, w) for side in (left, right)]
        cross = (
            weighted_products(pair, x, y)
            + (left * single[:, None] + left2 * double[:, None]) @ right.transpose(1, 2)
            + (left * double[:, None]) @ right2.transpose(1, 2)
            + sums[0][:, :, None] * sums[1][:, None, :] / n4[:, :, None]
        )
        norms = [
            pair @ (v * v).T
            + torch.einsum("brt,bt,brt->br", side, single, side)
            + 2 * torch.einsum("brt,bt,brt->br", side, double, side2)
            + side_sum**2 / n4
            for v, side, side2, side_sum in (
                (x, left, left2, sums[0]),
                (y, right, right2, sums[1]),
            )
        ]
        product = norms[0][:, :, None] * norms[1][:, None, :]
        # Two norms below 0 would give a product above it.
        good = (norms[0] > 0)[:, :, None] & (norms[1] > 0)[:, None, :]
        parts.append(torch.where(good, cross / product.clamp_min(0).sqrt(), torch.nan))
    return torch.cat(parts).cpu().numpy()


def _centred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract the mean of each column; a constant one becomes exactly 0."""
    x = x - x[:1]
    return x - x.mean(axis=0)


def _unit(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Take the diagonal out, and bring the rest to mean 0 and unit mean square."""
    pairs = x[:, i, j]
    pairs = pairs - pairs.mean(dim=1, keepdim=True)
    scale = (pairs * pairs).mean(dim=1, keepdim=True).sqrt()
    out = torch.zeros_like(x)
    out[:, i, j] = out[:, j, i] = pairs / torch.where(scale > 0, scale, 1.0)
    return out
