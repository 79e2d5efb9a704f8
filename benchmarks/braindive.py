"""Brain-guided sampling at the size of Stable Diffusion 2.1 base, with random weights.

On a CPU one guided step and its peak memory; on a GPU seconds per image and peak memory at 512
pixels and 50 steps, against the sum of the bare forward and backward passes that it is made of.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=4, use_linear_projection=True, **UNET[size]
        )
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2,
            block_out_channels=VAE[size], sample_size=512, scaling_factor=0.18215,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
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


class Timer:
    """Seconds and peak bytes of works, on a CPU or a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gib(self, work: Callable[[], Any]) -> float | None:
        """Peak of all that the process holds, weights included."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) / GIB
        held = harness._resident("VmRSS") / 2**20
        above = harness.peak_mib(work)
        return None if above is None else held + above / 1024


def bare_passes(pipe: Any, objective: Any, text: torch.Tensor, latents: torch.Tensor) -> dict:
    """Return the passes that a guided image is made of, written out without this package."""
    t = torch.tensor(500, device=latents.device)

    def guided_pass() -> None:
        with torch.enable_grad():
            z = latents.detach().requires_grad_()
            eps = pipe.unet(z, t, text, return_dict=False)[0]
            x0 = (z - 0.7 * eps) / 0.7
            image = pipe.vae.decode((0.7 * x0 + 0.3 * z) / 0.18215, return_dict=False)[0]
            value = objective((image.float() / 2 + 0.5).clamp(0, 1)).sum()
            torch.autograd.grad(value, z)

    def second_pass() -> None:
        with torch.no_grad():
            pipe.unet(latents, t, text, return_dict=False)

    def decode() -> None:
        with torch.no_grad():
            pipe.vae.decode(latents / 0.18215, return_dict=False)

    return {"guided": guided_pass, "second": second_pass, "decode": decode}


def measure(args: argparse.Namespace, device: torch.device, *, checkpointing: bool) -> dict:
    """Measure one way of running."""
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
    guidance = Guidance(130.0, 0.75, gradient_checkpointing=checkpointing)

    def image(n: int = steps) -> None:
        with guided(pipe, objective, guidance):
            pipe(prompt_embeds=text, latents=latents.clone(), num_inference_steps=n,
                 guidance_scale=1.0, output_type="pt")  # fmt: skip

    timer = Timer(device)
    if gpu:
        image(2)
    peak = timer.peak_gib(lambda: image(min(steps, 2) if gpu else 1))
    repeats = args.repeats if gpu else 1
    seconds = timer(image, 2 if gpu else 1)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    passes = bare_passes(pipe, objective, text, latents)
    if gpu:
        for work in passes.values():
            work()
    bare = {name: timer(work, repeats) for name, work in passes.items()}
    total = steps * (bare["guided"] + bare["second"]) + bare["decode"]
    bounds = {"guided over bare passes": (seconds / total, "<=", MOST_RATIO)}
    if peak is not None:
        bounds["peak GiB"] = (peak, "<=", GPU_GIB if gpu else CPU_GIB)
    checks = harness.checked(bounds)
    kept = "checkpointing" if checkpointing else "activations kept"
    return {
        "case": f"{args.size}, {8 * side} pixels, {steps} steps, {kept}, {device.type}",
        "work": {"precision": str(dtype), "steps": steps, "batch": 1, "scheduler": "DPM-Solver++",
                 "sag_scale": 0.75, "weights": "random"},
        "seconds_per_image": seconds,
        "bare_seconds": bare,
        "bare_seconds_in_all": total,
        "accuracy": checks,
        "passed": all(c["holds"] for c in checks.values()),
    }  # fmt: skip


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
    rows = [measure(args, device, checkpointing=way) for way in ways]
    name = f"braindive_{device.type}"
    raise SystemExit(not harness.record(name, rows, args.out, device=args.device))


if __name__ == "__main__":
    main()
