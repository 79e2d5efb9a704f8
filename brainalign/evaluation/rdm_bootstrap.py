r"""Similarity of RDMs in many samples of their stimuli at once, from weights instead of copies.

A bootstrap sample that holds stimulus i :math:`c_i` times holds the pair (i, j)
:math:`w_{ij} = c_i c_j` times; pairs of a stimulus with its own copy are left out. So no sample is
ever made: every comparison is a function of the original dissimilarities x, y and of these weights.
With :math:`N = \sum w` and :math:`\langle x, y \rangle = \sum w_{ij} x_{ij} y_{ij}`,

- "cosine", "corr": :math:`\langle x, y\rangle`, after subtraction of weighted means for "corr",
  over the norms: matrix products for all samples and RDMs;
- "spearman", "rho-a": the same for weighted midranks, from one sort of the original pairs and the
  cumulative weights of each sample;
- "kendall", "tau-a": weighted inversions between two orders, from dense blocks and a histogram;
- "cosine_cov", "corr_cov": the norm whitened by the covariance of dissimilarities,
  :math:`\langle x, y\rangle / 2 - \sum_i c_i a_i(x) b_i(y)`, where :math:`b_i` is
  :math:`-\tfrac12 \sum_j c_j x_{ij}` and a solves the equations that centre a Gram matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from brainalign.device import resolve_device
from brainalign.errors import SchemaError, UnknownNameError, near

__all__ = ["COMPARISONS", "check_comparison", "draw_samples", "resampled_similarity"]

#: Ways to compare two RDMs; "corr" is Pearson.
COMPARISONS = (
    "corr", "spearman", "rho-a", "cosine", "kendall", "tau-a", "corr_cov", "cosine_cov",
)  # fmt: skip

#: Bytes of the largest temporary array.
_BYTES = 2**24
#: RDMs of either side whose ranks are held at a time.
_RDMS = 64
#: Fewest distinct stimuli for a sample to count.
_DISTINCT = 3
#: Variance, relative to that of the whole RDM, below which a sample is constant.
_CONSTANT = 1e-13


def check_comparison(method: str) -> str:
    """Return the name of a comparison, or raise `UnknownNameError`."""
    if method not in COMPARISONS:
        raise UnknownNameError(
            f"There is no RDM comparison {method!r}.{near(method, COMPARISONS)}",
            f"Known: {', '.join(COMPARISONS)}; 'corr' is Pearson.",
        )
    return method


def draw_samples(
    n_stimuli: int, n_subjects: int, n_bootstrap: int, *, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each stimulus and each subject stand in each bootstrap sample.

    Returns
    -------
    stimuli : ndarray, shape (n_bootstrap, n_stimuli)
    subjects : ndarray, shape (n_bootstrap, n_subjects)
    """
    rng = np.random.default_rng(seed)
    stimuli = np.empty((n_bootstrap, n_stimuli))
    subjects = np.empty((n_bootstrap, n_subjects))
    for b in range(n_bootstrap):
        stimuli[b] = np.bincount(rng.integers(n_stimuli, size=n_stimuli), minlength=n_stimuli)
        subjects[b] = np.bincount(rng.integers(n_subjects, size=n_subjects), minlength=n_subjects)
    return stimuli, subjects


