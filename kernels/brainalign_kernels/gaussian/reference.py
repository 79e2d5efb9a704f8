"""Gaussian adaptive attention, Gaussian by Gaussian and head by head: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["chunks", "gaussian_adaptive_attention", "statistics"]


def chunks(size: int, heads: int) -> list[int]:
    """Lengths of the heads' parts of an axis; the last takes the remainder."""
    return [size // heads] * (heads - 1) + [size - (heads - 1) * (size // heads)]


def statistics(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; one entry has variance zero."""
    mean = x.mean(dim=axis, keepdim=True)
    if x.shape[axis] > 1 and x.numel() > 0:
        variance = x.var(dim=axis, keepdim=True)
    else:
        variance = torch.zeros_like(mean)
    return mean, (variance + eps).sqrt()


def gaussian_adaptive_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    axis: int,
    padding_value: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.gaussian_adaptive_attention`; also the weights."""
    wide = accumulation_dtype(x.dtype)
    outs, weights = [], []
    parts = x.to(wide).split(chunks(x.shape[axis], c.shape[0]), dim=axis)
    for part, offsets, widths in zip(parts, mean_offsets.to(wide), c.to(wide), strict=True):
        padding = None if padding_value is None else part == padding_value
        seen = part if padding is None else part.masked_fill(padding, 0.0)
        mean, deviation = statistics(seen, axis, eps)
        weight = torch.ones_like(part)
        for offset, width in zip(offsets, widths, strict=True):
            z = (part - (mean + offset)) / deviation
            square = width.square()
            weight = weight * (-z.square() / (2.0 * square)).exp() / (2.0 * math.pi * square).sqrt()
        weight = weight / weight.sum(dim=axis, keepdim=True).clamp_min(eps)
        out = part * weight
        outs.append(out if padding is None else torch.where(padding, part, out))
        weights.append(weight)
    return torch.cat(outs, dim=axis).to(x.dtype), torch.cat(weights, dim=axis).to(x.dtype)
