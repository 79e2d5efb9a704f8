"""CLEAR: every image token sees a disc around it, the text, and pooled image tokens."""

from brainalign_kernels.clear.attention import clear_attention
from brainalign_kernels.clear.mask import clear_mask, clear_scale
from brainalign_kernels.clear.module import ClearAttention

__all__ = ["ClearAttention", "clear_attention", "clear_mask", "clear_scale"]
