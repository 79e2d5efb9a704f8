"""Dual cross-attention: global-local, and pair-wise as a regulariser of self-attention."""

from brainalign_kernels.dual_cross.attention import (
    attention_rollout,
    class_rollout,
    global_local_cross_attention,
    pair_wise_cross_attention,
    select_top,
    uncertainty_weighted_loss,
)
from brainalign_kernels.dual_cross.module import (
    DualCrossTransformer,
    GlobalLocalCrossAttention,
    PairWiseCrossAttention,
    UncertaintyWeightedLoss,
)

__all__ = [
    "DualCrossTransformer",
    "GlobalLocalCrossAttention",
    "PairWiseCrossAttention",
    "UncertaintyWeightedLoss",
    "attention_rollout",
    "class_rollout",
    "global_local_cross_attention",
    "pair_wise_cross_attention",
    "select_top",
    "uncertainty_weighted_loss",
]
