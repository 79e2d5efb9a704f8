"""Gated linear attention token by token: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["gated_linear_attention"]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_decay_value: Tensor | None,
    state: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.gated_linear_attention`; `chunk_size` plays no part here."""
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    q, k, v = scale * q.to(wide), k.to(wide), v.to(wide)
    decay = log_decay.to(wide).exp()
    decay = decay[..., None] if decay.ndim == 3 else decay
    by_value = torch.ones_like(v) if log_decay_value is None else log_decay_value.to(wide).exp()
    # Zeros that are a product with nothing: without tokens, gradients are zeros and not absent.
    current = (decay * k)[:, :, :0].transpose(-1, -2) @ (by_value * v)[:, :, :0]
    if state is not None:
        current = current + state.to(wide)
    outs = []
    for t in range(q.shape[2]):
        current = decay[:, :, t, :, None] * current * by_value[:, :, t, None, :]
        current = current + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ current).squeeze(-2))
    out = torch.stack(outs, dim=2) if outs else (q * decay * k).sum(-1, keepdim=True) * v
    return out.to(dtype), current
