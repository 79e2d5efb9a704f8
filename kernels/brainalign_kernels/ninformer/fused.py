"""The same through PyTorch's fused layers, mixing tokens without transposed copies."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from brainalign_kernels.ninformer.reference import MLP, Affine

__all__ = ["mixer_gating_unit"]


def mixer_gating_unit(
    x: Tensor,
    projection: Affine,
    token_norm: Affine,
    token_mlp: MLP,
    channel_norm: Affine,
    channel_mlp: MLP,
    *,
    eps: float,
) -> Tensor:
    """See `brainalign_kernels.mixer_gating_unit`."""
    kind = x.dtype
    (first, first_bias), (second, second_bias) = token_mlp
    (inner, inner_bias), (outer, outer_bias) = channel_mlp
    tokens = layer_norm(x, x.shape[2:], token_norm.weight.to(kind), token_norm.bias.to(kind), eps)
    hidden = gelu(first.to(kind) @ tokens + first_bias.to(kind)[:, None])
    mixed = x + second.to(kind) @ hidden + second_bias.to(kind)[:, None]
    channels = layer_norm(
        mixed, x.shape[2:], channel_norm.weight.to(kind), channel_norm.bias.to(kind), eps
    )
    hidden = gelu(linear(channels, inner.to(kind), inner_bias.to(kind)))
    mixed = mixed + linear(hidden, outer.to(kind), outer_bias.to(kind))
    return linear(x, projection.weight.to(kind), projection.bias.to(kind)) * mixed
