"""LightNet: linear attention whose weights are a softmax over time, channel by channel."""

from brainalign_kernels.lightnet.attention import lightnet_attention, lightnet_recurrence
from brainalign_kernels.lightnet.module import LightNetAttention

__all__ = ["LightNetAttention", "lightnet_attention", "lightnet_recurrence"]
