"""CLEAR by tiles of the image: each attends to the window around it, the text and the pooled.

Cost and memory grow with the tokens of the image times those of a window, not with their square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from brainalign_kernels.clear import reference
from brainalign_kernels.clear.mask import square
from brainalign_kernels.clear.reference import with_pooled

__all__ = ["clear_attention", "windows_pay"]

#: Tokens a side of a tile.
TILE = 8


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
    """See `brainalign_kernels.clear_attention`."""
    if 0 in q.shape or v.shape[3] == 0:
        return reference.clear_attention(
            q, k, v, shape=shape, n_text=n_text, radius=radius, pooled_k=pooled_k,
            pooled_v=pooled_v, scale=scale,
        )  # fmt: skip
    grouped = q.shape[1] != k.shape[1]
    if not windows_pay(shape, radius):
        return _dense(q, k, v, shape, n_text, radius, pooled_k, pooled_v, scale, grouped)
    text = scaled_dot_product_attention(q[:, :, :n_text], k, v, scale=scale, enable_gqa=grouped)
    image = _image(q, k, v, shape, n_text, radius, pooled_k, pooled_v, scale, grouped)
    return torch.cat([text, image], dim=2) if n_text else image


def windows_pay(shape: tuple[int, int], radius: float) -> bool:
    """Whether the windows of the tiles have fewer keys than half of the image."""
    if 0 in shape:
        return False
    rows, columns = (_axis(n, radius) for n in shape)
    return 2 * rows[1] * columns[1] <= shape[0] * shape[1]


def _axis(length: int, radius: float) -> tuple[int, int, list[int]]:
    """Tile, window, and where the window of each tile begins: moved to lie inside the image."""
    tile, reach = min(TILE, length), math.ceil(radius) - 1
    window = min(tile + 2 * reach, length)
    starts = range(0, length, tile)
    return tile, window, [min(max(s - reach, 0), length - window) for s in starts]


def _image(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    scale: float,
    grouped: bool,
) -> Tensor:
    """Attend from the image, tile by tile."""
    b, (h, w) = q.shape[0], shape
    (tile_h, window_h, rows), (tile_w, window_w, columns) = (_axis(n, radius) for n in shape)
    n_rows, n_columns = len(rows), len(columns)
    tall, wide = n_rows * tile_h, n_columns * tile_w
    tiles = pad(q[:, :, n_text:].unflatten(2, shape), (0, 0, 0, wide - w, 0, tall - h))
    tiles = tiles.unflatten(3, (n_columns, tile_w)).unflatten(2, (n_rows, tile_h))
    tiles = tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    first = torch.tensor(rows, device=q.device)
    key_y = first[:, None] + torch.arange(window_h, device=q.device)
    first = torch.tensor(columns, device=q.device)
    key_x = first[:, None] + torch.arange(window_w, device=q.device)
    query_y = torch.arange(tall, device=q.device).unflatten(0, (n_rows, tile_h))
    query_x = torch.arange(wide, device=q.device).unflatten(0, (n_columns, tile_w))
    square_y = (query_y[:, :, None] - key_y[:, None, :]) ** 2
    square_x = (query_x[:, :, None] - key_x[:, None, :]) ** 2
    near = square_y[:, None, :, None, :, None] + square_x[None, :, None, :, None, :] < square(
        radius
    )  # rows, columns, queries, keys of the window
    # Queries that only fill a tile up see everything; they are cut off.
    filled = (query_y >= h)[:, None, :, None] | (query_x >= w)[None, :, None, :]
    mask = (near | filled[..., None, None]).flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def gather(x: Tensor, pooled: Tensor | None) -> Tensor:
        windows = x[:, :, n_text:].unflatten(2, shape)
        windows = windows.index_select(2, key_y.flatten()).index_select(3, key_x.flatten())
        windows = windows.unflatten(3, (n_columns, window_w)).unflatten(2, (n_rows, window_h))
        windows = windows.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)
        seen = [windows]
        for shared in (x[:, :, :n_text] if n_text else None, pooled):
            if shared is not None:
                seen.append(shared[:, None, None].expand(-1, n_rows, n_columns, -1, -1, -1))
        return torch.cat(seen, dim=4).flatten(0, 2)

    keys, values = gather(k, pooled_k), gather(v, pooled_v)
    mask = pad(mask, (0, keys.shape[2] - mask.shape[2]), value=True)[:, None]
    if b > 1:
        mask = mask.repeat(b, 1, 1, 1)
    out = scaled_dot_product_attention(
        tiles, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    out = out.unflatten(2, (tile_h, tile_w)).unflatten(0, (b, n_rows, n_columns))
    out = out.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return out[:, :, :h, :w].flatten(2, 3)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    scale: float,
    grouped: bool,
) -> Tensor:
    """Fused, with the dense mask: for images little larger than a window."""
    k, v, mask = with_pooled(k, v, shape, n_text, radius, pooled_k, pooled_v)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
