"""Decoded attention as a section of the report. Everything here reads what was decoded."""

from __future__ import annotations

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

__all__ = ["PUBLISHED", "attention_section", "section_from_decoded"]

#: Mean accuracies over subjects that are published for subject-specific decoders, by study, kind of
#: decoder and window length (s); and minimal expected switch durations (s).
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fuglsang2017": {
        "reconstruction": {
            "accuracy": {1: 0.606, 2: 0.666, 5: 0.746, 10: 0.811, 20: 0.869, 40: 0.923},
            "mesd": 12.2,
        },
        "cca": {"accuracy": {1: 0.602, 2: 0.649, 5: 0.721, 10: 0.774, 20: 0.832, 40: 0.835}},
    },
    "biesmans2016": {
        "reconstruction": {
            "accuracy": {1: 0.586, 2: 0.620, 5: 0.675, 10: 0.729, 20: 0.783, 40: 0.846},
            "mesd": 18.1,
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
        missing = [a for a in ("subject", "decoder", "mesd") if a not in ds.attrs]
        if missing or "accuracy" not in ds:
            raise SchemaError(f"{path} holds no decoded attention.")
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
    published = {
        key: PUBLISHED.get(study, {}).get(str(next(iter(by.values())).attrs["decoder"]), {})
        for key, by in decoded.items()
    }
    subjects = list(dict.fromkeys(s for by in decoded.values() for s in by))
    figures = [_curves(decoded, names, published, seed)]
    if len(subjects) > 1:
        figures += [
            _by_subject(by, key, names[key])
            for key, by in decoded.items()
            if next(iter(by.values())).attrs["decoder"] != "oracle"
        ]
    figures.append(_switches(decoded, names, published))
    for key, by in decoded.items():
        forward = {s: ds for s, ds in by.items() if "trf" in ds}
        if forward:
            figures.append(_responses(forward, key, names[key]))
            figures += _maps(forward, key)
    listeners = next(iter(decoded.values()))
    first = next(iter(listeners.values()))
    return Section(
        id="attention",
        title="Who is listened to",
        intro=(
            "Two talkers speak, one is attended. A decoder scores each talker in windows of the "
            "recording; the higher score is its answer. All windows come from trials that the "
            "decoder was not fitted to."
        ),
        figures=figures,
        summary=_estimates(decoded, names, published, seed),
        methods=_methods(decoded, first),
        references=dict(_REFERENCES),
        facts={
            "Listeners": f"{len(subjects)}",
            "Channels": " / ".join(
                dict.fromkeys(str(ds.attrs["n_channels"]) for ds in _all(decoded))
            ),
            "Trials": f"{sum(int(ds['n_trials'].max()) for ds in listeners.values())}",
        },
        order=46,
    )


def _all(decoded: Mapping[str, Mapping[str, xr.Dataset]]) -> list[xr.Dataset]:
    return [ds for by in decoded.values() for ds in by.values()]


def _mean(
    by: Mapping[str, xr.Dataset], lengths: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean accuracy over subjects, its interval over subjects, or over trials of a few subjects."""
    values = {
        v: np.stack([ds[v].reindex(length=lengths).values for ds in by.values()])
        for v in ("accuracy", "low", "high")
    }
    mean = np.nanmean(values["accuracy"], axis=0)
    if len(by) < _FEW:
        below, above = (
            np.sqrt(np.nansum((values[v] - values["accuracy"]) ** 2, axis=0)) / len(by)
            for v in ("low", "high")
        )
        return mean, mean - below, mean + above
    rng = np.random.default_rng(seed)
    drawn = values["accuracy"][rng.integers(len(by), size=(_DRAWS, len(by)))].mean(axis=1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
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
    series: dict[str, tuple[NDArray, NDArray, NDArray]] = {
        names[key]: _mean(by, lengths, seed) for key, by in decoded.items()
    }
    nothing = np.full(len(lengths), np.nan)
    for key, known in published.items():
        if "accuracy" in known:
            means = np.array([known["accuracy"].get(float(x), np.nan) for x in lengths])
            series[f"{names[key]}, published mean"] = (means, nothing, nothing)
    first = next(iter(decoded.values()))
    band = [
        np.nanmean([ds[v].reindex(length=lengths).values for ds in first.values()], axis=0)
        for v in ("chance_low", "chance_high")
    ]
    chance = 1 / next(iter(first.values())).sizes["talker"]
    series["guessing"] = (np.full(len(lengths), chance), *band)
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
        + "Ground of guessing: what 95 % of guesses reach in as many windows of one listener. "
        "Look whether a curve leaves the band of guessing, and how it rises: it must, as longer "
        "windows hold more evidence.",
        _series_dataset(lengths, series, "accuracy"),
        options={"x_log": True, "x_label": "window (s)", "y_label": "accuracy"},
    )


def _by_subject(by: Mapping[str, xr.Dataset], key: str, name: str) -> Figure:
    lengths = _lengths(by)
    series = {
        s: tuple(ds[v].reindex(length=lengths).values for v in ("accuracy", "low", "high"))
        for s, ds in by.items()
    }
    return Figure(
        f"accuracy-{key}",
        "curve",
        f"Accuracy of each listener: {name}",
        "As above, for each listener, with intervals from trials drawn again. Look for listeners "
        "who are at chance at all lengths.",
        _series_dataset(lengths, series, "accuracy"),
        options={"x_log": True, "x_label": "window (s)", "y_label": "accuracy"},
    )


def _series_dataset(
    x: NDArray, series: Mapping[str, tuple[NDArray, ...]], long_name: str
) -> xr.Dataset:
    ds = xr.Dataset(
        {
            v: (("x", "series"), np.stack([values[i] for values in series.values()], axis=1))
            for i, v in enumerate(("value", "low", "high"))
        },
        coords={"x": x, "series": list(series)},
    )
    ds["value"].attrs = {"long_name": long_name, "units": ""}
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
        "Time to switch",
        "Minimal expected switch duration: how long a volume control with the best window length "
        "would take to follow a switch of attention, at 80 % of the time above 65 % gain. Lower is "
        "better; it weighs speed against accuracy."
        + (f" Not drawn: {endless} at chance, which never switch." if endless else ""),
        ds,
        options={"reference_lines": lines, "y_label": "MESD (s)"},
    )


def _responses(by: Mapping[str, xr.Dataset], key: str, name: str) -> Figure:
    series: dict[str, tuple[NDArray, ...]] = {}
    lag = next(iter(by.values()))["lag"].values * 1000
    for subject, ds in [*by.items()][:_SUBJECTS_DRAWN]:
        best = np.argsort(-np.nan_to_num(ds["channel_r"].values), kind="stable")
        spaces = ds["space"].values.astype(str)
        for i in best[:_CHANNELS_DRAWN].tolist():
            for space in dict.fromkeys(spaces.tolist()):
                response = ds["trf"].values[i, spaces == space].mean(axis=0)
                label = f"{subject} {ds['neuroid_id'].values[i]}"
                label += f", {space}" if len(set(spaces)) > 1 else ""
                series[label] = (response, *[np.full(len(lag), np.nan)] * 2)
    return Figure(
        f"responses-{key}",
        "curve",
        f"Temporal response functions: {name}",
        "Weights of the forward model: the response of a channel to a brief rise of the attended "
        "talker's features, in standard deviations of both; of the channels that are predicted "
        "best. Look at the latency and the sign of the first peaks.",
        _series_dataset(lag, series, "weight"),
        options={"x_label": "time after the sound (ms)", "y_label": "weight"},
    )


def _maps(by: Mapping[str, xr.Dataset], key: str) -> list[Figure]:
    """Draw where channels follow the attended talker, on the scalp or on the brain's outline."""
    figures = []
    for subject, ds in [*by.items()][:_SUBJECTS_DRAWN]:
        if not {"x", "y", "z"} <= set(ds.coords):
            continue
        xyz = np.stack([ds[a].values for a in "xyz"], axis=1)
        if not np.isfinite(xyz).all(axis=1).any():
            continue
        scalp = str(ds.attrs.get("space", "")) == "head"
        views = _scalp(xyz) if scalp else _sides(xyz)
        axes = (
            {"x_label": "left to right", "y_label": "back to front"}
            if scalp
            else {"x_label": "along the head (mm)", "y_label": "height (mm)"}
        )
        for view, (rows, at, outlines) in views.items():
            data = xr.Dataset(
                {
                    "x": ("observation", at[:, 0]),
                    "y": ("observation", at[:, 1]),
                    "value": ("observation", ds["channel_r"].values[rows]),
                    "label": ("observation", ds["neuroid_id"].values[rows].astype(str)),
                }
            )
            data["value"].attrs = {"long_name": "correlation", "units": "", "cmap": "sequential"}
            figures.append(
                Figure(
                    f"map-{key}-{subject}-{view}".replace(" ", "-"),
                    "scatter",
                    f"Where the talker is heard: {subject}, {view}",
                    "Cross-validated correlation of each channel with its prediction from the "
                    "attended talker (forward model). It tells where the signal is; weights of a "
                    "decoder would not, as they also cancel noise.",
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
    for key, by in decoded.items():
        lengths = _lengths(by)
        length = float(lengths[np.argmin(np.abs(np.log(lengths / 5)))])
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
                reference="" if known is None else f"published mean {known:.3f}",
            )
        )
    return estimates


def _methods(decoded: Mapping[str, Mapping[str, xr.Dataset]], first: xr.Dataset) -> str:
    kinds = {str(next(iter(by.values())).attrs["decoder"]) for by in decoded.values()}
    said = {
        "reconstruction": "linear reconstruction of the attended talker's features from delayed "
        "recordings (ridge; penalties chosen within the training trials) [@osullivan2015]",
        "forward": "forward models (temporal response functions; ridge, banded over feature "
        "spaces), whose predictions from each talker are correlated with the recording",
        "cca": "canonical correlation of delayed recordings and delayed sound, followed by linear "
        "discriminant analysis of the correlations",
        "cluster": "a bidirectional LSTM that names the cluster of the attended talker's voice",
        "oracle": "an oracle that knows the attended talker",
    }
    return (
        f"Attention was decoded at {first.attrs['sampling_rate']:g} Hz by "
        + "; ".join(text for kind, text in said.items() if kind in kinds)
        + ". All windows of a trial were on one side of every split. Accuracies have intervals "
        "from trials (or listeners) drawn with replacement; the band of chance is binomial for as "
        "many windows as fit without overlap. The minimal expected switch duration follows "
        "[@geirnaert2020]."
    )
