"""From seeds to ranked images: resumption, the record, the baseline."""

import json
import shutil

import numpy as np
import pytest
import tiny_pipeline as tiny
import torch

from brainalign.data.stimuli import read_stimuli
from brainalign.data.store import write
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError
from brainalign.synthesis import (
    Jitter,
    ascend_pixels,
    dive,
    load_pipeline,
    read_kept,
    sample,
)
from brainalign.synthesis.objective import Target
from brainalign.synthesis.sampling import largest_batch, predict_target


@pytest.fixture(scope="module")
def paths(tmp_path_factory, encoder, model, stimuli):
    folder = tmp_path_factory.mktemp("paths")
    tiny.pipeline().save_pretrained(folder / "pipe")
    write(encoder, folder / "one.zarr", "encoder")
    two = tiny.encoder(model, stimuli, seed=5)
    write(two, folder / "two.zarr", "encoder")
    write(two.assign_attrs(subject="sub-02"), folder / "other.zarr", "encoder")
    return folder


OPTIONS = {
    "roi": "A", "n_images": 5, "seed": 7, "steps": 2, "batch_size": 2, "scale": 40.0,
    "scheduler": "dpmsolver++", "device": "cpu", "keep": 0.4,
}  # fmt: skip


def test_a_run_that_was_killed_ends_with_the_same_images(paths, tmp_path, monkeypatch, encoder):
    import brainalign.synthesis.sampling as module

    whole = dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "whole",
                 rerank=paths / "two.zarr", **OPTIONS)  # fmt: skip
    made = []

    def dies(pipe, objective, seeds, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(seeds))
        return real(pipe, objective, seeds, **options)

    real = module.sample
    monkeypatch.setattr(module, "sample", dies)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        dive(paths / "one.zarr", paths / "pipe", out=out, rerank=paths / "two.zarr", **OPTIONS)
    left = sorted(f.name for f in (tmp_path / "broken.seeds").rglob("*.png"))
    assert not out.exists() and left == [f"{s:08d}.png" for s in (7, 8, 9, 10)]
    # One image of a batch is lost: the batch is made again, the others of it are left alone.
    lost = next((tmp_path / "broken.seeds").rglob("00000010.png"))
    lost.unlink()
    made.clear()
    monkeypatch.setattr(module, "sample", real)
    again = dive(paths / "one.zarr", paths / "pipe", out=out, rerank=paths / "two.zarr", **OPTIONS)
    assert again.sha256 == whole.sha256 and not (tmp_path / "broken.seeds").exists()

    index = whole.index
    assert index["seed"].values.tolist() == [7, 8, 9, 10, 11]
    assert sorted(index["rank"].values.tolist()) == list(range(5))
    order = np.argsort(index["rank"].values)
    assert (np.diff(index["predicted_reranking"].values[order]) <= 0).all()
    assert not np.allclose(index["predicted_reranking"], index["predicted_guiding"])
    kept = read_kept(tmp_path / "whole")
    assert kept.ids == [whole.ids[i] for i in order[:2]]
    expected, _ = predict_target(encoder, Target("A").weights([encoder]), whole)
    assert np.allclose(index["predicted_guiding"], expected, atol=1e-6)
    config = json.loads(index.attrs["config"])
    assert config["guidance"]["scale"] == 40 and config["scheduler"].startswith("DPMSolver")
    assert index.attrs["batch_size"] == "2" and index.attrs["reranked_by"] == "another encoder"
    assert set(json.loads(index.attrs["inputs"])) == {"one.zarr", "two.zarr"}
    with pytest.raises(FileExistsError):
        dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "whole", **OPTIONS)


@pytest.mark.parametrize("jitter", [None, {"copies": 2}])
def test_a_seed_is_the_same_image_in_any_batch(paths, tmp_path, jitter):
    by_size = []
    for n, seed, size in ((3, 7, 3), (1, 8, 1), (2, 8, 2)):
        out = tmp_path / f"{n}-{seed}-{size}"
        made = dive(paths / "one.zarr", paths / "pipe", out=out,
                    jitter=jitter,
                    **{**OPTIONS, "n_images": n, "seed": seed, "batch_size": size})  # fmt: skip
        i = made.index["seed"].values.tolist().index(8)
        by_size.append(np.asarray(made.open(i)).astype(int))
    assert np.abs(by_size[0] - by_size[1]).max() <= 1
    assert np.abs(by_size[0] - by_size[2]).max() <= 1
    attrs = read_stimuli(tmp_path / "1-8-1").index.attrs
    assert attrs["reranked_by"] == "the guiding encoder"
    recorded = json.loads(attrs["config"])["guidance"]["jitter"]
    assert recorded == (jitter and {"copies": 2, "shift": 1 / 16, "zoom": 0.25, "noise": 0.05})