def resampled_similarity(
    models: ArrayLike,
    data: ArrayLike,
    counts: ArrayLike,
    *,
    method: str = "spearman",
    device: str | torch.device = "cpu",
) -> NDArray[np.float64]:
    """Similarity of every model RDM with every data RDM in every sample of the stimuli.

    Parameters
    ----------
    models : array-like, shape (n_models, n_stimuli, n_stimuli)
        RDMs. A pair that is NaN in all RDMs is left out.
    data : array-like, shape (n_data, n_stimuli, n_stimuli)
        RDMs of the same stimuli in the same order.
    counts : array-like of int, shape (n_samples, n_stimuli)
        How often each stimulus stands in each sample; 0 and 1 for subsets.
    method : str
        One of `COMPARISONS`.
    device : str
        "cpu", "cuda" or "auto". Always in float64.

    Returns
    -------
    ndarray, shape (n_samples, n_models, n_data)
        What `brainalign.evaluation.rsa.compare_rdms` gives for the resampled RDMs without pairs of
        copies; NaN for a sample with fewer than 3 distinct stimuli.

    Raises
    ------
    SchemaError
        If shapes do not fit, or a pair is NaN in some RDMs only.
    UnknownNameError
        For an unknown method.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566; Diedrichsen et al. (2021), Neurons, Behavior, Data
    Analysis and Theory 5, 3 (whitened measures).
    """
    check_comparison(method)
    device = resolve_device(device)
    m, d = (torch.as_tensor(np.asarray(x, dtype=np.float64), device=device) for x in (models, data))
    c = torch.as_tensor(np.asarray(counts, dtype=np.float64), device=device)
    n = m.shape[-1]
    if m.ndim != 3 or d.ndim != 3 or m.shape[1:] != (n, n) or d.shape[1:] != (n, n):
        raise SchemaError(
            f"Expected RDMs (n, stimuli, stimuli) of the same stimuli; got {tuple(m.shape)} and "
            f"{tuple(d.shape)}."
        )
    if c.ndim != 2 or c.shape[1] != n:
        raise SchemaError(f"Expected counts (samples, {n} stimuli); got {tuple(c.shape)}.")
    i, j = torch.triu_indices(n, n, 1, device=device)
    x, y = m[:, i, j], d[:, i, j]
    missing = x.isnan().any(dim=0)
    if not (torch.equal(missing, x.isnan().all(dim=0)) and _same_missing(missing, y)):
        raise SchemaError(
            "Some dissimilarities are NaN in some RDMs only.",
            "Leave their stimuli out, or mark the pair NaN in all RDMs.",
        )
    there = ~missing
    x, y, i, j = x[:, there], y[:, there], i[there], j[there]
    out = torch.empty(len(c), len(x), len(y), dtype=torch.float64, device=device)
    for one in _blocks(len(x), _RDMS):
        for two in _blocks(len(y), _RDMS):
            if method in ("corr", "cosine"):
                made = _moments(x[one], y[two], c, i, j, centred=method == "corr")
            elif method in ("spearman", "rho-a"):
                made = _ranked(x[one], y[two], c, i, j, ties=method == "spearman")
            elif method in ("kendall", "tau-a"):
                made = _kendall(x[one], y[two], c, i, j, ties=method == "kendall")
            else:
                made = _whitened(x[one], y[two], c, i, j, centred=method == "corr_cov")
            out[:, one, two] = made
    out[(c > 0).sum(dim=1) < _DISTINCT] = torch.nan
    return out.cpu().numpy()


def _same_missing(missing: Tensor, y: Tensor) -> bool:
    return bool((y.isnan() == missing).all())


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(k, min(k + size, n)) for k in range(0, n, size)]


