"""Linear attention whose decay depends on the token, and on the channel if wanted."""

from brainalign_kernels.gated_linear.attention import gated_linear_attention

__all__ = ["gated_linear_attention"]
