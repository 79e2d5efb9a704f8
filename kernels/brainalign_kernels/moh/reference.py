"""Every head of every token, times its gate: the specification."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.softmax.reference import softmax_attention

__all__ = ["moh_attention"]


def moh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.moh_attention`."""
    wide = accumulation_dtype(q.dtype)
    heads = softmax_attention(
        q.to(wide), k.to(wide), v.to(wide), mask=mask, is_causal=False, scale=scale
    )
    weights = gates.to(wide).masked_fill(~selected, 0.0).transpose(1, 2)
    return (heads * weights[..., None]).to(q.dtype)
