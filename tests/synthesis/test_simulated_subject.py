"""BrainDiVE with the shipped models, on a subject whose preferences are planted."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from brainalign.data.simulate import simulate
from brainalign.data.stimuli import write_stimuli
from brainalign.data.store import write
from brainalign.encoding import fit_encoder
from brainalign.features import extract, load_model
from brainalign.small_models.scenes import CATEGORIES, render_scenes
from brainalign.synthesis import ascend_pixels, dive, judge

PREFERS = {"EBA": "bodies"}  # benchmarks/braindive_truth.py asks of all regions, with more images


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Encoders of two halves of the scenes, by two models, in a folder with the scenes."""
    folder = tmp_path_factory.mktemp("subject")
    scenes = render_scenes(600, seed=31_000, size=64)
    stimuli = write_stimuli(
        folder / "scenes", [s.image for s in scenes], [s.stimulus_id for s in scenes],
        extra={"category": [s.category for s in scenes]},
    )  # fmt: skip
    clip, judge_ = (load_model(name, device="cpu") for name in ("small-clip", "small-judge"))

    def features(model, layer, pooling):
        return extract(model, stimuli, layer, pooling=pooling, device="cpu")[layer].load()

    seen = {
        "spatial": features(clip, "visual.layer4", "mean"),
        "embedding": features(clip, "output", "unit"),
        "judging": features(judge_, "output", "unit"),
    }
    roi = [r for r in (*PREFERS, "null") for _ in range(20)]
    neuroids = xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(len(roi))]), "roi": ("neuroid", roi),
            "hemisphere": ("neuroid", ["L"] * len(roi)),
            **{c: ("neuroid", np.arange(len(roi), dtype=float)) for c in "xyz"},
        }
    )  # fmt: skip
    made = simulate(
        seen["embedding"], category=stimuli.index["category"].values, neuroids=neuroids,
        preference=PREFERS, null=np.array(roi) == "null", ncsnr=(0.6, 1.2), seed=5,
    ).responses  # fmt: skip
    first = np.isin(made["stimulus_id"].values, list(stimuli.ids)[::2])
    for name, rows, file in (
        ("spatial", first, "guide-0"), ("embedding", first, "guide-1"),
        ("embedding", ~first, "rank"), ("judging", ~first, "judge"),
    ):  # fmt: skip
        fitted = fit_encoder(
            seen[name], made.isel(presentation=rows), stimuli="seen",
            alphas=np.logspace(-2, 5, 15), device="cpu",
        )  # fmt: skip
        write(fitted, folder / f"{file}.zarr", "encoder")
    return folder


def judged(subject, folder, roi, ascent=True):
    guides = [subject / "guide-0.zarr", subject / "guide-1.zarr"]
    common = {"roi": roi, "rerank": subject / "rank.zarr", "device": "cpu", "progress": False}
    sets = {"generated": folder / "images"}
    dive(
        guides, "small-diffusion", out=sets["generated"], n_images=40, keep=0.3, scale=150,
        schedule="linear", sag_scale=0, steps=25, scheduler="dpmsolver++", batch_size=10, **common,
    )  # fmt: skip
    if ascent:
        sets["pixel ascent"] = folder / "pixels"
        ascend_pixels(
            guides, out=sets["pixel ascent"], size=64, n_images=8, keep=0.5, steps=100, **common,
        )  # fmt: skip
    return judge(
        sets, subject / "scenes", encoder=subject / "judge.zarr", guiding=guides, roi=roi,
        device="cpu", labeller="small-classifier", labels=CATEGORIES, out=folder / "judged.nc",
        top=(20,),
    )  # fmt: skip


@pytest.mark.parametrize("roi", PREFERS)
def test_images_show_what_a_region_prefers_and_pixels_alone_do_not(subject, tmp_path, roi):
    found = judged(subject, tmp_path, roi)
    ours, pixels = (found.sel(set=s) for s in ("generated", "pixel ascent"))
    assert ours["share"].sel(label=PREFERS[roi]) >= 0.85, found["share"].to_pandas()
    assert ours["preferred"] == PREFERS[roi]
    # As natural scenes of that kind, at least.
    natural = found["natural_activation"].values
    assert ours["activation"] > np.quantile(natural, 0.9)
    assert pixels["activation"] < np.quantile(natural, 0.9)


def test_a_region_without_signal_gets_no_preferred_label(subject, tmp_path):
    found = judged(subject, tmp_path, "null", ascent=False).sel(set="generated")
    assert found["preferred"] == "" and found["rise_p"] > 0.001
