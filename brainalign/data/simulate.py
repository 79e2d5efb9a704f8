"""Simulated recordings with a known truth, from any features.

The response of neuroid v in presentation t of stimulus s is

    y[t, v] = intercept[v] + signal[s, v] + noise_sd[v] * e[t, v],

    signal = standardise(generator(X w)),   noise_sd = 1 / ncsnr,

where X holds the standardised features of the layer that drives v, w its weights, and e is
standard normal, alone or smoothed over cortex. `signal` has mean 0 and standard deviation 1 over
the stimuli, so the noise ceiling of the mean of k presentations is ncsnr^2 / (ncsnr^2 + 1 / k).

Every neuroid draws from its own random stream, so the numbers do not depend on how many neuroids
are made at a time, nor on whether they go to memory or to disk.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csc_array, csr_array

from brainalign.data import cortex as _cortex
from brainalign.data import store
from brainalign.data.schema import validate
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near

__all__ = [
    "GENERATORS",
    "Simulation",
    "TimeSeries",
    "simulate",
    "simulate_timeseries",
    "simulate_to",
    "true_responses",
]

logger = logging.getLogger(__name__)

Features = ArrayLike | xr.Dataset | Mapping[str, ArrayLike | xr.Dataset]
Range = float | tuple[float, float]

GENERATORS: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
    "linear": lambda drive, second: drive,
    "rectified": lambda drive, second: np.logaddexp(0, 3 * drive) / 3,
    "compressive": lambda drive, second: np.sign(drive) * np.sqrt(np.abs(drive)),
    "quadratic": lambda drive, second: drive + 0.7 * drive * second,
}
"""Static functions of the linear drive X w (and, for the interaction, of a second drive)."""

_BLOCK = 256
_WEIGHTS, _SECOND, _NOISE, _NEUROIDS, _ORDER, _SCANNER = range(6)


@dataclass(frozen=True)
class Simulation:
    """Simulated responses and what they were made of.

    Parameters
    ----------
    responses : xarray.Dataset
        Follows the ``responses`` schema.
    truth : xarray.Dataset
        On ``neuroid``: weights (neuroid, feature), second_weights (quadratic generator only),
        intercept, ncsnr (0 for null), noise_sd, ceiling (of the mean of all repetitions),
        ceiling_single (of one presentation), null, layer, part (such as "OPA, part 1"; "" where
        the ROI has none), preference, selectivity (mean signal of the preferred category minus
        that of the others), signal_mean, signal_scale. On ``layer_name``: n_features, and with
        ``feature``: feature_mean, feature_scale.
    """

    responses: xr.Dataset
    truth: xr.Dataset


@dataclass(frozen=True)
class TimeSeries:
    """A simulated recording session, before any first-level model.

    Parameters
    ----------
    bold : xarray.Dataset
        Follows the ``responses`` schema with dims (time, neuroid); percent of baseline.
        ``stimulus_id`` (time) is empty where nothing is shown.
    events : pandas.DataFrame
        One row per presentation: onset and duration (s, from the start of the run), trial_type,
        stimulus_id, session, run, repetition.
    responses, truth : xarray.Dataset
        The trial amplitudes that went in, and their truth, as in `Simulation`.
    """

    bold: xr.Dataset
    events: pd.DataFrame
    responses: xr.Dataset
    truth: xr.Dataset


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first number is drawn."""

    layers: dict[str, NDArray]
    mean: dict[str, NDArray]
    scale: dict[str, NDArray]
    used: dict[str, NDArray]
    stimulus_id: NDArray
    category: NDArray | None
    neuroids: xr.Dataset
    layer: NDArray
    roi_weights: dict[tuple[str, str], NDArray]  # of what `tuned` says
    tuned: NDArray  # ROI or part of one
    accepted: dict[str, tuple[str, ...]]  # labels that what `tuned` says prefers
    variation: float
    generator: str
    ncsnr: NDArray
    intercept: NDArray
    null: NDArray
    fwhm: float | None
    presentation: dict[str, NDArray]
    stimulus: NDArray
    mean_inverse_k: float
    subject: str
    seed: int
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        return max(x.shape[1] for x in self.layers.values())

    @property
    def n_neuroids(self) -> int:
        return self.neuroids.sizes["neuroid"]


