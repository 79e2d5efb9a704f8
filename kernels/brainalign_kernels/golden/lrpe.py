"""Golden files of the linearised relative position encoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from brainalign_kernels import lrpe as encode
from brainalign_kernels import md_lrpe as encode_axes
from brainalign_kernels.golden.check import FLOAT32, FLOAT64, GRADIENT64, GoldenFile, Run

__all__ = ["lrpe_1d", "md_lrpe"]


def md_lrpe(file: GoldenFile) -> Iterator[Run]:
    """Check `md_lrpe`."""
    meta, comparisons = file.meta, []
    for dtype, name, tolerance in (
        (torch.float64, "out_float64", FLOAT64), (torch.float32, "out", FLOAT32)
    ):  # fmt: skip
        x, theta = (file.tensor(n, dtype, grad=True) for n in ("x", "theta"))
        out = encode_axes(
            x,
            theta,
            meta["shape"],
            text_tokens=meta["l"],
            act=meta["act"],
            act_dim=meta["act_dim"],
        )
        comparisons.append(file.compare(name, out, tolerance))
        if dtype == torch.float64:
            inputs = {"grad_x": x, "grad_theta": theta}
            comparisons += file.gradients(out, "grad_out", inputs, GRADIENT64)
    yield Run("reference", comparisons)


def lrpe_1d(file: GoldenFile) -> Iterator[Run]:
    """Check `lrpe`; stored as (B, N, H, D), or (B, N, D) without heads."""
    meta, comparisons = file.meta, []
    for dtype, name, tolerance in (
        (torch.float64, "out_float64", FLOAT64), (torch.float32, "out", FLOAT32)
    ):  # fmt: skip
        x, theta = (file.tensor(n, dtype, grad=True) for n in ("x", "theta"))
        heads = x if x.ndim == 4 else x[:, :, None]
        act_dim = meta["act_dim"]
        if act_dim is not None:
            act_dim = {3: (0, 2, 3), 4: (0, 2, 1, 3)}[x.ndim][act_dim]
        out = encode(
            heads.transpose(1, 2),
            theta,
            kind=meta["kind"],
            offset=meta["offset"],
            act=meta["act"],
            act_dim=act_dim,
        ).transpose(1, 2)
        out = out if x.ndim == 4 else out[:, :, 0]
        comparisons.append(file.compare(name, out, tolerance))
        if dtype == torch.float64:
            inputs = {"grad_x": x, "grad_theta": theta}
            comparisons += file.gradients(out, "grad_out", inputs, GRADIENT64)
    yield Run("reference", comparisons)
