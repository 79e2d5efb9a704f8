"""Lightning attention: causal linear attention whose past decays by a factor per head."""

from brainalign_kernels.lightning.attention import lightning_attention
from brainalign_kernels.lightning.module import LightningAttention
from brainalign_kernels.lightning.slopes import fla_slopes, lightning_slopes

__all__ = ["LightningAttention", "fla_slopes", "lightning_attention", "lightning_slopes"]
