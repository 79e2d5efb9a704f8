"""HiP: the search, the keys that it keeps and the softmax over them. The original has float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from brainalign_kernels.golden.check import FLOAT32, GoldenFile, Run
from brainalign_kernels.hip.attention import BLOCKS, OPERATION
from brainalign_kernels.hip.plan import Plan
from brainalign_kernels.hip.reference import multiplicity

__all__ = ["hip_attention_draft", "hip_attention_head_group"]


def hip_attention_draft(file: GoldenFile) -> Iterator[Run]:
    """One budget per head."""
    return _runs(file, published_slots=False)


def hip_attention_head_group(file: GoldenFile) -> Iterator[Run]:
    """One budget per group of heads, with the original's slots."""
    return _runs(file, published_slots=True)


def _runs(file: GoldenFile, *, published_slots: bool) -> Iterator[Run]:
    meta = file.meta
    window, kept = meta.get("sliding_window_size", 0), meta["using_sliding_window"]
    plan = Plan(
        queries=meta["T_dst"], keys=meta["T_src"], top_k=meta["mask_k"],
        block_size_q=meta["block_size_q"], block_size_k=meta["block_size_k"],
        group_k=meta["block_size_k_group"], window=window if kept else 0, unsearched=window,
        sinks=meta.get("num_sink_tokens", 0) if kept else 0,
        head_group=meta.get("topk_head_group_size", 1), published_slots=published_slots,
        all_blocks=meta["oracle_rep"],
    )  # fmt: skip
    q, k, v = (file.tensor(n)[None] for n in "qkv")
    for impl in ("reference", "compiled"):
        if impl == "compiled" and plan.all_blocks:
            continue
        blocks, counts = BLOCKS(impl, q, k, plan=plan)
        out = OPERATION(impl, q, k, v, plan=plan, scale=meta["softmax_scale"])
        made = [
            file.compare("indices", blocks[0].int(), 0.0),
            file.compare("ks", counts[0].int(), 0.0),
            file.compare("out", out[0], FLOAT32),
        ]
        if "support_packed" in file:
            support = multiplicity(blocks, counts, plan=plan)[0] > 0
            made.append(file.compare("support_packed", _packed(support), 0.0))
        if "block_mask_packed" in file:
            mask = _packed(_block_mask(blocks, counts, plan))
            made.append(file.compare("block_mask_packed", mask, 0.0))
        yield Run(impl, made)


def _block_mask(blocks: Tensor, counts: Tensor, plan: Plan) -> Tensor:
    """Keys of the kept blocks, before the causal cut."""
    unit = plan.block_size_k * plan.group_k
    key = torch.arange(plan.keys)
    valid = torch.arange(blocks.shape[-1]) < counts[0, ..., None]
    first = blocks[0, ..., None]
    return ((key >= first) & (key < first + unit) & valid[..., None]).any(-2)


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))
