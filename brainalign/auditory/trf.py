"""Temporal response functions of recordings: cross-validated, against stimuli shifted in time."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.auditory.decoders import (
    ALPHAS,
    check_size,
    edges_said_once,
    make_splits,
    windowed_correlation,
)
from brainalign.auditory.trials import ListeningTrial, content_groups
from brainalign.data.splits import check_leak
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.linear import AlphaEdgeWarning
from brainalign.linear.lagged import TEST, TRAIN, LaggedRidge, TimeBlocks, delays
from brainalign.linear.ridge import warn_edges

__all__ = [
    "ALPHAS",
    "HeldOut",
    "held_out",
    "read_recordings",
    "response_peaks",
    "trf_models",
    "trf_record",
    "with_channels",
]

#: Names under which a file may hold its sampling rate.
_RATES = ("sampling_rate", "fs", "sfreq")
#: Share of the highest peak from which another one is reported.
_HEIGHT = 0.25


@dataclass(frozen=True)
class HeldOut:
    """Correlations of a model's predictions with the data it was not fitted to.

    Parameters
    ----------
    r : ndarray, shape (n_folds, n_trials, n_variants, n_targets)
        NaN where a fold tests nothing of a trial. The first variant is the stimulus as it was, the
        others are shifted.
    alpha : ndarray, shape (n_folds, n_variants, n_targets)
        Chosen within the training samples of each fold.
    """

    r: NDArray[np.float64]
    alpha: NDArray[np.float64]

    def mean(self) -> NDArray[np.float64]:
        """Return the mean over folds and trials, (n_variants, n_targets)."""
        return np.nanmean(self.r, axis=(0, 1))


def read_recordings(
    paths: Sequence[Path | str],
    target: str,
    *,
    recording: str | None = None,
    sampling_rate: float = 64.0,
) -> list[ListeningTrial]:
    """Read trials of one talker: a recording and a feature of what was heard, in the same samples.

    Parameters
    ----------
    paths : sequence of Path
        ``.npz`` files, a trial each.
    target : str
        Name of the array of the feature, (n_samples,) or (n_samples, n_features).
    recording : str, optional
        Name of the array of the recording, (n_samples, n_channels). By default the one other array
        of as many samples.
    sampling_rate : float
        Samples per second, where a file does not hold its own (``sampling_rate``, ``fs``,
        ``sfreq``).

    Returns
    -------
    list of ListeningTrial
        Named by their files.

    Raises
    ------
    UnknownNameError
        If there is no such array.
    SchemaError
        If the file is no ``.npz``, or its arrays do not go together.
    """
    files = [Path(p) for p in paths]
    stems = [p.stem for p in files]
    trials = []
    for path in files:
        arrays = _arrays(path)
        if target not in arrays:
            raise UnknownNameError(
                f"{path} holds no {target!r}.{near(target, arrays)}",
                f"It holds {', '.join(arrays)}.",
            )
        n = len(np.atleast_1d(arrays[target]))
        others = [k for k, a in arrays.items() if k != target and a.ndim == 2 and len(a) == n]
        name = recording if recording is not None else others[0] if len(others) == 1 else None
        if name is None or name not in arrays:
            raise UnknownNameError(
                f"{path} holds {', '.join(f'{k} {a.shape}' for k, a in arrays.items())}; "
                + (f"no {name!r}." if name else f"{len(others)} of them may be the recording."),
                "Name the array of the recording, (samples, channels) with as many samples as the "
                "feature.",
            )
        for key in (name, target):
            if arrays[key].dtype.kind not in "iuf":
                raise SchemaError(f"{path}: {key!r} holds {arrays[key].dtype}; expected numbers.")
        heard = np.asarray(arrays[target])
        rates = [_rate(arrays[k], f"{path}: {k!r}") for k in _RATES if k in arrays]
        trials.append(
            ListeningTrial(
                arrays[name],
                {target: heard.reshape(1, n, -1)},
                np.zeros(n, dtype=np.int64),
                rates[0] if rates else float(sampling_rate),
                path.stem if stems.count(path.stem) == 1 else str(path),
            )
        )
    return trials


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a ``.npz`` file."""
    try:
        with path.open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            several = isinstance(content, np.lib.npyio.NpzFile)
            arrays = {name: content[name] for name in content.files} if several else {}
    except (ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise SchemaError(
            f"{path} cannot be read as arrays: {error}.", "Give .npz files."
        ) from error
    if not several:
        raise SchemaError(f"{path} is a single array.", "Give .npz files.")
    return arrays


def _rate(value: NDArray[Any], where: str) -> float:
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise SchemaError(
            f"{where} is {value.dtype} of shape {value.shape}; expected one number, in Hz."
        )
    return float(value.item())


def held_out(
    trials: Sequence[ListeningTrial],
    target: str,
    roles: Sequence[Sequence[NDArray[np.int8]]],
    *,
    direction: str,
    tmin: float = 0.0,
    tmax: float = 0.4,
    alphas: Sequence[float] = ALPHAS,
    shifts: Sequence[float] = (),
) -> HeldOut:
    r"""Cross-validate a model in one direction, and again with the stimulus shifted in a circle.

    Forward, :math:`\hat y_c(t) = b_c + \sum_{f,l} w_{cfl}\, x_f(t - l)`; backward,
    :math:`\hat x_f(t) = b_f + \sum_{c,l} w_{fcl}\, y_c(t + l)`. A shifted stimulus keeps its pace
    and its statistics, and has lost its relation to the recording: what a model fitted to it
    reaches is chance. Stimuli are standardised over the training samples of all trials, recordings
    over those of each trial, whose gain may differ (over all samples of a trial that is held out
    whole); penalties are chosen by three blocks of time within the training samples.

    Parameters
    ----------
    trials : sequence of ListeningTrial
        Of one rate, with the same channels.
    target : str
        Feature space; that of the attended talker is taken.
    roles : sequence (folds) of sequence (trials) of ndarray of int8, shape (n_samples,)
        What each sample is, as `brainalign.linear.TimeBlocks.roles` tells.
    direction : {"forward", "backward"}
    tmin, tmax : float
        First and last delay of the recording after the sound, seconds.
    alphas : sequence of float
        Penalties that are tried; a single one is used as it is.
    shifts : sequence of float
        Shares of each trial's length.

    Returns
    -------
    HeldOut
        Variants: none, then each shift. Targets: channels forward, features backward.

    Warns
    -----
    AlphaEdgeWarning
        Once, if many targets of the stimulus as it was are predicted with an end of the grid.
    """
    with edges_said_once(len(roles)):
        return _held_out(trials, target, roles, direction, tmin, tmax, alphas, shifts)


def _held_out(
    trials: Sequence[ListeningTrial],
    target: str,
    roles: Sequence[Sequence[NDArray[np.int8]]],
    direction: str,
    tmin: float,
    tmax: float,
    alphas: Sequence[float],
    shifts: Sequence[float],
) -> HeldOut:
    neural = [t.neural.astype(np.float32) for t in trials]
    stimuli = [
        [np.roll(s, round(share * len(s)), axis=0) for share in (0.0, *shifts)]
        for s in (t.attended_features(target).astype(np.float32) for t in trials)
    ]
    n_variants = 1 + len(shifts)
    scores, penalties = [], []
    for fold in roles:
        train = [role == TRAIN for role in fold]
        y = _standardised_each(neural, train)
        x = [_standardised([s[v] for s in stimuli], train) for v in range(n_variants)]
        # A decoder sees one recording, whatever is decoded: the variants are its targets.
        if direction == "backward":
            together = [np.concatenate(parts, axis=1) for parts in zip(*x, strict=True)]
            jobs = [(_spanned(y, train), together)]
        else:
            jobs = [(own, y) for own in x]
        r: list[list[NDArray[np.float64]]] = []
        alpha = []
        for source, response in jobs:
            model = LaggedRidge(
                tmin, tmax, trials[0].sampling_rate, alphas=alphas, cv=TimeBlocks(3),
                direction=direction, metric="r", device="cpu",
            )  # fmt: skip
            with warnings.catch_warnings():
                # Stimuli without a relation to the recording belong at an end.
                warnings.simplefilter("ignore", AlphaEdgeWarning)
                model.fit(source, response, rows=train)
            if not r and hasattr(model, "best_score_"):
                own = slice(len(model.alpha_) * len(jobs) // n_variants)
                best, grid = model.best_score_[own], np.asarray(alphas)
                place = np.abs(grid[:, None] - model.alpha_[own]).argmin(axis=0)
                warn_edges(place, best * np.abs(best), grid)
            r.append(
                [
                    windowed_correlation(p[role == TEST], m[role == TEST])
                    if (role == TEST).any()
                    else np.full(m.shape[1], np.nan)
                    for p, m, role in zip(model.predict(source), response, fold, strict=True)
                ]
            )
            alpha.append(model.alpha_)
        # (trials, jobs, targets of a job), the targets of a decoder being variants by features
        scores.append(np.stack(r, axis=1).reshape(len(trials), n_variants, -1))
        penalties.append(np.concatenate(alpha).reshape(n_variants, -1))
    return HeldOut(np.array(scores), np.array(penalties))


def _standardised(
    arrays: Sequence[NDArray[np.float32]], train: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.float32]]:
    rows = np.concatenate([a[t] for a, t in zip(arrays, train, strict=True)])
    mean, sd = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    sd = np.where(sd > 0, sd, 1.0)
    return [((a - mean) / sd).astype(np.float32) for a in arrays]


def _standardised_each(
    arrays: Sequence[NDArray[np.float32]], train: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.float32]]:
    rows = [t if t.any() else np.ones_like(t) for t in train]
    return [_standardised([a], [t])[0] for a, t in zip(arrays, rows, strict=True)]


