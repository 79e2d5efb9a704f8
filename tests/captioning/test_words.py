"""Words of captions: nouns, shares, categories, clusters and what no voxel says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import xarray as xr

from brainalign.captioning import (
    cluster_words,
    embed_2d,
    first_mentioned,
    noun_prompts,
    nouns,
    preferred_category,
    region_word_share,
    top_nouns,
    word_share,
)
from brainalign.errors import ConfigError, SchemaError

NOUNS = {"man", "men", "shirt", "pizza", "pizzas", "beach", "sign", "plate", "house", "table"}


def tag(captions):
    return [[w for w in c.lower().replace(".", "").split() if w in NOUNS] for c in captions]


def captions_of(grid, roi=None):
    n = len(grid)
    return xr.Dataset(
        {"caption": (("neuroid", "draw"), np.array(grid))},
        coords={
            "neuroid_id": ("neuroid", [f"n{i}" for i in range(n)]),
            "roi": ("neuroid", roi or ["A"] * n), "hemisphere": ("neuroid", ["L"] * n),
        },
    )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("textblob") is None, reason="textblob is missing")
def test_the_tagger_finds_nouns_and_nothing_else():
    said = [
        "A smiling old woman with long grey hair in a red shirt.",
        "a photo of two men eating pizzas",
    ]
    assert nouns(said) == [["woman", "hair", "shirt"], ["man", "pizza"]]


def test_nouns_are_singular_and_a_caption_is_tagged_once():
    seen = []

    def counted(captions):
        seen.extend(captions)
        return tag(captions)

    found = nouns(["two men with pizzas", "a man", "two men with pizzas"], counted)
    assert found == [["man", "pizza"], ["man"], ["man", "pizza"]]
    assert seen == ["two men with pizzas", "a man"]


#: As captions of everyday scenes name them: plural, singular; one word where the two are one.
SINGULARS = """
    axes axe, babies baby, beaches beach, benches bench, bikinis bikini, bodies body, boxes box,
    brownies brownie, brushes brush, bus, buses bus, cactuses cactus, canoes canoe, canvas,
    canvases canvas, cars car, cherries cherry, children child, clothes, cookies cookie,
    dishes dish, donuts donut, dress, dresses dress, feet foot, firemen fireman, fries fry,
    giraffes giraffe, glass, glasses, gloves glove, grass, grandchildren grandchild, halves half,
    headaches headache, heroes hero, horses horse, houses house, jeans, knives knife, leaves leaf,
    lens, lenses lens, loaves loaf, mattresses mattress, men man, menus menu, mice mouse,
    movies movie, olives olive, people, photographs photograph, pies pie, pizzas pizza,
    policemen policeman, potatoes potato, ramen, sandwiches sandwich, scarves scarf, scissors,
    sheep, shelves shelf, shoes shoe, skies sky, skis ski, sleeves sleeve, sofas sofa, sunglasses,
    tables table, taxis taxi, teeth tooth, tennis, ties tie, toes toe, tomatoes tomato, vases vase,
    viruses virus, watches watch, waves wave, wives wife, wolves wolf, women woman, zebras zebra