def simulate(
    features: Features,
    *,
    stimulus_id: ArrayLike | None = None,
    category: ArrayLike | None = None,
    neuroids: int | xr.Dataset | None = None,
    layers: Mapping[str, str] | None = None,
    preference: Mapping[str, str | Sequence[str]] | None = None,
    parts: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
    directions: Mapping[str, ArrayLike] | None = None,
    variation: float = 0.3,
    generator: str = "linear",
    n_repetitions: int | ArrayLike = 3,
    n_sessions: int = 1,
    n_runs: int = 1,
    ncsnr: Range | ArrayLike | Mapping[str, Range] = (0.4, 1.2),
    null: float | ArrayLike | Mapping[str, float] = 0.5,
    noise_fwhm_mm: float | None = None,
    subject: str = "sim01",
    seed: int = 0,
) -> Simulation:
    """Simulate a subject in memory.

    Parameters
    ----------
    features : array (stimulus, feature), features Dataset, or mapping of layer name to either
        What drives the responses. All layers hold the same stimuli in the same order.
    stimulus_id : array-like of str, optional
        Names of the stimuli. Default: those of the Dataset, else ``stim00000`` and so on.
    category : array-like of str, shape (n_stimuli,), optional
        Category of each stimulus; needed for category-selective ROIs.
    neuroids : int or Dataset, optional
        How many neuroids on fsaverage5 (None: all 20,484; see `brainalign.data.cortex.neuroids`),
        or a Dataset of coordinates on ``neuroid``: neuroid_id, roi, hemisphere, x, y, z (mm).
    layers : mapping of ROI to layer, optional
        Which layer drives which ROI; the key "" is the rest of cortex. Default: V1 the first
        layer, the other ROIs the last, every other neuroid one drawn at random.
    preference : mapping of ROI to category, or to several labels of it, optional
        Default: the categories of `brainalign.data.cortex.ROIS` that occur in `category`.
    parts : mapping of ROI to two or more categories, each one label or several, optional
        ROIs that consist of parts of equal size, in each hemisphere from back to front (along y),
        each with a category of its own that it prefers. They cannot be in `preference` or
        `directions` too.
    directions : mapping of ROI to array, shape (n_features,), optional
        Tuning in standardised features of the ROI's layer, in place of the category's.
    variation : float
        Share, 0 to 1, of a neuroid's drive that is its own; the rest is common to its ROI. A
        neuroid outside all ROIs has weights of its own only.
    generator : str
        A key of `GENERATORS`: what happens to the drive.
    n_repetitions : int or array-like of int, shape (n_stimuli,)
        Presentations of each stimulus.
    n_sessions, n_runs : int
        Sessions, and runs in each, that the presentations are cut into. A stimulus comes again
        only after all others have been shown.
    ncsnr : float, (low, high), array (n_neuroids,), or mapping of ROI to one of the first two
        Noise-ceiling signal-to-noise ratio (signal over noise standard deviation); a range is
        drawn from uniformly. The key "" of a mapping is the rest of cortex. Infinite: no noise.
    null : float, array-like of bool, shape (n_neuroids,), or mapping of ROI to float
        Share of neuroids outside ROIs that have no signal, or which ones. A mapping has the shares
        of ROIs, and under "" that of the rest of cortex; where none is named every neuroid has
        signal. The medial wall never has any.
    noise_fwhm_mm : float, optional
        Full width at half maximum of a Gaussian kernel that smooths the noise: along the surface
        on fsaverage5, else over straight distances. Its variance stays the same.
    subject : str
        Name of the subject.
    seed : int
        Seed of everything drawn.

    Returns
    -------
    Simulation
        Responses and truth.

    Raises
    ------
    SchemaError
        If features are not matrices of finite numbers over the same stimuli, lengths differ, or
        neuroids lack a coordinate that is needed (for `parts` also y).
    UnknownNameError
        If a generator, layer, ROI or category is not known.
    ConfigError
        If a number is out of its range, or a ROI of `parts` has fewer than two categories, fewer
        neuroids in a hemisphere than parts, or another tuning as well.

    Notes
    -----
    The ncsnr and its noise ceiling are those of Allen et al. 2022, Nat Neurosci 25:116.
    A category's tuning is the ridge solution for its indicator over the stimuli.
    """
    plan = _plan(
        features,
        stimulus_id=stimulus_id,
        category=category,
        neuroids=neuroids,
        layers=layers,
        preference=preference,
        parts=parts,
        directions=directions,
        variation=variation,
        generator=generator,
        n_repetitions=n_repetitions,
        n_sessions=n_sessions,
        n_runs=n_runs,
        ncsnr=ncsnr,
        null=null,
        noise_fwhm_mm=noise_fwhm_mm,
        subject=subject,
        seed=seed,
    )
    responses = np.empty((len(plan.stimulus), plan.n_neuroids), dtype=np.float32)
    weights = {k: np.zeros((plan.n_neuroids, plan.n_features), np.float32) for k in _large(plan)}
    small: list[dict[str, NDArray]] = []
    for start, stop, y, w, rest in _chunks(plan, plan.n_neuroids):
        responses[:, start:stop] = y
        for name, value in w.items():
            weights[name][start:stop] = value
        small.append(rest)
    template = _responses(plan)
    ds = template.assign(responses=(("presentation", "neuroid"), responses, _UNITS))
    truth = _truth(plan, small).assign({k: (("neuroid", "feature"), v) for k, v in weights.items()})
    return Simulation(validate(ds, "responses"), truth)


