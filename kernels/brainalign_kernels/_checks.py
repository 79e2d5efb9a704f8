"""Checks at the door, shared by all operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainalign_kernels.errors import ShapeError

__all__ = ["accumulation_dtype", "check_mask", "check_qkv", "default_scale", "expand_heads"]


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, same_length: bool = False) -> None:
    """Refuse what is not q (B, H, N, D), k (B, G, S, D), v (B, G, S, E), with H a multiple of G."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(
            f"Expected q, k, v of shape (batch, heads, tokens, channels); got {shapes}."
        )
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ShapeError(
            f"q, k, v must have one floating-point type; got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if q.device != k.device or q.device != v.device:
        raise ShapeError(f"q, k, v lie on {q.device}, {k.device}, {v.device}; expected one device.")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            f"Batches, key heads, key tokens and the channels of q and k must agree; got {shapes}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"Query heads must be a multiple of key heads; got {shapes}.")
    if same_length and q.shape[2] != k.shape[2]:
        raise ShapeError(f"Here queries and keys are the same tokens; got {shapes}.")


def check_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """Refuse a mask that is not for queries q (B, H, N, D) and keys k (B, G, S, D)."""
    if mask is None:
        return
    want = (*q.shape[:3], k.shape[2])
    if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, want, strict=True)):
        raise ShapeError(
            f"mask must have 4 axes, broadcastable to (B, H, N, S) = {tuple(want)}; got "
            f"{tuple(mask.shape)}."
        )
    if mask.device != q.device or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ShapeError(
            f"mask must be boolean or floating point on {q.device}, as q is; got {mask.dtype} on "
            f"{mask.device}."
        )


def expand_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads for grouped queries (GQA)."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def default_scale(scale: float | None, channels: int) -> float:
    """D^-1/2 if none is given."""
    return (1.0 / math.sqrt(channels) if channels else 1.0) if scale is None else float(scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, otherwise the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
