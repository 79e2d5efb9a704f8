"""TPE chunk by chunk; the ends of the chunks are a shorter TPE with a faster decay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from brainalign_kernels.toeplitz import reference
from brainalign_kernels.toeplitz.reference import powers

__all__ = ["tpe"]


def tpe(x: Tensor, log_decay: Tensor, *, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.tpe`, without the weight of the head; returns s and the last s."""
    if x.shape[2] == 0:
        return reference.tpe(x, log_decay, state=state, chunk_size=chunk_size)
    out = _scan(x, logsigmoid(log_decay), state, max(chunk_size, 2))
    return out, out[:, :, -1]


def _scan(x: Tensor, rate: Tensor, state: Tensor, chunk: int) -> Tensor:
    """All s_t = exp(rate) s_{t-1} + x_t from s_0 = state."""
    tokens = x.shape[2]
    size = min(chunk, tokens)
    steps = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)
    decay = (rate[:, None] * steps).exp()[:, :, None]
    if tokens <= chunk:
        return powers(rate, tokens) @ x + decay * state[:, :, None]
    blocks = pad(x, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
    inner = powers(rate, size)[:, None] @ blocks
    ends = _scan(inner[:, :, :, -1], rate * size, state, chunk)
    before = torch.cat([state[:, :, None], ends[:, :, :-1]], dim=2)
    out = inner + decay[:, None] * before[:, :, :, None]
    return out.flatten(2, 3)[:, :, :tokens]
