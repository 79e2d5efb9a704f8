"""BrainDiVE on a simulated subject whose preferences are known, with the small models alone.

Each region prefers one category of rendered scenes, one region is made of two parts, and one has no
signal. Images are guided by encoders of the small CLIP model fitted to half of the scenes, ranked
by one fitted to the other half (or by the judge, `--ranker judge`: then what selects is what is
measured), judged by an encoder of another network, and labelled by a classifier that took no part
in any of it. What is planted has to come out, and gradient ascent on pixels alone has to fail: it
may not have both the activation and the labels that are asked of the images. No times: this script
measures whether images show what they should.

The 99th percentile of scenes, by the judge, is the judge's own choice: a part of it is its noise.
So what is compared is chosen alike: the tenth of the images that the judge likes most with that
percentile of scenes, and the images that the ranker kept with as many scenes that it likes most.
The gap between the ranker's images and the judge's percentile, in which only one side has that
advantage, is written down as well (`ranker_over_99th_percentile`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import xarray as xr

from brainalign.data.simulate import simulate
from brainalign.data.stimuli import StimulusSet, read_stimuli, write_stimuli
from brainalign.data.store import sha256_file, sha256_of, write
from brainalign.encoding import fit_encoder
from brainalign.features import Model, extract, load_model
from brainalign.features.layers import Pooling
from brainalign.features.models import shipped_folder
from brainalign.small_models.scenes import CATEGORIES, render_scenes
from brainalign.synthesis import (
    Jitter,
    Target,
    ascend_pixels,
    dive,
    judge,
    label,
    label_images,
    predict_target,
    read_encoder,
)

PREFERS = {"FFA": "people", "EBA": "bodies", "PPA": "places", "VWFA": "words", "food": "food"}
PARTS = ("people", "places")
EACH, N_NULL = 30, 60
LABELLED = 0.85
OPTIONS = ("scenes", "images", "ascents", "keep", "steps", "scale", "schedule", "copies", "seed",
           "pipeline", "guides", "ranker")  # fmt: skip


def neuroids_of(roi: Sequence[str]) -> xr.Dataset:
    """Return neuroids of one hemisphere with these regions; their places say nothing."""
    n = len(roi)
    return xr.Dataset(
        coords={
            "neuroid_id": ("neuroid", [f"v{i:03d}" for i in range(n)]), "roi": ("neuroid", roi),
            "hemisphere": ("neuroid", ["L"] * n),
            **{c: ("neuroid", np.arange(n, dtype=float)) for c in "xyz"},
        }
    )  # fmt: skip


def subject(
    stimuli: StimulusSet, folder: Path, guides: Sequence[str], ranker: str, seed: int
) -> None:
    """Simulate responses driven by unit embeddings; write the encoders of both halves."""
    clip, judging = (load_model(name, device="cpu") for name in ("small-clip", "small-judge"))

    def features(model: Model, layer: str, pooling: Pooling) -> xr.Dataset:
        return extract(model, stimuli, layer, pooling=pooling, device="cpu")[layer].load()

    roi = [r for r in PREFERS for _ in range(EACH)]
    roi += [f"part {p}" for p in PARTS for _ in range(EACH)] + ["null"] * N_NULL
    made = simulate(
        features(clip, "output", "unit"), category=stimuli.index["category"].values,
        neuroids=neuroids_of(roi),
        preference={**PREFERS, **{f"part {p}": p for p in PARTS}},
        null=np.array([r == "null" for r in roi]), ncsnr=(0.6, 1.2), seed=seed,
    )  # fmt: skip
    names = ["mixed" if r.startswith("part") else r for r in roi]
    responses = made.responses.assign_coords(roi=("neuroid", names))
    half = np.random.default_rng(seed).permutation(len(stimuli)) < len(stimuli) // 2
    shown = dict(zip(stimuli.ids, half.tolist(), strict=True))
    first = np.array([shown[i] for i in responses["stimulus_id"].values.tolist()])

    def small(layer: str) -> xr.Dataset:
        return features(clip, layer, "unit" if layer == "output" else "mean")

    judged = features(judging, "output", "unit")
    fits = [(f"guide-{i}", small(layer), first) for i, layer in enumerate(guides)]
    fits += [("judge", judged, ~first)]
    fits += [] if ranker == "judge" else [("rank", small(ranker), ~first)]
    for file, seen, rows in fits:
        fitted = fit_encoder(
            seen, responses.isel(presentation=rows), stimuli="seen",
            alphas=np.logspace(-2, 5, 15).tolist(), device="cpu",
        )  # fmt: skip
        write(fitted, folder / f"{file}.zarr", "encoder", overwrite=True)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--workers", type=int, default=1, help="cases that run at a time")
    parser.add_argument("--scenes", type=int, default=900)
    parser.add_argument("--images", type=int, default=200, help="of each region; half of others")
    parser.add_argument("--ascents", type=int, default=50, help="images of pixels alone")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float, default=150.0)
    parser.add_argument("--schedule", default="linear", help="of the scale along the run")
    parser.add_argument(
        "--copies", type=int, default=8, help="altered copies of an image that are climbed on; or 0"
    )
    # The embedding of unit length ("output") alone has gradients that more often lead to pictures
    # which move the guide and no other network.
    parser.add_argument(
        "--guides", nargs="+", default=["visual.layer4", "output"],
        help="layers of small-clip whose encoders guide together",
    )  # fmt: skip
    parser.add_argument("--ranker", default="output", help="layer of small-clip, or judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", default="small-diffusion")
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument(
        "--keep-images", type=Path,
        help="folder to leave the images in; those that are there, of the same options, are taken",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(args, args.keep_images or Path(temporary))
        study.prepare()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            rows = list(pool.map(study.row, [c for c in CASES if args.only in c], chunksize=1))
    raise SystemExit(not harness.record("braindive_truth", rows, args.out))


def told(judged: xr.Dataset, kind: str, wanted: str = "") -> dict[str, Any]:
    """Return what a set of images was found to be."""
    found = judged.sel(set=kind)
    share = float(found["share"].sel(label=wanted)) if wanted in judged["label"] else 0.0
    return {
        "activation": float(found["activation"]), "above_top_1_percent": float(found["above"]),
        "labelled": share, "n": int(found["n"]), "preferred": str(found["preferred"].values),
        "diversity": float(found["diversity"]),
    }  # fmt: skip


@dataclass
class Study:
    """The subject, its scenes and how images are made, in a folder."""

    args: argparse.Namespace
    folder: Path

    def prepare(self) -> None:
        """Render the scenes, fit the encoders and label the scenes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "options.json"
        weights = sorted(shipped_folder("small-clip").parent.rglob("*.safetensors"))
        options = {k: getattr(self.args, k) for k in OPTIONS}
        options["models"] = sha256_of([sha256_file(file) for file in weights])
        if record.exists():
            if json.loads(record.read_text(encoding="utf-8")) != options:
                raise SystemExit(f"The images in {self.folder} are of other options.")
            return
        scenes = render_scenes(self.args.scenes, seed=30_000, size=64)
        write_stimuli(
            self.scenes, [s.image for s in scenes], [s.stimulus_id for s in scenes],
            extra={"category": [s.category for s in scenes]}, overwrite=True,
        )  # fmt: skip
        args = self.args
        subject(read_stimuli(self.scenes), self.folder, args.guides, args.ranker, args.seed)
        label(
            self.scenes, "small-classifier", CATEGORIES, out=self.folder / "labels.nc",
            device="cpu", overwrite=True,
        )  # fmt: skip
        record.write_text(json.dumps(options), encoding="utf-8")

    @property
    def scenes(self) -> Path:
        """Folder of the natural images."""
        return self.folder / "scenes"

    @property
    def ranker(self) -> Path:
        """Folder of the encoder that ranks."""
        return self.folder / ("judge.zarr" if self.args.ranker == "judge" else "rank.zarr")

    def judged(
        self, name: str, target: dict[str, Any], ascent: bool = False, **changed: Any
    ) -> xr.Dataset:
        """Make images for a target and judge them; with `ascent`, also those of pixels alone."""
        args, place = self.args, self.folder / name
        guide = [self.folder / f"guide-{i}.zarr" for i in range(len(args.guides))]
        place.mkdir(exist_ok=True)
        common = {
            "rerank": self.ranker, "n_images": args.images if ascent else max(args.images // 2, 1),
            "keep": args.keep, "device": "cpu", "progress": False,
        }  # fmt: skip
        making = {
            **common, "steps": args.steps, "scheduler": "dpmsolver++", "scale": args.scale,
            "schedule": args.schedule, "sag_scale": 0.0, "batch_size": 10,
            "jitter": Jitter(args.copies) if args.copies else None,
        }  # fmt: skip
        sets = {"generated": place / "generated"}
        if not sets["generated"].exists():
            dive(guide, args.pipeline, out=sets["generated"], **target, **{**making, **changed})
        if ascent:
            sets["pixel ascent"] = place / "ascent"
            fewer = {**common, "n_images": args.ascents}
            if not sets["pixel ascent"].exists():
                ascend_pixels(guide, out=sets["pixel ascent"], size=64, **target, **fewer)
        return judge(
            sets, self.scenes, out=place / "judged.nc", encoder=self.folder / "judge.zarr",
            guiding=guide, device="cpu", labeller="small-classifier", labels=CATEGORIES,
            top=(20, 50), natural_labels=self.folder / "labels.nc", overwrite=True, **target,
        )  # fmt: skip

    def row(self, case: str) -> dict[str, Any]:
        """Measure one case."""
        torch.set_num_threads(self.args.threads)
        accuracy, more = CASES[case](self)
        checks = harness.checked(accuracy)
        shown = {k: (round(c["value"], 3), c["holds"]) for k, c in checks.items()}
        print(case, shown, flush=True)
        return {
            "case": case, "work": {k: getattr(self.args, k) for k in OPTIONS}, "accuracy": checks,
            **more, "passed": all(c["holds"] for c in checks.values()),
        }  # fmt: skip


Measured = tuple[dict[str, tuple[float, str, float]], dict[str, Any]]


def region(study: Study, roi: str) -> Measured:
    """Images for a region that prefers a category, and those of ascent on pixels alone."""
    wanted = PREFERS[roi]
    judged = study.judged(roi, {"roi": roi}, ascent=True)
    ours, pixels = told(judged, "generated", wanted), told(judged, "pixel ascent", wanted)
    line = float(judged.attrs["top_1_percent"])
    # As many scenes as images were kept, chosen by what chose the images, judged by the judge.
    ranker, judging = read_encoder(study.ranker), read_encoder(study.folder / "judge.zarr")
    by_ranker, _ = predict_target(
        ranker, Target(roi).weights([ranker]), read_stimuli(study.scenes), device="cpu"
    )
    alike = judged["natural_activation"].values[np.argsort(-by_ranker)[: ours["n"]]].mean()

    def best(kind: str) -> dict[str, float]:
        """Return what the judge makes of its own choice among all images of a set."""
        made = read_stimuli(study.folder / roi / kind)
        by_judge, _ = predict_target(judging, Target(roi).weights([judging]), made, device="cpu")
        chosen = np.argsort(-by_judge)[: max(1, round(study.args.keep * len(made)))]
        shown = made.select([made.ids[i] for i in chosen.tolist()])
        classifier = load_model("small-classifier", device="cpu")
        named = label_images(classifier, shown, CATEGORIES, device="cpu")
        share = float((named == wanted).mean())
        return {"activation": float(by_judge[chosen].mean()), "labelled": share}

    images, climbed = best("generated"), best("ascent")
    reached = climbed["activation"] >= line and climbed["labelled"] >= LABELLED
    accuracy = {
        "images of the judge's choice over the 99th percentile of scenes":
            (images["activation"] - line, ">=", 0.0),
        "images of the ranker's choice over as many scenes of its choice":
            (ours["activation"] - float(alike), ">=", 0.0),
        "labelled as planted": (min(ours["labelled"], images["labelled"]), ">=", LABELLED),
        "pixel ascent has activation and labels": (float(reached), "<=", 0.0),
    }  # fmt: skip
    return accuracy, {
        "generated": ours, "ascent": pixels, "natural": told(judged, "all natural", wanted),
        "best_natural": told(judged, "top 20 natural", wanted), "threshold": line,
        "scenes_of_ranker": float(alike), "images_of_judge": images, "ascent_of_judge": climbed,
        "ranker_over_99th_percentile": ours["activation"] - line,
    }  # fmt: skip


def contrast(study: Study, roi: str, against: str) -> Measured:
    """Images that drive one region and not another."""
    judged = study.judged(f"{roi} against {against}", {"roi": roi, "against": against})
    ours = told(judged, "generated", PREFERS[roi])
    rise = ours["activation"] - told(judged, "all natural")["activation"]
    return {
        "activation over all natural": (rise, ">=", 0.0),
        "labelled as planted": (ours["labelled"], ">=", LABELLED),
    }, {"generated": ours}  # fmt: skip


def clusters(study: Study) -> Measured:
    """Images for the two clusters of a region of two parts."""
    shares = []
    for k in range(2):
        judged = study.judged(f"mixed_{k}", {"roi": "mixed", "cluster": k, "n_clusters": 2})
        labelled = judged["share"].sel(set="generated")
        shares.append({p: float(labelled.sel(label=p)) for p in PARTS})
    one, other = PARTS
    smaller = max(min(shares[0][one], shares[1][other]), min(shares[0][other], shares[1][one]))
    return {"smaller share of its own category": (smaller, ">=", LABELLED)}, {"shares": shares}


def null(study: Study) -> Measured:
    """Images for a region without signal."""
    ours = told(study.judged("null", {"roi": "null"}), "generated")
    return {"labels preferred": (float(ours["preferred"] != ""), "<=", 0.0)}, {"generated": ours}


def scales(study: Study) -> Measured:
    """Activation of all images as the weight of the gradient grows."""
    curve = {}
    for factor in (0.0, 0.25, 0.5, 1.0):
        judged = study.judged(
            f"scale_{factor}", {"roi": "food"}, scale=factor * study.args.scale, keep=1.0,
        )  # fmt: skip
        curve[factor * study.args.scale] = told(judged, "generated", "food")
    steps = np.diff([c["activation"] for c in curve.values()])
    return {"smallest step": (float(steps.min()), ">=", 0.0)}, {"curve": curve}


def cut(study: Study) -> Measured:
    """What changes where the gradient ends before the UNet; nothing is claimed."""
    judged = study.judged("cut", {"roi": "food"}, through_unet=False)
    return {}, {"generated": told(judged, "generated", "food")}


CASES: dict[str, Callable[[Study], Measured]] = {
    **{f"{roi} prefers {wanted}": partial(region, roi=roi) for roi, wanted in PREFERS.items()},
    "EBA against PPA": partial(contrast, roi="EBA", against="PPA"),
    "PPA against EBA": partial(contrast, roi="PPA", against="EBA"),
    "two clusters of a region of two parts": clusters,
    "a region without signal": null,
    "activation rises with the scale": scales,
    "gradient that ends before the UNet": cut,
}


if __name__ == "__main__":
    main()
