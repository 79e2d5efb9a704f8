"""Heads that depend on the image, and their reinforcement."""

from brainalign_kernels.vision_heads.divergence import (
    reinforce_heads,
    select_vision_heads,
    vision_aware_head_divergence,
)

__all__ = ["reinforce_heads", "select_vision_heads", "vision_aware_head_divergence"]
