"""Attention mechanisms behind one interface: exact references, fast paths, adapters and probes.

Every function takes q (B, H, N, D), k (B, H, S, D), v (B, H, S, E) as PyTorch's
``scaled_dot_product_attention`` does, and ``impl="auto" | "reference" | "compiled" | "triton"``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Public name: the module that has it, loaded when it is first asked for.
_WHERE = {
    "ShapeError": "errors",
    "UnsupportedError": "errors",
    "count_calls": "_dispatch",
    "softmax_attention": "softmax",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
