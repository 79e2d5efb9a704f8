"""Representational similarity analysis: RDMs and their comparison through rsatoolbox.

RDMs travel as Datasets of the ``rdms`` schema. rsatoolbox compares them and gives noise ceilings;
bootstraps over stimuli are computed by `brainalign.evaluation.rdm_bootstrap`, with equal results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from brainalign.data.schema import validate
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.cka import gram
from brainalign.evaluation.rdm_bootstrap import (
    check_comparison,
    draw_samples,
    resampled_similarity,
)

__all__ = [
    "MEASURES",
    "align_rdms",
    "average_rdms",
    "average_sessions",
    "choose_layer_rsa",
    "compare_rdms",
    "dissimilarity",
    "evaluate_rdms",
    "rdm",
    "rdm_noise_ceiling",
    "rdms_dataset",
    "stack_rdms",
]

logger = logging.getLogger(__name__)

#: Dissimilarity measures of patterns.
MEASURES = ("correlation", "euclidean", "mahalanobis", "crossnobis")


def rdms_dataset(
    matrices: ArrayLike, names: Sequence[str], stimulus_id: Sequence[str], *, measure: str = ""
) -> xr.Dataset:
    """Put RDMs into a Dataset of the ``rdms`` schema.

    Parameters
    ----------
    matrices : array-like, shape (n_rdms, n_stimuli, n_stimuli)
        Symmetric, with a zero diagonal.
    names : sequence of str
        One name per RDM, all different.
    stimulus_id : sequence of str
        One name per row.
    measure : str
        The dissimilarity measure.

    Returns
    -------
    xarray.Dataset
    """
    array = np.asarray(matrices, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] != len(names) or array.shape[1] != len(stimulus_id):
        raise SchemaError(
            f"RDMs have shape {array.shape}; expected ({len(names)} names, {len(stimulus_id)} "
            f"stimuli, {len(stimulus_id)} stimuli)."
        )
    ids = np.asarray(stimulus_id, dtype=str)
    ds = xr.Dataset(
        {"rdm": (("rdm_name", "stimulus", "stimulus_2"), array)},
        coords={
            "rdm_name": np.asarray(names, dtype=str),
            "stimulus_id": ("stimulus", ids),
            "stimulus_id_2": ("stimulus_2", ids),
        },
        attrs={"measure": measure},
    )
    return validate(ds, "rdms")


def rdm(
    patterns: xr.Dataset | ArrayLike,
    *,
    measure: str = "correlation",
    stimulus_id: Sequence[str] | None = None,
    name: str | None = None,
    noise_precision: ArrayLike | None = None,
    fold: str = "repetition",
) -> xr.Dataset:
    """Dissimilarity of every pair of stimuli.

    Parameters
    ----------
    patterns : Dataset or array-like, shape (n_stimuli, n_channels)
        A features or responses Dataset, or patterns. Presentations of one stimulus are averaged.
    measure : {"correlation", "euclidean", "mahalanobis", "crossnobis"}
        ``1 - r``; mean squared difference over channels; the same after whitening; the same,
        cross-validated over `fold` (unbiased: 0 for identical patterns, may be negative).
    stimulus_id : sequence of str, optional
        Stimuli of the result, in order. For an array, the names of its rows. For a Dataset, by
        default all its stimuli in order of first appearance.
    name : str, optional
        Name of the RDM; by default the layer, or the subject.
    noise_precision : array-like, shape (n_channels, n_channels), optional
        Inverse noise covariance, for "mahalanobis" and "crossnobis".
    fold : str
        Coordinate of the presentations that "crossnobis" cross-validates over.

    Returns
    -------
    xarray.Dataset
        ``rdms`` schema, with one RDM.

    Raises
    ------
    SchemaError
        If a pattern is not finite, or constant under "correlation"; the stimuli are named.
    UnknownNameError
        For an unknown measure or stimulus.
    """
    if measure not in MEASURES:
        raise UnknownNameError(
            f"There is no measure {measure!r}.{near(measure, MEASURES)}",
            f"Known: {', '.join(MEASURES)}.",
        )
    values, ids, folds, label = _patterns(patterns, stimulus_id, fold)
    wanted = list(dict.fromkeys(ids if stimulus_id is None else map(str, stimulus_id)))
    _known_stimuli(wanted, ids)
    bad = ~np.isfinite(values).all(axis=1)
    if measure == "correlation":
        bad |= np.ptp(values, axis=1) == 0
    if bad.any():
        named = ", ".join(repr(ids[i]) for i in np.flatnonzero(bad)[:3])
        raise SchemaError(
            f"{int(bad.sum())} of {len(values)} patterns are not finite"
            f"{' or constant' if measure == 'correlation' else ''} ({named})."
        )
    place = {s: i for i, s in enumerate(wanted)}
    keep = np.array([s in place for s in ids])
    order = np.array([place[s] for s, k in zip(ids, keep, strict=True) if k])
    values = values[keep]
    if measure == "crossnobis":
        if folds is None:
            raise SchemaError(f"'crossnobis' needs the coordinate {fold!r} on the presentations.")
        matrix = _crossnobis(values, order, folds[keep], noise_precision)
    else:
        means = np.zeros((len(wanted), values.shape[1]))
        np.add.at(means, order, values)
        means /= np.bincount(order)[:, None]
        if measure == "mahalanobis" and noise_precision is not None:
            means = means @ np.linalg.cholesky(np.asarray(noise_precision, dtype=np.float64))
        matrix = dissimilarity(means, measure=measure)
    return rdms_dataset(matrix[None], [name or label], wanted, measure=measure)


def dissimilarity(X: NDArray | xr.DataArray, *, measure: str) -> NDArray[np.float64]:
    """Dissimilarity of every pair of rows, from one Gram matrix.

    Parameters
    ----------
    X : array or DataArray, shape (n_stimuli, n_channels)
        One pattern per stimulus; may be opened lazily.
    measure : str
        "correlation": ``1 - r``; any other: mean squared difference over channels.

    Returns
    -------
    ndarray, shape (n_stimuli, n_stimuli)
        NaN where a pattern is constant under "correlation".
    """
    G = gram(X, centre="rows" if measure == "correlation" else "columns")
    norm = np.diag(G)
    if measure == "correlation":
        with np.errstate(divide="ignore", invalid="ignore"):
            matrix = 1 - G / np.sqrt(norm[:, None] * norm[None, :])
    else:
        matrix = np.maximum(norm[:, None] + norm[None, :] - 2 * G, 0) / X.shape[1]
    np.fill_diagonal(matrix, 0)
    return matrix


def _crossnobis(
    values: NDArray[np.float64],
    order: NDArray[np.intp],
    folds: NDArray[Any],
    noise_precision: ArrayLike | None,
) -> NDArray[np.float64]:
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm

    data = Dataset(values, obs_descriptors={"stimulus": order, "fold": folds})
    noise = None if noise_precision is None else np.asarray(noise_precision)
    made: Any = calc_rdm(
        data, method="crossnobis", descriptor="stimulus", cv_descriptor="fold", noise=noise
    )
    matrix = np.asarray(made.get_matrices()[0], dtype=np.float64)
    np.fill_diagonal(matrix, 0)
    return matrix


def stack_rdms(rdms: Mapping[str, xr.Dataset] | Sequence[xr.Dataset]) -> xr.Dataset:
    """Join RDMs of the same stimuli (in any order) into one Dataset.

    Parameters
    ----------
    rdms : sequence or dict of xarray.Dataset
        A dict renames RDMs: its keys are the names where a Dataset holds one RDM, and prefixes
        ``key:`` where it holds several.
    """
    parts = list(rdms.values()) if isinstance(rdms, Mapping) else list(rdms)
    if not parts:
        raise SchemaError("There are no RDMs to stack.")
    names: list[str] = []
    for i, part in enumerate(parts):
        own = part["rdm_name"].values.astype(str).tolist()
        if isinstance(rdms, Mapping):
            key = list(rdms)[i]
            own = [key] if len(own) == 1 else [f"{key}:{n}" for n in own]
        names += own
    first = parts[0]["stimulus_id"].values.astype(str).tolist()
    aligned = [_reorder(part, first) for part in parts]
    measures = sorted({str(p.attrs.get("measure", "")) for p in parts} - {""})
    return rdms_dataset(np.concatenate(aligned), names, first, measure=", ".join(measures))


def average_rdms(rdms: xr.Dataset, name: str = "mean", *, method: str | None = None) -> xr.Dataset:
    """Average RDMs: plainly, or pooled so that the average is best under a comparison `method`."""
    if method is None:
        mean = rdms["rdm"].values.mean(axis=0)
    else:
        from rsatoolbox.util.inference_util import pool_rdm

        mean = pool_rdm(_toolbox(rdms), method=check_comparison(method)).get_matrices()[0]
    ids = rdms["stimulus_id"].values.astype(str).tolist()
    return rdms_dataset(mean[None], [name], ids, measure=str(rdms.attrs.get("measure", "")))


def average_sessions(rdms: xr.Dataset) -> xr.Dataset:
    """Average the RDMs of each ``subject``; what has no such coordinate stays as it is."""
    if "subject" not in rdms.coords:
        return rdms
    subjects = rdms["subject"].values.astype(str)
    parts = {
        s: average_rdms(rdms.isel(rdm_name=np.flatnonzero(subjects == s)), s)
        for s in dict.fromkeys(subjects.tolist())
    }
    return stack_rdms(parts)


def align_rdms(a: xr.Dataset, b: xr.Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the pair vectors (n_rdms, n_pairs) of two Datasets, in the order of the first.

    Raises
    ------
    SchemaError
        If they do not hold the same stimuli; those missing on either side are named.
    """
    validate(a, "rdms")
    validate(b, "rdms")
    ids = a["stimulus_id"].values.astype(str).tolist()
    return _vectors(a["rdm"].values), _vectors(_reorder(b, ids))


