"""Judging: labels, intervals, preferences, diversity, and the section that shows them."""

import itertools
import json

import numpy as np
import pytest
import tiny_pipeline as tiny
import torch
from scipy import stats

from brainalign.data.section import read_section, write_section
from brainalign.data.stimuli import StimulusSet, write_stimuli
from brainalign.data.store import read, write
from brainalign.encoding import spherical_kmeans
from brainalign.errors import ConfigError, SchemaError
from brainalign.features import load_model
from brainalign.synthesis import ascend_pixels, judge, predict_target, read_kept
from brainalign.synthesis.judging import (
    ALL_NATURAL,
    compare_with_natural,
    label,
    label_images,
    mean_cosine_distance,
    mean_pixel_distance,
    preferred_label,
    rise_over_neuroids,
)
from brainalign.synthesis.objective import Target
from brainalign.synthesis.sections import Panel, dive_section, section_from_folders

LABELS = np.array(["face", "place", "word", "body", "food"])


def test_the_sets_are_compared_as_counted_by_hand():
    rng = np.random.default_rng(0)
    natural = rng.standard_normal(1000)
    kinds = LABELS[rng.integers(5, size=1000)]
    kinds[np.argsort(-natural)[:100]] = "place"
    ds = compare_with_natural(
        {ALL_NATURAL: natural, "generated": np.full(20, 9.0), "flat": np.full(20, natural.mean())},
        {ALL_NATURAL: kinds, "generated": np.repeat(["place", "food"], [18, 2]),
         "flat": np.repeat("face", 20)},
        seed=1,
    )  # fmt: skip
    assert ds["set"].values.tolist() == [
        ALL_NATURAL, "top 200 natural", "top 100 natural", "generated", "flat"
    ]  # fmt: skip
    share = ds["share"].to_pandas()
    assert share.loc["top 100 natural", "place"] == 1 and share.loc["generated", "place"] == 0.9
    assert ds["above"].values == pytest.approx([0.01, 0.05, 0.1, 1, 0])
    assert ds["activation"].sel(set="generated") == 9
    assert ds.attrs["top_1_percent"] == pytest.approx(np.quantile(natural, 0.99))
    low, high = (float(ds[f"activation_{k}"].sel(set=ALL_NATURAL)) for k in ("low", "high"))
    # Half of a 95 % interval of a mean.
    assert (high - low) / 2 == pytest.approx(1.96 * natural.std() / np.sqrt(1000), rel=0.1)
    preferred = dict(zip(ds["set"].values.tolist(), ds["preferred"].values.tolist(), strict=True))
    # A set of one label whose activation the judge does not confirm prefers nothing.
    assert preferred == {
        ALL_NATURAL: "", "top 200 natural": "place", "top 100 natural": "place",
        "generated": "place", "flat": "",
    }  # fmt: skip


def test_no_label_is_preferred_in_images_like_the_natural_ones():
    rng = np.random.default_rng(2)
    natural = LABELS[rng.integers(5, size=2000)]
    false = [preferred_label(LABELS[rng.integers(5, size=20)], natural)[0] for _ in range(400)]
    assert np.mean([f != "" for f in false]) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    label, p = preferred_label(np.repeat(["food", "face"], [14, 6]), natural)
    assert label == "food" and p < 1e-4
    with pytest.raises(SchemaError, match="all natural"):
        compare_with_natural({"x": np.ones(3)}, {"x": LABELS[:3]})
    with pytest.raises(SchemaError, match="finite"):
        compare_with_natural({ALL_NATURAL: np.ones(2) * np.nan}, {ALL_NATURAL: LABELS[:2]})


def test_a_rise_is_tested_over_neuroids():
    rng = np.random.default_rng(4)
    rise = rng.normal(0.3, 1, 20), rng.normal(-0.1, 2, 12)
    weights = np.repeat([1 / 20, -1 / 12], [20, 12])
    found = rise_over_neuroids(np.concatenate(rise) * weights, weights)
    expected = stats.ttest_ind(*rise, equal_var=False, alternative="greater").pvalue
    assert found == pytest.approx(expected)
    single = rise_over_neuroids(rise[0] / 20, weights[:20])
    assert single == pytest.approx(stats.ttest_1samp(rise[0], 0, alternative="greater").pvalue)
    assert np.isnan(rise_over_neuroids(np.ones(2), np.ones(2)))
    # Encoders of noise rise or fall together with what all generated images share, by luck.
    false = [
        rise_over_neuroids(rng.standard_normal(30) / 30, np.full(30, 1 / 30)) < 0.05
        for _ in range(2000)
    ]
    assert np.mean(false) == pytest.approx(0.05, abs=0.015)


