"""The gating unit from sums and products: the specification."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["MLP", "Affine", "mixer_gating_unit"]


class Affine(NamedTuple):
    """Weight and bias of a linear map, (out, in) and (out,), or of a layer norm, both (C,)."""

    weight: Tensor
    bias: Tensor


class MLP(NamedTuple):
    """Linear map to the hidden width, exact GELU, linear map back."""

    first: Affine
    second: Affine


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
    wide = accumulation_dtype(x.dtype)
    whole = x.to(wide)
    tokens = _layer_norm(whole, token_norm, eps).transpose(1, 2)
    mixed = whole + _mlp(tokens, token_mlp).transpose(1, 2)
    mixed = mixed + _mlp(_layer_norm(mixed, channel_norm, eps), channel_mlp)
    return (_linear(whole, projection) * mixed).to(x.dtype)


def _layer_norm(x: Tensor, norm: Affine, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    size = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return centred / size * norm.weight.to(x.dtype) + norm.bias.to(x.dtype)


def _linear(x: Tensor, layer: Affine) -> Tensor:
    return x @ layer.weight.to(x.dtype).T + layer.bias.to(x.dtype)


def _mlp(x: Tensor, layers: MLP) -> Tensor:
    hidden = _linear(x, layers.first)
    hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return _linear(hidden, layers.second)
