"""Golden files of the Toeplitz position encoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from brainalign_kernels import MDTPE, TPE
from brainalign_kernels.golden.check import FLOAT32, FLOAT64, GRADIENT64, GoldenFile, Run

__all__ = ["md_tpe", "tpe"]

PATHS = ("reference", "compiled")


def tpe(file: GoldenFile) -> Iterator[Run]:
    """Check `TPE`, what enters its norm, and its state."""
    meta = file.meta
    for impl in PATHS:
        comparisons = []
        for dtype in (torch.float64, torch.float32):
            module = TPE(
                meta["embed_dim"],
                meta["num_heads"],
                bias=meta["bias"],
                norm=meta["norm"],
                norm_eps=meta["norm_eps"],
                impl=impl,
            ).to(dtype)
            module.load_state_dict(file.parameters(dtype))
            x = file.tensor("x", dtype, grad=True)
            mask = file.tensor("attention_mask") if "attention_mask" in file else None
            out = module(x, mask=mask)
            if dtype == torch.float32:
                comparisons.append(file.compare("out", out, FLOAT32))
                continue
            made, state = module.core(x, mask=mask)
            made = made.unflatten(-1, (meta["num_heads"], -1))
            keys = module.k.unflatten(0, (meta["num_heads"], -1))
            comparisons += [
                file.compare("out_float64", out, FLOAT64),
                file.compare("core.core", made, FLOAT64),
                file.compare("core.state", keys[:, :, None] * state[:, :, None], FLOAT64),
            ]
            inputs = {f"grad_param.{name}": p for name, p in module.named_parameters()}
            comparisons += file.gradients(out, "grad_out", {"grad_x": x, **inputs}, GRADIENT64)
        yield Run(impl, comparisons)


def md_tpe(file: GoldenFile) -> Iterator[Run]:
    """Check `MDTPE`."""
    meta = file.meta
    for impl in PATHS:
        comparisons = []
        for dtype, name, tolerance in (
            (torch.float64, "out_float64", FLOAT64), (torch.float32, "out", FLOAT32)
        ):  # fmt: skip
            module = MDTPE(
                meta["embed_dim"],
                meta["num_heads"],
                dims=meta["dims"],
                bias=meta["bias"],
                norm=meta["norm"],
                norm_eps=meta["norm_eps"],
                impl=impl,
            ).to(dtype)
            module.load_state_dict(file.parameters(dtype))
            x = file.tensor("x", dtype, grad=True)
            out = module(x)
            comparisons.append(file.compare(name, out, tolerance))
            if dtype == torch.float64:
                inputs = {f"grad_param.{n}": p for n, p in module.named_parameters()}
                inputs["grad_x"] = x
                comparisons += file.gradients(out, "grad_out", inputs, GRADIENT64)
        yield Run(impl, comparisons)
