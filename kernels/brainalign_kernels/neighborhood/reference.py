"""Neighborhood attention as softmax attention under a dense mask: the specification."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.neighborhood.windows import Axis, bias_index, dense_mask
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["neighborhood_attention"]


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axes: tuple[Axis, ...], bias: Tensor | None, scale: float
) -> Tensor:
    """See `brainalign_kernels.neighborhood_attention`."""
    k, v = expand_heads(q, k, v)
    wide = accumulation_dtype(q.dtype)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if bias is not None:
        logits = logits + bias.to(wide)[:, bias_index(axes, q.device)]
    weights = masked_softmax(logits, dense_mask(axes, q.device))
    return (weights @ v.to(wide)).to(q.dtype)
