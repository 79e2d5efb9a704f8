"""The small decoder: what it was trained on is told, training goes on after a stop, its quality."""

from __future__ import annotations

import numpy as np
import pytest

from brainalign.errors import ConfigError
from brainalign.small_models import captioner as module
from brainalign.small_models.captioner import WEIGHTS, measure, named, train_captioner
from brainalign.small_models.scenes import SUBCATEGORIES, captions, name_of, render_scenes


def test_every_caption_of_a_scene_names_what_it_shows():
    scenes = render_scenes(60, seed=20_001, size=16)
    for scene in scenes:
        for text in (scene.caption, *captions(scene, 8)):
            category, kind = named(text + ".")
            assert category == scene.category, text
            assert kind in (scene.subcategory, None), text
    for category, kinds in SUBCATEGORIES.items():
        for variant in range(20):
            assert named(name_of(category, variant=variant))[0] == category
            for kind in kinds:
                assert named(name_of(category, kind, variant=variant)) == (category, kind)
    assert named("on the grass") == (None, None)


def test_bleu_is_that_of_its_definition():
    refs = [["the cat is on the mat", "there is a cat on the mat"]]
    assert module._bleu(["the cat is on the mat."], refs) == pytest.approx(1)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples are in a reference.
    got = module._bleu(["the cat is on a mat"], [["the cat is on the mat"]])
    assert got == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    brief = module._bleu(["the cat is on"], [["the cat is on the mat"]])
    assert brief == pytest.approx(np.exp(1 - 6 / 4))


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(module, "measure", lambda folder, *, clip, n: {
        "n": 1, "seed": 10_000, "category": 0.0, "subcategory": 0.0, "by_category": {},
        "bleu": 0.0, "projected": 0.0, "examples": [],
    })  # fmt: skip
    settings = {"n_scenes": 12, "steps": 4, "batch_size": 6, "scenes": tmp_path / "scenes"}
    train_captioner(tmp_path / "whole", **settings)
    ck = tmp_path / "ck"
    assert train_captioner(tmp_path / "cut", checkpoint=ck, stop_at=2, **settings) is None
    assert not (tmp_path / "cut").exists()
    train_captioner(tmp_path / "cut", checkpoint=ck, **settings)
    a, b = (load_file(tmp_path / n / "captioner.safetensors") for n in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)
    assert (tmp_path / "cut" / "MODEL_CARD.md").is_file()
    with pytest.raises(ConfigError, match="other settings"):
        train_captioner(tmp_path / "new", checkpoint=ck, **{**settings, "steps": 5})
    with pytest.raises(ConfigError, match="exists"):
        train_captioner(tmp_path / "cut", **settings)
    with pytest.raises(ConfigError, match="mixtures"):
        train_captioner(tmp_path / "new", mixtures=2)


def test_the_shipped_decoder_is_small_and_names_what_it_is_shown():
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 4e6
    found = measure(WEIGHTS, n=96, seed=20_002)
    assert found["category"] >= 0.9
    assert found["subcategory"] >= 0.5
    assert found["projected"] >= 0.9
    with pytest.raises(ConfigError, match="trained on"):
        measure(WEIGHTS, seed=1)
