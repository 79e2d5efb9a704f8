"""What pieces of cortex stand for, as a section of the report: one panel a target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.stimuli import StimulusSet, read_stimuli
from brainalign.data.store import read
from brainalign.errors import ConfigError
from brainalign.synthesis.judging import ALL_NATURAL
from brainalign.synthesis.sampling import read_kept

__all__ = ["Panel", "dive_section", "section_from_folders"]

_SHOWN = 8


@dataclass(frozen=True)
class Panel:
    """What is shown of one target.

    Parameters
    ----------
    name : str
        Of the target, such as ``"sub-01, FFA"``.
    judged : Dataset
        Of `brainalign.synthesis.judge`.
    generated : mapping of str to StimulusSet
        Images by the name of their set, from the first rank on (`read_kept`).
    cluster_of : str
        Name of the panel that this one is a cluster of, ``""`` for none.
    words : mapping of str to float
        What captions of the region's voxels name, with the share of captions that do.
    """

    name: str
    judged: xr.Dataset
    generated: Mapping[str, StimulusSet]
    cluster_of: str = ""
    words: Mapping[str, float] = field(default_factory=dict)


def section_from_folders(
    panels: Mapping[str, str | Path],
    generated: Mapping[str, Mapping[str, str | Path]],
    *,
    natural: str | Path,
    cluster_of: Mapping[str, str] | None = None,
    expected: Mapping[str, str] | None = None,
    words: Mapping[str, Mapping[str, float]] | None = None,
) -> Section:
    """Describe what `judge` and `dive` wrote.

    Parameters
    ----------
    panels : mapping of str to path
        Files of `brainalign.synthesis.judge` by target.
    generated : mapping of str to mapping of str to path
        By target and set, the folders that were judged.
    natural : path
        Folder of the natural stimuli.
    cluster_of, expected, words
        See `Panel` and `dive_section`.
    """
    made = [
        Panel(
            name,
            read(path),
            {k: read_kept(folder) for k, folder in generated[name].items()},
            (cluster_of or {}).get(name, ""),
            (words or {}).get(name, {}),
        )
        for name, path in panels.items()
    ]
    return dive_section(made, read_stimuli(natural), expected=expected)


def dive_section(
    panels: Sequence[Panel], natural: StimulusSet, *, expected: Mapping[str, str] | None = None
) -> Section:
    """Describe the images of some targets: natural and generated ones, and how they were judged.

    Parameters
    ----------
    panels : sequence of Panel
        In the order to show; those of clusters follow that of their region.
    natural : StimulusSet
        The natural stimuli of all panels.
    expected : mapping of str to str, optional
        By the name of a panel the label that it is known to prefer; a planted or published one.

    Raises
    ------
    ConfigError
        If there is no panel.
    """
    if not panels:
        raise ConfigError("There are no images to show.", "Run `brainalign dive` first.")
    panels = _grouped(panels)
    figures: list[Figure] = []
    summary: list[Estimate] = []
    for i, panel in enumerate(panels):
        figures.append(_images(f"images-{i}", panel, natural))
        figures.append(_activations(f"activation-{i}", panel))
        figures.append(_labels(f"labels-{i}", panel))
        summary += _estimates(panel, (expected or {}).get(panel.name))
    figures.append(_table(panels, expected or {}))
    methods, facts = _methods(panels)
    return Section(
        id="dive",
        title="Images that cortex is predicted to prefer",
        intro="Which images does a diffusion model draw when its sampling climbs the response that "
        "an encoder predicts of a region? They are judged by an encoder and a classifier "
        "that took no part in making them.",
        figures=figures,
        summary=summary,
        methods=methods,
        references={k: v for k, v in _REFERENCES.items() if f"@{k}" in methods},
        facts=facts,
        order=40,
    )


def _grouped(panels: Sequence[Panel]) -> list[Panel]:
    """Return panels in their order, but those of one region's clusters together and after it."""
    first: dict[str, int] = {}
    for i, panel in enumerate(panels):
        first.setdefault(panel.cluster_of or panel.name, i)
    return sorted(panels, key=lambda p: (first[p.cluster_of or p.name], bool(p.cluster_of)))


