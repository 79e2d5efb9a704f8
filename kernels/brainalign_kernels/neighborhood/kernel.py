"""Neighborhood attention in Triton, on 1 to 3 axes, forwards and backwards.

A program owns a box of queries of one dilation group (or of keys, for their gradients) and walks
over the box of keys that these can see (of queries that can see these), a row of BLOCK at a time.
Axes that the grid lacks have length 1. Windows are computed, not stored. float32 accumulation.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brainalign_kernels._triton import interpreted
from brainalign_kernels.neighborhood.windows import Axis, window

__all__ = ["Launch", "attend", "constants", "forward", "key_gradients", "launch", "query_gradients"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _seen(j, n, K: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last key of query number j in a group of n."""
    block = j // STRIDE * STRIDE
    if CAUSAL:
        leader = tl.minimum(block + (STRIDE - 1), n - 1)
        first = tl.maximum(leader - (K - 1), 0)
        last = j
    else:
        leader = tl.minimum(block + STRIDE // 2, n - 1)
        first = tl.minimum(tl.maximum(leader - K // 2, 0), n - K)
        last = first + (K - 1)
    return first, last


@triton.jit
def _first_seeing(a, K: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """First query that sees key number a, or one before it."""
    if CAUSAL:
        lowest = a
    else:
        block = (a - (K - 1) + K // 2 - STRIDE // 2 + (STRIDE - 1)) // STRIDE * STRIDE
        lowest = tl.where(a < K, 0, tl.maximum(block, 0))
    return lowest


@triton.jit
def _place(part, L, DILATION: tl.constexpr, SIDE: tl.constexpr):
    """Dilation group, its size, and number of the first token, of a box's part on one axis."""
    longest = (L + DILATION - 1) // DILATION
    boxes = (longest + SIDE - 1) // SIDE
    group = part // boxes
    size = (L - group + DILATION - 1) // DILATION
    return group, size, part % boxes * SIDE


@triton.jit
def _parts(L, DILATION: tl.constexpr, SIDE: tl.constexpr):
    """Boxes along one axis, over all its dilation groups."""
    longest = (L + DILATION - 1) // DILATION
    return (longest + SIDE - 1) // SIDE * DILATION


@triton.jit
def _token(j0, j1, j2, g0, g1, g2, L1, L2, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return ((j0 * D0 + g0) * L1 + j1 * D1 + g1) * L2 + j2 * D2 + g2


@triton.jit
def _rows(base, token, real, C: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Rows of channels; zeros where they are not real."""
    c = tl.arange(0, BLOCK_C)
    mask = real[:, None] & (c < C)[None, :]
    x = tl.load(base + token[:, None] * C + c[None, :], mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _put(base, token, real, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    mask = real[:, None] & (c < C)[None, :]
    tl.store(base + token[:, None] * C + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def forward(
    Q, K, V, Out, Lse, scale, heads, repeats, L0, L1, L2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and the base-2 logarithm of the sum of exponentials, for a box of queries."""
    p1, p2 = _parts(L1, D1, T1), _parts(L2, D2, T2)
    pid = tl.program_id(0)
    g0, n0, a0 = _place(pid // (p1 * p2), L0, D0, T0)
    g1, n1, a1 = _place(pid // p2 % p1, L1, D1, T1)
    g2, n2, a2 = _place(pid % p2, L2, D2, T2)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // heads * (heads // repeats) + head % heads // repeats
    tokens = L0 * L1 * L2

    m = tl.arange(0, T0 * T1 * T2)
    i0, i1, i2 = a0 + m // (T1 * T2), a1 + m // T2 % T1, a2 + m % T2
    real = (i0 < n0) & (i1 < n1) & (i2 < n2)
    token = _token(i0, i1, i2, g0, g1, g2, L1, L2, D0, D1, D2)
    f0, l0 = _seen(i0, n0, K0, S0, C0)
    f1, l1 = _seen(i1, n1, K1, S1, C1)
    f2, l2 = _seen(i2, n2, K2, S2, C2)
    b0, _b0 = _seen(a0, n0, K0, S0, C0)
    b1, _b1 = _seen(a1, n1, K1, S1, C1)
    b2, _b2 = _seen(a2, n2, K2, S2, C2)

    q = _rows(Q + head * tokens * D, token, real, D, BLOCK_D, WIDE)
    highest = tl.full([T0 * T1 * T2], -1.0e30, tl.float32)
    total = tl.zeros([T0 * T1 * T2], tl.float32)
    acc = tl.zeros([T0 * T1 * T2, BLOCK_E], tl.float32)
    for start in range(0, W0 * W1 * W2, BLOCK):
        w = start + tl.arange(0, BLOCK)
        j0, j1, j2 = b0 + w // (W1 * W2), b1 + w // W2 % W1, b2 + w % W2
        there = (w < W0 * W1 * W2) & (j0 < n0) & (j1 < n1) & (j2 < n2)
        seen = _token(j0, j1, j2, g0, g1, g2, L1, L2, D0, D1, D2)
        k = _rows(K + key_head * tokens * D, seen, there, D, BLOCK_D, WIDE)
        v = _rows(V + key_head * tokens * E, seen, there, E, BLOCK_E, WIDE)
        allowed = there[None, :] & (j2[None, :] >= f2[:, None]) & (j2[None, :] <= l2[:, None])
        if W1 > 1:
            allowed &= (j1[None, :] >= f1[:, None]) & (j1[None, :] <= l1[:, None])
        if W0 > 1:
            allowed &= (j0[None, :] >= f0[:, None]) & (j0[None, :] <= l0[:, None])
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        logits = tl.where(allowed, logits, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - above[:, None])
        fade = tl.exp2(highest - above)
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = above
    total = tl.where(real, total, 1.0)
    _put(Out + head * tokens * E, token, real, acc / total[:, None], E, BLOCK_E)
    tl.store(Lse + head * tokens + token, highest + tl.log2(total), mask=real)


@triton.jit
def query_gradients(
    Q, K, V, Grad, Lse, Delta, Dq, scale, heads, repeats, L0, L1, L2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq for a box of queries."""
    p1, p2 = _parts(L1, D1, T1), _parts(L2, D2, T2)
    pid = tl.program_id(0)
    g0, n0, a0 = _place(pid // (p1 * p2), L0, D0, T0)
    g1, n1, a1 = _place(pid // p2 % p1, L1, D1, T1)
    g2, n2, a2 = _place(pid % p2, L2, D2, T2)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // heads * (heads // repeats) + head % heads // repeats
    tokens = L0 * L1 * L2

    m = tl.arange(0, T0 * T1 * T2)
    i0, i1, i2 = a0 + m // (T1 * T2), a1 + m // T2 % T1, a2 + m % T2
    real = (i0 < n0) & (i1 < n1) & (i2 < n2)
    token = _token(i0, i1, i2, g0, g1, g2, L1, L2, D0, D1, D2)
    f0, l0 = _seen(i0, n0, K0, S0, C0)
    f1, l1 = _seen(i1, n1, K1, S1, C1)
    f2, l2 = _seen(i2, n2, K2, S2, C2)
    b0, _b0 = _seen(a0, n0, K0, S0, C0)
    b1, _b1 = _seen(a1, n1, K1, S1, C1)
    b2, _b2 = _seen(a2, n2, K2, S2, C2)

    q = _rows(Q + head * tokens * D, token, real, D, BLOCK_D, WIDE)
    grad = _rows(Grad + head * tokens * E, token, real, E, BLOCK_E, WIDE)
    lse = tl.load(Lse + head * tokens + token, mask=real, other=0.0)
    delta = tl.load(Delta + head * tokens + token, mask=real, other=0.0)
    dq = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    for start in range(0, W0 * W1 * W2, BLOCK):
        w = start + tl.arange(0, BLOCK)
        j0, j1, j2 = b0 + w // (W1 * W2), b1 + w // W2 % W1, b2 + w % W2
        there = (w < W0 * W1 * W2) & (j0 < n0) & (j1 < n1) & (j2 < n2)
        seen = _token(j0, j1, j2, g0, g1, g2, L1, L2, D0, D1, D2)
        k = _rows(K + key_head * tokens * D, seen, there, D, BLOCK_D, WIDE)
        v = _rows(V + key_head * tokens * E, seen, there, E, BLOCK_E, WIDE)
        allowed = (real[:, None] & there[None, :]) & (
            (j2[None, :] >= f2[:, None]) & (j2[None, :] <= l2[:, None])
        )
        if W1 > 1:
            allowed &= (j1[None, :] >= f1[:, None]) & (j1[None, :] <= l1[:, None])
        if W0 > 1:
            allowed &= (j0[None, :] >= f0[:, None]) & (j0[None, :] <= l0[:, None])
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        logits = tl.where(allowed, logits, float("-inf"))
        weights = tl.exp2(logits - lse[:, None])
        ds = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    _put(Dq + head * tokens * D, token, real, dq * scale, D, BLOCK_D)


@triton.jit
def key_gradients(
    Q, K, V, Grad, Lse, Delta, Dk, Dv, scale, heads, repeats, L0, L1, L2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and Dv for a box of keys, summed over the query heads that share them."""
    p1, p2 = _parts(L1, D1, T1), _parts(L2, D2, T2)
    pid = tl.program_id(0)
    g0, n0, a0 = _place(pid // (p1 * p2), L0, D0, T0)
    g1, n1, a1 = _place(pid // p2 % p1, L1, D1, T1)
    g2, n2, a2 = _place(pid % p2, L2, D2, T2)
    key_head = tl.program_id(1).to(tl.int64)
    tokens = L0 * L1 * L2

    m = tl.arange(0, T0 * T1 * T2)
    j0, j1, j2 = a0 + m // (T1 * T2), a1 + m // T2 % T1, a2 + m % T2
    there = (j0 < n0) & (j1 < n1) & (j2 < n2)
    seen = _token(j0, j1, j2, g0, g1, g2, L1, L2, D0, D1, D2)
    b0 = _first_seeing(a0, K0, S0, C0)
    b1 = _first_seeing(a1, K1, S1, C1)
    b2 = _first_seeing(a2, K2, S2, C2)

    k = _rows(K + key_head * tokens * D, seen, there, D, BLOCK_D, WIDE)
    v = _rows(V + key_head * tokens * E, seen, there, E, BLOCK_E, WIDE)
    dk = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    dv = tl.zeros([T0 * T1 * T2, BLOCK_E], tl.float32)
    rows: tl.constexpr = (W0 * W1 * W2 + BLOCK - 1) // BLOCK
    for step in range(0, repeats * rows):
        # Query heads of a key head lie side by side.
        head = key_head * repeats + step // rows
        w = step % rows * BLOCK + tl.arange(0, BLOCK)
        i0, i1, i2 = b0 + w // (W1 * W2), b1 + w // W2 % W1, b2 + w % W2
        real = (w < W0 * W1 * W2) & (i0 < n0) & (i1 < n1) & (i2 < n2)
        token = _token(i0, i1, i2, g0, g1, g2, L1, L2, D0, D1, D2)
        f0, l0 = _seen(i0, n0, K0, S0, C0)
        f1, l1 = _seen(i1, n1, K1, S1, C1)
        f2, l2 = _seen(i2, n2, K2, S2, C2)
        q = _rows(Q + head * tokens * D, token, real, D, BLOCK_D, WIDE)
        grad = _rows(Grad + head * tokens * E, token, real, E, BLOCK_E, WIDE)
        lse = tl.load(Lse + head * tokens + token, mask=real, other=0.0)
        delta = tl.load(Delta + head * tokens + token, mask=real, other=0.0)
        allowed = (there[:, None] & real[None, :]) & (
            (j2[:, None] >= f2[None, :]) & (j2[:, None] <= l2[None, :])
        )
        if W1 > 1:
            allowed &= (j1[:, None] >= f1[None, :]) & (j1[:, None] <= l1[None, :])
        if W0 > 1:
            allowed &= (j0[:, None] >= f0[None, :]) & (j0[:, None] <= l0[None, :])
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
        logits = tl.where(allowed, logits, float("-inf"))
        weights = tl.exp2(logits - lse[None, :])
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        ds = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    _put(Dk + key_head * tokens * D, seen, there, dk * scale, D, BLOCK_D)
    _put(Dv + key_head * tokens * E, seen, there, dv, E, BLOCK_E)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Parameters
    ----------
    sides : tuple of int
        Of a box, on three axes; their product is a power of 2, at least 16.
    block : int
        Keys (queries) of a step.
    warps, stages : int
        As Triton means them.
    """

    sides: tuple[int, int, int]
    block: int
    warps: int
    stages: int


def launch(axes: int, channels: int, dtype: torch.dtype, *, backward: bool) -> Launch:
    """Choose the launch for a number of axes, the wider channels and a type."""
    # float32 is multiplied without tensor cores, from registers.
    single = dtype == torch.float32
    sides = {
        (1, True): (1, 1, 32), (2, True): (1, 4, 8), (3, True): (2, 4, 4),
        (1, False): (1, 1, 64), (2, False): (1, 8, 8), (3, False): (4, 4, 4),
    }[axes, single]  # fmt: skip
    block = 32 if single or (backward and channels > 64) else 64
    return Launch(sides, block, 4, 1 if backward and single else 2)


def _three(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return (Axis(1, 1, 1, 1, False),) * (3 - len(axes)) + axes


@lru_cache(maxsize=256)
def _query_width(axis: Axis, side: int) -> int:
    """Most queries, from `_first_seeing` on, that see a box of keys on one axis."""
    widest = 1
    for group in {0, (axis.length - 1) % axis.dilation, axis.dilation - 1}:
        size = (axis.length - group + axis.dilation - 1) // axis.dilation
        first, last = window(torch.arange(size) * axis.dilation + group, axis)
        for a in range(0, size, side):
            seeing = ((first < a + side) & (last >= a)).nonzero()
            block = a - (axis.kernel - 1) + axis.kernel // 2 - axis.stride // 2 + axis.stride - 1
            block = block // axis.stride * axis.stride
            lowest = a if axis.causal else (0 if a < axis.kernel else max(block, 0))
            widest = max(widest, int(seeing.max()) - lowest + 1)
    return widest


def constants(
    axes: tuple[Axis, ...], d: int, e: int, dtype: torch.dtype, how: Launch, *, keys: bool
) -> dict[str, Any]:
    """Return the constants of a kernel; `keys`: of the one that owns boxes of keys."""
    made: dict[str, Any] = {}
    for a, (axis, side) in enumerate(zip(_three(axes), how.sides, strict=True)):
        shared = -(-(side - 1) // axis.stride) * axis.stride
        made |= {
            f"K{a}": axis.kernel,
            f"D{a}": axis.dilation,
            f"S{a}": axis.stride,
            f"C{a}": axis.causal,
            f"T{a}": side,
            f"W{a}": _query_width(axis, side)
            if keys
            else min(_longest(axis), shared + axis.kernel),
        }
    return made | {
        "D": d,
        "E": e,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_E": max(16, triton.next_power_of_2(e)),
        "BLOCK": how.block,
        # The interpreter's dot product of bfloat16 is wrong.
        "WIDE": dtype == torch.bfloat16 and interpreted(),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _boxes(axes: tuple[Axis, ...], how: Launch) -> int:
    total = 1
    for axis, side in zip(_three(axes), how.sides, strict=True):
        total *= math.ceil(_longest(axis) / side) * axis.dilation
    return total


def _longest(axis: Axis) -> int:
    """Size of the largest dilation group."""
    return -(-axis.length // axis.dilation)


def _axes(numbers: Sequence[int]) -> tuple[Axis, ...]:
    rows = [numbers[i : i + 5] for i in range(0, len(numbers), 5)]
    return tuple([Axis(n, k, d, s, bool(c)) for n, k, d, s, c in rows])


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, axes: tuple[Axis, ...], bias: Tensor | None, scale: float
) -> Tensor:
    """See `brainalign_kernels.neighborhood_attention`; without a bias."""
    numbers = [int(x) for axis in axes for x in axis]
    out: Tensor = torch.ops.brainalign_kernels.neighborhood_triton(q, k, v, numbers, scale)[0]
    return out


def _launch_of(q: Tensor, v: Tensor, axes: tuple[Axis, ...], *, backward: bool) -> Launch:
    return launch(len(axes), max(q.shape[3], v.shape[3]), q.dtype, backward=backward)


@torch.library.custom_op("brainalign_kernels::neighborhood_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, axes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grid, (b, h, n, d), e = _axes(axes), q.shape, v.shape[3]
    out = torch.empty((b, h, n, e), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, n), dtype=torch.float32, device=q.device)
    if out.numel():
        how = _launch_of(q, v, grid, backward=False)
        lengths = [axis.length for axis in _three(grid)]
        forward[_boxes(grid, how), b * h](
            q, k, v, out, lse, scale, h, h // k.shape[1], *lengths,
            **constants(grid, d, e, q.dtype, how, keys=False),
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("brainalign_kernels::neighborhood_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    axes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    grid, (b, h, _, d), e, g = _axes(axes), q.shape, v.shape[3], k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if out.numel():
        delta = (out.float() * grad.float()).sum(dim=-1)
        how = _launch_of(q, v, grid, backward=True)
        lengths = [axis.length for axis in _three(grid)]
        inputs = (q, k, v, grad, lse, delta)
        options = {"num_warps": how.warps, "num_stages": how.stages}
        query_gradients[_boxes(grid, how), b * h](
            *inputs, dq, scale, h, h // g, *lengths,
            **constants(grid, d, e, q.dtype, how, keys=False), **options,
        )  # fmt: skip
        key_gradients[_boxes(grid, how), b * g](
            *inputs, dk, dv, scale, h, h // g, *lengths,
            **constants(grid, d, e, q.dtype, how, keys=True), **options,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    axes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.axes, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    return (*_backward(grad, q, k, v, out, lse, ctx.axes, ctx.scale), None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)
