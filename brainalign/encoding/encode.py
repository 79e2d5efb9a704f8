"""Voxel-wise encoding models: from features and responses to honest scores and an encoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.schema import validate
from brainalign.data.splits import Split
from brainalign.data.store import atomic_dir, read, write
from brainalign.encoding.align import Aligned, Splits, align, make_splits
from brainalign.encoding.model import encoder_dataset, fit_all
from brainalign.encoding.nested import NestedPredictions, check_inner, group_best, nested_cv
from brainalign.encoding.selection import check_double_dipping
from brainalign.errors import ConfigError, SchemaError, UnavailableError
from brainalign.evaluation.ceilings import noise_ceiling, normalised_score
from brainalign.evaluation.significance import (
    fdr,
    max_statistic_p,
    permutation_p,
    permutation_test,
)
from brainalign.linear.ridge import DEFAULT_ALPHAS, check_alphas, warn_edges
from brainalign.linear.solvers import resolve_device

__all__ = ["EncodingResult", "deviations", "encode", "read_result", "write_result"]

logger = logging.getLogger(__name__)

PERMUTATIONS = ("auto", "predictions", "pooled", "refit", "none")
#: Permuted columns that are fitted at once, at least one whole permutation.
COLUMNS_IN_FLIGHT = 20_000


@dataclass
class EncodingResult:
    """Scores, predictions and encoders of one subject and one model.

    Parameters
    ----------
    scores : Dataset
        ``scores`` schema (layer, neuroid): r, r2, normalised, p, q, alpha; ceiling (neuroid).
    best : Dataset
        ``scores`` schema (neuroid): the same for the layer chosen in the training folds, with
        ``best_layer`` (chosen on all data, as the encoders), ``layer_agreement`` (share of folds
        that chose it) and, where it was computed, ``p_max`` (family-wise).
    predictions : Dataset
        ``measured``, ``predicted`` (presentation, neuroid), ``predicted_layer`` (layer,
        presentation, neuroid) and ``training_mean`` (fold, neuroid); coordinates stimulus_id and
        fold.
    encoder : Dataset
        ``encoder`` schema: all neuroids, on the layer that is best for all of them together.
    encoders : dict of layer to Dataset
        ``encoder`` schema: each neuroid on the layer chosen for it.
    exclusions : list of str
        What was left out, with counts.
    """

    scores: xr.Dataset
    best: xr.Dataset
    predictions: xr.Dataset
    encoder: xr.Dataset
    encoders: dict[str, xr.Dataset]
    exclusions: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The name of the model."""
        return str(self.scores["model"].values)

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return [str(n) for n in self.scores["layer"].values]


