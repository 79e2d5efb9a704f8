r"""LightNet chunk by chunk: linear memory, exponents never above the safe range.

With z_t the running log-sum of k and kappa_t = exp(k_t - z_t), token s enters the output at t with
the weight kappa_s exp(z_s - z_t). Inside a chunk the weight is split at a reference r into
exp(r - z_t) and kappa_s exp(z_s - r), a product of matrices. Where z rises too far within a chunk
for that, the chunk is halved: for t right and s left of the middle, r in the middle keeps both
exponents below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.lightnet.ops import register
from brainalign_kernels.lightnet.reference import FLOOR

__all__ = ["lightnet_attention", "lightnet_recurrence", "log_sum"]


def _span(dtype: torch.dtype) -> float:
    """How far z may rise in a chunk that is not halved: exp of it times the data stays finite."""
    return 300.0 if dtype == torch.float64 else 50.0


def gates(k: Tensor, z0: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of k over the tokens seen, from z0 on, and each token's share."""
    tokens = k.shape[2]
    if 0 in k.shape:
        return torch.empty_like(k), torch.empty_like(k)
    blocks = _chunks(k, min(chunk, tokens), last=True)
    top, low = blocks.amax(dim=3), blocks.amin(dim=3)
    # Not where k rises too far within a chunk, nor (a difference of infinities) for masked tokens.
    if not bool((top - low <= _span(k.dtype)).all()):
        z = torch.cat([z0[:, :, None], k], dim=2).logcumsumexp(dim=2)[:, :, 1:].clamp(min=FLOOR)
        return z, (k - z).exp()
    shares = (blocks - top[:, :, :, None]).exp_()
    sums = _ones(blocks) @ shares
    ends = top + sums[:, :, :, -1].log()
    carry = torch.cat([z0[:, :, None], ends], dim=2).logcumsumexp(dim=2)[:, :, :-1]
    reference = torch.maximum(top, carry)
    scale = (top - reference).exp()[:, :, :, None]
    sums = torch.addcmul((carry - reference).exp()[:, :, :, None], sums, scale)
    shares.mul_(scale).div_(sums)
    z = sums.log_().add_(reference[:, :, :, None])
    return _tokens(z, tokens), _tokens(shares, tokens)


def _ones(blocks: Tensor) -> Tensor:
    return blocks.new_ones(blocks.shape[3], blocks.shape[3]).tril()