def _images(id: str, panel: Panel, natural: StimulusSet) -> Figure:
    judged = panel.judged
    activation = judged["natural_activation"].values
    best = np.argsort(-activation, kind="stable")[:_SHOWN]
    by_id = dict(
        zip(judged["natural_id"].values.tolist(), range(judged.sizes["natural"]), strict=True)
    )
    place = {s: i for i, s in enumerate(natural.ids)}
    names, labels, groups, values = [], [], [], []
    pictures: dict[str, Any] = {}
    for rank, i in enumerate(best.tolist()):
        name = str(judged["natural_id"].values[i])
        pictures[f"natural-{rank}"] = natural.open(place[name])
        names.append(f"natural-{rank}")
        labels.append(name)
        groups.append("best natural images")
        values.append(float(activation[by_id[name]]))
    sets = judged["image_set"].values.astype(str)
    for kind, stimuli in panel.generated.items():
        mine = np.flatnonzero(sets == kind)
        found = dict(zip(judged["image_id"].values[mine].tolist(), mine.tolist(), strict=True))
        for rank, (name, path) in enumerate(
            list(zip(stimuli.ids, stimuli.paths, strict=True))[:_SHOWN]
        ):
            pictures[f"{kind}-{rank}"] = path
            names.append(f"{kind}-{rank}")
            labels.append(str(judged["image_label"].values[found[name]]))
            groups.append(kind)
            values.append(float(judged["image_activation"].values[found[name]]))
    return Figure(
        id=id,
        kind="image_grid",
        title=f"{panel.name}: natural and generated images",
        caption="The natural images with the highest activation predicted by the judging encoder, "
        "and the first images of each way to make them, with the label they were given. Look for "
        "what the generated images share that the natural ones share only in part."
        + _said(panel)
        + _prompted(panel),
        data=xr.Dataset(
            {
                "filename": ("image", names),
                "label": ("image", labels),
                "group": ("image", groups),
                "panel": ("image", [panel.name] * len(names)),
                "value": ("image", values, {"long_name": "predicted activation"}),
            }
        ),
        images=pictures,
    )


def _said(panel: Panel) -> str:
    """Return what captions of the region name, as a sentence of a figure's caption."""
    if not panel.words:
        return ""
    named = ", ".join(f"{noun} ({100 * share:.0f} %)" for noun, share in panel.words.items())
    whose = "cluster" if panel.cluster_of else "region"
    return f" Captions of the {whose}'s voxels name: {named}."


def _prompted(panel: Panel) -> str:
    """Return the prompts of each way to make images that had any."""
    return "".join(
        f" Prompts of the images {kind}: {'; '.join(prompts)}."
        for kind, stimuli in panel.generated.items()
        if any(prompts := _config(stimuli).get("prompts", []))
    )


def _config(stimuli: StimulusSet) -> dict[str, Any]:
    return dict(json.loads(stimuli.index.attrs["config"]))


def _activations(id: str, panel: Panel) -> Figure:
    judged = panel.judged
    threshold = float(judged.attrs["top_1_percent"])
    units = str(judged.attrs.get("units", ""))
    return Figure(
        id=id,
        kind="points",
        title=f"{panel.name}: predicted activation",
        caption=f"Mean of the judging encoder's prediction{f', in {units}' if units else ''}, with "
        "95 % intervals over images. The line is exceeded by 1 % of all natural images. The best "
        "natural images were chosen by this very prediction; images that only fool the guiding "
        "encoder stay near the natural mean.",
        data=xr.Dataset(
            {
                "value": ("item", judged["activation"].values,
                          {"long_name": "activation"}),
                "low": ("item", judged["activation_low"].values),
                "high": ("item", judged["activation_high"].values),
            },
            coords={"item": judged["set"].values.astype(str)},
        ),
        options={"reference_lines": [{"label": "best 1 % of natural images", "value": threshold}]},
    )  # fmt: skip