def compare_rdms(models: xr.Dataset, data: xr.Dataset, *, method: str = "spearman") -> xr.DataArray:
    """Similarity of every model RDM with every data RDM.

    Parameters
    ----------
    models, data : xarray.Dataset
        ``rdms`` schema, the same stimuli in any order.
    method : str
        One of `brainalign.evaluation.rdm_bootstrap.COMPARISONS`. "rho-a" suits models that predict
        ties; "corr" is Pearson.

    Returns
    -------
    xarray.DataArray
        Dimensions (model, data), with the RDM names as coordinates.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566.
    """
    check_comparison(method)
    m, d = align_rdms(models, data)
    return xr.DataArray(
        _compare(m, d, method),
        dims=("model", "data"),
        coords={"model": models["rdm_name"].values, "data": data["rdm_name"].values},
        attrs={"method": method},
        name="similarity",
    )


def rdm_noise_ceiling(data: xr.Dataset, *, method: str = "spearman") -> tuple[float, float]:
    """Lower and upper bound of the similarity that the true RDM would reach with each data RDM.

    Lower: each RDM against the pooled others; upper: against all, itself included.

    Parameters
    ----------
    data : xarray.Dataset
        ``rdms`` schema, at least two RDMs (subjects).
    method : str
        One of `brainalign.evaluation.rdm_bootstrap.COMPARISONS`.

    References
    ----------
    Nili et al. (2014), PLoS Computational Biology 10, e1003553.
    """
    from rsatoolbox.inference import boot_noise_ceiling

    check_comparison(method)
    if data.sizes["rdm_name"] < 2:
        raise SchemaError("A noise ceiling needs at least two RDMs (subjects); there is one.")
    lower, upper = boot_noise_ceiling(_toolbox(data), method=method)
    return float(lower), float(upper)


