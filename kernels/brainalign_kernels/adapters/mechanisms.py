"""The package's mechanisms, as the adapters call them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brainalign_kernels.adapters.sites import Attend
from brainalign_kernels.errors import ShapeError, UnsupportedError

__all__ = [
    "agent",
    "clear",
    "flow",
    "halo",
    "hip",
    "lightnet",
    "lightning",
    "linear",
    "neighborhood",
    "reversed_softmax",
    "sink",
    "softmax",
]


def softmax() -> Attend:
    """Return softmax attention."""
    from brainalign_kernels import softmax_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        return softmax_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)

    return attend


def sink(c: float) -> Attend:
    """Return softmax attention with one sink logit for all heads."""
    from brainalign_kernels import sink_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        logit = q.new_full((q.shape[1],), c)
        return sink_attention(q, k, v, logit, mask=mask, is_causal=is_causal, scale=scale)

    return attend


def neighborhood(size: int, dilation: int, stride: int) -> Attend:
    """Return neighborhood attention; dense where there are prefix tokens or a mask."""
    from brainalign_kernels import neighborhood_attention, neighborhood_mask, softmax_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        shape, prefix = _grid(q, k, shape, "neighborhood")
        mask, is_causal = _plain(mask, is_causal, q, k)
        causal = is_causal and len(shape) == 1
        window = {
            "kernel_size": size,
            "dilation": dilation,
            "stride": stride,
            "is_causal": causal,
        }
        if not prefix and mask is None and causal == is_causal:
            return neighborhood_attention(q, k, v, shape=shape, scale=scale, **window)
        allowed = _with_prefix(neighborhood_mask(shape, device=q.device, **window), prefix)
        allowed = _both(allowed, mask)
        return softmax_attention(q, k, v, mask=allowed, is_causal=is_causal, scale=scale)

    return attend


def halo(block: int, halo: int) -> Attend:
    """Return HaloNet's local attention; dense where there are prefix tokens."""
    from brainalign_kernels import halo_attention, softmax_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        shape, prefix = _grid(q, k, shape, "halo")
        if len(shape) != 2:
            raise UnsupportedError("halo needs rows and columns of image tokens.")
        _no_mask(mask, is_causal, q, k, "halo")
        options = {"shape": shape, "block_size": block, "halo_size": halo}
        if not prefix:
            return halo_attention(q, k, v, scale=scale, **options)
        # Equal logits give 1 / (keys in the window) to each key in it; the rest is zero padding,
        # which is one more key of logit log(padding) and value zero.
        tokens = math.prod(shape)
        zeros = q.new_zeros((1, 1, tokens, 1), dtype=torch.float32)
        eye = torch.eye(tokens, device=q.device)[None, None]
        inside = halo_attention(zeros, zeros, eye, **options)[0, 0] > 0
        padding = (block + 2 * halo) ** 2 - inside.sum(-1)
        allowed = _with_prefix(inside, prefix)[0, 0]
        bias = torch.zeros(allowed.shape, device=q.device).masked_fill(~allowed, -torch.inf)
        bias = torch.cat([bias, F.pad(padding.log(), (prefix, 0), value=-torch.inf)[:, None]], 1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return softmax_attention(q, k, v, mask=bias[None, None].to(q.dtype), scale=scale)

    return attend


def clear(radius: float) -> Attend:
    """Return CLEAR, tokens before the grid being its text; dense where there is a mask."""
    from brainalign_kernels import clear_attention, clear_mask, softmax_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        shape, prefix = _grid(q, k, shape, "clear")
        if len(shape) != 2:
            raise UnsupportedError("clear needs rows and columns of image tokens.")
        mask, is_causal = _plain(mask, is_causal, q, k)
        options = {"shape": shape, "n_text": prefix, "radius": radius}
        if mask is None and not is_causal:
            return clear_attention(q, k, v, scale=scale, **options)
        allowed = _both(clear_mask(**options, device=q.device)[None, None], mask)
        return softmax_attention(q, k, v, mask=allowed, is_causal=is_causal, scale=scale)

    return attend


def hip(k: int, block_q: int, block_k: int, window: int, sinks: int) -> Attend:
    """Return HiP attention, for causal layers."""
    from brainalign_kernels import hip_attention

    options = {"top_k": k, "block_size_q": block_q, "block_size_k": block_k}

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        _same_tokens(q, k, "hip")
        if not _causal(mask, is_causal, q, k, "hip"):
            raise UnsupportedError("hip is causal; this layer is not.")
        return hip_attention(q, k, v, scale=scale, window=window, sinks=sinks, **options)

    return attend


def agent(m: int, k_scale2: float, k_shortcut: float) -> Attend:
    """Return agent attention whose agents are queries pooled over the grid."""
    from brainalign_kernels import agent_attention

    side = math.isqrt(m)
    if side * side != m or m < 1:
        raise ShapeError(f"agent:m is {m}; expected a square, such as 49.")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        shape, prefix = _grid(q, k, shape, "agent")
        _no_mask(mask, is_causal, q, k, "agent")
        image = q[:, :, prefix:].transpose(-1, -2).flatten(0, 1)
        if len(shape) == 2:
            agents = F.adaptive_avg_pool2d(image.unflatten(-1, shape), side).flatten(-2)
        else:
            agents = F.adaptive_avg_pool1d(image, m)
        agents = agents.transpose(-1, -2).unflatten(0, q.shape[:2])
        return agent_attention(
            q, k, v, agents, scale=scale, k_scale2=k_scale2, k_shortcut=k_shortcut
        )

    return attend


def flow() -> Attend:
    """Return Flow-Attention, which has no scale."""
    from brainalign_kernels import flow_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        return flow_attention(q, k, v, is_causal=_causal(mask, is_causal, q, k, "flow"))

    return attend


def linear(eps: float) -> Attend:
    """Return normalised linear attention with feature map elu + 1."""
    from brainalign_kernels import linear_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        causal = _causal(mask, is_causal, q, k, "linear")
        return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, is_causal=causal, eps=eps)

    return attend


