"""BrainDiVE on a simulated subject whose preferences are known, with the small models alone.

Each region prefers one category of rendered scenes, one region is made of two parts, and one has no
signal. Images are guided by an encoder of the small CLIP model fitted to half of the scenes, ranked
and judged by an encoder of another network fitted to the other half, and labelled by a classifier
that took no part in either. What is planted has to come out, and gradient ascent on pixels alone
has to fail. No times: this script measures whether images show what they should.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import xarray as xr

from brainalign.data.simulate import simulate
from brainalign.data.stimuli import StimulusSet, read_stimuli, write_stimuli
from brainalign.data.store import write
from brainalign.encoding import fit_encoder
from brainalign.features import extract, load_model
from brainalign.small_models.scenes import CATEGORIES, render_scenes
from brainalign.synthesis import ascend_pixels, dive, judge, label

PREFERS = {"FFA": "people", "EBA": "bodies", "PPA": "places", "VWFA": "words", "food": "food"}
PARTS = ("people", "places")
EACH, N_NULL = 30, 60
LABELLED = 0.85


def subject(stimuli: StimulusSet, folder: Path, seed: int) -> None:
    """Simulate responses driven by unit embeddings; write the encoders of both halves."""
    models = {name: load_model(name, device="cpu") for name in ("small-clip", "small-judge")}
    features = {
        name: extract(model, stimuli, "output", pooling="unit", device="cpu")["output"].load()
        for name, model in models.items()
    }
    roi = [r for r in PREFERS for _ in range(EACH)]
    roi += [f"part {p}" for p in PARTS for _ in range(EACH)] + ["null"] * N_NULL
    n = len(roi)
    neuroids = xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i:03d}" for i in range(n)]), "roi": ("neuroid", roi),
            "hemisphere": ("neuroid", ["L"] * n),
            **{c: ("neuroid", np.arange(n, dtype=float)) for c in "xyz"},
        }
    )  # fmt: skip
    made = simulate(
        features["small-clip"], category=stimuli.index["category"].values, neuroids=neuroids,
        preference={**PREFERS, **{f"part {p}": p for p in PARTS}},
        null=np.array([r == "null" for r in roi]), ncsnr=(0.6, 1.2), seed=seed,
    )  # fmt: skip
    names = ["mixed" if r.startswith("part") else r for r in roi]
    responses = made.responses.assign_coords(roi=("neuroid", names))
    half = np.random.default_rng(seed).permutation(len(stimuli)) < len(stimuli) // 2
    shown = dict(zip(stimuli.ids, half.tolist(), strict=True))
    first = np.array([shown[i] for i in responses["stimulus_id"].values.tolist()])
    for name, rows, file in (("small-clip", first, "guide"), ("small-judge", ~first, "judge")):
        fitted = fit_encoder(
            features[name], responses.isel(presentation=rows), stimuli="seen",
            alphas=np.logspace(-2, 5, 15), device="cpu",
        )  # fmt: skip
        write(fitted, folder / f"{file}.zarr", "encoder")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=900)
    parser.add_argument("--images", type=int, default=60, help="of each target")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float, default=80.0)
    parser.add_argument("--schedule", default="linear", help="of the scale along the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", default="small-diffusion")
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--keep-images", type=Path, help="folder to leave the images in")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep_images or Path(temporary)
        rows = measure(args, folder)
    raise SystemExit(not harness.record("braindive_truth", rows, args.out))


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row a target, one of scales and one of the gradient that is cut."""
    folder.mkdir(parents=True, exist_ok=True)
    stimuli_folder = folder / "scenes"
    if not stimuli_folder.exists():
        scenes = render_scenes(args.scenes, seed=30_000, size=64)
        write_stimuli(
            stimuli_folder, [s.image for s in scenes], [s.stimulus_id for s in scenes],
            extra={"category": [s.category for s in scenes]},
        )  # fmt: skip
        subject(read_stimuli(stimuli_folder), folder, args.seed)
        label(
            stimuli_folder, "small-classifier", CATEGORIES, out=folder / "labels.nc", device="cpu"
        )
    common = {"rerank": folder / "judge.zarr", "device": "cpu", "progress": False}
    making = {
        **common, "steps": args.steps, "scheduler": "dpmsolver++", "n_images": args.images,
        "keep": args.keep, "scale": args.scale, "schedule": args.schedule,
        "sag_scale": 0.0, "batch_size": 10,
    }  # fmt: skip
    judging = {
        "encoder": folder / "judge.zarr", "guiding": folder / "guide.zarr", "device": "cpu",
        "labeller": "small-classifier", "labels": CATEGORIES, "top": (20, 50),
        "natural_labels": folder / "labels.nc", "overwrite": True,
    }  # fmt: skip

    def run(name: str, target: dict[str, Any], ascent: bool = False, **changed: Any) -> xr.Dataset:
        place = folder / name
        place.mkdir(exist_ok=True)
        sets = {"generated": place / "generated"}
        dive(
            folder / "guide.zarr", args.pipeline, out=sets["generated"], overwrite=True,
            **target, **{**making, **changed},
        )  # fmt: skip
        if ascent:
            sets["pixel ascent"] = place / "ascent"
            ascend_pixels(
                folder / "guide.zarr", out=sets["pixel ascent"], size=64, overwrite=True,
                n_images=args.images, keep=args.keep, **target, **common,
            )  # fmt: skip
        return judge(sets, stimuli_folder, out=place / "judged.nc", **target, **judging)

    def told(judged: xr.Dataset, kind: str, wanted: str = "") -> dict[str, float]:
        found = judged.sel(set=kind)
        share = float(found["share"].sel(label=wanted)) if wanted in judged["label"] else 0.0
        return {
            "activation": float(found["activation"]), "above_top_1_percent": float(found["above"]),
            "labelled": share, "n": int(found["n"]), "preferred": str(found["preferred"].values),
            "diversity": float(found["diversity"]),
        }  # fmt: skip

    work = {
        k: getattr(args, k)
        for k in ("scenes", "images", "keep", "steps", "scale", "schedule", "seed")
    }
    rows: list[dict[str, Any]] = []

    def add(case: str, accuracy: dict[str, Any], **more: Any) -> None:
        checks = harness.checked(accuracy)
        rows.append(
            {"case": case, "work": work, "accuracy": checks, **more,
             "passed": all(c["holds"] for c in checks.values())}
        )  # fmt: skip
        print(case, {k: (round(c["value"], 3), c["holds"]) for k, c in checks.items()}, flush=True)

    for roi, wanted in PREFERS.items():
        if args.only not in roi:
            continue
        judged = run(roi, {"roi": roi}, ascent=True)
        ours, pixels = told(judged, "generated", wanted), told(judged, "pixel ascent", wanted)
        add(
            f"{roi} prefers {wanted}",
            {
                "mean activation over the best 1 % of scenes":
                    (ours["activation"] - judged.attrs["top_1_percent"], ">=", 0.0),
                "labelled as planted": (ours["labelled"], ">=", LABELLED),
                "pixel ascent, mean activation over the best 1 % of scenes":
                    (pixels["activation"] - judged.attrs["top_1_percent"], "<=", 0.0),
            },
            generated=ours, ascent=pixels, natural=told(judged, "all natural", wanted),
            best_natural=told(judged, "top 20 natural", wanted),
            threshold=judged.attrs["top_1_percent"],
        )  # fmt: skip
    for first, second in (("EBA", "PPA"), ("PPA", "EBA")):
        name = f"{first} against {second}"
        if args.only not in name:
            continue
        judged = run(name, {"roi": first, "against": second})
        ours = told(judged, "generated", PREFERS[first])
        add(
            name,
            {"activation over all natural": (
                ours["activation"] - told(judged, "all natural")["activation"], ">=", 0.0),
             "labelled as planted": (ours["labelled"], ">=", LABELLED)},
            generated=ours,
        )  # fmt: skip
    if args.only in "clusters":
        shares = []
        for k in range(2):
            judged = run(f"mixed_{k}", {"roi": "mixed", "cluster": k, "n_clusters": 2})
            labelled = judged["share"].sel(set="generated")
            shares.append({p: float(labelled.sel(label=p)) for p in PARTS})
        one, other = PARTS
        smaller = max(min(shares[0][one], shares[1][other]), min(shares[0][other], shares[1][one]))
        checks = {"smaller share of its own category": (smaller, ">=", LABELLED)}
        add("two clusters of a region of two parts", checks, shares=shares)
    if args.only in "null":
        judged = run("null", {"roi": "null"})
        ours = told(judged, "generated")
        checks = {"labels preferred": (float(ours["preferred"] != ""), "<=", 0.0)}
        add("a region without signal", checks, generated=ours)
    if args.only in "scales":
        curve = {}
        for factor in (0.0, 0.25, 0.5, 1.0):
            judged = run(
                f"scale_{factor}", {"roi": "food"}, scale=factor * args.scale, keep=1.0,
                n_images=max(args.images // 3, 1),
            )  # fmt: skip
            curve[factor * args.scale] = told(judged, "generated", "food")
        values = [c["activation"] for c in curve.values()]
        add("activation rises with the scale",
            {"smallest step": (float(np.diff(values).min()), ">=", 0.0)}, curve=curve)  # fmt: skip
    if args.only in "cut":
        judged = run("cut", {"roi": "food"}, through_unet=False)
        add("gradient that ends before the UNet", {}, generated=told(judged, "generated", "food"))
    return rows


if __name__ == "__main__":
    main()