def evaluate_rdms(
    models: xr.Dataset,
    data: xr.Dataset,
    *,
    method: str = "spearman",
    over: str = "stimuli",
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    device: str = "cpu",
) -> xr.Dataset:
    r"""Compare model RDMs with the RDMs of subjects, with intervals and tests.

    The value of a model is its mean similarity with the data RDMs. Its standard error comes from
    a bootstrap over stimuli, over subjects, or over both with the two-factor correction of
    Schuett et al.; pairs of a stimulus with its own copy are left out. Intervals are
    :math:`value \pm t_{dof} \, se`.

    Parameters
    ----------
    models : xarray.Dataset
        ``rdms`` schema: layers, baselines.
    data : xarray.Dataset
        ``rdms`` schema: one RDM per subject.
    method : str
        One of `brainalign.evaluation.rdm_bootstrap.COMPARISONS`.
    over : {"stimuli", "subjects", "both"}
        What the conclusions generalise to.
    n_bootstrap : int
        Number of samples.
    level : float
        Coverage of the intervals.
    seed : int
        Seed.
    device : str
        Where the bootstrap is computed: "cpu", "cuda" or "auto".

    Returns
    -------
    xarray.Dataset
        ``value, low, high, se, p`` (model): p two-sided against 0; ``per_subject`` (model, data);
        ``difference, p_difference`` (model, model_2); ``ceiling`` (bound: lower, upper), NaN with
        one data RDM. p-values are not corrected for the number of models.

    Raises
    ------
    ConfigError
        If subjects are to be resampled and there is one, or an option is unknown.

    References
    ----------
    Schuett et al. (2023), eLife 12, e82566, eq. 7-9.
    """
    if over not in ("stimuli", "subjects", "both"):
        raise ConfigError(f"over is {over!r}; expected 'stimuli', 'subjects' or 'both'.")
    names = models["rdm_name"].values.astype(str)
    subjects = data["rdm_name"].values.astype(str)
    n, n_subjects = data.sizes["stimulus"], len(subjects)
    if over != "stimuli" and n_subjects < 2:
        raise ConfigError(
            f"over={over!r} needs at least two data RDMs; there is {n_subjects}.",
            'Use over="stimuli".',
        )
    similarity = compare_rdms(models, data, method=method)
    ids = models["stimulus_id"].values.astype(str).tolist()
    stimuli, drawn = draw_samples(n, n_subjects, n_bootstrap, seed=seed)
    samples = bootstrap_values(
        lambda counts: resampled_similarity(
            models["rdm"].values, _reorder(data, ids), counts, method=method, device=device
        ),
        similarity.values,
        stimuli,
        drawn,
        over,
    )
    good = np.isfinite(samples).all(axis=(0, 2))
    if good.sum() < 2:
        raise ConfigError(f"Only {int(good.sum())} of {n_bootstrap} bootstrap samples are usable.")
    samples = samples[:, good]
    sizes = {"both": (n_subjects, n), "subjects": (n_subjects,), "stimuli": (n,)}[over]
    dof = min(sizes) - 1
    value = similarity.values.mean(axis=1)
    se = np.sqrt(corrected_variance(samples.var(axis=1, ddof=1), sizes))
    half = se * stats.t.ppf((1 + level) / 2, dof)
    difference = value[:, None] - value[None, :]
    pairs = samples[..., :, None] - samples[..., None, :]
    spread = np.sqrt(corrected_variance(pairs.var(axis=1, ddof=1), sizes))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(value / se), dof)
        p_difference = 2 * stats.t.sf(np.abs(difference / spread), dof)
    np.fill_diagonal(p_difference, 1.0)
    ceiling = rdm_noise_ceiling(data, method=method) if n_subjects > 1 else (np.nan, np.nan)
    return xr.Dataset(
        {
            "value": ("model", value),
            "low": ("model", value - half),
            "high": ("model", value + half),
            "se": ("model", se),
            "p": ("model", p),
            "per_subject": (("model", "data"), similarity.values),
            "difference": (("model", "model_2"), difference),
            "p_difference": (("model", "model_2"), p_difference),
            "ceiling": ("bound", np.asarray(ceiling)),
        },
        coords={"model": names, "model_2": names, "data": subjects, "bound": ["lower", "upper"]},
        attrs={
            "method": method, "over": over, "n_bootstrap": n_bootstrap, "level": level,
            "seed": seed, "n_stimuli": n, "n_subjects": n_subjects,
            "measure": str(data.attrs.get("measure", "")),
        },
    )  # fmt: skip


