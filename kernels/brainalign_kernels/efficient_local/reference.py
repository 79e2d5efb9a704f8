"""Efficient local attention from sums over shifted strips: the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype

__all__ = ["ACTIVATIONS", "GATES", "Strip", "efficient_local_attention"]


class Strip(NamedTuple):
    """Parameters of the attention along one axis.

    Without `norm_weight` and `norm_bias` there is no norm.
    """

    #: Convolution along the axis, (C, C / groups, K), K odd.
    weight: Tensor
    #: Of the convolution, (C,).
    bias: Tensor | None = None
    #: Gain of the group norm, (C,).
    norm_weight: Tensor | None = None
    #: Shift of the group norm, (C,).
    norm_bias: Tensor | None = None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
}


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
    """See `brainalign_kernels.efficient_local_attention`."""
    if 0 in x.shape[2:]:
        return x.clone()
    wide = x.to(accumulation_dtype(x.dtype))
    options = {"norm_groups": norm_groups, "activation": activation, "gate": gate, "eps": eps}
    along_rows = _strip_attention(wide.mean(dim=3), rows, **options)  # type: ignore[arg-type]
    along_columns = _strip_attention(wide.mean(dim=2), columns, **options)  # type: ignore[arg-type]
    out = wide * along_rows[:, :, :, None] * along_columns[:, :, None, :]
    return (out + wide if has_skip else out).to(x.dtype)


def _strip_attention(
    strip: Tensor, parameters: Strip, *, norm_groups: int, activation: str, gate: str, eps: float
) -> Tensor:
    """Attention (B, C, L) from the mean over the other axis (B, C, L)."""
    batch, channels, length = strip.shape
    made = parameters.weight.to(strip.dtype)
    taps = made.shape[2]
    width = made.shape[1]
    groups = channels // width
    padded = torch.nn.functional.pad(strip, (taps // 2, taps // 2))
    windows = padded.unfold(2, taps, 1).reshape(batch, groups, width, length, taps)
    kernel = made.reshape(groups, width, width, taps)
    found = torch.einsum("bgilt,goit->bgol", windows, kernel).reshape(batch, channels, length)
    if parameters.bias is not None:
        found = found + parameters.bias.to(strip.dtype)[:, None]
    if parameters.norm_weight is not None and parameters.norm_bias is not None:
        parts = found.reshape(batch, norm_groups, channels // norm_groups * length)
        centred = parts - parts.mean(dim=2, keepdim=True)
        size = (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()
        found = (centred / size).reshape(batch, channels, length)
        gain, shift = parameters.norm_weight.to(found.dtype), parameters.norm_bias.to(found.dtype)
        found = found * gain[:, None] + shift[:, None]
    return GATES[gate](ACTIVATIONS[activation](found))
