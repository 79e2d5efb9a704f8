"""Brain-guided sampling at the size of Stable Diffusion 2.1 base, with random weights.

On a CPU one guided step and its peak memory; on a GPU seconds per image and peak memory at 512
pixels and 50 steps, against the sum of the bare forward and backward passes that it is made of.
Each with the gradient through the UNet and with one that ends before it, and the cosine between the
two gradients: with random weights that says what the script does, not what a trained UNet would.
On a GPU also what torch's deterministic algorithms cost, with which `dive` samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import xarray as xr
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from brainalign.device import Repeatable
from brainalign.features import load_model
from brainalign.synthesis import Guidance, ImageEncoder, guided

GIB = 2**30
CPU_GIB, GPU_GIB, MOST_RATIO = 20, 24, 1.15
STEPS = 50
# Of stabilityai/stable-diffusion-2-1-base; "small" has its structure with a tenth of the width.
UNET = {
    "full": {
        "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024, "sample_size": 64,
    },
    "small": {
        "block_out_channels": (32, 64, 128, 128), "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": 64, "sample_size": 16,
    },
}  # fmt: skip
VAE = {"full": (128, 256, 512, 512), "small": (32, 32, 64, 64)}
TEXT = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16},
    "small": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2},
}  # fmt: skip


def build(size: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Return the pipeline and the objective."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            unet = UNet2DConditionModel(
                in_channels=4, out_channels=4, use_linear_projection=True, **UNET[size]
            )
            vae = AutoencoderKL(
                in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2,
                block_out_channels=VAE[size], sample_size=512, scaling_factor=0.18215,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
            text = CLIPTextModel(
                CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, hidden_act="gelu",
                               **TEXT[size])
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085,
        beta_end=0.012, steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    name = "random:open_clip:ViT-B-16" if size == "full" else "small-clip"
    model = load_model(name, device="cpu")
    n, width = 1000, model.traced["output"].shape[0]
    rng = np.random.default_rng(0)
    encoder = xr.Dataset(
        {
            "weights": (("neuroid", "feature"), rng.standard_normal((n, width)) / width**0.5),
            "intercept": ("neuroid", np.zeros(n)), "alpha": ("neuroid", np.ones(n)),
            "feature_mean": ("feature", np.zeros(width)),
            "feature_scale": ("feature", np.ones(width)),
        },
        coords={
            "model": model.name, "layer": "output",
            "neuroid_id": ("neuroid", [str(i) for i in range(n)]),
            "roi": ("neuroid", ["FFA"] * n), "hemisphere": ("neuroid", ["L"] * n),
        },
        attrs={"pooling": "unit"},
    )  # fmt: skip
    module = ImageEncoder(
        encoder, [np.full(n, 1 / n)], models={model.name: model}, interpolation="bilinear",
        device=device,
    )  # fmt: skip
    return pipe.to(device), module.objective


def peak_gib(work: Callable[[], Any], device: torch.device) -> float | None:
    """Peak of all that the process, or the GPU, holds; weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / GIB
    held = harness._resident("VmRSS") / 2**20
    above = harness.peak_mib(work)
    return None if above is None else held + above / 1024


def bare_passes(pipe: Any, objective: Any, text: torch.Tensor, latents: torch.Tensor) -> dict:
    """Return the passes that a guided image is made of, written out without this package."""
    t = torch.tensor(500, device=latents.device)

    def guided_pass(*, through_unet: bool) -> torch.Tensor:
        with torch.enable_grad():
            z = latents.detach().requires_grad_()
            with torch.set_grad_enabled(through_unet):
                eps = pipe.unet(z, t, text, return_dict=False)[0]
            x0 = (z - 0.7 * eps) / 0.7
            image = pipe.vae.decode((0.7 * x0 + 0.3 * z) / 0.18215, return_dict=False)[0]
            value = objective((image.float() / 2 + 0.5).clamp(0, 1)).sum()
            return torch.autograd.grad(value, z)[0]

    def second_pass() -> None:
        with torch.no_grad():
            pipe.unet(latents, t, text, return_dict=False)

    def decode() -> None:
        with torch.no_grad():
            pipe.vae.decode(latents / 0.18215, return_dict=False)

    guided_passes = {way: partial(guided_pass, through_unet=way) for way in (True, False)}
    return {**guided_passes, "second": second_pass, "decode": decode}


