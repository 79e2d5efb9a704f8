"""Flow-Attention in time and memory linear in the number of tokens."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._causal import causal_product
from brainalign_kernels._checks import expand_heads
from brainalign_kernels.flow.reference import flow

__all__ = ["flow_attention"]


def flow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, eps: float, chunk_size: int
) -> Tensor:
    """See `brainalign_kernels.flow_attention`."""
    k, v = expand_heads(q, k, v)
    tokens = flow(q, k, is_causal=is_causal, eps=eps)
    values = v.to(tokens.keys.dtype) * tokens.competition[..., None]
    if is_causal:
        out = causal_product(tokens.queries, tokens.keys, values, chunk_size)
    else:
        out = tokens.queries @ (tokens.keys.transpose(-1, -2) @ values)
    return (tokens.allocation[..., None] * out).to(q.dtype)
