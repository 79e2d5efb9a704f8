"""What a piece of cortex stands for, in words."""

from importlib import import_module
from typing import Any

_HOME = {
    "DRAWS": "projection",
    "TEMPERATURE": "projection",
    "build_library": "projection",
    "draw_of": "projection",
    "embedding_weights": "projection",
    "project": "projection",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
