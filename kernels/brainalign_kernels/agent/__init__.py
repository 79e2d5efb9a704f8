"""Agent attention: the core, and the blocks that were published with it."""

from brainalign_kernels.agent.attention import agent_attention
from brainalign_kernels.agent.module import (
    AgentAttentionCSWin,
    AgentAttentionDeiT,
    AgentAttentionPVT,
    AgentAttentionSD,
    AgentAttentionSwin,
)

__all__ = [
    "AgentAttentionCSWin",
    "AgentAttentionDeiT",
    "AgentAttentionPVT",
    "AgentAttentionSD",
    "AgentAttentionSwin",
    "agent_attention",
]
