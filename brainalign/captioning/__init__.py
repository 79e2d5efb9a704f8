"""What a piece of cortex stands for, in words."""

from importlib import import_module
from typing import Any

_HOME = {
    "Captioner": "captioner",
    "ClipCap": "captioner",
    "DRAWS": "projection",
    "TEMPERATURE": "projection",
    "VisionLanguageCaptioner": "captioner",
    "beam_search": "captioner",
    "build_library": "projection",
    "draw_of": "projection",
    "embedding_weights": "projection",
    "load_captioner": "captioner",
    "project": "projection",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
