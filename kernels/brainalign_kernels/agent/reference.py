"""Agent attention as two dense softmaxes: the specification."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.softmax import reference

__all__ = ["agent_attention"]


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    position_bias: Tensor | None,
    agent_bias: Tensor | None,
    scale: float,
    scale2: float,
    k_shortcut: float,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.agent_attention`; also returns the agents' values."""
    kept = q.dtype
    q, k, v, agents = (x.to(accumulation_dtype(kept)) for x in (q, k, v, agents))
    values = reference.softmax_attention(
        agents, k, v, mask=position_bias, is_causal=False, scale=scale
    )
    out = reference.softmax_attention(
        q, agents, values, mask=agent_bias, is_causal=False, scale=scale2
    )
    if k_shortcut:
        out = out + k_shortcut * v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return out.to(kept), values.to(kept)
