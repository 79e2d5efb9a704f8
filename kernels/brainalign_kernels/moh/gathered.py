"""Each head attends for the tokens that chose it, and for no other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.softmax.sdpa import softmax_attention

__all__ = ["by_head", "moh_attention"]


def by_head(
    selected: Tensor, attend: Callable[[int, Tensor | None], Tensor], channels: int, like: Tensor
) -> Tensor:
    """Run each head for the tokens that chose it and put the results in their places.

    Parameters
    ----------
    selected : Tensor of bool, shape (B, N, H)
        Who chose which head.
    attend : callable
        From a head and the indices (B, M) of its tokens (None: all, in order) to (B, M, E). Items
        with fewer than M tokens are filled up with tokens that did not choose it.
    channels : int
        Channels E of the values.
    like : Tensor
        Has the type and device of the result.

    Returns
    -------
    Tensor, shape (B, H, N, E)
        Zeros where nothing was computed.
    """
    batch, tokens, heads = selected.shape
    loads = selected.sum(dim=1).amax(dim=0).tolist() if batch and tokens else [0] * heads
    order = selected.transpose(1, 2).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    out = []
    for head, load in enumerate(loads):
        blank = like.new_zeros((batch, tokens, channels))
        if load == tokens:
            out.append(attend(head, None))
        else:
            rows = order[:, head, :load]
            made = attend(head, rows)
            out.append(blank.scatter(1, rows[..., None].expand(-1, -1, channels), made))
    return torch.stack(out, dim=1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    batch, tokens = q.shape[0], q.shape[2]
    groups = q.shape[1] // k.shape[1]
    weights = gates.masked_fill(~selected, 0.0)

    def attend(head: int, rows: Tensor | None) -> Tensor:
        queries, weight, seen = q[:, head], weights[..., head, None], None
        if mask is not None:
            seen = mask[:, head if mask.shape[1] > 1 else 0]
        if rows is not None:
            queries, weight = _take(queries, rows), _take(weight, rows)
            if seen is not None and seen.shape[1] > 1:
                seen = _take(seen.expand(batch, tokens, -1), rows)
        key = head // groups
        made = softmax_attention(
            queries[:, None],
            k[:, key, None],
            v[:, key, None],
            mask=None if seen is None else seen[:, None],
            is_causal=False,
            scale=scale,
        )[:, 0]
        return (made.to(weight.dtype) * weight).to(q.dtype)

    return by_head(selected, attend, v.shape[-1], q)


@torch.library.custom_op("brainalign_kernels::moh_attention", mutates_args=())
def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    return _gathered(q, k, v, gates, selected, mask, scale)


@_traced.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[-1]))


def moh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.moh_attention`."""
    gates = gates.to(accumulation_dtype(q.dtype))
    # How many tokens chose a head is known only when it runs: one opaque step for a tracer.
    run = _traced if torch.compiler.is_compiling() else _gathered
    return run(q, k, v, gates, selected, mask, scale)
