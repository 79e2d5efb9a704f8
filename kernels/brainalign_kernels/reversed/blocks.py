r"""Reversed attention by blocks of children, whose weights are formed, used and forgotten.

:math:`A^T v` is a sum over children, and so are its gradients: for a cotangent g, with
:math:`P = v g^T`,

.. math:: \nabla v = A g, \qquad
          \nabla_{\text{logits}} = A \odot (P - \mathrm{rowsum}(A \odot P)).

No (N, S) array outlives its block, forwards and backwards, and all sums are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.reversed import reference
from brainalign_kernels.softmax.sdpa import open_rows

__all__ = ["missing", "reversed_attention"]

#: Logits formed at once: they stay in a CPU's cache, and fill a GPU.
_CPU, _GPU = 1 << 19, 1 << 26


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = _GPU if q.is_cuda else _CPU
    rows = max(16, size // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], rows):
        yield slice(start, start + rows)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float, rows: slice
) -> Tensor:
    """Softmax over the parents of some children."""
    logits = (scale * q[:, :, rows].to(k.dtype)) @ k.transpose(-1, -2)
    if mask is not None:
        some = mask if mask.shape[2] == 1 else mask[:, :, rows]
        if some.dtype == torch.bool:
            logits = logits.masked_fill_(~some, -torch.inf)
        else:
            logits += some
    if is_causal:
        child = torch.arange(rows.start, rows.start + logits.shape[2], device=q.device)[:, None]
        later = torch.arange(k.shape[2], device=q.device) > child
        logits = logits.masked_fill_(later, -torch.inf)
    return logits.softmax(dim=-1)


@torch.library.custom_op("brainalign_kernels::reversed_attention", mutates_args=())
def _send(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    wide = accumulation_dtype(q.dtype)
    out = torch.zeros((*k.shape[:3], v.shape[-1]), dtype=wide, device=q.device)
    parents = k.to(wide)
    for rows in _blocks(q, k):
        weights = _weights(q, parents, mask, is_causal, scale, rows)
        out += weights.transpose(-1, -2) @ v[:, :, rows].to(wide)
    return out.to(v.dtype)


@_send.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    return v.new_empty((*k.shape[:3], v.shape[-1]))


@torch.library.custom_op("brainalign_kernels::reversed_attention_backward", mutates_args=())
def _send_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(q.dtype)
    parents, received = k.to(wide), grad.to(wide)
    grad_q, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, v))
    grad_k = torch.zeros(k.shape, dtype=wide, device=k.device)
    for rows in _blocks(q, k):
        weights = _weights(q, parents, mask, is_causal, scale, rows)
        grad_v[:, :, rows] = (weights @ received).to(v.dtype)
        slopes = v[:, :, rows].to(wide) @ received.transpose(-1, -2)
        slopes -= (weights * slopes).sum(dim=-1, keepdim=True)
        slopes *= weights
        grad_q[:, :, rows] = (scale * (slopes @ parents)).to(q.dtype)
        grad_k += slopes.transpose(-1, -2) @ (scale * q[:, :, rows].to(wide))
    return grad_q, grad_k.to(k.dtype), grad_v


@_send_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors
    grads = _send_backward(grad, q, k, v, mask, ctx.is_causal, ctx.scale)
    return (*grads, None, None, None)


_send.register_autograd(_gradient, setup_context=_keep)


def missing(*args: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float) -> str:
    """Say why this path cannot do it, or nothing."""
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the mask."
    return ""


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_probabilities: Tensor | None,
    gate: Tensor | None,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.reversed_attention`."""
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return reference.reversed_attention(
            q, k, v, head_probabilities, gate, mask=mask, is_causal=is_causal, scale=scale
        )
    k = expand_heads(q, k, k)[0]
    v = reference.sent(v, head_probabilities, gate)
    if mask is not None:
        # A child without parents sees them all, and sends nothing.
        mask, empty = open_rows(mask, is_causal, q, k)
        mask, v, is_causal = mask.detach(), v.masked_fill(empty, 0.0), False
    return _send(q, k, v, mask, is_causal, scale).to(q.dtype)