def simulate_to(
    folder: str | Path,
    features: Features,
    *,
    max_bytes: int = 2**29,
    overwrite: bool = False,
    provenance: Mapping[str, str] | None = None,
    **design: Any,
) -> Path:
    """Simulate a subject of any size to disk, some neuroids at a time.

    Parameters
    ----------
    folder : path
        Will hold ``responses.zarr`` and ``truth.zarr``, both or nothing.
    features, **design
        As in `simulate`; the numbers are the same.
    max_bytes : int
        About how much memory the neuroids of one chunk may take, features not counted.
    overwrite : bool
        Replace a folder that is there.
    provenance : mapping of str to str, optional
        Attrs of `brainalign.data.store.provenance`, added to both.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DiskSpaceError
        If the disk has too little room; nothing has been written then.
    """
    import zarr
    from tqdm import tqdm

    folder = Path(folder)
    plan = _plan(features, **design)
    n_stimuli, n_rows = len(plan.stimulus_id), len(plan.stimulus)
    large = _large(plan)
    bytes_each = 4 * (3 * n_rows + 4 * n_stimuli + (1 + len(large)) * plan.n_features)
    step = int(np.clip(max_bytes // bytes_each // _BLOCK, 1, store.NEUROIDS_PER_CHUNK // _BLOCK))
    step = min(step * _BLOCK, plan.n_neuroids)
    store.require_disk(folder, 4 * plan.n_neuroids * (n_rows + len(large) * plan.n_features))
    attrs = dict(provenance or {})
    with store.atomic_dir(folder, overwrite=overwrite) as made:
        y_group = zarr.open_group(made / "responses.zarr", mode="w", zarr_format=3)
        t_group = zarr.open_group(made / "truth.zarr", mode="w", zarr_format=3)
        y_array = _create(y_group, "responses", ("presentation", "neuroid"),
                          (n_rows, plan.n_neuroids), (n_rows, step), _UNITS)  # fmt: skip
        w_arrays = {
            name: _create(t_group, name, ("neuroid", "feature"),
                          (plan.n_neuroids, plan.n_features), (step, plan.n_features), {})
            for name in large
        }  # fmt: skip
        small: list[dict[str, NDArray]] = []
        with tqdm(total=plan.n_neuroids, unit="neuroid", disable=None) as bar:
            for start, stop, y, w, rest in _chunks(plan, step):
                y_array[:, start:stop] = y
                for name, value in w.items():
                    w_arrays[name][start:stop] = value
                small.append(rest)
                bar.update(stop - start)
        for name, ds in (("responses", _responses(plan)), ("truth", _truth(plan, small))):
            ds = store.with_text_as(ds, np.dtypes.StringDType())
            ds.assign_attrs(
                {**attrs, "schema": "responses" if name == "responses" else ""}
            ).to_zarr(
                made / f"{name}.zarr",
                mode="a",
                zarr_format=3,
                consolidated=False,
                encoding=store.zarr_encoding(ds),
            )
        validate(store.read(made / "responses.zarr"), "responses")
    return folder


def true_responses(
    truth: xr.Dataset, features: Features, *, stimulus_id: ArrayLike | None = None
) -> xr.DataArray:
    """Return the noise-free responses of simulated neuroids to any stimuli.

    Parameters
    ----------
    truth : xarray.Dataset
        Truth of a simulation.
    features : as in `simulate`
        The same layers, of these or of new stimuli.
    stimulus_id : array-like of str, optional
        Names of the stimuli.

    Returns
    -------
    xarray.DataArray, dims (stimulus, neuroid)
        Intercept plus signal.

    Raises
    ------
    UnknownNameError
        If a layer that drives a neuroid is missing.
    """
    matrices, ids = _matrices(features, stimulus_id)
    layer = truth["layer"].values.astype(str)
    if list(matrices) == [""]:
        matrices = {str(truth["layer_name"].values[0]): matrices[""]}
    generator = GENERATORS[truth.attrs["generator"]]
    out = np.empty((len(ids), len(layer)), dtype=np.float32)
    for i, name in enumerate(truth["layer_name"].values.astype(str).tolist()):
        rows = np.flatnonzero(layer == name)
        if len(rows) == 0:
            continue
        if name not in matrices:
            raise UnknownNameError(
                f"Neuroids are driven by layer {name!r}, which is not given.{near(name, matrices)}"
            )
        x = matrices[name]
        p = int(truth["n_features"].values[i])
        if x.shape[1] != p:
            raise SchemaError(f"Layer {name!r} has {x.shape[1]} features; the truth has {p}.")
        x = (x - truth["feature_mean"].values[i, :p]) / truth["feature_scale"].values[i, :p]
        drive = x @ truth["weights"].values[rows, :p].T
        second = (
            x @ truth["second_weights"].values[rows, :p].T if "second_weights" in truth else drive
        )
        raw = generator(drive, second)
        mean, scale = truth["signal_mean"].values[rows], truth["signal_scale"].values[rows]
        out[:, rows] = np.where(truth["null"].values[rows], 0, (raw - mean) / scale)
    out += truth["intercept"].values.astype(np.float32)
    return xr.DataArray(
        out,
        dims=("stimulus", "neuroid"),
        coords={
            "stimulus_id": ("stimulus", ids),
            "neuroid_id": ("neuroid", truth["neuroid_id"].values),
        },
        attrs=_UNITS,
    )


def simulate_timeseries(
    features: Features,
    *,
    tr: float = 2.0,
    trial_seconds: float = 6.0,
    stimulus_seconds: float = 2.0,
    rest_seconds: float = 16.0,
    noise_sd: float = 0.5,
    autocorrelation: float = 0.3,
    drift: float = 1.0,
    baseline: float = 100.0,
    hrf_model: str = "spm",
    **design: Any,
) -> TimeSeries:
    """Simulate BOLD time series: trial amplitudes convolved with an HRF, drift and noise.

    Each run r and neuroid v has

        bold[t] = baseline + sum_j y[j, v] h_j(t) + drift d(t) + noise_sd a(t),

    where y are the responses of `simulate`, h_j is the boxcar of trial j convolved with the HRF as
    nilearn's first-level model does it (so amplitudes are in its units), d a slow cosine and a
    first-order autoregressive noise of standard deviation 1.

    Parameters
    ----------
    features, **design
        As in `simulate`.
    tr : float
        Repetition time in s.
    trial_seconds, stimulus_seconds, rest_seconds : float
        Time from one onset to the next, duration of a stimulus, and rest before the first and
        after the last trial of a run, in s.
    noise_sd : float
        Standard deviation of the scanner's noise, in percent of the baseline.
    autocorrelation : float
        Lag-1 correlation of the scanner's noise, above -1 and below 1.
    drift : float
        Amplitude of the drift: half a cosine over each run.
    baseline : float
        Mean signal.
    hrf_model : str
        An HRF of nilearn: "spm" or "glover".

    Returns
    -------
    TimeSeries
        BOLD, events, and the responses and truth that went in.

    Raises
    ------
    ConfigError
        If a duration is not positive or the autocorrelation is out of range.
    """
    from nilearn.glm.first_level import compute_regressor
    from scipy.signal import lfilter

    if min(tr, trial_seconds, stimulus_seconds) <= 0 or rest_seconds < 0:
        raise ConfigError("tr, trial_seconds and stimulus_seconds must be above 0 s, rest >= 0 s.")
    if not -1 < autocorrelation < 1:
        raise ConfigError(f"autocorrelation must be between -1 and 1; got {autocorrelation}.")
    if hrf_model not in ("spm", "glover"):
        raise UnknownNameError(f"There is no HRF {hrf_model!r}.", "Use 'spm' or 'glover'.")
    made = simulate(features, **design)
    y = made.responses
    n_neuroids = y.sizes["neuroid"]
    rng = np.random.default_rng([int(design.get("seed", 0)), _SCANNER])
    session, run = y["session"].values, y["run"].values
    bold, where, tables = [], [], []
    for s, r in dict.fromkeys(zip(session.tolist(), run.tolist(), strict=True)):
        rows = np.flatnonzero((session == s) & (run == r))
        onset = rest_seconds + trial_seconds * np.arange(len(rows))
        n_scans = int(np.ceil((onset[-1] + trial_seconds + rest_seconds) / tr))
        times = np.arange(n_scans) * tr
        response = np.column_stack(
            [
                compute_regressor(np.array([[o], [stimulus_seconds], [1.0]]), hrf_model, times)[0]
                for o in onset
            ]
        )
        noise = rng.standard_normal((n_scans + 50, n_neuroids))
        noise = lfilter([np.sqrt(1 - autocorrelation**2)], [1, -autocorrelation], noise, axis=0)
        slow = np.cos(np.pi * (np.arange(n_scans) + 0.5) / n_scans)[:, None]
        bold.append(
            baseline
            + response @ y["responses"].values[rows].astype(np.float64)
            + drift * slow * rng.choice([-1.0, 1.0], n_neuroids)
            + noise_sd * noise[50:]
        )
        shown = np.full(n_scans, "", dtype=y["stimulus_id"].dtype)
        for o, name in zip(onset, y["stimulus_id"].values[rows].tolist(), strict=True):
            shown[(times >= o - 1e-9) & (times < o + stimulus_seconds - 1e-9)] = name
        where.append(pd.DataFrame({"session": s, "run": r, "seconds": times, "stimulus_id": shown}))
        tables.append(
            pd.DataFrame(
                {
                    "onset": onset,
                    "duration": stimulus_seconds,
                    "trial_type": "stimulus",
                    "stimulus_id": y["stimulus_id"].values[rows],
                    "session": s,
                    "run": r,
                    "repetition": y["repetition"].values[rows],
                }
            )
        )
    frame = pd.concat(where, ignore_index=True)
    keep = [c for c in y.coords if y[c].dims == ("neuroid",)]
    series = xr.Dataset(
        {"responses": (("time", "neuroid"), np.concatenate(bold).astype(np.float32))},
        coords={
            **{c: y[c] for c in keep},
            "session": ("time", frame["session"].to_numpy(np.int64)),
            "run": ("time", frame["run"].to_numpy(np.int64)),
            "seconds": ("time", frame["seconds"].to_numpy(np.float64), {"units": "s"}),
            "stimulus_id": ("time", frame["stimulus_id"].to_numpy().astype(str)),
            "subject": str(y["subject"].values[0]),
        },
        attrs={**y.attrs, "sampling_rate": 1 / tr, "units": "percent of baseline"},
    )
    events = pd.concat(tables, ignore_index=True)
    return TimeSeries(validate(series, "responses"), events, y, made.truth)


_UNITS = {"units": "standard deviations of the signal"}


def _plan(
    features: Features,
    *,
    stimulus_id: ArrayLike | None = None,
    category: ArrayLike | None = None,
    neuroids: int | xr.Dataset | None = None,
    layers: Mapping[str, str] | None = None,
    preference: Mapping[str, str | Sequence[str]] | None = None,
    parts: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
    directions: Mapping[str, ArrayLike] | None = None,
    variation: float = 0.3,
    generator: str = "linear",
    n_repetitions: int | ArrayLike = 3,
    n_sessions: int = 1,
    n_runs: int = 1,
    ncsnr: Any = (0.4, 1.2),
    null: Any = 0.5,
    noise_fwhm_mm: float | None = None,
    subject: str = "sim01",
    seed: int = 0,
) -> _Plan:
    if generator not in GENERATORS:
        raise UnknownNameError(f"There is no generator {generator!r}.{near(generator, GENERATORS)}",
                               f"Known: {', '.join(GENERATORS)}.")  # fmt: skip
    if not 0 <= variation <= 1:
        raise ConfigError(f"variation is a share between 0 and 1; got {variation}.")
    if noise_fwhm_mm is not None and not noise_fwhm_mm > 0:
        raise ConfigError(f"noise_fwhm_mm must be above 0 mm or None; got {noise_fwhm_mm}.")
    matrices, ids = _matrices(features, stimulus_id)
    if len(ids) < 3:
        raise ConfigError(f"A simulation needs at least 3 stimuli; got {len(ids)}.")
    mean, scale, used, x = {}, {}, {}, {}
    for name, m in matrices.items():
        mean[name] = m.mean(axis=0, dtype=np.float64)
        sd = m.std(axis=0, dtype=np.float64)
        constant = sd <= 1e-12 * np.maximum(1, np.abs(mean[name]))
        if constant.all():
            raise SchemaError(f"All features of layer {name!r} are constant over the stimuli.")
        scale[name] = np.where(constant, 1.0, sd)
        used[name] = ~constant
        x[name] = ((m - mean[name]) / scale[name] * used[name]).astype(m.dtype)
    labels = None if category is None else np.asarray(category).astype(str)
    if labels is not None and labels.shape != (len(ids),):
        raise SchemaError(f"category has shape {labels.shape}; there are {len(ids)} stimuli.")

    where = neuroids if isinstance(neuroids, xr.Dataset) else _cortex.neuroids(neuroids, seed=seed)
    for name in ("neuroid_id", "roi", "hemisphere", *(("y",) if parts else ())):
        if name not in where.coords or where[name].dims != ("neuroid",):
            raise SchemaError(f"neuroids must have the coordinate {name!r} on 'neuroid'.")
    n = where.sizes["neuroid"]
    roi = where["roi"].values.astype(str)
    present = sorted(set(roi.tolist()) - {""})
    rng = np.random.default_rng([seed, _NEUROIDS])
    names = list(x)
    layer = np.array(names)[rng.integers(len(names), size=n)]
    driven = {r: names[0] if r == "V1" else names[-1] for r in present}
    _known(layers or {}, [*present, "", *_cortex.ROIS], "ROI", "layers")
    for r, name in (layers or {}).items():
        if name not in x:
            raise UnknownNameError(f"There is no layer {name!r}.{near(name, names)}",
                                   f"Given: {', '.join(map(repr, names))}.")  # fmt: skip
        if r == "":
            layer[:] = name
        else:
            driven[r] = name
    for r in present:
        layer[roi == r] = driven[r]

    accepted = _preferences(preference, labels, present)
    tuned, of_parts = _cut(parts or {}, where, labels, {*(preference or {}), *(directions or {})})
    accepted |= of_parts
    _known(directions or {}, [*present, *_cortex.ROIS], "ROI", "directions")
    roi_weights = {}
    for r in sorted(set(tuned.tolist()) - {""}):
        name = str(layer[tuned == r][0])
        key = (r, name)
        if directions is not None and r in directions:
            w = np.asarray(directions[r], dtype=np.float64)
            if w.shape != (x[name].shape[1],) or not np.isfinite(w).all():
                raise SchemaError(f"The direction of {r!r} must be {x[name].shape[1]} finite "
                                  f"numbers; it has shape {w.shape}.")  # fmt: skip
            w = w * used[name]
        elif r in accepted:
            assert labels is not None
            w = _contrast(x[name], np.isin(labels, accepted[r]))
        else:
            own = np.random.default_rng([seed, _WEIGHTS, zlib.crc32(r.encode())])
            w = own.standard_normal(x[name].shape[1]) * used[name]
        size = np.std(x[name] @ w, ddof=1)
        if not size > 0:
            raise SchemaError(f"The direction of {r!r} gives every stimulus the same response.")
        roi_weights[key] = w / size

    snr = _ncsnr(ncsnr, roi, rng)
    if np.ndim(null) == 0:
        shares = dict(null) if isinstance(null, Mapping) else {"": float(null)}
        _known(shares, [*present, "", *_cortex.ROIS], "ROI", "null")
        silent = np.zeros(n, dtype=bool)
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"null is a share between 0 and 1; got {share}.")
            inside = rng.permutation(np.flatnonzero(roi == name))
            silent[inside[: round(share * len(inside))]] = True
    else:
        silent = np.array(null, dtype=bool)
        if silent.shape != (n,):
            raise SchemaError(f"null has shape {silent.shape}; there are {n} neuroids.")
    if "medial_wall" in where.coords:
        silent |= where["medial_wall"].values
    presentation, stimulus, mean_inverse_k = _presentations(
        ids, n_repetitions, n_sessions, n_runs, seed
    )
    return _Plan(
        layers=x,
        mean=mean,
        scale=scale,
        used=used,
        stimulus_id=ids,
        category=labels,
        neuroids=where.drop_vars("medial_wall", errors="ignore"),
        layer=layer,
        roi_weights=roi_weights,
        tuned=tuned,
        accepted=accepted,
        variation=float(variation),
        generator=generator,
        ncsnr=snr,
        intercept=rng.normal(0.0, 0.5, n),
        null=silent,
        fwhm=noise_fwhm_mm,
        presentation=presentation,
        stimulus=stimulus,
        mean_inverse_k=mean_inverse_k,
        subject=subject,
        seed=int(seed),
    )


def _matrices(
    features: Features, stimulus_id: ArrayLike | None
) -> tuple[dict[str, NDArray], NDArray]:
    given: dict[Any, Any] = (
        dict(features)
        if isinstance(features, Mapping) and not isinstance(features, xr.Dataset)
        else {None: features}
    )
    ids = None if stimulus_id is None else np.asarray(stimulus_id).astype(str)
    matrices: dict[str, NDArray] = {}
    first = ""
    for key, value in given.items():
        name = key
        if isinstance(value, xr.Dataset):
            validate(value, "features")
            name = str(value["layer"].values) if name is None else name
            if "stimulus_id" in value.coords:
                own = value["stimulus_id"].values.astype(str)
                if ids is not None and not np.array_equal(ids, own):
                    raise SchemaError(
                        f"Layer {name!r} has other stimuli, or another order, than {first!r}."
                        if first
                        else f"stimulus_id differs from that of layer {name!r}.",
                        "Select the same stimuli in the same order for all layers.",
                    )
                ids = own
            value = value["features"].values
        name = "" if name is None else str(name)
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype == np.float32 else np.float64, copy=False)
        if array.ndim != 2:
            raise SchemaError(
                f"Features of layer {name!r} must be (stimulus, feature); they have shape "
                f"{array.shape}."
            )
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise SchemaError(
                f"Features of layer {name!r} have NaN or infinite values in {len(bad)} of "
                f"{len(array)} stimuli (first row {bad[0]})."
            )
        matrices[name] = array
        first = first or name
    if not matrices:
        raise SchemaError("No features were given.")
    lengths = {k: len(m) for k, m in matrices.items()}
    n = len(next(iter(matrices.values())))
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"Layers have different numbers of stimuli: {lengths}.")
    if ids is None:
        ids = np.array([f"stim{i:05d}" for i in range(n)])
    if len(ids) != n:
        raise SchemaError(f"stimulus_id has {len(ids)} entries; features have {n} stimuli.")
    if len(np.unique(ids)) < n:
        raise SchemaError("stimulus_id holds the same name twice.")
    return matrices, ids


