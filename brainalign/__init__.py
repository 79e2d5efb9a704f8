"""How well a model's inner features explain a brain, and what a piece of brain stands for.

The rooms (`data`, `features`, `evaluation`, `linear`, `encoding`, `decoding`, `report`) load on
first use.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = ("data", "features", "evaluation", "linear", "encoding", "decoding", "report", "errors")

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return import_module(f"brainalign.{name}")
    raise AttributeError(f"module 'brainalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
