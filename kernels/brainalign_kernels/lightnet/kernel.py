r"""LightNet in Triton: chunks of 64 tokens, blocks of 16 within them.

Token s enters the output at t with the weight kappa_s exp(z_s - z_t). Between two blocks it is
split at the last token b before the block of t: exp(b - z_t) and kappa_s exp(z_s - b), both at most
one, are multiplied as matrices. Within a block every pair has its own exponent. All products are in
float32 (TF32 for half precision: the weights of late tokens are too small for float16).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brainalign_kernels.lightnet.ops import register
from brainalign_kernels.lightnet.reference import FLOOR

__all__ = [
    "CHUNK",
    "KERNELS",
    "SIZES",
    "configuration",
    "lightnet_attention",
    "lightnet_recurrence",
    "log_sum",
]

#: Tokens of a chunk and of a block, and channels of a tile.
CHUNK, BLOCK, WIDTH = 64, 16, 32
SIZES = {"CHUNK": CHUNK, "BLOCK": BLOCK, "WIDTH": WIDTH}


def configuration(dtype: torch.dtype) -> dict[str, Any]:
    """Precision of the products and launch options for queries of that type."""
    exact = dtype == torch.float32
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if exact else 4,
        "num_stages": 2,
    }


@triton.jit
def _tile(pointer, rows, columns, row_limit, column_limit):
    """Load rows and columns of a matrix with `column_limit` columns, zeros outside."""
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    places = rows[:, None] * column_limit + columns[None, :]
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, rows, columns, row_limit, column_limit, values):
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    places = rows[:, None] * column_limit + columns[None, :]
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _row(pointer, row, columns, limit):
    return tl.load(pointer + row * limit + columns, mask=columns < limit, other=0.0)


@triton.jit
def _before(z, z0, chunk, columns, limit, CHUNK: tl.constexpr):
    """Return z before the first token of a chunk."""
    later = tl.minimum(chunk, 1)
    row = (chunk * CHUNK - 1) * later
    earlier = tl.load(z + row * limit + columns, mask=columns < limit * later, other=0.0)
    return earlier + tl.load(z0 + columns, mask=columns < limit * (1 - later), other=0.0)


@triton.jit
def _fall(gap):
    """Return exp of a difference that is at most zero wherever it counts."""
    return tl.exp(tl.minimum(gap, 0.0))


@triton.jit
def _log_sums(
    k, carry, z, total, tokens, channels, chunks,
    FLOOR: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    k += head * tokens * channels
    z += head * tokens * channels
    carry += (head * chunks + chunk) * channels
    total += (head * chunks + chunk) * channels
    place = tl.arange(0, BLOCK)
    seen = place[:, None] >= place[None, :]
    before = tl.load(carry + d, mask=d < channels, other=0.0)
    for block in range(CHUNK // BLOCK):
        rows = chunk * CHUNK + block * BLOCK + place
        logits = _tile(k, rows, d, tokens, channels)
        logits = tl.where((rows < tokens)[:, None], tl.maximum(logits, FLOOR), FLOOR)
        pairs = tl.where(seen[:, :, None], logits[None, :, :], FLOOR)
        top = tl.maximum(tl.max(pairs, axis=1), before[None, :])
        terms = tl.where(seen[:, :, None], tl.exp(pairs - top[:, None, :]), 0.0)
        now = top + tl.log(tl.sum(terms, axis=1) + tl.exp(before[None, :] - top))
        _put(z, rows, d, tokens, channels, now)
        before = tl.max(now, axis=0)
    tl.store(total + d, before, mask=d < channels)


@triton.jit
def _later_sums(
    y, z, carry, later, tokens, channels, chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    y += head * tokens * channels
    z += head * tokens * channels
    later += head * tokens * channels
    place = tl.arange(0, BLOCK)
    ahead = place[:, None] <= place[None, :]
    # Sum over the tokens after the chunk, as seen from its last token.
    after = tl.load(carry + (head * chunks + chunk) * channels + d, mask=d < channels, other=0.0)
    z_after = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
    for step in range(CHUNK // BLOCK):
        first = chunk * CHUNK + CHUNK - BLOCK - step * BLOCK
        if first < tokens:
            rows = first + place
            values = _tile(y, rows, d, tokens, channels)
            log = _tile(z, rows, d, tokens, channels)
            weights = tl.where(ahead[:, :, None], _fall(log[:, None, :] - log[None, :, :]), 0.0)
            sums = tl.sum(weights * values[None, :, :], axis=1)
            sums += _fall(log - z_after[None, :]) * after[None, :]
            _put(later, rows, d, tokens, channels, sums)
            is_first = (place == 0)[:, None]
            after = tl.sum(tl.where(is_first, sums, 0.0), axis=0)
            z_after = tl.sum(tl.where(is_first, log, 0.0), axis=0)


@triton.jit
def _carry_back(
    first, z, carry, tokens, channels, chunks, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < channels
    first += head * tokens * channels
    z += head * tokens * channels
    carry += head * chunks * channels
    after = tl.zeros((WIDTH,), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        start = _row(z, chunk * CHUNK, d, channels)
        end = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
        tl.store(carry + chunk * channels + d, after, mask=inside)
        here = _row(first, chunk * CHUNK, d, channels) + after * _fall(start - end)
        earlier = _row(z, tl.maximum(chunk * CHUNK - 1, 0), d, channels)
        after = here * _fall(earlier - start)


@triton.jit
def _scores(
    q, kappa, z, scores, tokens, channels, blocks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    start = block * BLOCK
    chunk_start = start // CHUNK * CHUNK
    q += head * tokens * channels
    kappa += head * tokens * channels
    z += head * tokens * channels
    scores += head * tokens * CHUNK
    place = tl.arange(0, BLOCK)
    rows = start + place
    columns = chunk_start + tl.arange(0, CHUNK)
    earlier = columns < start
    across = tl.zeros((BLOCK, CHUNK), tl.float32)
    within = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, channels, WIDTH):
        d = first + tl.arange(0, WIDTH)
        query = _tile(q, rows, d, tokens, channels)
        log = _tile(z, rows, d, tokens, channels)
        weight = _tile(kappa, rows, d, tokens, channels)
        border = _row(z, tl.maximum(start - 1, 0), d, channels)
        left = _tile(kappa, columns, d, start, channels)
        left *= _fall(_tile(z, columns, d, start, channels) - border[None, :])
        left = tl.where(earlier[:, None], left, 0.0)
        right = query * _fall(border[None, :] - log)
        across += tl.dot(right, tl.trans(left), input_precision=PRECISION)
        pairs = _fall(log[None, :, :] - log[:, None, :]) * weight[None, :, :]
        within += tl.sum(query[:, None, :] * pairs, axis=2)
    within = tl.where(place[:, None] >= place[None, :], within, 0.0)
    target = scores + rows[:, None] * CHUNK
    outside = (columns < start) | (columns >= start + BLOCK)
    tl.store(
        target + (columns - chunk_start)[None, :],
        across,
        mask=(rows < tokens)[:, None] & outside[None, :],
    )
    tl.store(target + (rows - chunk_start)[None, :], within, mask=(rows < tokens)[:, None])


@triton.jit
def _states(
    kappa, v, z, z0, s0, states, final, tokens, channels, values, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    e = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    kappa += head * tokens * channels
    z += head * tokens * channels
    v += head * tokens * values
    states += head * chunks * channels * values
    state = _tile(s0 + head * channels * values, d, e, channels, values)
    before = tl.load(z0 + head * channels + d, mask=d < channels, other=0.0)
    for chunk in range(chunks):
        _put(states + chunk * channels * values, d, e, channels, values, state)
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        end = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
        weight = _tile(kappa, rows, d, tokens, channels)
        weight *= _fall(_tile(z, rows, d, tokens, channels) - end[None, :])
        value = _tile(v, rows, e, tokens, values)
        state = state * _fall(before - end)[:, None]
        state += tl.dot(tl.trans(weight), value, input_precision=PRECISION)
        before = end
    _put(final + head * channels * values, d, e, channels, values, state)


@triton.jit
def _states_backward(
    q, z, z0, grad_out, grad_final, grads, grad_s0, tokens, channels, values, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    e = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    q += head * tokens * channels
    z += head * tokens * channels
    grad_out += head * tokens * values
    grads += head * chunks * channels * values
    grad = _tile(grad_final + head * channels * values, d, e, channels, values)
    for step in range(chunks):
        chunk = chunks - 1 - step
        _put(grads + chunk * channels * values, d, e, channels, values, grad)
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        end = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
        before = _before(z, z0 + head * channels, chunk, d, channels, CHUNK)
        query = _tile(q, rows, d, tokens, channels)
        query *= _fall(before[None, :] - _tile(z, rows, d, tokens, channels))
        up = _tile(grad_out, rows, e, tokens, values)
        grad = grad * _fall(before - end)[:, None]
        grad += tl.dot(tl.trans(query), up, input_precision=PRECISION)
    _put(grad_s0 + head * channels * values, d, e, channels, values, grad)


@triton.jit
def _outputs(
    q, z, z0, v, scores, states, out, tokens, channels, values, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = tl.arange(0, CHUNK)
    rows = chunk * CHUNK + place
    q += head * tokens * channels
    z += head * tokens * channels
    states += (head * chunks + chunk) * channels * values
    weights = _tile(scores + head * tokens * CHUNK, rows, place, tokens, CHUNK)
    value = _tile(v + head * tokens * values, rows, e, tokens, values)
    made = tl.dot(weights, value, input_precision=PRECISION)
    for first in range(0, channels, WIDTH):
        d = first + tl.arange(0, WIDTH)
        before = _before(z, z0 + head * channels, chunk, d, channels, CHUNK)
        query = _tile(q, rows, d, tokens, channels)
        query *= _fall(before[None, :] - _tile(z, rows, d, tokens, channels))
        state = _tile(states, d, e, channels, values)
        made += tl.dot(query, state, input_precision=PRECISION)
    _put(out + head * tokens * values, rows, e, tokens, values, made)


@triton.jit
def _score_gradients(
    grad_out, v, grads, tokens, values, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    place = tl.arange(0, CHUNK)
    rows = chunk * CHUNK + place
    made = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, values, WIDTH):
        e = first + tl.arange(0, WIDTH)
        up = _tile(grad_out + head * tokens * values, rows, e, tokens, values)
        value = _tile(v + head * tokens * values, rows, e, tokens, values)
        made += tl.dot(up, tl.trans(value), input_precision=PRECISION)
    made = tl.where(place[:, None] >= place[None, :], made, 0.0)
    _put(grads + head * tokens * CHUNK, rows, place, tokens, CHUNK, made)


@triton.jit
def _inputs(
    q, kappa, v, z, z0, grad_out, score_grads, states, state_grads, grad_q, grad_kappa, grad_z,
    tokens, channels, values, chunks, blocks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    chunk = start // CHUNK
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    q += head * tokens * channels
    kappa += head * tokens * channels
    z += head * tokens * channels
    v += head * tokens * values
    grad_out += head * tokens * values
    score_grads += head * tokens * CHUNK
    states += (head * chunks + chunk) * channels * values
    state_grads += (head * chunks + chunk) * channels * values
    place = tl.arange(0, BLOCK)
    rows = start + place
    local = start - chunk * CHUNK
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    query = _tile(q, rows, d, tokens, channels)
    weight = _tile(kappa, rows, d, tokens, channels)
    log = _tile(z, rows, d, tokens, channels)
    by_query = tl.zeros((BLOCK, WIDTH), tl.float32)
    by_weight = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, values, WIDTH):
        e = first + tl.arange(0, WIDTH)
        up = _tile(grad_out, rows, e, tokens, values)
        value = _tile(v, rows, e, tokens, values)
        state = _tile(states, d, e, channels, values)
        state_grad = _tile(state_grads, d, e, channels, values)
        by_query += tl.dot(up, tl.trans(state), input_precision=PRECISION)
        by_weight += tl.dot(value, tl.trans(state_grad), input_precision=PRECISION)
    before = _before(z, z0 + head * channels, chunk, d, channels, CHUNK)
    end = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
    by_query *= _fall(before[None, :] - log)
    by_weight *= _fall(log - end[None, :])

    logs = _tile(z, columns, d, tokens, channels)
    border = _row(z, tl.maximum(start - 1, 0), d, channels)
    left = _tile(kappa, columns, d, start, channels) * _fall(logs - border[None, :])
    left = tl.where((columns < start)[:, None], left, 0.0)
    down = _tile(score_grads, rows, tl.arange(0, CHUNK), tokens, CHUNK)
    by_query += _fall(border[None, :] - log) * tl.dot(down, left, input_precision=PRECISION)

    border = _row(z, tl.minimum(start + BLOCK, tokens) - 1, d, channels)
    right = _tile(q, columns, d, tokens, channels) * _fall(border[None, :] - logs)
    right = tl.where((columns >= start + BLOCK)[:, None], right, 0.0)
    down = _tile(score_grads, columns, local + place, tokens, CHUNK)
    sums = tl.dot(tl.trans(down), right, input_precision=PRECISION)
    by_weight += _fall(log - border[None, :]) * sums

    down = _tile(score_grads, rows, local + place, tokens, CHUNK)
    pairs = _fall(log[None, :, :] - log[:, None, :]) * down[:, :, None]
    by_query += tl.sum(pairs * weight[None, :, :], axis=1)
    by_weight += tl.sum(pairs * query[:, None, :], axis=0)

    _put(grad_q + head * tokens * channels, rows, d, tokens, channels, by_query)
    _put(grad_kappa + head * tokens * channels, rows, d, tokens, channels, by_weight)
    by_z = weight * by_weight - query * by_query
    _put(grad_z + head * tokens * channels, rows, d, tokens, channels, by_z)


@triton.jit
def _values(
    kappa, z, grad_out, scores, state_grads, grad_v, tokens, channels, values, chunks,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = tl.arange(0, CHUNK)
    rows = chunk * CHUNK + place
    kappa += head * tokens * channels
    z += head * tokens * channels
    state_grads += (head * chunks + chunk) * channels * values
    weights = _tile(scores + head * tokens * CHUNK, rows, place, tokens, CHUNK)
    up = _tile(grad_out + head * tokens * values, rows, e, tokens, values)
    made = tl.dot(tl.trans(weights), up, input_precision=PRECISION)
    for first in range(0, channels, WIDTH):
        d = first + tl.arange(0, WIDTH)
        end = _row(z, tl.minimum((chunk + 1) * CHUNK, tokens) - 1, d, channels)
        weight = _tile(kappa, rows, d, tokens, channels)
        weight *= _fall(_tile(z, rows, d, tokens, channels) - end[None, :])
        grad = _tile(state_grads, d, e, channels, values)
        made += tl.dot(weight, grad, input_precision=PRECISION)
    _put(grad_v + head * tokens * values, rows, e, tokens, values, made)


KERNELS = (
    _log_sums, _later_sums, _carry_back, _scores, _states, _states_backward, _outputs,
    _score_gradients, _inputs, _values,
)  # fmt: skip
#: Of the kernels around the recurrence, which multiply no matrices.
POINTWISE = {"num_warps": 4, "num_stages": 2}


def gates(k: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of k over the tokens seen, and each token's share, in float32."""
    k, z0 = k.contiguous(), z0.float()
    z = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    if k.numel() == 0:
        return z, torch.empty_like(z)
    batch, heads, tokens, channels = k.shape
    chunks = triton.cdiv(tokens, CHUNK)
    carry = z0.new_full((batch, heads, chunks, channels), FLOOR)
    total = torch.empty_like(carry)
    grid = (batch * heads * chunks, triton.cdiv(channels, WIDTH))

    def run() -> None:
        _log_sums[grid](
            k, carry, z, total, tokens, channels, chunks,
            FLOOR=FLOOR, CHUNK=CHUNK, BLOCK=BLOCK, WIDTH=WIDTH, **POINTWISE,
        )  # fmt: skip

    run()
    carry = torch.cat([z0.clamp(min=FLOOR)[:, :, None], total[:, :, :-1]], dim=2)
    carry = carry.logcumsumexp(dim=2).contiguous()
    run()
    return z, (k - z).exp()


