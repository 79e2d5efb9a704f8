"""What the trainers of small models share: scenes, order, schedule, going on after a stop."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brainalign.data.store import atomic_file
from brainalign.errors import ConfigError, MissingDependencyError

from .scenes import CATEGORIES, SUBCATEGORIES, captions, render_scene

__all__ = [
    "CAPTIONS",
    "HELD_OUT_SEED",
    "IMAGE_SIZE",
    "KINDS",
    "augment",
    "batches",
    "load_state",
    "require",
    "save_state",
    "schedule",
    "stored_scenes",
]

#: Every category with each of its sub-categories.
KINDS = [(c, k) for c in CATEGORIES for k in SUBCATEGORIES[c]]
#: Side of the pictures that the small models see, in pixels.
IMAGE_SIZE = 64
#: Captions of each scene of training.
CAPTIONS = 12
#: Training seeds stay below, measuring seeds above.
HELD_OUT_SEED = 10_000
_RENDER_SIZES = (64, 96, 128)  # a model must not depend on the size its pictures were made in


def require(*modules: str) -> None:
    """Raise where one of `modules` is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"The package {name} is not installed.",
                'Install it with: pip install "brainalign[features]"',
            )


def _draw(n: int, seed: int) -> tuple[np.ndarray, list[list[str]], list[int]]:
    """Return pictures (n, side, side, 3) uint8, `CAPTIONS` captions and the kind of each."""
    from PIL import Image
    from tqdm import tqdm

    images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    texts, kinds = [], []
    for i in tqdm(range(n), desc="render", disable=None):
        # Divided by the number of categories, or each category would have but one size.
        size = _RENDER_SIZES[(i // len(CATEGORIES)) % len(_RENDER_SIZES)]
        scene = render_scene(i, seed=seed, size=size)
        picture = Image.fromarray(scene.image)
        if size != IMAGE_SIZE:
            picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        images[i] = np.asarray(picture)
        texts.append([scene.caption, *captions(scene, CAPTIONS - 1, seed=seed)])
        kinds.append(KINDS.index((scene.category, scene.subcategory)))
    return images, texts, kinds


def stored_scenes(
    n: int, seed: int, folder: Path | None
) -> tuple[np.ndarray, list[list[str]], list[int]]:
    """Render the scenes, or read those an earlier run left in `folder`."""
    if folder is None:
        return _draw(n, seed)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, texts = folder / "scenes.npy", folder / "captions.json"
    about = {"n": n, "seed": seed}
    if texts.exists():  # written last
        saved = json.loads(texts.read_text(encoding="utf-8"))
        images = np.load(pictures, allow_pickle=False)
        probe = min(n, 3 * len(CATEGORIES))
        # Rendering a few again shows whether the renderer is still the one that made the rest.
        if saved["about"] == about and np.array_equal(_draw(probe, seed)[0], images[:probe]):
            return images, saved["captions"], saved["kinds"]
        raise ConfigError(
            f"The scenes in {folder} are not those of n_scenes={n} and seed={seed}, or the "
            "renderer has changed since.",
            "Remove that folder to begin anew.",
        )
    images, said, kinds = _draw(n, seed)
    with atomic_file(pictures) as made:
        np.save(made, images, allow_pickle=False)
    with atomic_file(texts) as made:
        made.write_text(json.dumps({"about": about, "captions": said, "kinds": kinds}))
    return images, said, kinds


def batches(
    n: int, size: int, seed: int, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (step, indices): a new order each epoch, the same whenever training resumes."""
    per_epoch = n // size
    epoch, order = -1, np.arange(0)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, 1, epoch]).permutation(n)
        k = step % per_epoch
        yield step, order[k * size : (k + 1) * size]


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each picture by up to 4 pixels and vary its brightness and contrast a little."""
    pad = 4
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    side = images.shape[1]
    offsets = rng.integers(0, 2 * pad + 1, (len(images), 2))
    moved = np.stack(
        [p[y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets, strict=True)]
    ).astype(np.float32)
    gain = rng.uniform(0.85, 1.15, (len(images), 1, 1, 1)).astype(np.float32)
    bias = rng.uniform(-12, 12, (len(images), 1, 1, 1)).astype(np.float32)
    return np.clip(moved * gain + bias, 0, 255)


def schedule(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up to `peak`, then a cosine to a hundredth of it."""
    warm = min(100, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def save_state(
    folder: Path, model: Any, optimiser: Any, step: int, settings: dict[str, Any]
) -> None:
    """Write weights and the optimiser's state after `step` updates, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}.{key}"] = value.detach().cpu().contiguous()
    about = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    with atomic_file(folder / "state.safetensors") as made:
        save_file(tensors, made, metadata=about)


def load_state(folder: Path, model: Any, optimiser: Any, settings: dict[str, Any]) -> int:
    """Put the saved state back and return the step it stands at, 0 where there is none."""
    from safetensors import safe_open

    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as saved:
        about = saved.metadata()
        if json.loads(about["settings"]) != settings:
            raise ConfigError(
                f"The checkpoint {path} was made with other settings: {about['settings']}.",
                "Train with those, or remove the checkpoint.",
            )
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        state = {
            key: tensors[f"optimiser.{name}.{key}"].to(parameter.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimiser.{name}.{key}" in tensors
        }
        if state:
            optimiser.state[parameter] = state
    return int(about["step"])
