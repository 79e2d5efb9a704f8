"""The direct forms: every output as a weighted sum over the tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu, logsigmoid, softplus

from brainalign_kernels._causal import causal_product
from brainalign_kernels._checks import accumulation_dtype, default_scale
from brainalign_kernels.softmax import softmax_attention

__all__ = ["chunked", "dsf_attention", "log_forget", "positive", "qlstm", "s6_layer"]


def positive(x: Tensor) -> Tensor:
    """Return elu(x) + 1."""
    return elu(x) + 1.0


def log_forget(forget: Tensor, exponent: Tensor | None) -> Tensor:
    """Logarithm of the forget gate: sigmoid, or the reversed sigmoid to a power."""
    if exponent is None:
        return logsigmoid(forget)
    return logsigmoid(-forget) * exponent.relu()


def dsf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    log_normaliser: Tensor | None,
    scale: float | None,
    chunk_size: int,
) -> Tensor:
    """See `brainalign_kernels.dsf_attention`."""
    if kind == "softmax":
        scale = default_scale(scale, q.shape[-1])
        return softmax_attention(q, k, v, is_causal=True, scale=scale, impl="reference")
    wide = accumulation_dtype(q.dtype)
    dtype, q, k, v = q.dtype, q.to(wide), k.to(wide), v.to(wide)
    if kind == "linear":
        scores = (positive(q) @ positive(k).transpose(-1, -2)).tril()
        return (scores @ v / scores.sum(dim=-1, keepdim=True)).to(dtype)
    assert log_normaliser is not None
    scores = (q @ k.transpose(-1, -2)).tril()
    return (scores @ v * (-log_normaliser.to(wide)).exp()[..., None]).to(dtype)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    log_normaliser: Tensor | None,
    scale: float | None,
    chunk_size: int,
) -> Tensor:
    """Fused softmax attention, or chunks of linear attention."""
    if kind == "softmax":
        scale = default_scale(scale, q.shape[-1])
        return softmax_attention(q, k, v, is_causal=True, scale=scale, impl="compiled")
    wide = accumulation_dtype(q.dtype)
    dtype, q, k, v = q.dtype, q.to(wide), k.to(wide), v.to(wide)
    if kind == "linear":
        q, k = positive(q), positive(k)
        total = (q * k.cumsum(dim=-2)).sum(dim=-1, keepdim=True)
        return (causal_product(q, k, v, chunk_size) / total).to(dtype)
    assert log_normaliser is not None
    out = causal_product(q, k, v, chunk_size)
    return (out * (-log_normaliser.to(wide)).exp()[..., None]).to(dtype)


def _decay_between(log_decay: Tensor, tokens: int) -> Tensor:
    # exp of the sum over the tokens s + 1 to t; zero for t < s. Tokens are axis 2, s comes after t.
    total = log_decay.cumsum(dim=2)
    between = total.unsqueeze(3) - total.unsqueeze(2)
    seen = torch.ones((tokens, tokens), dtype=torch.bool, device=log_decay.device).tril()
    seen = seen.view(tokens, tokens, *[1] * (between.ndim - 4))
    return between.masked_fill(~seen, -torch.inf).exp()


def qlstm(
    x: Tensor, forget: Tensor, take: Tensor, give: Tensor, *, exponent: Tensor | None
) -> Tensor:
    """See `brainalign_kernels.qlstm`."""
    wide = accumulation_dtype(x.dtype)
    logs = log_forget(forget.to(wide), None if exponent is None else exponent.to(wide))
    weights = _decay_between(logs.expand(x.shape), x.shape[2])
    taken = take.to(wide).sigmoid() * x.to(wide)
    out = give.to(wide).sigmoid() * (weights * taken.unsqueeze(2)).sum(dim=3)
    return out.to(x.dtype)


def s6_layer(
    x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None
) -> Tensor:
    """See `brainalign_kernels.s6_layer`."""
    wide = accumulation_dtype(x.dtype)
    x_, step, decay, b, c = (y.to(wide) for y in (x, step, decay, b, c))
    # (B, H, N, n, E) -> weights (B, H, N, N, n, E)
    logs = logsigmoid(-step)[..., None, :] * decay.relu()
    weights = _decay_between(logs, x.shape[2])
    taken = (softplus(step) * x_)[..., None, :] * b[..., None]
    out = (c[..., None] * (weights * taken.unsqueeze(2)).sum(dim=3)).sum(dim=-2)
    return (out if d is None else out + d.to(wide) * x_).to(x.dtype)
