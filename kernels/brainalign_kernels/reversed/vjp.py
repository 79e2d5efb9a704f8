r"""Reversed attention as the backward pass of PyTorch's fused attention.

For :math:`o = A(q, k)\, u` the gradient of :math:`\langle o, v \rangle` with respect to u is
:math:`A^T v`: a fused backward kernel computes it without (N, S) arrays. In turn, for a cotangent
g of :math:`A^T v`, :math:`\langle A^T v, g \rangle = \langle A g, v \rangle`, so that the gradient
for v is the attention to g, and those for q and k are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from brainalign_kernels._checks import expand_heads
from brainalign_kernels.reversed.reference import sent
from brainalign_kernels.softmax.sdpa import open_rows

__all__ = ["missing", "reversed_attention"]


def _attend(
    q: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    return scaled_dot_product_attention(q, k, u, attn_mask=mask, is_causal=is_causal, scale=scale)


@contextmanager
def _autograd(device: torch.device) -> Iterator[None]:
    # An operator runs below autograd; these two need it, for tensors of their own.
    name = "AutogradCUDA" if device.type == "cuda" else "AutogradCPU"
    with ExitStack() as stack:
        for key in (name, "ADInplaceOrView"):
            guard = torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False)
            stack.enter_context(guard)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _apart(x: Tensor) -> Tensor:
    # What inference mode made cannot be saved for a backward pass.
    return x.clone() if x.is_inference() else x.detach()


@torch.library.custom_op("brainalign_kernels::reversed_attention", mutates_args=())
def _send(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    with _autograd(q.device):
        q, k, v = (_apart(x) for x in (q, k, v))
        mask = None if mask is None else _apart(mask)
        blank = v.new_zeros((*k.shape[:3], v.shape[-1])).requires_grad_()
        out = _attend(q, k, blank, mask, is_causal, scale)
        return torch.autograd.grad(out, blank, v)[0].detach().contiguous()


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
    with _autograd(q.device):
        grad, q, k, v = (_apart(x) for x in (grad, q, k, v))
        mask = None if mask is None else _apart(mask)
        q, k = q.requires_grad_(), k.requires_grad_()
        received = _attend(q, k, grad, mask, is_causal, scale)
        grads = (*torch.autograd.grad(received, (q, k), v), received)
        grad_q, grad_k, grad_v = (x.detach().contiguous() for x in grads)
    return grad_q, grad_k, grad_v


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
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors
    grads = _send_backward(grad.contiguous(), q, k, v, mask, ctx.is_causal, ctx.scale)
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
    k = expand_heads(q, k, k)[0]
    v = sent(v, head_probabilities, gate).to(q.dtype)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return q.new_zeros((*k.shape[:3], v.shape[-1])) + 0 * (q.sum() + k.sum() + v.sum())
    if mask is not None:
        # A child without parents sees them all, and sends nothing.
        mask, empty = open_rows(mask, is_causal, q, k)
        mask, v, is_causal = mask.detach(), v.masked_fill(empty, 0.0), False
    return _send(q, k, v, mask, is_causal, scale)