def gates_backward(
    kappa: Tensor, z: Tensor, z0: Tensor, grad_z: Tensor, grad_kappa: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to k and z0."""
    inner = grad_z - kappa * grad_kappa
    later, first = _reverse_sum(inner, z, z0.clamp(min=FLOOR))
    return kappa * (grad_kappa + later), first


def _reverse_sum(y: Tensor, z: Tensor, z0: Tensor, chunk: int = 32) -> tuple[Tensor, Tensor]:
    r"""Return sum_{t >= s} exp(z_s - z_t) y_t for every s, and the same with z0 for z_s."""
    tokens = y.shape[2]
    if tokens == 0:
        return y.clone(), torch.zeros_like(z0)
    chunk = min(chunk, tokens)
    y, z = _chunks(y, chunk), _chunks(z, chunk, last=True)
    if _steep(z) is None:
        rise = (z - z[:, :, :, :1]).exp_()
        out = rise * (_ones(z).T @ (y / rise))
    else:
        out = y.clone()
        for t in range(chunk - 2, -1, -1):
            decay = (z[:, :, :, t] - z[:, :, :, t + 1]).exp_()
            out[:, :, :, t].addcmul_(decay, out[:, :, :, t + 1])
    # Sum over all later chunks, seen from each chunk's last token.
    carry = torch.zeros_like(out[:, :, :, 0])
    for c in range(y.shape[2] - 2, -1, -1):
        ahead = (
            out[:, :, c + 1, 0]
            + carry[:, :, c + 1] * (z[:, :, c + 1, 0] - z[:, :, c + 1, -1]).exp()
        )
        carry[:, :, c] = ahead * (z[:, :, c, -1] - z[:, :, c + 1, 0]).exp()
    out += carry[:, :, :, None] * (z - z[:, :, :, -1:]).exp()
    return _tokens(out, tokens), out[:, :, 0, 0] * (z0 - z[:, :, 0, 0]).exp()


def _chunks(x: Tensor, chunk: int, *, last: bool = False) -> Tensor:
    """Reshape (B, H, N, D) to (B, H, chunks, chunk, D): the tail is zeros, or the last token."""
    missing = -x.shape[2] % chunk
    if missing:
        shape = (*x.shape[:2], missing, x.shape[3])
        x = torch.cat([x, x[:, :, -1:].expand(shape) if last else x.new_zeros(shape)], dim=2)
    return x.unflatten(2, (-1, chunk))


def _tokens(x: Tensor, tokens: int) -> Tensor:
    return x.flatten(2, 3)[:, :, :tokens].contiguous()


def _scores(q: Tensor, kappa: Tensor, z: Tensor) -> Tensor:
    """Weights (..., C, C) of a chunk: sum over channels of q_t exp(z_s - z_t) kappa_s, s <= t."""
    size = q.shape[-2]
    start = z[..., :1, :]
    out = (q * (start - z).exp()) @ (kappa * (z - start).exp()).transpose(-1, -2)
    out = out.tril_()
    steep = _steep(z)
    if steep is None:
        return out
    q, kappa, z = q[steep], kappa[steep], z[steep]
    half = size // 2
    left, right = (..., slice(None, half), slice(None)), (..., slice(half, None), slice(None))
    middle = z[..., half - 1 : half, :]
    block = q.new_zeros(*q.shape[:-1], size)
    block[..., :half, :half] = _scores(q[left], kappa[left], z[left])
    block[..., half:, half:] = _scores(q[right], kappa[right], z[right])
    block[..., half:, :half] = (q[right] * (middle - z[right]).exp()) @ (
        kappa[left] * (z[left] - middle).exp()
    ).transpose(-1, -2)
    out[steep] = block
    return out


def _scores_backward(q: Tensor, kappa: Tensor, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_scores` with respect to q and kappa; `grad` is lower triangular."""
    size = q.shape[-2]
    start = z[..., :1, :]
    fall, rise = (start - z).exp(), (z - start).exp()
    grad_q = fall * (grad @ (kappa * rise))
    grad_kappa = rise * (grad.transpose(-1, -2) @ (q * fall))
    steep = _steep(z)
    if steep is None:
        return grad_q, grad_kappa
    q, kappa, z, grad = q[steep], kappa[steep], z[steep], grad[steep]
    half = size // 2
    left, right = (..., slice(None, half), slice(None)), (..., slice(half, None), slice(None))
    middle = z[..., half - 1 : half, :]
    ql, kl = _scores_backward(q[left], kappa[left], z[left], grad[..., :half, :half])
    qr, kr = _scores_backward(q[right], kappa[right], z[right], grad[..., half:, half:])
    fall, rise = (middle - z[right]).exp(), (z[left] - middle).exp()
    across = grad[..., half:, :half]
    qr = qr + fall * (across @ (kappa[left] * rise))
    kl = kl + rise * (across.transpose(-1, -2) @ (q[right] * fall))
    grad_q[steep] = torch.cat([ql, qr], dim=-2)
    grad_kappa[steep] = torch.cat([kl, kr], dim=-2)
    return grad_q, grad_kappa


def _steep(z: Tensor) -> Tensor | None:
    """Which chunks have to be halved; None for none."""
    if z.shape[-2] == 1 or z.numel() == 0:
        return None
    steep = (z[..., -1, :] - z[..., 0, :]).amax(dim=-1) > _span(z.dtype)
    return steep if bool(steep.any()) else None


def _states(
    kappa: Tensor, v: Tensor, z: Tensor, z0: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """State before each chunk, state after the last, and z before each chunk."""
    end = z[:, :, :, -1]
    start = torch.cat([z0[:, :, None], end[:, :, :-1]], dim=2)
    added = (kappa * (z - end[:, :, :, None]).exp()).transpose(-1, -2) @ v
    keep = (start - end).exp()[..., None]
    state = s0
    for c in range(z.shape[2]):
        after = torch.addcmul(added[:, :, c], keep[:, :, c], state)
        added[:, :, c] = state
        state = after
    return added, state, start


def forward(
    q: Tensor, kappa: Tensor, v: Tensor, z: Tensor, z0: Tensor, s0: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    tokens = q.shape[2]
    if 0 in q.shape or 0 in v.shape:
        return q.new_zeros(*q.shape[:3], v.shape[3]), s0.clone()
    chunk = min(chunk, tokens)
    q, kappa, v = (_chunks(x, chunk) for x in (q, kappa, v))
    z = _chunks(z, chunk, last=True)
    before, final, start = _states(kappa, v, z, z0, s0)
    out = _scores(q, kappa, z) @ v
    out += (q * (start[:, :, :, None] - z).exp()) @ before
    return _tokens(out, tokens), final.clone()


def backward(
    q: Tensor,
    kappa: Tensor,
    v: Tensor,
    z: Tensor,
    z0: Tensor,
    s0: Tensor,
    grad_out: Tensor,
    grad_state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, kappa, v, z, z0 and s0."""
    tokens = q.shape[2]
    if 0 in q.shape or 0 in v.shape:
        zeros = [torch.zeros_like(x) for x in (q, kappa, v, z, z0)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], grad_state.clone()
    chunk = min(chunk, tokens)
    q, kappa, v, grad_out = (_chunks(x, chunk) for x in (q, kappa, v, grad_out))
    z = _chunks(z, chunk, last=True)
    before, final, start = _states(kappa, v, z, z0, s0)
    end = z[:, :, :, -1]
    fall = (start[:, :, :, None] - z).exp()
    rise = (z - end[:, :, :, None]).exp()
    # Gradient of the state after each chunk, from the last to the first.
    after = (q * fall).transpose(-1, -2) @ grad_out
    keep = (start - end).exp()[..., None]
    carry = grad_state
    for c in range(z.shape[2] - 1, -1, -1):
        ahead = torch.addcmul(after[:, :, c], keep[:, :, c], carry)
        after[:, :, c] = carry
        carry = ahead
    weights = _scores(q, kappa, z)
    grad_v = weights.transpose(-1, -2) @ grad_out + (kappa * rise) @ after
    grad_weights = (grad_out @ v.transpose(-1, -2)).tril_()
    grad_q, grad_kappa = _scores_backward(q, kappa, z, grad_weights)
    grad_q += fall * (grad_out @ before.transpose(-1, -2))
    grad_kappa += rise * (v @ after.transpose(-1, -2))
    grad_z = _tokens(kappa * grad_kappa - q * grad_q, tokens)
    grad_z[:, :, -1] -= (final * grad_state).sum(dim=-1)
    return (
        _tokens(grad_q, tokens),
        _tokens(grad_kappa, tokens),
        _tokens(grad_v, tokens),
        grad_z,
        (s0 * carry).sum(dim=-1),
        carry.clone(),
    )


_gates, _recurrence = register("chunked", gates, gates_backward, forward, backward)


def log_sum(k: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightnet.attention.running_log_sum`."""
    z, share = _gates(k, start)
    return z, share


def lightnet_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    modulation: Tensor | None,
    state: tuple[Tensor, Tensor],
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `brainalign_kernels.lightnet_attention`."""
    wide = accumulation_dtype(q.dtype)
    memory, before = (x.to(wide) for x in state)
    z, kappa = _gates(k.to(wide), before)
    if modulation is not None:
        kappa = kappa * modulation.to(wide)
    out, final = _recurrence(
        q.to(wide), kappa, v.to(wide), z, before.clamp(min=FLOOR), memory, chunk_size
    )
    total = z[:, :, -1] if z.shape[2] else before
    return out.to(q.dtype), final, total.masked_fill(total <= FLOOR, -torch.inf)


def lightnet_recurrence(
    q: Tensor,
    kappa: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    state: tuple[Tensor, Tensor],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightnet_recurrence`."""
    wide = accumulation_dtype(q.dtype)
    memory, before = (x.to(wide) for x in state)
    out, final = _recurrence(
        q.to(wide),
        kappa.to(wide),
        v.to(wide),
        z.to(wide).clamp(min=FLOOR),
        before.clamp(min=FLOOR),
        memory,
        chunk_size,
    )
    return out.to(q.dtype), final