def _known(given: Mapping[str, Any], known: Sequence[str], what: str, argument: str) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(
                f"{argument} names the {what} {name!r}, which no neuroid has.{near(name, known)}"
            )


def _preferences(
    preference: Mapping[str, str | Sequence[str]] | None,
    labels: NDArray | None,
    present: Sequence[str],
) -> dict[str, tuple[str, ...]]:
    """Return the category labels that each ROI prefers, the category's own name first."""
    known = [] if labels is None else sorted(set(labels.tolist()))
    if preference is None:
        wanted = {r: _cortex.ROIS[r].category for r in present if r in _cortex.ROIS}
        missing = sorted({c for c in wanted.values() if c and c not in known})
        if missing and labels is not None:
            logger.info("No stimulus is labelled %s: ROIs for it have no preference.", missing)
        return {r: (c,) for r, c in wanted.items() if c in known}
    _known(preference, [*present, *_cortex.ROIS], "ROI", "preference")
    chosen = {}
    for r, value in preference.items():
        several = (value,) if isinstance(value, str) else tuple(value)
        for c in several:
            if c not in known:
                raise UnknownNameError(
                    f"{r!r} prefers {c!r}, but no stimulus is of that category.{near(c, known)}",
                    "Give `category`, with one label per stimulus." if labels is None else None,
                )
        if several:
            chosen[r] = several
    return chosen


