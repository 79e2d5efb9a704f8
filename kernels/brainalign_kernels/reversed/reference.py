"""Reversed attention with the (N, S) weights at hand: the specification."""

from __future__ import annotations

from torch import Tensor, eye

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.softmax.reference import softmax_attention

__all__ = ["reversed_attention", "sent", "weights"]


def weights(q: Tensor, k: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Softmax over the parents S of every child N, (B, H, N, S)."""
    wide = accumulation_dtype(q.dtype)
    units = eye(k.shape[2], dtype=wide, device=k.device).expand(*k.shape[:2], -1, -1)
    return softmax_attention(
        q.to(wide), k.to(wide), units, mask=mask, is_causal=is_causal, scale=scale
    )


def sent(v: Tensor, head_probabilities: Tensor | None, gate: Tensor | None) -> Tensor:
    """Values times what each head and child may send."""
    v = v.to(accumulation_dtype(v.dtype))
    if head_probabilities is not None:
        v = v * head_probabilities.to(v.dtype)[..., None]
    return v if gate is None else v * gate.to(v.dtype)[:, None, :, None]


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_probabilities: Tensor | None,
    gate: Tensor | None,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.reversed_attention`."""
    k = expand_heads(q, k, k)[0]
    attention = weights(q, k, mask=mask, is_causal=is_causal, scale=scale)
    return (attention.transpose(-1, -2) @ sent(v, head_probabilities, gate)).to(q.dtype)
