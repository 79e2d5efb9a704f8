"""The sum with one power of the decay per pair of tokens: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["powers", "tpe"]


def powers(rate: Tensor, tokens: int) -> Tensor:
    """Matrix (H, N, N) of exp(rate)^(t - m) for m <= t, otherwise 0."""
    place = torch.arange(tokens, device=rate.device, dtype=rate.dtype)
    gap = place[:, None] - place
    return (rate[:, None, None] * gap.clamp(min=0)).exp().tril()


def tpe(x: Tensor, log_decay: Tensor, *, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.tpe`, without the weight of the head; returns s and the last s."""
    rate = logsigmoid(log_decay)
    tokens = x.shape[2]
    steps = torch.arange(1, tokens + 1, device=x.device, dtype=x.dtype)
    out = powers(rate, tokens) @ x
    out = out + (rate[:, None] * steps).exp()[:, :, None] * state[:, :, None]
    return out, out[:, :, -1] if tokens else state
