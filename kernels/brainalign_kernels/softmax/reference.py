"""Dense softmax attention: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads

__all__ = ["masked_softmax", "softmax_attention"]


def masked_softmax(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; zeros where nothing is allowed, forwards and backwards.

    Parameters
    ----------
    logits : Tensor, shape (..., S)
        May hold -inf.
    allowed : Tensor of bool, broadcastable to `logits`, optional
        True: takes part.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if logits.shape[-1] == 0:
        return logits
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """See `brainalign_kernels.softmax_attention`."""
    k, v = expand_heads(q, k, v)
    wide = accumulation_dtype(q.dtype)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    allowed = None
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask
    elif mask is not None:
        logits = logits + mask.to(wide)
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        allowed = causal if allowed is None else allowed & causal
    return (masked_softmax(logits, allowed) @ v.to(wide)).to(q.dtype)
