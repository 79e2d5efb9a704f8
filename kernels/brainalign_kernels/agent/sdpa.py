"""Agent attention as two calls of PyTorch's fused kernels."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels.softmax import sdpa

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
    values = sdpa.softmax_attention(agents, k, v, mask=position_bias, is_causal=False, scale=scale)
    out = sdpa.softmax_attention(q, agents, values, mask=agent_bias, is_causal=False, scale=scale2)
    if k_shortcut:
        out = out + k_shortcut * v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return out, values
