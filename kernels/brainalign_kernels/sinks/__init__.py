"""Attention sinks: their measures, redistribution of their attention, and a learned sink logit."""

from brainalign_kernels.sinks.attention import sink_attention
from brainalign_kernels.sinks.detection import sink_metric, sink_share, sink_tokens
from brainalign_kernels.sinks.module import SinkAttention
from brainalign_kernels.sinks.redistribution import (
    image_centric_rows,
    redistribute_attention,
    visual_attention_redistribution,
)

__all__ = [
    "SinkAttention",
    "image_centric_rows",
    "redistribute_attention",
    "sink_attention",
    "sink_metric",
    "sink_share",
    "sink_tokens",
    "visual_attention_redistribution",
]