def bootstrap_values(
    resampled: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    whole: NDArray[np.float64],
    stimuli: NDArray[np.float64],
    subjects: NDArray[np.float64],
    over: str,
) -> NDArray[np.float64]:
    """Mean similarity over subjects in every sample: (factor, sample, model).

    Factors are (both, subjects, stimuli), as rsatoolbox orders them, or the one that is `over`.
    """
    weights = subjects / subjects.sum(axis=1, keepdims=True)
    by_subjects = weights @ whole.T
    if over == "subjects":
        return by_subjects[None]
    values = resampled(stimuli)
    by_stimuli = values.mean(axis=2)
    if over == "stimuli":
        return by_stimuli[None]
    return np.stack([np.einsum("bmd,bd->bm", values, weights), by_subjects, by_stimuli])


def _compare(a: NDArray[np.float64], b: NDArray[np.float64], method: str) -> NDArray[np.float64]:
    from rsatoolbox.rdm import compare

    similarity: Any = compare
    return np.asarray(similarity(a, b, method))


def corrected_variance(variances: NDArray[np.float64], n: Sequence[int]) -> NDArray[np.float64]:
    """Return the sampling variance from bootstraps over one factor, or (both, subjects, stimuli).

    A bootstrap over both factors counts the noise twice; the correction is bounded below by what
    each factor alone gives and above by the bootstrap over both.
    """
    if len(variances) == 1:
        return np.asarray(variances[0] * n[0] / (n[0] - 1))
    both, subjects, stimuli = variances
    interaction = both - subjects - stimuli
    one, two = (k / (k - 1) for k in n)
    least = np.maximum(one * subjects, two * stimuli)
    value = one * subjects + two * stimuli - one * two * interaction
    return np.asarray(np.minimum(np.maximum(value, least), both))


