"""The same through PyTorch's convolution and group norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv1d, group_norm

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.efficient_local import reference
from brainalign_kernels.efficient_local.reference import ACTIVATIONS, GATES, Strip

__all__ = ["efficient_local_attention"]


def efficient_local_attention(
    x: Tensor,
    rows: Strip,
    columns: Strip,
    *,
    norm_groups: int,
    activation: str,
    gate: str,
    has_skip: bool,
    eps: float,
) -> Tensor:
    """See `brainalign_kernels.efficient_local_attention`; the strips are in float32 at least."""
    channels, *sides = x.shape[1:]
    # Group norm refuses a single value, and convolution none.
    if x.shape[0] * (channels // norm_groups) * min(sides) <= 1:
        return reference.efficient_local_attention(
            x, rows, columns, norm_groups=norm_groups, activation=activation, gate=gate,
            has_skip=has_skip, eps=eps,
        )  # fmt: skip
    wide = accumulation_dtype(x.dtype)
    made = []
    for axis, strip in ((3, rows), (2, columns)):
        bias = None if strip.bias is None else strip.bias.to(wide)
        weight = strip.weight.to(wide)
        found = conv1d(
            x.mean(dim=axis, dtype=wide), weight, bias,
            padding=weight.shape[2] // 2, groups=weight.shape[0] // weight.shape[1],
        )  # fmt: skip
        if strip.norm_weight is not None and strip.norm_bias is not None:
            gain, shift = strip.norm_weight.to(wide), strip.norm_bias.to(wide)
            found = group_norm(found, norm_groups, gain, shift, eps)
        made.append(GATES[gate](ACTIVATIONS[activation](found)).unsqueeze(axis))
    weights = made[0] * made[1]
    return (x * (weights + 1.0 if has_skip else weights)).to(x.dtype)
