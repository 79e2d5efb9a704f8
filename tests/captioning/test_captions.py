"""BrainSCUBA of a simulated subject: what was planted comes out as words, and nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from PIL import Image

from brainalign.captioning import (
    PERSON_WORDS,
    build_library,
    caption_best_images,
    caption_encoder,
    caption_result,
    caption_voxels,
    captions_section,
    cluster_words,
    embedding_weights,
    load_captioner,
    predict_texts,
    preferred_category,
    project,
    region_nouns,
    region_prompts,
    section_from_captions,
    voxel_table,
    word_share,
)
from brainalign.data.schema import validate
from brainalign.data.section import read_section, write_section
from brainalign.data.simulate import simulate
from brainalign.data.stimuli import write_stimuli
from brainalign.data.store import read, write
from brainalign.encoding import encode, fit_encoder, predict, roi_members, write_result
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.features import load_model
from brainalign.small_models.scenes import SUBCATEGORIES, render_scenes

N, N_FIT, N_DRAWS = 480, 360, 2
SWEET = ("cake", "donut", "ice cream")
FRUIT = ("apple", "banana", "strawberry")
ROIS = {
    "FFA": SUBCATEGORIES["people"], "EBA": SUBCATEGORIES["bodies"],
    "PPA": SUBCATEGORIES["places"], "VWFA": SUBCATEGORIES["words"],
    "FRUIT": FRUIT, "SWEET": SWEET,
}  # fmt: skip
CATEGORY = {"FFA": "people", "EBA": "bodies", "PPA": "places", "VWFA": "words"}
EACH, N_NULL = 16, 40


def tag(captions):
    """Whatever is a sub-category's word; the scenes' captions have few others."""
    known = {w for kinds in SUBCATEGORIES.values() for k in kinds for w in k.split()}
    known -= {"of", "old", "headless"}
    return [
        [w for w in c.replace(".", "").replace(",", "").split() if w in known] for c in captions
    ]


@pytest.fixture(scope="module")
def clip():
    return load_model("small-clip", device="cpu")


@pytest.fixture(scope="module")
def subject(clip):
    """Responses to half of the scenes, driven by unit-norm embeddings; embeddings of all."""
    scenes = render_scenes(N, seed=20_000, size=64)
    with torch.no_grad():
        x = torch.cat([
            clip.encode_image(
                torch.stack([clip.transform(Image.fromarray(s.image)) for s in scenes[i : i + 60]])
            )
            for i in range(0, N, 60)
        ]).numpy()  # fmt: skip
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    roi = [r for r in ROIS for _ in range(EACH)] + ["NULL"] * N_NULL
    n = len(roi)
    null = np.array([r == "NULL" for r in roi])
    neuroids = xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i:03d}" for i in range(n)]),
            "roi": ("neuroid", roi), "hemisphere": ("neuroid", ["L", "R"] * (n // 2)),
            "vertex": ("neuroid", np.arange(n)),
            **{c: ("neuroid", np.arange(n, dtype=float)) for c in "xyz"},
        }
    )  # fmt: skip
    made = simulate(
        unit[:N_FIT], category=[s.subcategory for s in scenes[:N_FIT]],
        stimulus_id=[s.stimulus_id for s in scenes[:N_FIT]], neuroids=neuroids,
        preference={r: list(k) for r, k in ROIS.items()}, null=null, ncsnr=(0.6, 1.2), seed=1,
    )  # fmt: skip
    return scenes, x, unit, made


def features_of(values, scenes, clip):
    return xr.Dataset(
        {"features": (("stimulus", "feature"), values)},
        coords={
            "stimulus_id": ("stimulus", [s.stimulus_id for s in scenes]),
            "model": clip.name, "layer": "output",
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder(subject, clip):
    scenes, _, unit, made = subject
    features = features_of(unit[:N_FIT], scenes[:N_FIT], clip)
    return fit_encoder(features, made.responses, alphas=np.logspace(0, 6, 13), device="cpu")


@pytest.fixture(scope="module")
def captioner():
    return load_captioner("small-captioner", device="cpu")


@pytest.fixture(scope="module")
def captions(subject, encoder, captioner, clip):
    return caption_encoder(
        encoder, subject[1], captioner, model=clip, n_draws=N_DRAWS, device="cpu"
    )


def test_captions_name_what_selective_voxels_prefer(captions, encoder):
    members = roi_members(captions)
    found = preferred_category(captions, members)
    named = found["voxel_category"].values
    roi = captions["roi"].values
    meant = np.array([CATEGORY.get(r, "food") for r in roi])
    selective = roi != "NULL"
    share = (named == meant)[selective].mean()
    assert share >= 0.85
    preferred = dict(
        zip(found["roi"].values.tolist(), found["preferred"].values.tolist(), strict=True)
    )
    assert {r: preferred[r] for r in CATEGORY} == CATEGORY
    assert preferred["NULL"] == ""


def test_parts_of_a_region_split_and_their_words_differ_as_planted(captions, encoder):
    roi = captions["roi"].values
    both = np.flatnonzero(np.isin(roi, ["FRUIT", "SWEET"]))
    found = cluster_words(embedding_weights(encoder), captions, both, n_clusters=2, tagger=tag)
    sweet = np.array([roi[i] == "SWEET" for i in both])
    agree = (found["cluster"].values == sweet).mean()
    assert max(agree, 1 - agree) >= 0.9
    of_sweet = int(np.bincount(found["cluster"].values[sweet]).argmax())
    names = found["noun"].values.tolist()
    for words, cluster in ((("cake", "donut", "cream"), of_sweet), (FRUIT, 1 - of_sweet)):
        excess = found["excess"].sel(cluster_number=cluster)
        assert sum(float(excess.sel(noun=w)) for w in words if w in names) > 0.3


def test_faithful_captions_are_told_from_those_of_other_voxels(captions, encoder, clip):
    selective = captions["roi"].values != "NULL"
    assert captions["percentile"].values[selective].mean() > 0.75
    # The prediction is the encoder's for the text's embedding, of unit norm as its features.
    texts = captions["caption"].values[:3, 0].tolist()
    with torch.no_grad():
        t = torch.nn.functional.normalize(clip.encode_text(texts), dim=-1).double().numpy()
    z = (t - encoder["feature_mean"].values) / encoder["feature_scale"].values
    expected = z @ encoder["weights"].values.T + encoder["intercept"].values
    assert np.allclose(predict_texts(encoder, texts, clip), expected, atol=1e-4)
    assert np.allclose(captions["prediction"].values[:3, 0], np.diag(expected[:, :3]), atol=1e-4)


class Fixed:
    """A captioner whose words are given."""

    def __init__(self, n_features, words, clip=None):
        self.n_features, self.words, self.clip = n_features, words, clip

    def caption(self, embeddings, **_):
        return [self.words[i % len(self.words)] for i in range(len(embeddings))]


def test_percentiles_rank_among_other_voxels(encoder, clip):
    some = encoder.isel(neuroid=[0, EACH * 2, EACH * 3])
    said = ["a man", "a beach", "the word apple"]
    made = caption_voxels(some, np.ones((1, 3, 128)), Fixed(128, said), model=clip)
    y = predict_texts(some, said, clip)
    for v in range(3):
        others = [y[j, v] for j in range(3) if j != v]
        assert made["percentile"].values[v, 0] == pytest.approx(
            np.mean([o < y[v, v] for o in others])
        )
    # One caption for all: nothing is told apart, so every rank is one half.
    same = caption_voxels(some, np.ones((2, 3, 128)), Fixed(128, ["a man"]), model=clip)
    assert np.allclose(same["percentile"], 0.5)
    with pytest.raises(SchemaError, match="draw, neuroid, feature"):
        caption_voxels(some, np.ones((3, 128)), Fixed(128, said), model=clip)
    with pytest.raises(SchemaError, match="captioner takes 64"):
        caption_encoder(some, np.ones((5, 128)), Fixed(64, said), model=clip)


def test_a_captioner_or_library_of_another_model_is_refused_before_any_work(
    subject, encoder, captioner, clip, tmp_path
):
    """Two models have as many features: nothing but their names tells their spaces apart."""
    assert captioner.clip == clip.name == "small-clip"
    some = encoder.isel(neuroid=[0, 1])
    other = some.assign_coords(model="small-judge")

    class Idle(Fixed):
        def caption(self, embeddings, **_):
            raise AssertionError("It was asked for captions.")

    reads = Idle(128, [], clip="small-clip")
    nothing = np.full((5, 128), np.nan)  # whatever is made of it is refused
    words = "reads embeddings of 'small-clip'; the encoder was fitted to those of 'small-judge'"
    with pytest.raises(SchemaError, match=words):
        caption_encoder(other, nothing, reads)
    with pytest.raises(SchemaError, match=words):
        caption_encoder(other, nothing, "small-captioner", device="cpu")
    with pytest.raises(SchemaError, match=words):
        caption_voxels(other, np.ones((1, 2, 128)), reads)
    library = features_of(subject[1][:5], subject[0][:5], clip).assign_coords(model="small-judge")
    write(library, tmp_path / "library.zarr", "features")
    words = "fitted to layer 'output' of 'small-clip'; the library has .* of 'small-judge'"
    for given in (library, tmp_path / "library.zarr", [nothing, library]):
        with pytest.raises(SchemaError, match=words):
            caption_encoder(some, given, reads)
    with pytest.raises(SchemaError, match="the set of images has embeddings .* 'small-judge'"):
        caption_best_images(some, library, reads, responses=xr.DataArray())


def test_the_baseline_captions_the_images_of_the_largest_response(subject, encoder, clip):
    scenes, _, unit, _ = subject
    held_out = features_of(unit[N_FIT:], scenes[N_FIT:], clip)
    by_number = {s.stimulus_id: i for i, s in enumerate(scenes)}

    class Told(Fixed):
        def caption(self, embeddings, **_):
            near = np.argmax(np.asarray(embeddings) @ unit.T, axis=1)
            return [scenes[i].caption for i in near]

    baseline = caption_best_images(encoder, held_out, Told(128, []), n_images=2, model=clip)
    y = predict(encoder, held_out)
    ids = y["stimulus_id"].values.astype(str)
    for v in (0, 40, 100):
        order = np.argsort(-y.values[:, v])[:2]
        assert baseline["source_id"].values[v].tolist() == ids[order].tolist()
        assert baseline["caption"].values[v, 0] == scenes[by_number[ids[order[0]]]].caption
    measured = y.copy(data=-y.values)
    other = caption_best_images(encoder, held_out, Told(128, []), responses=measured, model=clip)
    assert other["source_id"].values[0, 0] == ids[np.argmin(y.values[:, 0])]


def test_captions_are_an_artefact_and_a_table(captions, tmp_path):
    validate(captions, "captions")
    write(captions, tmp_path / "captions.zarr", "captions")
    back = read(tmp_path / "captions.zarr", "captions")
    assert np.array_equal(back["caption"].values, captions["caption"].values)
    assert str(back["captioner"].values) == "ClipCap"
    table = voxel_table(back, tagger=tag)
    assert list(table) == [
        "neuroid", "ROI", "hemisphere", "caption", "nouns", "predicted", "percentile"
    ]  # fmt: skip
    assert isinstance(table["caption"].dtype, pd.CategoricalDtype)
    best = captions["percentile"].values.max(axis=1)
    assert np.allclose(table["percentile"], best)
    with pytest.raises(SchemaError, match="neuroid_id"):
        validate(captions.drop_vars("neuroid_id"), "captions")


def test_a_section_shows_words_maps_clusters_and_voxels(captions, encoder, subject, tmp_path):
    on_mesh = captions.assign_attrs(space="fsaverage5", subject="sim")
    truth, sweets = subject[3].truth, ["cake", "donut", "cream"]
    categories = {**CATEGORY, "FRUIT": "food", "SWEET": "food", "NULL": ""}
    planted = truth.assign(preference=("neuroid", [categories[r] for r in truth["roi"].values]))
    section = captions_section(
        {"sim": on_mesh}, baselines={"sim": on_mesh}, truth={"sim": planted},
        weights={"sim": embedding_weights(encoder)}, tagger=tag, word_maps={"sweets": sweets},
        layout="tsne",
    )  # fmt: skip
    kinds = {f.id: f.kind for f in read_section(write_section(section, tmp_path / "s")).figures}
    assert kinds == {
        "words": "heatmap", "categories": "heatmap", "share-person": "points",
        "share-sweets": "points", "word-map-sim": "surface", "clusters": "table",
        "weights": "scatter", "faithfulness": "distribution", "baseline": "table",
        "voxels-sim": "table",
    }  # fmt: skip
    shown = {f.id: f.data for f in section.figures}
    for name, words, highest in (("person", PERSON_WORDS, "FFA"), ("sweets", sweets, "SWEET")):
        own = word_share(captions, words, tag)
        drawn = shown[f"share-{name}"].sel(series="sim")
        assert drawn["item"].values[drawn["value"].values.argmax()] == highest
        for roi in ROIS:
            point = drawn.sel(item=roi)
            assert point["value"] == pytest.approx(100 * own[captions["roi"].values == roi].mean())
            assert point["low"] <= point["value"] <= point["high"]
        on_map = shown["word-map-sim"][f"share_{name}"].values
        np.testing.assert_allclose(on_map[np.isfinite(on_map)].sum(), own.sum(), rtol=1e-5)
    assert shown["weights"]["x"].attrs["long_name"] == "first axis of t-SNE"
    estimates = {e.label: e.value for e in section.summary}
    assert estimates["Selective voxels whose planted category is named"] >= 85
    assert any("NULL" in f.caption for f in section.figures if f.id == "categories")

    # Voxels of a volume lie where a table of vertices says; one of another region is not captioned.
    ids = captions["neuroid_id"].values.astype(str)
    vertices = np.full(20484, "", dtype=ids.dtype)
    vertices[[3, 10_250, 7]] = ids[5], ids[0], "0-0-0"
    placed = xr.Dataset({"neuroid_id": ("vertex", vertices)})
    volume = captions.drop_vars("vertex", errors="ignore")
    section = captions_section({"sim": volume}, surfaces={"sim": placed}, tagger=tag)
    [figure] = [f for f in section.figures if f.kind == "surface"]
    shown = figure.data["percentile"].values
    assert np.flatnonzero(np.isfinite(shown)).tolist() == [3, 10_250]
    expected = captions["percentile"].mean("draw").values[[5, 0]]
    np.testing.assert_allclose(shown[[3, 10_250]], expected, rtol=1e-6)


def test_regions_are_chosen_for_the_report_and_maps_and_tables_hold_every_voxel(captions, encoder):
    on_mesh = captions.assign_attrs(space="fsaverage5", subject="sim")
    weights = embedding_weights(encoder)
    apart = np.flatnonzero(captions["roi"].values == "NULL")
    section = captions_section(
        {"sim": on_mesh, "other": captions.isel(neuroid=apart)}, rois=["PPA", "MT", "FFA"],
        baselines={"sim": on_mesh}, weights={"sim": weights, "other": weights[apart]}, tagger=tag,
    )  # fmt: skip
    shown = {f.id: f.data for f in section.figures}
    assert shown["words"]["row"].values.tolist() == ["PPA", "FFA"]
    assert shown["categories"]["row"].values.tolist() == ["PPA", "FFA"]
    assert set(shown["clusters"]["region"].values.tolist()) == {"PPA", "FFA"}
    assert set(shown["weights"]["group"].values.tolist()) == {"PPA", "FFA"}
    assert section.exclusions == ["No captioned voxel lies in MT."]
    assert shown["voxels-sim"].sizes["row"] == captions.sizes["neuroid"]
    assert shown["voxels-other"].sizes["row"] == N_NULL
    on_map = shown["word-map-sim"]["percentile"].values
    assert np.isfinite(on_map).sum() == captions.sizes["neuroid"]
    none = captions_section({"sim": on_mesh}, rois=["MT"], weights={"sim": weights}, tagger=tag)
    assert {f.id for f in none.figures} == {
        "word-map-sim", "weights", "faithfulness", "voxels-sim"
    }  # fmt: skip
    assert np.isfinite(none.figures[0].data["percentile"].values).sum() == len(captions["neuroid"])


def test_every_subject_that_has_a_surface_is_mapped(captions):
    few = captions.isel(neuroid=slice(12))
    on_mesh = few.assign_attrs(space="fsaverage5")
    subjects = {"volume": few.drop_vars("vertex"), **{f"sim{i}": on_mesh for i in range(5)}}
    section = captions_section(subjects, tagger=tag)
    assert [f.id for f in section.figures if f.kind == "surface"] == [
        f"word-map-sim{i}" for i in range(5)
    ]


def test_a_library_of_images_is_built_in_a_store(subject, clip, tmp_path):
    scenes, x, _, _ = subject
    stimuli = write_stimuli(
        tmp_path / "images", [s.image for s in scenes[:8]], [s.stimulus_id for s in scenes[:8]]
    )
    library = build_library(clip, stimuli, tmp_path / "store", device="cpu")
    assert np.allclose(library["features"].values, x[:8], atol=1e-4)
    w = np.random.default_rng(0).standard_normal((3, 128))
    assert np.allclose(
        project(w, library, n_draws=1, device="cpu"), project(w, x[:8], n_draws=1, device="cpu"),
        atol=1e-4,
    )  # fmt: skip


def test_results_on_disk_are_captioned_and_described(subject, clip, tmp_path):
    scenes, x, unit, made = subject
    roi = made.responses["roi"].values.astype(str)
    some = np.flatnonzero(np.isin(roi, ["PPA", "NULL"]))
    features = features_of(unit[:N_FIT], scenes[:N_FIT], clip)
    result = encode(
        {"output": features}, made.responses.isel(neuroid=some), alphas=np.logspace(1, 5, 5),
        splits=3, inner_cv="gcv", n_permutations=200, n_bootstrap=100, device="cpu", seed=0,
    )  # fmt: skip
    write_result(result, tmp_path / "encoded")
    np.save(tmp_path / "library.npy", x)
    held_out = features_of(unit[N_FIT:], scenes[N_FIT:], clip)
    write(held_out, tmp_path / "held_out.zarr", "features")
    out = caption_result(
        tmp_path / "encoded", tmp_path / "library.npy", tmp_path / "sim.zarr", n_draws=1,
        held_out=tmp_path / "held_out.zarr", model="small-clip", beams=2, max_tokens=12,
        device="cpu",
    )  # fmt: skip
    captions = read(out, "captions")
    assert str(captions["captioner"].values) == "small-captioner"
    # Hardly a voxel without signal is predicted, so hardly one is captioned.
    assert (captions["roi"].values == "PPA").sum() == EACH
    assert (captions["roi"].values == "NULL").sum() <= 3
    named = region_nouns(out, "PPA", top=3, tagger=tag)
    # Nouns are in the singular.
    known = {w.removesuffix("s") for k in ROIS["PPA"] for w in k.split()}
    assert len(named) <= 3 and next(iter(named)).removesuffix("s") in known
    assert list(named.values()) == sorted(named.values(), reverse=True) and max(named.values()) <= 1
    assert region_nouns(out, "MT", tagger=tag) == {}
    ids = captions["neuroid_id"].values[captions["roi"].values == "PPA"].tolist()
    assert region_nouns(out, [*ids, "not captioned"], top=3, tagger=tag) == named
    assert region_nouns(out, ["not captioned"], tagger=tag) == {}
    prompts = region_prompts(out, ids, top=3, tagger=tag)
    assert [p.split()[-1] for p in prompts] == list(named)
    assert all(p.startswith("A photo of ") for p in prompts)
    assert region_prompts(out, ["not captioned"], tagger=tag) == []
    section = section_from_captions([out], [tmp_path / "encoded"], tagger=tag)
    ids = [f.id for f in section.figures]
    assert "baseline" in ids and "clusters" in ids
    table = next(f for f in section.figures if f.kind == "table" and f.id.startswith("voxels"))
    assert "r" in table.data and table.data.sizes["row"] == captions.sizes["neuroid"]
    checked = caption_result(
        tmp_path / "encoded", tmp_path / "library.npy", tmp_path / "checked.zarr", n_draws=1,
        rois=["PPA"], check_with=tmp_path / "encoded", beams=1, max_tokens=2, device="cpu",
    )  # fmt: skip
    checked = read(checked, "captions")
    assert (
        checked.attrs["checked_with"] == "small-clip" and np.isfinite(checked["prediction"]).all()
    )
    with pytest.raises(FileExistsError):
        caption_result(tmp_path / "encoded", tmp_path / "library.npy", out)
    with pytest.raises(UnknownNameError, match="no encoder of layer 'blocks'"):
        caption_result(tmp_path / "encoded", x, tmp_path / "b.zarr", layer="blocks")
    with pytest.raises(ConfigError, match=r"has q < 0.*smallest q of all is [\d.e-]+\."):
        caption_result(tmp_path / "encoded", x, tmp_path / "b.zarr", q=0.0)
