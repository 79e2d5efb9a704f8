"""CLEAR through FlexAttention, for CUDA: blocks of keys that no query sees are skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels.clear import tiles
from brainalign_kernels.clear.mask import square

__all__ = ["clear_attention", "flex_attends", "visible"]


def clear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.clear_attention`; by tiles where FlexAttention cannot."""
    if not flex_attends(q, v):
        return tiles.clear_attention(
            q, k, v, shape=shape, n_text=n_text, radius=radius, pooled_k=pooled_k,
            pooled_v=pooled_v, scale=scale,
        )  # fmt: skip
    n_pooled = 0
    if pooled_k is not None and pooled_v is not None:
        n_pooled = pooled_k.shape[2]
        k, v = torch.cat([k, pooled_k], dim=2), torch.cat([v, pooled_v], dim=2)
    mask = _block_mask(shape, n_text, float(radius), n_pooled, str(q.device))
    attend = _compiled()
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def flex_attends(q: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention's kernels take these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and min(q.shape[3], v.shape[3]) >= 16
        and max(q.shape[3], v.shape[3]) <= 256
        and 0 not in q.shape
        and not torch.compiler.is_compiling()
    )


def visible(
    shape: tuple[int, int], n_text: int, radius: float
) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """Return `clear_mask` as FlexAttention wants it: a function of query and key."""
    width, end = max(shape[1], 1), n_text + shape[0] * shape[1]
    squared = square(radius)

    def mask_mod(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        i, j = query - n_text, key - n_text
        y, x = i // width - j // width, i % width - j % width
        near = (y * y + x * x < squared) | (key < n_text)
        return torch.where(query < n_text, key < end, near | (key >= end))

    return mask_mod


@lru_cache(maxsize=16)
def _block_mask(
    shape: tuple[int, int], n_text: int, radius: float, n_pooled: int, device: str
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = n_text + shape[0] * shape[1]
    return create_block_mask(
        visible(shape, n_text, radius), None, None, tokens, tokens + n_pooled, device=device
    )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
