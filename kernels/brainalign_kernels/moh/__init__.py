"""Mixture-of-head attention: a router chooses the heads of each token."""

from brainalign_kernels.moh.attention import load_balance_loss, moh_attention, moh_routing
from brainalign_kernels.moh.module import MoHAttention, MoHViTAttention
from brainalign_kernels.moh.pooled import MoHAggregatedAttention

__all__ = [
    "MoHAggregatedAttention",
    "MoHAttention",
    "MoHViTAttention",
    "load_balance_loss",
    "moh_attention",
    "moh_routing",
]