def test_copies_lead_to_other_images(paths, tmp_path):
    options = {**OPTIONS, "n_images": 2}
    made = {
        copies: dive(paths / "one.zarr", paths / "pipe", out=tmp_path / str(copies),
                     jitter=Jitter(copies) if copies else None, **options)
        for copies in (0, 1, 2)
    }  # fmt: skip
    assert len({tuple(images.sha256) for images in made.values()}) == 3
    pixels = [
        ascend_pixels(paths / "one.zarr", out=tmp_path / f"pixels {n}", size=64, roi="A", steps=3,
                      n_images=2, jitter={"copies": n} if n else None, device="cpu")
        for n in (0, 2)
    ]  # fmt: skip
    assert pixels[0].sha256 != pixels[1].sha256
    settings = [json.loads(images.index.attrs["config"])["jitter"] for images in pixels]
    assert not settings[0] and settings[1]["copies"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_repeats_its_images_and_draws_those_of_the_cpu(paths, tmp_path):
    options = {**OPTIONS, "batch_size": "auto", "device": "cuda"}
    made = [dive(paths / "one.zarr", paths / "pipe", out=tmp_path / name, **options)
            for name in "ab"]  # fmt: skip
    assert made[0].sha256 == made[1].sha256
    cpu = dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "cpu", **OPTIONS)
    for i in range(5):
        there, here = (np.asarray(images.open(i)).astype(int) for images in (made[0], cpu))
        assert np.abs(there - here).max() <= 2
    ascended = [
        ascend_pixels(paths / "one.zarr", out=tmp_path / f"pixels-{name}", size=64, roi="A",
                      n_images=2, seed=0, steps=3, device="cuda")
        for name in "ab"
    ]  # fmt: skip
    assert ascended[0].sha256 == ascended[1].sha256


def test_a_batch_size_is_chosen_once(paths, tmp_path, monkeypatch):
    import brainalign.synthesis.sampling as module

    asked = []
    monkeypatch.setattr(module, "largest_batch", lambda *a, **k: asked.append(a) or 2)
    made = dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "x",
                **{**OPTIONS, "batch_size": "auto", "n_images": 3})  # fmt: skip
    assert len(asked) == 1 and made.index.attrs["batch_size"] == "2"
    with pytest.raises(ConfigError, match="batch_size"):
        dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "y", **{**OPTIONS, "batch_size": 0})


def test_the_batch_that_fits_is_found_by_trying(monkeypatch):
    import brainalign.synthesis.sampling as module

    sizes = []
    monkeypatch.setattr(
        module, "_peak", lambda run, device: (run(), 300.0 + 100.0 * sizes[-1], 2000.0)[1:]
    )
    assert largest_batch(sizes.append, 100, device="cpu") == 14  # 0.85 x 2000 = 300 + 14 x 100
    assert largest_batch(sizes.append, 9, device="cpu") == 9
    monkeypatch.setattr(module, "_peak", lambda run, device: (float("inf"), 2000.0))
    assert largest_batch(sizes.append, 9, device="cpu") == 1


def test_ascent_on_pixels_raises_the_prediction(paths, tmp_path):
    made = ascend_pixels(paths / "one.zarr", out=tmp_path / "x", size=64, roi="A", against="B",
                         n_images=3, batch_size=2, steps=8, device="cpu")  # fmt: skip
    still = ascend_pixels(paths / "one.zarr", out=tmp_path / "y", size=64, roi="A", against="B",
                          n_images=3, batch_size=2, steps=0, device="cpu")  # fmt: skip
    gain = made.index["predicted_guiding"].values - still.index["predicted_guiding"].values
    assert (gain > 0.1).all()
    assert made.index["target"].values.tolist() == ["A against B"] * 3


def test_words_alone_make_images_with_their_prompts_in_turn(paths, tmp_path):
    prompts = ["a photo of a face", "a photo of a house"]
    options = {**OPTIONS, "n_images": 4, "scale": 0.0, "sag_scale": 0.0, "text_scale": 5.0}
    made = dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "x", prompt=prompts, **options)
    pipe = load_pipeline(paths / "pipe", scheduler="dpmsolver++", device="cpu")
    alone = {"steps": 2, "text_scale": 5.0}
    for pair in ([0, 1], [2, 3]):
        plain = sample(pipe, None, [7 + i for i in pair], prompt=prompts, **alone)
        for i, image in zip(pair, plain, strict=True):
            assert np.array_equal(np.asarray(made.open(i)), np.asarray(image))
    other = sample(pipe, None, [7, 8], prompt=prompts[::-1], **alone)
    assert not np.array_equal(np.asarray(made.open(0)), np.asarray(other[0]))
    assert json.loads(made.index.attrs["config"])["prompts"] == prompts
    assert np.isfinite(made.index["predicted_guiding"]).all()
    with pytest.raises(ConfigError, match="3 prompts came for 2 images"):
        sample(pipe, None, [7, 8], prompt=["a"] * 3)


def test_errors_come_before_the_first_seed(paths, tmp_path):
    for options, error, match in (
        ({"roi": "Z"}, UnknownNameError, "Z"),
        ({"scheduler": "dpm"}, UnknownNameError, "dpmsolver"),
        ({"precision": "half"}, ConfigError, "precision"),
        ({"keep": 0}, ConfigError, "keep"),
        ({"schedule": "steep"}, ConfigError, "schedule"),
        ({"prompt": []}, ConfigError, "no prompt"),
        ({"jitter": {"copy": 3}}, ConfigError, "copies"),
        ({"rerank": paths / "other.zarr"}, SchemaError, "sub-02"),
    ):
        with pytest.raises(error, match=match):
            dive(paths / "one.zarr", paths / "pipe", out=tmp_path / "x", **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnavailableError, match="model_index"):
        load_pipeline(tmp_path)
    shutil.rmtree(tmp_path)
