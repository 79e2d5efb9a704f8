"""Train a very small timm network that tells the category of a scene, and only judges.

It shares no architecture, seed or scene with the models that guide a synthesis, so pictures that
merely exploit a guide do not fool it. The result is a folder that timm itself loads:
``timm.create_model("local-dir:FOLDER")``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainalign.data.store import atomic_dir
from brainalign.errors import ConfigError

from .scenes import CATEGORIES, render_scenes
from .training import (
    HELD_OUT_SEED,
    IMAGE_SIZE,
    KINDS,
    augment,
    check_held_out,
    check_run,
    common_options,
    fit,
    half_precision,
    options_parser,
    require,
    soften,
    stored_scenes,
)

if TYPE_CHECKING:
    import torch

__all__ = ["main", "measure", "model_card", "train_classifier"]

_ARCHITECTURE = "resnet10t"
_CHANNELS = [32, 64, 128, 256]
_MEAN, _STD = 0.5, 0.25


def _as_input(pictures: np.ndarray) -> torch.Tensor:
    import torch

    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - _MEAN) / _STD


def train_classifier(
    out_folder: Path | str,
    *,
    n_scenes: int = 8000,
    steps: int = 2000,
    seed: int = 13,
    device: str = "cpu",
    checkpoint: Path | str | None = None,
    scenes: Path | str | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    save_every: int = 100,
    stop_at: int | None = None,
    n_measure: int = 1200,
    overwrite: bool = False,
) -> Path | None:
    """Train the judge on scenes rendered on the spot and write it for timm.

    Minimises the cross-entropy of the scene's category over shifted, softened and noisy pictures.

    Parameters
    ----------
    out_folder : path
        Gets ``config.json`` (with ``label_names``), ``model.safetensors`` (float16),
        ``training.json`` and ``MODEL_CARD.md``.
    n_scenes, steps : int
        Scenes to learn from, and updates.
    seed : int
        Names the scenes and draws first weights and batches; below 10000.
    device : str
        Where torch computes.
    checkpoint : path, optional
        A folder for scenes and the state every `save_every` steps; training goes on from there.
    scenes : path, optional
        The folder for rendered scenes, where several runs share them; default `checkpoint`.
    batch_size : int
        Pictures per update.
    learning_rate : float
        Peak of the schedule.
    save_every : int
        Steps between two checkpoints.
    stop_at : int, optional
        Stop after this step and leave only the checkpoint.
    n_measure : int
        Held-out scenes for the model card.
    overwrite : bool
        Whether to replace `out_folder`.

    Returns
    -------
    Path or None
        `out_folder`; None where `stop_at` ended the run early.

    Raises
    ------
    ConfigError
        If numbers make no sense or the checkpoint belongs to other settings.
    """
    require("timm")
    import timm
    import torch
    from torch.nn.functional import cross_entropy

    out_folder = Path(out_folder)
    check_run(out_folder, seed, checkpoint, stop_at, overwrite)
    if n_scenes < batch_size or steps < 1:
        raise ConfigError(
            "Training needs n_scenes >= batch_size and steps >= 1; got "
            f"n_scenes={n_scenes}, batch_size={batch_size}, steps={steps}."
        )
    settings = {
        "architecture": _ARCHITECTURE, "channels": _CHANNELS, "n_scenes": n_scenes, "steps": steps,
        "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate,
    }  # fmt: skip
    folder = Path(checkpoint) if checkpoint else None
    images, _, kinds = stored_scenes(n_scenes, seed, Path(scenes) if scenes else folder)
    labels = torch.tensor([CATEGORIES.index(KINDS[k][0]) for k in kinds], device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            _ARCHITECTURE, num_classes=len(CATEGORIES), channels=_CHANNELS
        ).to(device)  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, step])
        shown = soften(_as_input(augment(images[chosen], rng)), rng).to(device)
        return cross_entropy(model(shown), labels[chosen], label_smoothing=0.05)

    done = fit(
        model, optimiser, loss_of, n_scenes, settings, folder, save_every=save_every,
        stop_at=stop_at, clip_norm=None,
    )  # fmt: skip
    if done < steps:
        return None
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(out_folder, overwrite=overwrite) as made:
        _write(model, made)
        record = {
            "settings": settings,
            "parameters": sum(p.numel() for p in model.parameters()),
            "measured": measure(made, n=n_measure),
        }
        (made / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (made / "MODEL_CARD.md").write_text(model_card(record), encoding="utf-8")
    return out_folder


def _write(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    config = {
        "architecture": _ARCHITECTURE, "model_args": {"channels": _CHANNELS},
        "num_classes": len(CATEGORIES),
        "num_features": model.num_features, "label_names": list(CATEGORIES),
        "pretrained_cfg": {
            "custom_load": False, "fixed_input_size": False,
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": [_MEAN] * 3, "std": [_STD] * 3, "num_classes": len(CATEGORIES),
            "first_conv": "conv1.0", "classifier": "fc",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(half_precision(model), folder / "model.safetensors", metadata={"format": "pt"})


def measure(folder: Path | str, *, n: int = 1200, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """Return how often the judge is right on held-out scenes, sharp and softened.

    Parameters
    ----------
    folder : path
        The model.
    n : int
        Number of scenes, of all categories in turn.
    seed : int
        Names the scenes; 10000 or more, as training never uses those.

    Returns
    -------
    dict
        ``correct`` and ``correct_soft`` (detail above half the resolution removed), shares in
        0..1; ``chance``; ``n``; ``by_category``.

    Raises
    ------
    ConfigError
        If `seed` is one that training may have used.
    """
    import torch
    from PIL import Image

    from brainalign.features import load_model

    check_held_out(seed)
    model = load_model(f"timm:local-dir:{folder}", device="cpu")
    scenes = render_scenes(n, seed=seed, size=96)
    truth = np.array([CATEGORIES.index(s.category) for s in scenes])

    def answers(soft: bool) -> np.ndarray:
        found = []
        for start in range(0, n, 64):
            shown = [Image.fromarray(s.image) for s in scenes[start : start + 64]]
            if soft:
                half = (IMAGE_SIZE // 2, IMAGE_SIZE // 2)
                shown = [p.resize(half, Image.Resampling.BOX) for p in shown]
            with torch.inference_mode():
                logits = model.module(torch.stack([model.transform(p) for p in shown]))
            found.append(logits.argmax(1).numpy())
        return np.concatenate(found)

    sharp = answers(False) == truth
    return {
        "correct": float(sharp.mean()), "correct_soft": float((answers(True) == truth).mean()),
        "chance": 1 / len(CATEGORIES), "n": n, "seed": seed,
        "by_category": {c: float(sharp[truth == i].mean()) for i, c in enumerate(CATEGORIES)},
    }  # fmt: skip


def model_card(record: dict[str, Any]) -> str:
    """Return the text of ``MODEL_CARD.md``: what the model is, how it was made, how good it is."""
    measured, settings = record["measured"], record["settings"]
    each = ", ".join(f"{c} {100 * v:.1f} %" for c, v in measured["by_category"].items())
    channels = ", ".join(str(c) for c in settings["channels"])
    return f"""# small-classifier

