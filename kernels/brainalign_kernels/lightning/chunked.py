"""Lightning attention chunk by chunk: linear time and memory, decays only from differences.

Within a chunk the scores are dense; between chunks a state (D, E) of the accumulation type carries
the past. Every exponent is a sum of log-decays over a stretch of steps, never its negative, so that
nothing overflows, however strong the decay or long the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.lightning import reference

__all__ = ["join_chunks", "lightning_attention", "scan_states", "split_chunks"]


def split_chunks(x: Tensor, size: int) -> Tensor:
    """Split (B, H, N, ...) into (B, H, chunks, size, ...); the last chunk is filled with zeros."""
    missing = -x.shape[2] % size
    if missing:
        x = pad(x, [0, 0] * (x.ndim - 3) + [0, missing])
    return x.unflatten(2, (x.shape[2] // size, size))


def join_chunks(x: Tensor, n: int) -> Tensor:
    """Undo `split_chunks`."""
    return x.flatten(2, 3)[:, :, :n]


def scan_states(kv: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before every chunk, and after the last.

    Parameters
    ----------
    kv : Tensor, shape (B, H, chunks, D, E)
        What each chunk adds to the state at its end.
    decay : Tensor, broadcastable to `kv` except in `chunks`
        Factor of the state over each chunk.
    state : Tensor, shape (B, H, D, E), optional
        Before the first chunk.
    """
    current = kv.new_zeros(kv[:, :, 0].shape) if state is None else state.to(kv.dtype)
    before = []
    for added, factor in zip(kv.unbind(2), decay.unbind(2), strict=True):
        before.append(current)
        current = torch.addcmul(added, current, factor)
    return torch.stack(before, dim=2), current


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.lightning_attention`."""
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    h, n = q.shape[1:3]
    if n == 0:
        return reference.lightning_attention(
            q, k, v, log_decay, state, scale=scale, chunk_size=chunk_size
        )
    size = min(chunk_size, n)
    q, k, v = (split_chunks(x.to(wide), size) for x in (q, k, v))
    q = scale * q
    chunks = q.shape[2]
    step = torch.arange(size, device=q.device, dtype=wide)
    # The last chunk ends where the sequence does, so that its state is the one after token n.
    ends = torch.full((chunks, 1), size, device=q.device, dtype=wide)
    ends[-1] = n - (chunks - 1) * size
    rate = log_decay.to(wide).view(h, 1, 1)
    past = step[:, None] - step
    within = (rate * past).masked_fill(past < 0, -torch.inf).exp()
    from_start = (rate * (step + 1)).exp()
    to_end = (rate * (ends - 1 - step).clamp(min=0)).exp()
    whole = (rate * ends).exp()
    kv = (k * to_end[..., None]).transpose(-1, -2) @ v
    before, final = scan_states(kv, whole[None, ..., None], state)
    out = ((q @ k.transpose(-1, -2)) * within[:, None]) @ v
    out = out + (q * from_start[..., None]) @ before
    return join_chunks(out, n).to(dtype), final
