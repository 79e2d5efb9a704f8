"""The same for all groups of channels at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.ulsam import reference
from brainalign_kernels.ulsam.reference import BatchNorm

__all__ = ["subspace_attention"]


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
    """See `brainalign_kernels.subspace_attention`; also the attention.

    Batch norm knows no groups, and the pointwise convolutions are one with groups.
    """
    if x.numel() == 0:
        return reference.subspace_attention(
            x, depthwise, depthwise_norm, pointwise, pointwise_norm, training=training,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    wide = accumulation_dtype(x.dtype)
    splits = pointwise[1].shape[0]
    weight, bias = (p.to(wide)[:, None, None] for p in depthwise)
    options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps}
    hidden = _batch_norm(weight * x.to(wide) + bias, depthwise_norm, **options).relu()
    pooled = max_pool2d(hidden, 3, stride=1, padding=1)
    mixing = pointwise[0].to(wide).reshape(splits, -1, 1, 1)
    mixed = conv2d(pooled, mixing, pointwise[1].to(wide), groups=splits)
    logits = _batch_norm(mixed, pointwise_norm, **options).relu()
    attention = logits.flatten(2).softmax(dim=2).reshape(logits.shape)
    parts = x.unflatten(1, (splits, -1))
    out = (parts * (1.0 + attention[:, :, None])).flatten(1, 2)
    return out.to(x.dtype), attention.to(x.dtype)


def _batch_norm(
    x: Tensor, norm: BatchNorm, *, training: bool, momentum: float, eps: float
) -> Tensor:
    wide = x.dtype
    mean, variance = norm.running_mean, norm.running_var
    if mean.dtype == wide:
        return batch_norm(
            x, mean, variance, norm.weight.to(wide), norm.bias.to(wide), training, momentum, eps
        )
    kept = mean.to(wide), variance.to(wide)
    out = batch_norm(x, *kept, norm.weight.to(wide), norm.bias.to(wide), training, momentum, eps)
    if training:
        mean.copy_(kept[0])
        variance.copy_(kept[1])
    return out
