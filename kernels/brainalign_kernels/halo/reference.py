"""Halo attention as dense attention over the padded map: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["halo_attention"]


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    block_size: int,
    halo_size: int,
    stride: int,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    scale: float,
    scale_pos: bool,
) -> Tensor:
    """See `brainalign_kernels.halo_attention`."""
    kept, wide = q.dtype, accumulation_dtype(q.dtype)
    k, v = expand_heads(q, k, v)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    h, w = shape
    padding = (0, 0, halo_size, halo_size, halo_size, halo_size)
    k, v = (pad(x.unflatten(2, shape), padding).flatten(2, 3) for x in (k, v))
    logits = scale * (q @ k.transpose(-1, -2))
    window, side = block_size + 2 * halo_size, block_size // stride
    allowed = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    tables = (height_rel, width_rel)
    for axis, (queries, keys) in enumerate(
        zip(_positions(h // stride, w // stride, q), _positions(*_padded(shape, halo_size), q),
            strict=True)
    ):  # fmt: skip
        in_window = keys[None, :] - block_size * (queries // side)[:, None]
        allowed = allowed & (in_window >= 0) & (in_window < window)
        table = tables[axis]
        if table is not None:
            offset = in_window - (queries % side)[:, None] + window - 1
            index = offset.clamp(0, 2 * window - 2).expand(*q.shape[:2], -1, -1)
            logits = logits + (scale if scale_pos else 1.0) * torch.gather(
                q @ table.to(wide).T, -1, index
            )
    return (masked_softmax(logits, allowed) @ v).to(kept)


def _padded(shape: tuple[int, int], halo: int) -> tuple[int, int]:
    return shape[0] + 2 * halo, shape[1] + 2 * halo


def _positions(h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every token of a map."""
    token = torch.arange(h * w, device=like.device)
    return token // max(w, 1), token % max(w, 1)
