"""What attention does inside a trained model: maps, rollout, heads, distances, sinks."""

from brainalign_kernels.probes.capture import Captured, observe
from brainalign_kernels.probes.heads import (
    HeadImportance,
    accuracy,
    head_divergence,
    head_importance,
    true_class_probability,
)
from brainalign_kernels.probes.maps import attention_maps, attention_rollout
from brainalign_kernels.probes.space import attention_distance, ring_profile
from brainalign_kernels.probes.summary import PatternSummary, attention_patterns
from brainalign_kernels.probes.tokens import SinkProfile, attention_sinks

__all__ = [
    "Captured",
    "HeadImportance",
    "PatternSummary",
    "SinkProfile",
    "accuracy",
    "attention_distance",
    "attention_maps",
    "attention_patterns",
    "attention_rollout",
    "attention_sinks",
    "head_divergence",
    "head_importance",
    "observe",
    "ring_profile",
    "true_class_probability",
]
