"""The same through PyTorch's fused kernels, without a matrix of all weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.sinks import reference
from brainalign_kernels.softmax import sdpa

__all__ = ["sink_attention", "visual_attention_redistribution"]


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.sink_attention`.

    The sink is a key in front with value zero. Two channels more hold sink / scale in every query,
    as a value and its rounding error, and ones in that key.
    """
    options = {"mask": mask, "is_causal": is_causal, "scale": scale}
    if 0 in q.shape or 0 in k.shape or 0 in v.shape or scale == 0:
        return reference.sink_attention(q, k, v, sink, **options)  # type: ignore[arg-type]
    batch, heads, queries, channels = q.shape
    # Fused kernels want channels in eights.
    more = 2 + -(channels + 2) % 8
    wide = accumulation_dtype(q.dtype)
    lowest = -3e4 if q.dtype == torch.float16 else -1e30
    exact = (sink.to(wide) / scale).clamp(lowest, -lowest)
    high = exact.to(q.dtype)
    low = (exact - high.to(wide)).to(q.dtype)
    extra = torch.stack([high, low], dim=-1).expand(batch, heads, queries, 2)
    q = pad(torch.cat([q, extra], dim=-1), (0, more - 2))
    key = k.new_zeros((1, 1, 1, channels + more))
    key[..., channels : channels + 2] = 1.0
    k = torch.cat([key.expand(*k.shape[:2], -1, -1), pad(k, (0, more))], dim=2)
    size = v.shape[3]
    v = pad(v, (0, more if size == channels else 0, 1, 0))
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        # A query more in front keeps the causal triangle in place.
        q = pad(q, (0, 0, 1, 0)) if is_causal else q
        out = scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return out[:, :, is_causal:, :size]
    keys = k.shape[2] - 1
    mask = mask.expand(*mask.shape[:3], keys)
    if is_causal:
        causal = torch.ones((queries, keys), dtype=torch.bool, device=q.device).tril()
        if mask.dtype == torch.bool:
            mask = mask & causal
        else:
            mask = mask.masked_fill(~causal, -torch.inf)
    if mask.dtype == torch.bool:
        mask = pad(mask, (1, 0), value=True)
    else:
        mask = pad(sdpa.added_mask(mask, q.dtype), (1, 0))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[..., :size]


def visual_attention_redistribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    image: Tensor,
    queries: Tensor,
    *,
    p: float,
    rho: float,
    image_mass: float,
    eps: float,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `brainalign_kernels.visual_attention_redistribution`.

    Redistribution is linear in the weights, so the sums over sinks and over the other image tokens
    are further value channels of one attention. It runs in float32 at least: rows are chosen by a
    threshold.
    """
    kind, wide = q.dtype, accumulation_dtype(q.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    size = v.shape[3]
    marks = torch.cat([sinks, image & ~sinks, sinks & image, image], dim=2)
    marks = marks.transpose(2, 3).to(wide).expand(*v.shape[:3], 4)
    values = torch.cat([v, v * marks[..., :1], v * marks[..., 1:2], marks], dim=-1)
    made = sdpa.softmax_attention(q, k, values, mask=mask, is_causal=is_causal, scale=scale)
    out, from_sinks, from_rest, sums = made.split([size, size, size, 4], dim=-1)
    on_sinks, on_rest, on_image_sinks, on_image = sums.unbind(dim=-1)
    rows = reference.centric_rows(
        on_image_sinks, on_image, sinks, image, rho=rho, image_mass=image_mass, eps=eps
    )
    rows = (rows & queries & (on_rest > 0))[..., None]
    gain = (1.0 - p) * (on_sinks / on_rest.masked_fill(on_rest == 0, 1.0))[..., None]
    return torch.where(rows, out - (1.0 - p) * from_sinks + gain * from_rest, out).to(kind)
