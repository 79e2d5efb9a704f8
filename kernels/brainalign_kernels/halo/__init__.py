"""Halo attention: blocks of queries over their window of keys."""

from brainalign_kernels.halo.attention import halo_attention
from brainalign_kernels.halo.module import HaloAttention

__all__ = ["HaloAttention", "halo_attention"]