def test_a_label_is_not_preferred_where_neuroids_do_not_agree():
    natural, kinds = np.random.default_rng(1).standard_normal(500), np.resize(LABELS, 500)
    sets = {ALL_NATURAL: natural, "generated": np.full(20, 2.0)}
    named = {ALL_NATURAL: kinds, "generated": np.repeat("food", 20)}
    for p, wanted in ((0.2, ""), (1e-6, "food"), (np.nan, "food")):
        ds = compare_with_natural(sets, named, rises={"generated": p}).sel(set="generated")
        assert ds["preferred"] == wanted
        np.testing.assert_equal(float(ds["rise_p"]), p)


def test_diversities_are_means_over_pairs(stimuli):
    x = np.random.default_rng(0).standard_normal((9, 5))
    pairs = [
        1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        for i, j in itertools.combinations(range(9), 2)
    ]
    assert mean_cosine_distance(x) == pytest.approx(np.mean(pairs))
    few = stimuli.select(stimuli.ids[:4])
    small = [np.asarray(few.open(i).resize((32, 32), 4), dtype=float) / 255 for i in range(4)]
    pairs = [((small[i] - small[j]) ** 2).mean() for i, j in itertools.combinations(range(4), 2)]
    assert mean_pixel_distance(few) == pytest.approx(np.sqrt(np.mean(pairs)))
    assert np.isnan(mean_pixel_distance(stimuli.select(stimuli.ids[:1])))


class Colour(torch.nn.Module):
    """A classifier by the strongest colour."""

    def forward(self, images):
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def colours():
    return load_model(Colour(), image_size=64, mean=[0, 0, 0], std=[1, 1, 1], device="cpu")


def test_a_classifier_and_a_model_of_texts_label_images(tmp_path, colours, model):
    images = [np.eye(3, dtype=np.uint8)[c] * np.full((64, 64, 1), 200, np.uint8) for c in (2, 0)]
    pure = write_stimuli(tmp_path / "x", images, ["a", "b"])
    assert label_images(colours, pure, ["red", "green", "blue"]).tolist() == ["blue", "red"]
    with pytest.raises(ConfigError, match="2 labels"):
        label_images(colours, pure, ["red", "green"])
    with pytest.raises(ConfigError, match="in their order"):
        label_images(colours, pure, {"red": ["red"], "green": ["green"], "blue": ["blue"]})
    found = label_images(model, pure, {"face": ["a face"], "place": ["a house"]})
    assert set(found.tolist()) <= {"face", "place"}