def _spanned(
    arrays: Sequence[NDArray[np.float32]], train: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.float32]]:
    """Turn channels into the directions that they span: for ridge the same, and of full rank.

    An average reference, or components that were taken out, leave fewer than there are channels.
    """
    rows = np.concatenate([a[t] for a, t in zip(arrays, train, strict=True)])
    values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
    kept = vectors[:, values > 1e-6 * values[-1]].astype(np.float32)
    return [a @ kept for a in arrays]


def response_peaks(
    coef: NDArray[np.floating], times: NDArray[np.float64]
) -> list[dict[str, float | int]]:
    r"""Find the latencies at which response functions are strong over all channels.

    They are the local maxima over time of :math:`g(t) = \sqrt{\sum_{c} w_c(t)^2 / C}` that rise to
    a quarter of the highest one. The first and the last delay are none, as g may rise beyond.

    Parameters
    ----------
    coef : ndarray, shape (n_channels, n_lags)
        Response functions of one feature.
    times : ndarray, shape (n_lags,)
        Seconds.

    Returns
    -------
    list of dict
        ``latency`` (s), ``power`` (g), and the strongest ``channel`` (from 0) with its ``weight``.
    """
    power = np.sqrt((np.asarray(coef, dtype=np.float64) ** 2).mean(axis=0))
    inner = np.arange(1, len(power) - 1)
    high = (power[inner] > power[inner - 1]) & (power[inner] >= power[inner + 1])
    found = []
    for i in inner[high & (power[inner] >= _HEIGHT * power.max())].tolist():
        channel = int(np.abs(coef[:, i]).argmax())
        found.append(
            {
                "latency": float(times[i]),
                "power": float(power[i]),
                "channel": channel,
                "weight": float(coef[channel, i]),
            }
        )
    return found


