"""Gated linear attention chunk by chunk; every exponent is a sum over a stretch of steps.

A decay per head turns the dense scores of a chunk into scores times exp(sums between two steps). A
decay per channel does not factor out of the scores. There the chunk is halved again and again: the
second half of each stretch sees the first, and both decay from and to the middle, so that no factor
is above 1 for log-decays not above 0. Resets, a log-decay of -inf, are exact too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.gated_linear import reference
from brainalign_kernels.lightning.chunked import join_chunks, scan_states, split_chunks

__all__ = ["gated_linear_attention"]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_decay_value: Tensor | None,
    state: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.gated_linear_attention`."""
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    n = q.shape[2]
    if n == 0:
        return reference.gated_linear_attention(
            q, k, v, log_decay, log_decay_value, state, scale=scale, chunk_size=chunk_size
        )
    by_channel = log_decay.ndim == 4 or log_decay_value is not None
    size = min(chunk_size, n)
    if by_channel:
        size = 1 << (size.bit_length() - 1)
    q, k, v, log_decay = (split_chunks(x.to(wide), size) for x in (q, k, v, log_decay))
    q = scale * q
    if log_decay.ndim == 4:
        log_decay = log_decay[..., None]
    kept = log_decay.cumsum(3).exp()
    later = _sum_after(log_decay).exp()
    if log_decay_value is None:
        kv = (k * later).transpose(-1, -2) @ v
        before, final = scan_states(kv, kept[..., -1, :, None], state)
        inter = (q * kept) @ before
        if by_channel:
            out = inter + _halves(q, k, v, log_decay, None)
        else:
            out = inter + ((q @ k.transpose(-1, -2)) * _between(log_decay)) @ v
    else:
        by_value = split_chunks(log_decay_value.to(wide), size)
        kept_value = by_value.cumsum(3).exp()
        kv = (k * later).transpose(-1, -2) @ (v * _sum_after(by_value).exp())
        factor = kept[..., -1, :, None] * kept_value[..., -1, None, :]
        before, final = scan_states(kv, factor, state)
        out = ((q * kept) @ before) * kept_value + _halves(q, k, v, log_decay, by_value)
    return join_chunks(out, n).to(dtype), final


def _sum_after(x: Tensor) -> Tensor:
    """Sum over the steps after each, along axis -2."""
    return pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _between(log_decay: Tensor) -> Tensor:
    """Return exp of the sum over the steps j+1 to i, at [..., i, j]; 0 for j > i."""
    size = log_decay.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    steps = log_decay.expand(*log_decay.shape[:-1], size).masked_fill(~lower.tril(-1), 0.0)
    return steps.cumsum(-2).masked_fill(~lower, -torch.inf).exp()


def _halves(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, by_value: Tensor | None) -> Tensor:
    """Attention within chunks (..., size, channels), size a power of two."""
    size = q.shape[-2]
    out = (q * k).sum(-1, keepdim=True) * v
    half = 1
    while half < size:
        parts = (size // (2 * half), 2, half)
        q2, k2, v2, g2 = (x.unflatten(-2, parts) for x in (q, k, v, by_key))
        late = q2[..., 1, :, :] * g2[..., 1, :, :].cumsum(-2).exp()
        early = k2[..., 0, :, :] * _sum_after(g2[..., 0, :, :]).exp()
        value = v2[..., 0, :, :]
        if by_value is not None:
            w2 = by_value.unflatten(-2, parts)
            value = value * _sum_after(w2[..., 0, :, :]).exp()
        seen = (late @ early.transpose(-1, -2)) @ value
        if by_value is not None:
            seen = seen * w2[..., 1, :, :].cumsum(-2).exp()
        first, second = out.unflatten(-2, parts).unbind(-3)
        out = torch.stack((first, second + seen), dim=-3).flatten(-4, -2)
        half *= 2
    return out
