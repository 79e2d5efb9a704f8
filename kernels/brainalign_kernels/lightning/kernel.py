"""Lightning attention in Triton: three kernels, all chunks at once but for the scan over states.

``chunk_sums`` adds up what each chunk gives to the state, ``scan`` turns these sums into the state
before each chunk, ``apply`` makes the outputs of a chunk from its scores and that state. The
gradients are the same kernels with other arguments, since each of them is such an attention:
dq attends from do over v to k forwards in time; dk from v over do to q and dv from k over q to do
backwards. Accumulation and states are float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._triton import interpreted

__all__ = ["Launch", "apply", "attend", "chunk_sums", "launch", "launches", "scan"]

#: A step this strong is exactly 0 in float32; a finite one keeps resets apart from inf - inf.
_STRONGEST = -128.0


@triton.jit
def _decays(
    G, bh, h, start, step, n, CHUNK: tl.constexpr, CHUNKS, STEPWISE: tl.constexpr
):  # fmt: skip
    """Sum the log-decays from the start of the chunk up to each step, and over the chunk."""
    length = tl.minimum(n - start, CHUNK)
    if STEPWISE:
        base = G + bh.to(tl.int64) * CHUNKS * CHUNK + start
        return tl.load(base + step), tl.load(base + CHUNK - 1)
    rate = tl.load(G + h)
    return rate * tl.minimum(step + 1, length).to(tl.float32), rate * length.to(tl.float32)


@triton.jit
def chunk_sums(
    A, B, G, Out,
    a_b, a_h, a_n, b_b, b_h, b_n,
    n, heads, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, STEPWISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out[c] = scale * sum of w a b' over the chunk; w decays to its end, or from its start."""
    pid = tl.program_id(0)
    bh, c = pid // chunks, pid % chunks
    tiles: tl.constexpr = (E + BLOCK - 1) // BLOCK
    d = tl.program_id(1) // tiles * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(1) % tiles * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, CHUNK)
    start = c * CHUNK
    live = start + step < n
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    token = (start + step).to(tl.int64)
    cum, total = _decays(G, bh, h, start, step, n, CHUNK, chunks, STEPWISE)
    weight = tl.exp(cum if REVERSE else total - cum)
    a_at = A + b * a_b + h * a_h + token[None, :] * a_n + d[:, None]
    b_at = B + b * b_b + h * b_h + token[:, None] * b_n + e[None, :]
    x = tl.load(a_at, mask=live[None, :] & (d[:, None] < D), other=0.0).to(tl.float32)
    y = tl.load(b_at, mask=live[:, None] & (e[None, :] < E), other=0.0).to(tl.float32)
    made = scale * tl.dot(x * weight[None, :], y, input_precision=PRECISION)
    out_at = Out + pid.to(tl.int64) * D * E + d[:, None] * E + e[None, :]
    tl.store(out_at, made, mask=(d[:, None] < D) & (e[None, :] < E))