def _labels(id: str, panel: Panel) -> Figure:
    judged = panel.judged
    return Figure(
        id=id,
        kind="bars",
        title=f"{panel.name}: what is in the images",
        caption=f"Share of images by the label of {judged.attrs.get('labeller', 'the labeller')}, "
        "which did not guide, with 95 % intervals. Look for a label that grows from all natural "
        "images to the best ones and on to the generated ones.",
        data=xr.Dataset(
            {
                k: (("item", "series"), 100 * judged[v].values.T, {"long_name": "% of images"})
                for k, v in (("value", "share"), ("low", "share_low"), ("high", "share_high"))
            },
            coords={
                "item": judged["label"].values.astype(str),
                "series": judged["set"].values.astype(str),
            },
        ),
    )


def _label(row: xr.Dataset, expected: str | None) -> str:
    """Return the label whose share is told of a set of images, empty where there is none."""
    label = expected or str(row["preferred"].values)
    return label if label in row["label"].values else ""


def _estimates(panel: Panel, expected: str | None) -> list[Estimate]:
    """Tell of the images that an encoder guided; the table has all sets."""
    kind = _guided(panel)
    row = panel.judged.sel(set=kind)
    out = [
        Estimate(
            f"{panel.name}, {kind}: above the best 1 % of natural images",
            100 * float(row["above"]), 100 * float(row["above_low"]),
            100 * float(row["above_high"]), "%",
            note=f"{int(row['n'])} images, by the judging encoder",
            reference="natural images 1 %",
        )
    ]  # fmt: skip
    if label := _label(row, expected):
        share = row.sel(label=label)
        natural = panel.judged.sel(set=ALL_NATURAL, label=label)
        out.append(
            Estimate(
                f"{panel.name}, {kind}: labelled {label}",
                100 * float(share["share"]), 100 * float(share["share_low"]),
                100 * float(share["share_high"]), "%",
                note="expected" if expected else "the label that is more frequent than in "
                "natural images",
                reference=f"all natural images {100 * float(natural['share']):.0f} %",
            )
        )  # fmt: skip
    return out


def _table(panels: Sequence[Panel], expected: Mapping[str, str]) -> Figure:
    rows: dict[str, list[Any]] = {}
    for panel in panels:
        for name in panel.judged["set"].values.tolist():
            row = panel.judged.sel(set=name)
            label = _label(row, expected.get(panel.name))
            for key, value in {
                "target": panel.name,
                "cluster of": panel.cluster_of,
                "images": str(name),
                "n": int(row["n"]),
                "activation": float(row["activation"]),
                "in best 1 % (%)": 100 * float(row["above"]),
                "preferred": str(row["preferred"].values),
                "p": float(row["preferred_p"]),
                "label": label,
                "so labelled (%)": 100 * float(row["share"].sel(label=label)) if label else np.nan,
                "diversity": float(row["diversity"]),
                "pixel diversity": float(row["pixel_diversity"]),
            }.items():
                rows.setdefault(key, []).append(value)
    return Figure(
        id="sets",
        kind="table",
        title="All sets of images",
        caption="A label is preferred if it is more frequent than in all natural images (binomial "
        "test, corrected over labels) and the judging encoder confirms that the set's activation "
        "is above that of natural images, over images and over neuroids. The label whose share is "
        "told is the expected one, else the preferred one. Diversity is the mean pairwise cosine "
        "distance of the judging encoder's features, and the root mean square difference of "
        "pixels. In the best 1 % are images above the activation that 1 % of natural ones exceed.",
        data=xr.Dataset({k: ("row", v) for k, v in rows.items()}),
    )


def _guided(panel: Panel) -> str:
    """Return the set whose sampling an encoder guided, whatever the order; else the first."""
    for kind, stimuli in panel.generated.items():
        if _config(stimuli).get("guidance", {}).get("scale"):
            return kind
    return next(iter(panel.generated))


