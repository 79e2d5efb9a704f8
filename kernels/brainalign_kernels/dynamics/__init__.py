"""Attention and recurrent layers as linear time-varying dynamical systems."""

from brainalign_kernels.dynamics.attention import dsf_attention, qlstm, s6_layer
from brainalign_kernels.dynamics.module import DSFAttention
from brainalign_kernels.dynamics.system import DynamicalSystem, run_system
from brainalign_kernels.dynamics.views import (
    linear_system,
    normalised_system,
    qlstm_system,
    s6_system,
    softmax_system,
)

__all__ = [
    "DSFAttention",
    "DynamicalSystem",
    "dsf_attention",
    "linear_system",
    "normalised_system",
    "qlstm",
    "qlstm_system",
    "run_system",
    "s6_layer",
    "s6_system",
    "softmax_system",
]
