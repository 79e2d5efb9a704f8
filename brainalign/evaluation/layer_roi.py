"""Every layer against every region of interest: RSA and CKA side by side.

Both compare two square matrices over stimuli. Written as one vector each, of unit length where the
measure asks for it, their similarity is a dot product: all layers, regions and subjects are one
matrix product, and so is every permutation of the stimuli.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import sparse, stats
from tqdm.auto import tqdm

from brainalign.data.schema import validate
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.cka import gram, resampled_cka
from brainalign.evaluation.rdm_bootstrap import check_comparison, draw_samples, resampled_similarity
from brainalign.evaluation.rsa import (
    bootstrap_values,
    corrected_variance,
    dissimilarity,
    rdm_noise_ceiling,
    rdms_dataset,
)
from brainalign.evaluation.significance import max_statistic_p, permutation_p

__all__ = ["layer_roi_cka", "layer_roi_rsa"]

logger = logging.getLogger(__name__)

_LEAST_STIMULI = 8
_MEASURES = ("correlation", "euclidean")
#: Comparisons that are no dot product of fixed vectors: each permutation would be evaluated anew.
_NOT_LINEAR = ("kendall", "tau-a")

Matrices = NDArray[np.float64]


def layer_roi_rsa(
    features: Mapping[str, xr.Dataset],
    responses: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    rois: Sequence[str] | None = None,
    measure: str = "correlation",
    method: str = "spearman",
    over: str = "stimuli",
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str = "cpu",
) -> xr.Dataset:
    """Compare the RDM of every layer with that of every region of interest.

    Parameters
    ----------
    features : mapping of layer to Dataset
        ``features`` schema. The stimuli that all layers and subjects have are used.
    responses : Dataset, or mapping of subject to Dataset
        ``responses`` schema with presentations, which are averaged by stimulus.
    rois : sequence of str, optional
        Regions, from the coordinate ``roi`` or ``roi_mask``; by default all.
    measure : {"correlation", "euclidean"}
        See `brainalign.evaluation.rsa.rdm`.
    method : str
        One of `brainalign.evaluation.rdm_bootstrap.COMPARISONS` other than Kendall's.
    over : {"stimuli", "subjects", "both"}
        What the intervals generalise to. With few subjects the t of "subjects" and "both" has few
        degrees of freedom, and intervals are wide.
    n_bootstrap, n_permutations : int
        Numbers of samples; 0 leaves intervals or p-values out (NaN).
    level : float
        Coverage of the intervals.
    seed : int
        Seed.
    device : str
        Where the bootstrap is computed: "cpu", "cuda" or "auto".

    Returns
    -------
    xarray.Dataset
        ``value, low, high, se`` (layer, roi): mean similarity over subjects, its interval
        ``value +- t se`` by a bootstrap as in `brainalign.evaluation.rsa.evaluate_rdms`;
        ``p`` (layer, roi): one-sided, by permutation of the layers' stimuli; ``p_max``: the same
        against the largest value of all layers and regions; ``per_subject`` (layer, roi, subject);
        ``ceiling`` (bound, roi): NaN with one subject.

    Raises
    ------
    SchemaError
        If responses are a time series or not finite, or fewer than 8 stimuli are shared.
    ConfigError, UnknownNameError
        For an option or region that is not known.
    """
    check_comparison(method)
    if method in _NOT_LINEAR:
        raise ConfigError(
            f"method={method!r} is not offered for many layers and regions.",
            'Use "rho-a", which handles ties as "tau-a" does, or "spearman".',
        )
    if measure not in _MEASURES:
        raise UnknownNameError(
            f"There is no measure {measure!r} here.{near(measure, _MEASURES)}",
            f"Known: {', '.join(_MEASURES)}.",
        )

    def matrix(X: NDArray | xr.DataArray) -> NDArray[np.float64]:
        return dissimilarity(X, measure=measure)

    def ceiling(matrices: Matrices, subjects: Sequence[str], ids: Sequence[str]) -> Any:
        return rdm_noise_ceiling(rdms_dataset(matrices, subjects, ids), method=method)

    made = _table(
        features, responses, rois, matrix, lambda x: _rdm_vectors(x, method),
        lambda x, y, c: resampled_similarity(x, y, c, method=method, device=device), ceiling,
        over, n_bootstrap, n_permutations, level, seed,
    )  # fmt: skip
    return made.assign_attrs(measure=measure, method=method)


def layer_roi_cka(
    features: Mapping[str, xr.Dataset],
    responses: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    rois: Sequence[str] | None = None,
    over: str = "stimuli",
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str = "cpu",
) -> xr.Dataset:
    """Debiased linear CKA of every layer with every region of interest.

    Gram matrices (stimuli x stimuli) are made once per layer, region and subject; memory grows with
    their number times the square of the number of stimuli.

    Parameters
    ----------
    features, responses, rois, over, n_bootstrap, n_permutations, level, seed, device
        As in `layer_roi_rsa`. Bootstrap samples leave tuples with copies of a stimulus out, see
        `brainalign.evaluation.cka.resampled_cka`.

    Returns
    -------
    xarray.Dataset
        As `layer_roi_rsa`. The ceiling is the CKA of each subject's region with the mean of the
        other subjects' Gram matrices of unit norm (lower), or of all (upper).

    Raises
    ------
    SchemaError, ConfigError, UnknownNameError
        As `layer_roi_rsa`.

    References
    ----------
    Kornblith et al. (2019), ICML; Song et al. (2012), JMLR 13, 1393-1434.
    """

    def ceiling(matrices: Matrices, subjects: Sequence[str], ids: Sequence[str]) -> Any:
        vectors = _gram_vectors(matrices)
        return _pooled_ceiling(vectors @ vectors.T)

    return _table(
        features, responses, rois, gram, _gram_vectors,
        lambda x, y, c: resampled_cka(x, y, c, device=device), ceiling,
        over, n_bootstrap, n_permutations, level, seed,
    ).assign_attrs(method="debiased linear CKA")  # fmt: skip


def _table(
    features: Mapping[str, xr.Dataset],
    responses: xr.Dataset | Mapping[str, xr.Dataset],
    rois: Sequence[str] | None,
    matrix: Callable[[NDArray | xr.DataArray], NDArray[np.float64]],
    vectors: Callable[[Matrices], NDArray[np.float64]],
    resampled: Callable[[Matrices, Matrices, NDArray[np.float64]], NDArray[np.float64]],
    ceiling: Callable[[Matrices, Sequence[str], Sequence[str]], tuple[float, float]],
    over: str,
    n_bootstrap: int,
    n_permutations: int,
    level: float,
    seed: int,
) -> xr.Dataset:
    by_subject = _subjects(responses)
    subjects, layers = list(by_subject), list(features)
    if over not in ("stimuli", "subjects", "both"):
        raise ConfigError(f"over is {over!r}; expected 'stimuli', 'subjects' or 'both'.")
    if over != "stimuli" and len(subjects) < 2:
        raise ConfigError(
            f"over={over!r} needs at least two subjects; there is one.", 'Use over="stimuli".'
        )
    ids = _shared_stimuli(features, by_subject)
    members = {s: _roi_members(ds, rois) for s, ds in by_subject.items()}
    names = list(members[subjects[0]])
    for subject, own in members.items():
        if missing := [r for r in names if r not in own]:
            raise SchemaError(f"Subject {subject!r} has no region {missing[0]!r}.", "Name `rois`.")
    x = np.stack([matrix(_rows(features[name], ids)) for name in layers])
    _finite(x, [f"layer {name!r}" for name in layers])
    y = np.stack(
        [matrix(_means(by_subject[s], members[s][r], ids)) for r in names for s in subjects]
    )
    _finite(y, [f"region {r!r} of subject {s!r}" for r in names for s in subjects])
    shape = (len(layers), len(names), len(subjects))
    one, two = vectors(x), vectors(y)
    each = (one @ two.T).reshape(shape)
    value = each.mean(axis=2)
    n = len(ids)
    se, dof = np.full(value.shape, np.nan), 1
    if n_bootstrap:
        stimuli, drawn = draw_samples(n, len(subjects), n_bootstrap, seed=seed)
        values = bootstrap_values(
            lambda counts: resampled(x, y, counts).reshape(len(counts), -1, len(subjects)),
            each.reshape(-1, len(subjects)), stimuli, drawn, over,
        )  # fmt: skip
        sizes = {"both": (len(subjects), n), "subjects": (len(subjects),), "stimuli": (n,)}[over]
        variance = np.nanvar(values, axis=1, ddof=1)
        se = np.sqrt(corrected_variance(variance, sizes)).reshape(value.shape)
        dof = min(sizes) - 1
    half = se * stats.t.ppf((1 + level) / 2, dof)
    p = p_max = np.full(value.shape, np.nan)
    if n_permutations:
        null = _permuted(one, two, n, n_permutations, shape, seed)
        hits = (null >= value - 1e-12).sum(axis=0)
        p = permutation_p(hits, n_permutations)
        p_max = max_statistic_p(value, null.max(axis=(1, 2)))
    bounds = np.full((2, len(names)), np.nan)
    if len(subjects) > 1:
        parts = y.reshape(len(names), len(subjects), n, n)
        bounds = np.array([ceiling(part, subjects, ids) for part in parts]).T
    dims = ("layer", "roi")
    return xr.Dataset(
        {
            "value": (dims, value),
            "low": (dims, value - half),
            "high": (dims, value + half),
            "se": (dims, se),
            "p": (dims, p),
            "p_max": (dims, p_max),
            "per_subject": ((*dims, "subject"), each),
            "ceiling": (("bound", "roi"), bounds),
        },
        coords={"layer": layers, "roi": names, "subject": subjects, "bound": ["lower", "upper"]},
        attrs={
            "over": over, "n_bootstrap": n_bootstrap, "n_permutations": n_permutations,
            "level": level, "seed": seed, "n_stimuli": n, "n_subjects": len(subjects),
        },
    )  # fmt: skip


def _subjects(responses: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    if not isinstance(responses, xr.Dataset):
        made = dict(responses)
    else:
        name = str(np.ravel(responses["subject"].values)[0]) if "subject" in responses else ""
        made = {name or "subject": responses}
    if not made:
        raise SchemaError("There are no responses.")
    for subject, ds in made.items():
        validate(ds, "responses")
        if "presentation" not in ds["responses"].dims:
            raise SchemaError(
                f"The responses of {subject!r} are a time series.", "Fit betas first."
            )
    return made


def _shared_stimuli(
    features: Mapping[str, xr.Dataset], responses: Mapping[str, xr.Dataset]
) -> list[str]:
    if not features:
        raise SchemaError("There are no layers to compare.")
    for layer, ds in features.items():
        validate(ds, "features")
        if "stimulus" not in ds["features"].dims:
            raise SchemaError(f"The features of layer {layer!r} are a time series.")
    every = [
        ds["stimulus_id"].values.astype(str) for ds in (*features.values(), *responses.values())
    ]
    shared = set(every[0]).intersection(*every[1:])
    ids = [s for s in dict.fromkeys(every[0].tolist()) if s in shared]
    largest = max(len(set(e.tolist())) for e in every)
    if len(ids) < _LEAST_STIMULI:
        raise SchemaError(
            f"Layers and subjects share {len(ids)} of {largest} stimuli; at least "
            f"{_LEAST_STIMULI} are needed."
        )
    if len(ids) < largest:
        logger.info("%d of %d stimuli are shared by all layers and subjects.", len(ids), largest)
    return ids


def _roi_members(ds: xr.Dataset, rois: Sequence[str] | None) -> dict[str, NDArray[np.intp]]:
    own = ds["roi"].values.astype(str)
    members = {r: np.flatnonzero(own == r) for r in sorted(set(own.tolist()) - {""})}
    if "roi_mask" in ds.variables:
        for name in ds["roi_name"].values.astype(str).tolist():
            inside = np.flatnonzero(ds["roi_mask"].sel(roi_name=name).values)
            if len(inside):
                members[name] = inside
    if rois is None:
        return members or {"all": np.arange(len(own))}
    for name in rois:
        if name not in members:
            raise UnknownNameError(f"There is no region {name!r}.{near(name, members)}")
    return {name: members[name] for name in rois}


def _rows(ds: xr.Dataset, ids: list[str]) -> xr.DataArray:
    place = {s: i for i, s in enumerate(ds["stimulus_id"].values.astype(str).tolist())}
    order = [place[s] for s in ids]
    array = ds["features"]
    return array if order == list(range(array.shape[0])) else array[order]


def _means(ds: xr.Dataset, members: NDArray[np.intp], ids: list[str]) -> NDArray[np.float64]:
    """Average the presentations of each stimulus: (stimulus, neuroid)."""
    place = {s: i for i, s in enumerate(ids)}
    row = np.array([place.get(s, -1) for s in ds["stimulus_id"].values.astype(str).tolist()])
    kept = np.flatnonzero(row >= 0)
    share = 1 / np.bincount(row[kept])
    average = sparse.csr_array(
        (share[row[kept]], (row[kept], np.arange(len(kept)))), shape=(len(ids), len(kept))
    )
    block = ds["responses"][:, members].values[kept]
    return np.asarray(average @ block.astype(np.float64))


def _finite(matrices: Matrices, names: Sequence[str]) -> None:
    bad = [name for name, one in zip(names, matrices, strict=True) if not np.isfinite(one).all()]
    if bad:
        raise SchemaError(
            f"{len(bad)} of {len(names)} sets of patterns hold values that are not finite, or a "
            f"pattern that is constant; the first is {bad[0]}.",
            "Leave these neuroids or stimuli out.",
        )


def _rdm_vectors(matrices: Matrices, method: str) -> NDArray[np.float64]:
    """Vectors whose dot products are the similarities of RDMs under `method`."""
    n = matrices.shape[1]
    i, j = np.triu_indices(n, 1)
    x = matrices[:, i, j]
    if method in ("spearman", "rho-a"):
        x = np.stack([stats.rankdata(row) for row in x])
    if method in ("spearman", "rho-a", "corr", "corr_cov"):
        x = x - x.mean(axis=1, keepdims=True)
    square = np.zeros((len(x), n, n))
    square[:, i, j] = square[:, j, i] = x
    if method.endswith("_cov"):
        square = _centred(-0.5 * square)
    elif method == "rho-a":
        k = x.shape[1]
        return _vectors(square) * np.sqrt(6 / (k**3 - k))
    return _of_unit_length(_vectors(square))


def _gram_vectors(matrices: Matrices) -> NDArray[np.float64]:
    """Vectors whose dot products are debiased CKA: U-centred Gram matrices of unit norm."""
    n = matrices.shape[1]
    K = matrices.copy()
    K[:, np.arange(n), np.arange(n)] = 0
    sums = K.sum(axis=1) / (n - 2)
    K -= sums[:, :, None] + sums[:, None, :]
    K += sums.sum(axis=1)[:, None, None] / (n - 1)
    K[:, np.arange(n), np.arange(n)] = 0
    return _of_unit_length(_vectors(K))


def _centred(x: Matrices) -> Matrices:
    rows = x.mean(axis=1, keepdims=True)
    return x - rows - rows.transpose(0, 2, 1) + rows.mean(axis=2, keepdims=True)


def _vectors(square: Matrices) -> NDArray[np.float64]:
    """Upper triangles with their diagonal; dot products are sums over whole matrices."""
    i, j = np.triu_indices(square.shape[1])
    return square[:, i, j] * np.where(i == j, 1.0, np.sqrt(2.0))


def _of_unit_length(x: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


def _permuted(
    one: NDArray[np.float64],
    two: NDArray[np.float64],
    n: int,
    n_permutations: int,
    shape: tuple[int, int, int],
    seed: int,
) -> NDArray[np.float64]:
    """Mean similarity with the stimuli of one side exchanged: (permutation, layer, roi)."""
    rng = np.random.default_rng([seed, 1])
    i, j = np.triu_indices(n)
    place = np.empty((n, n), dtype=np.intp)
    place[i, j] = place[j, i] = np.arange(len(i))
    # All subjects see the same exchange, so their mean can be taken before.
    regions = two.reshape(shape[1], shape[2], -1).mean(axis=1)
    null = np.empty((n_permutations, *shape[:2]))
    for b in tqdm(range(n_permutations), desc="permutations", disable=None, leave=False):
        order = rng.permutation(n)
        exchanged = place[order[i], order[j]]
        if len(one) < len(regions):
            null[b] = one[:, exchanged] @ regions.T
        else:
            null[b] = one @ regions[:, exchanged].T
    return null


def _pooled_ceiling(similarity: NDArray[np.float64]) -> tuple[float, float]:
    """Similarity of each unit vector with the mean of the others, and of all."""
    n = len(similarity)
    upper = similarity.sum(axis=1) / np.sqrt(similarity.sum())
    lower = []
    for s in range(n):
        rest = np.delete(np.arange(n), s)
        lower.append(similarity[s, rest].sum() / np.sqrt(similarity[np.ix_(rest, rest)].sum()))
    return float(np.mean(lower)), float(np.mean(upper))
