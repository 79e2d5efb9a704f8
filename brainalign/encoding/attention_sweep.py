"""The sweep of attention mechanisms as a section: alignment against mechanism, cost and reach.

Everything here reads what training, extraction and encoding left; nothing is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from brainalign.data.bundle import read_bundle
from brainalign.data.section import Estimate, Figure, Section
from brainalign.encoding.compare import sampled_score
from brainalign.encoding.result import read_result
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.evaluation.rdm_bootstrap import draw_samples, resampled_similarity
from brainalign.evaluation.rsa import (
    average_rdms,
    average_sessions,
    compare_rdms,
    rdm,
    rdm_noise_ceiling,
    stack_rdms,
)
from brainalign.evaluation.trainings import compare_trainings
from brainalign.features import read_manifest

__all__ = [
    "Alignment",
    "encoding_alignment",
    "rsa_alignment",
    "sweep_section",
    "sweep_section_from_folders",
]

#: What a network is -> how the section calls it.
KINDS = {
    "trained": "trained with it",
    "untrained": "before training",
    "swapped": "swapped into softmax weights: damage",
}
_TITLE = "Attention mechanisms, each trained from scratch"


@dataclass
class Alignment:
    """One measure of alignment, of every network of a sweep.

    Parameters
    ----------
    id, title, label : str
        Its anchor, what is measured on what, and the axis.
    values : dict of str to ndarray, shape (n_subjects,)
        By network.
    samples : dict of str to ndarray, shape (n_bootstrap, n_subjects)
        The same in samples of the stimuli, which are the same for all networks.
    n_stimuli : int
        Stimuli that were resampled.
    ceiling : (float, float) or None
        Lower and upper bound of what could be reached.
    layers : xarray.DataArray, optional
        Mean over subjects (network, layer).
    rdms : dict of str to xarray.Dataset
        RDMs to show: first the measured one.
    """

    id: str
    title: str
    label: str
    values: dict[str, NDArray[np.float64]]
    samples: dict[str, NDArray[np.float64]]
    n_stimuli: int
    ceiling: tuple[float, float] | None = None
    layers: xr.DataArray | None = None
    rdms: dict[str, xr.Dataset] = field(default_factory=dict)


def rsa_alignment(
    layers: Mapping[str, Mapping[str, xr.Dataset]],
    target: xr.Dataset,
    *,
    layer: str,
    title: str = "RDMs of subjects",
    bootstraps: int = 1000,
    seed: int = 0,
) -> Alignment:
    """Compare one layer of every network with the RDM of each subject, by Spearman correlation.

    Parameters
    ----------
    layers : mapping of network to mapping of layer to xarray.Dataset
        RDMs of the ``rdms`` schema.
    target : xarray.Dataset
        RDMs of subjects; sessions of one ``subject`` are averaged.
    layer : str
        The layer that is scored, named before the scores were seen; the others are shown.
    title : str
        Whose RDMs they are.
    bootstraps, seed : int
        Samples of the stimuli.

    Raises
    ------
    UnknownNameError
        If a network lacks the layer.
    """
    for network, by in layers.items():
        if layer not in by:
            raise UnknownNameError(
                f"{network!r} has no layer {layer!r}.{near(layer, by)}", f"Known: {', '.join(by)}."
            )
    subjects = average_sessions(target)
    stacked = stack_rdms({network: by[layer] for network, by in layers.items()})
    ids = stacked["stimulus_id"].values.astype(str).tolist()
    counts, _ = draw_samples(len(ids), subjects.sizes["rdm_name"], bootstraps, seed=seed)
    values = compare_rdms(stacked, subjects).values
    # `compare_rdms` aligned the stimuli by name; the bootstrap takes matrices in one order.
    ordered = stack_rdms([stacked, subjects])["rdm"].values[len(layers) :]
    drawn = resampled_similarity(stacked["rdm"].values, ordered, counts)
    every = list(next(iter(layers.values())))
    by_layer = np.stack(
        [
            compare_rdms(stack_rdms({n: by[name] for n, by in layers.items()}), subjects)
            .mean("data")
            .values
            for name in every
        ],
        axis=1,
    )
    several = subjects.sizes["rdm_name"] > 1
    return Alignment(
        "rsa",
        title,
        "Spearman ρ with subjects",
        {n: values[i] for i, n in enumerate(layers)},
        {n: drawn[:, i] for i, n in enumerate(layers)},
        len(ids),
        rdm_noise_ceiling(subjects) if several else None,
        xr.DataArray(
            by_layer, dims=("network", "layer"), coords={"network": list(layers), "layer": every}
        ),
        {"measured": average_rdms(subjects, "measured")}
        | {n: by[layer] for n, by in layers.items()},
    )


def encoding_alignment(
    results: Mapping[str, Mapping[str, Any]], *, title: str = "responses"
) -> Alignment:
    """Take the noise-ceiling normalised encoding score of every network.

    Parameters
    ----------
    results : mapping of network to mapping of subject to EncodingResult
        The same subjects for each; encoded with the same stimuli, samples and seed.
    title : str
        Whose responses they are.

    Raises
    ------
    SchemaError
        If networks were tested on different stimuli or subjects.
    """
    values, samples = {}, {}
    tested: NDArray[np.str_] | None = None
    subjects = list(next(iter(results.values())))
    for network, by in results.items():
        if list(by) != subjects:
            raise SchemaError(f"{network!r} has the subjects {list(by)}; expected {subjects}.")
        scores = [sampled_score(result) for result in by.values()]
        values[network] = np.array([value for value, _ in scores])
        samples[network] = np.stack([drawn for _, drawn in scores], axis=1)
        theirs = next(iter(by.values())).bootstrap["stimulus_id"].values.astype(str)
        if tested is not None and not np.array_equal(tested, theirs):
            raise SchemaError(f"{network!r} was not tested on the same stimuli as the others.")
        tested = theirs
    assert tested is not None
    return Alignment(
        "encoding",
        title,
        "share of explainable variance",
        values,
        samples,
        len(np.unique(tested)),
    )


def sweep_section_from_folders(
    models: Mapping[str, Mapping[str, Any]],
    *,
    mechanisms: Mapping[str, str],
    reference: str,
    profiles: str | Path,
    layer: str = "",
    rsa: str | Path | None = None,
    features: Sequence[str | Path] = (),
    encoded: Sequence[str | Path] = (),
    budget: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
    generator: str = "",
    target: str = "human_it",
    bootstraps: int = 1000,
    seed: int = 0,
) -> Section:
    """Describe a sweep from what the workflow left.

    Parameters
    ----------
    models : mapping of str to mapping
        By network: ``kind`` (a key of `KINDS`), ``mechanism``, ``seed``.
    mechanisms : mapping of str to str
        The specification of each mechanism.
    reference : str
        The mechanism that others are compared with.
    profiles : path
        JSON of `brainalign.features.profile_attention` by network.
    layer : str
        See `rsa_alignment`.
    rsa : path, optional
        A bundle with the RDMs `target`.
    features : sequence of path
        Feature manifests of that study's stimuli, named after the networks.
    encoded : sequence of path
        Encoding results, ``.../<subject>/<network>``.
    budget : mapping
        What each training was given, to be told.
    titles : mapping of str to str
        Of the studies: ``rsa``, ``encoding``.
    generator : str
        What the responses were simulated from.
    target : str
        The extra of the bundle.
    bootstraps, seed : int
        Samples of the stimuli.
    """
    titles = titles or {}
    alignments = []
    if rsa is not None:
        bundle = read_bundle(rsa)
        if target not in bundle.extras or bundle.stimuli is None:
            raise UnknownNameError(
                f"The study in {rsa} has no RDMs {target!r}.{near(target, bundle.extras)}"
            )
        ids = bundle.stimuli.ids
        layers = {
            Path(p).stem: {k: rdm(ds, stimulus_id=ids) for k, ds in read_manifest(p).items()}
            for p in features
        }
        alignments.append(
            rsa_alignment(
                layers, bundle.extras[target], layer=layer, bootstraps=bootstraps, seed=seed,
                title=titles.get("rsa", "RDMs"),
            )
        )  # fmt: skip
    if encoded:
        results: dict[str, dict[str, Any]] = {}
        for folder in map(Path, encoded):
            results.setdefault(folder.name, {})[folder.parent.name] = read_result(folder)
        alignments.append(encoding_alignment(results, title=titles.get("encoding", "responses")))
    return sweep_section(
        models,
        alignments,
        json.loads(Path(profiles).read_text(encoding="utf-8")),
        mechanisms=mechanisms,
        reference=reference,
        layer=layer,
        budget=budget,
        generator=generator,
        bootstraps=bootstraps,
    )


@dataclass
class _Sweep:
    """Which network is what."""

    models: Mapping[str, Mapping[str, Any]]
    mechanisms: Mapping[str, str]
    reference: str
    seeds: list[int]

    def key(self, kind: str, mechanism: str, seed: int) -> str:
        """Return the network's name; the reference swapped into its own weights is itself."""
        if kind == "swapped" and mechanism == self.reference:
            kind = "trained"
        return self._keys[kind, mechanism, seed]

    def __post_init__(self) -> None:
        self._keys = {
            (str(m["kind"]), str(m["mechanism"]), int(m["seed"])): k for k, m in self.models.items()
        }
        if self.reference not in self.mechanisms:
            raise UnknownNameError(
                f"There is no mechanism {self.reference!r}.{near(self.reference, self.mechanisms)}"
            )
        for mechanism in self.mechanisms:
            for seed in self.seeds:
                if ("trained", mechanism, seed) not in self._keys:
                    raise SchemaError(
                        f"The sweep lacks the network trained with {mechanism!r} and seed {seed}.",
                        "Every mechanism needs the same seeds.",
                    )

    def has(self, kind: str) -> bool:
        return any(k == kind for k, _, _ in self._keys)

    def compared(self, alignment: Alignment, kind: str) -> xr.Dataset:
        """Compare the mechanisms with the reference, all networks being of one kind."""
        return self._compare(
            alignment,
            {m: [self.key(kind, m, s) for s in self.seeds] for m in self.mechanisms},
            self.reference,
        )

    def gained(self, alignment: Alignment) -> xr.Dataset:
        """Compare the trained with the untrained network of each mechanism."""
        parts = []
        for mechanism in self.mechanisms:
            networks = {
                k: [self.key(k, mechanism, s) for s in self.seeds] for k in ("untrained", "trained")
            }
            ds = self._compare(alignment, networks, "untrained").isel(condition=[1])
            parts.append(ds.assign_coords(condition=[mechanism]))
        return xr.concat(parts, "condition")

    def _compare(
        self, alignment: Alignment, networks: Mapping[str, Sequence[str]], reference: str
    ) -> xr.Dataset:
        def stacked(by: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
            return np.stack(
                [np.stack([by[n] for n in names], axis=-1) for names in networks.values()], axis=-2
            )

        return compare_trainings(
            stacked(alignment.values),
            stacked(alignment.samples),
            conditions=list(networks),
            seeds=self.seeds,
            reference=reference,
            n_stimuli=alignment.n_stimuli,
        )


def sweep_section(
    models: Mapping[str, Mapping[str, Any]],
    alignments: Sequence[Alignment],
    profiles: Mapping[str, Mapping[str, Any]],
    *,
    mechanisms: Mapping[str, str],
    reference: str,
    layer: str = "",
    budget: Mapping[str, float] | None = None,
    generator: str = "",
    bootstraps: int = 1000,
) -> Section:
    """Describe a sweep of attention mechanisms.

    Parameters
    ----------
    models, mechanisms, reference, layer, budget, generator
        See `sweep_section_from_folders`.
    alignments : sequence of Alignment
        At least one.
    profiles : mapping of str to mapping
        See `brainalign.features.profile_attention`.
    bootstraps : int
        Samples behind the intervals.

    Raises
    ------
    ConfigError
        If there is no measure of alignment.
    SchemaError
        If a mechanism lacks a seed that another has.
    """
    if not alignments:
        raise ConfigError(
            "No measure of alignment could be had for the sweep.",
            "Its studies were left out, or none was named.",
        )
    seeds = sorted({int(m["seed"]) for m in models.values()})
    sweep = _Sweep(models, mechanisms, reference, seeds)
    trained = {a.id: sweep.compared(a, "trained") for a in alignments}
    cost = _costs(sweep, profiles)
    figures: list[Figure] = []
    summary: list[Estimate] = []
    for a in alignments:
        figures += _alignment_figures(sweep, a, trained[a.id])
        summary += _estimates(sweep, a, trained[a.id], cost)
    for a in alignments:
        figures += _against(sweep, a, trained[a.id], cost)
    for a in alignments:
        figures += _controls(sweep, a, trained[a.id])
        if a.layers is not None:
            figures.append(_layers(sweep, a))
    figures += _tables(sweep, alignments, trained, cost, profiles)
    for a in alignments:
        if a.rdms:
            figures.append(_rdms(sweep, a))
    accuracy = cost["accuracy_trained"].values
    if np.isfinite(accuracy).all():
        chance = next(p["zero_shot"]["chance"] for p in profiles.values() if p.get("zero_shot"))
        least = int(np.argmin(accuracy))
        summary.append(
            Estimate(
                "Lowest zero-shot accuracy of a mechanism",
                100 * float(accuracy[least]),
                unit="%",
                note=f"{list(mechanisms.values())[least]}, held-out scenes, mean over "
                f"{len(seeds)} seeds: whether training reached every mechanism",
                reference=f"chance {100 * chance:.0f} %, highest {100 * accuracy.max():.0f} %",
            )
        )
    return Section(
        id="attention",
        title=_TITLE,
        intro=f"Does a network come closer to the brain with another attention mechanism? One "
        f"small vision transformer was trained from scratch with each of {len(mechanisms)} "
        f"mechanisms and {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, on an equal budget: the "
        "same scenes, first weights, batches and number of steps for all mechanisms of a seed.",
        figures=figures,
        summary=summary,
        methods=_methods(sweep, alignments, profiles, layer, budget or {}, generator, bootstraps),
        references=_REFERENCES,
        facts={
            "mechanisms": str(len(mechanisms)),
            "seeds": str(len(seeds)),
            "networks": str(len(models)),
            "machine": str(next(iter(profiles.values()))["machine"]),
        },
        order=60,
    )


def _costs(sweep: _Sweep, profiles: Mapping[str, Mapping[str, Any]]) -> xr.Dataset:
    """Cost, reach and accuracy of each mechanism: means over seeds, (mechanism)."""

    def over_seeds(kind: str, name: str) -> NDArray[np.float64]:
        if kind != "trained" and not sweep.has(kind):
            return np.full((len(sweep.mechanisms), len(sweep.seeds)), np.nan)
        return np.array(
            [
                [_number(profiles[sweep.key(kind, m, s)], name) for s in sweep.seeds]
                for m in sweep.mechanisms
            ]
        )

    one = "mechanism"
    out = {
        name: (one, over_seeds("trained", name).mean(axis=1))
        for name in ("distance", "multiply_adds", "score_bytes", "parameters")
    }
    out["ms_per_image"] = (one, over_seeds("trained", "ms_per_image").min(axis=1))
    for kind in KINDS:
        out[f"accuracy_{kind}"] = (one, over_seeds(kind, "accuracy").mean(axis=1))
    out["distance_untrained"] = (one, over_seeds("untrained", "distance").mean(axis=1))
    ds = xr.Dataset(out, coords={one: list(sweep.mechanisms)})
    ds["distance_per_seed"] = ((one, "seed"), over_seeds("trained", "distance"))
    return ds


def _number(profile: Mapping[str, Any], name: str) -> float:
    if name == "accuracy":
        named = profile.get("zero_shot")
        return float(named["correct"]) if named else float("nan")
    return float(profile[name])


def _points(
    ds: xr.Dataset, labels: Sequence[str], value: str, low: str, high: str, per_seed: str
) -> xr.Dataset:
    """Lay a mean with its interval and every seed out as (item, series)."""
    seeds = ds[per_seed].values
    series = ["mean", *(f"seed {s}" for s in ds["seed"].values.tolist())]
    out = {"value": np.column_stack([ds[value].values, seeds])}
    for name, variable in (("low", low), ("high", high)):
        out[name] = np.column_stack([ds[variable].values, np.full(seeds.shape, np.nan)])
    return xr.Dataset(
        {k: (("item", "series"), v) for k, v in out.items()},
        coords={"item": list(labels), "series": series},
    )


def _interval_words(ds: xr.Dataset) -> str:
    over = f"95 % intervals for other {ds.attrs['over']} (t, degrees of freedom by Satterthwaite)."
    return over + (
        " With one seed they hold for these networks." if ds.attrs["n_seeds"] == 1 else ""
    )


def _alignment_figures(sweep: _Sweep, a: Alignment, ds: xr.Dataset) -> list[Figure]:
    labels = list(sweep.mechanisms.values())
    bands = []
    if a.ceiling is not None and a.ceiling[0] < a.ceiling[1]:
        bands = [{"label": "noise ceiling", "low": a.ceiling[0], "high": a.ceiling[1]}]
    others = [i for i, m in enumerate(sweep.mechanisms) if m != sweep.reference]
    name = sweep.mechanisms[sweep.reference]
    return [
        Figure(
            f"{a.id}-alignment",
            "points",
            f"{a.title}: alignment by mechanism",
            "The first point of a mechanism is its mean, each other one a training run. "
            f"{_interval_words(ds)} "
            "Look first at how far the seeds of one mechanism lie apart: a difference between "
            "mechanisms that is no larger is no finding."
            + (" The band is what the true pattern would reach." if bands else ""),
            _points(ds, labels, "value", "low", "high", "per_seed"),
            {"y_label": a.label, "orientation": "h", "reference_bands": bands},
        ),
        Figure(
            f"{a.id}-difference",
            "points",
            f"{a.title}: difference from {name}",
            f"The same, minus {name} trained with the same seed: first weights and batches are "
            f"shared, and so are stimuli{' and subjects' if ds.attrs['n_subjects'] > 1 else ''}. "
            f"{_interval_words(ds)} An interval that leaves out 0 is a difference before "
            "correction for the number of mechanisms; the table has p by Holm.",
            _points(
                ds.isel(condition=others),
                [labels[i] for i in others],
                "difference",
                "difference_low",
                "difference_high",
                "difference_per_seed",
            ),
            {
                "y_label": "difference",
                "orientation": "h",
                "reference_lines": [{"label": "no difference", "value": 0.0}],
            },
        ),
    ]


def _against(sweep: _Sweep, a: Alignment, ds: xr.Dataset, cost: xr.Dataset) -> list[Figure]:
    """Alignment against attention distance and against cost, one point a network."""
    n_seeds = len(sweep.seeds)
    labels = np.repeat(list(sweep.mechanisms.values()), n_seeds)
    y = ds["per_seed"].values.ravel()
    seeds = np.tile([f"seed {s}" for s in sweep.seeds], len(sweep.mechanisms))

    def scatter(x: NDArray[np.float64]) -> xr.Dataset:
        return xr.Dataset(
            {
                "x": ("observation", x),
                "y": ("observation", y),
                "group": ("observation", labels),
                "label": ("observation", seeds),
            }
        )

    few = (
        f"Each point is a network. Over {len(sweep.mechanisms)} mechanisms a trend may be chance: "
    )
    distance = cost["distance_per_seed"].values.ravel()
    work = np.repeat(cost["multiply_adds"].values / 1e6, n_seeds)
    return [
        Figure(
            f"{a.id}-distance",
            "scatter",
            f"{a.title}: alignment against attention distance",
            "Attention distance: how many patches lie, on average, between a patch and what it "
            "attends to, over heads and layers, measured in the trained network. "
            f"{few}{_trend(cost['distance'].values, ds['value'].values)}",
            scatter(distance),
            {"x_label": "attention distance (patches)", "y_label": a.label},
        ),
        Figure(
            f"{a.id}-cost",
            "scatter",
            f"{a.title}: alignment against cost",
            "Cost: multiply-adds of all attention layers for one image, by formula, without "
            f"projections. {few}{_trend(cost['multiply_adds'].values, ds['value'].values)}",
            scatter(work),
            {"x_label": "multiply-adds (millions an image)", "y_label": a.label},
        ),
    ]


def _trend(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Rank correlation over mechanisms in words, with the p of all orders where they are few."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "there are too few to say."
    rho = float(stats.spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    shuffled = stats.permutation_test(
        (x,),
        lambda v: stats.spearmanr(v, y).statistic,
        permutation_type="pairings",
        n_resamples=2000,
        rng=rng,
    )
    return f"Spearman ρ of their means {rho:.2f}, permutation p {float(shuffled.pvalue):.2g}."


def _controls(sweep: _Sweep, a: Alignment, trained: xr.Dataset) -> list[Figure]:
    parts = {KINDS["trained"]: trained}
    for kind in ("untrained", "swapped"):
        if sweep.has(kind):
            parts[KINDS[kind]] = sweep.compared(a, kind)
    if len(parts) == 1:
        return []
    out = {
        k: np.stack([ds[k].values for ds in parts.values()], axis=1)
        for k in ("value", "low", "high")
    }
    swapped = list(parts).index(KINDS["swapped"]) if KINDS["swapped"] in parts else None
    if swapped is not None:  # the reference in its own weights is no swap
        for values in out.values():
            values[list(sweep.mechanisms).index(sweep.reference), swapped] = np.nan
    ds = xr.Dataset(
        {k: (("item", "series"), v) for k, v in out.items()},
        coords={"item": list(sweep.mechanisms.values()), "series": list(parts)},
    )
    words = "Before training, a network shows what the architecture alone gives. "
    if swapped is not None:
        words += (
            "A mechanism that is put into weights trained with softmax attention, without "
            "training, measures damage to that network: it says nothing of a network trained with "
            "the mechanism, and the two need not agree. "
        )
    return [
        Figure(
            f"{a.id}-controls",
            "points",
            f"{a.title}: what training brings, and what swapping breaks",
            f"{words}Means over seeds; {_interval_words(trained)}",
            ds,
            {"y_label": a.label, "orientation": "h"},
        )
    ]


def _layers(sweep: _Sweep, a: Alignment) -> Figure:
    assert a.layers is not None
    names = [str(n) for n in a.layers["layer"].values]
    value = np.stack(
        [
            a.layers.sel(network=[sweep.key("trained", m, s) for s in sweep.seeds]).mean("network")
            for m in sweep.mechanisms
        ],
        axis=1,
    )
    return Figure(
        f"{a.id}-layers",
        "points",
        f"{a.title}: every layer",
        "Means over seeds and subjects. The scores above are those of one layer, named before they "
        "were seen; look whether the order of the mechanisms is the same in the others.",
        xr.Dataset(
            {"value": (("item", "series"), value)},
            coords={"item": [_short(n) for n in names], "series": list(sweep.mechanisms.values())},
        ),
        {"y_label": a.label, "connect": True, "orientation": "v", "width": "full"},
    )


def _short(layer: str) -> str:
    parts = layer.split(".")
    return " ".join(parts[-2:]) if len(parts) > 1 else layer


def _rdms(sweep: _Sweep, a: Alignment) -> Figure:
    shown = {"measured": a.rdms["measured"]}
    for mechanism, name in sweep.mechanisms.items():
        each = [a.rdms[sweep.key("trained", mechanism, s)] for s in sweep.seeds]
        shown[name] = average_rdms(stack_rdms(dict(zip(map(str, sweep.seeds), each, strict=True))))
    return Figure(
        f"{a.id}-rdms",
        "rdm",
        f"{a.title}: dissimilarities",
        "The measured RDM, mean over subjects, and that of each mechanism's scored layer, mean "
        "over seeds, in ranks. Look for blocks that the recordings have and the networks lack.",
        stack_rdms(shown),
    )


def _estimates(sweep: _Sweep, a: Alignment, ds: xr.Dataset, cost: xr.Dataset) -> list[Estimate]:
    names = list(sweep.mechanisms.values())
    at = list(sweep.mechanisms).index(sweep.reference)
    value = ds["value"].values
    best = int(np.argmax(value))
    ceiling = ""
    if a.ceiling is not None and a.ceiling[0] < a.ceiling[1]:
        ceiling = f"noise ceiling {a.ceiling[0]:.2f} to {a.ceiling[1]:.2f}"
    found = int((ds["p_holm"].values < 0.05).sum())
    spread = ds["per_seed"].std("seed", ddof=1).mean().item() if len(sweep.seeds) > 1 else np.nan
    out = [
        Estimate(
            f"{a.title}: {names[at]}",
            float(value[at]), float(ds["low"][at]), float(ds["high"][at]),
            note=f"{a.label}; over other {ds.attrs['over']}",
            reference=ceiling,
        ),
        Estimate(
            f"{a.title}: mechanisms that differ from {names[at]}",
            float(found),
            unit=f"of {len(names) - 1}",
            note="p < 0.05 after Holm's correction, over other " + ds.attrs["over"],
        ),
        Estimate(
            f"{a.title}: highest of {len(names)} mechanisms, {names[best]}",
            float(value[best]), float(ds["low"][best]), float(ds["high"][best]),
            note=f"chosen for being highest, so biased upwards; mechanisms range over "
            f"{np.ptp(value):.3f}",
            reference=f"seeds of one mechanism: standard deviation {spread:.3f}"
            if np.isfinite(spread) else "",
        ),
    ]  # fmt: skip
    return out


def _tables(
    sweep: _Sweep,
    alignments: Sequence[Alignment],
    trained: Mapping[str, xr.Dataset],
    cost: xr.Dataset,
    profiles: Mapping[str, Mapping[str, Any]],
) -> list[Figure]:
    names = list(sweep.mechanisms.values())
    one = "mechanism"

    def table(columns: Mapping[str, Any]) -> xr.Dataset:
        # netCDF takes no slash in a name.
        named = {k.replace("/", "\u2215"): (one, v) for k, v in columns.items()}
        return xr.Dataset(named, coords={one: names})

    def ranged(value: Any, low: Any, high: Any) -> list[str]:
        return [
            "–" if not np.isfinite(v) else f"{v:.3f} [{lo:.3f}, {hi:.3f}]"
            for v, lo, hi in zip(value, low, high, strict=True)
        ]

    def p_words(p: NDArray[np.float64]) -> list[str]:
        return ["–" if not np.isfinite(x) else "< 0.001" if x < 0.001 else f"{x:.3f}" for x in p]

    def percent(x: NDArray[np.float64]) -> list[str]:
        return ["–" if not np.isfinite(v) else f"{100 * v:.1f} %" for v in x]

    reference = sweep.mechanisms[sweep.reference]
    figures = []
    for a in alignments:
        ds = trained[a.id]
        difference = ds["difference"].where(np.isfinite(ds["p"]))
        columns = {
            "alignment": ranged(ds["value"], ds["low"], ds["high"]),
            f"minus {reference}": ranged(difference, ds["difference_low"], ds["difference_high"]),
            "p": p_words(ds["p"].values),
            "p (Holm)": p_words(ds["p_holm"].values),
            "seeds": [", ".join(f"{v:.3f}" for v in row) for row in ds["per_seed"].values.tolist()],
        }
        figures.append(
            Figure(
                f"{a.id}-table",
                "table",
                f"{a.title}: alignment by mechanism",
                f"{a.label[0].upper()}{a.label[1:]}, means over seeds with 95 % intervals. "
                f"Differences from {reference} are paired by seed.",
                table(columns),
                {"width": "full"},
            )
        )
    paid = {
        "zero-shot accuracy": percent(cost["accuracy_trained"].values),
        "attention distance (patches)": [f"{v:.2f}" for v in cost["distance"].values],
        "before training": [
            "–" if not np.isfinite(v) else f"{v:.2f}" for v in cost["distance_untrained"].values
        ],
        "multiply-adds (millions an image)": [
            f"{v / 1e6:.2f}" for v in cost["multiply_adds"].values
        ],
        "scores or state (KiB an image)": [f"{v / 1024:.1f}" for v in cost["score_bytes"].values],
        "time (ms an image)": [f"{v:.2f}" for v in cost["ms_per_image"].values],
        "parameters of the image tower": [f"{int(v):,}" for v in cost["parameters"].values],
    }
    first = next(iter(profiles.values()))
    figures.append(
        Figure(
            "cost-table",
            "table",
            "Cost, reach and accuracy by mechanism",
            "Multiply-adds and stored scores are those of all attention layers, from formulas that "
            "the methods state. The time is that of the whole image tower, forward, the fastest of "
            f"several passes on this machine ({first['machine']}). The tower has a class token, so "
            "windows run as softmax attention under a mask here: their saving shows in the formula "
            "and not in the time.",
            table(paid),
            {"width": "full"},
        )
    )
    if not (sweep.has("untrained") or sweep.has("swapped")):
        return figures
    swapped_accuracy = cost["accuracy_swapped"].values.copy()
    swapped_accuracy[list(sweep.mechanisms).index(sweep.reference)] = np.nan
    for a in alignments:
        extra = {"trained": [f"{v:.3f}" for v in trained[a.id]["value"].values]}
        if sweep.has("untrained"):
            untrained, gained = sweep.compared(a, "untrained"), sweep.gained(a)
            extra["before training"] = [f"{v:.3f}" for v in untrained["value"].values]
            extra["trained minus before"] = ranged(
                gained["difference"], gained["difference_low"], gained["difference_high"]
            )
        if sweep.has("swapped"):
            ds = sweep.compared(a, "swapped")
            extra[f"damage: swapped minus {reference}"] = ranged(
                ds["difference"].where(np.isfinite(ds["p"])),
                ds["difference_low"],
                ds["difference_high"],
            )
            extra["damage: zero-shot accuracy after the swap"] = percent(swapped_accuracy)
        figures.append(
            Figure(
                f"{a.id}-controls-table",
                "table",
                f"{a.title}: before training, and damage by swapping",
                f"Damage: the mechanism in weights trained with {reference}, without training, "
                f"minus {reference}. It is a property of those weights and no alignment of the "
                "mechanism.",
                table(extra),
                {"width": "full"},
            )
        )
    return figures


def _methods(
    sweep: _Sweep,
    alignments: Sequence[Alignment],
    profiles: Mapping[str, Mapping[str, Any]],
    layer: str,
    budget: Mapping[str, float],
    generator: str,
    bootstraps: int,
) -> str:
    first = next(iter(profiles.values()))
    given = ""
    if budget:
        given = (
            f" Each run took {int(budget['steps']):,} updates of {int(budget['batch_size'])} "
            f"pictures out of {int(budget['scenes']):,} rendered scenes, with a peak learning rate "
            f"of {budget['learning_rate']:g}, which was not tuned for any mechanism."
        )
    by = {a.id: a for a in alignments}
    names = ", ".join(sweep.mechanisms.values())
    text = (
        "A small CLIP [@radford2021] with a vision transformer of "
        f"{first['grid'][0]} by {first['grid'][1]} patches and a class token as its image tower "
        "was trained from scratch on rendered scenes and their captions, with each of these "
        f"mechanisms in all attention layers of the image tower: {names}. "
        "None has parameters, so all runs of a seed began with the same weights and saw the same "
        f"batches; the {len(sweep.seeds)} seeds changed scenes, weights and batches.{given} "
        "The class token attends to all patches and all patches attend to it, under windows too, "
        "so that local mechanisms keep one global route."
    )
    if "rsa" in by:
        text += (
            f" Alignment with {by['rsa'].title} was the Spearman correlation of 1 − Pearson RDMs "
            f"of patch-averaged features of layer {layer}, chosen beforehand, with the RDM of each "
            "subject [@kriegeskorte2008; @nili2014]."
        )
    if "encoding" in by:
        source = ""
        if generator:
            source = f", simulated from {generator}, which is outside the sweep,"
        text += (
            f" Alignment with {by['encoding'].title}{source} was that of cross-validated ridge "
            "models, layer and penalty chosen in the training folds: r² over the noise ceiling, "
            "with its sign, averaged over neuroids."
        )
    return text + (
        f" Intervals and tests combine {bootstraps} bootstrap samples of the stimuli, which are "
        "the same for all networks (with subjects, in two factors [@schuett2023]), with the "
        "variance over training runs, pooled over mechanisms; degrees of freedom by Satterthwaite, "
        "p-values of differences from "
        f"{sweep.mechanisms[sweep.reference]} by Holm. Cost was counted per image, over layers, "
        "for H heads of N tokens with D channels: 2HPD multiply-adds for P query-key pairs "
        "(softmax: P = N²; windows: the pairs inside them and with the class token), 4HmND for m "
        "agents, "
        "H N (2D² + 2D) for linear attention with D (D + 1) numbers of state in place of scores, "
        "H N (2D² + 4D) for flow attention; projections are not counted. Attention distance is "
        "the mean distance in patches between a patch and what it attends to, weighted by "
        "attention, over patches, heads and layers [@dosovitskiy2021]. For comparison, the "
        "networks were scored before their first step, and each mechanism was swapped into the "
        "weights trained with softmax attention without training, which measures damage."
    )


_REFERENCES = {
    "radford2021": """@inproceedings{radford2021,
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  title = {Learning Transferable Visual Models from Natural Language Supervision},
  booktitle = {Proceedings of the 38th International Conference on Machine Learning},
  pages = {8748--8763}, year = {2021}
}""",
    "dosovitskiy2021": """@inproceedings{dosovitskiy2021,
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and others},
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  booktitle = {International Conference on Learning Representations}, year = {2021}
}""",
    "kriegeskorte2008": """@article{kriegeskorte2008,
  author = {Kriegeskorte, Nikolaus and Mur, Marieke and Ruff, Douglas A. and others},
  title = {Matching Categorical Object Representations in Inferior Temporal Cortex of Man and Monkey},
  journal = {Neuron}, volume = {60}, pages = {1126--1141}, year = {2008}, doi = {10.1016/j.neuron.2008.10.043}
}""",  # noqa: E501
    "nili2014": """@article{nili2014,
  author = {Nili, Hamed and Wingfield, Cai and Walther, Alexander and others},
  title = {A Toolbox for Representational Similarity Analysis},
  journal = {PLoS Computational Biology}, volume = {10}, pages = {e1003553}, year = {2014}, doi = {10.1371/journal.pcbi.1003553}
}""",  # noqa: E501
    "schuett2023": """@article{schuett2023,
  author = {Sch{\\"u}tt, Heiko H. and Kipnis, Alexander D. and Diedrichsen, J{\\"o}rn and Kriegeskorte, Nikolaus},
  title = {Statistical Inference on Representational Geometries},
  journal = {eLife}, volume = {12}, pages = {e82566}, year = {2023}, doi = {10.7554/eLife.82566}
}""",  # noqa: E501
}