def test_from_encoders_to_the_section(tmp_path, encoder, model, stimuli, colours):
    write(encoder, tmp_path / "one.zarr", "encoder")
    write(tiny.encoder(model, stimuli, seed=5), tmp_path / "two.zarr", "encoder")
    ascend_pixels(tmp_path / "one.zarr", out=tmp_path / "made", size=64, roi="A", n_images=4,
                  keep=0.5, steps=3, device="cpu", rerank=tmp_path / "two.zarr")  # fmt: skip
    options = {
        "encoder": tmp_path / "two.zarr", "labels": ["red", "green", "blue"], "roi": "A",
        "top": (5, 10), "n_bootstrap": 50, "device": "cpu",
    }  # fmt: skip
    made = {"pixel ascent": tmp_path / "made"}
    judged = judge(
        made, stimuli.folder, labeller=colours, out=tmp_path / "judged.nc", **options
    )  # fmt: skip
    once = label(stimuli.folder, colours, options["labels"], out=tmp_path / "n.nc", device="cpu")
    assert once["predicted"].values.tolist() == label_images(
        colours, stimuli, options["labels"], device="cpu"
    ).tolist()  # fmt: skip
    options |= {"natural_labels": tmp_path / "n.nc"}
    again = judge(made, stimuli.folder, labeller=colours, out=tmp_path / "again.nc", **options)
    assert again.identical(judged)
    with pytest.raises(SchemaError, match="labeller"):
        judge(made, stimuli.folder, labeller=model, out=tmp_path / "no.nc", **options)
    assert judged["n"].values.tolist() == [24, 10, 5, 2]
    on_disk = read(tmp_path / "judged.nc")
    assert np.allclose(on_disk["activation"], judged["activation"])
    assert np.allclose(on_disk["share"].sum("label"), 1)
    best = on_disk["natural_activation"].values
    assert float(on_disk["activation"].sel(set="top 5 natural")) == pytest.approx(
        np.sort(best)[-5:].mean()
    )
    section = section_from_folders(
        {"sub-01, A": tmp_path / "judged.nc"},
        {"sub-01, A": {"pixel ascent": tmp_path / "made"}},
        natural=stimuli.folder,
        expected={"sub-01, A": "red"},
    )
    write_section(section, tmp_path / "section")
    back = read_section(tmp_path / "section")
    assert [f.kind for f in back.figures] == ["image_grid", "points", "bars", "table"]
    grid = back.figures[0]
    assert len(grid.images) == 8 + 2 and all(p.is_file() for p in grid.images.values())
    assert grid.data["value"].values[:8].tolist() == pytest.approx(sorted(best)[::-1][:8])
    assert {e.label for e in back.summary} == {
        "sub-01, A, pixel ascent: above the best 1 % of natural images",
        "sub-01, A, pixel ascent: labelled red",
    }
    sets = back.figures[-1].data
    assert sets["images"].values.tolist() == judged["set"].values.tolist()
    assert sets["label"].values.tolist() == ["red"] * 4
    told = sets["so labelled (%)"].values
    assert np.allclose(told, 100 * judged["share"].sel(label="red"), equal_nan=True)
    above = sets["in best 1 % (%)"].values
    assert np.allclose(above, 100 * judged["above"])

    # The summary tells of what an encoder guided, wherever it stands among the sets.
    sets = {"from words": tmp_path / "made", "guided": tmp_path / "made"}
    both = judge(sets, stimuli.folder, labeller=colours, out=tmp_path / "both.nc", **options)

    def sampled(scale, **more):
        kept = read_kept(tmp_path / "made")
        guidance = {"scale": scale, "schedule": "constant", "sag_scale": 0.0, **more}
        config = {
            **json.loads(kept.index.attrs["config"]), "guidance": guidance, "scheduler": "ddim",
            "prompts": [""], "text_scale": 7.5,
        }  # fmt: skip
        return StimulusSet(kept.index.assign_attrs(config=json.dumps(config)), kept.folder)

    panel = Panel("A", both, {"from words": sampled(0.0), "guided": sampled(9.0)})
    section = dive_section([panel], stimuli, expected={"A": "red"})
    assert [e.label.partition(":")[0] for e in section.summary] == ["A, guided"] * 2
    assert "guidance scale 9" in section.methods and "copies" not in section.methods
    jitter = {"copies": 8, "shift": 0.0625, "zoom": 0.25, "noise": 0.05}
    panel = Panel("A", both, {"guided": sampled(9.0, jitter=jitter)})
    told = dive_section([panel], stimuli, expected={"A": "red"}).methods
    assert "mean over 8 copies" in told and "up to 6.25 %" in told and "[@olah2017]" in told


def test_a_cluster_is_judged_on_the_neuroids_that_it_was_made_for(
    tmp_path, model, stimuli, colours
):
    # Directions at random have many divisions that are nearly as good: a search finds one by luck.
    many = tiny.encoder(model, stimuli, n=150)
    inside = many["roi"].values == "A"
    w = many["weights"].values[inside] / many["feature_scale"].values
    assert (spherical_kmeans(w, 4, seed=3)[0] != spherical_kmeans(w, 4)[0]).any()
    write(many, tmp_path / "many.zarr", "encoder")
    options = {"roi": "A", "cluster": 1, "n_clusters": 4}
    made = ascend_pixels(
        tmp_path / "many.zarr", out=tmp_path / "made", size=64, n_images=2, keep=1, steps=1,
        seed=3, device="cpu", **options,
    )  # fmt: skip
    judged = judge(
        {"pixel ascent": tmp_path / "made"}, stimuli.folder, encoder=tmp_path / "many.zarr",
        guiding=tmp_path / "many.zarr", labeller=colours, labels=["red", "green", "blue"],
        out=tmp_path / "judged.nc", top=(5,), n_bootstrap=10, seed=3, device="cpu", **options,
    )  # fmt: skip
    assert np.allclose(
        sorted(judged["image_activation"].values), sorted(made.index["predicted_guiding"].values)
    )
    (cluster,) = Target("A", cluster=1, n_clusters=4).weights([many])
    expected = many["neuroid_id"].values[cluster > 0].tolist()
    assert read(tmp_path / "judged.nc")["neuroid_id"].values.tolist() == expected


