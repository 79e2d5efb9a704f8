"""Dense attention with a sink logit, and with redistribution: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, expand_heads
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["attention_logits", "redistribute", "sink_attention", "visual_attention_redistribution"]


def attention_logits(
    q: Tensor, k: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Scaled dot products, -inf where nothing may be attended; heads of k as many as of q."""
    wide = accumulation_dtype(q.dtype)
    logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask.to(wide)
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~causal, -torch.inf)
    return logits


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
    """See `brainalign_kernels.sink_attention`."""
    k, v = expand_heads(q, k, v)
    logits = attention_logits(q, k, mask=mask, is_causal=is_causal, scale=scale)
    extra = sink.to(logits.dtype).expand(q.shape[:3])[..., None]
    weights = masked_softmax(torch.cat([logits, extra], dim=-1))[..., :-1]
    return (weights @ v.to(logits.dtype)).to(q.dtype)


def redistribute(
    attention: Tensor, sinks: Tensor, image: Tensor, rows: Tensor, *, p: float
) -> Tensor:
    """Move (1 - p) of the sinks' attention to the image tokens that are no sinks, in `rows`.

    `sinks` and `image` are (B, 1, 1, T), `rows` (B, H, Q).
    """
    rest = (attention * (image & ~sinks)).sum(dim=-1, keepdim=True)
    freed = (1.0 - p) * (attention * sinks).sum(dim=-1, keepdim=True)
    gain = 1.0 + freed / rest.masked_fill(rest == 0, 1.0)
    moved = torch.where(sinks, p * attention, torch.where(image, gain * attention, attention))
    return torch.where(rows[..., None] & (rest > 0), moved, attention)


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
    """See `brainalign_kernels.visual_attention_redistribution`."""
    k, v = expand_heads(q, k, v)
    weights = masked_softmax(attention_logits(q, k, mask=mask, is_causal=is_causal, scale=scale))
    rows = centric_rows(
        (weights * (sinks & image)).sum(dim=-1),
        (weights * image).sum(dim=-1),
        sinks, image, rho=rho, image_mass=image_mass, eps=eps,
    )  # fmt: skip
    weights = redistribute(weights, sinks, image, rows & queries, p=p)
    return (weights @ v.to(weights.dtype)).to(q.dtype)


def centric_rows(
    on_sinks: Tensor,
    on_image: Tensor,
    sinks: Tensor,
    image: Tensor,
    *,
    rho: float,
    image_mass: float,
    eps: float,
) -> Tensor:
    """Rows with enough attention on the image, and little of it on its sinks, (B, H, Q)."""
    share = on_sinks / (on_image + eps * image.sum(dim=-1))
    found = (sinks & image).any(dim=-1)
    return found & (share <= rho) & (on_image >= image_mass)