def _cut(
    parts: Mapping[str, Sequence[str | Sequence[str]]],
    where: xr.Dataset,
    labels: NDArray | None,
    taken: Collection[str],
) -> tuple[NDArray, dict[str, tuple[str, ...]]]:
    """Return the ROI, or the part of one, of each neuroid, and the labels that each part prefers.

    `taken` are the ROIs whose tuning is given otherwise.
    """
    roi, hemisphere = (where[k].values.astype(str) for k in ("roi", "hemisphere"))
    known = [*sorted(set(roi.tolist()) - {""}), *_cortex.ROIS]
    _known(parts, known, "ROI", "parts")
    tuned, accepted = roi.astype(object), {}
    for r, wanted in parts.items():
        if isinstance(wanted, str) or len(wanted) < 2 or not all(wanted):
            raise ConfigError(f"parts needs a list of two categories or more for {r!r}; got "
                              f"{wanted!r}.")  # fmt: skip
        if r in taken:
            raise ConfigError(f"{r!r} is in parts, and in preference or directions too.",
                              "Name it in one of them.")  # fmt: skip
        names = [f"{r}, part {k}" for k in range(1, len(wanted) + 1)]
        for name, category in zip(names, wanted, strict=True):
            accepted[name] = _preferences({r: category}, labels, known)[r]
        for side in np.unique(hemisphere[roi == r]):
            rows = np.flatnonzero((roi == r) & (hemisphere == side))
            if len(rows) < len(names):
                raise ConfigError(f"{r!r} has {len(rows)} neuroids in hemisphere {side}; that is "
                                  f"too few for {len(names)} parts.")  # fmt: skip
            rows = rows[np.argsort(where["y"].values[rows], kind="stable")]
            for name, part in zip(names, np.array_split(rows, len(names)), strict=True):
                tuned[part] = name
    return tuned.astype(str), accepted


