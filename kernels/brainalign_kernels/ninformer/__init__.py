"""NiNformer: gating by a token-mixing network in the network."""

from brainalign_kernels.ninformer.attention import MLP, Affine, mixer_gating_unit
from brainalign_kernels.ninformer.module import MixerGatingUnit, NiNformer, NiNformerBlock

__all__ = [
    "MLP",
    "Affine",
    "MixerGatingUnit",
    "NiNformer",
    "NiNformerBlock",
    "mixer_gating_unit",
]
