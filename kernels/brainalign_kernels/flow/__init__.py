"""Flow-Attention: linear attention from the conservation of flow."""

from brainalign_kernels.flow.attention import flow_attention
from brainalign_kernels.flow.module import FlowAttention

__all__ = ["FlowAttention", "flow_attention"]
