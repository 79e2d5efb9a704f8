"""The probe by gradient descent with its published settings, beside ridge, on a simulated subject.

Responses follow unit embeddings of the small CLIP model; both encoders are fitted to the same
scenes and predict the same other ones. No times: this script measures held-out correlations.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import xarray as xr
from braindive_truth import EACH, PREFERS, neuroids_of

from brainalign.data.simulate import simulate
from brainalign.data.stimuli import StimulusSet, read_stimuli, write_stimuli
from brainalign.encoding import AdamWProbe, fit_encoder, fit_probe, predict
from brainalign.features import extract, load_model
from brainalign.small_models.scenes import render_scenes

SCENES = {"full": (900, 600), "small": (90, 60)}
EPOCHS = {"full": 100, "small": 2}
#: At most this much less of the held-out correlation than ridge has.
MOST_LOSS = 0.05


def subject(stimuli: StimulusSet, features: xr.Dataset, seed: int) -> xr.Dataset:
    """Return responses of regions that prefer a category each."""
    roi = [r for r in PREFERS for _ in range(EACH)]
    return simulate(
        features, category=stimuli.index["category"].values, neuroids=neuroids_of(roi),
        preference=PREFERS, ncsnr=(0.6, 1.2), seed=seed,
    ).responses  # fmt: skip


def measure(args: Any, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Fit both encoders to the same scenes and predict the others."""
    n, n_train = SCENES[args.size]
    scenes = render_scenes(n, seed=30_000, size=64)
    write_stimuli(
        folder / "scenes", [s.image for s in scenes], [s.stimulus_id for s in scenes],
        extra={"category": [s.category for s in scenes]},
    )  # fmt: skip
    stimuli = read_stimuli(folder / "scenes")
    model = load_model("small-clip", device="cpu")
    features = extract(model, stimuli, "output", pooling="unit", device="cpu")["output"].load()
    responses = subject(stimuli, features, seed)
    order = np.random.default_rng(seed).permutation(n)
    ids = np.array(stimuli.ids)
    train, held = set(ids[order[:n_train]].tolist()), ids[order[n_train:]].tolist()
    shown = responses["stimulus_id"].values.astype(str)
    fitted = responses.isel(presentation=np.isin(shown, list(train)))
    measured = (
        responses["responses"].groupby("stimulus_id").mean("presentation").sel(stimulus_id=held)
    ).values

    def correlation(predicted: np.ndarray) -> float:
        a, b = (x - x.mean(0) for x in (np.asarray(predicted, dtype=np.float64), measured))
        r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
        return float(r.mean())

    rows_of = {i: k for k, i in enumerate(stimuli.ids)}
    there = features.isel(stimulus=[rows_of[i] for i in held])
    training = {"n_epochs": EPOCHS[args.size], "seed": seed, "device": "cpu"}
    ridge = fit_encoder(
        features, fitted, stimuli="seen", alphas=np.logspace(-2, 5, 15).tolist(), device="cpu"
    )
    probe = fit_probe(model, stimuli, fitted, layer="output", pooling="unit", **training)
    names = sorted(train)
    plain = AdamWProbe(**training).fit(
        features["features"].values[[rows_of[i] for i in names]],
        responses["responses"].groupby("stimulus_id").mean("presentation")
        .sel(stimulus_id=names).values,
    )  # fmt: skip
    r = {
        "ridge": correlation(predict(ridge, there).values),
        "probe": correlation(predict(probe, there).values),
        "probe on images that were not augmented": correlation(
            plain.predict(there["features"].values)
        ),
    }
    checks = harness.checked({"held-out r of ridge minus that of the probe":
                              (r["ridge"] - r["probe"], "<=", MOST_LOSS)})  # fmt: skip
    return [
        {
            "case": f"{n_train} scenes, {n - n_train} held out, {EACH * len(PREFERS)} neuroids",
            "work": {"model": "small-clip", "layer": "output", "pooling": "unit",
                     "n_epochs": training["n_epochs"], "seed": seed},
            "measured": {f"r of the {name}": value for name, value in r.items()},
            "accuracy": checks,
            "passed": all(c["holds"] for c in checks.values()),
        }
    ]  # fmt: skip


def main() -> None:
    """Measure and record."""
    args = harness.arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    raise SystemExit(not harness.record("probe", rows, args.out))


if __name__ == "__main__":
    main()
