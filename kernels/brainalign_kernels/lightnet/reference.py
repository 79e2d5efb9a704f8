"""LightNet from its definition: a softmax of k over the tokens seen, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["FLOOR", "bidirectional", "lightnet_attention", "lightnet_recurrence", "log_sum"]

#: Stands for a log-sum of nothing: differences of it stay finite.
FLOOR = -1e30


def lightnet_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    modulation: Tensor | None,
    state: tuple[Tensor, Tensor],
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `brainalign_kernels.lightnet_attention`; returns the output and both parts of the state.

    What was seen before is one more token: its logit is the log-sum, its value the state.
    """
    wide = accumulation_dtype(q.dtype)
    memory, before = state
    tokens = q.shape[2]
    logits = torch.cat([before[:, :, None].to(wide), k.to(wide)], dim=2).transpose(2, 3)
    seen = torch.ones(tokens + 1, tokens + 1, dtype=torch.bool, device=q.device).tril()
    # (B, H, t, D, s); row t = 0 is the state before the first token.
    weights = masked_softmax(logits[:, :, None], seen[:, None])
    old, new = weights[..., 0], weights[..., 1:]
    if modulation is not None:
        new = new * modulation.to(wide).transpose(2, 3)[:, :, None]
    out = torch.einsum("bhtd,bhtds,bhse->bhte", q.to(wide), new[:, :, 1:], v.to(wide))
    out = out + torch.einsum("bhtd,bhtd,bhde->bhte", q.to(wide), old[:, :, 1:], memory.to(wide))
    final = old[:, :, -1, :, None] * memory.to(wide)
    final = final + torch.einsum("bhds,bhse->bhde", new[:, :, -1], v.to(wide))
    empty = (logits == -torch.inf).all(dim=-1)
    total = logits.masked_fill(empty[..., None], 0.0).logsumexp(dim=-1)
    return out.to(q.dtype), final, total.masked_fill(empty, -torch.inf)


def lightnet_recurrence(
    q: Tensor,
    kappa: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    state: tuple[Tensor, Tensor],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightnet_recurrence`; returns the output and the state."""
    wide = accumulation_dtype(q.dtype)
    memory, before = state
    tokens = q.shape[2]
    z = torch.cat([before[:, :, None].to(wide), z.to(wide)], dim=2).clamp(min=FLOOR)
    seen = torch.ones(tokens + 1, tokens + 1, dtype=torch.bool, device=q.device).tril()
    gap = z[:, :, :, None] - z[:, :, None]
    weights = (-gap).masked_fill(~seen[..., None], -torch.inf).exp()
    old, new = weights[:, :, :, 0], weights[:, :, :, 1:] * kappa.to(wide)[:, :, None]
    out = torch.einsum("bhtd,bhtsd,bhse->bhte", q.to(wide), new[:, :, 1:], v.to(wide))
    out = out + torch.einsum("bhtd,bhtd,bhde->bhte", q.to(wide), old[:, :, 1:], memory.to(wide))
    final = old[:, :, -1, :, None] * memory.to(wide)
    final = final + torch.einsum("bhsd,bhse->bhde", new[:, :, -1], v.to(wide))
    return out.to(q.dtype), final


def log_sum(k: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightnet.attention.running_log_sum`."""
    tokens = k.shape[2]
    logits = torch.cat([start[:, :, None], k], dim=2).transpose(2, 3)
    seen = torch.ones(tokens, tokens + 1, dtype=torch.bool, device=k.device).tril(1)
    logits = logits[:, :, None].expand(-1, -1, tokens, -1, -1)
    share = masked_softmax(logits, seen[:, None]).diagonal(1, dim1=2, dim2=4).transpose(2, 3)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    empty = (logits == -torch.inf).all(dim=-1)
    z = logits.masked_fill(empty[..., None], 0.0).logsumexp(dim=-1)
    return z.masked_fill(empty, FLOOR), share


def bidirectional(
    q: Tensor, k: Tensor, v: Tensor, *, modulation: Tensor | None, zero_start: bool
) -> Tensor:
    """Every token sees all: one softmax over the sequence per channel."""
    wide = accumulation_dtype(q.dtype)
    logits = k.to(wide).transpose(-1, -2)
    if zero_start:
        logits = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], 1)], dim=-1)
    weights = masked_softmax(logits)[..., : k.shape[2]]
    if modulation is not None:
        weights = weights * modulation.to(wide).transpose(-1, -2)
    return (q.to(wide) @ (weights @ v.to(wide))).to(q.dtype)
