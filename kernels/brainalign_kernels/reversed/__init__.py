"""Reversed attention: children send their values to their parents."""

from brainalign_kernels.reversed.attention import (
    dependency_mask,
    pruning_scores,
    reversed_attention,
)
from brainalign_kernels.reversed.module import (
    DependencyBlock,
    DependencyTransformer,
    ReversedAttention,
)

__all__ = [
    "DependencyBlock",
    "DependencyTransformer",
    "ReversedAttention",
    "dependency_mask",
    "pruning_scores",
    "reversed_attention",
]
