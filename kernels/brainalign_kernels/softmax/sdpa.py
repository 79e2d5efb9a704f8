"""Softmax attention through PyTorch's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from brainalign_kernels.softmax import reference

__all__ = ["added_mask", "open_rows", "softmax_attention"]


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to logits, in `dtype`; what is finite stays finite there."""
    lowest = torch.finfo(dtype).min
    return mask.clamp(min=lowest).to(dtype).masked_fill(mask == -torch.inf, -torch.inf)


def open_rows(mask: Tensor, is_causal: bool, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask for fused kernels, causal if asked, and the rows (..., N, 1) without keys.

    Such a row sees all keys in the mask, so that no kernel meets an empty one: zero it after.
    """
    causal = None
    if is_causal:
        causal = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
    if mask.dtype == torch.bool:
        mask = mask if causal is None else mask & causal
        empty = ~mask.any(dim=-1, keepdim=True)
        return mask | empty, empty
    mask = mask if causal is None else mask.masked_fill(~causal, -torch.inf)
    empty = (mask == -torch.inf).all(dim=-1, keepdim=True)
    return added_mask(mask, q.dtype).masked_fill(empty, 0.0), empty


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """See `brainalign_kernels.softmax_attention`."""
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return reference.softmax_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    mask, empty = open_rows(mask, is_causal, q, k)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.masked_fill(empty, 0.0)
