"""Permutation tests, corrections for many tests, and bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control
from tqdm.auto import tqdm

from brainalign.device import resolve_device
from brainalign.errors import ConfigError
from brainalign.evaluation.scores import log_undefined, same_targets, undefined

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Interval",
    "PermutationTest",
    "bootstrap_ci",
    "bootstrap_counts",
    "bootstrap_r",
    "fdr",
    "kept_variance",
    "max_statistic_p",
    "permutation_p",
    "permutation_rows",
    "permutation_test",
]

_TARGETS_AT_ONCE = 2048
_ROWS_AT_ONCE = 1024
# Blocks below which an exchange of blocks is warned of.
_FEWEST_BLOCKS = 20
# Share of the variance of r under the null hypothesis that blocks must keep: at this share, 8 % of
# targets without an effect are found at a level of 5 %.
_KEPT_VARIANCE = 0.75
# Values of a gathered block: what stays in a core's cache, and what fills a GPU.
_GATHERED = {"cpu": 2**19, "cuda": 2**26}


class PermutationTest(NamedTuple):
    """Result of a permutation test of the correlation of each target.

    `p_max` is corrected for all targets by the maximum statistic.
    """

    statistic: NDArray[np.float64]
    p: NDArray[np.float64]
    p_max: NDArray[np.float64]
    null_max: NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its bootstrap interval and the samples it comes from."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    samples: NDArray[np.float64]


def permutation_p(hits: ArrayLike, n_permutations: int) -> NDArray[np.float64]:
    r"""P-value of a permutation test: :math:`p = (1 + \mathrm{hits}) / (1 + n)`.

    Parameters
    ----------
    hits : array-like of int
        Permutations with a statistic at least as large as the observed one; NaN stays NaN.
    n_permutations : int
        ``n``.

    Returns
    -------
    ndarray
        Above 0, at most 1.

    References
    ----------
    Phipson & Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9, 39, eq. 2.
    """
    return np.asarray((1 + np.asarray(hits, dtype=np.float64)) / (1 + n_permutations))


def permutation_rows(
    n: int,
    n_permutations: int,
    *,
    scheme: str = "stimuli",
    block: int = 1,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Iterator[NDArray[np.intp]]:
    """Yield row orders that leave the null hypothesis unchanged.

    Parameters
    ----------
    n : int
        Number of rows.
    n_permutations : int
        Number of orders.
    scheme : {"stimuli", "circular", "block"}
        Exchange rows freely; shift them circularly by any number of rows, 0 included (time
        series: keeps the autocorrelation); or exchange whole blocks of neighbouring rows.
    block : int
        Rows of a block, for "block" alone. Circular shifts take no smallest shift: without the
        shifts near 0 the orders, with the measured one, are no group, and false positives rise.
    groups : array-like, shape (n,), optional
        Rows are exchanged (or shifted) only within a group, such as a run.
    seed : int
        Seed.

    Yields
    ------
    ndarray of int, shape (n,)

    Raises
    ------
    ConfigError
        For a scheme that is not known, or rows that are too few for it.

    Warns
    -----
    UserWarning
        If "block" makes fewer than 20 blocks.

    Notes
    -----
    Circular shifts are exact for series that are stationary round the circle. Elsewhere the seam,
    where the end meets the beginning, matters the less the longer a group is beside the
    correlation time of its rows. Blocks have a seam each: they must be long beside that time.
    """
    if scheme not in ("stimuli", "circular", "block"):
        raise ConfigError(f"scheme is {scheme!r}; expected 'stimuli', 'circular' or 'block'.")
    if block < 1 or (block != 1 and scheme != "block"):
        raise ConfigError(
            f"block={block} goes with scheme='block' and is at least 1; scheme is {scheme!r}.",
            "Leave block out: circular shifts are drawn from all, as a smallest one would make "
            "false positives likelier." if scheme == "circular" else None,
        )  # fmt: skip
    labels = np.zeros(n, dtype=int) if groups is None else np.asarray(groups)
    if labels.shape != (n,):
        raise ConfigError(f"groups has shape {labels.shape}; expected ({n},).")
    members = [np.flatnonzero(labels == g) for g in np.unique(labels)]
    for rows in members:
        least = 2 * block
        if len(rows) < least:
            raise ConfigError(
                f"A {scheme!r} permutation with block={block} needs at least {least} rows in every "
                f"group; one has {len(rows)}."
            )
    n_blocks = sum(len(rows) // block for rows in members)
    if scheme == "block" and n_blocks < _FEWEST_BLOCKS:
        warnings.warn(
            f"Rows in blocks of {block} make {n_blocks} blocks: with fewer than {_FEWEST_BLOCKS}, "
            "the null distribution rests on few independent pieces, and orders leave a good part "
            "of the rows where they are. Use scheme='circular', or more data; blocks shorter than "
            "the correlation of the rows would make false positives likelier.",
            stacklevel=2,
        )
    rng = np.random.default_rng(seed)
    for _ in range(n_permutations):
        order = np.arange(n)
        for rows in members:
            order[rows] = rows[_one_order(len(rows), scheme, block, rng)]
        yield order


def _one_order(n: int, scheme: str, block: int, rng: np.random.Generator) -> NDArray[np.intp]:
    if scheme == "circular":
        return np.roll(np.arange(n), int(rng.integers(n)))
    if scheme == "block" and block > 1:
        pieces = np.array_split(np.arange(n), n // block)
        return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
    return rng.permutation(n)


def permutation_test(
    measured: ArrayLike,
    predicted: ArrayLike,
    *,
    n_permutations: int = 1000,
    scheme: str = "stimuli",
    block: int = 1,
    groups: ArrayLike | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> PermutationTest:
    """Test whether predictions correlate with measurements beyond chance (one-sided).

    Exact where the predictions come from other data than the measured rows: one held-out test
    set. Predictions pooled over cross-validation folds depend on the measured rows of the other
    folds, and no exchange of rows undoes that: refit on permuted data instead.

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets)
        The same rows and targets.
    n_permutations : int
        Number of permutations; all targets share each, which `p_max` needs.
    scheme, block, groups, seed
        See `permutation_rows`.
    device : str or torch.device
        Where the permuted correlations are computed: "cpu", "cuda", or "auto" for CUDA where there
        is one. The result does not depend on it: sums are made in float32, and made again in
        float64 wherever their rounding could decide a comparison.

    Returns
    -------
    PermutationTest
        NaN for targets without a correlation.

    Warns
    -----
    UserWarning
        If there are few blocks, or if they are short beside the correlation of the rows.
    """
    where = resolve_device(device)
    y, p = same_targets(measured, predicted)
    n, t = y.shape
    if scheme == "block":
        _check_block(y, p, block, groups)
    r, values = np.full((2, t), np.nan)
    null_max = np.full(n_permutations, -np.inf)
    for start in tqdm(
        range(0, max(1, t), _TARGETS_AT_ONCE), desc="permutations", disable=None, leave=False
    ):
        some = slice(start, start + _TARGETS_AT_ONCE)
        part = np.arange(t)[some]
        a, b = (m[:, some].astype(np.float64) for m in (y, p))
        good = ~undefined(a, b)
        if not good.all():
            part, a, b = part[good], a[:, good], b[:, good]
        a, b = _standardise(a), _standardise(b)
        r[part] = np.clip(np.einsum("nt,nt->t", a, b), -1, 1)
        orders = permutation_rows(
            n, n_permutations, scheme=scheme, block=block, groups=groups, seed=seed
        )
        hits, largest = _permuted(a, b, r[part], orders, where)
        values[part] = permutation_p(hits, n_permutations)
        null_max = np.maximum(null_max, largest)
    log_undefined(np.isnan(r), "Pearson r")
    return PermutationTest(r, values, max_statistic_p(r, null_max), null_max)


def _check_block(
    measured: NDArray[Any], predicted: NDArray[Any], block: int, groups: ArrayLike | None
) -> None:
    """Warn if blocks are short beside the correlation of neighbouring rows."""
    labels = np.zeros(len(measured), dtype=int) if groups is None else np.asarray(groups)
    if labels.shape != (len(measured),) or block < 1:
        return  # refused where rows are drawn
    _, place, size = np.unique(labels, return_inverse=True, return_counts=True)
    rows = place == size.argmax()
    kept = kept_variance(measured[rows], predicted[rows], block)
    if kept < _KEPT_VARIANCE:
        warnings.warn(
            f"Blocks of {block} rows keep {kept:.0%} of the variance that the correlation of "
            "neighbouring rows gives r by chance: false positives are likelier than the level "
            "says. Use longer blocks, or scheme='circular'.",
            stacklevel=3,
        )


def kept_variance(measured: ArrayLike, predicted: ArrayLike, block: int) -> float:
    r"""Share of the variance of r under the null hypothesis that an exchange of blocks keeps.

    .. math:: \frac{1 + 2 \sum_{k < L} (1 - k / L) \, \rho_y(k) \rho_p(k)}
              {1 + 2 \sum_{k < n} (1 - k / n) \, \rho_y(k) \rho_p(k)}

    with the autocorrelations of the measured and the predicted series. Their product, averaged over
    at most 200 targets, is followed up to the lag where it first falls to 0.

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets)
        Series without gaps.
    block : int
        L, rows of a block.

    Returns
    -------
    float

    References
    ----------
    Bartlett (1935), J. R. Stat. Soc. 98, 536-543 (variance of r between two series).
    """
    y, p = (np.asarray(m) for m in (measured, predicted))
    some = slice(None, None, -(-y.shape[1] // 200) or 1)
    n = len(y)
    product = np.mean(_autocorrelation(y[:, some]) * _autocorrelation(p[:, some]), axis=1)
    falls = np.flatnonzero(~(product[1:] > 0))
    product = product[1 : 1 + (falls[0] if len(falls) else n - 1)]
    lag = np.arange(1, 1 + len(product))

    def variance(length: int) -> float:
        return float(1 + 2 * (np.clip(1 - lag / length, 0, None) * product).sum())

    return variance(block) / variance(n)


def _autocorrelation(x: NDArray[Any]) -> NDArray[np.float64]:
    """Autocorrelation of each column at every lag, over the whole length; 0 for constant ones."""
    x = _standardise(x.astype(np.float64))
    spectrum = np.fft.rfft(x, n=2 * len(x), axis=0)
    return np.fft.irfft(np.abs(spectrum) ** 2, n=2 * len(x), axis=0)[: len(x)]


def _permuted(
    measured: NDArray[np.float64],
    predicted: NDArray[np.float64],
    observed: NDArray[np.float64],
    orders: Iterator[NDArray[np.intp]],
    device: torch.device,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how often each target's null value reaches r, and each permutation's maximum.

    Columns are centred and of unit length.
    """
    import torch

    y, p = (torch.as_tensor(m, device=device) for m in (measured, predicted))
    n, t = y.shape
    r = torch.as_tensor(observed, device=device)
    rows = min(n, _ROWS_AT_ONCE)
    elements = _GATHERED["cpu" if device.type == "cpu" else "cuda"] // rows
    width = max(1, min(t, elements))
    blocks = [
        (y[:, i : i + width].float().contiguous(), p[:, i : i + width].float().contiguous())
        for i in range(0, t, width)
    ]
    by_target = y.T.contiguous(), p.T.contiguous()
    # Rounding of a float32 sum of `rows` products, whose absolute values add up to at most 1.
    error = (rows + 4) * 2.0**-24
    hits = torch.zeros(t, dtype=torch.float64, device=device)
    largest = []
    at_once = max(1, elements // width)
    room = torch.empty(at_once * rows * width, device=device)
    while some := list(islice(orders, at_once)):
        order = torch.as_tensor(np.stack(some), device=device)
        null = torch.cat(
            [_null_r(a, b, order, rows, room) for a, b in blocks] or [y.new_empty(0)], dim=-1
        )
        null = null.reshape(len(order), t)
        if t:
            top = null.amax(dim=1, keepdim=True) - 2 * error
            close = (null >= top) | ((null - r).abs() <= error + 1e-12)
            _decide(null, close, by_target, order)
            hits += (null >= r - 1e-12).sum(dim=0)
            largest.append(null.amax(dim=1).cpu().numpy())
    return hits.cpu().numpy(), np.concatenate(largest) if largest else np.array([-np.inf])


def _null_r(y: Tensor, p: Tensor, order: Tensor, rows: int, room: Tensor) -> Tensor:
    """Return r of permuted with predicted rows, shape (n_orders, n_targets), from float32 sums.

    Rows are gathered into `room`, whose memory is used again and again.
    """
    import torch

    out = torch.zeros(len(order), y.shape[1], dtype=torch.float64, device=y.device)
    for i in range(0, len(y), rows):
        take = order[:, i : i + rows]
        gathered = room[: take.numel() * y.shape[1]].view(take.numel(), -1)
        torch.index_select(y, 0, take.reshape(-1), out=gathered)
        products = gathered.view(*take.shape, -1).mul_(p[i : i + rows])
        out += products.sum(dim=1)
    return out


def _decide(null: Tensor, close: Tensor, by_target: tuple[Tensor, Tensor], order: Tensor) -> None:
    """Compute the marked values of `null` again in float64, in place."""
    y, p = by_target
    which, target = close.nonzero(as_tuple=True)
    for i in range(0, len(which), 4096):
        k, t = which[i : i + 4096], target[i : i + 4096]
        null[k, t] = (y[t].gather(1, order[k]) * p[t]).sum(dim=1)


def max_statistic_p(statistic: ArrayLike, null_max: ArrayLike) -> NDArray[np.float64]:
    """P-values that hold for all targets together (family-wise), from the null's maximum.

    Parameters
    ----------
    statistic : array-like, shape (n_targets,)
        Observed values, higher is better; NaN stays NaN.
    null_max : array-like, shape (n_permutations,)
        Maximum over the targets in each permutation.

    Returns
    -------
    ndarray, shape (n_targets,)

    References
    ----------
    Nichols & Holmes (2002), Human Brain Mapping 15, 1-25.
    """
    observed = np.asarray(statistic, dtype=np.float64)
    null = np.sort(np.asarray(null_max, dtype=np.float64))
    hits = len(null) - np.searchsorted(null, observed - 1e-12, side="left")
    return np.where(np.isnan(observed), np.nan, permutation_p(hits, len(null)))


def fdr(p: ArrayLike, *, method: str = "bh") -> NDArray[np.float64]:
    """Adjust p-values for the false discovery rate; NaN stays NaN and is not counted.

    Parameters
    ----------
    p : array-like
        P-values.
    method : {"bh", "by"}
        Benjamini-Hochberg, or Benjamini-Yekutieli for any dependence.

    Returns
    -------
    ndarray
        q-values, of the shape of `p`.

    References
    ----------
    Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57, 289-300.
    """
    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    defined = np.isfinite(values)
    if defined.any():
        q[defined] = false_discovery_control(values[defined], method=method)
    return q


def bootstrap_counts(
    n: int, n_bootstrap: int = 1000, *, groups: ArrayLike | None = None, seed: int = 0
) -> NDArray[np.float64]:
    """How often each row stands in each bootstrap sample.

    Parameters
    ----------
    n : int
        Number of rows.
    n_bootstrap : int
        Number of samples.
    groups : array-like, shape (n,), optional
        Rows drawn together, such as the presentations of one stimulus.
    seed : int
        Seed.

    Returns
    -------
    ndarray, shape (n_bootstrap, n)
    """
    rng = np.random.default_rng(seed)
    index = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    m = int(index.max()) + 1
    drawn = rng.multinomial(m, np.full(m, 1 / m), size=n_bootstrap)
    return drawn[:, index].astype(np.float64)


def bootstrap_r(
    measured: ArrayLike,
    predicted: ArrayLike,
    counts: NDArray[np.float64],
    *,
    device: str | torch.device = "auto",
) -> NDArray[np.float64]:
    """Pearson r of each target in each bootstrap sample, from weighted sums.

    Parameters
    ----------
    measured, predicted : array-like, shape (n_samples, n_targets)
        The same rows and targets. float32 where both are, else float64.
    counts : ndarray, shape (n_bootstrap, n_samples)
        From `bootstrap_counts`.
    device : str or torch.device
        As in `permutation_test`.

    Returns
    -------
    ndarray, shape (n_bootstrap, n_targets)
        NaN where a sample holds a single value.
    """
    import torch

    where = resolve_device(device)
    y, p = np.asarray(measured), np.asarray(predicted)
    single = y.dtype == p.dtype == np.float32
    dtype = torch.float32 if single else torch.float64
    weight = torch.as_tensor(counts, dtype=torch.float64, device=where)
    weight = weight / weight.sum(dim=1, keepdim=True)
    short = weight.to(dtype)
    # A variance this small beside its mean square is computed again in float64; what is then
    # still below `small`, for rows that are unit vectors, is the rounding of a constant sample.
    doubtful, small = 1e-2, 1e-14 / len(y)
    out = np.empty((len(counts), y.shape[1]))
    for start in range(0, y.shape[1], _TARGETS_AT_ONCE):
        part = slice(start, start + _TARGETS_AT_ONCE)
        exact = [
            torch.as_tensor(_standardise(np.asarray(m[:, part], dtype=np.float64)), device=where)
            for m in (y, p)
        ]
        a, b = (m.to(dtype) for m in exact)
        moments = [short @ m for m in (a, b, a * a, b * b, a * b)]
        if single:
            moments = [m.double() for m in moments]
            my, mp, yy, pp, _ = moments
            bad = (yy - my**2 < doubtful * yy) | (pp - mp**2 < doubtful * pp)
            which, target = bad.nonzero(as_tuple=True)
            for i in range(0, len(which), 4096):
                k, t = which[i : i + 4096], target[i : i + 4096]
                c, d, w = exact[0][:, t].T, exact[1][:, t].T, weight[k]
                for moment, m in zip(moments, (c, d, c * c, d * d, c * d), strict=True):
                    moment[k, t] = (w * m).sum(dim=1)
        my, mp, yy, pp, yp = moments
        vy, vp = yy - my**2, pp - mp**2
        r = ((yp - my * mp) / (vy * vp).sqrt()).clamp(-1, 1)
        r[~((vy > small) & (vp > small))] = torch.nan
        out[:, part] = r.cpu().numpy()
    return out


def bootstrap_ci(
    statistic: Callable[..., Any],
    *arrays: ArrayLike,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic over resampled rows (stimuli, subjects).

    Parameters
    ----------
    statistic : callable
        Takes the arrays and returns a number or an array.
    *arrays : array-like, shape (n, ...)
        Resampled together along the first axis.
    n_bootstrap : int
        Number of samples.
    level : float
        Coverage, between 0 and 1.
    groups : array-like, shape (n,), optional
        Rows drawn together.
    seed : int
        Seed.

    Returns
    -------
    Interval
        NaN samples are left out of the percentiles.

    References
    ----------
    Efron & Tibshirani (1993), An Introduction to the Bootstrap, ch. 13.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1; got {level}.")
    data = [np.asarray(a) for a in arrays]
    n = len(data[0])
    if any(len(d) != n for d in data):
        raise ConfigError(f"The arrays have different lengths: {[len(d) for d in data]}.")
    index = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(index == g) for g in range(int(index.max()) + 1)]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n_bootstrap):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[g] for g in drawn])
        samples.append(np.asarray(statistic(*(d[rows] for d in data)), dtype=np.float64))
    stacked = np.stack(samples)
    low, high = percentiles(stacked, level)
    return Interval(np.asarray(statistic(*data), dtype=np.float64), low, high, stacked)


def percentiles(
    samples: NDArray[np.float64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper end of the central `level` of the samples along the first axis."""
    tail = (1 - level) / 2
    filled = np.where(np.isnan(samples).all(axis=0), 0.0, samples)
    low, high = np.nanquantile(filled, [tail, 1 - tail], axis=0)
    empty = np.isnan(samples).all(axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def _standardise(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre columns and scale them to unit length; constant columns become 0."""
    x = x - x.mean(axis=0)
    norm = np.sqrt(np.einsum("n...,n...->...", x, x))
    x /= np.where(norm > 0, norm, 1)
    return x
