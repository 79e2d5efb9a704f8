"""Attention of transformers' models, through its AttentionInterface."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn

from brainalign_kernels.adapters import mechanisms
from brainalign_kernels.adapters.sites import Attend, Site
from brainalign_kernels.errors import UnsupportedError

__all__ = ["is_attention", "is_model", "swap"]

PREFIX = "brainalign_kernels_"
_numbers = count()


def is_model(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    return _has_base(type(model), "transformers", "PreTrainedModel")


def is_attention(module: nn.Module) -> bool:
    """Whether its forward pass asks the AttentionInterface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def swap(model: Any, pairs: Sequence[tuple[Site, Attend]]) -> Callable[[], None]:
    """Replace the attention at some sites, all others stay; the result undoes it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = list(_configs(model))
    if any(str(name).startswith(PREFIX) for _, name in before):
        raise UnsupportedError("This model's attention is swapped already: restore it first.")
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{type(model).__name__} does not use transformers' AttentionInterface."
        )
    chosen = {id(site.module): (site, attention) for site, attention in pairs}
    stays = mechanisms.softmax()
    name = f"{PREFIX}{next(_numbers)}"

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        site, run = chosen.get(id(module)) or (Site("a layer that stays", module), stays)
        for option in ("softcap", "s_aux"):
            if options.get(option) is not None:
                raise UnsupportedError(f"{site.name!r}: {option} cannot be swapped.")
        if dropout:
            raise UnsupportedError(f"{site.name!r} drops attention weights: use model.eval().")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = attention_mask
        if position_bias is not None:
            mask = _add_bias(mask, position_bias[..., : key.shape[2]])
        out = site.attend(run, query, key, value, mask=mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)

    def restore() -> None:
        # Setting a configuration also sets those inside it, which come after it in the list.
        for config, implementation in before:
            config._attn_implementation = implementation
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)

    try:
        model.set_attn_implementation(name)
    except BaseException:
        restore()
        raise
    return restore


def _configs(model: nn.Module) -> Iterator[tuple[Any, str | None]]:
    """Every configuration that modules of `model` look into, outer ones first."""
    seen: set[int] = set()

    def walk(config: Any) -> Iterator[tuple[Any, str | None]]:
        if id(config) in seen:
            return
        seen.add(id(config))
        yield config, config._attn_implementation
        for key in getattr(config, "sub_configs", {}):
            if getattr(config, key, None) is not None:
                yield from walk(getattr(config, key))

    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            yield from walk(config)


def _add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if not mask.is_floating_point():
        return bias.masked_fill(~mask, -float("inf"))
    return bias + mask


def _has_base(kind: type, package: str, name: str) -> bool:
    """Whether a class of `package` called `name` is among the bases, without importing it."""
    return any(b.__name__ == name and b.__module__.split(".")[0] == package for b in kind.__mro__)
