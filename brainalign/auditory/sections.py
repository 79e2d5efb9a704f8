"""Decoded attention as a section of the report. Everything here reads what was decoded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.cortex import fsaverage5
from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.store import read
from brainalign.errors import ConfigError, SchemaError

__all__ = [
    "PUBLISHED",
    "attention_section",
    "response_section",
    "section_from_decoded",
    "section_from_responses",
]

_LINEAR = {"sampling_rate": 64.0, "space": "envelope", "tmin": 0.0, "tmax": 0.4, "n_channels": None}
_CCA = {"space": "envelope", "sound_span": 1.2, "n_components": 10}
#: Mean accuracies over subjects that are published for subject-specific decoders of all channels,
#: by study, kind of decoder and window length (s); minimal expected switch durations (s); and the
#: settings of these decoders.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fuglsang2017": {
        "reconstruction": {
            "accuracy": {1: 0.606, 2: 0.666, 5: 0.746, 10: 0.811, 20: 0.869, 40: 0.923},
            "mesd": 12.2,
            "settings": _LINEAR,
        },
        "cca": {
            "accuracy": {1: 0.602, 2: 0.649, 5: 0.721, 10: 0.774, 20: 0.832, 40: 0.835},
            "settings": _CCA,
        },
    },
    "biesmans2016": {
        "reconstruction": {
            "accuracy": {1: 0.586, 2: 0.620, 5: 0.675, 10: 0.729, 20: 0.783, 40: 0.846},
            "mesd": 18.1,
            "settings": _LINEAR,
        },
    },
}
_REFERENCES = {
    "geirnaert2020": """@article{geirnaert2020,
  author = {Geirnaert, Simon and Francart, Tom and Bertrand, Alexander},
  title = {An Interpretable Performance Metric for Auditory Attention Decoding Algorithms in a
           Context of Neuro-Steered Gain Control},
  journal = {IEEE Transactions on Neural Systems and Rehabilitation Engineering},
  volume = {28},
  pages = {307--317},
  year = {2020},
  doi = {10.1109/TNSRE.2019.2952724}
}
""",
    "haufe2014": """@article{haufe2014,
  author = {Haufe, Stefan and Meinecke, Frank and G{\\"o}rgen, Kai and D{\\"a}hne, Sven and
            Haynes, John-Dylan and Blankertz, Benjamin and Bie{\\ss}mann, Felix},
  title = {On the Interpretation of Weight Vectors of Linear Models in Multivariate Neuroimaging},
  journal = {NeuroImage},
  volume = {87},
  pages = {96--110},
  year = {2014},
  doi = {10.1016/j.neuroimage.2013.10.067}
}
""",
    "osullivan2015": """@article{osullivan2015,
  author = {O'Sullivan, James A. and Power, Alan J. and Mesgarani, Nima and Rajaram, Siddharth and
            Foxe, John J. and Shinn-Cunningham, Barbara G. and Slaney, Malcolm and
            Shamma, Shihab A. and Lalor, Edmund C.},
  title = {Attentional Selection in a Cocktail Party Environment Can Be Decoded from Single-Trial
           {EEG}},
  journal = {Cerebral Cortex},
  volume = {25},
  pages = {1697--1706},
  year = {2015},
  doi = {10.1093/cercor/bht355}
}
""",
}
#: Subjects whose response functions and maps are drawn, and channels of each.
_SUBJECTS_DRAWN, _CHANNELS_DRAWN = 4, 2
_DRAWS = 2000
#: Windows after a switch that are drawn.
_SHOWN = 4
_ATTRS = ("subject", "decoder", "mesd", "settings", "responsive", "seconds", "seconds_left_out")
_LATENCY = ("latency", "latency_low", "latency_high")
#: Fewer listeners than these say nothing of others: intervals are over their trials.
_FEW = 5


def section_from_decoded(
    decoded: Sequence[str | Path],
    *,
    study: str = "",
    titles: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Section:
    """Describe decoded attention on disk.

    Parameters
    ----------
    decoded : sequence of path
        Files of `brainalign.auditory.experiment.decode`, named by their decoder, one for each
        subject and decoder.
    study, titles, seed
        See `attention_section`.
    """
    found: dict[str, dict[str, xr.Dataset]] = {}
    for path in map(Path, decoded):
        ds = read(path).load()
        missing = [a for a in _ATTRS if a not in ds.attrs]
        if missing or "accuracy" not in ds:
            raise SchemaError(
                f"{path} holds no decoded attention: it has no "
                + (f"attribute {missing[0]!r}." if missing else "accuracy."),
                "Write it by `brainalign aad-decode`.",
            )
        found.setdefault(path.stem, {})[str(ds.attrs["subject"])] = ds
    return attention_section(found, study=study, titles=titles, seed=seed)


def attention_section(
    decoded: Mapping[str, Mapping[str, xr.Dataset]],
    *,
    study: str = "",
    titles: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Section:
    """Describe how well attention is decoded, and by what.

    Parameters
    ----------
    decoded : mapping of str to mapping of str to Dataset
        By decoder, then by subject, of `brainalign.auditory.experiment.decode`.
    study : str
        Name of the study, for what is published of it.
    titles : mapping of str to str, optional
        Names of the decoders for the reader.
    seed : int
        Of the intervals over subjects.
    """
    if not decoded or not all(decoded.values()):
        raise ConfigError("There is no decoded attention to describe.")
    names = {key: (titles or {}).get(key, key) for key in decoded}
    published = {key: _published(study, by) for key, by in decoded.items()}
    subjects = list(dict.fromkeys(s for by in decoded.values() for s in by))
    figures = [_curves(decoded, names, published, seed)]
    if len(subjects) > 1:
        figures += [
            _by_subject(by, key, names[key], published[key]) for key, by in _judged(decoded).items()
        ]
    figures.append(_switches(decoded, names, published))
    switching = {
        key: {s: ds for s, ds in by.items() if ds.sizes.get("switch_length")}
        for key, by in decoded.items()
    }
    if all(switching.values()):
        figures += _followed(switching, names, seed)
    several = sum(any("trf" in ds for ds in by.values()) for by in decoded.values()) > 1
    for key, by in decoded.items():
        forward = {s: ds for s, ds in by.items() if "trf" in ds}
        if forward:
            figures += _responses(forward, key, names[key])
            figures += _maps(forward, key, names[key] if several else "")
    listeners = next(iter(decoded.values()))
    first = next(iter(listeners.values()))
    methods = _methods(decoded, names, first)
    return Section(
        id="attention",
        title="Who is listened to",
        intro=(
            "Two talkers speak, one is attended. A decoder scores each talker in windows of the "
            "recording; the higher score is its answer. All windows come from trials that the "
            "decoder was not fitted to." + _others(decoded, names)
        ),
        figures=figures,
        summary=[
            *_estimates(decoded, names, published, seed),
            *_latencies(switching, names, seed),
        ],
        methods=methods,
        references={k: v for k, v in _REFERENCES.items() if f"[@{k}]" in methods},
        facts={
            "Listeners": f"{len(subjects)}",
            "Channels": " / ".join(
                dict.fromkeys(str(ds.attrs["n_channels"]) for ds in _all(decoded))
            ),
            "Trials": f"{sum(int(ds['n_trials'].max()) for ds in listeners.values())}",
            **_left_out(listeners),
        },
        order=46,
    )


def _published(study: str, by: Mapping[str, xr.Dataset]) -> Mapping[str, Any]:
    """Return what is published of a decoder, if all listeners' is that one."""
    known = PUBLISHED.get(study, {})
    found = [known.get(str(ds.attrs["decoder"]), {}) for ds in by.values()]
    same = all(_is_published(ds, of) for ds, of in zip(by.values(), found, strict=True))
    return found[0] if same else {}


