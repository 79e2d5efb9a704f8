"""Attention of modules that call PyTorch's scaled_dot_product_attention: timm, open_clip, torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from brainalign_kernels.adapters.sites import Attend, Site
from brainalign_kernels.errors import UnsupportedError

__all__ = ["Intercept", "is_attention", "multi_head_attention", "swap"]

#: Flags by which modules of timm and open_clip choose PyTorch's function.
_FLAGS = ("fused_attn", "use_fsdpa")
#: Where a module that is swapped says so.
_MARK = "_brainalign_swapped"


class Intercept(TorchFunctionMode):
    """Inside this block, scaled_dot_product_attention is `attention` at `site`."""

    def __init__(self, site: Site, attention: Attend) -> None:
        super().__init__()
        self.site, self.attention = site, attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise UnsupportedError(f"{self.site.name!r} drops attention weights: use model.eval().")
        return self.site.attend(
            self.attention, query, key, value, mask=attn_mask, is_causal=is_causal, scale=scale
        )


def is_attention(module: nn.Module) -> bool:
    """Whether this adapter can swap the attention that `module` computes."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return any(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS)


def swap(site: Site, attention: Attend) -> Callable[[], None]:
    """Replace the attention of one module; the result undoes it."""
    module = site.module
    if _MARK in module.__dict__:
        raise UnsupportedError(f"{site.name!r} is swapped already: restore it first.")
    if getattr(module, "logit_scale", None) is not None:
        raise UnsupportedError(
            f"{site.name!r} has scaled cosine attention, which cannot be swapped."
        )
    before = {name: module.__dict__[name] for name in ("forward",) if name in module.__dict__}
    flags = {flag: getattr(module, flag) for flag in _FLAGS if hasattr(module, flag)}
    forward = module.forward

    def intercepted(*args: Any, **kwargs: Any) -> Any:
        calls = site.calls
        with Intercept(site, attention):
            out = forward(*args, **kwargs)
        if site.calls == calls:
            raise UnsupportedError(
                f"{site.name!r} ({type(module).__name__}) did not call PyTorch's "
                "scaled_dot_product_attention, so its attention cannot be swapped."
            )
        return out

    def multi_head(*args: Any, **kwargs: Any) -> Any:
        return multi_head_attention(site, attention, *args, **kwargs)

    new = multi_head if isinstance(module, nn.MultiheadAttention) else intercepted
    module.__dict__["forward"] = new
    module.__dict__[_MARK] = True
    for flag in flags:
        setattr(module, flag, True)
    # PyTorch's encoder layers have a fused path around this module, unless it has a hook.
    hook = module.register_forward_hook(lambda module, args, output: None)

    def restore() -> None:
        hook.remove()
        del module.__dict__["forward"], module.__dict__[_MARK]
        module.__dict__.update(before)
        for flag, value in flags.items():
            setattr(module, flag, value)

    return restore


def multi_head_attention(
    site: Site,
    attention: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Forward pass of ``nn.MultiheadAttention``, projections as they are."""
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    if need_weights:
        raise UnsupportedError(
            f"{site.name!r}: a swapped layer gives no weights: need_weights=False."
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedError(f"{site.name!r}: bias_kv and add_zero_attn cannot be swapped.")
    if module.training and module.dropout:
        raise UnsupportedError(f"{site.name!r} drops attention weights: use model.eval().")
    if query.is_nested:
        raise UnsupportedError(
            f"{site.name!r} gets nested tensors: build the encoder with enable_nested_tensor=False."
        )
    single = query.ndim == 2
    if single:
        query, key, value = (
            x.unsqueeze(0 if module.batch_first else 1) for x in (query, key, value)
        )
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    batch, tokens, width = query.shape
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = _merge_masks(attn_mask, key_padding_mask, batch, module.num_heads)
    # PyTorch takes is_causal as a hint about attn_mask, which must be given with it.
    out = site.attend(attention, q, k, v, mask=mask)
    out = module.out_proj(out.transpose(1, 2).reshape(batch, tokens, width))
    if not module.batch_first:
        out = out.transpose(0, 1)
    return (out.squeeze(0 if module.batch_first else 1) if single else out), None


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int
) -> Tensor | None:
    """One mask that broadcasts to (B, H, N, S); in PyTorch's module, True means masked."""
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (batch, heads))
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, -1)
    masks = [m for m in (attn_mask, padding) if m is not None]
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        merged = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~merged
    floats = [
        torch.zeros_like(m, dtype=torch.float32).masked_fill(m, -torch.inf)
        if m.dtype == torch.bool
        else m
        for m in masks
    ]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]
