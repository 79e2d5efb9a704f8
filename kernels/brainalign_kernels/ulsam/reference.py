"""Subspace attention, one group of channels after the other: the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["BatchNorm", "subspace_attention"]


class BatchNorm(NamedTuple):
    """Parameters and running statistics of a batch norm, each (C,)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def subspace_attention(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor],
    depthwise_norm: BatchNorm,
    pointwise: tuple[Tensor, Tensor],
    pointwise_norm: BatchNorm,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.subspace_attention`; also the attention."""
    wide = accumulation_dtype(x.dtype)
    splits = pointwise[1].shape[0]
    width = x.shape[1] // splits
    outs, attentions = [], []
    for split in range(splits):
        own = slice(split * width, (split + 1) * width)
        part = x[:, own].to(wide)
        weight, bias = (p[own].to(wide)[:, None, None] for p in depthwise)
        hidden = _batch_norm(
            weight * part + bias, depthwise_norm, own, training=training, momentum=momentum, eps=eps
        ).relu()
        padded = pad(hidden, (1, 1, 1, 1), value=-torch.inf)
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        # Not amax, which shares a gradient among equal entries: pooling gives it to the first.
        pooled = windows.max(dim=4).values
        weights = pointwise[0][own].to(wide)[:, None, None]
        mixed = (weights * pooled).sum(dim=1, keepdim=True) + pointwise[1][split].to(wide)
        one = slice(split, split + 1)
        logits = _batch_norm(
            mixed, pointwise_norm, one, training=training, momentum=momentum, eps=eps
        ).relu()
        attention = logits.flatten(1).softmax(dim=1).reshape(logits.shape)
        attentions.append(attention)
        outs.append(attention * part + part)
    return torch.cat(outs, dim=1).to(x.dtype), torch.cat(attentions, dim=1).to(x.dtype)


def _batch_norm(
    x: Tensor, norm: BatchNorm, own: slice, *, training: bool, momentum: float, eps: float
) -> Tensor:
    """Batch norm of some channels, whose running statistics are updated in place in training."""
    wide = x.dtype
    if training:
        mean = x.mean(dim=(0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        count = x.numel() // x.shape[1]
        for kept, new in (
            (norm.running_mean, mean),
            (norm.running_var, variance * (count / (count - 1))),
        ):
            kept[own] = (1 - momentum) * kept[own] + momentum * new.detach().to(kept.dtype)
    else:
        mean, variance = norm.running_mean[own].to(wide), norm.running_var[own].to(wide)
    gain = norm.weight[own].to(wide) / (variance + eps).sqrt()
    shift = norm.bias[own].to(wide) - mean * gain
    return x * gain[:, None, None] + shift[:, None, None]
