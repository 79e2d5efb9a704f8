"""Other attention mechanisms inside models of transformers, diffusers, timm and open_clip."""

from brainalign_kernels.adapters.cost import Cost, attention_cost
from brainalign_kernels.adapters.sites import Attend
from brainalign_kernels.adapters.specs import Attention, describe, parse
from brainalign_kernels.adapters.swap import Swap, attention_layers, swap_attention

__all__ = [
    "Attend",
    "Attention",
    "Cost",
    "Swap",
    "attention_cost",
    "attention_layers",
    "describe",
    "parse",
    "swap_attention",
]