def encode(
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    responses: xr.Dataset,
    *,
    splits: Splits = 5,
    alphas: float | Sequence[float] = DEFAULT_ALPHAS,
    inner_cv: int | str = 5,
    choose: str = "neuroid",
    repetitions: str = "average",
    stimuli: str = "exact",
    bad_neuroids: str = "exclude",
    stimulus_sha256: Mapping[str, str] | None = None,
    allow_leak: bool = False,
    ceiling: ArrayLike | None = None,
    repeats: int | None = None,
    ceiling_threshold: float = 0.1,
    permutation: str = "auto",
    n_permutations: int = 1000,
    seed: int = 0,
    device: str = "auto",
    target_batch: int | None = None,
) -> EncodingResult:
    r"""Fit and score encoding models of every layer, with the layer chosen by nested validation.

    .. math:: y_t = w_t^\top z(x) + b_t, \qquad
              \min_{w, b} \|y_t - \hat y_t\|^2 + \alpha_t \|w_t\|^2

    In each outer fold, features are z-scored by the training rows, and alphas (per neuroid and
    layer) and layers (per neuroid, ROI, or one for all) are chosen by validation inside the
    training rows. The reported scores come from test rows that took no part in any choice.

    Parameters
    ----------
    features : dict of layer to Dataset, or Dataset
        ``features`` schema.
    responses : Dataset
        ``responses`` schema (presentation, neuroid), one subject.
    splits : int or sequence of (train, test)
        K folds over stimuli; or pairs of row numbers (of `align`), masks or stimulus ids.
    alphas : float or sequence of float
        Grid of penalties, for z-scored features.
    inner_cv : int, "loo" or "gcv"
        How alphas and layers are scored inside the training rows: K folds over stimuli,
        leave-one-out, or generalised cross-validation. The last two leave out single rows and need
        one row a stimulus.
    choose : {"neuroid", "roi", "all"}
        Which neuroids share their layer. ROIs are those of the ``roi`` coordinate; neuroids
        outside all of them share one.
    repetitions, stimuli, bad_neuroids
        See `align`.
    stimulus_sha256 : dict of stimulus id to hash, optional
        Content hashes for the leak check.
    allow_leak : bool
        Warn of, instead of refusing, stimuli on both sides of a split.
    ceiling : array-like, shape (n_neuroids,), optional
        Noise ceiling in units of r^2, for the neuroids of `responses`. By default from ncsnr,
        which is measured from repeats or read from the responses.
    repeats : int, optional
        Presentations that each row of the responses is already the mean of.
    ceiling_threshold : float
        Neuroids with a lower ceiling get no normalised score; they are counted.
    permutation : {"auto", "predictions", "pooled", "refit", "none"}
        "predictions" exchanges the measured test rows: exact for one held-out test set, not for
        K folds, whose predictions depend on each other's test rows. "refit" exchanges the rows of
        the data and repeats everything, choices included. "pooled" does this for random neuroids
        and pools their null distribution (each neuroid must choose its own layer). "auto" takes
        "predictions" for one split, "pooled" for K folds, or "refit" where layers are shared.
    n_permutations : int
        Exchanges; for "pooled", draws of a neuroid and an exchange.
    seed : int
        Seed of folds and permutations.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` ...
    target_batch : int, optional
        Neuroids in flight.

    Returns
    -------
    EncodingResult

    Raises
    ------
    SchemaError
        Missing or extra stimuli, NaN or constant neuroids or features.
    LeakError
        A stimulus in train and test, or neuroids chosen on test stimuli.
    ConfigError
        Options that cannot be used.

    References
    ----------
    Naselaris et al. (2011), NeuroImage 56, 400-410.
    """
    for name, value, allowed in (
        ("choose", choose, ("neuroid", "roi", "all")),
        ("permutation", permutation, PERMUTATIONS),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
    grid = check_alphas(alphas)
    check_inner(inner_cv)
    resolve_device(device)
    if permutation != "none" and n_permutations < 1:
        raise ConfigError(f'n_permutations is {n_permutations}; use permutation="none" for none.')
    if target_batch is not None and target_batch < 1:
        raise ConfigError(f"target_batch is {target_batch}; expected at least 1.")
    aligned = align(
        features, responses, repetitions=repetitions, stimuli=stimuli, bad_neuroids=bad_neuroids,
        repeats=repeats,
    )  # fmt: skip
    pairs = make_splits(
        aligned, splits, seed=seed, stimulus_sha256=stimulus_sha256, allow_leak=allow_leak
    )
    tested = np.unique(aligned.row_id[np.concatenate([test for _, test in pairs])])
    check_double_dipping(responses, tested.tolist())
    mode = _permutation_mode(permutation, len(pairs), choose)
    check_inner(inner_cv, aligned.row_stimulus)
    nc = _ceiling(ceiling, aligned, responses, np.sort(np.concatenate([test for _, test in pairs])))
    _check_exchange(mode, aligned, pairs)
    groups = _groups(aligned.neuroids, choose)
    options: dict[str, Any] = {
        "alphas": grid,
        "inner_cv": inner_cv,
        "row_groups": aligned.row_stimulus,
        "seed": seed,
        "device": device,
        "target_batch": target_batch,
    }
    X = {name: aligned.rows(name) for name in aligned.features}
    Y = aligned.responses
    n = Y.shape[1]
    rng = np.random.default_rng([seed, 1])
    null: NDArray[np.float32] | None = None
    if mode == "pooled":
        null = _pooled_columns(aligned, n_permutations, rng)
        shared = np.concatenate([groups, groups.max() + 1 + np.arange(null.shape[1])])
        out = nested_cv(X, np.hstack([Y, null]), pairs, target_groups=shared, keep=n, **options)
    else:
        out = nested_cv(X, Y, pairs, target_groups=groups, **options)

    fits = {name: fit_all(aligned, name, grid, inner_cv, seed, device, target_batch) for name in X}
    score = np.stack([f.score.cpu().numpy() for f in fits.values()])
    final, overall = _final_choice(score, groups)
    if len(grid) > 1:
        index = np.stack([f.index.cpu().numpy() for f in fits.values()])
        here = np.arange(n)
        warn_edges(index[final, here], score[final, here], grid)

    predictions = _predictions(aligned, out)
    p, p_layer, p_max = _significance(
        mode, out, predictions, aligned, X, pairs, groups, options, n_permutations, seed, rng
    )
    alpha = np.stack([f.alpha.cpu().numpy() for f in fits.values()])
    common = _attrs(
        aligned, grid, inner_cv, choose, mode, n_permutations, seed, len(pairs), repetitions,
        ceiling_threshold, tested,
    )  # fmt: skip
    if "selections" in responses.attrs:
        common["selections"] = responses.attrs["selections"]
    scores, _ = _scores(
        aligned, out.r_layer[:, :n], out.r2_layer[:, :n], p_layer, alpha, nc, ceiling_threshold,
        list(X),
    )  # fmt: skip
    best, n_low = _scores(
        aligned, out.r[:n], out.r2[:n], p, alpha[final, np.arange(n)], nc, ceiling_threshold, None
    )
    best["best_layer"] = ("neuroid", np.asarray(list(X))[final])
    best["layer_agreement"] = ("neuroid", (out.choice[:, :n] == final).mean(axis=0))
    if p_max is not None:
        best["p_max"] = ("neuroid", p_max)
    scores.attrs.update(common)
    best.attrs.update(common)
    exclusions = [f"{c} neuroids: {reason}" for reason, c in aligned.excluded.items()]
    if nc is not None and n_low:
        exclusions.append(
            f"{n_low} of {n} neuroids have a noise ceiling below {ceiling_threshold:g} or none: "
            "no normalised score"
        )
    undefined = int(np.isnan(best["r"].values).sum())
    if undefined:
        exclusions.append(f"{undefined} of {n} neuroids have no score (constant in the test rows)")
    left_out = len(np.unique(responses["stimulus_id"].values)) - len(aligned.stimulus_id)
    if left_out:
        exclusions.append(f"{left_out} stimuli of the responses have no features")
    names = list(X)
    layer = names[overall]
    return EncodingResult(
        scores=validate(scores, "scores"),
        best=validate(best, "scores"),
        predictions=predictions,
        encoder=encoder_dataset(
            aligned, layer, fits[layer], np.arange(n), target_batch=target_batch
        ),
        encoders={
            name: encoder_dataset(
                aligned, name, fits[name], np.flatnonzero(final == i), target_batch=target_batch
            )
            for i, name in enumerate(names)
            if (final == i).any()
        },
        exclusions=exclusions,
    )


def deviations(
    predictions: xr.Dataset, layer: str | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measured and predicted responses as deviations from the training mean of their fold.

    Parameters
    ----------
    predictions : Dataset
        Of an `EncodingResult`.
    layer : str, optional
        A layer; by default the prediction by nested choice.

    Returns
    -------
    measured, predicted : ndarray, shape (n_tested, n_neuroids)
    """
    mean = predictions["training_mean"].values[predictions["fold"].values]
    if layer is None:
        predicted = predictions["predicted"].values
    else:
        predicted = predictions["predicted_layer"].sel(layer=layer).values
    measured = predictions["measured"].values
    return (measured - mean).astype(np.float64), (predicted - mean).astype(np.float64)


def write_result(
    result: EncodingResult,
    folder: str | Path,
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result as a folder of artefacts, atomically.

    The folder holds ``scores.zarr``, ``best.zarr``, ``predictions.zarr``, ``encoder.zarr``,
    ``encoders/NN.zarr`` (one per chosen layer) and ``result.json``.
    """
    with atomic_dir(folder, overwrite=overwrite) as made:
        for name, kind in (("scores", "scores"), ("best", "scores"), ("encoder", "encoder")):
            write(getattr(result, name), made / f"{name}.zarr", kind, provenance=provenance)
        write(result.predictions, made / "predictions.zarr", None, provenance=provenance)
        (made / "encoders").mkdir()
        for i, ds in enumerate(result.encoders.values()):
            write(ds, made / "encoders" / f"{i:02d}.zarr", "encoder", provenance=provenance)
        record = {"layers": list(result.encoders), "exclusions": result.exclusions}
        (made / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Path(folder)


def read_result(folder: str | Path) -> EncodingResult:
    """Read what `write_result` wrote.

    Raises
    ------
    UnavailableError
        If the folder holds no result.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        raise UnavailableError(f"{folder} holds no encoding result (result.json).")
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return EncodingResult(
        scores=read(folder / "scores.zarr", "scores"),
        best=read(folder / "best.zarr", "scores"),
        predictions=read(folder / "predictions.zarr"),
        encoder=read(folder / "encoder.zarr", "encoder"),
        encoders={
            name: read(folder / "encoders" / f"{i:02d}.zarr", "encoder")
            for i, name in enumerate(record["layers"])
        },
        exclusions=record["exclusions"],
    )


def _permutation_mode(permutation: str, n_splits: int, choose: str) -> str:
    if permutation == "auto":
        if n_splits == 1:
            return "predictions"
        return "pooled" if choose == "neuroid" else "refit"
    if permutation == "pooled" and choose != "neuroid":
        raise ConfigError(
            f'permutation="pooled" needs choose="neuroid"; it is {choose!r}.',
            'Use permutation="refit".',
        )
    if permutation == "predictions" and n_splits > 1:
        logger.warning(
            "Exchanging the predictions of %d folds is not exact: each fold's prediction depends "
            "on the other folds' test rows. Use permutation='pooled' or 'refit'.",
            n_splits,
        )
    return permutation


def _check_exchange(mode: str, aligned: Aligned, pairs: list[Split]) -> None:
    """Refuse exchanges that the rows do not allow."""
    if mode == "predictions":
        tested = aligned.row_stimulus[np.concatenate([test for _, test in pairs])]
        if len(np.unique(tested)) < len(tested):
            raise ConfigError(
                "Test rows that repeat a stimulus cannot be exchanged one by one.",
                'Average them (repetitions="average") or use permutation="refit".',
            )
    elif mode != "none":
        count = np.bincount(aligned.row_stimulus)
        if count.min() < count.max():
            raise ConfigError(
                f"Stimuli with {count.min()} to {count.max()} rows cannot be exchanged.",
                'Average them (repetitions="average") or use permutation="none".',
            )


def _groups(neuroids: xr.Dataset, choose: str) -> NDArray[np.int64]:
    n = neuroids.sizes["neuroid"]
    if choose == "all":
        return np.zeros(n, dtype=np.int64)
    if choose == "roi":
        names = neuroids["roi"].values.astype(str)
        return np.unique(names, return_inverse=True)[1].astype(np.int64)
    return np.arange(n)


def _exchange(aligned: Aligned, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return a row order that exchanges stimuli: all presentations of one move together."""
    n = len(aligned.stimulus_id)
    if len(aligned.responses) == n:
        return rng.permutation(n)
    rows = [np.flatnonzero(aligned.row_stimulus == s) for s in range(n)]
    order = np.empty(len(aligned.responses), dtype=np.intp)
    for to, source in enumerate(rng.permutation(n)):
        order[rows[to]] = rows[source]
    return order


def _pooled_columns(aligned: Aligned, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    Y = aligned.responses
    which = rng.integers(Y.shape[1], size=n)
    return np.stack([Y[_exchange(aligned, rng), v] for v in which], axis=1)


def _significance(
    mode: str,
    out: NestedPredictions,
    predictions: xr.Dataset,
    aligned: Aligned,
    X: dict[str, NDArray[np.float32]],
    pairs: list[Split],
    groups: NDArray[np.int64],
    options: dict[str, Any],
    n_permutations: int,
    seed: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    n = aligned.responses.shape[1]
    if mode == "none":
        return np.full(n, np.nan), np.full((len(X), n), np.nan), None
    if mode == "pooled":
        p = _from_null(out.r[:n], out.r[n:])
        layers = [_from_null(r[:n], r[n:]) for r in out.r_layer]
        return p, np.stack(layers), None
    if mode == "predictions":
        tests = [
            permutation_test(
                *deviations(predictions, layer), n_permutations=n_permutations, seed=seed
            )
            for layer in (None, *X)
        ]
        return tests[0].p, np.stack([t.p for t in tests[1:]]), tests[0].p_max
    hits = np.zeros((1 + len(X), n))
    null_max = []
    per_batch = max(1, COLUMNS_IN_FLIGHT // n)
    observed = np.vstack([out.r, out.r_layer])
    for start in range(0, n_permutations, per_batch):
        count = min(per_batch, n_permutations - start)
        permuted = [aligned.responses[_exchange(aligned, rng)] for _ in range(count)]
        shared = np.concatenate([groups + i * (groups.max() + 1) for i in range(count)])
        null = nested_cv(X, np.hstack(permuted), pairs, target_groups=shared, keep=0, **options)
        r = np.vstack([null.r, null.r_layer]).reshape(1 + len(X), count, n)
        hits += (np.nan_to_num(r, nan=-np.inf) >= observed[:, None] - 1e-12).sum(axis=1)
        null_max.append(np.nanmax(r[0], axis=1))
    p = np.where(np.isnan(observed), np.nan, permutation_p(hits, n_permutations))
    return p[0], p[1:], max_statistic_p(out.r, np.concatenate(null_max))


def _from_null(r: NDArray[np.float64], null: NDArray[np.float64]) -> NDArray[np.float64]:
    null = np.sort(np.nan_to_num(null, nan=-np.inf))
    hits = len(null) - np.searchsorted(null, r - 1e-12, side="left")
    return np.where(np.isnan(r), np.nan, permutation_p(hits, len(null)))


def _final_choice(
    score: NDArray[np.float64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    import torch

    tensor = torch.as_tensor(score)
    final = group_best(tensor, torch.as_tensor(groups)).numpy()
    everyone = group_best(tensor, torch.zeros(score.shape[1], dtype=torch.int64))
    return final, int(everyone[0])


def _ceiling(
    ceiling: ArrayLike | None,
    aligned: Aligned,
    responses: xr.Dataset,
    rows: NDArray[np.intp],
) -> NDArray[np.float64] | None:
    if ceiling is None:
        return (
            None if aligned.ncsnr is None else noise_ceiling(aligned.ncsnr, aligned.repeats[rows])
        )
    values = np.asarray(ceiling, dtype=np.float64)
    if values.shape != (responses.sizes["neuroid"],):
        raise SchemaError(
            f"ceiling has shape {values.shape}; expected ({responses.sizes['neuroid']},)."
        )
    names = responses["neuroid_id"].values.astype(str).tolist()
    place = {name: i for i, name in enumerate(names)}
    kept = aligned.neuroids["neuroid_id"].values.astype(str).tolist()
    return values[[place[name] for name in kept]]


def _predictions(aligned: Aligned, out: NestedPredictions) -> xr.Dataset:
    dims = ("presentation", "neuroid")
    ds = xr.Dataset(
        {
            "measured": (dims, aligned.responses[out.rows]),
            "predicted": (dims, out.predicted),
            "predicted_layer": (("layer", *dims), out.predicted_layer),
            "training_mean": (("fold_number", "neuroid"), out.training_mean),
        },
        coords={
            "stimulus_id": ("presentation", aligned.row_id[out.rows]),
            "fold": ("presentation", out.fold),
            "repeats": ("presentation", aligned.repeats[out.rows]),
            "layer": list(aligned.features),
        },
        attrs={"units": str(aligned.attrs.get("units", ""))},
    )
    return ds.merge(aligned.neuroids, combine_attrs="override")


def _scores(
    aligned: Aligned,
    r: NDArray[np.float64],
    r2: NDArray[np.float64],
    p: NDArray[np.float64],
    alpha: NDArray[np.float64],
    ceiling: NDArray[np.float64] | None,
    threshold: float,
    layers: list[str] | None,
) -> tuple[xr.Dataset, int]:
    dims = ("neuroid",) if layers is None else ("layer", "neuroid")
    nc = np.full(r.shape[-1], np.nan) if ceiling is None else ceiling
    normalised, n_low = normalised_score(r, nc, threshold=threshold)
    q = fdr(p) if layers is None else np.stack([fdr(row) for row in p])
    values = {"r": r, "r2": r2, "normalised": normalised, "p": p, "q": q, "alpha": alpha}
    ds = xr.Dataset({name: (dims, v) for name, v in values.items()})
    ds["ceiling"] = ("neuroid", nc)
    if layers is not None:
        ds = ds.assign_coords(layer=layers)
    if aligned.ncsnr is not None:
        ds["ncsnr"] = ("neuroid", aligned.ncsnr)
        ds = ds.set_coords("ncsnr")
    meta = next(iter(aligned.meta.values()))
    ds = ds.assign_coords(model=str(meta["model"].values))
    rest = aligned.neuroids.drop_vars("ncsnr", errors="ignore")
    return ds.merge(rest, combine_attrs="override"), n_low


def _attrs(
    aligned: Aligned,
    grid: NDArray[np.float64],
    inner_cv: int | str,
    choose: str,
    mode: str,
    n_permutations: int,
    seed: int,
    n_folds: int,
    repetitions: str,
    threshold: float,
    tested: NDArray[np.str_],
) -> dict[str, Any]:
    return {
        "subject": str(aligned.attrs.get("subject", "")),
        "space": str(aligned.attrs.get("space", "")),
        "units": str(aligned.attrs.get("units", "")),
        "folds": n_folds,
        "inner_cv": str(inner_cv),
        "alphas": [float(a) for a in grid],
        "choose": choose,
        "permutation": mode,
        "permutations": 0 if mode == "none" else n_permutations,
        "seed": seed,
        "repetitions": repetitions,
        "n_stimuli": len(aligned.stimulus_id),
        "n_tested": len(tested),
        "mean_repeats": float(aligned.repeats.mean()),
        "ceiling_threshold": threshold,
        "stimuli": json.dumps(aligned.stimulus_id.tolist()),
    }
