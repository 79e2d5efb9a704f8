"""HiP with all query blocks at once: batched search, then a softmax over gathered keys.

Cost and memory grow with queries times kept keys. Query blocks go in parts, so that what is
gathered at a time stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.hip import reference
from brainalign_kernels.hip.plan import EMPTY, Plan
from brainalign_kernels.softmax import sdpa

__all__ = ["hip_attention", "hip_blocks", "missing", "missing_blocks"]

#: Numbers gathered at a time.
_PART = 1 << 24


def missing_blocks(q: Tensor, k: Tensor, *, plan: Plan) -> str:
    """Why this search cannot do a call, or an empty string."""
    return "a half is scored by its first block here, not by all." if plan.all_blocks else ""


def missing(q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, scale: float) -> str:
    """Why this implementation cannot do a call, or an empty string."""
    return missing_blocks(q, k, plan=plan)


def hip_blocks(q: Tensor, k: Tensor, *, plan: Plan) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.hip_blocks`."""
    k, _ = expand_heads(q, k, k)
    wide = accumulation_dtype(q.dtype)
    q, k = q.detach().to(wide), k.detach().to(wide)
    b, heads, _, channels = q.shape
    kept = plan.head_group * plan.slots
    if 0 in (b, heads, plan.n_blocks):
        size = (b, heads // plan.head_group, plan.n_blocks)
        empty = torch.zeros(*size, kept, dtype=torch.long, device=q.device)
        return empty, empty.sum(-1)
    bounds = [k]
    if plan.group_k > 1 and plan.keys:
        fill = -plan.keys % plan.group_k
        grouped = torch.cat([k, k[:, :, -1:].expand(-1, -1, fill, -1)], dim=2)
        grouped = grouped.unflatten(2, (-1, plan.group_k))
        bounds = [grouped.amin(3), grouped.amax(3)]
    found = []
    lines = b * heads // plan.head_group
    for part in _parts(plan, lines * kept * plan.block_size_k * max(channels, 1)):
        found.append(_search(q, bounds, part, plan))
    indices, counts = (torch.cat(x, dim=2) for x in zip(*found, strict=True))
    return indices, counts


def _parts(plan: Plan, numbers: int) -> Iterator[range]:
    """Yield runs of query blocks that gather about `_PART` numbers, with `numbers` for each."""
    step = max(1, _PART // max(numbers, 1))
    for first in range(0, plan.n_blocks, step):
        yield range(first, min(first + step, plan.n_blocks))


def _votes(plan: Plan, part: range) -> list[list[int]]:
    """List the queries that vote: every other one; short blocks repeat their last."""
    rows = [list(range(*plan.rows(i))) for i in part]
    rows = [r[1::2] if len(r) > 1 else r for r in rows]
    longest = max(len(r) for r in rows)
    return [r + r[-1:] * (longest - len(r)) for r in rows]


def _search(q: Tensor, bounds: list[Tensor], part: range, plan: Plan) -> tuple[Tensor, Tensor]:
    """Start tokens and counts for a part of the query blocks."""
    b, heads = q.shape[:2]
    together, slots, unit = plan.head_group, plan.slots, plan.block_size_k * plan.group_k
    groups = heads // together
    device = q.device
    index = torch.tensor(_votes(plan, part), device=device)
    votes = q[:, :, index.flatten()].unflatten(2, index.shape).unflatten(1, (groups, together))
    length = torch.tensor([plan.length(i) for i in part], device=device)[:, None, None]
    n = [plan.key_blocks(i) for i in part]
    rounds = [plan.rounds(x) for x in n]
    size = (b, groups, len(part), together * slots)

    first = [[plan.slot(x, head, m) for head in range(together) for m in range(slots)] for x in n]
    start, width = (x.expand(size) for x in torch.tensor(first, device=device).unbind(-1))
    head = torch.arange(together, device=device).repeat_interleave(slots).expand(size)
    n_keys = bounds[0].shape[2]
    offset = torch.arange(plan.block_size_k, device=device)
    lines = torch.arange(b * groups, device=device).view(b, groups, 1, 1, 1) * together

    def score(head: Tensor, start: Tensor) -> Tensor:
        """Best product of a voter with the first block, shape of `start`."""
        place = start[..., None] * plan.block_size_k + offset
        inside = place < length
        place = place.clamp(max=n_keys - 1) + (lines + head[..., None]) * n_keys
        best = q.new_full((), EMPTY)
        for bound in bounds:
            keys = bound.reshape(-1, bound.shape[-1]).index_select(0, place.flatten())
            keys = keys.view(*place.shape[:3], -1, bound.shape[-1])
            by_head = [votes[:, :, h] @ keys.mT for h in range(together)]
            for h, products in enumerate(by_head):
                top = products.amax(dim=-2).view(place.shape)
                usable = inside & (head == h)[..., None]
                best = torch.maximum(best, top.masked_fill(~usable, EMPTY).amax(dim=-1))
        return best

    if max(rounds, default=0):
        scores = score(head, start)
    for turn in range(max(rounds, default=0)):
        left = width // 2
        scored_left = scores.masked_fill(left == 0, EMPTY)
        middle = start + left
        scored_right = score(head, middle).masked_fill(width == left, EMPTY)
        both = torch.stack([scored_left, scored_right], dim=-1).flatten(-2)
        order = both.sort(dim=-1, descending=True, stable=True).indices[..., : size[-1]]
        live = torch.tensor([turn < r for r in rounds], device=device)[:, None]
        pairs = (
            (scored_left, scored_right, scores),
            (start, middle, start),
            (left, width - left, width),
            (head, head, head),
        )
        scores, start, width, head = (
            torch.where(live, torch.stack([x, y], dim=-1).flatten(-2).gather(-1, order), old)
            for x, y, old in pairs
        )
    starts = (head * plan.keys + start * unit).sort(dim=-1).values

    whole = []
    for x in n:
        listed = [h * plan.keys + i * unit for h in range(together) for i in range(min(x, slots))]
        rest = range(len(listed), size[-1])
        whole.append(listed + [0 if plan.published_slots else i * unit for i in rest])
    everything = torch.tensor([x <= slots for x in n], device=device)[:, None]
    starts = torch.where(everything, torch.tensor(whole, device=device), starts)
    counts = torch.tensor([together * min(x, slots) for x in n], device=device)
    return starts, counts.expand(size[:3])


def hip_attention(q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, scale: float) -> Tensor:
    """See `brainalign_kernels.hip_attention`."""
    if 0 in q.shape or 0 in v.shape:
        return reference.hip_attention(q, k, v, plan=plan, scale=scale)
    indices, counts = hip_blocks(q, k, plan=plan)
    k, v = expand_heads(q, k, v)
    kept = indices.shape[-1] * plan.block_size_k * plan.group_k + plan.window + plan.sinks
    numbers = q.shape[0] * q.shape[1] * kept * (q.shape[3] + v.shape[3])
    rows = plan.block_size_q
    fill = plan.n_blocks * rows - plan.queries
    q = torch.nn.functional.pad(q, (0, 0, 0, fill)).unflatten(2, (plan.n_blocks, rows))
    outs = [
        _softmax(q[:, :, p.start : p.stop], k, v, indices[:, :, p.start : p.stop],
                 counts[:, :, p.start : p.stop], p, plan, scale)
        for p in _parts(plan, numbers)
    ]  # fmt: skip
    return torch.cat(outs, dim=2).flatten(2, 3)[:, :, : plan.queries]


def _softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    part: range,
    plan: Plan,
    scale: float,
) -> Tensor:
    """Softmax over the kept blocks, the window and the first keys, for a part of the blocks."""
    b, heads = q.shape[:2]
    device, unit = q.device, plan.block_size_k * plan.group_k
    end = torch.tensor([plan.end(i) for i in part], device=device)[:, None]
    head = torch.arange(plan.head_group, device=device)[:, None, None]
    slot = torch.arange(indices.shape[-1], device=device)
    valid = (slot < counts[..., None])[:, :, None] & (indices[:, :, None] // plan.keys == head)
    token = (indices % plan.keys)[..., None] + torch.arange(unit, device=device)
    token = token[:, :, None].expand(-1, -1, plan.head_group, -1, -1, -1).flatten(4)
    valid = valid[..., None].expand(*valid.shape, unit).flatten(4)
    valid = valid & (token < plan.keys) & (token >= plan.sinks) & (token < end - plan.window)
    last = end - plan.window + torch.arange(plan.window, device=device)
    sinks = torch.arange(plan.sinks, device=device).expand(len(part), -1)
    always = torch.cat([last, sinks], dim=-1)
    allowed = torch.cat([last >= 0, sinks < (end - plan.window).clamp(max=plan.keys)], dim=-1)
    size = (b, heads, len(part), -1)
    token = torch.cat([token.flatten(1, 2), always.expand(size)], dim=-1)
    valid = torch.cat([valid.flatten(1, 2), allowed.expand(size)], dim=-1)

    row = torch.tensor([part.start * plan.block_size_q], device=device)
    row = row + torch.arange(len(part) * plan.block_size_q, device=device)
    row = row.view(len(part), -1, 1) + plan.keys - plan.queries
    mask = valid[..., None, :] & (token[..., None, :] <= row)
    place = token.clamp(0, max(plan.keys - 1, 0))
    place = place + torch.arange(b * heads, device=device).view(b, heads, 1, 1) * plan.keys

    def gather(x: Tensor) -> Tensor:
        # Gradients of a key come from many blocks: they add up in float32.
        wide = accumulation_dtype(x.dtype) if x.requires_grad else x.dtype
        taken = x.to(wide).reshape(-1, x.shape[-1]).index_select(0, place.flatten()).to(x.dtype)
        return taken.view(b * heads, len(part), -1, x.shape[-1])

    out = sdpa.softmax_attention(
        q.flatten(0, 1), gather(k), gather(v), mask=mask.flatten(0, 1), is_causal=False,
        scale=scale,
    )  # fmt: skip
    return out.unflatten(0, (b, heads))