def _methods(panels: Sequence[Panel]) -> tuple[str, dict[str, str]]:
    ways = {kind: _config(stimuli) for kind, stimuli in panels[0].generated.items()}
    worded = [k for k, c in ways.items() if c.get("guidance") and not c["guidance"]["scale"]]
    kind = _guided(panels[0])
    first, config = panels[0].generated[kind], ways[kind]
    guidance = {} if kind in worded else config.get("guidance", {})
    judged = panels[0].judged.attrs
    text = (
        "Images were generated by brain-guided diffusion [@luo2023]: the score of a latent "
        "diffusion model [@rombach2022] was moved along the gradient of the mean response "
        "that encoding models predict, "
    )
    if guidance:
        text += (
            f"with guidance scale {guidance['scale']:g} ({guidance['schedule']}), "
            f"self-attention guidance [@hong2023] of {guidance['sag_scale']:g}, "
            f"{config['steps']} steps of {config['scheduler']} and "
            + (f"prompts {config['prompts']!r}" if any(config["prompts"]) else "an empty prompt")
            + ". "
        )
        jitter = guidance.get("jitter")
        if jitter:
            text += (
                f"The response was the mean over {jitter['copies']} copies of an image, altered "
                f"anew at each step [@olah2017]: moved by up to {100 * jitter['shift']:.3g} % of "
                f"the side, zoomed by up to {100 * jitter['zoom']:.3g} %, with noise of standard "
                f"deviation {jitter['noise']:g}. "
            )
    for other in worded:
        text += (
            f"Images {other} were sampled from words alone, with no encoder to guide and a text "
            f"scale of {ways[other]['text_scale']:g}: from prompts of the nouns that captions of "
            "the target's voxels name most [@luo2024]. "
        )
    text += (
        f"Images were ranked by {first.index.attrs['reranked_by']}, and the best "
        f"{len(first)} of each target kept. Their activation was predicted from features of "
        f"{judged.get('judging_model', '')}, their content labelled by "
        f"{judged.get('labeller', '')}. Intervals are 95 % percentiles of "
        f"{judged['n_bootstrap']} bootstrap samples of images."
    )
    facts = {
        "targets": str(len(panels)),
        "natural images": f"{panels[0].judged.sizes['natural']:,}",
        "images a target": str(len(first)),
    }
    return text, facts


_REFERENCES = {
    "luo2023": """@inproceedings{luo2023,
  author = {Luo, Andrew F. and Henderson, Margaret M. and Wehbe, Leila and Tarr, Michael J.},
  title = {Brain Diffusion for Visual Exploration: Cortical Discovery using Large Scale Generative Models},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {36}, year = {2023}}""",  # noqa: E501
    "luo2024": """@inproceedings{luo2024,
  author = {Luo, Andrew F. and Henderson, Margaret M. and Tarr, Michael J. and Wehbe, Leila},
  title = {{BrainSCUBA}: Fine-Grained Natural Language Captions of Visual Cortex Selectivity},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}""",
    "rombach2022": """@inproceedings{rombach2022,
  author = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\"o}rn},
  title = {High-Resolution Image Synthesis with Latent Diffusion Models},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year = {2022}}""",  # noqa: E501
    "olah2017": """@article{olah2017,
  author = {Olah, Chris and Mordvintsev, Alexander and Schubert, Ludwig},
  title = {Feature Visualization}, journal = {Distill}, volume = {2}, number = {11}, year = {2017},
  doi = {10.23915/distill.00007}}""",
    "hong2023": """@inproceedings{hong2023,
  author = {Hong, Susung and Lee, Gyuseong and Jang, Wooseok and Kim, Seungryong},
  title = {Improving Sample Quality of Diffusion Models Using Self-Attention Guidance},
  booktitle = {IEEE/CVF International Conference on Computer Vision}, year = {2023}}""",
}
