"""Lightning attention as one product with a matrix of decays: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["lightning_attention"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightning_attention`; `chunk_size` plays no part here."""
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    q, k, v = scale * q.to(wide), k.to(wide), v.to(wide)
    n = q.shape[2]
    place = torch.arange(n, device=q.device, dtype=wide)
    log_decay = log_decay.to(wide)[:, None, None]
    past = place[:, None] - place
    decay = (log_decay * past).masked_fill(past < 0, -torch.inf).exp()
    to_end = (log_decay * (n - 1 - place)[:, None]).exp()
    out = ((q @ k.transpose(-1, -2)) * decay) @ v
    final = (k * to_end).transpose(-1, -2) @ v
    if state is not None:
        out = out + (q * (log_decay * (place + 1)[:, None]).exp()) @ state.to(wide)
        final = final + (n * log_decay).exp() * state.to(wide)
    return out.to(dtype), final
