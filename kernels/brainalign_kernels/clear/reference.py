"""CLEAR as softmax attention with a dense mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels.clear.mask import clear_mask
from brainalign_kernels.softmax import reference

__all__ = ["clear_attention", "with_pooled"]


def clear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.clear_attention`."""
    k, v, mask = with_pooled(k, v, shape, n_text, radius, pooled_k, pooled_v)
    return reference.softmax_attention(q, k, v, mask=mask, is_causal=False, scale=scale)


def with_pooled(
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with the pooled ones behind them, and the dense mask over all."""
    n_pooled = 0
    if pooled_k is not None and pooled_v is not None:
        n_pooled = pooled_k.shape[2]
        k, v = torch.cat([k, pooled_k], dim=2), torch.cat([v, pooled_v], dim=2)
    mask = clear_mask(shape, n_text, radius, n_pooled=n_pooled, device=k.device)
    return k, v, mask