def _patterns(
    patterns: xr.Dataset | ArrayLike, stimulus_id: Sequence[str] | None, fold: str
) -> tuple[NDArray[np.float64], list[str], NDArray[Any] | None, str]:
    if not isinstance(patterns, xr.Dataset):
        values = np.asarray(patterns, dtype=np.float64)
        if values.ndim != 2 or stimulus_id is None or len(stimulus_id) != len(values):
            raise SchemaError(
                f"Patterns of shape {values.shape} need one stimulus_id per row; got "
                f"{None if stimulus_id is None else len(stimulus_id)}."
            )
        return values, [str(s) for s in stimulus_id], None, "rdm"
    if "features" in patterns:
        validate(patterns, "features")
        variable, rows, label = "features", "stimulus", str(patterns["layer"].values)
    else:
        validate(patterns, "responses")
        variable, rows = "responses", "presentation"
        label = str(np.ravel(patterns["subject"].values)[0]) if "subject" in patterns else "rdm"
    if rows not in patterns[variable].dims or "stimulus_id" not in patterns.coords:
        raise SchemaError(f"{variable} need dimension {rows!r} with stimulus_id; time has none.")
    ids = patterns["stimulus_id"].values.astype(str).tolist()
    folds = patterns[fold].values if fold in patterns.coords else None
    return np.asarray(patterns[variable].values, dtype=np.float64), ids, folds, label or "rdm"


def _known_stimuli(wanted: Sequence[str], known: Sequence[str]) -> None:
    there = set(known)
    missing = [s for s in wanted if s not in there]
    if missing:
        raise UnknownNameError(
            f"{len(missing)} of {len(wanted)} stimuli have no pattern, the first is "
            f"{missing[0]!r}.{near(missing[0], there)}"
        )


