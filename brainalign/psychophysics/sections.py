"""Channels of people, models and areas as a section of the report. It reads what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.studies import geirhos2021
from brainalign.errors import ConfigError, SchemaError
from brainalign.psychophysics.analysis import (
    UNIT_SD,
    Channel,
    ChannelFit,
    accuracy_matrix,
    bootstrap_channel,
    compare_channels,
    fit_channel,
    fit_index_channel,
    fit_thresholds,
    percentile_intervals,
    recovery_error,
    repeated_over,
    threshold_indices,
    told_open,
)
from brainalign.psychophysics.areas import AreaFit, fit_area
from brainalign.psychophysics.trials import accuracy, consistency_with_people, shape_bias

__all__ = ["channels_section", "example_pictures"]

#: Of the average human observer and of networks, by the published rule.
_PUBLISHED = {"bandwidth": (1.0, 4.2), "centre": (39.6, 34.0)}
_TRIALS = (350, 700, 1400, 2800, 5600)
_CURVE_POINTS = 61
_HEATMAPS = 12
#: Thresholds are told up to this many times the strongest noise, and down to the weakest over it.
_TOLD = 8.0


@dataclass(frozen=True)
class _Measured:
    """A channel with what the figures need of it."""

    kind: str
    channel: Channel
    intervals: dict[str, tuple[float, float]]
    draws: xr.Dataset | None
    n: int
    drawn_over: str
    clean: float
    rule: Channel | None


def channels_section(
    observers: Mapping[str, xr.Dataset],
    *,
    people: Sequence[str] = (),
    areas: xr.Dataset | None = None,
    examples: tuple[NDArray[np.float32], Sequence[str], Sequence[str]] | None = None,
    published: Mapping[str, xr.Dataset] | None = None,
    missing: Sequence[str] = (),
    guess: float | None = None,
    level: float = 0.95,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Section:
    """Describe channels of spatial frequencies.

    Parameters
    ----------
    observers : mapping of str to Dataset
        Trials by title, as of `brainalign.psychophysics.observe` or of files.
    people : sequence of str
        Which of the titles are people.
    areas : Dataset, optional
        Of `brainalign.psychophysics.areas.move_areas`.
    examples : (ndarray (n, height, width), sequence of str, sequence of str), optional
        Pictures in 0..1, the label of each and its group.
    published : mapping of str to Dataset, optional
        Trials of people in other experiments by name, as of Geirhos et al. 2021.
    missing : sequence of str
        What was left out, and why.
    guess : float, optional
        Share right by chance, of all observers; by default one over the number of categories that
        each was shown.
    level : float
        Coverage of the intervals.
    n_bootstrap, seed : int
        Draws, and their seed.

    Raises
    ------
    ConfigError
        If there are no observers, or people are none of them.
    """
    strange = [p for p in people if p not in observers]
    if not observers or strange:
        raise ConfigError(
            f"Observers are needed, and people among them; got {[*observers]}, people {[*people]}."
        )
    found = {
        title: _of_observer(trials, title in people, guess, level, n_bootstrap, seed)
        for title, trials in observers.items()
    }
    fits: dict[str, AreaFit] = {}
    if areas is not None:
        fits = {
            str(a): fit_area(areas.sel(area=a), level=level, n_bootstrap=n_bootstrap, seed=seed)
            for a in areas["area"].values
        }
    found |= {title: _of_area(fit, areas) for title, fit in fits.items()}
    bands = _bands(observers)
    figures = [_table(found)]
    drawn = (
        _curves(found, bands, level, areas=False),
        _curves(found, bands, level, areas=True),
        _widths(found),
    )
    figures += [f for f in drawn if f is not None]
    thresholds = _thresholds(observers, guess, level, n_bootstrap, seed)
    unseeing = [t for t in observers if "below_half" in found[t].channel.flags]
    figures += [_sensitivity_map(thresholds, unseeing), _threshold_curves(thresholds, level)]
    figures += [_heatmap(i, t, observers[t]) for i, t in enumerate([*observers][:_HEATMAPS])]
    figures += [_area_heatmap(i, t, fits[t]) for i, t in enumerate([*fits][:_HEATMAPS])]
    undrawn = [
        f"{len(titles) - _HEATMAPS} of {len(titles)} {what} have no map of {shown}: "
        f"{', '.join([*titles][_HEATMAPS:])}"
        for titles, what, shown in (
            (observers, "observers", "accuracy"), (fits, "areas", "what noise moves")
        )
        if len(titles) > _HEATMAPS
    ]  # fmt: skip
    if examples is not None:
        figures.insert(0, _examples(*examples))
    figures.append(_trials_needed(observers, guess, seed))
    consistent = _consistency(observers, people, level, n_bootstrap, seed)
    figures += [] if consistent is None else [consistent]
    figures += _compared(found, people, level)
    summary = _estimates(found)
    if published:
        figures.append(_other_experiments(published))
        figures.append(_consistency_elsewhere(published, level, n_bootstrap, seed))
        summary += _published_estimates(published)
    unusable = [
        f"{title}: {', '.join(m.channel.flags)}" for title, m in found.items()
        if not m.channel.usable
    ]  # fmt: skip
    return Section(
        id="channels",
        title="Channels of spatial frequencies",
        intro=(
            "Critical band masking: noise of one octave is added to pictures of low contrast, and "
            "the bands in which it hurts are the observer's channel. People, networks and brain "
            "areas are measured with the same noise and told in the same units."
        ),
        figures=figures,
        summary=summary,
        methods=_methods(observers, bool(fits), level, n_bootstrap),
        references=dict(_REFERENCES) | ({"geirhos2021": geirhos2021.BIBTEX} if published else {}),
        exclusions=[*missing, *(f"no channel can be told of {u}" for u in unusable), *undrawn],
        facts={"Observers": str(len(observers)), "Areas": str(len(fits))},
        order=47,
    )


def _of_observer(
    trials: xr.Dataset,
    person: bool,
    guess: float | None,
    level: float,
    n_bootstrap: int,
    seed: int,
) -> _Measured:
    fit: ChannelFit = fit_channel(trials, guess=guess, level=level)
    over = repeated_over(trials)
    # Where nothing repeats, each trial is drawn by itself: by its picture if that has a name.
    named = "stimulus_id" in trials.variables and np.unique(trials["stimulus_id"]).size > 1
    units = over or (("stimulus_id",) if named else ())
    draws = bootstrap_channel(trials, over=units, guess=guess, n_bootstrap=n_bootstrap, seed=seed)
    intervals = percentile_intervals(draws, level) if over else fit.intervals
    try:
        matrix = accuracy_matrix(trials)
        rule = fit_index_channel(
            threshold_indices(matrix.values), lowest=float(matrix["frequency"][0]),
            n_levels=len(matrix), accuracy=matrix.values,
        )  # fmt: skip
    except SchemaError:  # conditions that are not crossed
        rule = None
    clean = trials["correct"].values[trials["noise_sd"].values == 0]
    return _Measured(
        "people" if person else "model",
        told_open(fit.channel, intervals),
        intervals,
        draws,
        fit.n_trials,
        {(): "trials", ("stimulus_id",): "images", ("subject",): "subjects"}.get(
            over, "images and subjects"
        ),
        float(clean.mean()) if clean.size else np.nan,
        rule,
    )  # fmt: skip


def _of_area(fit: AreaFit, areas: xr.Dataset | None) -> _Measured:
    n = 0 if areas is None else areas.sizes["stimulus"] * areas.sizes["cell"]
    return _Measured("area", fit.channel, fit.intervals, fit.draws, n, "images", np.nan, None)


def _bands(observers: Mapping[str, xr.Dataset]) -> NDArray[np.float64]:
    noisy = [t["frequency"].values[t["noise_sd"].values > 0] for t in observers.values()]
    return np.unique(np.concatenate(noisy))


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{low:.3g}–{high:.3g}" if np.isfinite(high) and low > 0 else (
        f"up to {high:.3g}" if np.isfinite(high) else f"{low:.3g} or more" if low > 0 else "open"
    )  # fmt: skip


def _table(found: Mapping[str, _Measured]) -> Figure:
    columns: dict[str, list[Any]] = {
        "observer": [*found],
        "kind": [m.kind for m in found.values()],
        "trials": [f"{m.n:,}" for m in found.values()],
        "right, %": ["" if np.isnan(m.clean) else f"{100 * m.clean:.0f}" for m in found.values()],
    }
    units = {"bandwidth": "octaves", "centre": "cycles per image", "sensitivity": ""}
    for name, unit in units.items():
        columns[f"{name}, {unit}" if unit else name] = [
            f"{getattr(m.channel, name):.3g} ({_interval(m.intervals[name])})"
            for m in found.values()
        ]
    columns["drawn over"] = [m.drawn_over for m in found.values()]
    columns["flags"] = [", ".join(m.channel.flags) or "none" for m in found.values()]
    columns["published rule, octaves"] = [_by_rule(m.rule) for m in found.values()]
    return Figure(
        "channels",
        "table",
        "Channels",
        "Bandwidth, centre and peak sensitivity of each channel, with intervals over what was "
        "drawn anew; right answers are those without noise. Rows flagged flat, below_half or "
        "diverged are no estimates. An open end means that these trials exclude no value on that "
        "side. The last column is the bandwidth by the published rule, with its flags.",
        xr.Dataset({c: ("row", np.array(v)) for c, v in columns.items()}),
    )


def _by_rule(rule: Channel | None) -> str:
    if rule is None:
        return ""
    width = f"{rule.bandwidth:.3g}" if np.isfinite(rule.bandwidth) else ""
    flags = ", ".join(rule.flags)
    return f"{width} ({flags})" if width and flags else width or flags


def _gain(x: NDArray[np.float64], centre: Any, bandwidth: Any) -> NDArray:
    """Return log-Gaussian sensitivity over its peak, at (frequency,) for each of (draw, 1)."""
    return 2.0 ** -((2 * np.log2(x / centre) / bandwidth) ** 2)


def _curves(
    found: Mapping[str, _Measured], bands: NDArray[np.float64], level: float, areas: bool
) -> Figure | None:
    """Draw the channels of people and models, or those of areas with people and models beside."""
    of_kind = {t: m for t, m in found.items() if (m.kind == "area") == areas}
    usable = {t: m for t, m in of_kind.items() if m.channel.usable}
    if not usable:
        return None
    left_out = [t for t in of_kind if t not in usable]
    if areas:
        usable |= {
            f"{t} ({'people' if m.kind == 'people' else 'model'} as observer)": m
            for t, m in found.items()
            if m.kind != "area" and m.channel.usable
        }
    x = np.geomspace(bands[0] / 2, 2 * bands[-1], _CURVE_POINTS)
    value, low, high = (np.full((len(usable), len(x)), np.nan) for _ in range(3))
    for i, m in enumerate(usable.values()):
        c = m.channel
        value[i] = _gain(x, c.centre, c.bandwidth)
        if m.draws is not None:
            of = (m.draws[v].values[:, None] for v in ("centre", "bandwidth"))
            # Each draw over its own peak, so that shades tell the place and width of the channel.
            low[i], high[i] = np.nanquantile(
                _gain(x, *of), [(1 - level) / 2, (1 + level) / 2], axis=0
            )
    ds = xr.Dataset(
        {
            "value": (("x", "series"), value.T),
            "low": (("x", "series"), low.T),
            "high": (("x", "series"), high.T),
        },
        coords={"x": x, "series": [*usable]},
    )
    ds["x"].attrs = {"long_name": "label of the noise's band", "units": "cycles/image"}
    ds["value"].attrs = {"long_name": "sensitivity over its peak", "units": ""}
    what = (
        "Curves named as observers are those of people and models by their answers; an area's, and "
        "that of a network's output, are by how far noise moves it. Look for areas whose band is "
        "that of the network, that of people, or neither."
        if areas
        else "Look for models whose channels are wider than those of people, or lie elsewhere."
    )
    return Figure(
        "curves-areas" if areas else "curves",
        "curve",
        "Channels of areas beside those of people and models"
        if areas
        else "Channels of people and models",
        "Sensitivity to noise at each frequency over the peak of the same observer: 1 at the "
        "centre, one half where the band ends. Shades hold the middle "
        f"{100 * level:.0f} % of the draws, each over its own peak. {what}"
        + (f" Without a channel (see the table): {', '.join(left_out)}." if left_out else ""),
        ds,
        {"x_log": True, "width": "full"},
    )


def _widths(found: Mapping[str, _Measured]) -> Figure | None:
    usable = {t: m for t, m in found.items() if m.channel.usable}
    if not usable:
        return None
    ends = np.array([m.intervals["bandwidth"] for m in usable.values()], dtype=float)
    ends[~np.isfinite(ends)] = np.nan
    ds = xr.Dataset(
        {
            "value": ("item", np.array([m.channel.bandwidth for m in usable.values()])),
            "low": ("item", ends[:, 0]),
            "high": ("item", ends[:, 1]),
        },
        coords={"item": [*usable]},
    )
    ds["value"].attrs = {"long_name": "bandwidth", "units": "octaves"}
    person, network = _PUBLISHED["bandwidth"]
    return Figure(
        "bandwidths",
        "points",
        "Bandwidths",
        "Full width of each channel at half its height, with intervals. The lines are published "
        "values for photographs, by a rule that tells channels of sensitive observers too wide.",
        ds,
        {
            "reference_lines": [
                {"value": person, "label": "average human, published"},
                {"value": network, "label": "median network, published"},
            ],
            "orientation": "h",
            "width": "full",
        },
    )


def _thresholds(
    observers: Mapping[str, xr.Dataset],
    guess: float | None,
    level: float,
    n_bootstrap: int,
    seed: int,
) -> xr.Dataset:
    """Return thresholds of single bands (observer, frequency), NaN for bands that were not shown.

    Those that the noise cannot tell lie at the end of what it can.
    """
    parts = []
    for trials in observers.values():
        sd = trials["noise_sd"].values
        fit = fit_thresholds(trials, guess=guess, level=level, n_bootstrap=n_bootstrap, seed=seed)
        parts.append(fit.clip(sd[sd > 0].min() / _TOLD, sd.max() * _TOLD))
    titles = xr.DataArray([*observers], dims="observer", name="observer")
    return xr.concat(parts, titles, join="outer", combine_attrs="drop").sortby("frequency")


def _sensitivity_map(thresholds: xr.Dataset, unseeing: Sequence[str]) -> Figure:
    ordered = thresholds.transpose("observer", "frequency")
    ds = xr.Dataset(
        {
            name: (("row", "column"), np.log2(UNIT_SD / ordered[of].values))
            for name, of in (("value", "threshold"), ("low", "high"), ("high", "low"))
        },
        coords={
            "row": thresholds["observer"].values.astype(str),
            "column": [f"{f:g}" for f in thresholds["frequency"].values],
        },
    )
    ds["value"].attrs = {"long_name": "log2(0.01 / threshold)", "units": ""}
    return Figure(
        "sensitivity",
        "heatmap",
        "Sensitivity to noise",
        "By band, for each by itself: the base-2 logarithm of 0.01 over the standard deviation of "
        "the noise that halves the margin over guessing. It is the published scale, where 0 is a "
        "threshold of 0.01 and -4 one of 0.16; the channel is the bright part of a row. Bands that "
        f"no noise masks stand at {_TOLD:g} times the strongest noise, those that all noise masks "
        f"at the weakest over {_TOLD:g}."
        + (
            f" Right on no more than half even at best, so that a row says little: "
            f"{', '.join(unseeing)}."
            if unseeing
            else ""
        ),
        ds,
        {"x_label": "band, cycles/image"},
    )


def _threshold_curves(thresholds: xr.Dataset, level: float) -> Figure:
    ds = thresholds.rename(threshold="value", frequency="x", observer="series")
    ds = ds.transpose("x", "series")
    ds["x"].attrs = {"long_name": "band of the noise", "units": "cycles/image"}
    ds["value"].attrs = {"long_name": "threshold, standard deviation of the noise", "units": ""}
    return Figure(
        "thresholds",
        "curve",
        "Thresholds of each band",
        "The noise that halves the observer's margin over guessing, fitted to each band without "
        "the form of a channel; slope and lapses are common to the bands of an observer. Shades "
        f"are {100 * level:.0f} % intervals by parametric bootstrap, as if trials were "
        "independent. The lowest point of a curve is the centre of a channel; values at the ends "
        f"of the axis, {_TOLD:g} times beyond the noise that was shown, are open.",
        ds,
        {"x_log": True, "y_log": True, "width": "full"},
    )


def _cells(
    share: NDArray[np.float64], f: NDArray[np.float64], sd: NDArray[np.float64], name: str
) -> xr.Dataset:
    ds = xr.Dataset(
        {"value": (("row", "column"), share)},
        coords={"row": [f"{s:g}" for s in sd], "column": [f"{v:g}" for v in f]},
    )
    # One scale for all, so that maps of different observers compare.
    ds["value"].attrs = {"long_name": name, "units": "", "vmin": 0.0, "vmax": 1.0}
    return ds


_HEATMAP_OPTIONS = {"x_label": "band, cycles/image", "y_label": "standard deviation of the noise"}


def _heatmap(i: int, title: str, trials: xr.Dataset) -> Figure:
    from brainalign.psychophysics.analysis import count_cells

    noisy = trials.isel(trial=trials["noise_sd"].values > 0)
    table = (
        count_cells(noisy)
        .to_dataframe()
        .assign(share=lambda t: t["correct"] / t["n"])
        .pivot(index="noise_sd", columns="frequency", values="share")
    )
    return Figure(
        f"accuracy-{i}",
        "heatmap",
        f"{title}: what noise does",
        "Share of right answers by band and level of noise. The channel is where the map is dark: "
        "noise there is what the observer cannot bear.",
        _cells(table.to_numpy(), table.columns.to_numpy(), table.index.to_numpy(), "share right"),
        dict(_HEATMAP_OPTIONS),
    )


def _area_heatmap(i: int, title: str, fit: AreaFit) -> Figure:
    table = (
        fit.fidelity.to_dataframe()
        .reset_index(drop=False)
        .pivot(index="noise_sd", columns="frequency", values="value")
    )
    return Figure(
        f"fidelity-{i}",
        "heatmap",
        f"{title}: what noise moves",
        "What is left of the differences among pictures in the predicted response: 1 where noise "
        "moves nothing, one half where it moves the pattern as far as pictures lie from their "
        "mean.",
        _cells(table.to_numpy(), table.columns.to_numpy(), table.index.to_numpy(), "share left"),
        dict(_HEATMAP_OPTIONS),
    )


def example_pictures(
    image: NDArray[np.float32], noise_sds: Sequence[float], *, contrast: float, mean: float
) -> tuple[NDArray[np.float32], list[str], list[str]]:
    """Return one grey picture in every condition, with labels and groups.

    Parameters
    ----------
    image : ndarray, shape (height, width)
        Intensities in 0..1.
    noise_sds : sequence of float
        Levels of noise.
    contrast, mean : float
        See `brainalign.psychophysics.stimuli.low_contrast`.

    Returns
    -------
    pictures : ndarray, shape (n, height, width)
    labels, groups : list of str
    """
    import torch

    from brainalign.psychophysics.pyramid import band_frequencies
    from brainalign.psychophysics.stimuli import mask

    frequencies = band_frequencies(*image.shape)
    cells = [(sd, b) for sd in noise_sds if sd > 0 for b in range(len(frequencies))]
    pictures = torch.from_numpy(np.asarray(image, dtype=np.float32)).expand(len(cells), -1, -1)
    shown = mask(
        pictures, [sd for sd, _ in cells], [b for _, b in cells], list(range(len(cells))),
        contrast=contrast, mean=mean,
    )  # fmt: skip
    labels = [f"{frequencies[b]:g} cycles/image" for _, b in cells]
    return shown.numpy(), labels, [f"noise {sd:g}" for sd, _ in cells]


def _examples(
    pictures: NDArray[np.float32], labels: Sequence[str], groups: Sequence[str]
) -> Figure:
    from PIL import Image

    names = [f"picture-{i}" for i in range(len(labels))]
    images = {
        n: Image.fromarray(np.rint(255 * p).astype(np.uint8))
        for n, p in zip(names, pictures, strict=True)
    }
    ds = xr.Dataset(
        {
            "filename": ("image", names),
            "label": ("image", list(labels)),
            "group": ("image", list(groups)),
        }
    )
    return Figure(
        "pictures",
        "image_grid",
        "What was shown",
        "One picture in noise of each band and level. Try it: the band in which the picture is "
        "hardest to name is the middle of your own channel.",
        ds,
        images=images,
    )


def _trials_needed(observers: Mapping[str, xr.Dataset], guess: float | None, seed: int) -> Figure:
    first = next(iter(observers.values()))
    noisy = first["noise_sd"].values > 0
    bands = np.unique(first["frequency"].values[noisy])
    levels = np.unique(first["noise_sd"].values)
    if guess is None:
        guess = 1 / len(np.unique(first["category"].values.astype(str)))
    middle = float(np.exp(np.log(bands).mean()))
    errors = {
        f"{width:g} octaves wide": recovery_error(
            _TRIALS, bandwidth=width, centre=middle * 2**0.25,
            sensitivity=0.01 / float(np.sqrt(levels[levels > 0].min() * levels.max())) * 2,
            guess=guess, frequencies=bands.tolist(), noise_sds=levels.tolist(),
            n_simulations=30, seed=seed,
        )["bandwidth"].values
        for width in (1.5, 3.0)
    }  # fmt: skip
    ds = xr.Dataset(
        {"value": (("x", "series"), np.array([*errors.values()]).T)},
        coords={"x": np.array(_TRIALS, dtype=float), "series": [*errors]},
    )
    ds["x"].attrs = {"long_name": "trials in all", "units": ""}
    ds["value"].attrs = {"long_name": "error of the bandwidth", "units": "octaves"}
    return Figure(
        "trials-needed",
        "curve",
        "Trials needed for a given error",
        "How far the estimated bandwidth strays from the truth (root mean square of the logarithm; "
        "1 is a factor of 2) in simulated experiments with the conditions of this one, by the "
        "number of trials. Images repeated in many conditions count for less.",
        ds,
        {"x_log": True},
    )


def _consistency(
    observers: Mapping[str, xr.Dataset],
    people: Sequence[str],
    level: float,
    n_bootstrap: int,
    seed: int,
) -> Figure | None:
    names = ("subject", "stimulus_id", "condition", "correct", "response")
    parts, human = [], []
    for title, trials in observers.items():
        if any(n not in trials.variables for n in names):
            continue
        size = trials.sizes["trial"]
        subject = np.broadcast_to(trials["subject"].values.astype(str), size)
        if title in people:
            human += sorted({*subject.tolist()})
        else:
            subject = np.full(size, title)
        parts.append(
            xr.Dataset(
                {n: ("trial", np.broadcast_to(trials[n].values, size)) for n in names[1:]}
                | {"subject": ("trial", subject)}
            )
        )
    if len(human) < 2:
        return None
    together = xr.concat(parts, "trial")
    try:
        found = consistency_with_people(
            together, human, level=level, n_bootstrap=n_bootstrap, seed=seed
        )
    except SchemaError:  # a stimulus seen twice in a condition
        return None
    known = np.isfinite(found["kappa"].values)
    found = found.isel(observer=known)
    ds = xr.Dataset(
        {
            "value": ("item", found["kappa"].values),
            "low": ("item", found["low"].values),
            "high": ("item", found["high"].values),
        },
        coords={"item": found["observer"].values.astype(str)},
    )
    ds["value"].attrs = {"long_name": "Cohen's kappa with people", "units": ""}
    return Figure(
        "consistency",
        "points",
        "Errors on the same pictures",
        "How far observers are right and wrong on the same pictures as people are, beyond what "
        "their accuracies say: 0 is chance, 1 the same errors. The first row is people among "
        "themselves.",
        ds,
        {
            "orientation": "h",
            "width": "full",
            "reference_lines": [{"value": 0.0, "label": "chance"}],
        },
    )


def _compared(found: Mapping[str, _Measured], people: Sequence[str], level: float) -> list[Figure]:
    human = [p for p in people if found[p].draws is not None and found[p].channel.usable]
    others = [
        t for t, m in found.items()
        if t not in people and m.draws is not None and m.channel.usable
    ]  # fmt: skip
    rows = []
    for person in human:
        for other in others:
            a, b = found[other].draws, found[person].draws
            if a is None or b is None or a.sizes["draw"] != b.sizes["draw"]:
                continue
            ratios = compare_channels(a, b, level=level)
            rows.append(
                (
                    other,
                    person,
                    *(f"{m:.2f} ({lo:.2f} to {hi:.2f})" for m, lo, hi in ratios.values()),
                )
            )
    if not rows:
        return []
    columns = ["observer", "people", "bandwidth", "centre", "sensitivity"]
    return [
        Figure(
            "compared",
            "table",
            "Models and areas over people",
            "Ratio of each value to that of people, with its interval: 1 is alike. An interval "
            "without 1 is a difference that images (and subjects) drawn anew would keep.",
            xr.Dataset(
                {
                    c: ("row", np.array(v))
                    for c, v in zip(columns, zip(*rows, strict=True), strict=True)
                }
            ),
        )
    ]


def _other_experiments(published: Mapping[str, xr.Dataset]) -> Figure:
    rows: list[tuple[str, str, float, float, float, int]] = []
    for name, trials in published.items():
        if "condition" not in trials.variables:
            continue
        found = accuracy(trials)
        for i, condition in enumerate(found["condition"].values.astype(str)):
            value, low, high = (100 * float(found[v][i]) for v in ("accuracy", "low", "high"))
            rows.append((name, condition, value, low, high, int(found["n"][i])))
    columns = ["experiment", "condition", "right, %", "low", "high", "trials"]
    return Figure(
        "people-elsewhere",
        "table",
        "People in related experiments",
        "Accuracy of the people of Geirhos et al. 2021 by condition, with Wilson's intervals: what "
        "blur, noise and contrast leave them, on 16 classes.",
        xr.Dataset(
            {c: ("row", np.array(v)) for c, v in zip(columns, zip(*rows, strict=True), strict=True)}
        ),
    )


def _consistency_elsewhere(
    published: Mapping[str, xr.Dataset], level: float, n_bootstrap: int, seed: int
) -> Figure:
    rows = {}
    for name, trials in published.items():
        people = np.unique(trials["subject"].values.astype(str)).tolist()
        found = consistency_with_people(
            trials, people, level=level, n_bootstrap=n_bootstrap, seed=seed
        )
        rows[name] = [float(found[v].sel(observer="people")) for v in ("kappa", "low", "high")]
    values = np.array([*rows.values()]).T
    ds = xr.Dataset(
        {v: ("item", row) for v, row in zip(("value", "low", "high"), values, strict=True)},
        coords={"item": [*rows]},
    )
    ds["value"].attrs = {"long_name": "Cohen's kappa among people", "units": ""}
    return Figure(
        "consistency-elsewhere",
        "points",
        "Errors of people in related experiments",
        "How far the people of Geirhos et al. 2021 are right and wrong on the same pictures, "
        "beyond what their accuracies say: Cohen's kappa, the mean over all two people and all "
        f"conditions. Intervals hold {100 * level:.0f} % of samples of pictures, not of people. A "
        "model's errors are those of people where its kappa with them is as high.",
        ds,
        {
            "orientation": "h",
            "width": "full",
            "reference_lines": [{"value": 0.0, "label": "chance"}],
        },
    )


def _published_estimates(published: Mapping[str, xr.Dataset]) -> list[Estimate]:
    if "cue-conflict" not in published:
        return []
    bias = shape_bias(published["cue-conflict"]).attrs
    return [
        Estimate(
            "Shape bias of people", bias["bias"], bias["low"], bias["high"],
            note=f"Geirhos et al. 2021, {bias['n_conflict']:,} trials", reference="published .959",
        )
    ]  # fmt: skip


def _estimates(found: Mapping[str, _Measured]) -> list[Estimate]:
    person, network = _PUBLISHED["bandwidth"]
    out = []
    for title, m in found.items():
        if not m.channel.usable:
            continue
        low, high = m.intervals["bandwidth"]
        out.append(
            Estimate(
                f"Bandwidth of {title}",
                m.channel.bandwidth,
                low if low > 0 else None,
                high if np.isfinite(high) else None,
                "octaves",
                f"{m.kind}; centre {m.channel.centre:.3g} cycles/image",
                "" if m.kind == "area" else f"published: people {person:g}, networks {network:g}",
            )
        )
    return out


def _methods(
    observers: Mapping[str, xr.Dataset], areas: bool, level: float, n_bootstrap: int
) -> str:
    first = next(iter(observers.values()))
    sds = np.unique(first["noise_sd"].values)
    text = (
        "Channels were measured by critical band masking [@subramanian2023]: noise of one octave "
        "(one level of a Laplacian pyramid, scaled to the power of its highest level) was added to "
        "grey pictures of low contrast at standard deviations of "
        f"{', '.join(f'{s:g}' for s in sds)} before filtering. A log-Gaussian channel with a guess "
        "rate, a lapse rate and a slope was fitted to single trials by maximum likelihood. "
        f"Intervals hold {100 * level:.0f} % of {n_bootstrap} samples of images (and of subjects, "
        "where there are several) drawn with replacement, or are by profile likelihood where no "
        "image was shown twice."
    )
    if areas:
        text += (
            " The same noise was shown to an encoding model; the channel of a region was fitted to "
            "how far noise moved the predicted pattern, relative to the spread of the pictures' "
            "own patterns."
        )
    return text


_REFERENCES = {
    "subramanian2023": """@inproceedings{subramanian2023,
  author = {Subramanian, Ajay and Sizikova, Elena and Majaj, Najib J. and Pelli, Denis G.},
  title = {Spatial-frequency channels, shape bias, and adversarial robustness},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2023}
}""",
}