def _is_published(ds: xr.Dataset, known: Mapping[str, Any]) -> bool:
    if not known or ds.attrs.get("split") == "subject":
        return False
    if json.loads(ds.attrs["responsive"]) is not None:
        return False
    own = {"sampling_rate": ds.attrs["sampling_rate"], **json.loads(ds.attrs["settings"])}
    return all(own[name] == value for name, value in known["settings"].items())


def _left_out(by: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """Say how much of the recordings took no part, if any."""
    used, left = (sum(ds.attrs[a] for ds in by.values()) for a in ("seconds", "seconds_left_out"))
    said = f"{left:.0f} of {used + left:.0f} s: marked as bad, or between marks and too short"
    return {"Left out": said} if left else {}


def section_from_responses(fitted: Sequence[str | Path]) -> Section:
    """Describe response functions on disk.

    Parameters
    ----------
    fitted : sequence of path
        Files that ``brainalign trf --out`` writes, one for each subject and feature space.
    """
    found: dict[str, dict[str, xr.Dataset]] = {}
    for path in map(Path, fitted):
        ds = read(path).load()
        missing = [a for a in ("subject", "target", "forward_r", "backward_r") if a not in ds.attrs]
        if missing or "trf" not in ds:
            raise SchemaError(f"{path} holds no response functions.")
        found.setdefault(str(ds.attrs["target"]), {})[str(ds.attrs["subject"])] = ds
    return response_section(found)


def response_section(fitted: Mapping[str, Mapping[str, xr.Dataset]]) -> Section:
    """Describe how recordings follow what is heard: response functions, and where.

    Parameters
    ----------
    fitted : mapping of str to mapping of str to Dataset
        By feature space, then by subject: the models of `brainalign.auditory.trf.trf_models` with
        the coordinates of the neuroids; in attrs ``sampling_rate``, ``split``, and r of held-out
        data and of shifted stimuli (``forward_r``, ``forward_null``, ``backward_r``,
        ``backward_null``).
    """
    if not fitted or not all(fitted.values()):
        raise ConfigError("There are no response functions to describe.")
    figures, summary = [], []
    for target, by in fitted.items():
        figures.append(_predicted(by, target))
        figures += _responses(by, target, target)
        figures += _maps(by, target)
        for direction, what in (
            ("backward", f"The {target} is reconstructed from the recording"),
            ("forward", f"Channels are predicted from the {target}"),
        ):
            r, null = (
                float(np.mean([ds.attrs[f"{direction}_{k}"] for ds in by.values()]))
                for k in ("r", "null")
            )
            summary.append(
                Estimate(
                    what,
                    r,
                    note=f"correlation in held-out time, mean of {len(by)} listeners"
                    if len(by) > 1
                    else "correlation in held-out time",
                    reference=f"shifted sound {null:.3f}" if np.isfinite(null) else "",
                )
            )
    listeners = next(iter(fitted.values()))
    first = next(iter(listeners.values()))
    held = "blocks of time" if first.attrs["split"] == "time" else "trials"
    return Section(
        id="responses",
        title="How the recording follows what is heard",
        intro=(
            "A forward model predicts every channel from delayed features of the sound; its "
            "weights are temporal response functions. Correlations are of data that the model was "
            "not fitted to."
        ),
        figures=figures,
        summary=summary,
        methods=(
            f"Temporal response functions were fitted at {first.attrs['sampling_rate']:g} Hz with "
            f"delays of {float(first['lag'][0]) * 1000:.0f} to "
            f"{float(first['lag'][-1]) * 1000:.0f} ms by ridge regression. Correlations are of "
            f"held-out {held}; penalties were chosen within the training data. Chance is the same "
            "for sounds that were shifted in a circle, fitted anew. Unlike a decoder's, the "
            "weights of a forward model can be read as responses [@haufe2014]."
        ),
        references={"haufe2014": _REFERENCES["haufe2014"]},
        facts={
            "Listeners": f"{len(listeners)}",
            "Channels": " / ".join(
                dict.fromkeys(str(ds.sizes["neuroid"]) for ds in listeners.values())
            ),
        },
        order=46,
    )


def _predicted(by: Mapping[str, xr.Dataset], target: str) -> Figure:
    """Draw how well channels are predicted beside what shifted sounds reach."""
    value = np.array(
        [
            [np.nanmean(ds["channel_r"]), np.nanmax(ds["channel_r"]), ds.attrs["forward_null"]]
            for ds in by.values()
        ]
    )
    ds = xr.Dataset(
        {"value": (("item", "series"), value)},
        coords={
            "item": list(by),
            "series": ["mean of the channels", "best channel", "mean, shifted sound"],
        },
    )
    ds["value"].attrs = {"long_name": "correlation", "units": ""}
    return Figure(
        f"predicted-{target}",
        "points",
        f"Channels predicted from the {target}",
        "Correlation of held-out data with their prediction, of each listener. Sounds that are "
        "shifted in a circle tell chance; the best of many channels is above it by choice alone.",
        ds,
        options={"y_label": "correlation"},
    )


def _judged(
    decoded: Mapping[str, Mapping[str, xr.Dataset]],
) -> Mapping[str, Mapping[str, xr.Dataset]]:
    """Return the decoders without those that know the answer, unless there are no others."""
    found = {
        key: by
        for key, by in decoded.items()
        if next(iter(by.values())).attrs["decoder"] != "oracle"
    }
    return found or decoded


def _all(decoded: Mapping[str, Mapping[str, xr.Dataset]]) -> list[xr.Dataset]:
    return [ds for by in decoded.values() for ds in by.values()]


def _others(decoded: Mapping[str, Mapping[str, xr.Dataset]], names: Mapping[str, str]) -> str:
    """Say which decoders are of other listeners."""
    found = [
        names[key]
        for key, by in decoded.items()
        if all(ds.attrs.get("split") == "subject" for ds in by.values())
    ]
    return f" Fitted to other listeners alone: {', '.join(found)}." if found else ""


def _mean(
    by: Mapping[str, xr.Dataset],
    lengths: NDArray[np.float64],
    seed: int,
    *,
    of: tuple[str, str, str] = ("accuracy", "low", "high"),
    over: str = "length",
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean over subjects, with its interval over subjects, or over trials of a few subjects.

    A length at which a subject has none, or an infinite value, is of the others.
    """
    value, *ends = (
        np.stack([ds[v].reindex({over: lengths}).values for ds in by.values()]) for v in of
    )
    value = np.where(np.isfinite(value), value, np.nan)
    n = np.isfinite(value).sum(axis=0)
    mean = np.nansum(value, axis=0) / np.where(n, n, np.nan)
    if len(by) < _FEW:
        below, above = (
            np.sqrt(np.where(np.isfinite(value), (end - value) ** 2, 0).sum(axis=0)) / n.clip(1)
            for end in ends
        )
        return mean, mean - below, mean + above
    rng = np.random.default_rng(seed)
    drawn = value[rng.integers(len(by), size=(_DRAWS, len(by)))]
    counts = np.isfinite(drawn).sum(axis=1)
    means = np.nansum(drawn, axis=1) / np.where(counts, counts, np.nan)
    low, high = np.full(len(lengths), np.nan), np.full(len(lengths), np.nan)
    some = n > 0
    low[some], high[some] = np.nanpercentile(means[:, some], [2.5, 97.5], axis=0)
    return mean, low, high


def _lengths(by: Mapping[str, xr.Dataset]) -> NDArray[np.float64]:
    return np.unique(np.concatenate([ds["length"].values for ds in by.values()]))


def _curves(
    decoded: Mapping[str, Mapping[str, xr.Dataset]],
    names: Mapping[str, str],
    published: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> Figure:
    lengths = np.unique(np.concatenate([_lengths(by) for by in decoded.values()]))
    series: dict[str, tuple[NDArray, ...]] = {
        names[key]: _mean(by, lengths, seed) for key, by in decoded.items()
    }
    nothing = np.full(len(lengths), np.nan)
    for key, known in published.items():
        if "accuracy" in known:
            means = np.array([known["accuracy"].get(float(x), np.nan) for x in lengths])
            series[f"{names[key]}, published mean"] = (means, nothing, nothing)
    first = next(iter(decoded.values()))
    series["guessing"] = _guessing(first, lengths)
    several = max(len(by) for by in decoded.values()) >= _FEW
    return Figure(
        "accuracy",
        "curve",
        "Accuracy by length of the window",
        "Share of windows in which the attended talker has the highest score"
        + (
            ", mean over listeners with 95 % intervals from listeners drawn again. "
            if several
            else ", mean over listeners with 95 % intervals from trials drawn again, since windows "
            "of one trial are not independent. "
        )
        + "Shaded around guessing: what 95 % of guesses reach in as many windows of one listener. "
        "Look whether a curve leaves the band of guessing, and how it rises: it must, as longer "
        "windows hold more evidence.",
        _series_dataset(lengths, series, "accuracy"),
        options={"x_log": True, "x_label": "window (s)", "y_label": "accuracy"},
    )


def _guessing(
    by: Mapping[str, xr.Dataset], lengths: NDArray[np.float64]
) -> tuple[NDArray[np.float64], ...]:
    """Chance, and the mean over listeners of the band that guesses of one listener reach."""
    band = [
        np.nanmean([ds[v].reindex(length=lengths).values for ds in by.values()], axis=0)
        for v in ("chance_low", "chance_high")
    ]
    return np.full(len(lengths), _chance(by)), *band


def _chance(by: Mapping[str, xr.Dataset]) -> float:
    return 1 / next(iter(by.values())).sizes["talker"]


def _by_subject(
    by: Mapping[str, xr.Dataset], key: str, name: str, published: Mapping[str, Any]
) -> Figure:
    lengths = _lengths(by)
    series: dict[str, tuple[NDArray, ...]] = {
        s: tuple(ds[v].reindex(length=lengths).values for v in ("accuracy", "low", "high"))
        for s, ds in by.items()
    }
    if "accuracy" in published:
        means = np.array([published["accuracy"].get(float(x), np.nan) for x in lengths])
        series["published mean"] = _line(means)
    series["guessing"] = _guessing(by, lengths)
    return Figure(
        f"accuracy-{key}",
        "curve",
        f"Accuracy of each listener: {name}",
        "As above, for each listener, with intervals from trials drawn again. Look for listeners "
        "who stay within the band of guessing at all lengths.",
        _series_dataset(lengths, series, "accuracy"),
        options={"x_log": True, "x_label": "window (s)", "y_label": "accuracy"},
    )


def _line(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return a series without an interval."""
    return values, *[np.full(len(values), np.nan)] * 2


def _series_dataset(
    x: NDArray, series: Mapping[str, tuple[NDArray, ...]], long_name: str, units: str = ""
) -> xr.Dataset:
    ds = xr.Dataset(
        {
            v: (("x", "series"), np.stack([values[i] for values in series.values()], axis=1))
            for i, v in enumerate(("value", "low", "high"))
        },
        coords={"x": x, "series": list(series)},
    )
    ds["value"].attrs = {"long_name": long_name, "units": units}
    return ds


def _switches(
    decoded: Mapping[str, Mapping[str, xr.Dataset]],
    names: Mapping[str, str],
    published: Mapping[str, Mapping[str, Any]],
) -> Figure:
    subjects = list(dict.fromkeys(s for by in decoded.values() for s in by))
    value = np.array(
        [[by[s].attrs["mesd"] if s in by else np.nan for by in decoded.values()] for s in subjects],
        dtype=np.float64,
    )
    endless = int(np.isinf(value).sum())
    value[np.isinf(value)] = np.nan
    ds = xr.Dataset(
        {"value": (("item", "series"), value)},
        coords={"item": subjects, "series": [names[k] for k in decoded]},
    )
    ds["value"].attrs = {"long_name": "MESD", "units": "s"}
    lines = [
        {"label": f"{names[k]}, published", "value": p["mesd"]}
        for k, p in published.items()
        if "mesd" in p
    ]
    return Figure(
        "switches",
        "points",
        "Minimal expected switch duration (MESD)",
        "How long a volume control with the best length of the window would take to follow a "
        "switch of attention, at 80 % of the time above 65 % gain. Lower is better; it weighs "
        "speed against accuracy."
        + (f" Not drawn: {endless} at chance, which never switch." if endless else ""),
        ds,
        options={"reference_lines": lines, "y_label": "MESD (s)"},
    )


def _followed(
    decoded: Mapping[str, Mapping[str, xr.Dataset]], names: Mapping[str, str], seed: int
) -> list[Figure]:
    """Draw how decisions follow switches: by the time since, and by the length of the window."""
    lengths = _switch_lengths(decoded)
    chosen = _near(lengths)
    since = np.unique(np.concatenate([ds["since"].values for ds in _all(decoded)]))
    since = since[since <= _SHOWN * chosen]
    share, latency, lost = {}, {}, []
    for key, by in decoded.items():
        curves = np.stack(
            [
                ds["share"].reindex(switch_length=[chosen], since=since).values[0]
                for ds in by.values()
            ]
        )
        there = np.isfinite(curves).any(axis=0)
        mean = np.full(len(since), np.nan)
        mean[there] = np.nanmean(curves[:, there], axis=0)
        share[names[key]] = _line(mean)
        latency[names[key]] = _mean(by, lengths, seed, of=_LATENCY, over="switch_length")
        never = sum(int(np.isinf(ds["latency"].values).sum()) for ds in by.values())
        if never:
            lost.append(f"{names[key]} ({never})")
    drawn = np.any([np.isfinite(v[0]) for v in share.values()], axis=0)
    shares = {k: tuple(v[drawn] for v in values) for k, values in share.items()}
    return [
        Figure(
            "after-a-switch",
            "curve",
            f"After a switch of attention, windows of {chosen:g} s",
            "Share of decisions for the new talker by the time since attention went there, over "
            "all switches. At first a window holds mostly the old talker, so that a good decoder "
            "starts near 0; it passes one half when more than half of the window is new. A decoder "
            "that guesses stays at one half.",
            _series_dataset(since[drawn], shares, "for the new talker"),
            options={
                "x_label": "time since the switch (s)",
                "y_label": "decisions for the new talker",
                "reference_lines": [{"label": "guessing", "value": 0.5}],
            },
        ),
        Figure(
            "latency",
            "curve",
            "Time until decisions follow a switch",
            "Median over switches of the time until all decisions are for the new talker for as "
            "long as a window lasts; mean over listeners with 95 % intervals. A decoder that errs "
            "nowhere takes half a window and the delay that its filters wait for. Look where a "
            "curve leaves that line: there decisions are wrong too often to hold."
            + (
                " Left out, since half of the switches or more are not followed (listeners and "
                f"lengths): {', '.join(lost)}."
                if lost
                else ""
            ),
            _series_dataset(
                lengths,
                {**latency, "half a window": _line(lengths / 2)},
                "latency",
                "s",
            ),
            options={"x_log": True, "x_label": "window (s)", "y_label": "latency (s)"},
        ),
    ]


def _switch_lengths(decoded: Mapping[str, Mapping[str, xr.Dataset]]) -> NDArray[np.float64]:
    return np.unique(np.concatenate([ds["switch_length"].values for ds in _all(decoded)]))


def _latencies(
    decoded: Mapping[str, Mapping[str, xr.Dataset]], names: Mapping[str, str], seed: int
) -> list[Estimate]:
    if not all(decoded.values()):
        return []
    length = _near(_switch_lengths(decoded))
    estimates = []
    for key, by in _judged(decoded).items():
        mean, low, high = (
            float(v[0])
            for v in _mean(by, np.array([length]), seed, of=_LATENCY, over="switch_length")
        )
        known = np.isfinite([low, high]).all()
        share = np.nanmean(
            [ds["followed"].reindex(switch_length=[length]).values for ds in by.values()]
        )
        estimates.append(
            Estimate(
                f"Switch of attention followed after, windows of {length:g} s: {names[key]}",
                mean,
                low if known else None,
                high if known else None,
                unit="s",
                note=f"median over switches, {share:.0%} of which are followed",
                reference=f"half a window {length / 2:g} s",
            )
        )
    return estimates


def _near(lengths: NDArray[np.float64], to: float = 5.0) -> float:
    return float(lengths[np.argmin(np.abs(np.log(lengths / to)))])


def _responses(by: Mapping[str, xr.Dataset], key: str, name: str) -> list[Figure]:
    """Draw response functions of the channels that are predicted best, a figure per space."""
    spaces = list(
        dict.fromkeys(s for ds in by.values() for s in ds["space"].values.astype(str).tolist())
    )
    lag = next(iter(by.values()))["lag"].values * 1000
    figures = []
    for space in spaces:
        series: dict[str, tuple[NDArray, ...]] = {}
        for subject, ds in [*by.items()][:_SUBJECTS_DRAWN]:
            columns = ds["space"].values.astype(str) == space
            for i in _best(ds)[:_CHANNELS_DRAWN].tolist():
                response = ds["trf"].values[i, columns].mean(axis=0)
                series[f"{subject} {ds['neuroid_id'].values[i]}"] = _line(response)
        figures.append(
            Figure(
                f"responses-{key}" + (f"-{space}" if len(spaces) > 1 else ""),
                "curve",
                f"Temporal response functions: {name}" + (f", {space}" if len(spaces) > 1 else ""),
                "Weights of the forward model by their delay: the response of a channel to a brief "
                "rise of the attended talker's features, in standard deviations of both; of the "
                f"{_CHANNELS_DRAWN} channels of each listener that are predicted best (or, with a "
                "single penalty, that have the largest weights). Look at the latency and the sign "
                "of the first peaks.",
                _series_dataset(lag, series, "weight"),
                options={"x_label": "time after the sound (ms)", "y_label": "weight"},
            )
        )
    return figures


def _best(ds: xr.Dataset) -> NDArray[np.intp]:
    """Order the channels that have a response function, that of the highest correlation first."""
    strength = ds["channel_r"].values
    if np.isnan(strength).all():
        strength = np.square(ds["trf"].values).sum(axis=(1, 2))
    order = np.argsort(-np.where(np.isnan(strength), -np.inf, strength), kind="stable")
    return order[np.isfinite(ds["trf"].values[order]).all(axis=(1, 2))]


def _maps(by: Mapping[str, xr.Dataset], key: str, model: str = "") -> list[Figure]:
    """Draw where channels follow the attended talker and their weights at the strongest latency.

    Places are on the scalp, or on the brain's outline.
    """
    figures = []
    for subject, ds in [*by.items()][:_SUBJECTS_DRAWN]:
        if not {"x", "y", "z"} <= set(ds.coords):
            continue
        xyz = np.stack([ds[a].values for a in "xyz"], axis=1)
        # Channels that were not chosen have no weights, and no place on a map of them.
        xyz[np.isnan(ds["trf"].values).any(axis=(1, 2))] = np.nan
        if not np.isfinite(xyz).all(axis=1).any():
            continue
        scalp = str(ds.attrs.get("space", "")) == "head"
        views = _scalp(xyz) if scalp else _sides(xyz)
        axes = (
            {"x_label": "left to right", "y_label": "back to front"}
            if scalp
            else {"y_label": "height (mm)"}
        )
        space = str(ds["space"].values[0])
        weights = ds["trf"].values[:, ds["space"].values.astype(str) == space].mean(axis=1)
        # Channels that follow nothing have the largest weights where nothing holds them back.
        follows = np.clip(np.nan_to_num(ds["channel_r"].values, nan=0.0), 0, None)
        heard = weights * (follows if follows.any() else np.ones_like(follows))[:, None]
        power = np.nanmean(np.square(heard), axis=0)
        # The first and the last delay also hold what lies beyond them.
        lag = 1 + int(power[1:-1].argmax()) if len(power) > 2 else int(power.argmax())
        latency = f"{float(ds['lag'].values[lag]) * 1000:.0f} ms"
        shown = (
            (
                f"map-{key}", f"Where the talker is heard: {subject}", ds["channel_r"].values,
                {"long_name": "correlation", "units": "", "cmap": "sequential"},
                "Cross-validated correlation of each channel with its prediction from the "
                "attended talker (forward model). It tells where the signal is.",
            ),
            (
                f"weights-{key}", f"Weights {latency} after the sound: {subject}",
                weights[:, lag], {"long_name": "weight", "units": "", "cmap": "diverging"},
                f"Weight of the forward model of each channel for the attended talker's {space}, "
                f"{latency} after the sound, where the weights of the channels that follow it are "
                "largest. Unlike those of a decoder, which also cancel noise, they tell where the "
                "response is, and its sign.",
            ),
        )  # fmt: skip
        for view, (rows, at, outlines) in views.items():
            if not scalp:
                ends = ("front", "back") if view == "left" else ("back", "front")
                axes["x_label"] = f"{ends[0]} to {ends[1]} (mm)"
            for name, title, values, attrs, caption in shown:
                if not np.isfinite(values[rows]).any():
                    continue
                data = xr.Dataset(
                    {
                        "x": ("observation", at[:, 0]),
                        "y": ("observation", at[:, 1]),
                        "value": ("observation", values[rows], attrs),
                        "label": ("observation", ds["neuroid_id"].values[rows].astype(str)),
                    }
                )
                figures.append(
                    Figure(
                        f"{name}-{subject}-{view}".replace(" ", "-"),
                        "scatter",
                        f"{title}, {view}" + (f" ({model})" if model else ""),
                        caption,
                        data,
                        options={"equal_axes": True, "outlines": outlines, **axes},
                    )
                )
    return figures


View = tuple[NDArray[np.intp], NDArray[np.float64], list[dict[str, list[float]]]]


def _scalp(xyz: NDArray[np.float64]) -> dict[str, View]:
    """Project positions on a head seen from above: the angle from the top is the radius."""
    rows = np.flatnonzero(np.isfinite(xyz).all(axis=1))
    x, y, z = xyz[rows].T
    radius = np.arccos(z / np.linalg.norm(xyz[rows], axis=1)) / (np.pi / 2)
    angle = np.arctan2(y, x)
    at = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    turn = np.linspace(0, 2 * np.pi, 73)
    head = {"x": np.cos(turn).tolist(), "y": np.sin(turn).tolist()}
    nose = {"x": [-0.12, 0.0, 0.12], "y": [0.993, 1.14, 0.993]}
    return {"from above": (rows, at, [head, nose])}


def _sides(xyz: NDArray[np.float64]) -> dict[str, View]:
    """Project positions (MNI) on the outline of each hemisphere that has electrodes."""
    from scipy.spatial import ConvexHull

    cortex = fsaverage5()
    views: dict[str, View] = {}
    known = np.isfinite(xyz).all(axis=1)
    for side, name, sign in (("L", "left", -1.0), ("R", "right", 1.0)):
        rows = np.flatnonzero(known & (xyz[:, 0] * sign > 0))
        if not len(rows):
            continue
        # The front is on the left of a left hemisphere that is seen from its side.
        surface = cortex.pial[cortex.hemisphere == side][:, 1:] * [sign, 1]
        hull = surface[ConvexHull(surface).vertices]
        hull = np.concatenate([hull, hull[:1]])
        outline = {"x": hull[:, 0].tolist(), "y": hull[:, 1].tolist()}
        views[name] = (rows, xyz[rows][:, 1:] * [sign, 1], [outline])
    return views


def _estimates(
    decoded: Mapping[str, Mapping[str, xr.Dataset]],
    names: Mapping[str, str],
    published: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> list[Estimate]:
    estimates = []
    for key, by in _judged(decoded).items():
        lengths = _lengths(by)
        length = _near(lengths)
        i = int(np.flatnonzero(lengths == length)[0])
        mean, low, high = (float(v[i]) for v in _mean(by, lengths, seed))
        known = published[key].get("accuracy", {}).get(length)
        estimates.append(
            Estimate(
                f"Attended talker found in {length:g} s: {names[key]}",
                mean,
                low if np.isfinite(low) else None,
                high if np.isfinite(high) else None,
                note="windows of trials that were left out"
                + (f", mean of {len(by)} listeners" if len(by) > 1 else ""),
                reference=f"guessing {_chance(by):.3f}"
                if known is None
                else f"published mean {known:.3f}",
            )
        )
    return estimates


def _methods(
    decoded: Mapping[str, Mapping[str, xr.Dataset]], names: Mapping[str, str], first: xr.Dataset
) -> str:
    kinds = {str(next(iter(by.values())).attrs["decoder"]) for by in decoded.values()}
    said = {
        "reconstruction": "linear reconstruction of the attended talker's features from delayed "
        "recordings (ridge; penalties chosen within the training trials) [@osullivan2015]",
        "forward": "forward models (temporal response functions; ridge, banded over feature "
        "spaces), whose predictions from each talker are correlated with the recording, and whose "
        "weights, unlike a decoder's, can be read as responses [@haufe2014]",
        "cca": "canonical correlation of delayed recordings and delayed sound, followed by linear "
        "discriminant analysis of the correlations",
        "cluster": "a bidirectional LSTM that names the cluster of the attended talker's voice",
        "oracle": "an oracle that knows the attended talker",
    }
    return (
        f"Attention was decoded at {first.attrs['sampling_rate']:g} Hz by "
        + "; ".join(text for kind, text in said.items() if kind in kinds)
        + ". All windows of a trial were on one side of every split."
        + _others(decoded, names)
        + " Accuracies have intervals "
        "from trials (or listeners) drawn with replacement; the band of chance is binomial for as "
        "many windows as fit without overlap. The minimal expected switch duration follows "
        "[@geirnaert2020]."
    )