def lightnet() -> Attend:
    """Return LightNet attention with SiLU on the queries."""
    from brainalign_kernels import lightnet_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        causal = _causal(mask, is_causal, q, k, "lightnet")
        _same_tokens(q, k, "lightnet")
        out = lightnet_attention(q, k, v, is_causal=causal, activation="silu")
        assert isinstance(out, Tensor)
        return out

    return attend


def lightning(scale: float) -> Attend:
    """Return lightning attention with its slopes of one layer; both directions if not causal."""
    from brainalign_kernels import lightning_attention, lightning_slopes

    factor = scale

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        causal = _causal(mask, is_causal, q, k, "lightning")
        _same_tokens(q, k, "lightning")
        decay = -lightning_slopes(q.shape[1]).to(q.device)
        out = lightning_attention(q, k, v, decay, scale=factor)
        if causal:
            return out
        back = lightning_attention(q.flip(2), k.flip(2), v.flip(2), decay, scale=factor).flip(2)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return out + back - factor * (q * k).sum(-1, keepdim=True) * v

    return attend


def reversed_softmax() -> Attend:
    """Return reversed attention: each token sends its value to those that it attends to."""
    from brainalign_kernels import reversed_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, shape: Any, mask: Any, is_causal: bool, scale: Any
    ) -> Tensor:
        _same_tokens(q, k, "reversed")
        # Under a causal mask, values would flow from later tokens to earlier ones.
        _no_mask(mask, is_causal, q, k, "reversed")
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return reversed_attention(q, k, v, scale=scale)

    return attend


def _grid(q: Tensor, k: Tensor, shape: Any, name: str) -> tuple[tuple[int, ...], int]:
    """Return the grid and the number of tokens before it; one axis where there is no grid."""
    _same_tokens(q, k, name)
    if shape is None:
        return (q.shape[2],), 0
    return tuple(shape), q.shape[2] - math.prod(shape)


def _same_tokens(q: Tensor, k: Tensor, name: str) -> None:
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError(
            f"{name} needs queries and keys of the same tokens; there are {q.shape[2]} and "
            f"{k.shape[2]} (a cache? pass use_cache=False)."
        )


def _with_prefix(allowed: Tensor, prefix: int) -> Tensor:
    """Tokens before the grid see, and are seen by, all."""
    return F.pad(allowed, (prefix, 0, prefix, 0), value=True)[None, None]


def _both(allowed: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.expand(*mask.shape[:2], *allowed.shape[2:]).masked_fill(~allowed, -torch.inf)


def _plain(
    mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor
) -> tuple[Tensor | None, bool]:
    """Without a mask that forbids nothing, or that only forbids the future."""
    if mask is None:
        return None, is_causal
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype != torch.bool and not bool(((mask == 0) | ~seen).all()):
        return mask, is_causal
    if bool(seen.all()):
        return None, is_causal
    past = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
    if seen.shape[-2:] == past.shape and bool((seen == past).all()):
        return None, True
    return mask, is_causal


def _causal(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, name: str) -> bool:
    mask, is_causal = _plain(mask, is_causal, q, k)
    if mask is not None:
        raise UnsupportedError(
            f"{name} takes no mask but a causal one; this layer has one (padded text, or a "
            "position bias). Name layers without it."
        )
    return is_causal


def _no_mask(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, name: str) -> None:
    if _causal(mask, is_causal, q, k, name):
        raise UnsupportedError(f"{name} is not causal; this layer is.")
