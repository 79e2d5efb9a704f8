"""Neighborhood attention by blocks of queries: each gathers the few keys that it can see.

A block is a box of queries of one dilation group. Its keys are a box too, so that both are products
of one table per axis; the masks of equal blocks are stored once. Blocks go through in chunks, and
the backward pass computes their weights again: beside inputs and outputs, memory does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.neighborhood.windows import Axis, bias_entries, window

__all__ = ["neighborhood_attention"]

#: Numbers that a chunk of blocks may hold in its larger arrays: they stay in the cache.
_CHUNK = 1 << 18
#: Cost of a block: as many logits. Of a gathered key: likewise.
_PER_BLOCK, _PER_KEY = 2000, 16
_SIDES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class _AxisBlocks(NamedTuple):
    queries: Tensor  # (blocks, side): positions on the axis
    real: Tensor  # (blocks, side): not filled up
    keys: Tensor  # (blocks, keys)
    pattern: Tensor  # (blocks,): row of `allowed` and `offset`
    allowed: Tensor  # (patterns, side, keys)
    offset: Tensor  # (patterns, side, keys): entry of the position bias


class _Blocks(NamedTuple):
    full: bool  # no block is filled up
    queries: Tensor  # (blocks, M): token
    real: Tensor  # (blocks, M)
    keys: Tensor  # (blocks, S): token
    pattern: Tensor  # (blocks,)
    allowed: Tensor  # (patterns, M, S)
    offset: Tensor  # (patterns, M, S)


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axes: tuple[Axis, ...], bias: Tensor | None, scale: float
) -> Tensor:
    """See `brainalign_kernels.neighborhood_attention`."""
    numbers = [int(x) for axis in axes for x in axis]
    out: Tensor = torch.ops.brainalign_kernels.neighborhood_blocks(q, k, v, bias, numbers, scale)
    return out


def _axes(numbers: Sequence[int]) -> tuple[Axis, ...]:
    rows = [numbers[i : i + 5] for i in range(0, len(numbers), 5)]
    return tuple(Axis(n, k, d, s, bool(c)) for n, k, d, s, c in rows)


@lru_cache(maxsize=64)
def _along(axis: Axis, side: int) -> _AxisBlocks:
    queries, real, first, last = [], [], [], []
    for group in range(axis.dilation):
        size = (axis.length - group + axis.dilation - 1) // axis.dilation
        count = -(-size // side)
        index = torch.arange(count * side).view(count, side)
        real.append(index < size)
        index = index.clamp(max=size - 1)
        queries.append(index * axis.dilation + group)
        lo, hi = window(queries[-1], axis)
        first.append(lo)
        last.append(hi)
    query, low, high = torch.cat(queries), torch.cat(first), torch.cat(last)
    start = low.amin(dim=1, keepdim=True)
    width = int((high.amax(dim=1, keepdim=True) - start).max()) + 1
    key = start + torch.arange(width)
    residue = query[:, :1] % axis.dilation
    beyond = (axis.length - 1 - residue) // axis.dilation
    allowed = (key[:, None] >= low[..., None]) & (key[:, None] <= high[..., None])
    offset = key[:, None] - (query // axis.dilation)[..., None] + axis.kernel - 1
    # Where nothing is allowed the entry does not matter, and equal patterns must be equal.
    offset = offset.masked_fill(~allowed, 0)
    both = torch.cat([allowed.long(), offset], dim=-1).flatten(1)
    unique, pattern = torch.unique(both, dim=0, return_inverse=True)
    shaped = unique.view(-1, side, 2 * width)
    return _AxisBlocks(
        query,
        torch.cat(real),
        torch.minimum(key, beyond) * axis.dilation + residue,
        pattern,
        shaped[..., :width].bool(),
        shaped[..., width:],
    )


@lru_cache(maxsize=64)
def _sides(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Side of a block on each axis, such that the work is least."""
    options = []
    for axis in axes:
        size = -(-axis.length // axis.dilation)
        found = {}
        for side in (*_SIDES, size):
            count = -(-size // min(side, size))
            even = -(-size // count)
            shared = -(-(even - 1) // axis.stride) * axis.stride
            found[even] = (even, count * axis.dilation, min(size, shared + axis.kernel))
        options.append(list(found.values()))

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, blocks, keys = (math.prod(column) for column in zip(*choice, strict=True))
        # Below 32 queries a matrix product is not worth its start.
        return blocks * (max(queries, 32) * keys + _PER_KEY * keys + _PER_BLOCK)

    return tuple(side for side, _, _ in min(product(*options), key=cost))


@lru_cache(maxsize=32)
def _make_blocks(axes: tuple[Axis, ...], device: torch.device) -> _Blocks:
    with torch.inference_mode(False), torch.no_grad():
        along = [_along(axis, side) for axis, side in zip(axes, _sides(axes), strict=True)]
        one = torch.zeros((1, 1), dtype=torch.long)
        queries, keys, pattern, real = one, one, one[0], one == 0
        allowed, offset = (one == 0)[None], one[None]
        for axis, a in zip(axes, along, strict=True):
            queries = _outer(queries * axis.length, a.queries)
            keys = _outer(keys * axis.length, a.keys)
            real = _outer(real.long(), a.real.long()) == 2
            pattern = (pattern[:, None] * len(a.allowed) + a.pattern).flatten()
            allowed = _outer(allowed.long(), a.allowed.long()) == 2
            offset = _outer(offset * (2 * axis.kernel - 1), a.offset)
        tables = [x.to(device) for x in (queries, real, keys, pattern, allowed, offset)]
        return _Blocks(bool(real.all()), *tables)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return sums of each entry of `a` with each of `b`, axis by axis; those of `b` run faster."""
    spread = a.reshape([x for n in a.shape for x in (n, 1)])
    spread = spread + b.reshape([x for n in b.shape for x in (1, n)])
    return spread.reshape([m * n for m, n in zip(a.shape, b.shape, strict=True)])


class _Chunk(NamedTuple):
    queries: Tensor  # (C * M,)
    keys: Tensor  # (C * S,)
    pattern: Tensor  # (C,)
    real: Tensor | None  # (C, M, 1), or None if no block is filled up
    blocks: int


def _chunks(blocks: _Blocks, per_block: int) -> Iterator[_Chunk]:
    step = max(1, _CHUNK // max(1, per_block))
    for start in range(0, len(blocks.pattern), step):
        part = slice(start, start + step)
        pattern = blocks.pattern[part]
        real = None if blocks.full else blocks.real[part, :, None]
        yield _Chunk(
            blocks.queries[part].flatten(), blocks.keys[part].flatten(), pattern, real, len(pattern)
        )


def _per_block(blocks: _Blocks, q: Tensor, k: Tensor, v: Tensor) -> int:
    return k.shape[0] * k.shape[1] * blocks.keys.shape[1] * (q.shape[3] + v.shape[3])


def _added(blocks: _Blocks, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logits, (H or 1, patterns, M, S)."""
    mask = torch.zeros(blocks.allowed.shape, dtype=dtype, device=blocks.allowed.device)
    mask = mask.masked_fill_(~blocks.allowed, -torch.inf)[None]
    if bias is None:
        return mask
    return mask + bias.to(dtype)[:, blocks.offset.flatten()].view(-1, *blocks.offset.shape)


class _Cut:
    """Tensors (B, H, N, D) cut into the blocks of a chunk: (B * G, C, R * M or S, D)."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.b, self.h, self.n = q.shape[:3]
        self.g = k.shape[1]
        self.r = self.h // self.g
        self.dtype = accumulation_dtype(q.dtype)

    def queries(self, x: Tensor, chunk: _Chunk) -> Tensor:
        d = x.shape[-1]
        taken = x.reshape(-1, self.n, d).index_select(1, chunk.queries).to(self.dtype)
        taken = taken.view(self.b * self.g, self.r, chunk.blocks, -1, d).transpose(1, 2)
        return taken.reshape(self.b * self.g, chunk.blocks, -1, d)

    def keys(self, x: Tensor, chunk: _Chunk) -> Tensor:
        d = x.shape[-1]
        taken = x.reshape(-1, self.n, d).index_select(1, chunk.keys).to(self.dtype)
        return taken.view(self.b * self.g, chunk.blocks, -1, d)

    def added(self, added: Tensor, chunk: _Chunk) -> Tensor:
        """(B * G or 1, C, R * M, S)."""
        c, (heads, _, m, s) = chunk.blocks, added.shape
        taken = added.index_select(1, chunk.pattern)
        if heads == 1:
            return taken[:, :, None].expand(1, c, self.r, m, s).reshape(1, c, self.r * m, s)
        taken = taken.view(1, self.g, self.r, c, m, s).transpose(2, 3)
        return taken.expand(self.b, -1, -1, -1, -1, -1).reshape(-1, c, self.r * m, s)

    def heads(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Back to heads: (B * H, C, M, any)."""
        m, last = x.shape[2] // self.r, x.shape[3]
        x = x.view(self.b * self.g, chunk.blocks, self.r, m, last).transpose(1, 2)
        return x.reshape(self.b * self.h, chunk.blocks, m, last)

    def put(self, into: Tensor, x: Tensor, chunk: _Chunk) -> None:
        """Write blocks of queries where they came from; what fills a block up is equal."""
        rows = self.heads(x, chunk).flatten(1, 2).to(into.dtype)
        into.view(self.b * self.h, self.n, -1).index_copy_(1, chunk.queries, rows)

    def add(self, into: Tensor, x: Tensor, chunk: _Chunk) -> None:
        """Add blocks of keys to where they came from."""
        into.view(self.b * self.g, self.n, -1).index_add_(1, chunk.keys, x.flatten(1, 2))


@torch.library.custom_op("brainalign_kernels::neighborhood_blocks", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[int], scale: float
) -> Tensor:
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    if out.numel() == 0:
        return out
    blocks, cut = _make_blocks(_axes(axes), q.device), _Cut(q, k)
    added = _added(blocks, bias, cut.dtype)
    for chunk in _chunks(blocks, _per_block(blocks, q, k, v)):
        made = scaled_dot_product_attention(
            cut.queries(q, chunk), cut.keys(k, chunk), cut.keys(v, chunk),
            attn_mask=cut.added(added, chunk), scale=scale,
        )  # fmt: skip
        cut.put(out, made, chunk)
    return out


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[int], scale: float
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op("brainalign_kernels::neighborhood_blocks_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    axes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cut, all_axes = _Cut(q, k), _axes(axes)
    dq, dk, dv = (torch.zeros(x.shape, dtype=cut.dtype, device=q.device) for x in (q, k, v))
    rows = (0 if bias is None else q.shape[1], bias_entries(all_axes))
    dbias = torch.zeros(rows, dtype=cut.dtype, device=q.device)
    if grad.numel():
        blocks = _make_blocks(all_axes, q.device)
        added = _added(blocks, bias, cut.dtype)
        by_pattern = None if bias is None else torch.zeros_like(added)
        logits_size = q.shape[0] * q.shape[1] * added[0, 0].numel()
        size = _per_block(blocks, q, k, v) + 2 * logits_size
        for chunk in _chunks(blocks, size):
            real = None if chunk.real is None else chunk.real.repeat(1, cut.r, 1)
            queries, keys = cut.queries(q, chunk), cut.keys(k, chunk)
            values, outer = cut.keys(v, chunk), cut.queries(grad, chunk)
            logits = (queries * scale) @ keys.transpose(-1, -2)
            weights = logits.add_(cut.added(added, chunk)).softmax(dim=-1)
            ds = outer @ values.transpose(-1, -2)
            ds -= (ds * weights).sum(dim=-1, keepdim=True)
            ds *= weights
            cut.put(dq, (ds @ keys).mul_(scale), chunk)
            if real is not None:
                ds, outer = ds * real, outer * real
            cut.add(dk, (ds.transpose(-1, -2) @ queries).mul_(scale), chunk)
            cut.add(dv, weights.transpose(-1, -2) @ outer, chunk)
            if by_pattern is not None:
                per_head = cut.heads(ds, chunk).unflatten(0, (cut.b, cut.h)).sum(dim=0)
                by_pattern.index_add_(1, chunk.pattern, per_head)
        if by_pattern is not None:
            dbias.index_add_(1, blocks.offset.flatten(), by_pattern.flatten(1))
    kind = q.dtype if bias is None else bias.dtype
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias.to(kind)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    axes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (0 if bias is None else q.shape[1], bias_entries(_axes(axes)))
    dbias = (q if bias is None else bias).new_empty(rows)
    new = [x.new_empty(x.shape) for x in (q, k, v)]
    return new[0], new[1], new[2], dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, ctx.axes, ctx.scale = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(q, k, v, *([bias] if ctx.has_bias else []))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    bias = rest[0] if ctx.has_bias else None
    dq, dk, dv, dbias = _backward(grad, q, k, v, bias, ctx.axes, ctx.scale)
    return dq, dk, dv, dbias if ctx.has_bias else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
