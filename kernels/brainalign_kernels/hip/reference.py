"""HiP one query block at a time, and its softmax with a dense matrix: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.hip.plan import EMPTY, Plan
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["hip_attention", "hip_blocks", "multiplicity"]


def hip_blocks(q: Tensor, k: Tensor, *, plan: Plan) -> tuple[Tensor, Tensor]:
    """See `brainalign_kernels.hip_blocks`."""
    k, _ = expand_heads(q, k, k)
    wide = accumulation_dtype(q.dtype)
    q, k = q.detach().to(wide), k.detach().to(wide)
    b, heads = q.shape[:2]
    groups = heads // plan.head_group
    indices = torch.zeros(b, groups, plan.n_blocks, plan.head_group * plan.slots, dtype=torch.long)
    counts = torch.zeros(b, groups, plan.n_blocks, dtype=torch.long)
    for batch in range(b):
        for group in range(groups):
            chosen = slice(group * plan.head_group, (group + 1) * plan.head_group)
            for block in range(plan.n_blocks):
                found, count = _search(q[batch, chosen], k[batch, chosen], block, plan)
                indices[batch, group, block] = torch.tensor(found, dtype=torch.long)
                counts[batch, group, block] = count
    return indices.to(q.device), counts.to(q.device)


def _search(q: Tensor, k: Tensor, block: int, plan: Plan) -> tuple[list[int], int]:
    """Start tokens of the blocks that the heads of a group keep for one query block."""
    length, slots = plan.length(block), plan.slots
    n = plan.key_blocks(block)
    unit = plan.block_size_k * plan.group_k
    if n <= slots:
        kept = [(head, i) for head in range(plan.head_group) for i in range(n)]
        starts = [head * plan.keys + i * unit for head, i in kept]
        rest = range(len(kept), plan.head_group * slots)
        starts += [0 if plan.published_slots else i * unit for i in rest]
        return starts, len(kept)
    first, last = plan.rows(block)
    votes = q[:, first:last]
    votes = votes[:, 1::2] if votes.shape[1] > 1 else votes

    def score(head: int, start: int, size: int) -> float:
        if size == 0:
            return EMPTY
        blocks = size if plan.all_blocks else 1
        begin = start * plan.block_size_k
        end = min(begin + blocks * plan.block_size_k, length)
        best = -torch.inf
        for position in range(begin, end):
            keys = k[head, position * plan.group_k : (position + 1) * plan.group_k]
            for key in (keys.amin(0), keys.amax(0)):
                best = max(best, float((votes[head] @ key).max()))
        best = max(best, EMPTY)
        return max(best, 0.0) if plan.all_blocks else best

    kept3 = [
        (head, *plan.slot(n, head, m)) for head in range(plan.head_group) for m in range(slots)
    ]
    for _ in range(plan.rounds(n)):
        halves = []
        for head, start, size in kept3:
            left = size // 2
            halves += [(head, start, left), (head, start + left, size - left)]
        halves.sort(key=lambda half: -score(*half))
        kept3 = halves[: plan.head_group * slots]
    starts = sorted(head * plan.keys + start * unit for head, start, _ in kept3)
    return starts, len(starts)


def multiplicity(indices: Tensor, counts: Tensor, *, plan: Plan) -> Tensor:
    """How often each query's softmax counts each key, shape (B, H, N, S)."""
    b, groups = counts.shape[:2]
    times = torch.zeros(b, groups * plan.head_group, plan.queries, plan.keys, dtype=torch.long)
    unit = plan.block_size_k * plan.group_k
    for batch in range(b):
        for group in range(groups):
            for block in range(plan.n_blocks):
                rows = slice(*plan.rows(block))
                kept = indices[batch, group, block, : int(counts[batch, group, block])].tolist()
                for start in kept:
                    head = group * plan.head_group + start // plan.keys
                    token = start % plan.keys
                    times[batch, head, rows, token : min(token + unit, plan.keys)] += 1
                end = plan.end(block)
                window = slice(max(end - plan.window, 0), end)
                for seen in (window, slice(0, plan.sinks)):
                    heads = slice(group * plan.head_group, (group + 1) * plan.head_group)
                    times[batch, heads, rows, seen] = 1
    causal = torch.ones(plan.queries, plan.keys, dtype=torch.bool)
    return (times * causal.tril(plan.keys - plan.queries)).to(indices.device)


def hip_attention(q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, scale: float) -> Tensor:
    """See `brainalign_kernels.hip_attention`."""
    times = multiplicity(*hip_blocks(q, k, plan=plan), plan=plan)
    kept, wide = q.dtype, accumulation_dtype(q.dtype)
    k, v = expand_heads(q, k, v)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    weights = masked_softmax(logits + times.to(wide).log(), times > 0)
    return (weights @ v.to(wide)).to(kept)