def test_several_encoders_judge_together(tmp_path, model, stimuli, encoder, colours):
    second = tiny.encoder(model, stimuli, seed=5)
    other = second.assign_attrs(subject="sub-02")
    for name, ds in {"one": encoder, "two": second, "other": other}.items():
        write(ds, tmp_path / f"{name}.zarr", "encoder")
    ascend_pixels(tmp_path / "one.zarr", out=tmp_path / "made", size=64, n_images=2, keep=1,
                  steps=0, roi="A", device="cpu")  # fmt: skip

    def judged(*names, **target):
        return judge(
            {"pixel ascent": tmp_path / "made"}, stimuli.folder, device="cpu", labeller=colours,
            encoder=[tmp_path / f"{n}.zarr" for n in names], labels=["red", "green", "blue"],
            out=tmp_path / "judged.nc", top=(5,), n_bootstrap=10, overwrite=True,
            **{"roi": "A", **target},
        )  # fmt: skip

    one, two, both = judged("one"), judged("two"), judged("one", "two")
    for value in ("natural_activation", "image_activation"):
        assert np.allclose(both[value], (one[value] + two[value]) / 2, atol=1e-6)
    # A neuroid that two encoders predict is one neuroid, those of two subjects are two.
    ids = encoder["neuroid_id"].values[encoder["roi"].values == "A"].tolist()
    assert both["neuroid_id"].values.tolist() == ids
    subjects = judged("one", "other")
    assert subjects["neuroid_id"].values.tolist() == 2 * ids
    assert subjects["subject"].values.tolist() == [encoder.attrs["subject"]] * len(ids) + [
        "sub-02"
    ] * len(ids)
    # The test over neuroids has each of them once.
    for found, of in ((both, [encoder, second]), (subjects, [encoder, other])):
        weights = Target("A").weights(of)
        shown = [read_kept(tmp_path / "made"), stimuli]
        rises = np.array([
            np.subtract(*[predict_target(e, [w], s, device="cpu")[1] for s in shown])
            for e, w in zip(of, weights, strict=True)
        ])  # fmt: skip
        used = np.array([w[w != 0] for w in weights])
        if found is both:
            rises, used = rises.sum(0), used.sum(0)
        expected = rise_over_neuroids(rises.ravel(), used.ravel())
        assert float(found["rise_p"].sel(set="pixel ascent")) == pytest.approx(expected, rel=1e-5)
    guides = [tmp_path / "one.zarr", tmp_path / "other.zarr"]
    split = {"cluster": 0, "n_clusters": 2}
    found = judged("one", "other", guiding=guides, **split)
    expected = Target("A", **split).weights([encoder, other])
    assert len(found["neuroid_id"]) == sum(int((w > 0).sum()) for w in expected)
    # Two encoders of one subject have the same neuroids in a cluster.
    weights = Target("A", **split).weights([encoder, second])
    assert np.array_equal(weights[0], weights[1]) and 0 < (weights[0] > 0).sum() < len(ids)
    with pytest.raises(SchemaError, match="not in both"):
        judged("one", guiding=guides, **split)


def test_clusters_are_shown_after_their_region(tmp_path, stimuli, encoder, colours):
    write(encoder, tmp_path / "one.zarr", "encoder")
    ascend_pixels(tmp_path / "one.zarr", out=tmp_path / "made", size=64, n_images=1, keep=1,
                  steps=0, roi="A", device="cpu")  # fmt: skip
    made = {"pixel ascent": tmp_path / "made"}
    judge(made, stimuli.folder, encoder=tmp_path / "one.zarr", roi="A", against="B", device="cpu",
          labeller=colours, labels=["red", "green", "blue"], out=tmp_path / "judged.nc", top=(5,),
          n_bootstrap=10)  # fmt: skip
    # Of a contrast the words are those of what is to be high.
    wanted = read(tmp_path / "judged.nc")["neuroid_id"].values.tolist()
    assert wanted == encoder["neuroid_id"].values[encoder["roi"].values == "A"].tolist()
    names = ["s, food, cluster 1 of 2", "s, EBA", "s, food, cluster 2 of 2", "s, food"]
    section = section_from_folders(
        dict.fromkeys(names, tmp_path / "judged.nc"), dict.fromkeys(names, made),
        natural=stimuli.folder,
        cluster_of={n: "s, food" for n in names if "cluster" in n},
        words={names[0]: {"apple": 0.6}, names[2]: {"pizza": 0.5}},
    )  # fmt: skip
    grids = [f for f in section.figures if f.kind == "image_grid"]
    assert [f.title.partition(":")[0] for f in grids] == [names[3], names[0], names[2], names[1]]
    assert grids[1].caption.endswith("Captions of the cluster's voxels name: apple (60 %).")
    assert grids[2].caption.endswith("name: pizza (50 %).") and "name:" not in grids[0].caption