def _contrast(x: NDArray, member: NDArray, shrinkage: float = 0.1) -> NDArray:
    """Return the ridge weights of a category's indicator; alpha = shrinkage x mean eigenvalue."""
    if member.all() or not member.any():
        raise ConfigError("A category must have some of the stimuli and leave out some.")
    y = member - member.mean()
    n, p = x.shape
    x = x.astype(np.float64, copy=False)
    if p <= n:
        gram = x.T @ x
        alpha = shrinkage * np.trace(gram) / p
        return np.linalg.solve(gram + alpha * np.eye(p), x.T @ y)
    gram = x @ x.T
    alpha = shrinkage * np.trace(gram) / n
    return x.T @ np.linalg.solve(gram + alpha * np.eye(n), y)


def _ncsnr(value: Any, roi: NDArray, rng: np.random.Generator) -> NDArray:
    n = len(roi)
    uniform = rng.random(n)

    def draw(bounds: Any) -> NDArray:
        low, high = (bounds, bounds) if np.ndim(bounds) == 0 else bounds
        if not 0 < low <= high:
            raise ConfigError(f"ncsnr must be above 0, and low <= high; got {bounds}.")
        return np.full(n, float(low)) if low == high else low + (high - low) * uniform

    if isinstance(value, Mapping):
        unknown = sorted(set(roi.tolist()) - set(value))
        if unknown:
            raise ConfigError(
                f"ncsnr has no entry for {unknown[0]!r}.",
                'Name every ROI, and "" for the rest of cortex.',
            )
        out = np.empty(n)
        for name in set(roi.tolist()):
            out[roi == name] = draw(value[name])[roi == name]
        return out
    if np.ndim(value) == 0 or (isinstance(value, tuple) and len(value) == 2):
        return draw(value)
    out = np.asarray(value, dtype=np.float64)
    if out.shape != (n,):
        raise SchemaError(f"ncsnr has shape {out.shape}; there are {n} neuroids.")
    if not (out > 0).all():
        raise ConfigError("ncsnr must be above 0.", "Use `null` for neuroids without signal.")
    return out


def _presentations(
    ids: NDArray, n_repetitions: int | ArrayLike, n_sessions: int, n_runs: int, seed: int
) -> tuple[dict[str, NDArray], NDArray, float]:
    times = np.broadcast_to(np.asarray(n_repetitions), (len(ids),))
    if not np.issubdtype(times.dtype, np.integer) or times.min() < 1:
        raise ConfigError("n_repetitions must be whole numbers of at least 1.")
    if n_sessions < 1 or n_runs < 1:
        raise ConfigError("n_sessions and n_runs must be at least 1.")
    rng = np.random.default_rng([seed, _ORDER])
    passes = [rng.permutation(np.flatnonzero(times > k)) for k in range(times.max())]
    stimulus = np.concatenate(passes)
    n, blocks = len(stimulus), n_sessions * n_runs
    if blocks > n:
        raise ConfigError(f"{blocks} runs cannot be made of {n} presentations.")
    block = np.arange(n) * blocks // n
    coords = {
        "stimulus_id": ids[stimulus],
        "repetition": np.repeat(np.arange(1, len(passes) + 1), [len(p) for p in passes]),
        "session": block // n_runs + 1,
        "run": block % n_runs + 1,
    }
    return coords, stimulus, float(np.mean(1 / times))


