"""Softmax attention through PyTorch's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["softmax_attention"]


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """See `brainalign_kernels.softmax_attention`."""
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    if is_causal:
        causal = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
        if mask.dtype == torch.bool:
            mask = mask & causal
        else:
            mask = mask.masked_fill(~causal, -torch.inf)
    empty = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    empty = empty.all(dim=-1, keepdim=True)
    # A row without keys sees them all here and is zeroed after: no kernel then meets an empty row.
    mask = mask | empty if mask.dtype == torch.bool else mask.to(q.dtype).masked_fill(empty, 0.0)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.masked_fill(empty, 0.0)
