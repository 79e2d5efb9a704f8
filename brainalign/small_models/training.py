"""What the trainers of small models share: scenes, order, schedule, going on after a stop."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainalign.data.store import atomic_file
from brainalign.errors import ConfigError, MissingDependencyError

from .scenes import CATEGORIES, SUBCATEGORIES, captions, render_scene

if TYPE_CHECKING:
    import torch

__all__ = [
    "CAPTIONS",
    "HELD_OUT_SEED",
    "IMAGE_SIZE",
    "KINDS",
    "augment",
    "check_held_out",
    "check_run",
    "common_options",
    "fit",
    "half_precision",
    "options_parser",
    "require",
    "soften",
    "stored_scenes",
]

log = logging.getLogger(__name__)

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


def check_run(
    out_folder: Path, seed: int, checkpoint: Path | str | None, stop_at: int | None, overwrite: bool
) -> None:
    """Refuse a run before its work: seeds kept for measuring, no checkpoint, a taken folder."""
    if not 0 <= seed < HELD_OUT_SEED:
        raise ConfigError(
            f"The seed of training must lie in 0..{HELD_OUT_SEED - 1}, got {seed}: seeds from "
            f"{HELD_OUT_SEED} on are kept for held-out scenes."
        )
    if stop_at is not None and checkpoint is None:
        raise ConfigError("stop_at leaves only a checkpoint, and no checkpoint folder was given.")
    if out_folder.exists() and not overwrite and stop_at is None:
        raise ConfigError(f"{out_folder} exists.", "Give another folder, or ask to overwrite it.")


def check_held_out(seed: int) -> None:
    """Refuse to measure on scenes that a model may have been trained on."""
    if seed < HELD_OUT_SEED:
        raise ConfigError(f"Seed {seed} may have been trained on; use {HELD_OUT_SEED} or more.")


def half_precision(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's state as it is shipped: floating point as float16."""
    import torch

    return {
        k: v.detach().cpu().to(torch.float16 if v.is_floating_point() else v.dtype).contiguous()
        for k, v in model.state_dict().items()
    }


def options_parser(
    module: str, description: str, *, scenes: int, steps: int, seed: int, measured: tuple[int, str]
) -> argparse.ArgumentParser:
    """Return a parser of the options that all trainers have, with one trainer's defaults.

    `measured` is the default and the help of ``--measure``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m brainalign.small_models.{module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder of the model")
    parser.add_argument("--scenes", type=int, default=scenes, help="scenes to learn from")
    parser.add_argument("--steps", type=int, default=steps, help="updates")
    parser.add_argument(
        "--seed", type=int, default=seed, help="names the scenes and draws the batches"
    )
    parser.add_argument("--device", default="cpu", help="where torch computes")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from if cut off")
    parser.add_argument("--scenes-folder", type=Path, help="rendered scenes, for several runs")
    parser.add_argument("--measure", type=int, default=measured[0], help=measured[1])
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser


def common_options(
    parser: argparse.ArgumentParser, chosen: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Set up log and threads; return the folder of the model and what all trainers are given."""
    if chosen.out is None:
        parser.error("--out is required")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    torch.set_num_threads(chosen.threads)
    return chosen.out, {
        "n_scenes": chosen.scenes, "steps": chosen.steps, "seed": chosen.seed,
        "device": chosen.device, "checkpoint": chosen.checkpoint, "scenes": chosen.scenes_folder,
        "n_measure": chosen.measure, "overwrite": chosen.overwrite,
    }  # fmt: skip


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


def _batches(
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


def soften(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Take the detail from some pictures and add noise to all, as drawn ones are soft.

    Parameters
    ----------
    pictures : Tensor, shape (picture, 3, side, side)
        Standardised; changed in place.
    rng : Generator
        Draws which, how much, and the noise.
    """
    import torch
    from torch.nn.functional import interpolate

    side = pictures.shape[-1]
    soft = rng.random(len(pictures)) < 0.4
    if soft.any():
        small = interpolate(pictures[soft], size=int(rng.integers(24, 49)), mode="area")
        pictures[soft] = interpolate(small, size=side, mode="bilinear", align_corners=False)
    amount = torch.from_numpy(rng.uniform(0, 0.2, (len(pictures), 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(tuple(pictures.shape), dtype=np.float32))
    return pictures + amount * noise


def _schedule(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up to `peak`, then a cosine to a hundredth of it."""
    warm = min(100, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def _save_state(
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


def _load_state(folder: Path, model: Any, optimiser: Any, settings: dict[str, Any]) -> int:
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


def fit(
    model: Any,
    optimiser: Any,
    loss_of: Callable[[int, np.ndarray], torch.Tensor],
    n: int,
    settings: dict[str, Any],
    folder: Path | None,
    *,
    name: str = "train",
    save_every: int,
    stop_at: int | None = None,
    clip_norm: float | None = 1.0,
    after_step: Callable[[], None] | None = None,
) -> int:
    """Minimise a loss over scenes, going on from a checkpoint of the same settings.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained and saved; switched to training, and back at the end.
    optimiser : torch.optim.Optimizer
        Its rate warms up and falls as a cosine, up to ``settings["learning_rate"]``.
    loss_of : callable
        Takes the step and the indices of its scenes, returns the loss.
    n : int
        Number of scenes.
    settings : dict
        ``steps``, ``batch_size``, ``learning_rate``, ``seed``, and all else that a checkpoint must
        agree with.
    folder : Path or None
        Of the checkpoint, written every `save_every` steps.
    name : str
        For the progress bar and the log.
    save_every : int
        Steps between two checkpoints.
    stop_at : int, optional
        Stop after this step.
    clip_norm : float, optional
        Largest norm of the gradient; None leaves it as it is.
    after_step : callable, optional
        Called after every update.

    Returns
    -------
    int
        The step that has been reached.

    Raises
    ------
    ConfigError
        If the checkpoint was made with other settings.
    """
    import torch
    from tqdm import tqdm

    steps, peak = settings["steps"], settings["learning_rate"]
    first = _load_state(folder, model, optimiser, settings) if folder else 0
    last = steps if stop_at is None else min(steps, stop_at)
    model.train()
    progress = tqdm(total=steps, initial=first, desc=name, disable=None)
    for step, chosen in _batches(n, settings["batch_size"], settings["seed"], first, last):
        for group in optimiser.param_groups:
            group["lr"] = _schedule(step, steps, peak)
        loss = loss_of(step, chosen)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimiser.step()
        if after_step is not None:
            after_step()
        progress.update()
        if step % 50 == 0:
            log.info("%s: step %d loss %.4f", name, step, loss.item())
        if folder and ((step + 1) % save_every == 0 or step + 1 == last):
            folder.mkdir(parents=True, exist_ok=True)
            _save_state(folder, model, optimiser, step + 1, settings)
    progress.close()
    model.eval()
    done = max(first, last)
    if done < steps:
        log.info("%s: stopped at step %d of %d", name, done, steps)
    return done