def sample_blocks(n_samples: int, row_bytes: int) -> list[slice]:
    return _blocks(n_samples, max(1, _BYTES // max(row_bytes, 1)))


def _over(cross: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Divide products (b, m, d) by the norms; 0 where a side is constant."""
    good = (xx > _CONSTANT)[:, :, None] & (yy > _CONSTANT)[:, None, :]
    norm = torch.sqrt(xx.clamp_min(0)[:, :, None] * yy.clamp_min(0)[:, None, :])
    return torch.where(good, cross / torch.where(good, norm, 1.0), 0.0)


def _scaled(x: Tensor, centred: bool) -> Tensor:
    """Bring RDMs to unit mean square, so that weighted moments lose nothing to rounding."""
    if centred:
        x = x - x.mean(dim=1, keepdim=True)
    scale = (x * x).mean(dim=1, keepdim=True).sqrt()
    return x / torch.where(scale > 0, scale, 1.0)


def weighted_products(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Weighted sums of products of every x with every y: (b, m, d)."""
    out = w.new_empty(len(w), len(x), len(y))
    for rows in _blocks(len(x), max(1, min(256, _BYTES // (8 * x.shape[1])) // len(y))):
        both = (x[rows, None] * y[None]).flatten(0, 1)
        out[:, rows] = (w @ both.T).view(len(w), -1, len(y))
    return out


def _moments(x: Tensor, y: Tensor, c: Tensor, i: Tensor, j: Tensor, *, centred: bool) -> Tensor:
    x, y = _scaled(x, centred), _scaled(y, centred)
    parts = []
    for rows in sample_blocks(len(c), 8 * x.shape[1]):
        w = c[rows][:, i] * c[rows][:, j]
        w /= w.sum(dim=1, keepdim=True).clamp_min(1)
        cross, xx, yy = weighted_products(w, x, y), w @ (x * x).T, w @ (y * y).T
        if centred:
            mx, my = w @ x.T, w @ y.T
            cross -= mx[:, :, None] * my[:, None, :]
            xx, yy = xx - mx * mx, yy - my * my
        parts.append(_over(cross, xx, yy))
    return torch.cat(parts)


def _ranked(x: Tensor, y: Tensor, c: Tensor, i: Tensor, j: Tensor, *, ties: bool) -> Tensor:
    first, second = ([_group_bounds(v) for v in side] for side in (x, y))
    parts = []
    for rows in sample_blocks(len(c), 8 * x.shape[1] * (len(x) + len(y) + 4)):
        w = c[rows][:, i] * c[rows][:, j]
        total = w.sum(dim=1, keepdim=True)
        left = torch.stack([_midranks(w, total, *bounds) for bounds in first], dim=1)
        right = torch.stack([_midranks(w, total, *bounds) for bounds in second], dim=1)
        weighted = left * w[:, None]
        cross = weighted @ right.transpose(1, 2)
        size = total[:, :, None].clamp_min(2)
        if ties:
            cubed = size[:, 0] ** 3
            xx = (weighted * left).sum(dim=2) / cubed
            yy = torch.einsum("bp,bdp,bdp->bd", w, right, right) / cubed
            parts.append(_over(cross / cubed[:, :, None], xx, yy))
        else:
            parts.append(3 * cross / (size**3 - size))
    return torch.cat(parts)


def _group_bounds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order of the pairs, and for each pair where its group of ties starts and ends."""
    ordered, order = x.sort()
    return order, torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)


def _midranks(w: Tensor, total: Tensor, order: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return twice the midrank of every pair in the sample, less its mean: a whole number."""
    below = w.new_zeros(len(w), w.shape[1] + 1)
    torch.cumsum(w.gather(1, order.expand_as(w)), dim=1, out=below[:, 1:])
    ranks = below.gather(1, start.expand_as(w))
    ranks += below.gather(1, end.expand_as(w))
    ranks -= total
    return ranks


def _whitened(x: Tensor, y: Tensor, c: Tensor, i: Tensor, j: Tensor, *, centred: bool) -> Tensor:
    n = c.shape[1]
    x, y = _scaled(x, False), _scaled(y, False)
    present = c.new_zeros(n, n)
    present[i, j] = present[j, i] = 1
    parts = []
    for rows in sample_blocks(len(c), 8 * max(x.shape[1], n * n, n * (len(x) + len(y)))):
        k = c[rows]
        w = k[:, i] * k[:, j]
        total = w.sum(dim=1, keepdim=True).clamp_min(1)
        others = k @ present
        cross, xx, yy = weighted_products(w, x, y), w @ (x * x).T, w @ (y * y).T
        sums = [_row_sums(side, k, i, j) for side in (x, y)]
        if centred:
            means = [w @ side.T / total for side in (x, y)]
            cross -= total[:, :, None] * means[0][:, :, None] * means[1][:, None, :]
            xx, yy = xx - total * means[0] ** 2, yy - total * means[1] ** 2
            sums = [
                s + 0.5 * m[:, None, :] * others[:, :, None]
                for s, m in zip(sums, means, strict=True)
            ]
        equations = torch.diag_embed(others / 2 + 1) + 0.5 * present * k[:, None, :]
        solved = torch.linalg.solve(equations, torch.cat(sums, dim=2))
        a, b = solved[:, :, : len(x)] * k[:, :, None], solved[:, :, len(x) :] * k[:, :, None]
        cross = cross / 2 - a.transpose(1, 2) @ sums[1]
        xx = xx / 2 - (a * sums[0]).sum(dim=1)
        yy = yy / 2 - (b * sums[1]).sum(dim=1)
        parts.append(_over(cross / total[:, :, None], xx / total, yy / total))
    return torch.cat(parts)


def _row_sums(x: Tensor, c: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Sum the rows of the Gram matrices -x / 2 over the sample: (b, n, n_rdms)."""
    n = c.shape[1]
    square = x.new_zeros(len(x), n, n)
    square[:, i, j] = square[:, j, i] = -0.5 * x
    return torch.einsum("bs,rts->btr", c, square)


def _kendall(x: Tensor, y: Tensor, c: Tensor, i: Tensor, j: Tensor, *, ties: bool) -> Tensor:
    parts = []
    xs, ys = ([v.unique(return_inverse=True)[1] for v in side] for side in (x, y))
    for rows in sample_blocks(len(c), 4 * x.shape[1]):
        # Pairs by samples: rows are gathered whole. Sums of weights are exact up to 2**24.
        k = c[rows].T.float()
        w = k[i] * k[j]
        total = _pairs(w.sum(dim=0, dtype=torch.float64))
        x_tied, y_tied = (torch.stack([_tied(w, g) for g in side]) for side in (xs, ys))
        out = w.new_empty(w.shape[1], len(xs), len(ys), dtype=torch.float64)
        for a, gx in enumerate(xs):
            for b, gy in enumerate(ys):
                groups = gx * (int(gy.max()) + 1) + gy
                both = _tied(w, groups.unique(return_inverse=True)[1])
                inverted = _inversions(w, groups, gy * (int(gx.max()) + 1) + gx)
                score = total - x_tied[a] - y_tied[b] + both - 2 * inverted
                if ties:
                    score = score / ((total - x_tied[a]) * (total - y_tied[b])).sqrt()
                else:
                    score = score / total
                out[:, a, b] = score.clamp(-1, 1)
        parts.append(out)
    return torch.cat(parts)


def _pairs(n: Tensor) -> Tensor:
    return n * (n - 1) / 2


def _tied(w: Tensor, group: Tensor) -> Tensor:
    """Count the pairs of tied elements in every sample, copies of one element among them."""
    n_groups = int(group.max()) + 1
    if n_groups < len(group):
        w = w.new_zeros(n_groups, w.shape[1]).index_add_(0, group, w)
    w = w.double()
    return ((w * w).sum(dim=0) - w.sum(dim=0)) / 2


def _inversions(w: Tensor, by_x: Tensor, by_y: Tensor) -> Tensor:
    """Count the pairs of elements that two orders put differently, by the weights of each sample.

    The elements are cut into blocks in both orders. Two elements that share a block in neither are
    counted from the weights of the cells (block in x, block in y); the others from 0-1 matrices.
    """
    n, b = w.shape
    x, y = (_places(v) for v in (by_x, by_y))
    size = max(16, round(n**0.5))
    k = -(-n // size)
    x_block, y_block = x // size, y // size
    cells = w.new_zeros(k * k, b).index_add_(0, x_block * k + y_block, w).double().view(k, k, b)
    later = cells.flip(0).cumsum(dim=0).flip(0)[1:]
    before = later.cumsum(dim=1)[:, :-1]
    count = (cells[:-1, 1:] * before).sum(dim=(0, 1))
    for place, other, other_block, everywhere in (
        (x, y, y_block, True),
        (y, x, x_block, False),
    ):
        order = torch.full((k * size,), n, device=w.device)
        order[place] = torch.arange(n, device=w.device)
        padded = torch.cat([w, w.new_zeros(1, b)])[order].view(k, size, b)
        where, block = (
            torch.cat([v, v.new_zeros(1)])[order].view(k, size) for v in (other, other_block)
        )
        swapped = (where[:, :, None] > where[:, None, :]).triu()
        if not everywhere:
            swapped &= block[:, :, None] != block[:, None, :]
        reached = torch.bmm(swapped.to(w.dtype), padded)
        count += (reached.double() * padded).sum(dim=(0, 1))
    return count


def _places(key: Tensor) -> Tensor:
    places = torch.empty_like(key)
    places[key.argsort(stable=True)] = torch.arange(len(key), device=key.device)
    return places