def _large(plan: _Plan) -> tuple[str, ...]:
    return ("weights", "second_weights") if plan.generator == "quadratic" else ("weights",)


def _chunks(
    plan: _Plan, step: int
) -> Iterator[tuple[int, int, NDArray, dict[str, NDArray], dict[str, NDArray]]]:
    """Yield responses, weights and the other truth of `step` neuroids at a time.

    Matrix products run over fixed blocks of neuroids, so that rounding does not depend on `step`,
    which is a multiple of the block or the whole.
    """
    for start in range(0, plan.n_neuroids, step):
        stop = min(start + step, plan.n_neuroids)
        y = _noise(plan, start, stop)
        blocks = []
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            signal, w, rest = _signal(plan, first, last)
            y[:, first - start : last - start] += signal[plan.stimulus]
            blocks.append((w, rest))
        y += plan.intercept[start:stop].astype(np.float32)
        weights = {k: np.concatenate([w[k] for w, _ in blocks]) for k in blocks[0][0]}
        small = {k: np.concatenate([r[k] for _, r in blocks]) for k in blocks[0][1]}
        yield start, stop, y, weights, small


def _signal(
    plan: _Plan, start: int, stop: int
) -> tuple[NDArray, dict[str, NDArray], dict[str, NDArray]]:
    n = stop - start
    tuned = plan.tuned[start:stop]
    signal = np.zeros((len(plan.stimulus_id), n))
    weights = {k: np.zeros((n, plan.n_features), np.float32) for k in _large(plan)}
    mean, scale = np.zeros(n), np.ones(n)
    null, layer = plan.null[start:stop], plan.layer[start:stop]
    for name, x in plan.layers.items():
        rows = np.flatnonzero((layer == name) & ~null)
        if len(rows) == 0:
            continue
        p = x.shape[1]
        w = _own_weights(plan, _WEIGHTS, start + rows, x, plan.used[name])
        common = np.array([tuned[r] != "" for r in rows])
        if common.any():
            shared = np.stack([plan.roi_weights[tuned[r], name] for r in rows[common]])
            v = plan.variation
            w[common] = np.sqrt(1 - v) * shared + np.sqrt(v) * w[common]
        # Rounded first: what the truth holds is exactly what made the responses.
        w = (w / np.std(x @ w.T, axis=0, ddof=1)[:, None]).astype(np.float32)
        drive = second = (x @ w.T).astype(np.float64)
        weights["weights"][rows, :p] = w
        if "second_weights" in weights:
            w2 = _own_weights(plan, _SECOND, start + rows, x, plan.used[name]).astype(np.float32)
            second = (x @ w2.T).astype(np.float64)
            weights["second_weights"][rows, :p] = w2
        raw = GENERATORS[plan.generator](drive, second)
        if plan.generator != "linear":
            mean[rows], scale[rows] = raw.mean(axis=0), raw.std(axis=0, ddof=1)
        signal[:, rows] = (raw - mean[rows]) / scale[rows]
    snr = np.where(null, 0.0, plan.ncsnr[start:stop])
    k = plan.mean_inverse_k
    with np.errstate(invalid="ignore"):
        ceiling, single = (
            np.where(np.isinf(snr), 1.0, snr**2 / (snr**2 + m)) for m in (k, 1.0)
        )  # fmt: skip
    selectivity = np.full(n, np.nan)
    for r, several in plan.accepted.items():
        assert plan.category is not None
        member = np.isin(plan.category, several)
        rows = np.flatnonzero((tuned == r) & ~null)
        selectivity[rows] = signal[member][:, rows].mean(0) - signal[~member][:, rows].mean(0)
    small = {
        "ncsnr": snr,
        "noise_sd": 1 / plan.ncsnr[start:stop],
        "ceiling": ceiling,
        "ceiling_single": single,
        "null": null,
        "selectivity": selectivity,
        "signal_mean": mean,
        "signal_scale": scale,
    }
    return signal.astype(np.float32), weights, small


def _own_weights(plan: _Plan, stream: int, rows: NDArray, x: NDArray, used: NDArray) -> NDArray:
    """Return weights of single neuroids, scaled to a drive of standard deviation 1."""
    w = np.stack(
        [
            np.random.default_rng([plan.seed, stream, int(r)]).standard_normal(len(used))
            for r in rows
        ]
    )
    w *= used
    return w / np.std(x @ w.T.astype(x.dtype), axis=0, ddof=1)[:, None]


