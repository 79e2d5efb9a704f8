"""Simulated sections with every kind of figure, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw

from brainalign.data.section import Estimate, Figure, Section, write_section

LAYERS = ["conv_stem", *(f"blocks.{i}" for i in range(7)), "conv_head", "classifier"]
ROIS = ["V1", "V2", "hV4", "FFA", "OFA", "EBA", "PPA", "VWFA"]
CATEGORIES = ["face", "body", "place", "word"]
KHALIGH = """@article{kriegeskorte2008,
  author = {Kriegeskorte, Nikolaus and Mur, Marieke and Ruff, Douglas A. and Kiani, Roozbeh},
  title = {Matching Categorical Object Representations in Inferior Temporal Cortex
    of Man and Monkey},
  journal = {Neuron}, volume = {60}, number = {6}, pages = {1126--1141}, year = {2008},
  doi = {10.1016/j.neuron.2008.10.043}
}"""
KAY = """@article{kay2017,
  author = {Kay, Kendrick N. and Yeatman, Jason D.},
  title = {Bottom-up and top-down computations in word- and face-selective cortex},
  journal = {eLife}, volume = {6}, pages = {e22341}, year = {2017}, doi = {10.7554/eLife.22341}
}"""

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "javascript:document.title='owned'",
    "<a href=\"javascript:document.title='owned'\">link</a>",
    "{{ 7 * 7 }}{% raw %}",
    '=HYPERLINK("http://example.invalid")',
    "../../etc/passwd",
    "名前 \u202etxt.exe\u202c é\u0301 🧠",
    "%{customdata} &lt;b&gt; <b>bold</b> $x^2$",
    "a\x07b\nc",
]


def vertices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hemisphere, vertex and position of every vertex of the inflated fsaverage5."""
    from brainalign.report.surface import inflated

    meshes = inflated()
    hemisphere = np.repeat(["L", "R"], 10242)
    vertex = np.tile(np.arange(10242), 2)
    return hemisphere, vertex, np.concatenate([meshes[h].coordinates for h in "LR"])


