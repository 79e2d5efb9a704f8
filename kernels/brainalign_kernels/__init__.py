"""Attention mechanisms behind one interface: exact references, fast paths, adapters and probes.

Every function takes q (B, H, N, D), k (B, H, S, D), v (B, H, S, E) as PyTorch's
``scaled_dot_product_attention`` does, and ``impl="auto" | "reference" | "compiled" | "triton"``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Public name: the module that has it, loaded when it is first asked for.
_WHERE = {
    "AdditiveAttentionPooling": "adversarial",
    "AgentAttentionCSWin": "agent",
    "AgentAttentionDeiT": "agent",
    "AgentAttentionPVT": "agent",
    "AgentAttentionSD": "agent",
    "AgentAttentionSwin": "agent",
    "ClearAttention": "clear",
    "DSFAttention": "dynamics",
    "DependencyBlock": "reversed",
    "DependencyTransformer": "reversed",
    "DualCrossTransformer": "dual_cross",
    "DynamicalSystem": "dynamics",
    "EfficientLocalAttention": "efficient_local",
    "FlowAttention": "flow",
    "GaussianAdaptiveAttention": "gaussian",
    "GaussianAdaptiveBlock": "gaussian",
    "GlobalLocalCrossAttention": "dual_cross",
    "HaloAttention": "halo",
    "LRPE": "linear_position",
    "LightNetAttention": "lightnet",
    "LightningAttention": "lightning",
    "MDLRPE": "linear_position",
    "MDTPE": "toeplitz",
    "MixerGatingUnit": "ninformer",
    "MoHAggregatedAttention": "moh",
    "MoHAttention": "moh",
    "MoHViTAttention": "moh",
    "NeighborhoodAttention": "neighborhood",
    "NiNformer": "ninformer",
    "NiNformerBlock": "ninformer",
    "PairWiseCrossAttention": "dual_cross",
    "ReversedAttention": "reversed",
    "ShapeError": "errors",
    "SinkAttention": "sinks",
    "TPE": "toeplitz",
    "ULSAM": "ulsam",
    "UncertaintyWeightedLoss": "dual_cross",
    "UnsupportedError": "errors",
    "adversarial_attention_loss": "adversarial",
    "agent_attention": "agent",
    "attention_rollout": "dual_cross",
    "class_rollout": "dual_cross",
    "clear_attention": "clear",
    "clear_mask": "clear",
    "clear_scale": "clear",
    "count_calls": "_dispatch",
    "dependency_mask": "reversed",
    "draw_attention": "patterns",
    "dsf_attention": "dynamics",
    "effective_attention": "patterns",
    "efficient_local_attention": "efficient_local",
    "fla_slopes": "lightning",
    "flow_attention": "flow",
    "gated_linear_attention": "gated_linear",
    "gaussian_adaptive_attention": "gaussian",
    "global_local_cross_attention": "dual_cross",
    "halo_attention": "halo",
    "hip_attention": "hip",
    "hip_blocks": "hip",
    "image_centric_rows": "sinks",
    "interpretable_perturbation": "adversarial",
    "lightnet_attention": "lightnet",
    "lightnet_recurrence": "lightnet",
    "lightning_attention": "lightning",
    "lightning_slopes": "lightning",
    "linear_attention": "linear",
    "linear_system": "dynamics",
    "load_balance_loss": "moh",
    "lrpe": "linear_position",
    "masked_attention": "adversarial",
    "md_lrpe": "linear_position",
    "md_tpe": "toeplitz",
    "mixer_gating_unit": "ninformer",
    "moh_attention": "moh",
    "moh_routing": "moh",
    "neighborhood_attention": "neighborhood",
    "neighborhood_mask": "neighborhood",
    "neighborhood_mask_mod": "neighborhood",
    "normalised_system": "dynamics",
    "pair_wise_cross_attention": "dual_cross",
    "pruning_scores": "reversed",
    "qlstm": "dynamics",
    "qlstm_system": "dynamics",
    "redistribute_attention": "sinks",
    "reinforce_heads": "vision_heads",
    "reversed_attention": "reversed",
    "run_system": "dynamics",
    "s6_layer": "dynamics",
    "s6_system": "dynamics",
    "score_differences": "adversarial",
    "score_perturbation": "adversarial",
    "select_top": "dual_cross",
    "select_vision_heads": "vision_heads",
    "sink_attention": "sinks",
    "sink_metric": "sinks",
    "sink_share": "sinks",
    "sink_tokens": "sinks",
    "softmax_attention": "softmax",
    "softmax_system": "dynamics",
    "subspace_attention": "ulsam",
    "swap_attention": "adapters",
    "tpe": "toeplitz",
    "uncertainty_weighted_loss": "dual_cross",
    "virtual_adversarial_attention_loss": "adversarial",
    "vision_aware_head_divergence": "vision_heads",
    "visual_attention_redistribution": "sinks",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