def trf_record(trials: Sequence[ListeningTrial], target: str, **options: Any) -> dict[str, Any]:
    """Fit and score forward and backward models; the first result of `trf_models`."""
    return trf_models(trials, target, **options)[0]


def trf_models(
    trials: Sequence[ListeningTrial],
    target: str,
    *,
    split: str = "time",
    n_folds: int = 5,
    tmin: float = 0.0,
    tmax: float = 0.4,
    alphas: Sequence[float] = ALPHAS,
    n_shifts: int = 9,
    allow_leak: bool = False,
    bad: Sequence[NDArray[np.bool_]] | None = None,
) -> tuple[dict[str, Any], xr.Dataset]:
    """Fit and score forward and backward models of some trials.

    Parameters
    ----------
    trials : sequence of ListeningTrial
        Of one listener.
    target : str
        Feature space; that of the attended talker is taken.
    split : {"time", "trial"}
        "time" holds out the same block of time of all trials, with a gap of the delays' span on
        both sides; "trial" holds out whole trials.
    n_folds : int
        Blocks, or folds of trials.
    tmin, tmax, alphas
        As for `held_out`.
    n_shifts : int
        Shifted stimuli, at equal steps round each trial.
    allow_leak : bool
        Hold out trials though they share what was heard with those of the training.
    bad : sequence (trials) of ndarray of bool, shape (n_samples,), optional
        Samples that are neither fitted nor scored.

    Returns
    -------
    record : dict
        For JSON: what was done; ``backward`` and ``forward`` with the mean correlation ``r`` of
        held-out data, the ``null`` of the shifts, and the share ``p`` of shifts that reach r, r
        among them; for the forward model the channels above all shifts, and the ``peaks`` of the
        response functions that are fitted to everything.
    models : Dataset
        ``trf`` (neuroid, feature, lag), response functions fitted to everything, in standard
        deviations of both, with ``lag`` in s; ``channel_r`` (neuroid), the correlation of held-out
        data, and ``channel_null`` (shift, neuroid), the same for each shifted stimulus.

    Raises
    ------
    LeakError
        If a stretch of what was heard is the same, bit by bit, in training and test trials.
    ConfigError, SchemaError
        If trials are too few or too short, or do not go together.
    """
    rates = sorted({t.sampling_rate for t in trials})
    if len(rates) != 1 or len({t.neural.shape[1] for t in trials}) != 1:
        raise SchemaError(
            f"Trials have {sorted({t.neural.shape[1] for t in trials})} channels and rates of "
            f"{rates} Hz; expected one of each."
        )
    rate = rates[0]
    lags = delays(tmin, tmax, rate)
    lengths = [len(t.neural) for t in trials]
    check_size(trials[0].neural.shape[1], len(lags), sum(lengths))
    groups = content_groups(trials)
    if split == "time":
        roles: Any = TimeBlocks(n_folds).roles(lengths, int(lags[-1] - lags[0]), rate)
    elif split == "trial":
        pairs = make_splits(trials, n_folds=min(n_folds, len(trials)))
        check_leak(pairs, groups, allow=allow_leak)
        roles = []
        for train, test in pairs:
            place = np.zeros(len(trials), dtype=np.int8)
            place[train], place[test] = TRAIN, TEST
            roles.append([np.full(n, k) for n, k in zip(lengths, place, strict=True)])
    else:
        raise ConfigError(f"split is {split!r}; expected 'time' or 'trial'.")
    good = [np.ones(n, dtype=bool) for n in lengths] if bad is None else [~b for b in bad]
    roles = [[role * g for role, g in zip(fold, good, strict=True)] for fold in roles]
    shifts = [k / (n_shifts + 1) for k in range(1, n_shifts + 1)]
    options: dict[str, Any] = {"tmin": tmin, "tmax": tmax, "alphas": alphas, "shifts": shifts}
    names = [t.name for t in trials]
    record: dict[str, Any] = {
        "target": target,
        "sampling_rate": rate,
        "delays": [float(lags[0] / rate), float(lags[-1] / rate)],
        "n_trials": len(trials),
        "n_channels": int(trials[0].neural.shape[1]),
        "seconds": sum(lengths) / rate,
        "trials_with_a_stimulus_of_their_own": int(
            (np.unique(groups, return_counts=True)[1] == 1).sum()
        ),
        "split": split,
        "n_folds": len(roles),
        "leak": bool(split == "trial" and len(np.unique(groups)) < len(trials)),
    }
    backward = held_out(trials, target, roles, direction="backward", **options)
    record["backward"] = _summary(backward, names)
    forward = held_out(trials, target, roles, direction="forward", **options)
    channels = forward.mean()
    best = int(np.nanargmax(channels[0]))
    record["forward"] = _summary(forward, names) | {
        "best_channel": {"channel": best, "r": float(channels[0, best])},
        "channels_above_all_shifts": int((channels[0] > channels[1:].max(axis=0)).sum())
        if shifts
        else None,
    }
    x = _standardised([t.attended_features(target).astype(np.float32) for t in trials], good)
    y = _standardised_each([t.neural.astype(np.float32) for t in trials], good)
    model = LaggedRidge(
        tmin, tmax, rate, alphas=alphas, cv=TimeBlocks(n_folds), metric="r",
        alpha_per_target=False, device="cpu",
    ).fit(x, y, rows=good)  # fmt: skip
    record["forward"]["peaks"] = [
        peak | ({"feature": f} if model.coef_.shape[1] > 1 else {})
        for f in range(model.coef_.shape[1])
        for peak in response_peaks(model.coef_[:, f], model.times_)
    ]
    models = xr.Dataset(
        {
            "trf": (("neuroid", "feature", "lag"), np.asarray(model.coef_)),
            "channel_r": ("neuroid", channels[0]),
            "channel_null": (("shift", "neuroid"), channels[1:]),
        },
        coords={
            "lag": ("lag", np.asarray(model.times_), {"units": "s"}),
            "space": ("feature", np.full(model.coef_.shape[1], target)),
        },
    )
    return record, models


