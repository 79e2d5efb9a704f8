"""Captions of voxels as a section of the report. Everything here reads what was captioned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.captioning.captions import voxel_table
from brainalign.captioning.projection import embedding_weights
from brainalign.captioning.words import (
    CATEGORY_WORDS,
    LAYOUTS,
    PERSON_WORDS,
    Tagger,
    cluster_words,
    embed_2d,
    preferred_category,
    region_word_share,
    top_nouns,
    word_share,
)
from brainalign.data.bundle import read_bundle
from brainalign.data.cortex import N_VERTICES
from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.store import read
from brainalign.encoding.result import read_result
from brainalign.encoding.rois import roi_members
from brainalign.errors import ConfigError
from brainalign.features.layers import OUTPUT

__all__ = ["captions_section", "section_from_captions"]

_SPACE = "fsaverage5"
_PERSON = "person"
_WORDS_LISTED = 8
_MOST_POINTS = 3000
_WORDS_PER_ROI = 3
_FEWEST = 10


def section_from_captions(
    captions: Sequence[str | Path],
    encoded: Sequence[str | Path] = (),
    *,
    data: str | Path | None = None,
    rois: Sequence[str] | None = None,
    word_maps: Mapping[str, Sequence[str]] | None = None,
    n_clusters: int = 2,
    layout: str = "pca",
    categories: Mapping[str, Sequence[str]] = CATEGORY_WORDS,
    tagger: Tagger | None = None,
    seed: int = 0,
) -> Section:
    """Describe captions on disk.

    Parameters
    ----------
    captions : sequence of path
        Stores of `brainalign.captioning.caption_result`, one a subject. The baseline that stands
        beside one is shown with it.
    encoded : sequence of path, optional
        The encoding results that were captioned, in the same order: for clusters, and for the
        accuracy of each voxel.
    data : path, optional
        The bundle of the study: its extras hold the truth of simulated subjects, and the voxels
        that vertices lie in (``surface_SUBJECT``).
    rois, word_maps, n_clusters, layout, categories, tagger, seed
        See `captions_section`.
    """
    if encoded and len(encoded) != len(captions):
        raise ConfigError(f"{len(encoded)} encoding results came with {len(captions)} captions.")
    said: dict[str, xr.Dataset] = {}
    baselines, weights, scores = {}, {}, {}
    for i, path in enumerate(map(Path, captions)):
        ds = read(path, "captions").load()
        subject = str(ds.attrs.get("subject") or path.stem)
        said[subject] = ds
        beside = path.with_name(f"{path.stem}-best-images{path.suffix}")
        if beside.exists():
            baselines[subject] = read(beside, "captions").load()
        if encoded:
            result = read_result(encoded[i])
            encoder = result.encoders[str(ds["layer"].values)]
            known = {n: k for k, n in enumerate(encoder["neuroid_id"].values.astype(str).tolist())}
            rows = [known[n] for n in ds["neuroid_id"].values.astype(str).tolist()]
            weights[subject] = embedding_weights(encoder.isel(neuroid=rows).load())
            scores[subject] = result.best
    extras = {} if data is None else read_bundle(data).extras
    truth, surfaces = (
        {s: extras[f"{kind}_{s}"] for s in said if f"{kind}_{s}" in extras}
        for kind in ("truth", "surface")
    )
    return captions_section(
        said, baselines=baselines, weights=weights, scores=scores, truth=truth, surfaces=surfaces,
        rois=rois, word_maps=word_maps, n_clusters=n_clusters, layout=layout,
        categories=categories, tagger=tagger, seed=seed,
    )  # fmt: skip


def captions_section(
    captions: Mapping[str, xr.Dataset],
    *,
    baselines: Mapping[str, xr.Dataset] | None = None,
    weights: Mapping[str, ArrayLike] | None = None,
    scores: Mapping[str, xr.Dataset] | None = None,
    truth: Mapping[str, xr.Dataset] | None = None,
    surfaces: Mapping[str, xr.Dataset] | None = None,
    rois: Sequence[str] | None = None,
    word_maps: Mapping[str, Sequence[str]] | None = None,
    n_clusters: int = 2,
    layout: str = "pca",
    categories: Mapping[str, Sequence[str]] = CATEGORY_WORDS,
    tagger: Tagger | None = None,
    seed: int = 0,
) -> Section:
    """Describe what voxels stand for, in words.

    Parameters
    ----------
    captions : mapping of str to Dataset
        By subject, of `brainalign.captioning.caption_encoder`.
    baselines : mapping of str to Dataset, optional
        By subject, of `brainalign.captioning.caption_best_images`, of the same voxels.
    weights : mapping of str to array (neuroid, feature), optional
        By subject, in the space of the embeddings: for clusters and the map of weights.
    scores : mapping of str to Dataset, optional
        By subject, ``scores`` schema.
    truth : mapping of str to Dataset, optional
        By subject, of a simulated one: ``preference`` and ``null`` on neuroid.
    surfaces : mapping of str to Dataset, optional
        By subject, ``neuroid_id`` (vertex) of fsaverage5, left hemisphere first: where voxels of a
        volume lie on the map. Neuroids on that surface are their own.
    rois : sequence of str, optional
        Regions to describe, in order; by default all. Voxels of no such region are on the maps and
        in the tables all the same.
    word_maps : mapping of str to sequence of str, optional
        Nouns, singular, by what they stand for; the share of captions that name one is drawn by
        region and on the surface, after that of words for a person (``"person"``).
    n_clusters : int
        Into which each region of 10 voxels or more is split.
    layout : {"pca", "tsne", "umap"}
        Of the map of weights; see `brainalign.captioning.embed_2d`.
    categories : mapping of str to sequence of str
        Words of each category; see `brainalign.captioning.first_mentioned`.
    tagger : callable, optional
        See `brainalign.captioning.nouns`.
    seed : int
        Of the clusters and the layout.
    """
    if not captions:
        raise ConfigError("There are no captions to describe.")
    members = {s: _members(ds, rois) for s, ds in captions.items()}
    names = list(dict.fromkeys(r for m in members.values() for r in m))
    preferred = {s: preferred_category(ds, members[s], categories) for s, ds in captions.items()}
    placed = surfaces or {}
    named: dict[str, Sequence[str]] = {_PERSON: sorted(PERSON_WORDS), **(word_maps or {})}
    figures = []
    if names:
        figures += [_words(captions, members, names, tagger), _categories(preferred, names)]
        figures += [
            _shares(captions, members, names, name, listed, tagger)
            for name, listed in named.items()
        ]
    figures += [
        _surface(ds, _vertices(ds, placed.get(s)), preferred[s], s, categories, named, tagger)
        for s, ds in captions.items()
        if s in placed or ("vertex" in ds.coords and ds.attrs.get("space") == _SPACE)
    ]
    if weights:
        figures += _clusters(captions, weights, members, n_clusters, tagger, seed)
        figures.append(_weight_map(captions, weights, members, layout, seed))
    faithful = _faithfulness(captions, baselines or {})
    if faithful is not None:
        figures.append(faithful)
    if baselines and names:
        figures.append(_baseline(captions, baselines, members, names, tagger))
    figures += [_table(ds, (scores or {}).get(s), s, tagger) for s, ds in captions.items()]
    first = next(iter(captions.values()))
    unchecked = [s for s, ds in captions.items() if not _is_checked(ds)]
    facts = {"Captions of voxels": f"{sum(d.sizes['neuroid'] for d in captions.values()):,}"}
    if unchecked:
        facts["Faithfulness not checked"] = ", ".join(unchecked)
    return Section(
        id="captions",
        title="What voxels stand for, in words",
        intro=(
            "BrainSCUBA: each voxel's encoding weights are moved to where natural images lie, and "
            f"put into words, {first.sizes['draw']} times with other images. A caption tells of "
            "the image that the encoder says the voxel would respond to most; it is a hypothesis "
            "about the voxel and no measurement."
        ),
        figures=figures,
        summary=_estimates(captions, baselines or {}, preferred, truth or {}, categories),
        methods=_methods(first),
        references=dict(_REFERENCES),
        exclusions=[f"No captioned voxel lies in {r}." for r in rois or () if r not in names],
        facts=facts,
        order=45,
    )


def _members(ds: xr.Dataset, rois: Sequence[str] | None) -> dict[str, NDArray[np.intp]]:
    found = roi_members(ds)
    return found if rois is None else {r: found[r] for r in rois if r in found}


def _is_checked(captions: xr.Dataset) -> bool:
    return bool(np.isfinite(captions["prediction"].values).any())


def _mean_share(tables: Sequence[xr.Dataset], names: Sequence[str]) -> xr.DataArray:
    """Return the share (roi, noun) averaged over the subjects that have the region."""
    shares = [t["share"] for t in tables]
    joined = xr.concat(shares, dim="subject", join="outer", coords="minimal", compat="override")
    return joined.mean("subject", skipna=True).fillna(0.0).reindex(roi=[*names])


def _words(
    captions: Mapping[str, xr.Dataset],
    members: Mapping[str, Mapping[str, NDArray[np.intp]]],
    names: Sequence[str],
    tagger: Tagger | None,
) -> Figure:
    every = 10**6
    tables = [top_nouns(ds, members[s], top=every, tagger=tagger) for s, ds in captions.items()]
    share = _mean_share(tables, names)
    columns: list[str] = []
    for roi in names:
        row = share.sel(roi=roi)
        best = row["noun"].values[np.argsort(-row.values, kind="stable")][:_WORDS_PER_ROI]
        columns += [str(n) for n in best if str(n) not in columns]
    ds = xr.Dataset(
        {"value": (("row", "column"), share.sel(noun=columns).values)},
        coords={"row": [*names], "column": columns},
    )
    ds["value"].attrs = {"long_name": "share of captions that name it", "units": ""}
    return Figure(
        "words",
        "heatmap",
        "Nouns of each region",
        f"The {_WORDS_PER_ROI} nouns that the captions of each region name most, and how often "
        "the others name them. Look for nouns that one region has to itself.",
        ds,
        {"best_in": "row", "x_label": "noun", "y_label": "region"},
    )


def _categories(preferred: Mapping[str, xr.Dataset], names: Sequence[str]) -> Figure:
    joined = xr.concat([p["share"] for p in preferred.values()], dim="subject", join="outer")
    share = joined.mean("subject", skipna=True).reindex(roi=[*names])
    certain = {
        roi: sorted({str(p["preferred"].sel(roi=roi).values) for p in preferred.values()
                     if roi in p["roi"].values})
        for roi in names
    }  # fmt: skip
    none = [roi for roi, found in certain.items() if found == [""]]
    ds = xr.Dataset(
        {"value": (("row", "column"), share.values)},
        coords={"row": [*names], "column": share["category"].values.astype(str)},
    )
    ds["value"].attrs = {"long_name": "share of voxels", "units": ""}
    note = f" No category has the majority of the voxels of {', '.join(none)}." if none else ""
    return Figure(
        "categories",
        "heatmap",
        "Categories of each region",
        "Share of voxels most of whose captions are first about something of a category. A region "
        "prefers a category where this is the majority with 95 % confidence." + note,
        ds,
        {"best_in": "row", "x_label": "category", "y_label": "region"},
    )


def _said(name: str) -> str:
    return "a person" if name == _PERSON else name.replace("_", " ")


def _shares(
    captions: Mapping[str, xr.Dataset],
    members: Mapping[str, Mapping[str, NDArray[np.intp]]],
    names: Sequence[str],
    name: str,
    words: Sequence[str],
    tagger: Tagger | None,
) -> Figure:
    tables = [
        region_word_share(ds, members[s], words, tagger=tagger).reindex(roi=[*names])
        for s, ds in captions.items()
    ]
    ds = xr.Dataset(
        {
            drawn: (("item", "series"), 100 * np.stack([t[own].values for t in tables], axis=1))
            for drawn, own in (("value", "share"), ("low", "low"), ("high", "high"))
        },
        coords={"item": [*names], "series": [*captions]},
    )
    ds["value"].attrs = {"long_name": f"captions that name {_said(name)}", "units": "%"}
    listed = ", ".join(words[:_WORDS_LISTED])
    more = f" and {len(words) - _WORDS_LISTED} more" if len(words) > _WORDS_LISTED else ""
    return Figure(
        f"share-{name}",
        "points",
        f"Captions of each region that name {_said(name)}",
        f"Share of the captions of a region's voxels with a noun of this list: {listed}{more}. "
        "Lines are 95 % intervals over the draws: how far the share hangs on the images that were "
        "projected on, and no statement about other subjects.",
        ds,
        {"y_label": f"captions that name {_said(name)} (%)", "y_range": [-2, 102]},
    )


def _vertices(captions: xr.Dataset, surface: xr.Dataset | None) -> NDArray[np.intp]:
    """Return the neuroid of each vertex of fsaverage5, left hemisphere first; -1 for none."""
    if surface is not None:
        own = captions["neuroid_id"].values.astype(str).tolist()
        place = {n: i for i, n in enumerate(own)}
        return np.array([place.get(n, -1) for n in surface["neuroid_id"].values.astype(str)])
    out = np.full(2 * N_VERTICES, -1)
    side = np.where(captions["hemisphere"].values.astype(str) == "R", N_VERTICES, 0)
    out[side + captions["vertex"].values] = np.arange(captions.sizes["neuroid"])
    return out


def _surface(
    captions: xr.Dataset,
    neuroid: NDArray[np.intp],
    preferred: xr.Dataset,
    subject: str,
    categories: Mapping[str, Sequence[str]],
    named: Mapping[str, Sequence[str]],
    tagger: Tagger | None,
) -> Figure:
    place = {c: float(i) for i, c in enumerate(categories)}
    category = np.array(
        [place.get(c, np.nan) for c in preferred["voxel_category"].values.astype(str).tolist()]
    )
    maps = {
        "category": (
            category,
            {"long_name": "Category", "cmap": "categorical", "labels": json.dumps([*categories])},
        ),
        **{
            f"share_{name}": (
                word_share(captions, words, tagger),
                {"long_name": f"Share of captions that name {_said(name)}", "units": "",
                 "cmap": "sequential"},
            )
            for name, words in named.items()
        },
        "percentile": (
            captions["percentile"].mean("draw").values,
            {"long_name": "Faithfulness", "units": "percentile", "cmap": "sequential"},
        ),
    }  # fmt: skip
    ds = xr.Dataset(
        {k: ("vertex", np.where(neuroid < 0, np.nan, v[neuroid]).astype(np.float32), attrs)
         for k, (v, attrs) in maps.items() if np.isfinite(v).any()},
        coords={
            "vertex": ("vertex", np.tile(np.arange(N_VERTICES), 2)),
            "hemisphere": ("vertex", np.repeat(["L", "R"], N_VERTICES)),
        },
    )  # fmt: skip
    about = ", ".join(map(_said, named))
    return Figure(
        f"word-map-{subject}",
        "surface",
        f"{subject}: cortex coloured by meaning",
        "What the captions of each vertex are about, on the inflated fsaverage5 surface: the "
        f"category that most of them mention first, the share that name {about}"
        f"{', and their faithfulness' if _is_checked(captions) else ''}. Grey is not captioned. "
        "Turn the brain with the mouse; choose the map above "
        "it.",
        ds,
    )


def _clusters(
    captions: Mapping[str, xr.Dataset],
    weights: Mapping[str, ArrayLike],
    members: Mapping[str, Mapping[str, NDArray[np.intp]]],
    n_clusters: int,
    tagger: Tagger | None,
    seed: int,
) -> list[Figure]:
    rows: list[tuple[str, str, int, int, str]] = []
    for subject, w in weights.items():
        for roi, index in members[subject].items():
            if len(index) < max(_FEWEST, n_clusters):
                continue
            found = cluster_words(
                w, captions[subject], index, n_clusters=n_clusters, seed=seed, tagger=tagger
            )
            for k in range(n_clusters):
                excess = found["excess"].sel(cluster_number=k)
                order = np.argsort(-excess.values, kind="stable")[:5]
                said = ", ".join(
                    f"{found['noun'].values[i]} (+{100 * excess.values[i]:.0f} %)"
                    for i in order
                    if excess.values[i] > 0
                )
                rows.append((subject, roi, k + 1, int(found["size"].values[k]), said or "none"))
    if not rows:
        return []
    columns = ["subject", "region", "cluster", "voxels", "words"]
    ds = xr.Dataset(
        {c: ("row", np.array(v)) for c, v in zip(columns, zip(*rows, strict=True), strict=True)}
    )
    return [
        Figure(
            "clusters",
            "table",
            "Parts of each region and their words",
            f"Each region split into {n_clusters} by spherical k-means of its voxels' weights, and "
            "the nouns that the captions of a part name more often than those of the rest of the "
            "region. The split is always made: look for parts whose words differ in kind.",
            ds,
        )
    ]


def _weight_map(
    captions: Mapping[str, xr.Dataset],
    weights: Mapping[str, ArrayLike],
    members: Mapping[str, Mapping[str, NDArray[np.intp]]],
    layout: str,
    seed: int,
) -> Figure:
    subject = next(iter(weights))
    w, ds = np.asarray(weights[subject]), captions[subject]
    roi = np.full(len(w), "no ROI", dtype=object)
    for name, index in reversed([*members[subject].items()]):
        roi[index] = name
    inside = np.flatnonzero(roi != "no ROI")
    inside = inside if len(inside) > 2 else np.arange(len(roi))
    thin = inside[np.linspace(0, len(inside) - 1, min(len(inside), _MOST_POINTS)).astype(int)]
    layout = layout if len(thin) >= _FEWEST else "pca"
    xy = np.zeros((len(thin), 2))
    if len(thin) > 2:
        xy = embed_2d(w[thin], method=layout, seed=seed)
    data = xr.Dataset(
        {
            "x": ("observation", xy[:, 0]),
            "y": ("observation", xy[:, 1]),
            "group": ("observation", roi[thin].astype(str)),
            "label": ("observation", ds["caption"].values.astype(str)[thin, 0]),
        }
    )
    linear = layout == "pca"
    for axis, count in (("x", "first"), ("y", "second")):
        name = f"{count} principal component" if linear else f"{count} axis of {LAYOUTS[layout]}"
        data[axis].attrs = {"long_name": name, "units": ""}
    far = "" if linear else " How far apart groups lie says little."
    return Figure(
        "weights",
        "scatter",
        f"{subject}: voxels by the direction of their weights",
        f"Each point is a voxel, laid out by {LAYOUTS[layout]} of the unit-norm weights, with its "
        f"caption. Voxels that would respond to the same images lie together.{far}",
        data,
    )


def _faithfulness(
    captions: Mapping[str, xr.Dataset], baselines: Mapping[str, xr.Dataset]
) -> Figure | None:
    """Return how faithful captions are; None where none was checked."""
    parts: list[tuple[str, NDArray]] = []
    for title, sets in (("projected weights", captions), ("best real images", baselines)):
        if sets:
            values = np.concatenate([ds["percentile"].values.ravel() for ds in sets.values()])
            parts.append((title, values[np.isfinite(values)]))
    if not any(len(values) for _, values in parts):
        return None
    data = xr.Dataset(
        {
            "value": ("observation", np.concatenate([v for _, v in parts])),
            "group": ("observation", np.repeat([t for t, _ in parts], [len(v) for _, v in parts])),
        }
    )
    data["value"].attrs = {"long_name": "percentile among captions of other voxels", "units": ""}
    return Figure(
        "faithfulness",
        "distribution",
        "How faithful the captions are",
        "An encoder predicts a voxel's response to its caption, through the text tower of its "
        "CLIP model. Shown is the share of other voxels' captions for which it predicts less: "
        "0.5 is chance, 1 a caption that fits no other voxel as well. It says that words fit "
        "weights, and not that the weights fit the brain: noise has its captions too. Beside it, "
        "captions of the real images that each voxel responds to most.",
        data,
        {"reference_lines": [{"value": 0.5, "label": "chance"}]},
    )


def _baseline(
    captions: Mapping[str, xr.Dataset],
    baselines: Mapping[str, xr.Dataset],
    members: Mapping[str, Mapping[str, NDArray[np.intp]]],
    names: Sequence[str],
    tagger: Tagger | None,
) -> Figure:
    rows: list[tuple[str, str, str]] = []
    both = [s for s in captions if s in baselines]
    shares = [
        _mean_share([top_nouns(sets[s], members[s], top=10**6, tagger=tagger) for s in both], names)
        for sets in (captions, baselines)
    ]
    for roi in names:
        said = []
        for share in shares:
            row = share.sel(roi=roi)
            order = np.argsort(-row.values, kind="stable")[:5]
            said.append(
                ", ".join(
                    f"{row['noun'].values[i]} ({100 * row.values[i]:.0f} %)"
                    for i in order
                    if row.values[i] > 0
                )
            )
        rows.append((roi, said[0], said[1]))
    columns = ["region", "projected weights", "best real images"]
    ds = xr.Dataset(
        {c: ("row", np.array(v)) for c, v in zip(columns, zip(*rows, strict=True), strict=True)}
    )
    return Figure(
        "baseline",
        "table",
        "Words of projected weights and of the best real images",
        "The nouns of each region's captions, and those of captions of the images that its voxels "
        "respond to most. Where the two agree, the words do not hang on the projection.",
        ds,
    )


def _table(
    captions: xr.Dataset, scores: xr.Dataset | None, subject: str, tagger: Tagger | None
) -> Figure:
    table = voxel_table(captions, scores, tagger)
    ds = xr.Dataset(
        {
            str(c): ("row", table[c].astype(str).to_numpy() if table[c].dtype.kind not in "fi"
                     else table[c].to_numpy())
            for c in table
        }
    )  # fmt: skip
    return Figure(
        f"voxels-{subject}",
        "table",
        f"{subject}: every voxel and its caption",
        "The most faithful caption of each voxel, the nouns of all its captions, the response that "
        "the encoder predicts for the caption and its percentile among captions of other voxels."
        if _is_checked(captions)
        else "The first caption of each voxel and the nouns of all its captions. Whether they are "
        "faithful to the encoder was not checked.",
        ds,
    )


def _estimates(
    captions: Mapping[str, xr.Dataset],
    baselines: Mapping[str, xr.Dataset],
    preferred: Mapping[str, xr.Dataset],
    truth: Mapping[str, xr.Dataset],
    categories: Mapping[str, Sequence[str]],
) -> list[Estimate]:
    mine = np.concatenate([d["percentile"].values.ravel() for d in captions.values()])
    theirs = np.array([p for d in baselines.values() for p in d["percentile"].values.ravel()])
    beside = (
        f"; captions of the best real images {np.nanmean(theirs):.2f}"
        if np.isfinite(theirs).any()
        else ""
    )
    out = []
    if np.isfinite(mine).any():
        out.append(
            Estimate(
                "Faithfulness of captions",
                float(np.nanmean(mine)),
                note="mean share of other voxels' captions for which the encoder predicts less",
                reference=f"chance 0.50{beside}",
            )
        )
    right, of = 0, 0
    for subject, planted in truth.items():
        if subject not in captions:
            continue
        known = {n: i for i, n in enumerate(planted["neuroid_id"].values.astype(str).tolist())}
        rows = [known[n] for n in captions[subject]["neuroid_id"].values.astype(str).tolist()]
        meant = planted["preference"].values.astype(str)[rows]
        selective = (meant != "") & ~planted["null"].values.astype(bool)[rows]
        named = preferred[subject]["voxel_category"].values.astype(str)
        right += int((named == meant)[selective].sum())
        of += int(selective.sum())
    if of:
        out.append(
            Estimate(
                "Selective voxels whose planted category is named",
                100 * right / of,
                unit="%",
                note=f"{right:,} of {of:,}: the category most captions of a voxel mention first",
                reference=f"chance {100 / len(categories):.0f} %",
            )
        )
    return out


def _methods(ds: xr.Dataset) -> str:
    temperature = float(ds.attrs.get("temperature", np.nan))
    sharpness = f" with temperature 1/{1 / temperature:.0f}" if temperature > 0 else ""
    model, layer = str(ds["model"].values), str(ds["layer"].values)
    fitted = "the image embeddings" if layer == OUTPUT else f"layer {layer}"
    judge = str(ds.attrs.get("checked_with", model))
    other = "" if judge == model and layer == OUTPUT else f" on {judge}"
    faithful = (
        f"The faithfulness of a caption is the prediction of the encoding model{other} for its "
        "text embedding, as a percentile among predictions for other voxels' captions."
        if _is_checked(ds)
        else "Whether captions are faithful to the encoding model was not checked, since no texts "
        "lie in the space of its features."
    )
    return (
        "Voxels were captioned with BrainSCUBA [@luo2024]. The weights of an encoding model on "
        f"{fitted} of {model} were projected onto embeddings of natural "
        f"images by a softmax of their cosines{sharpness}, separately for {ds.sizes['draw']} "
        f"disjoint parts of the images, and decoded by {ds['captioner'].values!s} [@mokady2021] "
        f"with a beam search of {ds.attrs.get('beams', 5)} beams. Nouns were found by a tagger of "
        f"parts of speech. {faithful}"
    )


_REFERENCES = {
    "luo2024": """@inproceedings{luo2024,
  author = {Luo, Andrew F. and Henderson, Margaret M. and Tarr, Michael J. and Wehbe, Leila},
  title = {{BrainSCUBA}: Fine-Grained Natural Language Captions of Visual Cortex Selectivity},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}""",
    "mokady2021": """@article{mokady2021,
  author = {Mokady, Ron and Hertz, Amir and Bermano, Amit H.},
  title = {{ClipCap}: {CLIP} Prefix for Image Captioning},
  journal = {arXiv}, volume = {2111.09734}, year = {2021}
}""",
}
