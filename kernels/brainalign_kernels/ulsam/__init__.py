"""Ultra-lightweight subspace attention (ULSAM)."""

from brainalign_kernels.ulsam.attention import BatchNorm, subspace_attention
from brainalign_kernels.ulsam.module import ULSAM

__all__ = ["ULSAM", "BatchNorm", "subspace_attention"]
