"""Efficient local attention (ELA)."""

from brainalign_kernels.efficient_local.attention import Strip, efficient_local_attention
from brainalign_kernels.efficient_local.module import ELA_PRESETS, EfficientLocalAttention

__all__ = ["ELA_PRESETS", "EfficientLocalAttention", "Strip", "efficient_local_attention"]
