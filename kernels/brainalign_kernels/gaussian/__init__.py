"""Gaussian adaptive attention (GAAM)."""

from brainalign_kernels.gaussian.attention import gaussian_adaptive_attention
from brainalign_kernels.gaussian.module import GaussianAdaptiveAttention, GaussianAdaptiveBlock

__all__ = ["GaussianAdaptiveAttention", "GaussianAdaptiveBlock", "gaussian_adaptive_attention"]