def _noise(plan: _Plan, start: int, stop: int) -> NDArray:
    """Return the noise of neuroids start to stop.

    A kernel sums over fixed blocks of neuroids, so that rounding does not depend on the chunk.
    """
    n_rows = len(plan.stimulus)

    def white(neuroid: int) -> NDArray:
        stream = np.random.default_rng([plan.seed, _NOISE, neuroid])
        return stream.standard_normal(n_rows, dtype=np.float32)

    sd = (1 / plan.ncsnr[start:stop]).astype(np.float32)
    if plan.fwhm is None:
        out = np.empty((n_rows, stop - start), dtype=np.float32)
        for i in range(start, stop):
            out[:, i - start] = white(i)
        out *= sd
        return out
    kernel = _kernel(plan, start, stop)
    smooth = np.zeros((stop - start, n_rows), dtype=np.float32)
    for first in range(0, plan.n_neuroids, _BLOCK):
        last = min(first + _BLOCK, plan.n_neuroids)
        part = kernel.indptr[first : last + 1]
        columns = np.flatnonzero(np.diff(part))
        if len(columns) == 0:
            continue
        inside = slice(part[0], part[-1])
        rows, row = np.unique(kernel.indices[inside], return_inverse=True)
        column = np.repeat(np.arange(len(columns)), np.diff(part)[columns])
        block = csr_array((kernel.data[inside], (row, column)), shape=(len(rows), len(columns)))
        block.sort_indices()
        smooth[rows] += block @ np.stack([white(first + int(c)) for c in columns])
    return np.ascontiguousarray((smooth * sd[:, None]).T)


def _kernel(plan: _Plan, start: int, stop: int) -> csc_array:
    """Return the Gaussian weights of all neuroids' white noise, with squares that sum to 1."""
    assert plan.fwhm is not None
    sigma = plan.fwhm / np.sqrt(8 * np.log(2))
    distance = _distances(plan, start, stop, 3 * sigma)
    weight = np.exp(-0.5 * (distance.data / sigma) ** 2)
    row = np.repeat(np.arange(stop - start), np.diff(distance.indptr))
    norm = np.sqrt(np.bincount(row, weight**2, minlength=stop - start))
    data = (weight / norm[row]).astype(np.float32)
    kernel = csc_array((data, (row, distance.indices)), shape=distance.shape)
    kernel.sort_indices()
    return kernel


def _distances(plan: _Plan, start: int, stop: int, limit: float) -> csr_array:
    ds = plan.neuroids
    n = plan.n_neuroids
    on_mesh = ds.attrs.get("space") == "fsaverage5" and "vertex" in ds.coords
    if on_mesh:
        side = (ds["hemisphere"].values.astype(str) == "R").astype(int)
        vertex = side * _cortex.N_VERTICES + ds["vertex"].values
        on_mesh = len(np.unique(vertex)) == n
    if on_mesh:
        found = _cortex.fsaverage5().within(vertex[start:stop], limit)
        position = np.full(2 * _cortex.N_VERTICES, -1)
        position[vertex] = np.arange(n)
        row = np.repeat(np.arange(stop - start), np.diff(found.indptr))
        column, value = position[found.indices], found.data
        keep = column >= 0
        return csr_array((value[keep], (row[keep], column[keep])), shape=(stop - start, n))
    from scipy.spatial import cKDTree

    if not {"x", "y", "z"} <= set(ds.coords):
        raise SchemaError("Noise that is correlated over space needs coordinates x, y, z in mm.")
    xyz = np.column_stack([ds[a].values for a in "xyz"]).astype(np.float64)
    side = ds["hemisphere"].values.astype(str)
    # Hemispheres are pushed far apart: their medial walls touch, but share no cortex.
    xyz[side == "R", 0] += 1e6
    tree = plan.cache.setdefault("tree", cKDTree(xyz))
    found = cKDTree(xyz[start:stop]).sparse_distance_matrix(tree, limit, output_type="ndarray")
    return csr_array((found["v"], (found["i"], found["j"])), shape=(stop - start, n))


def _responses(plan: _Plan) -> xr.Dataset:
    coords: dict[str, Any] = {k: ("presentation", v) for k, v in plan.presentation.items()}
    coords["subject"] = ("presentation", np.full(len(plan.stimulus), plan.subject))
    coords.update({str(k): v for k, v in plan.neuroids.coords.items()})
    return xr.Dataset(
        coords=coords,
        attrs={
            "units": _UNITS["units"],
            "subject": plan.subject,
            "space": plan.neuroids.attrs.get("space", ""),
            "simulated": "yes",
        },
    )


def _truth(plan: _Plan, small: Sequence[Mapping[str, NDArray]]) -> xr.Dataset:
    p, names = plan.n_features, list(plan.layers)
    mean, scale = np.zeros((len(names), p)), np.ones((len(names), p))
    for i, name in enumerate(names):
        size = len(plan.mean[name])
        mean[i, :size], scale[i, :size] = plan.mean[name], plan.scale[name]
    per_neuroid = {k: np.concatenate([s[k] for s in small]) for k in small[0]}
    own_part = plan.tuned != plan.neuroids["roi"].values.astype(str)
    preference = np.array([plan.accepted.get(r, ("",))[0] for r in plan.tuned])
    return xr.Dataset(
        {
            **{k: ("neuroid", v) for k, v in per_neuroid.items()},
            "intercept": ("neuroid", plan.intercept),
            "layer": ("neuroid", plan.layer.astype(str)),
            "part": ("neuroid", np.where(own_part, plan.tuned, "")),
            "preference": ("neuroid", np.where(plan.null, "", preference).astype(str)),
            "feature_mean": (("layer_name", "feature"), mean),
            "feature_scale": (("layer_name", "feature"), scale),
            "n_features": ("layer_name", np.array([len(plan.mean[k]) for k in names])),
        },
        coords={
            **{str(k): v for k, v in plan.neuroids.coords.items()},
            "layer_name": ("layer_name", np.array(names)),
        },
        attrs={
            "generator": plan.generator,
            "seed": plan.seed,
            "subject": plan.subject,
            "noise_fwhm_mm": 0.0 if plan.fwhm is None else float(plan.fwhm),
            "variation": plan.variation,
        },
    )


def _create(
    group: Any,
    name: str,
    dims: Sequence[str],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    attrs: Mapping[str, str],
) -> Any:
    from zarr.codecs import Crc32cCodec

    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype="float32",
        fill_value=float("nan"),
        compressors=(Crc32cCodec(),),
        dimension_names=dims,
        attributes=dict(attrs),
    )