def with_channels(
    models: xr.Dataset, responses: xr.Dataset, record: Mapping[str, Any]
) -> xr.Dataset:
    """Return the models of `trf_models` with the places of their channels, and what was found.

    Parameters
    ----------
    models, record
        From `trf_models`.
    responses : Dataset
        The recording: schema ``responses`` (time, neuroid).

    Returns
    -------
    Dataset
        With the recording's coordinates of the neuroids; ``attrs``: ``subject``, ``target``,
        ``space`` (of the positions), ``sampling_rate``, ``split``, and ``forward_r``,
        ``forward_null``, ``backward_r``, ``backward_null`` (NaN without shifts).
    """
    found = {
        f"{direction}_{name}": float(value)
        for direction in ("forward", "backward")
        for name, value in (
            ("r", record[direction]["r"]),
            ("null", record[direction].get("null", {"r": np.nan})["r"]),
        )
    }
    ds = models.assign_coords(
        {str(c): v for c, v in responses.coords.items() if v.dims == ("neuroid",)}
    )
    ds.attrs = {
        "subject": str(responses.attrs.get("subject", "")),
        "space": str(responses.attrs.get("space", "")),
        **{k: record[k] for k in ("target", "sampling_rate", "split", "n_channels")},
        **found,
    }
    return ds


def _summary(found: HeldOut, names: Sequence[str]) -> dict[str, Any]:
    means = found.mean().mean(axis=1)
    own = found.r[:, :, 0].mean(axis=2)
    tested = ~np.isnan(own)
    alpha, count = np.unique(found.alpha[:, 0], return_counts=True)
    summary: dict[str, Any] = {
        "r": float(means[0]),
        "r_by_fold": [float(np.mean(row[t])) for row, t in zip(own, tested, strict=True)],
        "r_by_trial": {
            n: float(np.mean(row[t])) for n, row, t in zip(names, own.T, tested.T, strict=True)
        },
        "alphas": {f"{a:g}": int(c) for a, c in zip(alpha, count, strict=True)},
    }
    if len(means) > 1:
        null = means[1:]
        summary["null"] = {
            "r": float(null.mean()),
            "sd": float(null.std()),
            "r_by_shift": null.tolist(),
        }
        summary["p"] = float((1 + (null >= means[0]).sum()) / (1 + len(null)))
    return summary