def surface_data(seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    hemisphere, vertex, xyz = vertices()
    centres = {
        "FFA": (0, -40, -55),
        "EBA": (-30, -75, -5),
        "PPA": (22, -38, -45),
        "V1": (25, -95, -5),
    }
    roi = np.full(vertex.size, "", dtype=object)
    field = np.zeros(vertex.size)
    nearest = np.full(vertex.size, np.nan)
    mirrored = xyz * np.where(hemisphere == "L", 1, -1)[:, None] ** np.array([1, 0, 0])
    for i, (name, centre) in enumerate(centres.items()):
        distance = np.linalg.norm(mirrored - centre, axis=1)
        field = np.maximum(field, np.exp(-((distance / 26) ** 2)))
        roi[distance < 14] = name
        nearest[distance < 22] = i
    visual = mirrored[:, 1] < -5 - 0.5 * np.abs(mirrored[:, 2])
    r = np.where(visual, 0.62 * field + 0.05 + rng.normal(0, 0.03, field.size), np.nan)
    preference = np.where(visual, np.tanh((mirrored[:, 0]) / 20) * field, np.nan)
    ds = xr.Dataset(
        {
            "r": ("vertex", r, {"long_name": "Encoding accuracy", "units": "Pearson r"}),
            "normalised": (
                "vertex",
                np.where(field > 0.15, r / 0.75, np.nan),
                {"long_name": "Accuracy as a share of the ceiling", "units": "r / ceiling"},
            ),
            "people": (
                "vertex",
                preference,
                {"long_name": "People above places", "units": "z", "cmap": "diverging"},
            ),
            "preferred": (
                "vertex",
                nearest,
                {
                    "long_name": "Preferred category",
                    "cmap": "categorical",
                    "labels": json.dumps(["people", "bodies", "places", "edges"]),
                },
            ),
        },
        coords={
            "hemisphere": ("vertex", hemisphere),
            "vertex": ("vertex", vertex),
            "roi": ("vertex", roi.astype(str)),
        },
    )
    return ds


def stimulus(category: str, i: int, size: int = 96) -> Image.Image:
    """Draw a small picture of a category."""
    rng = np.random.default_rng(CATEGORIES.index(category) * 1000 + i)
    ground = tuple(int(v) for v in rng.integers(120, 235, 3))
    ink = tuple(int(v) for v in rng.integers(20, 110, 3))
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    s, dx = size / 96, int(rng.integers(-10, 10))
    if category == "face":
        pen.ellipse((24 * s + dx, 16 * s, 72 * s + dx, 80 * s), fill=(228, 190, 160), outline=ink)
        for x in (38, 58):
            pen.ellipse(((x - 4) * s + dx, 38 * s, (x + 4) * s + dx, 46 * s), fill=ink)
        pen.arc((36 * s + dx, 50 * s, 60 * s + dx, 70 * s), 20, 160, fill=ink, width=3)
    elif category == "body":
        pen.ellipse((40 * s + dx, 8 * s, 56 * s + dx, 24 * s), fill=ink)
        for a, b in (
            ((48, 24), (48, 58)),
            ((48, 32), (28, 46)),
            ((48, 32), (68, 44)),
            ((48, 58), (34, 88)),
            ((48, 58), (62, 88)),
        ):
            pen.line((a[0] * s + dx, a[1] * s, b[0] * s + dx, b[1] * s), fill=ink, width=6)
    elif category == "place":
        pen.rectangle((0, 60 * s, size, size), fill=(90, 130, 80))
        pen.polygon([(20 * s + dx, 50 * s), (48 * s + dx, 22 * s), (76 * s + dx, 50 * s)], fill=ink)
        pen.rectangle((28 * s + dx, 50 * s, 68 * s + dx, 78 * s), fill=(200, 180, 150), outline=ink)
    else:
        for row in range(3):
            x = 10
            while x < 80:
                w = int(rng.integers(5, 14))
                pen.rectangle(
                    (x * s, (26 + 18 * row) * s, (x + w) * s, (34 + 18 * row) * s), fill=ink
                )
                x += w + 5
    return image


def quality(rng: np.random.Generator) -> Section:
    groups = np.repeat(ROIS, 400)
    middle = np.repeat(np.linspace(0.75, 0.5, len(ROIS)), 400)
    ceiling = np.clip(middle + rng.normal(0, 0.08, groups.size), 0.05, 0.95)
    k = np.arange(1, 11)
    snr = np.array([0.35, 0.6, 1.0])[:, None]
    growth = np.sqrt(snr * k / (snr * k + 1))
    return Section(
        id="quality",
        title="Data quality",
        intro="How well the responses repeat bounds what any model can explain. "
        "Ceilings come from the noise between repeats of the same stimulus.",
        order=10,
        facts={"Subjects": "1 (simulated)", "Stimuli": "480", "Repeats": "3", "Neuroids": "20,484"},
        summary=[
            Estimate(
                "Median noise ceiling over visual cortex",
                0.642,
                0.631,
                0.655,
                "r",
                "split-half, Spearman-Brown",
                "true ceiling 0.65",
            ),
        ],
        figures=[
            Figure(
                "ceilings",
                "distribution",
                "Noise ceiling of every vertex, by region",
                "The ceiling is the highest correlation a perfect model could reach. Regions far "
                "to the "
                "left cannot tell models apart; a second hump near zero would be vertices "
                "outside the cortex.",
                xr.Dataset(
                    {
                        "value": (
                            "observation",
                            ceiling,
                            {"long_name": "Noise ceiling", "units": "r"},
                        )
                    },
                    coords={"group": ("observation", groups)},
                ),
                options={"reference_lines": [{"label": "kept above", "value": 0.1}]},
            ),
            Figure(
                "repeats",
                "curve",
                "What more repeats would bring",
                "The ceiling grows with the number of repeats averaged. Where the line is flat, "
                "more "
                "stimuli are worth more than more repeats.",
                xr.Dataset(
                    {
                        "value": (
                            ("x", "series"),
                            growth.T,
                            {"long_name": "Noise ceiling", "units": "r"},
                        ),
                        "low": (("x", "series"), growth.T - 0.03),
                        "high": (("x", "series"), np.minimum(growth.T + 0.03, 1)),
                    },
                    coords={
                        "x": ("x", k, {"long_name": "Repeats averaged"}),
                        "series": ["PPA", "FFA", "V1"],
                    },
                ),
                options={"reference_lines": [{"label": "this study", "value": 0.65}]},
            ),
            Figure(
                "counts",
                "table",
                "What entered the analysis",
                "Counts after exclusion. A region with few vertices has a wide interval "
                "everywhere below.",
                xr.Dataset(
                    {
                        "region": ("row", ROIS),
                        "vertices": ("row", rng.integers(60, 900, 8)),
                        "excluded": ("row", rng.integers(0, 12, 8)),
                        "median ceiling": ("row", rng.uniform(0.4, 0.8, 8)),
                        "shared": ("row", np.array([True, False] * 4)),
                    }
                ),
            ),
        ],
        methods="Noise ceilings followed the noise between repeats [@kay2017]. Vertices with a "
        "ceiling "
        "below r = 0.1 were left out.\n\nResponses were averaged over three repeats.",
        references={"kay2017": KAY},
        exclusions=["38 of 20,484 vertices: constant over all presentations."],
    )


def encoding(rng: np.random.Generator) -> Section:
    depth = np.arange(len(LAYERS))[:, None]
    best = np.array([1.5, 2.2, 3.5, 6.2, 5.6, 5.2, 6.5, 6.8])[None]
    value = 0.12 + 0.5 * np.exp(-(((depth - best) / 3.2) ** 2)) + rng.normal(0, 0.012, (10, 8))
    models = [
        "MobileNetV2, best layer",
        "small CLIP, best layer",
        "V1 energy model",
        "Random weights",
        "Pixels",
    ]
    heights = np.array([[0.61, 0.52], [0.57, 0.55], [0.44, 0.21], [0.31, 0.18], [0.22, 0.09]])
    n = 1500
    ceiling = rng.uniform(0.25, 0.9, n)
    r = np.clip(ceiling * rng.beta(6, 2.2, n) + rng.normal(0, 0.03, n), -0.1, 1)
    roi = rng.choice(ROIS[:4], n)
    ds = surface_data()
    return Section(
        id="encoding",
        title="Encoding with a network",
        intro="Ridge regression from each layer's features to every vertex, scored on stimuli "
        "held out. "
        "The layer of a region is chosen inside the training folds, so the scores below are not "
        "chosen from.",
        order=20,
        facts={
            "Model": "MobileNetV2 (ImageNet)",
            "Layers": "10",
            "Folds": "5",
            "Features kept": "512 a layer",
        },
        summary=[
            Estimate(
                "Encoding accuracy in FFA, best layer (nested)",
                0.612,
                0.587,
                0.634,
                "r",
                "5 folds, median over vertices",
                "V1 model 0.44",
            ),
            Estimate(
                "Share of the ceiling explained in FFA",
                81.4,
                78.0,
                84.9,
                "%",
                "",
                "random network 41 %",
            ),
            Estimate(
                "Vertices with q < 0.05",
                6412,
                None,
                None,
                "",
                "1,000 refitted permutations",
                "expected by chance 0",
            ),
            Estimate("Smallest p", 0.000999, None, None, "", "permutation", ""),
        ],
        figures=[
            Figure(
                "maps",
                "surface",
                "Encoding accuracy over the cortex",
                "Bright patches are vertices whose responses to new images the features predict. "
                "Look for "
                "the ventral stream on both sides; an accuracy spread evenly over the cortex "
                "would point "
                "to a leak between training and test stimuli.",
                ds,
            ),
            Figure(
                "layers",
                "heatmap",
                "Accuracy by layer and region",
                "Early regions should be best explained by early layers, category-selective "
                "regions by "
                "late ones: the outlined cells run down to the right.",
                xr.Dataset(
                    {
                        "value": (
                            ("row", "column"),
                            value,
                            {"long_name": "accuracy", "units": "Pearson r"},
                        ),
                        "low": (("row", "column"), value - 0.02),
                        "high": (("row", "column"), value + 0.02),
                    },
                    coords={"row": LAYERS, "column": ROIS},
                ),
                options={"best_in": "column", "x_label": "Region", "y_label": "Layer"},
            ),
            Figure(
                "against-ceiling",
                "distribution",
                "Accuracy against what can be explained",
                "The nearer the filled hump comes to the ceiling, the less is left to explain. A "
                "hump that "
                "goes beyond its ceiling would mean the ceiling is estimated wrongly.",
                xr.Dataset(
                    {"value": ("observation", r, {"long_name": "Pearson r"})},
                    coords={"group": ("observation", roi), "ceiling": ("observation", ceiling)},
                ),
                options={"reference_lines": [{"label": "chance", "value": 0.0}]},
            ),
            Figure(
                "baselines",
                "points",
                "Against the baselines",
                "A model counts only as far as it beats its own architecture with random "
                "weights, and the "
                "V1 model. Intervals that do not overlap differ clearly.",
                xr.Dataset(
                    {
                        "value": (("item", "series"), heights),
                        "low": (
                            ("item", "series"),
                            heights - rng.uniform(0.01, 0.04, heights.shape),
                        ),
                        "high": (
                            ("item", "series"),
                            heights + rng.uniform(0.01, 0.04, heights.shape),
                        ),
                    },
                    coords={"item": models, "series": ["FFA", "VWFA"]},
                ),
                options={
                    "y_label": "Accuracy (Pearson r)",
                    "reference_bands": [{"label": "noise ceiling", "low": 0.68, "high": 0.76}],
                    "reference_lines": [{"label": "chance", "value": 0.0}],
                },
            ),
            Figure(
                "vertex-ceiling",
                "scatter",
                "Every vertex against its ceiling",
                "Points below the line have room left; points above it are noise in the ceiling. "
                "A cloud "
                "parallel to the line is a model that misses the same share everywhere.",
                xr.Dataset(
                    {
                        "x": ("observation", ceiling, {"long_name": "Noise ceiling", "units": "r"}),
                        "y": ("observation", r, {"long_name": "Accuracy", "units": "r"}),
                    },
                    coords={"group": ("observation", roi)},
                ),
                options={"identity_line": True},
            ),
        ],
        methods="Responses were predicted by ridge regression with one penalty per vertex, "
        "chosen by "
        "cross-validation within the training folds. Features were standardised on the training "
        "stimuli.\n\n"
        "Significance came from permutations that refit the model, with the false discovery rate "
        "at 5 % "
        "[@unknown]. Selective regions were compared with a template model [@kay2017].",
        references={"kay2017": KAY},
        exclusions=["Layer classifier: its 1,000 features were kept whole, without projection."],
    )


def representation(rng: np.random.Generator, n: int = 48) -> Section:
    identity = [f"{c}-{i:02d}" for c in CATEGORIES for i in range(n // 4)]
    category = [i.split("-")[0] for i in identity]
    same = np.equal.outer(category, category)
    living = np.isin(category, ["face", "body"])
    near = np.equal.outer(living, living)
    rdms = []
    for strength in (1.0, 0.7, 0.25, 0.05):
        noise = rng.normal(0, 0.18, (n, n))
        m = 1 - strength * (0.35 * same + 0.25 * near) + (noise + noise.T) / 2
        np.fill_diagonal(m, 0)
        rdms.append(np.clip(m, 0, 2))
    names = ["Human IT", "Monkey IT", "MobileNetV2 blocks.4", "Pixels"]
    layers = ["conv_stem", *(f"blocks.{i}" for i in range(7)), "classifier"]
    rho = 0.05 + 0.34 * np.exp(-(((np.arange(9) - 5) / 2.6) ** 2))
    return Section(
        id="rsa",
        title="Representational similarity",
        intro="Which images a brain region treats as alike, and whether a network agrees.",
        order=30,
        facts={"Stimuli": str(n), "Subjects": "4 humans, 2 monkeys", "Measure": "1 − Pearson r"},
        summary=[
            Estimate(
                "Monkey–human IT agreement",
                0.491,
                0.42,
                0.56,
                "r",
                "bootstrap over stimuli",
                "published 0.49",
            )
        ],
        figures=[
            Figure(
                "rdms",
                "rdm",
                "Dissimilarity of every pair of images",
                "Dark blocks along the diagonal are categories whose images are treated as "
                "alike. Look "
                "for the same blocks in the network as in the brain, and for none in the pixels.",
                xr.Dataset(
                    {"rdm": (("rdm_name", "stimulus", "stimulus_2"), np.array(rdms))},
                    coords={
                        "rdm_name": names,
                        "stimulus_id": ("stimulus", identity),
                        "category": ("stimulus", category),
                    },
                ),
                images={
                    s: stimulus(c, i)
                    for i, (s, c) in enumerate(zip(identity, category, strict=True))
                },
            ),
            Figure(
                "agreement",
                "bars",
                "Layers of the network against human IT",
                "Agreement should rise towards the late blocks and stay below the band, which is "
                "where a "
                "perfect model of the group would lie.",
                xr.Dataset(
                    {
                        "value": ("item", rho),
                        "low": ("item", rho - 0.05),
                        "high": ("item", rho + 0.05),
                    },
                    coords={"item": layers},
                ),
                options={
                    "y_label": "Spearman's rho",
                    "reference_bands": [{"label": "noise ceiling", "low": 0.48, "high": 0.61}],
                    "reference_lines": [{"label": "random network", "value": 0.14}],
                },
            ),
            Figure(
                "confusion",
                "matrix",
                "What is taken for what",
                "Rows are what was shown, columns what was decoded. Weight off the diagonal "
                "should fall "
                "between categories that look alike.",
                xr.Dataset(
                    {
                        "value": (
                            ("row", "column"),
                            (c := rng.dirichlet([1.0] * 4, 4) * 0.3 + 0.7 * np.eye(4))
                            / c.sum(1, keepdims=True),
                            {"long_name": "share of trials"},
                        )
                    },
                    coords={"row": CATEGORIES, "column": CATEGORIES},
                ),
                options={"x_label": "Decoded", "y_label": "Shown"},
            ),
            Figure(
                "best-images",
                "image_grid",
                "Images a region responds to most",
                "The strongest responses of each region, held out. They should share the "
                "category the "
                "region is named for.",
                xr.Dataset(
                    {
                        "filename": (
                            "image",
                            [f"{c}-{i:02d}" for c in ("face", "place") for i in range(8)],
                        ),
                        "label": (
                            "image",
                            [f"{c} {i + 1}" for c in ("face", "place") for i in range(8)],
                        ),
                        "value": ("image", np.sort(rng.uniform(0.5, 3, 16))[::-1]),
                        "group": ("image", ["FFA"] * 8 + ["PPA"] * 8),
                    }
                ),
                images={
                    f"{c}-{i:02d}": stimulus(c, i, 192) for c in ("face", "place") for i in range(8)
                },
            ),
        ],
        methods="Dissimilarities were 1 − Pearson r between response patterns "
        "[@kriegeskorte2008; @kay2017].",
        references={"kriegeskorte2008": KHALIGH, "kay2017": KAY},
        problems=["Monkey 2: stimulus 17 has no response; its pairs are missing."],
    )


def hostile() -> Section:
    """Return a section whose every text tries to be something else than text."""
    n = len(HOSTILE)
    values = np.linspace(0.1, 0.9, n)
    grid = np.add.outer(values, values) / 2
    rdm = np.abs(np.subtract.outer(values, values))
    name = HOSTILE[1]
    pictures = {h: stimulus("face", i) for i, h in enumerate(HOSTILE)}

    def figure(kind: str, data: xr.Dataset, **more: Any) -> Figure:
        return Figure(kind, kind, f"{kind} {name}", " | ".join(HOSTILE), data, **more)

    two = np.arange(2)
    return Section(
        id=HOSTILE[0],
        title=name,
        intro="\n\n".join(HOSTILE),
        order=90,
        facts={h: h for h in HOSTILE},
        summary=[Estimate(h, 0.5, 0.4, 0.6, h, h, h) for h in HOSTILE],
        figures=[
            figure(
                "heatmap",
                xr.Dataset(
                    {"value": (("row", "column"), grid)}, {"row": HOSTILE, "column": HOSTILE}
                ),
            ),
            figure(
                "matrix",
                xr.Dataset(
                    {"value": (("row", "column"), grid)}, {"row": HOSTILE, "column": HOSTILE}
                ),
            ),
            figure(
                "points",
                xr.Dataset({"value": ("item", values)}, {"item": HOSTILE}),
                options={"y_label": name, "reference_lines": [{"label": name, "value": 0.3}]},
            ),
            figure(
                "bars",
                xr.Dataset(
                    {"value": (("item", "series"), grid)}, {"item": HOSTILE, "series": HOSTILE}
                ),
            ),
            figure(
                "curve",
                xr.Dataset(
                    {"value": (("x", "series"), grid, {"units": name})},
                    {"x": np.arange(n), "series": HOSTILE},
                ),
            ),
            figure(
                "distribution",
                xr.Dataset(
                    {"value": ("observation", np.tile(values, n))},
                    {"group": ("observation", np.repeat(HOSTILE, n))},
                ),
            ),
            figure(
                "scatter",
                xr.Dataset(
                    {"x": ("observation", values), "y": ("observation", values)},
                    {"label": ("observation", HOSTILE), "group": ("observation", HOSTILE)},
                ),
            ),
            figure(
                "rdm",
                xr.Dataset(
                    {"rdm": (("rdm_name", "stimulus", "stimulus_2"), np.stack([rdm, rdm]))},
                    {
                        "rdm_name": HOSTILE[:2],
                        "stimulus_id": ("stimulus", HOSTILE),
                        "category": ("stimulus", HOSTILE),
                    },
                ),
                images=pictures,
            ),
            figure(
                "image_grid",
                xr.Dataset(
                    {
                        "filename": ("image", HOSTILE),
                        "label": ("image", HOSTILE),
                        "group": ("image", HOSTILE),
                    }
                ),
                images=pictures,
            ),
            figure(
                "table",
                xr.Dataset(
                    {
                        "text": ("row", HOSTILE),
                        "n" + HOSTILE[2]: ("row", HOSTILE),
                        "number": ("row", -values),
                    }
                ),
            ),
            figure(
                "surface",
                xr.Dataset(
                    {
                        "m": (
                            "vertex",
                            two * 1.0,
                            {
                                "long_name": name,
                                "cmap": "categorical",
                                "labels": json.dumps(HOSTILE[:2]),
                            },
                        ),
                        "q": ("vertex", two * 1.0, {"long_name": name, "units": name}),
                    },
                    {
                        "vertex": ("vertex", two),
                        "hemisphere": ("vertex", ["L", "R"]),
                        "roi": ("vertex", HOSTILE[:2]),
                    },
                ),
            ),
        ],
        methods="\n\n".join(HOSTILE) + " [@a]",
        references={
            "a": "@misc{a, title = {<script>document.title='owned'</script>}, doi = "
            '{10.1234/"><script>x</script>}}'
        },
        exclusions=HOSTILE,
        problems=HOSTILE,
    )


def write_fakes(folder: Path, *, with_hostile: bool = False) -> list[Path]:
    """Write the sections and return their folders."""
    rng = np.random.default_rng(0)
    sections = [encoding(rng), quality(rng), representation(rng)] + (
        [hostile()] if with_hostile else []
    )
    return [write_section(s, folder / f"section-{i}") for i, s in enumerate(sections)]


def report_arguments() -> dict[str, object]:
    """Return what the report is told beside its sections."""
    return {
        "title": "How well network features explain visual cortex",
        "question": "Which layers of a network trained on images explain the responses of which "
        "regions, "
        "and how much of what can be explained is left?",
        "facts": {
            "Data": "A simulated subject on fsaverage5 and the 92 images of Kriegeskorte et al. "
            "(2008)",
            "Models": "MobileNetV2, a small CLIP; V1 energy model, pixels and random weights "
            "beside them",
            "Method": "Ridge regression with nested layer choice; representational similarity",
        },
        "config": {
            "seed": 0,
            "models": ["timm:mobilenetv2_100", "small-clip"],
            "folds": 5,
            "title": HOSTILE[0],
        },
        "left_out": [
            {
                "name": "Kay & Yeatman 2017",
                "reason": "No mirror or network gave its files; set BRAINALIGN_MIRROR.",
            }
        ],
        "provenance": {
            "created": "2026-01-01T00:00:00+00:00",
            "software": "brainalign 0.1.0; Python 3.11.7; numpy 2.4.6",
            "hardware": "x86_64, 2 cores, Linux",
            "seed": "0",
            "config_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "inputs": json.dumps({"section-0": "ab" * 32, "section-1": "cd" * 32}),
            "commands": ["brainalign demo --cores 2"],
        },
    }
