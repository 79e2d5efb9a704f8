"""The same through PyTorch's fused layers."""

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
    # One product for the whole batch; a weight times each sample's tokens is slower.
    hidden = gelu(linear(tokens.transpose(1, 2), first.to(kind), first_bias.to(kind)))
    mixed = x + linear(hidden, second.to(kind), second_bias.to(kind)).transpose(1, 2)
    channels = layer_norm(
        mixed, x.shape[2:], channel_norm.weight.to(kind), channel_norm.bias.to(kind), eps
    )
    hidden = gelu(linear(channels, inner.to(kind), inner_bias.to(kind)))
    mixed = mixed + linear(hidden, outer.to(kind), outer_bias.to(kind))
    return linear(x, projection.weight.to(kind), projection.bias.to(kind)) * mixed
