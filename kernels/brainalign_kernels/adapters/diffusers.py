"""Attention of diffusers' models, through attention processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from brainalign_kernels.adapters.intercept import Intercept
from brainalign_kernels.adapters.sites import Attend, Grid, Site
from brainalign_kernels.errors import UnsupportedError

__all__ = ["find_sites", "is_model", "swap"]


class Processor:
    """The processor that was there, with another attention inside it."""

    def __init__(self, inner: Any, site: Site, attention: Attend) -> None:
        self.inner, self.site, self.attention = inner, site, attention
        # diffusers looks at the signature to know which arguments a processor takes.
        self.__dict__["__call__"] = _with_signature(self, inspect.signature(inner.__call__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = self.site.calls
        with Intercept(self.site, self.attention):
            out = self.inner(*args, **kwargs)
        if self.site.calls == calls:
            raise UnsupportedError(
                f"The processor {type(self.inner).__name__} at {self.site.name!r} does not call "
                "PyTorch's scaled_dot_product_attention: set AttnProcessor2_0 before."
            )
        return out


def _with_signature(processor: Processor, signature: inspect.Signature) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return type(processor).__call__(processor, *args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def is_model(model: nn.Module) -> bool:
    """Whether it has attention processors that can be set."""
    return hasattr(model, "attn_processors") and hasattr(model, "set_attn_processor")


def find_sites(model: Any) -> list[Site]:
    """Return the attention layers in the model's order."""
    modules = dict(model.named_modules())
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    grids = {n: Grid(m, before=True) for n, m in modules.items() if _has_map(m)}
    sites = []
    for name in names:
        outer = max((n for n in grids if name.startswith(f"{n}.")), key=len, default=None)
        module = modules[name]
        cross = bool(getattr(module, "is_cross_attention", False))
        sites.append(Site(name, module, None if outer is None else grids[outer], cross))
    return sites


def _has_map(module: nn.Module) -> bool:
    """Whether its first input is a map (B, C, rows, columns) whose positions are the tokens."""
    return type(module).__name__ == "Transformer2DModel" and getattr(
        module, "is_input_continuous", False
    )


def swap(model: Any, pairs: Sequence[tuple[Site, Attend]]) -> Callable[[], None]:
    """Replace the attention at some sites, all others stay; the result undoes it."""
    before = dict(model.attn_processors)
    if any(isinstance(p, Processor) for p in before.values()):
        raise UnsupportedError("This model's attention is swapped already: restore it first.")
    chosen = {f"{site.name}.processor": (site, attention) for site, attention in pairs}
    model.set_attn_processor(
        {
            key: Processor(inner, *chosen[key]) if key in chosen else inner
            for key, inner in before.items()
        }
    )

    def restore() -> None:
        model.set_attn_processor(dict(before))

    return restore