"""


def test_plurals_become_their_singular_and_what_is_none_stays():
    pairs = [line.split() for line in SINGULARS.replace("\n", " ").split(",")]
    expected = [p[-1] for p in pairs if p[-1] != "photograph"]
    told = nouns(["x"], lambda _: [[p[0].capitalize() for p in pairs]])[0]
    assert len(expected) > 60 and told == expected
    # What is singular already stays so.
    again = nouns(["x"], lambda _: [expected])[0]
    assert again == expected


def test_what_is_mentioned_first_counts_and_phrases_before_words():
    categories = {"food": ["hot dog", "pizza"], "animals": ["dog"], "people": ["man", "old man"]}
    assert first_mentioned("Two hot dogs beside a man.", categories) == "food"
    assert first_mentioned("a dog that is hot", categories) == "animals"
    assert first_mentioned("old men, one with a pizza", categories) == "people"
    assert first_mentioned("nothing of the kind", categories) is None


def test_a_face_counts_where_it_is_a_persons():
    persons = {"people": ["person", "face"], "bodies": ["hand", "leg"], "words": ["sign"]}
    assert first_mentioned("a close up of a dog's face", persons) is None
    assert first_mentioned("a cat\N{RIGHT SINGLE QUOTATION MARK}s furry face", persons) is None
    assert first_mentioned("the dogs' legs behind a sign", persons) == "words"
    assert first_mentioned("a store's sign", persons) == "words"
    assert first_mentioned("the children's faces", persons) == "people"
    assert first_mentioned("a man's left hand", persons) == "bodies"
    assert first_mentioned("it's a face", persons) == "people"
    ds = captions_of([["a dog's face", "a man's face"], ["two faces", "a table"]])

    def everything(captions):
        return [c.replace("'", " ").split() for c in captions]

    assert word_share(ds, ["face"], everything).tolist() == [0.5, 0.5]


def test_shares_of_nouns_and_persons():
    ds = captions_of(
        [["a man", "a man in a shirt"], ["a pizza", "a man and a man"], ["a beach", "a beach"]],
        ["A", "A", "B"],
    )
    table = top_nouns(ds, {"A": [0, 1], "B": [2]}, top=2, tagger=tag)
    share = table["share"].sel(roi="A").to_series().to_dict()
    assert share == {"man": 0.75, "pizza": 0.25, "beach": 0.0}
    assert (
        table["rank"].sel(roi="A", noun="man") == 1
        and table["rank"].sel(roi="B", noun="beach") == 1
    )
    assert word_share(ds, tagger=tag).tolist() == [1.0, 0.5, 0.0]
    assert noun_prompts(table, top=1) == {
        "A": [("A photo of a man", 0.75)], "B": [("A photo of a beach", 1.0)],
    }  # fmt: skip
    with pytest.raises(SchemaError, match="neuroid, draw"):
        word_share(xr.Dataset({"caption": ("caption", ["a man"])}), tagger=tag)


def test_shares_of_words_have_intervals_over_the_draws():
    ds = captions_of([
        ["a man", "a man", "a pizza"], ["a pizza", "a man", "a beach"],
        ["a beach", "a beach", "a beach"],
    ])  # fmt: skip
    found = region_word_share(ds, {"A": [0, 1], "B": [2], "none": []}, ["man"], tagger=tag)
    # Shares of the draws are 1/2, 1 and 0; t with two degrees of freedom is 4.303 at 95 %.
    assert found["share"].values[:2].tolist() == [0.5, 0.0]
    half = 4.3027 * 0.5 / np.sqrt(3)
    assert (found["low"][0], found["high"][0]) == (max(0.5 - half, 0), min(0.5 + half, 1))
    narrow = region_word_share(ds, {"A": [0, 1]}, ["man"], confidence=0.5, tagger=tag)
    assert narrow["high"].values[0] == pytest.approx(0.5 + 0.8165 * 0.5 / np.sqrt(3), rel=1e-4)
    assert found["high"].values[1] == 0 and np.isnan(found["share"].values[2])
    alone = region_word_share(ds.isel(draw=[0]), {"A": [0, 1]}, ["man"], tagger=tag)
    assert alone["share"].values[0] == 0.5 and np.isnan(alone["low"].values[0])


def test_a_category_needs_a_majority_with_confidence():
    categories = {"people": ["man"], "food": ["pizza"], "places": ["beach"]}
    kinds = ["a man", "a pizza", "a beach"]
    rng = np.random.default_rng(0)
    mixed = [[kinds[i]] * 3 for i in rng.integers(3, size=60)]
    clear = [["a man", "a man", "a beach"]] * 50 + [["a pizza"] * 3] * 10
    few = [["a man"] * 3] * 2
    torn = [["a man", "a pizza", "a beach"]]
    ds = captions_of([*mixed, *clear, *few, *torn])
    members = {"null": np.arange(60), "clear": np.arange(60, 120), "few": [120, 121], "torn": [122]}
    found = preferred_category(ds, members, categories)
    assert found["preferred"].values.tolist() == ["", "people", "", ""]
    assert found["share"].sel(roi="clear", category="people") == pytest.approx(50 / 60)
    assert found["low"].sel(roi="clear", category="people") < 50 / 60
    assert found["voxel_category"].values[-1] == ""


def test_planted_parts_of_a_region_are_told_by_their_words():
    rng = np.random.default_rng(1)
    part = np.repeat([0, 1], [30, 20])
    w = np.eye(2, 8)[part] + 0.1 * rng.standard_normal((50, 8))
    grid = [["a man in a shirt" if p == 0 else "a pizza on a plate"] * 2 for p in part]
    everything = captions_of([["a beach"] * 2, *grid])
    weights = np.vstack([np.ones(8), w])
    found = cluster_words(weights, everything, np.arange(1, 51), n_clusters=2, seed=0, tagger=tag)
    assert np.array_equal(found["cluster"].values, part)
    assert found["size"].values.tolist() == [30, 20]
    assert found["excess"].sel(cluster_number=0, noun="man") == 1
    assert found["excess"].sel(cluster_number=1, noun="man") == -1
    assert found["neuroid_id"].values[0] == "n1"
    with pytest.raises(SchemaError, match="50 weights came with captions of 51"):
        cluster_words(w, everything, [1, 2], tagger=tag)


def test_the_plane_keeps_directions_apart():
    rng = np.random.default_rng(2)
    w = np.repeat(np.eye(2, 6), 20, axis=0) + 0.05 * rng.standard_normal((40, 6))
    w *= rng.uniform(0.1, 10, (40, 1))
    for method in ("pca", "tsne", "umap"):
        xy = embed_2d(w, method=method, seed=0)
        apart = np.linalg.norm(xy[:20].mean(0) - xy[20:].mean(0))
        assert apart > 2 * max(xy[:20].std(), xy[20:].std())
        np.testing.assert_array_equal(xy, embed_2d(w, method=method, seed=0))
    with pytest.raises(ConfigError, match="pca, tsne, umap"):
        embed_2d(w, method="mds")
    with pytest.raises(ConfigError, match="4 neuroids or more; got 3"):
        embed_2d(w[:3], method="umap")