@triton.jit
def scan(
    Sums, G, First, Last,
    n, heads, chunks, size,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, STEPWISE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Sums[c] becomes the state before chunk c, in the order of the scan; Last, that after all."""
    bh = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    h = bh % heads
    step = tl.arange(0, 1)
    base = bh.to(tl.int64) * size + place
    state = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        state = tl.load(First + base, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, chunks):
        c = chunks - 1 - i if REVERSE else i
        total = _decays(G, bh, h, c * CHUNK, step, n, CHUNK, chunks, STEPWISE)[1]
        at = Sums + (bh.to(tl.int64) * chunks + c) * size + place
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = tl.exp(total) * state + added
    tl.store(Last + base, state, mask=inside)


@triton.jit
def apply(
    A, B, C, S, G, Out, Z, Rows,
    a_b, a_h, a_n, b_b, b_h, b_n, c_b, c_h, c_n, z_b, z_h, z_n, s_d, s_e,
    n, heads, chunks, rows, scale_scores, scale_state,
    D: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, STEPWISE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Out_i = scale_scores * sum_j decay_ij (a_i.b_j) c_j + scale_state * decay_i a_i S."""
    pid = tl.program_id(0)
    bh, c = pid // chunks, pid % chunks
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, CHUNK)
    start = c * CHUNK
    live = start + step < n
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    token = (start + step).to(tl.int64)
    a_at = A + b * a_b + h * a_h + token[:, None] * a_n
    b_at = B + b * b_b + h * b_h + token[None, :] * b_n
    s_at = S + pid.to(tl.int64) * D * E + e[None, :] * s_e
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    from_state = tl.zeros((CHUNK, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(a_at + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
        y = tl.load(b_at + d[:, None], mask=live[None, :] & (d[:, None] < D), other=0.0)
        s = tl.load(s_at + d[:, None] * s_d, mask=(d[:, None] < D) & (e[None, :] < E), other=0.0)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        scores += tl.dot(x, y, input_precision=PRECISION)
        from_state += tl.dot(x.to(tl.float32), s, input_precision=PRECISION)
    cum, total = _decays(G, bh, h, start, step, n, CHUNK, chunks, STEPWISE)
    if REVERSE:
        seen = step[:, None] <= step[None, :]
        between = cum[None, :] - cum[:, None]
        weight = tl.exp(total - cum)
    else:
        seen = step[:, None] >= step[None, :]
        between = cum[:, None] - cum[None, :]
        weight = tl.exp(cum)
    scores = scale_scores * scores * tl.exp(tl.where(seen, between, -float("inf")))
    inside = live[:, None] & (e[None, :] < E)
    c_at = C + b * c_b + h * c_h + token[:, None] * c_n + e[None, :]
    values = tl.load(c_at, mask=inside, other=0.0).to(tl.float32)
    from_chunk = tl.dot(scores, values, input_precision=PRECISION)
    from_state = scale_state * weight[:, None] * from_state
    out_at = Out + (bh.to(tl.int64) * n + token[:, None]) * E + e[None, :]
    tl.store(out_at, (from_chunk + from_state).to(Out.dtype.element_ty), mask=inside)
    if ROWS:
        z_at = Z + b * z_b + h * z_h + token[:, None] * z_n + e[None, :]
        z = tl.load(z_at, mask=inside, other=0.0).to(tl.float32)
        row_at = Rows + tl.program_id(1).to(tl.int64) * 2 * rows + bh.to(tl.int64) * n + token
        tl.store(row_at, tl.sum(from_chunk * z, axis=1), mask=live)
        tl.store(row_at + rows, tl.sum(from_state * z, axis=1), mask=live)


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched: tokens of a chunk, channels of a tile, warps, products."""

    chunk: int
    block: int
    warps: int
    precision: str
    stages: int = 2


#: Elements of a state that one program of `scan` carries.
SCAN_BLOCK = 256


def launch(dtype: torch.dtype, tokens: int) -> Launch:
    """Choose for a type and the tokens of a chunk."""
    chunk = 16 if tokens <= 16 else 64
    if dtype == torch.float32:
        return Launch(chunk, 32, warps=8, precision="ieee")
    # Scores and states stay float32; TF32 products with them lose less than half precision would.
    return Launch(chunk, 64, warps=4, precision="tf32")


def launches() -> list[tuple[torch.dtype, Launch]]:
    """Every configuration that `launch` can give."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    return [(t, launch(t, n)) for t in types for n in (16, 64)]


class _Problem:
    """Sizes, decays and configuration that the kernels of one call share."""

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor, chunk_size: int) -> None:
        self.batch, self.heads, self.n, self.d = q.shape
        self.e = v.shape[3]
        self.how = launch(q.dtype, min(chunk_size, self.n))
        self.chunks = triton.cdiv(self.n, self.how.chunk)
        self.stepwise = log_decay.ndim == 3
        rates = log_decay.float().clamp(min=_STRONGEST)
        if self.stepwise:
            filled = pad(rates, (0, self.chunks * self.how.chunk - self.n))
            rates = filled.unflatten(-1, (self.chunks, self.how.chunk)).cumsum(-1)
        self.decays = rates.contiguous()

    def states(
        self, a: Tensor, b: Tensor, first: Tensor | None, scale: float, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """State before each chunk, or gradient of the state after each, and that at the end."""
        how, d, e = self.how, self.d, self.e
        shape = (self.batch, self.heads, d, e)
        sums = a.new_empty((self.batch, self.heads, self.chunks, d, e), dtype=torch.float32)
        last = a.new_empty(shape, dtype=torch.float32)
        programs = self.batch * self.heads
        flags: dict[str, Any] = {"REVERSE": reverse, "STEPWISE": self.stepwise}
        tiles = triton.cdiv(d, how.block) * triton.cdiv(e, how.block)
        chunk_sums[(programs * self.chunks, tiles)](
            a, b, self.decays, sums,
            *a.stride()[:3], *b.stride()[:3],
            self.n, self.heads, self.chunks, scale,
            D=d, E=e, CHUNK=how.chunk, BLOCK=how.block,
            PRECISION=how.precision, **flags, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        first = None if first is None else first.float().contiguous()
        scan[(programs, triton.cdiv(d * e, SCAN_BLOCK))](
            sums, self.decays, last if first is None else first, last,
            self.n, self.heads, self.chunks, d * e,
            CHUNK=how.chunk, BLOCK=SCAN_BLOCK, FIRST=first is not None,
            **flags, num_warps=4, num_stages=how.stages,
        )  # fmt: skip
        return sums, last

    def apply(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        states: Tensor,
        scales: tuple[float, float],
        *,
        reverse: bool,
        transposed: bool,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return outputs (B, H, N, channels of c), and their products with z by chunk and state."""
        how, n = self.how, self.n
        d, e = a.shape[3], c.shape[3]
        tiles = triton.cdiv(e, how.block)
        out = c.new_empty((self.batch, self.heads, n, e))
        shape = (tiles, 2, self.batch, self.heads, n)
        rows = c.new_empty(shape if z is not None else (0,), dtype=torch.float32)
        weighed = c if z is None else z
        apply[(self.batch * self.heads * self.chunks, tiles)](
            a, b, c, states, self.decays, out, weighed, rows,
            *a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *weighed.stride()[:3],
            *((1, d) if transposed else (e, 1)),
            n, self.heads, self.chunks, self.batch * self.heads * n, *scales,
            D=d, E=e, CHUNK=how.chunk, BLOCK=how.block,
            REVERSE=reverse, STEPWISE=self.stepwise, ROWS=z is not None,
            PRECISION=how.precision, WIDEN=c.dtype == torch.bfloat16 and interpreted(),
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return out, rows.sum(0) if z is not None else rows

    def decay_gradient(
        self, by_query: Tensor, by_key: Tensor, before: Tensor, after: Tensor
    ) -> Tensor:
        """Gradient of the log-decays of every step, (B, H, N), from sums over pairs that span it.

        Within a chunk, pairs (i, j) with j < t <= i; from the chunk's start, queries i >= t; to its
        end, keys j < t; and what passes through the chunk whole.
        """
        filled = pad(torch.stack((*by_query, *by_key)), (0, self.chunks * self.how.chunk - self.n))
        query, query_state, key, key_state = filled.unflatten(-1, (self.chunks, -1))
        onwards = (query - key + query_state).flip(-1).cumsum(-1).flip(-1)
        earlier = pad(key_state[..., :-1].cumsum(-1), (1, 0))
        if self.stepwise:
            total = self.decays[..., -1]
        else:
            lengths = torch.full((self.chunks,), self.how.chunk, device=before.device)
            lengths[-1] = self.n - (self.chunks - 1) * self.how.chunk
            total = self.decays[:, None] * lengths
        through = total.exp() * (before * after).sum((-1, -2))
        return (onwards + earlier + through[..., None]).flatten(-2)[..., : self.n]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Make channels lie side by side; other strides may be any."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op(
    "brainalign_kernels::lightning_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, float scale, "
    "int chunk_size) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    if 0 in q.shape or 0 in v.shape:
        return _nothing(q, v, state)
    q, k, v = _rows(q, k, v)
    problem = _Problem(q, v, log_decay, chunk_size)
    before, last = problem.states(k, v, state, 1.0, reverse=False)
    out, _ = problem.apply(q, k, v, before, (scale, scale), reverse=False, transposed=False)
    return out, last


def _nothing(q: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    final = q.new_zeros((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_zeros(v.shape), final if state is None else final + state


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    final = q.new_empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), final


@torch.library.custom_op(
    "brainalign_kernels::lightning_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor log_decay, "
    "Tensor? state, float scale, int chunk_size, bool with_decay) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    chunk_size: int,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_decay = torch.zeros_like(log_decay, memory_format=torch.contiguous_format)
    if 0 in q.shape or 0 in v.shape:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        return dq, dk, dv, grad_decay, grad_last.float().clone()
    q, k, v, do = _rows(q, k, v, grad_out)
    problem = _Problem(q, v, log_decay, chunk_size)
    before, _ = problem.states(k, v, state, 1.0, reverse=False)
    after, first = problem.states(q, do, grad_last, scale, reverse=True)
    both, intra = (scale, scale), (scale, 1.0)
    z = (q, k) if with_decay else (None, None)
    dq, by_query = problem.apply(do, v, k, before, both, reverse=False, transposed=True, z=z[0])
    dk, by_key = problem.apply(v, do, q, after, intra, reverse=True, transposed=True, z=z[1])
    dv, _ = problem.apply(k, q, do, after, intra, reverse=True, transposed=False)
    if with_decay:
        steps = problem.decay_gradient(by_query, by_key, before, after)
        grad_decay = (steps if log_decay.ndim == 3 else steps.sum((0, 2))).to(log_decay.dtype)
    return dq, dk, dv, grad_decay, first


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    chunk_size: int,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, log_decay))
    return dq, dk, dv, dg, grad_last.new_empty(grad_last.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, state, ctx.scale, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, log_decay, state)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, state = ctx.saved_tensors
    if grad_out is None:
        grad_out = v.new_zeros(v.shape)
    if grad_last is None:
        shape = (*q.shape[:2], q.shape[3], v.shape[3])
        grad_last = q.new_zeros(shape, dtype=torch.float32)
    dq, dk, dv, dg, first = torch.ops.brainalign_kernels.lightning_backward(
        grad_out, grad_last, q, k, v, log_decay, state,
        ctx.scale, ctx.chunk_size, ctx.needs_input_grad[3],
    )  # fmt: skip
    return dq, dk, dv, dg, None if state is None else first.to(state.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Lightning attention with decays (H,), or (B, H, N) by step."""
    made: tuple[Tensor, Tensor] = torch.ops.brainalign_kernels.lightning_forward(
        q, k, v, log_decay, state, scale, chunk_size
    )
    return made