def measure(args: argparse.Namespace, device: torch.device, *, checkpointing: bool) -> list[dict]:
    """Measure one way of keeping activations, with the gradient through the UNet and without."""
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    steps = args.steps or (STEPS if gpu else 1)
    pipe, objective = build(args.size, dtype, device)
    with torch.no_grad():
        tokens = torch.full((1, 77), 49407, device=device)
        text = pipe.text_encoder(tokens)[0].to(dtype)
    side = pipe.unet.config.sample_size
    drawn = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(0))
    latents = drawn.to(device, dtype)

    def image(through_unet: bool, n: int = steps) -> None:
        guidance = Guidance(
            130.0, 0.75, through_unet=through_unet, gradient_checkpointing=checkpointing
        )
        with guided(pipe, objective, guidance):
            pipe(prompt_embeds=text, latents=latents.clone(), num_inference_steps=n,
                 guidance_scale=1.0, output_type="pt")  # fmt: skip

    def timed(works: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
        found = harness.median_times(works, repeats, device, warm=False)
        return {name: times["median_s"] for name, times in found.items()}

    # One guided step of the full size takes minutes on a CPU.
    repeats = args.repeats if gpu or args.size == "small" else 1
    peaks = {}
    for way in (True, False):
        if gpu:
            image(way, 2)
        peaks[way] = peak_gib(partial(image, way, min(steps, 2) if gpu else 1), device)
    images: dict[Any, Callable[[], Any]] = {way: partial(image, way) for way in (True, False)}
    repeatable = Repeatable()
    if gpu:
        repeatable(partial(image, True, 2))
        images["deterministic"] = lambda: repeatable(images[True])
    seconds = timed(images, 2 if gpu else repeats)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    passes = bare_passes(pipe, objective, text, latents)
    gradients = {way: passes[way]().double().flatten() for way in (True, False)}
    if gpu:
        for name in ("second", "decode"):
            passes[name]()
    bare = timed(passes, repeats)
    cosine = torch.cosine_similarity(gradients[True], gradients[False], dim=0).item()
    kept = "checkpointing" if checkpointing else "activations kept"
    rows = []
    for way, ends in ((True, ""), (False, ", gradient ends before the UNet")):
        total = steps * (bare[way] + bare["second"]) + bare["decode"]
        bounds = {"guided over bare passes": (seconds[way] / total, "<=", MOST_RATIO)}
        if peaks[way] is not None:
            bounds["peak GiB"] = (peaks[way], "<=", GPU_GIB if gpu else CPU_GIB)
        measured = {}
        if way and gpu:
            measured["time with deterministic algorithms over that without"] = (
                seconds["deterministic"] / seconds[True]
            )
            measured["every operation has a deterministic algorithm"] = float(repeatable.strict)
        if not way:
            measured["cosine with the gradient through the UNet"] = cosine
            over = seconds[False] / seconds[True]
            bounds["time over that of the gradient through the UNet"] = (over, "<=", 1.0)
        rows.append(
            {
                "case": f"{args.size}, {8 * side} pixels, {steps} steps, {kept}, {device.type}"
                + ends,
                "work": {"precision": str(dtype), "steps": steps, "batch": 1,
                         "scheduler": "DPM-Solver++", "sag_scale": 0.75, "weights": "random",
                         "through_unet": way},
                "peer": "bare passes",
                "times": {"ours": {"median_s": seconds[way]}, "bare passes": {"median_s": total}},
                "ratio": total / seconds[way],
                "bare_seconds": {
                    "guided": bare[way], "second": bare["second"], "decode": bare["decode"]
                },
                "measured": measured,
                "accuracy": (checks := harness.checked(bounds)),
                "passed": all(c["holds"] for c in checks.values()),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=harness.REPEATS)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a trial")
    parser.add_argument("--steps", type=int, default=0, help="by default 1 on a CPU, 50 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    # On a CPU kept activations of the full size do not fit into the bound.
    ways = (False, True) if device.type == "cuda" or args.size == "small" else (True,)
    rows = [row for way in ways for row in measure(args, device, checkpointing=way)]
    name = f"braindive_{device.type}"
    raise SystemExit(not harness.record(name, rows, args.out, device=args.device))


if __name__ == "__main__":
    main()
