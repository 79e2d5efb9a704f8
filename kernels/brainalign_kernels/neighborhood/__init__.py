"""Neighborhood attention on a line, a plane or a volume: every token sees its nearest ones."""

from brainalign_kernels.neighborhood.attention import neighborhood_attention
from brainalign_kernels.neighborhood.module import NeighborhoodAttention
from brainalign_kernels.neighborhood.windows import neighborhood_mask, neighborhood_mask_mod

__all__ = [
    "NeighborhoodAttention",
    "neighborhood_attention",
    "neighborhood_mask",
    "neighborhood_mask_mod",
]