def gates_backward(
    kappa: Tensor, z: Tensor, z0: Tensor, grad_z: Tensor, grad_kappa: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to k and z0."""
    if kappa.numel() == 0:
        return torch.zeros_like(kappa), torch.zeros_like(z0)
    batch, heads, tokens, channels = kappa.shape
    chunks = triton.cdiv(tokens, CHUNK)
    inner = (grad_z - kappa * grad_kappa).contiguous()
    z = z.contiguous()
    later = torch.empty_like(z)
    carry = z.new_zeros((batch, heads, chunks, channels))
    narrow = triton.cdiv(channels, WIDTH)

    def run() -> None:
        _later_sums[(batch * heads * chunks, narrow)](
            inner, z, carry, later, tokens, channels, chunks,
            CHUNK=CHUNK, BLOCK=BLOCK, WIDTH=WIDTH, **POINTWISE,
        )  # fmt: skip

    run()
    if chunks > 1:
        _carry_back[(batch * heads, narrow)](
            later, z, carry, tokens, channels, chunks, CHUNK=CHUNK, WIDTH=WIDTH, **POINTWISE
        )
        run()
    first = later[:, :, 0] * (z0.clamp(min=FLOOR) - z[:, :, 0]).exp()
    return kappa * (grad_kappa + later), first


def _run_states(
    kappa: Tensor, v: Tensor, z: Tensor, z0: Tensor, s0: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, channels = kappa.shape
    values, chunks = v.shape[3], triton.cdiv(tokens, CHUNK)
    states = s0.new_empty((batch, heads, chunks, channels, values))
    final = torch.empty_like(s0)
    grid = (batch * heads, triton.cdiv(channels, WIDTH), triton.cdiv(values, WIDTH))
    _states[grid](
        kappa, v, z, z0, s0, states, final, tokens, channels, values, chunks,
        CHUNK=CHUNK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    return states, final


def _run_scores(q: Tensor, kappa: Tensor, z: Tensor, **options: Any) -> Tensor:
    batch, heads, tokens, channels = q.shape
    blocks = triton.cdiv(tokens, BLOCK)
    scores = z.new_empty((batch, heads, tokens, CHUNK))
    _scores[(batch * heads * blocks,)](
        q, kappa, z, scores, tokens, channels, blocks,
        CHUNK=CHUNK, BLOCK=BLOCK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    return scores


def forward(
    q: Tensor, kappa: Tensor, v: Tensor, z: Tensor, z0: Tensor, s0: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    batch, heads, tokens, channels = q.shape
    values, options = v.shape[3], configuration(q.dtype)
    if 0 in q.shape or 0 in v.shape:
        return q.new_zeros((batch, heads, tokens, values)), s0.clone()
    q, kappa, v, z, z0, s0 = (x.contiguous() for x in (q, kappa, v, z, z0, s0))
    states, final = _run_states(kappa, v, z, z0, s0, **options)
    scores = _run_scores(q, kappa, z, **options)
    out = q.new_empty((batch, heads, tokens, values))
    chunks = triton.cdiv(tokens, CHUNK)
    _outputs[(batch * heads * chunks, triton.cdiv(values, WIDTH))](
        q, z, z0, v, scores, states, out, tokens, channels, values, chunks,
        CHUNK=CHUNK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    return out, final


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
    batch, heads, tokens, channels = q.shape
    values, options = v.shape[3], configuration(q.dtype)
    if 0 in q.shape or 0 in v.shape:
        zeros = [torch.zeros_like(x) for x in (q, kappa, v, z, z0)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], grad_state.clone()
    q, kappa, v, z, z0, s0 = (x.contiguous() for x in (q, kappa, v, z, z0, s0))
    grad_out, grad_state = grad_out.contiguous(), grad_state.contiguous()
    chunks, blocks = triton.cdiv(tokens, CHUNK), triton.cdiv(tokens, BLOCK)
    states, final = _run_states(kappa, v, z, z0, s0, **options)
    state_grads, grad_s0 = torch.empty_like(states), torch.empty_like(s0)
    grid = (batch * heads, triton.cdiv(channels, WIDTH), triton.cdiv(values, WIDTH))
    _states_backward[grid](
        q, z, z0, grad_out, grad_state, state_grads, grad_s0, tokens, channels, values, chunks,
        CHUNK=CHUNK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    scores = _run_scores(q, kappa, z, **options)
    grad_v = torch.empty_like(v)
    _values[(batch * heads * chunks, triton.cdiv(values, WIDTH))](
        kappa, z, grad_out, scores, state_grads, grad_v, tokens, channels, values, chunks,
        CHUNK=CHUNK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    score_grads = scores
    _score_gradients[(batch * heads * chunks,)](
        grad_out, v, score_grads, tokens, values, chunks, CHUNK=CHUNK, WIDTH=WIDTH, **options
    )
    grad_q, grad_kappa, grad_z = torch.empty_like(q), torch.empty_like(kappa), torch.empty_like(z)
    _inputs[(batch * heads * blocks, triton.cdiv(channels, WIDTH))](
        q, kappa, v, z, z0, grad_out, score_grads, states, state_grads,
        grad_q, grad_kappa, grad_z, tokens, channels, values, chunks, blocks,
        CHUNK=CHUNK, BLOCK=BLOCK, WIDTH=WIDTH, **options,
    )  # fmt: skip
    grad_z[:, :, -1] -= (final * grad_state).sum(dim=-1)
    return grad_q, grad_kappa, grad_v, grad_z, (s0 * grad_s0).sum(dim=-1), grad_s0


_gates, _recurrence = register("triton", gates, gates_backward, forward, backward)


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
    memory, before = state
    z, kappa = _gates(k, before)
    if modulation is not None:
        kappa = kappa * modulation
    out, final = _recurrence(q, kappa, v, z, before.clamp(min=FLOOR), memory, CHUNK)
    total = z[:, :, -1] if z.shape[2] else before
    return out, final, total.masked_fill(total <= FLOOR, -torch.inf)


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
    memory, before = state
    out, final = _recurrence(
        q,
        kappa.float(),
        v,
        z.float().clamp(min=FLOOR),
        before.clamp(min=FLOOR),
        memory,
        CHUNK,
    )
    return out, final
