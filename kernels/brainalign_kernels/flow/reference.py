"""Flow-Attention with explicit (N, S) scores: the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads

__all__ = ["Flow", "flow", "flow_attention"]


class Flow(NamedTuple):
    """What the conservation of flow gives each token.

    Parameters
    ----------
    queries : Tensor, shape (B, H, N, D)
        sigmoid(q) times the incoming flow of the sink (over n_i if causal).
    keys : Tensor, shape (B, H, S, D)
        sigmoid(k).
    allocation : Tensor, shape (B, H, N)
        Of the sinks.
    competition : Tensor, shape (B, H, S)
        Of the sources.
    """

    queries: Tensor
    keys: Tensor
    allocation: Tensor
    competition: Tensor


def _along(vectors: Tensor, others: Tensor, eps: float, causal: bool) -> Tensor:
    # (x_i + eps) . (sum of others + eps), the sum over all of them or over those up to i.
    total = others.cumsum(dim=-2) if causal else others.sum(dim=-2, keepdim=True)
    return ((vectors + eps) * (total + eps)).sum(dim=-1)


def flow(q: Tensor, k: Tensor, *, is_causal: bool, eps: float) -> Flow:
    """Flows of the tokens, in the precision in which sums are formed."""
    wide = accumulation_dtype(q.dtype)
    sink, source = q.to(wide).sigmoid(), k.to(wide).sigmoid()
    if is_causal:
        n = torch.arange(1, q.shape[-2] + 1, device=q.device).to(wide)
        incoming = n / _along(sink, source, eps, True)
        outgoing = n / _along(source, sink, eps, True)
        conserved_sink = _along(sink, source * outgoing[..., None], eps, True) / n
        conserved_source = _along(source, sink * incoming[..., None], eps, True) / n
        allocation = conserved_sink.sigmoid()
        strength = conserved_source.clamp(-1.0, 1.0).exp()
        competition = n * strength / strength.cumsum(dim=-1)
        queries = sink * (incoming / n)[..., None]
        return Flow(queries, source, allocation, competition)
    sinks, sources = q.shape[-2], k.shape[-2]
    incoming = 1 / _along(sink, source, eps, False)
    outgoing = 1 / _along(source, sink, eps, False)
    conserved_sink = _along(sink, source * outgoing[..., None], eps, False)
    conserved_source = _along(source, sink * incoming[..., None], eps, False).clamp(-1.0, 1.0)
    allocation = (conserved_sink * (sinks / max(sources, 1))).sigmoid()
    competition = conserved_source.softmax(dim=-1) * sources
    return Flow(sink * incoming[..., None], source, allocation, competition)


def flow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, eps: float, chunk_size: int
) -> Tensor:
    """See `brainalign_kernels.flow_attention`."""
    k, v = expand_heads(q, k, v)
    tokens = flow(q, k, is_causal=is_causal, eps=eps)
    scores = tokens.queries @ tokens.keys.transpose(-1, -2)
    if is_causal:
        scores = scores.tril()
    values = v.to(scores.dtype) * tokens.competition[..., None]
    return (tokens.allocation[..., None] * (scores @ values)).to(q.dtype)