A very small classifier of six categories ({", ".join(CATEGORIES)}) that judges synthesised
pictures and guides none: `{settings["architecture"]}` of timm, {channels} channels,
{record["parameters"]:,} parameters, pictures of {IMAGE_SIZE} x {IMAGE_SIZE}.

```python
import timm

model = timm.create_model("local-dir:FOLDER")
```

`label_names` of `config.json` names the outputs.

## Training

{settings["n_scenes"]:,} scenes drawn by `brainalign.small_models.scenes` (seed
{settings["seed"]}; no other small model was trained on them), shifted, softened and noisy;
{settings["steps"]:,} steps of AdamW, batch {settings["batch_size"]}, peak rate
{settings["learning_rate"]:g}. Made by
`python -m brainalign.small_models.classifier`.

## Measured

On {measured["n"]:,} held-out scenes (seed {measured["seed"]}):
{100 * measured["correct"]:.1f} % right (chance {100 * measured["chance"]:.1f} %),
{100 * measured["correct_soft"]:.1f} % with detail above half the resolution removed. {each}.

## Limits

It has seen rendered scenes only.
"""


def main(arguments: list[str] | None = None) -> int:
    """Train from the command line; see ``--help``."""
    parser = options_parser(
        "classifier", "Train a very small classifier of rendered scenes.", scenes=8000,
        steps=2000, seed=13, measured=(1200, "held-out scenes of the card"),
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    out, common = common_options(parser, chosen)
    train_classifier(out, **common)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
