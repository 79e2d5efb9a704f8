"""The same with all Gaussians of a head in one, and heads of one length side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.gaussian import reference
from brainalign_kernels.gaussian.reference import chunks, statistics

__all__ = ["gaussian_adaptive_attention"]


def gaussian_adaptive_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    axis: int,
    padding_value: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.gaussian_adaptive_attention`; also the weights.

    A product of Gaussians is a Gaussian: its precision is the sum of the precisions, its centre
    their weighted mean.
    """
    if x.shape[axis] == 0:
        return reference.gaussian_adaptive_attention(
            x, mean_offsets, c, axis=axis, padding_value=padding_value, eps=eps
        )
    wide = accumulation_dtype(x.dtype)
    offsets, squares = mean_offsets.to(wide), c.to(wide).square()
    precision = squares.reciprocal().sum(dim=1)
    centre = (offsets / squares).sum(dim=1) / precision
    apart = offsets - centre[:, None]
    height = -0.5 * (2.0 * math.pi * squares).log().sum(dim=1)
    spread = (apart.square() / squares).sum(dim=1)
    heads, size = c.shape[0], x.shape[axis]
    lengths = chunks(size, heads)
    whole = 1 if lengths[0] != lengths[-1] else 0
    # Heads of one length are one view; a longer last head is a part of its own.
    groups = [slice(0, heads - whole), slice(heads - whole, heads)]
    sizes = [sum(lengths[g]) for g in groups]
    outs, weights = [], []
    for group, part in zip(groups, x.to(wide).split(sizes, dim=axis), strict=True):
        if part.shape[axis] == 0:
            continue
        count = len(lengths[group])
        cut = part.unflatten(axis, (count, lengths[group][0]))
        shape = [1] * cut.ndim
        shape[axis] = count
        padding = None if padding_value is None else cut == padding_value
        seen = cut if padding is None else cut.masked_fill(padding, 0.0)
        mean, deviation = statistics(seen, axis + 1, eps)
        z = (cut - (mean + centre[group].reshape(shape))) / deviation
        # spread is in units of the input, like the offsets.
        base = (
            height[group].reshape(shape) - 0.5 * spread[group].reshape(shape) / deviation.square()
        )
        weight = (base - 0.5 * precision[group].reshape(shape) * z.square()).exp()
        weight = weight / weight.sum(dim=axis + 1, keepdim=True).clamp_min(eps)
        out = cut * weight
        out = out if padding is None else torch.where(padding, cut, out)
        outs.append(out.flatten(axis, axis + 1))
        weights.append(weight.flatten(axis, axis + 1))
    return torch.cat(outs, dim=axis).to(x.dtype), torch.cat(weights, dim=axis).to(x.dtype)