def _reorder(ds: xr.Dataset, ids: list[str]) -> NDArray[np.float64]:
    own = ds["stimulus_id"].values.astype(str).tolist()
    missing, extra = sorted(set(ids) - set(own)), sorted(set(own) - set(ids))
    if missing or extra:
        raise SchemaError(
            f"The RDMs hold different stimuli: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} extra {extra[:3]}.",
            "Select the shared stimuli first.",
        )
    place = {s: i for i, s in enumerate(own)}
    order = np.array([place[s] for s in ids])
    return np.asarray(ds["rdm"].values[:, order][:, :, order], dtype=np.float64)


def _vectors(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    i, j = np.triu_indices(matrices.shape[1], 1)
    return np.asarray(matrices[:, i, j], dtype=np.float64)


def _toolbox(rdms: xr.Dataset) -> Any:
    from rsatoolbox.rdm import RDMs

    return RDMs(_vectors(rdms["rdm"].values))


def choose_layer_rsa(
    models: xr.Dataset,
    data: xr.Dataset,
    *,
    method: str = "spearman",
    n_halvings: int = 10,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Similarity of a model whose layer is chosen on stimuli that do not enter the value.

    The stimuli are halved at random; the layer with the largest mean similarity in one half is
    scored in the other, and the reverse. The value is the mean over halvings, its interval that of
    a jackknife over stimuli.

    Parameters
    ----------
    models : xarray.Dataset
        ``rdms`` schema: the layers of one model.
    data : xarray.Dataset
        ``rdms`` schema: what they are compared with.
    method : str
        One of `brainalign.evaluation.rdm_bootstrap.COMPARISONS`.
    n_halvings : int
        Random halvings of the stimuli.
    level : float
        Coverage of the interval.
    seed : int
        Seed.

    Returns
    -------
    xarray.Dataset
        ``value, low, high, se``, and ``share`` (model): how often each layer was chosen.

    Raises
    ------
    SchemaError
        If there are fewer than 8 stimuli.
    """
    names = models["rdm_name"].values.astype(str)
    ids = models["stimulus_id"].values.astype(str).tolist()
    m, d = np.asarray(models["rdm"].values, dtype=np.float64), _reorder(data, ids)
    n = len(ids)
    if n < 8:
        raise SchemaError(f"Halving needs at least 8 stimuli; there are {n}.")
    rng = np.random.default_rng(seed)
    halvings = [rng.permutation(n) for _ in range(n_halvings)]

    # Two halves of every halving, for all stimuli and with each left out.
    halves = np.zeros((n + 1, n_halvings, 2, n))
    for left_out in range(-1, n):
        for k, order in enumerate(halvings):
            kept = order[order != left_out]
            halves[left_out, k, 0, kept[: n // 2]] = 1
            halves[left_out, k, 1, kept[n // 2 :]] = 1
    scores = resampled_similarity(m, d, halves.reshape(-1, n), method=method).mean(axis=2)
    here = scores.reshape(n + 1, n_halvings, 2, len(names))
    best = here.argmax(axis=3)[..., None]
    values = np.take_along_axis(here[:, :, ::-1], best, axis=3).mean(axis=(1, 2, 3))
    # The last is that of all stimuli.
    estimate, jackknife = float(values[-1]), values[:-1]
    share = np.bincount(best[-1].ravel(), minlength=len(names)) / best[-1].size
    se = float(np.sqrt((n - 1) / n * ((jackknife - jackknife.mean()) ** 2).sum()))
    half = se * float(stats.t.ppf((1 + level) / 2, n - 1))
    return xr.Dataset(
        {
            "value": estimate,
            "low": estimate - half,
            "high": estimate + half,
            "se": se,
            "share": ("model", share),
        },
        coords={"model": names},
        attrs={"method": method, "n_halvings": n_halvings, "level": level, "seed": seed},
    )
