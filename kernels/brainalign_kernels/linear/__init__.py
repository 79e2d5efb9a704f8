"""Linear attention without decay: every query sees all tokens, or those up to its own."""

from brainalign_kernels.linear.attention import linear_attention

__all__ = ["linear_attention"]
