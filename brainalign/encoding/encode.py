"""Voxel-wise encoding models: from features and responses to honest scores and an encoder."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from brainalign.data.schema import validate
from brainalign.data.splits import Split
from brainalign.data.store import fingerprint, sha256_of
from brainalign.device import resolve_devices
from brainalign.encoding.align import (
    Aligned,
    Splits,
    align,
    content_keys,
    make_splits,
    neuroid_coords,
)
from brainalign.encoding.blocks import Plan, Sizes, neuroid_chunk, part_slice, plan_blocks
from brainalign.encoding.fits import REGRESSIONS, Regression
from brainalign.encoding.gather import gather
from brainalign.encoding.model import Choices, encoder_dataset, fit_all
from brainalign.encoding.nested import (
    ALL_ROWS,
    NestedPredictions,
    Solvers,
    check_inner,
    group_best,
    nested_cv,
)
from brainalign.encoding.partition import FULL, JOINED, METHODS, models_of, shares_of
from brainalign.encoding.result import EncodingResult, read_result, write_result
from brainalign.encoding.rois import ALL_ROIS, NESTED, RoiSums, roi_members
from brainalign.encoding.selection import check_double_dipping
from brainalign.encoding.timeseries import Timing, as_rows
from brainalign.errors import ConfigError, SchemaError, near
from brainalign.evaluation import product_measure
from brainalign.evaluation.ceilings import noise_ceiling, normalised_score
from brainalign.evaluation.significance import PermutationTest, permutation_p, permutation_test
from brainalign.linear.ridge import DEFAULT_ALPHAS, check_alphas

__all__ = ["encode"]

logger = logging.getLogger(__name__)

PERMUTATIONS = ("auto", "predictions", "pooled", "refit", "none")
#: Permuted columns that are fitted at once, at least one whole permutation.
COLUMNS_IN_FLIGHT = 20_000


@dataclass(frozen=True)
class _Options:
    """Options of `encode` that its steps need."""

    grid: NDArray[np.float64]
    inner_cv: int | str
    choose: str
    mode: str
    n_permutations: int
    n_bootstrap: int
    threshold: float
    keep_predictions: bool
    repetitions: str
    seed: int
    device: str
    target_batch: int | None
    regression: Regression
    partition: str


def encode(
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    responses: xr.Dataset,
    *,
    splits: Splits = 5,
    regression: str = "ridge",
    spaces: Mapping[str, Sequence[str]] | None = None,
    partition: str = "none",
    n_iter: int = 50,
    delays: tuple[float, float] | None = None,
    direction: str = "forward",
    alphas: float | Sequence[float] = DEFAULT_ALPHAS,
    inner_cv: int | str = 5,
    choose: str = "neuroid",
    repetitions: str = "average",
    stimuli: str = "exact",
    bad_neuroids: str = "exclude",
    clusters: int | None = None,
    embedding: xr.Dataset | None = None,
    stimulus_sha256: Mapping[str, str] | None = None,
    allow_leak: bool = False,
    ceiling: ArrayLike | None = None,
    repeats: int | None = None,
    ceiling_threshold: float = 0.1,
    permutation: str = "auto",
    n_permutations: int = 1000,
    n_bootstrap: int = 1000,
    keep_predictions: bool = True,
    seed: int = 0,
    device: str | Sequence[str] = "auto",
    target_batch: int | None = None,
    memory_gib: float | None = None,
    part: tuple[int, int] | None = None,
    checkpoint: str | Path | None = None,
) -> EncodingResult:
    r"""Fit and score encoding models of every layer, with the layer chosen by nested validation.

    .. math:: y_t = w_t^\top z(x) + b_t, \qquad
              \min_{w, b} \|y_t - \hat y_t\|^2 + \alpha_t \|w_t\|^2

    Or, with ``regression="banded"``, all feature spaces s together with penalties of their own,

    .. math:: \min_{w, b} \|y_t - \hat y_t\|^2 + \sum_s \alpha_{st} \|w_{st}\|^2

    or a mixture of their predictions (`brainalign.linear.Stacking`). With `delays`, rows are
    samples of time and features are delayed (`brainalign.linear.LaggedRidge`).

    In each outer fold, features are z-scored by the training rows, and alphas (per neuroid and
    layer) and layers (per neuroid, ROI, or one for all) are chosen by validation inside the
    training rows. The reported scores come from test rows that took no part in any choice.

    Neuroids are worked on in blocks that keep `memory_gib`. Responses that lie in a store are read
    block by block, each chunk once. The size of the blocks changes no number beyond the rounding of
    float32 (the draws of a null distribution that fall on neuroids left out go to others of their
    block).

    Parameters
    ----------
    features : dict of layer to Dataset, or Dataset
        ``features`` schema.
    responses : Dataset
        ``responses`` schema (presentation, neuroid), one subject.
    splits : int or sequence of (train, test)
        K folds over stimuli; or pairs of row numbers (of `align`), masks or stimulus ids. For time
        series K folds over clips or runs, or over blocks of time where there are too few.
    regression : {"ridge", "banded", "stacking"}
        "ridge" fits the layers one by one and chooses among them; the others fit feature spaces
        together, in a model named "all". They are validated in folds.
    spaces : dict of str to sequence of str, optional
        Layers of each feature space, by their names in `features`; by default each layer is one.
    partition : {"none", "product", "leave_one_out", "subsets"}
        Divide the explained variance among the spaces; see `partition_variance`. Adds ``share``
        (part, neuroid) to ``best``, and its bootstrap sums. The last two fit more models.
    n_iter : int
        Candidate weights of the spaces, for banded ridge.
    delays : (float, float), optional
        First and last delay in seconds, for time series (time, neuroid) with features over time, or
        with features of the stimuli that they show; see `brainalign.encoding.timeseries.as_rows`.
    direction : {"forward", "backward"}
        "backward" turns the sign of the delays: a decoder, with `features` and `responses` from
        `brainalign.encoding.timeseries.backward`.
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
    clusters : int, optional
        Make the K folds of whole clusters of stimuli (`brainalign.data.splits.by_cluster`).
    embedding : Dataset, optional
        ``features`` schema: in which stimuli are clustered, the same for all models to compare.
    stimulus_sha256 : dict of stimulus id to hash, optional
        Content hashes, by which one stimulus under two names stays on one side of every split, and
        the stimuli of earlier choices (`select`, `record_choice`) are told.
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
    n_bootstrap : int
        Bootstrap samples over stimuli, for the intervals of `layer_roi` and `compare_models`; with
        0 there are none.
    keep_predictions : bool
        Keep measured and predicted responses: as large as the tested responses, twice.
    seed : int
        Seed of folds, permutations and samples.
    device : str or sequence of str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:0,cuda:1"`` ...: several share the blocks of
        neuroids (`brainalign.device.resolve_devices`), in one thread each.
    target_batch : int, optional
        Neuroids in one product.
    memory_gib : float, optional
        Most memory (GiB) that the process may hold, the program included; by default what it holds
        and half of what is free. Neuroids that share their layer must fit together.
    part : (int, int), optional
        ``(k, m)``: only the k-th of m parts of the neuroids, for `gather`.
    checkpoint : path, optional
        Folder for finished blocks. A run that was stopped goes on from there, with the same
        features, responses and options; it is removed in the end.

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
        Options that cannot be used, or too little memory.

    References
    ----------
    Naselaris et al. (2011), NeuroImage 56, 400-410.
    """
    for name, value, allowed in (
        ("choose", choose, ("neuroid", "roi", "all")),
        ("permutation", permutation, PERMUTATIONS),
        ("regression", regression, REGRESSIONS),
        ("partition", partition, ("none", *METHODS)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
    grid = check_alphas(alphas)
    check_inner(inner_cv)
    devices = resolve_devices(device)
    if permutation != "none" and n_permutations < 1:
        raise ConfigError(f'n_permutations is {n_permutations}; use permutation="none" for none.')
    if target_batch is not None and target_batch < 1:
        raise ConfigError(f"target_batch is {target_batch}; expected at least 1.")
    if n_bootstrap < 0:
        raise ConfigError(f"n_bootstrap is {n_bootstrap}; expected at least 0.")
    if part is not None and choose != "neuroid":
        raise ConfigError(
            f"choose={choose!r} needs all neuroids at once; part {part[0]} of {part[1]} holds few.",
            'Use choose="neuroid", or encode all in one piece.',
        )
    validate(responses, "responses")
    how = Regression(regression, n_iter=n_iter)
    timing = None
    if delays is not None:
        rate = responses.attrs.get("sampling_rate")
        how = replace(how, delays=delays, sampling_rate=rate, direction=direction)
        features, responses, timing = as_rows(features, responses, how.lags, stimulus_sha256)
        if clusters is not None:
            raise ConfigError("Clusters are of stimuli; time series are split by clips or time.")
    how = _together(how, features, spaces, partition)
    _check_regression(how, inner_cv, permutation)
    n = responses.sizes["neuroid"]
    within = slice(0, n)
    if part is not None:
        within = part_slice(n, neuroid_chunk(responses), part)
    options = _Options(
        grid, inner_cv, choose, permutation, n_permutations, n_bootstrap, ceiling_threshold,
        keep_predictions, repetitions, seed, str(devices[0]), target_batch, how, partition,
    )  # fmt: skip
    plan = _plan(features, responses, within, splits, options, memory_gib, devices)
    work = _Work(
        features=features,
        responses=responses,
        ceiling=_check_ceiling(ceiling, n),
        align_options={
            "repetitions": repetitions, "stimuli": stimuli, "bad_neuroids": bad_neuroids,
            "repeats": repeats,
        },
        split_options={
            "splits": splits, "clusters": clusters, "embedding": embedding,
            "stimulus_sha256": stimulus_sha256, "allow_leak": allow_leak,
        },
        options=options,
        plan=plan,
        timing=timing,
    )  # fmt: skip
    blocks = list(plan.blocks(within))
    folder = None
    if checkpoint is not None:
        folder = Path(checkpoint) / work.key(blocks)
    done = _encode_blocks(work, blocks, devices, folder)
    if not done:
        # Raises, naming what is wrong with the neuroids.
        align(features, responses.isel(neuroid=blocks[-1]), **work.align_options)
    out = gather(done)
    for reason, count in work.left_out.items():
        out.excluded[reason] = out.excluded.get(reason, 0) + count
    if part is not None:
        for ds in (out.scores, out.best):
            ds.attrs["part"] = f"{part[0]}/{part[1]}"
    if folder is not None and folder.is_dir():
        out = _loaded(out)
        shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return out


def _encode_blocks(
    work: _Work, blocks: Sequence[slice], devices: Sequence[torch.device], folder: Path | None
) -> list[EncodingResult]:
    """Encode all blocks, each by the next device that is free; those in the folder are done."""
    waiting, turn, stopped = iter(blocks), threading.Lock(), threading.Event()
    done: dict[int, EncodingResult] = {}
    progress = tqdm(
        total=len(blocks), desc="encode", unit="block", disable=None if len(blocks) > 1 else True
    )

    def worker(k: int) -> None:
        mine = work if k == 0 else None
        try:
            while True:
                if mine is None:
                    # What the blocks share is made by the first worker.
                    work.ready.wait()
                with turn:
                    block = next(waiting, None)
                if block is None or stopped.is_set():
                    return
                at = None if folder is None else folder / f"{block.start:09d}"
                if at is None or not at.is_dir():
                    mine = work.on(devices[k]) if mine is None else mine
                    result = mine.encode(block)
                    if result is not None and at is not None:
                        write_result(result, at)
                        result = read_result(at)
                else:
                    result = read_result(at)
                if result is not None:
                    done[block.start] = result
                progress.update()
        except BaseException:
            stopped.set()
            raise
        finally:
            if k == 0:
                work.ready.set()

    with progress:
        if len(devices) == 1:
            worker(0)
        else:
            # Threads that silence warnings would otherwise leave them silent.
            with warnings.catch_warnings(), ThreadPoolExecutor(len(devices)) as threads:
                for running in [threads.submit(worker, k) for k in range(len(devices))]:
                    running.result()
    return [done[start] for start in sorted(done)]


def _together(
    how: Regression,
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    spaces: Mapping[str, Sequence[str]] | None,
    partition: str,
) -> Regression:
    """Return the regression with the models that are to be fitted."""
    if how.kind == "ridge":
        if spaces is not None or partition != "none":
            raise ConfigError(
                "Feature spaces and their partition need a model of all of them; regression is "
                "'ridge'.",
                'Use regression="banded" or "stacking".',
            )
        return how
    if isinstance(features, xr.Dataset):
        raise ConfigError(f"regression={how.kind!r} needs the features of several spaces, by name.")
    own = {name: (name,) for name in features} if spaces is None else spaces
    unknown = [x for layers in own.values() for x in layers if x not in features]
    if unknown:
        raise ConfigError(
            f"There are no features {unknown[0]!r}.{near(unknown[0], features)}",
            f"Known: {', '.join(features)}.",
        )
    empty = [name for name, layers in own.items() if not layers]
    if empty or FULL in own or any(JOINED in name for name in own):
        raise ConfigError(
            f"Feature spaces need layers and names other than {FULL!r} and without {JOINED!r}; "
            f"got {dict(own)}."
        )
    sets = [tuple(own)] if partition == "none" else models_of(partition, list(own))
    models = {FULL if len(m) == len(own) else JOINED.join(m): m for m in sets}
    return replace(how, spaces={k: tuple(v) for k, v in own.items()}, models=models,
                   eligible=[FULL])  # fmt: skip


def _check_regression(how: Regression, inner_cv: int | str, permutation: str) -> None:
    """Refuse what a regression cannot do."""
    if how.kind != "ridge" and isinstance(inner_cv, str):
        raise ConfigError(
            f"inner_cv is {inner_cv!r}; regression={how.kind!r} is validated in folds.",
            "Give a number of folds.",
        )
    if how.delays is None:
        return
    if how.kind == "stacking":
        raise ConfigError("Stacking takes no delays.", 'Use regression="banded" or "ridge".')
    if isinstance(inner_cv, str):
        raise ConfigError(
            f"inner_cv is {inner_cv!r}; time series are validated in folds over clips or time.",
            "Give a number of folds.",
        )
    if permutation == "predictions":
        raise ConfigError(
            'permutation="predictions" exchanges single rows, and samples of time are not '
            "exchangeable.",
            'Use "pooled" or "refit", which shift whole trials in a circle.',
        )


def _permutation_mode(permutation: str, n_splits: int, choose: str, over_time: bool) -> str:
    if permutation == "auto":
        if n_splits == 1 and not over_time:
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


class _Work:
    """The analysis of one block of neuroids after the other, with what they share."""

    def __init__(
        self,
        features: Mapping[str, xr.Dataset] | xr.Dataset,
        responses: xr.Dataset,
        ceiling: NDArray[np.float64] | None,
        align_options: dict[str, Any],
        split_options: dict[str, Any],
        options: _Options,
        plan: Plan,
        timing: Timing | None = None,
    ) -> None:
        self.timing = timing
        #: Set once what the blocks share is made.
        self.ready = threading.Event()
        self._counting = threading.Lock()
        self.features, self.responses, self.ceiling = features, responses, ceiling
        self.align_options, self.split_options = align_options, split_options
        self.options, self.plan = options, plan
        #: Neuroids of blocks without a single usable one, by reason.
        self.left_out: dict[str, int] = {}
        self._neuroids = neuroid_coords(responses)
        self._rois = roi_members(self._neuroids)
        if len(self._rois) > 1:
            self._rois |= roi_members(self._neuroids, [ALL_ROIS])
        rng = np.random.default_rng([options.seed, 1])
        #: The neuroid of each draw of a pooled null distribution.
        self._drawn = rng.integers(responses.sizes["neuroid"], size=options.n_permutations)
        self._begun = False

    def on(self, device: torch.device) -> _Work:
        """Return the same work with solvers of its own on another device."""
        other = copy.copy(self)
        other.options = replace(self.options, device=str(device))
        other.solvers = self.solvers.on(device)
        return other

    def key(self, blocks: Sequence[slice]) -> str:
        """Name what the blocks' results depend on."""
        named = {"": self.features} if isinstance(self.features, xr.Dataset) else self.features
        values = [x for n, ds in named.items() for x in (n, fingerprint(ds, "features"))]
        values.append(fingerprint(self.responses, "responses"))
        attrs = {k: str(v) for k, v in self.responses.attrs.items()}
        given = {k: str(v) for k, v in vars(self.options).items() if k != "device"}
        splits = {
            k: fingerprint(v, "features") if isinstance(v, xr.Dataset) else _named(v)
            for k, v in self.split_options.items()
        }
        return sha256_of(
            *values, attrs, given, splits, self.align_options, [b.start for b in blocks],
            self.responses["stimulus_id"].values.astype(str),
            self._neuroids["neuroid_id"].values.astype(str),
            np.zeros(0) if self.ceiling is None else self.ceiling,
        )[:16]  # fmt: skip

    def encode(self, block: slice) -> EncodingResult | None:
        """Return the result of a block; None if it holds no neuroid that can be used."""
        data = self.responses.isel(neuroid=block)
        if not self._usable(data):
            return None
        # Features are read once: later blocks are aligned with the first feature alone.
        features = self.thin if self._begun else self.features
        aligned = align(features, data, **self.align_options)
        names = data["neuroid_id"].values.astype(str)
        del data
        if not self._begun:
            self._begin(aligned)
        aligned = replace(aligned, features={})
        kept = np.flatnonzero(np.isin(names, aligned.neuroids["neuroid_id"].values.astype(str)))
        return self._result(aligned, block, kept)

    def _usable(self, data: xr.Dataset) -> bool:
        """Whether a block of several holds a neuroid that varies; counts those of others."""
        if data.sizes["neuroid"] == self.responses.sizes["neuroid"] or (
            self.align_options["bad_neuroids"] != "exclude"
        ):
            return True
        values = np.asarray(data["responses"].values)
        finite = np.isfinite(values.sum(axis=0, dtype=np.float64))
        varies = (values != values[:1]).any(axis=0)
        if (finite & varies).any():
            return True
        for reason, bad in (("NaN or infinite", ~finite), ("constant", finite)):
            if bad.any():
                with self._counting:
                    self.left_out[reason] = self.left_out.get(reason, 0) + int(bad.sum())
        return False

    def _begin(self, aligned: Aligned) -> None:
        """Check what does not depend on the neuroids, and make what they share."""
        o = self.options
        timing, ids = self.timing, aligned.row_id
        groups: NDArray[Any]
        sha256 = self.split_options["stimulus_sha256"]
        if timing is None:
            place: dict[str, int] = {}
            keys = content_keys(ids, sha256).tolist()
            content = np.array([place.setdefault(key, len(place)) for key in keys])
            self.pairs = make_splits(aligned, seed=o.seed, **self.split_options)
            groups, trials, self.stimuli = content, None, aligned.stimulus_id.tolist()
        else:
            given = self.split_options
            self.pairs = timing.splits(
                ids, given["splits"], seed=o.seed, allow_leak=given["allow_leak"]
            )
            groups, trials = timing.groups(ids), timing.trials(ids)
            self.stimuli = timing.stimuli(ids)
        self.rows = np.sort(np.concatenate([test for _, test in self.pairs]))
        tested = ids[self.rows]
        #: Rows that are resampled together.
        self.units = tested if timing is None else timing.blocks(tested)
        self.tested = np.unique(tested).tolist() if timing is None else timing.stimuli(tested)
        source = self.features
        layers = [source] if isinstance(source, xr.Dataset) else list(source.values())
        for ds in (self.responses, *layers):
            check_double_dipping(ds, self.tested, sha256)
        mode = _permutation_mode(o.mode, len(self.pairs), o.choose, timing is not None)
        self.options = replace(o, mode=mode)
        if timing is None:
            check_inner(o.inner_cv, aligned.row_stimulus)
            twice = len(np.unique(aligned.row_stimulus)) - len(np.unique(content))
            if twice and isinstance(o.inner_cv, str):
                logger.warning(
                    "%d stimuli have the content of another. inner_cv=%r leaves them out one by "
                    "one, so that alphas are chosen too small; a number of folds keeps them "
                    "together.", twice, o.inner_cv,
                )  # fmt: skip
            _check_exchange(self.options.mode, aligned, self.pairs)
        self.solvers = Solvers(
            {name: aligned.rows(name) for name in aligned.features},
            self.pairs,
            alphas=o.grid,
            inner_cv=o.inner_cv,
            row_groups=groups,
            regression=o.regression,
            trials=trials,
            seed=o.seed,
            device=o.device,
            keep=self.plan.keep,
        )
        named = self.features
        if isinstance(named, xr.Dataset):
            named = {next(iter(aligned.features)): named}
        self.thin = {n: ds.isel(feature=slice(1)).compute() for n, ds in named.items()}
        models = dict.fromkeys(str(m["model"].values) for m in aligned.meta.values())
        self.model = " + ".join(models) if o.regression.models else next(iter(models))
        self.notes: list[str] = []
        left_out = len(np.unique(self.responses["stimulus_id"].values)) - len(aligned.stimulus_id)
        if left_out:
            self.notes.append(f"{left_out} stimuli of the responses have no features")
        self._begun = True
        self.ready.set()

    def _result(self, aligned: Aligned, block: slice, kept: NDArray[np.intp]) -> EncodingResult:
        o, layers, pairs = self.options, list(self.solvers.models), self.pairs
        Y = aligned.responses
        n = Y.shape[1]
        groups = _groups(aligned.neuroids, o.choose)
        nc = self._ceiling(aligned, block, kept)
        ids = aligned.row_id[self.rows]
        method = None if o.partition == "none" else o.partition
        sums = RoiSums(
            [*layers, NESTED],
            _within(self._rois, block, kept),
            self.units,
            aligned.neuroids["neuroid_id"].values.astype(str),
            np.where((nc >= o.threshold) & (nc > 0), nc, np.nan),
            n_bootstrap=o.n_bootstrap,
            seed=o.seed,
            device=o.device,
        )
        tests: list[PermutationTest] = []

        def each(i: int, measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> None:
            sums.add(i, measured, predicted)
            if method in ("leave_one_out", "subsets") and i < len(layers):
                sums.add_explained(self.solvers.models[layers[i]], measured, predicted)
            if o.mode == "predictions":
                tests.append(
                    permutation_test(
                        measured, predicted, n_permutations=o.n_permutations, seed=o.seed,
                        device=o.device,
                    )
                )  # fmt: skip

        if o.mode == "pooled":
            exchanged = self._exchanged(aligned, block, kept)
            shared = np.arange(n + exchanged.shape[1])
            both = np.hstack([Y, exchanged])
            out = nested_cv(
                self.solvers, both, target_groups=shared, keep=n, target_batch=o.target_batch,
                each_layer=each, parts=method == "product",
            )  # fmt: skip
            del both
        else:
            out = nested_cv(
                self.solvers, Y, target_groups=groups, target_batch=o.target_batch,
                each_layer=each, parts=method == "product",
            )  # fmt: skip
        each(len(layers), out.measured, out.predicted)
        if o.mode == "pooled":
            r = np.vstack([out.r_layer[:, n:], out.r[None, n:]])
            null = xr.Dataset({"r": (("layer", "draw"), r)}, coords={"layer": [*layers, NESTED]})
            p = np.full((len(layers) + 1, n), np.nan)
        else:
            p, null = self._p(aligned, groups, out, tests)

        fits = [fit_all(self.solvers, name, Y, o.target_batch) for name in layers]
        score = np.stack([f.score for f in fits])
        alpha = np.stack([f.alpha for f in fits])
        if o.regression.kind == "stacking":
            alpha[:] = np.nan  # each space has its own
        able = self.solvers.eligible
        final = np.array(able)[
            group_best(torch.as_tensor(score[able]), torch.as_tensor(groups)).numpy()
        ]
        here = np.arange(n)
        attrs = _attrs(aligned, o, len(pairs), self.tested, self.stimuli)
        hashes = self.split_options["stimulus_sha256"]
        if hashes is not None:
            attrs["stimuli_sha256"] = json.dumps([hashes.get(s, "") for s in self.stimuli])
        if self.split_options["clusters"] is not None:
            attrs["clusters"] = self.split_options["clusters"]
        if "selections" in self.responses.attrs:
            attrs["selections"] = self.responses.attrs["selections"]
        scores = _scores(
            aligned, out.r_layer[:, :n], out.r2_layer[:, :n], p[:-1], alpha, score, nc,
            o.threshold, layers, self.model,
        )  # fmt: skip
        best = _scores(
            aligned, out.r[:n], out.r2[:n], p[-1], alpha[final, here], score[final, here],
            nc, o.threshold, None, self.model,
        )  # fmt: skip
        if o.regression.models:
            best = best.assign(_spaces(self.solvers.models[FULL], fits[-1], o.regression.kind))
        if method is not None:
            explained = self._explained(out, layers, n, sums if method == "product" else None)
            shares = shares_of(method, explained)
            names = [JOINED.join(part) for part in shares]
            best["share"] = (("part", "neuroid"), np.stack(list(shares.values())))
            best = best.assign_coords(part=names)
        best["best_layer"] = ("neuroid", np.asarray(layers)[final])
        best["layer_agreement"] = ("neuroid", (out.choice[:, :n] == final).mean(axis=0))
        scores.attrs.update(attrs)
        best.attrs.update(attrs)
        rows = {
            "stimulus_id": ("presentation", ids),
            "fold": ("presentation", out.fold),
            "repeats": ("presentation", aligned.repeats[out.rows]),
        }
        return EncodingResult(
            scores=validate(scores, "scores"),
            best=validate(best, "scores"),
            encoders={
                name: encoder_dataset(
                    self.solvers, name, aligned, fits[i], np.flatnonzero(final == i),
                    target_batch=o.target_batch,
                )
                for i, name in enumerate(layers)
                if (final == i).any()
            },
            bootstrap=sums.dataset(method).assign_coords(rows),
            null=null,
            predictions=_predictions(aligned, out, rows) if o.keep_predictions else None,
            excluded=dict(aligned.excluded),
            notes=[*self.notes, *self._rank_notes()],
        )  # fmt: skip

    def _explained(
        self, out: NestedPredictions, layers: list[str], n: int, sums: RoiSums | None
    ) -> dict[tuple[str, ...], NDArray[np.float64]]:
        """Explained variance (n_neuroids,) that `shares_of` divides."""
        models = self.solvers.models
        if sums is None or out.parts is None:
            return {models[name]: out.r2_layer[i, :n] for i, name in enumerate(layers)}
        values = product_measure(out.measured, out.parts, baseline=0.0)
        for space, own in zip(models[FULL], out.parts, strict=True):
            sums.add_explained((space,), out.measured, own, out.predicted)
        return {(space,): v for space, v in zip(models[FULL], values, strict=True)}

    def _exchange(self, aligned: Aligned, rng: np.random.Generator) -> NDArray[np.intp]:
        if self.timing is not None:
            away = self.options.mode == "pooled"
            return self.timing.exchange(aligned.row_id, rng, away=away)
        return _exchange(aligned, rng)

    def _p(
        self,
        aligned: Aligned,
        groups: NDArray[np.int64],
        out: NestedPredictions,
        tests: list[PermutationTest],
    ) -> tuple[NDArray[np.float64], xr.Dataset]:
        """P-values (n_layers + 1, n_neuroids), and the null's maxima for the chosen layers."""
        o = self.options
        n = aligned.responses.shape[1]
        if o.mode == "none":
            return np.full((len(out.r_layer) + 1, n), np.nan), xr.Dataset()
        if o.mode == "predictions":
            maxima = tests[-1].null_max
            return np.stack([t.p for t in tests]), _maximum(maxima)
        observed = np.vstack([out.r_layer, out.r])
        hits = np.zeros(observed.shape)
        null_max = []
        # The same exchanges in every block.
        rng = np.random.default_rng([o.seed, 1])
        per_batch = max(1, min(COLUMNS_IN_FLIGHT, self.plan.room) // n)
        for start in range(0, o.n_permutations, per_batch):
            count = min(per_batch, o.n_permutations - start)
            permuted = [aligned.responses[self._exchange(aligned, rng)] for _ in range(count)]
            shared = np.concatenate([groups + i * (groups.max() + 1) for i in range(count)])
            null = nested_cv(
                self.solvers, np.hstack(permuted), target_groups=shared, keep=0,
                target_batch=o.target_batch,
            )  # fmt: skip
            r = np.vstack([null.r_layer, null.r]).reshape(len(observed), count, n)
            hits += (np.nan_to_num(r, nan=-np.inf) >= observed[:, None] - 1e-12).sum(axis=1)
            null_max.append(np.nanmax(r[-1], axis=1))
        p = np.where(np.isnan(observed), np.nan, permutation_p(hits, o.n_permutations))
        return p, _maximum(np.concatenate(null_max))

    def _exchanged(
        self, aligned: Aligned, block: slice, kept: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Exchanged responses of the neuroids of this block that were drawn; see `encode`."""
        draws = np.flatnonzero((self._drawn >= block.start) & (self._drawn < block.stop))
        place = np.searchsorted(kept, self._drawn[draws] - block.start) % len(kept)
        out = np.empty((len(aligned.responses), len(draws)), dtype=np.float32)
        for j, (draw, v) in enumerate(zip(draws.tolist(), place.tolist(), strict=True)):
            rng = np.random.default_rng([self.options.seed, 1, draw])
            out[:, j] = aligned.responses[self._exchange(aligned, rng), v]
        return out

    def _ceiling(
        self, aligned: Aligned, block: slice, kept: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        if self.ceiling is not None:
            return self.ceiling[block][kept]
        if aligned.ncsnr is None:
            return np.full(len(kept), np.nan)
        return noise_ceiling(aligned.ncsnr, aligned.repeats[self.rows])

    def _rank_notes(self) -> list[str]:
        """Say which layers hold features that others hold already."""
        out = []
        for name in self.solvers.models:
            spanned = self.solvers(name, ALL_ROWS).spanned()
            if spanned is not None and spanned[0] < spanned[1]:
                out.append(
                    f"layer {name!r}: its features span {spanned[0]} of {spanned[1]} possible "
                    "directions (some are constant or sums of others), so single weights are not "
                    "unique; predictions are as good"
                )
        return out


def _plan(
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    responses: xr.Dataset,
    within: slice,
    splits: Splits,
    options: _Options,
    memory_gib: float | None,
    devices: Sequence[torch.device],
) -> Plan:
    layers = [features] if isinstance(features, xr.Dataset) else list(features.values())
    presentations = rows = responses["responses"].shape[0]
    if options.repetitions == "average" and "stimulus_id" in responses.coords:
        rows = len(np.unique(responses["stimulus_id"].values))
    each = [ds.sizes.get("feature", 1) for ds in layers] or [1]
    how = options.regression
    if how.models is not None and how.spaces is not None and isinstance(features, Mapping):
        width = {
            space: sum(features[x].sizes.get("feature", 1) for x in own)
            for space, own in how.spaces.items()
        }
        each = [sum(width[space] for space in own) for own in how.models.values()]
    sizes = Sizes(
        presentations=presentations,
        rows=rows,
        features=[p * len(how.lags) for p in each],
        parts=len(how.spaces or ()) if options.partition == "product" else 0,
        folds=int(splits) if isinstance(splits, int | np.integer) else len(splits),
        inner=1 if isinstance(options.inner_cv, str) else int(options.inner_cv),
        bootstraps=options.n_bootstrap,
        null=options.n_permutations,
        predictions=options.keep_predictions,
    )
    n = within.stop - within.start
    if options.choose != "neuroid":
        devices = devices[:1]
    plan = plan_blocks(sizes, n, neuroid_chunk(responses), memory_gib, devices)
    if plan.step < n and options.choose != "neuroid":
        raise ConfigError(
            f"choose={options.choose!r} needs all {n} neuroids at once, but only {plan.room} fit "
            "into the memory limit.",
            'Raise memory_gib, or use choose="neuroid".',
        )
    return plan


def _within(
    members: Mapping[str, NDArray[np.intp]], block: slice, kept: NDArray[np.intp]
) -> dict[str, NDArray[np.intp]]:
    """Members of each ROI among the neuroids of a block that are kept, by their place there."""
    return {roi: np.flatnonzero(np.isin(kept + block.start, m)) for roi, m in members.items()}


def _spaces(spaces: Sequence[str], fit: Choices, kind: str) -> dict[str, Any]:
    """Penalties of the spaces of the model of all, and for stacking their weights."""
    out: dict[str, Any] = {"penalty": (("space", "neuroid"), fit.penalties)}
    if kind == "stacking":
        out["weight"] = (("space", "neuroid"), fit.weights)
    return {**out, "space": list(spaces)}


def _maximum(values: NDArray[np.float64]) -> xr.Dataset:
    return xr.Dataset({"maximum": ("permutation", values)})


def _loaded(result: EncodingResult) -> EncodingResult:
    """Return the result with nothing left on disk."""

    def load(ds: xr.Dataset) -> xr.Dataset:
        loaded = ds.load()
        loaded.attrs.pop("schema", None)
        return loaded

    kept = result.predictions
    return replace(
        result,
        scores=load(result.scores),
        best=load(result.best),
        encoders={name: load(ds) for name, ds in result.encoders.items()},
        bootstrap=load(result.bootstrap),
        null=load(result.null),
        predictions=None if kept is None else load(kept),
    )


def _check_ceiling(ceiling: ArrayLike | None, n: int) -> NDArray[np.float64] | None:
    if ceiling is None:
        return None
    values = np.asarray(ceiling, dtype=np.float64)
    if values.shape != (n,):
        raise SchemaError(f"ceiling has shape {values.shape}; expected ({n},).")
    return values


def _predictions(aligned: Aligned, out: NestedPredictions, rows: Mapping[str, Any]) -> xr.Dataset:
    dims = ("presentation", "neuroid")
    ds = xr.Dataset(
        {
            "measured": (dims, aligned.responses[out.rows]),
            "predicted": (dims, out.predicted + out.training_mean[out.fold]),
            "training_mean": (("fold_number", "neuroid"), out.training_mean),
        },
        coords=dict(rows),
        attrs={"units": str(aligned.attrs.get("units", ""))},
    )
    return ds.merge(aligned.neuroids, combine_attrs="override")


def _scores(
    aligned: Aligned,
    r: NDArray[np.float64],
    r2: NDArray[np.float64],
    p: NDArray[np.float64],
    alpha: NDArray[np.float64],
    validation: NDArray[np.float64],
    ceiling: NDArray[np.float64],
    threshold: float,
    layers: list[str] | None,
    model: str,
) -> xr.Dataset:
    dims = ("neuroid",) if layers is None else ("layer", "neuroid")
    values = {
        "r": r,
        "r2": r2,
        "normalised": normalised_score(r, ceiling, threshold=threshold)[0],
        "p": p,
        "q": np.full(p.shape, np.nan),
        "alpha": alpha,
        "validation_r2": validation,
    }
    ds = xr.Dataset({name: (dims, v) for name, v in values.items()})
    ds["ceiling"] = ("neuroid", ceiling)
    if layers is not None:
        ds = ds.assign_coords(layer=layers)
    if aligned.ncsnr is not None:
        ds["ncsnr"] = ("neuroid", aligned.ncsnr)
        ds = ds.set_coords("ncsnr")
    ds = ds.assign_coords(model=model)
    rest = aligned.neuroids.drop_vars("ncsnr", errors="ignore")
    return ds.merge(rest, combine_attrs="override")


def _attrs(
    aligned: Aligned, o: _Options, n_folds: int, tested: Sequence[str], stimuli: Sequence[str]
) -> dict[str, Any]:
    how = o.regression
    over_time = {"delays": list(how.delays), "sampling_rate": how.sampling_rate,
                 "direction": how.direction} if how.delays is not None else {}  # fmt: skip
    return {
        "regression": how.kind,
        "partition": o.partition,
        **over_time,
        "subject": str(aligned.attrs.get("subject", "")),
        "space": str(aligned.attrs.get("space", "")),
        "units": str(aligned.attrs.get("units", "")),
        "folds": n_folds,
        "inner_cv": str(o.inner_cv),
        "alphas": [float(a) for a in o.grid],
        "choose": o.choose,
        "permutation": o.mode,
        "permutations": 0 if o.mode == "none" else o.n_permutations,
        "seed": o.seed,
        "repetitions": o.repetitions,
        "n_stimuli": len(stimuli),
        "n_tested": len(tested),
        "mean_repeats": float(aligned.repeats.mean()),
        "ceiling_threshold": o.threshold,
        "stimuli": json.dumps(list(stimuli)),
    }


def _named(value: Any) -> Any:
    """Name what may hold arrays, all their values included."""
    if isinstance(value, np.ndarray):
        return sha256_of(value.astype(str) if value.dtype == object else value)
    if isinstance(value, list | tuple):
        return [_named(v) for v in value]
    return repr(value)
