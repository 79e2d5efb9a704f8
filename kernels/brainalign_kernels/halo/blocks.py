"""Halo attention as a batch of blocks for PyTorch's fused kernels.

The relative terms of a query depend on the key's row and column in the window only. They become
extra channels of the query, and one-hot rows and columns extra channels of the key: then the
logits are one product and no matrix of biases is ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from brainalign_kernels.halo import reference

__all__ = ["halo_attention"]


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    block_size: int,
    halo_size: int,
    stride: int,
    height_rel: Tensor | None,
    width_rel: Tensor | None,
    scale: float,
    scale_pos: bool,
) -> Tensor:
    """See `brainalign_kernels.halo_attention`."""
    if 0 in q.shape or 0 in v.shape:
        return reference.halo_attention(
            q, k, v, shape=shape, block_size=block_size, halo_size=halo_size, stride=stride,
            height_rel=height_rel, width_rel=width_rel, scale=scale, scale_pos=scale_pos,
        )  # fmt: skip
    b, heads = q.shape[:2]
    side, window = block_size // stride, block_size + 2 * halo_size
    rows, columns = shape[0] // block_size, shape[1] // block_size
    blocks = q.unflatten(2, (rows, side, columns, side)).permute(0, 2, 4, 1, 3, 5, 6)
    keys = _windows(k, shape, block_size, halo_size)
    values = _windows(v, shape, block_size, halo_size).flatten(4, 5).flatten(0, 2)
    by_scale = scale if scale_pos else 1.0
    extra_q, extra_k = [scale * blocks], [keys]
    place = torch.arange(window, device=q.device)
    one_hot = torch.eye(window, dtype=q.dtype, device=q.device)
    for table, first in ((height_rel, True), (width_rel, False)):
        if table is None:
            continue
        index = place[None, :] - place[:side, None] + window - 1
        vectors = table.to(q.dtype)[index]
        equation = "...yxd,yjd->...yxj" if first else "...yxd,xjd->...yxj"
        extra_q.append(by_scale * torch.einsum(equation, blocks, vectors))
        marks = one_hot[:, None, :] if first else one_hot[None, :, :]
        extra_k.append(marks.expand(*keys.shape[:4], window, window, window))
    blocks = torch.cat(extra_q, dim=-1).flatten(4, 5).flatten(0, 2)
    keys = torch.cat(extra_k, dim=-1).flatten(4, 5).flatten(0, 2)
    channels, wanted = values.shape[-1], blocks.shape[-1]
    # The CPU's fused kernel wants values as wide as keys.
    if channels < wanted and not q.is_cuda:
        values = pad(values, (0, wanted - channels))
    elif channels > wanted and not q.is_cuda:
        blocks, keys = (pad(x, (0, channels - wanted)) for x in (blocks, keys))
    out = scaled_dot_product_attention(
        blocks, keys, values, scale=1.0, enable_gqa=heads != k.shape[1]
    )
    out = out[..., :channels].unflatten(2, (side, side)).unflatten(0, (b, rows, columns))
    return out.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5)


def _windows(x: Tensor, shape: tuple[int, int], block: int, halo: int) -> Tensor:
    """Tokens (B, G, h*w, C) to windows (B, rows, columns, G, window, window, C)."""
    x = pad(x.unflatten(2, shape), (0, 0, halo, halo, halo, halo))
    size = block + 2 * halo
    return x.unfold(2, size, block).unfold(3, size, block).permute(0, 2, 3, 1, 5, 6, 4)
